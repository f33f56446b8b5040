"""The toy: exact velocities, honest claims, reproducible runs, and what bad input gets."""

import json
import math
from functools import partial
from types import SimpleNamespace

import mpmath
import pytest
import torch
from safetensors.torch import load_file

import anyflow
from toy import flow2d, plots

torch.set_num_threads(1)


@pytest.mark.parametrize("name", flow2d.DENSITIES)
def test_exact_velocity_is_the_conditional_mean(name):
    """E[(eps - x) g(z)] = E[v(z) g(z)] for any g: by samples, at several times."""
    density, n = flow2d.DENSITIES[name](), 30000
    for t in (0.05, 0.3, 0.7, 0.99):
        x, noise = density.sample(n), torch.randn(n, 2)
        z = anyflow.interpolate(x, noise, t)
        residual = noise - x - density.velocity(z, t)
        for g in (torch.ones_like(z), z, (3 * z).sin(), z.flip(1).cos()):
            error = (residual * g).mean(0).abs() / (residual * g).std(0) * math.sqrt(n)
            assert (error < 5).all(), "more than five standard errors"


def exact(density, z, t):
    """Mixture.velocity of one point, by its definition, in 60 digits."""
    with mpmath.workdps(60):
        t = min(max(mpmath.mpf(t), mpmath.mpf(1e-6)), 1 - mpmath.mpf(1e-6))
        parts, size = [], mpmath.mpf(density.size)
        for centre in density.centres.tolist():
            weight, means = mpmath.mpf(1), []
            for y, c in zip(z, centre):
                if density.shape == "gaussian":
                    var = ((1 - t) * size) ** 2 + t**2
                    weight *= mpmath.exp(-((y - (1 - t) * c) ** 2) / (2 * var))
                    means.append(t * (y - (1 - t) * c) / var)
                    continue
                lo, hi = ((y - (1 - t) * (c + side * size)) / t for side in (1, -1))
                sign = -1 if lo + hi > 0 else 1  # the left tail, where masses keep their digits
                a, b = (-hi, -lo) if sign < 0 else (lo, hi)
                mass = mpmath.ncdf(b) - mpmath.ncdf(a)
                weight *= mass
                means.append(sign * (mpmath.npdf(a) - mpmath.npdf(b)) / mass)
            parts.append((weight, means))
        total = sum(weight for weight, _ in parts)
        return [float((sum(w * m[i] for w, m in parts) / total - z[i]) / (1 - t)) for i in (0, 1)]


@pytest.mark.parametrize("t", [0.0, 1e-6, 1e-3, 0.03, 0.3, 0.6, 0.75, 0.97, 0.999, 1 - 1e-5, 1.0])
@pytest.mark.parametrize("name", flow2d.DENSITIES)
def test_velocity_is_exact_in_the_tails_and_at_both_ends(name, t):
    """0.6 and 0.75: either side of where a truncated normal is nearly flat, and summed in another way."""
    density, z = flow2d.DENSITIES[name](), torch.cat([k * torch.randn(2, 2) for k in (0.7, 1.5, 6)]).double()
    wanted = torch.tensor([exact(density, point, t) for point in z.tolist()], dtype=torch.float64)
    assert ((density.velocity(z, t) - wanted).abs() / wanted.abs().clamp(min=1)).max() < 1e-7


@pytest.mark.parametrize("name", flow2d.DENSITIES)
def test_exact_ode_carries_noise_to_the_density(name):
    density = flow2d.DENSITIES[name]()
    ruler = flow2d.Ruler(density, 1024, fresh=1, traced=64)
    x = density.flow(ruler.noise[:64], anyflow.time_grid(16) ** 2, substeps=1)[-1]
    assert (x - ruler.exact[-1]).abs().mean() < 1e-4, "coarse or fine, the ODE ends at the same points"
    x = density.flow(ruler.noise, anyflow.time_grid(16) ** 2, substeps=1)[-1].float()
    assert ruler.swd(x) < 0.02 and ruler.swd(ruler.noise) > 0.08
    assert x.mean(0).abs().max() < 0.01 and x.square().mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", flow2d.DENSITIES)
