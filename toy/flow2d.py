"""AnyFlow in two dimensions: the whole method with one small MLP, on a laptop, in a few minutes.

    python -m toy.flow2d                       # checkerboard, one seed: table, claims, figures in out/flow2d
    python -m toy.flow2d --density mixture --exact-teacher
    python -m toy.flow2d --recipe published    # the paper's choices; --undo NAME takes one of them
    python -m toy.flow2d --departures          # what each of them is worth, in short runs

Trains a flow-matching teacher, distils it by consistency distillation (the baseline), by forward flow-map
training (AnyFlow stage 1) and on-policy (stage 2), and measures each at 1, 2, 4, ..., 64 network calls. Every
density here is a mixture whose velocity is known in closed form, so a path can be held against the exact ODE.
"""

import argparse
import copy
import math
import random
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import anyflow
from full.files import write, write_json
from full.options import command, path_value, positive, seed_value
from toy import plots

NFE = [1, 2, 4, 8, 16, 32, 64]  # network calls, each a divisor of the next: the grids are nested
# teacher-heun: the teacher by a better solver than Euler's; anyflow-control: as many more steps of stage 1 as
# stage 2 has; anyflow-gamma: anyflow's network, re-noised
METHODS = ["teacher", "teacher-heun", "consistency", "anyflow-forward", "anyflow-control", "anyflow",
           "anyflow-gamma"]

def gamma_of(calls, c=2.0):
    """The more jumps, the less noise after each. On seeds 10 and 11, c of 0 to 2 are level, 4 and 8 worse."""
    return min(1.0, c / calls)


# ---- Densities with exact velocities (how they are found may wait) ---------------------------------------

class Mixture:
    """Equal-weight mixture of K components in the plane, centred, of mean variance one. Another density needs
    the same four functions.

    shape="gaussian": N(centre, size^2). shape="box": uniform on the square centre +- size.
    Given z_t, the noise of component k has a known posterior; v = E[eps - x | z_t] follows from its mean.
    """

    def __init__(self, centres, size, shape):
        centres = torch.as_tensor(centres, dtype=torch.float64)
        centres = centres - centres.mean(0)
        spread = size**2 / 3 if shape == "box" else size**2
        scale = (centres.square().mean() + spread).sqrt()
        self.centres, self.size, self.shape = centres / scale, float(size / scale), shape

    def sample(self, n):
        """n points, float32 (n, 2)."""
        centre = self.centres[torch.randint(len(self.centres), (n,))].float()
        within = 2 * torch.rand(n, 2) - 1 if self.shape == "box" else torch.randn(n, 2)
        return centre + self.size * within

    def velocity(self, z, t, r=None):
        """v(z, t) (B, 2), in the precision of z. It ignores r: it stands where a teacher is asked."""
        # The mean over components of E[eps - x]; not (E[eps | z] - z) / (1 - t), which is 0/0 at t = 1.
        t = torch.as_tensor(t, dtype=torch.float64).clamp(1e-6, 1 - 1e-6).expand(len(z))[:, None, None]
        s, d = 1 - t, z.double()[:, None] - (1 - t) * self.centres  # (B, K, 2)
        if self.shape == "gaussian":
            # z_t of component k is N(s c, s^2 size^2 + t^2), jointly Gaussian with eps and x.
            var = (s * self.size) ** 2 + t**2
            v, log_p = (t - s * self.size**2) / var * d - self.centres, -d.square() / (2 * var)
        else:
            # eps is a standard normal truncated to d / t +- s size / t, and x = c - t (eps - d / t) / s.
            away, log_p = truncated_normal(d / t, s * self.size / t)
            v = d / t - self.centres + away / s
        weight = log_p.sum(-1, keepdim=True).softmax(1)  # posterior of the component, (B, K, 1)
        return (weight * v).sum(1).to(z.dtype)

    def cdf(self, y, directions):
        """The share of the density below y (m,) in directions (2, D): float64 (D, m)."""
        z = y - (self.centres @ directions.double())[..., None]  # (K, D, m)
        if self.shape == "gaussian":
            return torch.special.ndtr(z / self.size).mean(0)
        # A box projected on a line is the sum of two uniforms, on [-a, a] and [-b, b]: a trapezoid.
        a, b = self.size * directions.double().abs()[..., None]
        area = lambda z: z.clamp(min=0).square() / (8 * a * b)
        return (area(z + a + b) - area(z + a - b) - area(z - a + b) + area(z - a - b)).mean(0)

    def flow(self, z, grid, substeps=2, velocity=None):
        """ODE states at the times of a fine falling grid, (len(grid), B, 2), by RK4 in float64; also of
        another velocity(z, t)."""
        v, states = velocity or self.velocity, [z.double()]
        for start, stop in zip(grid[:-1], grid[1:]):
            y, h = states[-1], (stop - start) / substeps
            for i in range(substeps):
                t = start + i * h
                k1 = v(y, t)
                k2 = v(y + h / 2 * k1, t + h / 2)
                k3 = v(y + h / 2 * k2, t + h / 2)
                k4 = v(y + h * k3, t + h)
                y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            states.append(y)
        return torch.stack(states)

