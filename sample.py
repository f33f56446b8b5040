"""A prompt, an image or the start of a video in, a video out: any number of steps, whole or chunk by chunk.

    python sample.py --prompt "a fast blue cross moving up" --steps 8 2    # the tiny world; 8, then 2 a chunk
    python sample.py --model FOLDER --prompt "a cat on a skateboard" --out cat.mp4       # Wan 2.1, AnyFlow
    python sample.py --model FOLDER --prompt "it rolls away" --image cat.jpg --out cat.mp4
    python sample.py --model FOLDER --prompts vbench.json --per-prompt 5 --out videos    # <prompt>-<i>.mp4

Everything here is `anyflow.sample` on a network that knows which frames are given: T2V (text to video) gives
none, I2V (image to video) the first latent frame, V2V (video to video) the first few. A published folder
brings its VAE and text encoder; without them, embeddings go in (--text) and latents come out. FOLDER may be
the name of a model on the hub, as nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers.
"""

import full  # noqa: F401  (first: so Ctrl-C during the imports below is heard)

# isort: split
import argparse
import functools
import importlib.util
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import anyflow
from full.compile import compile_blocks
from full.files import provenance, read_tensors, text_of
from full.hub import find
from full.options import command, count, device_of, positive, reason, seed_value
from full.pixels import FORMATS, Published, check_writer, clips_of, context_of, finite, latent_shape, save
from model import Wan
from toy import world

TOO_LARGE = "Fewer --frames, --height and --width need less; python -m full.plan says how much a clip needs."
MOST = 64  # calls a chunk, with a budget
EXAMPLE = Path(__file__).parent / "toy" / "weights" / "causal-anyflow"

def generate(model, text, noise, steps, *, shift=5.0, guidance=1.0, null_text=None, context=None, chunks=None,
             padding=False, sampler=None, path=False):
    """Latents (B, F, C, H, W) from noise of that shape in `steps` jumps, of a causal model for each chunk.

    steps: a number, or a tensor of times, as in `anyflow.sample`; for a causal model also a list of these,
    one for each chunk to be made, the last one for the rest.
    text: (B, L, text_dim). guidance: for teachers; needs null_text, as text. context: given first frames (B,
    f, C, H, W), returned unchanged. chunks, padding: see `stream`. sampler: one of SAMPLERS; by default
    "euler" for a network of one time, else "flowmap"; for what `train.py` made, `sampler_of_folder` knows it
    (and anyflow.json the shift). path: of a bidirectional model, every state. Raises ValueError.
    """
    if model.config.kind == "causal":
        if path:
            raise ValueError("path needs a bidirectional model, found kind 'causal'")
        more = dict(null_text=null_text, context=context, chunks=chunks, padding=padding, sampler=sampler)
        return torch.cat([*stream(model, text, noise, steps, shift=shift, guidance=guidance, **more)], 1)
    if chunks is not None:
        raise ValueError(f"chunks need a causal model, found kind {model.config.kind!r}")
    given = given_frames(context, noise)

    def held(z, t, r, text):
        """The model, which sees given frames clean, at t = 0, but at the other frames' r, as published."""
        z = torch.cat([context.to(z.dtype), z[:, given:]], 1)
        t = torch.where(torch.arange(z.shape[1], device=z.device) < given, 0, t[:, None])
        return model(z, t, r[:, None].expand(z.shape[:2]), text)

    with torch.no_grad():
        text, null = model.encode_text(text), None
        if guidance != 1 and null_text is not None:
            null = dict(text=model.encode_text(null_text))
    run, (steps,) = sampler_of(model, sampler, guidance), steps_of_chunks(steps, 1)
    options = dict(shift=shift, guidance=guidance, null=null, path=path, text=text)
    clips = run(held if given else model, noise, steps, **options)
    if given:
        clips[..., :given, :, :, :] = context
    return clips

