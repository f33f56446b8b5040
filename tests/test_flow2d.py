"""The toy: exact velocities, honest claims, reproducible runs, and what bad input gets."""

import json
import math

import pytest
import torch

import anyflow
from toy import flow2d

torch.set_num_threads(1)


@pytest.mark.parametrize("name", flow2d.DENSITIES)
def test_exact_velocity_is_the_conditional_mean(name):
    """E[(eps - x) g(z)] = E[v(z) g(z)] for any g: by samples, at several times."""
    density, n = flow2d.DENSITIES[name](), 100000
    for t in (0.05, 0.3, 0.7, 0.99):
        x, noise = density.sample(n), torch.randn(n, 2)
        z = anyflow.interpolate(x, noise, t)
        residual = noise - x - density.velocity(z, t)
        for g in (torch.ones_like(z), z, (3 * z).sin(), z.flip(1).cos()):
            error = (residual * g).mean(0).abs() / (residual * g).std(0) * math.sqrt(n)
            assert (error < 5).all(), "more than five standard errors"


@pytest.mark.parametrize("name", flow2d.DENSITIES)
def test_exact_ode_carries_noise_to_the_density(name):
    density, noise = flow2d.DENSITIES[name](), torch.randn(2000, 2)
    x = density.flow(noise, anyflow.time_grid(64))[-1].float()
    ruler = flow2d.Ruler(density, 2000, traced=1)
    assert ruler.swd(x) < 0.08 < ruler.swd(noise)
    assert x.mean(0).abs().max() < 0.1 and x.square().mean() == pytest.approx(1, abs=0.1)


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
        "consistency": dict(swd=[0.02, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07], path_error=one, budget_drift=one),
        "anyflow-forward": dict(swd=[0.016] * 7, path_error=[0.1] * 7, budget_drift=[0.1] * 7),
        "anyflow": dict(swd=[0.013] * 7, path_error=[0.1] * 7, budget_drift=[0.1] * 7),
    }
    for name, change in changes.items():
        rows[name.replace("_", "-")].update(change)
    methods = {name: {key: [[v] for v in row] for key, row in keys.items()} | {"train_seconds": 1.0}
               for name, keys in rows.items()}
    return {"methods": methods, "floor": 0.01}


def held(**changes):
    return [claim["holds"] for claim in flow2d.judge(results(**changes))]


def test_claims_are_judged_from_the_numbers():
    assert held() == [True] * 8
    assert held(teacher=dict(swd=[0.02] * 7))[0] is False
    assert held(consistency=dict(swd=[0.02] * 7))[1] is False
    assert held(anyflow=dict(swd=[0.01] * 6 + [0.012]))[2] is False
    assert held(teacher=dict(swd=[0.9] * 6 + [0.012]))[3] is False
    assert held(consistency=dict(swd=[0.012] + [0.07] * 6))[4] is False
    assert held(anyflow_forward=dict(swd=[0.015] * 7))[5] is False
    assert held(anyflow=dict(path_error=[0.11] * 7))[6] is False
    assert held(anyflow=dict(budget_drift=[0.21] * 7))[7] is False


def run(folder, *more):
    flow2d.main(["--fast", "--steps", "3", "--methods", "anyflow-forward", "--out", str(folder), *more])
    return json.loads((folder / "results.json").read_text())


def test_the_same_seed_gives_the_same_results(tmp_path):
    one, two, other = run(tmp_path / "1"), run(tmp_path / "2"), run(tmp_path / "3", "--seed", "1")
    swd = lambda answer: answer["methods"]["anyflow-forward"]["swd"]
    assert swd(one) == swd(two) != swd(other)
    assert one["nfe"] == [1, 2, 4, 8, 16, 32, 64] and len(swd(one)) == 7 and len(swd(one)[0]) == 1


def test_a_loss_that_turns_nan_names_stage_and_step(monkeypatch, tmp_path):
    monkeypatch.setattr(anyflow, "flow_map_loss", lambda *a, **k: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(SystemExit, match="stage anyflow-forward is nan at step 0"):
        run(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--steps 0", "--seeds none", "--density moons", "--methods rcm",
                                    "--out /dev/null/x", "--batch -3"])
def test_bad_option_is_one_sentence(option, capsys):
    with pytest.raises(SystemExit) as stop:
        flow2d.main(option.split())
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err
