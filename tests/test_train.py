"""The training loop: that it resumes exactly, that processes share a batch, and what it says to bad input."""

import collections
import copy
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from unittest import mock

import bench
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sample import movie
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

import anyflow
import sample
import train
from full import checkpoint, folders, lora, parallel, plan, prepare
from full.compile import what_needs_less
from full.data import Shards, preset
from full.files import STAGES, WEIGHTS, provenance
from full.options import check, expected, option
from full.parallel import adapt, assemble, mesh_of_nodes, start_processes, trained
from full.pixels import read_video
from model import Wan
from toy.video import write_shards
from toy.world import WORLDS, ExactTeacher, World, parse_prompt

ROOT = Path(__file__).parents[1]
BRIEF = ["--batch", "8", "--lr", "1e-3", "--warmup", "0"]
TWICE = ["--steps", "4", "--save-every", "2"]


def run(*args):
    train.main([str(arg) for arg in args])


def weights(folder):
    return load_file(folder / WEIGHTS)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A few steps of every stage, bidirectional and causal: {name: folder}."""
    folder = tmp_path_factory.mktemp("story")
    names = {name: folder / name for name in ("teacher", "forward", "anyflow", "consistency", "rcm")}
    names |= {f"causal-{name}": folder / f"causal-{name}" for name in names}
    for family, name in (("", "tiny"), ("causal-", "tiny-causal")):
        teacher, forward, anyflow, consistency, rcm = (names[family + stage] for stage in NAMES[:5])
        options = ["--preset", name, *TWICE, *BRIEF]
        judge = ["--judge", names["teacher"]] if family else []
        run("teacher", *options, "--out", teacher)
        run("flowmap", *options, "--out", forward, "--init", teacher)
        run("consistency", *options, "--out", consistency, "--init", teacher)
        run("onpolicy", *options, "--out", anyflow, "--init", forward, "--teacher", teacher, *judge)
        rollout = ["--rollout", "consistency", "--teacher", teacher, *judge]
        run("onpolicy", *options, "--out", rcm, "--init", consistency, *rollout)
    return names


NAMES = ["teacher", "forward", "anyflow", "consistency", "rcm"]
NAMES += [f"causal-{name}" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_trains_and_leaves_a_model(story, name):
    """Weights moved from where they started, and the folder opens."""
    made = weights(story[name])
    settings = json.loads((story[name] / "anyflow.json").read_text())
    start = weights(Path(settings["init"])) if settings["init"] else {}
    moved = [key for key, value in made.items() if key in start and not torch.equal(value, start[key])]
    assert not start or len(moved) > 0.8 * len(start)
    assert len(losses(story[name])) == 4 and (story[name] / "losses.png").exists()
    kind = "causal" if name.startswith("causal-") else "teacher" if name == "teacher" else "anyflow"
    assert Wan.from_pretrained(story[name]).config.kind == kind


def test_time_embedders_stay_blind_to_fast_sinusoids(tmp_path):
    """Also from weights that were not: the columns are zero after some steps, and a central difference at the
    published eps is the exact derivative to 3 %; of those weights before it is off by a third or more."""
    forward, teacher = (ROOT / f"toy/weights/bidirectional-{name}" for name in ("anyflow-forward", "teacher"))
    seeing, kept = Wan.from_pretrained(forward, dtype=torch.float32), tmp_path / "seeing"
    torch.manual_seed(0)
    for embedder in (seeing.condition_embedder.time_embedder, seeing.condition_embedder.delta_embedder):
        fast = (1000 * seeing.condition_embedder.frequencies() > 20).repeat(2)
        w = embedder.linear_1.weight.data
        w[:, fast] = w[:, ~fast].std() * torch.randn_like(w[:, fast])
    seeing.save_pretrained(kept)
    run("flowmap", "--preset", "tiny", "--init", kept, "--teacher", teacher, "--steps", "5",
        "--lr", "1e-3", "--warmup", "0", "--batch", "4", "--out", tmp_path / "out")
    error = []
    for folder in (kept, tmp_path / "out"):
        net = Wan.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        fast = (1000 * net.condition_embedder.frequencies() > 20).repeat(2)
        for embedder in (net.condition_embedder.time_embedder, net.condition_embedder.delta_embedder):
            w = embedder.linear_1.weight
            assert (w[:, fast] == 0).all() == (folder != kept) and (w[:, ~fast] != 0).any()
        torch.manual_seed(0)
        x, text = WORLDS["stars"].batch(range(8), 1)
        noise = torch.randn_like(x)
        t, r = torch.linspace(0.2, 0.9, 8), torch.linspace(0.1, 0.6, 8)
        at = anyflow.interpolate(x, noise, t), noise - x, t, r, text
        exact = bench.exact(net, *at)
        error.append((anyflow.central_difference(net, *at[:4], text=text) - exact).norm() / exact.norm())
    assert error[0] > 0.3 and error[1] < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_log_holds_the_errors_of_anchors_and_of_jumps(story, name):
    """Apart and before weight and balance: what the balanced loss itself hides."""
    stage = name.removeprefix("causal-")
    on_policy, off_policy = {"dmd", "fake"}, {"anchors", "jumps"}
    more = {"forward": off_policy, "anyflow": off_policy | on_policy, "rcm": on_policy}.get(stage, set())
    for row in losses(story[name]):
        assert row.keys() - {"whole"} == {"step", "loss", "norm", "lr"} | more
        assert all(math.isfinite(value) and value >= 0 for value in row.values())


@pytest.mark.parametrize("stage", ["flowmap", "onpolicy"])
def test_numbers_drawn_beside_a_run_change_nothing(story, stage, tmp_path, monkeypatch):
    """Of torch's global generator, as by a process that does a little more than the others: bit for bit."""
    start = story["teacher" if stage == "flowmap" else "forward"]
    options = [stage, "--preset", "tiny", "--init", start, "--teacher", story["teacher"]]
    options += ["--steps", "2", *BRIEF]
    run(*options, "--out", tmp_path / "alone")
    batch, drawn = train.Clips.batch, []

    def beside(*args):
        drawn.append(torch.rand(1))
        made = batch(*args)
        drawn.append(torch.rand(1))
        return made

    monkeypatch.setattr(train.Clips, "batch", beside)
    run(*options, "--out", tmp_path / "beside")
    made, wanted = weights(tmp_path / "beside"), weights(tmp_path / "alone")
    assert len(drawn) == 4 and all(torch.equal(made[key], wanted[key]) for key in wanted)
    assert losses(tmp_path / "beside") == losses(tmp_path / "alone")


@pytest.mark.parametrize("name", ["anyflow", "causal-rcm"])
def test_resume_is_bit_exact(story, name, tmp_path):
    """A run cut back to its first checkpoint goes on to the same weights and the same log, bit for bit."""
    folder = tmp_path / "cut"
    shutil.copytree(story[name], folder)
    shutil.rmtree(folder / "checkpoints" / "step-0000004")
    (folder / WEIGHTS).unlink()
    settings = json.loads((folder / "anyflow.json").read_text())
    options = [*TWICE, *BRIEF, "--rollout", settings["rollout"]]
    for key in ("init", "teacher", "judge"):
        options += [f"--{key}", settings[key]] if settings[key] else []
    run(settings["stage"], "--preset", settings["preset"], "--out", folder, "--resume", *options)
    made, wanted = weights(folder), weights(story[name])
    assert all(torch.equal(made[key], wanted[key]) for key in wanted)
    assert losses(folder) == losses(story[name])


@pytest.mark.parametrize("stage", STAGES)
def test_options_that_a_stage_does_not_read_are_told_and_change_nothing(story, stage, tmp_path, capsys):
    others = {"guidance": 2, "target": "data", "weight": "paper", "teacher_steps": 3, "rollout_steps": "3,5",
              "recompute_rollout": "true", "dmd": 3, "fake_lr": 1, "eps": 0.1, "diffusion": 0.1,
              "endpoint": 0.7, "balance": "false", "data_anchors": "false", "dmd_guidance": 3,
              "own_times": 0.3}
    assert set().union(*folders.UNREAD.values()) <= {field.name for field in fields(train.Recipe)}
    unread = {name: value for name, value in others.items() if name in folders.UNREAD[stage]}
    start = {"teacher": [], "onpolicy": ["--init", story["forward"], "--teacher", story["teacher"]]}
    options = [stage, "--preset", "tiny", *start.get(stage, ["--init", story["teacher"]])]
    options += ["--steps", "2", *BRIEF]
    run(*options, "--out", tmp_path / "out")
    assert "does not read" not in capsys.readouterr().err
    more = [word for name, value in unread.items() for word in (f"--{name.replace('_', '-')}", value)]
    run(*options, *more, "--out", tmp_path / "more")
    said = capsys.readouterr().err
    assert f"stage {stage} does not read" in said and all(word in said for word in more[::2])
    made, wanted = weights(tmp_path / "more"), weights(tmp_path / "out")
    assert all(torch.equal(made[key], wanted[key]) for key in wanted)


def test_the_log_is_written_line_by_line(tmp_path, monkeypatch):
    """So that a run that nobody's terminal shows can be followed."""
    seen, begin = [], train.Clips.has_whole_clips
    monkeypatch.setattr(train.Clips, "has_whole_clips", lambda *given: (
        seen.append((tmp_path / "log.jsonl").read_text().count("\n")) or begin(*given)))
    run("teacher", "--preset", "tiny", "--steps", "3", *BRIEF, "--out", tmp_path)
    assert seen == [0, 1, 2]


