"""Checkpoints of which none is ever half: whole ones have a manifest, damaged ones are put aside, loudly."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed.checkpoint.api import CheckpointException

from pretraining.background import Background, read_states
from pretraining.pickles import only_data
from symlm.manifests import newest_whole, write_manifest


class Checkpoints:
    """Checkpoints `step-N` in a folder: written under another name, renamed when whole; the newest stay.

    Args:
        folder: The folder.
        keep: How many stay.
        background: Writes them while the run goes on; None writes them before it does.
    """

    def __init__(self, folder: Path, keep: int, background: Background | None = None) -> None:
        self.folder, self.keep, self.background = folder, keep, background
        self.seconds = 0.0  # that the run has waited for saves

    def list(self) -> list[Path]:
        """Return the checkpoints by their steps."""
        found = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def save(self, accelerator: Accelerator, step: int) -> None:
        """Save the state of all processes; the manifest is written last, and the folder is renamed then.

        Raises: OSError where this, or in the background the one before, cannot be written. Nothing half stays.
        """
        self.finish()
        began, temporary = time.perf_counter(), self.folder / "unfinished"
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        with self.named(f"{self.folder / f'step-{step}'}"):
            self.refuse_what_does_not_fit()
            if self.background:
                self.background.save(accelerator, temporary, partial(self._seal, step))
            else:
                accelerator.save_state(str(temporary))
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    self._seal(step)
        self.seconds += time.perf_counter() - began

    def finish(self) -> None:
        """Wait for what is being written in the background.  Raises: OSError where it cannot be."""
        if self.background:
            began = time.perf_counter()
            with self.named(f"the checkpoint behind {self.last()}"):
                self.background.finish()
            self.seconds += time.perf_counter() - began

    def _seal(self, step: int) -> None:
        """Make a checkpoint of what is there now, whole; older ones beyond `keep` are removed."""
        temporary, target = self.folder / "unfinished", self.folder / f"step-{step}"
        write_manifest(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for old in self.list()[: -self.keep]:
            shutil.rmtree(old)

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Write in a `with` block.  Raises: OSError that names what could not be written, and nothing half stays."""
        try:
            yield
        except (Exception, CheckpointException) as error:  # torch and safetensors have their own for a full disk
            shutil.rmtree(self.folder / "unfinished", ignore_errors=True)
            raise OSError(f"{what} cannot be written ({_reason(error)})") from error

    def how_to_go_on(self) -> str:
        """Say what a run that a disk has ended goes on from."""
        return (
            f"the last whole checkpoint is {self.last()}: make room there and start the same command again with "
            "--resume=auto"
        )

    def last(self) -> str:
        """Name the last whole checkpoint."""
        try:
            return str((self.list() or ["none"])[-1])
        except OSError:  # a folder is a file that may not be opened any more
            return f"the newest in {self.folder}"

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
        self.finish()
        chosen: list[Path | str | None] = [self._newest_whole(accelerator)] if accelerator.is_main_process else [None]
        (path,) = broadcast_object_list(chosen)
        if isinstance(path, str):
            raise RuntimeError(path)
        if path is None:
            return 0
        try:
            with only_data(path):
                read_states(accelerator, path)
        except (Exception, CheckpointException) as error:
            reason = _reason(error)
            raise RuntimeError(f"{path} cannot be read ({reason}); remove it to go on from the one before") from error
        return int(path.name.split("-")[1])

    def _newest_whole(self, accelerator: Accelerator) -> Path | str | None:
        """Return the newest whole checkpoint, None without any; what to say where all are damaged."""
        found = self.list()
        path = newest_whole(found, accelerator.print)
        return path or (f"no checkpoint in {self.folder} is whole: begin anew with --overwrite=true" if found else None)


def _reason(error: BaseException) -> str:
    """Say what went wrong; of a distributed checkpoint each rank's error, without where it was raised."""
    failures = getattr(error, "failures", {})
    return "; ".join(f"rank {rank}: {failure!r}" for rank, (failure, _) in failures.items()) or str(error)
