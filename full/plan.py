"""What every stage of a recipe costs, without doing it: FLOPs, time, memory of a GPU, how many it needs.

    python -m full.plan --preset wan-14b-causal --gpus 64

`train` itself runs, with small clips on the CPU. Its networks are on the meta device, at their true size but
for the depth: every operation of every forward and backward pass is made, counted by torch's own formulas,
and its tensors' lives are followed, but no number is computed. FLOPs and peaks are linear in the depth.
"""

import argparse
import functools
import math
import statistics
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from full.data import NAMES, preset
from full.files import STAGES
from full.folders import networks
from full.lora import BODY, adapted
from full.options import add_options, check, command, option
from full.parallel import TRAINED, adapt, holder_of, trained
from model import Wan
from sample import generate
from train import RECIPES, Clips, Recipe, is_baseline, recipe_of, train

class Cost(TorchDispatchMode):
    """FLOPs, and bytes of the activations alive on a device, of what runs inside.

    flops: so far. peaks: the highest number of bytes between one network call (`mark`) and the next.
    """

    # FLOPs of fused attention on a CPU, which torch leaves out, by its formulas for a GPU.
    CPU = {"aten._scaled_dot_product_flash_attention_for_cpu": (sdpa_flop_count, 3),
           "aten._scaled_dot_product_flash_attention_for_cpu_backward": (sdpa_backward_flop_count, 4)}

    def __init__(self, nets, device="meta"):
        super().__init__()
        self.device, self.flops, self.live, self.peaks = device, 0, 0, [0]
        self.sizes = {}  # of storages: {their address in C++: bytes}, 0 for what is no activation
        for p in (p for net in nets for p in net.parameters()):
            self.follow(p, False)
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: self.forget(p.grad))

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1  # a check of values, or a norm: there are none
        out, name = op(*args, **kwargs), op._overloadpacket
        if name in flop_registry:
            self.flops += flop_registry[name](*args, **kwargs, out_val=out)
        elif str(name) in self.CPU:
            count, operands = self.CPU[str(name)]
            self.flops += count(*(x.shape for x in args[:operands]))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(x) and x.device.type == self.device:
                self.follow(x, True)
        return out

    def follow(self, x, activation):
        """Count x's storage from now to its end, once; with no bytes where it is no activation."""
        storage = x.untyped_storage()
        if storage._cdata in self.sizes:
            return
        weakref.finalize(storage, self.free, storage._cdata).atexit = False
        self.sizes[storage._cdata] = storage.nbytes() * activation
        self.live += self.sizes[storage._cdata]
        self.peaks[-1] = max(self.peaks[-1], self.live)

    def free(self, address):
        self.live -= self.sizes.pop(address)

    def forget(self, x):
        """x, a gradient, is no activation."""
        if x.device.type == self.device:
            self.follow(x, False)
            address = x.untyped_storage()._cdata
            self.live, self.sizes[address] = self.live - self.sizes[address], 0

    def mark(self):
        self.peaks.append(self.live)

class OnMeta(torch.nn.Module):
    """A network on the meta device, called with clips of few pixels; autograd goes through both."""

    def __init__(self, net, size, text_length, cost=None):
        super().__init__()
        self.net, self.config, self.cost = net, net.config, cost
        self.size, self.text_length = size, text_length

    def forward(self, z, t, r, text, *, clean=None, chunks=None, cache=None):
        self.cost.mark()
        clean = None if clean is None else self.enter(clean)
        u = self.net(self.enter(z), t, r, self.prompt(text), clean=clean, chunks=chunks, cache=cache)
        return Swap.apply(u, z.shape, z.device, z.dtype)

    def enter(self, z):
        return Swap.apply(z, (*z.shape[:3], *self.size), "meta", z.dtype)

    def prompt(self, text):
        length = len(text), self.text_length, self.config.text_dim
        return torch.empty(length, device="meta") if torch.is_tensor(text) else text

    def encode_text(self, text):
        return self.net.encode_text(self.prompt(text))

    def new_cache(self, padding=False):
        return self.net.new_cache(padding)

    def extend(self, cache, chunk, text):
        self.cost.mark()
        chunks = [chunk] if torch.is_tensor(chunk) else chunk
        return self.net.extend(cache, [self.enter(chunk) for chunk in chunks], self.prompt(text))