@pytest.fixture
def alone(monkeypatch):
    """The environment of a process of its own: half of the machine's threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_killed_run_resumes_from_its_newest_checkpoint(tmp_path, alone):
    """SIGKILL at any instant: what is named a checkpoint is whole, and the run ends as if never killed."""
    options = ["teacher", "--preset", "tiny", "--steps", "12", "--save-every", "1", *BRIEF, "--batch", "4"]
    command = [sys.executable, "train.py", *options, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list((tmp_path / "killed").glob("checkpoints/step-*")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / WEIGHTS).exists()
    run(*options, "--out", tmp_path / "killed", "--resume")
    run(*options, "--out", tmp_path / "whole")
    made, wanted = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all((made[key] - wanted[key]).abs().max() < 1e-6 for key in wanted)  # one thread there, two here
    assert len(losses(tmp_path / "killed")) == 12


def torchrun(*args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["train.py", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["flowmap", "onpolicy"])
def test_two_processes_are_one(story, stage, tmp_path, alone):
    """FSDP on two processes: losses and weights of one (1e-5). A batch of two leaves each process one sample,
    so that one of them has no jump to differentiate, or none at r = t to balance by."""
    if stage == "flowmap":
        options = ["--preset", "tiny", "--init", story["teacher"], "--target", "data", "--guidance", "3"]
        options += ["--balance", "true", "--steps", "3", *BRIEF, "--batch", "2"]
    else:
        options = ["--preset", "tiny-causal", "--init", story["causal-forward"], "--steps", "3", *BRIEF]
        options += ["--teacher", story["causal-teacher"], "--judge", story["teacher"]]
        options += ["--recompute-rollout", "true", "--checkpointing", "full", "--fake-samples", "fresh"]
    options = [stage, *options]
    run(*options, "--out", tmp_path / "one")
    torchrun(*options, "--out", tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all((one[key] - two[key]).abs().max() < 1e-5 for key in one)
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two")):
        assert a.keys() == b.keys() and all(abs(a[key] - b[key]) < 1e-5 * max(1, abs(a[key])) for key in a)


@pytest.mark.slow
def test_checkpoint_of_two_processes_resumes_in_one(story, tmp_path, alone):
    options = ["flowmap", "--preset", "tiny", "--init", story["teacher"], *TWICE, *BRIEF]
    torchrun(*options, "--out", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-0000004")
    whole = weights(tmp_path / "two")
    run(*options, "--out", tmp_path / "two", "--resume")
    assert all((whole[key] - value).abs().max() < 1e-5 for key, value in weights(tmp_path / "two").items())


def test_accumulated_rollouts_are_a_larger_batch(story, tmp_path):
    options = ["onpolicy", "--preset", "tiny", "--init", story["forward"], "--teacher", story["teacher"]]
    options += ["--steps", "2", "--balance", "false", *BRIEF]
    run(*options, "--out", tmp_path / "one")
    run(*options, "--out", tmp_path / "two", "--accumulate", "2")
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two")):
        assert all(abs(a[key] - b[key]) < 1e-5 for key in a)


def test_bfloat16_folder_trains_in_float32(story, tmp_path):
    """Small steps on bfloat16 weights would be rounded away."""
    Wan.from_pretrained(story["teacher"], dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    options = ["flowmap", "--preset", "tiny", "--steps", "2", *BRIEF, "--lr", "1e-6"]
    run(*options, "--init", tmp_path / "half", "--out", tmp_path / "out")
    made, start = weights(tmp_path / "out"), weights(tmp_path / "half")
    assert made["proj_out.weight"].dtype == torch.float32
    assert not torch.equal(made["proj_out.weight"], start["proj_out.weight"].float())


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_is_a_larger_batch(story, parts, tmp_path):
    """Eight clips in micro-batches, balanced by the anchors of all, have the gradients of one batch: losses,
    norms and weights."""
    options = ["flowmap", "--preset", "tiny-causal", "--init", story["causal-teacher"], "--steps", "3"]
    options += ["--guidance", "3", "--target", "data", *BRIEF]
    run(*options, "--out", tmp_path / "one")
    run(*options, "--out", tmp_path / "parts", "--accumulate", parts)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "parts")
    assert all((one[key] - two[key]).abs().max() < 1e-5 for key in one)
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "parts")):
        assert all(abs(a[key] - b[key]) < 1e-5 * max(1, abs(a[key])) for key in a)


def gradients_of_a_rollout(kind, judge="teacher", **changes):
    """x_hat and the gradient of a random linear function of it, by a student of random weights."""
    config, shape = preset("tiny-causal" if kind == "causal" else "tiny")
    torch.manual_seed(0)
    student, judge = Wan(config), Wan(replace(config, kind=judge, num_layers=1))
    recipe = train.recipe_of("tiny", "onpolicy", dict(batch=2, rollout_steps=(4,)) | changes)
    student.checkpointing = recipe.checkpointing
    clips = train.Clips(World(), recipe, config, shape, torch.device("cpu"), 3)
    x_hat = clips.rollout(student, judge, clips.batch(0, 0))[0]
    direction = torch.randn(x_hat.shape, generator=torch.Generator().manual_seed(1))
    (x_hat * direction).sum().backward()
    clips.go_back()
    return x_hat.detach(), [torch.zeros(1) if p.grad is None else p.grad for p in student.parameters()]


@pytest.mark.parametrize("kind, judge", [("anyflow", "teacher"), ("causal", "teacher"), ("causal", "causal")])
@pytest.mark.parametrize("changes", [{}, dict(checkpointing="full"), dict(checkpointing="selective"),
                                     dict(rollout="consistency")], ids=str)
def test_a_rollout_made_again_jump_by_jump_has_the_same_gradients(kind, judge, changes):
    """Chunks with a cache made again, over blocks that recompute too."""
    simulation = {key: value for key, value in changes.items() if key == "rollout"}
    x, kept = gradients_of_a_rollout(kind, judge, recompute_rollout=False, **simulation)
    y, again = gradients_of_a_rollout(kind, judge, recompute_rollout=True, **changes)
    assert torch.equal(x, y)
    assert all((a - b).norm() <= 1e-6 * a.norm() for a, b in zip(kept, again))


@pytest.mark.parametrize("judge, judged", [("teacher", 5), ("causal", 3)])
def test_gradient_through_some_chunks_is_in_the_mean_that_through_all(judge, judged, monkeypatch):
    """Over all choices of two of the judged chunks: their mean is the whole gradient, each has x_hat itself.
    A causal judge sees the last three of five."""
    monkeypatch.setattr(train.Clips, "draw_chunks", lambda *args: 5)
    x, whole = gradients_of_a_rollout("causal", judge)
    chosen, total = [*itertools.combinations(range(judged), 2)], 0
    for pair in chosen:
        order = torch.tensor([*pair, *({*range(judged)} - {*pair})])
        monkeypatch.setattr(train.torch, "randperm", lambda n, generator, order=order: order[:n])
        y, part = gradients_of_a_rollout("causal", judge, grad_chunks=2, recompute_rollout=True)
        assert torch.equal(x, y)
        part = [b / len(chosen) for b in part]
        total = [a + b for a, b in zip(total, part)] if total else part
    assert all((a - b).norm() <= 1e-5 * a.norm() for a, b in zip(whole, total))


def test_no_chunk_has_a_gradient_that_nobody_judges(monkeypatch):
    """A causal judge sees a clip's last three chunks. To go back through the others, too, adds nothing."""
    monkeypatch.setattr(train.Clips, "draw_chunks", lambda *args: 5)
    calls = []
    forward = Wan.forward
    monkeypatch.setattr(Wan, "forward", lambda *args, **cond: (
        calls.append(torch.is_grad_enabled()), forward(*args, **cond))[1])
    x, last = gradients_of_a_rollout("causal", "causal")
    assert calls.count(True) * 2 == calls.count(False) * 3
    by_chunk = train.Clips.chunk_by_chunk
    monkeypatch.setattr(train.Clips, "chunk_by_chunk", lambda *args: by_chunk(*args[:-1], 5))
    y, whole = gradients_of_a_rollout("causal", "causal")
    assert torch.equal(x, y)
    assert all((a - b).norm() <= 1e-6 * a.norm() for a, b in zip(whole, last))


@pytest.mark.slow
def test_plan_of_some_chunks_is_the_mean_over_all_choices():
    """FLOPs rise in a line with the number of chunks that have a gradient, up to those of all."""
    config, shape = preset("tiny-causal")
    config, flops = replace(config, chunk_partition=(1, 2, 3)), {}
    for k in (1, 2, 3, 0):
        recipe = train.recipe_of("tiny-causal", "onpolicy", dict(
            batch=2, target="data", rollout_steps=(1,), fake_steps=1, recompute_rollout=True, grad_chunks=k))
        options = dict(layers=1, steps=3 if k in (1, 2) else 1, place=(0, 1), chunks=3, text_length=4)
        steps = plan.steps_on_meta("onpolicy", recipe, config, (6, *shape[1:]), **options)
        flops[k] = sum(made for made, _ in steps) / len(steps)
    assert flops[1] < flops[2] < flops[3] == flops[0]
    assert flops[2] - flops[1] == pytest.approx(flops[3] - flops[2], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name, stage, checkpointing", [
    ("tiny-causal", "flowmap", "none"), ("tiny-causal", "flowmap", "full"),
    *(("tiny", stage, kept) for stage in ("flowmap", "onpolicy") for kept in ("none", "full", "selective"))])
def test_plan_is_what_a_step_takes(name, stage, checkpointing):
    """On the meta device as in a real step: FLOPs (1 %) and, by torch's profiler, peak memory (15 %); with
    rollout, derivative, LoRA and recomputation."""
    config, shape = preset(name)
    changes = dict(batch=8, target="data", lora=4, merge=True, rollout_steps=(8,), fake_samples="fresh",
                   recompute_rollout=checkpointing == "full")
    recipe = train.recipe_of(name, stage, changes | dict(checkpointing=checkpointing))
    runs = [plan.steps_on_meta(stage, recipe, config, shape, layers, text_length=4) for layers in (1, 2, 3)]
    flops, peak = plan.at_depth(config.num_layers, *runs)

    cpu = torch.device("cpu")
    nets = {name: Wan(net.config) for name, net in plan.networks_on_meta(stage, recipe, config).items()}
    for role, net in nets.items():
        adapt(stage, role, net, recipe)
    assemble(nets, recipe, cpu)
    made = checkpoint.Run(nets, {}, Path("none"), {})
    made.optimisers = {name: torch.optim.SGD(params.values()) for name, params in made.trained.items()}
    clips = train.Clips(World(), recipe, nets["student"].config, shape, cpu, seed=0)

    def step():
        made.step = 0
        list(train.train(stage, replace(recipe, steps=1), made, clips))

    with plan.Cost(nets.values(), "cpu") as cost:
        step()
    assert abs(flops / cost.flops - 1) < 0.01
    gradients = sum(4 * p.numel() for params in made.trained.values() for p in params.values())
    assert abs(peak / (bench.peak(step) - gradients) - 1) < 0.15


