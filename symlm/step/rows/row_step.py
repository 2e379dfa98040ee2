"""Row rules on the rank that stores the rows, block by block; only rows that ZeRO splits are exchanged."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from symlm_kernels.reference import row_norms
from symlm_kernels.reference.triangles import add_lower_product, is_halved, mirrored
from torch import Tensor

from symlm.distributed.collectives import summed
from symlm.distributed.layout import Layout, cut_rows, rows_held
from symlm.polar.inverse_roots import inverse_root, stored_root
from symlm.polar.precision import accumulation_dtype, resolve_dtype
from symlm.rules.rows import whitener
from symlm.rules.rule import Rule
from symlm.step.rows.blocks import Block, blocks_of


def entries_to_sum(rule: Rule, layout: Layout, gram_every: int = 1) -> int:
    """Count the elements that a step reduces over the shards: split rows, two mean rows, and a Gram matrix.

    Args:
        rule: A row rule.
        layout: The parameter's layout.
        gram_every: Every how many steps k a whitened rule has a Gram matrix; a rule that does not center sums nothing
            else, once in k steps.

    Returns:
        The number of elements, in the mean of k steps.
    """
    centered, n = rule.symmetry.shift, layout.shape[-1]
    seldom = rule.whitens * (n + (not centered)) / gram_every
    return round((len(cut_rows(layout)) + 2 * centered + seldom) * n)


def operations_of(rule: Rule, shape: tuple[int, ...], gram_every: int) -> float:
    """Count the operations of a whitened rule's products, `2mn²(1 + 1/k)`: a Gram matrix, and its inverse root.

    Args:
        rule: A row rule.
        shape: The shape (m, n) of the whole.
        gram_every: Every how many steps k the Gram matrix is computed.

    Returns:
        The count; 0 for a rule without such products.
    """
    m, n = shape
    return 2 * m * n * n * (1 + 1 / gram_every) if rule.whitens else 0


def gram_weight(group: dict[str, Any]) -> float:
    """Return the weight of this step's Gram matrix in the mean of a whitened rule, `1 − β₂^k` every k-th step, else 0.

    In a CUDA graph, whose replays are all one step, it is `1 − β₂`.

    Args:
        group: The parameter group; k is its `gram_every`.
    """
    every, beta2 = group["gram_every"], group["betas"][1]
    if every == 1 or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return 1 - beta2
    return 1 - beta2**every if (group["step"] - 1) % every == 0 else 0.0


def root_of(group: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return what computes a Gram matrix's inverse root: where that matrix stays for several steps, once for all.

    Args:
        group: The parameter group.
    """
    return stored_root if group["gram_every"] > 1 else inverse_root


