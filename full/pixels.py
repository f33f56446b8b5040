"""Prompts and pixels: the VAE and text encoder of a published folder, and image, video and prompt files.

diffusers, transformers and imageio do the work, imported where they are used, named where they are missing.
"""

import hashlib
import html
import importlib
import importlib.util
import itertools
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import save_file

from full.files import read_json, read_tensors, read_text, text_of, write
from full.options import check, option, reason

FPS = 16  # of Wan
FORMATS = (".mp4", ".gif", ".png", ".safetensors")
INSTALL = "pip install diffusers==0.42.1 transformers accelerate ftfy imageio imageio-ffmpeg"

def optional(module, purpose):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{purpose} needs {module} ({error}): {INSTALL}") from None


# ---- A published folder's VAE and text encoder -----------------------------------------------------------

def part_of(folder, name):
    """The subfolder of a published folder; ValueError where it is missing."""
    if not Path(folder).is_dir():
        raise ValueError(f"no folder {folder}")
    if not (Path(folder) / name).is_dir():
        raise ValueError(f"{folder} has no {name}, which a published folder has (sample.py looks in --parts)")
    odd = [path for path in (Path(folder) / name).iterdir() if not (path.is_file() or path.is_dir())]
    if odd:
        raise ValueError(f"{odd[0]} is neither a file nor a folder")
    return Path(folder) / name

def loaded(kind, folder, **options):
    """kind.from_pretrained(folder), or ValueError: whatever is wrong, and where weights are missing."""
    before = logging.root.manager.disable
    logging.disable()  # what they log of a bad folder is up to 27 lines, the error says it in one
    try:
        made = kind.from_pretrained(folder, **options)
    except Exception as error:  # diffusers and transformers raise many
        raise ValueError(f"{folder} cannot be loaded: {reason(error)}") from None
    finally:
        logging.disable(before)
    made, report = made if isinstance(made, tuple) else (made, {})
    if report.get("missing_keys"):
        raise ValueError(f"{folder} lacks {', '.join(sorted(report['missing_keys'])[:3])}")
    return made

def finite(x, name):
    """x, or ValueError where it holds NaN or infinity, as damaged weights make them."""
    if not x.isfinite().all():
        raise ValueError(f"{(~x.isfinite()).sum()} of {x.numel()} {name} are not finite")
    return x

@dataclass(frozen=True)
class Scheduler:
    """Of scheduler_config.json: its two names for the shift of sampling times."""

    shift: float = option(None, above=0)
    flow_shift: float = option(None, above=0)

class Published:
    """A published folder: prompts to embeddings, pixels to latents, latents to pixels."""

    fps, stride = FPS, (4, 8)  # pixels that a latent stands for, in time and along an edge

    def __init__(self, folder, device):
        self.folder, self.device, self.embeddings, self.vae = folder, device, {}, None

    def shift(self):
        """Of the sampling times."""
        path = Path(self.folder) / "scheduler" / "scheduler_config.json"
        known = check(Scheduler, read_json(path), path) if path.parent.is_dir() else {}
        return known.get("shift") or known.get("flow_shift") or 5.0

    def read_prompts(self, prompts, dtype):
        """Embed all prompts, then let the text encoder go (11 GB): `text` knows them."""
        encode = TextEncoder(self.folder, self.device, dtype)
        self.embeddings = dict(zip(prompts, encode(prompts).split(1)))

    def text(self, prompt):
        """(1, 512, text_dim)."""
        return self.embeddings[prompt]

    def open_vae(self, channels):
        self.vae = VAE(self.folder, self.device)
        self.stride = self.vae.stride
        if len(self.vae.mean) != channels:
            found = f"{self.folder}/vae makes {len(self.vae.mean)} channels"
            raise ValueError(f"{found}, expected {channels} for the network")

    def latents(self, video):
        return self.vae.encode(video[None])

    def pixels(self, latents):
        """uint8 (F, H, W, 3), the clips of a batch side by side."""
        video = torch.cat(list(self.vae.decode(latents)), -1).cpu()
        return (255 * video).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

