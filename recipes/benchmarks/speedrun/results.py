"""What runs leave behind: a line a validation, one file an arm, and the table with the benchmark's rule of proof."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

TARGET = 3.28
MARGIN = 0.004  # 3.09 standard deviations of 0.0013: p < 0.001, one-sided


def line(step: int, steps: int, loss: float, seconds: float, average: float) -> str:
    """Return a validation's line in the benchmark's form.

    Args:
        step: how many steps came before.
        steps: how many the run has.
        loss: the validation loss.
        seconds: of training so far, validations left out.
        average: seconds of a step since the last validation, no number at the first.
    """
    return f"step:{step}/{steps} val_loss:{loss:.5f} train_time:{seconds:.3f}s step_avg:{1000 * average:.2f}ms"


def margin(losses: list[float]) -> float:
    """Return `(3.28 − mean)·√n`, to nine digits, since 3.28 − 3.278 is below 0.002 in floats.

    Args:
        losses: one a run, at one step of all of them.
    """
    return round((TARGET - fmean(losses)) * math.sqrt(len(losses)), 9)


def is_proved(losses: list[float]) -> bool:
    """Tell whether runs prove that their mean is below the target, `(3.28 − mean)·√n ≥ 0.004`.

    Args:
        losses: one a run, at one step of all of them.
    """
    return margin(losses) >= MARGIN


@dataclass
class Run:
    """One run as it is stored: its losses by step, and where it was made."""

    seed: int
    processes: int
    origin: dict[str, Any]
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, step: int, loss: float, seconds: float) -> None:
        """Append a validation."""
        self.steps.append(step)
        self.losses.append(loss)
        self.seconds.append(seconds)


def read_arm(path: Path) -> dict[str, Any]:
    """Read an arm's file.

    Args:
        path: the file.

    Raises: ValueError with its name where it is none.
    """
    try:
        arm = json.loads(path.read_text())
        arm["runs"] = [Run(**run) for run in arm["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of runs ({error}): move it away, or give another folder") from error
    return arm


def check_arm(path: Path, settings: dict[str, Any], seed: int) -> None:
    """Refuse, before it is paid for, a run that its arm's file cannot take: all runs of a mean are of one thing.

    Args:
        path: the arm's file, which need not be there.
        settings: what its runs have in common.
        seed: of the new run.

    Raises: ValueError for a seed that is there already, or settings that differ.
    """
    if not path.exists():
        return
    arm = read_arm(path)
    before, now = (_flat(each) for each in (arm["settings"], json.loads(json.dumps(settings))))
    if differing := sorted(key for key in before | now if before.get(key) != now.get(key)):
        key = differing[0]
        raise ValueError(
            f"{path} has runs with {key} {before.get(key)!r}, this one has {now.get(key)!r}"
            + (f", and {len(differing) - 1} more differ" if len(differing) > 1 else "")
            + ": give each setting a folder (out)"
        )
    if seed in [run.seed for run in arm["runs"]]:
        raise ValueError(f"{path} has a run of seed {seed} already: a seed counts once, give another")


def add_run(path: Path, settings: dict[str, Any], run: Run) -> None:
    """Add a finished run to its arm's file, which is replaced as a whole.

    Args:
        path: the arm's file.
        settings: what its runs have in common.
        run: the run.
    """
    check_arm(path, settings, run.seed)
    runs = read_arm(path)["runs"] if path.exists() else []
    stored = {"settings": settings, "runs": [vars(each) for each in (*runs, run)]}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(stored, indent=1))
    os.replace(part, path)


def first(losses: dict[int, list[float]], holds: Callable[[list[float]], bool]) -> int | None:
    """Return the first step whose losses have a property; a run whose loss is no number has none."""
    return next((step for step in sorted(losses) if holds(losses[step])), None)


def table(folder: Path) -> pd.DataFrame:
    """Return a line an arm: the first step at which all its runs together prove the target, or reach it unproved.

    The step is the same for all runs, as the rules have it; a step that some run did not validate does not count.

    Args:
        folder: where the arms' files are.

    Returns: steps to 3.28, the mean loss there, n, the margin and whether it is proof; of an arm that is not there yet
        the mean loss at its end.
    Raises: ValueError where there is no run.
    """
    lines = []
    for path in sorted(folder.glob("*.json")):
        runs = read_arm(path)["runs"]
        by_step = [dict(zip(run.steps, run.losses, strict=True)) for run in runs]
        common = sorted(set.intersection(*map(set, by_step)))
        losses = {step: [run[step] for run in by_step] for step in common}
        proved, reached = first(losses, is_proved), first(losses, lambda each: fmean(each) <= TARGET)
        step = proved or reached or common[-1]
        lines.append(
            {
                "arm": path.stem,
                "steps to 3.28": step if proved or reached else f"not in {step}",
                "mean loss": f"{fmean(losses[step]):.5f}",
                "n": len(runs),
                "(3.28 − mean)·√n": f"{margin(losses[step]):+.5f}",
                "proved": "yes" if proved else f"no, below {MARGIN}",
            }
        )
    if not lines:
        raise ValueError(f"{folder} has no runs yet: train an arm first")
    return pd.DataFrame(lines).set_index("arm")


def _flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested settings as `{"arm.optimizer.lr": 0.02}`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{above}.{key}" if above else key
        flat |= _flat(value, name) if isinstance(value, dict) and value else {name: value}
    return flat