def test_closed_form_cdf_is_that_of_the_samples(name):
    """Kolmogorov-Smirnov, in eight directions: 2 / sqrt(n) is passed by one in 1500 by chance."""
    density, n, angles = flow2d.DENSITIES[name](), 20000, (torch.arange(8) + 0.5) / 8 * math.pi
    directions, line = torch.stack([angles.cos(), angles.sin()]), torch.linspace(-6, 6, 2001).double()
    x = (density.sample(n) @ directions).T.contiguous().sort().values.double()
    below = torch.searchsorted(x, line.expand(8, -1).contiguous()) / n
    cdf = density.cdf(line, directions)
    assert (cdf - below).abs().max() < 2 / math.sqrt(n)
    assert cdf[:, 0].abs().max() < 1e-12 and (cdf[:, -1] - 1).abs().max() < 1e-12
    assert (cdf.diff() >= -1e-12).all()


def test_ruler_measures_a_shift_and_its_floors_fall():
    """Moved by d, every direction's quantiles move by d . direction: mean |d| 2 / pi over all directions."""
    density = flow2d.checkerboard()
    small, large = (flow2d.Ruler(density, n, traced=1) for n in (256, 2048))
    assert large.floor < small.floor and large.floor_ode < small.floor_ode / 3
    assert large.floor_ode < large.floor, "Sobol noise fills the plane more evenly than random points"
    moved = large.swd(density.sample(2**16) + torch.tensor([0.3, 0.4]))
    assert moved == pytest.approx(0.5 * 2 / math.pi, rel=0.05)


def test_a_network_asked_at_one_time_answers_as_at_many():
    net, z = flow2d.MLP(), torch.randn(5, 2)
    t, r = torch.tensor(0.7), torch.tensor(0.2)
    one, many = net(z, t.expand(5), r.expand(5)), net(z, t.repeat(5), r.repeat(5))
    torch.testing.assert_close(one, many)


def test_velocity_is_finite_far_out_and_at_both_ends():
    z = torch.tensor([[0.0, 0.0], [30.0, -30.0], [0.1, 8.0]])
    for make in flow2d.DENSITIES.values():
        for t in (0.0, 1e-6, 0.5, 1.0):
            assert torch.isfinite(make().velocity(z, t)).all()


def results(**changes):
    """Made-up medians under which every claim holds, but for the changes."""
    one = [1.0] * 7
    rows = {
        "teacher": dict(swd=[0.9, 0.4, 0.2, 0.1, 0.05, 0.03, 0.02], path_error=one, budget_drift=one),
        "teacher-heun": dict(swd=[0.9, 0.3, 0.1, 0.05, 0.02, 0.02, 0.02], path_error=one, budget_drift=one),
        "consistency": dict(swd=[0.02, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07], path_error=one, budget_drift=one),
        "anyflow-forward": dict(swd=[0.016] * 7, path_error=[0.1] * 7, budget_drift=[0.1] * 7),
        "anyflow-control": dict(swd=[0.016] * 7, path_error=[0.1] * 7, budget_drift=[0.1] * 7),
        "anyflow": dict(swd=[0.013] * 7, path_error=[0.1] * 7, budget_drift=[0.1] * 7),
        "anyflow-gamma": dict(swd=[0.013] * 7, path_error=one, budget_drift=one),
    }
    for name, change in changes.items():
        rows[name.replace("_", "-")].update(change)
    methods = {name: {key: [[v] for v in row] for key, row in keys.items()} | {"train_seconds": 1.0}
               for name, keys in rows.items()}
    return {"methods": methods, "nfe": flow2d.NFE}


def held(**changes):
    return [claim["holds"] for claim in plots.decide(results(**changes))]


