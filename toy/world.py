"""A video world small enough to know everything about it, and a tracker that scores any clip by its laws.

One shape of one colour moves over a torus (what leaves on the right comes back on the left) at constant
speed, or, in a second world, falls. A prompt names colour, shape, direction and speed, and leaves open where
the object starts and, in the worlds with stars, which background pixels are one, drawn anew in each frame. So
the distance from a clip to the nearest clip that the world could have made of its prompt is a minimum over
two numbers, and no learned metric is needed; and the velocity that a perfect teacher would have is known.

A clip is (F, 3, 12, 12): background 0, colours at -2 and 2, a unit of variance or so, as Wan's latents have.
"""

import functools
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

SIZE, AMPLITUDE = 12, 2.0  # a star has the value 1 in every channel
# No red beside green: told apart by colour-blind readers too.
COLOURS = {"red": (1, -1, -1), "yellow": (1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
SHAPES = ("disc", "cross")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y grows downwards
SPEEDS = {"slow": 1, "fast": 2}  # pixels a frame
KINDS = (tuple(COLOURS), SHAPES, tuple(DIRECTIONS), tuple(SPEEDS))  # the four words of a prompt
WORDS = [word for kind in KINDS for word in kind]  # trained weights know a word by its place: keep the order
PAINT = AMPLITUDE * torch.tensor([*COLOURS.values()])
TEXT_DIM = 32


# ---- Prompts ---------------------------------------------------------------------------------------------

def parse_prompt(prompt):
    """Words, as in "a slow red disc going left", to the indices of its colour, shape, direction and speed.

    ValueError names the kind of word that is missing, or that is there twice.
    """
    words, indices = re.findall("[a-z]+", prompt.lower()), []
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
    stars: float = 0.0  # share of background pixels that are one
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

    def twinkle(self, positions, seed):
        """Stars (B, F, 12, 12), 0 or 1, of clips by their place: numbers that follow those of `draw`."""
        size = (self.frames, SIZE, SIZE)
        u = [np.random.default_rng((seed, i)).random(6 + math.prod(size))[6:] for i in positions]
        return (torch.from_numpy(np.stack(u)) < self.stars).float().unflatten(1, size)

    def offsets(self, labels, frames=None):
        """How far the object has come at each frame f, motion f + gravity f (f + 1) / 2: (B, F, 2)."""
        f = torch.arange(frames or self.frames)[:, None]
        direction, speed = (torch.tensor([*kind.values()]) for kind in (DIRECTIONS, SPEEDS))
        motion = direction[labels[:, 2]] * speed[labels[:, 3], None]
        return motion[:, None] * f + torch.tensor([0, self.gravity]) * f * (f + 1) / 2

    def covered(self, labels, start, frames=None):
        """Coverage (B, F, 12, 12) of labels (B, 4) from start positions (B, 2)."""
        return mask(start[:, None] + self.offsets(labels, frames), labels[:, 1:2])

    def render(self, labels, start, frames=None, stars=None):
        """Clips (B, F, 3, 12, 12) of labels (B, 4) from start positions (B, 2), before stars (B, F, 12, 12)
        or before none."""
        covered = self.covered(labels, start, frames)
        clips = paint(covered, labels[:, 0])
        return clips if stars is None else clips + ((1 - covered) * stars)[:, :, None]

    def clips(self, positions, seed):
        """Clips (B, F, 3, 12, 12) by their place, with their labels (B, 4) and starts (B, 2)."""
        labels, start = self.draw(positions, seed)
        return self.render(labels, start, stars=self.twinkle(positions, seed)), labels, start

    def batch(self, positions, seed):
        """(B, F, 3, 12, 12) and text (B, 4, 32): what `train.py` asks of its data."""
        clips, labels, _ = self.clips(positions, seed)
        return clips, embed(labels)

    def velocity(self, z, t, labels):
        """The exact v = E[eps - x | z_t = z, prompt] (as z) of z (B, F, 3, 12, 12), labels (B, 4).

        t: float, (B,), or (B, F) with frames at times of their own, those at 0 given. F may be fewer frames
        than a clip has. See "The exact velocity". The error is below 1e-3 of the RMS.
        """
        # v = (z - E[x | z]) / t.
        t = torch.as_tensor(t, dtype=torch.float64, device=z.device).clamp(1e-6, 1)
        t = t.reshape(t.shape + (1,) * (2 - t.ndim)).expand(z.shape[:2])
        x, y = torch.zeros(z.shape, dtype=torch.float64, device=z.device), z.double()
        alike = torch.cat([labels[:, 1:2], self.offsets(labels, z.shape[1]).flatten(1) % 1], 1)
        for kind in alike.unique(dim=0):  # one shape, objects between pixels in the same frames
            for rows in (alike == kind).all(1).nonzero()[:, 0].split(32):  # what a cache holds
                x[rows] = Posterior(self, y[rows], t[rows], labels[rows]).mean()
        return ((y - x) / t[:, :, None, None, None]).to(z.dtype)

    def flow(self, z, grid, labels):
        """Exact ODE states at the times of a fine grid that falls to 0, from z: (len(grid), B, F, 3, 12, 12).

        RK4 in float64. The last step, to 0, is Euler's and lands on E[x | z], which is constant for
        t < .15: begin it there.
        """
        v, states = lambda z, t: self.velocity(z, t, labels), [z.double()]
        for t, r in zip(grid[:-1], grid[1:]):
            y, h = states[-1], r - t
            k = k1 = v(y, t)
            if r > 0:
                k2 = v(y + h / 2 * k1, t + h / 2)
                k3 = v(y + h / 2 * k2, t + h / 2)
                k = (k1 + 2 * k2 + 2 * k3 + v(y + h * k3, r)) / 6
            states.append(y + h * k)
        return torch.stack(states)

def paint(covered, colour):
    """Coverage (B, F, 12, 12) in colours (B,) -> (B, F, 3, 12, 12)."""
    return covered[:, :, None] * PAINT[colour][:, None, :, None, None]

WORLDS = {"torus": World(), "gravity": World(colours=tuple(COLOURS), gravity=0.5)}
WORLDS |= {"stars": World(stars=0.06), "stars-gravity": World(tuple(COLOURS), gravity=0.5, stars=0.06)}

def true_frames(name, prompt, frames, seed):
    """How a clip of the world of that name begins, (1, frames, 3, 12, 12). ValueError for no such world."""
    if name not in WORLDS:
        raise ValueError("--given needs --video, or a model of the tiny world and a --prompt")
    world, first = WORLDS[name], range(1)
    label, start = torch.tensor([parse_prompt(prompt)]), world.draw(first, seed)[1]
    return world.render(label, start, stars=world.twinkle(first, seed))[:, :frames]

class ExactTeacher:
    """The exact velocity of a world, called as a bidirectional teacher is. It knows no null prompt."""

    config = SimpleNamespace(kind="exact")

    def __init__(self, world):
        self.world, self.labels = world, torch.cartesian_prod(*(torch.arange(len(kind)) for kind in KINDS))

    def __call__(self, z, t, r, text):
        away = torch.cdist(text.flatten(1).float().cpu(), embed(self.labels).flatten(1))  # (B, prompts)
        if away.amin(1).max() > 1:
            raise ValueError("the exact teacher knows no null prompt, expected --drop 0 and guidance 1")
        labels = self.labels[away.argmin(1)]
        return self.world.velocity(z.cpu(), t.cpu(), labels).to(z.device)  # the posterior is made on a CPU

class Pixels:
    """As `full.pixels.Published`, for models of these worlds: a prompt is labels, a latent a pixel."""

    fps, stride, shift = 4, (1, 1), lambda self: 2.0
    read_prompts = open_vae = lambda *_: None  # there is nothing to load

    def text(self, prompt):
        """(1, 4, 32). ValueError for what no world can make."""
        return embed(torch.tensor([parse_prompt(prompt)]) if prompt else None)

    def pixels(self, latents):
        return enlarge(latents)

def rgb(clip):
    """(..., 3, H, W) in [-2, 2], background 0 -> (..., H, W, 3) in [0, 1]."""
    return np.clip(0.5 + 0.25 * np.moveaxis(np.asarray(clip, dtype=np.float32), -3, -1), 0, 1)

def enlarge(clips, times=12):
    """Clips (B, F, 3, H, W) side by side, every pixel a square: uint8 (F, times H, B times W, 3)."""
    frames = np.concatenate(list(rgb(clips)), axis=2)
    return (255 * frames).round().astype(np.uint8).repeat(times, 1).repeat(times, 2)


# ---- The exact velocity (may wait) -----------------------------------------------------------------------
#
# Given the start p, pixels are independent, and each is one of two colours: with coverage m, m c or, with
# probability q, m c + (1 - m). So, with s = (1 - t) / t and the sums C = c . z / t and Z = 1 . z / t over the
# channels of a pixel, by Bayes
#     log odds of a star    d(m) = log q/(1-q) + s (1-m) Z - s^2 (1-m) (3/2 (1-m) + m 1.c)
#     log likelihood, relative to that of no object, sum over the pixels under the mask of
#                           m s C - 6 s^2 m^2 + log[(1 + e^d(m)) / (1 + e^d(0))]
# What is left is a posterior over p, some t / 30 pixels wide in both dimensions. It is summed over the cells
# of a grid; a cell that matters and is too wide is divided in four. Half a deviation is narrow enough; a
# smooth posterior would do with one, but coverage has kinks.

CELL, NARROW = 0.125, 0.65  # of the first grid, in pixels; of the last one, in deviations
STARTS = torch.stack(torch.meshgrid(*2 * [(torch.arange(SIZE / CELL) + 0.5) * CELL], indexing="xy"), -1)
STARTS = STARTS.flatten(0, 1)
# How fast a frame changes as the object moves along an axis, |dx/dp|^2 at most, by shape. Times s^2, this is
# the curvature of the log likelihood.
SLOPES = torch.tensor([100.0, 160.0])
NEGLIGIBLE = 10.0  # what is less likely than the best by exp of this is left out

class Posterior:
    """Of start and stars, given noisy clips z (B, F, 3, 12, 12) at times t (B, F), all of one shape, with
    objects that are the same fraction of a pixel off."""

    def __init__(self, world, z, t, labels):
        self.shape, frames, s = labels[0, 1], z.shape[1], (1 - t) / t
        # Roll whole pixels back, so that in all frames the object is where it started, or half a pixel off.
        offset = world.offsets(labels, frames)
        whole = offset.floor().long()
        x, y = (torch.arange(SIZE) + whole[..., i, None] for i in (0, 1))
        self.places = (y[..., None] % SIZE * SIZE + x[..., None, :] % SIZE).flatten(2)  # (B, F, 144)
        # The log likelihoods are differences of numbers of s^2 times 2000.
        dtype = torch.float32 if s.max() < 20 else torch.float64
        aligned = lambda sums: sums.flatten(2).gather(2, self.places).transpose(1, 2).to(dtype)
        self.colour, scaled = PAINT[labels[:, 0]].to(z.dtype), z * (s / t)[:, :, None, None, None]
        s_c = aligned(torch.einsum("bfchw,bc->bfhw", scaled, self.colour))  # (B, 144, F)
        s_z, s2 = aligned(scaled.sum(2)), s.square()[:, None].to(dtype)
        self.total = self.colour.sum(1)[:, None, None].to(dtype)  # 1.c
        self.prior = torch.tensor(world.stars, dtype=torch.float64).logit().to(dtype)
        self.curvature = SLOPES[self.shape] * s2.double().sum((1, 2))  # (B,)

        # Frames whose object is equally far off: how far, which they are, and their pixels.
        self.parts = []
        fractions, part_of_frame = (offset - whole)[0].unique(dim=0, return_inverse=True)
        for i, fraction in enumerate(fractions):
            f = (part_of_frame == i).nonzero()[:, 0]
            part = SimpleNamespace(offset=fraction, frames=f, s_c=s_c[..., f], s_z=s_z[..., f], s2=s2[..., f])
            part.empty = self.log_odds(0, part.s_z, part.s2, self.total)  # of a star, without an object
            part.no_object = F.softplus(part.empty)
            self.parts.append(part)

    def log_odds(self, m, s_z, s2, total):
        return self.prior + (1 - m) * (s_z - s2 * (1.5 * (1 - m) + m * total))

    def mean(self):
        """E[x | z], (B, F, 3, 12, 12)."""
        log_p, tables = self.of_grid()
        wide = CELL * self.curvature.sqrt() > NARROW
        clip, start, weight = self.refined(log_p, wide)
        x = torch.zeros(*self.places.transpose(1, 2).shape, 3, dtype=torch.float64)  # (B, 144, F, 3)
        for part, (values, entries, odds) in zip(self.parts, tables):
            star = part.empty.sigmoid().contiguous()  # which is filled through views
            covered, none = torch.zeros_like(star), star.clone()
            for i in (~wide).nonzero()[:, 0].tolist():
                weights = log_p[i].softmax(0).repeat_interleave(entries.shape[1])
                share = torch.zeros(len(values) * SIZE**2, dtype=weights.dtype)
                share = share.index_add_(0, entries.flatten(), weights).view(len(values), -1, 1)
                m = values[:, None, None]
                covered[i] = (share * m).sum(0)
                star[i] += (share * ((1 - m) * odds[i].sigmoid() - none[i])).sum(0)
            if wide.any():
                pair, pixel, m, odds = self.under_mask(clip, start, part)
                w = weight[pair][:, None].to(m.dtype)
                covered.flatten(0, 1).index_add_(0, pixel, (w * m).expand_as(odds))
                more = (1 - m) * odds.sigmoid() - at_pixels(none, pixel)
                star.flatten(0, 1).index_add_(0, pixel, w * more)
            x[:, :, part.frames] = covered[..., None] * self.colour[:, None, None] + star[..., None].double()
        x, places = x.permute(0, 2, 3, 1), self.places[:, :, None].expand(-1, -1, 3, -1)
        return torch.zeros_like(x).scatter(3, places, x).unflatten(3, (SIZE, SIZE))

    def of_grid(self):
        """Log likelihoods (B, 9216) of STARTS, and for each part what they were made of.

        On that grid a coverage has few values: what a pixel says of each is computed once.
        """
        log_p, tables = 0, []
        for part in self.parts:
            values, entries = coverage_table(self.shape.item(), tuple(part.offset.tolist()))
            s_c, s_z, s2, no_object = (x[:, None] for x in (part.s_c, part.s_z, part.s2, part.no_object))
            m = values[:, None, None]  # tables are (B, K, 144, f)
            odds = self.log_odds(m, s_z, s2, self.total[:, None])
            said = m * s_c - 6 * m * m * s2 + F.softplus(odds) - no_object
            log_p = log_p + said.sum(3).flatten(1)[:, entries].sum(2)
            tables.append((values, entries, odds))
        return log_p.double(), tables

    def refined(self, log_p, wide):
        """Clip (n,), start (n, 2) and weight (n,) of as many and as small cells as the wide clips need."""
        corners = torch.tensor([[x, y] for x in (-0.5, 0.5) for y in (-0.5, 0.5)])
        per_clip = torch.zeros(len(log_p), dtype=torch.float64)
        best_of = lambda clip, log_p: (per_clip - math.inf).scatter_reduce(0, clip, log_p, "amax")[clip]
        clip, start = wide.nonzero()[:, 0].repeat_interleave(len(STARTS)), STARTS.repeat(int(wide.sum()), 1)
        start, log_p = start.to(self.total.dtype), log_p[wide].flatten()
        width, cell, done = self.curvature.rsqrt(), CELL, []
        while len(clip):
            # A centre that is half a diagonal off the best point of its cell says too little of it.
            wide = cell > NARROW * width
            slack = NEGLIGIBLE**0.5 + torch.where(wide, 0.5 * cell / width, 0)
            kept = log_p > best_of(clip, log_p) - slack[clip].square()
            clip, start, log_p = clip[kept], start[kept], log_p[kept]
            more = wide[clip]
            done.append((clip[~more], start[~more], log_p[~more]))
            clip, start, cell = clip[more].repeat_interleave(4), start[more][:, None], cell / 2
            start = (start + corners * cell).flatten(0, 1)
            log_p = self.log_likelihood(clip, start)
        if not done:
            return None, None, None
        clip, start, log_p = (torch.cat(parts) for parts in zip(*done))
        weight = (log_p - best_of(clip, log_p)).exp()
        return clip, start, weight / per_clip.index_add(0, clip, weight)[clip]

    def log_likelihood(self, clip, start):
        """Of starts (n, 2) of clips (n,): (n,)."""
        log_p = torch.zeros(len(clip), dtype=torch.float64)
        for part in self.parts:
            pair, pixel, m, odds = self.under_mask(clip, start, part)
            said = m * at_pixels(part.s_c, pixel) - 6 * m * m * part.s2[clip[pair], 0] + F.softplus(odds)
            log_p.index_add_(0, pair, (said - at_pixels(part.no_object, pixel)).sum(1).double())
        return log_p

    def under_mask(self, clip, start, part):
        """The N pixels under the masks of (clip, start): pair (N,), pixel (N,) as clip * 144 + its place,
        coverage (N, 1), and log odds (N, f) of a star."""
        masks = mask(start + part.offset, self.shape).flatten(1)
        pair, place = masks.nonzero().unbind(1)
        of, m = clip[pair], masks[pair, place][:, None]
        pixel = of * SIZE**2 + place
        return pair, pixel, m, self.log_odds(m, at_pixels(part.s_z, pixel), part.s2[of, 0], self.total[of, 0])

def at_pixels(x, pixel):
    """Of x (B, 144, f): (N, f)."""
    return x.flatten(0, 1)[pixel]

@functools.cache
def coverage_table(shape, part):
    """The values (K,), 0 first, that coverages from STARTS have, and entries (9216, n): of each start, which
    value at which pixel, as value index * 144 + pixel. Entries of value 0 fill the rows up."""
    masks = mask(STARTS + torch.tensor(part), torch.tensor(shape)).flatten(1)
    values, index = masks.round(decimals=5).unique(return_inverse=True)
    pixels = masks.topk(int((masks > 0).sum(1).max())).indices
    return values, index.gather(1, pixels) * SIZE**2 + pixels


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

def track(clips, stars=0.0):
    """What the tracker sees in clips (B, F, 3, 12, 12): an object of one colour and shape in each frame.

    stars: of the world; above 0, every pixel of the background may be one.

    Returns colour (B,) and shape (B,) as indices, centre (B, F, 2) in pixels, and error (B, F): the RMS
    distance of a frame to the nearest one that the world can render with that object, over the RMS of the
    object. 0 is perfect, 1 is as bad as an empty frame.
    """
    objects = [(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
    gains = torch.stack([gain(clips, *which).flatten(2).amax(2).sum(1) for which in objects], 1)
    colour, shape = torch.tensor(objects)[gains.argmax(1)].unbind(1)
    centre, error = torch.zeros(*clips.shape[:2], 2), torch.zeros(clips.shape[:2])
    for c, s in {*zip(colour.tolist(), shape.tolist())}:
        rows = (colour == c) & (shape == s)
        some, of = clips[rows], torch.full((rows.sum(),), c)

        def distance(positions, some=some, of=of, s=s):  # (b, F, n, 2) -> (b, F, n)
            covered = [mask(p, torch.tensor(s)) for p in positions.unbind(2)]
            return torch.stack([relative(some, m, of, stars, (2, 3)) for m in covered], 2)

        best = gain(some, c, s).flatten(2).argmax(2)
        centre[rows] = refine(GRID.flatten(0, 1)[best], distance)
        error[rows] = distance(centre[rows][:, :, None])[..., 0].sqrt()
    return colour, shape, centre, error

def nearest(clips, labels, world):
    """The clip of the world for prompts `labels` (B, 4) that is nearest to each of clips (B, F, 3, 12, 12).

    Returns start (B, 2) and distance (B,), RMS over that of the object: 0 for a clip of the world, 1
    for an empty one, 1.4 and more for a clip of something else. Shape, colour, motion and sharpness must fit.
    """
    frames, start, distance = clips.shape[1], torch.zeros(len(clips), 2), torch.zeros(len(clips))
    for colour, shape in {*map(tuple, labels[:, :2].tolist())}:
        which = (labels[:, 0] == colour) & (labels[:, 1] == shape)
        some, label = clips[which], labels[which]
        # Along the prompt's motion all frames share one start; offsets are multiples of half a pixel.
        offsets = (2 * world.offsets(label, frames)).round().long()[:, :, None, None]  # (b, F, 1, 1, 2)
        at = ((2 * GRID).long() + offsets) % (2 * SIZE)
        at = (at[..., 1] * 2 * SIZE + at[..., 0]).flatten(2)
        total = gain(some, colour, shape).flatten(2).gather(2, at).sum(1)

        def cost(positions, some=some, label=label):  # (b, n, 2) -> (b, n)
            covered = [world.covered(label, p, frames) for p in positions.unbind(1)]
            return torch.stack([relative(some, m, label[:, 0], world.stars, (1, 2, 3)) for m in covered], 1)

        start[which] = refine(GRID.flatten(0, 1)[total.argmax(1)], cost)
        distance[which] = cost(start[which][:, None])[:, 0].sqrt()
    return start, distance

def relative(clips, covered, colour, stars, dims):
    """Squared distance of clips to what can be rendered with objects of coverage (B, F, 12, 12), over the
    squares of the objects, summed over dims. With stars, each pixel is held against the nearer of two."""
    error, rest = clips - paint(covered, colour), 1 - covered
    squared = error.square().sum(2)
    if stars:  # |e - rest|^2 - |e|^2, where it is below 0
        squared = squared + (3 * rest.square() - 2 * rest * error.sum(2)).clamp(max=0)
    return squared.sum(dims) / (3 * AMPLITUDE**2 * covered.square()).sum(dims)

def star_scores(clips, tracked):
    """Of the background pixels of clips, outside the object as tracked: share nearer to a star than to none,
    (B,), and RMS distance to the nearer, (B,)."""
    _, shape, centre, _ = tracked
    ground = mask(centre, shape[:, None]) == 0
    star = ground & (clips.mean(2) > 0.5)
    away = (clips - star[:, :, None].float()).square().mean(2) * ground
    size = ground.sum((1, 2, 3))
    return star.sum((1, 2, 3)) / size, (away.sum((1, 2, 3)) / size).sqrt()

def score(clips, labels, world):
    """Scores of clips (B, F, 3, 12, 12) for prompts (B, 4), each a mean over the clips.

    distance     to the nearest clip of the world for this prompt, see `nearest`          0 is best
    sharp        share of frames within 0.4 of one that the world can render              1
    physics      share of clips that move, with every velocity, gravity undone, within 1
                 pixel a frame of their median                                            1
    colour, shape, direction, speed: share that have those of the prompt                  1
    diversity    mean distance of two clips' first centres, over that of uniform ones     1
    frechet      distance to the world's clips in `features`                              0
    In worlds with stars, of the pixels outside the object:
    star rate    share nearer to a star than to none                                      world.stars
    star grain   RMS distance of a channel to the nearer of star and none                 0
    """
    tracked = colour, shape, centre, error = track(clips, world.stars)
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
    if world.stars:
        scores["star rate"], scores["star grain"] = star_scores(clips, tracked)
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
    real = world.clips(range(clips), seed=99)[0][:, :frames]
    return features(real, track(real, world.stars))

def frechet(a, b):
    """Frechet distance of Gaussians fitted to features (n, d) and (m, d), scaled by b's deviation."""
    a, b = ((x - b.mean(0)).double() / (b.std(0) + 0.1) for x in (a, b))
    product = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0)
    return (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * product.sqrt().sum()
