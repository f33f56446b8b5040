"""What the toys show: tables, claims, figures and animations. A file is written wholly or not at all."""

import statistics

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import PillowWriter

from full.files import write
from toy.world import rgb

# Okabe-Ito: told apart by colour-blind readers; markers and dashes tell them apart in grey.
STYLE = {
    "teacher": dict(color="#009E73", marker="s", linestyle=":", label="teacher (Euler)"),
    "teacher-heun": dict(color="#009E73", marker="x", linestyle="-.", label="teacher (Heun)"),
    "consistency": dict(color="#D55E00", marker="^", linestyle="--", label="consistency"),
    "anyflow-forward": dict(color="#56B4E9", marker="v", linestyle="-.", label="AnyFlow, stage 1"),
    "anyflow-control": dict(color="#666666", marker="d", linestyle="-.", label="control: stage 1, longer"),
    "anyflow": dict(color="#0072B2", marker="o", linestyle="-", label="AnyFlow, stage 2"),
    "anyflow-gamma": dict(color="#CC79A7", marker="P", linestyle="--", label="stage 2, gamma = 2 / calls"),
}
plt.switch_backend("Agg")
plt.rcParams.update({"figure.dpi": 110, "savefig.bbox": "tight", "font.size": 10, "axes.spines.top": False,
                     "axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 10})

def table(title, columns, rows, digits=3, width=8, corner="network calls"):
    """Rows {name: values} under columns, as text; a value that is text stays as it is."""
    cell = lambda value: f"{value:.{digits}f}" if isinstance(value, float) else str(value)
    line = lambda name, values: f"{name:32}" + "".join(f"{cell(value):>{width}}" for value in values)
    return "\n".join([title, line(corner, columns), *(line(*row) for row in rows.items())])

class Claims:
    """Claims decided by numbers: [{"claim", "holds", "figures"}] in `rows`."""

    def __init__(self, nfe, digits):
        self.nfe, self.digits, self.rows = nfe, digits, []

    def add(self, claim, holds, *figures):
        """figures: a text, or one list of a number per NFE, or several to compare."""
        if not isinstance(figures[0], str):
            show = lambda numbers: " / ".join(f"{x:.{self.digits}f}" for x in numbers)
            figures = [", ".join(f"{n}: {show(numbers)}" for n, numbers in zip(self.nfe, zip(*figures)))]
        self.rows.append({"claim": claim, "holds": bool(holds), "figures": figures[0]})

def print_claims(claims):
    for claim in claims:
        print(f"[{'holds' if claim['holds'] else 'DOES NOT HOLD'}] {claim['claim']}\n    {claim['figures']}")

def _save(figure, path):
    write(path, figure.savefig)
    plt.close(figure)

def _animate(figure, path, frames, draw, fps, dpi):
    """GIF: draw(frame) for each of the frames."""
    def save(part):
        writer = PillowWriter(fps=fps)
        with writer.saving(figure, part, dpi=dpi):
            for frame in frames:
                draw(frame)
                writer.grab_frame()

    write(path, save)
    plt.close(figure)

def _budget_axis(axis, nfe):
    axis.set_xscale("log", base=2)
    axis.set_xticks(nfe, [str(n) for n in nfe])
    axis.set(xlabel="network calls", yscale="log")
    axis.grid(alpha=0.25)

def _count(n, noun="call"):
    return f"{n} {noun}{'s' * (n > 1)}"

def _bare(axis):
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return axis

def _grid(names, titles, size, limit=2.5, **options):
    """A figure with a row of bare axes for each method, titles over its columns; the axes [name][column]."""
    size = size[0] * len(titles), size[1] * len(names)
    figure, axes = plt.subplots(len(names), len(titles), figsize=size, squeeze=False, **options)
    for row, name in zip(axes, names):
        row[0].set_ylabel(STYLE[name]["label"])
        for axis, title in zip(row, titles):
            _bare(axis).set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
            axis.set_title(title if name == names[0] else "")
    return figure, dict(zip(names, axes))

def medians(results):
    """{method: {measure: [median over seeds, per NFE]}}"""
    of_nfe = lambda rows: [statistics.median(row) for row in rows]
    return {name: {key: of_nfe(rows) for key, rows in scores.items() if key != "train_seconds"}
            for name, scores in results["methods"].items()}

def distances(results):
    """Sliced Wasserstein distance by method and NFE, median over seeds, as text."""
    rows = {STYLE[name]["label"]: [*scores["swd"], f"{results['methods'][name]['train_seconds']:.0f} s"]
            for name, scores in medians(results).items()}
    title = (f"sliced Wasserstein distance, lower is better; sampling floor {results['floor']:.4f}, without"
             f" fresh noise {results['floor_ode']:.4f}; the teacher's own ODE {results['floor_teacher']:.4f}")
    text, best = table(title, [*results["nfe"], "train"], rows, digits=4), results["best_times"]
    if not best:
        return text
    calls = [*next(iter(best.values()))[0]]
    rows = {STYLE[name]["label"]: [statistics.median(row[n] for row in seeds) for n in calls]
            for name, seeds in best.items()}
    return f"{text}\n\n{table('at the times of anyflow.best_grid', calls, rows, digits=4)}"

def decide(results):
    """The claims of the 2-D toy, decided by the medians over seeds: [{"claim", "holds", "figures"}]."""
    nfe, scores = results["nfe"], medians(results)
    at = {n: i for i, n in enumerate(nfe)}
    claims = Claims(nfe, digits=4)

    def claim(text, holds, *names, key="swd"):
        """Decided by holds(*numbers per NFE of these methods), if all were measured."""
        if all(name in scores for name in names):
            numbers = [scores[name][key] for name in names]
            claims.add(text, holds(*numbers), *numbers)

    claim("the Euler teacher needs many calls: 4 calls are at least 3 times worse than 64",
          lambda a: a[at[4]] >= 3 * a[-1], "teacher")
    claim("consistency gets worse with more calls: 64 calls are worse than 1.5 times its best",
          lambda a: a[-1] > 1.5 * min(a), "consistency")
    claim("AnyFlow is any-step: no budget is worse than 1.1 times the best of the smaller ones",
          lambda a: all(a[i] <= 1.1 * min(a[:i]) for i in range(1, len(nfe))), "anyflow")
    for name, other in (("its teacher, by Euler's method,", "teacher"), ("consistency", "consistency"),
                        ("its teacher, by Heun's method,", "teacher-heun")):
        claim(f"AnyFlow is better than {name} at every number of calls",
              lambda a, b: all(x < y for x, y in zip(a, b)), "anyflow", other)
    for text, other in (("on-policy training", "anyflow-forward"),
                        ("DMD, against as many steps without it,", "anyflow-control")):
        claim(f"{text} improves 1 and 2 calls by 15 % and costs no other more than 10 %",
              lambda a, b: all(x <= (0.85 if n <= 2 else 1.1) * y for n, x, y in zip(nfe, a, b)),
              "anyflow", other)
    claim("AnyFlow follows the ODE path at 8 calls: a tenth of consistency's distance to it",
          lambda a, b: a[at[8]] <= b[at[8]] / 10, "anyflow", "consistency", key="path_error")
    claim("AnyFlow shows at 4 calls what 64 will give: a fifth of consistency's drift",
          lambda a, b: a[at[4]] <= b[at[4]] / 5, "anyflow", "consistency", key="budget_drift")
    for text, other, least in (("consistency at every number of", "consistency", 1),
                               ("gamma 0 from 4", "anyflow", 4)):
        claim(f"AnyFlow with gamma is better than {text} calls, or level (5 %)",
              lambda a, b: all(x <= 1.05 * y for n, x, y in zip(nfe, a, b) if n >= least),
              "anyflow-gamma", other)
    return claims.rows

def quality(results, path):
    """Wasserstein distance, path error and drift against network calls: medians, and a band over seeds."""
    nfe, methods = results["nfe"], results["methods"]
    titles = {"swd": "quality\nsliced Wasserstein distance to the data",
              "path_error": "faithfulness\nRMS distance to the exact ODE path",
              "budget_drift": f"same noise, same sample\nmean distance to the own {nfe[-1]}-call sample"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9))
    for axis, (key, title) in zip(axes, titles.items()):
        some = slice(len(nfe) - (key == "budget_drift"))  # the last drift is zero by definition
        for name, scores in methods.items():
            y = np.array(scores[key])[some]
            axis.plot(nfe[some], np.median(y, 1), markersize=5, **STYLE[name])
            axis.fill_between(nfe[some], y.min(1), y.max(1), color=STYLE[name]["color"], alpha=0.2, lw=0)
        _budget_axis(axis, nfe)
        axis.set_title(title)
    for key, name in (("floor", f"sampling floor ({results['floor_ode']:.4f} without fresh noise)"),
                      ("floor_teacher", "the teacher's ODE, followed exactly")):
        axes[0].axhline(results[key], color="black", lw=0.8)
        axes[0].text(nfe[0], 0.95 * results[key], name, fontsize=8, va="top")
    axes[0].set_ylim(bottom=0.7 * results["floor"])
    axes[0].set_ylabel("better  ←  data units")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, ncols=7, loc="upper center",
                  bbox_to_anchor=(0.5, -0.02))
    seeds = _count(len(next(iter(methods.values()))["swd"][0]), "seed")
    bands = ": lines are medians, bands the range" if seeds != "1 seed" else ""
    figure.suptitle(f"{results['density']}, {seeds}{bands}. Lower is better.", fontsize=11, y=1.06)
    _save(figure, path)

