"""Draw runs, one or several side by side, or a comparison:  python recipes/report.py runs/a runs/b

A folder is a run's, and its `metrics.jsonl` is drawn; a file is the `results.json` that compare.py wrote. Several such
files, the rungs of a ladder, are drawn each in a folder of its name, and the default's advantage by size besides.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

from evidence import advantage, curves, page

OF_ALL = {"bench", "date", "commit", "device", "torch", "runs"}
OF_A_RUN = {"model", "arm", "seed", "factor", "trial", "tokens", "loss", "seconds_per_step", "optimizer_bytes"}


def lacking(file: Path) -> list[str]:
    """Return what a comparison lacks to be drawn."""
    comparison = json.loads(file.read_text())
    if not isinstance(comparison, dict):
        return sorted(OF_ALL)
    runs = comparison.get("runs") or [{}]
    return sorted((OF_ALL - {*comparison}) | {key for run in runs for key in OF_A_RUN - {*run}})


def draw_comparisons(files: list[Path], out: Path) -> list[Path]:
    """Draw one comparison into `out`; several into folders of their names, and their advantage by size into `out`."""
    if len(files) == 1:
        return page.draw(files[0], out)
    return [*(path for file in files for path in page.draw(file, out / file.stem)), *advantage.draw(files, out)]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or results.json of compare.py")
    parser.add_argument("--out", type=Path, help="where the pictures go: the run's folder, of several runs runs/report")
    given = parser.parse_args()
    if all(run.suffix == ".json" for run in given.runs):
        for file in given.runs:
            if keys := lacking(file):
                parser.error(f"{file} is no results.json of compare.py: it lacks {keys}")
        print("\n".join(map(str, draw_comparisons(given.runs, given.out or Path("runs/report")))))
        return
    if missing := [run for run in given.runs if not (run / "metrics.jsonl").exists()]:
        parser.error(f"{missing[0]} has no metrics.jsonl: is it a run's folder?")
    out = given.out or (given.runs[0] if len(given.runs) == 1 else Path("runs/report"))
    out.mkdir(parents=True, exist_ok=True)
    print("\n".join(str(path) for path in curves.draw(given.runs, out)))


if __name__ == "__main__":
    main()
