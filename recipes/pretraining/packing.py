"""Text to packed blocks of tokens: the tokenizer, the cache of tokens, and datasets of blocks."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "symlm"


END = "<|endoftext|>"


TEXT = 1_000_000  # characters that are tokenized at once


BUFFER = 1024  # blocks through which a stream is shuffled


def bpe_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the documents, or take the cached one of the same text and size."""
    digest = hashlib.sha256("".join(documents).encode()).hexdigest()[:16]
    path = CACHE / f"bpe-{vocab_size}-{digest}.json"
    if not path.exists():
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(documents, vocab_size=vocab_size, special_tokens=[END], show_progress=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid4().hex}")
        tokenizer.save(str(temporary))
        temporary.replace(path)
    with _cached(path):
        return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=END, bos_token=END, pad_token=END)


@contextmanager
def _cached(path: Path) -> Iterator[None]:
    """Read a file of the cache in a `with` block.  Raises: ValueError that names it, where it is damaged."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{path} cannot be read ({error}): remove it, and it is made again") from error


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Return each document's tokens with the end token behind it; of text at once they take 100 times its memory."""
    arrays: list[list[np.ndarray]] = [[] for _ in documents]
    for batch in _batches((k, piece) for k, document in enumerate(documents) for piece in _pieces(document)):
        encoded = tokenizer([piece for _, piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for (k, _), ids in zip(batch, encoded, strict=True):
            arrays[k].append(np.array(ids, dtype=np.int32))
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    return [np.concatenate([*array, end]) for array in arrays]


def _pieces(document: str) -> Iterator[str]:
    """Cut a document of more than `TEXT` characters before spaces, where a word begins anyway."""
    start = 0
    while start < len(document):
        end = start + TEXT
        space = document.rfind(" ", start + 1, end) if end < len(document) else -1
        end = space if space > 0 else end
        yield document[start:end]
        start = end


def _batches(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Put pieces together until they have `TEXT` characters."""
    batch: list[tuple[int, str]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= TEXT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def packed_tokens(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return all documents' tokens end to end, tokenized once and stored in the cache, mapped from there."""
    digest = hashlib.sha256("".join([*documents, *sorted(tokenizer.get_vocab())]).encode()).hexdigest()[:16]
    path = CACHE / f"tokens-{digest}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid4().hex}.npy")
        np.save(temporary, np.concatenate(tokenize(documents, tokenizer)))
        temporary.replace(path)
    with _cached(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)


class Collate:
    """Stack blocks to a batch, after a look at every token.  Raises: ValueError for one out of the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        batch = torch.stack(blocks)
        smallest, largest = (int(x) for x in torch.aminmax(batch))
        if smallest < 0 or largest >= self.vocabulary:
            bad = smallest if smallest < 0 else largest
            raise ValueError(f"token {bad} of the data is out of the model's vocabulary of {self.vocabulary}")
        return batch


class Packed(Dataset):
    """Blocks of `length` tokens from arrays laid end to end, drawn in an order of the seed, anew each epoch.

    Blocks of one batch come from all over the corpus; neighbours of one document would teach far less. Arrays may be
    mapped files: a block is read when it is asked for. What an array has beyond its last whole block is left out.
    """

    def __init__(self, arrays: list[np.ndarray], length: int, samples: int | None, seed: int | None) -> None:
        self.arrays, self.length, self.seed, self.epoch = arrays, length, seed, -1
        self.ends = np.cumsum([len(array) // length for array in arrays])
        self.blocks = int(self.ends[-1])
        if self.blocks < 1:
            raise ValueError(f"the dataset has {sum(map(len, arrays))} tokens, less than one block of {length}")
        self.samples = samples or self.blocks

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        epoch, block = divmod(index, self.blocks)
        if self.seed is not None:
            if epoch != self.epoch:
                self.order, self.epoch = np.random.default_rng((self.seed, epoch)).permutation(self.blocks), epoch
            block = int(self.order[block])
        k = int(np.searchsorted(self.ends, block, side="right"))
        start = (block - (int(self.ends[k - 1]) if k else 0)) * self.length
        return torch.from_numpy(self.arrays[k][start : start + self.length].astype(np.int64))


class PackedStream(IterableDataset):
    """The same of a streamed Hugging Face dataset, whose blocks are shuffled through a buffer."""

    def __init__(self, stream, column: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> None:
        self.stream, self.column, self.tokenizer, self.length, self.seed = stream, column, tokenizer, length, seed

    def __iter__(self) -> Iterator[torch.Tensor]:
        buffer: list[torch.Tensor] = []
        random = np.random.default_rng(self.seed)
        for block in self._blocks():
            buffer.append(block)
            if len(buffer) == BUFFER:
                k = int(random.integers(BUFFER))
                buffer[k], buffer[-1] = buffer[-1], buffer[k]
                yield buffer.pop()
        yield from (buffer[k] for k in random.permutation(len(buffer)))

    def _blocks(self) -> Iterator[torch.Tensor]:
        rest: list[int] = []
        for row in self.stream:
            rest += tokenize([_text(row, self.column)], self.tokenizer)[0].tolist()
            whole = len(rest) - len(rest) % self.length
            for start in range(0, whole, self.length):
                yield torch.tensor(rest[start : start + self.length])
            rest = rest[whole:]


def _text(row: dict, column: str) -> str:
    if not isinstance(row.get(column), str):
        raise ValueError(f"a row of the dataset has no text in column {column!r} (data.column), but {sorted(row)}")
    return row[column]
