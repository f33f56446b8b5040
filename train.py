"""One training loop for every stage and every size: a tiny video world on a laptop, Wan 14B on a cluster.

    P="--preset tiny-causal"
    python train.py teacher     $P --out out/teacher                                           # 0: flow matching
    python train.py flowmap     $P --out out/forward --init out/teacher                        # 1: flow map
    python train.py onpolicy    $P --out out/anyflow --init out/forward --teacher out/teacher  # 2: on-policy
    python train.py consistency $P --out out/consistency --init out/teacher                    # the baseline
    python train.py prepare --preset wan-14b --init WAN --videos FOLDER --data SHARDS          # videos to latents
    torchrun --nproc-per-node 8 train.py flowmap --preset wan-14b-causal --init WAN --data SHARDS --out OUT
    python train.py plan    --preset wan-14b-causal --gpus 64                                  # what it costs

A model folder is the layout of diffusers, as input and as result. Checkpoints are in OUT/checkpoints; `--resume`
goes on from the newest, on a CPU bit for bit. Under torchrun the networks are sharded (FSDP2). Every number of a
recipe is an option.
"""

import argparse
import functools
import gc
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import anyflow
from model import LORA, Wan, add_lora, chunk_mask, compile_blocks, low_rank, provenance, read_json, write
from model import PRESETS as SIZES_OF

STAGES = ("teacher", "flowmap", "onpolicy", "consistency")
COMMANDS = (*STAGES, "prepare", "plan")

# One process needs no group to save a checkpoint; and nothing here writes into a block's output.
warnings.filterwarnings("ignore", message="torch.distributed is disabled|FSDP2-wrapped module .* returned a view")


