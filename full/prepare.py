"""Videos with captions to shards of latents and embeddings, which `train.py --data` reads.

    python -m full.prepare --preset wan-14b --init WAN_FOLDER --videos FOLDER --data SHARDS --negative @FILE

Under torchrun each process takes its part. An interrupted run goes on; bad files are named and skipped.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from full.data import NAMES, open_shard, preset
from full.files import hold, read_json, read_lines, text_of, write, write_json
from full.hub import find
from full.options import check, command, device_of, nonempty, option, path_value, positive
from full.pixels import VAE, TextEncoder, read_video

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")

@dataclass(frozen=True)
class Row:
    """Of a manifest: a video, and where its latents are, or why it was skipped."""

    video: str = option()
    rank: int = option(low=0)
    shard: str = option("none", form="000-000000.safetensors")
    row: int = option(0, low=0)
    used: str = option(None)
    error: str = option(None)

def read_manifests(folder, shape, text, rank, world):
    """The rows of all manifests whose clip is in its shard: what failed may have been mended since.
    A bad shard, or one in no manifest, is set aside by one of the processes."""
    paths = sorted(folder.glob("manifest-*.jsonl"))
    rows, clips = [check(Row, row, path) for path in paths for row in read_lines(path)], {}
    listed = {row.get("shard") for row in rows}
    for path in sorted(folder.glob("[0-9]*-[0-9]*.safetensors")):
        try:
            if path.name not in listed:
                raise ValueError(f"{path}: in no manifest")
            clips[path.name] = open_shard(path, shape, text)[1]
        except (ValueError, OSError) as error:
            if int(path.name.partition("-")[0]) % world == rank:
                print(f"{error}; set aside as {path.name}.damaged, to be made again", file=sys.stderr)
                os.replace(path, f"{path}.damaged")
    return [row for row in rows if row.get("row", 0) < clips.get(row.get("shard"), 0)]

def videos_below(folder):
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in VIDEOS)
    if not files:
        raise ValueError(f"no videos in {folder}, expected files {', '.join(VIDEOS)}")
    return files

def prepare(videos, folder, shape, text_dim, encode, vae, negative="", size=32, rank=0, world=1):
    """Every video below a folder, with its caption in a .txt of the same name, to shards: (clips, bad files).

    The first frames of each, of another aspect the middle. shape: (F, C, H, W) of the latents. encode, vae:
    of `full.pixels`. negative: the null prompt's text. manifest-RANK.jsonl names the shard and row of each
    video, or why it was skipped; what lies in a shard is not encoded again, but told where video or caption
    are newer. Latents and text are bfloat16.
    """
    files = videos_below(videos)
    frames, _, height, width = shape
    pixels = (frames - 1) * vae.stride[0] + 1, height * vae.stride[1], width * vae.stride[1]
    null = encode([negative]).bfloat16()
    if null.shape[2] != text_dim:
        raise ValueError(f"the text encoder is {null.shape[2]} wide, expected {text_dim} for the preset")
    known = read_manifests(folder, shape, tuple(null.shape[1:]), rank, world)
    age = lambda path: path.stat().st_mtime if path.is_file() else 0
    late = [row["video"] for row in known for path in [Path(videos, row["video"])]
            if max(age(path), age(path.with_suffix(".txt"))) > age(folder / row["shard"])]
    if late and rank == 0:
        print(f"{len(late)} videos or captions are newer than their clips, which stay as they are, first"
              f" {late[0]}: to make them anew, take another folder", file=sys.stderr)
    seen, rows = {row["video"] for row in known}, [row for row in known if row["rank"] == rank]
    shards = 1 + max((int(path.name[4:10]) for path in folder.glob(f"{rank:03}-{6 * '[0-9]'}.*")), default=-1)
    clips = []  # encoded, of the next shard: latents, text, row of the manifest

    def flush():
        nonlocal clips, shards
        if clips:
            name = f"{rank:03}-{shards:06}.safetensors"
            latents, text = (torch.stack(parts) for parts in list(zip(*clips))[:2])
            write(folder / name, lambda part: save_file({"latents": latents, "text": text}, part))
            rows.extend(row | {"shard": name, "row": i} for i, (_, _, row) in enumerate(clips))
            shards, clips = shards + 1, []
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write(folder / f"manifest-{rank:03}.jsonl", lambda part: part.write_text(text))

    if rank == 0:
        write(folder / "null.safetensors", lambda part: save_file({"text": null}, part))
    todo = [path for path in files[rank::world] if str(path.relative_to(videos)) not in seen]
    try:
        for path in tqdm(todo, desc="videos", disable=None):
            row = {"video": str(path.relative_to(videos)), "rank": rank}
            try:
                text = path.with_suffix(".txt")
                caption = text.read_bytes().decode("utf-8-sig", "replace").strip() if text.is_file() else ""
                if not caption or "\ufffd" in caption:
                    raise ValueError(f"no caption in UTF-8 in {text}")
                video, used = read_video(path, *pixels)
                latents = vae.encode(video[None])[0].bfloat16().cpu().contiguous()
            except (ValueError, OSError) as error:
                rows.append(row | {"error": str(error)})
                tqdm.write(f"skipped: {error}", file=sys.stderr)
            else:
                if latents.shape != shape:
                    raise ValueError(f"the VAE makes {tuple(latents.shape)}, expected {shape} for the preset")
                row |= {"used": used} if used else {}
                clips.append((latents, encode([caption])[0].bfloat16(), row))
            if len(clips) == size:
                flush()
    finally:  # Ctrl-C keeps what is encoded
        flush()
    bad = sum("error" in row for row in rows)
    return len(rows) - bad, bad

def run(args):
    (config, shape), folder = preset(args.preset), args.data
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = device_of(args.device)
    videos_below(args.videos)  # none are found before anything is written or loaded
    init, negative = find(args.init, ignore="transformer/*"), text_of(args.negative)
    settings = {"videos": str(args.videos.resolve()), "init": str(init.resolve()), "shape": list(shape)}
    settings["negative"] = negative
    if rank == 0:
        hold(folder, init)
    path = folder / "prepare.json"
    if path.exists() and read_json(path) != settings and any(folder.glob("[0-9]*-[0-9]*.safetensors")):
        raise ValueError(f"{folder} was prepared from {read_json(path)}, expected {settings}: another --data")
    encode = TextEncoder(init, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if rank == 0:
        write_json(path, settings)
    vae = VAE(init, device)
    clips, bad = prepare(args.videos, folder, shape, config.text_dim, encode, vae, negative,
                         args.clips_per_shard, rank, world)
    print(f"{clips} clips by process {rank} in {folder}{f'; {bad} bad files in the manifest' if bad else ''}")
    if bad and not clips and world == 1:  # other processes may have better ones
        raise ValueError(f"none of the {bad} videos in {args.videos} could be used")

def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m full.prepare", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--preset", choices=NAMES, required=True, help="whose frames, height and width the clips get")
    add("--init", type=nonempty, required=True, help="published folder or hub name: VAE and text encoder")
    add("--videos", type=path_value, required=True, help="folder; a caption is in a .txt of its video's name")
    add("--data", type=path_value, required=True, help="folder of the shards")
    add("--negative", required=True, metavar="TEXT", help="the null prompt, or @FILE: for dropped prompts and"
        " guidance; Wan has a text of its own, '' is the empty prompt")
    add("--clips-per-shard", type=positive, default=32, help="(default 32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    args = parser.parse_args(argv)
    command("full.prepare", lambda: run(args), "the same command goes on")

if __name__ == "__main__":
    main()
