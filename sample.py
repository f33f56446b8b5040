"""A prompt and given frames in, a video out: any number of steps, whole or chunk by chunk.

    python sample.py --prompt "a fast blue cross moving up" --steps 4  # the tiny world, seconds after cloning
    python sample.py --model FOLDER --text prompt.safetensors          # Wan's size: embeddings in, latents out

Everything here is `anyflow.sample` on a network that knows which frames are given: T2V gives none, I2V the
first latent frame, V2V the first few.
"""

import argparse
import functools
import math
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import anyflow
from model import Wan, provenance

TINY = Path(__file__).parent / "toy" / "weights" / "causal-anyflow"


def generate(model, text, noise, steps, *, shift=5.0, guidance=1.0, null_text=None, context=None, chunks=None,
             padding=True, sampler=None):  # fmt: skip
    """Latents (B, F, C, H, W) from noise of that shape in `steps` jumps, of a causal model for each chunk.

    text: (B, L, text_dim). guidance: for teachers; needs null_text, as text. context: given first frames
    (B, f, C, H, W), returned unchanged. chunks, padding: see `stream`. sampler: one of SAMPLERS; by default "euler"
    for a network of one time, else "flowmap". Raises ValueError.
    """
    if model.config.kind == "causal":
        given = dict(null_text=null_text, context=context, chunks=chunks, padding=padding, sampler=sampler)
        return torch.cat([*stream(model, text, noise, steps, shift=shift, guidance=guidance, **given)], 1)
    if chunks is not None:
        raise ValueError(f"chunks need a causal model, found kind {model.config.kind!r}")
    given = check_context(context, noise)
    if given:
        noise = torch.cat([context.to(noise.dtype), noise[:, given:]], 1)

    def held(z, t, r, text):
        """The model with the given frames held: at t = 0 (with the others' r, as published), and not moving."""
        if not given:
            return model(z, t, r, text)
        frame = torch.arange(z.shape[1], device=z.device)
        u = model(z, torch.where(frame < given, 0, t[:, None]), r[:, None].expand(z.shape[:2]), text)
        return torch.where((frame < given)[:, None, None, None], 0, u)

    with torch.no_grad():
        text, null = model.encode_text(text), None
        if guidance != 1 and null_text is not None:
            null = dict(text=model.encode_text(null_text))
    run = sampler_of(model, sampler, guidance)
    return run(held, noise, steps, shift=shift, guidance=guidance, null=null, text=text)


# How each kind of network is sampled: a teacher, a flow map, a model distilled by consistency.
SAMPLERS = {
    "euler": functools.partial(anyflow.sample, average=False),
    "flowmap": anyflow.sample,
    "consistency": lambda *args, guidance, null, **options: anyflow.consistency_sample(*args, **options),
}


def sampler_of_folder(folder):
    """The sampler for what `train.py` made; None for a published folder."""
    made = provenance(folder)
    if made.get("stage") == "onpolicy" and made.get("rollout") == "consistency":
        return "consistency"
    return {"teacher": "euler", "consistency": "consistency"}.get(made.get("stage"))


def sampler_of(model, name, guidance):
    name = name or ("euler" if model.config.kind == "teacher" else "flowmap")
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}, expected one of {', '.join(SAMPLERS)}")
    if name == "consistency" and guidance != 1:
        raise ValueError(f"guidance is {guidance}, expected 1: a model distilled by consistency has it built in")
    return SAMPLERS[name]


def stream(model, text, noise, steps, *, shift=5.0, guidance=1.0, null_text=None, context=None, chunks=None,
           padding=True, sampler=None):  # fmt: skip
    """The chunks (B, f, C, H, W) of a causal model one by one, given ones first: arguments as of `generate`.

    chunks: frames of each, as many as one likes; not given, the model's own partition as far as noise reaches.
    padding: see `Wan.new_cache`; True for published weights.
    """
    if model.config.kind != "causal":
        raise ValueError(f"streaming needs a causal model, found kind {model.config.kind!r}")
    chunks = partition(noise.shape[1], model.config.chunk_partition) if chunks is None else tuple(chunks)
    if sum(chunks) != noise.shape[1] or min(chunks) < 1:
        raise ValueError(f"chunks are {chunks}, expected numbers above 0 that sum to the {noise.shape[1]} frames")
    given = check_context(context, noise)
    ends = [sum(chunks[: i + 1]) for i in range(len(chunks))]
    if given and given not in ends:
        raise ValueError(f"context of {given} frames ends inside a chunk, expected one of {ends}")

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
            start = noise[:, end - size : end]
            null = nulls[0] if nulls else None
            chunk = run(model, start, steps, shift=shift, guidance=guidance, null=null, **cond)
        yield chunk
        if end < ends[-1]:
            for cache, prompt in branches:
                model.extend(cache, chunk, prompt)


def partition(frames, chunks):
    """The first of the chunks, that sum to this many frames."""
    for i in range(1, len(chunks) + 1):
        if sum(chunks[:i]) == frames:
            return tuple(chunks[:i])
    raise ValueError(f"{frames} frames are no sum of the model's first chunks {tuple(chunks)}; name other chunks")


