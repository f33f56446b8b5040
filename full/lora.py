"""LoRA (2106.09685): a low-rank difference in training beside frozen weights; differences of networks."""

import re

import torch
import torch.nn.functional as F
from torch import nn

# The linears that the release adapts.
LORA = r"attn1\.(to_[qkv]|to_out\.0)$|ffn\.net\.(0\.proj|2)$|(time|delta)_embedder\.linear_[12]$"

class LoRALinear(nn.Linear):
    """W x + b + (alpha / rank) up(down(x)): W and b frozen, `up` zero at the start, where nothing changes.

    Where W is another network's weight, shared with it, the frozen `lora_start_*` lead from that network to
    where this one starts: W + start_up start_down.
    """

    @classmethod
    def wrap(cls, linear, rank, alpha, start=None):
        linear.__class__ = cls
        linear.requires_grad_(False)
        linear.scale = alpha / rank
        weight = linear.weight
        outputs, inputs = weight.shape
        linear.lora_down = nn.Parameter(weight.new_empty(rank, inputs).normal_(std=inputs**-0.5))
        linear.lora_up = nn.Parameter(weight.new_zeros(outputs, rank))
        up, down = (None, None) if start is None else (nn.Parameter(x, requires_grad=False) for x in start)
        linear.lora_start_up, linear.lora_start_down = up, down

    def forward(self, x):
        y = super().forward(x) + F.linear(F.linear(x, self.lora_down), self.lora_up) * self.scale
        if self.lora_start_up is not None:
            y = y + F.linear(F.linear(x, self.lora_start_down), self.lora_start_up)
        return y

    def merged(self):
        added = self.scale * self.lora_up.float() @ self.lora_down.float()
        if self.lora_start_up is not None:
            added = added + self.lora_start_up.float() @ self.lora_start_down.float()
        return self.weight + added.to(self.weight.dtype)

def adapted(model, pattern=LORA):
    """{name: linear} of the linears that a LoRA goes to."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(pattern, n)}

def add_lora(model, rank, alpha, pattern=LORA, starts=None):
    """Freeze the model and give a LoRA to every linear whose name matches, {name: (up, down)} in `starts` for
    its `lora_start_*`; a causal model's compressed patch embedding stays trainable as a whole. Returns the
    model. ValueError where nothing matches."""
    chosen = adapted(model, pattern)
    if any(isinstance(linear, LoRALinear) for linear in chosen.values()):
        raise ValueError("the model has a LoRA already, expected one without: save and load it to merge")
    if not chosen or rank < 1:
        raise ValueError(f"LoRA has rank {rank} and {len(chosen)} linears, expected at least 1 of each")
    model.requires_grad_(False)
    for name, linear in chosen.items():
        LoRALinear.wrap(linear, rank, alpha, (starts or {}).get(name))
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

def low_rank(difference, rank):
    """up (outputs, rank) and down (rank, inputs) with the product nearest to difference (outputs, inputs)."""
    with torch.random.fork_rng(devices=[difference.device] if difference.is_cuda else []):
        torch.manual_seed(0)  # the same on every process, and not of a run's random numbers
        up, sizes, down = torch.svd_lowrank(difference, min(rank + 8, *difference.shape), niter=4)
    return (up * sizes)[:, :rank].contiguous(), down[:, :rank].mT.contiguous()
