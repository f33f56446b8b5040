"""AnyFlow (arXiv 2605.13724): any-step diffusion by on-policy flow-map distillation, for any network u(z, t, r).

Read from top to bottom; each part needs only the parts above it.

    1  path        a straight line joins data and noise; the time grid
    2  flow map    one network call jumps from time t to ANY earlier time r; the samplers
    3  teacher     flow matching: at r = t the network is the velocity of an ODE
    4  stage 1     learn the jumps by differentiating their definition (off-policy: the states come from data)
    5  stage 2     learn from the student's own samples (on-policy), through a rollout of three jumps
    6  baseline    consistency distillation, which knows only jumps to the end

Notation: x data, eps standard normal noise (`noise` in code; there `eps` is a finite difference), t in [0, 1]
with t = 1 pure noise, z_t the state at time t, v the instantaneous and u the AVERAGE velocity.

Shapes: a state is (B, ...): (B, 2) for points, (B, F, C, H, W) for video. A time is a float, (B,) for one per
sample, or (B, F) for one per frame. A network is called `model(z, t, r, **cond)`, with times as tensors (B,) or
(B, F), and returns u in the shape of z. Tensors in `cond`, in lists and tuples too, have the batch as first
dimension; all else is handed on as it is. `null` is a dict of what the null prompt changes in `cond`. Random
numbers come from torch's global generator: `torch.manual_seed` makes every run repeat.
"""
import torch

# ------------------------------------------------------------------------------------------------------------
# 1. The path from data to noise
# ------------------------------------------------------------------------------------------------------------


def shift_time(t, shift):
    """Move times towards noise: t -> s t / (1 + (s - 1) t), which keeps 0 and 1 fixed (Wan uses s = 5).

    t: float or tensor in [0, 1]. shift: s > 0; s = 1 changes nothing. Raises ValueError for shift <= 0.
    """
    if not shift > 0:
        raise ValueError(f"shift is {shift}, expected a number above 0")
    return shift * t / (1 + (shift - 1) * t)


def time_grid(steps, shift=1.0):
    """The times that a sampler of `steps` network calls visits: float64 (steps + 1,), falling from 1 to 0."""
    if not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"steps is {steps!r}, expected an integer of at least 1")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def interpolate(x, noise, t):
    """The state z_t = (1 - t) x + t eps (..., as x) of the straight path, whose velocity is dz/dt = eps - x."""
    t, _ = _times(x, t, t)
    t = _expand(t, x)
    return ((1 - t) * x + t * noise).to(x.dtype)


def _times(z, t, r):
    """Check 0 <= r <= t <= 1; return both as (B,) or (B, F) tensors, in float32 or finer whatever z is."""
    out = []
    for time in (t, r):
        if not torch.is_tensor(time):
            time = torch.tensor(time, dtype=torch.float64)
        if time.shape != z.shape[:time.ndim] or time.ndim > 2:
            raise ValueError(f"a time has shape {tuple(time.shape)}, expected a float, (B,) or (B, F)"
                             f" for a state of shape {tuple(z.shape)}")
        time = time.to(z.device, torch.promote_types(z.dtype, torch.float32))
        out.append(time.expand(len(z)) if time.ndim == 0 else time)
    t, r = out
    if t.ndim != r.ndim:  # one of each sample, one of each frame
        t, r = (time[:, None].expand(z.shape[:2]) if time.ndim == 1 else time for time in (t, r))
    if not ((0 <= r) & (r <= t) & (t <= 1)).all():
        raise ValueError(f"times must satisfy 0 <= r <= t <= 1, found t in [{t.min():.4g}, {t.max():.4g}]"
                         f" and r in [{r.min():.4g}, {r.max():.4g}]")
    return t, r


def _expand(t, z):
    """(B,) or (B, F) -> (B, 1, ..., 1) or (B, F, 1, ..., 1), to multiply with z."""
    return t.reshape(t.shape + (1,) * (z.ndim - t.ndim))