def stream(model, text, noise, steps, *, shift=5.0, guidance=1.0, null_text=None, context=None, chunks=None,
           padding=False, sampler=None, budget=None):
    """The chunks (B, f, C, H, W) of a causal model one by one, given ones first: arguments as of `generate`.

    chunks: frames of each, as many as one likes, or else the model's own, as far as noise reaches. padding:
    see `Wan.new_cache`. budget: seconds for all, pauses counted. The first takes its `steps`, each later one
    as many calls, 1 to MOST, as fit into its frames' share of the time left. Do not change a chunk in place.
    """
    if model.config.kind != "causal":
        raise ValueError(f"streaming needs a causal model, found kind {model.config.kind!r}")
    chunks = partition(noise.shape[1], model.config.chunk_partition) if chunks is None else tuple(chunks)
    if sum(chunks) != noise.shape[1] or min(chunks) < 1:
        raise ValueError(f"chunks are {chunks}, expected numbers above 0 with the sum {noise.shape[1]}")
    given = given_frames(context, noise)
    ends = [sum(chunks[: i + 1]) for i in range(len(chunks))]
    if given and given not in ends:
        raise ValueError(f"context of {given} frames ends inside a chunk, expected one of {ends}")

    left = steps_of_chunks(steps, sum(end > given for end in ends))
    if budget is not None and not budget > 0:
        raise ValueError(f"budget is {budget}, expected a number of seconds above 0")
    deadline, cost = time.perf_counter() + (budget or 0), None  # seconds of a call for a frame
    run = sampler_of(model, sampler, guidance)
    with torch.no_grad():
        prompts = [text, null_text] if guidance != 1 and null_text is not None else [text]
        # The null prompt has a cache of its own: the past, too, is encoded with the prompt.
        branches = [(model.new_cache(padding), model.encode_text(prompt)) for prompt in prompts]
    cond, *nulls = (dict(cache=cache, text=prompt) for cache, prompt in branches)
    for end, size in zip(ends, chunks):
        if end <= given:
            chunk = context[:, end - size : end]
        else:
            calls, now = left.pop(0), time.perf_counter()
            if cost:  # to enter the cache costs about a call for each chunk of the window
                share = (deadline - now) / (ends[-1] - end + size)
                calls = max(1, int(min(MOST, share / cost - (model.config.full_chunk_limit - 1))))
            start, null = noise[:, end - size : end], nulls[0] if nulls else None
            chunk = run(model, start, calls, shift=shift, guidance=guidance, null=null, **cond)
            if budget:
                chunk.flatten()[0].item()  # waits for a GPU
                cost = (time.perf_counter() - now) / (len(anyflow.time_grid(calls)) - 1) / size
        yield chunk
        if end < ends[-1]:
            for cache, prompt in branches:
                model.extend(cache, chunk, prompt)

def steps_of_chunks(steps, chunks):
    """The `steps` of `generate` as a list, one entry for each of so many chunks."""
    steps = list(steps) if isinstance(steps, (list, tuple)) else [steps]
    if not 1 <= len(steps) <= chunks:
        raise ValueError(f"steps are {len(steps)} numbers for {chunks} chunk(s), expected one each at most")
    return steps + steps[-1:] * (chunks - len(steps))

# How each kind of network is sampled: a teacher, a flow map, a model distilled by consistency.
SAMPLERS = {
    "euler": functools.partial(anyflow.sample, average=False),
    "flowmap": anyflow.sample,
    "consistency": functools.partial(anyflow.sample, gamma=1.0),
}

def sampler_of(model, name, guidance):
    name = name or ("euler" if model.config.kind == "teacher" else "flowmap")
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}, expected one of {', '.join(SAMPLERS)}")
    if name == "consistency" and guidance != 1:
        raise ValueError(f"guidance is {guidance}, expected 1: a consistency model has it built in")
    return SAMPLERS[name]

def sampler_of_folder(folder):
    """The sampler for what `train.py` made; None for a published folder."""
    made = provenance(folder)
    return sampler_of_stage(made.get("stage"), made.get("rollout"))

def sampler_of_stage(stage, rollout):
    if stage == "onpolicy" and rollout == "consistency":
        return "consistency"
    return {"teacher": "euler", "consistency": "consistency"}.get(stage)

def partition(frames, chunks):
    """As many of the first chunks as have this many frames together."""
    for i in range(1, len(chunks) + 1):
        if sum(chunks[:i]) == frames:
            return tuple(chunks[:i])
    raise ValueError(f"{frames} latent frames are no sum of the model's first chunks {chunks}; name --chunks")

def given_frames(context, noise):
    """How many frames are given. They must fit the noise and leave something to generate."""
    if context is None:
        return 0
    wanted = (*noise.shape[:1], *noise.shape[2:])
    if context.ndim != 5 or (*context.shape[:1], *context.shape[2:]) != wanted:
        found = f"context has shape {tuple(context.shape)}"
        raise ValueError(f"{found}, expected all but its frames as the noise, {tuple(noise.shape)}")
    if not 1 <= context.shape[1] < noise.shape[1]:
        raise ValueError(f"context has {context.shape[1]} frames, expected 1 or more, below {noise.shape[1]}")
    return context.shape[1]


