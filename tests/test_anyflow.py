"""The mathematics of anyflow.py: identities, limits, convergence orders and exact cases."""

import itertools
import math
import re
from collections import namedtuple

import guidance
import numpy
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import anyflow
from model import PRESETS, Wan
from toy.flow2d import MLP, Mixture, mixture

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def net():
    return MLP(width=32, depth=2).double()


def counted(model):
    """The model with a list of the batch sizes it was called with."""

    def call(z, t, r, **cond):
        call.batches.append(len(z))
        return model(z, t, r, **cond)

    call.batches = []
    return call


class Exact:
    """Average velocity of a density's ODE by fine integration, float64: what training should find."""

    def __init__(self, density):
        self.density = density

    def __call__(self, z, t, r):
        out = self.density.velocity(z, t)
        for i in (t > r).nonzero()[:, 0]:
            z_r = self.density.flow(z[i : i + 1], torch.linspace(t[i], r[i], 65, dtype=torch.float64), 1)[-1]
            out[i] = ((z[i : i + 1] - z_r) / (t[i] - r[i]))[0]
        return out


def draw(batch, kind=torch.float64):
    t, r = torch.rand(2, batch, dtype=kind).sort(0, descending=True).values
    return torch.randn(batch, 2, dtype=kind), t, r


# path and grid


@pytest.mark.parametrize("shift", [0.5, 1, 5])
def test_shift_keeps_ends_and_order_and_composes(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    s = anyflow.shift_time(t, shift)
    assert s[0] == 0 and s[-1] == 1 and (s.diff() > 0).all()
    assert torch.allclose(anyflow.shift_time(s, 1 / shift), t, atol=1e-14)
    # The defining property: the signal-to-noise ratio (1 - t)/t is divided by the shift.
    assert torch.allclose(((1 - s) / s)[1:], ((1 - t) / t)[1:] / shift)


def test_every_shift_keeps_one_exactly():
    for shift in [i / 100 for i in range(1, 1001)]:
        assert anyflow.shift_time(1.0, shift) == anyflow.shift_time(torch.ones(()), shift) == 1
        grid = anyflow.time_grid(4, shift)
        assert torch.equal(anyflow.time_grid(grid), grid)


@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_time_pairs_keep_their_order_in_the_last_digits_below_one(shift, monkeypatch):
    near = 1 - torch.arange(1, 65) * 2**-24
    pairs = iter([torch.cartesian_prod(near, near).T.contiguous(), torch.tensor(0.5)])
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: next(pairs))
    t, r = anyflow.time_pairs(64**2, shift, diffusion=0.0, endpoint=0.0)
    assert (r <= t).all()


def test_grid_of_shift_one_is_even_and_grids_nest():
    for four in (4, torch.tensor(4), numpy.int64(4)):
        grid = anyflow.time_grid(four)
        assert grid.dtype == torch.float64 and grid.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert torch.allclose(anyflow.time_grid(8, 5.0)[::2], anyflow.time_grid(4, 5.0))


def test_path_joins_data_to_noise_with_constant_velocity():
    x, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    assert torch.equal(anyflow.interpolate(x, noise, 0.0), x)
    assert torch.equal(anyflow.interpolate(x, noise, 1.0), noise)
    slope = (anyflow.interpolate(x, noise, 0.7) - anyflow.interpolate(x, noise, 0.2)) / 0.5
    assert torch.allclose(slope, noise - x)


def test_time_pairs_have_the_stated_shares():
    t, r = anyflow.time_pairs(4000, shift=5.0)
    assert ((0 <= r) & (r <= t) & (t <= 1)).all()
    assert (t == r).sum() == pytest.approx(2000, abs=1)
    assert ((r == 0) & (t > 0)).sum() == pytest.approx(1000, abs=1)
    # Of a batch of one, half of the draws have r = t: single samples are not starved of either kind.
    alone = sum(bool((t == r).all()) for t, r in (anyflow.time_pairs(1) for _ in range(400)))
    assert 140 < alone < 260


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_time_weight_has_mean_one_over_the_shifted_grid(shift):
    grid = anyflow.time_grid(1000, shift)[:-1]
    assert anyflow.time_weight(grid, shift).mean() == pytest.approx(1)
    if shift == 1:  # integral of t sqrt(1 - t) is 4/15
        assert anyflow.time_weight(torch.tensor(0.75)).item() == pytest.approx(0.375 * 15 / 4, rel=1e-3)


# flow map and samplers


def test_exact_average_velocity_satisfies_the_identity_and_the_semigroup():
    exact, batch = Exact(mixture()), 6
    z, t, r = draw(batch)
    s = (t + r) / 2
    direct = anyflow.jump(exact, z, t, r)
    twice = anyflow.jump(exact, anyflow.jump(exact, z, t, s), s, r)
    assert torch.allclose(direct, twice, atol=1e-6)
    # u = v - (t - r) du/dt, eq. (3)
    v = exact.density.velocity(z, t)
    du = anyflow.central_difference(exact, z, v, t, r, eps=1e-3)
    assert torch.allclose(exact(z, t, r), v - (t - r)[:, None] * du, atol=1e-4)


def test_any_number_of_steps_of_the_exact_flow_map_gives_the_same_sample():
    exact = Exact(mixture())
    noise = torch.randn(4, 2, dtype=torch.float64)
    samples = [anyflow.sample(exact, noise, n, shift=2.0) for n in (1, 2, 5)]
    assert all(torch.allclose(samples[0], other, atol=1e-5) for other in samples[1:])


def test_own_times_of_the_exact_flow_map_give_the_same_sample_and_are_visited():
    exact = Exact(mixture())
    noise, times = torch.randn(4, 2, dtype=torch.float64), [1, 0.93, 0.2, 0.11, 0]
    states = anyflow.sample(exact, noise, times, shift=5.0, path=True)  # a shift moves even times alone
    assert torch.allclose(states[-1], anyflow.sample(exact, noise, 1), atol=1e-5)
    assert torch.allclose(states[2], anyflow.jump(exact, noise, 1.0, 0.2), atol=1e-5)
    even = anyflow.time_grid(3, 5.0)
    assert torch.equal(anyflow.time_grid(even), even)
    assert torch.equal(anyflow.sample(exact, noise, even), anyflow.sample(exact, noise, 3, shift=5.0))


class Bent(torch.nn.Module):
    """Keeps every state, but for jumps that cross one time, which have the average velocity 1."""

    def __init__(self, bend):
        super().__init__()
        self.bend, self.calls = bend, 0

    def forward(self, z, t, r, **cond):
        self.calls += 1
        wrong = (r + 1e-6 < self.bend) & (self.bend < t - 1e-6)
        return wrong[:, None].to(z.dtype).expand_as(z)


def test_best_grid_stops_where_jumps_must_not_cross():
    noise = torch.randn(3, 2, dtype=torch.float64)
    for bend in (24, 5):
        model = Bent(anyflow.time_grid(32, 3.0)[bend].item())
        grid = anyflow.best_grid(model, noise, 2, shift=3.0)
        assert model.calls <= 1000
        assert torch.equal(grid, anyflow.time_grid(32, 3.0)[[0, bend, 32]])