# ------------------------------------------------------------------------------------------------------------
# 2. The flow map and the samplers
#
# An ODE dz/dt = v(z, t) joins data and noise. Its average velocity over [r, t], along the path from z_t, is
#     u(z_t, t, r) = 1/(t - r) * integral_r^t v(z_s, s) ds,      u(z, t, t) = v(z, t),                       (1)
# so a network that knows u jumps from t to r in one call, over any distance, without discretisation error:
#     Phi_{r<-t}(z) = z - (t - r) u(z, t, r)                                                                 (2)
# Two jumps make one, Phi_{r<-s}(Phi_{s<-t}(z)) = Phi_{r<-t}(z): any number of steps leads to the same sample.
# ------------------------------------------------------------------------------------------------------------


def jump(model, z, t, r, **cond):
    """Phi_{r<-t}(z), eq. (2): the state (as z) at time r <= t of the ODE path that passes z at time t."""
    t, r = _times(z, t, r)
    u = model(z, t, r, **cond)
    return (z - _expand(t - r, z) * u).to(z.dtype)


def guided(model, z, t, r, guidance=1.0, null=None, **cond):
    """Classifier-free guidance, two calls: u_null + g (u_cond - u_null); g = 1 is the plain conditional call."""
    u = model(z, t, r, **cond)
    if guidance == 1:
        return u
    if null is None:
        raise ValueError(f"guidance {guidance} needs the null prompt: expected null=dict(...), found None")
    u_null = model(z, t, r, **(cond | null))
    return u_null + guidance * (u - u_null)


@torch.no_grad()
def sample(model, noise, steps, *, shift=1.0, guidance=1.0, null=None, average=True, path=False, **cond):
    """From noise (B, ...) at t = 1 to a sample at t = 0 in `steps` jumps.

    average=True is the flow-map sampler. average=False asks for the velocity at (t, t) and follows it in a
    straight line: Euler's method, all that a teacher can do, with an error that falls as 1/steps.
    Returns the sample (as noise), or with path=True every state, (steps + 1, B, ...). ValueError for steps < 1.
    """
    def velocity(z, t, r, **cond):
        return guided(model, z, t, r if average else t, guidance, null, **cond)

    grid = time_grid(steps, shift).tolist()
    states = [noise]
    for t, r in zip(grid[:-1], grid[1:]):
        z = jump(velocity, states[-1], t, r, **cond)
        states = [*states, z] if path else [z]
    return torch.stack(states) if path else states[-1]


# ------------------------------------------------------------------------------------------------------------
# 3. The teacher: flow matching
#
# Many straight lines pass through one point z at time t. Regression of their slopes eps - x on z_t finds the
# mean, v(z, t) = E[eps - x | z_t = z], and the ODE dz/dt = v(z, t) carries noise to data as the lines did. The
# network is asked for u at r = t, so that teacher and student are one architecture.
# ------------------------------------------------------------------------------------------------------------


def logit_normal_times(x, shift=1.0):
    """Times (B,) of the teacher's training: sigmoid of a standard normal, so most are mid-way; then shifted."""
    return shift_time(torch.randn(len(x), device=x.device).sigmoid(), shift)


def flow_matching_loss(model, x, *, t=None, noise=None, shift=1.0, **cond):
    """mean || model(z_t, t, t) - (eps - x) ||^2 over data x (B, ...). Scalar with gradient.

    t: float, (B,) or (B, F), logit-normal and shifted if not given. noise: eps, as x, drawn if not given.
    """
    t = logit_normal_times(x, shift) if t is None else t
    noise = torch.randn_like(x) if noise is None else noise
    t, _ = _times(x, t, t)
    u = model(interpolate(x, noise, t), t, t, **cond)
    return _squared_error(u, noise - x).mean()


def _squared_error(a, b):
    """(a - b)^2, in float32 or finer."""
    return (a - b).to(torch.promote_types(a.dtype, torch.float32)).square()


# ------------------------------------------------------------------------------------------------------------
# 4. Stage 1: forward flow-map training
#
# Multiply (1) by t - r and differentiate along the path, r held fixed:
#     u(z_t, t, r) = v(z_t, t) - (t - r) du/dt,     du/dt = d_t u + v . grad_z u                             (3)
# (MeanFlow, 2505.13447). The network is regressed on the right-hand side, computed with its own present weights
# and without gradient. Where r = t the second term is gone and (3) is flow matching: half of every batch holds
# that anchor while the other half learns to jump.
# ------------------------------------------------------------------------------------------------------------