NODES, WEIGHTS = map(torch.from_numpy, np.polynomial.legendre.leggauss(4))
def truncated_normal(m, w):
    """Mean less m, and log of the mass, of a standard normal on m +- w; also in the tails, also if narrow."""
    # In the left tail, all over exp(-c^2/2), which erfcx leaves out; c: the end nearer to 0, or 0 if inside.
    a, b, erfcx, unit = -m.abs() - w, w - m.abs(), torch.special.erfcx, 1 / math.sqrt(math.tau)
    c = b.clamp(max=0)
    phi_a, phi_b = (((c - y) * (c + y) / 2).exp() for y in (a, b))
    tail = (erfcx(-b / math.sqrt(2)) - phi_a * erfcx(-a / math.sqrt(2))) / 2
    mass = torch.where(b > 0, torch.special.ndtr(b) - torch.special.ndtr(a), tail)
    wide = (phi_b - phi_a) * m.sign() * unit / mass - m, mass.log() - c.square() / 2
    # Where it is nearly flat, that difference loses all digits, and four Gauss-Legendre nodes are exact.
    x = w[..., None] * NODES
    p = unit * WEIGHTS * (-m[..., None] * x - x.square() / 2).exp()
    flat = (p * x).sum(-1) / p.sum(-1), (w * p.sum(-1)).log() - m.square() / 2
    return [torch.where((w < 0.3) & (m.abs() * w < 0.3), *pair) for pair in zip(flat, wide)]

def checkerboard():
    return Mixture([(i, 2 * j + i % 2) for i in range(4) for j in range(2)], 0.5, "box")

def mixture():
    """Six Gaussians on a ring and one in the middle."""
    ring = [(math.cos(a), math.sin(a)) for a in torch.arange(6) * math.tau / 6]
    return Mixture([(0.0, 0.0)] + ring, 0.12, "gaussian")

def spiral():
    """Two spiral arms, each drawn by 40 overlapping Gaussians at nearly equal distances along its length."""
    s = torch.linspace(0.15, 1, 40).sqrt() * 2.25 * math.pi
    arm = torch.stack([s * s.cos(), s * s.sin()], 1)
    return Mixture(torch.cat([arm, -arm]), 0.35, "gaussian")

DENSITIES = {"checkerboard": checkerboard, "mixture": mixture, "spiral": spiral}


# ---- The network, and the loop that trains it ------------------------------------------------------------

