"""AnyFlow (arXiv 2605.13724): any-step diffusion by on-policy flow-map distillation, for any u(z, t, r).

Read from top to bottom; each part needs those above it (but for words on teachers and (6) at the samplers).

    1  lines       a straight line joins data and noise; the time grid
    2  flow map    one network call jumps from time t to ANY earlier time r; the samplers
    3  teacher     flow matching: at r = t the network is the velocity of an ODE
    4  stage 1     learn the jumps by differentiating their definition (off-policy: the states come from data)
    5  stage 2     learn from the student's own samples (on-policy), through a rollout of three jumps
    6  baseline    consistency distillation, which knows only jumps to the end
    7  times       where a sampler of few calls should stop on its way

Notation: x data, eps standard normal noise (`noise` in code; there `eps` is a finite difference), t in [0, 1]
with t = 1 pure noise, z_t the state at time t, v the instantaneous and u the AVERAGE velocity. All times are
AFTER any shift. A state is (B, n, ...): (B, 2) for points, (B, F, C, H, W) for video. A time is a float, (B,)
for one a sample, or (B, F) for one a frame. Random numbers not given come from torch's global generator.

The contract of a network (fine print can wait). Whatever keeps it, video or molecules, can be trained here.

    u = model(z, t, r, **cond)      t, r: tensors (B,) or (B, F) in [0, 1]; u has the shape of z

    - It is asked for every r <= t; by `central_difference`, which moves t and not r, for r up to `eps` above
      t; and, by samplers that hold given frames at t = 0, for any r at those frames.
    - The answer for one sample does not depend on the others in the batch: no batch statistics.
    - Two calls with one input give one answer: no dropout.
    - It is smooth in t over a distance of eps: `central_difference` averages whatever is faster.
    - Tensors in `cond`, in lists, tuples and dicts too, have the batch as first dimension; the rest is handed
      on as it is. `null` is a dict of the entries of `cond` that the null prompt replaces.
    - Under torch.distributed all processes call the losses together, with batches of one size.
"""
import torch

# ---- 1. Lines from data to noise ---------------------------------------------------------------------------

def shift_time(t, shift):
    """Move times towards noise, where large clips are decided (AnyFlow: s = 5): t -> s t / (1 + (s - 1) t).

    t: float or tensor in [0, 1]. shift: s > 0; 1/s undoes s. ValueError for other shifts.
    """
    if not 0 < shift < torch.inf:
        raise ValueError(f"shift is {shift}, expected a finite number above 0")
    return shift * t / (1 - t + shift * t)  # exactly 1 at t = 1, which 1 + (s - 1) t would miss by rounding

def time_grid(steps, shift=1.0):
    """The times that a sampler of `steps` network calls visits: float64 (steps + 1,), falling from 1 to 0.

    steps: how many, for even times, then shifted; or the times themselves (list or tensor), not shifted.
    """
    steps = steps.item() if getattr(steps, "ndim", 1) == 0 else steps
    if isinstance(steps, int) and steps >= 1:
        return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    grid = torch.as_tensor(() if isinstance(steps, (int, float, str)) else steps, dtype=torch.float64)
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or not (grid.diff() < 0).all():
        raise ValueError(f"steps is {steps}, expected an integer of at least 1, or times from 1 down to 0")
    return grid

def interpolate(x, noise, t):
    """The state z_t = (1 - t) x + t eps (as x) on the straight line between them, whose slope is eps - x."""
    if noise.shape != x.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {tuple(x.shape)} as x")
    t = _expand(as_times(x, t)[0], x)
    return ((1 - t) * x + t * noise).to(x.dtype)

def as_times(z, *times):
    """Floats, (B,) or (B, F) -> tensors, all (B,) or all (B, F), on z's device, in float32 or finer.
    ValueError for another shape, and for values outside [0, 1] (which a compiled function cannot see)."""
    if not z.is_floating_point():
        raise ValueError(f"a state is of {z.dtype}, expected floating point")
    tensors = []
    for time in times:
        time = time if torch.is_tensor(time) else torch.tensor(time, dtype=torch.float64)
        if time.shape not in ((), z.shape[:1], z.shape[:2]):
            wanted = f"a float, ({len(z)},) or {tuple(z.shape[:2])}"
            raise ValueError(f"a time has shape {tuple(time.shape)}, expected {wanted}")
        if not torch.compiler.is_compiling() and not ((0 <= time) & (time <= 1)).all():
            raise ValueError(f"times are in [{time.min():.4g}, {time.max():.4g}], expected [0, 1]")
        time = time.to(z.device, torch.promote_types(z.dtype, torch.float32))
        tensors.append(time.expand(len(z)) if time.ndim == 0 else time)
    if len({time.ndim for time in tensors}) > 1:
        tensors = [time[:, None].expand(z.shape[:2]) if time.ndim == 1 else time for time in tensors]
    return tensors

