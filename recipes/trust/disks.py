"""Disks that fill, vanish, become read-only, and files that cannot be opened any more."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from trust.kills import Outcome, behind_a_step, chain
from trust.runs import Lost, Run, tail


@contextmanager
def disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """Put a disk of a size of its own at a folder, in memory; only root may.  Raises: CalledProcessError otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def may_change_disks(folder: Path) -> bool:
    """Tell whether this user may mount a disk in memory, and make a folder read-only for root."""
    try:
        with disk(folder / "mounted", 64):
            pass
        (folder / "immutable").mkdir(exist_ok=True)
        immutable(folder / "immutable", "+i")
        immutable(folder / "immutable", "-i")
        return True
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


ROOM = 100_000  # kilobytes, more than a run takes


def full(run: Run, random: Random, number: int) -> Outcome:
    """A disk that is full after a random number of kilobytes, grows a little, is full again, and so on."""
    needed = sum(path.stat().st_size for path in run.whole.results.rglob("*") if path.is_file()) // 1024
    sizes = sorted(random.randrange(1, needed) for _ in range(run.links))
    later = iter([*sizes[1:], ROOM])

    def fault() -> bool:
        codes = run.end()
        if any(codes) and run.half():
            raise Lost("something half was left")
        remount(run.results, f"size={next(later)}k")
        return _ended(run, codes)

    with disk(run.results, sizes[0]):
        outcome = chain(run, fault)
    return outcome


def read_only(run: Run, random: Random, number: int) -> Outcome:
    """A folder that becomes read-only at a random step, for root too, and writable again."""

    def fault() -> bool:
        if not behind_a_step(run, random):
            return False
        immutable(run.results, "+i")
        try:
            codes = run.end()
        finally:
            immutable(run.results, "-i")
        return _ended(run, codes)

    return chain(run, fault)


def gone(run: Run, random: Random, number: int) -> Outcome:
    """A folder that is moved away at a random step, and comes back."""

    def fault() -> bool:
        if not behind_a_step(run, random):
            return False
        away = run.results.with_name("away")
        run.results.rename(away)
        codes = run.end()
        shutil.rmtree(run.results, ignore_errors=True)
        away.rename(run.results)
        return _ended(run, codes)

    return chain(run, fault)


def no_more_files(run: Run, random: Random, number: int) -> Outcome:
    """No further file can be opened from a random step on."""

    def fault() -> bool:
        if not behind_a_step(run, random):
            return False
        for rank in run.job.ranks():
            resource.prlimit(rank.pid, resource.RLIMIT_NOFILE, (rank.num_fds(), rank.num_fds()))
        return _ended(run, run.end())

    return chain(run, fault)


def immutable(folder: Path, flag: str) -> None:
    """Set or clear ext4's flag that nobody writes to a folder, nor to what is in it."""
    subprocess.run(["chattr", "-R", flag, folder], check=True, capture_output=True)


def _ended(run: Run, codes: list[int]) -> bool:
    """Look at how a run ended whose disk failed; False where the fault came behind its last write."""
    if not any(codes):
        return False
    if not run.launcher.config and codes != [os.EX_IOERR]:  # a launcher has a code of its own
        raise Lost(f"ended with {codes}: {tail(run.job.text)}")
    if "the last whole checkpoint is" not in run.job.text:
        raise Lost(f"no word of the last whole checkpoint: {tail(run.job.text)}")
    return True
