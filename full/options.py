"""What comes from outside, declared once: each value's meaning, default, type, range and choices.

A dataclass of `option`s is such a declaration. `check` reads it for what a file holds (config.json,
anyflow.json, a manifest), `add_options` for a command line. `command` runs one, to end in one sentence at
worst.
"""

import argparse
import ctypes
import functools
import math
import os
import re
import signal
import sys
from dataclasses import MISSING, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError

KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", tuple: "integers"}

def option(default=MISSING, meaning="", **limits):
    """A field. limits: low, above, high, below, choices; length of a tuple, whose integers they hold for;
    form of a text, in which 0 stands for any digit."""
    return field(default=default, metadata={"meaning": meaning} | limits)

def expected(f):
    """In words, what fits a field: "a number above 0"."""
    limits = f.metadata
    if "choices" in limits:
        return f"one of {', '.join(limits['choices'])}"
    kind = f"{limits['length']} integers" if "length" in limits else limits.get("form", KINDS[f.type])
    if "low" in limits and "high" in limits:
        return f"{kind} in [{limits['low']}, {limits['high']}]"
    words = (("above", "above"), ("low", "of at least"), ("high", "up to"), ("below", "and below"))
    return " ".join([kind, *(f"{word} {limits[key]}" for key, word in words if key in limits)])

def fits(f, value):
    """Whether a value has the type, range and choices of a field. None fits where it is the default."""
    limits = f.metadata
    if value is None or not isinstance(value, (int, float) if f.type is float else f.type):
        return value is None and f.default is None
    numbers = value if f.type is tuple else (value,) if f.type in (int, float) else ()
    right = lambda x: (isinstance(x, int if f.type is tuple else (int, float)) and not isinstance(x, bool)
                       and (math.isfinite(x) if isinstance(x, float) else abs(x) < 2**63)
                       and limits.get("low", x) <= x <= limits.get("high", x)
                       and ("above" not in limits or x > limits["above"])
                       and ("below" not in limits or x < limits["below"]))
    form = re.sub("[0-9]", "0", value) if "form" in limits else None
    long = f.type is not tuple or len(value) == limits.get("length", len(value)) > 0
    chosen = value in limits.get("choices", (value,)) and form == limits.get("form")
    return chosen and long and all(map(right, numbers))

def check(declaration, given, where=""):
    """The values {name: value} that a declaration names, lists as tuples. ValueError for a wrong one."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} holds {type(given).__name__}, expected an object of keys and values")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    for f in fields(declaration):
        if f.name not in given and f.default is MISSING:
            raise ValueError(f"{where}: {f.name} is missing, expected {expected(f)}")
        if f.name in given and not fits(f, given[f.name]):
            start = f"{where}: " if where else ""
            raise ValueError(f"{start}{f.name} is {given[f.name]!r}, expected {expected(f)}")
    return {f.name: given[f.name] for f in fields(declaration) if f.name in given}

def add_options(parser, declaration, defaults):
    """An option of the command line for each field; what is not given there stays None.

    defaults: {name: value} that the help shows in place of a field's own; None: it shows none.
    """
    for f in fields(declaration):
        default = (defaults or {}).get(f.name, f.default)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        shown = "" if defaults is None else f" (default {shown.lower()})"
        text = f"{f.metadata['meaning']}: {expected(f)}{shown}"
        kind = {tuple: "N,N,...", int: "N", float: "N"}.get(f.type, "X")
        read = functools.partial(from_text, f)
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=read, help=text, metavar=kind)

def from_text(f, text):
    """A value as written on a command line; its range is left to `check`."""
    try:
        if f.type is bool:
            return {"true": True, "false": False}[text]
        return tuple(int(part) for part in text.split(",")) if f.type is tuple else f.type(text)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected(f)}") from None

def integer(text, low, below, words):
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) < below):
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is no integer {words}")
    return int(text)

# Of a command line; a seed is what every generator here takes.
positive = functools.partial(integer, low=1, below=2**63, words="of at least 1")
count = functools.partial(integer, low=1, below=10**6, words="from 1 to 999999")
seed_value = functools.partial(integer, low=0, below=2**32, words="from 0 to 2^32 - 1")

def nonempty(text):
    """Of a file, a folder or a world, on a command line."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty, expected a name")
    return text

def path_value(text):
    return Path(nonempty(text))

def device_of(name):
    """The device of that name; each process of torchrun has a GPU of its own. ValueError for none."""
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {reason(error)}") from None
    return device

def reason(error):
    """The first line of what an error says; of a checkpoint's error, what the first process says."""
    if getattr(error, "failures", None):
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

def command(name, run, stopped, too_large=str):
    """run(), which ends in one sentence at worst. stopped: what to do after Ctrl-C or SIGTERM; too_large():
    where memory does not do."""
    sys.excepthook = sys.__excepthook__  # see full/__init__.py: the imports are done
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt: all is cleaned up
    try:
        run()
    except torch.OutOfMemoryError as error:
        sys.exit(f"{name}: {reason(error)} {too_large()}".strip())
    except (ValueError, OSError, RuntimeError, SafetensorError, ArithmeticError, MemoryError) as error:
        sys.exit(f"{name}: {reason(error)}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped; {stopped}")
    finally:
        signal.signal(signal.SIGTERM, before)

def end_with_parent():
    """SIGTERM to this process when its parent ends, however it does: no orphan trains on. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
