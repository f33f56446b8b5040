"""Bad input for every command, made from the declarations: does it end in one sentence within 20 s?

    python tests/fuzz.py                        # all
    python tests/fuzz.py --sample 30 --seed 1   # a random thirty
    python tests/fuzz.py --kills 20             # kill runs at random instants, resume: bit for bit

Each value gets its type's wrong neighbours and what lies beyond its range's ends; each file is missing,
empty, cut, random, a folder, a FIFO or a link in a circle. It prints how many ended well and names the
others.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from full import plan, prepare  # noqa: E402
from full.files import WEIGHTS, Provenance  # noqa: E402
from full.options import fits  # noqa: E402
from model import WanConfig  # noqa: E402
from toy import flow2d, video  # noqa: E402

COMMANDS = {"train": train, "sample": sample, "prepare": prepare, "plan": plan, "flow2d": flow2d,
            "video": video}
TEACH = ["teacher", "--preset", "tiny", "--steps", "3", "--batch", "2", "--save-every", "1"]
LIMIT = 20  # s

def wrong(field):
    """Values that a declaration refuses: of other types, and beyond the ends."""
    limits = field.metadata
    values = [None, "x", "", [], {}, -1, math.inf, math.nan, 10**400, True, 1.5, [1, "x"], "1"]
    for key, step in (("low", -1), ("above", 0), ("high", 1), ("below", 0)):
        values += [limits[key] + step] if key in limits else []
    return [value for value in values if not fits(field, tuple(value) if isinstance(value, list) else value)]

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

HOW = ("missing", "empty", "cut", "random", "folder", "FIFO", "circle")

def cases(base):
    """[(name, command, options, change of the copied folder)]; {} in an option is that folder."""
    made = []
    into = ["--out", "{}/out"]
    start = ["--model", "{}/model", "--steps", "1", *into]
    for f in fields(train.Recipe):
        texts = [str(v).lower() for v in wrong(f) if not isinstance(v, (type(None), list, dict))]
        texts = [text for text in texts if not (f.type in (int, float, tuple) and text == "1")]
        texts = [text for text in texts if not (f.type is bool and text == "true")]
        word = f"--{f.name.replace('_', '-')}"
        made += [(f"train {word} {text:.9}", "train", [*TEACH, *into, f"{word}={text}"], None)
                 for text in texts]

    def key(file, name, value):
        def change(folder):
            path = folder / file
            path.parent.mkdir(exist_ok=True)
            held = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(held | {name: value}))
        return change

    for declared, file in ((WanConfig, "model/config.json"), (Provenance, "model/anyflow.json")):
        known = json.loads((base / file).read_text())
        for f in fields(declared):
            values = wrong(f) if f.name in known else []
            made += [(f"{file} {f.name} {value!r:.12}", "sample", start,
                      key(file, f.name, value)) for value in values]
    more = ["flowmap", *TEACH[1:], "--init", "{}/model", *into]
    data = [*TEACH, "--data", "{}/shards", *into]
    resumed = [*TEACH, "--out", "{}/model", "--resume"]
    for how in HOW:
        change = (lambda how: lambda file: lambda folder: spoil(folder / file, how))(how)
        for file in ("config.json", WEIGHTS, "anyflow.json"):
            for command, options in (("sample", start), ("train", more)):
                if (file, how) != ("anyflow.json", "missing"):
                    made.append((f"{command} {file} {how}", command, options, change(f"model/{file}")))
        for file in ("null.safetensors", "shard-00000.safetensors"):
            made.append((f"train --data {file} {how}", "train", data, change(f"shards/{file}")))
        if how != "missing":
            made.append((f"train log.jsonl {how}", "train", resumed, change("model/log.jsonl")))
        for option in ("image", "video", "prompts", "text", "context"):
            made.append((f"sample --{option} {how}", "sample", [*start, f"--{option}", "{}/spoilt"],
                         change("spoilt")))
    for command, options in (
        ("train", [*TEACH, "--out", ""]), ("train", [*TEACH, *into, "--data", ""]),
        ("train", [*TEACH, *into, "--init", ""]), ("train", [*TEACH, "--out", "/dev/null/x"]),
        ("train", [*TEACH, "--out", "{}/" + 300 * "x"]), ("sample", [*start[:-2], "--out", "/dev/null/x"]),
        ("sample", [*start, "--frames", str(10**12 + 1)]), ("plan", ["--preset", "tiny", "--gpus", "0"]),
        ("plan", ["--preset", "x"]), ("plan", []), ("prepare", ["--preset", "tiny"]),
        ("flow2d", ["--steps", "0"]), ("flow2d", ["--out", "/dev/null/x"]),
        ("flow2d", ["--seeds", "-1"]),
        ("video", ["--copies", "0"]), ("video", ["--seed", "-1"]), ("video", ["--weights", "{}/none"]),
        ("video", ["--write-shards", "/dev/null/x"]),
        ("video", ["--write-shards", "{}/shards", "--clips", "3"]),
    ):
        made.append((f"{command} {' '.join(options)[-40:]}", command, options, None))
    return made

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
            os.setsid()
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
        lines = [line for line in lines if "%|" not in line and "it/s" not in line and "skipped " not in line]
        if code != 1:
            return {0: "accepted", 70: lines[-1][:90] if lines else "traceback"}.get(code, f"signal {-code}")
        if any("error: " in line for line in lines[-1:]):  # argparse, after the usage
            return None
        return None if len(lines) == 1 else f"{len(lines)} lines, first {lines[:1]}"

def kills(count, chance):
    """How many of `count` killed and resumed runs end in other weights than the undisturbed one."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "train.py", *TEACH, "--steps", "12"]
        go = lambda out, *more: subprocess.Popen([*command, "--out", f"{place}/{out}", *more], cwd=ROOT,
                                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begin = time.time()
        go("whole").wait()
        seconds, wanted, other = time.time() - begin, load_file(f"{place}/whole/{WEIGHTS}"), 0
        for i in range(count):
            how = chance.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            process = go(i)
            time.sleep(chance.uniform(0.3, 1) * seconds)
            process.send_signal(how), process.wait()
            if not (Path(place) / str(i) / WEIGHTS).exists():
                go(i, *["--resume"] * any(Path(place, str(i)).glob("checkpoints/step-*"))).wait()
            path = Path(place, str(i), WEIGHTS)
            made = load_file(path) if path.exists() else {}
            if not all(name in made and torch.equal(made[name], value) for name, value in wanted.items()):
                other += 1
                print(f"kill {i}, {how.name}: other weights, or none")
        print(f"{count - other} of {count} killed runs ended in the undisturbed run's weights, bit for bit")
        return other

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sample", type=int, help="so many cases, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, help="only kill so many runs")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    if args.kills:
        sys.exit(bool(kills(args.kills, chance)))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        for words in (["train.py", *TEACH, "--out", f"{base}/model"],
                      ["-m", "toy.video", "--write-shards", f"{base}/shards", "--clips", "8"]):
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
        every = cases(base)
        picked = chance.sample(every, min(args.sample or len(every), len(every)))
        bad = [(case[0], found) for case in picked if (found := ended(case, base))]
    for name, found in bad:
        print(f"{name}: {found}")
    print(f"{len(picked) - len(bad)} of {len(picked)} bad inputs ended in one sentence within {LIMIT} s")
    sys.exit(bool(bad))

if __name__ == "__main__":
    main()
