"""The video world's laws, a tracker that sees each way of breaking them, and what is told of models."""

import json
import math
import types
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyflow import sample, time_grid
from full.data import Shards, preset
from full.files import WEIGHTS as FILE
from full.files import provenance, write_json
from model import Wan
from sample import generate, sampler_of_folder
from toy import video
from toy.video import NFE, SHIFT, STORY, TASKS, WEIGHTS, Ruler, decide, world_of, write_shards
from toy.world import (
    KINDS,
    PAINT,
    SIZE,
    SPEEDS,
    WORLDS,
    Pixels,
    describe,
    embed,
    enlarge,
    features,
    frechet,
    mask,
    nearest,
    parse_prompt,
    score,
    track,
    wrap,
)

WORDS = ("colour", "shape", "direction", "speed")


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


@pytest.fixture(params=["torus", "stars-gravity"])
def extreme(request):
    """The world with least in it, and that with most."""
    return WORLDS[request.param]


def clips(world, n=48, seed=1):
    return world.clips(range(n), seed)


def test_world_repeats_by_number(world):
    """Clip i is the same alone, in a batch and in another order; another seed has other clips."""
    x, text = world.batch([5, 2, 7], seed=3)
    y, other = world.batch([7], seed=3)
    assert torch.equal(x[2:], y) and torch.equal(text[2:], other)
    assert not torch.equal(world.batch([7], seed=4)[0], y)


def test_torus_has_no_edges():
    """To start a pixel further right is to be rolled by a pixel, wherever the object is; by SIZE, nothing."""
    world = WORLDS["torus"]
    x, labels, start = clips(world)
    assert torch.allclose(world.render(labels, start + torch.tensor([1.0, 0])), x.roll(1, -1), atol=1e-5)
    assert torch.allclose(world.render(labels, start + SIZE), x, atol=1e-5)


def test_motion_law(world):
    """Second differences of the path are gravity; without it the first are the prompt's velocity."""
    _, labels, _ = clips(world)
    path = world.offsets(labels)
    assert torch.allclose(path.diff(dim=1, n=2), torch.tensor([0, world.gravity]).expand(48, 7, 2))
    slow_left = torch.tensor([[0, 0, 1, 0]])
    assert torch.equal(WORLDS["torus"].offsets(slow_left)[0, :, 0], -torch.arange(9.0))
    fast_up = torch.tensor([[0, 0, 2, 1]])  # the first step has a whole frame's gravity already
    assert torch.equal(WORLDS["gravity"].offsets(fast_up, 3)[0], torch.tensor([[0, 0], [0, -1.5], [0, -2.5]]))


def test_words_and_starts_are_drawn_evenly(extreme):
    """Every word of a kind equally often, to three deviations or so, and starts all over the torus."""
    labels, start = extreme.draw(range(3000), seed=1)
    for drawn, words in zip(labels.T, (extreme.colours, *KINDS[1:])):
        found, times = drawn.unique(return_counts=True)
        assert len(found) == len(words) and (times * len(words) / 3000 - 1).abs().max() < 0.1
    assert torch.allclose(start.quantile(torch.tensor([0, 0.5, 1]), 0).T, SIZE * torch.tensor([0, 0.5, 1]),
                          atol=0.3)


def test_stars_are_drawn_beside_the_start():
    """No pixel's star says where the object is."""
    world = WORLDS["stars"]
    stars, (_, start) = world.twinkle(range(400), 1), world.draw(range(400), 1)
    assert torch.corrcoef(torch.cat([start, stars.flatten(1)], 1).T)[:2, 2:].abs().max() < 0.3


def test_shapes_cover_their_area():
    """A disc of radius 2.5 covers pi 2.5^2 pixels, a cross two bars of 6.5 x 1.6, wherever it is, to the
    accuracy of its soft edge."""
    for shape, (wanted, soft) in enumerate(((torch.pi * 2.5**2, 0.5), (2 * 6.5 * 1.6 - 1.6**2, 1.2))):
        area = mask(SIZE * torch.rand(500, 2), torch.full((500,), shape)).sum((1, 2))
        assert (area - wanted).abs().max() < soft
    centre = SIZE * torch.rand(50, 2)
    assert torch.equal(mask(centre, torch.ones(50)), mask(centre.flip(1), torch.ones(50)).mT)


def test_real_clips_score_perfectly(world):
    x, labels, start = clips(world)
    scores = score(x, labels, world)
    assert scores["distance"] < 0.02 and 0.1 < scores["frechet"] < 1.5 and abs(scores["diversity"] - 1) < 0.1
    assert all(scores[key] == 1 for key in ("sharp", "physics", *WORDS))
    if world.stars:
        assert scores["star rate"] == pytest.approx(world.stars, abs=0.002) and scores["star grain"] < 1e-3


