"""A tiny run that faults happen to: how it is started, how far it is, and whether it ended as an undisturbed one."""

import hashlib
import json
import re
import shutil
import time
from pathlib import Path

from pretraining.folder import read_metrics
from torch.utils.cpp_extension import get_default_build_root

from symlm.manifests import MANIFEST
from trust.launchers import LAUNCHERS, Before, Job

STEPS, EVERY = 24, 3  # steps of a run, and between its checkpoints
LIMIT = 300.0  # seconds after which a run hangs
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
RECIPE = {
    "train.steps": STEPS,
    "train.save_every": EVERY,
    "train.validate_every": 12,
    "train.log_every": 1,
    "train.timeout": 30,
    "train.tracker": "none",
    "data.length": 32,
    "data.validation_blocks": 2,
    "data.vocab_size": 400,
    "model.sizes": json.dumps(SIZES),
    "resume": "auto",
}
TRAINER = {
    "max_steps": STEPS,
    "save_steps": EVERY,
    "save_total_limit": 2,
    "logging_steps": 1,
    "length": 32,
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "resume": True,
}


class Lost(Exception):
    """A fault was not survived."""


def write_text(folder: Path) -> Path:
    """Write the text of all runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(40):
        (folder / f"{k:02}.txt").write_text(f"document {k}: " + "the quick brown fox jumps. " * (20 + k))
    return folder


class Run:
    """A run in a folder under a launcher, always started by one command line.

    Args:
        folder: Its folder.
        name: Its launcher's name.
        base: The folder of the text, of the caches and of the undisturbed runs.
        links: How many faults happen to it in a row, each to what goes on after the one before.
    """

    def __init__(self, folder: Path, name: str, base: Path, links: int | None = None) -> None:
        self.folder, self.name, self.base, self.launcher = folder, name, base, LAUNCHERS[name]
        self.trainer = self.launcher.script != "pretrain.py"
        self.results = folder if self.trainer else folder / "default"
        self.checkpoints = folder if self.trainer else self.results / "checkpoints"
        self.weights = self.results / ("" if self.trainer else "model") / "model.safetensors"
        self.links = links or (3 if self.launcher.config else 5)
        self.more: tuple[str, ...] = ()  # arguments that the undisturbed run has not, and that change no weight
        self.started = 0
        self.job: Job | None = None
        self.took: float | None = None  # where it ended before its fault

    @property
    def whole(self) -> "Run":
        """The undisturbed run of this launcher."""
        return Run(self.base / "whole" / self.name, self.name, self.base)

    def arguments(self) -> list[str]:
        """Return the one command line, without the script."""
        if self.trainer:
            model, text = self.base / "whole" / "one process" / "default" / "model", self.base / "text" / "39.txt"
            fields = TRAINER | {"model": model, "text": text, "output_dir": self.folder}
        else:
            fields = RECIPE | {"data.dataset": self.base / "text", "out": self.folder}
            fields["train.batch"] = 2 // self.launcher.processes
        return [*(f"--{key}={value}" for key, value in fields.items()), *self.more]

    def start(self, *more: str, before: Before | None = None, cache: Path | None = None) -> Job:
        """Start it, or go on with it."""
        self.started += 1
        log = self.folder / f"{self.started}.log"
        environment = {"XDG_CACHE_HOME": str(cache or self.base / "cache")}
        environment["TORCH_EXTENSIONS_DIR"] = f"{get_default_build_root()}/faults"  # what DeepSpeed compiles, once
        self.job = Job(self.launcher, [*self.arguments(), *more], log, before, environment)
        return self.job

    def saved(self) -> list[Path]:
        """Return the checkpoints by their steps, whole ones alone of a Trainer, which writes them in place."""
        found = [path for path in self.checkpoints.glob("*-*") if re.fullmatch(r"(step|checkpoint)-\d+", path.name)]
        found = [path for path in found if not self.trainer or (path / MANIFEST).exists()]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def reached(self) -> int:
        """Return the last step that is saved; a Trainer is never given its very last."""
        steps = [int(path.name.split("-")[1]) for path in self.saved()]
        return max([step for step in steps if not self.trainer or step < STEPS], default=0)

    def last_step(self, since: int) -> int:
        """Return the last step that was made; `since` is where this start of it began."""
        if self.trainer:
            return since + self.job.text.count("'loss':")
        rows = read_metrics(self.results) if (self.results / "metrics.jsonl").exists() else []
        return rows[-1]["step"] if rows else 0

    def has_stepped(self) -> bool:
        """Tell whether this start of it has made a step."""
        return bool(re.search(r"loss'?[=:]", self.job.text))

    def half(self) -> bool:
        """Tell whether a checkpoint is being written."""
        if self.trainer:
            return any(not (path / MANIFEST).exists() for path in self.folder.glob("checkpoint-*[0-9]"))
        return (self.checkpoints / "unfinished").exists()

    def end(self, limit: float = LIMIT) -> list[int]:
        """Wait for the end, and return the exit codes.  Raises: Lost for a hang."""
        codes = self.job.wait(limit)
        if None in codes:
            raise Lost(f"still running after {limit:.0f} s: {tail(self.job.text)}")
        return [code for code in codes if code is not None]

    def go_on(self, limit: float = LIMIT, since: int | None = None) -> float:
        """Start it again, by the same command line, to its end; return the seconds to its first step.

        Args:
            limit: Seconds that it may take.
            since: The step from which it goes on, the last that is saved by default.

        Raises: Lost where it does not end well.
        """
        before = self.reached() if since is None else since
        job, seconds = self.start(), 0.0
        while job.running and time.monotonic() - job.began < limit:
            if not seconds and self.has_stepped():
                seconds = time.monotonic() - job.began
                if not self.trainer and self.last_step(before) < before:
                    raise Lost(f"it did not go on from step {before}")
            time.sleep(0.01)
        if any(codes := self.end(1.0)):
            raise Lost(f"the restart ended with {codes}: {tail(job.text)}")
        if self.trainer and self.last_step(before) != STEPS:
            raise Lost(f"it did not go on from step {before}")
        return seconds or time.monotonic() - job.began

    def check(self) -> None:
        """Raises: Lost where weights or metrics differ from the undisturbed run's by one bit."""
        whole = self.whole
        if digest(self.weights) != digest(whole.weights):
            raise Lost("other final weights than the undisturbed run's")
        if not self.trainer and rows(self) != rows(whole):
            raise Lost("other metrics than the undisturbed run's")


def make_whole(name: str, base: Path) -> Run:
    """Return the undisturbed run of a launcher, made where it is not there yet.  Raises: Lost where it fails."""
    run = Run(base / "whole" / name, name, base)
    if run.trainer:
        make_whole("one process", base)
    if not (run.folder / "seconds").exists():
        shutil.rmtree(run.folder, ignore_errors=True)
        run.go_on(2400)  # which has DeepSpeed compile
        (run.folder / "seconds").write_text(str(time.monotonic() - run.job.began))
    return run


def rows(run: Run) -> str:
    return (run.results / "metrics.jsonl").read_text()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tail(text: str) -> str:
    """Return the end of what a run printed, its errors if it has some."""
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line for line in lines if re.search(r"Error\b|error:|Exception", line)]
    return " / ".join((errors or lines)[-2:])[-600:]
