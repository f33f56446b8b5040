"""Files that are never half-written, and those of a model folder: weights, JSON, and their origin."""

import fcntl
import json
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from full.options import check, option, reason

WEIGHTS = "diffusion_pytorch_model.safetensors"
STAGES = ("teacher", "flowmap", "onpolicy", "consistency")

def write(path, save):
    """save(temporary path), then rename: nobody finds half a file, and an old one stays if this one fails.
    Nobody can guess the temporary name and plant a link there. OSError names the file."""
    path = Path(path)
    part = path.with_name(f".{secrets.token_hex(8)}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = part.stat().st_mode
        save(part)
        part.chmod(mode)  # for others to read: safetensors makes a file of its own, for its user alone
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', None) or reason(error)}") from None
    finally:
        with suppress(OSError):
            part.unlink()

HELD = {}  # {folder: its lock file}, open until this process ends, however it does

def hold(folder, *read):
    """Make a folder and lock it, for this process alone to write. ValueError: somebody else holds it, or it
    is one of the folders that are read."""
    folder = Path(folder).resolve()
    for source in (Path(name).resolve() for name in read if name):
        if folder in (source, source / "transformer"):
            raise ValueError(f"{folder} would be written and is read, expected another folder")
    folder.mkdir(parents=True, exist_ok=True)
    file = HELD.get(folder) or open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{folder} is in use by {file.read() or 'another process'}, expected to wait for it"
                         " or another folder") from None
    HELD[folder] = file
    file.truncate(0)
    print(f"process {os.getpid()} of {socket.gethostname()}", end="", file=file, flush=True)
    for part in folder.glob(".*.part*"):  # of who was killed here
        part.unlink()

def write_json(path, value):
    write(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))

def read_text(path, read, wrong):
    """read(the text of a file). ValueError says what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        return read(path.read_text("utf-8-sig"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} {wrong}: {error}") from None

def text_of(option):
    """A text as given on a command line, or that of FILE for @FILE."""
    return read_text(Path(option[1:]), str.strip, "is no text") if option.startswith("@") else option

def read_json(path):
    return read_text(path, json.loads, "is no JSON")

def read_lines(path, cut=False):
    """The objects of a file with one in each line, as JSON; cut: but for a last line without an end."""
    whole = lambda text: text[: text.rfind("\n") + 1] if cut else text
    objects = lambda text: [dict(json.loads(line)) for line in whole(text).splitlines()]
    return read_text(path, objects, "has a line that is no JSON object")

def append(path, text):
    """Add to the end of a file. OSError names it."""
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None

def read_log(path, step):
    """The lines of a log up to a step; none where there is no file. ValueError where it ends before."""
    rows = read_lines(path, cut=True) if os.path.lexists(path) else []
    if os.path.lexists(path) and not any(row.get("step") in (step, step + 1) for row in rows):
        raise ValueError(f"{path} does not go to step {step} as the checkpoint, expected that or no file")
    return [row for row in rows if row.get("step") in range(1, step + 1)]

def open_tensors(path, *names):
    """A safetensors file; ValueError names the file and what of `names` it lacks."""
    if not Path(path).is_file():
        raise ValueError(f"no file {path}")
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    for name in names:
        if name not in file.keys():
            raise ValueError(f"{path} has {', '.join(file.keys()) or 'nothing'}, expected a tensor {name!r}")
    return file

def read_tensors(path, *names):
    file = open_tensors(path, *names)
    return {name: file.get_tensor(name) for name in file.keys()}

def read_weights(folder, layers):
    """{name: tensor} of a folder's safetensors, one file or the shards that its index lists. ValueError where
    they have not so many layers, before a network is built that may be of any depth."""
    index, state, files = folder / f"{WEIGHTS}.index.json", {}, [WEIGHTS]
    if os.path.lexists(index):
        listed = read_json(index)
        if not isinstance(listed, dict) or not isinstance(listed.get("weight_map"), dict):
            raise ValueError(f"{index} has no weight_map")
        files = sorted(set(map(str, listed["weight_map"].values())))
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{index} lists the file {name!r}, expected a name without a folder")
        if not (folder / name).is_file():
            raise ValueError(f"no file {folder / name}" + f", which {index.name} lists" * (name != WEIGHTS))
        state |= read_tensors(folder / name)
    found = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if found != layers:
        raise ValueError(f"{folder} has weights of {found} layers, expected {layers} as in its config.json")
    return state

def take_weights(model, state, where):
    """Make a state dict the model's weights. ValueError for names and shapes that are not the model's."""
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    lacking, unknown = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    for problem, names in (("lacks", lacking), ("has unknown", unknown)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{where} {problem} {some} for a {model.config.kind} model")
    for name, shape in wanted.items():
        if state[name].shape != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}")
        if state[name].dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{where}: {name} is of {state[name].dtype}, expected float32 or bfloat16")
        if not state[name].isfinite().all():
            raise ValueError(f"{where}: {name} has values that are not finite: the weights are damaged")
    model.load_state_dict(state, assign=True)

def compressed_patches(embedding, size):
    """{"weight", "bias"} of the patch embedding -> for larger patches, by trilinear interpolation."""
    weight = embedding["weight"]
    larger = F.interpolate(weight.flatten(0, 1)[:, None].float(), size=size, mode="trilinear")
    larger = larger.reshape(*weight.shape[:2], *size).to(weight.dtype)
    return {"weight": larger, "bias": embedding["bias"].clone()}

def of_kind(state, kind, config):
    """A network of that kind's weights for config's: what only the latter has is made, the rest dropped."""
    first, second = ".time_embedder.", ".delta_embedder."
    if kind == "teacher" and config.kind != "teacher":
        state |= {name.replace(first, second): p.clone() for name, p in state.items() if first in name}
    if config.kind != "causal":
        return {name: p for name, p in state.items() if not name.startswith("far_patch_embedding.")}
    patch = {name: state.get(f"patch_embedding.{name}") for name in ("weight", "bias")}
    if kind != "causal" and None not in (patch["weight"], patch["bias"]):
        new = compressed_patches(patch, config.compressed_patch_size)
        state |= {f"far_patch_embedding.{name}": p for name, p in new.items()}
    return state

@dataclass(frozen=True)
class Provenance:
    """Of anyflow.json, which `train.py` leaves beside weights, what decides how the model is used."""

    stage: str = option(None, choices=STAGES)
    preset: str = option(None)
    data: str = option(None)
    rollout: str = option(None, choices=("flowmap", "consistency"))
    base: str = option(None)  # the folder that the weights are a LoRA of
    shift: float = option(None, above=0)
    shape: tuple = option(None, low=1, length=4)  # of a clip, (F, C, H, W)

def provenance(folder):
    """All of a folder's anyflow.json, as a dict; empty for a published folder."""
    path = Path(folder) / "anyflow.json"
    made = read_json(path) if os.path.lexists(path) else {}
    return made | check(Provenance, made, path)
