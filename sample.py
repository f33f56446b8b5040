"""A prompt, an image or the start of a video in, a video out: any number of steps, whole or chunk by chunk.

    python sample.py --prompt "a fast blue cross moving up" --steps 4                    # the tiny world
    python sample.py --model FOLDER --prompt "a cat on a skateboard" --out cat.mp4       # Wan 2.1, AnyFlow
    python sample.py --model FOLDER --prompt "it rolls away" --image cat.jpg --out cat.mp4
    python sample.py --model FOLDER --prompts vbench.txt --videos 5 --out videos         # <prompt>-<i>.mp4

Everything here is `anyflow.sample` on a network that knows which frames are given: T2V gives none, I2V the
first latent frame, V2V the first few. A published folder brings its VAE and text encoder, which diffusers and
transformers run; without them, embeddings go in (--text) and latents come out.
"""

import argparse
import functools
import hashlib
import html
import importlib
import importlib.util
import math
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import anyflow
from model import Wan, compile_blocks, provenance, read_json, write

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
    raise ValueError(
        f"{frames} latent frames are no sum of the model's first chunks {tuple(chunks)}; name --chunks"
    )


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
# Pixels and prompts at full scale: the VAE and the text encoder of a published folder
# ------------------------------------------------------------------------------------------------------------


FPS = 16  # of Wan
INSTALL = "pip install diffusers==0.42.1 transformers accelerate ftfy imageio imageio-ffmpeg"


def optional(module, purpose):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{purpose} needs {module} ({error}): {INSTALL}") from None


def part_of(folder, name):
    """The subfolder of a published folder; ValueError where it is missing."""
    if not (Path(folder) / name).is_dir():
        raise ValueError(
            f"{folder} has no {name}, which a published folder has (sample.py looks for it in --parts)"
        )
    return Path(folder) / name


def loaded(kind, folder, **options):
    """kind.from_pretrained(folder), or ValueError: whatever is wrong, and where weights are missing."""
    try:
        made = kind.from_pretrained(folder, **options)
    except Exception as error:  # diffusers and transformers raise many
        raise ValueError(f"{folder} cannot be loaded: {first_line(error)}") from None
    made, report = made if isinstance(made, tuple) else (made, {})
    if report.get("missing_keys"):
        raise ValueError(f"{folder} lacks {', '.join(sorted(report['missing_keys'])[:3])}")
    return made


def clean_prompt(prompt):
    """As the published pipelines do: mend encodings (where ftfy is installed), unescape HTML, single spaces."""
    if importlib.util.find_spec("ftfy"):
        prompt = importlib.import_module("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def finite(x, name):
    """x, or ValueError where it holds NaN or infinity: weights are damaged, or too large for their precision."""
    if not x.isfinite().all():
        raise ValueError(f"{(~x.isfinite()).sum()} of {x.numel()} {name} are not finite")
    return x


class TextEncoder:
    """Prompts -> embeddings (n, 512, text_dim), zero behind a prompt's end: the folder's tokenizer and UMT5.

    At XXL size it takes 11 GB in bfloat16: let it go before the network comes.
    """

    def __init__(self, folder, device="cpu", dtype=torch.float32):
        folders = part_of(folder, "tokenizer"), part_of(folder, "text_encoder")
        transformers = optional("transformers", "a prompt")
        transformers.utils.logging.disable_progress_bar()
        self.tokenizer = loaded(transformers.AutoTokenizer, folders[0])
        model = loaded(transformers.UMT5EncoderModel, folders[1], dtype=dtype, output_loading_info=True)
        self.model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, prompts, length=512):
        texts = []
        for prompt in prompts:  # one by one, so that a prompt's embedding does not depend on its company
            prompt = clean_prompt(prompt)
            tokens = self.tokenizer(
                prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).to(self.model.device)
            states = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state
            texts.append(finite(states.masked_fill(tokens.attention_mask[..., None] == 0, 0), "embeddings").cpu())
        return torch.cat(texts)