def test_tracker_finds_the_start_and_every_centre(world):
    x, labels, start = clips(world)
    found, _ = nearest(x, labels, world)
    assert wrap(found - start).norm(dim=1).max() < 0.1
    colour, shape, centre, error = track(x + 0.1 * torch.randn_like(x), world.stars)
    assert torch.equal(colour, labels[:, 0]) and torch.equal(shape, labels[:, 1])
    assert wrap(centre - start[:, None] - world.offsets(labels)).norm(dim=2).max() < 0.5


def broken(x):
    padded = torch.nn.functional.pad(x.flatten(0, 1), (2, 2, 2, 2), mode="circular")
    blur = torch.nn.functional.avg_pool2d(padded, 5, 1)
    return {
        "blurred": blur.view_as(x),
        "noisy": x + torch.randn_like(x),
        "frozen": x[:, :1] + 0.2 * torch.randn_like(x),
        "shuffled": x[:, [4, 0, 7, 2, 8, 5, 1, 6, 3]],
        "jumping": torch.cat([x[:, :5], x[:, 5:].roll((1, 1), (3, 4))], 1),
        "teleporting": torch.cat([x[:, :5], x[:, 5:].roll((5, 4), (3, 4))], 1),
        "reversed": x.flip(1),
        "wrong colour": -x.flip(2),
        "empty": torch.zeros_like(x),
    }


@pytest.mark.parametrize("how, failing, passing", [
    ("blurred", ["sharp"], ["physics", "direction", "speed"]),
    ("noisy", ["sharp"], ["colour", "direction", "speed"]),
    ("frozen", ["physics", "direction"], ["sharp", "colour", "shape"]),
    ("shuffled", ["physics"], ["sharp", "colour", "shape"]),
    ("jumping", ["physics"], ["sharp", "colour", "shape", "direction", "speed"]),
    ("teleporting", ["physics"], ["sharp", "colour", "shape", "direction", "speed"]),
    ("reversed", ["direction"], ["sharp", "physics", "shape", "speed"]),
    ("empty", ["sharp", "direction"], []),
])
def test_tracker_fails_broken_clips_where_it_should(how, failing, passing):
    x, labels, _ = clips(WORLDS["torus"])
    scores = score(broken(x)[how], labels, WORLDS["torus"])
    assert scores["distance"] > 0.4
    assert all(scores[key] < 0.1 for key in failing), scores
    assert all(scores[key] > 0.95 for key in passing), scores


def test_stars_are_anew_in_each_frame_and_behind_the_object():
    """A share of 0.06 of the background, independent from frame to frame, white; none where the object is."""
    world = WORLDS["stars"]
    x, labels, start = clips(world, 200)
    covered = world.covered(labels, start)
    star = (x == 1).all(2)
    ground = covered == 0
    assert abs(star[ground].float().mean() - 0.06) < 0.002 and not (star & (covered == 1)).any()
    both = ground[:, 1:] & ground[:, :-1]
    assert abs((star[:, 1:] & star[:, :-1])[both].float().mean() - 0.06**2) < 0.001
    assert torch.equal(world.render(labels, start), clips(WORLDS["torus"], 200)[0])  # the same objects


@pytest.mark.parametrize("how, failing", [
    ("missing", dict(rate=0.0)), ("too many", dict(rate=0.12)), ("grey", dict(grain=0.4 * 0.06**0.5)),
    ("faint", dict(rate=0.0, grain=0.4 * 0.06**0.5)), ("grain", dict(grain=0.1)),
    ("on the object", dict(grain=0.013)),
])
def test_tracker_sees_broken_stars(how, failing):
    """Each way of breaking stars shows in its own score, and leaves what the object does as it was."""
    world = WORLDS["stars"]
    x, labels, start = clips(world)
    plain, rest = world.render(labels, start), 1 - world.covered(labels, start)[:, :, None]
    more = (torch.rand_like(rest) < 0.12).float()
    y = {
        "missing": plain,
        "too many": plain + rest * more,
        "grey": plain + 0.6 * (x - plain),
        "faint": plain + 0.4 * (x - plain),
        "grain": x + 0.1 * rest * torch.randn_like(x),
        "on the object": torch.where((more > 0) & (rest < 1), 1.0, x),
    }[how]
    scores = score(y, labels, world)
    wanted = dict(rate=world.stars, grain=0.0) | failing
    assert scores["star rate"] == pytest.approx(wanted["rate"], abs=0.005)
    assert scores["star grain"] == pytest.approx(wanted["grain"], rel=0.1, abs=2e-3)
    assert (scores["distance"] > 0.2) == (how == "on the object")
    assert all(scores[key] > 0.95 for key in ("physics", *WORDS))


def test_nearest_clip_is_exact_under_stars():
    """Of clips with every kind of error the distance is what a search over starts and stars by hand finds."""
    world = WORLDS["stars-gravity"]
    x, labels, start = clips(world, 6)
    x = x + 0.3 * torch.randn_like(x)
    found, distance = nearest(x, labels, world)
    covered = world.covered(labels, found)
    plain = world.render(labels, found)[:, :, :, None]
    both = torch.cat([plain, plain + (1 - covered)[:, :, None, None]], 3)  # (B, F, 3, 2, 12, 12)
    squared = (x[:, :, :, None] - both).square().sum(2).amin(2).sum((1, 2, 3))
    energy = plain.square().sum((1, 2, 3, 4, 5))
    assert torch.allclose(distance, (squared / energy).sqrt(), atol=1e-5)
    assert wrap(found - start).norm(dim=1).max() < 0.15


