"""Damage to the newest checkpoint, file by file: found before a weight is touched, and the one before is taken."""

import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from symlm.manifests import MANIFEST, write_manifest
from trust.kills import Outcome
from trust.runs import EVERY, Lost, Run, tail


def flip(run: Run, random: Random, number: int) -> Outcome:
    """One bit of a file."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        file.write_bytes(content)

    return _damaged(run, number, damage)


def cut(run: Run, random: Random, number: int) -> Outcome:
    """A file without its end."""
    return _damaged(run, number, lambda file: file.write_bytes(file.read_bytes()[: random.randrange(size_of(file))]))


def missing(run: Run, random: Random, number: int) -> Outcome:
    """A file that is not there."""
    return _damaged(run, number, Path.unlink)


def mixed(run: Run, random: Random, number: int) -> Outcome:
    """A file of the checkpoint before in the place of the newest one's."""

    def damage(file: Path) -> None:
        newest, before = run.saved()[-1], run.saved()[-2]
        shutil.copy(before / file.relative_to(newest), file)

    return _damaged(run, number, damage, alike=False)


class Hostile:
    """A pickle that makes a folder when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.mark, 0o777, True, True)


def hostile(run: Run, random: Random, number: int) -> Outcome:
    """A pickle that runs code in the place of a file, which the manifest has been made to allow."""
    mark = run.folder.with_name(f"{run.folder.name}-executed")
    _copy_whole(run)
    newest = run.saved()[-1]
    file = _files(run)[number % len(_files(run))]
    file.write_bytes(pickle.dumps(Hostile(mark)))
    if file.name != MANIFEST:
        write_manifest(newest)
    job = run.start()
    codes = run.end()
    if mark.exists():
        raise Lost(f"{file.name} was executed")
    if any(codes) and "cannot be read" not in job.text:
        raise Lost(f"no word of {newest.name}: {tail(job.text)}")
    return [(0, 0.0)]


def _damaged(run: Run, number: int, damage: Callable[[Path], object], alike: bool = True) -> Outcome:
    """Damage a finished run's newest checkpoint, file by file; each start finds it, and the last ends as it should."""
    for link in range(run.links):
        shutil.rmtree(run.results, ignore_errors=True)
        _copy_whole(run)
        (*_, before, newest), files = run.saved(), _files(run, alike)
        file = files[(number * run.links + link) % len(files)]
        damage(file)
        if link < run.links - 1:
            run.start()
            while run.job.running and not run.has_stepped():
                time.sleep(0.01)
            run.job.wait(0)
        else:
            seconds = run.go_on(since=int(before.name.split("-")[1]))
            run.check()
        if f"{newest.name} is damaged" not in run.job.text and file.name != MANIFEST:
            raise Lost(f"the damage of {file.name} was not found: {tail(run.job.text)}")
    return [(EVERY, seconds)] * run.links


def _copy_whole(run: Run) -> None:
    shutil.copytree(run.whole.results, run.results)


def _files(run: Run, alike: bool = True) -> list[Path]:
    """Return the files of the newest checkpoint; without `alike` those that the one before has with another content."""
    newest, before = run.saved()[-1], run.saved()[-2]
    files = sorted(path for path in newest.rglob("*") if path.is_file() and size_of(path))
    if alike:
        return files
    pairs = [(path, before / path.relative_to(newest)) for path in files]
    return [path for path, other in pairs if other.exists() and other.read_bytes() != path.read_bytes()]


def size_of(file: Path) -> int:
    return file.stat().st_size