def _falling(z, t, r):
    """`as_times` of t and r, with r <= t."""
    t, r = as_times(z, t, r)
    if not torch.compiler.is_compiling() and not (r <= t).all():
        raise ValueError(f"found r above t by up to {(r - t).max():.4g}, expected r <= t")
    return t, r

def _expand(t, z):
    """(B,) or (B, F) -> (B, 1, ..., 1) or (B, F, 1, ..., 1), to multiply with z."""
    return t.reshape(t.shape + (1,) * (z.ndim - t.ndim))


# ---- 2. The flow map and the samplers ----------------------------------------------------------------------
# Many lines pass through one point z at time t. Their mean slope there is v(z, t) = E[eps - x | z_t = z]; the
# ODE dz/dt = v(z, t) carries noise to data as the lines do. The average of v along its path, over [r, t], is
#     u(z_t, t, r) = 1/(t - r) * integral_r^t v(z_s, s) ds,      u(z, t, t) = v(z, t),                     (1)
# so a network that knows u jumps from t to r in one call, over any distance, without discretisation error:
#     Phi_{r<-t}(z) = z - (t - r) u(z, t, r)                                                               (2)
# Two jumps make one, Phi_{r<-s}(Phi_{s<-t}(z)) = Phi_{r<-t}(z): any number of steps leads to the same sample.

def jump(model, z, t, r, **cond):
    """Phi_{r<-t}(z), eq. (2): the state (as z) at time r <= t of the ODE path that passes z at time t."""
    t, r = _falling(z, t, r)
    u = model(z, t, r, **cond).expand_as(z)  # an error where (B,) for (B, 1) would make (B, B)
    return (z - _expand(t - r, z) * u).to(z.dtype)

def guided(model, z, t, r, guidance=1.0, null=None, **cond):
    """Classifier-free guidance, meant for r = t: u_null + g (u_cond - u_null), two calls; one for g = 1."""
    u = model(z, t, r, **cond)
    if guidance == 1:
        return u
    u_null = model(z, t, r, **(cond | _given(null, guidance)))
    return u_null + guidance * (u - u_null)

def _given(null, guidance):
    if null is None:
        raise ValueError(f"guidance {guidance} needs the null prompt: expected null=dict(...), found None")
    return null

@torch.no_grad()
def sample(model, noise, steps, *, shift=1.0, guidance=1.0, null=None, average=True, gamma=0.0, path=False,
           **cond):
    """From noise (B, ...) at t = 1 to a sample at t = 0 in `steps` jumps, or by any times, see `time_grid`.

    average=True is the flow-map sampler. average=False asks for the velocity at (t, t) and follows it in a
    straight line: Euler's method, which a teacher needs, with an error that falls as 1/steps.
    gamma in [0, 1] returns to noise after every jump, see `_visit`: 0 stays on the ODE path, 1 is eq. (6).
    Returns the sample (as noise), or with path=True every state, (steps + 1, B, ...). Raises ValueError.
    """
    def u(z, t, r, **cond):
        return guided(model, z, t, r if average else t, guidance, null, **cond)

    states = _visit(u, noise, time_grid(steps, shift).tolist(), gamma, **cond)
    return torch.stack(states) if path else states[-1]

