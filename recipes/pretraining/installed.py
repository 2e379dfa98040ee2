"""Text without a network: the Python source of installed packages, or the prose of their docstrings.

Packages are a fixed list, pinned by `constraints.txt`; the same versions give the same tokens. Whole packages are held
out for validation, so that no file of theirs is near a file of the training text.
"""

import ast
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from uuid import uuid4

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from pretraining.packing import CACHE, bpe_tokenizer, tokenize

TRAINING = (
    *("transformers", "torch", "sympy", "pandas", "scipy", "scikit-learn", "numpy", "matplotlib", "mypy", "deepspeed"),
    *("fonttools", "Pygments", "huggingface_hub", "trl", "peft", "pyarrow", "datasets", "narwhals", "tensorboard"),
    *("mpmath", "triton", "accelerate", "pillow", "protobuf", "joblib", "fsspec", "Werkzeug", "jsonargparse"),
)
VALIDATION = ("networkx", "pydantic", "rich", "pytest", "Jinja2")
LARGEST_FILE = 2**19  # bytes: larger ones are tables and generated code
TEXT_OF_TOKENIZER = 2**25  # characters of the training text that its vocabulary is trained on
FILES_AT_A_TIME = 512


def source(text: str) -> str:
    """Return a file's text as it is."""
    return text


def prose(text: str) -> str:
    """Return the docstrings of a file, in order, with an empty line between them; "" where it cannot be parsed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SyntaxWarnings of other people's files
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(docstring for docstring in found if docstring)


KINDS: dict[str, Callable[[str], str]] = {"installed": source, "installed-prose": prose}


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return each package's installed version.

    Raises:
        ValueError: Names the packages that are missing; `make setup` installs them.
    """
    found, missing = {}, []
    for name in packages:
        try:
            found[name] = distribution(name).version
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        raise ValueError(f"data.dataset 'installed' reads packages that are not here: {missing}; run `make setup`")
    return found


def texts(packages: tuple[str, ...], kind: str) -> Iterator[str]:
    """Yield the text of every Python file of these packages once, by package and name; equal files count once."""
    seen: set[bytes] = set()
    for name in packages:
        package = distribution(name)
        files = sorted(str(package.locate_file(file)) for file in package.files or () if file.suffix == ".py")
        for file in map(Path, files):
            if not file.is_file() or file.stat().st_size > LARGEST_FILE:
                continue
            text = KINDS[kind](file.read_text(encoding="utf-8", errors="replace"))
            digest = hashlib.sha256(text.encode()).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                yield text


def load_tokens(kind: str, vocab_size: int) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """Return the tokenizer, and the tokens for training and for validation, mapped from the cache.

    Args:
        kind: "installed" (source) or "installed-prose" (docstrings).
        vocab_size: Of the byte-level BPE that is trained on the training text.

    Raises:
        ValueError: A package is not installed.
    """
    pinned = {"kind": kind, "vocabulary": vocab_size, **versions(TRAINING), **versions(VALIDATION)}
    digest = hashlib.sha256(json.dumps(pinned, sort_keys=True).encode()).hexdigest()[:16]
    folder = CACHE / f"{kind}-{vocab_size}-{digest}"
    if not (folder / "versions.json").exists():
        _make(folder, kind, vocab_size, pinned)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    train, held = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("train", "held"))
    return tokenizer, train, held


def _make(folder: Path, kind: str, vocab_size: int, pinned: dict[str, object]) -> None:
    """Write a folder of the cache under another name, and rename it when it is whole."""
    temporary = folder.with_name(f"{folder.name}.{uuid4().hex}")
    temporary.mkdir(parents=True)
    documents = list(tqdm(texts(TRAINING, kind), desc=f"reading {kind}", unit="file"))
    step = max(1, sum(map(len, documents)) // TEXT_OF_TOKENIZER)
    tokenizer = bpe_tokenizer(documents[::step], vocab_size)
    tokenizer.save_pretrained(temporary / "tokenizer")
    for name, some in (("train", documents), ("held", list(texts(VALIDATION, kind)))):
        parts = [some[k : k + FILES_AT_A_TIME] for k in range(0, len(some), FILES_AT_A_TIME)]
        tokens = [
            np.concatenate(tokenize(part, tokenizer)).astype(np.uint16)
            for part in tqdm(parts, desc=f"tokenizing {name}", unit=f"{FILES_AT_A_TIME} files")
        ]
        np.save(temporary / f"{name}.npy", np.concatenate(tokens))
    (temporary / "versions.json").write_text(json.dumps(pinned, indent=1))
    try:
        temporary.rename(folder)
    except OSError:  # another process was first
        if not (folder / "versions.json").exists():
            raise
