"""Processes and memory: FSDP2 over the GPUs of a node, and all networks of a stage as adapters of one."""

import os
import re
import warnings
from collections import defaultdict
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import anyflow
from full.compile import compile_blocks
from full.lora import BODY, STUDENT, LoRALinear, add_lora
from full.options import device_of, end_with_parent

TRAINED = ("student", "fake")

# One process needs no group to save a checkpoint; and nothing here writes into a block's output.
warnings.filterwarnings("ignore", message="torch.distributed is disabled|FSDP2-.* module .* returned a view")

def start_processes(device, dtype):
    """Join torchrun's processes. FSDP also does mixed precision: for that, one process is a group."""
    device = device_of(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        rank, world = (int(os.environ.get(key, 0)) for key in ("RANK", "WORLD_SIZE"))
        if not 0 <= rank < world:
            raise ValueError(f"RANK is {rank}, expected 0 to {world - 1} for WORLD_SIZE {world}")
        end_with_parent()
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
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

def wait_for_all(group=None):
    if dist.is_initialized():
        dist.barrier(group)

def local(x):
    """This process's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x

def whole(x):
    """All of a tensor that may be sharded, on every process."""
    return x.full_tensor() if isinstance(x, DTensor) else x

def trained(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}

@torch.no_grad()
def blind(net, weights, fastest):
    """Zero in trained weights {name: tensor}, and in their gradients, what sees sinusoids of time faster than
    this: AdamW and the average then keep the zeros. A LoRA's change is blind; what is frozen stays as it is.
    """
    if fastest:
        columns = 1000 * net.condition_embedder.frequencies().repeat(2) > fastest  # cosines, then sines
        for name, p in weights.items():
            if re.search(r"(time|delta)_embedder\.linear_1\.(weight|lora_down)$", name):
                for x in (p, p.grad) if p.grad is not None else (p,):
                    local(x)[:, columns.to(x.device)] = 0  # sharding divides rows

def clip_norm(net, weights, recipe):
    """The norm of the gradients of trained weights {name: tensor}, which are clipped in place."""
    blind(net, weights, recipe.fastest)
    return whole(torch.nn.utils.clip_grad_norm_(weights.values(), recipe.clip)).item()

class Means:
    """What a step measures, by name: means over its micro-batches and over all processes."""

    def __init__(self):
        self.sums, self.norms = defaultdict(lambda: 0), {}

    def add(self, name, values):
        self.sums[name] = self.sums[name] + torch.stack([values.sum(), values.new_tensor(len(values))])

    def read(self):
        """{name: mean}; a name without any value is left out."""
        rows = anyflow.sum_over_processes(torch.stack([*self.sums.values()])).tolist()
        return {name: total / count for name, (total, count) in zip(self.sums, rows) if count}

def mesh_of_nodes(kind):
    """All processes in a row, or, where there are several nodes, in a row for each; None without a group."""
    if not dist.is_initialized():
        return None
    world, node = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world % node:
        raise ValueError(f"there are {world} processes, expected as many on each node, {node}")
    if world > node:
        return init_device_mesh(kind, (world // node, node), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (world,))

def shard(model, recipe, device, mesh):
    """Compile each block, and shard each over the processes of a node, with a copy on every node.

    Block by block, from a model that lies on the disk: a process never holds more than its share and one
    block. Trained weights are float32, for steps of 1e-5 are lost in bfloat16; frozen ones that of the work.
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


# ---- One frozen network for all ----------------------------------------------------------------------------
#
# The release keeps three whole models in stage 2. But all of them are raw Wan with a LoRA,
#     judge = Wan + teacher's LoRA       fake score = Wan + LoRA       student = Wan + LoRA
# where the fake score's goes on from the teacher's, the student's from stage 1's: one frozen base serves all.
# Every network keeps its own modules; the base's weights are shared.

def holder_of(nets):
    """Whose frozen weights the others share: the judge's, or the teacher's, or nobody's."""
    return next((name for name in ("judge", "teacher") if name in nets), None)

def adapt(stage, role, net, recipe, starts=None):
    """Freeze what is not trained: the whole network with its LoRA `starts`, or all but a LoRA that goes on
    from there (see `add_lora`), or nothing."""
    starts = starts or {}
    if role in TRAINED and recipe.lora:
        add_lora(net, recipe.lora, STUDENT if role == "student" and stage != "teacher" else BODY, starts)
    elif role not in TRAINED:
        for name, start in starts.items():
            LoRALinear.wrap(net.get_submodule(name), start[0].shape[1], start)
        net.requires_grad_(False)

def assemble(nets, recipe, device):
    """Shard {role: network}, and let the networks share what is frozen and equal, in place."""
    holder, mesh = holder_of(nets), mesh_of_nodes(device.type)
    names = {}
    if recipe.lora and recipe.share and holder is not None:
        names = {role: equal_weights(net, nets[holder], getattr(torch, recipe.dtype))
                 for role, net in nets.items() if role != holder}
    for role in sorted(nets, key=lambda role: role != holder):
        blind(nets[role], trained(nets[role]), recipe.fastest)
        shard(nets[role], recipe, device, mesh)
        if role in names:
            link(role, nets[role], holder, nets[holder], names[role])

def link(name, net, base, base_net, names):
    """Make net's weights of these names, if they are frozen, the same tensors as the holder's."""
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
    same = lambda p, q: p.data_ptr() == q.data_ptr() or torch.equal(p.to(dtype), q.to(dtype))
    return [name for name, p in net.named_parameters() if ".lora_" not in name
            and name in theirs and p.shape == theirs[name].shape and same(p, theirs[name])]
