"""The default's advantage over each other arm as a function of the model's size, over the rungs of a ladder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from pretraining.config import read
from pretraining.models import build_model
from scipy import stats

import symlm
from evidence.tables import OURS, complete

BENCHES = Path(__file__).parents[1] / "configs" / "bench"


@dataclass(frozen=True)
class Point:
    """What an arm ends above the default on one rung: mean and error over paired seeds, NaN for one seed."""

    arm: str
    rung: str
    parameters: int
    mean: float
    error: float
    seeds: int

    @property
    def half(self) -> float:
        """Half of the 95 % interval (Student's t)."""
        return self.error * float(stats.t.ppf(0.975, self.seeds - 1)) if self.seeds > 1 else float("nan")


def parameters_of(bench: Path) -> int:
    """Count the parameters of a bench's model that a token uses: of an expert layer those of the experts it takes."""
    given = read([f"--config={bench}"])
    with torch.device("meta"):
        model = build_model(given.model.preset, given.model.config, given.model.sizes, given.data.vocab_size, 0)
    roles, config = symlm.assign_roles(model), model.config
    taken = getattr(config, "num_experts_per_tok", None) or 1
    of = next((getattr(config, key) for key in ("num_experts", "num_local_experts") if getattr(config, key, None)), 1)
    return sum(
        p.numel() * taken // of if str(roles[name]).startswith("expert") else p.numel()
        for name, p in model.named_parameters()
    )


def points_of(comparison: dict[str, Any], parameters: dict[str, int]) -> list[Point]:
    """Return every arm's point of a comparison's models, whose parameters are given by name."""
    points = []
    for model, count in parameters.items():
        ends: dict[str, dict[int, float]] = {}
        for run in complete([run for run in comparison["runs"] if run["model"] == model and not run["trial"]]):
            ends.setdefault(run["arm"], {})[run["seed"]] = run["loss"][-1]
        for arm in (arm for arm in ends if arm != OURS and OURS in ends):
            paired = [ends[arm][seed] - ends[OURS][seed] for seed in ends[arm] if seed in ends[OURS]]
            if paired:
                error = float(stats.sem(paired)) if len(paired) > 1 else float("nan")
                rung = f"{comparison['bench']}, {model}"
                points.append(Point(arm, rung, count, float(np.mean(paired)), error, len(paired)))
    return points


def exponent(points: list[Point]) -> tuple[float, float, float]:
    """Fit `advantage = c·N^b` to one arm's points, weighted by their errors.

    Args:
        points: one arm's points on two rungs or more, all of positive advantage.

    Returns:
        b, half of its 95 % interval as the points' errors give it (NaN if one has none), and c.

    Raises:
        ValueError: There is one size, or an advantage is not positive: it has no power law.
    """
    if len({point.parameters for point in points}) < 2 or min(point.mean for point in points) <= 0:
        raise ValueError("an exponent needs two sizes, and an advantage that is positive on all")
    x, y = (np.log([getattr(point, key) for point in points]) for key in ("parameters", "mean"))
    errors = np.array([point.error / point.mean for point in points]).clip(min=1e-9)  # of y, to first order
    known = bool(np.isfinite(errors).all())
    weights = errors**-2.0 if known else np.ones_like(x)
    center = np.average(x, weights=weights)
    spread = float((weights * (x - center) ** 2).sum())
    b = float((weights * (x - center) * y).sum()) / spread
    half = float(stats.norm.ppf(0.975)) / spread**0.5 if known else float("nan")
    return b, half, float(np.exp(np.average(y, weights=weights) - b * center))


def trend(points: list[Point]) -> str:
    """Return one arm's exponent with its interval, and what it says in words."""
    try:
        b, half, _ = exponent(points)
    except ValueError as error:
        return f"no exponent: {error}"
    if np.isnan(half):
        return f"N^{b:.2f}, without an interval: one seed"
    words = "shrinks with size" if b + half < 0 else "grows with size" if b - half > 0 else "level within the interval"
    return f"N^({b:.2f} ± {half:.2f}): {words}"


def draw(files: list[Path], out: Path) -> list[Path]:
    """Write advantage.png and advantage.md of several results.json, one a rung or more; return the paths."""
    points = []
    for comparison in (json.loads(file.read_text()) for file in files):
        models = dict.fromkeys(run["model"] for run in comparison["runs"])
        sizes = {model: parameters_of(BENCHES / f"{comparison['bench']}-{model}.yaml") for model in models}
        points += points_of(comparison, sizes)
    by_arm = {arm: [point for point in points if point.arm == arm] for arm in dict.fromkeys(p.arm for p in points)}
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for number, (arm, own) in enumerate(by_arm.items()):
        own.sort(key=lambda point: point.parameters)
        draw_arm(axes, arm, own, f"C{number}")
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xscale="log", xlabel="parameters that a token uses", ylabel=f"final loss minus {OURS}'s (nats)")
    axes.set_title(f"advantage of {OURS}: mean and 95 % interval over paired seeds")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    picture, page = out / "advantage.png", out / "advantage.md"
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    page.write_text(text(by_arm))
    return [picture, page]


def draw_arm(axes: Any, arm: str, own: list[Point], color: str) -> None:
    """Draw one arm's points, and the law through them where there is one."""
    sizes, halves = [point.parameters for point in own], np.nan_to_num([point.half for point in own])
    means = [point.mean for point in own]
    axes.errorbar(sizes, means, halves, color=color, marker="o", ls="none", capsize=3, label=f"{arm}: {trend(own)}")
    if len(set(sizes)) > 1 and min(means) > 0:
        b, _, c = exponent(own)
        between = np.geomspace(min(sizes), max(sizes), 50)
        axes.plot(between, c * between**b, color=color, lw=1)


def text(by_arm: dict[str, list[Point]]) -> str:
    """Return the points and exponents as Markdown."""
    lines = [
        {
            "arm": point.arm,
            "rung": point.rung,
            "parameters": f"{point.parameters:,}",
            f"minus {OURS}": f"{point.mean:.3f}" + (f" ± {point.half:.3f}" if point.seeds > 1 else ""),
            "seeds": point.seeds,
        }
        for own in by_arm.values()
        for point in own
    ]
    trends = "\n".join(f"- {arm}: {trend(own)}" for arm, own in by_arm.items())
    return f"# Advantage of {OURS} by size\n\n{pd.DataFrame(lines).to_markdown(index=False)}\n\n{trends}\n"
