"""What a run keeps: checkpoints to go on from exactly, and in the end a folder of averaged weights."""

import os
import pickle
import shutil
import signal
import sys
import zlib
from contextlib import contextmanager
from datetime import timedelta
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
from full.parallel import TRAINED, local, main_process, place, trained, wait_for_all, whole

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

def checksums(folder):
    """{name: CRC-32} of the files in a folder, each read by one of the processes, known to all."""
    (rank, world), mine = place(), {}
    names = [sorted(path.name for path in folder.iterdir() if path.name != "checksums.json")]
    if dist.is_initialized():
        dist.broadcast_object_list(names, 0)  # another node's listing may be an older one
    for path in (folder / name for name in names[0][rank::world]):
        mine[path.name] = 0
        with open(path if path.is_file() else os.devnull, "rb") as file:  # not a FIFO, which never ends
            while block := file.read(2**22):
                mine[path.name] = zlib.crc32(block, mine[path.name])
    parts = [mine] * world
    if dist.is_initialized():
        dist.all_gather_object(parts, mine)
    return {name: crc for part in parts for name, crc in part.items()}

PASSING = OSError, MemoryError, torch.OutOfMemoryError  # of the machine: the files may be whole,
LASTING = FileNotFoundError, IsADirectoryError  # but not where it is one of these

class Damaged(ValueError):
    """A checkpoint that is not as it was written."""

class Stop:
    """Whether SIGTERM came to any process: asked once a step, so that all save and end together."""

    def __init__(self, device):
        self.device, self.came = device, 0.0  # no tensor, for the signal may come while a block is compiled
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "came", 1.0))

    def __bool__(self):
        return bool(anyflow.sum_over_processes(torch.tensor(self.came, device=self.device)))

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
        """Write beside, rename, then drop all but the newest two. FloatingPointError for what is spoiled."""
        parts = *self.trained.values(), self.average
        finite = [local(p).isfinite().all() for part in parts for p in part.values()]
        if anyflow.sum_over_processes((~torch.stack(finite)).sum().float()):
            raise FloatingPointError(f"step {self.step}: weights are not finite after it; {self.newest()}")
        name = f"step-{self.step:07d}"
        part = self.folder / f".{name}.part"
        try:
            if main_process():
                for old in self.folder.glob(".step-*.part"):
                    shutil.rmtree(old, ignore_errors=True)
                part.mkdir(parents=True)
            wait_for_all()
            dcp.save(self.state(), checkpoint_id=part, no_dist=not dist.is_initialized())
            if main_process():
                write_json(part / "settings.json", self.settings)
            wait_for_all()
            sums = checksums(part)
            if main_process():
                write_json(part / "checksums.json", sums)
                shutil.rmtree(self.folder / name, ignore_errors=True)
                os.replace(part, self.folder / name)
                for old in self.all()[:-2]:
                    shutil.rmtree(old)
        except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"cannot save {self.folder / name}: {reason(error)}; {self.newest()}") from None
        wait_for_all()

    def resume(self):
        """Load the newest whole checkpoint. ValueError: there is none, or it was made with other settings."""
        kept = self.all()
        if not kept:
            raise ValueError(f"--resume found no checkpoint in {self.folder}")
        wait_for_all()  # until all have looked: then names may change
        for folder in reversed(kept):
            try:
                self.load(folder)
                return
            except Damaged as error:
                said = f"{error}; set aside as damaged-{folder.name}, the one before is tried"
                if main_process():
                    print(said, file=sys.stderr)
                    shutil.rmtree(folder.with_name(f"damaged-{folder.name}"), ignore_errors=True)
                    os.replace(folder, folder.with_name(f"damaged-{folder.name}"))
        raise ValueError(f"{said}, but there is none: train anew, into another --out")

    def load(self, folder):
        try:
            wanted, found = dict(read_json(folder / "checksums.json")), checksums(folder)
        except (ValueError, TypeError) as error:
            raise Damaged(f"{folder} is half-written: {reason(error)}") from None
        wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        if wrong:
            raise Damaged(f"{folder} is damaged: {', '.join(wrong)} changed")
        made, mine = read_json(folder / "settings.json"), self.settings
        changed = [f"{key} {made.get(key)!r} -> {mine.get(key)!r}" for key in sorted(made | mine)
                   if repr(made.get(key)) != repr(mine.get(key))]  # True is not 1.0
        if changed:
            raise ValueError(f"{folder} was made with other settings: {', '.join(changed)}")
        try:
            Reader(folder).read_metadata()  # what is wrong with it torch would log in twenty lines
            dcp.load(self.state(), storage_reader=Reader(folder), no_dist=not dist.is_initialized())
        except (Exception, CheckpointException) as error:
            said = f"cannot read checkpoint {folder}: {reason(error)}"
            for cause in (error, *(failure[0] for failure in getattr(error, "failures", {}).values())):
                if isinstance(cause, PASSING) and not isinstance(cause, LASTING):
                    raise type(cause)(said) from None
            raise Damaged(said) from None
        self.step = int(folder.name.removeprefix("step-"))

    def all(self):
        return sorted(self.folder.glob("step-" + 7 * "[0-9]"))

    def begun(self):
        """Whether there is a checkpoint, be it damaged."""
        return any(self.folder.glob("*step-" + 7 * "[0-9]"))

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
        """The averaged weights as a folder that diffusers opens, and beside them the LoRA, by one process.
        All wait for it, up to two hours. start(): the network before training."""
        group = dist.new_group(timeout=timedelta(hours=2)) if dist.is_initialized() else None
        wait_for_all(group)  # which connects it: to connect waits ten minutes at most
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
        wait_for_all(group)