def time_pairs(batch, shift=1.0, diffusion=0.5, endpoint=0.25, device=None):
    """Training times t >= r, each (batch,): the larger and smaller of two uniforms, shifted.

    A share `diffusion` of the batch has r = t, a share `endpoint` has r = 0. The shares are exact where they
    divide the batch and hold in the mean where not, down to a batch of one.
    """
    t, r = torch.rand(2, batch, device=device).sort(dim=0, descending=True).values
    slot = (torch.arange(batch, device=device) + torch.rand((), device=device)) / batch
    r = torch.where(slot < diffusion, t, torch.where(slot < diffusion + endpoint, 0, r))
    return shift_time(t, shift), shift_time(r, shift)


def time_weight(t, shift=1.0):
    """The paper's weight w(t) = t sqrt(1 - t) / mean, as t; the mean is over the shifted grid of 1000 times."""
    w = lambda t: t * (1 - t).sqrt()
    return w(t) / w(time_grid(1000, shift)[:-1]).mean().item()


@torch.no_grad()
def central_difference(model, z, v, t, r, eps=0.005, **cond):
    """du/dt of eq. (3), as z: [u(z + e v, t + e, r) - u(z - e v, t - e, r)] / 2e, no gradient. Its error is O(e^2).

    Forwards are all it needs; a Jacobian-vector product fails in flash attention, flex attention and FSDP2.
    + and - share one call. t +- e is clamped to [0, 1] and the quotient taken over the gap that is left: there,
    the error is O(e).
    """
    t, r = _times(z, t, r)
    later, earlier = (t + eps).clamp(max=1), (t - eps).clamp(min=0)
    both = torch.cat([z + _expand(later - t, z) * v, z + _expand(earlier - t, z) * v]).to(z.dtype)
    twice = _each_tensor(cond, lambda c: torch.cat([c, c]))
    plus, minus = model(both, torch.cat([later, earlier]), torch.cat([r, r]), **twice).chunk(2)
    return (plus - minus) / _expand(later - earlier, z)


def flow_map_loss(model, x, *, t=None, r=None, noise=None, shift=1.0, teacher=None, guidance=1.0, null=None,
                  weight=None, balance=True, eps=0.005, **cond):
    """Regression of u(z_t, t, r) on the right-hand side of eq. (3) over data x (B, ...). Scalar with gradient.

    v in the target is the data's, eps - x, or, with less variance, that of a `teacher` network.

    guidance g fuses guidance into the student, which is then sampled without, at half the cost: v becomes the
    GUIDED velocity v_null + g (v_cond - v_null). From data that is g (eps - x) + (1 - g) u(z_t, t, t; null),
    since v_cond is the mean of eps - x, and the student's own null branch is trained by the dropped prompts.

    t, r, noise: drawn by `time_pairs` and from the normal if not given. weight: a function of t (B,), if not
    given `time_weight`. balance: see `_balance`.
    """
    if (t is None) != (r is None):
        raise ValueError(f"found only {'t' if r is None else 'r'}, expected both t and r or neither")
    if t is None:
        t, r = time_pairs(len(x), shift, device=x.device)
    if not guidance > 0:
        raise ValueError(f"guidance is {guidance}, expected a number above 0")
    noise = torch.randn_like(x) if noise is None else noise
    t, r = _times(x, t, r)
    z = interpolate(x, noise, t)
    u = model(z, t, r, **cond)

    with torch.no_grad():
        off = (t > r).reshape(len(x), -1).any(1)
        v = noise - x
        if guidance != 1 and (teacher is None or balance):
            if null is None:
                raise ValueError(f"guidance {guidance} needs the null prompt: expected null=dict(...), found None")
            v = guidance * v + (1 - guidance) * model(z, t, t, **(cond | null))
        if teacher is not None:
            smooth = guided(teacher, z, t, t, guidance, null, **cond)
            v = torch.where(_expand(off, z), smooth, v) if balance else smooth

        target = v.clone()
        if _over_processes(off.sum()) > 0:  # where r = t, du/dt is multiplied by zero: do not compute it
            # Sharded processes must call the network equally often: one that has no such sample takes its first.
            i = off.nonzero()[:, 0] if off.any() else torch.zeros(1, dtype=torch.long, device=off.device)
            some = _each_tensor(cond, lambda c: c[i])
            du = central_difference(model, z[i], v[i], t[i], r[i], eps, **some)
            target[i] -= (_expand(t - r, z)[i] * du).to(v.dtype)

    # 1/g^2 keeps the unguided scale: (u - (1-g) u_null)/g against (eps - x) - (t-r)/g du/dt, as published.
    error = _squared_error(u, target) / guidance ** 2
    w = time_weight(t, shift) if weight is None else weight(t)
    loss = (_expand(w, x) * error).flatten(1).mean(1)  # (B,)
    return (_balance(loss, off) if balance else loss).mean()


