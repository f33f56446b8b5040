"""The video world's laws, and that the tracker sees each way of breaking them."""

import pytest
import torch

from full.data import Shards
from toy.video import write_shards
from toy.world import SIZE, WORLDS, describe, embed, frechet, mask, nearest, parse_prompt, score, track, wrap

WORDS = ("colour", "shape", "direction", "speed")


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


def clips(world, n=48, seed=1):
    labels, start = world.draw(range(n), seed)
    return world.render(labels, start), labels, start


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


def test_shapes_cover_their_area():
    """A disc of radius 2.5 covers pi 2.5^2 pixels, wherever it is, to the accuracy of its soft edge."""
    area = mask(SIZE * torch.rand(500, 2), torch.zeros(500)).sum((1, 2))
    assert (area - torch.pi * 2.5**2).abs().max() < 0.5


def test_real_clips_score_perfectly(world):
    x, labels, start = clips(world)
    scores = score(x, labels, world)
    assert scores["distance"] < 0.02 and scores["frechet"] < 1.5 and abs(scores["diversity"] - 1) < 0.1
    assert all(scores[key] == 1 for key in ("sharp", "physics", *WORDS))


def test_tracker_finds_the_start_and_every_centre(world):
    x, labels, start = clips(world)
    found, _ = nearest(x, labels, world)
    assert wrap(found - start).norm(dim=1).max() < 0.1
    colour, shape, centre, error = track(x + 0.1 * torch.randn_like(x))
    assert torch.equal(colour, labels[:, 0]) and torch.equal(shape, labels[:, 1])
    assert wrap(centre - start[:, None] - world.offsets(labels)).norm(dim=2).max() < 0.5


def broken(x):
    padded = torch.nn.functional.pad(x.flatten(0, 1), (2, 2, 2, 2), mode="circular")
    blur = torch.nn.functional.avg_pool2d(padded, 5, 1)
    return {
        "blurred": blur.view_as(x),
        "noisy": x + torch.randn_like(x),
        "frozen": x[:, :1].expand_as(x),
        "shuffled": x[:, [4, 0, 7, 2, 8, 5, 1, 6, 3]],
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
    ("teleporting", ["physics"], ["sharp", "colour", "shape", "direction", "speed"]),
    ("reversed", ["direction"], ["sharp", "physics", "shape", "speed"]),
    ("empty", ["sharp", "direction"], []),
])
def test_tracker_fails_broken_clips_where_it_should(how, failing, passing):
    x, labels, _ = clips(WORLDS["torus"])
    scores = score(broken(x)[how], labels, WORLDS["torus"])
    assert scores["distance"] > 0.5
    assert all(scores[key] < 0.1 for key in failing), scores
    assert all(scores[key] > 0.95 for key in passing), scores


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
    for prompt, name in (("a red disc moving left", "speed"), ("a slow fast red disc left", "speed"),
                         ("", "colour")):
        with pytest.raises(ValueError, match=name):
            parse_prompt(prompt)
    assert embed(labels).shape == (1, 4, 32)
    assert not torch.equal(embed(labels)[:, 0], embed(None)[:, 0])


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