def test_plan_adds_up(monkeypatch, capsys):
    """What the command prints of a stage: seconds, GPU-days, and from how many GPUs it fits a card."""
    parts = {"weights": 64 * 2**30, "activations": 30 * 2**30}  # of each of 8 GPUs: 512 GiB in all
    monkeypatch.setattr(plan, "cost_of_training", lambda *args: (4e15, parts))
    monkeypatch.setattr(plan, "cost_of_sampling", lambda *args: (1e15, 2**30))
    plan.main("--preset wan-14b-causal --gpus 16 --tflops 1000 --utilisation 0.5 --steps 2700".split())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][1] == "14,288,491,584" and "14,317,342,784;" in lines[0]
    cost, memory = (line[1:] for line in lines if line[:1] == ["onpolicy"])
    assert cost == ["16", "2700", "4", "8", "4", "no", "no", "8"]
    assert memory[-3:] == ["30.00", "0.00", "94.00"]
    assert ["stages", "0,", "1", "and", "2", "together:", "12", "GPU-days"] in lines


@pytest.mark.parametrize("part", plan.PARTS)
def test_a_plan_fits_where_a_tenth_of_a_card_is_free(part):
    """Weights, gradients, optimiser and average are divided by the GPUs of a node, the rest is not."""
    gib, divided = 2.0**30, part in ("weights", "gradients", "optimiser", "average")
    least = lambda size, card: plan.least_gpus({part: size * gib}, 8, 8, card)
    assert least(21.5, 24) == (8 if divided else 1) and least(21.7, 24) == "no"
    assert least(5.3, 24) == (2 if divided else 1) and least(73, 80) == "no" and least(0.1, 24) == 1


@pytest.mark.parametrize("stage", ["flowmap", "onpolicy"])
@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("lora, share", [(0, True), (4, True), (4, False)])
def test_a_plans_memory_is_the_sum_over_weights(stage, dtype, size, lora, share):
    """Trained ones take 4 bytes, as much a gradient, twice as much AdamW, as much the student's average;
    frozen ones that of the work, once where they are shared; two blocks and all roots are gathered."""
    recipe = train.Recipe(dtype=dtype, lora=lora, share=share, target="teacher", merge=True)
    config = replace(preset("tiny")[0], num_layers=2)
    nets = plan.networks_on_meta(stage, recipe, config)
    count = lambda ps: sum(p.numel() for p in ps)
    learns = {role: count(p for p in net.parameters() if p.requires_grad) for role, net in nets.items()}
    frozen = {role: count(net.parameters()) - learns[role] for role, net in nets.items()}
    held = sum(frozen.values())
    if lora and share:  # one base for all; what only a student has beside
        held = frozen["teacher"] + frozen["student"] - count(
            p for name, p in nets["student"].named_parameters() if not p.requires_grad
            and name in nets["teacher"].state_dict())
    all_ = sum(learns.values())
    roots = sum(count(net.parameters()) - count(net.blocks.parameters()) for net in nets.values())
    blocks = max(count(net.blocks[0].parameters()) for net in nets.values())
    wanted = {"weights": 4 * all_ + size * held, "gradients": 4 * all_, "optimiser": 8 * all_,
              "average": 4 * learns["student"]}
    wanted = {key: value / 2 for key, value in wanted.items()} | {"gathered": size * (2 * blocks + roots)}
    assert plan.memory_of(nets, recipe, 2) == pytest.approx(wanted)


def planned(monkeypatch, cost):
    """`plan.cost_of_training` of small stages whose steps cost cost(stage, recipe, chunks, place) a layer."""
    asked = []

    def counted(stage, recipe, config, shape, layers, steps, place, chunks):
        asked.append((stage, steps))
        return steps * [(layers * cost(stage, recipe, chunks, place), [layers])]

    monkeypatch.setattr(plan, "steps_on_meta", counted)

    def flops(stage, name="tiny-causal", gpus=8, **changes):
        config, shape = preset(name)
        recipe = train.recipe_of("tiny", stage, dict(batch=8, bidirectional=0.0, target="data") | changes)
        return plan.cost_of_training(stage, recipe, config, shape, gpus)[0] / config.num_layers

    return flops, asked


def test_a_plan_is_a_mean_over_the_numbers_of_chunks_and_over_whole_clips(monkeypatch):
    """Half of the steps have three chunks, the others three to five; a share a whole clip beside."""
    flops, _ = planned(monkeypatch, lambda stage, recipe, chunks, place: chunks + 100 * recipe.bidirectional)
    assert flops("flowmap") == pytest.approx((3 + 4) / 2) == flops("teacher")
    for stage in ("teacher", "flowmap"):
        assert flops(stage, bidirectional=0.1) == pytest.approx(3.5 + 10)


def test_a_plan_of_one_clip_has_a_jump_in_as_many_steps_as_asked_for(monkeypatch):
    flops, _ = planned(monkeypatch, lambda stage, recipe, chunks, place: 10 * (place[0] + 1) / place[1])
    assert flops("flowmap", "tiny", 1, batch=1, diffusion=0.3) == pytest.approx(0.7 * 10 + 0.3 * 5)
    assert flops("flowmap", "tiny", 8, batch=8) == 10  # the GPU with most to do


@pytest.mark.parametrize("chunks, draws", [(0, 1), (2, 5), (5, 1)])
def test_a_plan_of_stage_two_is_a_step_of_stage_one_and_a_rollout_of_3_less_2_over_n_jumps(
        chunks, draws, monkeypatch):
    """The mean over draws of chunks that have a gradient."""
    cost = lambda stage, recipe, chunks, place: chunks + (stage == "onpolicy") * (
        50 if recipe.rollout_steps == (1,) else 150)
    flops, asked = planned(monkeypatch, cost)
    made = flops("onpolicy", rollout_steps=(2, 4, 16), fake_steps=1, grad_chunks=chunks)
    assert made == pytest.approx(3.5 + 50 * statistics.mean(3 - 2 / n for n in (2, 4, 16)))
    assert {steps for stage, steps in asked if stage == "onpolicy"} == {draws}


@pytest.mark.parametrize("options, batch", [
    ("--gpus 4", 16), ("--gpus 6 --gpus-per-node 2", 18), ("--gpus 6 --gpus-per-node 2 --accumulate 2", 24)])
def test_a_plan_has_a_clip_for_each_gpu_and_micro_batch(options, batch, monkeypatch, capsys):
    """At least the published batch; stage 0 is bidirectional; to sample takes whole weights in bfloat16."""
    asked, forms = [], []
    monkeypatch.setattr(plan, "cost_of_training", lambda stage, recipe, config, *_: (
        asked.append((stage, config.kind, recipe.batch)), (4e15, {"weights": 2**30}))[1])
    monkeypatch.setattr(plan, "cost_of_sampling", lambda *_: (1e15, 2**30))
    monkeypatch.setattr(plan, "networks_on_meta", lambda *_: {})
    monkeypatch.setattr(plan, "memory_of", lambda nets, recipe, shards: (
        forms.append((recipe.lora > 0, recipe.lora > 0 and recipe.share)), collections.Counter())[1])
    plan.main(f"--preset wan-14b-causal {options}".split())
    lines = capsys.readouterr().out.splitlines()
    assert "; 32,760 tokens" in lines[0]
    assert asked == [(stage, "anyflow" if stage == "teacher" else "causal", batch) for stage in STAGES]
    cost, memory = (line.split() for line in lines if line.startswith("clip, 4 calls"))
    assert cost[-3:] == ["no", "1", "1"] and memory[3] == "26.67"
    assert forms == [(False, False), (True, False), (True, True)]


def test_a_plan_is_for_whole_nodes():
    with pytest.raises(SystemExit, match="gpus are 12, expected a multiple of the 8 of a node"):
        plan.main("--preset tiny --gpus 12".split())


def test_a_plan_has_the_networks_of_a_stage_as_loras_on_one_base():
    """Judge and fake score as Wan is published, of one time; teachers that a stage 0 has trained."""
    config, recipe = preset("tiny-causal")[0], train.Recipe(lora=4, merge=False, target="teacher")
    nets = plan.networks_on_meta("onpolicy", recipe, config, 1)
    assert {role: net.config.kind for role, net in nets.items()} == {
        "student": "causal", "teacher": "causal", "judge": "teacher", "fake": "teacher"}
    assert all(any(".lora_" in name for name, _ in net.named_parameters()) for net in nets.values())
    made = plan.networks_on_meta("teacher", recipe, preset("tiny")[0], 1)["student"]
    assert made.config.kind == "teacher" and made.proj_out.weight.is_meta


@pytest.fixture(scope="module")
def adapted(story, tmp_path_factory):
    """A teacher of stage 0 and students of stage 1, each a LoRA of rank 4 on one raw model."""
    folder = tmp_path_factory.mktemp("adapted")
    for name in ("tiny", "tiny-causal"):
        options = ["--init", story["teacher"], "--steps", "4", "--lora", "4", "--target", "data", *BRIEF]
        run("flowmap", "--preset", name, *options, "--out", folder / name)
    run("teacher", "--preset", "tiny", *options[:6], *BRIEF, "--out", folder / "teacher")
    return folder