def gammas(gammas, nfe, scores, path):
    """Distance against gamma, a line for each number of calls. scores: (seeds, gammas, NFE)."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(nfe)))
    axis.set_prop_cycle(color=colours, marker=[*"os^vDP"[: len(nfe)]])
    axis.plot([f"{g:.2g}" for g in gammas], np.median(scores, 0), markersize=5, label=[*map(_count, nfe)])
    axis.set(yscale="log", ylabel="better  ←  sliced Wasserstein distance, data units",
             xlabel="gamma: 0 stays on the ODE path, 1 returns to fresh noise after each jump")
    axis.yaxis.set(major_formatter="{x:.3f}", minor_formatter="{x:.3f}")
    axis.set_title(f"AnyFlow, stage 2, median of {_count(len(scores), 'seed')}")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    _save(figure, path)

def trajectories(exact, states, nfe, path, budgets=(1, 2, 4, 16), count=16):
    """From one noise: exact ODE paths (T, B, 2) in grey under the states that each method visits."""
    names = [name for name in ("teacher", "consistency", "anyflow") if name in states]
    figure, axes = _grid(names, [_count(n) for n in budgets], (2.7, 2.75))
    exact = exact[:, :count].numpy()
    for name in names:
        own = dict(color=STYLE[name]["color"])
        for axis, n in zip(axes[name], budgets):
            z = states[name][nfe.index(n)][:, :count].numpy()
            axis.plot(*np.moveaxis(exact, 2, 0), color="black", lw=0.7, alpha=0.35)
            axis.plot(*np.moveaxis(z, 2, 0), lw=0.6, alpha=0.6, **own)
            axis.scatter(*np.moveaxis(z[1:-1], 2, 0), s=6, **own)
            axis.scatter(*exact[0].T, s=9, facecolor="white", edgecolor="black", lw=0.6, zorder=3)
            axis.scatter(*z[-1].T, s=16, edgecolor="black", lw=0.5, zorder=4, **own)
            axis.scatter(*exact[-1].T, s=22, marker="x", color="black", lw=0.8, zorder=5)
    legend = ("white: noise · grey line and ×: exact ODE path and its end · coloured: states visited, last"
              " the sample\na faithful sampler's filled dots sit on the crosses")
    figure.suptitle(legend, fontsize=9, y=0.99)
    figure.tight_layout()
    _save(figure, path)

def sample_grid(target, samples, nfe, path, budgets=(1, 2, 4, 8, 64)):
    """Density of samples {name: [(B, 2) per nfe]} by method (rows) and calls (columns), beside the data's:
    of as many points in every panel, on one scale."""
    names = [name for name in STYLE if name in samples and name not in ("teacher-heun", "anyflow-control")]
    limit, count = 1.15 * target.abs().max().item(), len(target)
    root = lambda cloud: np.sqrt(np.histogram2d(*cloud[:count].numpy().T, 64, [[-limit, limit]] * 2)[0].T)
    figure, axes = _grid(names, [*map(_count, budgets), "data"], (1.85, 1.95), limit)
    look = dict(origin="lower", cmap="magma", extent=2 * (-limit, limit), clim=(0, 1.2 * root(target).max()))
    for name in names:
        for axis, cloud in zip(axes[name], [samples[name][nfe.index(n)] for n in budgets] + [target]):
            axis.imshow(root(cloud), **look)
    figure.suptitle("the brighter, the more samples; one scale for all", fontsize=10, y=1.01)
    figure.tight_layout(pad=0.4)
    _save(figure, path)

def jumping(states, nfe, path, budgets=(1, 2, 4, 16), count=500, frames=30, hold=8):
    """GIF: noise jumps to data, consistency above AnyFlow, by budget; points keep their colour."""
    names = [name for name in ("consistency", "anyflow") if name in states] or list(states)
    figure, axes = _grid(names, [_count(n) for n in budgets], (2.1, 2.2), dpi=70)
    dots = []
    for name in names:
        for axis, n in zip(axes[name], budgets):
            z = states[name][nfe.index(n)][:, :count].numpy()
            hue = (np.arctan2(z[0, :, 1], z[0, :, 0]) / (2 * np.pi)) % 1
            dots.append((axis.scatter(*z[0].T, s=3, c=hue, cmap="twilight_shifted", vmin=0, vmax=1), z, n))
    clock = figure.suptitle("", fontsize=10)
    figure.tight_layout()

    def draw(frame):
        for dot, z, n in dots:
            jumps = frame / frames * n
            k = min(int(jumps), n - 1)
            dot.set_offsets(z[k] + (jumps - k) * (z[k + 1] - z[k]))
        clock.set_text(f"t = {1 - frame / frames:.2f}   (1 = noise, 0 = data)")

    _animate(figure, path, [*range(frames + 1)] + [frames] * hold, draw, fps=12, dpi=70)

def losses(rows, names, path):
    """Losses of a run, rows [{"step", name: value}], each with its mean over a fiftieth of the run."""
    present = [name for name in names if any(name in row for row in rows)]
    figure, axes = plt.subplots(1, max(1, len(present)), figsize=(4.2 * len(present) + 1, 3.2), squeeze=False)
    for axis, name in zip(axes[0], present):
        step, value = np.array([(row["step"], row[name]) for row in rows if name in row]).T
        width = max(1, len(step) // 50)
        smooth = np.convolve(value, np.ones(width) / width, "valid")
        axis.plot(step, value, color="#999999", lw=0.4, label="a step")
        middle = step[width // 2 :][: len(smooth)]
        axis.plot(middle, smooth, color="#0072B2", label=f"mean of {width}" if width > 1 else None)
        axis.set(xlabel="step", title=f"{name}: {names[name]}", yscale="log" if value.min() > 0 else "linear")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.25)
    figure.tight_layout()
    _save(figure, path)


# ---- The video world -------------------------------------------------------------------------------------

def video_quality(results, also, path):
    """Distance to the world's nearest clip, distance of a preview and share of stars, against network calls,
    by family; pale, the results `also` of other training runs."""
    nfe, families = results["nfe"], results["methods"]
    count = 3 if results["stars"] else 2
    size = 4.6 * len(families), 3.4 * count
    figure, axes = plt.subplots(count, len(families), figsize=size, sharex=True, squeeze=False)
    for column, (family, methods) in zip(axes.T, families.items()):
        runs = [(methods, {}), *((other["methods"][family], dict(alpha=0.35, label=None)) for other in also)]
        keys = dict(zip(("distance", "preview", "star rate"), column))
        for key, axis in keys.items():
            some = slice(len(nfe) - (key == "preview"))  # the last is zero by definition
            for of_run, look in runs:
                for method, scores in of_run.items():
                    if key in scores:  # of a world with stars
                        axis.plot(nfe[some], scores[key][some], markersize=5, **STYLE[method] | look)
        column[0].set_title(f"{family}\nquality: distance to the nearest clip of the world")
        column[1].set_title(f"same noise: distance to the own {nfe[-1]}-call clip")
        for axis in column[:2]:
            lowest, highest = axis.dataLim.intervaly
            _budget_axis(axis, nfe)
            axis.set_yticks([0.05, 0.1, 0.2, 0.3, 0.5, 1.0], ["0.05", "0.1", "0.2", "0.3", "0.5", "1"])
            axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            size = "the object" if axis is column[0] else "a clip"
            axis.set(ylabel=f"better  ←  RMS / RMS of {size}", ylim=(0.8 * lowest, 1.25 * highest))
        for axis in column[2:]:
            axis.axhline(results["stars"], color="black", lw=0.8)
            _budget_axis(axis, nfe)
            axis.set(yscale="linear", ylabel="share of stars", title="fine detail: stars (line: the truth)")
        for axis in column[:-1]:
            axis.set_xlabel("")
    axes[0, 0].legend(fontsize=8)
    if also:
        figure.suptitle("pale: another training run", fontsize=10, y=0.93)
    _save(figure, path)

def path_error(results, away, grid, path, budgets=(1, 4, 32)):
    """Distance to the exact path against network calls, and, for some budgets, along the way.

    away: {method: [[distance at each visited time] per NFE]}; grid: the times of the largest NFE.
    """
    nfe, methods = results["nfe"], results["methods"]["bidirectional"]
    size = 3.3 * (1 + len(budgets)), 3.6
    figure, (calls, *ways) = plt.subplots(1, 1 + len(budgets), figsize=size, sharey=True)
    for method, rows in away.items():
        calls.plot(nfe, methods[method]["path_error"], markersize=5, **STYLE[method])
        for axis, n in zip(ways, budgets):
            axis.plot(grid[:: nfe[-1] // n], rows[nfe.index(n)], markersize=4, **STYLE[method])
    _budget_axis(calls, nfe)
    calls.set(title="distance to the exact path,\nRMS over the states visited", yscale="linear",
              ylabel="better  ←  RMS / RMS of a clip", ylim=(0, None))
    calls.legend(fontsize=8)
    for axis, n in zip(ways, budgets):
        axis.set(xlim=(1.02, -0.02), xlabel="t  (1 = noise, 0 = clip)", title=f"along the way, {_count(n)}")
        axis.grid(alpha=0.25)
    figure.tight_layout()
    _save(figure, path)

def paths(exact, states, grid, nfe, prompt, path, budgets=(1, 4, 32), frame=4, steps=36, hold=12):
    """GIF: one noise on its exact way, exact (T, 1, F, 3, H, W) at the times grid, and on each method's way.

    states: {method: [(n + 1, 1, F, 3, H, W) per NFE]}. A picture changes when its method calls the network.
    """
    names = [name for name in ("teacher", "consistency", "anyflow") if name in states]
    figure = plt.figure(figsize=(2.6 + 1.5 * len(budgets), 1.75 * len(names) + 0.9))
    cells = figure.add_gridspec(len(names), len(budgets) + 2, width_ratios=[1.9, 0.3, *[1] * len(budgets)],
                                left=0.01, right=0.99, bottom=0.05, top=0.87, wspace=0.12, hspace=0.28)

    show = lambda axis, z: axis.imshow(rgb(z[0, frame]), interpolation="nearest")
    left = _bare(figure.add_subplot(cells[:, 0]))
    left.set_title("the exact path", fontsize=10)
    truth, size = show(left, exact[0]), exact[-1].square().mean().sqrt()
    pictures = []
    for i, name in enumerate(names):
        for j, n in enumerate(budgets):
            axis = _bare(figure.add_subplot(cells[i, 2 + j]))
            axis.set_title(_count(n) if i == 0 else "", fontsize=10)
            if j == 0:
                axis.set_ylabel(STYLE[name]["label"].replace(" (", "\n("), fontsize=9)
            z = states[name][nfe.index(n)]
            pictures.append((show(axis, z[0]), axis, z))
    clock = figure.suptitle("", fontsize=9.5)

    def draw(step):
        t = 1 - step / steps
        k = sum(time >= t - 1e-9 for time in grid) - 1
        truth.set_data(rgb(exact[k][0, frame]))
        for picture, axis, z in pictures:
            jump = (len(exact) - 1) // (len(z) - 1)
            i = k // jump  # the last state that the method has visited
            picture.set_data(rgb(z[i][0, frame]))
            off = ((z[i] - exact[i * jump]).square().mean().sqrt() / size).item()
            axis.set_xlabel(f"off by {off:.0%}" if i else "waits at the noise", fontsize=8,
                            color="#666666" if i == 0 else "#009E73" if off < 0.25 else "#D55E00")
        clock.set_text(f"One noise becomes “{prompt}”; frame {frame + 1} of the video.   t = {t:.2f}\n"
                       "A faithful method shows the picture on the left after each of its network calls.")

    _animate(figure, path, [*range(steps + 1)] + [steps] * hold, draw, fps=6, dpi=80)

def chunks(results, path):
    """Exposure bias: how far causal streams drift, by chunk; and the error of I2V and V2V, by frame."""
    figure, (drift, tasks) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for method, row in results["drift"].items():
        drift.plot(range(1, len(row) + 1), row, markersize=5, **STYLE[method])
    drift.set(xlabel="chunk (of 1, then 2 frames; trained on 5 chunks)", xticks=range(1, len(row) + 1),
              title="streaming on from its own chunks, 4 calls each:\nerror of the object's centre")
    looks = zip(("#999999", "#E69F00", "#CC79A7"), "s^o")
    for (name, row), (colour, marker) in zip(results["continuation"].items(), looks):
        name = name if ":" in name else f"{name}: from its own first frame"  # which is all its truth
        tasks.plot(range(1, len(row) + 1), row, color=colour, marker=marker, markersize=5, label=name)
    title = "one causal model, every task, 4 calls a chunk:\nerror of the object's centre"
    tasks.set(xlabel="frame", title=title)
    for axis in (drift, tasks):
        axis.set(ylabel="better  ←  pixels", ylim=(0, 1.25 * axis.get_ylim()[1]))
        axis.legend(fontsize=8, loc="upper left", ncols=2)
        axis.grid(alpha=0.25)
    figure.tight_layout()
    _save(figure, path)

def clips_by_budget(clips, nfe, prompt, path):
    """GIF: methods by rows, calls by columns, all from one noise. clips: {method: [(F, 3, H, W) per NFE]}."""
    rows = {STYLE[key]["label"].replace(", ", ",\n").replace(" (", "\n("): row for key, row in clips.items()}
    _clips_gif(rows, [_count(n) for n in nfe], f"“{prompt}”, same noise everywhere", path)

def tasks(tasks, prompt, path):
    """GIF: a causal model continues what it is given. tasks: {name: (clip, true clip, given)}."""
    rows = {"model\n(4 calls)": [clip for clip, _, _ in tasks.values()],
            "truth": [true if n else None for _, true, n in tasks.values()]}
    _clips_gif(rows, [*tasks], f"“{prompt}”", path, [n for _, _, n in tasks.values()])

def _clips_gif(rows, columns, title, path, given=None):
    """GIF of clips {row: [(F, 3, H, W) or None per column]}. given: input frames of each column."""
    size = 1.25 * len(columns) + 1, 1.3 * len(rows) + 0.8
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, layout="constrained")
    images = []
    for line, (name, clips) in zip(axes, rows.items()):
        for axis, clip in zip(line, clips):
            _bare(axis)
            if clip is not None:
                images.append((axis.imshow(rgb(clip[0]), interpolation="nearest"), rgb(clip)))
        line[0].set_ylabel(name, fontsize=8)
    for axis, column in zip(axes[0], columns):
        axis.set_title(column + ("\n" if given else ""), fontsize=8)
    clock = figure.suptitle(" ", fontsize=9)
    frames = len(images[0][1])
    figure.canvas.draw()
    figure.set_layout_engine("none")  # once for all frames

    def draw(f):
        for image, clip in images:
            image.set_data(clip[f])
        clock.set_text(f"{title}, frame {f + 1} of {frames}")
        for axis, n, column in zip(axes[0], given or [], columns):
            axis.set_title(f"{column}\n{'given' if f < n else 'made'}", fontsize=8)

    _animate(figure, path, range(frames), draw, fps=4, dpi=80)
