"""The loss as a power law of tokens, `E + A·D^-a`, through the ends of whole runs, and the tokens to another's loss."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import minimize_scalar

STEEPEST, FLATTEST = 4.0, 0.01  # exponents beyond these are of noise


@dataclass(frozen=True)
class Law:
    """A loss of `floor + size · tokens^-exponent`."""

    floor: float
    size: float
    exponent: float

    def tokens_to(self, loss: float) -> float:
        """Return with how many tokens a run ends at a loss; infinite at the floor and below."""
        return float((self.size / (loss - self.floor)) ** (1 / self.exponent)) if loss > self.floor else float("inf")


def fit(tokens: list[float], losses: list[float]) -> Law:
    """Fit a law to the ends of whole runs, by least squares.

    Raises:
        ValueError: There are fewer than three lengths, or the losses do not fall, by less each time, as a law does.
    """
    D, L = np.array(tokens, dtype=float), np.array(losses, dtype=float)
    if len(set(tokens)) < 3:
        raise ValueError(f"a power law needs runs of three lengths, got {sorted(set(tokens))}")

    def at(exponent: float) -> tuple[np.ndarray, float]:
        design = np.stack([np.ones_like(D), (D / D.max()) ** -exponent], axis=1)
        solution = np.linalg.lstsq(design, L, rcond=None)[0]
        return solution, float(((design @ solution - L) ** 2).sum())

    bounds = (np.log(FLATTEST), np.log(STEEPEST))
    found = minimize_scalar(lambda x: at(np.exp(x))[1], bounds=bounds, method="bounded", options={"xatol": 1e-10})
    exponent = float(np.exp(found.x))
    floor, size = at(exponent)[0]
    if not size > 0 or not FLATTEST * 1.001 < exponent < STEEPEST / 1.001:
        raise ValueError(f"no power law falls through the losses {losses} at {tokens} tokens")
    return Law(float(floor), float(size * D.max() ** exponent), exponent)


def ends(runs: list[dict[str, Any]]) -> dict[float, dict[int, float]]:
    """Return the final losses of an arm's whole runs, by tokens and seed."""
    lengths: dict[float, dict[int, float]] = {}
    for run in runs:
        lengths.setdefault(run["tokens"][-1], {})[run["seed"]] = run["loss"][-1]
    return lengths


def law_of(runs: list[dict[str, Any]]) -> Law:
    """Fit a law to an arm's mean final losses over the seeds that have every length. Raises: ValueError as `fit`."""
    lengths = ends(runs)
    return _law(lengths, _common(lengths))


def _common(lengths: dict[float, dict[int, float]]) -> list[int]:
    """Return the seeds that have every length. Raises: ValueError if there is none."""
    if not (seeds := set.intersection(*(set(losses) for losses in lengths.values()))):
        raise ValueError("no seed has runs of all lengths, and of the other arm's")
    return sorted(seeds)


def _law(lengths: dict[float, dict[int, float]], seeds: list[int]) -> Law:
    """Fit a law to the mean final losses over some seeds."""
    return fit(list(lengths), [float(np.mean([losses[seed] for seed in seeds])) for losses in lengths.values()])


def share_to(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Return the share of another arm's tokens with which this one ends at the loss that the other ends at.

    The law is that of the means over the common seeds; the interval, of 95 % by Student's t, is from leaving out one
    seed at a time (a jackknife) in the logarithm.

    Args:
        runs: whole runs of this arm, of at least three lengths.
        others: whole runs of the other, of which the longest count.

    Returns:
        The share, and the ends of its interval, which are NaN for fewer than two seeds and where a part of the seeds
        never comes to that loss.

    Raises:
        ValueError: as `fit`, or the arms have no seed in common.
    """
    lengths, theirs = ends(runs), ends(others)
    longest = max(theirs)
    seeds = _common({**lengths, np.inf: theirs[longest]})

    def logarithm(some: list[int]) -> float:
        goal = float(np.mean([theirs[longest][seed] for seed in some]))
        return float(np.log(_law(lengths, some).tokens_to(goal) / longest))

    value, count = logarithm(seeds), len(seeds)
    parts = np.array([logarithm([other for other in seeds if other != seed]) for seed in seeds if count > 1])
    half = np.nan
    if count > 1 and np.isfinite(parts).all():
        error = np.sqrt((count - 1) / count * ((parts - parts.mean()) ** 2).sum())
        half = error * stats.t.ppf(0.975, count - 1)
    return tuple(float(np.exp(x)) for x in (value, value - half, value + half))  # type: ignore[return-value]