def _each_tensor(cond, function):
    """cond with function applied to its tensors, at any depth of dicts, lists and tuples."""
    if isinstance(cond, dict):
        return {key: _each_tensor(value, function) for key, value in cond.items()}
    if isinstance(cond, (list, tuple)):
        return type(cond)(_each_tensor(value, function) for value in cond)
    return function(cond) if torch.is_tensor(cond) else cond


def _balance(loss, off, tiny=1e-5):
    """Losses (B,), those with r < t rescaled to the mean of the others: l * mean / l, the factor a constant.

    Jumps have errors of another size than velocities, and this keeps both in view. It wants samples of many
    numbers (over the two coordinates of a point, 1/l is noise), and at r = t the data's velocity, whose variance
    keeps the mean above zero: against the teacher that it starts as, a student has no error there at all. So
    `flow_map_loss` asks a teacher only for the jumps.
    The mean is over all processes; without a sample at r = t, nothing is rescaled.
    """
    on = (~off).to(loss.dtype)
    total, count = _over_processes(torch.stack([(on * loss.detach()).sum(), on.sum()]))
    if count == 0:
        return loss
    return torch.where(off, loss * total / count / (loss.detach() + tiny), loss)


def _over_processes(x):
    """The sum of x over all processes, where there are several: the batch is what they hold together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        x = x.clone()
        torch.distributed.all_reduce(x)
    return x


# ------------------------------------------------------------------------------------------------------------
# 5. Stage 2: on-policy distillation
#
# Stage 1 sees states made from data. A student that samples sees its own, with the errors of its earlier jumps
# in them. So roll it out as it will be used, judge the sample x_hat where it lands, and send the gradient back.
# To differentiate N steps is too dear, but the flow map makes the rollout three jumps however large N is:
#     noise --(jump)--> z at grid[k] --(the step being trained)--> z at grid[k+1] --(jump)--> x_hat          (4)
# ------------------------------------------------------------------------------------------------------------


def backward_simulation(model, noise, grid, k, **cond):
    """x_hat (as noise) by eq. (4), with gradient through all its calls: at most three, empty jumps are skipped.

    noise: (B, ...) at t = 1. grid: of `time_grid`. k: which of its steps is trained, 0 <= k < steps.
    """
    if not 0 <= k < len(grid) - 1:
        raise ValueError(f"k is {k}, expected 0 to {len(grid) - 2} for a grid of {len(grid) - 1} steps")
    z = noise
    stops = [1.0, float(grid[k]), float(grid[k + 1]), 0.0]
    for t, r in zip(stops[:-1], stops[1:]):
        if r < t:
            z = jump(model, z, t, r, **cond)
    return z


def dmd_loss(x_hat, real, fake, *, t=None, noise=None, shift=1.0, guidance=1.0, null=None, per_sample=True,
             **cond):
    """Distribution matching (DMD, 2311.18828): its gradient moves samples x_hat (B, ...) towards the teacher's.

    The gradient of KL(student || teacher) is a difference of two scores, and at time t a score is an affine
    function of the expected clean sample x0 = z_t - t v(z_t, t). `real` is the frozen teacher, with guidance;
    `fake` knows the student's samples by `fake_score_loss`.
        grad = (x0_fake - x0_real) / mean|x_hat - x0_real|,   loss = mean (x_hat - stopgrad(x_hat - grad))^2  (5)

    t, noise: uniform, then shifted, and normal if not given. guidance: as in `guided`; the release's
    x0_cond + 3 (x0_cond - x0_null) is guidance = 4. per_sample: the mean in (5) is over each sample, as in the
    paper; False: over the batch, for samples of few numbers.
    """
    t = shift_time(torch.rand(len(x_hat), device=x_hat.device), shift) if t is None else t
    noise = torch.randn_like(x_hat) if noise is None else noise
    t, _ = _times(x_hat, t, t)
    with torch.no_grad():
        z = interpolate(x_hat, noise, t)
        x0_real = z - _expand(t, z) * guided(real, z, t, t, guidance, null, **cond)
        x0_fake = z - _expand(t, z) * fake(z, t, t, **cond)
        size = (x_hat - x0_real).abs().flatten(1).mean(1)
        if not per_sample:
            size = (_over_processes(size.sum()) / _over_processes(size.new_tensor(len(size)))).expand(len(size))
        size = size.clamp(min=1e-8)
        grad = (x0_fake - x0_real) / _expand(size, z)
    return _squared_error(x_hat, (x_hat - grad).detach()).mean()


def fake_score_loss(fake, x_hat, *, shift=1.0, **cond):
    """Flow matching of the fake score on the student's samples x_hat (B, ...), which get no gradient."""
    return flow_matching_loss(fake, x_hat.detach(), shift=shift, **cond)


