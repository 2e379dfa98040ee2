"""Disks that fill, vanish, become read-only, and files that cannot be opened any more."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from trust.kills import Outcome, _moment
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
    """A disk that is full after a random number of kilobytes; then it grows, and the same command goes on."""
    needed = sum(path.stat().st_size for path in run.whole.results.rglob("*") if path.is_file()) // 1024
    with disk(run.results, random.randrange(1, needed)):
        run.start()
        codes = run.end()
        if run.half():
            raise Lost("something half was left")
        return _after(run, codes, lambda: remount(run.results, f"size={ROOM}k"))


def read_only(run: Run, random: Random, number: int) -> Outcome:
    """A folder that becomes read-only at a random step, for root too, and writable again."""
    run.start()
    if not _moment(run, random, first_step=True):
        raise Lost("the run ended before its fault")
    immutable(run.results, "+i")
    try:
        codes = run.end()
    finally:
        immutable(run.results, "-i")
    return _after(run, codes, lambda: None)


def immutable(folder: Path, flag: str) -> None:
    """Set or clear ext4's flag that nobody writes to a folder, nor to what is in it."""
    subprocess.run(["chattr", "-R", flag, folder], check=True, capture_output=True)


def gone(run: Run, random: Random, number: int) -> Outcome:
    """A folder that is moved away at a random step, and comes back."""
    run.start()
    if not _moment(run, random, first_step=True):
        raise Lost("the run ended before its fault")
    away = run.results.with_name("away")
    run.results.rename(away)

    def back() -> None:
        shutil.rmtree(run.results, ignore_errors=True)
        away.rename(run.results)

    return _after(run, run.end(), back)


def no_more_files(run: Run, random: Random, number: int) -> Outcome:
    """No further file can be opened from a random step on."""
    run.start()
    if not _moment(run, random, first_step=True):
        raise Lost("the run ended before its fault")
    for rank in run.job.ranks():
        resource.prlimit(rank.pid, resource.RLIMIT_NOFILE, (rank.num_fds(), rank.num_fds()))
    return _after(run, run.end(), lambda: None)


def _after(run: Run, codes: list[int], mend) -> Outcome:
    """Look at how a run ended whose disk failed, mend the disk, and go on."""
    named = "the last whole checkpoint is" in run.job.text
    made, saved = run.last_step(0), run.reached()
    if not any(codes):
        run.check()  # the fault came behind its last write
        return [(0, 0.0)]
    if not run.launcher.config and codes != [os.EX_IOERR]:  # a launcher has a code of its own
        raise Lost(f"ended with {codes}: {tail(run.job.text)}")
    if not named:
        raise Lost(f"no word of the last whole checkpoint: {tail(run.job.text)}")
    mend()
    seconds = run.go_on()
    run.check()
    return [(max(0, made - saved), seconds)]