def brute_force(world, z, t, label, around, half, n):
    """E[eps - x | z] of one clip by n x n starts of equal weight in around +- half; x drawn by `render`."""
    axis = ((torch.arange(n) + 0.5) / n * 2 - 1).double() * half
    starts = around + torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)
    total, mean, best = 0.0, 0.0, -torch.inf
    for some in starts.split(256):
        labels = label.expand(len(some), -1)
        none = world.render(labels, some).double()
        star = world.render(labels, some, stars=torch.ones(1)).double()
        log_p = [torch.tensor(q).double().log() - (z - (1 - t) * x).square().sum(2) / (2 * t * t)
                 for q, x in ((1 - world.stars, none), (world.stars, star))]
        either = torch.logaddexp(*log_p)
        x = none + (log_p[1] - either).exp()[:, :, None] * (star - none)
        likely = either.sum((1, 2, 3))
        now = max(best, likely.max().item())
        scale, weight, best = torch.tensor(best - now).exp(), (likely - now).exp(), now
        total = total * scale + weight.sum()
        mean = mean * scale + torch.einsum("s,s...->...", weight, x)
    return (z - mean / total) / t


@pytest.mark.parametrize("t, half, n", [(1.0, SIZE / 2, 48), (0.95, SIZE / 2, 120), (0.7, 0.9, 64),
                                        (0.3, 0.16, 48), (0.02, 0.008, 48), (0.001, 0.0004, 48)])
def test_velocity_is_that_of_brute_force(extreme, t, half, n):
    """To 1e-3 of the RMS, from noise, where the object may be anywhere, to where its place is 1e-4 pixels."""
    x, labels, start = extreme.clips(range(3), seed=5)
    z = ((1 - t) * x + t * torch.randn_like(x)).double()
    v = extreme.velocity(z, t, labels)
    for i in (0, 2):
        exact = brute_force(extreme, z[i], t, labels[i], start[i].double(), half, n)
        assert (v[i] - exact).square().mean().sqrt() < 1e-3 * exact.square().mean().sqrt()


def test_velocity_of_objects_between_pixels_in_other_frames(monkeypatch):
    """Of a speed of 1.5 beside one of 1: each clip as alone."""
    monkeypatch.setitem(SPEEDS, "slow", 1.5)
    world, labels = WORLDS["stars"], torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 2, 0]])
    z = torch.randn(3, *world.shape)
    v = world.velocity(z, 0.5, labels)
    for i in range(3):
        alone = world.velocity(z[i : i + 1], 0.5, labels[i : i + 1])
        assert (v[i] - alone[0]).abs().max() < 1e-4


def test_velocity_at_pure_noise_is_to_the_prior_mean(extreme):
    """At t = 1 nothing is known of the clip: E[x] is the coverage's mean over the torus, and stars behind."""
    _, labels, _ = clips(extreme, 4)
    z = torch.randn(4, *extreme.shape)
    area = torch.stack([mask(SIZE * torch.rand(20000, 2), s.expand(20000)).mean() for s in labels[:, 1]])
    mean = area[:, None] * PAINT[labels[:, 0]] + extreme.stars * (1 - area[:, None])
    v = extreme.velocity(z, 1.0, labels)
    assert torch.allclose(v, z - mean[:, None, :, None, None], atol=0.01)


def test_velocity_is_a_regression_of_noise_minus_clip(extreme):
    """E[(eps - x) v] = E[v v] at random times, also with times for each frame; nothing else is orthogonal."""
    x, labels, _ = clips(extreme, 16)
    for t in (torch.rand(16), torch.rand(16, extreme.frames)):
        noise, time = torch.randn_like(x), t.reshape(16, -1, 1, 1, 1)
        v = extreme.velocity((1 - time) * x + time * noise, t, labels)
        product = (v * (noise - x - v)).mean((1, 2, 3, 4))
        assert product.mean().abs() < 4 * product.std() / 16**0.5 and product.mean().abs() < 0.02
        assert (v * (noise - x)).mean() > 1


def test_exact_flow_ends_in_the_world(extreme):
    """The ODE's end is a clip of the world; given all frames but the last at t = 0, their object goes on."""
    labels = extreme.draw(range(2), seed=8)[0]
    states = extreme.flow(torch.randn(2, *extreme.shape), time_grid(24, 4.0), labels)
    scores = score(states[-1].float(), labels, extreme)
    assert len(states) == 25 and scores["distance"] < 0.03 and scores.get("star grain", 0) < 0.02
    x, labels, start = clips(extreme, 4)
    t = torch.zeros(4, extreme.frames)
    t[:, -1] = 1.0
    last = (x - t[:, :, None, None, None] * extreme.velocity(x, t, labels))[:, -1]
    assert torch.allclose(last, extreme.render(labels, start)[:, -1]
                          + extreme.stars * (1 - extreme.covered(labels, start))[:, -1, None], atol=0.02)