def _visit(model, z, grid, gamma=0.0, **cond):
    """The states at the times of a falling grid, z at the first of them: one jump, one network call each.

    With gamma, a jump from t ends below r, at s = (1 - gamma) r, and FRESH noise leads up to r (2402.19159):
    z_r = a z_s + sqrt(r^2 - a^2 s^2) eps', a = (1 - r)/(1 - s). Errors shrink by a, but jumps are longer.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}, expected a number in [0, 1]")
    states = [z]
    for t, r in zip(grid[:-1], grid[1:]):
        s = (1 - gamma) * r
        z = jump(model, z, t, s, **cond)
        if gamma:
            a = (1 - r) / (1 - s)
            z = a * z + (r * r - (a * s) ** 2) ** 0.5 * torch.randn_like(z)
        states.append(z)
    return states


# ---- 3. The teacher: flow matching -------------------------------------------------------------------------
# Regression of the slopes eps - x on z_t finds their mean, v. The network is asked for u at r = t, so that
# teacher and student are one architecture.

def flow_matching_loss(model, x, *, t=None, noise=None, shift=1.0, **cond):
    """mean || model(z_t, t, t) - (eps - x) ||^2 over data x (B, ...). Scalar with gradient.

    t: float, (B,) or (B, F), logit-normal and shifted if not given. noise: eps, as x, drawn if not given.
    """
    t = shift_time(torch.randn(len(x), device=x.device).sigmoid(), shift) if t is None else t  # most mid-way
    (t,) = as_times(x, t)
    noise = torch.randn_like(x) if noise is None else noise
    u = model(interpolate(x, noise, t), t, t, **cond)
    return _squared_error(u, noise - x).mean()

def _squared_error(a, b):
    """(a - b)^2, in float32 or finer."""
    return (a.expand_as(b).to(torch.promote_types(a.dtype, torch.float32)) - b).square()

@torch.no_grad()
def update_average(average, weights, updates, decay, ramp=True):
    """Move `average`, which is sampled with, towards `weights` (lists of tensors), in place: by 1 - decay, or
    all the way before its first update, 0. ramp: by more while it is young, for short runs; not published."""
    young = (updates + 1) / (updates + 10) if ramp else 1.0
    decay = min(decay, young) if updates >= 0 else 0.0
    torch._foreach_lerp_(average, weights, 1 - decay)


# ---- 4. Stage 1: forward flow-map training -----------------------------------------------------------------
# By (1), (t - r) u = integral_r^t v ds. Differentiated along the path, r fixed: u + (t - r) du/dt = v, or
#     u(z_t, t, r) = v(z_t, t) - (t - r) du/dt,     du/dt = d_t u + v . grad_z u                           (3)
# (MeanFlow, 2505.13447). The right side is the target, a constant: only the left side's call has a gradient.
# It is linear in v, so eps - x, whose mean given z_t is v, may stand for v. Where r = t, it is flow matching:
# half of a batch are such ANCHORS. Without them errors of JUMPS, the other half, spoil v (toy/README.md).

def time_pairs(batch, shift=1.0, diffusion=0.5, endpoint=0.25, device=None, generator=None):
    """Training times t >= r, each (batch,): the larger and smaller of two uniforms, shifted.

    A share `diffusion` of the batch, the first ones, are anchors, r = t; the next share `endpoint` has r = 0,
    where every run ends. Shares are exact where they divide the batch, and elsewhere hold in the mean.
    """
    draw = lambda *shape: torch.rand(*shape, device=device, generator=generator)
    t, r = shift_time(draw(2, batch), shift).sort(dim=0, descending=True).values
    slot = (torch.arange(batch, device=device) + draw(())) / batch
    return t, torch.where(slot < diffusion, t, torch.where(slot < diffusion + endpoint, 0, r))

def time_weight(t, shift=1.0):
    """The paper's weight w(t) = t sqrt(1 - t) / mean, as t; the mean is over a shifted grid of 1000 times."""
    w = lambda t: t * (1 - t).sqrt()
    return w(t) / w(time_grid(1000, shift)[:-1]).mean().item()

