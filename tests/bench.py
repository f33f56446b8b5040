"""Speed and memory of this model beside diffusers' in one run, alternating: only ratios need be believed.

    python tests/bench.py                    # a small network, each of the sections below; it needs diffusers
    python tests/bench.py --only forward     # or stage1, memory, generation, stream, chunks, derivative
    python tests/bench.py --only derivative --model FOLDER   # of this network instead of small ones
    python tests/bench.py --only compiled    # of a rollout made again: gradients beside those of eager mode
    python tests/bench.py --preset wan-1.3b  # true size, on a GPU: forward, 4-step clip, a step of each stage
    python tests/bench.py --preset tiny      # the same on a CPU; --only forward or stages

Time is the median of --repeats alternations. Memory is the peak of a call's tensors, above what the weights
hold; with --preset, together with the weights. Without diffusers, a preset is measured alone.
"""

import argparse
import copy
import functools
import gc
import importlib.util
import platform
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention
from torch.nn.modules.module import register_module_parameter_registration_hook

sys.path.insert(0, str(Path(__file__).parents[1]))
import anyflow  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from full import lora, parallel, plan  # noqa: E402
from full.checkpoint import Run  # noqa: E402
from full.compile import GRAPHS, compile_blocks  # noqa: E402
from full.data import preset  # noqa: E402
from full.files import STAGES  # noqa: E402
from full.options import command  # noqa: E402
from model import CLASSES, PRESETS, Attention, Wan, WanConfig, rows_of_chunks  # noqa: E402

BASE = dict(patch_size=(1, 2, 2), num_attention_heads=6, attention_head_dim=64, in_channels=16,
            out_channels=16, text_dim=256, freq_dim=256, ffn_dim=1536, num_layers=6)
TOKENS = {1280: (5, 32, 32), 5120: (5, 64, 64)}  # frames, height, width of the latents
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pair(kind, **changes):
    """This project's model and that of diffusers, with the same random weights."""
    import diffusers

    theirs = getattr(diffusers, CLASSES[kind])(**BASE, **changes).to(DEVICE)
    config = {key: value for key, value in theirs.config.items() if key[0] != "_"}
    ours = Wan(WanConfig.from_dict({"_class_name": CLASSES[kind]} | config)).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def calls(kind, ours, theirs, size, batch=1):
    """The same forward of both, as functions without arguments."""
    z = torch.randn(batch, size[0], 16, *size[1:], device=DEVICE)
    text = torch.randn(batch, 64, BASE["text_dim"], device=DEVICE)
    t, r = torch.full((batch,), 0.7, device=DEVICE), torch.full((batch,), 0.3, device=DEVICE)
    frames = [1000 * x[:, None].expand(z.shape[:2]) for x in (t, r)]
    return lambda: ours(z, t, r, text), lambda: theirs(z, *frames, text, return_dict=False)[0]


def inference(call):
    with torch.no_grad():
        call()


def training(call):
    call().square().mean().backward()


def seconds(function):
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(functions, repeats):
    """Median seconds of each, measured in turn, after one call of each to warm up."""
    for function in functions:
        function()
    rows = [[seconds(function) for function in functions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*rows)]


def matmul_rate(size=1536, repeats=5):
    """FLOP/s of a float32 matrix product of about the network's shapes."""
    a, b = torch.randn(size, 384, device=DEVICE), torch.randn(384, size, device=DEVICE)
    return 2 * size * size * 384 / alternate([lambda: a @ b], 10 * repeats)[0]


def forward(args):
    """Forward and training step, beside diffusers and the floor: FLOPs at the rate of a matrix product."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    ours, theirs = pair("anyflow")
    print(f"{'':32}{'ours':>9}{'diffusers':>11}{'speed':>8}{'floor':>9}{'x floor':>9}")
    for tokens, size in TOKENS.items():
        mine, reference = calls("anyflow", ours, theirs, size)
        for name, run in (("forward", inference), ("training step", training)):
            # Of fused attention the FLOPs go uncounted.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                run(mine)
            a, b = alternate([lambda: run(mine), lambda: run(reference)], args.repeats)
            floor = counter.get_total_flops() / matmul_rate()
            row = f"{name}, {tokens} tokens"
            print(f"{row:32}{a:8.3f}s{b:10.3f}s{b / a:7.2f}x{floor:8.3f}s{a / floor:9.2f}")


def peak(function):
    """Peak bytes that one call allocates for tensors, above what was held before it."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()  # what is freed while it runs, and was not made then, would count below zero
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return held.max().item()