def test_prompts_decide_the_score():
    """Clips of other prompts are as good to look at and wrong in every word."""
    world = WORLDS["torus"]
    x, labels, _ = clips(world)
    other = torch.stack([(labels[:, i] + 1) % n for i, n in enumerate((3, 2, 4, 2))], 1)
    scores = score(x, other, world)
    assert all(scores[key] == 0 for key in WORDS) and scores["sharp"] == scores["physics"] == 1


def test_collapse_shows_in_diversity_and_frechet():
    world = WORLDS["torus"]
    _, labels, _ = clips(world)
    scores = score(world.render(labels, torch.full((48, 2), 3.0)), labels, world)
    assert scores["distance"] < 0.02 and scores["diversity"] < 0.01 and scores["frechet"] > 3


def test_diversity_of_two_clips_is_their_distance_over_that_of_uniform_ones():
    """Which is (sqrt 2 + arsinh 1) / 6 of a torus of side 1."""
    world = WORLDS["torus"]
    labels, start = clips(world, 2)[1], torch.tensor([[1.0, 2.0], [7.0, 8.0]])
    wanted = 72**0.5 / SIZE * 6 / (2**0.5 + math.asinh(1))
    assert score(world.render(labels, start), labels, world)["diversity"] == pytest.approx(wanted, rel=0.01)


def test_features_have_no_edges():
    """Two clips whose starts lie on both sides of an edge are alike."""
    world = WORLDS["torus"]
    x = world.render(torch.zeros(2, 4).long(), torch.tensor([[0.1, 11.9], [11.9, 0.1]]))
    first, second = features(x, track(x))
    assert (first - second).abs().max() < 0.3


def test_frechet_of_gaussians():
    """Equal samples: 0. A shift by d deviations: d^2. Deviation s instead of 1: (s - 1)^2 an axis."""
    a = torch.randn(20000, 2)
    a = (a - a.mean(0)) / a.std(0)
    near = dict(rel=0.25)  # of the floor under each deviation, 0.1
    assert frechet(a, a).abs() < 1e-6
    assert frechet(a + torch.tensor([3.0, 0]), a).item() == pytest.approx(9, **near)
    assert frechet(2 * a, a).item() == pytest.approx(2, **near)


def test_prompt_words():
    labels = torch.tensor([[0, 1, 3, 0]])
    assert torch.tensor(parse_prompt(describe(labels[0]))).equal(labels[0])
    assert parse_prompt("A fast, white disc moving up.") == (3, 0, 2, 1)
    for prompt, name in (("a red disc moving left", "speed"), ("a slow fast red disc left", "speed"),
                         ("", "colour")):
        with pytest.raises(ValueError, match=name):
            parse_prompt(prompt)
    assert embed(labels).shape == (1, 4, 32)
    assert not torch.equal(embed(labels)[:, 0], embed(None)[:, 0])


def test_clips_are_shown_side_by_side_in_their_colours():
    """From -2 to 2 a channel goes from dark to bright, the background is grey; each pixel is a square."""
    x = torch.zeros(2, 1, 3, SIZE, SIZE)
    x[1, 0, :, 0, 1] = torch.tensor([2.0, -2.0, 1.0])
    shown = torch.from_numpy(enlarge(x)).int()
    wanted = torch.full((1, 144, 288, 3), 128)
    wanted[0, :12, 156:168] = torch.tensor([255, 0, 191])
    assert torch.equal(shown, wanted.int()) and Pixels().shift() == SHIFT


def test_shards_hold_the_worlds_clips(tmp_path):
    world = WORLDS["torus"]
    write_shards(world, tmp_path, 10, seed=2, size=4)
    data = Shards(tmp_path, world.shape, 32)
    x, text = data.batch(range(10), seed=0)
    y, prompts = world.batch(range(10), seed=2)
    order = [(clip - y).flatten(1).norm(dim=1).argmin().item() for clip in x]
    assert sorted(order) == list(range(10)) and order != sorted(order)  # an epoch: every clip once, shuffled
    assert torch.equal(x, y[order]) and torch.equal(text, prompts[order])
    assert torch.equal(data.null, world.null)


def test_epochs_of_shards_are_shuffled_by_the_seed_and_their_number(tmp_path):
    """Each has every clip once; numbers of bfloat16 come in float32; what is still written is no shard."""
    clips, half = torch.arange(16.0).reshape(16, 1, 1, 1, 1).bfloat16(), dict(dtype=torch.bfloat16)
    save_file({"text": torch.zeros(1, 2, 3, **half)}, tmp_path / "null.safetensors")
    for name in ("a", ".b.part"):
        save_file({"latents": clips, "text": torch.zeros(16, 2, 3, **half)}, tmp_path / f"{name}.safetensors")
    data = Shards(tmp_path, (1, 1, 1, 1), 3)
    order = lambda places, seed: data.batch(places, seed)[0].flatten().tolist()
    epochs = [order(range(16 * i, 16 * i + 16), seed) for seed in (0, 1) for i in (0, 1)]
    assert len({*map(tuple, epochs)}) == 4 and all(sorted(epoch) == [*range(16)] for epoch in epochs)
    assert order(range(8, 24), 0) == epochs[0][8:] + epochs[1][:8] and order([3], 1) == epochs[2][3:4]
    assert {x.dtype for x in (*data.batch([0], 0), data.null)} == {torch.float32}


