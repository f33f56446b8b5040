"""Bad input for every command, made from the declarations: does it end in one sentence within 20 s?

    python tests/fuzz.py                       # all
    python tests/fuzz.py --cases 30 --seed 1   # a random thirty
    python tests/fuzz.py --commands FILE       # those of a file, one in each line: sample --steps 0
    python tests/fuzz.py --kills 14            # kill runs at random instants, repeat: bit for bit

Each declared value gets its type's wrong neighbours and what lies beyond its range's ends; each file is
missing, empty, cut, random, a folder, a FIFO or a link in a circle. A published folder's parts (VAE, text
encoder, tokenizer, scheduler) take part where the optional packages are installed. It prints how many ended
well and names the others.
"""

import argparse
import importlib.util
import json
import math
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from full import checkpoint, plan, prepare  # noqa: E402
from full.files import WEIGHTS, Provenance, write_json  # noqa: E402
from full.options import fits  # noqa: E402
from full.pixels import Prompt, Scheduler  # noqa: E402
from model import WanConfig  # noqa: E402
from toy import flow2d, page, video  # noqa: E402

COMMANDS = {"train": train, "sample": sample, "prepare": prepare, "plan": plan, "flow2d": flow2d,
            "video": video, "page": page}
OPTIONAL = importlib.util.find_spec("diffusers") and importlib.util.find_spec("transformers")
TEACH = ["teacher", "--preset", "tiny", "--steps", "3", "--batch", "2", "--save-every", "1"]
LIMIT = 20  # s

def wrong(field):
    """Values that a declaration refuses: of other types, and beyond the ends."""
    limits = field.metadata
    values = [None, "x", "", [], {}, -1, math.inf, math.nan, 10**400, True, 1.5, [1, "x"], "1"]
    for key, step in (("low", -1), ("above", 0), ("high", 1), ("below", 0)):
        values += [limits[key] + step] if key in limits else []
    return [value for value in values if not fits(field, tuple(value) if isinstance(value, list) else value)]

def texts(declaration):
    """[--option=text] that a declaration refuses on a command line, where all is text."""
    for f in fields(declaration):
        for text in dict.fromkeys(str(v).lower() for v in wrong(f) if isinstance(v, (str, int, float))):
            meant = {"1": (int, float, tuple), "true": (bool,)}.get(text, ())
            if f.type not in meant:
                yield f"--{f.name.replace('_', '-')}={text}"

HOW = ("missing", "empty", "cut", "random", "folder", "FIFO", "circle")

def spoil(path, how):
    data = path.read_bytes() if path.is_file() else b""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if how == "folder":
        path.mkdir()
    elif how == "FIFO":
        os.mkfifo(path)
    elif how == "circle":
        path.symlink_to(path.name)
    elif how != "missing":
        noise = random.Random(0).randbytes(999)
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "random": noise}[how])

# ---- Changes of a copied folder --------------------------------------------------------------------------

def spoilt(file, how):
    return lambda folder: spoil(folder / file, how)

def key(file, name, value):
    """One key of a JSON file has another value."""
    def change(folder):
        path = folder / file
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(held | {name: value}))
    return change

def written(file, text):
    return lambda folder: (folder / file).write_text(text)

STEP = "model/checkpoints/step-0000003"

def summed(change):
    """A change of the newest checkpoint by somebody who knows how to sum."""
    def changed(folder):
        change(folder)
        write_json(folder / STEP / "checksums.json", checkpoint.checksums(folder / STEP))
    return changed

def metadata(change):
    def changed(folder):
        made = change(checkpoint.Reader(folder / STEP).read_metadata())
        (folder / STEP / ".metadata").write_bytes(pickle.dumps(made))
    return summed(changed)

def with_(name, value):
    return lambda made: (setattr(made, name, value), made)[1]

METADATA = {"a number": lambda made: 3, "a list": lambda made: [], "none": lambda made: None,
            "no tensors": with_("state_dict_metadata", {}), "no storage": with_("storage_data", None),
            "numbers for tensors": lambda made: with_(
                "state_dict_metadata", dict.fromkeys(made.state_dict_metadata, 3))(made)}
INDEX = ("[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"x": 3}}',
         '{"weight_map": {"x": ""}}', '{"weight_map": {"x": "../x"}}', '{"weight_map": {"x": null}}',
         '{"weight_map": {"x": "config.json"}}')

# ---- Cases -----------------------------------------------------------------------------------------------

