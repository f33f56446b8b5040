"""For speed and memory: blocks compiled by torch, and what a backward pass keeps of a block and a rollout."""

import functools
import os

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from anyflow import jump

GRAPHS = 128  # that one function may have: for each number of chunks, with and without gradient

def compile_blocks(model):
    """Compile a network block by block, so that all blocks share their graphs."""
    torch._dynamo.config.recompile_limit = GRAPHS
    for block in model.blocks:
        block.compile()

ATTENTION = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in (
    "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")]

def keep_attention(context, op, q=None, k=None, *args, **kwargs):
    """Keep self-attention, which has at least as many keys as queries (and so may a short clip's text)."""
    to_itself = op in ATTENTION and q.shape[2] <= k.shape[2]
    return CheckpointPolicy.MUST_SAVE if to_itself else CheckpointPolicy.PREFER_RECOMPUTE

# At 32,760 tokens it is half of a block's work (14B) or more (1.3B), and one tensor of the size of its input.
keep_self_attention = functools.partial(create_selective_checkpoint_contexts, keep_attention)

class LeanNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # bit for bit as torch's
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, g):
        x, weight, scale = ctx.saved_tensors
        h = x * scale
        g_x = torch.addcmul(g * weight, h, (g * h @ weight)[..., None], value=-1 / len(weight)).mul_(scale)
        return g_x, h.mul_(g).flatten(0, -2).sum(0), None

def lean(norm, x):
    """norm(x). Where that takes several kernels, the backward pass keeps x alone, not x / RMS too."""
    several = not (x.is_cuda or x.dtype.itemsize < 4 or torch.compiler.is_compiling())
    return LeanNorm.apply(x, norm.weight, norm.eps) if several and x.requires_grad else norm(x)

class Again:
    """A student in one part of a rollout: called without a graph, and once more, with one, by `go_back`.

    So a backward pass through a rollout takes the memory of one call. It comes after the loss's, within which
    FSDP2 would keep every block gathered. past: the chunks before this part, of a causal student.
    """

    def __init__(self, student, text, past):
        self.student, self.text, self.past, self.calls = student, text, past, []

    def __call__(self, z, t, r, **cond):
        if torch.is_grad_enabled():
            self.calls.append((z.detach().requires_grad_(), t, r))
        with torch.no_grad():
            return self.student(z, t, r, **cond)

    def go_back(self, gradient):
        """From the gradient of the part's result through its calls, the last first, to the weights."""
        net, cond = self.student, {"text": self.text}
        if self.calls and net.config.kind == "causal":
            cond["cache"] = net.extend(net.new_cache(), self.past, self.text)
        for z, t, r in reversed(self.calls):
            jump(net, z, t, r, **cond).backward(gradient)
            gradient = z.grad

def what_needs_less(recipe, stage, preset):
    """For a training that ran out of memory: the options that it does not use yet."""
    gpus, node = (int(os.environ.get(key, 1)) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    onpolicy = stage == "onpolicy"
    unused = {
        f"--accumulate {recipe.batch // gpus}": recipe.accumulate * gpus < recipe.batch,
        "--checkpointing full": recipe.checkpointing != "full",
        "--recompute-rollout true": onpolicy and not recipe.recompute_rollout,
        "--grad-chunks 2": onpolicy and preset.endswith("-causal") and not (
            recipe.grad_chunks or recipe.recompute_rollout),
        "--lora 256": not recipe.lora,
        "--share true": recipe.lora and not recipe.share,
        "more GPUs": True,
    }
    some = ", ".join(name for name, helps in unused.items() if helps)
    plan = f"python -m full.plan --preset {preset} --gpus {gpus} --gpus-per-node {node}"
    return f"It needs less with {some}; {plan} says how much."