@dataclass
class RowStep:
    """Run one row rule on this rank's part of a matrix.

    Args:
        rule: The row rule.
        layout: The parameter's layout.
        part: This rank's part of the momentum, of which the dtype and device are used.
        rule_input: Maps a block, and a tensor to write to, to the rule's input.
        state: The rule's state of this rank's rows, and of the whole.
        settings: Further arguments of the row map.
        gram_weight: The weight of this step's Gram matrix in its mean; 0 in a step without one.
        store: Stores the next state of the whole in `state`, before its inverse root is computed.
        root: Returns the inverse root of what is stored, see `root_of`.
        compute_dtype: The dtype of products on a GPU.
    """

    rule: Rule
    layout: Layout
    part: Tensor
    rule_input: Callable[[Block, Tensor], Tensor]
    state: dict[str, Tensor]
    settings: dict[str, Any]
    gram_weight: float
    store: Callable[[dict[str, Tensor]], None]
    root: Callable[[Tensor], Tensor] = inverse_root
    compute_dtype: str | torch.dtype = "auto"

    def directions(self, elements: int) -> Iterator[tuple[Block, Tensor, dict[str, Tensor]]]:
        """Yield the directions of each block; all ranks call this together.

        A centered rule passes over the part twice more, for the two means; a whitened rule uses the second of these
        passes for its Gram matrix, which is stored before the first block.

        Args:
            elements: The size of a block, in elements.

        Yields:
            The block, its directions, which the next one overwrites, and the next state of its rows.
        """
        blocks = blocks_of(self.layout, elements)
        self.divisors: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        self.buffer = self._empty(max((block.rows.stop - block.rows.start for block in blocks), default=0))
        self.cut_rows = self._cut_rows(blocks) if cut_rows(self.layout) else {}
        centered, whitened = self.rule.symmetry.shift, self.rule.whitens
        self.shift = self._means(blocks, self._input)[-1] if centered else None
        only = self._mapped(blocks[0]) if len(blocks) == 1 else None  # several would be a second momentum
        mean = root = None
        measured = whitened and self.gram_weight > 0
        if centered or measured:
            means = self._means(blocks, lambda block: (only or self._mapped(block))[0], measured)
        if whitened:
            root = self._whitener(means[:-1] if measured else None)
        if centered:
            mean = means[-1] if root is None else means[-1] @ root
        for block in blocks:
            U, state = only or self._mapped(block)
            U = U if root is None else self._product(U, root)
            yield block, (U if mean is None else U.sub_(mean))[:, block.columns], state

    def _mapped(self, block: Block) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the divided rows of a block, in the buffer, and the next state of the rows."""
        X = self._input(block)
        out, first = self.buffer[: len(X)], block.rows.start
        if self.shift is not None:
            X = torch.sub(X, self.shift, out=out)
        if first not in self.divisors:
            assert self.rule.row_map is not None
            row_state = {key: value[block.rows] for key, value in self.state.items() if key in self.rule.row_state_keys}
            self.divisors[first] = self.rule.row_map(row_norms(X), **row_state, **self.settings)
        divisors, state = self.divisors[first]
        return torch.div(X, divisors, out=out), state

    def _input(self, block: Block) -> Tensor:
        """Return the rule's input for a block; for a piece of a row, that of the whole row."""
        row = self.cut_rows.get(block.rows.start)
        return self.rule_input(block, self.buffer[: block.rows.stop - block.rows.start]) if row is None else row

    def _means(self, blocks: list[Block], rows: Callable[[Block], Tensor], square: bool = False) -> Tensor:
        """Return the mean row, below `XᵀX/m` if `square`, reduced over the shards at once."""
        m, n = self.layout.shape
        total = self._zeros(n * square + 1, n)
        for block in blocks:
            if block.columns.start:
                continue  # a split row is counted on the rank where it begins
            X = rows(block)
            total[-1].add_(X.sum(dim=0))
            if square:
                self._add_gram(total[:-1], X)
        if square and is_halved(total, n):
            mirrored(total[:-1])
        return summed(total, self.layout) / m

    def _add_gram(self, K: Tensor, X: Tensor) -> None:
        """Add `XᵀX` to K, on a CPU the lower triangle of a large one."""
        if X.device.type != "cpu":
            K.add_(self._product(X.mT, X))
        elif is_halved(X, len(K)):
            add_lower_product(X.mT[None], X[None], K[None], alpha=1.0, beta=1.0, out=K[None])
        else:
            K.addmm_(X.mT, X)

    def _product(self, A: Tensor, B: Tensor) -> Tensor:
        """Return `A B` in the compute dtype."""
        return product(A, B, resolve_dtype(A, self.compute_dtype))

    def _whitener(self, square: Tensor | None) -> Tensor:
        """Store this step's Gram matrix in the mean, if it has one, and return the whitener of what is stored."""
        if square is not None:
            self.store({"gram": self.state["gram"].lerp(square, self.gram_weight)})
        return whitener(self.state["gram"], self.layout.shape[0], self.root)

    def _cut_rows(self, blocks: list[Block]) -> dict[int, Tensor]:
        """Return the whole rows of which this rank stores a piece, by their places among this rank's rows."""
        rows, first = cut_rows(self.layout), rows_held(self.layout)[0]
        pieces = [(block, rows.index(first + block.rows.start)) for block in blocks if first + block.rows.start in rows]
        whole = self._zeros(len(rows), self.layout.shape[-1])
        for block, place in pieces:
            columns = block.columns
            whole[place, columns] = self.rule_input(block, self.buffer[:1, columns])[0]
        summed(whole, self.layout)
        return {block.rows.start: whole[place : place + 1] for block, place in pieces}

    def _empty(self, rows: int) -> Tensor:
        """Return uninitialized rows in the accumulation dtype, on the part's device."""
        dtype = accumulation_dtype(self.part.dtype)
        return torch.empty(rows, self.layout.shape[-1], dtype=dtype, device=self.part.device)

    def _zeros(self, *shape: int) -> Tensor:
        """Return zeros in the accumulation dtype, on the part's device."""
        return torch.zeros(shape, dtype=accumulation_dtype(self.part.dtype), device=self.part.device)


def product(A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `A B`, accumulated in fp32 or wider, so that a Gram matrix stays positive semidefinite to rounding.

    Args:
        A: The left factor, (m, k).
        B: The right factor, (k, n).
        dtype: The dtype of the factors on a GPU, if it has 16 bits; elsewhere they are fp32 or wider.

    Returns:
        The product, (m, n), in the accumulation dtype.
    """
    wide = accumulation_dtype(A.dtype)
    if not A.is_cuda or dtype.itemsize > 2 or wide != torch.float32:
        return A.to(wide) @ B.to(wide)
    return torch.mm(A.to(dtype), B.to(dtype), out_dtype=wide)
