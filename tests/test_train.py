"""The training loop: that it resumes exactly, that processes share a batch, and what it says to bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sample import movie

import sample
import train
from model import WEIGHTS, Wan, WanConfig
from toy.video import World, parse_prompt, write_shards

ROOT = Path(__file__).parents[1]
BRIEF = ["--batch", "8", "--lr", "1e-3", "--warmup", "0"]


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
    for family, preset in (("", "tiny"), ("causal-", "tiny-causal")):
        teacher, forward, anyflow, consistency, rcm = (
            names[family + name] for name in ("teacher", "forward", "anyflow", "consistency", "rcm")
        )
        options = ["--preset", preset, "--steps", "4", "--save-every", "2", *BRIEF]
        real = ["--real", names["teacher"]] if family else []
        run("teacher", *options, "--out", teacher)
        run("flowmap", *options, "--out", forward, "--init", teacher)
        run("consistency", *options, "--out", consistency, "--init", teacher)
        run("onpolicy", *options, "--out", anyflow, "--init", forward, "--teacher", teacher, *real)
        rollout = ["--rollout", "consistency", "--teacher", teacher, *real]
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
    assert Wan.from_pretrained(story[name]).config.kind == {"t": "teacher", "c": "causal"}.get(
        name[0] if name == "teacher" or name.startswith("causal-") else "", "anyflow"
    )


@pytest.mark.parametrize("name", ["anyflow", "causal-rcm"])
def test_resume_is_bit_exact(story, name, tmp_path):
    """A run cut back to its first checkpoint goes on to the same weights and the same log, bit for bit."""
    folder = tmp_path / "cut"
    shutil.copytree(story[name], folder)
    shutil.rmtree(folder / "checkpoints" / "step-0000004")
    (folder / WEIGHTS).unlink()
    settings = json.loads((folder / "anyflow.json").read_text())
    options = ["--steps", "4", "--save-every", "2", *BRIEF, "--rollout", settings["rollout"]]
    options += [
        part for key in ("init", "teacher", "real") if settings[key] for part in (f"--{key}", settings[key])
    ]
    run(settings["stage"], "--preset", settings["preset"], "--out", folder, "--resume", *options)
    made, wanted = weights(folder), weights(story[name])
    assert all(torch.equal(made[key], wanted[key]) for key in wanted)
    assert losses(folder) == losses(story[name])


@pytest.fixture
def alone(monkeypatch):
    """The environment of a process of its own: half of the machine's threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run([*command, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("stage", ["flowmap", "onpolicy"])