@pytest.mark.parametrize("name", STORY)
def test_kept_weights_do_what_their_prompts_say(name):
    """Each of the nine, in 4 calls, on two prompts of its world: nearer to a clip of it than an empty one."""
    folder = WEIGHTS / name
    world, model = world_of(folder), Wan.from_pretrained(folder, dtype=torch.float32)
    labels, noise = world.draw(range(2), 3)[0], torch.randn(2, *world.shape)
    clips = generate(model, embed(labels), noise, 4, shift=SHIFT, sampler=sampler_of_folder(folder))
    assert score(clips, labels, world)["distance"] < 0.9


def test_path_is_held_against_the_exact_one():
    """`generate` hands out the states of a bidirectional model, and no causal model has one path; the ruler
    finds the exact states at distance 0, Euler's at 32 calls at a few per cent, and noise far off."""
    model = Wan.from_pretrained(WEIGHTS / "bidirectional-anyflow", dtype=torch.float32)
    noise, text = torch.randn(1, 9, 3, 12, 12), embed(torch.tensor([[0, 0, 0, 0]]))
    states = generate(model, text, noise, 4, path=True)
    assert torch.equal(states[0], noise) and torch.equal(states[-1], generate(model, text, noise, 4))
    with pytest.raises(ValueError, match="bidirectional"):
        generate(Wan.from_pretrained(WEIGHTS / "causal-anyflow"), text, noise, 4, path=True)
    ruler = Ruler(WORLDS["torus"], 1, seed=0, traced=1)
    assert max(ruler.away(ruler.exact[::8])) == 0
    v = lambda z, t, r: ruler.world.velocity(z, t, ruler.labels[ruler.traced])
    euler = sample(v, ruler.noise()[ruler.traced], 32, shift=SHIFT, average=False, path=True)
    assert 0 < ruler.away(euler)[-1] < 0.2 and ruler.away(euler[:1].expand_as(euler))[-1] > 1


def results(**changes):
    """Made-up scores of both families under which every claim holds, but for the changes."""
    words = {key: 6 * [1.0] for key in WORDS}
    rows = {"teacher": dict(distance=[0.9, 0.8, 0.6, 0.5, 0.4, 0.4]),
            "consistency": dict(distance=[0.5, 0.45, 0.4, 0.4, 0.45, 0.5], preview=6 * [0.3]),
            "anyflow-forward": dict(distance=[0.6, 0.5, 0.4, 0.35, 0.3, 0.3]),
            "anyflow": dict(distance=[0.5, 0.4, 0.35, 0.3, 0.3, 0.3], preview=6 * [0.1])}
    usual = dict(path_error=6 * [0.4], preview=6 * [0.3], **words) | {"star rate": 6 * [0.0]}
    rows = {name: usual | row for name, row in rows.items()}
    rows["anyflow"] |= {"star rate": 6 * [0.06], "path_error": 6 * [0.1]}
    after = dict(distance=[0.9, 0.7, 0.5, 0.4, 0.4, 0.5])
    made = {"stars": 0.06, "gravity": {"before": dict(distance=6 * [1.0]), "after": after},
            "drift": {"anyflow-forward": [0.4, 0.1, 0.2, 0.4], "anyflow": [0.1, 0.1, 0.1, 0.2]},
            "continuation": {**{name: 9 * [9.0] for name in TASKS.values()},
                             TASKS[3]: 3 * [9.0] + 2 * [0.9] + 4 * [1.9]}}
    for name, change in changes.items():
        if name.replace("_", "-") in rows:
            rows[name.replace("_", "-")] |= change
        else:
            made[name] = made[name] | change
    other = {name: {key: row[key] for key in row if key != "path_error"} for name, row in rows.items()}
    return made | {"methods": {"causal": other, "bidirectional": rows}}


