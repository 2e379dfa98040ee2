"""Compare optimizers under one protocol:  python recipes/compare.py --bench small --out runs/small

An arm is a run's configuration (`configs/adamw.yaml`); a bench gives every arm the same model, data, tokens and
schedule (`configs/bench/small-dense.yaml`). Each arm gets the same number of trials, all its rates times one factor, on
a seed that is not reported; its best factor then runs on the reported seeds. With `--shares`, every arm also makes
whole runs of fewer tokens, warm-up and decay included: a long run that is looked at early has not decayed yet. Three
lengths, as of `--shares '[0.25,0.5]'`, give each arm its power law of the loss in tokens. Finished runs are stored:
start it again after a kill. What comes out is `results.json`, and what `report.py` draws from it.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from evidence import page
from evidence.runs import Run, best_factor, execute
from jsonargparse import CLI
from pretraining.folder import origin

HERE = Path(__file__).parent
ARMS = tuple(
    str(HERE / "configs" / f"{name}.yaml") for name in ("adamw", "muon", "paper-row", "paper-hybrid", "default")
)
TRIAL_SEED = 0


def main(
    bench: str = "small",
    arms: tuple[str, ...] = ARMS,
    out: str = "runs/compare",
    models: tuple[str, ...] = ("dense", "moe"),
    factors: tuple[float, ...] = (0.5, 1.0, 2.0),
    seeds: int = 5,
    shares: tuple[float, ...] = (),
    jobs: int = 2,
    more: tuple[str, ...] = (),
) -> None:
    """Run a comparison, or what is left of it, and draw it.

    Args:
        bench: "tiny", "small", "gpu" or "ladder-1" to "ladder-3", the files configs/bench/BENCH-MODEL.yaml.
        arms: configurations of runs; of each only the optimizer counts.
        out: the folder of the runs and of what is drawn.
        models: the MODEL of the bench's files: "dense", "moe" or both, of a ladder "prose", "source", "moe".
        factors: what all rates of an arm are multiplied by, one trial each.
        seeds: how many runs of an arm are reported.
        shares: of the bench's tokens, in whole runs of every arm on the reported seeds, for example '[0.25,0.5]'.
        jobs: runs side by side, which share the cores.
        more: fields for every run, for example '["--train.steps=4"]'.
    """
    if bad := [share for share in shares if not 0 < share < 1]:
        raise SystemExit(f"shares lie between 0 and 1, which every arm runs anyway; got {bad}")
    if jobs < 1 or seeds < 1 or not factors or not arms or not models:
        raise SystemExit("there is at least one job, seed, factor, arm and model")
    if missing := [arm for arm in arms if not Path(arm).exists()]:
        raise SystemExit(f"no arm {missing[0]}; an arm is a run's configuration, as {ARMS[0]}")
    results: list[dict[str, Any]] = []
    for model in models:
        path, folder = HERE / "configs" / "bench" / f"{bench}-{model}.yaml", Path(out)
        if not path.exists():
            raise SystemExit(f"no bench {path}; there are {sorted(p.stem for p in path.parent.glob('*.yaml'))}")
        trials = {
            arm: [Run(folder, path, Path(arm), factor, TRIAL_SEED) for factor in factors] for arm in map(str, arms)
        }
        execute([run for runs in trials.values() for run in runs], jobs, more, f"{model}: trials")
        results_of_trials = {arm: [run.result() for run in runs] for arm, runs in trials.items()}
        chosen = {arm: best_factor(each) for arm, each in results_of_trials.items()}
        reported = [Run(folder, path, Path(arm), chosen[arm], seed + 1) for seed in range(seeds) for arm in arms]
        reported += [replace(run, share=share) for share in shares for run in reported]
        execute(reported, jobs, more, f"{model}: seeds")
        results += [trial | {"trial": True} for each in results_of_trials.values() for trial in each]
        results += [run.result() | {"trial": False} for run in reported]
        (folder / "results.json").write_text(json.dumps({"bench": bench, **origin(), "runs": results}))
    print("\n".join(map(str, page.draw(Path(out) / "results.json", Path(out)))))


if __name__ == "__main__":
    CLI(main, as_positional=False)
