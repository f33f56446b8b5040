"""A video world small enough to know everything about it, and a tracker that scores any clip by its laws.

    python -m toy.video            # measure the models in the repository: table, claims, GIFs in out/video
    python -m toy.video --train    # train them anew first

One shape of one colour moves over a torus (what leaves on the right comes back on the left) at constant speed, or,
in a second world, falls. A prompt names colour, shape, direction and speed; all that it leaves open is where the
object starts. So the distance from a clip to the nearest clip that the world could have made of its prompt is a
minimum over two numbers, and no learned metric is needed.

A clip is (F, 3, 12, 12): background 0, colours at -2 and 2, a unit of variance or so, as Wan's latents have.
"""

import argparse
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from model import Wan, provenance, read_json
from sample import generate, sampler_of_folder
from toy import plots

ROOT = Path(__file__).parents[1]

SIZE, AMPLITUDE = 12, 2.0
# No red beside green: told apart by colour-blind readers too.
COLOURS = {"red": (1, -1, -1), "yellow": (1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
SHAPES = ("disc", "cross")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y grows downwards
SPEEDS = {"slow": 1, "fast": 2}  # pixels a frame
KINDS = (tuple(COLOURS), SHAPES, tuple(DIRECTIONS), tuple(SPEEDS))  # the four words of a prompt
WORDS = [word for kind in KINDS for word in kind]
TEXT_DIM = 32


# ------------------------------------------------------------------------------------------------------------
# Prompts
# ------------------------------------------------------------------------------------------------------------


def parse_prompt(prompt):
    """Words, as in "a slow red disc going left", to the indices of its colour, shape, direction and speed.

    ValueError names the kind of word that is missing, or that is there twice.
    """
    words, indices = prompt.lower().replace(",", " ").split(), []
    for name, kind in zip(("colour", "shape", "direction", "speed"), KINDS):
        found = [word for word in words if word in kind]
        if len(found) != 1:
            raise ValueError(
                f"the prompt {prompt!r} has {len(found)} words of {name}, expected one of {', '.join(kind)}"
            )
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


# ------------------------------------------------------------------------------------------------------------
# The world
# ------------------------------------------------------------------------------------------------------------


def wrap(d):
    """Differences on the torus, into [-SIZE/2, SIZE/2)."""
    return (d + SIZE / 2) % SIZE - SIZE / 2


def mask(centre, shape):
    """Coverage in [0, 1] of each pixel, (..., 12, 12), by a shape of index `shape` (...) at `centre` (..., 2)."""
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
        u = torch.from_numpy(np.stack([np.random.default_rng((seed, i)).random(6) for i in positions])).float()
        counts = torch.tensor([len(self.colours), *(len(kind) for kind in KINDS[1:])])
        labels = (u[:, :4] * counts).long()
        labels[:, 0] = torch.tensor([KINDS[0].index(colour) for colour in self.colours])[labels[:, 0]]
        return labels, u[:, 4:] * SIZE

    def offsets(self, labels, frames=None):
        """How far the object has come at each frame: (B, F, 2), not wrapped. Velocity f + gravity f (f + 1) / 2."""
        f = torch.arange(frames or self.frames)[:, None]
        velocity = (
            torch.tensor([*DIRECTIONS.values()])[labels[:, 2]]
            * torch.tensor([*SPEEDS.values()])[labels[:, 3], None]
        )
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
    return covered[:, :, None] * (AMPLITUDE * torch.tensor([*COLOURS.values()])[colour])[:, None, :, None, None]


WORLDS = {"torus": World(), "gravity": World(colours=tuple(COLOURS), gravity=0.5)}


# ------------------------------------------------------------------------------------------------------------
# The tracker
# ------------------------------------------------------------------------------------------------------------

HALVES = torch.arange(2 * SIZE) / 2  # candidate positions of an axis, half a pixel apart
GRID = torch.stack(torch.meshgrid(HALVES, HALVES, indexing="xy"), -1)  # (24, 24, 2), by row, as (x, y)


def gain(clips, colour, shape):
    """How much an object of one colour and shape at each of GRID explains of each frame: (B, F, 24, 24).

    |z|^2 - |z - object|^2 = 2 z . object - |object|^2, in units of |object|^2: 1 for the object itself.
    """
    masks = mask(GRID.flatten(0, 1), torch.tensor(shape)).flatten(1)  # (576, 144)
    coloured = torch.einsum("bfchw,c->bfhw", clips, AMPLITUDE * torch.tensor([*COLOURS.values()])[colour].float())
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
    """What the tracker sees in clips (B, F, 3, 12, 12): an object of one colour and shape, somewhere in each frame.

    Returns colour (B,) and shape (B,) as indices, centre (B, F, 2) in pixels, and error (B, F): the RMS distance of
    a frame to the nearest one that the world can render with that object, over the RMS of that one. 0 is perfect,
    1 is as bad as an empty frame.
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
    """The clip of the world, for the prompts `labels` (B, 4), that is nearest to each of clips (B, F, 3, 12, 12).

    Returns start (B, 2) and distance (B,), RMS over that of the nearest clip: 0 for a clip of the world, 1 for an
    empty one, 1.4 and more for a clip of something else. It falls only if shape, colour, motion and sharpness fit.
    """
    frames, start, distance = clips.shape[1], torch.zeros(len(clips), 2), torch.zeros(len(clips))
    for colour, shape in {*map(tuple, labels[:, :2].tolist())}:
        which = (labels[:, 0] == colour) & (labels[:, 1] == shape)
        some, label = clips[which], labels[which]
        # Along the prompt's motion the gains of all frames are of one start; offsets are multiples of half a pixel.
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
    velocity = wrap(centre.diff(dim=1) - torch.tensor([0, world.gravity]) * frame)  # (B, F-1, 2), gravity undone
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
    """(B, 11): first centre (sines and cosines: it lives on a torus), velocity, its spread, colour, sharpness."""
    colour, _, centre, error = tracked
    angles = centre[:, 0] * (2 * math.pi / SIZE)
    velocity = wrap(centre.diff(dim=1))
    spread = velocity.std(1).norm(dim=1, keepdim=True)
    seen = clips.abs().amax((3, 4)).mean(1) / AMPLITUDE * torch.tensor([*COLOURS.values()])[colour]
    return torch.cat(
        [angles.sin(), angles.cos(), velocity.mean(1), spread, seen, 1 - error.mean(1, keepdim=True)], 1
    )


@functools.cache
def real_features(world, clips, frames):
    """Features of as many clips of the world itself."""
    labels, start = world.draw(range(clips), seed=99)
    real = world.render(labels, start, frames)
    return features(real, track(real))


def frechet(a, b):
    """Frechet distance of Gaussians fitted to features (n, d) and (m, d), each scaled by the deviation of b."""
    a, b = ((x - b.mean(0)).double() / (b.std(0) + 0.1) for x in (a, b))
    product = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0)
    return (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * product.sqrt().sum()


# ------------------------------------------------------------------------------------------------------------
# The story: train, measure, show
# ------------------------------------------------------------------------------------------------------------

NFE = [1, 2, 4, 8, 16, 32]  # network calls, of a causal model for each chunk
FAMILIES = {"causal": "tiny-causal", "bidirectional": "tiny"}
METHODS = ["teacher", "consistency", "anyflow-forward", "anyflow"]
TASKS = {0: "T2V", 1: "I2V: 1 frame given", 3: "V2V: 3 frames given"}
STREAM = (1, *[2] * 10)  # frames of the chunks of a long stream
WEIGHTS = Path(__file__).parent / "weights"

# Every run of `train.py`: name, stage, and what it starts from, which are names again. The causal teacher is
# first: it learns motion from clean past frames. A bidirectional one from random weights moved its objects left for
# right in half of its clips after 5,000 steps.
STORY = {
    "causal-teacher": ["teacher"],
    "bidirectional-teacher": ["teacher", "--init", "causal-teacher"],
}
for family in FAMILIES:
    start = ["--init", f"{family}-teacher"]
    STORY[f"{family}-anyflow-forward"] = ["flowmap", *start]
    STORY[f"{family}-anyflow"] = ["onpolicy", "--init", f"{family}-anyflow-forward"]
    STORY[f"{family}-anyflow"] += ["--teacher", f"{family}-teacher"]
    STORY[f"{family}-consistency"] = ["consistency", *start]
STORY["causal-anyflow"] += ["--real", "bidirectional-teacher"]  # which judges whole clips, so drift too
STORY = {name: [*stage, "--preset", FAMILIES[name.split("-")[0]]] for name, stage in STORY.items()}
# Continued training: the distilled student meets a world with a new colour and gravity, without a teacher.
STORY["causal-gravity"] = ["flowmap", "--preset", "tiny-causal", "--init", "causal-anyflow", "--data", "gravity"]
STORY["causal-gravity"] += ["--target", "data", "--steps", "2000"]


def train_all(folder, seed, steps):
    """Run STORY into folder/NAME, on a CPU two stages at a time with half of the cores each.

    steps: of every stage, or None for the preset's. What an interrupted training has finished is kept, what it had
    begun is resumed; ValueError if that was with other settings. RuntimeError names a stage that failed.
    """
    folder.mkdir(exist_ok=True)
    settings, path = {"seed": seed, "steps": steps}, folder / "story.json"
    if path.exists() and read_json(path) != settings:
        raise ValueError(f"{folder} holds a training of {read_json(path)}, expected {settings} or another --out")
    plots.write(path, lambda part: part.write_text(json.dumps(settings) + "\n"))
    done = {name for name in STORY if provenance(folder / name)}
    waiting, running = {name: options for name, options in STORY.items() if name not in done}, {}
    bar = tqdm(total=len(STORY), initial=len(done), desc="training", unit="stage", disable=None)
    at_once = 1 if torch.cuda.is_available() else 2
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    try:
        while waiting or running:
            for name, (stage, *options) in list(waiting.items()):
                needs = STORY.keys() & {*options}
                if len(running) < at_once and needs <= done:
                    del waiting[name]
                    options = [str(folder / option) if option in needs else option for option in options]
                    command = [sys.executable, "train.py", stage, *options, "--out", str(folder / name)]
                    command += ["--seed", str(seed), *(["--steps", str(steps)] if steps else [])]
                    command += ["--resume"] if [*(folder / name).glob("checkpoints/step-*")] else []
                    with open(folder / f"{name}.txt", "w") as out:
                        environment = os.environ | {"OMP_NUM_THREADS": threads}
                        running[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        raise RuntimeError(f"stage {name} failed, see {folder / f'{name}.txt'}")
                    done.add(name)
                    bar.update()
            bar.set_postfix_str(", ".join(running))
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
        bar.close()


class Ruler:
    """Prompts and noise that every method is measured with: each prompt of a world `copies` times."""

    def __init__(self, world, copies, seed):
        colours = [KINDS[0].index(colour) for colour in world.colours]
        others = [range(len(kind)) for kind in KINDS[1:]]
        self.world, self.labels = world, torch.tensor([*itertools.product(colours, *others)]).repeat(copies, 1)
        self.seed, self.shape = seed, (len(self.labels), *world.shape)

    def generate(self, model, sampler, steps, context=None):
        torch.manual_seed(self.seed)
        noise = torch.randn(self.shape)
        options = dict(padding=False) if model.config.kind == "causal" else {}
        return generate(model, embed(self.labels), noise, steps, sampler=sampler, context=context, **options)

    def measure(self, folder):
        """{score: [one per NFE]} and [clips per NFE] of the model in a folder."""
        model, sampler = Wan.from_pretrained(folder, dtype=torch.float32), sampler_of_folder(folder)
        clips = [self.generate(model, sampler, n) for n in NFE]
        rows = [score(x, self.labels, self.world) for x in clips]
        scores = {key: [row[key] for row in rows] for key in rows[0]}
        size = clips[-1].square().mean((1, 2, 3, 4))
        drift = [((x - clips[-1]).square().mean((1, 2, 3, 4)) / size).sqrt().mean().item() for x in clips]
        return scores | {"preview": drift}, clips

    def drift(self, folder, steps=4, chunks=STREAM):
        """Exposure bias: a causal model goes on from its own chunks, here for more than twice the frames of its
        training. Distance in pixels, by chunk, of the object to where the law takes it from the first 3 frames."""
        model, frames = Wan.from_pretrained(folder, dtype=torch.float32), sum(chunks)
        torch.manual_seed(self.seed)
        noise = torch.randn(len(self.labels), frames, *self.world.shape[1:])
        options = dict(sampler=sampler_of_folder(folder), chunks=chunks, padding=False)
        clips = generate(model, embed(self.labels), noise, steps, **options)
        start, _ = nearest(clips[:, :3], self.labels, self.world)
        lawful = start[:, None] + self.world.offsets(self.labels, frames)
        error = wrap(track(clips)[2] - lawful).norm(dim=2).mean(0)
        return [part.mean().item() for part in error.split(chunks)]

    def continuation(self, folder, given, steps):
        """One model, given the first frames of true clips: mean distance in pixels of the object's centre to the
        true one, by frame, (F,); the clips made and the true ones."""
        model, sampler = Wan.from_pretrained(folder, dtype=torch.float32), sampler_of_folder(folder)
        _, start = self.world.draw(range(len(self.labels)), seed=self.seed)
        true = self.world.render(self.labels, start)
        made = self.generate(model, sampler, steps, context=true[:, :given] if given else None)
        if not given:  # nothing to be held against but its own first frame
            start, _ = nearest(made[:, :1], self.labels, self.world)
        centre = start[:, None] + self.world.offsets(self.labels)
        return wrap(track(made)[2] - centre).norm(dim=2).mean(0).tolist(), made, true


def judge(results):
    """The claims, each decided by the numbers in results: [{"claim", "holds", "figures"}]."""
    claims, at = [], {n: i for i, n in enumerate(NFE)}

    def claim(text, holds, figures):
        claims.append({"claim": text, "holds": bool(holds), "figures": figures})

    def show(*rows):
        return ", ".join(f"{n}: " + " / ".join(f"{row[at[n]]:.3f}" for row in rows) for n in NFE)

    for family in FAMILIES:
        scores = results["methods"][family]
        teacher, consistency, forward, anyflow = (scores[method]["distance"] for method in METHODS)
        claim(
            f"{family}: AnyFlow is better than its teacher up to 8 calls, and no worse (5 %) at 16 and 32",
            all(
                anyflow[at[n]] < teacher[at[n]] if n <= 8 else anyflow[at[n]] <= 1.05 * teacher[at[n]] for n in NFE
            ),
            show(anyflow, teacher),
        )
        claim(
            f"{family}: AnyFlow is level with consistency (5 %) at 1 to 4 calls and better from 8 on",
            all(anyflow[at[n]] <= consistency[at[n]] * (1.05 if n <= 4 else 1) for n in NFE),
            show(anyflow, consistency),
        )
        claim(
            f"{family}: consistency gets worse with more calls: 32 are 1.1 times worse than its best",
            consistency[-1] > 1.1 * min(consistency),
            show(consistency),
        )
        claim(
            f"{family}: AnyFlow is any-step: no budget is worse than 1.1 times the best of the smaller ones",
            all(anyflow[i] <= 1.1 * min(anyflow[:i]) for i in range(1, len(NFE))),
            show(anyflow),
        )
        preview = [scores[method]["preview"] for method in ("anyflow", "consistency")]
        claim(
            f"{family}: AnyFlow's 4-call preview is nearer to its 32-call clip than half of consistency's distance",
            preview[0][at[4]] < 0.5 * preview[1][at[4]],
            show(*preview),
        )
        words = {key: scores["anyflow"][key][at[4]] for key in ("colour", "shape", "direction", "speed")}
        claim(
            f"{family}: prompts are obeyed at 4 calls: colour and shape 98 %, direction 90 %",
            words["colour"] >= 0.98 and words["shape"] >= 0.98 and words["direction"] >= 0.9,
            ", ".join(f"{key} {value:.0%}" for key, value in words.items()),
        )
    rows = {method: results["drift"][method] for method in ("anyflow-forward", "anyflow")}
    growth = {method: row[-1] - row[1] for method, row in rows.items()}
    claim(
        "causal: on-policy training lowers the drift's growth over the chunks, at 4 calls, by a third or more",
        growth["anyflow"] <= 2 / 3 * growth["anyflow-forward"],
        ", ".join(f"{name} {row[1]:.2f} to {row[-1]:.2f} pixels" for name, row in rows.items()),
    )
    pixels = results["continuation"][TASKS[3]]
    claim(
        "causal: V2V at 4 calls keeps the object's centre within 1 pixel over the first chunk, 2 over the clip",
        max(pixels[3:5]) < 1 and max(pixels[3:]) < 2,
        " ".join(f"{x:.2f}" for x in pixels[3:]),
    )
    before, after = (results["gravity"][key] for key in ("before", "after"))
    claim(
        "continued training on a changed world halves the distance at 4 calls, and 32 are no worse (10 %) than 4",
        after["distance"][at[4]] <= 0.5 * before["distance"][at[4]]
        and after["distance"][-1] <= 1.1 * after["distance"][at[4]],
        show(before["distance"], after["distance"]),
    )
    return claims


def table(results):
    """Distance to the nearest clip of the world for the prompt, by family, method and NFE, as text."""
    lines = ["distance to the nearest clip of the world for the prompt: 0 is best, 1 an empty clip",
             f"{'network calls':32}" + "".join(f"{n:8}" for n in NFE)]  # fmt: skip
    for family, methods in results["methods"].items():
        for method, scores in methods.items():
            lines.append(f"{family + ' ' + method:32}" + "".join(f"{value:8.3f}" for value in scores["distance"]))
    lines += ["", "AnyFlow at 4 calls, and the other scores (shares of clips; frechet: 0 is best)"]
    names = [name for name in results["methods"]["causal"]["anyflow"] if name != "distance"]
    lines.append(f"{'':32}" + "".join(f"{name:>10}" for name in names))
    for family, methods in results["methods"].items():
        for method, scores in methods.items():
            lines.append(
                f"{family + ' ' + method:32}" + "".join(f"{scores[name][NFE.index(4)]:10.2f}" for name in names)
            )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def keep(folder, target):
    """The weights of STORY in bfloat16, small enough for a repository."""
    for name in STORY:
        Wan.from_pretrained(folder / name, dtype=torch.bfloat16).save_pretrained(target / name)
        made = provenance(folder / name)
        made |= {
            key: Path(made[key]).name for key in ("init", "teacher", "real")
        }  # not where they lay on this machine
        plots.write(target / name / "anyflow.json", lambda path: path.write_text(json.dumps(made, indent=1) + "\n"))


def write_shards(world, folder, clips, seed, size=1024):
    """Clips of a world in the format that `train.py --data` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"null": {"text": world.null}}
    for first in tqdm(range(0, clips, size), desc="shards", disable=None):
        latents, text = world.batch(range(first, min(clips, first + size)), seed)
        files = files | {f"shard-{first // size:05d}": {"latents": latents, "text": text}}
        for name, tensors in files.items():
            plots.write(folder / f"{name}.safetensors", lambda path: save_file(tensors, path))
        files = {}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m toy.video", description=__doc__.split("\n\n")[0])
    parser.add_argument("--train", action="store_true", help="train everything anew, into OUT/models")
    parser.add_argument("--steps", type=int, help="of every stage, to try --train out")
    parser.add_argument("--weights", type=Path, help="folder of trained models (default: those in the repository)")
    parser.add_argument("--keep", type=Path, help="also write the models in bfloat16 into this folder")
    parser.add_argument(
        "--write-shards", type=Path, metavar="FOLDER", help="only write clips as train.py reads them"
    )
    parser.add_argument("--world", choices=WORLDS, default="torus", help="of --write-shards")
    parser.add_argument("--clips", type=int, default=4096, help="of --write-shards")
    parser.add_argument("--copies", type=int, default=1, help="clips of each prompt that are measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/video"))
    args = parser.parse_args(argv)
    for name, least in (("steps", 1), ("clips", 1), ("copies", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}, expected at least {least}")
    try:
        if args.write_shards:
            write_shards(WORLDS[args.world], args.write_shards, args.clips, args.seed)
        else:
            tell(args)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"toy.video: {error}")
    except KeyboardInterrupt:
        sys.exit("toy.video: stopped")


