"""Clips at full scale: what a preset's clips are, and folders of shards of them."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from full.files import open_tensors, read_tensors
from model import PRESETS

CAUSAL_TINY = dict(compressed_patch_size=(1, 12, 12), chunk_partition=(1, 2, 2, 2, 2))  # a frame in one patch
NAMES = [*PRESETS, *(f"{name}-causal" for name in PRESETS)]

def preset(name):
    """WanConfig, causal if the name says so, and the shape (F, C, H, W) of a clip's latents."""
    size, causal = name.removesuffix("-causal"), name.endswith("-causal")
    more = CAUSAL_TINY if size == "tiny" else {}
    config = replace(PRESETS[size], kind="causal" if causal else "anyflow", **more)
    frames, height, width = (9, 12, 12) if size == "tiny" else (21, 60, 104)
    return config, (frames, config.in_channels, height, width)

def open_shard(path, shape, text):
    """A shard, and how many clips it has, latents (n, *shape) and text (n, *text). ValueError for none."""
    file = open_tensors(path, "latents", "text")
    x, y = (tuple(file.get_slice(key).get_shape()) for key in ("latents", "text"))
    if x[1:] != shape or y != (*x[:1], *text):
        wanted = f"(n, {', '.join(map(str, shape))}) and (n, {', '.join(map(str, text))})"
        raise ValueError(f"{path}: latents {x} and text {y}, expected {wanted}")
    return file, x[0]

class Shards:
    """A folder of safetensors files, each with `latents` (n, F, C, H, W) and `text` (n, L, text_dim) of n
    clips, and `null.safetensors` with the null prompt, `text` (1, L, text_dim). A clip is read when asked
    for."""

    def __init__(self, folder, shape, text_dim, skip_bad=False):
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"no data folder {folder}")
        self.clips, self.shuffled, self.bytes, self.spoilt, bad = [], None, 0, "", []
        self.null = read_tensors(folder / "null.safetensors", "text")["text"].float()
        text = *self.null.shape[1:2], text_dim
        if self.null.shape != (1, *text) or not self.null.isfinite().all():
            found = f"{folder / 'null.safetensors'} has text {tuple(self.null.shape)}"
            raise ValueError(f"{found}, expected finite numbers (1, L, {text_dim})")
        for path in sorted({*folder.glob("[!.]*.safetensors")} - {folder / "null.safetensors"}):
            try:
                (file, count), length = open_shard(path, shape, text), path.stat().st_size
                self.clips += [(file, path, length, i) for i in range(count)]
                self.bytes += length
            except (ValueError, OSError) as error:
                bad.append(str(error))
        if bad and not skip_bad:
            raise ValueError(f"{len(bad)} bad shard(s), first {bad[0]}; --skip-bad-shards uses the others")
        if bad and os.environ.get("RANK", "0") == "0":
            print(f"skipped {len(bad)} bad shard(s): {'; '.join(bad)}", file=sys.stderr)
        if not self.clips:
            raise ValueError(f"no clips in {folder}, expected safetensors files with latents and text")

    def __len__(self):
        return len(self.clips)

    def batch(self, positions, seed):
        """Clips by their place in an endless row of epochs, each shuffled by its own seed."""
        picked = []
        for position in positions:
            epoch, i = divmod(position, len(self.clips))
            if (seed, epoch) != self.shuffled:
                self.shuffled = seed, epoch
                self.order = np.random.default_rng(self.shuffled).permutation(len(self.clips))
            picked.append(self.clips[self.order[i]])
        for _, path, length, _ in picked:  # mapped: to read what was cut off kills the process
            if path.stat().st_size != length:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {length} as when opened")
        read = lambda key: torch.stack([file.get_slice(key)[i] for file, *_, i in picked]).float()
        x, text = read("latents"), read("text")
        for (_, path, _, i), *numbers in zip(picked, x, text):
            if not all(values.isfinite().all() for values in numbers):
                self.spoilt = f"; clip {i} of {path} is not finite"  # the loss will not be: it says where
        return x, text
