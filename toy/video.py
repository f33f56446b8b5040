"""The tiny video world's story: nine models, trained by `train.py`, measured by the world's own laws.

    python -m toy.video            # measure the models in the repository: table, claims, GIFs in out/video
    python -m toy.video --train    # train them anew first
"""

import argparse
import functools
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from anyflow import best_grid, time_grid
from full.files import hold, provenance, read_json, write, write_json
from full.options import command, end_with_parent, path_value, positive, seed_value
from model import Wan
from sample import generate, sampler_of_folder
from toy import plots
from toy.world import KINDS, WORLDS, describe, embed, nearest, score, track, wrap

ROOT = Path(__file__).parents[1]
WEIGHTS = Path(__file__).parent / "weights"

NFE = [1, 2, 4, 8, 16, 32]  # network calls, of a causal model for each chunk
FAMILIES = ("causal", "bidirectional")
METHODS = ("teacher", "consistency", "anyflow-forward", "anyflow")
TASKS = {0: "T2V", 1: "I2V: 1 frame given", 3: "V2V: 3 frames given"}
BUDGETS = {"2 on every chunk": 2, "6 on the first, 1 on the others": [6, 1], "4 on every chunk": 4,
           "8 on the first, 1 on the others": [8, 1], "1 on every chunk, 6 on the last": [1, 1, 1, 1, 6]}
STREAM = (1, *[2] * 10)  # frames of the chunks of a long stream
SHIFT = 2.0  # of the sampling grid, as in training

# Every run of `train.py`, as one would type it; a run's name stands for its folder. The causal teacher comes
# first: clean past frames teach it motion, where a bidirectional one from random weights moved objects left
# for right in half of its clips after 5,000 steps. It also judges the causal student: the bidirectional one
# sees whole clips, but makes worse ones.
STORY = {
    "causal-teacher": "teacher --preset tiny-causal",
    "bidirectional-teacher": "teacher --preset tiny --init causal-teacher --steps 6000",
    "causal-anyflow-forward": "flowmap --preset tiny-causal --init causal-teacher",
    "causal-anyflow": "onpolicy --preset tiny-causal --init causal-anyflow-forward --teacher causal-teacher",
    "causal-consistency": "consistency --preset tiny-causal --init causal-teacher",
    "bidirectional-anyflow-forward": "flowmap --preset tiny --init bidirectional-teacher",
    "bidirectional-anyflow": "onpolicy --preset tiny --init bidirectional-anyflow-forward"
                             " --teacher bidirectional-teacher",
    "bidirectional-consistency": "consistency --preset tiny --init bidirectional-teacher",
    # Continued training: the student meets a world with a new colour and gravity, without a teacher.
    "causal-gravity": "flowmap --preset tiny-causal --init causal-anyflow --data stars-gravity --target data"
                      " --steps 2000",
}

def train_all(folder, seed, steps, exact_teacher=False):
    """Run STORY into folder/NAME, on a CPU two stages at a time with half of the cores each.

    steps: of every stage, or None for the preset's. exact_teacher: the bidirectional students learn from the
    exact velocity. What an interrupted training has finished is kept, what it had begun is resumed;
    ValueError if that was with other settings. RuntimeError: a stage failed.
    """
    hold(folder)
    settings = {"seed": seed, "steps": steps} | ({"exact_teacher": True} if exact_teacher else {})
    path = folder / "story.json"
    if path.exists() and read_json(path) != settings:
        raise ValueError(f"{folder} was trained with {read_json(path)}, expected {settings} or another --out")
    write_json(path, settings)
    done = {name for name in STORY if provenance(folder / name)}
    waiting, running = [name for name in STORY if name not in done], {}
    at_once = 1 if torch.cuda.is_available() else 2
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))}

    def begin(name):
        words = [str(folder / word) if word in STORY else word for word in STORY[name].split()]
        command = [sys.executable, "train.py", *words, "--out", str(folder / name), "--seed", str(seed)]
        command += ["--steps", str(steps)] if steps else []
        if exact_teacher and name.startswith("bidirectional") and not name.endswith("teacher"):
            command += ["--exact-teacher", "--drop", "0"]
        command += ["--resume"] if [*(folder / name).glob("checkpoints/step-*")] else []
        with open(folder / f"{name}.txt", "w") as out:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out,
                                    preexec_fn=end_with_parent)

    bar = tqdm(total=len(STORY), initial=len(done), desc="training", unit="stage", disable=None)
    try:
        while waiting or running:
            ready = [name for name in waiting if STORY.keys() & {*STORY[name].split()} <= done]
            for name in ready[: at_once - len(running)]:
                waiting.remove(name)
                running[name] = begin(name)
            for name in [name for name in running if running[name].poll() is not None]:
                if running.pop(name).returncode:
                    raise RuntimeError(f"stage {name} failed, see {folder / f'{name}.txt'}")
                done.add(name)
                bar.update()
            bar.set_postfix_str(", ".join(running))
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():  # each saves its last step
            process.wait()
        bar.close()