def test_two_processes_are_one(story, stage, tmp_path, alone):
    """FSDP on two processes: losses and weights of one (1e-5). A batch of two leaves each process one sample, so
    that one of them has no jump to differentiate, or none at r = t to balance by."""
    if stage == "flowmap":
        options = ["flowmap", "--preset", "tiny", "--init", story["teacher"], "--target", "data", "--guidance", "3"]
        options += ["--balance", "true", "--steps", "3", *BRIEF, "--batch", "2"]
    else:
        options = ["onpolicy", "--preset", "tiny-causal", "--init", story["causal-forward"], "--steps", "3", *BRIEF]
        options += ["--teacher", story["causal-teacher"], "--real", story["teacher"]]
    run(*options, "--out", tmp_path / "one")
    torchrun(*options, "--out", tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all((one[key] - two[key]).abs().max() < 1e-5 for key in one)
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two")):
        assert a.keys() == b.keys() and all(abs(a[key] - b[key]) < 1e-5 * max(1, abs(a[key])) for key in a)


def test_checkpoint_of_two_processes_resumes_in_one(story, tmp_path, alone):
    options = [
        "flowmap",
        "--preset",
        "tiny",
        "--init",
        story["teacher"],
        "--steps",
        "4",
        "--save-every",
        "2",
        *BRIEF,
    ]
    torchrun(*options, "--out", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-0000004")
    whole = weights(tmp_path / "two")
    run(*options, "--out", tmp_path / "two", "--resume")
    assert all((whole[key] - value).abs().max() < 1e-5 for key, value in weights(tmp_path / "two").items())


def test_accumulated_rollouts_are_a_larger_batch(story, tmp_path):
    options = ["onpolicy", "--preset", "tiny", "--init", story["forward"], "--teacher", story["teacher"], *BRIEF]
    options += ["--steps", "2", "--balance", "false"]
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


def test_accumulation_is_a_larger_batch(story, tmp_path):
    """Two micro-batches of four are a batch of eight, but for rounding (and balance, of a micro-batch)."""
    options = ["flowmap", "--preset", "tiny-causal", "--init", story["causal-teacher"], "--steps", "3", *BRIEF]
    options += ["--balance", "false"]
    run(*options, "--out", tmp_path / "one")
    run(*options, "--out", tmp_path / "two", "--accumulate", "2")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all((one[key] - two[key]).abs().max() < 1e-5 for key in one)


@pytest.mark.parametrize("stage", ["flowmap", "onpolicy"])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_plan_is_what_a_step_takes(stage, checkpointing):
    """On the meta device as in a real step: FLOPs (1 %) and, by torch's profiler, peak memory (15 %); with rollout,
    derivative, LoRA and recomputation."""
    config, shape, stages = train.preset("tiny")
    changes = dict(batch=8, target="data", lora=4, share=False, checkpointing=checkpointing, rollout_steps=(8,))
    recipe = train.replace(train.Recipe(**stages[stage]), **changes)
    runs = [train.simulate(stage, recipe, config, shape, layers, text_length=4) for layers in (1, 2, 3)]
    flops, peak = train.at_depth(config.num_layers, *runs)

    cpu = torch.device("cpu")
    nets = {name: Wan(net.config) for name, net in train.networks_on_meta(stage, recipe, config).items()}
    train.assemble(nets, recipe, cpu)
    made = train.Run(nets, {}, Path("none"), {})
    made.optimisers = {name: torch.optim.SGD(params.values()) for name, params in made.trained.items()}

    def step():
        made.step = 0
        once = train.replace(recipe, steps=1)
        list(train.train(stage, once, made, World(), 0, nets["student"].config, shape, cpu))

    with train.Cost(nets.values(), "cpu") as cost:
        step()
    assert abs(flops / cost.flops - 1) < 0.01
    gradients = sum(4 * p.numel() for params in made.trained.values() for p in params.values())
    assert abs(peak / (bench.peak(step) - gradients) - 1) < 0.15


@pytest.mark.parametrize("chunks, clean", [((1, 3, 3), True), ((1, 3, 3, 3, 2), True), ((1, 3, 3, 3), False)])
def test_plan_counts_the_blocks_that_flex_attention_computes(chunks, clean):
    """Of the true mask, token by token, the share of blocks of 128 in which anything is visible."""
    config = WanConfig(kind="causal", num_attention_heads=1, num_layers=1)
    net = train.OnMeta(train.SimpleNamespace(config=config), (16, 24), 4)
    tokens, share = net.visible(chunks, clean)
    mask = train.chunk_mask(chunks, min(3, len(chunks)), 96, 24, clean, "cpu").float()
    blocks = torch.nn.functional.max_pool2d(mask[None], 128, ceil_mode=True)
    assert tokens == len(mask) and abs(share - blocks.mean().item()) < 1e-6


def test_plan_adds_up(monkeypatch, capsys):
    """What the command prints of a stage: seconds, GPU-days, and from how many GPUs it fits a card."""
    parts = {"weights": 64 * 2**30, "activations": 30 * 2**30}  # of each of 8 GPUs: 512 GiB in all
    monkeypatch.setattr(train, "plan_of", lambda *args: (4e15, parts))
    monkeypatch.setattr(train, "cost_of_sampling", lambda *args: (1e15, 2**30))
    run(
        "plan",
        "--preset",
        "wan-14b-causal",
        "--gpus",
        "16",
        "--tflops",
        "1000",
        "--utilisation",
        "0.5",
        "--steps",
        "2700",
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][1] == "14,288,491,584" and "14,317,342,784;" in lines[0]
    cost, memory = (line[1:] for line in lines if line[:1] == ["onpolicy"])
    assert cost == ["16", "2700", "4", "8", "4", "no", "no", "8"] and memory[-3:] == ["30.00", "0.00", "94.00"]
    assert ["stages", "1", "and", "2", "together:", "8", "GPU-days"] in lines


@pytest.fixture(scope="module")
def adapted(story, tmp_path_factory):
    """Students of stage 1 that differ from their teachers by LoRA of rank 4."""
    folder = tmp_path_factory.mktemp("adapted")
    for preset, teacher in (("tiny", "teacher"), ("tiny-causal", "causal-teacher")):
        options = ["--init", story[teacher], "--steps", "4", "--lora", "4", *BRIEF]
        run("flowmap", "--preset", preset, *options, "--out", folder / preset)
    return folder


JUDGED = {"tiny": ("teacher", "teacher"), "tiny-causal": ("causal-teacher", "teacher")}


@pytest.mark.parametrize("kind", ["anyflow", "causal"])
def test_from_a_published_teacher_to_what_diffusers_opens(kind, tmp_path):
    """Both stages on a folder that diffusers saved, with LoRA on one base: diffusers opens all that they leave."""
    diffusers = pytest.importorskip("diffusers")
    config, _, _ = train.preset("tiny-causal" if kind == "causal" else "tiny")
    small = {key: value for key, value in train.replace(config, kind="teacher").to_dict().items() if key[0] != "_"}
    diffusers.WanTransformer3DModel(**small).save_pretrained(tmp_path / "wan" / "transformer")
    wan, options = tmp_path / "wan", ["--steps", "2", "--lora", "4", "--target", "data", *BRIEF]
    options += ["--preset", "tiny-causal" if kind == "causal" else "tiny"]
    run("flowmap", *options, "--init", wan, "--out", tmp_path / "forward")
    run("onpolicy", *options, "--init", tmp_path / "forward", "--teacher", wan, "--out", tmp_path / "anyflow")
    names = {"anyflow": "AnyFlowTransformer3DModel", "causal": "AnyFlowFARTransformer3DModel"}
    reference, info = getattr(diffusers, names[kind]).from_pretrained(
        tmp_path / "anyflow", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = Wan.from_pretrained(tmp_path / "anyflow")
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in reference.state_dict().items())


@pytest.mark.parametrize("preset, processes", [("tiny", 1), ("tiny-causal", 2)])
def test_one_base_with_adapters_trains_as_three_models(story, adapted, preset, processes, tmp_path):
    """Stage 2 with teacher, student and fake score as adapters of one network: losses and weights of three."""
    teacher, real = (story[name] for name in JUDGED[preset])
    options = ["onpolicy", "--preset", preset, "--init", adapted / preset, "--teacher", teacher, "--real", real]
    options += ["--steps", "3", "--lora", "4", *BRIEF]
    run(*options, "--share", "false", "--out", tmp_path / "false")
    (torchrun if processes > 1 else run)(*options, "--share", "true", "--out", tmp_path / "true")
    for one, three in zip(losses(tmp_path / "true"), losses(tmp_path / "false")):
        assert all(abs(one[key] - three[key]) < 1e-5 * max(1, abs(three[key])) for key in three), (one, three)
    one, three = weights(tmp_path / "true"), weights(tmp_path / "false")
    assert all((one[key] - three[key]).abs().max() < 1e-4 for key in three)


def test_one_base_is_held_once(story, adapted):
    """All that is frozen and of the teacher's shape lies in one memory; the student still starts as its folder."""
    args = train.parse(["onpolicy", "--preset", "tiny", "--init", str(adapted / "tiny"), "--teacher",
                        str(story["teacher"])])  # fmt: skip
    recipe = train.Recipe(lora=4, dtype="float32", checkpointing="none", compile=False)
    nets = train.networks("onpolicy", recipe, args, train.preset("tiny")[0])
    train.assemble(nets, recipe, torch.device("cpu"))
    base = dict(nets["real"].named_parameters())
    for name in ("student", "fake"):
        own = dict(nets[name].named_parameters())
        assert all(own[key] is p and not p.requires_grad for key, p in base.items()), name
    z, text = torch.randn(2, 9, 3, 12, 12), torch.randn(2, 4, 32)
    wanted = Wan.from_pretrained(adapted / "tiny")(z, 0.7, 0.2, text)
    assert (nets["student"](z, 0.7, 0.2, text) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_lora_bfloat16_and_checkpointing_train(story, tmp_path):
    """Full scale's options on a small model: what is not adapted stays as it was, what is saved has no LoRA."""
    options = ["flowmap", "--preset", "tiny", "--init", story["teacher"], "--steps", "2", *BRIEF]
    run(*options, "--lora", "4", "--dtype", "bfloat16", "--checkpointing", "full", "--out", tmp_path / "lora")
    made, start = weights(tmp_path / "lora"), weights(story["teacher"])
    moved = {key for key in start if not torch.equal(made[key], start[key])}
    assert "blocks.0.attn1.to_q.weight" in moved and "blocks.0.attn2.to_q.weight" not in moved
    assert made["blocks.0.attn1.to_q.weight"].dtype == torch.float32


def test_exported_weights_are_the_average():
    """The average of weights w_1, w_2, ... that a run keeps is the recursion a <- d a + (1 - d) w, d = (n+1)/(n+10)
    while young, and the weights themselves before ema_start."""
    net = torch.nn.Linear(2, 1, bias=False)
    run = train.Run({"student": net}, {}, Path("none"), {})
    recipe, wanted = train.Recipe(ema=0.5, ema_start=2), None
    for run.step in range(8):
        net.weight.data = torch.randn(1, 2)
        run.update_average(recipe)
        n = run.step - 2
        decay = min(0.5, (n + 1) / (n + 10)) if n >= 0 else 0.0
        wanted = net.weight.data if wanted is None else decay * wanted + (1 - decay) * net.weight.data
        assert torch.allclose(run.average["weight"], wanted)
        assert n >= 0 or torch.equal(run.average["weight"], net.weight.data)


def test_sample_writes_a_clip_that_goes_on_from_given_frames(story, tmp_path):
    """V2V from the command line: latents, GIF and contact sheet; the given frames are true ones, and unchanged."""
    prompts = ["a slow red disc moving left", "a fast blue cross moving up"]
    options = ["--model", str(story["causal-anyflow"]), "--given", "3", "--steps", "2", "--seed", "5"]
    sample.main([*options, "--prompt", *prompts, "--out", str(tmp_path)])
    for prompt in prompts:
        clip = load_file(tmp_path / f"{prompt}-0.safetensors")["latents"]
        assert clip.shape == (1, 9, 3, 12, 12) and (tmp_path / f"{prompt}-0.png").exists()
        true = World().render(torch.tensor([parse_prompt(prompt)]), World().draw(range(1), 5)[1])
        assert torch.equal(clip[:, :3], true[:, :3])
        assert Image.open(tmp_path / f"{prompt}-0.gif").n_frames == 9


def test_folders_name_their_sampler(story):
    """What trained a model decides how it is sampled: by Euler steps, by jumps, or by re-noising."""
    names = {name: sample.sampler_of_folder(story[name]) for name in NAMES[:5]}
    wanted = {"teacher": "euler", "forward": None, "anyflow": None}
    assert names == wanted | {"consistency": "consistency", "rcm": "consistency"}


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


def test_too_little_memory_is_told_what_would_fit(monkeypatch, capsys):
    card = train.SimpleNamespace(name="A card", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def full(args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "run_stage", full)
    with pytest.raises(SystemExit, match="on A card, 24 GiB: the plan says [0-9]+ GiB on each of 1 .*1 of 141 GiB"):
        run("flowmap", "--preset", "tiny", "--batch", "1")


def test_videos_become_shards(tmp_path, capsys):
    """Each video in its row of a shard, bad ones reported and skipped; a stopped run goes on, nothing twice."""
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
    with pytest.raises(KeyboardInterrupt):
        train.prepare(videos, tmp_path / "out", shape, 32, codec, codec, size=2)
    assert len(list((tmp_path / "out").glob("000-*.safetensors"))) == 1
    assert train.prepare(videos, tmp_path / "out", shape, 32, codec, codec, size=2) == (5, 3)
    assert len(calls) == 4 + 3  # two of the first three lay in a shard already
    (videos / "silent.txt").write_text("clip 0")  # mended
    assert train.prepare(videos, tmp_path / "out", shape, 32, codec, codec, size=2) == (6, 2) and len(calls) == 8
    said = capsys.readouterr().err
    assert all(
        word in said for word in ("no caption in", "is no video", "has 8 frames at 16 frames a second, expected 9")
    )

    data = train.Shards(tmp_path / "out", shape, 32)
    rows = [json.loads(line) for line in open(tmp_path / "out" / "manifest-000.jsonl")]
    assert len(data) == 6 and data.null.shape == (1, 8, 32) and sum("error" in row for row in rows) == 2
    for row in (row for row in rows if "shard" in row):
        shard = load_file(tmp_path / "out" / row["shard"])
        video, _ = sample.read_video(videos / row["video"], 9, 32, 48)
        assert shard["latents"].dtype == torch.bfloat16 and row["used"] == "48 x 32 of 48 x 40"
        assert torch.equal(shard["latents"][row["row"]], Codec().encode(video[None])[0].bfloat16())
        assert torch.equal(
            shard["text"][row["row"]],
            codec([(videos / row["video"]).with_suffix(".txt").read_text()])[0].bfloat16(),
        )


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
    options = ["teacher", "--preset", "tiny", "--data", shards, "--steps", "2", *BRIEF, "--out", tmp_path / "out"]
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
    options = ["teacher", "--preset", "tiny", "--data", shards, "--steps", "9", "--save-every", "1", "--batch", "1"]
    message = refused(*options, "--out", tmp_path / "out")
    steps = len(losses(tmp_path / "out"))
    assert "stage teacher" in message and f"step {steps}:" in message and "nan" in message
    kept = sorted((tmp_path / "out" / "checkpoints").glob("step-*"))
    assert (str(kept[-1]) in message) if kept else ("no earlier checkpoint" in message)


def test_resume_names_changed_settings(story, tmp_path):
    shutil.copytree(story["teacher"], tmp_path / "out")
    options = [
        "teacher",
        "--preset",
        "tiny",
        "--steps",
        "4",
        "--save-every",
        "2",
        *BRIEF,
        "--out",
        tmp_path / "out",
    ]
    message = refused(*options, "--resume", "--lr", "2e-3", "--batch", "4")
    assert "lr 0.001 -> 0.002" in message and "batch 8 -> 4" in message
    assert "earlier run" in refused(*options)
    assert "no checkpoint" in refused(*options, "--resume", "--out", tmp_path / "none")


def test_full_disk_keeps_the_old_checkpoint(story, tmp_path, monkeypatch):
    shutil.copytree(story["teacher"], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-0000004")

    def full(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(train.dcp, "save", full)
    options = [
        "teacher",
        "--preset",
        "tiny",
        "--steps",
        "4",
        "--save-every",
        "2",
        *BRIEF,
        "--out",
        tmp_path / "out",
    ]
    message = refused(*options, "--resume")
    assert "No space left" in message and "step-0000002" in message
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-0000002"]


def test_broken_checkpoint_is_named(story, tmp_path):
    shutil.copytree(story["teacher"], tmp_path / "out")
    for part in (tmp_path / "out" / "checkpoints" / "step-0000004").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    options = ["--preset", "tiny", "--steps", "4", "--save-every", "2", *BRIEF, "--out", tmp_path / "out"]
    assert "cannot read checkpoint" in refused("teacher", *options, "--resume")


def test_models_are_not_overwritten(story):
    options = ["flowmap", "--preset", "tiny", "--init", story["teacher"], "--out", story["forward"]]
    assert "earlier run or a model" in refused(*options)


def test_foreign_folders_are_named(story, tmp_path):
    tiny = ["--preset", "tiny", "--steps", "2", *BRIEF, "--out", tmp_path / "out"]
    assert "--init is missing" in refused("flowmap", *tiny)
    assert "no model folder" in refused("flowmap", *tiny, "--init", tmp_path / "none")
    assert "stage flowmap" in refused("consistency", *tiny, "--init", story["forward"])
    assert "stage consistency" in refused(
        "onpolicy", *tiny, "--init", story["consistency"], "--teacher", story["teacher"]
    )
    Wan(WanConfig(**{**train.preset("tiny")[0].__dict__, "num_layers": 2})).save_pretrained(tmp_path / "small")
    assert "num_layers 2, expected 4" in refused("flowmap", *tiny, "--init", tmp_path / "small")
    causal = ["--preset", "tiny-causal", "--steps", "2", *BRIEF, "--out", tmp_path / "out"]
    assert "kind teacher" in refused("flowmap", *causal, "--init", story["teacher"])
    bidirectional = ["--init", story["forward"], "--teacher", story["teacher"], "--real", story["causal-teacher"]]
    assert "bidirectional judge" in refused("onpolicy", *tiny, *bidirectional)
    assert "lora is 4" in refused("teacher", *tiny, "--lora", "4")


@pytest.mark.parametrize("options, words", [
    (["--batch", "7", "--accumulate", "2"], "multiple of"),
    (["--steps", "0"], "steps is 0"),
    (["--lr", "-1"], "lr is -1"),
    (["--lr", "nan"], "lr is nan"),
    (["--drop", "2"], "drop is 2"),
    (["--seed", "-1"], "seed is -1"),
])  # fmt: skip
def test_numbers_out_of_range(options, words, tmp_path):
    assert words in refused("teacher", "--preset", "tiny", "--out", tmp_path / "out", *options)


def test_presets_carry_the_published_recipe():
    stages = {stage: train.Recipe(**changes) for stage, changes in train.preset("wan-14b-causal")[2].items()}
    forward, policy = stages["flowmap"], stages["onpolicy"]
    assert (forward.steps, forward.batch, forward.lr, forward.beta2, forward.lora) == (4000, 16, 5e-5, 0.95, 256)
    assert (policy.steps, policy.lr, policy.beta1, policy.ema) == (1200, 2e-6, 0.0, 0.99)
    config, shape, _ = train.preset("wan-1.3b-causal")
    assert config.kind == "causal" and sum(config.chunk_partition) == shape[0] == 21


def test_environment_is_left_alone():
    assert "RANK" not in os.environ and not torch.distributed.is_initialized()
