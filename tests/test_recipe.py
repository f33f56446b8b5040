"""Three steps of the published recipe against the formulas of the paper, written out here once more.

Both sides take the same numbers: data, noise, times, N, k. No loss, jump or grid of anyflow.py is called.
"""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train
from full.data import preset
from model import Wan
from toy.world import World

G, EPS, SHIFT, BATCH = 3.0, 0.005, 5.0, 4


def wide(t):
    return t.reshape(*t.shape, *[1] * (5 - t.ndim))


def shifted(t):
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def stage_1(model, b):
    """u' = (u_c - (1 - g) u_null) / g against (eps - x) - (t - r) du/dt / g, weighted and balanced."""
    v, t, r, text = b.noise - b.x, b.t, b.r, b.cond
    z = (1 - wide(t)) * b.x + wide(t) * b.noise
    u = model(z, t, r, **text)
    with torch.no_grad():
        u_null = model(z, t, r, **(text | b.null))
        up, down = (t + EPS).clamp(max=1), (t - EPS).clamp(min=0)
        at = [model(z + wide(s - t) * v, s, r, **text) for s in (up, down)]
        target = v - wide(t - r) * (at[0] - at[1]) / wide(up - down) / G
    grid = shifted(torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1])
    weight = t * (1 - t).sqrt() / (grid * (1 - grid).sqrt()).mean()
    loss = weight * ((u - (1 - G) * u_null) / G - target).square().mean((1, 2, 3, 4))
    anchors = loss[t == r].detach().mean()
    return torch.where(t == r, loss, loss * anchors / (loss.detach() + 1e-5)).mean()


def whole_clip(model, b):
    """The guided loss at r = t on a clip without chunks."""
    t, text = b.t_clip, b.cond["text"]
    z = (1 - wide(t)) * b.clip + wide(t) * b.clip_noise
    with torch.no_grad():
        u_null = model(z, t, t, b.null["text"])
    error = (model(z, t, t, text) - (1 - G) * u_null) / G - (b.clip_noise - b.clip)
    return error.square().mean()


def rollout(model, b, recipe, chunks):
    """x_hat, and t and noise of DMD: numbers drawn as in `train.Clips`, jumps as in eq. (4) of anyflow.py."""
    t = shifted(torch.rand(BATCH, generator=b.common))
    noise = b.noise_of(1)
    n = recipe.rollout_steps[torch.randint(len(recipe.rollout_steps), (), generator=b.common).item()]
    k = torch.randint(n, (), generator=b.common).item()
    grid = shifted(torch.linspace(1, 0, n + 1, dtype=torch.float64)).tolist()
    times = sorted({1.0, grid[k], grid[k + 1], 0.0}, reverse=True)

    def jumps(z, u):
        for s, e in zip(times[:-1], times[1:]):
            z = z - (s - e) * u(z, torch.full((BATCH,), s), torch.full((BATCH,), e))
        return z

    if chunks is None:
        return jumps(b.clip_noise, lambda z, s, e: model(z, s, e, b.text)), t, noise
    made, cache = [], model.new_cache()  # of finished chunks, without gradient
    for part in b.clip_noise.split(chunks, 1):
        made.append(jumps(part, lambda z, s, e: model(z, s, e, b.text, cache=cache)))
        model.extend(cache, made[-1].detach(), b.text)
    return torch.cat(made, 1), t, noise


def dmd(x_hat, judge, fake, t, noise, b):
    """|| x_hat - sg(x_hat - (x0_fake - real) / mean|x_hat - real|) ||^2, real = x0_c + 3 (x0_c - x0_null)."""
    with torch.no_grad():
        z = (1 - wide(t)) * x_hat + wide(t) * noise
        x0 = lambda net, text: z - wide(t) * net(z, t, t, text)
        good, bad = x0(judge, b.text), x0(judge, b.null["text"])
        real = good + 3 * (good - bad)
        size = (x_hat - real).abs().mean((1, 2, 3, 4), keepdim=True)
        target = x_hat - (x0(fake, b.text) - real) / size
    return (x_hat - target).square().mean()


def grads(loss, net):
    return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)


@pytest.mark.parametrize("kind", ["anyflow", "causal"])
@pytest.mark.parametrize("stage", ["flowmap", "onpolicy"])
def test_three_steps_have_the_gradients_of_the_papers_formulas(kind, stage):
    config, shape = preset("tiny-causal" if kind == "causal" else "tiny")
    config = replace(config, num_layers=2)
    changes = dict(batch=BATCH, lora=0, dtype="float32", checkpointing="none", compile=False, clip=1e9,
                   drop=0.5, bidirectional=1.0)
    recipe = train.recipe_of("wan-1.3b", stage, changes)
    nets = {"student": Wan(config)}
    if stage == "onpolicy":
        judge = Wan(replace(config, kind="teacher"))
        nets |= {"judge": judge.requires_grad_(False), "fake": copy.deepcopy(judge).requires_grad_(True)}
    roles, found = [role for role in nets if role != "judge"], {}

    class Kept(torch.optim.SGD):
        def step(self):
            role = next(name for name in roles if self is optimisers[name])
            found[role] = [None if p.grad is None else p.grad.clone() for p in nets[role].parameters()]
            after[role] = copy.deepcopy(nets["student"])
            super().step()

    optimisers, after = {role: Kept(nets[role].parameters(), 1e-3) for role in roles}, {}
    weights = {role: dict(nets[role].named_parameters()) for role in roles}
    run = SimpleNamespace(nets=nets, trained=weights, optimisers=optimisers, step=0, newest=str,
                          update_average=lambda recipe: None)
    clips = train.Clips(World(), recipe, nets["student"].config, shape, torch.device("cpu"), seed=1)
    chunks = config.chunk_partition if kind == "causal" else None
    steps = train.train(stage, recipe, run, clips)
    for step in range(3):
        before = {role: copy.deepcopy(net) for role, net in nets.items()}
        next(steps)
        b = clips.batch(step, 0)
        student, wanted = before["student"], {}
        dropped = (b.cond["text"] == b.null["text"]).flatten(1).all(1)
        loss = stage_1(student, b)
        if stage == "onpolicy":
            x_hat, t, noise = rollout(student, b, recipe, chunks)
            loss = loss + dmd(x_hat, before["judge"], before["fake"], t, noise, b)
            fresh = clips.batch(step, 0, 1)
            with torch.no_grad():
                x_hat, _, _ = rollout(after["fake"], fresh, recipe, chunks)
            common = train.generator(1, fresh.number, 1)
            t = shifted(torch.randn(BATCH, generator=common).sigmoid())
            noise = fresh.noise_of(2)
            z = (1 - wide(t)) * x_hat + wide(t) * noise
            fake = before["fake"]
            wanted["fake"] = grads((fake(z, t, t, fresh.text) - (noise - x_hat)).square().mean(), fake)
        elif kind == "causal":
            loss = loss + whole_clip(student, b)
        wanted["student"] = grads(loss, student)
        assert 0 < dropped.sum() or step, "the first step has a dropped prompt"
        for role in roles:
            size = torch.cat([g.flatten() for g in wanted[role] if g is not None]).norm()
            for a, g in zip(found[role], wanted[role]):
                assert (a is None) == (g is None), (step, role)
                assert a is None or (a - g).norm() < 1e-5 * size, (step, role)

