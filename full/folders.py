"""The networks of a stage, and the model folders that they come from: checked, taken apart into LoRAs."""

import functools
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from full.files import provenance
from full.lora import ADAPTER, read_adapter, unmerge
from full.options import device_of
from full.parallel import adapt, main_process
from model import Wan

# From which stages each stage may start. One of your own has a row here and in UNREAD, STAGES and RECIPES,
# and a branch in `networks` below and in `loss_from_data` of train.py.
BEFORE = {"teacher": ("teacher",), "flowmap": ("teacher", "flowmap", "onpolicy"),
          "onpolicy": ("flowmap", "onpolicy"), "consistency": ("teacher",)}

# Recipe options that a stage does not read.
FLOW_MAP = {"guidance_form", "target", "data_anchors", "balance", "diffusion", "endpoint", "eps"}
ON_POLICY = {"rollout", "rollout_steps", "grad_chunks", "recompute_rollout", "dmd", "dmd_guidance", "fake_lr",
             "fake_steps", "fake_samples"}
UNREAD = {"teacher": FLOW_MAP | ON_POLICY | {"guidance", "weight", "teacher_steps"},
          "flowmap": ON_POLICY | {"own_times", "teacher_steps"}, "onpolicy": {"own_times", "bidirectional"},
          "consistency": FLOW_MAP | ON_POLICY | {"own_times", "bidirectional"}}

CAUSAL = "compressed_patch_size", "full_chunk_limit", "chunk_partition"  # which a teacher's folder lacks

def networks(stage, recipe, baseline, make):
    """{role: make(role)} for the networks of a stage; baseline: whether it is one of consistency.

    student: in training. teacher: whose velocity the target or the consistency step follows. judge: in stage
    2, the frozen teacher that DMD asks, by default the same folder; of a causal student it may be a
    bidirectional one, which sees whole clips. fake: the fake score, a copy of the judge in training.
    """
    follows = baseline or (stage in ("flowmap", "onpolicy") and recipe.target == "teacher")
    roles = ["student", *["teacher"] * follows, *["judge", "fake"] * (stage == "onpolicy")]
    return {role: make(role) for role in roles}

def load(folder, option, config, kind, stages):
    """A model folder, checked to have the preset's architecture and to come from one of the stages."""
    if folder is None:
        raise ValueError(f"{option} is missing, expected a model folder of stage {' or '.join(stages)}")
    keys = {key: getattr(config, key) for key in CAUSAL if kind == "causal"}
    model = Wan.from_pretrained(folder, kind, **keys)
    for key, wanted in asdict(config).items():
        found = getattr(model.config, key)
        if found != wanted and key in model.config.to_dict() and key != "rope_max_seq_len":
            raise ValueError(f"{option} {folder} has {key} {found}, expected {wanted} as the preset")
    made = provenance(folder).get("stage")
    if made not in (None, *stages):
        raise ValueError(f"{option} {folder} was made by stage {made}, expected {' or '.join(stages)}")
    return model

def base_of(args, recipe):
    """The folder of raw weights that all networks of a run are LoRAs of; None where there is none."""
    if not args.init or not recipe.lora or recipe.merge:
        return None
    base = args.base or provenance(args.init).get("base") or args.init
    if not Path(base).is_dir():
        raise ValueError(f"{args.init} is a LoRA of {base}, which is no folder, expected --base FOLDER or"
                         " --merge true")
    return str(Path(base).resolve())

def from_folders(stage, recipe, args, config, baseline):
    """`make` of `networks`: each role from the folder that the command line names for it, what is not
    trained frozen. baseline: whether the stage is one of consistency."""
    causal, base, device = config.kind == "causal", base_of(args, recipe), device_of(args.device)
    if "balance" not in UNREAD[stage] and recipe.balance and recipe.target == "teacher" and not (
            baseline or recipe.data_anchors):
        raise ValueError("balance is true with the teacher's anchors, in which a student that begins as its"
                         " teacher has no error: expected --balance false or --data-anchors true")
    unread = [f"--{name.replace('_', '-')}" for name in UNREAD[stage] if getattr(args, name) is not None]
    if unread and main_process():
        print(f"stage {stage} does not read {', '.join(sorted(unread))}", file=sys.stderr)

    def make(role):
        net, folder = student() if role == "student" else frozen_or_fake(role)
        tell(role, folder, net.config.kind)
        starts = {}
        if base is not None and str(Path(folder).resolve()) != base:
            known = provenance(folder).get("base") == base and (Path(folder) / ADAPTER).exists()
            stored = read_adapter(Path(folder)) if known else {}
            starts, whole = unmerge(net, base_weights(net.config), recipe.lora, stored, device)
            if whole and main_process():
                print(f"{role}: {whole} weights of {folder} differ from {base} by more than rank"
                      f" {recipe.lora} and are kept whole")
        adapt(stage, role, net, recipe, starts)
        return net

    @functools.cache  # once, though the student is made again for the result
    def tell(role, folder, kind):
        if folder and main_process():
            stage, name = map(provenance(folder).get, ("stage", "preset"))
            print(f"{role}: {kind}, from {folder}" + (f" ({name}, stage {stage})" if stage else ""))

    @functools.cache
    def base_weights(config):
        kind = config.kind if config.kind != "teacher" else None
        return Wan.from_pretrained(base, kind, **{key: getattr(config, key) for key in CAUSAL}).state_dict()

    def frozen_or_fake(role):
        option, folder = "--teacher", args.teacher
        if not folder and stage != "onpolicy":
            option, folder = "--init, without --teacher,", args.init
        if role != "teacher" and args.judge:
            option, folder = "--judge", args.judge
        net = load(folder, option, config, None, ("teacher",))
        if (net.config.kind == "causal") != causal and (role == "teacher" or not causal):
            kinds = f"is of kind {net.config.kind} for a student of kind {config.kind}"
            wanted = "a causal teacher" if causal else "a bidirectional one"
            raise ValueError(f"{option} {folder} {kinds}, expected {wanted}")
        return net, folder

    def student():
        if stage == "teacher" and not args.init:
            if recipe.lora:
                raise ValueError(f"lora is {recipe.lora}, expected 0 for random weights: --init is not given")
            net = Wan(config if causal else replace(config, kind="teacher"))
            torch.nn.init.zeros_(net.proj_out.weight)  # it starts as the zero function
            torch.nn.init.zeros_(net.proj_out.bias)
            return net, None
        before = ("consistency",) if stage == "onpolicy" and baseline else BEFORE[stage]
        # A bidirectional teacher keeps the kind of its folder; a causal one's becomes bidirectional.
        kind = None if stage == "teacher" and not causal else config.kind
        net = load(args.init, "--init", config, kind, before)
        if kind is None and net.config.kind == "causal":
            net = load(args.init, "--init", config, config.kind, before)
        return net, args.init

    return make
