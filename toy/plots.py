"""Figures and animations of the toys. Each function takes numbers or arrays and writes one file, wholly or not."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.animation import PillowWriter  # noqa: E402
from PIL import Image  # noqa: E402  (matplotlib brings it)

from model import write  # noqa: E402

# Okabe-Ito: told apart by colour-blind readers; markers and dashes tell them apart in grey.
STYLE = {
    "teacher": dict(color="#666666", marker="s", linestyle=":", label="teacher (Euler)"),
    "consistency": dict(color="#D55E00", marker="^", linestyle="--", label="consistency"),
    "anyflow-forward": dict(color="#56B4E9", marker="v", linestyle="-.", label="AnyFlow, forward only"),
    "anyflow": dict(color="#0072B2", marker="o", linestyle="-", label="AnyFlow"),
}
plt.rcParams.update(
    {
        "figure.dpi": 110,
        "savefig.bbox": "tight",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)


def _save(figure, path):
    write(path, figure.savefig)
    plt.close(figure)


def _budget_axis(axis, nfe):
    axis.set_xscale("log", base=2)
    axis.set_xticks(nfe, [str(n) for n in nfe])
    axis.set_xlabel("network calls")
    axis.set_yscale("log")


def quality(results, path):
    """Wasserstein distance, path error and budget drift against network calls: medians, and a band over seeds."""
    nfe = results["nfe"]
    titles = {
        "swd": "quality\nsliced Wasserstein distance to the data",
        "path_error": "faithfulness\nRMS distance to the exact ODE path",
        "budget_drift": f"same noise, same sample\nmean distance to the own {nfe[-1]}-call sample",
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9))
    for axis, (key, title) in zip(axes, titles.items()):
        for name, scores in results["methods"].items():
            rows, stop = (
                np.array(scores[key]),
                len(nfe) - (key == "budget_drift"),
            )  # the last drift is zero by definition
            axis.plot(nfe[:stop], np.median(rows, 1)[:stop], markersize=5, **STYLE[name])
            axis.fill_between(
                nfe[:stop],
                rows.min(1)[:stop],
                rows.max(1)[:stop],
                color=STYLE[name]["color"],
                alpha=0.2,
                lw=0,
            )
        _budget_axis(axis, nfe)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
    axes[0].axhline(results["floor"], color="black", lw=0.8)
    axes[0].text(nfe[0], results["floor"] * 1.06, "sampling floor", fontsize=8)
    axes[0].set_ylabel("better  ←  data units")
    axes[0].legend(fontsize=8)
    seeds = len(next(iter(results["methods"].values()))["swd"][0])
    plural = "s: lines are medians, bands the range" if seeds > 1 else ""
    figure.suptitle(f"{results['density']}, {seeds} seed{plural}. Lower is better everywhere.", fontsize=11, y=1.06)
    _save(figure, path)


def trajectories(exact, states, nfe, path, budgets=(1, 2, 4, 16), count=16):
    """From the same noise: the exact ODE paths, (T, B, 2), in grey under the states that each method visits."""
    names = [name for name in ("teacher", "consistency", "anyflow") if name in states]
    figure, axes = plt.subplots(
        len(names), len(budgets), figsize=(2.7 * len(budgets), 2.75 * len(names)), squeeze=False
    )
    for row, name in zip(axes, names):
        for axis, n in zip(row, budgets):
            visited = states[name][nfe.index(n)][:, :count].numpy()
            axis.plot(exact[:, :count, 0], exact[:, :count, 1], color="black", lw=0.7, alpha=0.35)
            axis.plot(visited[..., 0], visited[..., 1], color=STYLE[name]["color"], lw=0.6, alpha=0.6)
            axis.scatter(visited[1:-1, :, 0], visited[1:-1, :, 1], s=6, color=STYLE[name]["color"])
            axis.scatter(
                exact[0, :count, 0],
                exact[0, :count, 1],
                s=9,
                facecolor="white",
                edgecolor="black",
                lw=0.6,
                zorder=3,
            )
            axis.scatter(
                visited[-1, :, 0],
                visited[-1, :, 1],
                s=16,
                color=STYLE[name]["color"],
                edgecolor="black",
                lw=0.5,
                zorder=4,
            )
            axis.scatter(
                exact[-1, :count, 0], exact[-1, :count, 1], s=22, marker="x", color="black", lw=0.8, zorder=5
            )
            _bare(axis)
            if name == names[0]:
                axis.set_title(f"{n} call{'s' * (n > 1)}")
        row[0].set_ylabel(STYLE[name]["label"], fontsize=11)
    figure.suptitle(
        "white: noise · grey line and ×: exact ODE path and its end · coloured: states visited, last the sample\n"
        "a faithful sampler's filled dots sit on the crosses",
        fontsize=9,
        y=0.99,
    )
    figure.tight_layout()
    _save(figure, path)


def sample_grid(target, samples, nfe, path, budgets=(1, 2, 4, 8, 64)):
    """Samples by method (rows) and network calls (columns), beside the data. samples: {name: [(B, 2) per nfe]}."""
    names = [name for name in STYLE if name in samples]
    figure, axes = plt.subplots(
        len(names), len(budgets) + 1, figsize=(1.85 * (len(budgets) + 1), 1.95 * len(names)), squeeze=False
    )
    limit = 1.15 * np.abs(target.numpy()).max()
    for row, name in zip(axes, names):
        for axis, n in zip(row, (*budgets, None)):
            x = target if n is None else samples[name][nfe.index(n)]
            density = np.histogram2d(*x.numpy().T, bins=64, range=[[-limit, limit]] * 2)[0]
            axis.imshow(np.sqrt(density.T), origin="lower", cmap="magma", extent=(-limit, limit, -limit, limit))
            _bare(axis, limit)
            if name == names[0]:
                axis.set_title("data" if n is None else f"{n} call{'s' * (n > 1)}", fontsize=10)
        row[0].set_ylabel(STYLE[name]["label"], fontsize=9)
    figure.tight_layout(pad=0.4)
    _save(figure, path)


def _bare(axis, limit=2.5):
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_visible(False)


def jumping(states, nfe, path, budgets=(1, 2, 4, 16), count=500, frames=30, hold=8):
    """GIF: noise jumps to data, consistency above AnyFlow, by budget; a point keeps the colour of its noise."""
    names = [name for name in ("consistency", "anyflow") if name in states] or list(states)
    figure, axes = plt.subplots(
        len(names), len(budgets), figsize=(2.1 * len(budgets), 2.2 * len(names)), squeeze=False, dpi=70
    )
    dots = {}
    for row, name in zip(axes, names):
        for axis, n in zip(row, budgets):
            z = states[name][nfe.index(n)][:, :count].numpy()
            hue = (np.arctan2(z[0, :, 1], z[0, :, 0]) / (2 * np.pi)) % 1
            dots[name, n] = axis.scatter(
                z[0, :, 0], z[0, :, 1], s=3, c=hue, cmap="twilight_shifted", vmin=0, vmax=1
            )
            _bare(axis)
            if name == names[0]:
                axis.set_title(f"{n} call{'s' * (n > 1)}", fontsize=10)
        row[0].set_ylabel(STYLE[name]["label"], fontsize=10)
    clock = figure.suptitle("", fontsize=10)
    figure.tight_layout()

    def save(part):
        writer = PillowWriter(fps=12)
        with writer.saving(figure, part, dpi=70):
            for frame in [*range(frames + 1)] + [frames] * hold:
                for (name, n), dot in dots.items():
                    z = states[name][nfe.index(n)][:, :count].numpy()
                    at = frame / frames * n
                    k = min(int(at), n - 1)
                    dot.set_offsets(z[k] + (at - k) * (z[k + 1] - z[k]))
                clock.set_text(f"t = {1 - frame / frames:.2f}   (1 = noise, 0 = data)")
                writer.grab_frame()

    write(path, save)
    plt.close(figure)


def losses(rows, names, path):
    """Losses of a run against its step, each smoothed over a fiftieth of the run. rows: [{"step", name: value}]."""
    present = [name for name in names if any(name in row for row in rows)]
    if not present:
        return
    figure, axes = plt.subplots(1, len(present), figsize=(4.2 * len(present), 3.2), squeeze=False)
    for axis, name in zip(axes[0], present):
        step, value = np.array([(row["step"], row[name]) for row in rows if name in row]).T
        width = max(1, len(step) // 50)
        smooth = np.convolve(value, np.ones(width) / width, "valid")
        axis.plot(step, value, color="#999999", lw=0.4)
        axis.plot(step[len(step) - len(smooth) :], smooth, color="#0072B2")
        axis.set(xlabel="step", title=f"loss: {names[name]}", yscale="log" if value.min() > 0 else "linear")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
    figure.tight_layout()
    _save(figure, path)


# ------------------------------------------------------------------------------------------------------------
# The video world
# ------------------------------------------------------------------------------------------------------------


def rgb(clip):
    """(..., 3, H, W) in [-2, 2], background 0 -> (..., H, W, 3) in [0, 1]."""
    return np.clip(0.5 + 0.25 * np.moveaxis(np.asarray(clip, dtype=np.float32), -3, -1), 0, 1)


def video_quality(results, path):
    """Distance to the world's nearest clip and distance of a preview, against network calls, by family."""
    nfe, families = results["nfe"], results["methods"]
    figure, axes = plt.subplots(2, len(families), figsize=(4.6 * len(families), 6.8), sharex=True, squeeze=False)
    for column, (family, methods) in zip(axes.T, families.items()):
        for method, scores in methods.items():
            column[0].plot(nfe, scores["distance"], markersize=5, **STYLE[method])
            column[1].plot(nfe[:-1], scores["preview"][:-1], markersize=5, **STYLE[method])
        column[0].set_title(f"{family}\nquality: distance to the nearest clip of the world", fontsize=10)
        column[1].set_title(f"same noise: distance to the own {nfe[-1]}-call clip", fontsize=10)
        for axis in column:
            lowest, highest = axis.dataLim.intervaly
            _budget_axis(axis, nfe)
            axis.grid(alpha=0.25)
            axis.set_ylabel("better  ←  RMS / RMS of a clip")
            axis.set_yticks([0.05, 0.1, 0.2, 0.3, 0.5, 1.0], ["0.05", "0.1", "0.2", "0.3", "0.5", "1"])
            axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            axis.set_ylim(0.8 * lowest, 1.25 * highest)
    axes[0, 0].legend(fontsize=8)
    _save(figure, path)