class VAE:
    """Wan's: pixels (B, F, 3, H, W) in [0, 1] <-> latents (B, f, C, h, w), normalised per channel. The first latent
    frame stands for one frame, every other for `stride[0]`; a latent covers stride[1] x stride[1] pixels."""

    def __init__(self, folder, device="cpu"):
        folder = part_of(folder, "vae")
        diffusers = optional("diffusers", "a video in pixels")
        options = dict(torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True)
        model = loaded(diffusers.AutoencoderKLWan, folder, **options)
        self.model = model.to(device).eval()
        config = self.model.config
        wide = lambda values: torch.tensor(values, device=device).view(-1, 1, 1, 1)
        self.mean, self.std = wide(config.latents_mean), wide(config.latents_std)
        self.device, self.stride = device, (config.scale_factor_temporal, config.scale_factor_spatial)

    @torch.no_grad()
    def encode(self, video):
        moments = self.model.encode(2 * video.transpose(1, 2).to(self.device) - 1).latent_dist
        return finite((moments.mode() - self.mean) / self.std, "latents").transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents):
        latents = latents.float().to(self.device).transpose(1, 2) * self.std + self.mean
        return finite(self.model.decode(latents).sample / 2 + 0.5, "pixels").clamp(0, 1).transpose(1, 2)


def fit(frame, height, width):
    """An image (h, w, 3) of 0 to 255 -> (3, height, width) in [0, 1], its middle where the aspect differs; and what
    was used of it, or None for all."""
    h, w = frame.shape[:2]
    scale = min(h / height, w / width)
    cut = min(h, round(height * scale)), min(w, round(width * scale))
    top, left = (h - cut[0]) // 2, (w - cut[1]) // 2
    x = torch.from_numpy(frame[top : top + cut[0], left : left + cut[1]].copy()).permute(2, 0, 1)[None] / 255
    if cut != (height, width):
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return x[0], None if cut == (h, w) else f"{cut[1]} x {cut[0]} of {w} x {h}"


