"""Screen the dials of an arm at full length:  python recipes/screen.py --dials recipes/configs/screens/default.yaml

All dials are set at once, each to one of two values, by a Plackett–Burman design: twelve runs measure eleven dials,
each by six runs against six, and an arm that is to be a fair baseline gets the same design. Finished runs are stored:
start it again after a kill. What comes out is `screen.json`, a table and a picture.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from evidence.designs import design, effects
from evidence.figures import draw_effects
from evidence.runs import Run, execute
from jsonargparse import CLI
from pretraining.folder import origin

HERE = Path(__file__).parent


def at_level(optimizer: dict[str, Any], dials: dict[str, dict[str, list]], levels: np.ndarray) -> dict[str, Any]:
    """Return an arm's optimizer with each dial at its low (-1) or high (1) value."""
    optimizer = json.loads(json.dumps(optimizer))
    for dial, level in zip(dials.values(), levels, strict=True):
        for place, values in dial.items():
            *outer, last = place.split(".")
            section = optimizer
            for key in outer:
                section = section.setdefault(key, {})
            section[last] = values[int(level > 0)]
    return optimizer


def read_dials(path: Path) -> dict[str, dict[str, list]]:
    """Read dials: names, and of each its places in an arm's optimizer with a low and a high value.

    Raises:
        SystemExit: The file is not that.
    """
    dials = yaml.safe_load(path.read_text())
    pairs = isinstance(dials, dict) and all(
        isinstance(dial, dict) and all(isinstance(values, list) and len(values) == 2 for values in dial.values())
        for dial in dials.values()
    )
    if not dials or not pairs:
        raise SystemExit(f"{path}: a dial is `name: {{place in the optimizer: [low, high]}}`, as in configs/screens")
    return dials


def main(
    dials: Path = HERE / "configs" / "screens" / "default.yaml",
    arm: Path = HERE / "configs" / "default.yaml",
    bench: Path = HERE / "configs" / "bench" / "ladder-1-prose.yaml",
    out: Path = Path("runs/screen"),
    seeds: tuple[int, ...] = (0,),
    jobs: int = 2,
    more: tuple[str, ...] = (),
) -> None:
    """Run a screening, or what is left of it, and draw it.

    Args:
        dials: the dials: names, and of each its places in the arm's optimizer with a low and a high value.
        arm: the configuration of a run; of it only the optimizer counts.
        bench: the configuration of model, data and schedule.
        out: the folder of the runs and of what is drawn.
        seeds: the whole design is run on each; effects are means.
        jobs: runs side by side, which share the cores.
        more: fields for every run, for example '["--train.steps=4"]'.
    """
    if missing := [path for path in (dials, arm, bench) if not path.exists()]:
        raise SystemExit(f"no file {missing[0]}")
    if jobs < 1 or not seeds:
        raise SystemExit("there is at least one job and one seed")
    tried, optimizer = read_dials(dials), yaml.safe_load(arm.read_text())["optimizer"]
    try:
        columns = design(len(tried))
    except ValueError as error:
        raise SystemExit(f"{dials}: {error}") from None
    (out / "arms").mkdir(parents=True, exist_ok=True)
    arms = [out / "arms" / f"{arm.stem}-{number:02}.yaml" for number in range(len(columns))]
    for path, levels in zip(arms, columns, strict=True):
        path.write_text(yaml.safe_dump({"optimizer": at_level(optimizer, tried, levels[: len(tried)])}))
    runs = [Run(out, bench, path, 1.0, seed) for seed in seeds for path in arms]
    execute(runs, jobs, more, arm.stem)
    report(out, {"arm": arm.stem, "bench": bench.stem, "dials": tried}, columns, runs)


def report(out: Path, screen: dict[str, Any], columns: np.ndarray, runs: list[Run]) -> None:
    """Write `screen.json` and `effects.png`, and print the table."""
    results, names = [run.result() for run in runs], list(screen["dials"])
    losses = np.array([result["loss"][-1] for result in results]).reshape(-1, len(columns))
    each = effects(columns, losses.mean(0))
    unused = each[len(names) :]
    error = float(np.sqrt(np.mean(unused**2))) if len(unused) else float("nan")
    named = dict(zip(names, each.tolist(), strict=False))
    summary = {**screen, **origin(), "effects": named, "error": error, "runs": results}
    (out / "screen.json").write_text(json.dumps(summary))
    draw_effects(named, error, f"{screen['arm']} on {screen['bench']}, {len(runs)} runs", out / "effects.png")
    rows = sorted(named.items(), key=lambda row: -abs(row[1]))
    print(pd.DataFrame(rows, columns=["dial", "effect, low to high"]).round(4).to_markdown(index=False))
    print(f"mean {losses.mean():.4f}, {losses.min():.4f} to {losses.max():.4f}; error of an effect {error:.4f}")
    print(out / "effects.png")


if __name__ == "__main__":
    CLI(main, as_positional=False)
