"""One training loop for every stage and every size: a tiny video world on a laptop, Wan 14B on a cluster.

    P="--preset tiny-causal"
    python train.py teacher     $P --out out/teacher                                            # stage 0
    python train.py flowmap     $P --out out/forward --init out/teacher                         # stage 1
    python train.py onpolicy    $P --out out/anyflow --init out/forward --teacher out/teacher   # stage 2
    python train.py consistency $P --out out/consistency --init out/teacher                     # the baseline

First comes the loop, then `Clips`, what is special about video, then `Recipe`, the numbers. A model folder is
the layout of diffusers, as input and as result. Checkpoints are in OUT/checkpoints; `--resume` goes on from
the newest, on a CPU bit for bit. Under torchrun the networks are sharded (FSDP2): see full/README.md.
"""

import full  # noqa: F401  (first: so Ctrl-C during the imports below is heard)

# isort: split
import argparse
import functools
import gc
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import anyflow
import sample
from full.checkpoint import Run, Stop  # networks, optimisers and average, to go on from; SIGTERM
from full.compile import Again, what_needs_less
from full.data import NAMES, Shards, preset  # preset(name): WanConfig and shape of a clip
from full.files import STAGES, append, hold, read_lines, read_log, write
from full.folders import base_of, from_folders, networks  # {"student", "teacher", "judge", "fake": a Wan}
from full.hub import find
from full.options import add_options, check, command, nonempty, option, positive, seed_value
from full.parallel import TRAINED, Means, assemble, clip_norm, main_process, place, start_processes, trained
from full.pixels import save
from toy import plots
from toy.world import WORLDS, ExactTeacher, enlarge

# ---- The loop --------------------------------------------------------------------------------------------

def is_baseline(stage, recipe):
    return stage == "consistency" or (stage == "onpolicy" and recipe.rollout == "consistency")

def loss_from_data(stage, recipe, student, teacher, batch, means, anchor_sums):
    """The loss of a stage on data: stage 2 takes stage 1's; with consistency rollouts, consistency's."""
    if stage == "teacher":
        drawn = dict(t=batch.t_teacher, noise=batch.noise)
        return anyflow.flow_matching_loss(student, batch.x, **drawn, **batch.cond)
    weight = (lambda t: 1 / (t + 0.05)) if recipe.weight == "inverse" else None
    common = dict(noise=batch.noise, shift=recipe.shift, guidance=recipe.guidance, null=batch.null,
                  weight=weight, **batch.cond)
    if is_baseline(stage, recipe):
        return anyflow.consistency_loss(student, teacher, batch.x, t=batch.t_consistency,
                                        steps=recipe.teacher_steps, **common)
    loss, error, jumps = anyflow.flow_map_loss(
        student, batch.x, t=batch.t, r=batch.r, teacher=teacher, data_anchors=recipe.data_anchors,
        balance=recipe.balance, anchor_sums=anchor_sums, eps=recipe.eps, guidance_form=recipe.guidance_form,
        parts=True, **common)
    means.add("anchors", error[~jumps])
    means.add("jumps", error[jumps])
    return loss

def loss_of_whole_clip(stage, recipe, student, batch):
    """Flow matching of a causal model on a clip without chunks; in stage 1 with the recipe's guidance."""
    given = dict(t=batch.t_clip, noise=batch.clip_noise, text=batch.cond["text"])
    if stage == "teacher":
        return anyflow.flow_matching_loss(student, batch.clip, **given)
    return anyflow.flow_map_loss(student, batch.clip, r=batch.t_clip, guidance=recipe.guidance,
                                 null=batch.null, weight=torch.ones_like, balance=False, **given)