def cases(base):
    """[(name, command, options, change of the copied folder)]; {} in an option is that folder."""
    made = []
    into = ["--out", "{}/out"]
    start = ["--model", "{}/model", "--steps", "1", *into]
    add = lambda name, command, options, change=None: made.append((name, command, options, change))
    for option in texts(train.Recipe):
        add(f"train {option:.40}", "train", [*TEACH, *into, option])
        add(f"plan {option:.40}", "plan", ["--preset", "tiny", "--gpus", "1", option])
    for option in texts(plan.Machine):
        add(f"plan {option:.40}", "plan", ["--preset", "tiny", option])
    of_sample = "steps", "frames", "height", "width", "shift", "guidance", "seed", "given", "chunks"
    numbers = {"sample": of_sample, "video": ("steps", "clips", "copies", "seed"), "page": ("steps", "seed"),
               "flow2d": ("steps", "batch", "seeds", "seed"), "train": ("seed", "save-every", "sample-every")}
    for command, options in numbers.items():
        before = {"sample": start, "train": [*TEACH, *into]}.get(command, into)
        for option in options:
            for text in ("x", "", "nan", "1e400", str(10**400), "true"):
                add(f"{command} --{option}={text:.9}", command, [*before, f"--{option}={text}"])

    def declared(declaration, file, command, options, around=lambda change: change):
        known = json.loads((base / file).read_text())
        for f in fields(declaration):
            legal = [None] * (f.name == "out_channels")  # as many as in_channels
            for value in [v for v in wrong(f) if v not in legal] if f.name in known else []:
                add(f"{file} {f.name} {value!r:.12}", command, options, around(key(file, f.name, value)))

    more = ["flowmap", *TEACH[1:], "--init", "{}/model", *into]
    data = [*TEACH, "--data", "{}/shards", *into]
    resumed = [*TEACH, "--out", "{}/model", "--resume"]
    declared(WanConfig, "model/config.json", "sample", start)
    declared(Provenance, "model/anyflow.json", "sample", start)
    declared(train.Recipe, f"{STEP}/settings.json", "train", resumed, summed)
    for name, change in METADATA.items():
        add(f"train --resume, metadata {name}", "train", resumed, metadata(change))
    index = f"model/{WEIGHTS}.index.json"
    for text in INDEX:
        add(f"sample, index {text}", "sample", start, written(index, text))
    for f in fields(Prompt):
        for value in wrong(f):
            row = {"prompt_en": "a", "aug_prompt_en": "b"} | {f.name: value}
            add(f"sample --prompts {f.name} {value!r:.12}", "sample", [*start, "--prompts", "{}/p.json"],
                written("p.json", json.dumps([row])))
    for how in HOW:
        for file in ("config.json", WEIGHTS, "anyflow.json", f"{WEIGHTS}.index.json"):
            for command, options in (("sample", start), ("train", more)):
                if how != "missing" or file in ("config.json", WEIGHTS):
                    add(f"{command} {file} {how}", command, options, spoilt(f"model/{file}", how))
        for file in ("null.safetensors", "shard-00000.safetensors"):
            add(f"train --data {file} {how}", "train", data, spoilt(f"shards/{file}", how))
        for file in ("settings.json", ".metadata", "checksums.json", "__0_0.distcp"):
            add(f"train --resume {file} {how}", "train", resumed, spoilt(f"{STEP}/{file}", how))
        if how != "missing":
            add(f"train log.jsonl {how}", "train", resumed, spoilt("model/log.jsonl", how))
            again = ["--write-shards", "{}/shards", "--clips", "8"]
            add(f"video --write-shards made.json {how}", "video", again, spoilt("shards/made.json", how))
        for option in ("image", "video", "prompts", "text", "context"):
            given = [*start, f"--{option}", "{}/spoilt"]
            add(f"sample --{option} {how}", "sample", given, spoilt("spoilt", how))
    for command, options in (
        ("train", [*TEACH, "--out", ""]), ("train", [*TEACH, *into, "--data", ""]),
        ("train", [*TEACH, *into, "--init", ""]), ("train", [*TEACH, "--out", "/dev/null/x"]),
        ("train", [*TEACH, "--out", "{}/" + 300 * "x"]), ("sample", [*start[:-2], "--out", "/dev/null/x"]),
        ("sample", [*start, "--frames", str(10**12 + 1)]), ("plan", ["--preset", "x"]), ("plan", []),
        ("plan", ["--preset", "tiny", "--data", "true"]), ("prepare", ["--preset", "tiny"]),
        ("flow2d", ["--out", "/dev/null/x"]), ("page", ["--out", "/dev/null/x"]),
        ("page", [*into, "--results", "{}/model"]), ("video", ["--weights", "{}/none"]),
        ("video", ["--write-shards", "/dev/null/x"]),
        ("video", ["--write-shards", "{}/shards", "--clips", "3"]),
    ):
        add(f"{command} {' '.join(options)[-40:]}", command, options)
    return made + (of_published(base, add) or [] if OPTIONAL else [])

