"""Row rules where the rows are: block by block, and no row travels but those that ZeRO cuts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from symlm_kernels.reference import row_norms
from torch import Tensor

from symlm.distributed.collectives import summed
from symlm.distributed.layout import Layout, cut_rows, rows_held
from symlm.polar.precision import resolve_dtype
from symlm.rules.rows import whitener
from symlm.rules.rule import Rule
from symlm.step.rows.blocks import Block, blocks_of


def entries_to_sum(rule: Rule, layout: Layout) -> int:
    """Count the numbers that a step sums over the shards: the rows that are cut, two mean rows, a Gram matrix."""
    centered, n = rule.symmetry.shift, layout.shape[-1]
    means = centered + (1 + n * rule.whitens) * (centered or rule.whitens)
    return (len(cut_rows(layout)) + means) * n


def operations_of(rule: Rule, shape: tuple[int, ...]) -> int:
    """Count the floating-point operations of products of whole rows: a Gram matrix, and what turns by it."""
    m, n = shape
    return 4 * m * n * n if rule.whitens else 0


@dataclass
class RowStep:
    """One row rule on this rank's part of a matrix.

    part: where the rule's input lies, for its dtype and device; look: what the rule sees of a block; state: what it
    keeps of the rows held, and of the whole; settings: what else its map takes; compute_dtype: of products on a GPU.
    """

    rule: Rule
    layout: Layout
    part: Tensor
    rule_input: Callable[[Block], Tensor]
    state: dict[str, Tensor]
    settings: dict[str, Any]
    compute_dtype: str | torch.dtype = "auto"

    def directions(self, elements: int) -> Iterator[tuple[Block, Tensor, dict[str, Tensor]]]:
        """Yield each block, its direction and its rows' next state; all ranks call this together.

        A centered rule passes over the part twice more, for the two means; the second pass is also a whitened rule's,
        whose Gram matrix is in `kept` from the first block on.
        """
        blocks = blocks_of(self.layout, elements)
        self.matrix_state: dict[str, Tensor] = {}
        self.cut_rows = self._cut_rows(blocks) if cut_rows(self.layout) else {}
        centered, whitened = self.rule.symmetry.shift, self.rule.whitens
        self.shift = self._means(blocks, self._input)[-1] if centered else None
        mean = turn = None
        if centered or whitened:
            means = self._means(blocks, lambda block: self._mapped(block)[0], whitened)
            turn = self._whitener(means[:-1]) if whitened else None
            mean = (means[-1] if turn is None else means[-1] @ turn) if centered else None
        for block in blocks:
            U, state = self._mapped(block)
            U = U if turn is None else self._product(U, turn)
            yield block, (U if mean is None else U.sub_(mean))[:, block.columns], state

    def _mapped(self, block: Block) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.rule.row_map is not None
        X = self._input(block) if self.shift is None else self._input(block) - self.shift
        own = {key: value[block.rows] for key, value in self.state.items() if key in self.rule.row_state_keys}
        return self.rule.row_map(X, row_norms(X), **own, **self.settings)

    def _input(self, block: Block) -> Tensor:
        """Return what the rule sees of the block's rows, those whole of which it is a piece."""
        row = self.cut_rows.get(block.rows.start)
        return self.rule_input(block) if row is None else row

    def _means(self, blocks: list[Block], rows: Callable[[Block], Tensor], square: bool = False) -> Tensor:
        """Return the mean row, and above it `XᵀX/m` if asked for, in one sum over the shards."""
        m, n = self.layout.shape
        total = self._zeros(n * square + 1, n)
        for block in blocks:
            if block.columns.start:
                continue  # a cut row counts where it begins
            X = rows(block)
            total[-1] += X.sum(dim=0)
            if square:
                total[:-1] += self._product(X.mT, X)
        return summed(total, self.layout) / m

    def _product(self, A: Tensor, B: Tensor) -> Tensor:
        return product(A, B, resolve_dtype(A, self.compute_dtype))

    def _whitener(self, square: Tensor) -> Tensor:
        """Return what turns the row map's columns, by the Gram matrix in the mean of steps, which is kept."""
        self.matrix_state["gram"] = self.state["gram"].lerp(square, 1 - self.settings["beta2"])
        return whitener(self.matrix_state["gram"], self.layout.shape[0])

    def _cut_rows(self, blocks: list[Block]) -> dict[int, Tensor]:
        """Return, by their places here, the whole rows of which this rank holds a piece."""
        rows, first = cut_rows(self.layout), rows_held(self.layout)[0]
        pieces = [(block, rows.index(first + block.rows.start)) for block in blocks if first + block.rows.start in rows]
        whole = self._zeros(len(rows), self.layout.shape[-1])
        for block, place in pieces:
            whole[place, block.columns] = self.rule_input(block)[0]
        summed(whole, self.layout)
        return {block.rows.start: whole[place : place + 1] for block, place in pieces}

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=accumulation_dtype(self.part.dtype), device=self.part.device)


def product(A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A B in fp32 or wider, on a GPU of half-precision factors, summed in fp32: a Gram matrix stays one."""
    wide = accumulation_dtype(A.dtype)
    if not A.is_cuda or dtype.itemsize > 2 or wide != torch.float32:
        return A.to(wide) @ B.to(wide)
    return torch.mm(A.to(dtype), B.to(dtype), out_dtype=wide)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