def train(stage, recipe, run, clips):
    """Steps until recipe.steps; yields each one's log. Stage 1's loss asks the teacher, DMD the judge."""
    student, teacher, judge, fake = (run.nets.get(role) for role in ("student", "teacher", "judge", "fake"))
    while run.step < recipe.steps:
        started, step, means = time.perf_counter(), run.step, Means()
        lr_scale = learning_rate_at(step, recipe)
        for role, optimiser in run.optimisers.items():
            optimiser.param_groups[0]["lr"] = lr_scale * (recipe.fake_lr if role == "fake" else recipe.lr)

        def backward(name, loss):
            (loss / recipe.accumulate).backward()
            clips.go_back()  # where a rollout's gradient stops at x_hat: on, into the student
            means.add(name, loss.detach()[None])

        def update(role):
            """One step of the role's optimiser, or FloatingPointError where a loss or norm is not finite."""
            norm = clip_norm(run.nets[role], run.trained[role], recipe)
            losses = means.read()
            if not all(map(math.isfinite, (norm, *losses.values()))):
                found = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
                where = f"stage {stage}, step {step}: losses {found}, gradient's norm {norm:.4g}"
                raise FloatingPointError(f"{where}{getattr(clips, 'spoilt', '')}; {run.newest()}")
            run.optimisers[role].step()
            run.optimisers[role].zero_grad()
            means.norms[role] = norm

        anchor_sums = torch.zeros(2, device=clips.device)
        from_data = lambda batch: loss_from_data(stage, recipe, student, teacher, batch, means, anchor_sums)
        batches = lambda draw=0: (clips.batch(step, part, draw) for part in range(recipe.accumulate))
        if stage == "onpolicy":
            rollout = lambda batch: clips.rollout(student, judge, batch)
            fresh = (lambda i: batches(1 + i)) if recipe.fake_samples == "fresh" else None
            anyflow.on_policy_step(batches(), rollout, from_data, judge, fake, backward, update, fresh=fresh,
                                   dmd_weight=recipe.dmd, fake_steps=recipe.fake_steps)
        else:
            for batch in batches():
                backward("loss", from_data(batch))
                if clips.has_whole_clips(step) and stage != "consistency":
                    backward("whole", loss_of_whole_clip(stage, recipe, student, batch))
            update("student")

        run.update_average(recipe)
        run.step += 1
        yield {"step": run.step, **means.read(), "norm": means.norms["student"], "lr": lr_scale * recipe.lr,
               "seconds": time.perf_counter() - started}

def learning_rate_at(step, recipe):
    """A share of its highest value: it rises over `warmup` steps and falls over the last share `decay`."""
    left = (recipe.steps - step) / (recipe.decay * recipe.steps) if recipe.decay else 1.0
    return min(1.0, (step + 1) / max(1, recipe.warmup), left)


# ---- What is special about video: text, chunks, clean copies ---------------------------------------------

