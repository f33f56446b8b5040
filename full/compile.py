"""For speed and memory: blocks compiled by torch, and what a backward pass keeps of a block."""

import functools

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

GRAPHS = 64  # that one function may be compiled to: chunks have many shapes, each with and without gradient

@functools.cache
def compiled_flex_attention():
    torch._dynamo.config.recompile_limit = GRAPHS
    return torch.compile(flex_attention, dynamic=False)

def compile_blocks(model):
    """Compile a network block by block, so that all blocks share their graphs."""
    torch._dynamo.config.recompile_limit = GRAPHS
    for block in model.blocks:
        block.compile()

ATTENTION = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in (
    "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")]
ATTENTION.append(torch.ops.higher_order.flex_attention)

def keep_attention(context, op, q=None, k=None, *args, **kwargs):
    """Keep self-attention, which has at least as many keys as queries; a prompt has fewer. Recompute the
    rest."""
    to_itself = op in ATTENTION and q.shape[2] <= k.shape[2]
    return CheckpointPolicy.MUST_SAVE if to_itself else CheckpointPolicy.PREFER_RECOMPUTE

# At 32,760 tokens it is half of a block's work (14B) or more (1.3B), and one tensor of the size of its input.
keep_self_attention = functools.partial(create_selective_checkpoint_contexts, keep_attention)