def read_image(path, height, width):
    """(1, 3, height, width) in [0, 1], and what was used of it, as `fit`. ValueError for what is no image."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"{path} has numbers of mode {image.mode}, expected 8 bits for each colour")
            frame, cut = fit(np.array(ImageOps.exif_transpose(image).convert("RGB")), height, width)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read: {str(error).splitlines()[0]}") from None
    return frame[None], cut


def read_video(path, frames, height, width, fps=FPS):
    """The first frames at `fps`, (frames, 3, height, width) in [0, 1], and what was used of them, as `fit`.

    ValueError for what is no video, or too short."""
    if not Path(path).is_file():
        raise ValueError(f"no file {path}")
    imageio = optional("imageio.v3", "a video file")
    optional("imageio_ffmpeg", "a video file")
    read, cut = [], None
    try:
        own = imageio.immeta(path, plugin="FFMPEG", extension=".mp4")["fps"]
        wanted = [int(i * own / fps + 0.5) for i in range(frames)]  # some twice, where the file's rate is lower
        for i, frame in enumerate(imageio.imiter(path, plugin="FFMPEG", extension=".mp4")):
            if i in wanted[len(read) :]:
                picture, cut = fit(frame, height, width)
                read += [picture] * wanted.count(i)
            if len(read) == frames:
                break
    except (OSError, RuntimeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is no video that ffmpeg can read: {first_line(error)}") from None
    if len(read) < frames:
        raise ValueError(f"{path} has {len(read)} frames at {fps} frames a second, expected {frames}")
    return torch.stack(read), cut


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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


class Folder:
    """A model folder: the network, and what leads from prompts and pixels to its inputs and back.

    A published folder has a text encoder and a VAE beside the network; one of `train.py` has the network alone. In
    the tiny world a prompt is a row of labels, and a latent is a pixel.
    """

    def __init__(self, path, parts, device):
        self.path, self.parts, self.device, self.made = path, parts or path, device, provenance(path)
        self.tiny = str(self.made.get("preset")).startswith("tiny")
        self.model = Wan.from_pretrained(path)  # on the CPU, as stored, until the text encoder has gone
        scheduler = Path(self.parts) / "scheduler" / "scheduler_config.json"
        config = read_json(scheduler) if scheduler.exists() else {}
        self.shift = self.made.get("shift", config.get("shift", config.get("flow_shift", 5.0)))
        frames = sum(self.model.config.chunk_partition)  # 21
        self.shape = tuple(self.made.get("shape", (frames, 16, 60, 104)))  # of latents
        self.stride, self.fps = ((1, 1), 4) if self.tiny else ((4, 8), FPS)
        self.vae, self.known = None, {}

    def open_vae(self):
        if not self.tiny:
            self.vae = VAE(self.parts, self.device)
            self.stride, made, wanted = self.vae.stride, len(self.vae.mean), self.model.config.in_channels
            if made != wanted:
                raise ValueError(f"{self.parts}/vae makes {made} channels, expected {wanted} for the network")

    def latent_size(self, frames, height, width):
        """(F, h, w) for numbers of frames and pixels; None stands for what the model was trained for."""
        f, _, h, w = self.shape
        if frames is not None:
            f, rest = divmod(frames - 1, self.stride[0])
            f += 1
            if rest:
                raise ValueError(f"frames are {frames}, expected 1 more than a multiple of {self.stride[0]}")
        config = self.model.config
        patch = config.compressed_patch_size if config.kind == "causal" else config.patch_size
        for name, size, cells in (("height", height, patch[1]), ("width", width, patch[2])):
            if size is not None and size % (self.stride[1] * cells):
                raise ValueError(f"{name} is {size}, expected a multiple of {self.stride[1] * cells}")
        return f, height // self.stride[1] if height else h, width // self.stride[1] if width else w

    def encode(self, prompts, dtype):
        if not self.tiny:
            encode = TextEncoder(self.parts, self.device, dtype)
            self.known = dict(zip(prompts, encode(prompts).split(1)))

    def text(self, prompt):
        """(1, L, text_dim). ValueError for what the tiny world cannot make."""
        if not self.tiny:
            return self.known[prompt]
        from toy.video import embed, parse_prompt

        return embed(torch.tensor([parse_prompt(prompt)]) if prompt else None)

    def true_frames(self, prompt, frames, seed):
        """How a clip of the tiny world begins: (1, frames, C, H, W)."""
        from toy.video import WORLDS, parse_prompt

        if self.made.get("data") not in WORLDS:
            raise ValueError("--given needs --video, or a model of the tiny world and a --prompt")
        world = WORLDS[self.made["data"]]
        return world.render(torch.tensor([parse_prompt(prompt)]), world.draw(range(1), seed)[1])[:, :frames]

    def pixels(self, latents):
        """uint8 (F, H, W, 3), the clips of a batch side by side."""
        if self.tiny:
            from toy import plots

            return plots.enlarge(latents)
        video = torch.cat(list(self.vae.decode(latents)), -1).cpu()
        return (255 * video).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


FORMATS = (".mp4", ".gif", ".png", ".safetensors")


def check_writer():
    """ValueError where no MP4 can be written."""
    optional("imageio.v3", "an MP4 file")
    try:
        optional("imageio_ffmpeg", "an MP4 file").get_ffmpeg_exe()
    except RuntimeError as error:
        raise ValueError(f"an MP4 file needs ffmpeg: {first_line(error)}; --out FILE.gif does without") from None


def formats_of(args, folder):
    """The endings to write: of --out; else all in the tiny world, an MP4 for prompts, latents for embeddings."""
    if args.out.suffix.lower() in FORMATS:
        formats = [args.out.suffix.lower()]
    elif folder.tiny:
        formats = [ending for ending in FORMATS if ending != ".mp4" or importlib.util.find_spec("imageio_ffmpeg")]
    else:
        formats = [".safetensors" if args.text else ".mp4"]
    if ".mp4" in formats:
        check_writer()
    return formats


def save(stem, formats, latents, pixels, fps):
    """Files stem + ending, written beside, then renamed: latents (B, F, C, H, W), pixels uint8 (F, H, W, 3)."""
    from toy import plots

    def mp4(part):
        import imageio.v3 as imageio
        import imageio_ffmpeg

        imageio.imwrite(part, pixels, plugin="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=2)
        try:  # imageio does not ask whether ffmpeg could
            whole = imageio_ffmpeg.count_frames_and_secs(str(part))[0] == len(pixels)
        except RuntimeError:
            whole = False
        if not whole:
            raise OSError(f"ffmpeg could not write {stem}.mp4: is there space left?")

    savers = {
        ".safetensors": lambda part: save_file({"latents": latents.contiguous()}, part),
        ".gif": lambda part: plots.write_gif(pixels, part, fps),
        ".png": lambda part: plots.contact_sheet(pixels, part),
        ".mp4": mp4,
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    for ending in formats:
        write(f"{stem}{ending}", savers[ending])
    return ", ".join(f"{stem}{ending}" for ending in formats)


def jobs_of(args, formats):
    """[(prompt, seed, stem)] of what to make: one clip at --out, or several in that folder, named as by VBench."""
    one = args.out.suffix.lower() in FORMATS
    stem = args.out.with_suffix("") if one else args.out
    if args.text:
        return [(None, args.seed, stem)]
    prompts = args.prompt
    if args.prompts:
        try:
            lines = Path(args.prompts).read_text("utf-8-sig").splitlines()
            prompts = [line.strip() for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts {args.prompts} cannot be read: {error}") from None
        if not prompts:
            raise ValueError(f"--prompts {args.prompts} has no prompt, expected one in each line")
    if not all(map(str.strip, prompts)):
        raise ValueError("--prompt is empty, expected some words")
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--prompt is no UTF-8: {error}") from None
    if len(prompts) == 1 and not args.prompts and args.videos is None:
        return [(prompts[0], args.seed, stem)]
    if one or args.out.is_file():
        raise ValueError(f"--out {args.out} is a file, expected a folder for several clips")
    jobs = []
    for prompt in dict.fromkeys(prompts):
        name = prompt.replace("/", "_").encode()[:200].decode(errors="ignore")  # a file's name has 255 bytes
        if name != prompt:  # and another prompt may look like it
            name += "-" + hashlib.sha1(prompt.encode()).hexdigest()[:8]
        jobs += [(prompt, args.seed + i, args.out / f"{name}-{i}") for i in range(args.videos or 1)]
    kept = [job for job in jobs if not all(Path(f"{job[2]}{ending}").exists() for ending in formats)]
    if len(kept) < len(jobs):
        print(f"{len(jobs) - len(kept)} of {len(jobs)} are there already, made with whatever settings")
    return kept


def given_frames(args, folder, size):
    """Latents (1, f, C, h, w) that the command line gives for every clip, or None."""
    if args.context:
        return read_tensors(args.context, "latents")["latents"]
    if not args.image and not args.video:
        return None
    if folder.tiny:
        raise ValueError("--image and --video need a published folder, found a model of the tiny world")
    height, width = (side * folder.stride[1] for side in size[1:])
    if args.image:
        video, cut = read_image(args.image, height, width)
    else:
        chunks = (1,) * size[0]
        if folder.model.config.kind == "causal":
            chunks = args.chunks or folder.model.config.chunk_partition
        ends = [sum(chunks[:i]) for i in range(1, len(chunks))]
        ends = [folder.stride[0] * (end - 1) + 1 for end in ends if end < size[0]] or [1]
        frames = args.given or max(end for end in ends if end <= 25 or end == ends[0])
        if frames not in ends:
            some = f"{', '.join(map(str, ends[:3]))}{', ...' * (len(ends) > 3)}"
            raise ValueError(f"{frames} frames of --video are given, expected --given {some} where a chunk ends")
        video, cut = read_video(args.video, frames, height, width)
    if cut:
        print(f"{args.image or args.video}: of another aspect than {width} x {height}, used the middle, {cut}")
    return folder.vae.encode(video[None])


def run(args):
    """All of the command line's clips. Raises ValueError; OSError and RuntimeError where it cannot go on."""
    folder, dtype = Folder(args.model, args.parts, args.device), getattr(torch, args.dtype)
    formats = formats_of(args, folder)
    jobs = jobs_of(args, formats)
    if not jobs:
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=args.out if args.out.is_dir() else args.out.parent):
        pass  # an unwritable place is found before the work, not after it
    if formats != [".safetensors"] or args.image or args.video:
        folder.open_vae()
    size = folder.latent_size(args.frames, args.height, args.width)
    if folder.model.config.kind == "causal" and not args.chunks:
        partition(size[0], folder.model.config.chunk_partition)
    context = given_frames(args, folder, size)
    stored = read_tensors(args.text, "text") if args.text else {}
    if not stored:
        folder.encode(list(dict.fromkeys([job[0] for job in jobs] + [args.negative])), dtype)
    model = folder.model.to(args.device, dtype)
    if args.compile:
        compile_blocks(model)
    if not 0 <= args.guidance < math.inf:
        raise ValueError(f"guidance is {args.guidance}, expected a number of at least 0")
    options = dict(shift=folder.shift if args.shift is None else args.shift, guidance=args.guidance)
    options |= dict(
        chunks=args.chunks, padding=not folder.made, sampler=args.sampler or sampler_of_folder(args.model)
    )

    def make(prompt, seed, stem):
        text = stored["text"] if stored else folder.text(prompt)
        null = stored.get("null_text") if stored else folder.text(args.negative).expand_as(text)
        given = context
        if given is None and args.given:
            given = folder.true_frames(prompt, args.given, seed)
        text, null, given = (x if x is None else x.to(args.device, dtype) for x in (text, null, given))
        # As the published pipelines draw it, on the CPU: a seed gives the same video there and on every device.
        shape = len(text), model.config.in_channels, *size
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).transpose(1, 2)
        torch.manual_seed(seed)
        with tqdm(desc=stem.name, unit="call", disable=None) as bar:
            counter = model.register_forward_hook(lambda *_: bar.update())
            try:
                latents = generate(
                    model, text, noise.to(args.device, dtype), args.steps, null_text=null, context=given, **options
                )
            finally:
                counter.remove()
        finite(latents, "latents")
        pixels = folder.pixels(latents.float().cpu()) if formats != [".safetensors"] else None
        print("wrote " + save(stem, formats, latents.float().cpu(), pixels, folder.fps))

    failed = []
    for job in jobs:
        try:
            make(*job)
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                error = ValueError(too_large(model.config, size, args.chunks, args.device))
            if len(jobs) == 1:
                raise error from None
            failed.append(f"{job[2].name}: {first_line(error)}")
            print(f"failed: {failed[-1]}", file=sys.stderr)
    if failed:
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise ValueError(f"{len(failed)} of {len(jobs)} clips failed: {'; '.join(failed[:3])}{more}")


