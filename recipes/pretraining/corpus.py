"""Where the text comes from: the embedded corpus, local files, Hugging Face datasets, pre-tokenized shards."""

import hashlib
import re
import sysconfig
import warnings
from itertools import accumulate
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Subset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pretraining import installed
from pretraining.packing import Packed, PackedStream, _text, bpe_tokenizer, packed_tokens, tokenize

EMBEDDED = "stdlib"


MAGICS = {20240520: 1, 20240801: 1, 20260317: 2}  # llm.c GPT-2, llm.c Llama 3, and the paper's; with their versions


def stdlib_documents() -> list[str]:
    """Return the source files of the running Python's standard library, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


def is_validation(document: str) -> bool:
    """Put one document in 32 aside, by its own text, so that the split never moves."""
    return hashlib.sha256(document.encode()).digest()[0] < 8


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Return the documents for training and for validation; of too few, the first, or the end of the only one."""
    rest = [text for text in documents if not is_validation(text)]
    held = [text for text in documents if is_validation(text)]
    if rest and held:
        return rest, held
    cut = len(documents[0]) * 31 // 32
    return (documents[1:], documents[:1]) if len(documents) > 1 else ([documents[0][:cut]], [documents[0][cut:]])


def read_shard(path: Path) -> np.ndarray:
    """Map a `.bin` shard: 256 int32 (magic, version, tokens, bytes a token), then the tokens.

    Raises: ValueError with the shard's name and what is wrong with it.
    """
    size = path.stat().st_size
    if size < 1024:
        raise ValueError(f"{path}: truncated, {size} bytes are less than its header of 1024")
    magic, version, count, width = (int(x) for x in np.fromfile(path, dtype=np.int32, count=4))
    if MAGICS.get(magic) is None:
        raise ValueError(f"{path}: magic number {magic} is none of {sorted(MAGICS)}")
    width = width if version == 2 else {20240520: 2, 20240801: 4}.get(magic, 2)
    if width not in (2, 4):
        raise ValueError(f"{path}: {width} bytes a token, expected 2 or 4")
    if size != 1024 + count * width:
        raise ValueError(f"{path}: the header promises {count} tokens of {width} bytes, the file holds {size - 1024}")
    return np.memmap(path, dtype=np.uint16 if width == 2 else np.uint32, mode="r", offset=1024, shape=(count,))


STRING, BRACKET = re.compile(rb'"(?:[^"\\\\]|\\\\.)*"'), re.compile(rb"[\[\]{}]")
DEEPEST = (
    1000  # brackets inside each other; pyarrow's parser calls itself for each, and tens of thousands end the process
)


def refuse_deep(path: Path) -> None:
    """Look at a JSON file's brackets before it is parsed.  Raises: ValueError, naming the line that nests too deep."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.count(b"[") + line.count(b"{") <= DEEPEST:  # so for nearly all
                continue
            opened = (1 if bracket[0] in b"[{" else -1 for bracket in BRACKET.finditer(STRING.sub(b"", line)))
            if (depth := max(accumulate(opened), default=0)) > DEEPEST:
                raise ValueError(f"{path}: line {number} nests {depth} brackets, more than {DEEPEST}: remove the line")


def read_documents(path: str, column: str) -> list[str]:
    """Read local `.txt`, `.jsonl` or `.parquet` files, a folder of them, or one."""
    from datasets import load_dataset

    root = Path(path)
    files = sorted(str(f) for f in (root.rglob("*") if root.is_dir() else [root]) if f.is_file())
    kinds = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    documents: list[str] = []
    for file in files:
        kind = kinds.get(Path(file).suffix)
        if kind == "text":
            try:
                documents.append(Path(file).read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is no UTF-8 text: {error}") from None
        elif kind and Path(file).stat().st_size:
            if kind == "json":
                refuse_deep(Path(file))
            try:
                rows = load_dataset(kind, data_files=file, split="train")
            except Exception as error:  # whatever datasets raises does not name the file
                raise ValueError(f"{file} cannot be read: {error.__cause__ or error}") from error
            documents += texts_of(rows, column, file)
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"{path}: no .txt, .md, .jsonl, .json or .parquet document there that has any text")
    return documents


def texts_of(rows, column: str, where: str) -> list[str]:
    """Return a table's texts.  Raises: ValueError, naming the column and those there are, or the row that has none."""
    if column not in rows.column_names:
        raise ValueError(f"{where} has no column {column!r} (data.column), but {rows.column_names}")
    texts = list(rows[column])
    if bad := [k for k, text in enumerate(texts) if not isinstance(text, str)]:
        raise ValueError(f"{where}: row {bad[0]} has {texts[bad[0]]!r} in column {column!r}, which is no text")
    return texts