def test_claims_are_judged_from_the_numbers():
    assert held() == [True] * 12
    assert held(teacher=dict(swd=[0.02] * 7))[0] is False
    assert held(consistency=dict(swd=[0.02] * 7))[1] is False
    assert held(anyflow=dict(swd=[0.01] * 6 + [0.012]))[2] is False
    assert held(teacher=dict(swd=[0.9] * 6 + [0.012]))[3] is False
    assert held(consistency=dict(swd=[0.012] + [0.07] * 6))[4] is False
    assert held(teacher_heun=dict(swd=[0.9] * 6 + [0.012]))[5] is False
    assert held(anyflow_forward=dict(swd=[0.015] * 7))[6] is False
    assert held(anyflow_control=dict(swd=[0.015] * 7))[7] is False
    assert held(anyflow=dict(path_error=[0.11] * 7))[8] is False
    assert held(anyflow=dict(budget_drift=[0.21] * 7))[9] is False
    assert held(anyflow_gamma=dict(swd=[0.022] + [0.013] * 6))[10] is False
    assert held(anyflow_gamma=dict(swd=[0.015, 0.015] + [0.013] * 5)) == [True] * 12
    assert held(anyflow_gamma=dict(swd=[0.013] * 6 + [0.014]))[11] is False


def run(folder, *more):
    flow2d.main(["--fast", "--steps", "3", "--methods", "anyflow-forward", "--out", str(folder), *more])
    return json.loads((folder / "results.json").read_text())


COARSE = lambda density, _, seed, full=flow2d.Ruler: full(density, 512, seed, fresh=2, traced=20)


@pytest.fixture
def brief(monkeypatch):
    """Commands that measure little and draw nothing."""
    monkeypatch.setattr(flow2d, "NFE", [1, 2, 4])
    monkeypatch.setattr(flow2d, "Ruler", COARSE)
    for figure in ("quality", "sample_grid", "trajectories", "jumping"):
        monkeypatch.setattr(plots, figure, lambda *given: None)


def test_the_same_seed_gives_the_same_results(tmp_path, brief):
    one, two, other = run(tmp_path / "1"), run(tmp_path / "2"), run(tmp_path / "3", "--seed", "1")
    swd = lambda answer: answer["methods"]["anyflow-forward"]["swd"]
    assert swd(one) == swd(two) != swd(other)


def test_the_teachers_own_ode_is_followed_exactly(tmp_path, brief):
    """That of the exact teacher ends in the density, that of one of six steps hardly leaves the noise."""
    exact, young = run(tmp_path / "1", "--exact-teacher"), run(tmp_path / "2")
    assert exact["floor_teacher"] == pytest.approx(exact["floor_ode"], rel=1e-3)
    assert young["floor_teacher"] > 5 * young["floor_ode"]


def test_heun_is_of_second_order_and_takes_two_calls_a_step():
    """The end of the exact ODE, in double precision: twice the calls, a quarter of the error."""
    density, noise, calls = flow2d.mixture(), torch.randn(64, 2, dtype=torch.float64), []
    exact = density.flow(noise, anyflow.time_grid(256))[-1]

    def model(z, t, r):
        assert torch.equal(t, r)
        calls.append(len(z))
        return density.velocity(z, t[0])

    error = [(flow2d.heun(model, noise, n)[-1] - exact).norm() for n in (1, 128, 256)]
    assert calls == 385 * [64] and error[1] / error[2] == pytest.approx(4, rel=0.1)
    euler = anyflow.sample(model, noise, 1, average=False, path=True)
    assert torch.equal(flow2d.heun(model, noise, 1), euler)


def test_a_learner_warms_up_and_falls_as_a_cosine_and_keeps_an_average():
    """To zero; the average is young first: by (n + 1) / (n + 10) of itself, then by its own decay."""
    start = torch.nn.Linear(2, 1)
    learner, wanted = flow2d.Learner(start, 0.1, 80, ema=0.9), start.weight.detach().clone()
    for step in range(80):
        learner.model(torch.randn(8, 2)).square().mean().backward()
        learner.update(step)
        decay = min(0.9, (step + 1) / (step + 10))
        wanted = decay * wanted + (1 - decay) * learner.model.weight.detach()
        rate = 0.1 * min(1, (step + 1) / 50) * math.cos(math.pi / 2 * step / 80) ** 2
        assert learner.optimiser.param_groups[0]["lr"] == pytest.approx(rate)
    assert torch.allclose(learner.average.weight, wanted, atol=1e-6) and rate < 1e-4