def chunks(results, path):
    """Exposure bias: how far causal streams drift, by chunk; and the error of I2V and V2V, by frame."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for method, row in results["drift"].items():
        axes[0].plot(range(1, len(row) + 1), row, markersize=5, **STYLE[method])
    axes[0].set(xlabel="chunk (of 1, then 2 frames; trained on 5 chunks)", ylabel="better  ←  pixels",
                title="streaming on from its own chunks, 4 calls each:\nerror of the object's centre")  # fmt: skip
    axes[0].set_xticks(range(1, len(row) + 1))
    axes[0].legend(fontsize=8)
    looks = zip(("#999999", "#E69F00", "#009E73"), "s^o")
    for (name, row), (colour, marker) in zip(results["continuation"].items(), looks):
        axes[1].plot(range(1, len(row) + 1), row, color=colour, marker=marker, markersize=5, label=name)
    axes[1].set(xlabel="frame", ylabel="better  ←  pixels",
                title="one causal model, every task, 4 calls a chunk:\nerror of the object's centre")  # fmt: skip
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
    figure.tight_layout()
    _save(figure, path)


def clips_by_budget(clips, nfe, prompt, path):
    """GIF: methods by rows, calls by columns, all from one noise. clips: {method: [(F, 3, H, W) per NFE]}."""
    rows = {STYLE[method]["label"].replace(", ", ",\n").replace(" (", "\n("): row for method, row in clips.items()}
    _grid_gif(rows, [f"{n} call{'s' * (n > 1)}" for n in nfe], f"“{prompt}”, same noise everywhere", path)


def tasks(tasks, prompt, path):
    """GIF: a causal model continues what it is given, beside the truth. tasks: {name: (clip, true clip, given)}."""
    rows = {
        "model\n(4 calls)": [clip for clip, _, _ in tasks.values()],
        "truth": [true if n else None for _, true, n in tasks.values()],
    }
    _grid_gif(rows, [*tasks], f"“{prompt}”", path, [n for _, _, n in tasks.values()])


def _grid_gif(rows, columns, title, path, given=None, fps=4):
    """GIF of a grid of clips, {row: [(F, 3, H, W) or None per column]}. given: input frames of each column."""
    size = 1.25 * len(columns) + 1, 1.3 * len(rows) + 0.8
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, layout="constrained")
    images = []
    for axis, column in zip(axes[0], columns):
        axis.set_title(column + ("\n" if given else ""), fontsize=8)
    for line, (name, clips) in zip(axes, rows.items()):
        for axis, clip in zip(line, clips):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if clip is not None:
                images.append((axis.imshow(rgb(clip[0]), interpolation="nearest"), rgb(clip)))
        line[0].set_ylabel(name, fontsize=8)
    clock = figure.suptitle(" ", fontsize=9)
    frames = len(images[0][1])
    figure.canvas.draw()
    figure.set_layout_engine("none")  # once for all frames

    def save(part):
        writer = PillowWriter(fps=fps)
        with writer.saving(figure, part, dpi=80):
            for f in range(frames):
                for image, clip in images:
                    image.set_data(clip[f])
                clock.set_text(f"{title}, frame {f + 1} of {frames}")
                for axis, n, column in zip(axes[0], given or [], columns):
                    axis.set_title(f"{column}\n{'given' if f < n else 'made'}", fontsize=8)
                writer.grab_frame()

    write(path, save)
    plt.close(figure)


def enlarge(clips, times=12):
    """Clips (B, F, 3, H, W) side by side, every pixel a square: uint8 (F, times H, B times W, 3)."""
    frames = np.concatenate(list(rgb(clips)), axis=2)
    return (255 * frames).round().astype(np.uint8).repeat(times, 1).repeat(times, 2)


def write_gif(frames, path, fps=4):
    """uint8 (F, H, W, 3) as an endless GIF."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=others, duration=1000 // fps, loop=0)


def contact_sheet(frames, path, most=9):
    """PNG: up to `most` of the frames uint8 (F, H, W, 3), evenly spread, in a row."""
    picked = np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int))
    width = 1.1 * frames.shape[2] / frames.shape[1]
    figure, axes = plt.subplots(1, len(picked), figsize=(width * len(picked), 1.25), squeeze=False)
    for axis, f in zip(axes[0], picked):
        axis.imshow(frames[f], interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_title(f"frame {f + 1}", fontsize=8)
    figure.tight_layout(pad=0.3)
    _save(figure, path)