class Swap(torch.autograd.Function):
    """Put a tensor of another shape and device, without numbers, in x's place, and back for its gradient."""

    @staticmethod
    def forward(ctx, x, shape, device, dtype):
        ctx.of_x = x.shape, x.device, x.dtype
        return torch.zeros(shape, device=device, dtype=dtype)

    @staticmethod
    def backward(ctx, gradient):
        shape, device, dtype = ctx.of_x
        return torch.zeros(shape, device=device, dtype=dtype), None, None, None

def fused_attention(q, k, v):
    """As on a GPU. On the meta device torch would take the way that holds all pairs."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

@contextmanager
def counting(nets, device="meta"):
    fused = mock.patch.object(F, "scaled_dot_product_attention", fused_attention)
    with fused, Cost(nets, device) as cost:
        yield cost

def networks_on_meta(stage, recipe, config, layers=None):
    """{role: network} of a stage; teachers as Wan is published: of one time, and the judge bidirectional."""
    teacher = "causal" if config.kind == "causal" else "teacher"
    kinds = {"student": teacher if stage == "teacher" else config.kind, "teacher": teacher}

    def make(role):
        with torch.device("meta"):
            kind, depth = kinds.get(role, "teacher"), layers or config.num_layers
            net = Wan(replace(config, kind=kind, num_layers=depth))
        net.checkpointing = recipe.checkpointing
        return net

    nets = networks(stage, recipe, is_baseline(stage, recipe), make)
    for role, net in nets.items():
        starts = {}
        if recipe.lora and not recipe.merge and role in ("teacher", "judge"):  # stage 0 is a LoRA, too
            starts = {name: (m.weight.new_empty(m.out_features, recipe.lora),
                             m.weight.new_empty(recipe.lora, m.in_features))
                      for name, m in adapted(net, BODY).items()}
        adapt(stage, role, net, recipe, starts)
    return nets

@functools.cache
def steps_on_meta(stage, recipe, config, shape, layers, steps=1, place=(0, 1), chunks=None, text_length=512):
    """FLOPs, and peaks of activations in bytes from one network call to the next, of each of some steps."""
    nets = networks_on_meta(stage, recipe, config, layers)
    for net in nets.values():
        net.to(getattr(torch, recipe.dtype))
    in_turn = lambda n, generator: (torch.arange(n) + run.step * recipe.grad_chunks) % n  # have a gradient
    with counting(nets.values()) as cost, mock.patch("torch.randperm", in_turn):
        nets = {role: OnMeta(net, shape[2:], text_length, cost) for role, net in nets.items()}
        weights = {role: trained(nets[role]) for role in TRAINED if role in nets}
        optimisers = {role: torch.optim.SGD(params.values(), 0.0) for role, params in weights.items()}
        run = SimpleNamespace(nets=nets, trained=weights, optimisers=optimisers, step=0, newest=str,
                              update_average=lambda recipe: None)
        small = *shape[:2], *config.compressed_patch_size[1:]
        clips = lambda rows, seed: (torch.zeros(len(rows), *small), torch.zeros(len(rows), 1, 1))
        data, kind = SimpleNamespace(null=torch.zeros(1, 1, 1), batch=clips), nets["student"].config
        clips = Clips(data, recipe, kind, small, torch.device("cpu"), 0, place, chunks)
        made, before = [], 0
        for _ in train(stage, replace(recipe, steps=steps, fastest=0.0), run, clips):
            made.append((cost.flops - before, cost.peaks))
            before, cost.peaks = cost.flops, [cost.live]
    return made

def at_depth(layers, one, two, three=()):
    """From steps of networks of one, two (and three) layers: mean FLOPs (and the highest peak)."""
    flops = [a[0] + (b[0] - a[0]) * (layers - 1) for a, b in zip(one, two)]
    # From the second on: to go back through a first layer needs no gradient of what enters it.
    peaks = [x + (y - x) * (layers - 2) for a, b in zip(two, three) for x, y in zip(a[1], b[1])]
    return sum(flops) / len(flops), max(peaks, default=0)

def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Wan(config).parameters())

def cost_of_sampling(config, shape, text_length=512, steps=4, chunks=None):
    """FLOPs and peak of activations, bytes, of a clip in bfloat16."""
    runs = []
    for layers in (1, 2, 3):
        with torch.device("meta"):
            net = Wan(replace(config, num_layers=layers)).bfloat16()
        with counting([net]) as cost, torch.no_grad():
            small = 1, *shape[:2], *config.compressed_patch_size[1:]
            net = OnMeta(net, shape[2:], text_length, cost)
            generate(net, torch.zeros(1, 1, 1), torch.zeros(small), steps, chunks=chunks)
        runs.append([(cost.flops, cost.peaks)])
    return at_depth(config.num_layers, *runs)

def memory_of(nets, recipe, shards):
    """Bytes that one of `shards` GPUs holds between steps, by part, and what FSDP gathers for the work."""
    holder = nets.get(holder_of(nets))
    shared = set(holder.state_dict()) if holder and recipe.lora and recipe.share else ()
    size, parts = 2 if recipe.dtype == "bfloat16" else 4, Counter()
    for name, net in nets.items():
        for key, p in net.named_parameters():
            if p.requires_grad:
                parts += {"weights": 4 * p.numel(), "gradients": 4 * p.numel(), "optimiser": 8 * p.numel()}
                parts["average"] += 4 * p.numel() * (name == "student")
            elif net is holder or key not in shared or ".lora_" in key:
                parts["weights"] += size * p.numel()
    parts = {key: value / shards for key, value in parts.items()}
    if shards > 1 or recipe.dtype != "float32":
        numbers = lambda module: sum(p.numel() for p in module.parameters())
        blocks = max(numbers(net.blocks[0]) for net in nets.values())
        roots = sum(numbers(net) - numbers(net.blocks) for net in nets.values())
        parts["gathered"] = size * (2 * blocks + roots)  # one block at work, one on its way
    return parts

PARTS = ("weights", "gradients", "optimiser", "average", "gathered", "activations", "rollout")
CARDS = (24, 80, 141)  # GiB, as their makers round it

def cost_of_training(stage, recipe, config, shape, gpus, per_node=8):
    """FLOPs of a mean step on one GPU, the one with most to do, and {part: bytes} of its memory at most."""
    # The last GPU has a jump to differentiate. One alone with one clip has it in some steps.
    busiest, places = (gpus - 1, gpus), {(gpus - 1, gpus): 1.0}
    if recipe.batch == 1:
        busiest, places = (1, 2), {(1, 2): 1 - recipe.diffusion, (0, 2): recipe.diffusion}
        recipe = replace(recipe, batch=2)
    no_cost = dict(steps=1, lr=1.0, fake_lr=1.0, beta1=0.0, beta2=0.0, warmup=0, ema=0.0, ema_start=0)
    causal, most, window = config.kind == "causal", len(config.chunk_partition), config.full_chunk_limit

    def step(stage, chunks=None, place=busiest, steps=1, depths=(1, 2, 3), **changes):
        """FLOPs and peak of a step with so many chunks. Of many updates of the fake score one is counted."""
        if stage == "onpolicy" and recipe.fake_steps > 2 and "fake_steps" not in changes:
            few = functools.partial(step, stage, chunks, place, **changes)
            flops, peak = few(steps=steps, depths=depths, fake_steps=2)
            one, more = (few(depths=(1, 2), fake_steps=n, grad_chunks=0)[0] for n in (1, 1 + steps))
            return flops + (recipe.fake_steps - 2) * (more - one) / steps, peak
        changed = replace(recipe, **no_cost | {"bidirectional": 0.0} | changes)
        runs = [steps_on_meta(stage, changed, config, shape, n, steps, place, chunks) for n in depths]
        return at_depth(config.num_layers, *runs)

    def mean_step(stage, whole_clips):
        """FLOPs over the numbers of chunks that `Clips` draws, anchors and jumps; the highest peak.

        whole_clips: share of steps with flow matching of a whole clip beside."""
        flops = []
        for chunks in range(min(window, most), most + 1) if causal else [None]:
            depths = (1, 2, 3) if chunks in (None, most) else (1, 2)  # the most chunks need the most memory
            shares = places if stage == "flowmap" else {busiest: 1.0}
            made = {place: step(stage, chunks, place, depths=depths) for place in shares}
            flops.append(sum(share * made[place][0] for place, share in shares.items()))
        flops, peak = (flops[0] + sum(flops) / len(flops)) / 2, made[busiest][1]
        if causal and whole_clips:
            beside, alone = step(stage, most, bidirectional=1.0), step(stage, most)
            flops, peak = flops + whole_clips * (beside[0] - alone[0]), max(peak, beside[1])
        return flops, peak

    parts = memory_of(networks_on_meta(stage, recipe, config), recipe, min(gpus, per_node))
    if stage != "onpolicy":
        whole_clips = recipe.bidirectional if stage in ("teacher", "flowmap") else 0.0
        flops, parts["activations"] = mean_step(stage, whole_clips)
        return flops, parts
    # Stage 2 is a step of stage 1 or of consistency, and the judges and the rollout on top: measured as a
    # step of stage 2 without the step of stage 1 in it. A rollout of N steps has 3 - 2/N jumps in the mean.
    beside = "consistency" if is_baseline(stage, recipe) else "flowmap"
    flops, parts["activations"] = mean_step(beside, 0.0)
    if beside == "consistency":
        on_policy, peak = step(stage, window, steps=8)  # the mean of eight draws of N and k
    else:
        draws = most // math.gcd(recipe.grad_chunks, most) if causal else 1  # see `steps_on_meta`
        one, _ = step(stage, window, steps=draws, depths=(1, 2), rollout_steps=(1,))
        three, peak = step(stage, window, steps=draws, rollout_steps=(10**6,))
        on_policy = one + (three - one) * statistics.mean(1 - 1 / n for n in recipe.rollout_steps)
    parts["rollout"] = max(0, peak - parts["activations"])
    return flops + on_policy - step(beside, window, depths=(1, 2))[0], parts

def least_gpus(parts, shards, per_node, card):
    """The least number of a node's GPUs on which the parts fit, a tenth of a card kept free; or "no"."""
    for n in (2**i for i in range(per_node.bit_length())):
        total = sum(value * (1 if key in PARTS[4:] else shards / n) for key, value in parts.items())
        if total <= 0.9 * card * 2**30:
            return n
    return "no"

