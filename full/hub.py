"""Model folders by name: on this machine, or else on the hub."""

import re
from pathlib import Path

from full.options import reason

def find(name, revision=None, ignore=None):
    """A folder of that name, or else the model AUTHOR/MODEL on the hub, cached or fetched, but for files of
    the pattern `ignore`. Other names are returned as they are. ValueError where the hub does not give it."""
    if Path(name).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        return Path(name)
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"no folder {name}; the hub needs huggingface_hub, which diffusers brings") from None
    parts = dict(allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"], ignore_patterns=ignore)
    try:
        return Path(huggingface_hub.snapshot_download(str(name), revision=revision, **parts))
    except Exception as error:  # of the hub, and of the network beneath it
        raise ValueError(f"no folder {name}, and the hub does not give it: {reason(error)}") from None