@pytest.mark.parametrize("kind", ["anyflow", "causal"])
def test_from_a_published_teacher_to_what_diffusers_opens(kind, tmp_path):
    """Both stages on a folder of diffusers, with LoRA on one base: diffusers opens all that they leave."""
    diffusers = pytest.importorskip("diffusers")
    name = "tiny-causal" if kind == "causal" else "tiny"
    teacher = replace(preset(name)[0], kind="teacher").to_dict()
    small = {key: value for key, value in teacher.items() if key[0] != "_"}
    diffusers.WanTransformer3DModel(**small).save_pretrained(tmp_path / "wan" / "transformer")
    wan = tmp_path / "wan"
    options = ["--preset", name, "--steps", "2", "--lora", "4", "--target", "data", *BRIEF]
    run("flowmap", *options, "--init", wan, "--out", tmp_path / "forward")
    run("onpolicy", *options, "--init", tmp_path / "forward", "--teacher", wan, "--out", tmp_path / "anyflow")
    names = {"anyflow": "AnyFlowTransformer3DModel", "causal": "AnyFlowFARTransformer3DModel"}
    network = getattr(diffusers, names[kind])
    reference, info = network.from_pretrained(tmp_path / "anyflow", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = Wan.from_pretrained(tmp_path / "anyflow")
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in reference.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name, processes", [("tiny", 1), ("tiny-causal", 2)])
def test_one_base_with_adapters_trains_as_three_models(story, adapted, name, processes, tmp_path):
    """Teacher, student and fake score as adapters of one network: losses and weights of three networks."""
    options = ["onpolicy", "--preset", name, "--init", adapted / name, "--teacher", adapted / "teacher"]
    options += ["--steps", "3", "--lora", "4", "--target", "data", "--fake-samples", "fresh", *BRIEF]
    run(*options, "--share", "false", "--out", tmp_path / "false")
    (torchrun if processes > 1 else run)(*options, "--share", "true", "--out", tmp_path / "true")
    for one, three in zip(losses(tmp_path / "true"), losses(tmp_path / "false")):
        assert all(abs(one[key] - three[key]) < 1e-5 * max(1, abs(three[key])) for key in three), (one, three)
    one, three = weights(tmp_path / "true"), weights(tmp_path / "false")
    assert all((one[key] - three[key]).abs().max() < 1e-4 for key in three)


def three_networks(args, lora=4):
    args = train.parse(["onpolicy", "--preset", "tiny", *map(str, args)])
    recipe = train.Recipe(lora=lora, dtype="float32", checkpointing="none", compile=False)
    make = folders.from_folders("onpolicy", recipe, args, preset("tiny")[0], False)
    nets = folders.networks("onpolicy", recipe, False, make)
    assemble(nets, recipe, torch.device("cpu"))
    return nets


def test_one_base_is_held_once(story, adapted):
    """Judge, fake score and student are LoRAs of raw weights, which lie in one memory; each computes what its
    folder does, the fake score what the judge does, and the student and fake score go on with those LoRAs."""
    nets = three_networks(["--init", adapted / "tiny", "--teacher", adapted / "teacher"])
    base, raw = dict(nets["judge"].named_parameters()), Wan.from_pretrained(story["teacher"]).state_dict()
    assert all(torch.equal(base[key], value) for key, value in raw.items())
    for name in ("student", "fake"):
        own = dict(nets[name].named_parameters())
        assert all(own[key] is base[key] and not own[key].requires_grad for key in raw), name
    z, text = torch.randn(2, 9, 3, 12, 12), torch.randn(2, 4, 32)
    for name, folder in (("student", "tiny"), ("judge", "teacher"), ("fake", "teacher")):
        wanted = Wan.from_pretrained(adapted / folder)(z, 0.7, 0.2, text)
        assert (nets[name](z, 0.7, 0.2, text) - wanted).abs().max() < 1e-5 * wanted.abs().max()
        stored = lora.read_adapter(adapted / folder)
        own = dict(nets[name].named_parameters())
        assert all(torch.equal(own[f"{key}.lora_up"], up) for key, (up, _) in stored.items())
        assert any("time_embedder" in key for key in stored) == (name == "student")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 48])
def test_changes_as_small_as_rounding_of_a_bfloat16_base_are_a_lora_only_at_its_rank(rank, dtype):
    config = replace(preset("tiny")[0], num_layers=1)
    base, net = Wan(config).bfloat16(), Wan(config)
    net.load_state_dict(base.state_dict())
    linears = lora.adapted(net)
    for linear in linears.values():
        p = linear.weight.data
        change = torch.randn(len(p), rank) @ torch.randn(rank, p.shape[1])
        p += (0.0037 if dtype == torch.bfloat16 else 1e-4) * p.norm() / change.norm() * change
    starts, whole = lora.unmerge(net.to(dtype), base.state_dict(), 4, {})
    assert (len(starts), whole) == ((len(linears), 0) if rank == 4 else (0, len(linears)))


def model_folder(path, kind="teacher", number=0.0, made=None, **changes):
    """A small network in a folder: its last bias is the number."""
    net = Wan(replace(preset("tiny")[0], num_layers=1, kind=kind, **changes))
    torch.nn.init.constant_(net.proj_out.bias, number)
    net.save_pretrained(path)
    if made is not None:
        (path / "anyflow.json").write_text(json.dumps(made))
    return path


def maker(stage, *given, baseline=False, causal=False, **changes):
    """`make` of `folders.networks` for a network of one layer."""
    name = "tiny-causal" if causal else "tiny"
    recipe = train.Recipe(**dict(lora=0, balance=False) | changes)
    config = replace(preset(name)[0], num_layers=1)
    args = train.parse([stage, "--preset", name, *map(str, given)])
    return folders.from_folders(stage, recipe, args, config, baseline)


@pytest.mark.parametrize("stage, baseline, starts", [
    ("teacher", False, ["teacher"]), ("flowmap", False, ["teacher", "flowmap", "onpolicy"]),
    ("onpolicy", False, ["flowmap", "onpolicy"]), ("onpolicy", True, ["consistency"]),
    ("consistency", True, ["teacher"])])
def test_a_student_starts_where_the_stage_before_ended_or_from_a_published_folder(
        stage, baseline, starts, tmp_path):
    """And no student is a teacher: it is of stage 0 or published, too."""
    folder = model_folder(tmp_path / "a", "teacher" if stage == "teacher" else "anyflow", 3.0)
    make = maker(stage, "--init", folder, "--teacher", folder, baseline=baseline)
    for made in (None, *STAGES):
        (folder / "anyflow.json").write_text(json.dumps({"stage": made} if made else {}))
        for role, fit in (("student", starts), ("teacher", ["teacher"])):
            if made in (None, *fit):
                assert (make(role).proj_out.bias == 3).all()
            else:
                with pytest.raises(ValueError, match=f"{folder} was made by stage {made}, expected "):
                    make(role)


def test_each_role_has_its_folder(tmp_path):
    """The judge's is by default the teacher's, the teacher's in stage 1 the student's own."""
    start, teacher, judge = (model_folder(tmp_path / str(i), number=i) for i in range(3))
    init, own = ["--init", start], ["--teacher", teacher, "--judge", judge]
    number = lambda make, role: make(role).proj_out.bias[0].item()
    for stage, given, wanted in (
            ("flowmap", init, dict(student=0, teacher=0)),
            ("flowmap", init + own[:2], dict(student=0, teacher=1)),
            ("onpolicy", init + own[:2], dict(student=0, teacher=1, judge=1, fake=1)),
            ("onpolicy", init + own, dict(student=0, teacher=1, judge=2, fake=2))):
        assert {role: number(maker(stage, *given), role) for role in wanted} == wanted
    for role in ("teacher", "judge", "fake"):
        with pytest.raises(ValueError, match="--teacher is missing, expected a model folder"):
            maker("onpolicy", *init)(role)


@pytest.mark.parametrize("stage, target, baseline, others", [
    ("teacher", "teacher", False, ""), ("flowmap", "data", False, ""),
    ("flowmap", "teacher", False, "teacher"), ("consistency", "data", True, "teacher"),
    ("onpolicy", "data", False, "judge fake"),
    ("onpolicy", "teacher", False, "teacher judge fake"), ("onpolicy", "data", True, "teacher judge fake")])
def test_a_stage_has_no_network_that_it_does_not_ask(stage, target, baseline, others):
    recipe = train.Recipe(target=target)
    made = folders.networks(stage, recipe, baseline, lambda role: f"{role} made")
    assert made == {role: f"{role} made" for role in ["student", *others.split()]}


@pytest.mark.parametrize("kind, causal, wanted", [("teacher", False, "teacher"), ("causal", False, "anyflow"),
                                                  ("anyflow", False, "anyflow"), ("teacher", True, "causal")])
def test_a_teacher_keeps_the_kind_of_its_folder_but_for_chunks(kind, causal, wanted, tmp_path):
    more = {key: getattr(preset("tiny-causal")[0], key) for key in folders.CAUSAL} if kind == "causal" else {}
    folder = model_folder(tmp_path / "a", kind, **more)
    assert maker("teacher", "--init", folder, causal=causal)("student").config.kind == wanted


def test_a_teacher_from_nothing_begins_as_the_zero_function():
    net, z = maker("teacher")("student"), torch.randn(1, 9, 3, 12, 12)
    assert net.config.kind == "teacher" and not net(z, 0.7, 0.7, torch.randn(1, 4, 32)).any()


def test_a_folder_of_another_architecture_is_told_but_for_the_longest_clip(tmp_path):
    folder = model_folder(tmp_path / "a", rope_max_seq_len=512)
    assert maker("teacher", "--init", folder)("student").config.rope_max_seq_len == 512
    for key, value in (("text_dim", 16), ("cross_attn_norm", False)):
        with pytest.raises(ValueError, match=f"--init .* has {key} {value}, expected .* as the preset"):
            maker("teacher", "--init", model_folder(tmp_path / key, **{key: value}))("student")


def test_the_base_of_a_lora_is_the_one_named_or_else_what_its_folder_says(tmp_path):
    """Or else the folder itself; none without LoRA, and none where earlier ones are merged."""
    raw, named, start = tmp_path / "raw", tmp_path / "named", model_folder(tmp_path / "a", made={})
    raw.mkdir(), named.mkdir()
    base = lambda base=None, init=start, **changes: folders.base_of(
        mock.Mock(init=init, base=base), train.Recipe(**dict(lora=4, merge=False) | changes))
    assert base() == str(start) and base(named) == str(named)
    (start / "anyflow.json").write_text(json.dumps({"base": str(raw)}))
    assert base() == str(raw) and base(named) == str(named)
    assert base(init=None) is base(lora=0) is base(merge=True) is None