def load(data, seed: int, samples: int) -> tuple[PreTrainedTokenizerBase | None, Dataset, Dataset]:
    """Return the tokenizer, the training set of `samples` blocks and the fixed validation set of a `DataConfig`."""
    root = Path(data.dataset)
    named = _named_tokenizer(data.tokenizer) if data.tokenizer else None
    if paths := sorted(root.glob("*.bin")) if root.is_dir() else [root] if root.suffix == ".bin" else []:
        train, held = _split_shards(paths, data.validation_blocks * data.length)
        return named, Packed(train, data.length, samples, seed), _validation(held, data)
    if data.dataset in installed.KINDS:
        return _installed(data, seed, samples)
    if data.dataset != EMBEDDED and not root.exists():
        return _stream(data, named, seed)
    texts = stdlib_documents() if data.dataset == EMBEDDED else read_documents(data.dataset, data.column)
    rest, held = split(texts)
    tokenizer = named or bpe_tokenizer(rest, data.vocab_size)
    train = Packed([packed_tokens(rest, tokenizer)], data.length, samples, seed)
    return tokenizer, train, _validation([packed_tokens(held, tokenizer)], data)


def _named_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises: ValueError for whatever transformers raises, which does not name the tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(f"data.tokenizer {name!r} cannot be read: {error}") from error


def _installed(data, seed: int, samples: int) -> tuple[PreTrainedTokenizerBase, Dataset, Dataset]:
    """Take the text of installed packages, no block of it twice."""
    if data.tokenizer:
        raise ValueError(f"data.dataset {data.dataset!r} trains its own tokenizer: leave out data.tokenizer")
    tokenizer, tokens, held = installed.load_tokens(data.dataset, data.vocab_size)
    train = Packed([tokens], data.length, samples, seed)
    if samples > train.blocks:
        raise ValueError(
            f"the run takes {samples * data.length:,} tokens and {data.dataset!r} has {train.blocks * data.length:,}: "
            "use fewer train.steps, a smaller train.batch, or data.dataset=installed"
        )
    return tokenizer, train, _validation([held], data)


def _split_shards(paths: list[Path], tokens: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Hold out the shards with `val` in their names, else the first `tokens` of the first shard."""
    held = [read_shard(path) for path in paths if "val" in path.name]
    train = [read_shard(path) for path in paths if "val" not in path.name]
    if not train:
        raise ValueError(f"{[str(path) for path in paths]} are all for validation, by their names")
    return ([train[0][tokens:], *train[1:]], [train[0][:tokens]]) if not held else (train, held)


def _stream(data, tokenizer: PreTrainedTokenizerBase | None, seed: int):
    from datasets import load_dataset

    if tokenizer is None:
        raise ValueError(f"{data.dataset!r} is no local path; a Hub dataset needs data.tokenizer, a name or a path")
    stream = load_dataset(data.dataset, data.subset, split="train", streaming=True)
    return tokenizer, *split_stream(stream, data, tokenizer, seed)


def split_stream(stream, data, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[IterableDataset, Dataset]:
    """Hold out a stream's first documents, as many as the validation blocks take, and shuffle the rest."""
    held: list[np.ndarray] = []
    missing = data.validation_blocks * data.length
    for row in stream:
        if missing <= 0:
            break
        held += tokenize([_text(row, data.column)], tokenizer)
        missing -= len(held[-1])
    shuffled = stream.skip(len(held)).shuffle(seed=seed, buffer_size=1000)
    return PackedStream(shuffled, data.column, tokenizer, data.length, seed), _validation(held, data)


def _validation(documents: list[np.ndarray], data) -> Dataset:
    """Take blocks evenly over all held-out documents, so that no single long one speaks for the rest."""
    whole = Packed([np.concatenate(documents)], data.length, None, seed=None)
    count = min(whole.blocks, data.validation_blocks)
    if count < data.validation_blocks:
        warnings.warn(f"{count} blocks are held out, not {data.validation_blocks}: there is no more text", stacklevel=3)
    return Subset(whole, np.linspace(0, whole.blocks - 1, count, dtype=int).tolist())