BROKEN = [  # changes, and the claims of a bidirectional model, or of the rest, that they break
    (dict(teacher=dict(distance=[0.9, 0.8, 0.6, 0.3, 0.4, 0.4])), {0}),  # level at 8 calls
    (dict(anyflow=dict(distance=[0.5, 0.4, 0.35, 0.3, 0.3, 0.325]),
          teacher=dict(distance=[0.9, 0.8, 0.6, 0.5, 0.4, 0.305])), {0}),
    (dict(consistency=dict(distance=[0.48, 0.39, 0.34, 0.31, 0.45, 0.5])), set()),
    (dict(consistency=dict(distance=[0.48, 0.39, 0.34, 0.29, 0.45, 0.5])), {1}),
    (dict(consistency=dict(distance=[0.47, 0.45, 0.4, 0.4, 0.45, 0.5])), {1}),
    (dict(consistency=dict(distance=[0.5, 0.45, 0.4, 0.4, 0.45, 0.43])), {2}),
    (dict(anyflow=dict(distance=[0.5, 0.3, 0.34, 0.3, 0.3, 0.3])), {3}),
    (dict(anyflow_forward=dict(distance=[0.6, 0.5, 0.6, 0.35, 0.3, 0.3])), {4}),
    (dict(anyflow_forward=dict(distance=[0.6, 0.5, 0.4, 0.35, 0.3, 0.45])), {4}),
    (dict(anyflow=dict(path_error=[0.0, 0.0, 0.14, 0.0, 0.0, 0.0])), {5}),
    (dict(anyflow={"star rate": [0.06, 0.04, *4 * [0.06]]}), {6}),
    (dict(anyflow={"star rate": [0.06, 0.08, *4 * [0.06]]}), {6}),
    (dict(teacher={"star rate": 6 * [0.05]}), {6}),
    (dict(anyflow=dict(preview=[0.0, 0.0, 0.16, 0.0, 0.0, 0.0])), {7}),
    *((dict(anyflow={word: [1.0, 1.0, 0.97, 1.0, 1.0, 1.0]}), {8}) for word in ("colour", "shape")),
    (dict(anyflow=dict(direction=[1.0, 1.0, 0.89, 1.0, 1.0, 1.0])), {8}),
    (dict(drift={"anyflow": [0.1, 0.1, 0.2, 0.32]}), {"drift"}),
    *((dict(continuation={TASKS[3]: [9.0] * 3 + more}), {"V2V"}) for more in (
        [0.9, 1.1, 1.0, 1.0], [0.9, 0.9, 1.0, 2.1, 1.0])),
    (dict(gravity=dict(after=dict(distance=[0.9, 0.7, 0.51, 0.4, 0.4, 0.5]))), {"world"}),
    (dict(gravity=dict(after=dict(distance=[0.9, 0.7, 0.5, 0.4, 0.4, 0.56]))), {"world"})]


@pytest.mark.parametrize("changes, broken", [({}, set()), *BROKEN], ids=repr)
def test_claims_are_judged_from_the_numbers(changes, broken):
    rows = decide(results(**changes))
    assert len(rows) == 8 + 9 + 3
    bidirectional, rest = rows[8:17], rows[17:]
    found = {i for i, row in enumerate(bidirectional) if not row["holds"]}
    found |= {name for name in ("drift", "V2V", "world") for row in rest
              if name in row["claim"] and not row["holds"]}
    assert found == broken
    assert [row["holds"] for row in rows[:8]] == [i not in broken for i in (0, 1, 2, 3, 4, 6, 7, 8)]


def test_the_table_shows_the_other_scores_at_4_calls():
    made = results(anyflow=dict(speed=[0.1, 0.2, 0.34, 0.4, 0.5, 0.6]))
    scores = {"evenly": dict(distance=0.5, frechet=1.0, preview=0.2) | {"star rate": 0.1}}
    told = video.table(made | {"budgets": scores, "best_times": scores})
    rows = told[told.index("the other scores, at 4 calls") :].splitlines()
    assert rows[1].split()[-1] == "speed"
    assert next(row for row in rows if row.startswith("bidirectional: AnyFlow, stage 2")).endswith("0.34")


def test_clips_are_apart_by_the_mean_of_relative_distances():
    others = torch.ones(2, 9, 3, 4, 4)
    clips = others * torch.tensor([2.0, 4.0]).view(2, 1, 1, 1, 1)
    assert video.apart(clips, others) == 2 and video.apart(others, clips) == pytest.approx(5 / 8)


@pytest.fixture
def measured(monkeypatch):
    """A ruler of the world without stars, and what it asks of `generate`, which answers as `asked.answer`."""
    asked = types.SimpleNamespace(calls=[], answer=None, kind="causal")

    def generate(model, text, noise, steps, **options):
        asked.calls.append(types.SimpleNamespace(text=text, noise=noise, steps=steps, **options))
        return asked.answer(asked.calls[-1])

    model = lambda *_, **options: types.SimpleNamespace(config=types.SimpleNamespace(kind=asked.kind))
    monkeypatch.setattr(video.Wan, "from_pretrained", model)
    monkeypatch.setattr(video, "sampler_of_folder", lambda folder: f"of {folder}")
    monkeypatch.setattr(video, "generate", generate)
    asked.ruler = Ruler(WORLDS["torus"], 1, seed=3, traced=2)
    return asked