def test_an_adapter_of_another_base_is_not_taken(tmp_path, monkeypatch):
    """The weights are taken apart anew."""
    raw, read = model_folder(tmp_path / "raw"), []
    folder = model_folder(tmp_path / "a", made={"stage": "teacher", "base": str(raw)})
    save_file({"x": torch.zeros(1)}, folder / lora.ADAPTER)
    monkeypatch.setattr(folders, "read_adapter", lambda path: read.append(path) or {})
    monkeypatch.setattr(folders, "unmerge", lambda *given: ({}, 0))
    for base in (raw, model_folder(tmp_path / "other")):
        options = ["--init", raw, "--teacher", folder, "--base", base]
        maker("onpolicy", *options, lora=4, merge=False)("judge")
    assert read == [folder]


@pytest.mark.parametrize("stage, preset_, changes, helps", [
    ("flowmap", "tiny-causal", dict(share=False, checkpointing="selective"),
     "--accumulate 2, --checkpointing full, --share true, "),
    ("flowmap", "tiny", dict(lora=0, accumulate=2, recompute_rollout=False), "--lora 256, "),
    ("onpolicy", "tiny", dict(recompute_rollout=False, accumulate=2), "--recompute-rollout true, "),
    ("onpolicy", "tiny-causal", dict(recompute_rollout=False, accumulate=2),
     "--recompute-rollout true, --grad-chunks 2, "),
    ("onpolicy", "tiny-causal", dict(recompute_rollout=False, accumulate=2, grad_chunks=3),
     "--recompute-rollout true, "),
    ("onpolicy", "tiny-causal", dict(accumulate=2), "")])
def test_less_memory_is_taken_by_what_a_run_does_not_use_yet(stage, preset_, changes, helps, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4"), monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    usual = dict(batch=8, lora=4, share=True, checkpointing="full", recompute_rollout=True, grad_chunks=0)
    said = what_needs_less(train.Recipe(**usual | changes), stage, preset_)
    plan_ = f"python -m full.plan --preset {preset_} --gpus 4 --gpus-per-node 2"
    assert said == f"It needs less with {helps}more GPUs; {plan_} says how much."


def test_nodes_of_unequal_size_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="there are 3 processes, expected as many on each node, 2"):
        mesh_of_nodes("cpu")


@pytest.fixture
def third_of_eight():
    """This process as one of eight that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=2, world_size=8)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("node, names, rows", [
    ("2", ("replicate", "shard"), [[0, 1], [2, 3], [4, 5], [6, 7]]), ("8", None, [*range(8)])])
def test_nodes_hold_copies_of_what_their_processes_share(third_of_eight, node, names, rows, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", node)
    mesh = mesh_of_nodes("cpu")
    assert mesh.mesh_dim_names == names and mesh.mesh.tolist() == rows
    assert parallel.place() == (2, 8) and not parallel.main_process()


def test_each_process_waits_for_those_of_its_group(third_of_eight, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.distributed, "barrier", waited.append)
    parallel.wait_for_all(), parallel.wait_for_all("some")
    assert waited == [None, "some"]


def test_means_are_over_all_values_of_micro_batches_and_processes(monkeypatch):
    means = parallel.Means()
    means.add("a", torch.tensor([1.0, 2.0, 3.0])), means.add("b", torch.tensor([]))
    means.add("a", torch.tensor([6.0])), means.add("b", torch.tensor([]))
    assert means.read() == {"a": 3.0}
    other = torch.tensor([[8.0, 1.0], [10.0, 4.0]])  # sums and counts of another process
    monkeypatch.setattr(anyflow, "sum_over_processes", lambda x: x + other)
    assert means.read() == {"a": 4.0, "b": 2.5}


@pytest.mark.parametrize("rank", [0, 4])
def test_clipping_leaves_blind_what_is_and_returns_the_norm_of_the_rest(rank):
    """Weights and gradients of fast sinusoids are zero, before the norm is taken, and nothing else is."""
    net = Wan(replace(preset("tiny")[0], num_layers=1))
    net = lora.add_lora(net, rank) if rank else net
    weights, norms = trained(net), []
    fast = (1000 * net.condition_embedder.frequencies() > 20).repeat(2)
    first = "lora_down" if rank else "weight"
    blind = [f"condition_embedder.{which}_embedder.linear_1.{first}" for which in ("time", "delta")]
    for name, p in weights.items():
        p.data, p.grad = torch.ones_like(p), torch.randn_like(p)
        norms.append((p.grad[:, ~fast] if name in blind else p.grad).norm())
    norm = parallel.clip_norm(net, weights, train.Recipe(fastest=20.0, clip=0.5))
    assert norm == pytest.approx(torch.stack(norms).norm().item())
    assert torch.stack([p.grad.norm() for p in weights.values()]).norm().item() == pytest.approx(0.5)
    for name, p in weights.items():
        zero = torch.zeros_like(p, dtype=bool)
        zero[..., fast if name in blind else []] = True
        assert torch.equal(p == 0, zero) and torch.equal(p.grad == 0, zero)


@pytest.mark.parametrize("stage, role, whose", [
    ("teacher", "student", lora.BODY), ("flowmap", "student", lora.STUDENT), ("onpolicy", "fake", lora.BODY),
    ("flowmap", "teacher", None), ("onpolicy", "judge", None)])
def test_what_is_trained_of_a_network_with_lora(stage, role, whose):
    """As in the release: a student's time embedders, too, nothing of what is frozen. A given LoRA goes on."""
    net, name = Wan(replace(preset("tiny")[0], num_layers=1)), "blocks.0.attn1.to_q"
    started = torch.randn(96, 2), torch.randn(2, 96)
    adapt(stage, role, net, train.Recipe(lora=4), {name: started})
    made = {key for key, linear in net.named_modules() if isinstance(linear, lora.LoRALinear)}
    assert made == ({*lora.adapted(net, whose)} if whose else {name})
    wanted = {f"{key}.lora_{side}" for key in made for side in ("up", "down")} if whose else set()
    assert trained(net).keys() == wanted
    assert torch.equal(net.get_submodule(name).lora_up[:, :2], started[0])


@pytest.fixture
def alone_in_bfloat16():
    yield start_processes("cpu", "bfloat16")  # a group of one
    torch.distributed.destroy_process_group()


def test_trained_weights_and_times_are_in_float32_beside_work_in_bfloat16(alone_in_bfloat16):
    """A step of 1e-5 and a time of 0.999 would be lost."""
    net, recipe = Wan(replace(preset("tiny")[0], num_layers=1)), train.Recipe(lora=4, compile=False)
    adapt("flowmap", "student", net, recipe)
    assemble({"student": net}, recipe, alone_in_bfloat16)
    for p in net.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    z, text, worked = torch.randn(1, 9, 3, 12, 12), torch.randn(1, 4, 32), []
    net.blocks[0].attn1.to_q.register_forward_hook(lambda linear, x, y: worked.append(y.dtype))
    late, last = (net(z, torch.tensor([t]), torch.tensor([0.5]), text) for t in (0.999, 1.0))
    assert {*worked} == {torch.bfloat16} and not torch.equal(late, last)
    assert net.checkpointing == recipe.checkpointing


@pytest.mark.parametrize("role, share", [("judge", True), ("teacher", True), ("judge", False)])
def test_frozen_weights_that_are_equal_as_the_work_sees_them_are_shared(role, share, alone_in_bfloat16):
    """If it is asked for; of what is in training nothing is."""
    frozen = Wan(replace(preset("tiny-causal")[0], num_layers=1))
    nets = {"student": copy.deepcopy(frozen).bfloat16().float(), role: frozen}
    other = "blocks.0.attn2.to_q.weight"
    nets["student"].get_parameter(other).data *= 2
    recipe = train.Recipe(lora=4, compile=False, share=share)
    for role, net in nets.items():
        adapt("onpolicy", role, net, recipe)
    learns = trained(nets["student"]).keys()
    assemble(nets, recipe, alone_in_bfloat16)
    theirs = {parallel.local(p).data_ptr() for p in frozen.parameters()}
    shared = {n for n, p in nets["student"].named_parameters() if parallel.local(p).data_ptr() in theirs}
    others = nets["student"].state_dict().keys() - learns
    assert trained(nets["student"]).keys() == learns and shared == (others - {other} if share else set())