@torch.no_grad()
def central_difference(model, z, v, t, r, eps=0.005, **cond):
    """du/dt of eq. (3), shaped as z: [u(z + e v, t + e, r) - u(z - e v, t - e, r)] / 2e, no gradient.

    It is u's mean slope on a straight line from t - e to t + e: for u smooth at that scale du/dt, to O(e^2).
    Of sin(a t) it gives the derivative times sin(a e)/(a e): with the published e = 0.005 and the fastest
    sinusoid of Wan's time embedding, a = 1000, times -0.19. It needs forwards alone: Jacobian-vector products
    fail in flash and flex attention (and FSDP2 up to torch 2.11). One call takes both times, clamped: next to
    0 and 1 the difference is one-sided, to O(e). Bfloat16 rounds e v away in z, and is noise in the work.
    """
    t, r = as_times(z, t, r)
    later, earlier = (t + eps).clamp(max=1), (t - eps).clamp(min=0)
    both = torch.cat([z + _expand(later - t, z) * v, z + _expand(earlier - t, z) * v]).to(z.dtype)
    twice = _each_tensor(cond, lambda c: torch.cat([c, c]))
    plus, minus = model(both, torch.cat([later, earlier]), torch.cat([r, r]), **twice).chunk(2)
    return (plus - minus) / _expand(later - earlier, z)

GUIDANCE_FORMS = ("published", "consistent")

def flow_map_loss(model, x, *, t=None, r=None, noise=None, shift=1.0, teacher=None, data_anchors=False,
                  guidance=1.0, guidance_form="published", null=None, weight=None, balance=None,
                  anchor_sums=None, eps=0.005, parts=False, **cond):
    """Regression of u(z_t, t, r) on the right side of eq. (3) over data x (B, ...). Scalar with gradient.

    teacher: a network whose velocity the target has, with less variance than the data's eps - x.
    data_anchors: the teacher's velocity is for the jumps only, and anchors keep the data's.

    guidance g is built into the student: it is then sampled without, at half the cost. Its velocity becomes
    g v + (1 - g) v_null, v_null its own at `null`, learnt where cond IS null (drop some). Of two forms,
        "published"   u = g v + (1 - g) u(z_t, t, r; null) - (t - r) du/dt,   du/dt along v,
        "consistent"  u = v' - (t - r) du/dt, v' = g v + (1 - g) u(z_t, t, t; null), du/dt along v',
    equal at r = t. The fixed point of the second is the guided ODE's flow map; that of the first is none, not
    even at `null`, where du/dt counts 1/g (`python tests/guidance.py`). A teacher's v' has its own v_null.

    t, r, noise: drawn by `time_pairs` and from the normal if not given; frames of a sample have one t - r.
    weight: a function of t, or else `time_weight`. balance, anchor_sums: see `_balance`; None: balance where
    anchors are the data's. parts: also returns squared errors / g^2 (B,), unweighted, and which are jumps.
    """
    if (t is None) != (r is None):
        raise ValueError(f"found only {'t' if r is None else 'r'}, expected both t and r or neither")
    if not guidance > 0:
        raise ValueError(f"guidance is {guidance}, expected a number above 0")
    if guidance_form not in GUIDANCE_FORMS:
        raise ValueError(f"guidance_form is {guidance_form!r}, expected one of {', '.join(GUIDANCE_FORMS)}")
    t, r = time_pairs(len(x), shift, device=x.device) if t is None else (t, r)
    t, r = _falling(x, t, r)
    noise = torch.randn_like(x) if noise is None else noise
    gaps = (t - r).reshape(len(x), -1)
    if (gaps - gaps[:, :1]).abs().max() > 1e-5:
        raise ValueError("t - r differs between the frames of a sample, expected one")
    z, jumps = interpolate(x, noise, t), gaps[:, 0] > 0
    form = guidance_form if guidance != 1 else None
    guide = lambda v, r: guidance * v + (1 - guidance) * model(z, t, r, **(cond | _given(null, guidance)))
    u = model(z, t, r, **cond)
    with torch.no_grad():
        v = noise - x
        if form == "consistent" and (teacher is None or data_anchors):
            v = guide(v, t)
        if teacher is not None:
            of_teacher = guided(teacher, z, t, t, guidance if form == "consistent" else 1, null, **cond)
            v = torch.where(_expand(jumps, z), of_teacher, v) if data_anchors else of_teacher
        du = _derivative_of_jumps(model, z, v, t, r, jumps, eps, **cond)
        target = (guide(v, r) if form == "published" else v) - (_expand(t - r, z) * du).to(v.dtype)

    error = _squared_error(u, target) / guidance**2  # which keeps the scale of the unguided error
    w = time_weight(t, shift) if weight is None else weight(t)
    loss = (_expand(w, x) * error).flatten(1).mean(1)  # (B,)
    balance = teacher is None or data_anchors if balance is None else balance
    loss = (_balance(loss, jumps, anchor_sums) if balance else loss).mean()
    return (loss, error.detach().flatten(1).mean(1), jumps) if parts else loss