def memory(args):
    """Peak memory of a forward and of a training step."""
    ours, theirs = pair("anyflow")
    print(f"{'':32}{'ours':>9}{'diffusers':>11}{'ratio':>8}")
    for tokens, size in TOKENS.items():
        for name, run in (("forward", inference), ("training step", training)):
            a, b = (peak(lambda: run(call)) for call in calls("anyflow", ours, theirs, size))
            ours.zero_grad(), theirs.zero_grad()
            print(f"{f'{name}, {tokens} tokens':32}{a / 2**20:6.0f} MB{b / 2**20:8.0f} MB{a / b:8.2f}")


def generation(args):
    """Causal generation, 4 steps a chunk, by `generate` and by AnyFlowFARPipeline."""
    import diffusers

    ours, theirs = pair("causal")
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5)
    pipe = diffusers.AnyFlowFARPipeline(None, None, theirs, None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 4, 8
    text = torch.randn(1, 64, BASE["text_dim"], device=DEVICE)
    print(f"{'':32}{'ours':>9}{'diffusers':>11}{'speed':>8}")
    for chunks, repeats in ((8, 3), (64, 1)):
        noise = torch.randn(1, chunks, 16, 16, 16, device=DEVICE)
        mine = lambda: sample.generate(ours, text, noise, 4, chunks=(1,) * chunks, padding=True)
        reference = lambda: pipe(prompt_embeds=text, latents=noise.transpose(1, 2), num_frames=4 * chunks - 3,
                                 height=128, width=128, num_inference_steps=4, output_type="latent",
                                 chunk_partition=[1] * chunks)
        if chunks > 8:  # too long to warm up: the eight chunks before were the warm-up
            a, b = seconds(mine), seconds(reference)
        else:
            a, b = alternate([mine, reference], repeats)
        print(f"{f'{chunks} chunks of 64 tokens':32}{a:8.2f}s{b:10.2f}s{b / a:7.2f}x")


def stage1(args):
    """Training step of stage 1: here, and as published (du/dt of every sample, + and - in two forwards)."""
    model = Wan(WanConfig(kind="anyflow", **BASE)).to(DEVICE)
    x = torch.randn(8, 5, 16, 16, 16, device=DEVICE)
    text = torch.randn(8, 64, BASE["text_dim"], device=DEVICE)
    null = dict(text=torch.zeros_like(text))

    def published(guidance, t, r, noise, eps=0.005):
        wide = lambda time: time[:, None, None, None, None]
        z = anyflow.interpolate(x, noise, t)
        u = model(z, t, r, text)
        with torch.no_grad():
            v = noise - x
            if guidance != 1:
                v = guidance * v + (1 - guidance) * model(z, t, r, **null)
            plus, minus = (t + eps).clamp(max=1), (t - eps).clamp(min=0)
            later = model(z + wide(plus - t) * (noise - x), plus, r, text)
            du = (later - model(z + wide(minus - t) * (noise - x), minus, r, text)) / wide(plus - minus)
            target = v - wide(t - r) * du
        loss = ((u - target) / guidance).square().flatten(1).mean(1) * anyflow.time_weight(t)
        scale = torch.where(r < t, loss[r == t].mean() / (loss + 1e-5), 1.0).detach()
        (scale * loss).mean().backward()

    def here(guidance, t, r, noise):
        options = dict(guidance=guidance, null=null, text=text)
        anyflow.flow_map_loss(model, x, t=t, r=r, noise=noise, **options).backward()

    print(f"{'':32}{'ours':>9}{'published':>11}{'speed':>8}   difference of the gradients")
    for guidance in (1.0, 3.0):
        draws = (*anyflow.time_pairs(len(x), device=DEVICE), torch.randn_like(x))
        runs = [lambda: here(guidance, *draws), lambda: published(guidance, *draws)]
        grads = []
        for run in runs:
            model.zero_grad()
            run()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        a, b = alternate(runs, args.repeats)
        difference = (grads[0] - grads[1]).norm() / grads[1].norm()
        row = f"batch 8, guidance {guidance:g}"
        print(f"{row:32}{a:8.3f}s{b:10.3f}s{b / a:7.2f}x   {difference:.0e} of the norm")


def stream(args):
    """Time to commit a chunk: incremental, and by encoding the whole history for each, as published."""
    ours, _ = pair("causal")
    text = torch.randn(1, 64, BASE["text_dim"], device=DEVICE)
    with torch.no_grad():
        text = ours.encode_text(text)
    clip = torch.randn(1, 64, 16, 16, 16, device=DEVICE)
    cache, commits = ours.new_cache(), []
    for n in range(64):
        commits.append(seconds(lambda: ours.extend(cache, clip[:, n : n + 1], text)))

    zero = torch.zeros(1, 1, device=DEVICE)

    @torch.no_grad()
    def history():  # all 64 chunks in one forward: 62 compressed of 16 tokens, and two of 64
        past = ours._group(clip[:, :62], zero, zero, 0, compressed=True)
        late = ours._group(clip[:, 62:], zero, zero, 62)
        ours._blocks([past, late], text, None, rows_of_chunks((1,) * 64, 2, 64, 16, False))

    early, late = statistics.median(commits[4:12]), statistics.median(commits[-8:])
    print(f"commit of chunk 4-11: {1e3 * early:.1f} ms, of chunk 56-63: {1e3 * late:.1f} ms")
    again = alternate([history], args.repeats)[0]
    times = f"incremental {1e3 * late:.1f} ms, whole history in one forward {1e3 * again:.1f} ms"
    print(f"at chunk 64: {times}, {again / late:.1f}x; tokens 144 and 1120, {1120 / 144:.1f}x")


def chunks(args):
    """Attention of causal training: row by row of `rows_of_chunks`, beside one call under a mask (on a GPU
    flex attention with its BlockMask, both compiled, at the size of 1.3B in bfloat16)."""
    gpu = DEVICE == "cuda"
    dtype, frame, heads, dim = (torch.bfloat16, 1560, 12, 128) if gpu else (torch.float32, 256, 6, 64)
    attention = Attention(WanConfig(num_attention_heads=heads, attention_head_dim=dim)).to(DEVICE)
    attention.to_out[0] = torch.nn.Identity()
    print(f"{'':40}{'rows':>9}{'mask':>9}{'speed':>8}")
    for sizes in ((1, 3, 3), (1, 3, 3, 3), (1, 3, 3, 3, 3, 3, 3)):
        lengths, columns = rows_of_chunks(sizes, 3, frame, frame // 4, True)
        table = torch.zeros(2 * [len(lengths)], dtype=torch.bool, device=DEVICE)
        for row, seen in enumerate(columns):
            table[row, list(seen)] = True
        row_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(DEVICE)
        size = 1, sum(lengths), heads, dim
        q, k, v = (torch.randn(size, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3))
        if gpu:
            mod = lambda batch, head, i, j: table[row_of[i], row_of[j]]
            make = torch.compile(flex_attention.create_block_mask)
            under = functools.partial(torch.compile(flex_attention.flex_attention, dynamic=False),
                                      block_mask=make(mod, None, None, size[1], size[1], device=DEVICE))
        else:
            under = functools.partial(F.scaled_dot_product_attention, attn_mask=table[row_of][:, row_of])
        attend = torch.compile(attention.attend, dynamic=False) if gpu else attention.attend
        by_rows = lambda: attend(q, k, v, (lengths, columns))
        heads_first = lambda: (x.transpose(1, 2) for x in (q, k, v))
        by_mask = lambda: under(*heads_first()).transpose(1, 2).flatten(2)
        assert (by_rows() - by_mask()).norm() < (0.02 if gpu else 1e-5) * by_mask().norm()
        for name, run in (("forward", inference), ("and backward", training)):
            a, b = alternate([lambda: run(by_rows), lambda: run(by_mask)], args.repeats)
            what = f"{len(sizes)} chunks, {size[1]} tokens, {name}"
            print(f"{what:40}{a:8.4f}s{b:8.4f}s{b / a:7.2f}x", flush=True)


EPS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02]


def derivative(args):
    """Relative error of `central_difference` against an exact JVP, by eps: in float32 as found, then blind to
    sinusoids of time above 20 radians per unit time, and of that network in bfloat16, part by part."""
    from toy.video import WEIGHTS
    from toy.world import WORLDS, embed

    nets = {args.model: args.model} if args.model else {
        f"tiny, {name}": WEIGHTS / f"bidirectional-anyflow{end}"
        for name, end in (("stage 1", "-forward"), ("stage 2", ""))}
    nets = {name: Wan.from_pretrained(folder, dtype=torch.float32) for name, folder in nets.items()}
    if not args.model:
        shape = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=2)
        nets["random, width 1536, 2 layers"] = Wan(WanConfig(kind="anyflow", **BASE | shape))
    for name, net in nets.items():
        net, config = net.to(DEVICE).requires_grad_(False), net.config
        if config.in_channels == 3:  # the tiny world, whose v is known
            x, labels, _ = WORLDS["stars"].clips(range(16), 0)
            text, velocity = embed(labels), lambda z, t: WORLDS["stars"].velocity(z, t, labels)
        else:  # as the data's, eps - x
            x, text = torch.randn(2, 3, config.in_channels, 8, 8), torch.randn(2, 16, config.text_dim)
            velocity = None
        noise, (t, r) = torch.randn_like(x), torch.rand(2, len(x)).sort(0, descending=True).values
        t, r = (anyflow.shift_time(0.02 + 0.95 * time, 5.0).clamp(max=0.98) for time in (t, r))
        z = anyflow.interpolate(x, noise, t)
        v = velocity(z, t) if velocity else noise - x
        inputs = [x.to(DEVICE) for x in (z, v, t, r, text)]
        print(f"{name:48}" + "".join(f"{eps:>9}" for eps in EPS))
        rows = {"float32": net}
        blind = copy.deepcopy(net)
        parallel.blind(blind, dict(blind.named_parameters()), 20.0)
        rows["float32, blind"] = blind
        for row, net in rows.items():
            errors(row, exact(net, *inputs), net, *inputs)
        blind.load_state_dict({key: w.bfloat16().float() for key, w in blind.state_dict().items()})
        du = exact(blind, *inputs)  # of the weights that the bfloat16 network has
        half = lambda x: x.bfloat16().float()
        errors("blind, z +- eps v rounded, else float32", du,
               lambda z, *at, text: blind(half(z), *at, text), *inputs)
        errors("blind, u of both rounded, else float32", du,
               lambda *at, text: half(blind(*at, text)), *inputs)
        low = copy.deepcopy(blind).bfloat16()
        network = lambda *at, text: low(*at, text).float()
        errors("blind, bfloat16", du, network, *inputs)
        embedder = low.condition_embedder
        for part in (part for name, part in embedder.named_children() if name != "text_embedder"):
            part.float()
        errors("  and time embedders in float32", du, network, *inputs)
        low.patch_embedding.float().register_forward_hook(lambda module, given, made: made.bfloat16())
        errors("  and the first layer in float32", du, network, *inputs)


