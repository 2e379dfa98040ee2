"""Intervals, tokens to a loss, and the table of a comparison."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from evidence.powerlaws import ends, law_of, share_to

BASELINES, OURS = ("adamw", "muon"), "default"


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


def law(runs: list[dict[str, Any]]) -> str:
    """Return an arm's power law of the final loss in tokens; "" where it has runs of fewer than three lengths."""
    if len(ends(runs)) < 3:
        return ""
    try:
        found = law_of(runs)
    except ValueError:
        return "none"
    return f"{found.floor:.2f} + {found.size:.3g}·D^-{found.exponent:.2f}"


def law_to(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """Return the share of another arm's tokens with which this arm's law comes to its loss, and the interval."""
    if len(ends(runs)) < 3:
        return ""
    try:
        share, low, high = share_to(runs, others)
    except ValueError:
        return "no law"
    if not np.isfinite(share):
        return "not reached"
    return f"{share:.3f}" if np.isnan(low) else f"{share:.3f} ({low:.3f} to {high:.3f})"


def table(runs: list[dict[str, Any]], trials: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one line an arm: factor, final loss, paired difference to ours, tokens to the baselines' losses, costs.

    A factor at the edge of those tried is marked: the arm's best may lie beyond. "whole runs to" is the tokens of a run
    that ends at the baseline's loss, its rate decayed as theirs is; "law to" is the same by the arm's power law of
    tokens D, with its interval over seeds.
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
            own, theirs = ([run for run in runs if run["arm"] == name] for name in (arm, baseline))
            if share := law_to(own, theirs):
                line[f"law to {baseline}'s loss"] = share
        if formula := law([run for run in runs if run["arm"] == arm]):
            line["law"] = formula
        seconds = [run["seconds_per_step"] for run in seeds.values() if run["seconds_per_step"]]  # a kill may cost one
        line["seconds a step"] = f"{np.mean(seconds):.3f}" if seconds else ""
        line["optimizer MB"] = f"{next(iter(seeds.values()))['optimizer_bytes'] / 1e6:.1f}"
        if "router/load_cv" in next(iter(seeds.values())):
            line["load CV"] = interval([run["router/load_cv"][-1] for run in seeds.values()])
            line["dead experts"] = f"{max(run['router/dead_expert_fraction'][-1] for run in seeds.values()):.0%}"
        if all("update_rms/router" in run for run in seeds.values()):
            line["router update RMS"] = f"{np.mean([np.mean(run['update_rms/router']) for run in seeds.values()]):.1e}"
        lines.append(line)
    return pd.DataFrame(lines).fillna("").set_index("arm")
