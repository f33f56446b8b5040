"""Model folders by name: on this machine, or else on the hub."""

import re
from pathlib import Path

from full.options import reason

def find(name, revision=None):
    """A folder of that name, or else the model AUTHOR/MODEL on the hub, from the local cache or fetched into
    it. What is no such name is returned as it is. ValueError where the hub cannot be reached or lacks it."""
    if Path(name).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        return Path(name)
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"no folder {name}; the hub needs huggingface_hub, which diffusers brings") from None
    parts = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(huggingface_hub.snapshot_download(str(name), revision=revision, allow_patterns=parts))
    except Exception as error:  # of the hub, and of the network beneath it
        raise ValueError(f"no folder {name}, and the hub does not give it: {reason(error)}") from None
