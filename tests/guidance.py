"""What guided training converges to, exactly, on Gaussians in one dimension: stage 1's two forms, and DMD.

    python tests/guidance.py

Data N(1, 0.5^2) with the prompt, N(0, 1) with the null prompt. Every velocity is then affine in z, and so is
each fixed point of `anyflow.flow_map_loss`: its two numbers A, B in u(z, t, r) = A z + B solve linear ODEs in
t, integrated here. A first table holds samples of both against the guided ODE from the same noise. A second
holds that ODE's distribution against the one where `anyflow.dmd_loss`, with a guided judge, has no gradient.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import anyflow  # noqa: E402

PROMPT, NULL, G = (1.0, 0.5), (0.0, 1.0), 3.0  # mean and deviation of the data; guidance
NFE = (1, 2, 4, 8, 16)

def velocity(data, t):
    """v(z, t) = a z + b of N(mean, deviation^2), E[eps - x | z]: (a, b) as t."""
    mean, deviation = data
    a = (t - (1 - t) * deviation**2) / ((1 - t) ** 2 * deviation**2 + t**2)
    return a, -mean - a * (1 - t) * mean

def guided_velocity(t, g=G):
    """(a, b) of v_null + g (v_prompt - v_null)."""
    return tuple(null + g * (v - null) for v, null in zip(velocity(PROMPT, t), velocity(NULL, t)))

def fixed_point(t, r, form, steps=100):
    """((A, B) of the prompt, (A, B) of the null prompt), u = A z + B where the target IS the output.

    With s = t - r and du/dt = (A' + a A) z + B' + b A along the velocity a z + b, "published" says
        null     s (A' + a A) = g (a - A)                     s (B' + b A) = g (b - B)
        prompt   s (A' + a A) = g a + (1 - g) A_null - A      s (B' + b A) = g b + (1 - g) B_null - B
    and "consistent" says s (A' + a A) = a - A, s (B' + b A) = b - B, of the prompt with guided a, b.
    """
    def step(u, ab, rate, source, s, h):
        """One step, implicit midpoint, of s (A' + a A) = source - rate A, and likewise of B."""
        (A, B), (a, b), decay = u, ab, rate / s
        new_A = (A * (1 - h * (decay + a) / 2) + h * source[0] / s) / (1 + h * (decay + a) / 2)
        drive = source[1] / s - b * (A + new_A) / 2
        return new_A, (B * (1 - h * decay / 2) + h * drive) / (1 + h * decay / 2)

    null, prompt, h = velocity(NULL, r), guided_velocity(r), (t - r) / steps  # at s = 0, u = v
    for i in range(steps):
        s = ((i + 0.5) * h).clamp(min=1e-12)
        a_null, a_prompt, a_guided = velocity(NULL, r + s), velocity(PROMPT, r + s), guided_velocity(r + s)
        before = null
        if form == "published":
            null = step(null, a_null, G, [G * x for x in a_null], s, h)
            source = [G * x + (1 - G) * (old + new) / 2 for x, old, new in zip(a_prompt, before, null)]
            prompt = step(prompt, a_prompt, 1, source, s, h)
        else:
            null, prompt = step(null, a_null, 1, a_null, s, h), step(prompt, a_guided, 1, a_guided, s, h)
    return prompt, null

def network(form):
    """The fixed point as a network: u(z, t, r, prompt), z (B, 1), prompt (B, 1) 1, or 0 for the null one."""
    def model(z, t, r, prompt):
        return sum(which * (A[:, None] * z + B[:, None])
                   for which, (A, B) in zip((prompt, 1 - prompt), fixed_point(t, r, form)))

    return model

def euler(z, t, r, prompt, g=G):
    a, b = guided_velocity(t, g)
    return a[:, None] * z + b[:, None]

def end_of_ode(g):
    """Mean and deviation of what the guided ODE makes of noise N(0, 1): an affine function of it."""
    ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    low, high = anyflow.sample(euler, ends, 2000, average=False, prompt=torch.ones_like(ends), g=g)
    return ((high + low) / 2).item(), ((high - low) / 2).item()

def end_of_dmd(g, steps=3000, times=200):
    """Mean and deviation of a student m + s noise that follows the gradient of `anyflow.dmd_loss`, at uniform
    times, with a judge guided by g and an exact fake score, from N(0, 1).

    All is affine, so its gradient is that of noises of -1 and 1, in the student and in z, with equal weight.
    """
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    start, noise = torch.cartesian_prod(signs, signs).repeat(times, 1)[..., None].unbind(1)
    t = ((torch.arange(times).double() + 0.5) / times).repeat_interleave(4)
    options = dict(t=t, noise=noise, guidance=g, null=dict(prompt=0), per_sample=False, prompt=1)
    of = lambda data, z, t: sum(term * factor for term, factor in zip(velocity(data, t), (z, 1)))
    judge = lambda z, t, r, prompt: of(PROMPT if prompt else NULL, z, t[:, None])
    student = torch.tensor(NULL, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([student], 0.05)
    for _ in range(steps):
        fake = lambda z, t, r, prompt: of(student.tolist(), z, t[:, None])
        anyflow.dmd_loss(student[0] + student[1] * start, judge, fake, **options).backward()
        optimiser.step()
        optimiser.zero_grad()
    return tuple(student.tolist())

def table():
    """{method: [RMS distance to the guided ODE's sample, per NFE]}, over noise N(0, 1)."""
    noise = torch.special.ndtri((torch.arange(99, dtype=torch.float64) + 0.5) / 99)[:, None]
    prompt = torch.ones_like(noise)
    rows = {"guided Euler": euler, "published": network("published"), "consistent": network("consistent")}
    exact = anyflow.sample(euler, noise, 2000, average=False, prompt=prompt)
    return {name: [(anyflow.sample(model, noise, n, prompt=prompt) - exact).square().mean().sqrt().item()
                   for n in NFE] for name, model in rows.items()}

if __name__ == "__main__":
    from toy.plots import table as text

    print(text("RMS distance to the sample of the guided ODE from the same noise, g = 3", NFE, table()))
    ends = {"guided ODE": end_of_ode, "DMD": end_of_dmd}
    rows = {f"{name}: {number}": [end(g)[i] for g in (1, 2, 3)] for name, end in ends.items()
            for i, number in enumerate(("mean", "deviation"))}
    print("\n" + text("where they lead with guidance 1, 2 and 3", (1, 2, 3), rows, corner="guidance"))
