"""A run's folder: its configuration, its metrics a row at a time, and its checkpoints, of which none is ever half."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from report import read_metrics
from run_config import RunConfig


class Checkpoints:
    """Complete checkpoints `step-N` in a folder: written under another name, renamed when whole, the newest kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def list(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))

    def save(self, accelerator: Accelerator, step: int) -> None:
        temporary = self.folder / "unfinished"
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            target = self.folder / f"step-{step}"
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            for old in self.list()[: -self.keep]:
                shutil.rmtree(old)

    def load(self, accelerator: Accelerator) -> int:
        if not self.list():
            return 0
        accelerator.load_state(str(self.list()[-1]))
        return int(self.list()[-1].name.split("-")[1])


def open_folder(config: RunConfig, accelerator: Accelerator) -> Path:
    """Make the run's folder, or check that the one to resume holds this very configuration."""
    folder = Path(config.out) / config.name
    resolved = {key: value for key, value in asdict(config).items() if key != "resume"}
    resolved["train"]["mixed_precision"] = accelerator.mixed_precision  # which the launcher may have told
    path = folder / "config.json"
    if config.resume and not path.exists():
        raise ValueError(f"{folder} holds no run to resume")
    if config.resume:
        before = json.loads(path.read_text())
        changed = [key for key in resolved if before.get(key) != resolved[key]]
        if changed:
            raise ValueError(
                f"{folder} was run with another configuration ({changed}); resume with {path}'s, or rename"
            )
    elif accelerator.is_main_process:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(resolved, indent=1))
    accelerator.wait_for_everyone()
    return folder


def forget_after(step: int, folder: Path) -> None:
    """Drop the rows of steps that a killed run did after its last checkpoint: they are done again."""
    rows = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(row: dict[str, Any], folder: Path, accelerator: Accelerator) -> None:
    """Append a row to the run's metrics, and send its numbers to the tracker."""
    if accelerator.is_main_process:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    accelerator.log({key: value for key, value in row.items() if not isinstance(value, list)}, step=row["step"])