class Clips:
    """All that the loop does not know: which frames and numbers a step takes, how a student is rolled out.

    For other data write a class with a `device` and these four functions, and name it in `run_stage` (there
    preset and `open_data` fix the clips' shape; `--sample-every` also asks for `data`, `shape`):
    `batch(step, part, draw)` returns an object with x, noise, cond, null, t, r, t_teacher, t_consistency;
    `rollout(student, judge, batch)` what `anyflow.on_policy_step` asks, x_hat by `backward_simulation` of an
    N and k that it draws; then `go_back()` does nothing; `has_whole_clips(step)` returns False.

    Every process draws the numbers of the whole batch from one generator, seeded by the step. Of n processes
    each takes every n-th row: a share of each kind of time pair. A row's noise has its own generator. So runs
    do not depend on resuming or (but for a consistency rollout: torch's generator) on how many share them.
    """

    def __init__(self, data, recipe, config, shape, device, seed, place=(0, 1), chunks_a_step=None):
        self.data, self.recipe, self.config, self.shape, self.device = data, recipe, config, shape, device
        self.seed, self.place, self.chunks_a_step = seed, place, chunks_a_step
        self.causal, self.rolled_out = config.kind == "causal", None
        self.chunks = config.chunk_partition if self.causal else shape[:1]

    def batch(self, step, part, draw=0):
        """The `part`-th micro-batch of a step; draw above 0: of fresh ones, for the fake score."""
        recipe, size = self.recipe, self.recipe.batch
        rank, processes = self.place
        number = step * (1 + recipe.fake_steps * (recipe.fake_samples == "fresh")) + draw
        common = generator(self.seed, number, 0)
        torch.manual_seed(seed_of(self.seed, number, 1000 + part * processes + rank))
        # Anchors come first, in the first micro-batches, for `anyflow._balance`.
        rows = torch.arange(size).chunk(recipe.accumulate)[part][rank::processes]
        here = lambda drawn: drawn[rows].to(self.device)
        uniform = lambda *shape: torch.rand(*shape, generator=common)
        normal = lambda *shape: torch.randn(*shape, generator=common)
        noise_of = lambda use: torch.stack([torch.randn(self.shape, generator=generator(
            self.seed, number, use, 1 + row)) for row in rows.tolist()]).to(self.device)

        pairs = anyflow.time_pairs(size, recipe.shift, recipe.diffusion, recipe.endpoint, generator=common)
        t, r = map(here, pairs)
        t_consistency = anyflow.shift_time(here(uniform(size)), recipe.shift)
        logit = normal(size, 1)
        by_frame = uniform(size, 1) < (0.0 if self.causal else recipe.own_times)
        logit = torch.where(by_frame, 1.5 * normal(size, self.shape[0]), logit)  # 1.5: frames shall differ
        t_teacher = anyflow.shift_time(here(logit).sigmoid(), recipe.shift)
        noise = noise_of(0)
        dropped = here(uniform(size) < recipe.drop)
        clip, text = (x.to(self.device) for x in self.data.batch((number * size + rows).tolist(), self.seed))
        self.spoilt = getattr(self.data, "spoilt", "")
        null = self.data.null.to(self.device).expand_as(text)

        cond = dict(text=torch.where(dropped[:, None, None], null, text))
        frames = slice(self.shape[0])
        if self.causal:  # it sees the clip's first chunks, and learns from the last of these, the window
            chunks = self.chunks[: self.draw_chunks(common)]
            frames = slice(sum(chunks[: -self.config.full_chunk_limit]), sum(chunks))
            cond |= dict(clean=clip[:, : frames.stop], chunks=chunks)
        return SimpleNamespace(
            x=clip[:, frames], noise=noise[:, frames], cond=cond, null=dict(text=null),  # to learn from
            t=t, r=r, t_consistency=t_consistency, t_teacher=t_teacher[:, frames],  # of x: (b,), or (b, F)
            clip=clip, clip_noise=noise, t_clip=t_teacher, text=text, frames=frames,  # all; no prompt dropped
            number=number, common=common, here=here, noise_of=noise_of)  # noise 1 is DMD's, 2 + i the fake's

    def draw_chunks(self, common):
        """How many: with probability 1/2 as many as the window holds, or else any number from that up."""
        most = len(self.config.chunk_partition)
        number = min(self.config.full_chunk_limit, most)
        if torch.rand((), generator=common) >= 0.5:
            number = torch.randint(number, most + 1, (), generator=common).item()
        return self.chunks_a_step or number

    def has_whole_clips(self, step):
        """Whether a causal model is also trained, in this step, on whole clips without chunks."""
        share = self.recipe.bidirectional * self.causal
        return int((step + 1) * share + 1e-9) > int(step * share + 1e-9)  # the steps are evenly spread

    def rollout(self, student, judge, batch):
        """The student's own frames x_hat, with gradient through every jump (of consistency: the last), and
        what `anyflow.on_policy_step` asks for with it. A causal model makes them as when sampling."""
        recipe, size, common = self.recipe, self.recipe.batch, batch.common
        t = anyflow.shift_time(batch.here(torch.rand(size, generator=common)), recipe.shift)
        steps = recipe.rollout_steps[torch.randint(len(recipe.rollout_steps), (), generator=common).item()]
        k, grid = torch.randint(steps, (), generator=common).item(), anyflow.time_grid(steps, recipe.shift)
        causal_judge = judge.config.kind == "causal"  # it sees the window, after the student's earlier chunks
        simulations = {"flowmap": anyflow.backward_simulation, "consistency": anyflow.consistency_simulation}
        simulate = functools.partial(simulations[recipe.rollout], grid=grid, k=k, text=batch.text)
        chunks, frames = (batch.cond["chunks"], batch.frames) if causal_judge else (self.chunks, slice(None))
        judged = min(len(chunks), self.config.full_chunk_limit) if causal_judge else len(chunks)
        x_hat = self.chunk_by_chunk(student, simulate, batch, chunks, judged)
        cond = dict(text=batch.text) | (dict(clean=x_hat.detach(), chunks=chunks) if causal_judge else {})

        def fake_options(i):
            common = generator(self.seed, batch.number, 1 + i)
            t = anyflow.shift_time(torch.randn(size, generator=common).sigmoid(), recipe.shift)
            return dict(t=batch.here(t), noise=batch.noise_of(2 + i)[:, frames])

        options = dict(t=t, noise=batch.noise_of(1)[:, frames], guidance=recipe.dmd_guidance, null=batch.null)
        return x_hat[:, frames], options, fake_options, cond

    def chunk_by_chunk(self, student, simulate, batch, chunks, judged):
        """The student's frames: a whole clip as one chunk, or causal chunks, all of one grid and k. A chunk
        enters the next ones' cache without gradient, so none crosses chunks. The last `judged` are judged:
        with `grad_chunks` K only K of these, drawn anew, have a gradient, times judged / K, as its mean. With
        `recompute_rollout` x_hat is a leaf, and `go_back` carries its gradient on."""
        again = self.recipe.recompute_rollout and torch.is_grad_enabled()
        past = {"cache": student.new_cache()} if self.causal else {}
        kept, made, networks = self.recipe.grad_chunks or judged, [], []
        order = len(chunks) - judged + torch.randperm(judged, generator=batch.common)
        for i, noise in enumerate(batch.clip_noise[:, : sum(chunks)].split(chunks, 1)):
            networks.append(Again(student, batch.text, made[:i]) if again else student)
            with torch.set_grad_enabled(torch.is_grad_enabled() and i in order[:kept]):
                made.append(simulate(networks[i], noise, **past))
            if i + 1 < len(chunks):
                student.extend(past["cache"], made[-1].detach(), batch.text)
        x_hat = torch.cat(made, 1)
        if again:
            self.rolled_out = x_hat.requires_grad_(), chunks, networks
        scale = max(1.0, judged / kept)
        return x_hat if scale == 1 else x_hat.detach() + scale * (x_hat - x_hat.detach())

    def go_back(self):
        """The rest of a backward pass that stopped at x_hat: through the calls that made it."""
        if self.rolled_out:
            (x_hat, chunks, networks), self.rolled_out = self.rolled_out, None
            for network, gradient in zip(networks, x_hat.grad.split(chunks, 1)):
                network.go_back(gradient)