# ------------------------------------------------------------------------------------------------------------
# Recipes
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Every number of a run. The defaults are the published stage 1 of Wan 1.3B (arXiv 2605.13724)."""

    steps: int = 6000
    batch: int = 32  # clips a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches a step
    lr: float = 5e-5
    beta1: float = 0.9
    beta2: float = 0.95
    warmup: int = 1000  # steps of rising learning rate
    decay: float = 0.0  # share of the steps, the last ones, in which it falls to zero
    clip: float = 1.0  # norm of the gradient
    ema: float = 0.999
    ema_start: int = 1000  # before this step the average is the weights themselves
    shift: float = 5.0
    drop: float = 0.1  # share of prompts replaced by the null prompt
    own_times: float = 0.0  # bidirectional teacher: share of clips whose frames have times of their own
    # stage 1
    guidance: float = 3.0  # fused into the student
    target: str = "data"  # velocity of the target: "data", or "teacher" with less variance
    weight: str = "paper"  # of time: "paper" (1 for consistency), or "inverse" 1 / (t + 0.05)
    balance: bool = True
    diffusion: float = 0.5  # share of r = t
    endpoint: float = 0.25  # share of r = 0
    eps: float = 0.005  # half the step of the central difference
    bidirectional: float = 0.1  # causal: share of steps with flow matching of the whole clip beside
    # stage 2
    rollout: str = "flowmap"  # simulation: "flowmap", or "consistency" to train the baseline on-policy
    rollout_steps: tuple = (2, 4, 8, 16, 50)  # N, drawn anew each step
    dmd: float = 1.0  # weight beside the stage-1 loss
    dmd_guidance: float = 4.0  # of the teacher that judges: the release's x0_cond + 3 (x0_cond - x0_null)
    fake_lr: float = 2e-6
    fake_steps: int = 1  # updates of the fake score for one of the student
    # baseline
    teacher_steps: int = 50  # midpoint steps that divide [0, 1]
    # machine
    lora: int = 256  # rank, with alpha = rank; 0 trains all weights
    dtype: str = "bfloat16"  # of forwards and backwards; weights and sums over processes stay float32
    share: bool = True  # with LoRA: teacher, student and fake score as adapters of one frozen network
    checkpointing: str = (
        "full"  # what the backward pass recomputes: "none", "full", or all but attention "selective"
    )
    compile: bool = True


CHOICES = {"target": ("data", "teacher"), "weight": ("paper", "inverse"), "rollout": ("flowmap", "consistency"),
           "dtype": ("float32", "bfloat16"), "checkpointing": ("none", "full", "selective")}  # fmt: skip

ON_POLICY = dict(steps=1200, lr=2e-6, beta1=0.0, beta2=0.999, warmup=0, ema=0.99, ema_start=200)
WAN = {stage: ON_POLICY if stage == "onpolicy" else {} for stage in STAGES}
WAN_14B = {stage: dict(steps=4000, batch=16) | WAN[stage] for stage in STAGES}

TINY = dict(beta2=0.99, warmup=100, decay=0.3, ema=0.998, ema_start=0, guidance=1.0, target="teacher", eps=0.02,
            lora=0, dtype="float32", checkpointing="none", compile=False)  # fmt: skip
TINY = {
    "teacher": TINY | dict(steps=8000, lr=3e-3, own_times=0.5),
    "flowmap": TINY | dict(steps=4000, lr=1e-3, batch=16),
    "consistency": TINY | dict(steps=4000, lr=1e-3, batch=16, teacher_steps=8),
    "onpolicy": TINY | dict(steps=1000, lr=2e-4, fake_lr=4e-4, batch=16, beta1=0.0, warmup=20, fake_steps=3,
                            rollout_steps=(1, 2, 4), dmd_guidance=1.0),
}  # fmt: skip

# Preset: the network, latent frames, height and width of a clip, and the recipe of each stage.
SIZES = {"tiny": ("tiny", 9, 12, 12, TINY), "wan-1.3b": ("wan-1.3b", 21, 60, 104, WAN),
         "wan-14b": ("wan-14b", 21, 60, 104, WAN_14B)}  # fmt: skip
PRESETS = [*SIZES, *(f"{name}-causal" for name in SIZES)]


def preset(name):
    """WanConfig (causal if the name says so), shape (F, C, H, W) of a clip, {stage: its changes to `Recipe`}."""
    size, frames, height, width, stages = SIZES[name.removesuffix("-causal")]
    config = replace(SIZES_OF[size], kind="causal" if name.endswith("-causal") else "anyflow")
    if size == "tiny":  # the whole of a 12 x 12 frame in one compressed patch
        config = replace(config, compressed_patch_size=(1, 12, 12), chunk_partition=(1, 2, 2, 2, 2))
    return config, (frames, config.in_channels, height, width), stages


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------


class Shards:
    """A folder of safetensors files, each with `latents` (n, F, C, H, W) and `text` (n, L, text_dim) of n clips,
    and `null.safetensors` with the null prompt, `text` (1, L, text_dim). A clip is read when it is asked for."""

    def __init__(self, folder, shape, text_dim, skip_bad=False):
        folder, text = Path(folder), None
        if not folder.is_dir():
            raise ValueError(f"no data folder {folder}")
        self.files, self.shuffled, bad = [], None, []
        for path in sorted(folder.glob("*.safetensors")):
            if path.name == "null.safetensors" or path.name[0] == ".":
                continue
            try:
                file = safe_open(path, "pt")
                sizes = [tuple(file.get_slice(key).get_shape()) for key in ("latents", "text")]
                text = text or (sizes[1][1], text_dim)
                if sizes[0][1:] != shape or sizes[1] != (sizes[0][0], *text):
                    wanted = f"(n, {', '.join(map(str, shape))}) and (n, {', '.join(map(str, text))})"
                    raise ValueError(f"latents {sizes[0]} and text {sizes[1]}, expected {wanted}")
                self.files += [(file, i) for i in range(sizes[0][0])]
            except (SafetensorError, ValueError, OSError) as error:
                bad.append(f"{path}: {error}")
        if bad and not skip_bad:
            raise ValueError(f"{len(bad)} bad shard(s), the first {bad[0]}; --skip-bad-shards uses the others")
        if not self.files:
            raise ValueError(f"no clips in {folder}, expected safetensors files with latents and text")
        path = folder / "null.safetensors"
        try:
            self.null = load_file(path)["text"].float()
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{path} does not hold the null prompt, `text` (1, L, text_dim): {error}") from None
        if self.null.shape != (1, *text):
            raise ValueError(f"{path} has text {tuple(self.null.shape)}, expected {(1, *text)} as in the shards")

    def __len__(self):
        return len(self.files)

    def batch(self, positions, seed):
        """Clips by their place in an endless row of epochs, each shuffled by its own seed."""
        picked = []
        for position in positions:
            epoch, i = divmod(position, len(self.files))
            if (seed, epoch) != self.shuffled:
                self.shuffled = seed, epoch
                self.order = np.random.default_rng(self.shuffled).permutation(len(self.files))
            picked.append(self.files[self.order[i]])
        return tuple(
            torch.stack([file.get_slice(key)[i] for file, i in picked]).float() for key in ("latents", "text")
        )


VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")


def prepare(videos, folder, shape, text_dim, encode, vae, size=32, rank=0, world=1):
    """Every video below a folder, with its caption in a .txt of the same name, to shards: (clips, bad files).

    The first frames of each, of another aspect the middle. shape: (F, C, H, W) of the latents. encode, vae: of
    `sample`. manifest-RANK.jsonl names the shard and row of each video, or why it was skipped; what lies in
    a shard is not encoded again, so an interrupted run goes on. Latents and text are bfloat16. Raises ValueError.
    """
    from sample import read_video

    files = sorted(p for p in Path(videos).rglob("*") if p.suffix.lower() in VIDEOS)
    if not files:
        raise ValueError(f"no videos in {videos}, expected files {', '.join(VIDEOS)}")
    frames, _, height, width = shape
    pixels = (frames - 1) * vae.stride[0] + 1, height * vae.stride[1], width * vae.stride[1]
    folder.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for path in sorted(folder.glob("manifest-*.jsonl")) for line in open(path)]
    known = [row for row in known if (folder / row.get("shard", "none")).exists()]  # what failed may be mended
    seen, rows = {row["video"] for row in known}, [row for row in known if row["rank"] == rank]
    shards = 1 + max((int(row["shard"][4:10]) for row in rows), default=-1)
    clips = []  # encoded, of the next shard: latents, text, row of the manifest

    def flush():
        nonlocal clips, shards
        if clips:
            name = f"{rank:03}-{shards:06}.safetensors"
            latents, text = (torch.stack(parts) for parts in list(zip(*clips))[:2])
            write(folder / name, lambda part: save_file({"latents": latents, "text": text}, part))
            rows.extend(row | {"shard": name, "row": i} for i, (_, _, row) in enumerate(clips))
            shards, clips = shards + 1, []
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write(folder / f"manifest-{rank:03}.jsonl", lambda part: part.write_text(text))

    if rank == 0:
        null = encode([""]).bfloat16()
        if null.shape[2] != text_dim:
            raise ValueError(f"the text encoder is {null.shape[2]} wide, expected {text_dim} for the preset")
        write(folder / "null.safetensors", lambda part: save_file({"text": null}, part))
    todo = [path for path in files[rank::world] if str(path.relative_to(videos)) not in seen]
    for path in tqdm(todo, desc="videos", disable=None):
        row = {"video": str(path.relative_to(videos)), "rank": rank}
        try:
            text = path.with_suffix(".txt")
            caption = text.read_bytes().decode("utf-8-sig", "replace").strip() if text.is_file() else ""
            if not caption or "\ufffd" in caption:
                raise ValueError(f"no caption in UTF-8 in {text}")
            video, cut = read_video(path, *pixels)
            latents = vae.encode(video[None])[0].bfloat16().cpu().contiguous()
        except (ValueError, OSError) as error:
            rows.append(row | {"error": str(error)})
            tqdm.write(f"skipped: {error}", file=sys.stderr)
        else:
            if latents.shape != shape:
                raise ValueError(f"the VAE makes latents {tuple(latents.shape)}, expected {shape} for the preset")
            text = encode([caption])[0].bfloat16()
            clips.append((latents, text, row | ({"used": cut} if cut else {})))
        if len(clips) == size:
            flush()
    flush()
    bad = sum("error" in row for row in rows)
    return len(rows) - bad, bad


def open_data(args, shape, text_dim):
    from toy.video import WORLDS

    if args.data in WORLDS:
        data = WORLDS[args.data]
        if data.shape != shape:
            raise ValueError(f"the world {args.data} has clips {data.shape}, expected {shape} for {args.preset}")
        return data
    if args.data is None:
        raise ValueError(f"--preset {args.preset} needs --data, a folder of shards")
    return Shards(args.data, shape, text_dim, args.skip_bad_shards)


# ------------------------------------------------------------------------------------------------------------
# Processes and networks
# ------------------------------------------------------------------------------------------------------------


def device_of(name):
    """The device, of several GPUs this process's own. ValueError where there is none."""
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def start_processes(device, dtype):
    """Join torchrun's processes. FSDP also does mixed precision: for that, one process is a group of its own."""
    device = device_of(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    elif dtype != "float32":
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def mesh_of_nodes(kind):
    """All processes in a row, or, where there are several nodes, in a row for each; None without a group."""
    if not dist.is_initialized():
        return None
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world > local:
        return init_device_mesh(kind, (world // local, local), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (world,))


def shard(model, recipe, device, mesh):
    """Compile each block, and shard each over the processes of a node, with a copy on every node.

    Block by block, from a model that lies on the disk: a process never holds more than its share and one block.
    Trained weights are float32, for steps of 1e-5 are lost in bfloat16; frozen ones are as precise as their use.
    """
    model.checkpointing = recipe.checkpointing
    if recipe.compile:
        compile_blocks(model)

    def place(module):
        for p in module.parameters():
            if not isinstance(p, DTensor):
                p.data = p.data.to(device, torch.float32 if p.requires_grad else getattr(torch, recipe.dtype))
        if mesh is not None:
            fully_shard(module, mesh=mesh, mp_policy=policy)

    # Not the inputs: a time of 0.999 is 1 in bfloat16.
    policy = MixedPrecisionPolicy(getattr(torch, recipe.dtype), torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        place(block)
    place(model)
    if mesh is not None:
        register_fsdp_forward_method(model, "extend")
    return model


def base_of(nets):
    """Whose frozen weights the others share: the judge's, or the teacher's, or nobody's."""
    return next((name for name in ("real", "teacher") if name in nets), None)


def is_baseline(stage, recipe):
    return stage == "consistency" or (stage == "onpolicy" and recipe.rollout == "consistency")


def assemble(nets, recipe, device):
    """Add LoRA, shard, and let the networks share what is frozen and equal, {name: network} in place.

    The release keeps three whole models in stage 2. With LoRA they are one frozen base, the teacher's: the fake
    score differs by its LoRA; the student by its own, and by what stage 1 taught it, itself of low rank.
    """
    base, mesh = base_of(nets), mesh_of_nodes(device.type)
    same = {}
    for name, net in nets.items():
        starts = {}
        if recipe.lora and recipe.share and base not in (None, name):
            same[name], starts = compare(net, nets[base], recipe, device)
        if name not in TRAINED:
            net.requires_grad_(False)
        elif recipe.lora:
            add_lora(net, recipe.lora, recipe.lora, starts=starts)
    for name in sorted(nets, key=lambda name: name != base):
        shard(nets[name], recipe, device, mesh)
        names = same.get(name, ())
        own, theirs = dict(nets[name].named_parameters()), dict(nets[base or name].named_parameters())
        # FSDP pads what its processes cannot divide, in a copy for each network: leave those few.
        whole = lambda p: not isinstance(p, DTensor) or len(p) % p.device_mesh.shape[-1] == 0
        linked = {n: theirs[n] for n in names if not own[n].requires_grad and whole(theirs[n])}
        nets[name].load_state_dict(linked, strict=False, assign=True)
        if name in same and main_process():
            frozen = sum(not p.requires_grad for p in own.values())
            print(f"{name} shares {len(linked)} of its {frozen} frozen weights with {base}")


def compare(net, base, recipe, device):
    """Names of the weights that net has from base, equal or by a difference of low rank; {linear: that difference}.

    Those of the second kind are set to base's."""
    own, theirs, dtype = dict(net.named_parameters()), dict(base.named_parameters()), getattr(torch, recipe.dtype)
    same, starts = [], {}
    for name, p in own.items():
        q = theirs.get(name)
        if q is None or p.shape != q.shape:
            continue
        if torch.equal(p.to(dtype), q.to(dtype)):
            same.append(name)
        elif re.search(LORA, name.removesuffix(".weight")):
            coarse = max(torch.finfo(x.dtype).eps for x in (p, q))  # as exact as the weights are
            difference = p.detach().to(device, torch.float32) - q.detach().to(device, torch.float32)
            up, down = low_rank(difference, recipe.lora)
            for factor in (up, down) if dist.is_initialized() else ():  # unique but for turns: all take the first's
                dist.broadcast(factor, 0)
            if (difference - up @ down).norm().item() <= max(coarse / 2, 1e-6) * p.norm().item():
                starts[name.removesuffix(".weight")] = up, down
                same.append(name)
                p.data = q.data
    return same, starts


def load(folder, option, config, kind, stages):
    """A model folder, checked to have the preset's architecture and to come from one of the stages."""
    if folder is None:
        raise ValueError(f"{option} is missing, expected a model folder of stage {' or '.join(stages)}")
    new = {key: getattr(config, key) for key in ("compressed_patch_size", "full_chunk_limit", "chunk_partition")}
    model = Wan.from_pretrained(folder, kind, **new if kind == "causal" else {})  # as it lies on the disk
    for key, wanted in asdict(config).items():
        found = getattr(model.config, key)
        if found != wanted and key in model.config.to_dict() and key != "rope_max_seq_len":
            raise ValueError(f"{option} {folder} has {key} {found}, expected {wanted} as the preset")
    made = provenance(folder).get("stage")
    if made not in (None, *stages):
        raise ValueError(f"{option} {folder} was made by stage {made}, expected {' or '.join(stages)}")
    return model


def new_model(config):
    """Random weights that start as the zero function."""
    model = Wan(config)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


class Run:
    """The state that a checkpoint holds: networks in training, their optimisers, the average, the step.

    There is no random state and no data position to keep: both are functions of seed and step, see `train`.
    """

    def __init__(self, nets, optimisers, folder, settings):
        self.nets, self.optimisers, self.settings = nets, optimisers, settings
        self.folder, self.step = folder / "checkpoints", 0
        # As AdamW would at a weight's first gradient: a checkpoint needs the state of all, had they one yet or not.
        for optimiser in optimisers.values():
            for p in optimiser.param_groups[0]["params"]:
                state = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p)}
                optimiser.state[p] = state | {"exp_avg_sq": torch.zeros_like(p)}
        self.trained = {name: trained(nets[name]) for name in TRAINED if name in nets}
        self.average = {name: p.detach().clone() for name, p in self.trained["student"].items()}

    def state(self):
        """Tensors by name, as they are: a checkpoint is written from them and read into them."""
        state = {"average": self.average}
        for name, optimiser in self.optimisers.items():
            state[name] = self.trained[name]
            state[f"{name}_optimiser"] = {key: optimiser.state[p] for key, p in self.trained[name].items()}
        return state

    def save(self):
        """Write beside, rename, then drop all but the newest two."""
        name = f"step-{self.step:07d}"
        part = self.folder / f".{name}.part"
        try:
            if main_process():
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            wait_for_all()
            dcp.save(self.state(), checkpoint_id=part, no_dist=not dist.is_initialized())
            if main_process():
                (part / "settings.json").write_text(json.dumps(self.settings, indent=1) + "\n")
                shutil.rmtree(self.folder / name, ignore_errors=True)
                os.replace(part, self.folder / name)
                for old in self.all()[:-2]:
                    shutil.rmtree(old)
        except (Exception, CheckpointException) as error:  # which is no Exception
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"cannot save {self.folder / name}: {reason(error)}; {self.newest()}") from None
        wait_for_all()

    def resume(self):
        """Load the newest checkpoint. ValueError where there is none, or where it was made with other settings."""
        if not self.all():
            raise ValueError(f"--resume found no checkpoint in {self.folder}")
        newest = self.all()[-1]
        made = read_json(newest / "settings.json")
        changed = [f"{key} {made.get(key)!r} -> {self.settings.get(key)!r}"
                   for key in sorted(made | self.settings) if made.get(key) != self.settings.get(key)]  # fmt: skip
        if changed:
            raise ValueError(f"{newest} was made with other settings: {', '.join(changed)}")
        try:
            dcp.load(self.state(), checkpoint_id=newest, no_dist=not dist.is_initialized())
        except (Exception, CheckpointException) as error:
            raise ValueError(f"cannot read checkpoint {newest}: {reason(error)}") from None
        self.step = int(newest.name.removeprefix("step-"))

    def all(self):
        return sorted(self.folder.glob("step-" + 7 * "[0-9]"))

    def newest(self):
        return f"the last whole checkpoint is {self.all()[-1]}" if self.all() else "there is no earlier checkpoint"

    @torch.no_grad()
    def update_average(self, recipe):
        n = self.step - recipe.ema_start
        decay = min(recipe.ema, (n + 1) / (n + 10)) if n >= 0 else 0.0  # it forgets faster while it is young
        own = lambda params: [local(p) for p in params.values()]
        torch._foreach_lerp_(own(self.average), own(self.trained["student"]), 1 - decay)

    @torch.no_grad()
    def export(self, folder, start, recipe):
        """The averaged weights as a folder that diffusers opens. start(): the network of before the training."""
        whole = {}
        for name, p in self.average.items():  # one by one, off the GPU: together they may be more than it holds
            p = p.full_tensor() if isinstance(p, DTensor) else p
            if main_process():
                whole[name] = p.cpu()
        if main_process():
            student = start().float()
            if recipe.lora:
                add_lora(student, recipe.lora, recipe.lora)
            student.load_state_dict(whole, strict=not recipe.lora)
            student.save_pretrained(folder)
            write(folder / "anyflow.json", lambda part: part.write_text(json.dumps(self.settings, indent=1) + "\n"))
        wait_for_all()


TRAINED = ("student", "fake")


def local(x):
    """This process's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def trained(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def reason(error):
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------------------


def rollout(recipe, model, noise, text, chunks, seed):
    """The student's own clip x_hat (B, F, C, H, W), with gradient through the step being trained.

    A causal model makes it chunk by chunk as when sampling: each through the simulation, then, without gradient,
    into the cache that the next chunk sees.
    """
    baseline = recipe.rollout == "consistency"
    simulate = anyflow.consistency_simulation if baseline else anyflow.backward_simulation
    steps = recipe.rollout_steps[torch.randint(len(recipe.rollout_steps), ()).item()]
    k = torch.randint(steps, ()).item()
    seed_with(*seed)  # the noise that consistency returns to, of each process its own
    grid = anyflow.time_grid(steps, recipe.shift)
    if chunks is None:
        return simulate(model, noise, grid, k, text=text)
    cache, video = model.new_cache(padding=False), []
    for part in noise.split(chunks, 1):
        video.append(simulate(model, part, grid, k, text=text, cache=cache))
        if len(video) < len(chunks):
            model.extend(cache, video[-1].detach(), text)
    return torch.cat(video, 1)


def train(stage, recipe, run, data, seed, config, shape, device, place=(0, 1), chunks_a_step=None):
    """Steps until recipe.steps; yields after each what the log holds.

    place: this process, of how many. chunks_a_step: of a causal clip, drawn if not given.
    """
    nets, optimisers = run.nets, run.optimisers
    student, teacher, real, fake = (nets.get(name) for name in ("student", "teacher", "real", "fake"))
    rank, world = place
    causal, limit = config.kind == "causal", config.full_chunk_limit
    weight = (lambda t: 1 / (t + 0.05)) if recipe.weight == "inverse" else None

    while run.step < recipe.steps:
        start, step = time.perf_counter(), run.step
        left = (recipe.steps - step) / (recipe.decay * recipe.steps) if recipe.decay else 1.0
        factor = min(1.0, (step + 1) / max(1, recipe.warmup), left)
        for name, lr in (("student", recipe.lr), ("fake", recipe.fake_lr)):
            if name in optimisers:
                optimisers[name].param_groups[0]["lr"] = lr * factor
        losses, samples = {}, []

        def backward(name, loss):
            (loss / recipe.accumulate).backward()
            losses[name] = losses.get(name, 0.0) + loss.detach() / recipe.accumulate

        def update(name, *values):
            """Clip, check, step. Returns the gradient's norm; FloatingPointError before anything is spoilt."""
            norm = torch.nn.utils.clip_grad_norm_(run.trained[name].values(), recipe.clip)
            norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
            if not all(map(math.isfinite, (norm, *values))):
                found = ", ".join(f"{key} {value:.4g}" for key, value in losses.items())
                raise FloatingPointError(
                    f"stage {stage}, step {step}: losses {found}, gradient's norm {norm:.4g}; {run.newest()}"
                )
            optimisers[name].step()
            optimisers[name].zero_grad()
            return norm

        for micro in range(recipe.accumulate):
            # Every process draws the random numbers of the whole batch, from a seed of the step, and takes its
            # rows: a run does not depend on where it was resumed, nor (but for a consistency rollout) on how many
            # processes share it. Rows lie a stride apart: each process gets its share of every kind of time pair.
            seed_with(seed, step, 0)
            own_seed = seed, step, 1000 + micro * world + rank  # of what is drawn inside a rollout
            rows = torch.arange(recipe.batch)[micro * world + rank :: world * recipe.accumulate]
            mine = lambda drawn, rows=rows: drawn[rows].to(device)
            t, r = (
                mine(time)
                for time in anyflow.time_pairs(recipe.batch, recipe.shift, recipe.diffusion, recipe.endpoint)
            )
            tau, logit = mine(torch.rand(recipe.batch)), torch.randn(recipe.batch, 1)
            own = torch.rand(recipe.batch, 1) < (0.0 if causal else recipe.own_times)
            logit = torch.where(own, 1.5 * torch.randn(recipe.batch, shape[0]), logit)
            t_teacher = anyflow.shift_time(mine(logit).sigmoid(), recipe.shift)
            noise = mine(torch.randn(recipe.batch, *shape))
            dropped = mine(torch.rand(recipe.batch) < recipe.drop)
            clip, text = (x.to(device) for x in data.batch((step * recipe.batch + rows).tolist(), seed))
            null = data.null.to(device).expand_as(text)
            prompt = torch.where(dropped[:, None, None], null, text)

            # x: the frames to learn from. Causal: of the first n chunks those in the window. In half of the steps n
            # is what the window holds, in the other half any number from there up.
            x, cond = clip, dict(text=prompt)
            if causal:
                most = len(config.chunk_partition)
                n = min(limit, most)
                if torch.rand(()) >= 0.5:
                    n = torch.randint(n, most + 1, ()).item()
                n = chunks_a_step or n
                chunks = config.chunk_partition[:n]
                end, first = sum(chunks), sum(chunks[:-limit])
                x, noise_x = clip[:, first:end], noise[:, first:end]
                cond |= dict(clean=clip[:, :end], chunks=chunks)
            else:
                noise_x = noise
            common = dict(noise=noise_x, shift=recipe.shift, guidance=recipe.guidance, null=dict(text=null), **cond)

            if stage == "teacher":
                times = t_teacher[:, : x.shape[1]]
                backward("loss", anyflow.flow_matching_loss(student, x, t=times, noise=noise_x, **cond))
            elif stage == "consistency" or recipe.rollout == "consistency":
                loss = anyflow.consistency_loss(
                    student, teacher, x, t=tau, steps=recipe.teacher_steps, weight=weight, **common
                )
                backward("loss", loss)
            else:
                target = teacher if recipe.target == "teacher" else None
                options = dict(teacher=target, weight=weight, balance=recipe.balance, eps=recipe.eps)
                backward("loss", anyflow.flow_map_loss(student, x, t=t, r=r, **options, **common))
            if causal and stage in ("teacher", "flowmap") and often(recipe.bidirectional, step):
                backward("whole", anyflow.flow_matching_loss(student, clip, t=t_teacher, noise=noise, text=prompt))

            if stage == "onpolicy":
                t_dmd = mine(anyflow.shift_time(torch.rand(recipe.batch), recipe.shift))
                noise_dmd = mine(torch.randn(recipe.batch, *shape))
                if real.config.kind == "causal":  # judges the chunks x, each after the student's own earlier ones
                    x_hat = rollout(recipe, student, noise[:, :end], text, chunks, own_seed)
                    judged, noise_dmd = x_hat[:, first:], noise_dmd[:, first:end]
                    said = dict(text=text, clean=x_hat.detach(), chunks=chunks)
                else:
                    whole = config.chunk_partition if causal else None
                    judged = rollout(recipe, student, noise, text, whole, own_seed)
                    said = dict(text=text)
                options = dict(guidance=recipe.dmd_guidance, null=dict(text=null))
                dmd = anyflow.dmd_loss(judged, real, fake, t=t_dmd, noise=noise_dmd, **options, **said)
                backward("dmd", recipe.dmd * dmd)
                samples.append((judged.detach(), said, mine))

        for name in losses:
            losses[name] = over_processes(losses[name])
        norm = update("student", *losses.values())

        # The fake score learns the samples that the student has just been judged by: one rollout serves both.
        for i in range(recipe.fake_steps if samples else 0):
            losses["fake"] = 0.0
            for x_hat, said, mine in samples:
                seed_with(seed, step, 1 + i)
                t_fake = mine(anyflow.logit_normal_times(torch.empty(recipe.batch), recipe.shift))
                noise_fake = mine(torch.randn(recipe.batch, *x_hat.shape[1:]))
                backward("fake", anyflow.fake_score_loss(fake, x_hat, t=t_fake, noise=noise_fake, **said))
            losses["fake"] = over_processes(losses["fake"])
            update("fake", losses["fake"])

        run.update_average(recipe)
        run.step += 1
        lr = optimisers["student"].param_groups[0]["lr"]
        yield {"step": run.step, **losses, "norm": norm, "lr": lr, "seconds": time.perf_counter() - start}


def often(share, step):
    """Whether this step is one of the share of all steps, evenly spread."""
    return int((step + 1) * share + 1e-9) > int(step * share + 1e-9)


def seed_with(*numbers):
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def over_processes(loss):
    """Mean over the processes, as a float."""
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss = loss / dist.get_world_size()
    return loss.item()


# ------------------------------------------------------------------------------------------------------------
# The cost plan: what a step does, holds and takes, without doing it
#
# `train` itself runs, with small clips on the CPU. Its networks are on the meta device, at their true size but for
# the depth: every operation of every forward and backward pass is made, counted by torch's own formulas, and its
# tensors' lives are followed, but no number is computed. FLOPs and peaks are linear in the depth.
# ------------------------------------------------------------------------------------------------------------


class Cost(TorchDispatchMode):
    """FLOPs, and bytes of the activations alive on a device, of what runs inside.

    flops: so far. peaks: the highest number of bytes between one `mark` and the next.
    visible: {tokens: share of query-key pairs that a mask lets through}, of self-attention.
    """

    # FLOPs of fused attention on a CPU, which torch leaves out, by its formulas for a GPU.
    CPU = {"aten._scaled_dot_product_flash_attention_for_cpu": (sdpa_flop_count, 0),
           "aten._scaled_dot_product_flash_attention_for_cpu_backward": (sdpa_backward_flop_count, 1)}  # fmt: skip

    def __init__(self, nets, device="meta"):
        super().__init__()
        self.device, self.flops, self.visible, self.live, self.peaks = device, 0, {}, 0, [0]
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
        flops = 0
        if name in flop_registry:
            flops = flop_registry[name](*args, **kwargs, out_val=out)
        elif str(name) in self.CPU:
            count, first = self.CPU[str(name)]
            flops = count(*(x.shape for x in args[: 3 + first]))
        if flops and "attention" in str(name):
            q, k = args[1:3] if "backward" in str(name) else args[:2]
            flops *= self.visible.get(q.shape[2], 1) if q.shape[2] == k.shape[2] else 1
        self.flops += flops
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
            self.live -= self.sizes[x.untyped_storage()._cdata]
            self.sizes[x.untyped_storage()._cdata] = 0

    def mark(self):
        self.peaks.append(self.live)


class OnMeta(torch.nn.Module):
    """A network on the meta device, called with clips of few pixels; autograd goes through both."""

    def __init__(self, net, size, text_length, cost=None):
        super().__init__()
        self.net, self.config, self.size, self.text_length, self.cost = net, net.config, size, text_length, cost

    def forward(self, z, t, r, text, *, clean=None, chunks=None, cache=None):
        self.cost.mark()
        if chunks:
            self.cost.visible.update([self.visible(chunks, clean is not None)])
        clean = None if clean is None else self.enter(clean)
        u = self.net(self.enter(z), t, r, self.prompt(text), clean=clean, chunks=chunks, cache=cache)
        return Leave.apply(u, z)

    def enter(self, z):
        return Enter.apply(z, (*z.shape[:3], *self.size))

    def prompt(self, text):
        length = len(text), self.text_length, self.config.text_dim
        return torch.empty(length, device="meta") if torch.is_tensor(text) else text

    def encode_text(self, text):
        return self.net.encode_text(self.prompt(text))

    def new_cache(self, padding=True):
        return self.net.new_cache(padding)

    def extend(self, cache, chunk, text):
        self.cost.mark()
        self.net.extend(cache, self.enter(chunk), self.prompt(text))

    def visible(self, chunks, clean, block=128):
        """Tokens of causal training, and the share of their pairs that flex attention computes, in whole blocks."""
        window = min(len(chunks), self.config.full_chunk_limit)
        full, compressed = (
            math.prod(self.size) // math.prod(patch)
            for patch in (self.config.patch_size, self.config.compressed_patch_size)
        )
        early, late = sum(chunks[:-window]), sum(chunks[-window:])
        frames = torch.tensor([compressed] * early + [full] * late * (1 + clean))
        allowed = chunk_mask(chunks, window, 1, 1, clean, "cpu").float()  # one token a frame
        tokens = int(frames.sum())
        blocks = torch.zeros(-(-tokens // block), len(frames))
        blocks[torch.arange(tokens) // block, torch.repeat_interleave(torch.arange(len(frames)), frames)] = 1
        return tokens, float((blocks @ allowed @ blocks.T > 0).float().mean())


class Enter(torch.autograd.Function):
    """From a small clip to one of true size without numbers, and its gradient back."""

    @staticmethod
    def forward(ctx, z, shape):
        ctx.save_for_backward(z)
        return torch.empty(shape, device="meta")

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(*ctx.saved_tensors), None


class Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, z):
        ctx.shape, ctx.dtype = u.shape, u.dtype
        return torch.zeros_like(z)

    @staticmethod
    def backward(ctx, gradient):
        return torch.empty(ctx.shape, device="meta", dtype=ctx.dtype), None


def fused_attention(q, k, v, attn_mask=None):
    """As on a GPU. On the meta device torch would take the way that holds all pairs."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


@contextmanager
def counting(nets, device="meta"):
    with mock.patch.object(F, "scaled_dot_product_attention", fused_attention), \
         mock.patch("model.cached_chunk_mask", lambda *args: None), Cost(nets, device) as cost:  # fmt: skip
        yield cost


def networks_on_meta(stage, recipe, config, layers=None):
    """{name: network} as of `networks`; teachers as Wan is published: of one time, and the judge bidirectional."""
    teacher = replace(config, kind="causal" if config.kind == "causal" else "teacher")
    kinds = {"student": teacher if stage == "teacher" else config}
    baseline = is_baseline(stage, recipe)
    if baseline or (stage in ("flowmap", "onpolicy") and recipe.target == "teacher"):
        kinds["teacher"] = teacher
    if stage == "onpolicy":
        kinds |= {name: replace(config, kind="teacher") for name in ("real", "fake")}
    nets = {}
    for name, kind in kinds.items():
        with torch.device("meta"):
            net = Wan(replace(kind, num_layers=layers or kind.num_layers))
        net.checkpointing = recipe.checkpointing
        nets[name] = net
    base = nets.get(base_of(nets))
    for name, net in nets.items():
        if name not in TRAINED:
            net.requires_grad_(False)
        elif recipe.lora:
            starts = {}
            if name == "student" and recipe.share and stage == "onpolicy":
                starts = {
                    key: (
                        m.weight.new_empty(len(m.weight), recipe.lora),
                        m.weight.new_empty(recipe.lora, m.in_features),
                    )
                    for key, m in net.named_modules()
                    if isinstance(m, torch.nn.Linear)
                    and re.search(LORA, key)
                    and f"{key}.weight" in base.state_dict()
                }
            add_lora(net, recipe.lora, recipe.lora, starts=starts)
    return nets


@functools.cache
def simulate(stage, recipe, config, shape, layers, steps=1, place=(0, 1), chunks=None, seed=0, text_length=512):
    """FLOPs, and peaks of activations in bytes from one network call to the next, of each of some steps."""
    nets = networks_on_meta(stage, recipe, config, layers)
    for net in nets.values():
        net.to(getattr(torch, recipe.dtype))
    with counting(nets.values()) as cost:
        for name, net in nets.items():
            nets[name] = OnMeta(net, shape[2:], text_length, cost)
        optimisers = {name: torch.optim.SGD(trained(nets[name]).values(), 0.0) for name in TRAINED if name in nets}
        small = *shape[:2], *config.compressed_patch_size[1:]
        text = torch.zeros(recipe.batch, 1, 1)
        data = SimpleNamespace(
            null=text[:1], batch=lambda rows, seed: (torch.zeros(len(rows), *small), text[: len(rows)])
        )
        run = SimpleNamespace(nets=nets, optimisers=optimisers, step=0, update_average=lambda recipe: None,
                              newest=str, trained={name: trained(nets[name]) for name in optimisers})  # fmt: skip
        made, before = [], 0
        recipe = replace(recipe, steps=steps)
        config, device = nets["student"].config, torch.device("cpu")
        for _ in train(stage, recipe, run, data, seed, config, small, device, place, chunks):
            made.append((cost.flops - before, cost.peaks))
            before, cost.peaks = cost.flops, [cost.live]
    return made


def at_depth(layers, one, two, three=()):
    """From the steps of networks of one, two and three layers: mean FLOPs; the highest peak, if there are three."""
    flops = [a[0] + (b[0] - a[0]) * (layers - 1) for a, b in zip(one, two)]
    # From the second on: to go back through a first layer needs no gradient of what enters it.
    peaks = [x + (y - x) * (layers - 2) for a, b in zip(two, three) for x, y in zip(a[1], b[1])]
    return sum(flops) / len(flops), max(peaks, default=0)


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Wan(config).parameters())


def cost_of_sampling(config, shape, text_length=512, steps=4, chunks=None):
    """FLOPs and peak of activations, bytes, of a clip in bfloat16."""
    from sample import generate

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
    base = nets.get(base_of(nets))
    shared = set(base.state_dict()) if base and recipe.lora and recipe.share else ()
    size, parts = 2 if recipe.dtype == "bfloat16" else 4, Counter()
    for name, net in nets.items():
        for key, p in net.named_parameters():
            if p.requires_grad:
                parts += {"weights": 4 * p.numel(), "gradients": 4 * p.numel(), "optimiser": 8 * p.numel()}
                parts["average"] += 4 * p.numel() * (name == "student")
            elif net is base or key not in shared:
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


def plan_of(stage, recipe, config, shape, gpus, per_node=8):
    """FLOPs of a mean step on one GPU, the one with most to do, and {part: bytes} of its memory at most."""

    # The last GPU has a jump to differentiate. One alone with one clip has it in some steps: the halves of a batch.
    busiest, places = (gpus - 1, gpus), {(gpus - 1, gpus): 1.0}
    if recipe.batch == 1:
        busiest, places = (1, 2), {(1, 2): 1 - recipe.diffusion, (0, 2): recipe.diffusion}
        recipe = replace(recipe, batch=2)
    alike = dict(steps=1, lr=1.0, fake_lr=1.0, beta1=0.0, beta2=0.0, warmup=0, ema=0.0, ema_start=0)  # in cost

    def cost(stage, chunks=None, place=busiest, steps=1, depths=(1, 2, 3), **changes):
        changed = replace(recipe, **alike | changes)
        runs = [simulate(stage, changed, config, shape, n, steps, place, chunks) for n in depths]
        return at_depth(config.num_layers, *runs)

    def mean(stage):
        """Over numbers of chunks, and steps with flow matching of the whole clip beside; and the highest peak."""
        most, least = len(config.chunk_partition), config.full_chunk_limit
        numbers = range(min(least, most), most + 1) if config.kind == "causal" else [None]
        costs, some = [], places if stage == "flowmap" else {busiest: 1.0}
        for n in numbers:
            depths = (1, 2, 3) if n == numbers[-1] else (1, 2)  # the most chunks need the most memory
            made = {place: cost(stage, n, place, depths=depths, bidirectional=0.0) for place in some}
            costs.append((sum(share * made[place][0] for place, share in some.items()), made[busiest][1]))
        flops, peak = (costs[0][0] + sum(flops for flops, _ in costs) / len(costs)) / 2, costs[-1][1]
        if config.kind == "causal" and stage in ("teacher", "flowmap") and recipe.bidirectional:
            both, alone = (cost(stage, numbers[-1], bidirectional=share) for share in (1.0, 0.0))
            flops, peak = flops + recipe.bidirectional * (both[0] - alone[0]), max(peak, both[1])
        return flops, peak

    parts = memory_of(networks_on_meta(stage, recipe, config), recipe, min(gpus, per_node))
    if stage != "onpolicy":
        flops, parts["activations"] = mean(stage)
        return flops, parts
    # A step of stage 1 or of consistency; on top, the judges and the rollout, of N steps 3 - 2/N jumps in the mean.
    beside, chunks = "consistency" if recipe.rollout == "consistency" else "flowmap", config.full_chunk_limit
    recipe = replace(recipe, bidirectional=0.0)
    flops, parts["activations"] = mean(beside)
    if beside == "consistency":
        more, peak = cost(stage, chunks, steps=8)
    else:
        one, _ = cost(stage, chunks, depths=(1, 2), rollout_steps=(1,))
        three, peak = cost(stage, chunks, rollout_steps=(10**6,))
        more = one + (three - one) * sum(1 - 1 / n for n in recipe.rollout_steps) / len(recipe.rollout_steps)
    parts["rollout"] = max(0, peak - parts["activations"])
    return flops + more - cost(beside, chunks, depths=(1, 2))[0], parts


def fits(parts, shards, per_node, card):
    """The least number of GPUs of a node on which the parts fit, a tenth of a card kept free; "no" for none."""
    for n in (2**i for i in range(per_node.bit_length())):
        total = sum(value * (1 if key in PARTS[4:] else shards / n) for key, value in parts.items())
        if total <= 0.9 * card * 2**30:
            return n
    return "no"


def too_large(args):
    """What the plan says to a run that found too little GPU memory."""
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    (config, shape, stages), gpus = preset(args.preset), int(os.environ.get("WORLD_SIZE", 1))
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    _, parts = plan_of(args.stage, recipe_of(args, stages[args.stage]), config, shape, gpus, per_node)
    least = {size: fits(parts, min(gpus, per_node), max(8, per_node), size) for size in CARDS}
    enough = ", ".join(f"{n} of {size} GiB" for size, n in least.items() if n != "no") or "no node of 8"
    needs = f"the plan says {sum(parts.values()) / 2**30:.0f} GiB on each of {gpus} GPU(s)"
    has = f"out of memory on {card.name}, {card.total_memory / 2**30:.0f} GiB"
    return f"{has}: {needs}; enough would be {enough}; more --accumulate or --checkpointing full need less"


def run_plan(args):
    """Print what every stage of a preset's recipe costs on some GPUs."""
    config, shape, stages = preset(args.preset)
    per_node, rate = args.gpus_per_node, args.tflops * 1e12 * args.utilisation
    shards = min(args.gpus, per_node)
    if not (0 < args.tflops < math.inf and 0 < args.utilisation <= 1):
        found = f"tflops is {args.tflops} and utilisation {args.utilisation}"
        raise ValueError(f"{found}, expected a number above 0 and a share up to 1")
    if args.gpus % shards:
        raise ValueError(f"gpus are {args.gpus}, expected a multiple of the {per_node} of a node")
    recipes = {}
    for stage in STAGES:
        recipe = recipe_of(args, stages[stage])
        check(replace(recipe, batch=recipe.batch * max(1, recipe.accumulate)), args.seed, 1)
        least = args.gpus * recipe.accumulate  # a clip for each GPU
        recipes[stage] = replace(recipe, batch=max(1, -(-recipe.batch // least)) * least)
        check(recipes[stage], args.seed, args.gpus)

    size = {kind: parameters(replace(config, kind=kind)) for kind in ("teacher", config.kind)}
    tokens = math.prod(shape) // shape[1] // math.prod(config.patch_size)
    print(f"{args.preset}: {size['teacher']:,} parameters, with two times {size[config.kind]:,}; {tokens:,} tokens")
    work = f"{100 * args.utilisation:g} % of {args.tflops:g} TFLOP/s"
    print(f"{args.gpus} GPU(s) at {work}, weights over {shards} of them\n")
    print(f"{'':12}{'batch':>6}{'steps':>7}{'PFLOP':>9}{'s':>9}{'GPU-days':>10}   fits from so many GPUs of")
    print(f"{'':25}{'of a GPU and step':>18}{'':10}   " + "".join(f"{card:>6} GiB" for card in CARDS))
    table, days = [], {}

    def line(name, flops, parts, recipe=None):
        head = f"{name:12}{recipe.batch:6}{recipe.steps:7}" if recipe else f"{name:25}"
        days[name] = flops / rate * recipe.steps * args.gpus / 86400 if recipe else 0
        cost = f"{flops / 1e15:9.3g}{flops / rate:9.3g}" + (f"{days[name]:10.3g}" if recipe else " " * 10)
        over = (shards, per_node) if recipe else (1, 1)
        least = [fits(parts, *over, card) for card in CARDS]
        tqdm.write(f"{head}{cost}   " + "".join(f"{n:>10}" for n in least))
        held = [parts.get(part, 0) / 2**30 for part in PARTS]
        table.append(f"{name:12}" + "".join(f"{value:12.2f}" for value in (*held, sum(held))))

    for stage, recipe in tqdm(recipes.items(), desc="counting", disable=None, leave=False):
        line(stage, *plan_of(stage, recipe, config, shape, args.gpus, per_node), recipe)
    flops, peak = cost_of_sampling(config, shape)
    line("clip, 4 calls", flops, {"weights": 2 * size[config.kind], "activations": peak})
    print(f"\nstages 1 and 2 together: {days['flowmap'] + days['onpolicy']:.3g} GPU-days")
    print(f"\nmemory of a GPU, GiB\n{'':12}" + "".join(f"{part:>12}" for part in (*PARTS, "total")))
    print("\n".join(table))

    def stage_2(**changes):
        recipe = replace(recipes["onpolicy"], **changes)
        parts = memory_of(networks_on_meta("onpolicy", recipe, config), recipe, 1)
        return (parts["weights"] + parts["optimiser"]) / 2**30

    forms = {"three whole networks": dict(lora=0), "three with LoRA": dict(share=False), "this recipe": {}}
    held = ", ".join(f"{name} {stage_2(**changes):.4g}" for name, changes in forms.items())
    print(f"\nweights and optimiser states of stage 2 in all, GiB: {held}")


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


# From which stages each stage may start.
BEFORE = {
    "teacher": ("teacher",),
    "flowmap": ("teacher", "flowmap", "onpolicy"),
    "onpolicy": ("flowmap", "onpolicy"),
    "consistency": ("teacher",),
}


def student_of(stage, recipe, args, config):
    """The network to be trained, as it starts."""
    causal = config.kind == "causal"
    if stage == "teacher" and not args.init:
        if recipe.lora:
            raise ValueError(
                f"lora is {recipe.lora}, expected 0 without --init: random weights must all be trained"
            )
        return new_model(config if causal else replace(config, kind="teacher"))
    before = ("consistency",) if stage == "onpolicy" and recipe.rollout == "consistency" else BEFORE[stage]
    # A bidirectional teacher keeps the kind of its folder; a causal one's becomes bidirectional.
    kind = None if stage == "teacher" and not causal else config.kind
    student = load(args.init, "--init", config, kind, before)
    if kind is None and student.config.kind == "causal":
        student = load(args.init, "--init", config, config.kind, before)
    return student


def networks(stage, recipe, args, config):
    """{"student"} and, as the stage needs them, "teacher", "real" and "fake".

    teacher: whose velocity the target or the consistency step follows. real: who judges in the on-policy stage, by
    default the teacher; of a causal student it may be a bidirectional one, which sees the whole clip at once.
    fake: a copy of real, in training.
    """
    torch.manual_seed(args.seed)  # for new weights, and those of LoRA
    nets, causal = {"student": student_of(stage, recipe, args, config)}, config.kind == "causal"
    baseline = is_baseline(stage, recipe)
    if baseline or (stage != "teacher" and recipe.target == "teacher"):
        folder = args.teacher or (args.init if stage != "onpolicy" else None)
        teacher = nets["teacher"] = load(folder, "--teacher", config, None, ("teacher",))
        if (teacher.config.kind == "causal") != causal:
            kinds = f"is of kind {teacher.config.kind} for a student of kind {config.kind}"
            raise ValueError(f"--teacher {folder} {kinds}, expected both causal or neither")
    if stage == "onpolicy":
        option = "--real" if args.real else "--teacher"
        for name in ("real", "fake"):
            judge = nets[name] = load(args.real or args.teacher, option, config, None, ("teacher",))
            if judge.config.kind == "causal" and not causal:
                raise ValueError(f"{option} {args.real or args.teacher} is causal, expected a bidirectional judge")
    return nets


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage="train.py STAGE --preset NAME ...")
    parser.add_argument("stage", choices=COMMANDS)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--out", type=Path, help="folder of the result (default out/PRESET-STAGE)")
    parser.add_argument(
        "--data", help="folder of shards, or the world torus or gravity (default of tiny presets: torus)"
    )
    parser.add_argument(
        "--init", help="model folder to start from; prepare: published folder with VAE and text encoder"
    )
    parser.add_argument("--teacher", help="model folder of the teacher (default: --init)")
    parser.add_argument("--real", help="onpolicy: model folder of the teacher that judges (default: --teacher)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --out")
    parser.add_argument("--save-every", type=positive, default=500, help="steps between checkpoints")
    parser.add_argument("--skip-bad-shards", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add = parser.add_argument_group("prepare").add_argument
    add(
        "--videos",
        type=Path,
        help="folder of videos, each with its caption in a .txt of the same name; shards to --data",
    )
    add("--clips-per-shard", type=positive, default=32)
    add = parser.add_argument_group("plan").add_argument
    add("--gpus", type=positive, default=8)
    add("--gpus-per-node", type=positive, default=8, help="over which the weights are sharded")
    add("--tflops", type=float, default=989.0, help="of a GPU, bfloat16 (default: H100 or H200)")
    add("--utilisation", type=float, default=0.4, help="share of it that the work reaches (default 0.4)")
    numbers = parser.add_argument_group("recipe", "defaults are the preset's")
    for field in fields(Recipe):
        kind = {bool: boolean, tuple: integers}.get(field.type, field.type)
        option = f"--{field.name.replace('_', '-')}"
        numbers.add_argument(
            option, type=kind, choices=CHOICES.get(field.name), metavar=field.type.__name__.upper()
        )
    args = parser.parse_args(argv)
    args.out = args.out or Path("out") / f"{args.preset}-{args.stage}"
    args.data = args.data or ("torus" if args.preset.startswith("tiny") and args.stage in STAGES else None)
    return args


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return int(text)


def boolean(text):
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def integers(text):
    return tuple(positive(part) for part in text.split(","))


def check(recipe, seed, world):
    """ValueError for numbers outside their range."""
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected at least 0")
    for name in ("steps", "batch", "accumulate", "teacher_steps", "fake_steps"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} is {getattr(recipe, name)}, expected at least 1")
    for name in ("warmup", "ema_start", "lora", "dmd", "dmd_guidance"):
        if not 0 <= getattr(recipe, name) < math.inf:
            raise ValueError(f"{name} is {getattr(recipe, name)}, expected at least 0")
    for name in ("lr", "fake_lr", "clip", "shift", "guidance", "eps"):
        if not 0 < getattr(recipe, name) < math.inf:
            raise ValueError(f"{name} is {getattr(recipe, name)}, expected a number above 0")
    for name in ("beta1", "beta2", "ema", "drop", "decay", "own_times", "diffusion", "endpoint", "bidirectional"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"{name} is {getattr(recipe, name)}, expected a number in [0, 1]")
    if recipe.diffusion + recipe.endpoint > 1:
        raise ValueError(
            f"diffusion and endpoint are {recipe.diffusion} and {recipe.endpoint}, expected a sum up to 1"
        )
    if recipe.batch % (world * recipe.accumulate):
        shares = f"{world} process(es) x {recipe.accumulate} micro-batch(es)"
        raise ValueError(f"batch is {recipe.batch}, expected a multiple of {shares}")


def recipe_of(args, preset):
    """The preset's recipe with what the command line says otherwise."""
    given = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    return Recipe(**preset | {key: value for key, value in given.items() if value is not None})


def run_stage(args):
    config, shape, stages = preset(args.preset)
    recipe = recipe_of(args, stages[args.stage])
    check(recipe, args.seed, int(os.environ.get("WORLD_SIZE", 1)))
    data = open_data(args, shape, config.text_dim)
    device = start_processes(args.device, recipe.dtype)
    nets = networks(args.stage, recipe, args, config)
    assemble(nets, recipe, device)
    adam = dict(betas=(recipe.beta1, recipe.beta2), weight_decay=0.0, fused=True)
    optimisers = {name: torch.optim.AdamW(trained(nets[name]).values(), **adam) for name in TRAINED if name in nets}
    places = {key: str(Path(getattr(args, key)).resolve()) if getattr(args, key) else "" for key in FOLDERS}
    places |= {"data": args.data, "clips": len(data) if isinstance(data, Shards) else None}
    settings = {"stage": args.stage, "preset": args.preset, "seed": args.seed, **places, **asdict(recipe)}
    settings |= {"shape": list(shape), "rollout_steps": list(recipe.rollout_steps)}

    run = Run(nets, optimisers, args.out, settings)
    if args.resume:
        run.resume()
    elif run.all() or (args.out / "config.json").exists():
        raise ValueError(
            f"{args.out} holds an earlier run or a model; --resume goes on with a run, another --out leaves it"
        )
    log = args.out / "log.jsonl"
    if main_process():
        args.out.mkdir(parents=True, exist_ok=True)
        kept = log.read_text().splitlines()[: run.step] if args.resume and log.exists() else []
        write(log, lambda part: part.write_text("".join(f"{line}\n" for line in kept)))
    bar = tqdm(total=recipe.steps, initial=run.step, desc=f"{args.preset} {args.stage}", mininterval=1,
               disable=None if main_process() else True)  # fmt: skip
    with open(log if main_process() else os.devnull, "a") as lines:
        config, place = nets["student"].config, (0, 1)
        if dist.is_initialized():
            place = dist.get_rank(), dist.get_world_size()
        for row in train(args.stage, recipe, run, data, args.seed, config, shape, device, place):
            lines.write(json.dumps(row) + "\n")
            bar.update()
            if run.step % 20 == 0:
                bar.set_postfix_str(" ".join(f"{name} {row[name]:.4g}" for name in row if name in LOSSES))
            if run.step % args.save_every == 0 or run.step == recipe.steps:
                lines.flush()
                run.save()
    bar.close()
    run.export(args.out, lambda: student_of(args.stage, recipe, args, config), recipe)
    if main_process():
        from toy import plots

        plots.losses([json.loads(line) for line in log.read_text().splitlines()], LOSSES, args.out / "losses.png")
        print(f"weights in {args.out}")


FOLDERS = ("init", "teacher", "real")
LOSSES = {
    "loss": "of the stage",
    "whole": "flow matching of the whole clip",
    "dmd": "distribution matching",
    "fake": "fake score",
}


def run_prepare(args):
    """Videos to shards, under torchrun by several processes at once, each its own part."""
    from sample import VAE, TextEncoder

    config, shape, _ = preset(args.preset)
    for option in ("videos", "init", "data"):
        if getattr(args, option) is None:
            raise ValueError(f"prepare needs --{option}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = device_of(args.device)
    settings = {"videos": str(args.videos.resolve()), "init": str(Path(args.init).resolve()), "shape": list(shape)}
    path = Path(args.data) / "prepare.json"
    if path.exists() and read_json(path) != settings:
        raise ValueError(
            f"{args.data} was prepared from {read_json(path)}, expected {settings}; name another --data"
        )
    encode = TextEncoder(args.init, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write(path, lambda part: part.write_text(json.dumps(settings) + "\n"))
    clips, bad = prepare(args.videos, Path(args.data), shape, config.text_dim, encode, VAE(args.init, device),
                         args.clips_per_shard, rank, world)  # fmt: skip
    print(f"{clips} clips in {args.data}" + (f"; {bad} bad files are in the manifest" if bad else ""))
    if bad and not clips and world == 1:  # other processes may have better ones
        raise ValueError(f"none of the {bad} videos in {args.videos} could be used")


def main(argv=None):
    args = parse(argv)
    try:
        {"prepare": run_prepare, "plan": run_plan}.get(args.stage, run_stage)(args)
    except (ValueError, OSError, SafetensorError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"train.py: {too_large(args) if args.stage in STAGES else reason(error)}")
    except KeyboardInterrupt:
        on = "--resume goes on from a checkpoint" if args.stage in STAGES else "the same command goes on"
        sys.exit(f"train.py: stopped; {on}")
    finally:
        if dist.is_initialized():
            gc.collect()  # FSDP's networks hold on to the group
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
