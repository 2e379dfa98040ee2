"""Manifests of checkpoints: what their files are, written last: none that is half or damaged passes for whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

MANIFEST = "manifest.json"


def describe(folder: Path) -> dict[str, list[int | str]]:
    """Return size and SHA-256 of every file of a checkpoint, by its path in there, without the manifest.

    Args:
        folder: The checkpoint.

    Returns:
        {path: [bytes, SHA-256]}.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): [path.stat().st_size, _digest(path)] for path in files}


def write_manifest(folder: Path) -> None:
    """Write the manifest of a checkpoint whose files are all there.

    Args:
        folder: The checkpoint.
    """
    text = json.dumps(describe(folder), indent=1)
    temporary = folder / f"{MANIFEST}.unfinished"
    temporary.write_text(text)
    temporary.replace(folder / MANIFEST)


def damage_of(folder: Path, required: bool = False) -> str:
    """Say what is wrong with a checkpoint.

    Args:
        folder: The checkpoint.
        required: Whether one without a manifest is not whole; else it is of a time before there were any.

    Returns:
        Its first file that is not as the manifest has it, "" for a whole one.
    """
    path = folder / MANIFEST
    if not path.exists():
        return "it has no manifest, which is written last" if required else ""
    try:
        expected = json.loads(path.read_text())
        found = describe(folder)
        wrong = [name for name in expected if found.get(name) != expected[name]] + sorted(set(found) - set(expected))
    except (ValueError, TypeError):
        return "its manifest cannot be read"
    return f"{wrong[0]} is missing, changed or another's" if wrong else ""


def newest_whole(found: Iterable[Path], report: Callable[[str], None], required: bool = False) -> Path | None:
    """Return the newest checkpoint that is whole; damaged ones that are newer are renamed `*.damaged`.

    Several processes may call it at once: one of them puts a damaged checkpoint aside, and all return the same.

    Args:
        found: Checkpoints, the oldest first.
        report: What is called with a sentence for each that is damaged.
        required: As in `damage_of`.

    Returns:
        The newest whole one, None without any.
    """
    for path in reversed(list(found)):
        try:
            if not (damage := damage_of(path, required)):
                return path
            mine = path.rename(path.with_name(f"{path.name}.damaged.{os.getpid()}"))
        except FileNotFoundError:  # another process has put it aside
            continue
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        mine.rename(aside)
        report(f"WARNING: {path} is damaged ({damage}); it is {aside.name} now, and the one before is taken")
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