class Ruler:
    """Prompts and noise that every method is measured with: each prompt of a world `copies` times; and, of
    some of it, the exact way from noise to clip."""

    def __init__(self, world, copies, seed, traced=12):
        colours = [KINDS[0].index(colour) for colour in world.colours]
        others = [range(len(kind)) for kind in KINDS[1:]]
        labels = torch.tensor([*itertools.product(colours, *others)]).repeat(copies, 1)
        self.world, self.labels, self.seed, self.shape = world, labels, seed, (len(labels), *world.shape)
        self.traced = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:traced]

    def noise(self):
        torch.manual_seed(self.seed)
        return torch.randn(self.shape)

    @functools.cached_property
    def exact(self):
        """The exact ODE's states from some of the noise, at the times of the finest grid: (33, n, F, ...)."""
        grid = time_grid(NFE[-1], SHIFT)
        return self.world.flow(self.noise()[self.traced], grid, self.labels[self.traced]).float()

    def away(self, states):
        """Distance of states (k + 1, n, F, ...) to the exact ones at the same times, RMS over that of the
        clips that these end in: [one per time]."""
        error = (states - self.exact[:: NFE[-1] // (len(states) - 1)]).square().flatten(1).mean(1)
        return (error / self.exact[-1].square().mean()).sqrt().tolist()

    def generate(self, model, sampler, steps, **options):
        noise = self.noise()
        return generate(model, embed(self.labels), noise, steps, shift=SHIFT, sampler=sampler, **options)

    def measure(self, folder):
        """{score: [one per NFE]}, [clips per NFE] and, of a bidirectional model, [states of the traced]."""
        model, sampler = Wan.from_pretrained(folder, dtype=torch.float32), sampler_of_folder(folder)
        path = model.config.kind != "causal"
        clips = [self.generate(model, sampler, n, path=path) for n in NFE]
        states = [x[:, self.traced] for x in clips] if path else None
        clips = [x[-1] for x in clips] if path else clips
        rows = [score(x, self.labels, self.world) for x in clips]
        scores = {key: [row[key] for row in rows] for key in rows[0]}
        scores["preview"] = [apart(x, clips[-1]) for x in clips]
        if path:  # of the states visited after the noise
            away = [torch.tensor(self.away(x))[1:] for x in states]
            scores["path_error"] = [x.square().mean().sqrt().item() for x in away]
        return scores, clips, states

    def budgets(self, folder):
        """{how the calls are spent on the chunks: scores} of a causal model."""
        model, sampler = Wan.from_pretrained(folder, dtype=torch.float32), sampler_of_folder(folder)
        clips = {name: self.generate(model, sampler, steps) for name, steps in BUDGETS.items()}
        return {name: score(x, self.labels, self.world) for name, x in clips.items()}

    def best_times(self, folder):
        """{"4 calls, best times": scores}, and with even ones. `anyflow.best_grid` finds them with other
        noise; preview is the distance to the clip of 32 calls at even times."""
        model, rows = Wan.from_pretrained(folder, dtype=torch.float32), {}
        torch.manual_seed(self.seed + 1)
        noise, text = torch.randn(self.shape)[:48:11], embed(self.labels[:48:11])  # few: 993 calls
        last = self.generate(model, None, NFE[-1])
        for n, best in zip((2, 4, 8), best_grid(model, noise, [2, 4, 8], shift=SHIFT, text=text)):
            for name, steps in {"even": n, "best": best}.items():
                x = self.generate(model, None, steps)
                scores = score(x, self.labels, self.world)
                rows[f"{n} calls, {name} times"] = scores | {"preview": apart(x, last)}
        return rows

    def drift(self, folder, steps=4, chunks=STREAM):
        """Exposure bias: a causal model goes on from its own chunks, here for more than twice the frames of
        its training. Distance in pixels, by chunk, to where the law takes the object from 3 frames."""
        model, frames = Wan.from_pretrained(folder, dtype=torch.float32), sum(chunks)
        torch.manual_seed(self.seed)
        noise = torch.randn(len(self.labels), frames, *self.world.shape[1:])
        options = dict(shift=SHIFT, sampler=sampler_of_folder(folder), chunks=chunks)
        clips = generate(model, embed(self.labels), noise, steps, **options)
        start, _ = nearest(clips[:, :3], self.labels, self.world)
        lawful = start[:, None] + self.world.offsets(self.labels, frames)
        error = wrap(track(clips, self.world.stars)[2] - lawful).norm(dim=2).mean(0)
        return [part.mean().item() for part in error.split(chunks)]

    def continuation(self, folder, given, steps):
        """One model, given the first frames of true clips: mean distance in pixels of the object's centre to
        the true one, by frame, (F,); the clips made and the true ones."""
        model, sampler = Wan.from_pretrained(folder, dtype=torch.float32), sampler_of_folder(folder)
        places = range(len(self.labels))
        _, start = self.world.draw(places, seed=self.seed)
        true = self.world.render(self.labels, start, stars=self.world.twinkle(places, seed=self.seed))
        made = self.generate(model, sampler, steps, context=true[:, :given] if given else None)
        if not given:  # nothing to be held against but its own first frame
            start, _ = nearest(made[:, :1], self.labels, self.world)
        centre = start[:, None] + self.world.offsets(self.labels)
        return wrap(track(made, self.world.stars)[2] - centre).norm(dim=2).mean(0).tolist(), made, true

def apart(clips, others):
    """RMS distance of each clip to its other, over the RMS of the other; mean over clips."""
    mean = lambda x: x.square().mean((1, 2, 3, 4))
    return (mean(clips - others) / mean(others)).sqrt().mean().item()

def decide(results):
    """The claims, each decided by the numbers in results: [{"claim", "holds", "figures"}]."""
    claims, at_4 = plots.Claims(NFE, digits=3), NFE.index(4)
    for family in FAMILIES:
        scores = results["methods"][family]
        teacher, consistency, forward, ours = (scores[method]["distance"] for method in METHODS)
        claims.add(f"{family}: AnyFlow is better than its teacher up to 8 calls, no worse (5 %) at 16 and 32",
                   all(a < b if n <= 8 else a <= 1.05 * b for n, a, b in zip(NFE, ours, teacher)),
                   ours, teacher)
        claims.add(f"{family}: AnyFlow is level with consistency (5 %) at 1 to 4 calls and better from 8 on",
                   all(a <= b * (1.05 if n <= 4 else 1) for n, a, b in zip(NFE, ours, consistency)),
                   ours, consistency)
        claims.add(f"{family}: consistency gets worse with more calls: 32 are 1.1 times worse than its best",
                   consistency[-1] > 1.1 * min(consistency), consistency)
        claims.add(f"{family}: AnyFlow is any-step: no budget is worse than 1.1 times the best smaller one",
                   all(ours[i] <= 1.1 * min(ours[:i]) for i in range(1, len(NFE))), ours)
        claims.add(f"{family}: stage 1 alone is better than its teacher at 1, 2, 4 calls, within 10 % at 32",
                   all(a < b for n, a, b in zip(NFE, forward, teacher) if n <= 4)
                   and forward[-1] <= 1.1 * teacher[-1], forward, teacher)
        if "path_error" in scores["anyflow"]:
            ours, theirs = (scores[method]["path_error"] for method in ("anyflow", "consistency"))
            claims.add(f"{family}: AnyFlow follows the exact path at 4 calls: a third of consistency's error",
                       ours[at_4] <= theirs[at_4] / 3, ours, theirs)
        if results["stars"]:
            ours, theirs = (scores[method]["star rate"] for method in ("anyflow", "teacher"))
            near = [abs(rate[NFE.index(2)] / results["stars"] - 1) <= 0.25 for rate in (ours, theirs)]
            claims.add(f"{family}: AnyFlow's star rate at 2 calls is within 25 % of {results['stars']}, its"
                       " teacher's is not", near == [True, False], ours, theirs)
        ours, theirs = (scores[method]["preview"] for method in ("anyflow", "consistency"))
        claims.add(f"{family}: AnyFlow's 4-call preview is half as far from its last clip as consistency's",
                   ours[at_4] < 0.5 * theirs[at_4], ours, theirs)
        words = {key: scores["anyflow"][key][at_4] for key in ("colour", "shape", "direction", "speed")}
        claims.add(f"{family}: prompts are obeyed at 4 calls: colour and shape 98 %, direction 90 %",
                   words["colour"] >= 0.98 and words["shape"] >= 0.98 and words["direction"] >= 0.9,
                   ", ".join(f"{key} {value:.0%}" for key, value in words.items()))
    rows = {method: results["drift"][method] for method in ("anyflow-forward", "anyflow")}
    forward, ours = (row[-1] - row[1] for row in rows.values())
    claims.add("causal: on-policy training lowers the drift's growth over the chunks, at 4 calls, by a third",
               ours <= 2 / 3 * forward,
               ", ".join(f"{name} {row[1]:.2f} to {row[-1]:.2f} pixels" for name, row in rows.items()))
    made = results["continuation"][TASKS[3]][3:]
    claims.add("causal: V2V at 4 calls keeps the object within 1 pixel over the first chunk, 2 over the clip",
               max(made[:2]) < 1 and max(made) < 2, " ".join(f"{x:.2f}" for x in made))
    before, after = (results["gravity"][key]["distance"] for key in ("before", "after"))
    claims.add("continued training on a changed world halves the distance at 4 calls, 32 no worse (10 %)",
               after[at_4] <= 0.5 * before[at_4] and after[-1] <= 1.1 * after[at_4], before, after)
    return claims.rows

def table(results):
    """Distance to the nearest clip of the world for the prompt, by family, method and NFE, as text."""
    rows = {f"{family}: {plots.STYLE[method]['label']}": scores
            for family, methods in results["methods"].items() for method, scores in methods.items()}
    of_world = "distance to the nearest clip of the world for the prompt: 0 is best, 1 an empty clip"
    titles = {"distance": of_world,
              "path_error": "RMS distance to the exact path of the same noise, over the RMS of a clip",
              "star rate": f"share of background pixels that are a star: {results['stars']} is the truth"}
    by_calls = [plots.table(title, NFE, {name: scores[key] for name, scores in rows.items() if key in scores})
                for key, title in titles.items() if any(key in scores for scores in rows.values())]
    names = [name for name in results["methods"]["causal"]["anyflow"] if name not in titles]
    at_4 = {row: [scores[name][NFE.index(4)] for name in names] for row, scores in rows.items()}
    title = "the other scores, at 4 calls (shares of clips; frechet, preview, star grain: 0 is best)"
    some = ["distance", "star rate", "frechet"] if results["stars"] else ["distance", "frechet"]
    columns = lambda rows, names: {row: [scores[name] for name in names] for row, scores in rows.items()}
    with_preview = [*some, "preview"]
    return "\n\n".join([
        *by_calls, plots.table(title, names, at_4, digits=2, width=11, corner=""),
        plots.table("causal AnyFlow, calls spent unevenly", some, columns(results["budgets"], some), width=11,
                    corner=""),
        plots.table("bidirectional AnyFlow, even times and those of anyflow.best_grid", with_preview,
                    columns(results["best_times"], with_preview), width=11, corner="")])


# ---- Command line ----------------------------------------------------------------------------------------

def keep(folder, target):
    """The weights of STORY in bfloat16, small enough for a repository."""
    for name in STORY:
        Wan.from_pretrained(folder / name, dtype=torch.bfloat16).save_pretrained(target / name)
        made = provenance(folder / name)
        made |= {key: Path(made[key]).name for key in ("init", "teacher", "judge", "base") if key in made}
        write_json(target / name / "anyflow.json", made)

def write_shards(world, folder, clips, seed, size=1024):
    """Clips of a world in the format that `train.py --data` reads."""
    hold(folder)
    made, path = {"clips": clips, "seed": seed, "size": size, "world": str(world)}, folder / "made.json"
    if read_json(path) != made if path.exists() else any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds other shards than {made}, expected a new folder")
    write_json(path, made)
    save = lambda name, tensors: write(folder / f"{name}.safetensors", functools.partial(save_file, tensors))
    save("null", {"text": world.null})
    for first in tqdm(range(0, clips, size), desc="shards", disable=None):
        latents, text = world.batch(range(first, min(clips, first + size)), seed)
        save(f"shard-{first // size:05d}", {"latents": latents, "text": text})

def world_of(folder):
    """The world that a model was trained in. ValueError for none."""
    name = provenance(folder).get("data")
    if name not in WORLDS:
        raise ValueError(f"no model at {folder} that was trained in one of the worlds {', '.join(WORLDS)}")
    return WORLDS[name]

def read_results(path):
    """The results.json of another run of `tell`. ValueError for what is none."""
    results = read_json(path)
    rows = results.get("methods") if isinstance(results, dict) and results.get("nfe") == NFE else None
    try:
        if all(len(rows[family][method][key]) == len(NFE) for family in FAMILIES for method in METHODS
               for key in ("distance", "preview")):
            return results
    except (TypeError, KeyError):
        pass
    raise ValueError(f"--also {path} has not the scores of both families, expected results.json of toy.video")

def tell(args):
    """Train if asked, measure every model, write results.json and all figures, print table and claims."""
    begin = time.perf_counter()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    models, also = args.weights or WEIGHTS, [read_results(path) for path in args.also]
    if args.train:
        models = args.out / "models"
        train_all(models, args.seed, args.steps, args.exact_teacher)
    trained = time.perf_counter() - begin
    if args.keep:
        keep(models, args.keep)
    ruler, falling = (Ruler(world_of(models / name), args.copies, args.seed)
                      for name in ("causal-anyflow", "causal-gravity"))
    results = {"nfe": NFE, "seed": args.seed, "clips": len(ruler.labels), "stars": ruler.world.stars,
               "train_seconds": trained}
    bar = tqdm(total=len(STORY) + 1, desc="measuring", unit="model", disable=None)

    def measured(ruler, name):
        bar.update()
        return ruler.measure(models / name)

    made = {family: {method: measured(ruler, f"{family}-{method}") for method in METHODS}
            for family in FAMILIES}
    results["methods"] = {family: {method: scores for method, (scores, *_) in rows.items()}
                          for family, rows in made.items()}
    results["drift"] = {method: ruler.drift(models / f"causal-{method}") for method in METHODS}
    results["budgets"] = ruler.budgets(models / "causal-anyflow")
    results["best_times"] = ruler.best_times(models / "bidirectional-anyflow")
    tasks = {name: ruler.continuation(models / "causal-anyflow", given, 4) for given, name in TASKS.items()}
    results["continuation"] = {name: pixels for name, (pixels, _, _) in tasks.items()}
    results["gravity"] = {"before": measured(falling, "causal-anyflow")[0],
                          "after": measured(falling, "causal-gravity")[0]}
    bar.close()
    results["claims"] = decide(results)
    results["seconds"] = time.perf_counter() - begin
    write_json(args.out / "results.json", results)
    plots.video_quality(results, also, args.out / "quality.png")
    plots.chunks(results, args.out / "chunks.png")
    row = 5  # a prompt to show: the same in every figure
    for family in FAMILIES:
        clips = {method: [x[row] for x in made[family][method][1]] for method in METHODS}
        plots.clips_by_budget(clips, NFE, describe(ruler.labels[row]), args.out / f"{family}.gif")
    states = {method: made["bidirectional"][method][2] for method in METHODS}
    away = {method: [ruler.away(x) for x in of_nfe] for method, of_nfe in states.items()}
    grid = time_grid(NFE[-1], SHIFT).tolist()
    plots.path_error(results, away, grid, args.out / "path.png")
    one = {method: [x[:, :1] for x in of_nfe] for method, of_nfe in states.items()}
    prompt = describe(ruler.labels[ruler.traced[0]])
    plots.paths(ruler.exact[:, :1], one, grid, NFE, prompt, args.out / "path.gif")
    shown = {TASKS[given]: (*(x[row] for x in tasks[TASKS[given]][1:]), given) for given in TASKS}
    plots.tasks(shown, describe(ruler.labels[row]), args.out / "tasks.gif")
    print(table(results))
    plots.print_claims(results["claims"])
    print(f"figures and results.json in {args.out}; {time.perf_counter() - begin:.0f} s")

def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m toy.video", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--train", action="store_true", help="train everything anew, into OUT/models")
    add("--steps", type=positive, help="of every stage, to try --train out")
    add("--exact-teacher", action="store_true", help="with --train: the bidirectional students learn from the"
        " exact velocity, not from a trained teacher")
    add("--weights", type=Path, help="folder of trained models (default: those in the repository)")
    add("--also", type=Path, nargs="+", default=[], metavar="RESULTS", help="results.json of models trained"
        " with other seeds, drawn beside these")
    add("--keep", type=Path, help="also write the models in bfloat16 into this folder")
    add("--write-shards", type=Path, metavar="FOLDER", help="only write clips as train.py reads them")
    add("--world", choices=WORLDS, default="torus", help="of --write-shards")
    add("--clips", type=positive, default=4096, help="of --write-shards (default 4096)")
    add("--copies", type=positive, default=1, help="clips of each prompt that are measured (default 1)")
    add("--seed", type=seed_value, default=0, help="0 to 2^32 - 1 (default 0)")
    add("--out", type=path_value, default=Path("out/video"))
    args = parser.parse_args(argv)
    if (args.exact_teacher or args.steps) and not args.train:
        parser.error("--exact-teacher and --steps need --train")
    shards = lambda: write_shards(WORLDS[args.world], args.write_shards, args.clips, args.seed)
    kept = "the same command goes on" if args.train or args.write_shards else "nothing is kept"
    command("toy.video", shards if args.write_shards else lambda: tell(args), kept)

if __name__ == "__main__":
    main()