def test_networks_that_are_no_lora_or_have_lost_it(story, adapted, capfd, tmp_path):
    """One weight of another rank is kept whole and said; a LoRA that is nowhere stored is found by its SVD; a
    base that is gone is asked for."""
    other = Wan.from_pretrained(story["teacher"])
    torch.nn.init.normal_(other.blocks[0].attn1.to_q.weight)
    other.save_pretrained(tmp_path / "other")
    nets = three_networks(["--init", adapted / "tiny", "--teacher", tmp_path / "other"])
    assert "judge: 1 weights of" in capfd.readouterr().out
    assert torch.equal(nets["judge"].blocks[0].attn1.to_q.weight, other.blocks[0].attn1.to_q.weight)
    shutil.copytree(adapted / "teacher", tmp_path / "bare")
    (tmp_path / "bare" / lora.ADAPTER).unlink()
    nets = three_networks(["--init", adapted / "tiny", "--teacher", tmp_path / "bare"])
    assert "kept whole" not in capfd.readouterr().out
    z, text = torch.randn(2, 9, 3, 12, 12), torch.randn(2, 4, 32)
    wanted = Wan.from_pretrained(adapted / "teacher")(z, 0.7, 0.2, text)
    assert (nets["judge"](z, 0.7, 0.2, text) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    shutil.copytree(adapted / "tiny", tmp_path / "moved")
    made = json.loads((tmp_path / "moved" / "anyflow.json").read_text())
    (tmp_path / "moved" / "anyflow.json").write_text(json.dumps(made | {"base": str(tmp_path / "gone")}))
    options = ["onpolicy", "--preset", "tiny", "--lora", "4", "--init", tmp_path / "moved"]
    said = refused(*options, "--teacher", adapted / "teacher", "--out", tmp_path / "out")
    assert "gone, which is no folder, expected --base" in said


def test_lora_bfloat16_and_checkpointing_train(story, tmp_path):
    """Full scale's options on a small model: what is not adapted stays as it was, no LoRA is saved."""
    options = ["flowmap", "--preset", "tiny", "--init", story["teacher"], "--steps", "2", *BRIEF]
    run(*options, "--lora", "4", "--dtype", "bfloat16", "--checkpointing", "full", "--out", tmp_path / "lora")
    made, start = weights(tmp_path / "lora"), weights(story["teacher"])
    moved = {key for key in start if not torch.equal(made[key], start[key])}
    assert "blocks.0.attn1.to_q.weight" in moved and "blocks.0.attn2.to_q.weight" not in moved
    assert made["blocks.0.attn1.to_q.weight"].dtype == torch.float32


@pytest.mark.parametrize("ramp", [False, True])
def test_exported_weights_are_the_average(ramp):
    """The average of weights w_1, w_2, ... that a run keeps is the recursion a <- d a + (1 - d) w, and the
    weights themselves before ema_start; with a ramp d = (n+1)/(n+10) while young."""
    net = torch.nn.Linear(2, 1, bias=False)
    run = checkpoint.Run({"student": net}, {}, Path("none"), {})
    recipe, wanted = train.Recipe(ema=0.5, ema_start=2, ema_ramp=ramp), None
    for run.step in range(8):
        net.weight.data = torch.randn(1, 2)
        run.update_average(recipe)
        n = run.step - 2
        decay = min(0.5, (n + 1) / (n + 10) if ramp else 1.0) if n >= 0 else 0.0
        wanted = net.weight.data if wanted is None else decay * wanted + (1 - decay) * net.weight.data
        assert torch.allclose(run.average["weight"], wanted)
        assert n >= 0 or torch.equal(run.average["weight"], net.weight.data)


def test_sample_writes_a_clip_that_goes_on_from_given_frames(story, tmp_path):
    """V2V from the command line: latents, GIF, contact sheet; the given frames are true ones, unchanged."""
    prompts = ["a slow red disc moving left", "a fast blue cross moving up"]
    options = ["--model", str(story["causal-anyflow"]), "--given", "3", "--steps", "2", "--seed", "5"]
    sample.main([*options, "--prompt", *prompts, "--out", str(tmp_path)])
    for prompt in prompts:
        clip = load_file(tmp_path / f"{prompt}-0.safetensors")["latents"]
        assert clip.shape == (1, 9, 3, 12, 12) and (tmp_path / f"{prompt}-0.png").exists()
        world, label = WORLDS["stars"], torch.tensor([parse_prompt(prompt)])
        true = world.render(label, world.draw(range(1), 5)[1], stars=world.twinkle(range(1), 5))
        assert torch.equal(clip[:, :3], true[:, :3])
        assert Image.open(tmp_path / f"{prompt}-0.gif").n_frames == 9


def test_folders_name_their_sampler(story):
    """What trained a model decides how it is sampled: by Euler steps, by jumps, or by re-noising."""
    names = {name: sample.sampler_of_folder(story[name]) for name in NAMES[:5]}
    wanted = {"teacher": "euler", "forward": None, "anyflow": None}
    assert names == wanted | {"consistency": "consistency", "rcm": "consistency"}


@pytest.mark.slow
@pytest.mark.parametrize("name, processes", [("tiny", 1), ("tiny-causal", 2)])
def test_clips_of_the_average_and_of_the_raw_weights_while_training(story, name, processes, tmp_path, alone):
    """They change nothing of the run; those of the average are what its exported model makes."""
    causal = "causal-" if "causal" in name else ""
    options = ["flowmap", "--preset", name, "--init", story[f"{causal}teacher"], *TWICE, *BRIEF]
    (torchrun if processes > 1 else run)(*options, "--sample-every", "2", "--out", tmp_path / "out")
    made, wanted = weights(tmp_path / "out"), weights(story[f"{causal}forward"])
    assert all((made[key] - wanted[key]).abs().max() < 1e-5 for key in wanted)
    folder = tmp_path / "out" / "samples"
    names = [f"step-000000{step}-{kind}" for step in (2, 4) for kind in ("average", "raw")]
    assert {path.stem for path in folder.iterdir()} == {*names} and len([*folder.iterdir()]) == 8
    clips = {name: load_file(folder / f"{name}.safetensors")["latents"] for name in names}
    assert not torch.equal(clips[names[2]], clips[names[3]])
    noise = torch.randn(2, 9, 3, 12, 12, generator=train.generator(0))
    text = World().batch(range(2), 0)[1]
    shift = provenance(tmp_path / "out")["shift"]
    clip = sample.generate(Wan.from_pretrained(tmp_path / "out"), text, noise, 4, shift=shift)
    assert (clip - clips[names[2]]).abs().max() < 1e-4


@pytest.fixture
def shards(tmp_path):
    write_shards(World(), tmp_path / "shards", 16, seed=0, size=8)
    return tmp_path / "shards"


class Codec:
    """A VAE whose latents are the mean colours of its patches, and a text encoder of letters."""

    stride = 4, 8

    def encode(self, video):
        x = torch.nn.functional.avg_pool3d(video.transpose(1, 2), (1, 8, 8)).transpose(1, 2)
        return torch.cat([x[:, :1], x[:, 1:].unflatten(1, (-1, 4)).mean(2)], 1)

    def __call__(self, prompts):
        rows = [[ord(letter) / 128 for letter in prompt.ljust(8)[:8]] for prompt in prompts]
        return torch.tensor(rows)[:, :, None].expand(-1, -1, 32).contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("given, helps", [
    ([], ["accumulate 2", "checkpointing full", "lora 256", "recompute-rollout true", "grad-chunks 2"]),
    (["--checkpointing", "full", "--grad-chunks", "2", "--recompute-rollout", "true"], ["accumulate 2"]),
    (["--accumulate", "2", "--lora", "4"], ["checkpointing full", "grad-chunks 2"]),
])
def test_too_little_memory_is_told_what_needs_less(given, helps, monkeypatch, capsys):
    """One sentence: options that the run does not use yet, and the command that says what would fit, as it
    stands there."""
    def full(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore of it")

    monkeypatch.setattr(train, "run_stage", full)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused("onpolicy", "--preset", "tiny-causal", "--batch", "4", *given)
    assert "CUDA out of memory" in said and all(f"--{option}" in said for option in helps)
    assert not any(f"{option} " in said for option in given if option.startswith("--"))
    command = said[said.index("python -m full.plan ") :].split()[3:7]
    assert command == ["--preset", "tiny-causal", "--gpus", "2"]
    monkeypatch.setattr(plan, "cost_of_training", lambda *args: (4e15, {"weights": 2**30}))
    plan.main(command)
    assert "flowmap" in capsys.readouterr().out


def test_videos_become_shards(tmp_path, capsys):
    """Each video in its row of a shard, bad ones named and skipped; a stopped run goes on, nothing twice."""
    videos, shape, codec = tmp_path / "videos", (3, 3, 4, 6), Codec()
    (videos / "more").mkdir(parents=True)
    for i in range(5):
        movie(videos / "more" / f"{i}.mp4", frames=9 + i, height=40, width=48)
        (videos / "more" / f"{i}.txt").write_text(f"clip {i}")
    shutil.copy(videos / "more" / "0.mp4", videos / "silent.mp4")
    movie(videos / "short.mp4", frames=8, height=32, width=48), (videos / "short.txt").write_text("short")
    (videos / "broken.mp4").write_text("?" * 300), (videos / "broken.txt").write_text("broken")

    calls = []

    def stopped(video):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return Codec.encode(codec, video)

    codec.encode = stopped
    make = lambda: prepare.prepare(videos, tmp_path / "out", shape, 32, codec, codec, size=2)
    with pytest.raises(KeyboardInterrupt):
        make()
    assert len(list((tmp_path / "out").glob("000-*.safetensors"))) == 2
    assert make() == (5, 3)
    assert len(calls) == 4 + 2  # the first three lay in shards already
    (videos / "silent.txt").write_text("clip 0")  # mended
    assert make() == (6, 2) and len(calls) == 7
    said = capsys.readouterr().err
    assert "newer" not in said
    os.utime(videos / "more" / "1.txt", (2e9, 2e9))
    assert make() == (6, 2) and len(calls) == 7
    told = "1 videos or captions are newer than their clips, which stay as they are, first more/1.mp4"
    assert told in capsys.readouterr().err
    short = "has 8 frames at 16 frames a second, expected 9"
    assert all(words in said for words in ("no caption in", "is no video", short))

    made = Shards(tmp_path / "out", shape, 32)
    rows = [json.loads(line) for line in open(tmp_path / "out" / "manifest-000.jsonl")]
    assert len(made) == 6 and made.null.shape == (1, 8, 32) and sum("error" in row for row in rows) == 2
    for row in (row for row in rows if "shard" in row):
        shard = load_file(tmp_path / "out" / row["shard"])
        video, _ = read_video(videos / row["video"], 9, 32, 48)
        caption = (videos / row["video"]).with_suffix(".txt").read_text()
        assert shard["latents"].dtype == torch.bfloat16 and row["used"] == "48 x 32 of 48 x 40"
        assert torch.equal(shard["latents"][row["row"]], Codec().encode(video[None])[0].bfloat16())
        assert torch.equal(shard["text"][row["row"]], codec([caption])[0].bfloat16())


def refused(*args):
    with pytest.raises(SystemExit) as error:
        run(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shards_train(shards, tmp_path):
    run("teacher", "--preset", "tiny", "--data", shards, "--steps", "3", *BRIEF, "--out", tmp_path / "out")
    assert len(losses(tmp_path / "out")) == 3


def test_corrupt_shard_is_named_and_skipped_only_if_asked(shards, tmp_path):
    bad = shards / "shard-00001.safetensors"
    bad.write_bytes(bad.read_bytes()[:1000])
    options = ["teacher", "--preset", "tiny", "--data", shards, "--steps", "2", *BRIEF]
    options += ["--out", tmp_path / "out"]
    assert str(bad) in refused(*options)
    run(*options, "--skip-bad-shards")
    bad.unlink()
    (shards / "shard-00000.safetensors").unlink()
    assert "no clips" in refused(*options)
    assert "no data folder" in refused(*options, "--data", tmp_path / "none")


def test_nan_stops_and_keeps_the_last_good_checkpoint(shards, tmp_path):
    clips = load_file(shards / "shard-00001.safetensors")
    clips["latents"][:] = float("nan")
    save_file(clips, shards / "shard-00001.safetensors")
    options = ["teacher", "--preset", "tiny", "--data", shards, "--steps", "9", "--save-every", "1"]
    options += ["--batch", "1"]
    message = refused(*options, "--out", tmp_path / "out")
    steps = len(losses(tmp_path / "out"))
    assert "stage teacher" in message and f"step {steps}:" in message and "nan" in message
    kept = sorted((tmp_path / "out" / "checkpoints").glob("step-*"))
    assert (str(kept[-1]) in message) if kept else ("no earlier checkpoint" in message)


def test_resume_names_changed_settings(story, tmp_path):
    shutil.copytree(story["teacher"], tmp_path / "out")
    options = ["teacher", "--preset", "tiny", *TWICE, *BRIEF, "--out", tmp_path / "out"]
    message = refused(*options, "--resume", "--lr", "2e-3", "--batch", "4")
    assert "lr 0.001 -> 0.002" in message and "batch 8 -> 4" in message
    assert "earlier run" in refused(*options)
    assert "found no folder" in refused(*options, "--resume", "--out", tmp_path / "none")
    (tmp_path / "none").mkdir()
    assert "found no checkpoint" in refused(*options, "--resume", "--out", tmp_path / "none")


def test_full_disk_keeps_the_old_checkpoint(story, tmp_path, monkeypatch):
    shutil.copytree(story["teacher"], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-0000004")

    def full(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    options = ["teacher", "--preset", "tiny", *TWICE, *BRIEF, "--out", tmp_path / "out"]
    message = refused(*options, "--resume")
    assert "No space left" in message and "step-0000002" in message
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-0000002"]


def test_broken_checkpoint_falls_back_to_the_one_before(story, tmp_path, capsys):
    """A flipped bit, half a file, a missing one: told, set aside, and the run ends in the same weights."""
    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 64
        path.write_bytes(data)

    for i, spoil in enumerate((flip, lambda path: path.write_bytes(path.read_bytes()[:100]), Path.unlink)):
        folder = shutil.copytree(story["teacher"], tmp_path / str(i))
        newest = folder / "checkpoints" / "step-0000004"
        spoil(next(newest.glob("*.distcp")))
        options = ["--preset", "tiny", *TWICE, *BRIEF, "--out", folder]
        run("teacher", *options, "--resume")
        assert f"{newest} is damaged" in capsys.readouterr().err and newest.exists()
        assert (newest.parent / "damaged-step-0000004").exists()
        made, wanted = weights(folder), weights(story["teacher"])
        assert all(torch.equal(made[key], wanted[key]) for key in wanted)
        for path in folder.glob("checkpoints/step-*/settings.json"):
            path.write_text("{}")
        assert "but there is none: train anew" in refused("teacher", *options, "--resume")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), torch.OutOfMemoryError("too little"),
                                   MemoryError("too little")])
def test_what_the_machine_lacks_is_no_damage(story, tmp_path, monkeypatch, error):
    """A checkpoint whose checksums are right stays where it is; one set aside is no reason to train anew."""
    folder = shutil.copytree(story["teacher"], tmp_path / "out")
    options = ["--preset", "tiny", *TWICE, *BRIEF, "--out", folder]
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.dcp, "load", mock.Mock(side_effect=error))
        assert f"cannot read checkpoint {folder}" in refused("teacher", *options, "--resume")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == kept
    (folder / "config.json").unlink()
    for path in folder.glob("checkpoints/step-*"):
        path.rename(path.with_name(f"damaged-{path.name}"))
    assert "earlier run or a model" in refused("teacher", *options)


def test_sigterm_is_heard_while_a_block_is_compiled(monkeypatch):
    handlers = []
    monkeypatch.setattr(signal, "signal", lambda number, heard: handlers.append(heard))
    stop = checkpoint.Stop(torch.device("cpu"))
    assert not stop
    with FakeTensorMode():
        handlers[0]()
    assert stop


def test_a_lora_goes_on_exactly_from_weights_in_bfloat16():
    linear, start = torch.nn.Linear(8, 6).bfloat16(), (torch.randn(6, 2), torch.randn(2, 8))
    lora.LoRALinear.wrap(linear, 2, start)
    assert torch.equal(linear.lora_up, start[0]) and torch.equal(linear.lora_down, start[1])
    assert linear.merged().dtype == linear.weight.dtype and not linear.weight.requires_grad


def test_a_lora_goes_on_at_a_larger_rank_as_the_same_product():
    """What is new begins as a new LoRA: up at zero, down even within 1 / sqrt(inputs), as in PEFT."""
    linear, start = torch.nn.Linear(900, 6), (torch.randn(6, 2), torch.randn(2, 900))
    wanted = linear.weight + start[0] @ start[1]
    lora.LoRALinear.wrap(linear, 4, start)
    assert linear.lora_up.shape == (6, 4) and torch.allclose(linear.merged(), wanted)
    new = 30 * linear.lora_down[2:]
    assert 0.99 < new.max() < 1.0001 and -1.0001 < new.min() < -0.99


@pytest.mark.parametrize("names", [["q.lora_up"], ["q.lora_up", "q.lora_down", "q.bias"]])
def test_adapter_with_other_names_is_refused(names, tmp_path):
    save_file({name: torch.zeros(1, 1) for name in names}, tmp_path / lora.ADAPTER)
    with pytest.raises(ValueError, match=f"{lora.ADAPTER} has q.*expected lora_up and lora_down"):
        lora.read_adapter(tmp_path)


@pytest.mark.parametrize("shape", [(200, 100), (40, 6)])
def test_low_rank_is_the_nearest_product_and_no_matter_of_chance(shape):
    """As near as an SVD's, the same each time; torch's generator is left as it was."""
    change, state = torch.randn(shape), torch.get_rng_state()
    up, down = lora.low_rank(change, 4)
    assert torch.equal(torch.get_rng_state(), state)
    nearest = torch.linalg.svdvals(change)[4:].norm()
    assert up.shape == (shape[0], 4) and (change - up @ down).norm() < 1.01 * nearest
    torch.manual_seed(5)
    assert all(map(torch.equal, lora.low_rank(change, 4), (up, down)))


@pytest.mark.parametrize("outputs, rank, inputs, whole", [
    (96, 2, 96, 0), (96, 4, 96, 0), (96, 5, 96, 1), (95, 4, 96, 1), (96, 4, 95, 1)])
def test_stored_lora_is_taken_at_the_rank_of_the_run_or_a_smaller_one(outputs, rank, inputs, whole):
    """Of another rank or shape it leaves the weight whole."""
    net, name = Wan(replace(preset("tiny")[0], num_layers=1)).requires_grad_(False), "blocks.0.attn1.to_q"
    base, stored = copy.deepcopy(net.state_dict()), (torch.randn(outputs, rank), torch.randn(rank, inputs))
    net.get_submodule(name).weight[:outputs, :inputs] += stored[0] @ stored[1]
    starts, found = lora.unmerge(net, base, 4, {name: stored})
    assert found == whole and starts.keys() == ({name} if not whole else set())


def test_weights_as_in_the_base_or_of_another_shape_are_no_lora():
    net = Wan(replace(preset("tiny")[0], num_layers=1))
    half, base = copy.deepcopy(net).bfloat16(), net.state_dict()
    assert lora.unmerge(net, base, 4, {}) == lora.unmerge(half, base, 4, {}) == ({}, 0)
    assert lora.unmerge(net, {"blocks.0.attn1.to_q.weight": torch.ones(1, 1)}, 4, {}) == ({}, 0)


def test_weights_are_taken_apart_as_the_first_process_says(monkeypatch):
    """Of factors of one product, those that it sends."""
    net, scales = Wan(replace(preset("tiny")[0], num_layers=1)).requires_grad_(False), [2.0, 0.5]
    base, linear = copy.deepcopy(net.state_dict()), net.blocks[0].attn1.to_q
    q = base["blocks.0.attn1.to_q.weight"]
    linear.weight += torch.randn(96, 4) @ torch.randn(4, 96)
    wanted = lora.low_rank(linear.weight - q, 4)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, source: x.mul_(scales.pop(source)))
    starts, whole = lora.unmerge(net, base, 4, {})
    (up, down), = starts.values()
    assert whole == 0 and torch.equal(up, 2 * wanted[0]) and torch.equal(down, wanted[1] / 2)
    assert torch.equal(linear.weight, q)


