"""Row rules where the rows lie: block by block, and no row travels; of rows that ZeRO cut, only the squares do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from symlm_kernels.reference import row_norms
from torch import Tensor

from symlm.collectives import Layout, summed
from symlm.rules.rule import Rule


@dataclass(frozen=True)
class Block:
    """Some of this rank's rows, or a piece of one: `rows` among those it holds any of, `columns` of them."""

    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    flat: slice | None = None  # where a part that is cut inside of rows has them

    def of(self, part: Tensor) -> Tensor:
        """Return the block of a part: of whole rows by its rows, of a flat one by its place."""
        return (
            part[self.rows] if self.flat is None else part[self.flat].view(-1, self.columns.stop - self.columns.start)
        )


ALL = Block()


def cuts_rows(layout: Layout) -> bool:
    """Tell whether any rank's part begins or ends inside of a row."""
    return any(edge % layout.shape[-1] for interval in layout.intervals for edge in interval)


def rows_held(layout: Layout) -> tuple[int, int]:
    """Return [first, last) of the rows of which this rank holds a piece."""
    (start, stop), n = layout.interval, layout.shape[-1]
    return start // n, start // n if start == stop else -(-stop // n)


def blocks_of(layout: Layout, elements: int) -> list[Block]:
    """Cut this rank's part in blocks of about `elements`, which stay near a cache, and pieces of cut rows."""
    n, size = layout.shape[-1], max(1, elements // layout.shape[-1])
    (start, stop), (first, last) = layout.interval, rows_held(layout)
    if not cuts_rows(layout):
        return [Block(slice(row, min(row + size, last - first))) for row in range(0, last - first, size)]
    whole = range(-(-start // n) * n, stop // n * n + 1, n)  # where its whole rows begin, and the last of them ends
    edges = sorted({start, stop, *whole[::size], *whole[-1:]})
    return [_piece(a, b, start, n) for a, b in pairwise(edges)]


def _piece(a: int, b: int, start: int, n: int) -> Block:
    first = start // n
    column = slice(a % n, a % n + b - a) if a // n == (b - 1) // n else slice(0, n)
    return Block(slice(a // n - first, (b - 1) // n + 1 - first), column, slice(a - start, b - start))


@dataclass
class RowStep:
    """One row rule on this rank's part of a matrix.

    part: where the rule's input lies, for its dtype and device; look: what the rule sees of a block; state: what it
    keeps of the rows held; settings: what else its map takes.
    """

    rule: Rule
    layout: Layout
    part: Tensor
    look: Callable[[Block], Tensor]
    state: dict[str, Tensor]
    settings: dict[str, Any]

    def directions(self, elements: int) -> Iterator[tuple[Block, Tensor, dict[str, Tensor]]]:
        """Yield each block, its direction and its rows' next state; all ranks call this together.

        A centered rule passes over the part twice more, for the two means.
        """
        blocks, mean = blocks_of(self.layout, elements), None
        self.shift: Tensor | None = None
        if self.rule.symmetry.shift:
            self.shift = self._mean_row(blocks, self.look)
        self.norms = self._norms_of_cut_rows(blocks) if cuts_rows(self.layout) else {}
        if self.rule.symmetry.shift:
            mean = self._mean_row(blocks, lambda block: self._mapped(block)[0])
        for block in blocks:
            U, state = self._mapped(block)
            yield block, U if mean is None else U.sub_(mean[block.columns]), state

    def _mapped(self, block: Block) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.rule.row_map is not None
        X, norm = self._seen(block), self.norms.get(block.rows.start)
        own = {key: value[block.rows] for key, value in self.state.items()}
        return self.rule.row_map(X, row_norms(X) if norm is None else norm, **own, **self.settings)

    def _seen(self, block: Block) -> Tensor:
        X = self.look(block)
        return X if self.shift is None else X - self.shift[block.columns]

    def _mean_row(self, blocks: list[Block], values: Callable[[Block], Tensor]) -> Tensor:
        total = torch.zeros(self.layout.shape[-1], dtype=_wide(self.part.dtype), device=self.part.device)
        for block in blocks:
            total[block.columns] += values(block).sum(dim=0)
        return summed(total, self.layout) / self.layout.shape[0]

    def _norms_of_cut_rows(self, blocks: list[Block]) -> dict[int, Tensor]:
        """Return, by their places here, the norms of cut rows; in float64, where no square overflows."""
        n, first = self.layout.shape[-1], rows_held(self.layout)[0]
        rows = sorted({edge // n for interval in self.layout.intervals for edge in interval if edge % n})
        pieces = [(block, rows.index(first + block.rows.start)) for block in blocks if first + block.rows.start in rows]
        squares = torch.zeros(len(rows), dtype=torch.float64, device=self.part.device)
        for block, place in pieces:
            squares[place] += self._seen(block).double().square().sum()
        norms = summed(squares, self.layout).sqrt().to(_wide(self.part.dtype))
        return {block.rows.start: norms[place].view(1, 1) for block, place in pieces}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
