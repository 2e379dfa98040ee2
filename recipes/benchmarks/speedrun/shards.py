"""The benchmark's text: `.bin` shards of tokens, read in the order of their names, no token twice."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HEADER, MAGIC, VERSION = 256, 20240520, 1  # int32 numbers, of which three are used: magic, version, tokens


def read_shard(path: Path) -> np.ndarray:
    """Map a shard: a header of 256 int32 (magic, version, tokens), then the tokens as uint16.

    Returns: (tokens,).
    Raises: ValueError with the shard's name and what is wrong with it.
    """
    header, size = np.fromfile(path, dtype=np.int32, count=HEADER), path.stat().st_size
    if len(header) < HEADER:
        raise ValueError(f"{path} has {size} bytes and was cut inside its header of {4 * HEADER}: copy it again")
    magic, version, count = (int(number) for number in header[:3])
    if magic != MAGIC:
        raise ValueError(f"{path} begins with {magic}, a shard of GPT-2 tokens with {MAGIC}: is it another format?")
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, this reader knows {VERSION}: tokenize the text again")
    there = (size - 4 * HEADER) / 2
    if count < 1 or there != count:
        raise ValueError(f"{path} says that it holds {count:,} tokens and has room for {there:,g}: copy it again")
    return np.memmap(path, dtype=np.uint16, mode="r", offset=4 * HEADER, shape=(count,))


def find_shards(pattern: str) -> list[Path]:
    """Return the shards that match, in the order of their names.

    Args:
        pattern: a path whose last part may have wildcards.

    Raises: ValueError where none matches.
    """
    path = Path(pattern)
    if not (found := sorted(path.parent.glob(path.name))):
        raise ValueError(f"no shard matches {pattern}: give data.train and data.validation, or fetch the text first")
    return found


class Tokens:
    """Batches of a list of shards for one of several ranks, the same whole batches however many ranks there are.

    A batch is of one shard; what is left at a shard's end is not used, as in the benchmark's program.

    Args:
        shards: the files, all read and checked at once.
        batch: tokens of a step, of all ranks.
        length: tokens of a sequence.
        vocab_size: one more than the largest token allowed.

    Raises: ValueError for a shard that cannot be read.
    """

    def __init__(self, shards: list[Path], batch: int, length: int, vocab_size: int) -> None:
        self.shards = {path: read_shard(path) for path in shards}
        self.batch, self.length, self.vocab_size = batch, length, vocab_size

    def __len__(self) -> int:
        """Return the number of whole batches; each needs the token behind its last one as a target."""
        return sum((len(tokens) - 1) // self.batch for tokens in self.shards.values())

    def require(self, steps: int, field: str) -> None:
        """Refuse a run that the shards cannot feed.

        Args:
            steps: the batches that it takes.
            field: where the shards were given, for the message.

        Raises: ValueError with what to add.
        """
        if len(self) < steps:
            held = sum(map(len, self.shards.values()))
            raise ValueError(
                f"{field}: {len(self.shards)} shards hold {held:,} tokens, {len(self):,} batches of {self.batch:,}, "
                f"and the run takes {steps:,}; no token is read twice: add shards with at least "
                f"{(steps - len(self)) * self.batch + 1:,} tokens, or set fewer steps"
            )

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's part of each batch, and its targets: the next tokens.

        Args:
            rank: which part, in the order of the text.
            ranks: how many parts.

        Returns: two of (sequences, length), int64.
        Raises: ValueError for a token that the vocabulary does not have.
        """
        part = self.batch // ranks
        for path, tokens in self.shards.items():
            for first in range(0, (len(tokens) - 1) // self.batch * self.batch, self.batch):
                begin = first + rank * part
                read = tokens[begin : begin + part + 1].astype(np.int64)
                if (largest := int(read.max())) >= self.vocab_size:
                    raise ValueError(
                        f"{path}: token {largest} behind position {begin:,} is not in the vocabulary of "
                        f"{self.vocab_size:,}: tokenize the text with GPT-2's, or set model.vocab_size"
                    )
                x, y = torch.from_numpy(read[:-1]), torch.from_numpy(read[1:])
                yield x.view(-1, self.length), y.view(-1, self.length)