def _derivative_of_jumps(model, z, v, t, r, jumps, eps, **cond):
    """du/dt (shaped as z) of jumps. At an anchor, where t - r is zero, it is not computed but 0."""
    du = torch.zeros_like(z, dtype=torch.promote_types(z.dtype, torch.float32))
    if sum_over_processes(jumps.sum()) > 0:
        # Sharded processes must call the network equally often: one without a jump takes its first sample.
        i = jumps.nonzero()[:, 0] if jumps.any() else torch.zeros(1, dtype=torch.long, device=z.device)
        some = _each_tensor(cond, lambda c: c[i])
        du[i] = central_difference(model, z[i], v[i], t[i], r[i], eps, **some).to(du.dtype)
    return du

def _each_tensor(cond, function):
    """cond with function applied to its tensors, at any depth of dicts, lists and tuples."""
    if isinstance(cond, dict):
        return {key: _each_tensor(value, function) for key, value in cond.items()}
    if isinstance(cond, (list, tuple)):
        return getattr(cond, "_make", type(cond))(_each_tensor(value, function) for value in cond)
    return function(cond) if torch.is_tensor(cond) else cond

def _balance(loss, jumps, sums=None, tiny=1e-5):
    """Losses (B,), each jump's l times the constant (anchors' mean) / l: jumps shall not drown anchors.

    It cancels w(t) of a jump (if a sample has one time). Every jump then logs the same loss: `parts` returns
    the true errors. It needs samples of many numbers (over a point's two, 1/l is noise) and anchors from
    data: a student that starts as its teacher has no error against it, and the mean would be 0.
    The mean is over all processes and, with `sums`, a tensor (2,) that is zero at the start of a step, over
    its micro-batches: exact if anchors come first. Without an anchor, nothing is rescaled.
    """
    anchors = (~jumps).to(loss.dtype)
    found = sum_over_processes(torch.stack([(anchors * loss.detach()).sum(), anchors.sum()]))
    total, count = found if sums is None else sums.add_(found)
    if count == 0:
        return loss
    return torch.where(jumps, loss * total / count / (loss.detach() + tiny), loss)