def tell(args):
    begin = time.perf_counter()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    models = args.weights or WEIGHTS
    if args.train:
        models = args.out / "models"
        train_all(models, args.seed, args.steps)
    trained = time.perf_counter() - begin
    if args.keep:
        keep(models, args.keep)
    ruler = Ruler(WORLDS["torus"], args.copies, args.seed)
    results = {"nfe": NFE, "seed": args.seed, "clips": len(ruler.labels), "train_seconds": trained, "methods": {}}
    shown, made = {}, {}
    bar = tqdm(total=len(STORY) + 1, desc="measuring", unit="model", disable=None)
    for family in FAMILIES:
        results["methods"][family], shown[family] = {}, {}
        for method in METHODS:
            results["methods"][family][method], shown[family][method] = ruler.measure(models / f"{family}-{method}")
            bar.update()
    results["drift"] = {method: ruler.drift(models / f"causal-{method}") for method in METHODS}
    results["continuation"] = {}
    for given, name in TASKS.items():
        pixels, clips, true = ruler.continuation(models / "causal-anyflow", given, 4)
        results["continuation"][name], made[name] = pixels, (clips, true, given)
    falling = Ruler(WORLDS["gravity"], args.copies, args.seed)
    before, _ = falling.measure(models / "causal-anyflow")
    bar.update()
    after, _ = falling.measure(models / "causal-gravity")
    bar.update()
    bar.close()
    results["gravity"] = {"before": before, "after": after}
    results["claims"] = judge(results)
    results["seconds"] = time.perf_counter() - begin
    plots.write(args.out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    plots.video_quality(results, args.out / "quality.png")
    plots.chunks(results, args.out / "chunks.png")
    row = 5  # a prompt to show: the same in every figure
    for family in FAMILIES:
        clips = {method: [x[row] for x in shown[family][method]] for method in METHODS}
        plots.clips_by_budget(clips, NFE, describe(ruler.labels[row]), args.out / f"{family}.gif")
    tasks = {name: (clips[row], true[row], given) for name, (clips, true, given) in made.items()}
    plots.tasks(tasks, describe(ruler.labels[row]), args.out / "tasks.gif")
    print(table(results))
    for claim in results["claims"]:
        print(f"[{'holds' if claim['holds'] else 'DOES NOT HOLD'}] {claim['claim']}\n    {claim['figures']}")
    print(f"figures and results.json in {args.out}; {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
