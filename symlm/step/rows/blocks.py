"""Blocks of rows, and the pieces of rows that a partition cuts."""

from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from symlm.distributed.layout import Layout, cut_rows, rows_held


@dataclass(frozen=True)
class Block:
    """Some of this rank's rows, or a piece of one: `rows` among those it holds any of, `columns` of them."""

    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    flat: slice | None = None  # where a part that is cut inside of rows has them

    def of(self, part: Tensor) -> Tensor:
        """Return the block of a part: of whole rows by its rows, of a flat one by its place; all of any shape."""
        if self is ALL:
            return part
        return (
            part[self.rows] if self.flat is None else part[self.flat].view(-1, self.columns.stop - self.columns.start)
        )


ALL = Block()


def blocks_of(layout: Layout, elements: int) -> list[Block]:
    """Cut this rank's part in blocks of about `elements`, which stay near a cache, and pieces of cut rows."""
    n, size = layout.shape[-1], max(1, elements // layout.shape[-1])
    (start, stop), (first, last) = layout.interval, rows_held(layout)
    if not cut_rows(layout):
        return [Block(slice(row, min(row + size, last - first))) for row in range(0, last - first, size)]
    whole = range(-(-start // n) * n, stop // n * n + 1, n)  # where its whole rows begin, and the last of them ends
    edges = sorted({start, stop, *whole[::size], *whole[-1:]})
    return [_piece(a, b, start, n) for a, b in pairwise(edges)]


def _piece(a: int, b: int, start: int, n: int) -> Block:
    first = start // n
    column = slice(a % n, a % n + b - a) if a // n == (b - 1) // n else slice(0, n)
    return Block(slice(a // n - first, (b - 1) // n + 1 - first), column, slice(a - start, b - start))