@pytest.mark.parametrize("name", ["tiny", "tiny-causal"])
def test_no_more_than_two_blocks_are_gathered_at_a_time(name):
    """In the whole of a step of stage 2, also while it goes back through the rollout."""
    device = start_processes("cpu", "bfloat16")  # a group of one
    try:
        config, shape = preset(name)
        config = replace(config, num_layers=5)
        recipe = train.recipe_of(name, "onpolicy", dict(batch=2, steps=1, rollout_steps=(4,), target="data",
                                                        recompute_rollout=True, checkpointing="full"))
        teacher = replace(config, kind="teacher")
        nets = {"judge": Wan(teacher).requires_grad_(False), "student": Wan(config), "fake": Wan(teacher)}
        assemble(nets, recipe, device)
        gathered, blocks = [], [block for net in nets.values() for block in net.blocks]
        whole = lambda block: not isinstance(next(block.parameters()), DTensor)
        count = lambda *_: gathered.append(sum(map(whole, blocks)))
        for block in blocks:
            block.register_forward_pre_hook(count), block.attn1.register_full_backward_hook(count)
        clips = train.Clips(World(), recipe, config, shape, device, 3)
        adam = {role: torch.optim.AdamW(trained(nets[role]).values()) for role in ("student", "fake")}
        next(train.train("onpolicy", recipe, checkpoint.Run(nets, adam, Path("none"), {}), clips))
        assert 1 <= min(gathered) and max(gathered) <= 2
    finally:
        torch.distributed.destroy_process_group()


