"""AnyFlow in two dimensions: the whole method of `anyflow.py` with one small MLP, on a laptop, in two minutes.

    python -m toy.flow2d                       # checkerboard, one seed: table, claims, figures in out/flow2d
    python -m toy.flow2d --density mixture --exact-teacher
    python -m toy.flow2d --fast                # half a minute, the same ordering of methods

Trains a flow-matching teacher, distils it by consistency distillation (the baseline), by forward flow-map
training (AnyFlow stage 1) and on-policy (stage 2), and measures each at 1, 2, 4, ..., 64 network calls. Every
density here is a mixture whose velocity is known in closed form, so a path can be held against the exact ODE.
"""

import argparse
import copy
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import anyflow
from toy import plots

NFE = [1, 2, 4, 8, 16, 32, 64]  # network calls, each a divisor of the next: the grids are nested
METHODS = ["teacher", "consistency", "anyflow-forward", "anyflow"]


# ------------------------------------------------------------------------------------------------------------
# Densities with exact velocities
# ------------------------------------------------------------------------------------------------------------


class Mixture:
    """Equal-weight mixture of K components in the plane, centred, with a variance of one in the mean of both axes.

    shape="gaussian": N(centre, size^2). shape="box": uniform on the square centre +- size.
    Given z_t, the noise of component k has a known posterior; v(z, t) = E[eps - x | z_t = z] follows from its mean.
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
        """v(z, t) (B, 2), in the precision of z. It ignores r: it stands wherever a teacher is asked at (t, t)."""
        # v = (E[eps | z] - z) / (1 - t), from x = (z - t eps) / (1 - t): 0/0 at t = 1, so stop just short of 1.
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
        """Exact ODE states at the times of a falling grid, from z at grid[0]: (len(grid), B, 2). RK4, float64."""
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
    """Mean, and log of the mass, of a standard normal on [lo, hi]; also far out in the tails, also if narrow."""
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


# ------------------------------------------------------------------------------------------------------------
# The network, and the loop that trains it
# ------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """u(z, t, r) for points z (B, 2), times (B,). Two time embedders and a fixed gate, as in the DiT."""

    def __init__(self, width=64, depth=4, gate=0.25):
        super().__init__()
        self.gate = gate
        # Sharp edges need high frequencies in z.
        self.register_buffer("space", torch.tensor([1.0, 2.0, 4.0]) * 0.9)
        self.register_buffer("time", torch.tensor([0.5, 1.0, 2.0, 4.0]) * math.pi)
        self.embed_t, self.embed_r = (
            nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, width)) for _ in range(2)
        )
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


def fit(stage, model, loss_of, steps, lr, betas=(0.9, 0.999), ema=0.999):
    """Adam with cosine decay on `loss_of(model, progress)`. Returns the average of the weights, and seconds."""
    start = time.perf_counter()
    average = copy.deepcopy(model).requires_grad_(False)
    params = list(model.parameters())
    optimiser = torch.optim.Adam(params, lr, betas, fused=True)
    bar = tqdm(range(steps), desc=f"{stage:>15}", leave=False, disable=None, mininterval=0.5)
    for i in bar:
        optimiser.param_groups[0]["lr"] = lr * min(1, (i + 1) / 50) * (1 + math.cos(math.pi * i / steps)) / 2
        loss = loss_of(model, i / steps)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss of stage {stage} is {loss.item()} at step {i}")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        with torch.no_grad():  # the average forgets faster while it is young
            torch._foreach_lerp_(list(average.parameters()), params, 1 - min(ema, (i + 1) / (i + 10)))
        if i % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    return average, time.perf_counter() - start


def train(density, methods, steps, batch, exact_teacher):
    """The stages of the paper, in order. Returns {method: network} and {method: seconds of its own stage}."""
    nets, seconds = {}, {}

    def teacher_loss(model, _):
        return anyflow.flow_matching_loss(model, density.sample(batch))

    nets["teacher"], seconds["teacher"] = fit("teacher", MLP(), teacher_loss, 2 * steps, 3e-3)
    # What the students learn from. Every student starts from the teacher's weights: at r = t it is the teacher.
    trained = nets["teacher"]
    velocity = nets["teacher"] = density.velocity if exact_teacher else trained
    student = lambda net=trained: copy.deepcopy(net).requires_grad_(True)

    # An error at small t lands on the sample, with no later step to mend it: the losses must not look past it.
    # The paper's w(t), made for the data's velocity with its variance, does.
    def flow_map_loss(model, _=None):
        weight = lambda t: 1 / (t + 0.05)
        return anyflow.flow_map_loss(model, density.sample(batch), teacher=velocity, weight=weight, balance=False)

    def consistency_loss(model, progress):  # finer teacher steps as training goes on: first fast, then exact
        weight = lambda t: 1 / (t + 0.05) ** 2
        return anyflow.consistency_loss(
            model, velocity, density.sample(batch), steps=int(10 * 4**progress), weight=weight
        )

    if "consistency" in methods:
        nets["consistency"], seconds["consistency"] = fit("consistency", student(), consistency_loss, steps, 2e-3)
    if "anyflow-forward" in methods or "anyflow" in methods:
        nets["anyflow-forward"], seconds["anyflow-forward"] = fit(
            "anyflow-forward", student(), flow_map_loss, steps, 2e-3
        )
    if "anyflow" in methods:
        fake = student()
        fake_optimiser = torch.optim.Adam(fake.parameters(), 3e-4, (0.0, 0.999), fused=True)

        def on_policy_loss(model, progress):
            grid = anyflow.time_grid(random.choice([1, 2, 4]))
            k = random.randrange(len(grid) - 1)
            x_hat = anyflow.backward_simulation(model, torch.randn(batch, 2), grid, k)
            # The fake score must keep up with the student, or its error becomes the student's drift: three steps
            # to one, on four noises a sample, with the student's decay of the learning rate.
            fake_optimiser.param_groups[0]["lr"] = 3e-4 * (1 + math.cos(math.pi * progress)) / 2
            for _ in range(3):
                fake_optimiser.zero_grad()
                anyflow.fake_score_loss(fake, x_hat.repeat(4, 1)).backward()
                fake_optimiser.step()
            t = 0.02 + 0.83 * torch.rand(batch)  # beyond, that error outweighs what the fake score has to say
            dmd = anyflow.dmd_loss(x_hat, velocity, fake, t=t, per_sample=False)
            return 4 * dmd + flow_map_loss(model)

        forward, few = student(nets["anyflow-forward"]), max(1, steps // 5)
        nets["anyflow"], seconds["anyflow"] = fit("anyflow", forward, on_policy_loss, few, 3e-4, (0.0, 0.999), 0.99)
    return nets, seconds


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


class Ruler:
    """What all methods of one seed are measured with: noise to start from, exact paths of some of it, data."""

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
        """Sliced 2-Wasserstein distance of points (n, 2) to the density, mean of 64 directions, in data units."""
        return ((x @ self.directions).sort(0).values - self.quantiles).square().mean(0).sqrt().mean().item()

    def measure(self, method, net):
        """Per NFE: {"swd", "path_error", "budget_drift"}, the samples, and the states of the traced points."""
        run = anyflow.consistency_sample if method == "consistency" else anyflow.sample
        options = {"average": False} if method == "teacher" else {}
        scores, states, samples = {"swd": [], "path_error": [], "budget_drift": []}, [], []
        for n in NFE:
            visited = torch.cat([run(net, z, n, path=True, **options) for z in self.noise.split(2500)], dim=1)
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
    return {
        name: {
            key: [statistics.median(row) for row in values]
            for key, values in scores.items()
            if key != "train_seconds"
        }
        for name, scores in results["methods"].items()
    }


def table(results):
    """Sliced Wasserstein distance by method and NFE, median over seeds, as text."""
    lines = [
        f"sliced Wasserstein distance, lower is better, sampling floor {results['floor']:.4f}",
        f"{'network calls':16}" + "".join(f"{n:8}" for n in NFE) + "   train",
    ]
    for name, scores in medians(results).items():
        seconds = results["methods"][name]["train_seconds"]
        lines.append(f"{name:16}" + "".join(f"{value:8.4f}" for value in scores["swd"]) + f"{seconds:6.0f} s")
    return "\n".join(lines)


def judge(results):
    """The paper's claims, each decided by the medians over seeds: [{"claim", "holds", "figures"}]."""
    claims, scores = [], medians(results)
    at = {n: i for i, n in enumerate(NFE)}

    def claim(text, needs, holds, figures):
        if all(name in scores for name in needs):
            claims.append({"claim": text, "holds": bool(holds()), "figures": figures()})

    def swd(name, n):
        return scores[name]["swd"][at[n]]

    def pairs(a, b):
        return ", ".join(f"{n}: {swd(a, n):.4f} / {swd(b, n):.4f}" for n in NFE)

    claim(
        "the Euler teacher needs many calls: 4 calls are at least 3 times worse than 64",
        ["teacher"],
        lambda: swd("teacher", 4) >= 3 * swd("teacher", 64),
        lambda: f"4: {swd('teacher', 4):.4f}, 64: {swd('teacher', 64):.4f}",
    )
    claim(
        "consistency gets worse with more calls: 64 calls are worse than 1.5 times its best",
        ["consistency"],
        lambda: swd("consistency", 64) > 1.5 * min(scores["consistency"]["swd"]),
        lambda: ", ".join(f"{n}: {swd('consistency', n):.4f}" for n in NFE),
    )
    claim(
        "AnyFlow is any-step: no budget is worse than 1.1 times the best of the smaller ones",
        ["anyflow"],
        lambda: all(swd("anyflow", n) <= 1.1 * min(scores["anyflow"]["swd"][: at[n]]) for n in NFE[1:]),
        lambda: ", ".join(f"{n}: {swd('anyflow', n):.4f}" for n in NFE),
    )
    for other in ("teacher", "consistency"):
        claim(
            f"AnyFlow is better than {'its ' * (other == 'teacher')}{other} at every number of calls",
            ["anyflow", other],
            lambda other=other: all(swd("anyflow", n) < swd(other, n) for n in NFE),
            lambda other=other: pairs("anyflow", other),
        )
    claim(
        "on-policy training improves 1 and 2 calls by 15 % or more and costs no other budget more than 10 %",
        ["anyflow", "anyflow-forward"],
        lambda: all(swd("anyflow", n) <= (0.85 if n <= 2 else 1.1) * swd("anyflow-forward", n) for n in NFE),
        lambda: pairs("anyflow", "anyflow-forward"),
    )
    for key, n, share, text in (
        ("path_error", 8, 10, "follows the ODE path at 8 calls: a tenth of consistency's distance to it"),
        ("budget_drift", 4, 5, "shows at 4 calls what 64 will give: a fifth of consistency's drift"),
    ):
        a, b = (scores.get(name, {}).get(key, [0] * len(NFE))[at[n]] for name in ("anyflow", "consistency"))
        claim(
            f"AnyFlow {text}",
            ["anyflow", "consistency"],
            lambda a=a, b=b, share=share: a <= b / share,
            lambda a=a, b=b: f"{a:.4f} / {b:.4f}",
        )
    return claims


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return int(text)


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m toy.flow2d", description=__doc__.split("\n\n")[0])
    parser.add_argument("--density", choices=DENSITIES, default="checkerboard")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="teacher is always one")
    parser.add_argument(
        "--exact-teacher", action="store_true", help="distil the closed-form velocity, not the trained one"
    )
    parser.add_argument("--seeds", type=positive, default=1, help="how many seeds; results are medians over them")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--steps",
        type=positive,
        help="steps of a student (default 5000; --fast 1000); the teacher has twice, on-policy a fifth",
    )
    parser.add_argument("--batch", type=positive, default=512)
    parser.add_argument("--out", type=Path, default=Path("out/flow2d"))
    parser.add_argument("--fast", action="store_true", help="half a minute: fewer steps and samples")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as error:
        parser.error(f"cannot write to --out {args.out}: {error.strerror}")
    return args


def main(argv=None):
    args = parse(argv)
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
        plots.write(args.out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
        plots.quality(results, args.out / "quality.png")
        if seed == args.seed:
            plots.sample_grid(ruler.data, samples, NFE, args.out / "samples.png")
            plots.trajectories(ruler.exact, states, NFE, args.out / "trajectories.png")
            plots.jumping(states, NFE, args.out / "jumping.gif")
    print(table(results))
    for claim in results["claims"]:
        print(f"[{'holds' if claim['holds'] else 'DOES NOT HOLD'}] {claim['claim']}\n    {claim['figures']}")
    print(f"figures and results.json in {args.out}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; figures and results of the seeds that had finished are in place")
    except FloatingPointError as error:
        sys.exit(f"stopped: {error}")