def clean_prompt(prompt):
    """As the published pipelines do: mend encodings (if ftfy is installed), unescape HTML, single spaces."""
    if importlib.util.find_spec("ftfy"):
        prompt = importlib.import_module("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()

class TextEncoder:
    """Prompts -> embeddings (n, 512, text_dim), zero behind a prompt's end, of the folder's UMT5."""

    def __init__(self, folder, device="cpu", dtype=torch.float32):
        folders = part_of(folder, "tokenizer"), part_of(folder, "text_encoder")
        transformers = optional("transformers", "a prompt")
        transformers.utils.logging.disable_progress_bar()
        self.tokenizer = loaded(transformers.AutoTokenizer, folders[0], trust_remote_code=False)
        options = dict(dtype=dtype, output_loading_info=True, use_safetensors=True)  # no pickle: it runs code
        self.model = loaded(transformers.UMT5EncoderModel, folders[1], **options).to(device).eval()

    @torch.no_grad()
    def __call__(self, prompts, length=512):
        texts, layout = [], dict(padding="max_length", truncation=True, return_tensors="pt")
        for prompt in prompts:  # one by one, so that a prompt's embedding does not depend on its company
            tokens = self.tokenizer(clean_prompt(prompt), max_length=length, **layout).to(self.model.device)
            states = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state
            states = states.masked_fill(tokens.attention_mask[..., None] == 0, 0)
            texts.append(finite(states, "embeddings").cpu())
        return torch.cat(texts)

class VAE:
    """Wan's: pixels (B, F, 3, H, W) in [0, 1] <-> latents (B, f, C, h, w), normalised per channel. The first
    latent frame stands for one frame, every other for `stride[0]`; a latent covers stride[1]^2 pixels."""

    def __init__(self, folder, device="cpu"):
        folder = part_of(folder, "vae")
        diffusers = optional("diffusers", "a video in pixels")
        options = dict(low_cpu_mem_usage=False, output_loading_info=True, use_safetensors=True)
        model = loaded(diffusers.AutoencoderKLWan, folder, torch_dtype=torch.float32, **options)
        self.model, self.device, config = model.to(device).eval(), device, model.config
        wide = lambda values: torch.tensor(values, device=device).view(-1, 1, 1, 1)
        try:
            self.mean, self.std = wide(config.latents_mean), wide(config.latents_std)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder}: latents_mean or latents_std has no numbers: {error}") from None
        if self.std.shape != self.mean.shape or not (self.std > 0).all():
            found = f"{folder}: latents_std is {config.latents_std}"
            raise ValueError(f"{found}, expected {len(self.mean)} numbers above 0")
        self.stride = config.scale_factor_temporal, config.scale_factor_spatial

    @torch.no_grad()
    def encode(self, video):
        moments = self.model.encode(2 * video.transpose(1, 2).to(self.device) - 1).latent_dist
        return finite((moments.mode() - self.mean) / self.std, "latents").transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents):
        latents = latents.float().to(self.device).transpose(1, 2) * self.std + self.mean
        return finite(self.model.decode(latents).sample / 2 + 0.5, "pixels").clamp(0, 1).transpose(1, 2)


# ---- Files -----------------------------------------------------------------------------------------------

def crop_and_resize(frame, height, width):
    """An image (h, w, 3) of 0 to 255 -> (3, height, width) in [0, 1], its middle where the aspect differs;
    and what was used of it, or None for all."""
    h, w = frame.shape[:2]
    scale = min(h / height, w / width)
    used = min(h, round(height * scale)), min(w, round(width * scale))
    top, left = (h - used[0]) // 2, (w - used[1]) // 2
    x = torch.from_numpy(frame[top : top + used[0], left : left + used[1]].copy())
    x = x.permute(2, 0, 1)[None] / 255
    if used != (height, width):
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return x[0], None if used == (h, w) else f"{used[1]} x {used[0]} of {w} x {h}"