class MLP(nn.Module):
    """u(z, t, r) for points z (B, 2), times (B,). Two time embedders and a fixed gate, as in `model.py`."""

    def __init__(self, width=64, depth=4, gate=0.25):
        super().__init__()
        self.gate = gate
        # Sharp edges need high frequencies in z.
        self.register_buffer("space", torch.tensor([1.0, 2.0, 4.0]) * 0.9)
        self.register_buffer("time", torch.tensor([0.5, 1.0, 2.0, 4.0]) * math.pi)
        embedder = lambda: nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, width))
        self.embed_t, self.embed_r = embedder(), embedder()
        self.first = nn.Linear(2 + 12, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 2)

    def forward(self, z, t, r):
        if t.stride(0) == r.stride(0) == 0:  # a sampler's time is one number for all points: embed it once
            t, r = t[:1], r[:1]
        e = (1 - self.gate) * self.embed_t(fourier(t[:, None], self.time))
        e = e + self.gate * self.embed_r(fourier(r[:, None], self.time))
        h = self.first(fourier(z, self.space)) + e
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h))
        return self.last(nn.functional.silu(h))

def fourier(x, frequencies):
    """(B, n) -> (B, n + 2 n len(frequencies)): the numbers themselves with their sines and cosines."""
    angles = (x[:, :, None] * frequencies).flatten(1)
    return torch.cat([x, angles.sin(), angles.cos()], 1)

class Learner:
    """A copy of a network, in training by Adam with warm-up and cosine decay, and its averaged weights."""

    def __init__(self, start, lr, steps, betas=(0.9, 0.999), ema=0.999):
        self.lr, self.steps, self.ema, self.updates = lr, steps, ema, 0
        self.model = copy.deepcopy(start).requires_grad_(True)
        self.average = copy.deepcopy(start).requires_grad_(False)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr, betas, fused=True)

    def update(self, step):
        """One step with the present gradients, at that step's learning rate."""
        decay = (1 + math.cos(math.pi * step / self.steps)) / 2
        self.optimiser.param_groups[0]["lr"] = self.lr * min(1, (step + 1) / 50) * decay
        parameters = list(self.model.parameters())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        anyflow.update_average(list(self.average.parameters()), parameters, self.updates, self.ema)
        self.updates += 1

def repeat(stage, steps, one_step):
    """one_step(i) for i = 0, 1, ...: each returns its loss. Returns seconds."""
    start = time.perf_counter()
    bar = tqdm(range(steps), desc=f"{stage:>15}", leave=False, disable=None, mininterval=0.5)
    for i in bar:
        loss = one_step(i)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of stage {stage} is {loss} at step {i}")
        if i % 50 == 0:
            bar.set_postfix_str(f"loss {loss:.4f}")
    return time.perf_counter() - start

# Where we differ from the paper, (our choice, the paper's): those of stage 1, then those of stage 2
RECIPE = {
    "velocity": ("teacher", "data"),  # v in stage 1's target
    # An error at small t lands on the sample, and no later step mends it: so small t weighs more. The paper's
    # w(t) = t sqrt(1 - t) is almost nothing there.
    "weight": (lambda t: 1 / (t + 0.05), None),
    "balance": (False, True),  # of jumps against anchors: it needs samples of many numbers
    "ends": (True, False),  # half a batch more learns the jumps to 0 by the baseline's loss
    "rollout": ([1, 2, 4], [2, 4, 8, 16, 50]),  # of how many steps, stage 2
    "rate": (3e-4, 8e-5),  # of learning in stage 2: the paper's is a 25th of stage 1's
    "fake-steps": (3, 1),  # the fake score must keep up with the student
    "fake-noises": (4, 1),  # of a sample, in each of them
    "dmd-weight": (4.0, 1.0),
    "dmd-times": (0.85, 1.0),  # t from 0.02 up to this; later the fake score's error exceeds its signal
    "dmd-mean": ("batch", "sample"),  # in eq. (5)
}

