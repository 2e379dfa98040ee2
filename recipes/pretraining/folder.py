"""A run's folder: its configuration, and its metrics a row at a time."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from pretraining.checkpoints import Checkpoints
from pretraining.config import RunConfig, read

LOOSE = {  # what may differ when a run goes on
    *("name", "out", "resume", "overwrite"),
    *(f"train.{name}" for name in ("save_every", "log_every", "keep", "async_save", "timeout", "tracker")),
}


def resolve(config: RunConfig, precision: str | None = None, processes: int = 1) -> dict[str, Any]:
    """Return what a run is, as it is written to its folder: its fields, and what the launcher decided."""
    settings = asdict(config)
    settings["train"]["mixed_precision"] = precision or config.train.mixed_precision
    return settings | {"samples_a_step": config.train.batch * config.train.accumulate * processes}


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield `field: before -> now` of what makes another run of it."""
    for key in {**before, **now}:
        name, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if name in ("data", "model", "optimizer", "train"):
            yield from differences(old or {}, new or {}, f"{name}.")
        elif name not in LOOSE and old != new:
            yield f"{name}: {old} -> {new}"


def _settings(path: Path) -> dict[str, Any]:
    """Read what a run is.  Raises: ValueError for a file that is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): remove it, and begin anew with --overwrite=true") from None


def is_finished(folder: Path, arguments: list[str]) -> bool:
    """Tell whether a folder has the finished run of these arguments of pretrain.py.

    Raises: SystemExit where it has a run with other settings, whose numbers would be taken for this one's.
    """
    path = folder / "config.json"
    if path.exists():
        now = resolve(read(arguments), "no")
        if changed := list(differences(_settings(path), now)):
            raise SystemExit(f"{folder} holds another run ({'; '.join(changed)}): remove it, or give another --out")
    return (folder / "summary.json").exists()


def check_folder(config: RunConfig, accelerator: Accelerator) -> Path:
    """Return the run's folder; nothing is changed in it. `resume: auto` becomes whether there is a run to go on with.

    Raises: ValueError where there is nothing to resume, where that is another run, or where a run would be lost; and
        where ranks were given other settings, before one of them writes its own.
    """
    folder = Path(config.out) / config.name
    path = folder / "config.json"
    now = resolve(config, accelerator.mixed_precision, accelerator.num_processes)
    for rank, given in enumerate(gather_object([now])):
        if changed := list(differences(now, given)):
            raise ValueError(f"the ranks disagree ({'; '.join(changed)} on rank {rank}): start all with one command")
    if config.resume == "auto":
        config.resume = path.exists()
    if config.resume and not path.exists():
        raise ValueError(f"{folder} holds no run to resume")
    if config.resume:
        if changed := list(differences(_settings(path), now)):
            raise ValueError(f"{folder} holds another run ({'; '.join(changed)}): resume with its own, or rename")
    elif Checkpoints(folder / "checkpoints", 1).list() and not config.overwrite:
        raise ValueError(
            f"{folder} holds a run: go on with it, --resume=true; take another --name; or lose it, --overwrite=true"
        )
    accelerator.wait_for_everyone()  # before any process changes what another has still to look at
    return folder


def open_folder(config: RunConfig, accelerator: Accelerator, folder: Path) -> None:
    """Make the folder, and empty it of another run unless this one goes on with it.

    Raises: RuntimeError while another process trains there.
    """
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        if not config.resume:
            for name in ("checkpoints", "model"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in ("metrics.jsonl", "summary.json"):
                (folder / name).unlink(missing_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        settings = resolve(config, accelerator.mixed_precision, accelerator.num_processes)
        _replace(folder / "config.json", json.dumps(settings, indent=1))
    accelerator.wait_for_everyone()


_locks = []  # held for the life of the process, however that ends


def _lock(folder: Path) -> None:
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"another process is training in {folder}: choose another --name, or wait for it") from None
    _locks.append(file)


def origin() -> dict[str, Any]:
    """Return where, when and of which commit something ran."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {"date": str(date.today()), "commit": commit or "unknown", "device": device, "torch": torch.__version__}


def processor() -> str:
    """Return the processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def read_metrics(run: Path) -> list[dict]:
    """Read a run's metrics, one object a line; a line cut short by a kill, or of something else, is left out."""
    rows = []
    for line in (run / "metrics.jsonl").read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def forget_after(step: int, folder: Path) -> None:
    """Drop the rows of steps that a killed run did after its last checkpoint: they are done again."""
    rows = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
    _replace(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.unfinished")
    temporary.write_text(text)
    temporary.replace(path)


def write(row: dict[str, Any], folder: Path, accelerator: Accelerator) -> None:
    """Append a row to the run's metrics, and send its numbers to the tracker; a disk that fails costs the row alone."""
    numbers = {key: value for key, value in row.items() if not isinstance(value, list)}
    try:
        if accelerator.is_main_process:
            _append(json.dumps(row).encode() + b"\n", folder / "metrics.jsonl")
        accelerator.log(numbers, step=row["step"])
    except OSError as error:
        warnings.warn(f"the metrics of step {row['step']} are not written: {error}", stacklevel=2)


def _append(line: bytes, path: Path) -> None:
    """Append a line, or nothing.  Raises: OSError where the disk takes no more."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(line) < len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