def test_every_method_gets_the_same_prompts_noise_and_times_and_its_own_sampler(measured, monkeypatch):
    """Each prompt of the world so many times; noise of the seed; preview: the distance to the last clip."""
    monkeypatch.setattr(video, "score", lambda x, *_: {"distance": x.mean().item()})
    measured.answer = lambda call: torch.full((48, 9, 3, 12, 12), float(call.steps))
    scores, clips, states = measured.ruler.measure("folder")
    assert scores == {"distance": NFE, "preview": [1 - n / 32 for n in NFE]} and states is None
    torch.manual_seed(3)
    noise = torch.randn(48, 9, 3, 12, 12)
    for call in measured.calls:
        assert torch.equal(call.noise, noise) and (call.shift, call.sampler) == (SHIFT, "of folder")
    labels = Ruler(WORLDS["stars-gravity"], 2, seed=0).labels
    assert len(labels) == 2 * len(labels.unique(dim=0)) == 2 * 64
    assert len(measured.ruler.labels.unique(dim=0)) == 48 == len(measured.calls[0].text.unique(dim=0))


def test_the_error_along_the_path_is_that_of_the_states_after_the_noise(measured, monkeypatch):
    """RMS over time, as a share of the RMS of the exact clips."""
    exact = torch.linspace(1, 2, 33).view(33, 1, 1, 1, 1, 1).expand(-1, 48, *measured.ruler.shape[1:])
    measured.ruler.exact, measured.kind = exact[:, :2], "anyflow"
    monkeypatch.setattr(video, "score", lambda x, *_: {"distance": x.mean().item()})
    error = lambda n: torch.tensor([100.0, *range(1, n + 1)]).view(-1, 1, 1, 1, 1, 1)
    measured.answer = lambda call: exact[:: 32 // call.steps] + error(call.steps)
    scores, clips, states = measured.ruler.measure("folder")
    for n, found, clip in zip(NFE, scores["path_error"], clips):
        assert found == pytest.approx(math.sqrt(sum(i * i for i in range(1, n + 1)) / n) / 2)
        assert clip.mean() == pytest.approx(2 + n)
    assert [x.shape[:2] for x in states] == [(n + 1, 2) for n in NFE]


def test_best_times_are_found_with_other_noise_and_held_against_even_ones(measured, monkeypatch):
    grids, given = [torch.full((n + 1,), float(n + 40)) for n in (2, 4, 8)], []
    monkeypatch.setattr(video, "best_grid", lambda model, noise, *_, **options: given.append(noise) or grids)
    monkeypatch.setattr(video, "score", lambda x, *_: {"distance": x.mean().item()})
    of = lambda steps: float(steps if isinstance(steps, int) else steps[0])
    measured.answer = lambda call: torch.full((2, 9, 3, 4, 4), of(call.steps))
    rows = measured.ruler.best_times("folder")
    for n in (2, 4, 8):
        assert rows[f"{n} calls, even times"] == {"distance": n, "preview": 1 - n / 32}
        assert rows[f"{n} calls, best times"] == {"distance": n + 40, "preview": (n + 8) / 32}
    assert not torch.equal(given[0], measured.calls[0].noise[:48:11])


def test_drift_is_measured_by_chunk_from_where_the_first_frames_say(measured):
    """Half of the clips leave their path by two pixels from the fifth frame on: a pixel in the mean."""
    ruler = measured.ruler
    ruler.labels = ruler.labels[::6]
    clips = ruler.world.render(ruler.labels, 12 * torch.rand(8, 2))
    clips[::2, 4:] = clips[::2, 4:].roll(2, -1)
    measured.answer, chunks = lambda call: clips, (1, 2, 2, 2, 2)
    assert ruler.drift("folder", 4, chunks) == pytest.approx([0, 0, 0.5, 1, 1], abs=0.05)
    call = measured.calls[0]
    torch.manual_seed(3)
    assert torch.equal(call.noise, torch.randn(8, 9, 3, 12, 12))
    assert (call.steps, call.shift, call.sampler, call.chunks) == (4, SHIFT, "of folder", chunks)


@pytest.mark.parametrize("given", [0, 3])
def test_a_continuation_is_held_against_true_clips_or_its_own_first_frame(measured, given):
    ruler, stars = measured.ruler, Ruler(WORLDS["stars"], 1, seed=3)
    ruler.labels, stars.labels = ruler.labels[::6], stars.labels[::6]
    start = ruler.world.draw(range(8), 3)[1] + (0 if given else 3)  # of one's own where none is given
    clips = ruler.world.render(ruler.labels, start)
    clips[::2, 8] = clips[::2, 8].roll(2, -1)
    measured.answer = lambda call: clips
    pixels, made, true = ruler.continuation("folder", given, 4)
    assert pixels == pytest.approx([*8 * [0], 1], abs=0.1) and made is clips
    context = measured.calls[0].context
    assert context is None if not given else torch.equal(context, true[:, :given])
    assert (stars.continuation("folder", given, 4)[2] == 1).all(2).float().mean() > 0.03


class Process:
    """A training that is done when it is asked for the second time, or fails."""

    running, begun, fails = [], [], ()

    def __init__(self, command, **options):
        self.command, self.asked, self.returncode = command, 0, None
        self.folder = video.Path(command[command.index("--out") + 1])
        self.running.append(self), self.begun.append(self.folder.name)
        assert len(self.running) <= 2
        for word in command[3:]:
            folder = video.Path(word)
            assert folder == self.folder or folder.parent != self.folder.parent or provenance(folder), word

    def poll(self):
        self.asked += 1
        if self.asked == 2:
            self.running.remove(self)
            self.folder.mkdir(exist_ok=True)
            self.returncode = int(self.folder.name in self.fails)
            if not self.returncode:
                write_json(self.folder / "anyflow.json", {"command": self.command})
        return self.returncode

    def terminate(self):
        self.running.remove(self)

    def wait(self):
        assert self not in self.running


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(video.subprocess, "Popen", Process)
    monkeypatch.setattr(video.time, "sleep", lambda _: None)
    monkeypatch.setattr(Process, "running", []), monkeypatch.setattr(Process, "begun", [])
    return Process


@pytest.mark.parametrize("exact", [False, True])
def test_the_story_is_trained_in_an_order_in_which_its_parts_are_there(processes, exact, tmp_path):
    """What is done is not done again, what was begun is resumed, with the settings of the first time."""
    (tmp_path / "causal-teacher" / "checkpoints" / "step-0000001").mkdir(parents=True)
    video.train_all(tmp_path, 5, 7, exact)
    assert sorted(processes.begun) == sorted(STORY)
    for name, words in STORY.items():
        command = " ".join(provenance(tmp_path / name)["command"]) + " "
        assert f"train.py {words.split()[0]} --preset" in command and " --seed 5 " in command
        assert command.rindex(" --steps 7 ") >= command.rindex(" --steps")
        student = name.startswith("bidirectional") and name != "bidirectional-teacher"
        assert (" --exact-teacher --drop 0 " in command) == (exact and student)
        assert (" --resume " in command) == (name == "causal-teacher")
    video.train_all(tmp_path, 5, 7, exact)
    assert len(processes.begun) == len(STORY)
    for settings in ((6, 7, exact), (5, None, exact), (5, 7, not exact)):
        with pytest.raises(ValueError, match="was trained with .*, expected .* or another --out"):
            video.train_all(tmp_path, *settings)


def test_a_stage_that_fails_is_named_and_the_others_end(processes, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "fails", ["causal-consistency"])
    with pytest.raises(RuntimeError, match="stage causal-consistency failed, see .*causal-consistency.txt"):
        video.train_all(tmp_path, 0, None)
    assert not processes.running and "causal-gravity" not in processes.begun


def test_kept_models_are_in_bfloat16_and_name_no_folder_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(video, "STORY", {"a": ""})
    Wan(replace(preset("tiny")[0], num_layers=1)).save_pretrained(tmp_path / "a")
    folders, made = ("init", "teacher", "judge"), {"stage": "onpolicy", "base": ""}
    write_json(tmp_path / "a" / "anyflow.json", made | {key: f"/x/{key}" for key in folders})
    video.keep(tmp_path, tmp_path / "kept")
    assert {x.dtype for x in load_file(tmp_path / "kept" / "a" / FILE).values()} == {torch.bfloat16}
    assert provenance(tmp_path / "kept" / "a") == made | {key: key for key in folders}


@pytest.mark.parametrize("spoil", [lambda made: made.update(nfe=[1, 2, 4]), lambda made: made.pop("nfe"),
                                   lambda made: made["methods"]["causal"]["anyflow"]["preview"].pop(),
                                   lambda made: made["methods"]["causal"].pop("teacher"),
                                   lambda made: made["methods"].pop("bidirectional")])
def test_results_of_another_run_have_all_that_is_drawn_beside(spoil, tmp_path):
    made = json.loads(json.dumps(results() | {"nfe": NFE}))
    write_json(tmp_path / "a.json", made)
    assert video.read_results(tmp_path / "a.json") == made
    spoil(made), write_json(tmp_path / "a.json", made)
    with pytest.raises(ValueError, match="a.json has not the scores of both families"):
        video.read_results(tmp_path / "a.json")


def test_foreign_folders_are_told(tmp_path, capsys, monkeypatch):
    """A model of no world; shards of another world or of nobody; an option that would change nothing."""
    for made in ({}, {"data": str(tmp_path)}):
        write_json(tmp_path / "anyflow.json", made)
        with pytest.raises(ValueError, match="no model at .* that was trained in one of the worlds"):
            world_of(tmp_path)
    write_shards(WORLDS["torus"], tmp_path / "a", 2, 0)
    (tmp_path / "a" / "shard-00000.safetensors").rename(tmp_path / "shard-00000.safetensors")
    for folder, world in ((tmp_path / "a", "stars"), (tmp_path, "torus")):
        with pytest.raises(ValueError, match=f"{folder} holds other shards than"):
            write_shards(WORLDS[world], folder, 2, 0)
    monkeypatch.setattr(video, "tell", lambda args: None)
    with pytest.raises(SystemExit):
        video.main(["--exact-teacher"])
    assert "--exact-teacher and --steps need --train" in capsys.readouterr().err