# ------------------------------------------------------------------------------------------------------------
# 6. The baseline: consistency distillation
#
# It learns only r = 0: f(z, t) = Phi_{0<-t}(z). To take several steps it must return to noise after each,
#     x = f(z_t, t),     z_r = (1 - r) x + r eps'   with FRESH noise eps',                                   (6)
# which leaves the ODE path: the sample forgets where it came from, and every step adds an error of its own.
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def consistency_sample(model, noise, steps, *, shift=1.0, path=False, **cond):
    """From noise (B, ...) to a sample by eq. (6) in `steps` calls; path=True: all states, (steps + 1, B, ...)."""
    grid = time_grid(steps, shift).tolist()
    states = [noise]
    for t, r in zip(grid[:-1], grid[1:]):
        z = _renoised_step(model, states[-1], t, r, **cond)
        states = states + [z] if path else [z]
    return torch.stack(states) if path else states[-1]


def consistency_loss(model, teacher, x, *, steps=50, t=None, noise=None, shift=1.0, guidance=1.0, null=None,
                     weight=None, **cond):
    """|| f(z_t, t) - stopgrad f(z_s, s) ||^2, z_s one midpoint step of the teacher below z_t: both on one ODE path.

    At s = 0, f(z, 0) = z is exact; from there the truth spreads upwards, step by step. Heun's step would ask for
    v(z, s) at s near 0, where it is not the limit of v on the path: a clean sample does not tell its noise.
    steps: how many of them divide [0, 1]. t: (B,) BEFORE the shift, uniform if not given. weight: a function of t,
    1 if not given.
    """
    if not steps >= 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    tau = torch.rand(len(x), device=x.device) if t is None else t
    noise = torch.randn_like(x) if noise is None else noise
    t, s = shift_time(tau, shift), shift_time((tau - 1 / steps).clamp(min=0), shift)
    z = interpolate(x, noise, t)
    with torch.no_grad():
        v = guided(teacher, z, t, t, guidance, null, **cond)
        middle = (t + s) / 2
        v = guided(teacher, z - _expand(t - middle, z) * v, middle, middle, guidance, null, **cond)
        target = jump(model, z - _expand(t - s, z) * v, s, 0.0, **cond)
    error = _squared_error(jump(model, z, t, 0.0, **cond), target)
    return (error if weight is None else _expand(weight(t), x) * error).mean()


def consistency_simulation(model, noise, grid, k, **cond):
    """The rollout that (4) replaces, x_hat (as noise): k steps of (6) without gradient, then f(z, t) with it."""
    if not 0 <= k < len(grid) - 1:
        raise ValueError(f"k is {k}, expected 0 to {len(grid) - 2} for a grid of {len(grid) - 1} steps")
    z = noise
    for t, r in zip(grid[:k].tolist(), grid[1:k + 1].tolist()):
        z = _renoised_step(model, z, t, r, **cond)
    return jump(model, z, float(grid[k]), 0.0, **cond)


@torch.no_grad()
def _renoised_step(model, z, t, r, **cond):
    """Eq. (6): z_t -> x = f(z_t, t) -> z_r with fresh noise."""
    x = jump(model, z, t, 0.0, **cond)
    return interpolate(x, torch.randn_like(x), r)
