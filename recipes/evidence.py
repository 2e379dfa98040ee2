"""Draw a comparison from its raw numbers:  python recipes/evidence.py recipes/results/small-dense.json"""

import base64
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from jinja2 import Template
from jsonargparse import CLI
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASELINES, OURS = ("adamw", "muon"), "default"
PAGE = Template(
    """<!doctype html><meta charset="utf-8"><title>{{ title }}</title>
<style>body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ccc}
img{max-width:100%}</style>
<h1>{{ title }}</h1><p>{{ note }}</p>
{% for model in models %}<h2>{{ model.name }}</h2>{{ model.table }}
{% for picture in model.pictures %}<img alt="{{ picture.name }}" src="data:image/png;base64,{{ picture.data }}">
{% endfor %}{% endfor %}"""
)


def interval(values: list[float]) -> str:
    """Return mean ± half of the 95 % interval (Student's t)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.3f}"
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{mean:.3f} ± {half:.3f}"


def tokens_to(tokens: list[float], losses: list[float], goal: float) -> float:
    """Return when a curve first comes down to a loss, by lines between its points; infinite where it never does."""
    for k, loss in enumerate(losses):
        if loss <= goal:
            if k == 0:
                return tokens[0]
            share = (losses[k - 1] - goal) / (losses[k - 1] - loss)
            return tokens[k - 1] + share * (tokens[k] - tokens[k - 1])
    return float("inf")


def complete(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs that saw all of the bench's tokens."""
    return [run for run in runs if run.get("share", 1.0) == 1]


def whole_runs_to(runs: list[dict[str, Any]], goals: dict[int, float]) -> str:
    """Return the share of the tokens with which an arm's whole runs end at a seed's goal; "" if all have one length.

    Between the lengths that were run, the final loss is a line in the logarithm of the tokens.
    """
    shares = sorted({run.get("share", 1.0) for run in runs})
    if len(shares) < 2:
        return ""
    ends = {(run["seed"], run.get("share", 1.0)): run["loss"][-1] for run in runs}
    seeds = [seed for seed in goals if all((seed, share) in ends for share in shares)]
    logs = [tokens_to(np.log(shares).tolist(), [ends[seed, share] for share in shares], goals[seed]) for seed in seeds]
    below = "at most " if np.log(shares[0]) in logs else ""
    return below + interval(np.exp(logs).tolist()) if np.isfinite(logs).all() else "not reached by every seed"


def table(runs: list[dict[str, Any]], trials: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one line an arm: factor, final loss, paired difference to ours, tokens to the baselines' losses, costs.

    A factor at the edge of those tried is marked: the arm's best may lie beyond. "whole runs to" is the tokens of a run
    that ends at the baseline's loss, its rate decayed as theirs is.
    """
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for run in complete(runs):
        by_arm.setdefault(run["arm"], {})[run["seed"]] = run
    ours = by_arm.get(OURS, {})
    lines = []
    for arm, seeds in by_arm.items():
        tried, factor = {t["factor"] for t in trials if t["arm"] == arm}, next(iter(seeds.values()))["factor"]
        edge = " (edge)" if len(tried) > 1 and factor in (min(tried), max(tried)) else ""
        line: dict[str, Any] = {"arm": arm, "rates ×": f"{factor:g}{edge}", "seeds": len(seeds)}
        line["final loss"] = interval([run["loss"][-1] for run in seeds.values()])
        if ours and arm != OURS:
            common = [seed for seed in seeds if seed in ours]
            line["minus default"] = interval([seeds[s]["loss"][-1] - ours[s]["loss"][-1] for s in common])
        for baseline in (name for name in BASELINES if name in by_arm):
            shares = [
                tokens_to(run["tokens"], run["loss"], by_arm[baseline][seed]["loss"][-1]) / run["tokens"][-1]
                for seed, run in seeds.items()
                if seed in by_arm[baseline]
            ]
            reached = all(np.isfinite(shares))
            line[f"tokens to {baseline}'s loss"] = interval(shares) if reached else "not reached by every seed"
            goals = {seed: run["loss"][-1] for seed, run in by_arm[baseline].items()}
            if shorter := whole_runs_to([run for run in runs if run["arm"] == arm], goals):
                line[f"whole runs to {baseline}'s loss"] = shorter
        seconds = [run["seconds_per_step"] for run in seeds.values() if run["seconds_per_step"]]  # a kill may cost one
        line["seconds a step"] = f"{np.mean(seconds):.3f}" if seconds else ""
        line["optimizer MB"] = f"{next(iter(seeds.values()))['optimizer_bytes'] / 1e6:.1f}"
        if "router/load_cv" in next(iter(seeds.values())):
            line["load CV"] = interval([run["router/load_cv"][-1] for run in seeds.values()])
            line["dead experts"] = f"{max(run['router/dead_expert_fraction'][-1] for run in seeds.values()):.0%}"
            line["router update RMS"] = f"{np.mean([np.mean(run['update_rms/router']) for run in seeds.values()]):.1e}"
        lines.append(line)
    return pd.DataFrame(lines).fillna("").set_index("arm")


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


def draw(results: Path, out: Path) -> list[Path]:
    """Write curves, sensitivity, table as Markdown, and one HTML page that holds them all; return the paths."""
    told = json.loads(results.read_text())
    out.mkdir(parents=True, exist_ok=True)
    title = f"symlm, bench {told['bench']}"
    # Finished runs are kept, so that a run may be older than the comparison.
    dates, commits = (
        ", ".join(sorted({run.get(key, told[key]) for run in told["runs"]})) for key in ("date", "commit")
    )
    note = f"{told['device']}; torch {told['torch']}; {dates}; commit {commits}. Intervals: 95 %, Student's t."
    paths, models, text = [], [], f"# {title}\n\n{note}\n"
    for model in dict.fromkeys(run["model"] for run in told["runs"]):
        trials = [run for run in told["runs"] if run["model"] == model and run["trial"]]
        runs = [run for run in told["runs"] if run["model"] == model and not run["trial"]]
        pictures = [out / f"{told['bench']}-{model}-curves.png", out / f"{told['bench']}-{model}-rates.png"]
        draw_curves(complete(runs), f"{told['bench']}, {model}", pictures[0])
        draw_sensitivity(trials, f"{told['bench']}, {model}", pictures[1])
        frame = table(runs, trials)
        text += (
            f"\n## {model}\n\n{frame.to_markdown()}\n\n" + "\n".join(f"![{p.stem}]({p.name})" for p in pictures) + "\n"
        )
        images = [{"name": p.stem, "data": base64.b64encode(p.read_bytes()).decode()} for p in pictures]
        models.append({"name": model, "table": frame.to_html(), "pictures": images})
        paths += pictures
    page, markdown = out / "report.html", out / "report.md"
    page.write_text(PAGE.render(title=title, note=note, models=models))
    markdown.write_text(text)
    return [*paths, markdown, page]


def main(results: str, out: str = "runs/evidence") -> None:
    """Draw the comparison in a results.json.

    Args:
        results: the file that compare.py wrote.
        out: the folder for pictures, Markdown and page.
    """
    print("\n".join(map(str, draw(Path(results), Path(out)))))


if __name__ == "__main__":
    CLI(main, as_positional=True)
