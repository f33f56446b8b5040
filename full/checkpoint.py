"""What a run keeps: checkpoints to go on from exactly, and in the end a folder of averaged weights."""

import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule

import anyflow
from full.files import read_json, write_json
from full.lora import save_adapter
from full.options import reason
from full.parallel import TRAINED, local, main_process, trained, wait_for_all, whole

# All that the `.metadata` of our checkpoints names; pickle would call whatever else it does. Not
# BytesStorageMetadata: what it stands for torch unpickles without a question.
KNOWN = {("torch.distributed.checkpoint.metadata", name) for name in (
    "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "_MEM_FORMAT_ENCODING")}
KNOWN |= {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
          ("pathlib._local", "PosixPath"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}

class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not dtype and (module, name) not in KNOWN:
            raise ValueError(f".metadata names {module}.{name}, expected descriptions of tensors alone")
        return super().find_class(module, name)

class Reader(dcp.FileSystemReader):
    """Reads a checkpoint that may come from anywhere: runs no code, leaves the folder never."""

    def read_metadata(self, *args, **kwargs):
        with open(self.path / ".metadata", "rb") as file:
            made = Unpickler(file).load()
        for stored in made.storage_data.values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise ValueError(f".metadata names the file {stored.relative_path!r}, expected no folder")
        return made

class Run:
    """The state that a checkpoint holds: networks in training, their optimisers, the average, the step.

    No random state or data position is kept: both are functions of seed and step, see `train.Clips`.
    """

    def __init__(self, nets, optimisers, folder, settings):
        self.nets, self.optimisers, self.settings = nets, optimisers, settings
        self.folder, self.step = folder / "checkpoints", 0
        # AdamW makes its state at a weight's first gradient, but a checkpoint needs the state of all weights.
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
                write_json(part / "settings.json", self.settings)
                shutil.rmtree(self.folder / name, ignore_errors=True)
                os.replace(part, self.folder / name)
                for old in self.all()[:-2]:
                    shutil.rmtree(old)
        except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"cannot save {self.folder / name}: {reason(error)}; {self.newest()}") from None
        wait_for_all()

    def resume(self):
        """Load the newest checkpoint. ValueError where there is none, or it was made with other settings."""
        if not self.all():
            raise ValueError(f"--resume found no checkpoint in {self.folder}")
        newest = self.all()[-1]
        made = read_json(newest / "settings.json")
        if not isinstance(made, dict):
            raise ValueError(f"{newest / 'settings.json'} holds {type(made).__name__}, expected an object")
        changed = [f"{key} {made.get(key)!r} -> {self.settings.get(key)!r}"
                   for key in sorted(made | self.settings) if made.get(key) != self.settings.get(key)]
        if changed:
            raise ValueError(f"{newest} was made with other settings: {', '.join(changed)}")
        self.load(newest)

    def load(self, folder):
        try:
            dcp.load(self.state(), storage_reader=Reader(folder), no_dist=not dist.is_initialized())
        except (Exception, CheckpointException) as error:
            raise ValueError(f"cannot read checkpoint {folder}: {reason(error)}") from None
        self.step = int(folder.name.removeprefix("step-"))

    def all(self):
        return sorted(self.folder.glob("step-" + 7 * "[0-9]"))

    def newest(self):
        kept = self.all()
        return f"the last whole checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"

    def update_average(self, recipe):
        parts = ([local(p) for p in params.values()] for params in (self.average, self.trained["student"]))
        anyflow.update_average(*parts, self.step - recipe.ema_start, recipe.ema, recipe.ema_ramp)

    @contextmanager
    def averaged(self):
        """The student with the average of its weights, for as long as the context lasts."""
        own = {name: p.detach().clone() for name, p in self.trained["student"].items()}
        try:
            self.set_weights(self.average)
            yield self.nets["student"]
        finally:
            self.set_weights(own)

    @torch.no_grad()
    def set_weights(self, values):
        for name, p in self.trained["student"].items():
            p.copy_(values[name])
        for module in self.nets["student"].modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what was gathered for the last forward pass is of the old weights

    @torch.no_grad()
    def export(self, folder, start, recipe):
        """The averaged weights as a folder that diffusers opens, and beside them the LoRA. start(): the
        network before training."""
        average = {}
        for name, p in self.average.items():  # one by one, off the GPU, which may not hold them all
            p = whole(p)
            if main_process():
                average[name] = p.cpu()
        student = start()  # on all: they may have to agree on a LoRA
        if main_process():
            student.float().load_state_dict(average, strict=not recipe.lora)
            student.save_pretrained(folder)
            if recipe.lora:
                save_adapter(student, folder)
            write_json(folder / "anyflow.json", self.settings)
        wait_for_all()
