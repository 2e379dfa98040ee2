"""Checkpoints of which none is ever half: whole ones have a manifest, damaged ones are put aside, loudly."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pretraining.pickles import only_data
from symlm.manifests import newest_whole, write_manifest


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

        Raises: OSError where this cannot be written. Nothing half stays.
        """
        temporary = self.folder / "unfinished"
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        with self.named(f"{self.folder / f'step-{step}'}"):
            self.refuse_what_does_not_fit()
            accelerator.save_state(str(temporary))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_manifest(temporary)
                target = self.folder / f"step-{step}"
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
                for old in self.list()[: -self.keep]:
                    shutil.rmtree(old)

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Write in a `with` block.  Raises: OSError that names what could not be written, and nothing half stays."""
        try:
            yield
        except Exception as error:  # torch and safetensors have their own for a full disk
            shutil.rmtree(self.folder / "unfinished", ignore_errors=True)
            raise OSError(f"{what} cannot be written ({error})") from error

    def how_to_go_on(self) -> str:
        """Say what a run that a disk has ended goes on from."""
        last = self.list()[-1] if self.list() else "none"
        return (
            f"the last whole checkpoint is {last}: make room there and start the same command again with --resume=auto"
        )

    def refuse_what_does_not_fit(self, weights: int = 0) -> None:
        """Look at the disk before anything is written.

        Args:
            weights: Bytes of the weights, all that is known before the first checkpoint.

        Raises: OSError where a checkpoint would not fit; or where the folder is gone, which is not made anew.
        """
        found = self.list()
        files = [path for path in found[-1].rglob("*") if path.is_file()] if found else []
        needed, free = sum(path.stat().st_size for path in files) or weights, shutil.disk_usage(self.folder).free
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
            with only_data(path):
                accelerator.load_state(str(path))
        except Exception as error:
            raise RuntimeError(f"{path} cannot be read ({error}); remove it to go on from the one before") from error
        return int(path.name.split("-")[1])

    def _newest_whole(self, accelerator: Accelerator) -> Path | str | None:
        """Return the newest whole checkpoint, None without any; what to say where all are damaged."""
        found = self.list()
        path = newest_whole(found, accelerator.print)
        return path or (f"no checkpoint in {self.folder} is whole: begin anew with --overwrite=true" if found else None)