# ---- Command line ----------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", default=EXAMPLE, help="model folder, or AUTHOR/MODEL on the hub (default: the tiny causal"
        " one in the repository)")
    add("--revision", help="of a --model on the hub: branch, tag or commit")
    add("--parts", help="published folder of the VAE and text encoder, if --model has none of its own")
    add("--prompt", nargs="+", default=["a slow red disc moving left"], help="one, or several in quotes")
    add("--prompts", help="file of prompts, one in each line, or of JSON with prompt_en, which names the clip"
        " <prompt>-<i>, and aug_prompt_en, which it is made from, as VBench has it")
    add("--per-prompt", type=count, help="clips of each prompt")
    add("--seeds", choices=("per-prompt", "running"), default="per-prompt",
        help="SEED, SEED + 1, ... for each prompt, or over all clips, as the release has it for VBench")
    add("--negative", default="", help="prompt to be guided away from, or @FILE (default: the empty one)")
    add("--image", help="first frame")
    add("--video", help="file whose first frames are given")
    add("--given", type=positive, help="frames of --video (default: 25 or fewer), or of a true tiny clip")
    add("--text", help="safetensors: `text` (B, L, text_dim), perhaps `null_text`, in place of --prompt")
    add("--context", help="safetensors: `latents` (B, f, C, h, w), given first frames")
    add("--out", type=Path, default=Path("out/clip"), help="file .mp4, .gif, .png (some frames), .safetensors"
        " (latents), by default all that apply; of several clips the folder")
    steps = parser.add_mutually_exclusive_group().add_argument
    steps("--steps", type=positive, nargs="+", default=[4], help="network calls (default 4), of a causal"
          " model a chunk: one number for each, the last one goes on")
    steps("--times", type=float, nargs="+", help="where calls begin and end, as 1 0.9 0.5 0")
    add("--budget", type=float, help="seconds, with compiling: chunks but the first take the calls that fit")
    add("--frames", type=positive, help="of the video, if not the model's own (81)")
    add("--height", type=positive, help="in pixels, if not the model's own (480)")
    add("--width", type=positive, help="in pixels, if not the model's own (832)")
    add("--chunks", type=positive, nargs="+", help="latent frames of each, if not the model's own")
    add("--sampler", choices=SAMPLERS, help="if not the one that the model was trained for")
    add("--shift", type=float, help="if not the model's own")
    add("--guidance", type=float, default=1.0, help="for teachers, at least 0 (default 1)")
    add("--padding", action="store_true", help="keys of zero behind a chunk, as in diffusers")
    add("--seed", type=seed_value, default=0, help="0 to 2^32 - 1 (default 0)")
    add("--dtype", choices=["float32", "bfloat16"], help="of the network (default: bfloat16 on a GPU)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    add("--compile", action="store_true", help="compile the blocks: takes a minute, for a GPU")
    args = parser.parse_args(argv)
    args.ending = args.out.suffix.lower()
    for name in ("model", "parts", "prompts", "image", "video", "text", "context"):
        if getattr(args, name) == "":
            parser.error(f"--{name} is empty, expected a name")
    if not args.out.name or (os.path.isdir(args.out) and args.ending in FORMATS):
        parser.error(f"--out {args.out} is a folder, expected a file")
    if args.ending in (".avi", ".mov", ".mkv", ".webm", ".jpg", ".jpeg"):
        parser.error(f"--out {args.out} has the ending {args.ending}, expected one of {', '.join(FORMATS)}")
    if args.text and (args.prompts or args.per_prompt):
        parser.error("--text is embeddings, expected it without --prompts and --per-prompt")
    if bool(args.image) + bool(args.video) + bool(args.context) > 1:
        parser.error("found more than one of --image, --video and --context, expected one")
    if args.given and (args.image or args.context or args.text):
        parser.error("--given is of --video or a tiny clip, expected no --image, --context or --text")
    if not 0 <= args.guidance < math.inf:
        parser.error(f"--guidance is {args.guidance}, expected a number of at least 0")
    return args

def timed(chunks, calls):
    """Chunks as they are finished, each with a printed line. calls: a list of all network calls so far."""
    start = time.perf_counter()
    for i, chunk in enumerate(chunks, 1):
        tqdm.write(f"chunk {i}: {len(calls)} network calls, {time.perf_counter() - start:.3f} s")
        calls.clear()
        yield chunk
        start = time.perf_counter()

def run(args):
    """All of the command line's clips. Raises ValueError; OSError and RuntimeError where it cannot go on."""
    args.model, args.negative = find(args.model, args.revision), text_of(args.negative)
    args.parts = args.parts and find(args.parts, ignore="transformer/*")
    steps = anyflow.time_grid(args.times) if args.times else args.steps
    device, made = device_of(args.device), provenance(args.model)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model = Wan.from_pretrained(args.model)  # on the CPU, as stored, until the text encoder has gone
    tiny = str(made.get("preset")).startswith("tiny") and not args.parts
    parts = world.Pixels() if tiny else Published(args.parts or args.model, device)

    formats = [args.ending] if args.ending in FORMATS else [".safetensors" if args.text else ".mp4"]
    if tiny and args.ending not in FORMATS:
        formats = FORMATS if importlib.util.find_spec("imageio_ffmpeg") else FORMATS[1:]
    if ".mp4" in formats:
        check_writer()
    clips = clips_of(args, formats)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=args.out if args.out.is_dir() else args.out.parent):
        pass  # an unwritable place is found before the work, not after it
    if formats != [".safetensors"] or args.image or args.video:
        parts.open_vae(model.config.in_channels)
    shape = latent_shape(args, model.config, made, parts.stride)
    if model.config.kind == "causal" and not args.chunks:
        partition(shape[0], model.config.chunk_partition)
    context = context_of(args, model.config, shape, parts)
    stored = read_tensors(args.text, "text") if args.text else {}
    if clips and not stored:
        parts.read_prompts(list(dict.fromkeys([clip[0] for clip in clips] + [args.negative])), dtype)
    model = model.to(device, dtype)
    if args.compile:
        compile_blocks(model)
    shift = args.shift if args.shift is not None else made.get("shift") or parts.shift()
    options = dict(shift=shift, guidance=args.guidance, chunks=args.chunks, padding=args.padding,
                   sampler=args.sampler or sampler_of_folder(args.model))

    def make(prompt, seed, stem):
        text = stored["text"] if stored else parts.text(prompt)
        null = stored.get("null_text") if stored else parts.text(args.negative)
        given = context
        if given is None and args.given:
            given = world.true_frames(made.get("data"), prompt, args.given, seed)
        text, null, given = (x if x is None else x.to(device, dtype) for x in (text, null, given))
        null = null if null is None else null.expand(*text.shape[:1], -1, -1)
        # As the published pipelines draw it, on the CPU: a seed gives one noise there and on every device.
        size = *text.shape[:1], shape[1], shape[0], *shape[2:]
        noise = torch.randn(size, generator=torch.Generator().manual_seed(seed)).transpose(1, 2)
        torch.manual_seed(seed)
        inputs, calls = (model, text, noise.to(device, dtype), steps), []
        with tqdm(desc=stem.name, unit="call", disable=None) as bar:
            counter = model.register_forward_hook(lambda *_: calls.append(bar.update()))
            try:
                if args.budget is None:
                    latents = generate(*inputs, null_text=null, context=given, **options)
                else:
                    chunks = stream(*inputs, null_text=null, context=given, budget=args.budget, **options)
                    latents = torch.cat([*timed(chunks, calls)], 1)
            finally:
                counter.remove()
        latents = finite(latents, "latents").float().cpu()
        pixels = parts.pixels(latents) if formats != [".safetensors"] else None
        print("wrote " + save(stem, formats, latents, pixels, parts.fps))

    failed = []
    for clip in clips:
        try:
            make(*clip)
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:
            if len(clips) == 1:
                raise
            more = f" {TOO_LARGE}" if isinstance(error, torch.OutOfMemoryError) else ""
            failed.append(f"{clip[2].name}: {reason(error)}{more}")
            print(f"failed: {failed[-1]}", file=sys.stderr)
    if failed:
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise ValueError(f"{len(failed)} of {len(clips)} clips failed: {'; '.join(failed[:3])}{more}")

def main(argv=None):
    args = parse(argv)
    command("sample.py", lambda: run(args), "the same command makes what is missing", lambda: TOO_LARGE)

if __name__ == "__main__":
    main()