def test_models_are_not_overwritten(story):
    options = ["flowmap", "--preset", "tiny", "--init", story["teacher"], "--out", story["forward"]]
    assert "earlier run or a model" in refused(*options)


def test_foreign_folders_are_named(story, tmp_path):
    tiny = ["--preset", "tiny", "--steps", "2", *BRIEF, "--out", tmp_path / "out"]
    assert "--init is missing" in refused("flowmap", *tiny)
    assert "no model folder" in refused("flowmap", *tiny, "--init", tmp_path / "none")
    assert "stage flowmap" in refused("consistency", *tiny, "--init", story["forward"])
    options = ["--init", story["consistency"], "--teacher", story["teacher"]]
    assert "stage consistency" in refused("onpolicy", *tiny, *options)
    Wan(replace(preset("tiny")[0], num_layers=2)).save_pretrained(tmp_path / "small")
    assert "num_layers 2, expected 4" in refused("flowmap", *tiny, "--init", tmp_path / "small")
    causal = ["--preset", "tiny-causal", "--steps", "2", *BRIEF, "--out", tmp_path / "out"]
    assert "kind teacher" in refused("flowmap", *causal, "--init", story["teacher"])
    options = ["--init", story["forward"], "--teacher", story["teacher"], "--judge", story["causal-teacher"]]
    message = refused("onpolicy", *tiny, *options)
    assert f"--judge {story['causal-teacher']} is of kind causal" in message
    assert "expected a bidirectional one" in message
    assert "lora is 4" in refused("teacher", *tiny, "--lora", "4")
    init = ["--init", story["teacher"]]
    for unread in (["teacher", "--teacher", story["teacher"]],
                   ["flowmap", *init, "--judge", story["teacher"]],
                   ["flowmap", *init, "--target", "data", "--teacher", story["teacher"]]):
        assert f"stage {unread[0]} with this recipe asks none" in refused(unread[0], *tiny, *unread[1:])
    assert "no error: expected --balance false" in refused("flowmap", *tiny, *init, "--data-anchors", "false")


@pytest.mark.parametrize("options, words", [
    (["--batch", "7", "--accumulate", "2"], "multiple of"),
    (["--steps", "0"], "steps is 0"),
    (["--lr", "-1"], "lr is -1"),
    (["--lr", "nan"], "lr is nan"),
    (["--drop", "2"], "drop is 2"),
    (["--guidance-form", "published"], "but guidance is 1"),
    (["--guidance-form", "ours", "--guidance", "3"], "guidance_form is 'ours', expected one of"),
])
def test_numbers_out_of_range(options, words, tmp_path):
    assert words in refused("teacher", "--preset", "tiny", "--out", tmp_path / "out", *options)


@dataclass(frozen=True)
class Declared:
    """A field of every type."""

    count: int = option(3, "how many", low=1, high=9)
    share: float = option(0.5, "of all", low=0, high=1)
    rate: float = option(1.0, "each second", above=0)
    decay: float = option(0.5, "of the rest", low=0, below=1)
    switch: bool = option(True, "on or off")
    word: str = option("a", "one letter", choices=("a", "b"))
    place: str = option(None, "anywhere")
    sides: tuple = option((1, 2), "two lengths", low=1, high=4, length=2)
    steps: tuple = option((1,), "any number of them", low=0)


FIT = {"count": [1, 9], "share": [0, 1, 0.0, 1.0, 5e-324], "rate": [5e-324, 1, 1e18],
       "decay": [0, 0.999999],
       "switch": [True, False], "word": ["a", "b"], "place": [None, "", "x"], "sides": [(1, 4), [4, 1]],
       "steps": [(0,), [10**9, 0, 0]]}
NAN, INF = math.nan, math.inf
UNFIT = {
    "count": ("an integer .*1.*9", [
        0, 10, -1, 2.0, 2.5, True, "3", None, NAN, INF, [3], {}, 10**400]),
    "share": ("a number .*0.*1", [
        -1e-9, 1.001, 2, True, False, "0.5", None, NAN, INF, [0.5], 10**400]),
    "rate": ("a number above 0", [0, 0.0, -1, NAN, INF, -INF, True, "1", None]),
    "decay": ("a number of at least 0 and below 1", [-1e-9, 1, 1.0, 2, NAN]),
    "switch": ("true or false", [0, 1, 1.0, "true", None, []]),
    "word": ("one of a, b", ["c", "A", "", "ab", 0, None, True, ["a"], ("a",)]),
    "place": ("text", [0, 1.0, True, ["x"], {}]),
    "sides": ("2 integers .*1.*4", [
        (), [], (1,), (1, 2, 3), (0, 1), (1, 5), (1, 2.0), (1, True), ("1", "2"), "12", 12, None, ([1], 2)]),
    "steps": ("integers .*at least 0", [(), [], (-1,), (1, NAN), (1.5,), (1, None), "1", 1, None, [[1]]]),
}


@pytest.mark.parametrize("name", FIT)
def test_declared_values_are_taken(name):
    for value in FIT[name]:
        made = check(Declared, {name: value, "unknown": 7})[name]
        assert made == (tuple(value) if isinstance(value, list) else value) and type(made) is not list


def test_missing_values_and_what_is_no_object_are_named():
    for given, found in ({"rank": 0}, "video is missing"), ({"video": "a.mp4"}, "rank is missing"):
        with pytest.raises(ValueError, match=f"^line 3: {found}, expected "):
            check(prepare.Row, given, "line 3")
    for given in ([], None, "count", 3):
        with pytest.raises(ValueError, match="^file.json holds .*, expected an object"):
            check(Declared, given, "file.json")


PAIRS = [(name, value) for name, (_, values) in UNFIT.items() for value in values]


@pytest.mark.parametrize("name, value", PAIRS, ids=[f"{name} {value!r:.20}" for name, value in PAIRS])
def test_wrong_neighbours_of_declared_values_are_named(name, value):
    """Key, value, and what was expected, in one sentence."""
    shown = repr(tuple(value) if isinstance(value, list) else value)
    with pytest.raises(ValueError) as error:
        check(Declared, {name: value}, "file.json")
    start, end = str(error.value).split(", expected ")
    assert start == f"file.json: {name} is {shown}" and re.fullmatch(f"{UNFIT[name][0]}.?", end)


def test_help_names_each_number_of_a_recipe_its_meaning_and_the_presets_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as end:
        run("onpolicy", "--preset", "tiny", "--help")
    said = " ".join(capsys.readouterr().out.split())
    for field in fields(train.Recipe):
        default = train.RECIPES["tiny"]["onpolicy"].get(field.name, field.default)
        default = ",".join(map(str, default)) if field.type is tuple else default
        default = str(default).lower() if field.type is bool else default
        meaning, wanted = field.metadata["meaning"], expected(field).strip()
        said_of = said.split(f" --{field.name.replace('_', '-')} ")[-1]
        assert meaning and f" {meaning}: {wanted} (default {default})" in said_of[:300], field.name
    assert end.value.code == 0
    known = {"fake-steps": "2", "rollout-steps": "1,2,4,8,16,32", "lr": "0.0002", "compile": "false"}
    for name, default in known.items():
        assert said.split(f" --{name} ")[-1].split("(default ")[1].startswith(f"{default})")


def test_presets_carry_the_published_recipe():
    forward, policy = (train.recipe_of("wan-14b-causal", stage, {}) for stage in ("flowmap", "onpolicy"))
    assert (forward.steps, forward.batch, forward.lr) == (4000, 16, 5e-5)
    assert (forward.beta2, forward.lora) == (0.95, 256)
    assert (policy.steps, policy.lr, policy.beta1, policy.ema) == (1200, 2e-6, 0.0, 0.99)
    assert (forward.guidance, forward.guidance_form, policy.fake_samples) == (3.0, "published", "fresh")
    assert not (forward.ema_ramp or forward.merge or policy.ema_ramp)
    config, shape = preset("wan-1.3b-causal")
    assert config.kind == "causal" and sum(config.chunk_partition) == shape[0] == 21
    assert shape == (21, 16, 480 / 8, 832 / 8)


def test_environment_is_left_alone():
    assert "RANK" not in os.environ and not torch.distributed.is_initialized()


def test_exact_teacher_is_the_velocity_of_the_world():
    world = WORLDS["stars"]
    clips, text = world.batch(range(6), seed=3)
    t, (labels, _) = torch.linspace(0.1, 1, 6), world.draw(range(6), 3)
    z = anyflow.interpolate(clips, torch.randn_like(clips), t)
    assert torch.equal(ExactTeacher(world)(z, t, t, text), world.velocity(z, t, labels))
    with pytest.raises(ValueError, match="no null prompt, expected --drop 0"):
        ExactTeacher(world)(z, t, t, torch.cat([text[:5], world.null]))


def test_exact_teacher_takes_the_place_of_teacher_and_judge(story, tmp_path):
    exact = ["--preset", "tiny", "--exact-teacher", "--steps", 1, "--batch", 2, "--drop", 0]
    run("flowmap", *exact, "--init", story["teacher"], "--out", tmp_path / "forward")
    run("onpolicy", *exact, "--init", tmp_path / "forward", "--teacher", story["teacher"],
        "--out", tmp_path / "anyflow")
    assert provenance(tmp_path / "anyflow")["exact_teacher"]
    causal = ["flowmap", "--init", story["causal-teacher"], "--preset", "tiny-causal"]
    plain = ["flowmap", "--init", story["teacher"]]
    for more in ([*plain, "--target", "data"], [*plain, "--drop", "0.1"], causal, ["teacher"]):
        said = refused(more[0], *exact, *more[1:], "--out", tmp_path / "x")
        assert "--exact-teacher needs a world" in said
