"""Compare optimizers under one protocol:  python recipes/compare.py --bench small --out runs/small

An arm is a run's configuration (`configs/adamw.yaml`); a bench gives every arm the same model, data, tokens and
schedule (`configs/bench/small-dense.yaml`). Each arm gets the same number of trials, all its rates times one factor, on
a seed that is not reported; its best factor then runs on the reported seeds. With `--shares`, the last arm also makes
whole runs of fewer tokens, warm-up and decay included: a long run that is looked at early has not decayed yet. Finished
runs are kept: start it again after a kill. What comes out is `results.json`, and what `evidence.py` draws from it.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import evidence
import yaml
from jsonargparse import CLI
from report import read_metrics
from run_config import read
from run_folder import is_finished, origin
from tqdm import tqdm

HERE = Path(__file__).parent
ARMS = tuple(
    str(HERE / "configs" / f"{name}.yaml") for name in ("adamw", "muon", "paper-row", "paper-hybrid", "default")
)
TRIAL_SEED = 0
ROUTERS = ("router/load_cv", "router/dead_expert_fraction", "update_rms/router")


@dataclass(frozen=True)
class Run:
    """One run of pretrain.py: an arm on a model of the bench, all of the arm's rates times a factor.

    share: of the bench's tokens, all in one schedule.
    """

    out: Path
    bench: Path
    arm: Path
    factor: float
    seed: int
    share: float = 1.0

    @property
    def model(self) -> str:
        return self.bench.stem.rsplit("-", 1)[-1]

    @property
    def folder(self) -> Path:
        short = "" if self.share == 1 else f"-of{self.share:g}"
        return self.out / self.model / f"{self.arm.stem}-x{self.factor:g}-seed{self.seed}{short}"

    def command(self, more: tuple[str, ...]) -> list[str]:
        told = scaled(yaml.safe_load(self.arm.read_text())["optimizer"], self.factor)
        fields = {f"optimizer.{key}": value for key, value in told.items()}
        fields |= {"name": self.folder.name, "out": self.folder.parent, "train.seed": self.seed}
        fields |= {"train.tracker": "none", "resume": (self.folder / "config.json").exists()}
        texts = [f"--{key}={json.dumps(x) if isinstance(x, dict) else x}" for key, x in fields.items()]
        bench = [f"--config={self.bench}", *texts, *more]
        steps = round(self.share * read(bench).train.steps)
        return [sys.executable, str(HERE / "pretrain.py"), *bench, f"--train.steps={steps}"]

    def execute(self, more: tuple[str, ...], threads: int) -> None:
        """Run, or resume, and keep the numbers alone.  Raises: RuntimeError with the end of the run's errors."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(self.command(more), capture_output=True, text=True, env=environment)
        ended = (self.folder / "summary.json").exists()  # as a run does that blew up, whose losses say so
        if done.returncode and not ended:
            raise RuntimeError(f"{self.folder} failed:\n{done.stderr[-2000:]}")
        for heavy in ("checkpoints", "model"):
            shutil.rmtree(self.folder / heavy, ignore_errors=True)

    def result(self) -> dict[str, Any]:
        rows = read_metrics(self.folder)
        curve = [(row["tokens"], row["val/loss"]) for row in rows if "val/loss" in row]
        routers = {key: [row[key] for row in rows if key in row] for key in ROUTERS}
        return {
            "model": self.model,
            "arm": self.arm.stem,
            "factor": self.factor,
            "seed": self.seed,
            "share": self.share,
            "tokens": [tokens for tokens, _ in curve],
            "loss": [loss for _, loss in curve],
            **json.loads((self.folder / "summary.json").read_text()),
            **{key: values for key, values in routers.items() if values},
        }


def scaled(optimizer: dict[str, Any], factor: float) -> dict[str, Any]:
    """Return an arm's optimizer with every rate times a factor."""
    overrides = {
        role: {key: value * factor if key == "lr" else value for key, value in values.items()}
        for role, values in optimizer.get("overrides", {}).items()
    }
    return {**optimizer, "lr": optimizer.get("lr", 0.02) * factor, "overrides": overrides}


def execute(runs: list[Run], jobs: int, more: tuple[str, ...], what: str) -> None:
    """Run what is not finished, `jobs` side by side; one failure is told after the others have ended."""
    left = [run for run in runs if not is_finished(run.folder, run.command(more)[2:])]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with tqdm(total=len(left), unit="run", desc=what) as bar, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run.execute, more, threads) for run in left]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
    if failures := [str(error) for future in futures if (error := future.exception())]:
        raise SystemExit("\n\n".join(failures) + f"\n{len(failures)} of {len(left)} runs failed; the rest is kept")


def best_factor(trials: list[dict[str, Any]]) -> float:
    """Return the factor of the trial that ended lowest; a run that blew up ended nowhere."""
    return min(trials, key=lambda trial: (math.isnan(trial["loss"][-1]), trial["loss"][-1]))["factor"]


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
        bench: "tiny", "small" or "gpu", the files configs/bench/BENCH-MODEL.yaml.
        arms: configurations of runs; of each only the optimizer counts.
        out: the folder of the runs and of what is drawn.
        models: "dense", "moe" or both.
        factors: what all rates of an arm are multiplied by, one trial each.
        seeds: how many runs of an arm are reported.
        shares: of the bench's tokens, in whole runs of the last arm on the reported seeds, for example '[0.55,0.85]'.
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
        found = {arm: [run.result() for run in runs] for arm, runs in trials.items()}
        chosen = {arm: best_factor(each) for arm, each in found.items()}
        reported = [Run(folder, path, Path(arm), chosen[arm], seed + 1) for seed in range(seeds) for arm in arms]
        reported += [replace(run, share=share) for share in shares for run in reported if run.arm == Path(arms[-1])]
        execute(reported, jobs, more, f"{model}: seeds")
        results += [trial | {"trial": True} for each in found.values() for trial in each]
        results += [run.result() | {"trial": False} for run in reported]
        (folder / "results.json").write_text(json.dumps({"bench": bench, **origin(), "runs": results}))
    print("\n".join(map(str, evidence.draw(Path(out) / "results.json", Path(out)))))


if __name__ == "__main__":
    CLI(main, as_positional=False)