def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

def generator(*numbers):
    return torch.Generator().manual_seed(seed_of(*numbers))


# ---- Recipes ---------------------------------------------------------------------------------------------

SHARE = dict(low=0, high=1)

@dataclass(frozen=True)
class Recipe:
    """The numbers of a run, each an option. Defaults: the published stage 1 of Wan 1.3B (2605.13724)."""

    steps: int = option(6000, "updates of the student", low=1, high=9999999)
    batch: int = option(32, "clips a step, over all processes and micro-batches", low=1)
    accumulate: int = option(1, "micro-batches a step", low=1)
    lr: float = option(5e-5, "learning rate of AdamW", above=0)
    beta1: float = option(0.9, "of AdamW", low=0, below=1)
    beta2: float = option(0.95, "of AdamW", low=0, below=1)
    warmup: int = option(1000, "steps of rising learning rate", low=0)
    decay: float = option(0.0, "share of the steps, the last ones, in which the rate falls to zero", **SHARE)
    clip: float = option(1.0, "norm that a gradient is clipped to", above=0)
    ema: float = option(0.999, "decay of the average of the weights", **SHARE)
    ema_start: int = option(1000, "steps before which the average is the weights themselves", low=0)
    ema_ramp: bool = option(False, "forget faster while the average is young, for short runs")
    shift: float = option(5.0, "of all times, towards noise", above=0)
    drop: float = option(0.1, "share of prompts replaced by the null prompt", **SHARE)
    own_times: float = option(0.0, "bidirectional teacher: share of clips with times for each frame", **SHARE)
    # stage 1
    guidance: float = option(3.0, "fused into the student", above=0)
    guidance_form: str = option("published", "consistent: of the guided ODE", choices=anyflow.GUIDANCE_FORMS)
    target: str = option("data", "whose velocity the target has", choices=("data", "teacher"))
    data_anchors: bool = option(True, "with target teacher: where r = t, still the data's velocity")
    weight: str = option("paper", "paper's (consistency: 1) or 1 / (t + 0.05)", choices=("paper", "inverse"))
    balance: bool = option(True, "rescale each jump's loss to the mean of the anchors'")
    diffusion: float = option(0.5, "share of r = t", **SHARE)
    endpoint: float = option(0.25, "share of r = 0", **SHARE)
    eps: float = option(0.005, "half the step of the central difference", above=0, below=0.5)
    fastest: float = option(0.0, "the largest a of the sin(a t) that trained weights see; 0: all", low=0)
    bidirectional: float = option(0.1, "causal stages 0, 1: share of steps with a whole clip too", **SHARE)
    # stage 2
    rollout: str = option("flowmap", "consistency: for the baseline", choices=("flowmap", "consistency"))
    rollout_steps: tuple = option((2, 4, 8, 16, 50), "numbers of calls N, one drawn for a rollout", low=1)
    grad_chunks: int = option(0, "causal: how many judged chunks have a gradient; 0: all", low=0)
    recompute_rollout: bool = option(True, "make a rollout again, part by part, to go back through it")
    dmd: float = option(1.0, "weight of DMD beside the loss of stage 1", low=0)
    dmd_guidance: float = option(4.0, "of the judge: the release's x0_cond + 3 (x0_cond - x0_null)", low=0)
    fake_lr: float = option(2e-6, "learning rate of the fake score", above=0)
    fake_steps: int = option(1, "updates of the fake score for one of the student", low=1)
    fake_samples: str = option("reused", "samples that the fake score learns", choices=("reused", "fresh"))
    # baseline
    teacher_steps: int = option(50, "midpoint steps of the teacher that divide [0, 1]", low=1)
    # machine
    lora: int = option(256, "rank, with alpha = rank; 0 trains all weights", low=0)
    merge: bool = option(False, "earlier LoRAs go into the frozen weights, new ones are trained")
    share: bool = option(True, "with LoRA: teacher, student and fake score as adapters of one frozen network")
    dtype: str = option("bfloat16", "of the work and of frozen weights", choices=("float32", "bfloat16"))
    checkpointing: str = option("full", "what is recomputed going back; selective: all but self-attention",
                                choices=("none", "full", "selective"))
    compile: bool = option(True, "compile the blocks")

