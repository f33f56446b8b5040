"""AnyFlow in two dimensions: the whole method with one small MLP, on a laptop, in two minutes.

    python -m toy.flow2d                       # checkerboard, one seed: table, claims, figures in out/flow2d
    python -m toy.flow2d --density mixture --exact-teacher
    python -m toy.flow2d --fast                # half a minute, the same ordering of methods

Trains a flow-matching teacher, distils it by consistency distillation (the baseline), by forward flow-map
training (AnyFlow stage 1) and on-policy (stage 2), and measures each at 1, 2, 4, ..., 64 network calls. Every
density here is a mixture whose velocity is known in closed form, so a path can be held against the exact ODE.
"""

import argparse
import copy
import math
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import anyflow
from full.files import write_json
from full.options import command, positive
from toy import plots

NFE = [1, 2, 4, 8, 16, 32, 64]  # network calls, each a divisor of the next: the grids are nested
METHODS = ["teacher", "consistency", "anyflow-forward", "anyflow"]


# ---- Densities with exact velocities ---------------------------------------------------------------------

class Mixture:
    """Equal-weight mixture of K components in the plane, centred, of mean variance one.

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
        # v = (E[eps | z] - z) / (1 - t), from x = (z - t eps) / (1 - t): 0/0 at t = 1, so stop just short.
        t = torch.as_tensor(t, dtype=torch.float64).clamp(1e-6, 1 - 1e-6).expand(len(z))[:, None, None]
        y = z.double()[:, None]  # (B, 1, 2) against components (K, 2)
        if self.shape == "gaussian":
            # z_t of component k is N((1 - t) c, (1 - t)^2 s^2 + t^2), jointly Gaussian with eps.
            var = ((1 - t) * self.size) ** 2 + t**2
            eps = t * (y - (1 - t) * self.centres) / var
            log_p = -(y - (1 - t) * self.centres).square() / (2 * var) - var.log() / 2
        else:
            # x uniform on [a, b] makes eps = (z - (1 - t) x) / t a standard normal truncated to [lo, hi].
            lo, hi = ((y - (1 - t) * (self.centres + side * self.size)) / t for side in (1, -1))
            eps, log_p = truncated_normal(lo, hi)
        weight = log_p.sum(-1, keepdim=True).softmax(1)  # posterior of the component, (B, K, 1)
        return (((weight * eps).sum(1) - y[:, 0]) / (1 - t[:, 0])).to(z.dtype)

    def flow(self, z, grid, substeps=2):
        """Exact ODE states at the times of a falling grid, from z: (len(grid), B, 2). RK4, float64."""
        states = [z.double()]
        for start, stop in zip(grid[:-1], grid[1:]):
            y, h = states[-1], (stop - start) / substeps
            for i in range(substeps):
                t = start + i * h
                k1 = self.velocity(y, t)
                k2 = self.velocity(y + h / 2 * k1, t + h / 2)
                k3 = self.velocity(y + h / 2 * k2, t + h / 2)
                k4 = self.velocity(y + h * k3, t + h)
                y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            states.append(y)
        return torch.stack(states)

def truncated_normal(lo, hi):
    """Mean, and log of the mass, of a standard normal on [lo, hi]; also in the tails, also if narrow."""
    flip = lo + hi > 0  # work in the left tail, where log_ndtr keeps its precision
    a, b = torch.where(flip, -hi, lo), torch.where(flip, -lo, hi)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    log_mass = log_b + torch.log(-torch.expm1(log_a - log_b))
    log_phi = lambda y: -y.square() / 2 - math.log(2 * math.pi) / 2
    mean = (log_phi(a) - log_mass).exp() - (log_phi(b) - log_mass).exp()
    return torch.where(flip, -mean, mean), log_mass

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
    """u(z, t, r) for points z (B, 2), times (B,). Two time embedders and a fixed gate, as in the DiT."""

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
    """A network in training by Adam, with warm-up and cosine decay, and its averaged weights."""

    def __init__(self, model, lr, steps, betas=(0.9, 0.999), ema=0.999):
        self.model, self.lr, self.steps, self.ema, self.updates = model, lr, steps, ema, 0
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimiser = torch.optim.Adam(model.parameters(), lr, betas, fused=True)

    def update(self, step):
        """With the gradients that are there, in the learning rate of that step."""
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

def fit(stage, model, loss_of, steps, lr):
    """Train a network by `loss_of(model, progress)`. Returns the average of its weights, and seconds."""
    learner = Learner(model, lr, steps)

    def one_step(i):
        loss = loss_of(model, i / steps)
        loss.backward()
        learner.update(i)
        return loss.item()

    seconds = repeat(stage, steps, one_step)
    return learner.average, seconds

def train(density, methods, steps, batch, exact_teacher):
    """The stages of the paper, in order. Returns {method: network} and {method: seconds of its own stage}."""
    nets, seconds = {}, {}

    def teacher_loss(model, _):
        return anyflow.flow_matching_loss(model, density.sample(batch))

    nets["teacher"], seconds["teacher"] = fit("teacher", MLP(), teacher_loss, 2 * steps, 3e-3)
    # What the students learn from. Every student starts as the teacher.
    trained = nets["teacher"]
    velocity = nets["teacher"] = density.velocity if exact_teacher else trained
    student = lambda net=trained: copy.deepcopy(net).requires_grad_(True)

    # An error at small t lands on the sample, and no later step mends it: so small t weighs more. The paper's
    # w(t) = t sqrt(1 - t) weighs it less, since it was made for the data's velocity, which is noisy there.
    def flow_map_loss(model, _=None):
        weight = lambda t: 1 / (t + 0.05)
        x = density.sample(batch)
        return anyflow.flow_map_loss(model, x, teacher=velocity, weight=weight, balance=False)

    def consistency_loss(model, progress):  # finer teacher steps as training goes on: first fast, then exact
        weight, finer = lambda t: 1 / (t + 0.05) ** 2, int(10 * 4**progress)
        return anyflow.consistency_loss(model, velocity, density.sample(batch), steps=finer, weight=weight)

    for name, loss in (("consistency", consistency_loss), ("anyflow-forward", flow_map_loss)):
        if name in methods or (name == "anyflow-forward" and "anyflow" in methods):
            nets[name], seconds[name] = fit(name, student(), loss, steps, 2e-3)
    if "anyflow" in methods:
        nets["anyflow"], seconds["anyflow"] = on_policy(student(nets["anyflow-forward"]), velocity, student(),
                                                        flow_map_loss, batch, max(1, steps // 5))
    return nets, seconds

def on_policy(student, judge, fake, flow_map_loss, batch, steps):
    """Stage 2 of a student, judged by the teacher. Returns the average of its weights, and seconds."""
    learners = {name: Learner(net, 3e-4, steps, betas=(0.0, 0.999), ema=0.99)
                for name, net in (("student", student), ("fake", fake))}

    def rollout(batch):
        grid = anyflow.time_grid(random.choice([1, 2, 4]))
        k = random.randrange(len(grid) - 1)
        x_hat = anyflow.backward_simulation(student, torch.randn(batch, 2), grid, k)
        # Beyond t = 0.85 the fake score's error outweighs what it has to say.
        of_dmd = dict(t=0.02 + 0.83 * torch.rand(batch), per_sample=False)
        return x_hat, of_dmd, lambda i: dict(repeats=4), {}

    def one_step(i):
        losses = []

        def backward(name, loss):
            loss.backward()
            losses.append(loss.item())

        # The fake score must keep up with the student: three updates, on four noises a sample, for one.
        anyflow.on_policy_step([batch], rollout, lambda _: flow_map_loss(student), judge, fake, backward,
                               lambda name: learners[name].update(i), dmd_weight=4.0, fake_steps=3)
        return sum(losses)

    seconds = repeat("anyflow", steps, one_step)
    return learners["student"].average, seconds


# ---- Measuring -------------------------------------------------------------------------------------------

class Ruler:
    """What all methods of one seed are measured with: noise, exact paths of some of it, data."""

    def __init__(self, density, points, traced=500):
        self.noise = torch.randn(points, 2)
        self.exact = density.flow(self.noise[:traced], anyflow.time_grid(NFE[-1])).float()  # (65, traced, 2)
        self.data = density.sample(points)
        angles = (torch.arange(64) + 0.5) / 64 * math.pi
        self.directions = torch.stack([angles.cos(), angles.sin()])
        # The density's quantiles in each direction, from 8 times as many points as there are samples.
        self.quantiles = (density.sample(8 * points) @ self.directions).sort(0).values[4::8]
        self.floor = self.swd(self.data)  # what as many points of the density itself score

    def swd(self, x):
        """Sliced 2-Wasserstein distance of points (n, 2) to the density, mean of 64 directions."""
        return ((x @ self.directions).sort(0).values - self.quantiles).square().mean(0).sqrt().mean().item()

    def measure(self, method, net):
        """Per NFE: {"swd", "path_error", "budget_drift"}, the samples, and the traced points' states."""
        options = {"teacher": dict(average=False), "consistency": dict(gamma=1.0)}.get(method, {})
        scores, states, samples = {"swd": [], "path_error": [], "budget_drift": []}, [], []
        for n in NFE:
            parts = [anyflow.sample(net, z, n, path=True, **options) for z in self.noise.split(2500)]
            visited = torch.cat(parts, dim=1)
            samples.append(visited[-1])
            states.append(visited[:, : self.exact.shape[1]])
            scores["swd"].append(self.swd(samples[-1]))
            # RMS distance of the states visited after the noise to the exact ODE states at the same times
            error = states[-1][1:] - self.exact[:: NFE[-1] // n][1:]
            scores["path_error"].append(error.square().sum(-1).mean().sqrt().item())
        for x in samples:  # mean distance to the method's own 64-call sample from the same noise
            scores["budget_drift"].append((x - samples[-1]).norm(dim=-1).mean().item())
        return scores, samples, states

def medians(results):
    """{method: {measure: [median over seeds, per NFE]}}"""
    of_nfe = lambda rows: [statistics.median(row) for row in rows]
    return {name: {key: of_nfe(rows) for key, rows in scores.items() if key != "train_seconds"}
            for name, scores in results["methods"].items()}

def table(results):
    """Sliced Wasserstein distance by method and NFE, median over seeds, as text."""
    rows = {name: [*scores["swd"], f"{results['methods'][name]['train_seconds']:.0f} s"]
            for name, scores in medians(results).items()}
    title = f"sliced Wasserstein distance, lower is better, sampling floor {results['floor']:.4f}"
    return plots.table(title, [*NFE, "train"], rows, digits=4)

def judge(results):
    """The paper's claims, each decided by the medians over seeds: [{"claim", "holds", "figures"}]."""
    scores = medians(results)
    at = {n: i for i, n in enumerate(NFE)}
    claims = plots.Claims(NFE, digits=4)
    teacher, consistency, forward, student = (scores.get(name, {}).get("swd") for name in METHODS)
    if teacher:
        claims.add("the Euler teacher needs many calls: 4 calls are at least 3 times worse than 64",
                   teacher[at[4]] >= 3 * teacher[-1], teacher)
    if consistency:
        claims.add("consistency gets worse with more calls: 64 calls are worse than 1.5 times its best",
                   consistency[-1] > 1.5 * min(consistency), consistency)
    if student:
        claims.add("AnyFlow is any-step: no budget is worse than 1.1 times the best of the smaller ones",
                   all(student[i] <= 1.1 * min(student[:i]) for i in range(1, len(NFE))), student)
    for name, other in (("its teacher", teacher), ("consistency", consistency)):
        if student and other:
            claims.add(f"AnyFlow is better than {name} at every number of calls",
                       all(a < b for a, b in zip(student, other)), student, other)
    if student and forward:
        claims.add("on-policy training improves 1 and 2 calls by 15 % and costs no other more than 10 %",
                   all(a <= (0.85 if n <= 2 else 1.1) * b for n, a, b in zip(NFE, student, forward)),
                   student, forward)
    if student and consistency:
        ours, theirs = scores["anyflow"], scores["consistency"]
        a, b = (of["path_error"][at[8]] for of in (ours, theirs))
        claims.add("AnyFlow follows the ODE path at 8 calls: a tenth of consistency's distance to it",
                   a <= b / 10, f"{a:.4f} / {b:.4f}")
        a, b = (of["budget_drift"][at[4]] for of in (ours, theirs))
        claims.add("AnyFlow shows at 4 calls what 64 will give: a fifth of consistency's drift", a <= b / 5,
                   f"{a:.4f} / {b:.4f}")
    return claims.rows


# ---- Command line ----------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m toy.flow2d", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--density", choices=DENSITIES, default="checkerboard")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="teacher is always one")
    add("--exact-teacher", action="store_true", help="distil the closed-form velocity, not the trained one")
    add("--seeds", type=positive, default=1, help="how many; results are medians over them (default 1)")
    add("--seed", type=int, default=0, help="the first (default 0)")
    add("--steps", type=positive, help="of a student (default 5000, --fast 1000); the teacher has twice")
    add("--batch", type=positive, default=512, help="(default 512)")
    add("--out", type=Path, default=Path("out/flow2d"))
    add("--fast", action="store_true", help="half a minute: fewer steps and samples")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as error:
        parser.error(f"cannot write to --out {args.out}: {error.strerror}")
    return args

def run(args):
    start = time.perf_counter()
    density = DENSITIES[args.density]()
    steps, points = (args.steps or 1000, 10000) if args.fast else (args.steps or 5000, 50000)
    options = {"steps": steps, "batch": args.batch, "seed": args.seed, "exact_teacher": args.exact_teacher}
    results = {"density": args.density, "options": options, "nfe": NFE, "floor": 0.0, "methods": {}}
    floors, seconds = [], {}
    for seed in range(args.seed, args.seed + args.seeds):
        torch.manual_seed(seed)
        random.seed(seed)
        nets, took = train(density, args.methods, steps, args.batch, args.exact_teacher)
        ruler, samples, states = Ruler(density, points), {}, {}
        for name, net in nets.items():
            scores, samples[name], states[name] = ruler.measure(name, net)
            entry = results["methods"].setdefault(name, {key: [[] for _ in NFE] for key in scores})
            for key, values in scores.items():
                for row, value in zip(entry[key], values):
                    row.append(value)
            seconds.setdefault(name, []).append(took[name])
            entry["train_seconds"] = statistics.median(seconds[name])  # of this stage alone
        floors.append(ruler.floor)
        results["floor"] = statistics.median(floors)
        results["claims"] = judge(results)
        results["seconds"] = time.perf_counter() - start
        write_json(args.out / "results.json", results)
        plots.quality(results, args.out / "quality.png")
        if seed == args.seed:
            plots.sample_grid(ruler.data, samples, NFE, args.out / "samples.png")
            plots.trajectories(ruler.exact, states, NFE, args.out / "trajectories.png")
            plots.jumping(states, NFE, args.out / "jumping.gif")
    print(table(results))
    plots.print_claims(results["claims"])
    print(f"figures and results.json in {args.out}; {time.perf_counter() - start:.0f} s")

def main(argv=None):
    args = parse(argv)
    command("toy.flow2d", lambda: run(args), "what the finished seeds gave is in place")

if __name__ == "__main__":
    main()