def check_context(context, noise):
    """How many frames are given. They must fit the noise and leave something to generate."""
    if context is None:
        return 0
    shape = noise.shape
    if context.ndim != 5 or (context.shape[0], *context.shape[2:]) != (shape[0], *shape[2:]):
        wanted = f"({shape[0]}, f, {', '.join(map(str, shape[2:]))})"
        raise ValueError(f"context has shape {tuple(context.shape)}, expected {wanted}")
    if not 1 <= context.shape[1] < shape[1]:
        raise ValueError(f"context has {context.shape[1]} frames, expected 1 to {shape[1] - 1} of the {shape[1]}")
    return context.shape[1]


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def read_tensors(path, *names):
    """The tensors of a safetensors file; ValueError names the file and what of `names` it lacks."""
    if not Path(path).is_file():
        raise ValueError(f"no file {path}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    for name in names:
        if name not in tensors:
            raise ValueError(f"{path} has {', '.join(tensors) or 'nothing'}, expected a tensor {name!r}")
    return tensors


def make(args):
    """Latents (B, F, C, H, W) for the command line's options, and whether they are pixels of the tiny world."""
    model = Wan.from_pretrained(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    made = provenance(args.model)
    tiny = str(made.get("preset")).startswith("tiny")
    frames, _, height, width = made.get("shape", (21, 16, 60, 104))
    given = None
    if tiny and args.text is None:
        from toy.video import WORLDS, embed, parse_prompt

        labels = torch.tensor([parse_prompt(prompt) for prompt in args.prompt])
        text, null_text = embed(labels), embed(None).expand(len(labels), -1, -1)
        if args.given:
            if made["data"] not in WORLDS:
                raise ValueError(f"{args.model} was trained on {made['data']}, expected a world for --given")
            world = WORLDS[made["data"]]
            _, start = world.draw(range(len(labels)), args.seed)
            given = world.render(labels, start)[:, : args.given]
    elif args.text is None:
        raise ValueError(f"{args.model} reads prompts as embeddings; name a file of them with --text")
    else:
        prompt = read_tensors(args.text, "text")
        text, null_text = prompt["text"], prompt.get("null_text")
    if args.given and (given is None or args.context):
        raise ValueError("--given needs a model of the tiny world and a --prompt; else name a file with --context")
    if args.context:
        given = read_tensors(args.context, "latents")["latents"]
    text, null_text, given = (x if x is None else x.to(args.device) for x in (text, null_text, given))
    shape = len(text), args.frames or frames, model.config.in_channels, args.height or height, args.width or width
    torch.manual_seed(args.seed)
    noise = torch.randn(shape).to(args.device)  # drawn on the CPU: the same video on every device
    shift = made.get("shift", 5.0) if args.shift is None else args.shift
    if not 0 <= args.guidance < math.inf:
        raise ValueError(f"guidance is {args.guidance}, expected a number of at least 0")
    options = dict(shift=shift, guidance=args.guidance, null_text=null_text, context=given, chunks=args.chunks)
    options |= dict(padding=not made, sampler=args.sampler or sampler_of_folder(args.model))
    if model.config.kind != "causal":
        return generate(model, text, noise, args.steps, **options).float().cpu(), tiny
    parts, bar = [], tqdm(total=shape[1], unit="frame", disable=None)
    for chunk in stream(model, text, noise, args.steps, **options):
        parts.append(chunk.float().cpu())
        bar.update(chunk.shape[1])
    bar.close()
    return torch.cat(parts, 1), tiny


def write(path, latents, pixels):
    """Latents in a safetensors file; of a model in pixel space, also a GIF and a contact sheet, and an MP4 where
    imageio is installed. Each is written beside, then renamed."""
    from toy import plots

    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(".safetensors")]
    plots.write(files[0], lambda part: save_file({"latents": latents.contiguous()}, part))
    if pixels:
        frames = plots.enlarge(latents)
        files += [path.with_suffix(".gif"), path.with_suffix(".png")]
        plots.write(files[1], lambda part: plots.write_gif(frames, part))
        plots.contact_sheet(latents, files[2])
        try:
            import imageio.v3 as imageio

            files.append(path.with_suffix(".mp4"))
            plots.write(files[3], lambda part: imageio.imwrite(part, frames, fps=4))
        except (ImportError, OSError):  # no imageio, or none of its backends for MP4
            files = files[:3]
    print("wrote " + ", ".join(str(file) for file in files))


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return int(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", default=str(TINY), help="model folder (default: the tiny causal one in the repository)"
    )
    parser.add_argument(
        "--prompt", nargs="+", default=["a slow red disc moving left"], help="of the tiny world; several at once"
    )
    parser.add_argument("--given", type=positive, help="tiny world: that many true first frames (I2V: 1, V2V: 3)")
    parser.add_argument(
        "--text", help="safetensors: `text` (B, L, text_dim), perhaps `null_text`, in place of --prompt"
    )
    parser.add_argument("--context", help="safetensors with `latents` (B, f, C, H, W): the given first frames")
    parser.add_argument("--out", type=Path, default=Path("out/clip"), help="file; each format has its own ending")
    parser.add_argument("--steps", type=positive, default=4, help="network calls, of a causal model for each chunk")
    parser.add_argument(
        "--frames", type=positive, help="latent frames, if not the model's own: 21 are 81 in pixels"
    )
    parser.add_argument("--height", type=positive, help="of the latents, if not the model's own: 60 are 480 pixels")
    parser.add_argument("--width", type=positive, help="of the latents, if not the model's own: 104 are 832 pixels")
    parser.add_argument("--chunks", type=positive, nargs="+", help="frames of each, if not the model's own")
    parser.add_argument("--sampler", choices=SAMPLERS, help="if not the one that the model was trained for")
    parser.add_argument("--shift", type=float, help="if not the model's own: 5 for published ones")
    parser.add_argument("--guidance", type=float, default=1.0, help="for teachers; students have it built in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not args.out.name or args.out.is_dir():
        parser.error(f"--out {args.out} is a folder, expected a file")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(
            dir=args.out.parent
        ):  # an unwritable place is found before the work, not after it
            pass
        write(args.out, *make(args))
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")


if __name__ == "__main__":
    main()