def test_best_grid_is_the_least_sum_of_all_grids(net):
    noise, points, steps = torch.randn(16, 2, dtype=torch.float64), 8, 3
    net.requires_grad_(False)
    times = anyflow.time_grid(points - 1)

    def error(i, j):
        """RMS between the jump and two half jumps, from the path of the finest ones."""
        z = anyflow.sample(net, noise, points - 1, path=True)[i]
        whole, *halves = (anyflow.jump(net, z, times[i].item(), times[k].item()) for k in (j, (i + j) // 2))
        half = halves[0] if (i + j) // 2 > i else z
        last = anyflow.jump(net, half, times[max(i, (i + j) // 2)].item(), times[j].item())
        return (whole - last).square().mean().sqrt().item() if j > i + 1 else 0.0

    ways = [(0, *some, points - 1) for some in itertools.combinations(range(1, points - 1), steps - 1)]
    best = min(ways, key=lambda way: sum(error(i, j) for i, j in zip(way, way[1:])))
    assert torch.equal(anyflow.best_grid(net, noise, steps, points=points), times[list(best)])
    several = anyflow.best_grid(net, noise, [5, steps], points=points)  # of one search
    assert [len(grid) for grid in several] == [6, 4] and torch.equal(several[1], times[list(best)])


@pytest.mark.parametrize("steps", [0, 33, 2.0, [1, 0.5, 0], [4, 33]])
def test_best_grid_refuses_other_budgets(net, steps):
    with pytest.raises(ValueError, match="expected an integer from 1 to 32"):
        anyflow.best_grid(net, torch.randn(3, 2, dtype=torch.float64), steps)


def test_sampler_without_averages_is_euler(net):
    noise = torch.randn(5, 2, dtype=torch.float64)
    z, grid = noise, anyflow.time_grid(3, 5.0)
    for t, r in zip(grid[:-1], grid[1:]):
        at = t.expand(5)
        z = z + (r - t) * net(z, at, at)
    assert torch.allclose(anyflow.sample(net, noise, 3, shift=5.0, average=False), z)


def test_euler_converges_to_the_exact_flow_at_order_one():
    density = mixture()
    noise = torch.randn(500, 2, dtype=torch.float64)
    exact = density.flow(noise, anyflow.time_grid(64))[-1]
    error = [(anyflow.sample(density.velocity, noise, n, average=False) - exact).norm(dim=1).mean().item()
             for n in (64, 128, 256)]
    assert all(0.8 < math.log2(a / b) < 1.4 for a, b in zip(error, error[1:]))


def test_path_returns_every_state(net):
    noise = torch.randn(5, 2, dtype=torch.float64)
    path = anyflow.sample(net, noise, 4, path=True)
    assert path.shape == (5, 5, 2) and torch.equal(path[0], noise)
    assert torch.equal(path[-1], anyflow.sample(net, noise, 4))
    assert torch.equal(path[2], anyflow.jump(net, path[1], 0.75, 0.5))


def prompted(z, t, r, prompt):
    """A linear network with a prompt (B, 1), easy to differentiate by hand."""
    shape = (-1,) + (1,) * (z.ndim - 1)
    return z * (1 + t.reshape(shape) ** 2) + r.reshape(shape) + prompt.reshape(shape)


def test_guidance_extrapolates_from_the_null_prompt():
    z, prompt, null = torch.randn(4, 2), torch.ones(4, 1), dict(prompt=torch.zeros(4, 1))
    one = anyflow.sample(prompted, z, 1, average=False, prompt=prompt)
    for g in (0.0, 1.0, 3.0):  # u_cond - u_null is 1 everywhere
        guided = anyflow.sample(prompted, z, 1, average=False, guidance=g, null=null, prompt=prompt)
        assert torch.allclose(guided, one - (g - 1), atol=1e-6)


def test_consistency_sampling_renoises(net):
    noise = torch.randn(4000, 2, dtype=torch.float64)
    net.requires_grad_(False)
    torch.manual_seed(1)
    path = anyflow.consistency_sample(net, noise, 2, path=True)
    x = anyflow.jump(net, noise, 1.0, 0.0)
    fresh = (path[1] - 0.5 * x) / 0.5  # z_r = (1 - r) x + r eps', eq. (6)
    assert fresh.mean().abs() < 0.05 and fresh.std() == pytest.approx(1, abs=0.03)
    assert (fresh * noise).mean().abs() < 0.05, "the noise is not fresh"
    assert torch.equal(path[2], anyflow.jump(net, path[1], 0.5, 0.0))
    torch.manual_seed(1)
    assert torch.equal(path[-1], anyflow.consistency_sample(net, noise, 2))


class Gaussian:
    """The exact flow map of N(0, s^2): along a path, z is in proportion to the standard deviation at t."""

    def __init__(self, s):
        self.std = lambda t: ((1 - t) ** 2 * s * s + t * t).sqrt()
        self.slope = lambda t: (t - (1 - t) * s * s) / self.std(t)

    def __call__(self, z, t, r):
        average = torch.where(t > r, (self.std(t) - self.std(r)) / (t - r), self.slope(t))
        return z * (average / self.std(t))[:, None]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_gamma_keeps_the_distribution_of_the_exact_flow_map(gamma, steps):
    """Where each jump lands fits the noise that leads up from there: std s, whatever gamma."""
    s, n = 0.4, 100_000
    noise = torch.randn(n, 1, dtype=torch.float64)
    path = anyflow.sample(Gaussian(s), noise, steps, shift=2.0, gamma=gamma, path=True)
    for t, z in zip(anyflow.time_grid(steps, 2.0), path):
        wanted = Gaussian(s).std(t).item()
        assert abs(z.std().item() / wanted - 1) < 4 / (2 * n) ** 0.5, "more than four standard errors"
    memory = (path[-1] * noise).mean().item() / s  # of the noise at the start: all of it on the ODE path
    assert memory > 0.99 if gamma == 0 or steps == 1 else memory < (0.9 if gamma == 0.5 else 0.6)


def test_gamma_of_one_is_consistency_sampling_and_of_zero_draws_nothing(net):
    noise = torch.randn(5, 2, dtype=torch.float64)
    torch.manual_seed(3)
    one = anyflow.sample(net, noise, 4, shift=5.0, gamma=1.0, path=True)
    torch.manual_seed(3)
    assert torch.equal(one, anyflow.consistency_sample(net, noise, 4, shift=5.0, path=True))
    before = torch.get_rng_state()
    zero = anyflow.sample(net, noise, 4, gamma=0.0)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(zero, anyflow.sample(net, noise, 4))
    assert not torch.equal(anyflow.sample(net, noise, 4, gamma=0.5), zero)
    assert not torch.equal(torch.get_rng_state(), before)


# training losses


def test_flow_matching_is_minimal_at_the_marginal_velocity():
    density = mixture()
    x = density.sample(20000).double()
    noise = torch.randn_like(x)
    t = torch.rand(len(x), dtype=torch.float64)
    off = lambda z, t, r: density.velocity(z, t) + 0.3
    low, high = (anyflow.flow_matching_loss(model, x, t=t, noise=noise) for model in (density.velocity, off))
    # E|v - (eps - x) + c|^2 = E|v - (eps - x)|^2 + c^2
    assert (high - low).item() == pytest.approx(0.09, abs=0.02)


def test_central_difference_is_second_order_in_eps(net):
    z, t, r = draw(16)
    t, r = 0.3 + 0.4 * t, 0.3 * r
    v = torch.randn_like(z)
    one = torch.ones_like(t)
    _, exact = torch.func.jvp(net, (z, t, r), (v, one, torch.zeros_like(t)))
    error = [(anyflow.central_difference(net, z, v, t, r, eps) - exact).norm().item()
             for eps in (0.08, 0.04, 0.02)]
    assert all(1.8 < math.log2(a / b) < 2.2 for a, b in zip(error, error[1:]))


def test_central_difference_stays_inside_the_trained_times(net):
    times = []

    def spy(z, t, r):
        times.append(t)
        return net(z, t, r)

    t = torch.tensor([1.0, 0.999, 0.001, 0.0], dtype=torch.float64)
    z, v = torch.randn(2, 4, 2, dtype=torch.float64)
    du = anyflow.central_difference(spy, z, v, t, torch.zeros_like(t))
    assert len(times) == 1 and times[0].min() >= 0 and times[0].max() <= 1
    _, exact = torch.func.jvp(net, (z, t, 0 * t), (v, torch.ones_like(t), 0 * t))
    assert torch.allclose(du, exact, atol=0.05), "one-sided at the ends, and divided by the gap that is left"


def test_central_difference_of_a_sinusoid_is_smaller_by_its_mean_over_eps():
    """sin(w t) -> w cos(w t) sin(w e)/(w e): of Wan's fastest, w = 1000, -0.19 is left at the published e."""
    t = torch.rand(50, dtype=torch.float64) * 0.9 + 0.05
    z = torch.randn(50, 2, dtype=torch.float64)
    for w, e, factor in ((1000, 0.005, -0.1918), (100, 0.005, 0.9589), (1000, 1e-4, 0.9983)):
        wave = lambda z, t, r: (w * t).sin()[:, None].expand_as(z)
        du = anyflow.central_difference(wave, z, torch.randn_like(z), t, 0 * t, e)
        assert math.sin(w * e) / (w * e) == pytest.approx(factor, abs=1e-4)
        wanted = (w * (w * t).cos() * math.sin(w * e) / (w * e))[:, None].expand_as(z)
        assert torch.allclose(du, wanted, atol=1e-8 * w)


def test_central_difference_smooths_wan_at_the_published_eps_and_differentiates_it_at_a_smaller_one():
    """On random weights, against torch.func.jvp: at 0.005 it is the mean of du/dt and nothing like du/dt."""
    net = Wan(PRESETS["tiny"]).double().requires_grad_(False)
    torch.nn.init.normal_(net.proj_out.weight, std=0.1)
    z, v = torch.randn(2, 4, 2, 3, 8, 8, dtype=torch.float64)
    text, t = torch.randn(4, 4, 32, dtype=torch.float64), torch.tensor([0.9, 0.7, 0.5, 0.3]).double()

    def derivative(s):
        """du/dt at t + s on the straight line through z."""
        at = (z + s * v, t + s, t / 3), (v, torch.ones_like(t), 0 * t)
        with sdpa_kernel(SDPBackend.MATH):  # no other attention knows a forward derivative
            return torch.func.jvp(lambda z, t, r: net(z, t, r, text), *at)[1]

    def error(e, wanted):
        du = anyflow.central_difference(net, z, v, t, t / 3, e, text=text)
        return ((du - wanted).norm() / wanted.norm()).item()

    exact = derivative(0.0)
    assert error(0.005, exact) > 0.5 and error(1e-4, exact) < 0.01
    assert 3.5 < error(1e-3, exact) / error(5e-4, exact) < 4.2, "of second order"  # from where w e is below 1
    middles = ((torch.arange(64) + 0.5) / 32 - 1) * 0.005
    assert error(0.005, sum(map(derivative, middles.tolist())) / 64) < 0.02


def test_flow_map_loss_vanishes_at_the_exact_flow_map():
    exact = Exact(mixture())
    x = exact.density.sample(8).double()
    options, off = dict(teacher=exact.density.velocity, balance=False), lambda z, t, r: 1.1 * exact(z, t, r)
    assert anyflow.flow_map_loss(exact, x, eps=1e-3, **options) < 1e-8
    assert anyflow.flow_map_loss(off, x, **options) > 1e-4


def test_no_derivative_where_r_equals_t(net):
    x = torch.randn(8, 2, dtype=torch.float64)
    t = torch.full((8,), 0.6, dtype=torch.float64)
    model = counted(net)
    anyflow.flow_map_loss(model, x, t=t, r=t)
    assert model.batches == [8]
    r = torch.where(torch.arange(8) < 3, 0.2, t)
    model.batches.clear()
    anyflow.flow_map_loss(model, x, t=t, r=r)
    assert model.batches == [8, 6], "one batched call, + and - of the three samples with r < t"


def test_flow_map_loss_at_r_equals_t_is_weighted_flow_matching(net):
    x, noise = torch.randn(2, 8, 2, dtype=torch.float64)
    t = torch.rand(8, dtype=torch.float64)
    one = lambda t: torch.ones_like(t)
    loss = anyflow.flow_map_loss(net, x, t=t, r=t, noise=noise, weight=one)
    assert torch.allclose(loss, anyflow.flow_matching_loss(net, x, t=t, noise=noise))


def conditional_pair():
    """Densities with and without a prompt; the average velocity of the GUIDED ODE by fine integration."""
    some, every = Mixture([(1, 0), (1, 1), (-2, -1)], 0.3, "gaussian"), mixture()

    class Guided:
        def velocity(self, z, t, r=None):
            null = every.velocity(z, t)
            return null + 3.0 * (some.velocity(z, t) - null)

        flow = Mixture.flow

    exact = Exact(Guided())

    def model(z, t, r, prompt):
        return exact(z, t, r) if prompt is None else every.velocity(z, t)

    return some, every, exact, model


def test_fused_guidance_has_the_guided_flow_map_as_its_target():
    """Derived directly: at the exact guided flow map, with v_cond for eps - x, the target IS the output."""
    some, every, exact, model = conditional_pair()
    z, t, r = draw(6)
    # noise - x is free: let it be v_cond(z_t, t), its mean. Solve z = (1 - t) x + t eps and eps - x = v_cond.
    v = some.velocity(z, t)
    x = z - t[:, None] * v
    options = dict(t=t, r=r, noise=x + v, balance=False, eps=1e-3, prompt=None)
    fused = dict(guidance=3.0, null=dict(prompt="null"))
    assert anyflow.flow_map_loss(model, x, guidance_form="consistent", **fused, **options) < 1e-7
    unguided = anyflow.flow_map_loss(model, x, **options)
    assert unguided > 1e-3, "the same student is wrong for the unguided flow"
    published = anyflow.flow_map_loss(model, x, guidance_form="published", **fused, **options)
    assert published > 1e-3, "and no fixed point of the published form"


@pytest.mark.parametrize("form", anyflow.GUIDANCE_FORMS)
def test_fixed_points_of_fused_guidance_on_gaussians(form):
    """The affine u of tests/guidance.py is where the target is the output, of prompts and of dropped ones; it
    is not for the other form. Sampled, the consistent one is the guided ODE at every number of calls."""
    _, t, r = draw(12)
    z, prompt = torch.randn(12, 1, dtype=torch.float64), (torch.arange(12) % 3 > 0).double()[:, None]
    model = guidance.network(form)
    ab = [torch.where(prompt[:, 0] > 0, *pair) for pair in
          zip(guidance.velocity(guidance.PROMPT, t), guidance.velocity(guidance.NULL, t))]
    v = ab[0][:, None] * z + ab[1][:, None]
    options = dict(t=t, r=r, balance=False, eps=1e-3, weight=torch.ones_like, prompt=prompt,
                   guidance=guidance.G, null=dict(prompt=torch.zeros_like(prompt)))
    x, noise = z - t[:, None] * v, z + (1 - t)[:, None] * v  # so that z_t = z and eps - x = v
    loss = {name: anyflow.flow_map_loss(model, x, noise=noise, guidance_form=name, **options).item()
            for name in anyflow.GUIDANCE_FORMS}
    other, = set(loss) - {form}
    assert loss[form] < 1e-6 < 1e-2 < loss[other]


def test_only_the_consistent_form_samples_the_guided_ode():
    rows = guidance.table()
    assert max(rows["consistent"]) < 2e-3
    assert all(a > 10 * b for a, b in zip(rows["published"], rows["consistent"]))
    assert all(a < b for a, b in zip(rows["published"], rows["guided Euler"]))


@pytest.mark.parametrize("g", [1.0, 2.0])
def test_a_guided_judge_aims_beyond_the_guided_ode(g):
    """Without guidance both end in the data. With it DMD ends narrower and further out."""
    dmd, ode = guidance.end_of_dmd(g), guidance.end_of_ode(g)
    if g == 1:
        assert dmd == pytest.approx(guidance.PROMPT, abs=1e-3) and ode == pytest.approx(dmd, abs=1e-3)
    else:
        assert dmd[0] > ode[0] + 0.1 and dmd[1] < ode[1] - 0.02


def test_a_student_that_equals_its_teacher_learns_jumps():
    """Balance against the teacher's anchors, which have no error then, would leave no gradient."""
    net = torch.nn.Linear(2, 2)
    teacher, student = (lambda z, t, r: net(z) * t[:, None], lambda z, t, r: net(z) * t[:, None])
    x = torch.randn(8, 2)
    gradient = lambda **options: torch.autograd.grad(
        anyflow.flow_map_loss(student, x, teacher=teacher, **options), net.weight)[0].abs().max()
    assert gradient(balance=True) == 0 and gradient() > 1e-4 and gradient(data_anchors=True) > 1e-4


@pytest.mark.parametrize("form", anyflow.GUIDANCE_FORMS)
def test_fused_guidance_as_the_paper_writes_it(form):
    """(u_cond - (1 - g) u_null)/g against (eps - x) - (t - r)/g du/dt, with gradient through u_cond only. As
    published, u_null at the same (t, r) and du/dt along the data's velocity; dropped prompts likewise."""
    net, g = torch.nn.Linear(2, 2).double(), 3.0
    model = lambda z, t, r, prompt: net(z) * (1 + t[:, None]) + r[:, None] ** 2 + prompt
    x, noise = torch.randn(2, 8, 2, dtype=torch.float64)
    z, t, r = draw(8)
    prompt, null = torch.randn(2, 8, 2, dtype=torch.float64)
    prompt[:2] = null[:2]  # dropped
    options = dict(guidance=g, guidance_form=form, null=dict(prompt=null), weight=torch.ones_like,
                   balance=False, prompt=prompt)
    loss = anyflow.flow_map_loss(model, x, t=t, r=r, noise=noise, **options)
    z = anyflow.interpolate(x, noise, t)
    u_null = model(z, t, r if form == "published" else t, null).detach()
    along = noise - x if form == "published" else g * (noise - x) + (1 - g) * u_null
    du = anyflow.central_difference(model, z, along, t, r, prompt=prompt)
    error = (model(z, t, r, prompt) - (1 - g) * u_null) / g - ((noise - x) - (t - r)[:, None] / g * du)
    direct = error.square().mean()
    assert torch.allclose(loss, direct)
    grads = (torch.autograd.grad(value, net.parameters()) for value in (loss, direct))
    assert all(torch.allclose(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("answer", [lambda z: z[:, 0], lambda z: z.mT, lambda z: z[:, :1].repeat(1, 2, 1)])
def test_an_answer_of_another_shape_is_no_answer(answer):
    """Which numbers would be broadcast, or not, would be a secret."""
    model, x = lambda z, t, r: answer(z), torch.randn(4, 1, 3)
    for use in (lambda: anyflow.jump(model, x, 0.7, 0.2), lambda: anyflow.flow_matching_loss(model, x),
                lambda: anyflow.flow_map_loss(model, x), lambda: anyflow.consistency_loss(model, model, x)):
        with pytest.raises(RuntimeError, match="shape|size"):
            use()


@pytest.mark.parametrize("held", [lambda p: [p], lambda p: ("a name", p), lambda p: {"deep": [p]},
                                  namedtuple("Prompt", "text")])
def test_prompts_stay_with_their_samples_however_they_are_held(held):
    def model(z, t, r, prompt):
        while not torch.is_tensor(prompt):
            prompt = prompt["deep"] if isinstance(prompt, dict) else prompt[-1]
        return prompted(z, t, r, prompt)

    x, noise = torch.randn(2, 8, 2, dtype=torch.float64)
    _, t, r = draw(8)
    r[::2] = t[::2]
    prompt = torch.randn(8, 1, dtype=torch.float64)
    options = dict(t=t, r=r, noise=noise)
    one, other = (anyflow.flow_map_loss(model, x, prompt=p, **options) for p in (prompt, held(prompt)))
    assert torch.equal(one, other)


def test_balance_gives_every_jump_the_size_of_the_diffusion_losses():
    loss = torch.tensor([1.0, 3.0, 10.0, 0.1], requires_grad=True)
    off = torch.tensor([False, False, True, True])
    balanced = anyflow._balance(loss, off)
    assert torch.allclose(balanced, torch.tensor([1.0, 3, 2, 2]), rtol=1e-3)
    balanced.sum().backward()
    assert torch.allclose(loss.grad, torch.tensor([1, 1, 2 / 10, 2 / 0.1]), rtol=1e-3)
    assert torch.equal(anyflow._balance(loss, torch.ones(4, dtype=bool)), loss), "a mean over nothing"


def test_balance_of_micro_batches_is_that_of_the_batch_if_anchors_come_first():
    loss, jumps = torch.rand(8) + 0.1, torch.arange(8) >= 3
    sums = torch.zeros(2)
    parts = [anyflow._balance(*part, sums) for part in zip(loss.split(2), jumps.split(2))]
    assert torch.allclose(torch.cat(parts), anyflow._balance(loss, jumps))
    assert torch.allclose(sums, torch.tensor([loss[:3].sum(), 3.0]))


def test_balance_hides_how_bad_the_jumps_are_and_parts_show_it():
    """Jumps with 100 times the squared error: the same balanced loss. `parts` is the error as it is."""
    x, t = torch.randn(8, 40, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    r, made = torch.where(torch.arange(8) < 3, t / 2, t), {}
    for size in (1.0, 10.0):
        # x = noise: the path stands still, v and du/dt are 0, and all that the network says is error.
        model = lambda z, t, r: z * torch.where(t > r, size, 1.0)[:, None]
        for balance in (True, False):
            options = dict(t=t, r=r, noise=x, balance=balance, parts=True)
            made[size, balance] = anyflow.flow_map_loss(model, x, **options)
    loss = {key: value[0].item() for key, value in made.items()}
    assert abs(loss[10, True] / loss[1, True] - 1) < 1e-3 < 1 < loss[10, False] / loss[1, False]
    (_, one, jumps), (_, ten, _) = made[1, True], made[10, True]
    assert torch.equal(jumps, t > r) and one.shape == jumps.shape == (8,) and not one.requires_grad
    assert torch.allclose(one, x.square().mean(1)) and torch.equal(one, made[1, False][1])
    assert torch.allclose(ten, torch.where(jumps, 100 * one, one))


def test_balance_cancels_the_weight_of_jumps(net):
    """Two weights that agree at the anchors' times and not at the jumps' give one loss, and one gradient."""
    x, noise = torch.randn(2, 8, 2, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    r, found = torch.where(t > 0.5, t / 2, t), {}
    weights = lambda t: torch.ones_like(t), lambda t: 1 + 50 * (t - 0.5).clamp(min=0)
    for balance in (True, False):
        options = dict(t=t, r=r, noise=noise, balance=balance)
        losses = [anyflow.flow_map_loss(net, x, weight=weight, **options) for weight in weights]
        grads = [torch.autograd.grad(loss, net.last.weight)[0] for loss in losses]
        relative = lambda a, b: ((a - b).norm() / b.norm()).item()
        found[balance] = relative(*losses), relative(*grads)
    assert max(found[True]) < 1e-4 and min(found[False]) > 0.1


@pytest.mark.parametrize("data_anchors, balance", [*itertools.product((False, True), repeat=2)])
def test_data_anchors_and_balance_are_independent(data_anchors, balance):
    """With a teacher: at r = t the loss is against its velocity or the data's, as asked; of jumps, its."""
    x, noise = torch.randn(2, 8, 3, dtype=torch.float64)
    t = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
    r = torch.where(torch.arange(8) % 2 == 0, t, t / 3)
    zero, teacher = lambda z, t, r: 0 * z, lambda z, t, r: z.sin() + t[:, None]
    v = teacher(anyflow.interpolate(x, noise, t), t, t)
    if data_anchors:
        v = torch.where((t == r)[:, None], noise - x, v)
    options = dict(teacher=teacher, balance=balance, data_anchors=data_anchors, parts=True)
    loss, error, jumps = anyflow.flow_map_loss(zero, x, t=t, r=r, noise=noise, **options)
    assert torch.allclose(error, v.square().mean(1)) and torch.equal(jumps, t > r)
    wanted = anyflow.time_weight(t) * error
    wanted = wanted[~jumps] if balance else wanted  # balanced, each jump counts as the mean of the anchors
    assert loss.item() == pytest.approx(wanted.mean().item(), rel=1e-4)


# on-policy


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_backward_simulation_is_three_jumps(net, steps):
    noise = torch.randn(4, 2, dtype=torch.float64)
    grid = anyflow.time_grid(steps, 5.0)
    for k in range(steps):
        model = counted(net)
        x_hat = anyflow.backward_simulation(model, noise, grid, k)
        assert len(model.batches) == 1 + (k > 0) + (k < steps - 1) <= 3
        z = anyflow.jump(net, noise, 1.0, grid[k].item()) if k > 0 else noise
        z = anyflow.jump(net, z, grid[k].item(), grid[k + 1].item())
        z = anyflow.jump(net, z, grid[k + 1].item(), 0.0) if k < steps - 1 else z
        assert torch.equal(x_hat, z)


def test_backward_simulation_sends_gradient_through_every_jump():
    knobs = torch.ones(3, dtype=torch.float64, requires_grad=True)
    calls = []

    def model(z, t, r):
        calls.append(t)
        return knobs[len(calls) - 1] * z

    noise = torch.randn(4, 2, dtype=torch.float64)
    anyflow.backward_simulation(model, noise, anyflow.time_grid(5), 2).sum().backward()
    assert (knobs.grad != 0).all()


def test_dmd_gradient_vanishes_for_equal_scores_and_pulls_a_displaced_sample_back():
    density = mixture()
    x_hat = density.sample(500).double().requires_grad_()
    anyflow.dmd_loss(x_hat, density.velocity, density.velocity).backward()
    assert (x_hat.grad == 0).all()

    # The student's samples are the data moved by d, and so is its exact score: the gradient points along d.
    d = torch.tensor([0.3, -0.2], dtype=torch.float64)
    moved = (density.sample(4000).double() + d).requires_grad_()
    fake = lambda z, t, r: density.velocity(z - (1 - t)[:, None] * d, t) - d
    for per_sample in (True, False):
        loss = anyflow.dmd_loss(moved, density.velocity, fake, per_sample=per_sample)
        (pull,) = torch.autograd.grad(loss, moved)
        assert torch.cosine_similarity(pull.mean(0), d, dim=0) > 0.95


def test_fake_score_gets_the_gradient_and_the_student_none(net):
    x_hat = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    anyflow.fake_score_loss(net, x_hat).backward()
    assert x_hat.grad is None and net.first.weight.grad.abs().sum() > 0


def test_fake_score_sees_each_sample_with_several_noises(net):
    x_hat, prompt, seen = torch.randn(3, 2, dtype=torch.float64), torch.arange(3.0).double()[:, None], []

    def fake(z, t, r, prompt):
        seen.append((z, t, prompt))
        return net(z, t, r)

    anyflow.fake_score_loss(fake, x_hat, repeats=4, prompt=prompt)
    z, t, prompts = seen[0]
    assert z.shape == (12, 2) and len(t.unique()) == 12
    assert torch.equal(prompts, prompt.repeat_interleave(4, 0))
    anyflow.fake_score_loss(fake, x_hat, repeats=4, prompt=prompt, t=0.0)
    assert torch.equal(seen[1][0], x_hat.repeat_interleave(4, 0))


def test_on_policy_step_judges_samples_and_then_teaches_them_to_the_fake_score(net, monkeypatch):
    """Order and content, with two micro-batches, three updates of the fake score and DMD of weight 2.5."""
    student = torch.tensor([[0.5, -0.2], [0.1, 0.8]], dtype=torch.float64, requires_grad=True)
    judge, fake = lambda z, t, r, prompt: z.sin() * prompt, lambda z, t, r, prompt: net(z, t, r)
    batches = [torch.randn(4, 2, dtype=torch.float64) for _ in range(2)]
    dmd_options = {id(x): dict(t=torch.rand(4).double(), noise=torch.randn(4, 2).double()) for x in batches}
    cond = dict(prompt=torch.full((4, 1), 1.5, dtype=torch.float64))
    calls, judged, taught, grads, draws = [], [], [], {}, []
    losses = {name: getattr(anyflow, name) for name in ("dmd_loss", "fake_score_loss")}

    def spy(name, samples, position):
        def call(*args, **options):
            samples.append(args[position])
            return losses[name](*args, **options)

        monkeypatch.setattr(anyflow, name, call)

    spy("dmd_loss", judged, 0), spy("fake_score_loss", taught, 1)

    def rollout(x):
        def fake_options(i):
            draws.append(i)
            return dict(t=torch.full((4,), 0.1 + 0.2 * i, dtype=torch.float64), noise=torch.ones_like(x))

        return x @ student, dmd_options[id(x)], fake_options, cond

    def backward(name, loss):
        calls.append(name)
        to = net.last.weight if name == "fake" else student
        grads[name] = grads.get(name, 0) + torch.autograd.grad(loss, to, retain_graph=True)[0]
        others = torch.autograd.grad(loss, student if name == "fake" else net.last.weight, allow_unused=True)
        assert others == (None,), f"the loss {name} reaches a network that it does not train"

    stage_1, update = lambda x: (x @ student).square().mean(), lambda role: calls.append(f"update {role}")
    anyflow.on_policy_step(iter(batches), rollout, stage_1, judge, fake, backward, update, dmd_weight=2.5,
                           fake_steps=3)
    assert sorted(calls[:4]) == ["dmd", "dmd", "loss", "loss"]
    assert calls[4:] == ["update student"] + 3 * ["fake", "fake", "update fake"]
    assert draws == [0, 0, 1, 1, 2, 2]
    assert all(x.requires_grad for x in judged) and not any(x.requires_grad for x in taught)
    assert len(taught) == 6 and all(torch.equal(a, b) for a, b in zip(taught, 3 * judged))

    direct = [losses["dmd_loss"](x @ student, judge, fake, **dmd_options[id(x)], **cond) for x in batches]
    assert torch.allclose(grads["dmd"], 2.5 * torch.autograd.grad(sum(direct), student)[0])
    assert grads["dmd"].abs().min() > 0 and grads["fake"].abs().max() > 0


def test_fresh_samples_for_the_fake_score_are_made_after_the_students_update():
    """From batches of their own for every update, by the student as it is then, without gradient."""
    student, order = torch.ones(1, dtype=torch.float64, requires_grad=True), []
    judge = fake = lambda z, t, r: z.sin()

    def rollout(x):
        order.append((x[0, 0].item(), student.item(), torch.is_grad_enabled()))
        return x * student, {}, lambda i: {}, {}

    def update(role):
        order.append(role)
        if role == "student":
            student.data += 1

    batch = lambda number: torch.full((2, 2), number, dtype=torch.float64)
    anyflow.on_policy_step([batch(1.0), batch(2.0)], rollout, lambda x: (x * student).mean(), judge, fake,
                           lambda name, loss: None, update, fake_steps=2,
                           fresh=lambda i: [batch(10.0 + i), batch(20.0 + i)])
    fresh = [(10.0, 2.0, False), (20.0, 2.0, False), "fake", (11.0, 2.0, False), (21.0, 2.0, False), "fake"]
    assert order == [(1.0, 1.0, True), (2.0, 1.0, True), "student", *fresh]


# consistency


def test_consistency_loss_vanishes_at_the_exact_endpoint_map():
    exact = Exact(mixture())
    x = exact.density.sample(8).double()
    fine = anyflow.consistency_loss(exact, exact.density.velocity, x, steps=1000)
    assert fine < 1e-5 and anyflow.consistency_loss(exact, exact.density.velocity, x, steps=4) > 10 * fine


def test_consistency_loss_takes_t_after_the_shift(net):
    """The teacher's step is 1/steps long before the shift: from tau to tau - 1/steps or 0, both shifted."""
    shift, steps, student, teacher = 5.0, 8, [], []

    def spy(times):
        def call(z, t, r):
            times.append((t, r))
            return net(z, t, r)

        return call

    tau = torch.tensor([0.05, 0.125, 0.5, 0.9, 1.0], dtype=torch.float64)
    t = anyflow.shift_time(tau, shift)
    s = anyflow.shift_time((tau - 1 / steps).clamp(min=0), shift)
    x = torch.randn(5, 2, dtype=torch.float64)
    anyflow.consistency_loss(spy(student), spy(teacher), x, steps=steps, t=t, shift=shift)
    assert all((r == 0).all() for _, r in student) and len(student) == len(teacher) == 2
    for found, wanted in zip((time for time, _ in student + teacher), (s, t, t, (t + s) / 2)):
        assert torch.allclose(found, wanted, atol=1e-12)


def test_consistency_simulation_is_renoised_jumps_with_gradient_in_the_last(net):
    noise = torch.randn(4, 2, dtype=torch.float64)
    grid = anyflow.time_grid(4)
    torch.manual_seed(3)
    x_hat = anyflow.consistency_simulation(net, noise, grid, 2)
    torch.manual_seed(3)
    path = anyflow.consistency_sample(net, noise, 4, path=True)
    last = anyflow.jump(net, path[2], 0.5, 0.0)
    assert torch.equal(x_hat, last)
    wanted = torch.autograd.grad(last.sum(), net.last.weight)[0]
    assert torch.allclose(torch.autograd.grad(x_hat.sum(), net.last.weight)[0], wanted)


# times per frame, precision, repeatability


def video_net(z, t, r):
    at = lambda time: time.reshape(time.shape + (1,) * (z.ndim - time.ndim))
    return (z.sin() * (1 + at(t)) + at(r).to(z.dtype)).to(z.dtype)


def less(model):
    return lambda *args: 0.9 * model(*args)


LOSSES = {
    "flow matching": lambda model, x, t, r, noise: anyflow.flow_matching_loss(model, x, t=t, noise=noise),
    "flow map": lambda model, x, t, r, noise: anyflow.flow_map_loss(model, x, t=t, r=r, noise=noise),
    "dmd": lambda model, x, t, r, noise: anyflow.dmd_loss(x, model, less(model), t=t, noise=noise),
}


@pytest.mark.parametrize("name", LOSSES)
def test_times_per_frame_equal_times_per_sample(name):
    x, noise = torch.randn(2, 3, 4, 2, 5, 5, dtype=torch.float64)
    t, r = torch.rand(2, 3, dtype=torch.float64).sort(0, descending=True).values
    r[0] = t[0]
    frames = [time[:, None].expand(3, 4) for time in (t, r)]
    assert torch.allclose(LOSSES[name](video_net, x, t, r, noise), LOSSES[name](video_net, x, *frames, noise))
    assert torch.allclose(anyflow.jump(video_net, x, t, r), anyflow.jump(video_net, x, *frames))


def test_flow_map_loss_of_frames_at_their_own_times_is_that_of_frames_alone():
    x, noise = torch.randn(2, 3, 4, 2, 5, 5, dtype=torch.float64)
    t = 0.5 + 0.4 * torch.rand(3, 4, dtype=torch.float64)
    r = t - 0.4 * torch.rand(3, 1, dtype=torch.float64)  # one distance for all frames of a clip
    loss = lambda *args: anyflow.flow_map_loss(video_net, args[0], t=args[1], r=args[2], noise=args[3],
                                               balance=False)
    alone = loss(*(y.flatten(0, 1) for y in (x, t, r, noise)))
    assert loss(x, t, r, noise).item() == pytest.approx(alone.item(), rel=1e-12)


def test_jump_compiles_in_one_graph():
    x = torch.randn(3, 2)
    compiled = torch.compile(anyflow.jump, fullgraph=True, backend="eager")
    t, r = torch.full((3,), 0.8), torch.full((3,), 0.3)
    assert torch.equal(compiled(video_net, x, t, r), anyflow.jump(video_net, x, t, r))


def test_squared_error_of_bfloat16_is_taken_in_float32():
    x, noise, u = torch.randn(3, 100, 2).bfloat16()
    loss = anyflow.flow_matching_loss(lambda z, t, r: u, x, noise=noise)
    assert loss.item() == pytest.approx((u.float() - (noise - x).float()).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_loss_and_sampler_works_in(dtype):
    net = MLP(width=32, depth=2)
    low = lambda z, t, r: net(z.float(), t, r).to(dtype)
    x, noise = torch.randn(2, 16, 2)
    t, r = torch.rand(2, 16).sort(0, descending=True).values
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for loss in LOSSES.values():
        value, reference = loss(low, x.to(dtype), t, r, noise.to(dtype)), loss(net, x, t, r, noise).item()
        assert value.dtype == torch.float32 and value.item() == pytest.approx(reference, rel=10 * tolerance)
    for sampler in (
        lambda model, z: anyflow.sample(model, z, 4),
        lambda model, z: anyflow.consistency_sample(model, z, 1),
        lambda model, z: anyflow.backward_simulation(model, z, anyflow.time_grid(4), 1),
    ):
        out, reference = sampler(low, noise.to(dtype)), sampler(net, noise)
        assert out.dtype == dtype
        assert torch.allclose(out.float(), reference, atol=3 * tolerance, rtol=tolerance)


def test_the_same_seed_gives_the_same_losses(net):
    x = torch.randn(16, 2, dtype=torch.float64)

    def run():
        torch.manual_seed(7)
        return [
            anyflow.flow_matching_loss(net, x),
            anyflow.flow_map_loss(net, x),
            anyflow.dmd_loss(x, net, net),
            anyflow.consistency_loss(net, net, x),
            anyflow.consistency_sample(net, x, 3).sum(),
        ]

    assert run() == run()


# what is drawn, asked and forwarded


def test_grids_are_exact_in_float64_for_every_number_of_steps():
    for steps in (3, 7, 50):
        wanted = torch.tensor([1 - i / steps for i in range(steps + 1)], dtype=torch.float64)
        assert torch.allclose(anyflow.time_grid(steps), wanted, rtol=0, atol=1e-15)


def test_a_bfloat16_state_keeps_its_type_and_its_times():
    """0.999 is 1 in bfloat16, and a time that the network would never see."""
    x, seen = torch.ones(3, 2).bfloat16(), []
    assert anyflow.interpolate(x, -x, 0.3).dtype == torch.bfloat16
    anyflow.jump(lambda z, t, r: seen.append((t, r)) or z, x, 0.999, 0.001)
    assert all(torch.equal(time, torch.full((3,), value)) for time, value in zip(seen[0], (0.999, 0.001)))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_a_jump_with_gamma_ends_at_its_share_of_the_way_below_r(net, gamma):
    """At s = (1 - gamma) r for every r of the grid, from the t where the one before was brought back to."""
    calls, grid = [], anyflow.time_grid(4, 2.0)
    spy = lambda z, t, r: calls.append(torch.stack([t[0], r[0]])) or net(z, t, r)
    anyflow.sample(spy, torch.randn(3, 2, dtype=torch.float64), 4, shift=2.0, gamma=gamma)
    assert torch.allclose(torch.stack(calls, 1), torch.stack([grid[:-1], (1 - gamma) * grid[1:]]))


SHIFT = 5.0
DRAWN = {  # loss with drawn times, on a network: what the first call's t was before the shift
    "normal logit": lambda net, x: anyflow.flow_matching_loss(net, x, shift=SHIFT),
    "normal logit of the fake score": lambda net, x: anyflow.fake_score_loss(net, x, shift=SHIFT),
    "uniform of DMD": lambda net, x: anyflow.dmd_loss(x, net, net, shift=SHIFT),
    "uniform of consistency": lambda net, x: anyflow.consistency_loss(net, net, x, shift=SHIFT),
    "pair": lambda net, x: anyflow.flow_map_loss(net, x, shift=SHIFT, balance=False),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_times_that_are_not_given_are_drawn_as_stated_and_then_shifted(kind):
    """Undo the shift: logits of mean 0, std 1; uniforms of mean 1/2, std 1/sqrt 12; of two the larger."""
    times, n = [], 20_000
    spy = lambda z, t, r: times.append(t) or z
    DRAWN[kind](spy, torch.randn(n, 2, dtype=torch.float64))
    t = anyflow.shift_time(times[0], 1 / SHIFT)
    t, mean, std = {"normal": (t.logit(), 0, 1), "uniform": (t, 1 / 2, 12**-0.5),
                    "pair": (t, 2 / 3, 18**-0.5)}[kind.split()[0]]
    assert abs(t.mean() - mean) < 4 * std / n**0.5 and abs(t.std() / std - 1) < 0.03


def test_time_pairs_are_the_larger_and_the_smaller_of_two_shifted_uniforms():
    pair = torch.stack(anyflow.time_pairs(20_000, SHIFT, diffusion=0.0, endpoint=0.0)).double()
    t, r = anyflow.shift_time(pair, 1 / SHIFT)
    for moment, wanted in ((t, 2 / 3), (r, 1 / 3), (t * r, 1 / 4), (t.square(), 1 / 2), (r.square(), 1 / 6)):
        assert moment.mean().item() == pytest.approx(wanted, abs=0.01)


def test_networks_get_states_of_the_type_of_the_data():
    """In bfloat16 every call of a loss, and of its central difference, is one in bfloat16."""
    def strict(z, t, r):
        assert z.dtype == torch.bfloat16 and t.dtype == r.dtype == torch.float32
        return z

    x = torch.randn(8, 2).bfloat16()
    for loss in (anyflow.flow_matching_loss, anyflow.flow_map_loss, anyflow.fake_score_loss):
        loss(strict, x)
    anyflow.dmd_loss(x, strict, strict)


def test_fused_guidance_is_the_published_one_if_no_form_is_named():
    x, noise = torch.randn(2, 8, 2, dtype=torch.float64)
    options = dict(t=0.8, r=0.3, noise=noise, guidance=3.0, prompt=x[:, :1], null=dict(prompt=0 * x[:, :1]))
    loss = lambda **form: anyflow.flow_map_loss(prompted, x, balance=False, **options, **form).item()
    assert loss() == loss(guidance_form="published") != loss(guidance_form="consistent")


@pytest.mark.parametrize("data_anchors", [False, True])
@pytest.mark.parametrize("form", anyflow.GUIDANCE_FORMS)
def test_fused_guidance_with_a_teacher(form, data_anchors):
    """A student that says its prompt everywhere, so du/dt is 0: the target is the guided velocity, with the
    student's own null branch, but in the consistent form with the teacher's, which is asked at r = t."""
    x, noise = torch.randn(2, 8, 3, dtype=torch.float64)
    t = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
    r, g = torch.where(torch.arange(8) % 2 == 0, t, t / 3), 3.0
    prompt, null = torch.randn(2, 8, 3, dtype=torch.float64)
    teacher = lambda z, t, r, prompt: z.sin() * prompt + t[:, None] - 2 * r[:, None]
    z = anyflow.interpolate(x, noise, t)
    of_teacher, of_null = teacher(z, t, t, prompt), teacher(z, t, t, null)
    guided = g * of_teacher + (1 - g) * (of_null if form == "consistent" else null)
    if data_anchors:
        guided = torch.where((t == r)[:, None], g * (noise - x) + (1 - g) * null, guided)
    _, error, _ = anyflow.flow_map_loss(
        lambda z, t, r, prompt: prompt, x, t=t, r=r, noise=noise, teacher=teacher, data_anchors=data_anchors,
        guidance=g, guidance_form=form, prompt=prompt, null=dict(prompt=null), parts=True)
    assert torch.allclose(error, ((prompt - guided) / g).square().mean(1))


def test_the_loss_of_a_batch_is_the_mean_of_its_samples_own():
    """Each sample with its prompt, also where only those with r < t have a derivative."""
    x, noise, prompt = torch.randn(3, 6, 2, dtype=torch.float64)
    t = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    r = torch.where(torch.arange(6) % 2 == 0, t, t / 2)
    model = lambda z, t, r, prompt: z.sin() * (1 + t[:, None] ** 2) * prompt
    loss = lambda i: anyflow.flow_map_loss(model, x[i], t=t[i], r=r[i], noise=noise[i], prompt=prompt[i],
                                           balance=False)
    alone = torch.stack([loss(slice(i, i + 1)) for i in range(6)])
    assert torch.allclose(loss(slice(6)), alone.mean())


@pytest.mark.parametrize("per_sample", [True, False])
def test_the_gradient_of_dmd_is_the_difference_of_clean_samples_over_a_mean_distance(per_sample):
    """Eq. (5), with a guided judge that says v and a null prompt's v - 1, so x0 moves by -t (g - 1)."""
    x_hat, noise, v, fake = torch.randn(4, 5, 2, dtype=torch.float64)
    t, g = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), 3.0
    judge = lambda z, t, r, prompt: v - (t - r)[:, None] - prompt
    prompt, null = torch.zeros(5, 1), dict(prompt=torch.ones(5, 1))
    x_hat.requires_grad_()
    says = lambda z, t, r, prompt: fake - (t - r)[:, None]
    loss = anyflow.dmd_loss(x_hat, judge, says, t=t, noise=noise, guidance=g, null=null, prompt=prompt,
                            per_sample=per_sample)
    found = torch.autograd.grad(loss, x_hat)[0] * x_hat.numel() / 2
    z = anyflow.interpolate(x_hat.detach(), noise, t)
    x0_judge = z - t[:, None] * (v + g - 1)
    distance = (x_hat.detach() - x0_judge).abs()
    distance = distance.mean(1, keepdim=True) if per_sample else distance.mean()
    assert torch.allclose(found * distance, z - t[:, None] * fake - x0_judge)


def test_a_sample_that_the_judge_expects_to_the_bit_gets_no_gradient():
    x_hat, still = torch.randn(4, 2, requires_grad=True), lambda z, t, r: 0 * z
    anyflow.dmd_loss(x_hat, still, still, noise=x_hat.detach(), t=0.5).backward()
    assert (x_hat.grad == 0).all()


@pytest.mark.parametrize("steps", [1, 4])
def test_consistency_compares_with_a_stopped_jump_from_the_guided_teachers_midpoint_step(steps):
    """Of dz/dt = k z, k of guidance, the midpoint step over h is the series of exp(-k h) to second order; the
    student says knob z, so f(z, t) = (1 - knob t) z, and only that at t has a gradient."""
    x, noise = torch.randn(2, 5, 2, dtype=torch.float64)
    tau, knob = torch.tensor([0.05, 0.2, 0.5, 0.8, 1.0]).double(), torch.tensor(0.7, requires_grad=True)
    t, s = (anyflow.shift_time(time, 3.0)[:, None] for time in (tau, (tau - 1 / steps).clamp(min=0)))
    teacher = lambda z, t, r, prompt: prompt * z + (t - r)[:, None]
    student = lambda z, t, r, prompt: knob * z
    k, weight = -0.2 + 3.0 * (0.5 + 0.2), lambda t: 1 + t
    loss = anyflow.consistency_loss(
        student, teacher, x, t=t[:, 0], noise=noise, shift=3.0, steps=steps, guidance=3.0, weight=weight,
        prompt=torch.full((5, 1), 0.5), null=dict(prompt=torch.full((5, 1), -0.2)))
    z = anyflow.interpolate(x, noise, t[:, 0])
    z_s = z * (1 - k * (t - s) + (k * (t - s)) ** 2 / 2)
    error = (1 - knob.item() * t) * z - (1 - knob.item() * s) * z_s
    assert loss.item() == pytest.approx((weight(t) * error.square()).mean().item(), rel=1e-6)
    wanted = (weight(t) * 2 * error * -t * z).mean().item()
    assert torch.autograd.grad(loss, knob)[0].item() == pytest.approx(wanted, rel=1e-6)


def test_best_grid_asks_with_the_prompt_and_keeps_no_graph(net):
    calls = []

    def model(z, t, r, prompt):
        calls.append(torch.is_grad_enabled())
        return net(z, t, r) + prompt

    anyflow.best_grid(model, torch.randn(3, 2, dtype=torch.float64), [1, 2], prompt=torch.ones(3, 2))
    assert len(calls) == 993 and not any(calls)


def test_one_distance_for_all_frames_is_meant_to_five_digits():
    t, r = torch.ones(2, 2), torch.tensor([[0.5, 0.499]]).expand(2, 2)
    with pytest.raises(ValueError, match="t - r differs"):
        anyflow.flow_map_loss(video_net, torch.zeros(2, 2), t=t, r=r)


# bad input


TWO = torch.zeros(2, 2)
BAD = [
    (lambda: anyflow.time_grid(0), "steps is 0"),
    (lambda: anyflow.time_grid(2.5), "steps is 2.5"),
    (lambda: anyflow.time_grid([1, 0.5]), "from 1 down to 0"),
    (lambda: anyflow.time_grid([0.9, 0]), "from 1 down to 0"),
    (lambda: anyflow.time_grid([1, 0.5, 0.5, 0]), "steps is [1, 0.5, 0.5, 0], expected"),
    (lambda: anyflow.time_grid(()), "steps is"),
    (lambda: anyflow.time_grid("4"), "steps is 4, expected an integer"),
    (lambda: anyflow.time_grid(torch.tensor([1, math.nan, 0])), "from 1 down to 0"),
    (lambda: anyflow.time_grid(4, 0), "shift is 0"),
    (lambda: anyflow.shift_time(0.5, -1), "shift is -1"),
    (lambda: anyflow.shift_time(0.5, math.inf), "shift is inf"),
    (lambda: anyflow.jump(video_net, TWO, 0.5, 0.6), "r above t by up to 0.1, expected r <= t"),
    (lambda: anyflow.jump(video_net, TWO, 1.5, 0.0), "times are in [1.5, 1.5], expected [0, 1]"),
    (lambda: anyflow.jump(video_net, TWO, torch.tensor([0.5, math.nan]), 0.0), "times are in [nan, nan]"),
    (lambda: anyflow.jump(video_net, TWO, torch.zeros(3), 0.0), "a time has shape (3,), expected a float"),
    (lambda: anyflow.interpolate(TWO, TWO, -0.1), "times are in [-0.1, -0.1]"),
    (lambda: anyflow.interpolate(TWO, TWO[:1], 0.1), "noise has shape (1, 2), expected (2, 2) as x"),
    (lambda: anyflow.sample(video_net, TWO, 0), "steps is 0"),
    (lambda: anyflow.sample(video_net, TWO, 1, gamma=1.5), "gamma is 1.5, expected a number in [0, 1]"),
    (lambda: anyflow.sample(video_net, TWO, 1, gamma=math.nan), "gamma is nan"),
    (lambda: anyflow.flow_map_loss(video_net, TWO, guidance=0.0), "guidance is 0"),
    (lambda: anyflow.flow_map_loss(video_net, TWO, t=0.5), "found only t"),
    (lambda: anyflow.flow_map_loss(video_net, TWO, t=torch.ones(2, 2), r=torch.eye(2)), "t - r differs"),
    (lambda: anyflow.flow_matching_loss(video_net, TWO.int(), noise=TWO), "a state is of torch.int32"),
    (lambda: anyflow.consistency_loss(video_net, video_net, TWO, steps=0), "steps is 0"),
    (lambda: anyflow.sample(video_net, TWO, 2, guidance=3.0), "null"),
    (lambda: anyflow.flow_map_loss(video_net, TWO, guidance=3.0), "null"),
    (lambda: anyflow.backward_simulation(video_net, TWO, anyflow.time_grid(4), 4), "k is 4"),
    (lambda: anyflow.consistency_simulation(video_net, TWO, anyflow.time_grid(4), -1), "k is -1"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