def of_published(base, add):
    """What needs the optional packages: a published folder's parts, and the manifest of `prepare`."""
    clip = ["--model", "{}/published", "--prompt", "the cat", "--frames", "5", "--height", "32",
            "--width", "32", "--steps", "1", "--out", "{}/clip.gif"]
    videos = ["--preset", "wan-1.3b", "--init", "{}/published", "--videos", "{}/videos",
              "--data", "{}/latents", "--negative", "the"]
    text = "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"
    files = (*text, "vae/config.json", f"vae/{WEIGHTS}",
             "scheduler/scheduler_config.json", "transformer/config.json",
             f"transformer/{WEIGHTS}")
    manifest = "latents/manifest-000.jsonl"
    for how in HOW:
        for file in files:
            add(f"sample, published {file} {how}", "sample", clip, spoilt(f"published/{file}", how))
        if how not in ("missing", "empty"):
            add(f"prepare manifest {how}", "prepare", videos, spoilt(manifest, how))
        add(f"prepare shard {how}", "prepare", videos, spoilt("latents/000-000000.safetensors", how))
    for name, values in {"latents_std": ([], 16 * [0], 16 * [math.nan], 3, None, "x", 16 * ["x"]),
                         "latents_mean": ([], [0.0], 3, "x", 16 * ["x"]), "z_dim": (0, -1, 3, "x", None),
                         "base_dim": (0, -1, 16, "x", None), "dim_mult": ([], 3, "x", None, [0])}.items():
        for value in values:
            change = key("published/vae/config.json", name, value)
            add(f"sample, VAE {name} {value!r:.12}", "sample", clip, change)
    for f in fields(Scheduler):
        for value in wrong(f):
            add(f"sample, scheduler {f.name} {value!r:.12}", "sample", clip,
                key("published/scheduler/scheduler_config.json", f.name, value))
    for f in fields(prepare.Row):
        for value in wrong(f):
            change = written(manifest, json.dumps(ROW | {f.name: value}))
            add(f"prepare manifest {f.name} {value!r:.12}", "prepare", videos, change)

ROW = {"video": "a.mp4", "rank": 0, "shard": "000-000000.safetensors", "row": 0}

def make(base):
    """The folder that is copied for every case: a model with its checkpoint, shards, a published folder."""
    for words in (["train.py", *TEACH, "--out", f"{base}/model"],
                  ["-m", "toy.video", "--write-shards", f"{base}/shards", "--clips", "8"]):
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    shutil.rmtree(base / "model/checkpoints/step-0000002")
    if not OPTIONAL:
        return
    from test_sample import published

    published(base / "published", "anyflow", text_dim=4096)
    for name in ("videos", "latents"):
        (base / name).mkdir()
    (base / "videos" / "a.mp4").write_text("?"), (base / "videos" / "a.txt").write_text("the cat")
    shapes = {"latents": (1, 21, 16, 60, 104), "text": (1, 512, 4096)}
    shard = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(shard, base / "latents" / ROW["shard"])
    (base / "latents" / "manifest-000.jsonl").write_text(json.dumps(ROW))

ASIDE = ("%|", "it/s", "skipped", "set aside as ")  # in lines that say what goes on in spite of something

def ended(case, base):
    """None where the case ended in one sentence, else what happened. In a fork: imports are paid once."""
    _, command, options, change = case
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(base, f"{place}/x"))
        if change:
            change(folder)
        said = Path(place) / "said"
        pid = os.fork()
        if not pid:
            os.setpgrp()
            file = os.open(said, os.O_CREAT | os.O_WRONLY)
            os.dup2(file, 2), os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(os.open(os.devnull, 0), 0)
            code = 70
            try:
                COMMANDS[command].main([word.replace("{}", str(folder)) for word in options])
                code = 0
            except SystemExit as end:
                code = 0 if end.code in (None, 0) else 1
                print(end.code if isinstance(end.code, str) else "", file=sys.stderr, flush=True)
            except BaseException as error:
                print(f"Traceback: {error!r}", file=sys.stderr, flush=True)
            os._exit(code)
        begin = time.time()
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.time() - begin > LIMIT:
                os.killpg(pid, signal.SIGKILL), os.waitpid(pid, 0)
                return f"hung for {LIMIT} s"
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(done[1])
        lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
        lines = [line for line in lines[:-1] if not any(words in line for words in ASIDE)] + lines[-1:]
        if code != 1:
            return {0: "accepted", 70: lines[-1][:90] if lines else "traceback"}.get(code, f"signal {-code}")
        if any("error: " in line for line in lines[-1:]):  # argparse, after the usage
            return None
        return None if len(lines) == 1 else f"{len(lines)} lines, first {lines[:1]}"

