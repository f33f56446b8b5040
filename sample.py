"""Text, image or video in, video out: any number of steps, whole clips or streamed chunk by chunk.

    python sample.py --model FOLDER --text prompt.safetensors --steps 4 --out out/clip.safetensors

Everything here is `anyflow.sample` on a network that knows which frames are given: T2V gives none, I2V the first
latent frame, V2V the first few.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import anyflow
from model import Wan


def generate(model, text, noise, steps, *, shift=5.0, guidance=1.0, null_text=None, context=None, chunks=None):
    """Latents (B, F, C, H, W) from noise of that shape, in `steps` network calls (a causal model: per chunk).

    text: (B, L, text_dim). guidance: for teachers; needs null_text, as text. context: given first frames
    (B, f, C, H, W), returned unchanged. chunks: see `stream`. Raises ValueError.
    """
    if model.config.kind == "causal":
        return torch.cat([*stream(model, text, noise, steps, shift=shift, guidance=guidance, null_text=null_text,
                                  context=context, chunks=chunks)], 1)  # fmt: skip
    if chunks is not None:
        raise ValueError(f"chunks need a causal model, found kind {model.config.kind!r}")
    given = check_context(context, noise)
    if given:
        noise = torch.cat([context.to(noise.dtype), noise[:, given:]], 1)

    def held(z, t, r, text):
        """The model with the given frames held: they are at t = 0, and do not move. r is left alone, as published."""
        if not given:
            return model(z, t, r, text)
        frame = torch.arange(z.shape[1], device=z.device)
        u = model(z, torch.where(frame < given, 0, t[:, None]), r[:, None].expand(z.shape[:2]), text)
        return torch.where((frame < given)[:, None, None, None], 0, u)

    with torch.no_grad():
        text, null = model.encode_text(text), null_text if null_text is None else dict(text=model.encode_text(null_text))
    average = model.config.kind != "teacher"
    return anyflow.sample(
        held, noise, steps, shift=shift, guidance=guidance, null=null, average=average, text=text
    )


def stream(model, text, noise, steps, *, shift=5.0, guidance=1.0, null_text=None, context=None, chunks=None):
    """The chunks (B, f, C, H, W) of a causal model one by one, given ones first: arguments as of `generate`.

    chunks: frames of each; not given, the model's own partition as far as noise reaches. Any number of chunks will do.
    """
    if model.config.kind != "causal":
        raise ValueError(f"streaming needs a causal model, found kind {model.config.kind!r}")
    chunks = partition(noise.shape[1], model.config.chunk_partition) if chunks is None else tuple(chunks)
    if sum(chunks) != noise.shape[1] or min(chunks) < 1:
        raise ValueError(f"chunks {chunks} are {sum(chunks)} frames, but the noise has {noise.shape[1]}")
    given = check_context(context, noise)
    ends = [sum(chunks[: i + 1]) for i in range(len(chunks))]
    if given and given not in ends:
        raise ValueError(f"context of {given} frames ends inside a chunk, expected one of {ends}")

    with torch.no_grad():
        text, null = model.encode_text(text), null_text if null_text is None else model.encode_text(null_text)
    # The null prompt has a cache of its own: the past, too, is encoded with the prompt.
    branches = [(model.new_cache(), text)] + ([(model.new_cache(), null)] if guidance != 1 and null is not None else [])
    cond, *nulls = (dict(cache=cache, text=prompt) for cache, prompt in branches)
    for end, size in zip(ends, chunks):
        if end <= given:
            chunk = context[:, end - size : end]
        else:
            start = noise[:, end - size : end]
            null = nulls[0] if nulls else None
            chunk = anyflow.sample(model, start, steps, shift=shift, guidance=guidance, null=null, **cond)
        yield chunk
        if end < ends[-1]:
            for cache, prompt in branches:
                model.extend(cache, chunk, prompt)


def partition(frames, chunks):
    """The first of the chunks, that sum to this many frames."""
    for i in range(1, len(chunks) + 1):
        if sum(chunks[:i]) == frames:
            return tuple(chunks[:i])
    raise ValueError(f"{frames} frames are no sum of the model's first chunks {tuple(chunks)}; name others in chunks")


def check_context(context, noise):
    """How many frames are given. They must fit the noise and leave something to generate."""
    if context is None:
        return 0
    shape = noise.shape
    if context.ndim != 5 or (context.shape[0], *context.shape[2:]) != (shape[0], *shape[2:]):
        raise ValueError(f"context has shape {tuple(context.shape)}, expected ({shape[0]}, f, {', '.join(map(str, shape[2:]))})")
    if not 1 <= context.shape[1] < shape[1]:
        raise ValueError(f"context has {context.shape[1]} frames, expected 1 to {shape[1] - 1} of the {shape[1]}")
    return context.shape[1]
