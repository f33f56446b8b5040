"""LoRA (2106.09685): a low-rank difference, in training or frozen, beside frozen weights."""

import math
import re

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from full.files import read_tensors, write

# The linears that the release adapts; teacher, judge and fake score keep their time embedders.
BODY = r"attn1\.(to_[qkv]|to_out\.0)$|ffn\.net\.(0\.proj|2)$"
STUDENT = rf"{BODY}|(time|delta)_embedder\.linear_[12]$"
ADAPTER = "adapter.safetensors"

class LoRALinear(nn.Linear):
    """W x + b + up(down(x)), W and b frozen: LoRA with alpha = rank."""

    @classmethod
    def wrap(cls, linear, rank, start=None):
        """start: (up (outputs, r), down (r, inputs)), r <= rank. The rest starts at 0, as in PEFT."""
        linear.__class__ = cls
        linear.requires_grad_(False)
        outputs, inputs = linear.weight.shape
        exact = dict(dtype=torch.float32, device=linear.weight.device)  # the base may be stored in bfloat16
        up, down = torch.zeros(outputs, rank, **exact), torch.empty(rank, inputs, **exact)
        down.uniform_(-(inputs**-0.5), inputs**-0.5)
        if start is not None:
            up[:, : start[0].shape[1]], down[: start[1].shape[0]] = start
        linear.lora_up, linear.lora_down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_down), self.lora_up)

    def merged(self):
        return self.weight + (self.lora_up.float() @ self.lora_down.float()).to(self.weight.dtype)

def adapted(model, pattern=STUDENT):
    """{name: linear} of the linears that a LoRA goes to."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(pattern, n)}

def add_lora(model, rank, pattern=STUDENT, starts=None):
    """Freeze the model and give a LoRA in training to every linear whose name matches, or is in `starts`
    {name: (up, down)}, where it goes on from there; a causal model's compressed patch embedding stays
    trainable as a whole. Returns the model. ValueError where nothing matches."""
    starts = starts or {}
    chosen = adapted(model, pattern) | {name: model.get_submodule(name) for name in starts}
    if any(isinstance(linear, LoRALinear) for linear in chosen.values()):
        raise ValueError("the model has a LoRA already, expected one without: save and load it to merge")
    if not chosen or rank < 1:
        raise ValueError(f"LoRA has rank {rank} and {len(chosen)} linears, expected at least 1 of each")
    model.requires_grad_(False)
    for name, linear in chosen.items():
        LoRALinear.wrap(linear, rank, starts.get(name))
    if model.config.kind == "causal":
        model.far_patch_embedding.requires_grad_(True)
    return model

def merged_state(model):
    """The state dict with every LoRA added into its weight: names and shapes of a model without LoRA."""
    state = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{name}.weight"] = module.merged().detach()
    return state

def save_adapter(model, folder):
    """The LoRA alone, beside the weights into which it is merged: a later stage goes on from it."""
    state = {name: value.contiguous() for name, value in model.state_dict().items() if ".lora_" in name}
    write(folder / ADAPTER, lambda part: save_file(state, part))

def read_adapter(folder):
    """{linear: (up, down)} of a folder; ValueError for names that are no LoRA's."""
    state = read_tensors(folder / ADAPTER)
    linears = {name.rpartition(".")[0] for name in state}
    if state.keys() != {f"{name}.lora_{side}" for name in linears for side in ("up", "down")}:
        raise ValueError(f"{folder / ADAPTER} has {', '.join(sorted(state)[:3])}, ...: expected lora_up and"
                         " lora_down of each linear")
    return {name: (state[f"{name}.lora_up"], state[f"{name}.lora_down"]) for name in linears}

def low_rank(difference, rank):
    """up (outputs, rank) and down (rank, inputs) with the product nearest to difference (outputs, inputs)."""
    with torch.random.fork_rng(devices=[difference.device] if difference.is_cuda else []):
        torch.manual_seed(0)  # the same on every process, and not of a run's random numbers
        up, sizes, down = torch.svd_lowrank(difference, min(rank + 8, *difference.shape), niter=4)
    return (up * sizes)[:, :rank].contiguous(), down[:, :rank].mT.contiguous()

def agreed(factors):
    """The first process's factors on all: many have one product."""
    for factor in factors if dist.is_initialized() else ():
        dist.broadcast(factor, 0)
    return factors

def unmerge(net, base, rank, stored, device="cpu"):
    """Take a network's weights apart, in place, into the base's and a LoRA: returns its {linear: (up, down)}.

    base: {name: tensor} of the weights that it was trained from. stored: {linear: (up, down)} that its folder
    holds, or nothing: then an SVD finds them. What is not of that rank stays whole; how many is returned too.
    """
    starts, whole = {}, 0
    for name, linear in adapted(net).items():
        p, q = linear.weight, base.get(f"{name}.weight")
        if q is None or p.shape != q.shape or torch.equal(p, q.to(p.dtype)):
            continue
        difference = p.detach().to(device, torch.float32) - q.to(device, torch.float32)
        up, down = stored.get(name) or agreed(low_rank(difference, rank))
        rounding = torch.finfo(p.dtype).eps / 3  # of the stored weights, at most (RMS, relative)
        fits = up.shape[1] <= rank and up.shape[0] == len(p) and down.shape[1] == p.shape[1]
        left = (difference - up.to(device).float() @ down.to(device).float()).norm() if fits else math.inf
        if left <= max(rounding, 1e-6) * p.norm().item():
            starts[name], linear.weight.data = (up.cpu(), down.cpu()), q
        else:
            whole += 1
    return starts, whole