WAN = {stage: {} for stage in STAGES}
WAN["onpolicy"] = dict(steps=1200, lr=2e-6, beta1=0.0, beta2=0.999, warmup=0, ema=0.99, ema_start=200,
                       fake_samples="fresh")
WAN_14B = {stage: dict(steps=4000, batch=16) | changes for stage, changes in WAN.items()}

SMALL = dict(beta2=0.99, warmup=100, decay=0.5, ema=0.998, ema_start=0, ema_ramp=True, shift=2.0,
             guidance=1.0, target="teacher", fastest=20.0, lora=0, dtype="float32", checkpointing="none",
             compile=False, recompute_rollout=False)
TINY = {
    "teacher": SMALL | dict(steps=8000, lr=3e-3, own_times=0.5),
    "flowmap": SMALL | dict(steps=3200, lr=6e-4, decay=1.0, batch=16, weight="inverse"),
    "consistency": SMALL | dict(steps=3200, lr=6e-4, decay=1.0, batch=16, teacher_steps=8),
    "onpolicy": SMALL | dict(steps=400, lr=2e-4, fake_lr=4e-4, batch=16, beta1=0.0, warmup=20, fake_steps=2,
                             weight="inverse", dmd=4.0, rollout_steps=(1, 2, 4, 8, 16, 32), dmd_guidance=1.0),
}
RECIPES = {"tiny": TINY, "wan-1.3b": WAN, "wan-14b": WAN_14B}

def recipe_of(name, stage, changes, processes=1):
    """The Recipe of a preset's stage with {option: value} changed. ValueError for what does not fit."""
    changes = {key: value for key, value in changes.items() if value is not None}
    named = "guidance_form" in changes
    recipe = Recipe(**check(Recipe, RECIPES[name.removesuffix("-causal")][stage] | changes))
    if recipe.diffusion + recipe.endpoint > 1:
        raise ValueError(f"diffusion is {recipe.diffusion}, expected at most 1 - endpoint {recipe.endpoint}")
    if named and recipe.guidance == 1:
        raise ValueError(f"guidance_form is {recipe.guidance_form}, but guidance is 1, expected another")
    if recipe.batch % (processes * recipe.accumulate):
        shares = f"{processes} process(es) x {recipe.accumulate} micro-batch(es)"
        raise ValueError(f"batch is {recipe.batch}, expected a multiple of {shares}")
    return recipe