def trained(monkeypatch, methods, undone=(), seed=3, batch=16, **options):
    """`train` with the first and the last step of each stage: what it gives, and what it asks for."""
    asked = {"steps": {}, "flow_map": [], "consistency": []}

    def repeat(stage, steps, one_step):
        asked["steps"][stage] = steps
        one_step(0), one_step(steps - 1)
        return 1.0

    def recorded(name, loss):
        return lambda model, *given, **options: (
            asked[name].append((given, options)), loss(model, given[-1]))[1]

    def on_policy(learners, judge, flow_map_loss, batch, recipe):
        asked["on_policy"] = learners, judge, batch, flow2d.random.random()
        return repeat("anyflow", learners["student"].steps, lambda i: learners["student"].update(i))

    monkeypatch.setattr(flow2d, "repeat", repeat)
    monkeypatch.setattr(flow2d, "on_policy", on_policy)
    monkeypatch.setattr(anyflow, "flow_map_loss", recorded("flow_map", anyflow.flow_matching_loss))
    monkeypatch.setattr(anyflow, "consistency_loss", recorded("consistency", anyflow.flow_matching_loss))
    nets, _ = flow2d.train(flow2d.checkerboard(), methods, 10, batch, seed, undone=undone, **options)
    return nets, asked


def same(a, b):
    return all(map(torch.equal, a.parameters(), b.parameters()))


def test_stages_follow_each_other_with_their_steps_and_starts(monkeypatch):
    """The teacher has twice a student's, stage 2 and its control a fifth; nobody trains what is not asked."""
    nets, asked = trained(monkeypatch, flow2d.METHODS)
    assert asked["steps"] == {"teacher": 20, "consistency": 10, "anyflow-forward": 10, "anyflow-control": 2,
                              "anyflow": 2}
    learners, judge, batch, _ = asked["on_policy"]
    assert judge is nets["teacher"] and batch == 16
    assert same(learners["fake"].average, nets["teacher"])
    assert nets["anyflow"] is learners["student"].average and nets["anyflow-gamma"] is nets["anyflow"]
    assert same(learners["student"].average, nets["anyflow-forward"])
    assert not same(nets["anyflow-forward"], nets["teacher"])
    assert trained(monkeypatch, ["anyflow-forward"])[1]["steps"].keys() == {"teacher", "anyflow-forward"}


