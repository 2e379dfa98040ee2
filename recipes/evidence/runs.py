"""Runs of pretrain.py as processes: an arm on a bench, its rates times a factor, and what came out."""

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pretraining.config import read
from pretraining.folder import is_finished, read_metrics
from tqdm import tqdm

RECIPE = Path(__file__).parents[1] / "pretrain.py"
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
        settings = scaled(yaml.safe_load(self.arm.read_text())["optimizer"], self.factor)
        fields = {f"optimizer.{key}": value for key, value in settings.items()}
        fields |= {"name": self.folder.name, "out": self.folder.parent, "train.seed": self.seed}
        fields |= {"train.tracker": "none", "resume": (self.folder / "config.json").exists()}
        texts = [f"--{key}={json.dumps(x) if isinstance(x, dict) else x}" for key, x in fields.items()]
        bench = [f"--config={self.bench}", *texts, *more]
        steps = round(self.share * read(bench).train.steps)
        return [sys.executable, str(RECIPE), *bench, f"--train.steps={steps}"]

    def execute(self, command: list[str], threads: int) -> None:
        """Run a command of `command`, or resume it, and store the numbers alone.

        Raises:
            RuntimeError: The run failed; with the end of its errors.
        """
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        ended = (self.folder / "summary.json").exists()  # as a run does that diverged, whose losses show it
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
    """Run what is not finished, `jobs` side by side; a failure is reported after the others have ended.

    Raises:
        SystemExit: Some runs failed; the others are stored.
    """
    # Commands are read here, in one thread: jsonargparse changes the working directory while it reads a file.
    commands = [(run, run.command(more)) for run in runs]
    left = [(run, command) for run, command in commands if not is_finished(run.folder, command[2:])]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with tqdm(total=len(left), unit="run", desc=what) as bar, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run.execute, command, threads) for run, command in left]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
    if failures := [str(error) for future in futures if (error := future.exception())]:
        raise SystemExit("\n\n".join(failures) + f"\n{len(failures)} of {len(left)} runs failed; the rest is stored")


def best_factor(trials: list[dict[str, Any]]) -> float:
    """Return the factor of the trial that ended lowest; a run that blew up ended nowhere."""
    return min(trials, key=lambda trial: (math.isnan(trial["loss"][-1]), trial["loss"][-1]))["factor"]
