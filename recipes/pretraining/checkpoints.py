"""Checkpoints of which none is ever half: whole ones have a manifest, damaged ones are put aside, loudly."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

MANIFEST = "manifest.json"


class Checkpoints:
    """Checkpoints `step-N` in a folder: written under another name, renamed when whole; the newest stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def list(self) -> list[Path]:
        """Return the checkpoints by their steps."""
        found = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def save(self, accelerator: Accelerator, step: int) -> None:
        """Save the state of all processes; the manifest is written last, and the folder is renamed then.

        Raises: OSError that names the last whole one, where this cannot be written. Nothing half stays.
        """
        temporary = self.folder / "unfinished"
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            self._refuse_what_does_not_fit()
            accelerator.save_state(str(temporary))
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            last = self.list()[-1] if self.list() else "none"
            raise OSError(
                f"{self.folder / f'step-{step}'} cannot be written ({error}); the last whole checkpoint is {last}: "
                "make room there and start the same command again with --resume=true"
            ) from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / MANIFEST).write_text(json.dumps(manifest(temporary), indent=1))
            target = self.folder / f"step-{step}"
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            for old in self.list()[: -self.keep]:
                shutil.rmtree(old)

    def _refuse_what_does_not_fit(self) -> None:
        """Raises: OSError where the newest checkpoint would not fit again, before anything is written."""
        if not self.list():
            return
        needed = sum(path.stat().st_size for path in self.list()[-1].rglob("*") if path.is_file())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(f"it takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} are free")

    def load(self, accelerator: Accelerator) -> int:
        """Load the newest that is whole, before which damaged ones are renamed; return its step, 0 without any.

        Raises: RuntimeError where there are checkpoints and none is whole, or where a whole one cannot be read.
        """
        chosen: list[Path | str | None] = [self._newest_whole(accelerator)] if accelerator.is_main_process else [None]
        (path,) = broadcast_object_list(chosen)
        if isinstance(path, str):
            raise RuntimeError(path)
        if path is None:
            return 0
        try:
            accelerator.load_state(str(path))
        except Exception as error:
            raise RuntimeError(f"{path} cannot be read ({error}); remove it to go on from the one before") from error
        return int(path.name.split("-")[1])

    def _newest_whole(self, accelerator: Accelerator) -> Path | str | None:
        """Return the newest whole checkpoint, None without any; what to say where all are damaged."""
        found = self.list()
        for path in reversed(found):
            if not (damage := damage_of(path)):
                return path
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            accelerator.print(
                f"WARNING: {path} is damaged ({damage}); it is {aside.name} now, and the one before is taken"
            )
        return f"no checkpoint in {self.folder} is whole: begin anew with --overwrite=true" if found else None


def manifest(folder: Path) -> dict[str, list[int | str]]:
    """Return size and SHA-256 of every file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): [path.stat().st_size, _digest(path)] for path in files}


def damage_of(folder: Path) -> str:
    """Say which file of a checkpoint is not as its manifest has it, "" for a whole one; one without is from before."""
    path = folder / MANIFEST
    if not path.exists():
        return ""
    try:
        expected = json.loads(path.read_text())
    except ValueError:
        return "its manifest cannot be read"
    found = manifest(folder)
    wrong = [name for name in expected if found.get(name) != expected[name]] + sorted(set(found) - set(expected))
    return f"{wrong[0]} is missing, changed or another's" if wrong else ""


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