def sum_over_processes(x):
    """The sum of x over all processes, where there are several: the batch is what they hold together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        x = x.clone()
        torch.distributed.all_reduce(x)
    return x


# ---- 5. Stage 2: on-policy distillation --------------------------------------------------------------------
# Stage 1 sees states made from data. A student that samples sees its own, with the errors of its earlier
# jumps in them. So let it sample, judge the sample x_hat, and send the gradient back. All N steps of a run
# would cost too much: step k is made as it is. One jump stands for those before it, one for those after it,
# which lead to the same states if u is exact. The gradient passes through all three:
#     noise --(jump)--> z at grid[k] --(step k)--> z at grid[k+1] --(jump)--> x_hat                        (4)

def backward_simulation(model, noise, grid, k, **cond):
    """x_hat (as noise) by eq. (4), with gradient through all its calls: at most three, without empty jumps.

    noise: (B, ...) at t = 1. grid: of `time_grid`; k: one of its steps, 0 <= k < steps, drawn anew.
    """
    return _visit(model, noise, sorted({1.0, *_step(grid, k), 0.0}, reverse=True), **cond)[-1]

def _step(grid, k):
    if not 0 <= k < len(grid) - 1:
        raise ValueError(f"k is {k}, expected 0 to {len(grid) - 2} for a grid of {len(grid) - 1} steps")
    return grid[k : k + 2].tolist()

def dmd_loss(x_hat, judge, fake, *, t=None, noise=None, shift=1.0, guidance=1.0, null=None, per_sample=True,
             **cond):
    """Distribution matching (DMD, 2311.18828): its gradient moves samples x_hat (B, ...) to the teacher's.

    A network expects x0 = z_t - t v(z_t, t) behind z_t; its score is ((1 - t) x0 - z_t) / t^2. For x_hat,
    KL(student || teacher) at time t has the gradient (1 - t) (score_fake - score_judge), or (1 - t)^2 / t^2
    (x0_fake - x0_judge); (5) weighs it otherwise. `judge` is the frozen teacher, with guidance; `fake` starts
    as its copy and learns the student's samples. Loss: mean (x_hat - stopgrad(x_hat - grad))^2,
        grad = (x0_fake - x0_judge) / mean|x_hat - x0_judge|                                               (5)

    t, noise: uniform, then shifted, and normal if not given. guidance: as in `guided`, 4 for the release's
    x0_cond + 3 (x0_cond - x0_null); with it DMD aims beyond the guided ODE (`python tests/guidance.py`).
    per_sample: the mean in (5) is over each sample, as published, or the batch, for samples of few numbers.
    """
    t = shift_time(torch.rand(len(x_hat), device=x_hat.device), shift) if t is None else t
    noise = torch.randn_like(x_hat) if noise is None else noise
    (t,) = as_times(x_hat, t)
    with torch.no_grad():
        z = interpolate(x_hat, noise, t)
        x0_judge = z - _expand(t, z) * guided(judge, z, t, t, guidance, null, **cond)
        x0_fake = z - _expand(t, z) * fake(z, t, t, **cond)
        size = (x_hat - x0_judge).abs().flatten(1).mean(1)
        if not per_sample:
            total, count = sum_over_processes(torch.stack([size.sum(), size.new_tensor(len(size))]))
            size = (total / count).expand(len(size))
        grad = (x0_fake - x0_judge) / _expand(size.clamp(min=1e-8), z)
    return _squared_error(x_hat, (x_hat - grad).detach()).mean()

def fake_score_loss(fake, x_hat, *, repeats=1, shift=1.0, **cond):
    """Flow matching of the fake score on the student's samples x_hat (B, ...), which get no gradient.

    cond: also t and noise, if they are given. repeats: how many of them are drawn for a sample, if not.
    """
    repeat = lambda c: c.repeat_interleave(repeats, 0)
    return flow_matching_loss(fake, repeat(x_hat.detach()), shift=shift, **_each_tensor(cond, repeat))

def on_policy_step(batches, rollout, stage_1, judge, fake, backward, update, *, fresh=None, dmd_weight=1.0,
                   fake_steps=1):
    """One step of stage 2, whole. The student learns, the judge is frozen, the fake score follows.

        noise --student, eq. (4)--> x_hat --+--> z_t --+--> judge --> x0_judge --+
                                            |          +--> fake ---> x0_fake ---+--> eq. (5) -----> student
        data ---------------- eq. (3), the loss of stage 1 ----------------------------------------> student
                                            +--> detached, flow matching --------------------------> fake

    First the student learns, then the fake score: on the judged samples (one rollout serves both, but they
    are one update old) or, as published, on FRESH ones of the updated student (a second rollout, without
    gradient). If the fake score lags, the student follows its error: take more fake_steps or a slower
    student. Stage 1's loss keeps the jumps that (4) does not visit.

    batches                what each backward pass takes: a batch, or its micro-batches one by one
    fresh(i)               such batches for the i-th update of the fake score; None: those of `batches` again
    stage_1(batch)         the loss of stage 1, a scalar with gradient
    rollout(batch)         x_hat, with gradient; dict dmd_options of `dmd_loss`; fake_options(i), a dict of
                           `fake_score_loss` in update i; dict cond, which judge and fake score are given
    backward(name, loss)   adds the gradients of a loss: "loss" (stage 1), "dmd" or "fake"
    update(name)           steps with and clears the gradients of "student" or, fake_steps times, of "fake"
    """
    judged = []
    for batch in batches:
        backward("loss", stage_1(batch))
        x_hat, dmd_options, fake_options, cond = rollout(batch)
        backward("dmd", dmd_weight * dmd_loss(x_hat, judge, fake, **dmd_options, **cond))
        judged.append((x_hat.detach(), None, fake_options, cond))
    update("student")

    for i in range(fake_steps):
        samples = map(torch.no_grad()(rollout), fresh(i)) if fresh else judged
        for x_hat, _, fake_options, cond in samples:
            backward("fake", fake_score_loss(fake, x_hat, **fake_options(i), **cond))
        update("fake")


# ---- 6. The baseline: consistency distillation -------------------------------------------------------------
# It learns only r = 0: f(z, t) = Phi_{0<-t}(z). To take several steps it must return to noise after each,
#     x = f(z_t, t),     z_r = (1 - r) x + r eps'   with FRESH noise eps',                                 (6)
# which leaves the ODE path. More steps make AnyFlow's jumps shorter; these go to 0, each with its error.

def consistency_sample(model, noise, steps, *, shift=1.0, path=False, **cond):
    """From noise (B, ...) to a sample by eq. (6) in `steps` calls. path=True: every state, as in `sample`."""
    return sample(model, noise, steps, shift=shift, gamma=1.0, path=path, **cond)

def consistency_loss(model, teacher, x, *, steps=50, t=None, noise=None, shift=1.0, guidance=1.0, null=None,
                     weight=None, **cond):
    """|| f(z_t, t) - stopgrad f(z_s, s) ||^2, z_s one midpoint step of the teacher below z_t on its ODE path.

    f(z, 0) = z is exact; training carries it upwards from s = 0, step by step. Midpoints, not Heun's step:
    that asks for v at s, also at s = 0, where on data of low dimension v has no limit.
    steps: how many of them divide [0, 1], evenly before the shift. t: (B,), uniform and shifted if not given.
    weight: a function of t, 1 if not given.
    """
    if not steps >= 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    t = shift_time(torch.rand(len(x), device=x.device), shift) if t is None else t
    noise = torch.randn_like(x) if noise is None else noise
    (t,) = as_times(x, t)
    s = shift_time((shift_time(t, 1 / shift) - 1 / steps).clamp(min=0), shift)
    z, middle = interpolate(x, noise, t), (t + s) / 2
    step = lambda v, r: (z - _expand(t - r, z) * v).to(z.dtype)
    with torch.no_grad():
        v = guided(teacher, z, t, t, guidance, null, **cond)
        v = guided(teacher, step(v, middle), middle, middle, guidance, null, **cond)
        target = jump(model, step(v, s), s, 0.0, **cond)
    error = _squared_error(jump(model, z, t, 0.0, **cond), target)
    return (error if weight is None else _expand(weight(t), x) * error).mean()

def consistency_simulation(model, noise, grid, k, **cond):
    """The baseline's rollout, in place of (4): k steps of (6) without gradient, then x_hat = f(z, t)."""
    t, _ = _step(grid, k)
    with torch.no_grad():
        z = _visit(model, noise, grid[: k + 1].tolist(), gamma=1.0, **cond)[-1]
    return jump(model, z, t, 0.0, **cond)