def compiled(args):
    """A rollout made again in compiled blocks: difference of x_hat and, relative, of its gradients to eager
    mode's."""
    from test_train import gradients_of_a_rollout

    rollout = train.Clips.rollout

    def in_compiled_blocks(clips, student, judge, batch):
        compile_blocks(student)
        return rollout(clips, student, judge, batch)

    for kind in ("anyflow", "causal"):
        for checkpointing in ("none", "full", "selective"):
            changes = dict(recompute_rollout=True, checkpointing=checkpointing)
            x, eager = gradients_of_a_rollout(kind, **changes)
            with mock.patch.object(train.Clips, "rollout", in_compiled_blocks):
                y, made = gradients_of_a_rollout(kind, **changes)
            error = max(((a - b).norm() / a.norm().clamp(min=1e-12)).item() for a, b in zip(eager, made))
            found = f"{(x - y).abs().max():9.1e}{error:9.1e}"
            print(f"{kind:8} checkpointing {checkpointing:10}{found}", flush=True)
            torch._dynamo.reset()


def exact(net, z, v, t, r, text):
    """du/dt along (v, 1, 0) in forward mode, which only plain attention has."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        call = lambda z, t: net(z, t, r, text)
        return torch.func.jvp(call, (z, t), (v, torch.ones_like(t)))[1]


def errors(row, du, net, z, v, t, r, text):
    """Print |difference - du| / |du| for each eps."""
    found = [anyflow.central_difference(net, z, v, t, r, eps, text=text) for eps in EPS]
    print(f"{row:48}" + "".join(f"{((x - du).norm() / du.norm()).item():9.3f}" for x in found), flush=True)


# ------------------------------------------------------------------------------------------------------------
# True size
# ------------------------------------------------------------------------------------------------------------


def true_size(args):
    """A preset's forward, 4-step clip and training steps, at batch 1: bfloat16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    n = 8192 if DEVICE == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=DEVICE).to(dtype)
    rate = 2 * n**3 / alternate([lambda: a @ b], 15)[0]
    print(f"{args.preset}, {dtype}; a matrix product of {n} runs at {rate / 1e12:.3g} TFLOP/s")
    if args.only in (None, "forward"):
        beside = f"{'diffusers: s':>13}{'GiB':>9}{'speed':>8}{'memory':>8}"
        print(f"\n{'':34}{'s':>9}{'TFLOP/s':>9}{'of rate':>9}{'GiB':>9} | {beside}")
        for kind in ("anyflow", "causal"):
            whole_clip(args, kind, dtype, rate)
    if args.only != "forward":
        print("\nOne step with LoRA on one base, beside what `full.plan` says of it")
        beside = f"{'plan: GiB':>13}{'measured / plan':>17}"
        print(f"{'':34}{'s':>9}{'TFLOP/s':>9}{'of rate':>9}{'GiB':>9} | {beside}")
        for causal in ("", "-causal"):
            for stage in (args.only,) if args.only in STAGES else STAGES:
                twice = DEVICE == "cuda" and stage in ("flowmap", "onpolicy")
                for compiled in (False, True) if twice else (False,):
                    name = f"{stage}{causal}, {MODES[compiled]}"
                    attempt(name, training_step, args.preset + causal, stage, compiled, rate)