@dataclass(frozen=True)
class Machine:
    """What a plan is made for."""

    gpus: int = option(8, "number of GPUs", low=1)
    gpus_per_node: int = option(8, "over which the weights are sharded", low=1)
    tflops: float = option(989.0, "peak of a GPU in bfloat16; an H100's or H200's", above=0)
    utilisation: float = option(0.3, "share of it that the work reaches", above=0, high=1)

def print_plan(name, machine, given):
    """What every stage of a preset's recipe costs on some GPUs, with {option: value} changed."""
    (config, shape), gpus, per_node = preset(name), machine.gpus, machine.gpus_per_node
    shards, rate = min(gpus, per_node), machine.tflops * 1e12 * machine.utilisation
    if gpus % shards:
        raise ValueError(f"gpus are {gpus}, expected a multiple of the {per_node} of a node")
    check(Recipe, given)
    recipes, each = {}, gpus * given.get("accumulate", 1)  # a clip for each GPU and micro-batch
    for stage in STAGES:
        wanted = replace(Recipe(), **RECIPES[name.removesuffix("-causal")][stage] | given).batch
        recipes[stage] = recipe_of(name, stage, given | dict(batch=-(-wanted // each) * each), gpus)

    size = {kind: parameters(replace(config, kind=kind)) for kind in ("teacher", config.kind)}
    tokens = math.prod(shape) // shape[1] // math.prod(config.patch_size)
    print(f"{name}: {size['teacher']:,} parameters, with two times {size[config.kind]:,}; {tokens:,} tokens")
    work = f"{100 * machine.utilisation:g} % of {machine.tflops:g} TFLOP/s"
    print(f"{gpus} GPU(s) at {work}, weights over {shards} of them; a bidirectional judge\n")
    print(f"{'':12}{'batch':>6}{'steps':>7}{'PFLOP':>9}{'s':>9}{'GPU-days':>10}   fits from so many GPUs of")
    print(f"{'':25}{'of a GPU and step':>18}{'':10}   " + "".join(f"{card:>6} GiB" for card in CARDS))
    table, days = [], {}

    def line(row, flops, parts, recipe=None):
        head = f"{row:12}{recipe.batch:6}{recipe.steps:7}" if recipe else f"{row:25}"
        days[row] = flops / rate * recipe.steps * gpus / 86400 if recipe else 0
        cost = f"{flops / 1e15:9.3g}{flops / rate:9.3g}" + (f"{days[row]:10.3g}" if recipe else " " * 10)
        over = (shards, per_node) if recipe else (1, 1)
        least = [least_gpus(parts, *over, card) for card in CARDS]
        tqdm.write(f"{head}{cost}   " + "".join(f"{n:>10}" for n in least))
        held = [parts.get(part, 0) / 2**30 for part in PARTS]
        table.append(f"{row:12}" + "".join(f"{value:12.2f}" for value in (*held, sum(held))))

    for stage, recipe in tqdm(recipes.items(), desc="counting", disable=None, leave=False):
        # Stage 0 of Wan is bidirectional: so is the judge, also of causal students.
        kind = "anyflow" if stage == "teacher" and not name.startswith("tiny") else config.kind
        of_stage = replace(config, kind=kind)
        line(stage, *cost_of_training(stage, recipe, of_stage, shape, gpus, per_node), recipe)
    flops, peak = cost_of_sampling(config, shape)
    line("clip, 4 calls", flops, {"weights": 2 * size[config.kind], "activations": peak})
    total = sum(days[stage] for stage in ("teacher", "flowmap", "onpolicy"))
    print(f"\nstages 0, 1 and 2 together: {total:.3g} GPU-days")
    print(f"\nmemory of a GPU, GiB\n{'':12}" + "".join(f"{part:>12}" for part in (*PARTS, "total")))
    print("\n".join(table))

    print("\nweights and optimiser states of stage 2 in all, GiB")
    forms = {"three whole networks": dict(lora=0), "three with LoRA": dict(share=False), "this recipe": {}}
    for form, changes in forms.items():
        recipe = replace(recipes["onpolicy"], **changes)
        parts = memory_of(networks_on_meta("onpolicy", recipe, config), recipe, 1)
        print(f"{form:23}{(parts['weights'] + parts['optimiser']) / 2**30:8.4g}")

def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m full.plan", description=__doc__.split("\n\n")[0],
                                     allow_abbrev=False)  # --data is train.py's, not --data-anchors
    parser.add_argument("--preset", choices=NAMES, required=True)
    add_options(parser.add_argument_group("machine"), Machine, {})
    add_options(parser.add_argument_group("recipe", "of every stage, in place of the preset's"), Recipe, None)
    args = vars(parser.parse_args(argv))
    given = lambda form: {f.name: args[f.name] for f in fields(form) if args[f.name] is not None}
    plan = lambda: print_plan(args["preset"], Machine(**check(Machine, given(Machine))), given(Recipe))
    command("full.plan", plan, "nothing is kept")

if __name__ == "__main__":
    main()