def read_image(path, height, width):
    """(1, 3, height, width) in [0, 1], on white, and what was used of it. ValueError for what is no image."""
    if not Path(path).is_file():
        raise ValueError(f"no file {path}")
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"{path} has numbers of mode {image.mode}, expected 8 bits for each colour")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:  # under it any colour may lie
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            rgb = np.array(image.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read: {reason(error)}") from None
    frame, used = crop_and_resize(rgb, height, width)
    return frame[None], used

def read_video(path, frames, height, width, fps=FPS):
    """The first frames at `fps`, (frames, 3, height, width) in [0, 1], and what was used of each.
    ValueError for what is no video, or too short."""
    if not Path(path).is_file():
        raise ValueError(f"no file {path}")
    imageio = optional("imageio.v3", "a video file")
    optional("imageio_ffmpeg", "a video file")
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # the filter below turns and widens frames
    read, used = [], None
    try:
        # By the frames' own times, which need not be even, and of pixels that need not be square.
        filters = ["-vf", f"fps={fps}:round=near,scale=iw*sar:ih"]
        options = dict(plugin="FFMPEG", extension=".mp4", output_params=filters)
        for frame in itertools.islice(imageio.imiter(path, **options), frames):
            picture, used = crop_and_resize(frame, height, width)
            read.append(picture)
    except (OSError, RuntimeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is no video that ffmpeg can read: {reason(error)}") from None
    if len(read) < frames:
        raise ValueError(f"{path} has {len(read)} frames at {fps} frames a second, expected {frames}")
    return torch.stack(read), used

def check_writer():
    """ValueError where no MP4 can be written."""
    optional("imageio.v3", "an MP4 file")
    try:
        optional("imageio_ffmpeg", "an MP4 file").get_ffmpeg_exe()
    except RuntimeError as error:
        raise ValueError(f"an MP4 file needs ffmpeg: {reason(error)}; --out FILE.gif does without") from None

def write_mp4(pixels, path, fps):
    imageio, ffmpeg = (optional(module, "an MP4 file") for module in ("imageio.v3", "imageio_ffmpeg"))
    imageio.imwrite(path, pixels, plugin="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=2)
    try:  # imageio does not ask whether ffmpeg could
        whole = ffmpeg.count_frames_and_secs(str(path))[0] == len(pixels)
    except RuntimeError:
        whole = False
    if not whole:
        raise OSError(f"ffmpeg could not write {path}: is there space left?")

def write_gif(frames, path, fps=4):
    """uint8 (F, H, W, 3) as an endless GIF."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=others, duration=1000 // fps, loop=0)

def write_contact_sheet(frames, path, most=9):
    """PNG: up to `most` of the frames uint8 (F, H, W, 3), evenly spread, in a row."""
    from matplotlib import pyplot

    picked = np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int))
    width = 1.1 * frames.shape[2] / frames.shape[1]
    figure, axes = pyplot.subplots(1, len(picked), figsize=(width * len(picked), 1.25), squeeze=False)
    for axis, f in zip(axes[0], picked):
        axis.imshow(frames[f], interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_title(f"frame {f + 1}", fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(path)
    pyplot.close(figure)

def save(stem, formats, latents, pixels, fps):
    """Files stem + ending: latents (B, F, C, H, W), pixels uint8 (F, H, W, 3)."""
    savers = {
        ".safetensors": lambda part: save_file({"latents": latents.contiguous()}, part),
        ".gif": lambda part: write_gif(pixels, part, fps),
        ".png": lambda part: write_contact_sheet(pixels, part),
        ".mp4": lambda part: write_mp4(pixels, part, fps),
    }
    for ending in formats:
        write(f"{stem}{ending}", savers[ending])
    return ", ".join(f"{stem}{ending}" for ending in formats)

@dataclass(frozen=True)
class Prompt:
    """Of VBench's list: what names a clip, and what it is made from."""

    prompt_en: str = option()
    aug_prompt_en: str = option()

def read_prompts(path):
    """[(prompt that names a clip, the one that it is made from)] of a file: lines of text, in which both are
    one, or objects of JSON, in lines or in one list, with both keys of `Prompt`. ValueError."""
    text = text_of(f"@{path}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--prompts {path} has no prompt, expected one in each line")
    if not re.match(r"\[\s*[{\"]|\{", text):
        return [(line, line) for line in lines]
    parse = lambda _: json.loads(text) if text[0] == "[" else [json.loads(line) for line in lines]
    rows = read_text(Path(path), parse, "is no JSON")
    rows = [check(Prompt, row, f"--prompts {path}, prompt {i}") for i, row in enumerate(rows, 1)]
    return [(row["prompt_en"], row["aug_prompt_en"]) for row in rows]

def clips_of(args, formats):
    """[(prompt, seed, stem)] to make: one clip at --out, or several in that folder, named as by VBench."""
    one = args.ending in FORMATS
    stem = args.out.with_suffix("") if one else args.out
    if args.text:
        return [(None, args.seed, stem)]
    prompts = read_prompts(args.prompts) if args.prompts else [(prompt, prompt) for prompt in args.prompt]
    if not all(prompt.strip() for prompt, _ in prompts):
        raise ValueError("--prompt is empty, expected some words")
    if any("\ud800" <= letter <= "\udfff" for prompt, _ in prompts for letter in prompt):
        raise ValueError("--prompt is no UTF-8")
    if len(prompts) == 1 and not args.prompts and args.per_prompt is None:
        return [(prompts[0][1], args.seed, stem)]
    if one or args.out.is_file():
        raise ValueError(f"--out {args.out} is a file, expected a folder for several clips")
    clips, each = {}, args.per_prompt or 1
    for number, (prompt, text) in enumerate(prompts):  # of a name that comes twice, the last clip stays
        name = prompt.replace("/", "_").encode()[:200].decode(errors="ignore")  # a file's name has 255 bytes
        if name != prompt:  # and another prompt may look like it
            name += "-" + hashlib.sha1(prompt.encode()).hexdigest()[:8]
        first = args.seed + (number * each if args.seeds == "running" else 0)
        clips |= {f"{name}-{i}": (text, first + i, args.out / f"{name}-{i}") for i in range(each)}
    if len(clips) < len(prompts) * each:
        print(f"{len(prompts) - len(clips) // each} of {len(prompts)} prompts are another's copy: made once")
    todo = [clip for clip in clips.values() if not all(Path(f"{clip[2]}{end}").exists() for end in formats)]
    if len(todo) < len(clips):
        print(f"{len(clips) - len(todo)} of {len(clips)} are there already, made with whatever settings")
    return todo

def latent_shape(args, config, made, stride):
    """(F, C, h, w) for --frames, --height and --width in pixels, or what the model was trained for."""
    patch = config.compressed_patch_size if config.kind == "causal" else config.patch_size
    f, _, h, w = made.get("shape") or (sum(config.chunk_partition), 16, 60, 104)
    wanted = {"height": (stride[1] * patch[1], args.height), "width": (stride[1] * patch[2], args.width)}
    for name, (multiple, size) in wanted.items():
        if size and size % multiple:
            raise ValueError(f"{name} is {size}, expected a multiple of {multiple}")
    if args.frames and (args.frames - 1) % stride[0]:
        raise ValueError(f"frames are {args.frames}, expected 1 more than a multiple of {stride[0]}")
    f = (args.frames - 1) // stride[0] + 1 if args.frames else f
    h, w = (size // stride[1] if size else own for size, own in ((args.height, h), (args.width, w)))
    return f, config.in_channels, h, w

def context_of(args, config, shape, parts):
    """Latents (1, f, C, h, w) that --context, --image or --video gives for every clip, or None."""
    if args.context:
        return read_tensors(args.context, "latents")["latents"]
    if not args.image and not args.video:
        return None
    if not isinstance(parts, Published):
        raise ValueError("--image and --video need a published folder, found a model of the tiny world")
    height, width = (side * parts.stride[1] for side in shape[2:])
    if args.image:
        video, used = read_image(args.image, height, width)
    else:
        chunks = args.chunks or config.chunk_partition if config.kind == "causal" else (1,) * shape[0]
        ends = [sum(chunks[:i]) for i in range(1, len(chunks))]
        ends = [parts.stride[0] * (end - 1) + 1 for end in ends if end < shape[0]] or [1]
        frames = args.given or max(end for end in ends if end <= 25 or end == ends[0])
        if frames not in ends:
            some = f"{', '.join(map(str, ends[:3]))}{', ...' * (len(ends) > 3)}"
            raise ValueError(f"{frames} frames of --video are given, expected {some} where a chunk ends")
        video, used = read_video(args.video, frames, height, width)
    if used:
        name = args.image or args.video
        print(f"{name}: of another aspect than {width} x {height}, used the middle, {used}")
    return parts.latents(video)
