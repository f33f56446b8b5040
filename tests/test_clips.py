"""What a step of training draws, and what the loop does with it: shares, distributions, rates and order."""

import collections
import itertools
import types
from dataclasses import replace

import pytest
import torch

import anyflow
import train
from full.data import preset
from model import Wan

@pytest.mark.parametrize("warmup, decay", [(0, 0.0), (10, 0.0), (0, 0.5), (10, 0.5), (10, 1.0), (80, 1.0)])
def test_the_learning_rate_rises_and_falls_in_straight_lines(warmup, decay):
    """From 1 / warmup to 1, then over the last share of the steps down to one part, never 0: the lesser."""
    recipe = train.Recipe(steps=100, warmup=warmup, decay=decay)
    rate = torch.tensor([train.learning_rate_at(step, recipe) for step in range(100)], dtype=torch.float64)
    rises = torch.arange(1, 101, dtype=torch.float64) / max(1, warmup)
    falls = torch.arange(100, 0, -1, dtype=torch.float64) / (100 * decay) if decay else torch.ones(100)
    assert torch.allclose(rate, torch.stack([rises, falls, torch.ones(100)]).amin(0)) and rate.min() > 0


class Places:
    """Clips and prompts that are their place in the row, and a null prompt of -1."""

    null = torch.full((1, 1, 1), -1.0)

    def __init__(self, shape):
        self.shape, self.asked = shape, []

    def batch(self, positions, seed):
        self.asked += positions
        places = torch.tensor(positions).float()
        return places.reshape(-1, 1, 1, 1, 1).expand(-1, *self.shape), places.reshape(-1, 1, 1)


def places(stage="flowmap", name="tiny", **changes):
    """Clips of `Places`, a pixel each, of one preset's recipe."""
    config, shape = preset(name)
    data = Places((shape[0], 1, 1, 1))
    recipe = train.recipe_of("tiny", stage, dict(batch=4) | changes)
    return train.Clips(data, recipe, config, data.shape, torch.device("cpu"), 3)