# ---- Command line -----------------------------------------------------------------------------------------

FOLDERS = {"init": "model folder to start from",
           "teacher": "model folder of the teacher (default: --init; onpolicy needs it)",
           "judge": "onpolicy: model folder of the teacher that judges (default: --teacher)",
           "base": "folder of the weights that all are LoRAs of (default: what --init is a LoRA of)"}

def parse(argv):
    known = argparse.ArgumentParser(add_help=False)  # the stage and preset whose defaults --help shows
    known.add_argument("stage", nargs="?"), known.add_argument("--preset")
    stage, name = vars(known.parse_known_args(argv)[0]).values()
    defaults = RECIPES.get((name or "").removesuffix("-causal"), WAN).get(stage, {})

    usage, head = "train.py STAGE --preset NAME ...", __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=head, usage=usage)
    add = parser.add_argument
    add("stage", choices=STAGES)
    add("--preset", choices=NAMES, required=True)
    add("--out", type=nonempty, help="folder of the result (default out/PRESET-STAGE)")
    data = f"folder of shards, or a world: {', '.join(WORLDS)} (default of tiny presets: stars)"
    for key, meaning in ({"data": data} | FOLDERS).items():
        add(f"--{key}", type=nonempty, help=meaning)
    add("--exact-teacher", action="store_true", help="a world's velocity teaches and judges, with --drop 0")
    add("--resume", action="store_true", help="go on from the newest checkpoint of --out")
    add("--save-every", type=positive, default=500, help="steps between checkpoints (default 500)")
    add("--sample-every", type=positive, help="steps between sample clips, into OUT/samples (default: none)")
    add("--skip-bad-shards", action="store_true", help="train on the others")
    add("--seed", type=seed_value, default=0, help="0 to 2^32 - 1 (default 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    whose = f"defaults are those of {name or 'wan-1.3b'} {stage or 'flowmap'}"
    add_options(parser.add_argument_group("recipe", whose), Recipe, defaults)
    args = parser.parse_args(argv)
    args.out = Path(os.path.abspath(args.out or f"out/{args.preset}-{args.stage}"))
    args.data = args.data or ("stars" if args.preset.startswith("tiny") else None)
    return args

def open_data(args, shape, text_dim):
    if args.data is None:
        raise ValueError(f"--preset {args.preset} needs --data, a folder of shards")
    if args.data not in WORLDS:
        return Shards(args.data, shape, text_dim, args.skip_bad_shards)
    if WORLDS[args.data].shape != shape:
        raise ValueError(f"--data {args.data} has clips {WORLDS[args.data].shape}, expected {shape}")
    return WORLDS[args.data]

def save_samples(run, clips, args, recipe, count=2):
    """Clips of fixed noise and prompts in OUT/samples, of both weights: in 4 calls, a teacher's in 32."""
    student, device = run.nets["student"], clips.device
    student.encode_text = lambda text: text  # sharded blocks embed a prompt only in their own forward pass
    text = clips.data.batch(range(count), args.seed)[1].to(device)
    noise = torch.randn(count, *clips.shape, generator=generator(args.seed)).to(device)
    options = dict(shift=recipe.shift, sampler=sample.sampler_of_stage(args.stage, recipe.rollout))
    for name, weights in (("average", run.averaged), ("raw", nullcontext)):
        with weights():
            steps = 32 if args.stage == "teacher" else 4
            latents = sample.generate(student, text, noise, steps, **options).float().cpu()
        if main_process():
            stem, tiny = args.out / "samples" / f"step-{run.step:07d}-{name}", args.preset.startswith("tiny")
            save(stem, (".safetensors", *[".gif"] * tiny), latents, enlarge(latents) if tiny else None, fps=4)
    del student.encode_text

given = lambda args: {field.name: getattr(args, field.name) for field in fields(Recipe)}

def run_stage(args):
    config, shape = preset(args.preset)
    recipe = recipe_of(args.preset, args.stage, given(args), int(os.environ.get("WORLD_SIZE", 1)))
    data = open_data(args, shape, config.text_dim)
    device = start_processes(args.device, recipe.dtype)
    for key, name in [(key, getattr(args, key)) for key in FOLDERS]:
        setattr(args, key, str(find(name, ignore="text_encoder/*").resolve()) if name else None)
    torch.manual_seed(args.seed)  # for new weights, and those of LoRA
    if args.resume and not args.out.is_dir():
        raise ValueError(f"--resume found no folder {args.out}")
    if main_process():
        hold(args.out, *(getattr(args, key) for key in FOLDERS), args.data)
    make = from_folders(args.stage, recipe, args, config, is_baseline(args.stage, recipe))
    nets = networks(args.stage, recipe, is_baseline(args.stage, recipe), make)
    if args.judge and "judge" not in nets or args.teacher and not {"teacher", "judge"} & nets.keys():
        raise ValueError(f"--teacher or --judge is given, but stage {args.stage} with this recipe asks none")
    assemble(nets, recipe, device)
    if args.exact_teacher:
        null = recipe.drop or recipe.guidance != 1 or ("judge" in nets and recipe.dmd_guidance != 1)
        if isinstance(data, Shards) or config.kind == "causal" or "teacher" not in nets or null:
            raise ValueError("--exact-teacher needs a world, a teacher, no chunks, --drop 0, guidance 1")
        nets |= {role: ExactTeacher(data) for role in {"teacher", "judge"} & nets.keys()}
    adam = dict(betas=(recipe.beta1, recipe.beta2), weight_decay=0.0, fused=True)
    optimisers = {role: torch.optim.AdamW(trained(nets[role]).values(), **adam)
                  for role in TRAINED if role in nets}
    settings = {key: getattr(args, key) or "" for key in ("stage", "preset", "data", *FOLDERS)}
    settings |= {"seed": args.seed, "shape": shape, **asdict(recipe), "base": base_of(args, recipe) or ""}
    settings |= {"exact_teacher": True} if args.exact_teacher else {}
    if isinstance(data, Shards):
        settings |= {"data": str(Path(args.data).resolve()), "clips": len(data), "bytes": data.bytes}
    settings = json.loads(json.dumps(settings))  # as a checkpoint gives them back

    run = Run(nets, optimisers, args.out, settings)
    if args.resume:
        run.resume()
    elif run.begun() or (args.out / "config.json").exists():
        raise ValueError(f"{args.out} holds an earlier run or a model, expected --resume or another --out")
    log = args.out / "log.jsonl"
    if main_process():
        kept = read_log(log, run.step) if args.resume else []
        write(log, lambda part: part.write_text("".join(f"{json.dumps(row)}\n" for row in kept)))
    clips = Clips(data, recipe, nets["student"].config, shape, device, args.seed, place())
    bar = tqdm(total=recipe.steps, initial=run.step, desc=f"{args.preset} {args.stage}", mininterval=1,
               disable=None if main_process() else True)
    stop = Stop(device)
    for row in train(args.stage, recipe, run, clips):
        if main_process():
            append(log, json.dumps(row) + "\n")
        bar.update()
        if run.step % 20 == 0:
            bar.set_postfix_str(" ".join(f"{name} {row[name]:.4g}" for name in LOSSES if name in row))
        if args.sample_every and run.step % args.sample_every == 0:
            save_samples(run, clips, args, recipe)
        stopping = bool(stop)
        if stopping or run.step % args.save_every == 0 or run.step == recipe.steps:
            run.save()
        if stopping and run.step < recipe.steps:
            raise RuntimeError(f"SIGTERM: saved step {run.step} in {args.out}, --resume goes on from it")
    bar.close()
    run.export(args.out, lambda: make("student"), recipe)
    if main_process():
        plots.losses(read_lines(log), LOSSES, args.out / "losses.png")
        print(f"weights in {args.out}")

# The losses in the log, which losses.png shows; "loss" of stage 2 is stage 1's.
LOSSES = {"loss": "of the stage", "anchors": "squared error at r = t", "jumps": "squared error at r < t",
          "whole": "flow matching of whole clips", "dmd": "distribution matching", "fake": "fake score"}

def main(argv=None):
    args = parse(argv)
    less = lambda: what_needs_less(recipe_of(args.preset, args.stage, given(args)), args.stage, args.preset)
    try:
        command("train.py", lambda: run_stage(args), "--resume goes on from a checkpoint, if any", less)
    finally:
        if dist.is_initialized():
            gc.collect()  # FSDP's networks hold on to the group
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
