"""Hostile text, and pickles in the place of every file that is read: refused by name, or trained; never executed."""

import json
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet

from trust.damage import Hostile, size_of
from trust.kills import Outcome
from trust.runs import Lost, Run, tail

WORDS = "the quick brown fox jumps over the lazy dog "
Write = Callable[[Path], None]


def _text(content: str | bytes) -> Write:
    return lambda file: file.write_bytes(content.encode() if isinstance(content, str) else content) and None


def _rows(*rows: object) -> Write:
    return _text("".join(json.dumps(row) + "\n" for row in rows))


def _parquet(*groups: list[str]) -> Write:
    """Write a row group for each list, empty ones too."""

    def write(file: Path) -> None:
        schema = pyarrow.schema([("text", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(file, schema) as out:
            for group in groups:
                out.write_table(pyarrow.table({"text": group}, schema))

    return write


TEXTS: dict[str, tuple[str, Write, str]] = {  # the file, its content, what a refusal says, "" where it is trained
    "no newline": ("a.txt", _text(WORDS * 2000), ""),
    "newlines alone": ("a.txt", _text("\n" * 100_000), "less than one block"),
    "one letter alone": ("a.txt", _text("a" * 100_000), "less than one block"),
    "null bytes": ("a.txt", _text("\0" * 50_000 + WORDS * 100), ""),
    "100 MB in one line": ("a.txt", _text(WORDS * (100_000_000 // len(WORDS))), ""),
    "the end token as text": ("a.txt", _text(("<|endoftext|>" + WORDS) * 900), ""),
    "every plane of Unicode": ("a.txt", _text("".join(map(chr, range(0x20, 0xD800))) * 2 + "\U0010ffff" * 500), ""),
    "empty": ("a.txt", _text(""), "that has any text"),
    "a space": ("a.txt", _text(" "), "less than one block"),
    "mixed encodings": ("a.txt", _text(WORDS.encode() * 500 + "naïve".encode("latin-1")), "a.txt is no UTF-8 text"),
    "UTF-16": ("a.txt", _text((WORDS * 500).encode("utf-16")), "a.txt is no UTF-8 text"),
    "a nested JSONL": ("a.jsonl", _rows(*[{"text": {"of": WORDS}}] * 90), "a.jsonl: row 0 has"),
    "a deep JSONL": ("a.jsonl", _text('{"text": ' + "[" * 50_000 + "]" * 50_000 + "}\n"), "a.jsonl"),
    "a JSONL with half a row": (
        "a.jsonl",
        _text('{"text": "' + WORDS * 500 + '"}\n{"text": "ha'),
        "a.jsonl cannot be read",
    ),
    "rows of two kinds": ("a.jsonl", _rows({"text": WORDS * 500}, {"text": 3}), "a.jsonl"),
    "a row without text": ("a.jsonl", _rows({"text": WORDS * 500}, {"other": "x"}), "a.jsonl: row 1 has None"),
    "empty Parquet groups": ("a.parquet", _parquet([], [WORDS * 500], [], [WORDS * 100]), "a.parquet cannot be read"),
    "no Parquet group": ("a.parquet", _parquet(), "a.parquet cannot be read"),
    "half a Parquet file": ("a.parquet", _text(b"PAR1" + bytes(500)), "a.parquet cannot be read"),
    "a shard of zeros": ("a.bin", _text(bytes(5000)), "a.bin: magic number"),
}


def text(run: Run, random: Random, number: int) -> Outcome:
    """Text that nobody expects."""
    name = list(TEXTS)[number % len(TEXTS)]
    file, write, refusal = TEXTS[name]
    folder = run.folder / "text"
    folder.mkdir(parents=True)
    write(folder / file)
    run.start(f"--data.dataset={folder / file}", cache=run.folder / "cache")
    return _judge(run, name, refusal)


def growing(run: Run, random: Random, number: int) -> Outcome:
    """A file that grows while it is read."""
    file, done = run.folder / "a.txt", threading.Event()
    run.folder.mkdir(parents=True)
    file.write_text(WORDS * 2000)

    def grow() -> None:
        while not done.wait(0.001):
            with file.open("a") as end:
                end.write(WORDS * 10)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        run.start(f"--data.dataset={file}", cache=run.folder / "cache")
        return _judge(run, "a growing file", "")
    finally:
        done.set()
        thread.join()


def pickles(run: Run, random: Random, number: int) -> Outcome:
    """A pickle that runs code in the place of a file that is read beside checkpoints."""
    mark, folder, cache = (
        run.folder.with_name(f"{run.folder.name}-executed"),
        run.folder / "given",
        run.folder / "cache",
    )
    shutil.copytree(run.whole.results, run.results)
    shutil.copytree(run.base / "cache" / "symlm", cache / "symlm")
    folder.mkdir()
    given = {
        "a shard": (folder / "a.bin", f"--data.dataset={folder / 'a.bin'}"),
        "JSONL": (folder / "a.jsonl", f"--data.dataset={folder / 'a.jsonl'}"),
        "Parquet": (folder / "a.parquet", f"--data.dataset={folder / 'a.parquet'}"),
        "a tokenizer": (folder / "tokenizer.json", f"--data.tokenizer={folder}"),
        "a model's configuration": (folder / "config.json", f"--model.config={folder}"),
        "a run's configuration": (folder / "a.yaml", f"--config={folder / 'a.yaml'}"),
        "the run's settings": (run.results / "config.json", ""),
        "metrics": (run.results / "metrics.jsonl", ""),
        "cached tokens": (max((cache / "symlm").glob("tokens-*"), key=size_of), ""),
        "the cached tokenizer": (next((cache / "symlm").glob("bpe-*")), ""),
    }
    name = list(given)[number % len(given)]
    file, argument = given[name]
    file.write_bytes(pickle.dumps(Hostile(mark)))
    run.start(*([argument, "--resume=false", "--overwrite=true"] if argument else []), cache=cache)
    codes = run.end()
    if mark.exists():
        raise Lost(f"{name}: executed")
    if any(codes) and file.name not in run.job.text and f"{folder}' cannot be read" not in run.job.text:
        raise Lost(f"{name}: refused without its name: {tail(run.job.text)}")
    return [(0, 0.0)]


def _judge(run: Run, name: str, refusal: str) -> Outcome:
    """Look for a refusal by name, or for a whole run."""
    codes = run.end(900)  # which a hundred megabytes take
    if refusal and not any(codes):
        raise Lost(f"{name}: trained, though it is refused")
    if any(codes) and (not refusal or refusal not in run.job.text):
        raise Lost(f"{name}: ended with {codes}: {tail(run.job.text)}")
    return [(0, 0.0)]