MODES = "eager", "compiled"
TEXT = 512 if DEVICE == "cuda" else 4  # tokens of a prompt


def attempt(name, function, *args):
    """Print the row of function(): seconds, peak bytes, FLOPs, rate, and what comes after a bar."""
    try:
        took, held, flops, rate, beside = function(*args)
        speed = f"{flops / took / 1e12:9.3g}{flops / took / rate:9.1%}"
        print(f"{name:34}{took:9.3g}{speed}{held / 2**30:9.3g} | {beside}", flush=True)
    except (RuntimeError, TypeError, ValueError) as error:  # no memory, or not to be compiled: others go on
        print(f"{name:34} {str(error).strip().splitlines()[0]}", flush=True)
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def whole_clip(args, kind, dtype, rate):
    """Rows of a network beside that of diffusers, where installed: forward, and a clip, noise to latents."""
    config, shape = preset(args.preset + "-causal" * (kind == "causal"))
    pipelines = importlib.util.find_spec("diffusers") is not None
    noise = torch.randn(1, *shape, device=DEVICE, dtype=dtype)
    text = torch.randn(1, TEXT, config.text_dim, device=DEVICE, dtype=dtype)
    nets = [made_in(dtype, lambda: Wan(config))]
    runs = {"4-step clip": [lambda net: sample.generate(net, text, noise, 4, padding=pipelines)]}
    if kind == "anyflow":
        runs = {"forward": [lambda net: net(noise, 0.7, 0.3, text)]} | runs
    if pipelines:
        import diffusers

        nets.append(published(nets[0], dtype))
        pipeline = diffusers.AnyFlowPipeline if kind == "anyflow" else diffusers.AnyFlowFARPipeline
        pipe = pipeline(None, None, nets[1], None, diffusers.FlowMapEulerDiscreteScheduler(shift=5))
        pipe.set_progress_bar_config(disable=True)
        # The pipeline checks for multiples of 16 pixels, of which it makes none here.
        pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 4, 16
        size = dict(num_frames=4 * shape[0] - 3, height=16 * shape[2], width=16 * shape[3])
        options = dict(num_inference_steps=4, output_type="latent", **size)
        frames = torch.ones(1, shape[0], device=DEVICE)
        latents = noise.transpose(1, 2)
        runs["4-step clip"].append(lambda net: pipe(prompt_embeds=text, latents=latents, **options))
        if kind == "anyflow":
            times = 700 * frames, 300 * frames
            runs["forward"].append(lambda net: net(noise, *times, text, return_dict=False))

    def compare(pair, flops, repeats):
        calls = [lambda run=run, net=net: inference(lambda: run(net)) for run, net in zip(pair, nets)]
        times = alternate(calls, repeats)
        held = [peak(call) + sum(p.nbytes for p in net.parameters()) for call, net in zip(calls, nets)]
        beside = ""
        if len(times) == 2:
            (a, b), (m, n) = times, held
            beside = f"{b:13.3g}{n / 2**30:9.3g}{b / a:7.2f}x{m / n:8.2f}"
        return times[0], held[0], flops, rate, beside

    # A clip of one step is one forward.
    steps = {"forward": 1, "4-step clip": 4}
    flops = {name: plan.cost_of_sampling(config, shape, TEXT, steps[name])[0] for name in runs}
    # The pipeline expects of its user to compile flex attention, which in eager mode holds all pairs.
    torch._dynamo.config.recompile_limit = GRAPHS
    flex = flex_attention.flex_attention
    if DEVICE == "cuda" and kind == "causal":
        flex = torch.compile(flex, dynamic=False)
    # A causal clip calls the network in many shapes: on a CPU they take minutes to compile.
    for compiled in (False, True) if kind == "anyflow" or DEVICE == "cuda" else (False,):
        for name, pair in runs.items():
            repeats = args.repeats if name == "forward" else 1
            row = f"{name}, {kind}, {MODES[compiled]}"
            if kind == "causal" and len(pair) == 2:  # alone first: the pipeline may not end
                attempt(row, compare, pair[:1], flops[name], repeats)
            with mock.patch.object(flex_attention, "flex_attention", flex):
                attempt(row, compare, pair, flops[name], repeats)
        for net in nets:
            compile_blocks(net)


