"""A video world small enough to know everything about it, and a tracker that scores any clip by its laws.

One shape of one colour moves over a torus (what leaves on the right comes back on the left) at constant
speed, or, in a second world, falls. A prompt names colour, shape, direction and speed; all that it leaves
open is where the object starts. So the distance from a clip to the nearest clip that the world could have
made of its prompt is a minimum over two numbers, and no learned metric is needed.

A clip is (F, 3, 12, 12): background 0, colours at -2 and 2, a unit of variance or so, as Wan's latents have.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

SIZE, AMPLITUDE = 12, 2.0
# No red beside green: told apart by colour-blind readers too.
COLOURS = {"red": (1, -1, -1), "yellow": (1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
SHAPES = ("disc", "cross")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y grows downwards
SPEEDS = {"slow": 1, "fast": 2}  # pixels a frame
KINDS = (tuple(COLOURS), SHAPES, tuple(DIRECTIONS), tuple(SPEEDS))  # the four words of a prompt
WORDS = [word for kind in KINDS for word in kind]
PAINT = AMPLITUDE * torch.tensor([*COLOURS.values()])
TEXT_DIM = 32


# ---- Prompts ---------------------------------------------------------------------------------------------

def parse_prompt(prompt):
    """Words, as in "a slow red disc going left", to the indices of its colour, shape, direction and speed.

    ValueError names the kind of word that is missing, or that is there twice.
    """
    words, indices = prompt.lower().replace(",", " ").split(), []
    for name, kind in zip(("colour", "shape", "direction", "speed"), KINDS):
        found = [word for word in words if word in kind]
        if len(found) != 1:
            some = f"{len(found)} words of {name}, expected one of {', '.join(kind)}"
            raise ValueError(f"the prompt {prompt!r} has {some}")
        indices.append(kind.index(found[0]))
    return tuple(indices)

def describe(labels):
    """(4,) indices -> "a slow red disc moving left"."""
    colour, shape, direction, speed = (kind[int(i)] for kind, i in zip(KINDS, labels))
    return f"a {speed} {colour} {shape} moving {direction}"

def embed(labels):
    """Labels (B, 4) -> text (B, 4, 32): one fixed random vector a word. The null prompt is `embed(None)`."""
    table = torch.randn(len(WORDS) + 1, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    if labels is None:
        return table[-1].expand(1, len(KINDS), -1).clone()
    first = torch.tensor([0, *(len(kind) for kind in KINDS[:-1])]).cumsum(0)
    return table[labels + first]


# ---- The world -------------------------------------------------------------------------------------------

def wrap(d):
    """Differences on the torus, into [-SIZE/2, SIZE/2)."""
    return (d + SIZE / 2) % SIZE - SIZE / 2

def mask(centre, shape):
    """Coverage in [0, 1] of each pixel, (..., 12, 12), by a shape (...) (its index) at centre (..., 2)."""
    pixels = torch.arange(SIZE, device=centre.device) + 0.5
    dx = wrap(pixels - centre[..., 0, None])[..., None, :].abs()
    dy = wrap(pixels - centre[..., 1, None])[..., :, None].abs()
    disc = 2.5 - (dx.square() + dy.square()).sqrt()  # signed distances to the edge, inside positive
    cross = torch.maximum(torch.minimum(3.25 - dx, 0.8 - dy), torch.minimum(0.8 - dx, 3.25 - dy))
    return (0.5 + torch.where(shape[..., None, None] == 0, disc, cross)).clamp(0, 1)

@dataclass(frozen=True)
class World:
    """The clips of one set of laws, by number: clip i of a seed is always the same."""

    colours: tuple = ("red", "yellow", "blue")
    gravity: float = 0.0  # downwards, in pixels a frame, each frame
    frames: int = 9

    @property
    def shape(self):
        return self.frames, 3, SIZE, SIZE

    @property
    def null(self):
        return embed(None)

    def draw(self, positions, seed):
        """Labels (B, 4) and start positions (B, 2) in pixels, of clips by their place in an endless row."""
        u = [np.random.default_rng((seed, i)).random(6) for i in positions]
        u = torch.from_numpy(np.stack(u)).float()
        counts = torch.tensor([len(self.colours), *(len(kind) for kind in KINDS[1:])])
        labels = (u[:, :4] * counts).long()
        labels[:, 0] = torch.tensor([KINDS[0].index(colour) for colour in self.colours])[labels[:, 0]]
        return labels, u[:, 4:] * SIZE

    def offsets(self, labels, frames=None):
        """How far the object has come at each frame f, velocity f + gravity f (f + 1) / 2: (B, F, 2)."""
        f = torch.arange(frames or self.frames)[:, None]
        direction, speed = (torch.tensor([*kind.values()]) for kind in (DIRECTIONS, SPEEDS))
        velocity = direction[labels[:, 2]] * speed[labels[:, 3], None]
        return velocity[:, None] * f + torch.tensor([0, self.gravity]) * f * (f + 1) / 2

    def render(self, labels, start, frames=None):
        """Clips (B, F, 3, 12, 12) of labels (B, 4) from start positions (B, 2)."""
        covered = mask(start[:, None] + self.offsets(labels, frames), labels[:, 1:2])
        return paint(covered, labels[:, 0])

    def batch(self, positions, seed):
        """(B, F, 3, 12, 12) and text (B, 4, 32): what `train.py` asks of its data."""
        labels, start = self.draw(positions, seed)
        return self.render(labels, start), embed(labels)

def paint(covered, colour):
    """Coverage (B, F, 12, 12) in colours (B,) -> (B, F, 3, 12, 12)."""
    return covered[:, :, None] * PAINT[colour][:, None, :, None, None]

WORLDS = {"torus": World(), "gravity": World(colours=tuple(COLOURS), gravity=0.5)}

def true_frames(name, prompt, frames, seed):
    """How a clip of the world of that name begins, (1, frames, 3, 12, 12). ValueError for no such world."""
    if name not in WORLDS:
        raise ValueError("--given needs --video, or a model of the tiny world and a --prompt")
    world = WORLDS[name]
    return world.render(torch.tensor([parse_prompt(prompt)]), world.draw(range(1), seed)[1])[:, :frames]

def rgb(clip):
    """(..., 3, H, W) in [-2, 2], background 0 -> (..., H, W, 3) in [0, 1]."""
    return np.clip(0.5 + 0.25 * np.moveaxis(np.asarray(clip, dtype=np.float32), -3, -1), 0, 1)

def enlarge(clips, times=12):
    """Clips (B, F, 3, H, W) side by side, every pixel a square: uint8 (F, times H, B times W, 3)."""
    frames = np.concatenate(list(rgb(clips)), axis=2)
    return (255 * frames).round().astype(np.uint8).repeat(times, 1).repeat(times, 2)


# ---- The tracker -----------------------------------------------------------------------------------------

HALVES = torch.arange(2 * SIZE) / 2  # candidate positions of an axis, half a pixel apart
GRID = torch.stack(torch.meshgrid(HALVES, HALVES, indexing="xy"), -1)  # (24, 24, 2), by row, as (x, y)

def gain(clips, colour, shape):
    """How much an object of one colour and shape at each of GRID explains of each frame: (B, F, 24, 24).

    |z|^2 - |z - object|^2 = 2 z . object - |object|^2, in units of |object|^2: 1 for the object itself.
    """
    masks = mask(GRID.flatten(0, 1), torch.tensor(shape)).flatten(1)  # (576, 144)
    coloured = torch.einsum("bfchw,c->bfhw", clips, PAINT[colour])
    energy = 3 * AMPLITUDE**2 * masks.square().sum(1)
    return ((2 * coloured.flatten(2) @ masks.T - energy) / energy).unflatten(2, GRID.shape[:2])

def refine(start, cost, rounds=4):
    """Positions (..., 2) from the best of GRID to the minimum of cost(positions (..., 9, 2)) -> (..., 9)."""
    steps = torch.tensor([[x, y] for y in (-1, 0, 1) for x in (-1, 0, 1)])
    for i in range(rounds):
        around = start[..., None, :] + steps * 0.5 ** (i + 2)
        best = cost(around).argmin(-1)
        start = around.gather(-2, best[..., None, None].expand(*best.shape, 1, 2))[..., 0, :]
    return start % SIZE

def track(clips):
    """What the tracker sees in clips (B, F, 3, 12, 12): an object of one colour and shape in each frame.

    Returns colour (B,) and shape (B,) as indices, centre (B, F, 2) in pixels, and error (B, F): the RMS
    distance of a frame to the nearest one that the world can render with that object, over the RMS of that
    one. 0 is perfect, 1 is as bad as an empty frame.
    """
    objects = [(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
    gains = torch.stack([gain(clips, *which).flatten(2).amax(2).sum(1) for which in objects], 1)
    colour, shape = torch.tensor(objects)[gains.argmax(1)].unbind(1)
    centre, error = torch.zeros(*clips.shape[:2], 2), torch.zeros(clips.shape[:2])
    for c, s in {*zip(colour.tolist(), shape.tolist())}:
        rows = (colour == c) & (shape == s)
        some, of = clips[rows], torch.full((rows.sum(),), c)

        def distance(positions, some=some, of=of, s=s):  # (b, F, n, 2) -> (b, F, n)
            drawn = [paint(mask(p, torch.tensor(s)), of) for p in positions.unbind(2)]
            return torch.stack([relative(some, d, (2, 3, 4)) for d in drawn], 2)

        best = gain(some, c, s).flatten(2).argmax(2)
        centre[rows] = refine(GRID.flatten(0, 1)[best], distance)
        error[rows] = distance(centre[rows][:, :, None])[..., 0].sqrt()
    return colour, shape, centre, error

def nearest(clips, labels, world):
    """The clip of the world for prompts `labels` (B, 4) that is nearest to each of clips (B, F, 3, 12, 12).

    Returns start (B, 2) and distance (B,), RMS over that of the nearest clip: 0 for a clip of the world, 1
    for an empty one, 1.4 and more for a clip of something else. Shape, colour, motion and sharpness must fit.
    """
    frames, start, distance = clips.shape[1], torch.zeros(len(clips), 2), torch.zeros(len(clips))
    for colour, shape in {*map(tuple, labels[:, :2].tolist())}:
        which = (labels[:, 0] == colour) & (labels[:, 1] == shape)
        some, label = clips[which], labels[which]
        # Along the prompt's motion the gains of all frames are of one start; offsets are half pixels.
        offsets = (2 * world.offsets(label, frames)).round().long()[:, :, None, None]  # (b, F, 1, 1, 2)
        at = ((2 * GRID).long() + offsets) % (2 * SIZE)
        at = (at[..., 1] * 2 * SIZE + at[..., 0]).flatten(2)
        total = gain(some, colour, shape).flatten(2).gather(2, at).sum(1)

        def cost(positions, some=some, label=label):  # (b, n, 2) -> (b, n)
            drawn = [world.render(label, p, frames) for p in positions.unbind(1)]
            return torch.stack([relative(some, d, (1, 2, 3, 4)) for d in drawn], 1)

        start[which] = refine(GRID.flatten(0, 1)[total.argmax(1)], cost)
        distance[which] = cost(start[which][:, None])[:, 0].sqrt()
    return start, distance

def relative(clips, drawn, dims):
    """|clips - drawn|^2 / |drawn|^2, summed over dims."""
    return (clips - drawn).square().sum(dims) / drawn.square().sum(dims)

def score(clips, labels, world):
    """Scores of clips (B, F, 3, 12, 12) for prompts (B, 4), each a mean over the clips.

    distance     to the nearest clip of the world for this prompt, see `nearest`          0 is best
    sharp        share of frames within 0.4 of one that the world can render              1
    physics      share of clips that move, with every velocity, gravity undone, within 1
                 pixel a frame of their median                                            1
    colour, shape, direction, speed: share that have those of the prompt                  1
    diversity    mean distance of two clips' first centres, over that of uniform ones     1
    frechet      distance to the world's clips in `features`                              0
    """
    tracked = colour, shape, centre, error = track(clips)
    frame = torch.arange(1, clips.shape[1])[:, None]
    velocity = wrap(centre.diff(dim=1) - torch.tensor([0, world.gravity]) * frame)  # (B, F-1, 2)
    usual = velocity.median(1).values
    moves = usual.norm(dim=1) > 0.5
    direction = (usual @ torch.tensor([*DIRECTIONS.values()]).float().T).argmax(1)
    speed = (usual.norm(dim=1, keepdim=True) - torch.tensor([*SPEEDS.values()])).abs().argmin(1)
    apart = wrap(centre[:, None, 0] - centre[None, :, 0]).norm(dim=2).sum() / (len(clips) * (len(clips) - 1))
    scores = {
        "distance": nearest(clips, labels, world)[1],
        "sharp": error < 0.4,
        "physics": ((velocity - usual[:, None]).norm(dim=2).amax(1) < 1) & moves,
        "colour": colour == labels[:, 0],
        "shape": shape == labels[:, 1],
        "direction": (direction == labels[:, 2]) & moves,
        "speed": (speed == labels[:, 3]) & moves,
        "diversity": apart / (0.3826 * SIZE),
        "frechet": frechet(features(clips, tracked), real_features(world, *clips.shape[:2])),
    }
    return {name: value.float().mean().item() for name, value in scores.items()}

def features(clips, tracked):
    """(B, 11): first centre (sines and cosines, on a torus), velocity, its spread, colour, sharpness."""
    colour, _, centre, error = tracked
    angles = centre[:, 0] * (2 * math.pi / SIZE)
    velocity = wrap(centre.diff(dim=1))
    spread = velocity.std(1).norm(dim=1, keepdim=True)
    seen = clips.abs().amax((3, 4)).mean(1) * PAINT[colour] / AMPLITUDE**2
    sharp = 1 - error.mean(1, keepdim=True)
    return torch.cat([angles.sin(), angles.cos(), velocity.mean(1), spread, seen, sharp], 1)

@functools.cache
def real_features(world, clips, frames):
    """Features of as many clips of the world itself."""
    labels, start = world.draw(range(clips), seed=99)
    real = world.render(labels, start, frames)
    return features(real, track(real))

def frechet(a, b):
    """Frechet distance of Gaussians fitted to features (n, d) and (m, d), scaled by b's deviation."""
    a, b = ((x - b.mean(0)).double() / (b.std(0) + 0.1) for x in (a, b))
    product = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0)
    return (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * product.sqrt().sum()