# ---- 7. Where to stop on the way ---------------------------------------------------------------------------

@torch.no_grad()
def best_grid(model, noise, steps, *, points=33, shift=1.0, **cond):
    """Times for `sample`, float64 (steps + 1,), out of `points` shifted ones: those of the most exact jumps.

    A jump differs from two half ones by about its error, where short jumps are more exact; one over a single
    interval counts as exact. Errors add up, unless the flow stretches them: dynamic programming finds the
    least sum, RMS over samples from noise (B, ...), in 993 calls for 33 points. steps: a number, or a list.
    """
    wanted = steps if isinstance(steps, (list, tuple)) else [steps]
    if not all(isinstance(n, int) and 1 <= n < points for n in wanted):
        raise ValueError(f"steps is {steps}, expected an integer from 1 to {points - 1}")
    grid, errors = time_grid(points - 1, shift), torch.full((points, points), torch.inf)
    states = _visit(model, noise, grid.tolist(), **cond)
    to = lambda z, i, j: jump(model, z, grid[i].item(), grid[j].item(), **cond)
    for i in range(points - 1):
        ends = {i + 1: states[i + 1]} | {j: to(states[i], i, j) for j in range(i + 2, points)}
        for j, end in ends.items():
            halves = to(ends[(i + j) // 2], (i + j) // 2, j) if j > i + 2 else states[j]
            errors[i, j] = (end - halves).float().square().mean().sqrt()
    found, least, ways = {}, errors[0], [[0, j] for j in range(points)]  # to any time in n jumps, first n = 1
    for n in range(1, max(wanted) + 1):
        found[n] = grid[ways[-1]]
        least, last = (least[:, None] + errors).min(0)
        ways = [ways[i] + [j] for j, i in enumerate(last.tolist())]
    return [found[n] for n in wanted] if wanted is steps else found[steps]
