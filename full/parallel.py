"""Processes and memory: FSDP2 over the GPUs of a node, and three networks as adapters of one."""

import os
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from full.compile import compile_blocks
from full.lora import adapted, add_lora, low_rank
from full.options import device_of

TRAINED = ("student", "fake")

# One process needs no group to save a checkpoint; and nothing here writes into a block's output.
HARMLESS = "torch.distributed is disabled|FSDP2-wrapped module .* returned a view"
warnings.filterwarnings("ignore", message=HARMLESS)

def start_processes(device, dtype):
    """Join torchrun's processes. FSDP also does mixed precision: for that, one process is a group."""
    device = device_of(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    elif dtype != "float32":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device

def place():
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def main_process():
    return place()[0] == 0

def wait_for_all():
    if dist.is_initialized():
        dist.barrier()

def local(x):
    """This process's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x

def whole(x):
    """All of a tensor that may be sharded, on every process."""
    return x.full_tensor() if isinstance(x, DTensor) else x

def trained(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}

def mesh_of_nodes(kind):
    """All processes in a row, or, where there are several nodes, in a row for each; None without a group."""
    if not dist.is_initialized():
        return None
    world, node = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world > node:
        return init_device_mesh(kind, (world // node, node), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (world,))

def shard(model, recipe, device, mesh):
    """Compile each block, and shard each over the processes of a node, with a copy on every node.

    Block by block, from a model that lies on the disk: a process never holds more than its share and one
    block. Trained weights are float32, for steps of 1e-5 are lost in bfloat16; frozen ones have that of the
    work.
    """
    model.checkpointing = recipe.checkpointing
    if recipe.compile:
        compile_blocks(model)
    # Not the inputs: a time of 0.999 is 1 in bfloat16.
    policy = MixedPrecisionPolicy(getattr(torch, recipe.dtype), torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        for p in module.parameters():
            if not isinstance(p, DTensor):
                p.data = p.data.to(device, torch.float32 if p.requires_grad else getattr(torch, recipe.dtype))
        if mesh is not None:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    if mesh is not None:
        register_fsdp_forward_method(model, "extend")


# ------------------------------------------------------------------------------------------------------------
# One frozen network for three
#
# The release keeps three whole models in stage 2. With LoRA they are one frozen base, the judge, and two
# adapters:
#     judge = base       fake score = base + LoRA       student = base + what stage 1 taught it + LoRA
# What stage 1 taught is itself of low rank. Every network keeps its own modules; the base's weights are
# shared.
# ------------------------------------------------------------------------------------------------------------

def base_of(nets):
    """Whose frozen weights the others share: the judge's, or the teacher's, or nobody's."""
    return next((name for name in ("judge", "teacher") if name in nets), None)

def adapt(name, net, recipe, starts=None):
    """Freeze what is not trained: the whole network, or all but a LoRA (see `add_lora`), or nothing."""
    if name not in TRAINED:
        net.requires_grad_(False)
    elif recipe.lora:
        add_lora(net, recipe.lora, recipe.lora, starts=starts)

def assemble(nets, recipe, device):
    """Add LoRA, shard, and let the networks {name: network} share what is frozen and equal, in place."""
    base, mesh = base_of(nets), mesh_of_nodes(device.type)
    shared = {}  # {name of a network: names of its weights that are the base's}
    for name, net in nets.items():
        starts = {}
        if recipe.lora and recipe.share and base not in (None, name):
            equal = equal_weights(net, nets[base], getattr(torch, recipe.dtype))
            starts = low_rank_differences(net, nets[base], recipe.lora, device, leave=equal)
            for linear in starts:
                net.get_submodule(linear).weight.data = nets[base].get_submodule(linear).weight.data
            shared[name] = equal + [f"{linear}.weight" for linear in starts]
        adapt(name, net, recipe, starts)
    for name in sorted(nets, key=lambda name: name != base):
        shard(nets[name], recipe, device, mesh)
        if name in shared:
            link(name, nets[name], base, nets[base], shared[name])

def link(name, net, base, base_net, names):
    """Make net's weights of these names, if they are frozen, the same tensors as the base's."""
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    theirs = dict(base_net.named_parameters())
    # FSDP pads what its processes cannot divide, in a copy for each network: leave those few.
    even = lambda p: not isinstance(p, DTensor) or len(p) % p.device_mesh.shape[-1] == 0
    linked = {n: theirs[n] for n in names if n in frozen and even(theirs[n])}
    net.load_state_dict(linked, strict=False, assign=True)
    if main_process():
        print(f"{name} shares {len(linked)} of its {len(frozen)} frozen weights with {base}")

def equal_weights(net, base, dtype):
    """Names of the weights that are the same in both, in the precision that they are used in."""
    theirs = dict(base.named_parameters())
    return [name for name, p in net.named_parameters()
            if name in theirs and p.shape == theirs[name].shape
            and torch.equal(p.to(dtype), theirs[name].to(dtype))]

def low_rank_differences(net, base, rank, device, leave):
    """{linear: (up, down)} where weight = base's weight + up down, as exactly as the weights are stored."""
    theirs, found = dict(base.named_parameters()), {}
    for linear, module in adapted(net).items():
        p, q = module.weight, theirs.get(f"{linear}.weight")
        if q is None or p.shape != q.shape or f"{linear}.weight" in leave:
            continue
        difference = p.detach().to(device, torch.float32) - q.detach().to(device, torch.float32)
        up, down = low_rank(difference, rank)
        for factor in (up, down) if dist.is_initialized() else ():  # many factors have one product: agree
            dist.broadcast(factor, 0)
        coarse = max(torch.finfo(x.dtype).eps for x in (p, q))
        if (difference - up @ down).norm().item() <= max(coarse / 2, 1e-6) * p.norm().item():
            found[linear] = up, down
    return found
