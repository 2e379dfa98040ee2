"""The pictures of runs: loss, update size by role, and each expert's load."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from pretraining.folder import read_metrics


def series(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Return the tokens and values at which a key was written."""
    points = [(row["tokens"], row[key]) for row in rows if key in row]
    return [x for x, _ in points], [y for _, y in points]


def draw(runs: list[Path], out: Path) -> list[Path]:
    """Write loss.png for all runs, and update_rms.png for the first."""
    unique = len({run.name for run in runs}) == len(runs)
    names = [run.name if unique else str(run) for run in runs]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, run in enumerate(runs):
        rows, color = read_metrics(run), f"C{number}"
        axes.plot(*series(rows, "train/loss"), color=color, alpha=0.3, lw=0.8)
        axes.plot(*series(rows, "val/loss"), color=color, marker="o", ms=3, label=names[number])
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title="validation (marked) and training (faint) loss")
    axes.legend()
    axes.grid(alpha=0.3)
    paths = [out / "loss.png", out / "update_rms.png"]
    figure.savefig(paths[0], dpi=130)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rows = read_metrics(runs[0])
    for key in sorted({key for row in rows for key in row if key.startswith("update_rms/")}):
        axes.plot(*series(rows, key), label=key.removeprefix("update_rms/"))
    axes.set(
        xlabel="tokens", ylabel="RMS of one step's update", yscale="log", title=f"update size by role, {runs[0].name}"
    )
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(paths[1], dpi=130)
    if loads := [row["router/load"] for row in rows if "router/load" in row]:
        paths.append(out / "expert_load.png")
        draw_load(np.array(loads), [row["tokens"] for row in rows if "router/load" in row], runs[0].name, paths[-1])
    plt.close("all")
    return paths


def draw_load(loads: np.ndarray, tokens: list[int], name: str, path: Path) -> None:
    """Draw each layer's expert load over the run, over the uniform share.  Shapes: (points, layers, experts)."""
    layers, experts = loads.shape[1:]
    half = (tokens[-1] - tokens[0]) / max(1, len(tokens) - 1) / 2 or 0.5  # a column's middle is at its tokens
    size = (7, 1 + 1.2 * layers)
    figure, panels = plt.subplots(layers, 1, figsize=size, sharex=True, layout="constrained", squeeze=False)
    for layer, axes in enumerate(panels[:, 0]):
        image = axes.imshow(
            loads[:, layer].T * experts,
            aspect="auto",
            interpolation="nearest",
            vmin=0,
            vmax=3,
            extent=(tokens[0] - half, tokens[-1] + half, experts - 0.5, -0.5),
        )
        axes.set(ylabel=f"layer {layer}")
    panels[-1, 0].set(xlabel="tokens")
    figure.colorbar(image, ax=panels, label="load / uniform share")
    figure.suptitle(f"load of each expert, {name}")
    figure.savefig(path, dpi=130)