HERE = f"import sys; sys.path[:0] = {str(ROOT)!r}, {str(ROOT / 'tests')!r}; import fuzz;"

def prepare_numbers(out):
    """`prepare` of sixty videos, three a shard, without VAE, text encoder and ffmpeg."""
    from test_robust import read_number
    from test_train import Codec

    videos, codec = Path(f"{out}-videos"), Codec()
    videos.mkdir(exist_ok=True)
    for i in range(60):
        (videos / f"{i}.mp4").touch(), (videos / f"{i}.txt").write_text(f"clip {i}")
    prepare.read_video = lambda *given: (time.sleep(0.05), read_number(*given))[1]
    prepare.prepare(videos, Path(out), (3, 3, 4, 6), 32, codec, codec, "", size=3)

def tensors(folder):
    """All that a run leaves, but for its checkpoints."""
    return {(path.relative_to(folder), name): value for path in sorted(folder.glob("**/*.safetensors"))
            if "checkpoints" not in path.parts for name, value in load_file(path).items()}

def kills(count, chance):
    """How many of `count` killed and repeated runs leave other tensors than the undisturbed one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with tempfile.TemporaryDirectory() as place:
        brief = "--preset tiny --steps 12 --batch 2 --save-every 1 --device cpu"
        start = f"{brief} --init {place}/teacher --teacher {place}/teacher"
        stages = {"teacher": f"teacher {brief}", "flowmap": f"flowmap {start}",
                  "consistency": f"consistency {start}",
                  "onpolicy": f"onpolicy {brief} --init {place}/flowmap --teacher {place}/teacher"}
        two = f"-m torch.distributed.run --standalone --nproc-per-node 2 train.py teacher {brief} --out"
        jobs = {stage: ["train.py", *words.split(), "--out"] for stage, words in stages.items()}
        jobs |= {"one of two": two.split(), "prepare": ["-c", f"{HERE} fuzz.prepare_numbers(sys.argv[1])"],
                 "story": ["-c", f"{HERE} fuzz.video.train_all(fuzz.Path(sys.argv[1]), 0, 2)"]}

        def go(job, out):
            more = ["--resume"] * ("--out" in jobs[job] and any(out.glob("checkpoints/step-*")))
            silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return subprocess.Popen([sys.executable, *jobs[job], str(out), *more], cwd=ROOT, **silent)

        seconds, other, met = {}, 0, 0
        for job in [*jobs][: max(count, 2)]:
            begin = time.time()
            assert go(job, Path(place, job)).wait() == 0, f"{job} failed undisturbed"
            seconds[job] = time.time() - begin
        for i in range(count):
            job, how = [*jobs][i % len(jobs)], chance.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            out = Path(place, f"killed-{i}")
            process = go(job, out)
            time.sleep(chance.uniform(0.3, 1) * seconds[job])
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            ranks = children.read_text().split() if job == "one of two" and children.exists() else []
            with suppress(ProcessLookupError):
                os.kill(int(chance.choice(ranks)), how) if ranks else process.send_signal(how)
            met += bool(process.wait())
            if process.returncode:
                time.sleep(2)  # children end after it
                go(job, out).wait()
            wanted, made = tensors(Path(place, job)), tensors(out)
            if made.keys() != wanted.keys() or not all(torch.equal(made[key], wanted[key]) for key in wanted):
                other += 1
                print(f"kill {i}, {job}, {how.name}: other tensors, or none", flush=True)
        print(f"{count - other} of {count} runs left the undisturbed one's tensors; a signal ended {met}")
        return other

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, help="so many, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, and of the kills (default 0)")
    parser.add_argument("--only", default="", help="cases with these words in their names")
    parser.add_argument("--allowed", type=int, default=0, help="exit code 0 with so many that do not")
    parser.add_argument("--commands", type=Path, help="file of commands to be tried in place of these cases")
    parser.add_argument("--kills", type=int, help="only kill so many runs")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    if args.kills:
        sys.exit(bool(kills(args.kills, chance)))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        base.mkdir()
        if args.commands:
            lines = map(shlex.split, args.commands.read_text().splitlines())
            every = [(shlex.join(words), words[0], words[1:], None) for words in lines]
        else:
            make(base)
            every = [case for case in cases(base) if args.only in case[0]]
        picked = chance.sample(every, min(args.cases or len(every), len(every)))
        bad = []
        for case in picked:
            if found := ended(case, base):
                bad.append(case)
                print(f"{case[0]}: {found}", flush=True)
    tried = f"{len(picked)} bad inputs (of {len(every)}, --seed {args.seed})"
    print(f"{len(picked) - len(bad)} of {tried} ended in one sentence within {LIMIT} s")
    sys.exit(len(bad) > args.allowed)

if __name__ == "__main__":
    main()
