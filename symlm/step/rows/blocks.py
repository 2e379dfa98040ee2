"""Blocks of rows, and pieces of rows that are split between ranks."""

from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from symlm.distributed.layout import Layout, cut_rows, rows_held


@dataclass(frozen=True)
class Block:
    """Describe some of this rank's rows, or a piece of one.

    Args:
        rows: Their places among the rows of which this rank stores any.
        columns: The columns of them.
        flat: Their place in the flat part, where a split row makes the part flat; None for a part of whole rows.
    """

    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    flat: slice | None = None

    def of(self, part: Tensor) -> Tensor:
        """Return the block of a part, or all of it for `ALL`.

        Args:
            part: This rank's part, (rows, n), or flat if the block has a place in the flat part.

        Returns:
            A view of the part, (rows of the block, its columns).
        """
        if self is ALL:
            return part
        return (
            part[self.rows] if self.flat is None else part[self.flat].view(-1, self.columns.stop - self.columns.start)
        )


ALL = Block()


def blocks_of(layout: Layout, elements: int) -> list[Block]:
    """Divide this rank's part into blocks of rows, and pieces of split rows.

    Args:
        layout: The parameter's layout.
        elements: The size of a block, in elements, rounded down to whole rows; at least one row.

    Returns:
        The blocks, in order.
    """
    n, size = layout.shape[-1], max(1, elements // layout.shape[-1])
    (start, stop), (first, last) = layout.interval, rows_held(layout)
    if not cut_rows(layout):
        return [Block(slice(row, min(row + size, last - first))) for row in range(0, last - first, size)]
    whole = range(-(-start // n) * n, stop // n * n + 1, n)  # where its whole rows begin, and the last of them ends
    edges = sorted({start, stop, *whole[::size], *whole[-1:]})
    return [_piece(a, b, start, n) for a, b in pairwise(edges)]


def _piece(a: int, b: int, start: int, n: int) -> Block:
    """Return the block of the elements [a, b) of the whole, rows of n, in a part that begins at `start`."""
    first = start // n
    column = slice(a % n, a % n + b - a) if a // n == (b - 1) // n else slice(0, n)
    return Block(slice(a // n - first, (b - 1) // n + 1 - first), column, slice(a - start, b - start))