def test_stage_two_repeats_by_its_seed(monkeypatch):
    drawn = [trained(monkeypatch, ["anyflow"], seed=seed)[1]["on_policy"][-1] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("exact", [False, True])
def test_losses_have_our_choices_or_the_papers(monkeypatch, exact):
    """v of the teacher, more weight at small t, half a batch of the baseline's loss, ever finer steps; or v
    of the data, without these."""
    nets, asked = trained(monkeypatch, ["consistency", "anyflow-forward"], exact_teacher=exact)
    for (x,), options in asked["flow_map"]:
        assert len(x) == 16 and options["teacher"] == nets["teacher"] and options["balance"] is False
        assert options["weight"](0.05) == pytest.approx(10)
    assert len(asked["flow_map"]) == 2
    for ((velocity, x), options), (size, steps) in zip(
            asked["consistency"], [(16, 10), (16, int(10 * 4**0.9)), (8, 10), (8, int(10 * 4**0.9))]):
        assert velocity == nets["teacher"] and (len(x), options["steps"]) == (size, steps)
        assert options["weight"](0.05) == pytest.approx(100)
    _, asked = trained(monkeypatch, ["anyflow-forward"], flow2d.RECIPE, exact_teacher=exact)
    (_, options), _ = asked["flow_map"]
    assert not asked["consistency"] and options == dict(teacher=None, weight=None, balance=True)


@pytest.mark.parametrize("undone, mean, noises, weight, updates, last, calls", [
    ((), "batch", 4, 4.0, 3, 0.85, {1, 2, 4}), (flow2d.RECIPE, "sample", 1, 1.0, 1, 1.0, {2, 4, 8, 16, 50})])
def test_stage_two_has_the_choices_of_its_recipe(
        undone, mean, noises, weight, updates, last, calls, monkeypatch):
    """The number of calls, which of them, the times of DMD, its mean, and the updates of the fake score."""
    recipe = {name: pair[name in undone] for name, pair in flow2d.RECIPE.items()}
    learners = {name: flow2d.Learner(torch.nn.Linear(2, 2), 0.1, 150) for name in ("student", "fake")}
    drawn, times, losses = [], [], []
    monkeypatch.setattr(anyflow, "backward_simulation", lambda student, noise, grid, k: (
        drawn.append((len(grid) - 1, k)), noise)[1])

    def step(batches, rollout, stage_1, judge, fake, backward, update, **options):
        assert batches == [1000] and judge == "judge" and fake is learners["fake"].model
        assert options == dict(dmd_weight=weight, fake_steps=updates)
        x_hat, dmd, fake_options, cond = rollout(1000)
        times.append(dmd["t"])
        assert x_hat.shape == (1000, 2) and dmd["per_sample"] == (mean == "sample") and cond == {}
        assert fake_options(0) == dict(repeats=noises)
        for name in ("student", "fake", "fake"):
            backward(name, stage_1(1000)), update(name)

    monkeypatch.setattr(anyflow, "on_policy_step", step)
    monkeypatch.setattr(flow2d, "repeat", lambda stage, steps, one: losses.extend(map(one, range(steps))))
    loss = lambda student: student.weight.sum() * 0 + 2
    flow2d.on_policy(learners, "judge", loss, 1000, recipe)
    assert {n for n, _ in drawn} == calls and {k for n, k in drawn if n == 4} == {0, 1, 2, 3}
    assert losses == 150 * [6.0] and [learners[name].updates for name in learners] == [150, 300]
    t = torch.cat(times)
    assert t.min() == pytest.approx(0.02, abs=1e-3) and t.max() == pytest.approx(last, abs=1e-3)
    assert t.mean() == pytest.approx((0.02 + last) / 2, abs=0.01)


def test_methods_are_sampled_each_in_its_way_and_scored_alike(monkeypatch):
    """Who draws fresh noise gets more points. States off by (3, 4) n / 64 after the noise are 5 n / 64 off
    the path, and 5 - 5 n / 64 off those of 64 calls."""
    ruler, asked = flow2d.Ruler(flow2d.mixture(), 64, fresh=2, traced=8), []

    def sampler(net, z, n, **options):
        asked.append((net, n, len(z), options))
        states = torch.zeros(n + 1, len(z), 2)
        states[:, :8] = ruler.exact[:: 64 // n]
        states[1:] += torch.tensor([3.0, 4.0]) * n / 64
        return states

    monkeypatch.setattr(anyflow, "sample", lambda _, *given, **more: sampler("sample", *given, **more))
    monkeypatch.setattr(flow2d, "heun", lambda _, *given, **more: sampler("heun", *given, **more))
    for method, name, gamma, points in (
            ("teacher", "sample", lambda n: 0, 64), ("teacher-heun", "heun", lambda n: 0, 64),
            ("consistency", "sample", lambda n: 1, 128), ("anyflow", "sample", lambda n: 0, 64),
            ("anyflow-gamma", "sample", lambda n: min(1, 2 / n), 128)):
        asked.clear()
        scores, samples, states = ruler.measure(method, "net")
        wanted = [dict(gamma=gamma(n), path=True, average=method != "teacher") for n in flow2d.NFE]
        assert asked == [(name, n, points, options) for n, options in zip(flow2d.NFE, wanted)]
        assert scores["path_error"] == pytest.approx([5 * n / 64 for n in flow2d.NFE], rel=1e-4)
        assert scores["budget_drift"] == pytest.approx([5 - 5 * n / 64 for n in flow2d.NFE], rel=1e-4)
        assert [len(x) for x in samples] == 7 * [points] and [x.shape[1] for x in states] == 7 * [8]


def test_best_times_are_measured_at_those_times_and_found_with_other_noise(monkeypatch):
    ruler, found = flow2d.Ruler(flow2d.mixture(), 64, fresh=1, traced=8), []
    grids = [torch.linspace(1, 0, n + 1) ** 2 for n in (2, 4, 8)]
    monkeypatch.setattr(anyflow, "best_grid", lambda *given: found.append(given) or grids)
    ruler.sample, ruler.swd = lambda *given: (given, None), lambda x: x
    assert ruler.best_times("net") == {n: ("net", grid, 64, 0.0) for n, grid in zip((2, 4, 8), grids)}
    (net, noise, calls), = found
    assert net == "net" and calls == [2, 4, 8] and noise.std() == pytest.approx(1, 0.1)


@pytest.mark.parametrize("options, steps, points, undone", [
    ([], 5000, 2**15, []), (["--fast"], 1000, 2**12, []), (["--steps", "7"], 7, 2**15, []),
    (["--recipe", "published", "--exact-teacher"], 5000, 2**15, [*flow2d.RECIPE])])
def test_each_seed_is_trained_and_measured_as_asked(options, steps, points, undone, monkeypatch):
    asked = []
    monkeypatch.setattr(flow2d, "train", lambda density, *given: (asked.append(given), ("nets", "s"))[1])
    monkeypatch.setattr(flow2d, "Ruler", lambda density, *given: given)
    args = flow2d.parse(["--seed", "5", "--seeds", "2", *options])
    made = [*flow2d.trained_seeds(args, ["anyflow"])]
    assert made == [("nets", "s", (points, seed)) for seed in (5, 6)]
    for seed, (methods, *given, chosen) in zip((5, 6), asked):
        assert methods == ["anyflow"] and given == [steps, 512, seed, "--exact-teacher" in options]
        assert [*chosen] == undone


def test_noise_of_a_ruler_is_that_of_its_seed():
    noise = [flow2d.Ruler(flow2d.mixture(), 16, seed, fresh=1, traced=1).noise for seed in (0, 1)]
    assert not torch.isin(*noise).any()


def test_results_are_medians_over_seeds(tmp_path, monkeypatch, brief):
    """Of floors and seconds; scores are kept by seed."""
    def seeds(args, methods):
        for value in (1.0, 8.0, 3.0):
            ruler = SimpleNamespace(floor=value, floor_ode=2 * value, data=None, exact=None)
            ruler.of_ode = lambda _, value=value: 3 * value
            scores = {key: [value, 2 * value, 3 * value] for key in ("swd", "path_error", "budget_drift")}
            ruler.measure = lambda *_, scores=scores: (scores, None, None)
            yield {"teacher": "net"}, {"teacher": value}, ruler

    monkeypatch.setattr(flow2d, "trained_seeds", seeds)
    monkeypatch.setattr(plots, "decide", lambda results: [])
    monkeypatch.setattr(plots, "distances", lambda results: "")
    made = run(tmp_path)
    assert [made[f"floor{name}"] for name in ("", "_ode", "_teacher")] == [3, 6, 9]
    assert made["methods"]["teacher"]["train_seconds"] == 3
    assert made["methods"]["teacher"]["swd"] == [[1, 8, 3], [2, 16, 6], [3, 24, 9]]


def test_a_run_leaves_results_figures_and_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(flow2d, "Ruler", COARSE)
    monkeypatch.setattr(plots, "jumping", partial(plots.jumping, frames=3, hold=0))
    results = run(tmp_path, "--methods", *flow2d.METHODS[1:])
    assert results["nfe"] == [1, 2, 4, 8, 16, 32, 64] and len(results["claims"]) == 12
    assert all([*map(len, scores["swd"])] == 7 * [1] for scores in results["methods"].values())
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json", "networks", "quality.png", "samples.png", "trajectories.png", "jumping.gif"}
    weights = {path.stem: load_file(path) for path in (tmp_path / "networks").iterdir()}
    assert weights.keys() == results["methods"].keys() == {*flow2d.METHODS}
    flow2d.MLP().load_state_dict(weights["anyflow"])
    differ = lambda a, b: any((weights[a][key] != weights[b][key]).any() for key in weights[a])
    assert differ("anyflow-control", "anyflow-forward") and differ("anyflow", "anyflow-control")
    assert not differ("anyflow-gamma", "anyflow")


def test_the_published_recipe_undoes_every_choice(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(flow2d, "on_policy", lambda *given: seen.append(given[-1]) or 0.0)
    monkeypatch.setattr(flow2d, "Ruler", lambda *given: None)
    for more in ([], ["--recipe", "published"], ["--undo", "weight", "balance"]):
        args = flow2d.parse(["--steps", "1", "--out", str(tmp_path), *more])
        next(flow2d.trained_seeds(args, ["anyflow"]))
    ours, published, some = seen
    assert all(ours[name] != published[name] for name in flow2d.RECIPE)
    assert [name for name in ours if some[name] != ours[name]] == ["weight", "balance"]
    assert published["velocity"] == "data" and published["weight"] is None and published["balance"] is True


def test_departures_differ_from_our_recipe_in_one_choice_alone(tmp_path, capsys, monkeypatch, brief):
    calls, train = [], flow2d.train
    monkeypatch.setattr(flow2d, "train", lambda *given: calls.append(given) or train(*given))
    flow2d.main(["--departures", "--fast", "--steps", "2", "--seed", "10", "--out", str(tmp_path)])
    (*_, first, last) = capsys.readouterr().out.split("ours, stage ")[:3]
    assert first.split()[-1] == last.splitlines()[0].split()[-1] == "1.00-1.00"
    scores, names = json.loads((tmp_path / "departures.json").read_text()), [*flow2d.RECIPE]
    both, second = ["ours", "again", *names[:4], "all"], ["again, stage 1 ours", *names[4:]]
    assert scores.keys() == {f"{name}, stage {i}" for name in both for i in (1, 2)} | {
        f"{name}, stage 2" for name in second}
    seeds, undone, starts = zip(*((seed, [*undone], given) for *_, seed, _, undone, given in calls[1:]))
    assert seeds == (10, 1010) + 5 * (10,) + (1010,) + 7 * (10,)
    undone = [[name for name in names if name in some] for some in undone]
    assert undone == [[], [], *([name] for name in names[:4]), names, [], *([name] for name in names[4:])]
    assert all(start["teacher"] is starts[0]["teacher"] for start in starts)
    assert [i for i, start in enumerate(starts) if "anyflow-forward" in start] == [*range(7, 15)]


def test_gamma_is_chosen_from_the_numbers_printed(tmp_path, capsys, brief):
    flow2d.main(["--choose-gamma", "--fast", "--steps", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "gamma = min(1, 2 / calls)" in printed and (tmp_path / "gamma.png").exists()


def test_a_loss_that_turns_nan_names_stage_and_step(monkeypatch, tmp_path):
    monkeypatch.setattr(anyflow, "flow_map_loss", lambda *a, **k: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(SystemExit, match="stage anyflow-forward is nan at step 0"):
        run(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--steps 0", "--seeds none", "--density moons", "--methods rcm",
                                    "--batch -3", "--choose-gamma --methods anyflow",
                                    "--departures --methods anyflow", "--departures --choose-gamma"])
def test_bad_option_is_one_sentence(option, capsys, monkeypatch):
    monkeypatch.setattr(flow2d, "command", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        flow2d.main(option.split())
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_before_the_training():
    with pytest.raises(SystemExit, match=r"^toy.flow2d: .*Not a directory: '/dev/null/x'$"):
        flow2d.main(["--out", "/dev/null/x"])
