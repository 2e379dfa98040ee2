"""The pictures of a comparison."""

from pathlib import Path
from typing import Any

import matplotlib

from evidence.tables import OURS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def draw_curves(runs: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw each arm's mean validation loss with the band of its seeds; the first fifth is left out."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for number, arm in enumerate(dict.fromkeys(run["arm"] for run in runs)):
        own = [run for run in runs if run["arm"] == arm]
        tokens, losses = np.array(own[0]["tokens"]), np.array([run["loss"] for run in own])
        shown = tokens >= tokens[-1] / 5
        color, width = ("black", 2.5) if arm == OURS else (f"C{number}", 1.5)
        axes.plot(tokens[shown], losses.mean(0)[shown], color=color, lw=width, label=f"{arm} ({len(own)} seeds)")
        axes.fill_between(tokens[shown], losses.min(0)[shown], losses.max(0)[shown], color=color, alpha=0.2, lw=0)
    axes.set(xlabel="tokens", ylabel="validation loss (nats a token)", title=f"{title}: mean and range over seeds")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_sensitivity(trials: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw each arm's final loss against the factor on all of its rates."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for number, arm in enumerate(dict.fromkeys(trial["arm"] for trial in trials)):
        points = sorted((trial["factor"], trial["loss"][-1]) for trial in trials if trial["arm"] == arm)
        axes.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", label=arm)
    factors = sorted({trial["factor"] for trial in trials})
    axes.set(xscale="log", xlabel="factor on all rates of the arm", ylabel="final validation loss")
    axes.set_title(f"{title}: trials, one seed that is not reported")
    axes.set_xticks(factors, labels=[f"{factor:g}" for factor in factors])
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_effects(effects: dict[str, float], error: float, title: str, path: Path) -> None:
    """Draw the effect of each dial, largest first, with the band of the error."""
    ordered = sorted(effects.items(), key=lambda pair: abs(pair[1]))
    figure, axes = plt.subplots(figsize=(7.5, 1 + 0.3 * len(ordered)), layout="constrained")
    axes.barh([name for name, _ in ordered], [effect for _, effect in ordered], color="C0")
    if np.isfinite(error):
        axes.axvspan(-error, error, color="black", alpha=0.15, lw=0, label="error")
        axes.legend(loc="lower right")
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlabel="final loss at the high value minus at the low one", title=title)
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=130)
    plt.close(figure)