@pytest.mark.parametrize("fresh", [False, True])
def test_every_draw_of_every_step_takes_clips_of_its_own(fresh):
    """All that lie in a row up to there, each once; with fresh ones for the fake score, those too."""
    clips = places("onpolicy", fake_steps=2, fake_samples="fresh" if fresh else "reused", accumulate=2)
    for step in range(3):
        for draw_ in range(3 if fresh else 1):
            for part in range(2):
                clips.batch(step, part, draw_)
    assert clips.data.asked == [*range(4 * 3 * (3 if fresh else 1))]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_steps_with_whole_clips_are_evenly_spread(share):
    """After n steps n times the share, rounded down; never for a bidirectional model."""
    clips = places(name="tiny-causal", bidirectional=share)
    made = torch.tensor([clips.has_whole_clips(step) for step in range(1000)]).cumsum(0)
    assert made.tolist() == [int(n * round(10 * share) // 10) for n in range(1, 1001)]
    assert not any(map(places(bidirectional=share).has_whole_clips, range(20)))


def test_chunks_are_in_half_of_the_steps_those_of_the_window_and_else_any_number_from_there():
    clips, common = places(name="tiny-causal"), train.generator(0)
    counts = torch.tensor([clips.draw_chunks(common) for _ in range(3000)]).bincount(minlength=6)
    assert counts[:3].sum() == 0  # window 3 of 5: 1/2 and a third of the other half, then a third each
    assert torch.allclose(counts[3:] / 3000, torch.tensor([2 / 3, 1 / 6, 1 / 6]), atol=0.03)


def test_prompts_are_dropped_one_by_one_as_often_as_asked_and_never_for_rollouts():
    clips = places(batch=400, drop=0.25)
    shares = []
    for step in range(10):
        b = clips.batch(step, 0)
        dropped = (b.cond["text"] == -1)[:, 0, 0]
        assert torch.equal(b.text[:, 0, 0], b.clip[:, 0, 0, 0, 0]) and (b.text >= 0).all()
        assert torch.equal(b.cond["text"][~dropped], b.text[~dropped])
        shares.append(dropped.float().mean())
    assert abs(sum(shares) / 10 - 0.25) < 0.03 and 0.1 < min(shares) and max(shares) < 0.4


@pytest.mark.parametrize("name, own", [("tiny", 0.5), ("tiny", 0.0), ("tiny-causal", 0.5)])
def test_times_of_the_teacher_are_normal_before_shift_and_sigmoid(name, own):
    """Of std 1, one for all frames; a share of a bidirectional teacher's clips has one a frame, std 1.5."""
    clips = places("teacher", name, batch=4000, own_times=own, shift=3.0)
    t = anyflow.shift_time(clips.batch(0, 0).t_clip.double(), 1 / 3).logit()
    alone = (t != t[:, :1]).any(1) if t.shape[1] > 1 else torch.zeros(4000, dtype=torch.bool)
    own = own if name == "tiny" else 0.0
    assert abs(alone.double().mean() - own) < 0.03
    assert abs(t[~alone][:, 0].std() - 1) < 0.06 and abs(t.mean()) < 0.06
    assert not own or abs(t[alone].std() - 1.5) < 0.06


@pytest.mark.parametrize("stage", ["flowmap", "onpolicy"])
def test_times_of_a_batch_are_shifted_and_have_the_shares_asked_for(stage):
    clips = places(stage, batch=4000, diffusion=0.3, endpoint=0.1, shift=4.0)
    b = clips.batch(0, 0)
    shares = torch.stack([b.t == b.r, b.r == 0]).double().mean(1)
    assert torch.allclose(shares, torch.tensor([0.3, 0.1], dtype=torch.float64), atol=1e-3)
    undone = lambda t: anyflow.shift_time(t.double(), 1 / 4).mean().item()
    assert undone(b.t) == pytest.approx(2 / 3, abs=0.02)
    assert undone(b.t_consistency) == pytest.approx(1 / 2, abs=0.02)


def test_a_rollout_draws_its_number_of_calls_its_step_and_the_times_of_dmd(monkeypatch):
    """Of N every one equally often, of k every one below N, on the shifted grid; t uniform, then shifted."""
    clips, drawn, times = places("onpolicy", rollout_steps=(2, 5), shift=4.0), [], []
    monkeypatch.setattr(train.Clips, "chunk_by_chunk", lambda self, student, simulate, batch, *more: (
        drawn.append((simulate.keywords["grid"], simulate.keywords["k"])), batch.clip)[1])
    judge = types.SimpleNamespace(config=types.SimpleNamespace(kind="teacher"))
    for step in range(600):
        _, options, _, _ = clips.rollout(None, judge, clips.batch(step, 0))
        times.append(options["t"])
    counts = collections.Counter((len(grid) - 1, k) for grid, k in drawn)
    assert all(torch.equal(grid, anyflow.time_grid(len(grid) - 1, 4.0)) for grid, _ in drawn)
    wanted = {(2, k): 150 for k in range(2)} | {(5, k): 60 for k in range(5)}
    assert counts.keys() == wanted.keys() and all(abs(counts[key] / wanted[key] - 1) < 0.5 for key in wanted)
    t = anyflow.shift_time(torch.cat(times).double(), 1 / 4)
    assert abs(t.mean() - 1 / 2) < 0.03 and abs(t.std() - 12**-0.5) < 0.02


def test_noise_is_anew_for_every_clip_step_and_use():
    clips = places("onpolicy", fake_samples="fresh", accumulate=2)
    batches = [clips.batch(step, part, draw_) for step in range(3) for part in range(2) for draw_ in range(3)]
    noise = torch.cat([torch.cat([b.noise, b.noise_of(1), b.noise_of(2)]) for b in batches]).flatten(1)
    assert len(noise.unique(dim=0)) == len(noise) == 3 * 2 * 3 * 3 * 2


def loop(monkeypatch, stage, steps=3, whole=(), **changes):
    """`train.train` over stubs: the rows of its log, and what was asked of whom with which numbers."""
    recipe = train.Recipe(steps=steps, warmup=0, decay=1.0, lr=1.0, fake_lr=0.5, **changes)
    asked, weight = [], torch.nn.Parameter(torch.ones(()))
    tell = lambda *what, value=None: asked.append(what) or value
    nets = {role: types.SimpleNamespace(name=role) for role in ("student", "teacher", "judge", "fake")}
    run = types.SimpleNamespace(nets=nets, trained={"student": "of student", "fake": "of fake"}, step=0,
                                update_average=lambda recipe: tell("average", run.step))
    run.optimisers = {role: types.SimpleNamespace(param_groups=[{}], zero_grad=lambda: None)
                      for role in run.trained}
    for role, optimiser in run.optimisers.items():
        optimiser.step = lambda role=role, group=optimiser.param_groups[0]: tell("step", role, group["lr"])
    clips = types.SimpleNamespace(
        device="cpu", go_back=lambda: None, has_whole_clips=lambda step: step in whole,
        batch=lambda step, part, draw: tell("batch", step, part, draw, value="batch"))
    norm = lambda net, weights, recipe: tell("clip", net.name, weights, value=1.0)
    monkeypatch.setattr(train, "clip_norm", norm)
    monkeypatch.setattr(train, "loss_from_data", lambda *args: tell("data", value=weight * 1))
    monkeypatch.setattr(train, "loss_of_whole_clip", lambda *args: tell("whole", value=weight * 1))

    def on_policy_step(batches, rollout, stage_1, judge, fake, backward, update, *, fresh, **options):
        tell("options", judge.name, fake.name, options)
        for batch in batches:
            backward("loss", stage_1(batch))
        update("student")
        for i in range(options["fake_steps"]):
            backward("fake", sum(weight for _ in fresh(i)))
            update("fake")

    monkeypatch.setattr(anyflow, "on_policy_step", on_policy_step)
    return list(train.train(stage, recipe, run, clips)), asked, weight.grad


def test_a_step_of_stage_two_has_its_own_rates_gradients_and_fresh_draws(monkeypatch):
    options = dict(dmd=2.5, fake_steps=2, fake_samples="fresh", accumulate=2, batch=2)
    _, asked, _ = loop(monkeypatch, "onpolicy", steps=2, **options)
    for step, scale in enumerate((1.0, 0.5)):  # over two steps the rate falls from 1 to 0
        wanted = [("options", "judge", "fake", dict(dmd_weight=2.5, fake_steps=2))]
        wanted += [said for part in range(2) for said in (("batch", step, part, 0), ("data",))]
        wanted += [("clip", "student", "of student"), ("step", "student", scale)]
        for draw_ in (1, 2):
            wanted += [*(("batch", step, part, draw_) for part in range(2)), ("clip", "fake", "of fake"),
                       ("step", "fake", 0.5 * scale)]
        assert asked[: len(wanted) + 1] == [*wanted, ("average", step)]
        del asked[: len(wanted) + 1]


@pytest.mark.parametrize("stage", ["teacher", "flowmap", "consistency"])
def test_a_step_on_data_is_a_mean_over_micro_batches_and_whole_clips_come_in_their_steps(stage, monkeypatch):
    rows, asked, gradient = loop(monkeypatch, stage, whole=(1,), accumulate=4, batch=4)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert ["whole" in row for row in rows] == [False, stage != "consistency", False]
    assert gradient == 3 + (stage != "consistency"), "each loss has the gradient 1, and a step their mean"
    assert [what[1] for what in asked if what[0] == "average"] == [0, 1, 2]


@pytest.mark.parametrize("judge", ["causal", "teacher"])
def test_a_causal_judge_sees_the_students_own_earlier_chunks_without_gradient(judge, monkeypatch):
    monkeypatch.setattr(train.Clips, "draw_chunks", lambda *args: 5)
    config, shape = preset("tiny-causal")
    student, judge = Wan(replace(config, num_layers=1)), Wan(replace(config, kind=judge, num_layers=1))
    recipe = train.recipe_of("tiny", "onpolicy", dict(batch=2, rollout_steps=(2,)))
    clips = train.Clips(train.WORLDS["stars"], recipe, config, shape, torch.device("cpu"), 3)
    batch = clips.batch(0, 0)
    x_hat, options, fake_options, cond = clips.rollout(student, judge, batch)
    causal = judge.config.kind == "causal"
    assert cond.keys() == ({"text", "clean", "chunks"} if causal else {"text"})
    assert x_hat.requires_grad and torch.equal(cond["text"], batch.text)
    noises = [options["noise"], fake_options(0)["noise"], fake_options(1)["noise"]]
    assert all(noise.shape == x_hat.shape for noise in noises)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(noises, 2))
    if causal:
        assert cond["clean"].shape == (2, *shape) and not cond["clean"].requires_grad
        assert torch.equal(cond["clean"][:, -x_hat.shape[1] :], x_hat.detach()) and x_hat.shape[1] == 6
        assert not torch.equal(cond["clean"], batch.clip)


def at(time):
    return time[:, None, None, None, None]


STAGE_1 = {  # options of the recipe: what they are called with in `anyflow.flow_map_loss`
    "as published": ({}, {}),
    "guidance": (dict(guidance=2.0), dict(guidance=2.0)),
    "consistent": 2 * (dict(guidance=2.0, guidance_form="consistent"),),
    "shift": (dict(shift=1.5), {}),
    "data anchors": (dict(data_anchors=True), dict(data_anchors=True)),
    "teacher's anchors": (dict(data_anchors=False), dict(data_anchors=False)),
    "balance": (dict(balance=True), dict(balance=True)),
    "eps": (dict(eps=0.1), dict(eps=0.1)),
    "weight": (dict(weight="inverse"), dict(weight=lambda t: 1 / (t + 0.05))),
}


@pytest.mark.parametrize("case", STAGE_1)
@pytest.mark.parametrize("stage", ["flowmap", "onpolicy"])
def test_the_loss_on_data_has_the_options_of_the_recipe(case, stage):
    changes, options = STAGE_1[case]
    clips = places(stage, batch=8, **dict(weight="paper", balance=False) | changes)
    student = lambda z, t, r, text: (z / 9).sin() * at(1 + t + r**2) + at(text.mean((1, 2))) / 9
    teacher = lambda z, t, r, text: (z / 9).cos() * at(1 - t)
    b, recipe = clips.batch(0, 0), clips.recipe
    loss = train.loss_from_data(stage, recipe, student, teacher, b, train.Means(), torch.zeros(2))
    wanted = anyflow.flow_map_loss(
        student, b.x, t=b.t, r=b.r, noise=b.noise, teacher=teacher, null=b.null, shift=recipe.shift,
        **dict(data_anchors=True, balance=False) | options, **b.cond)
    assert torch.equal(loss, wanted)


@pytest.mark.parametrize("stage, changes", [("consistency", {}), ("onpolicy", dict(rollout="consistency"))])
def test_the_baseline_learns_from_data_by_consistency(stage, changes):
    clips = places(stage, batch=8, teacher_steps=5, guidance=2.0, shift=3.0, weight="inverse", **changes)
    net = lambda z, t, r, text: (z / 9).sin() * at(1 + t + r**2) + at(text.mean((1, 2))) / 9
    b = clips.batch(0, 0)
    loss = train.loss_from_data(stage, clips.recipe, net, net, b, train.Means(), torch.zeros(2))
    wanted = anyflow.consistency_loss(
        net, net, b.x, t=b.t_consistency, noise=b.noise, steps=5, shift=3.0, guidance=2.0, null=b.null,
        weight=lambda t: 1 / (t + 0.05), **b.cond)
    assert torch.equal(loss, wanted)


def test_the_optimiser_has_the_betas_of_the_recipe_and_no_weight_decay(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(train.torch.optim, "AdamW", lambda weights, **options: given.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.run_stage(train.parse(["teacher", "--preset", "tiny", "--beta1", "0.3", "--beta2", "0.7",
                                     "--out", str(tmp_path)]))
    assert given["betas"] == (0.3, 0.7) and given["weight_decay"] == 0