def published(ours, dtype):
    """The network of diffusers with the same weights, in the precisions in which it loads itself."""
    import diffusers

    config = {key: value for key, value in ours.config.to_dict().items() if key[0] != "_"}
    theirs = made_in(dtype, lambda: getattr(diffusers, CLASSES[ours.config.kind])(**config))
    theirs.load_state_dict(ours.state_dict())
    for name, p in theirs.named_parameters():
        if any(part in name.split(".") for part in theirs._keep_in_fp32_modules):
            p.data = p.data.float()
    return theirs


def made_in(dtype, make):
    """The network that make() makes, each parameter in dtype from the start: 14B in float32 fill a card."""
    cast = lambda module, name, p: None if p is None else torch.nn.Parameter(p.data.to(dtype))
    hook = register_module_parameter_registration_hook(cast)
    with torch.device(DEVICE):
        net = make()
    hook.remove()
    return net


def training_step(name, stage, compiled, rate):
    """The first step that does what an earlier one did, which has compiled and allocated: anchors and jumps
    differ. Three chunks of a causal clip."""
    config, shape = preset(name)
    fixed = dict(batch=1, steps=3, rollout_steps=(2,), target="data", bidirectional=0.0, compile=compiled)
    recipe = train.recipe_of(name, stage, fixed | dict(lora=256 if DEVICE == "cuda" else 16))
    chunks = config.full_chunk_limit if config.kind == "causal" else None
    options = dict(steps=3, chunks=chunks, text_length=TEXT)
    runs = [plan.steps_on_meta(stage, recipe, config, shape, n, **options) for n in (1, 2, 3)]
    costs = [plan.at_depth(config.num_layers, *([step] for step in steps)) for steps in zip(*runs)]
    flops = [cost[0] for cost in costs]
    alike = next((i for i in range(1, 3) if flops[i] in flops[:i]), 2)
    flops, activations = costs[alike]
    device = torch.device(DEVICE)
    if not torch.distributed.is_initialized():
        device = parallel.start_processes(DEVICE, recipe.dtype)
    with device:
        nets = {role: Wan(net.config) for role, net in plan.networks_on_meta(stage, recipe, config).items()}
    holder = nets.get(parallel.holder_of(nets))
    for net in nets.values():
        if holder:
            net.load_state_dict(holder.state_dict(), strict=False)  # a student that has learned nothing yet
    for role, net in nets.items():  # a LoRA of the judge that has learned nothing, either
        zeros = lambda m: (m.weight.new_zeros(len(m.weight), recipe.lora),
                           m.weight.new_zeros(recipe.lora, m.in_features))
        frozen = role not in parallel.TRAINED
        starts = {name: zeros(m) for name, m in lora.adapted(net, lora.BODY).items()} if frozen else {}
        parallel.adapt(stage, role, net, recipe, starts)
    parallel.assemble(nets, recipe, device)
    adam = {role: torch.optim.AdamW(parallel.trained(nets[role]).values(), 1e-6, fused=True)
            for role in parallel.TRAINED if role in nets}
    run = Run(nets, adam, Path("none"), {})
    clip, text = torch.randn(1, *shape), torch.randn(1, TEXT, config.text_dim)
    data = SimpleNamespace(null=text, batch=lambda rows, seed: (clip, text))
    clips = train.Clips(data, recipe, nets["student"].config, shape, device, 0, (0, 1), chunks)
    steps = train.train(stage, recipe, run, clips)
    first, last = [next(steps)["seconds"] for _ in range(alike)][0], []
    if DEVICE == "cuda":  # gradients are freed between steps
        torch.cuda.reset_peak_memory_stats()
        last.append(next(steps)["seconds"])
        held = torch.cuda.max_memory_allocated()
    else:
        kept = [p for net in nets.values() for p in net.parameters()] + [*run.average.values()]
        kept += [x for adam in adam.values() for state in adam.state.values() for x in state.values()]
        kept = [parallel.local(x).untyped_storage() for x in kept]
        kept = {storage.data_ptr(): storage.nbytes() for storage in kept}
        held = sum(kept.values()) + peak(lambda: last.append(next(steps)["seconds"]))
    meta = plan.networks_on_meta(stage, recipe, config)
    said = sum(plan.memory_of(meta, recipe, 1).values()) + activations
    return last[0], held, flops, rate, f"{said / 2**30:13.3g}{held / said:17.2f}   (first step {first:.3g} s)"


SECTIONS = {"forward": forward, "stage1": stage1, "memory": memory, "generation": generation,
            "stream": stream, "chunks": chunks, "derivative": derivative, "compiled": compiled}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), help="measure at the true size of a preset")
    parser.add_argument("--model", help="model folder, of --only derivative")
    parser.add_argument("--only", choices=[*SECTIONS, "stages", *STAGES])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}, expected at least 1")
    if args.model and not Path(args.model).is_dir():
        parser.error(f"--model {args.model} is no folder")
    sections = ("forward", "stages", *STAGES) if args.preset else tuple(SECTIONS)
    if args.only not in (None, *sections):
        parser.error(f"--only is {args.only}, expected one of {', '.join(sections)}")
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.machine()} CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.preset:
        return true_size(args)
    print("float32, eager")
    for name, section in SECTIONS.items():
        if args.only in (None, name):
            print(f"\n{section.__doc__}")
            section(args)


if __name__ == "__main__":
    command("tests/bench.py", main, "nothing is kept")