def train(density, methods, steps, batch, seed, exact_teacher=False, undone=(), given=()):
    """The stages of the paper, in order, but for networks given. Returns {name: network}, {name: seconds}."""
    torch.manual_seed(seed)
    random.seed(seed)
    recipe = {name: paper if name in undone else ours for name, (ours, paper) in RECIPE.items()}
    wanted = {"teacher", *methods} | {"anyflow-forward" for name in methods if name.startswith("anyflow")}
    nets, seconds = dict(given), {}
    data = lambda: density.sample(batch)
    more, gentle = max(1, steps // 5), dict(betas=(0.0, 0.999), ema=0.99)  # how stage 2 and its control learn

    def fit(name, start, loss_of, *options, **more_options):
        """Train a copy of a network by `loss_of(model, progress)`; keep the average of its weights."""
        if name in nets or name not in wanted:
            return
        learner = Learner(start, *options, **more_options)

        def one_step(i):
            loss = loss_of(learner.model, i / learner.steps)
            loss.backward()
            learner.update(i)
            return loss.item()

        nets[name], seconds[name] = learner.average, repeat(name, learner.steps, one_step)

    fit("teacher", MLP(), lambda model, _: anyflow.flow_matching_loss(model, data()), 3e-3, 2 * steps)
    trained = nets["teacher"]  # every student starts as the teacher, and learns from its velocity
    velocity = nets["teacher"] = density.velocity if exact_teacher else trained

    def consistency_loss(model, progress, every=1):  # finer teacher steps later: first fast, then exact
        x, weight, finer = data()[::every], lambda t: 1 / (t + 0.05) ** 2, int(10 * 4**progress)
        return anyflow.consistency_loss(model, velocity, x, steps=finer, weight=weight)

    def flow_map_loss(model, progress=1.0):
        teacher = velocity if recipe["velocity"] == "teacher" else None
        loss = anyflow.flow_map_loss(model, data(), teacher=teacher, weight=recipe["weight"],
                                     balance=recipe["balance"])
        return loss + consistency_loss(model, progress, every=2) if recipe["ends"] else loss

    fit("consistency", trained, consistency_loss, 2e-3, steps)
    fit("anyflow-forward", trained, flow_map_loss, 2e-3, steps)
    forward = nets.get("anyflow-forward")
    fit("anyflow-control", forward, lambda model, _: flow_map_loss(model), recipe["rate"], more, **gentle)
    if "anyflow" in methods or "anyflow-gamma" in methods:
        learners = {name: Learner(net, recipe["rate"], more, **gentle)
                    for name, net in (("student", forward), ("fake", trained))}  # it starts as the teacher
        seconds["anyflow"] = on_policy(learners, velocity, flow_map_loss, batch, recipe)
        nets["anyflow"] = learners["student"].average
    for name, same in (("anyflow-gamma", "anyflow"), ("teacher-heun", "teacher")):
        if name in methods:
            nets[name], seconds[name] = nets[same], seconds[same]
    return {name: nets[name] for name in [*given, *METHODS] if name in nets}, seconds

def on_policy(learners, judge, flow_map_loss, batch, recipe):
    """Stage 2 of learners["student"], judged by the teacher, with learners["fake"]. Returns seconds."""
    student, fake = learners["student"].model, learners["fake"].model

    def rollout(size):  # a batch is its size here
        grid = anyflow.time_grid(random.choice(recipe["rollout"]))
        k = random.randrange(len(grid) - 1)
        x_hat = anyflow.backward_simulation(student, torch.randn(size, 2), grid, k)
        t = 0.02 + (recipe["dmd-times"] - 0.02) * torch.rand(size)
        dmd_options = dict(t=t, per_sample=recipe["dmd-mean"] == "sample")
        return x_hat, dmd_options, lambda i: dict(repeats=recipe["fake-noises"]), {}

    def one_step(i):
        losses = []

        def backward(name, loss):
            loss.backward()
            losses.append(loss.item())

        anyflow.on_policy_step([batch], rollout, lambda _: flow_map_loss(student), judge, fake, backward,
                               lambda name: learners[name].update(i), dmd_weight=recipe["dmd-weight"],
                               fake_steps=recipe["fake-steps"])
        return sum(losses)

    return repeat("anyflow", learners["student"].steps, one_step)


# ---- Measuring -------------------------------------------------------------------------------------------

def heun(model, noise, calls, **_):
    """A teacher's states (steps + 1, B, 2), by Heun's method: two calls a step; with one call, Euler's."""
    states, grid = [noise], anyflow.time_grid(max(1, calls // 2)).float()
    velocity = lambda z, t: model(z, t.expand(len(z)), t.expand(len(z)))
    for t, r in zip(grid[:-1], grid[1:]):
        z, v = states[-1], velocity(states[-1], t)
        if calls > 1:
            v = (v + velocity(z - (t - r) * v, r)) / 2
        states.append(z - (t - r) * v)
    return torch.stack(states)

class Ruler:
    """What all methods of one seed are measured with: noise, exact paths of some of it, the density's CDF.

    The noise is a scrambled Sobol sequence, which fills the plane more evenly than random points. A sampler
    that stays on the ODE keeps that; one that draws fresh noise loses it, and gets more points.
    """

    def __init__(self, density, points, seed=0, fresh=8, traced=500):
        sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)
        uniform = sobol.draw(fresh * points, dtype=torch.float64)
        self.noise = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).float()
        self.density, self.points, self.data = density, points, density.sample(points)
        self.exact = density.flow(self.noise[:traced], anyflow.time_grid(NFE[-1])).float()  # (65, traced, 2)
        angles = (torch.arange(64) + 0.5) / 64 * math.pi
        self.directions = torch.stack([angles.cos(), angles.sin()])
        self.line = torch.linspace(-6, 6, 6001, dtype=torch.float64)
        self.cdf, self.quantiles = density.cdf(self.line, self.directions).numpy(), {}
        # What a perfect method scores: with fresh noise, random points of the density, as many as such a
        # sampler gets, mean of four draws; without, the exact ODE from the Sobol noise.
        self.floor = statistics.mean(self.swd(density.sample(fresh * points)) for _ in range(4))
        self.floor_ode = self.of_ode(density.velocity)

    def swd(self, x):
        """Sliced 2-Wasserstein distance of points (n, 2) to the density, mean of 64 directions."""
        if len(x) not in self.quantiles:  # as many of the density's quantiles, from its CDF
            share = (np.arange(len(x)) + 0.5) / len(x)
            self.quantiles[len(x)] = np.float32([np.interp(share, row, self.line) for row in self.cdf])
        along = np.sort((x @ self.directions).T.numpy())
        return float(np.sqrt(np.square(along - self.quantiles[len(x)]).mean(1)).mean())

    def of_ode(self, velocity):
        """Distance of the samples of dz/dt = velocity(z, t), followed exactly: RK4, finer towards 0."""
        grid = anyflow.time_grid(16) ** 2  # to 1e-4 what 64 even steps give
        return self.swd(self.density.flow(self.noise[: self.points], grid, 1, velocity)[-1].float())

    def sample(self, net, n, points, gamma, sampler=anyflow.sample, **options):
        """Samples (points, 2) in n calls, and what the traced points visit, (n + 1, traced, 2)."""
        parts = [sampler(net, z, n, gamma=gamma, path=True, **options)
                 for z in self.noise[:points].split(2048)]
        return torch.cat([part[-1] for part in parts]), parts[0][:, : self.exact.shape[1]]

    def best_times(self, net):
        """{calls: distance at the times of `anyflow.best_grid`, which are found with other noise}."""
        other_noise = torch.randn(1024, 2, generator=torch.Generator().manual_seed(1))
        grids = anyflow.best_grid(net, other_noise, [2, 4, 8])
        return {len(grid) - 1: self.swd(self.sample(net, grid, self.points, 0.0)[0]) for grid in grids}

    def measure(self, method, net):
        """Per NFE: {"swd", "path_error", "budget_drift"}, the samples, and the traced points' states."""
        scores, states, samples = {"swd": [], "path_error": [], "budget_drift": []}, [], []
        for n in NFE:
            gamma = {"consistency": 1.0, "anyflow-gamma": gamma_of(n)}.get(method, 0.0)
            points = len(self.noise) if method in ("consistency", "anyflow-gamma") else self.points
            sampler = heun if method == "teacher-heun" else anyflow.sample
            x, visited = self.sample(net, n, points, gamma, sampler, average=method != "teacher")
            samples.append(x)
            states.append(visited)
            scores["swd"].append(self.swd(x))
            # RMS distance of the states visited after the noise to the exact ODE states at the same times
            error = visited[1:] - self.exact[:: NFE[-1] // (len(visited) - 1)][1:]
            scores["path_error"].append(error.square().sum(-1).mean().sqrt().item())
        for x in samples:  # mean distance to the method's own 64-call sample from the same noise
            scores["budget_drift"].append((x - samples[-1]).norm(dim=-1).mean().item())
        return scores, samples, states


# ---- Command line ----------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m toy.flow2d", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--density", choices=DENSITIES, default="checkerboard")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="teacher is always one")
    choices = parser.add_mutually_exclusive_group().add_argument
    choices("--recipe", choices=("tuned", "published"), default="tuned", help="our choices or the paper's")
    choices("--undo", nargs="+", choices=RECIPE, default=[], help="the paper's choice in these alone")
    add("--exact-teacher", action="store_true", help="distil the closed-form velocity, not the trained one")
    add("--seeds", type=positive, default=1, help="how many; results are medians over them (default 1)")
    add("--seed", type=seed_value, default=0, help="the first (default 0)")
    add("--steps", type=positive, help="of a student (default 5000, --fast 1000); the teacher has twice")
    add("--batch", type=positive, default=512, help="(default 512)")
    add("--out", type=path_value, default=Path("out/flow2d"))
    add("--fast", action="store_true", help="about a minute: fewer steps and samples")
    choices("--departures", action="store_true", help="instead: short runs with each of the paper's choices")
    add("--choose-gamma", action="store_true", help="instead: train AnyFlow, measure many gamma, draw them")
    args = parser.parse_args(argv)
    if args.choose_gamma + args.departures + (args.methods != METHODS) > 1:
        parser.error("found more than one of --choose-gamma, --departures and --methods, expected one")
    args.steps, args.points = args.steps or (1000 if args.fast else 5000), 2**12 if args.fast else 2**15
    return args

def trained_seeds(args, methods):
    """For each seed: what `train` gives, and the ruler."""
    density, undone = DENSITIES[args.density](), RECIPE if args.recipe == "published" else args.undo
    for seed in range(args.seed, args.seed + args.seeds):
        nets, seconds = train(density, methods, args.steps, args.batch, seed, args.exact_teacher, undone)
        yield nets, seconds, Ruler(density, args.points, seed)

def departures(args):
    """Print distances after short runs with each of the paper's choices alone, from one teacher a seed."""
    density, scores, first = DENSITIES[args.density](), {}, ["ours", "again", *[*RECIPE][:4], "all"]
    for seed in range(args.seed, args.seed + args.seeds):
        teacher, _ = train(density, [], args.steps, args.batch, seed)
        ruler, ours = Ruler(density, args.points, seed), {}
        for way in [*first, "again, stage 1 ours", *[*RECIPE][4:]]:
            given, undone = teacher if way in first else teacher | ours, RECIPE if way == "all" else [way]
            how = args.batch, seed + 1000 * ("again" in way), args.exact_teacher, undone, given
            nets, _ = train(density, ["anyflow"], max(1, args.steps // 5), *how)
            ours = ours or {"anyflow-forward": nets["anyflow-forward"]}
            for name in [name for name in nets if name not in given]:
                row = [ruler.swd(ruler.sample(nets[name], n, ruler.points // 2, 0.0)[0]) for n in NFE]
                scores.setdefault(f"{way}, stage {1 + (name == 'anyflow')}", []).append(row)
        write_json(args.out / "departures.json", scores)
    times = lambda name: np.exp(np.log(np.divide(scores[name], scores[f"ours, {name[-7:]}"])).mean(1))
    rows = {name: [*np.median(scores[name], 0), f"{times(name).min():8.2f}-{times(name).max():.2f}"]
            for name in scores}
    print(plots.table("sliced Wasserstein distance, median; times ours, mean of calls, range of seeds; again:"
                      " other random numbers", [*NFE, "  times ours"], rows, digits=4))

def choose_gamma(args):
    """Print and draw distances of AnyFlow by gamma and calls, and print what each c of `gamma_of` gives."""
    gammas, nfe = [0.0] + [2.0**-k for k in range(6, -1, -1)], NFE[1:]  # one call draws no noise
    score = lambda ruler, net, n, gamma: ruler.swd(ruler.sample(net, n, 2 * ruler.points, gamma)[0])
    scores = np.array([[[score(ruler, nets["anyflow"], n, gamma) for n in nfe] for gamma in gammas]
                       for nets, _, ruler in trained_seeds(args, ["anyflow"])])  # (seeds, gammas, NFE)
    rows = {f"gamma {gamma:.4f}": row.tolist() for gamma, row in zip(gammas, np.median(scores, 0))}
    print(plots.table("sliced Wasserstein distance, lower is better, median", nfe, rows, digits=4))
    for c in (0, 1, 2, 4, 8):
        rule = [scores[:, gammas.index(gamma_of(n, c)), i] for i, n in enumerate(nfe)]
        print(f"gamma = min(1, {c} / calls): {np.exp(np.log(rule).mean()):.4f}, geometric mean of all")
    plots.gammas(gammas, nfe, scores, args.out / "gamma.png")

def run(args):
    start, floors, seconds = time.perf_counter(), [], {}
    results = {"density": args.density, "options": vars(args) | {"out": str(args.out)}, "nfe": NFE,
               "gamma": [*map(gamma_of, NFE)], "methods": {}, "best_times": {}}
    for nets, took, ruler in trained_seeds(args, args.methods):
        samples, states = {}, {}
        for name, net in nets.items():
            scores, samples[name], states[name] = ruler.measure(name, net)
            entry = results["methods"].setdefault(name, {key: [[] for _ in NFE] for key in scores})
            for key, values in scores.items():
                for row, value in zip(entry[key], values):
                    row.append(value)
            seconds.setdefault(name, []).append(took[name])
            entry["train_seconds"] = statistics.median(seconds[name])  # of this stage alone
            if name in ("anyflow-forward", "anyflow"):
                results["best_times"].setdefault(name, []).append(ruler.best_times(net))
        learnt = lambda z, t, net=nets["teacher"]: net(z.float(), t.float()[None], t.float()[None]).double()
        floors.append((ruler.floor, ruler.floor_ode, ruler.of_ode(learnt)))
        results |= zip(("floor", "floor_ode", "floor_teacher"), map(statistics.median, zip(*floors)))
        results["claims"] = plots.decide(results)
        results["seconds"] = time.perf_counter() - start
        write_json(args.out / "results.json", results)
        plots.quality(results, args.out / "quality.png")
        if len(floors) == 1:
            (args.out / "networks").mkdir(exist_ok=True)
            for name, net in nets.items():
                if isinstance(net, nn.Module):  # an exact teacher is none
                    write(args.out / f"networks/{name}.safetensors", partial(save_file, net.state_dict()))
            plots.sample_grid(ruler.data, samples, NFE, args.out / "samples.png")
            plots.trajectories(ruler.exact, states, NFE, args.out / "trajectories.png")
            plots.jumping(states, NFE, args.out / "jumping.gif")
    print(plots.distances(results))
    plots.print_claims(results["claims"])
    print(f"figures and results.json in {args.out}; {time.perf_counter() - start:.0f} s")

def main(argv=None):
    args = parse(argv)
    work = choose_gamma if args.choose_gamma else departures if args.departures else run
    kept = "nothing is kept" if args.choose_gamma else "what the finished seeds gave is in place"
    command("toy.flow2d", lambda: (args.out.mkdir(parents=True, exist_ok=True), work(args)), kept)

if __name__ == "__main__":
    main()