def too_large(config, size, chunks, device):
    """What the plan of `train.py` says to a clip of F, h, w latents that found too little GPU memory."""
    from train import cost_of_sampling, parameters

    card, (frames, *area) = torch.cuda.get_device_properties(device), size
    _, peak = cost_of_sampling(config, (frames, config.in_channels, *area), chunks=chunks)
    needs = (2 * parameters(config) + peak) / 2**30
    has = f"out of memory on {card.name}, {card.total_memory / 2**30:.0f} GiB"
    needs = f"the plan says {needs:.1f} GiB for the network in bfloat16, and the VAE comes on top"
    return f"{has}: {needs}; fewer --frames, a smaller --height and --width need less"


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return int(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", default=str(TINY), help="model folder (default: the tiny causal one in the repository)")
    add("--parts", help="published folder whose VAE and text encoder are used, if --model has none of its own")
    add("--prompt", nargs="+", default=["a slow red disc moving left"], help="one, or several in quotes")
    add("--prompts", help="file of prompts, one in each line; clips are named <prompt>-<i>, as VBench does")
    add("--videos", type=positive, help="clips of each prompt, with seeds SEED, SEED + 1, ...")
    add("--negative", default="", help="prompt to be guided away from (default: the empty one)")
    add("--image", help="first frame")
    add("--video", help="file whose first frames are given")
    add(
        "--given",
        type=positive,
        help="how many frames of --video (default 25, or the end of a chunk below), or of the tiny world's truth",
    )
    add("--text", help="safetensors: `text` (B, L, text_dim), perhaps `null_text`, in place of --prompt")
    add("--context", help="safetensors: `latents` (B, f, C, h, w), given first frames")
    add("--out", type=Path, default=Path("out/clip"), help="file .mp4, .gif, .png (some frames) or .safetensors"
        " (latents), by default all that apply; of several clips the folder")  # fmt: skip
    add("--steps", type=positive, default=4, help="network calls, of a causal model for each chunk")
    add("--frames", type=positive, help="of the video, if not the model's own (81)")
    add("--height", type=positive, help="in pixels, if not the model's own (480)")
    add("--width", type=positive, help="in pixels, if not the model's own (832)")
    add("--chunks", type=positive, nargs="+", help="latent frames of each, if not the model's own")
    add("--sampler", choices=SAMPLERS, help="if not the one that the model was trained for")
    add("--shift", type=float, help="if not the model's own (5)")
    add("--guidance", type=float, default=1.0, help="for teachers; students have it built in")
    add("--seed", type=int, default=0)
    add("--dtype", choices=["float32", "bfloat16"], help="of the network (default: bfloat16 on a GPU)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="compile the blocks: a minute once, then faster")
    args = parser.parse_args(argv)
    if not args.out.name or (args.out.is_dir() and args.out.suffix.lower() in FORMATS):
        parser.error(f"--out {args.out} is a folder, expected a file")
    if args.out.suffix.lower() in (".avi", ".mov", ".mkv", ".webm", ".jpg", ".jpeg"):
        parser.error(f"--out {args.out} has the ending {args.out.suffix}, expected one of {', '.join(FORMATS)}")
    if args.prompts and args.text or (args.text and args.videos):
        parser.error("--text is embeddings in place of prompts, expected it without --prompts and --videos")
    if bool(args.image) + bool(args.video) + bool(args.context) > 1:
        parser.error("found more than one of --image, --video and --context, expected one")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed is {args.seed}, expected 0 to 2^32 - 1")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    try:
        run(args)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        sys.exit(f"sample.py: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped; the same command makes what is missing")


if __name__ == "__main__":
    main()
