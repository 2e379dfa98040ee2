"""MatrixView: a stored tensor as a stack of matrices (b, m, n), by a pattern that also gives the exact inverse."""

import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from symlm.views.rearrangement import Axis, Rearrangement


def _axes(side: str) -> list[Axis]:
    """Parse `"(h m) n"` to `[("h", "m"), ("n",)]`."""
    tokens = re.findall(r"\([^)]*\)|\S+", side)
    return [tuple(token.strip("()").split()) for token in tokens]


@dataclass(frozen=True)
class MatrixView:
    """Rearrange a stored tensor into matrices, `"stored -> b m n"` as einops writes it, with no copy if strides allow.

    Axes in parentheses are merged, row-major; a `1` on the right is a new axis. An axis of several sizes is one of
    unequal blocks, as of fused q, k and v; each block is a stack of its own (`sections`). Blocks that stack differently
    have one right side each, separated by `|`. `str(view)` is plain text for a parameter group, which
    `MatrixView.parse` reads.

    Args:
        pattern: The axes of the stored tensor and of the stack.
        sizes: The lengths that the stored shape does not determine, by axis; several lengths for unequal blocks.

    >>> str(MatrixView("(h m) n -> h m n", {"h": (16,)}))
    '(h m) n -> h m n, h=16'
    >>> str(MatrixView("m n -> 1 m n", {"m": (64, 32, 32)}))
    'm n -> 1 m n, m=64+32+32'
    >>> str(MatrixView("(h m) n -> h m n | 1 (h m) n", {"h": (12, 4)}))  # q and k head by head, v whole
    '(h m) n -> h m n | 1 (h m) n, h=12+4'
    """

    pattern: str
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict, hash=False)

    @classmethod
    @lru_cache(maxsize=4096)
    def parse(cls, text: str) -> "MatrixView":
        """Read the text that `str` writes.

        Args:
            text: `"pattern, axis=size, axis=size+size"`.

        Returns:
            The view.

        Raises:
            ValueError: The text has another form.
        """
        pattern, *sizes = (part.strip() for part in text.split(","))
        if pattern.count("->") != 1:
            raise ValueError(f"a view has the form 'stored -> b m n, axis=size', got {text!r}")
        named = (size.split("=") for size in sizes)
        return cls(pattern, {key: tuple(int(part) for part in value.split("+")) for key, value in named})

    def __str__(self) -> str:
        sizes = (f"{key}={'+'.join(map(str, value))}" for key, value in self.sizes.items())
        return ", ".join([self.pattern, *sizes])

    @cached_property
    def _sides(self) -> tuple[list[Axis], list[Axis]]:
        """Return the axes of the stored tensor and of the stack, of the first block's stack if there are several."""
        left, right = self.pattern.split("->")
        stored, stacks = _axes(left), [_axes(stack) for stack in right.split("|")]
        flat = sorted(name for axis in stored for name in axis)
        for stack in stacks:
            if flat != sorted(n for axis in stack for n in axis if n != "1") or len(stack) != 3:
                raise ValueError(
                    f"{self.pattern!r} is not a rearrangement into three axes b m n; each side needs all axes"
                )
        if len(stacks) not in (1, *(len(self.sizes[key]) for key in self.unequal)):
            raise ValueError(f"view {self} has {len(stacks)} right sides; give one, or one for each unequal block")
        return stored, stacks[0]

    @property
    def axes(self) -> int:
        """The number of axes of the stored tensor."""
        return len(self._sides[0])

    @property
    def unequal(self) -> list[str]:
        """The axes that are split into blocks of unequal size."""
        return [key for key, size in self.sizes.items() if len(size) > 1]

    def _lengths(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Return the length of every axis for a stored tensor of this shape."""
        stored, _ = self._sides
        if len(stored) != len(shape):
            raise ValueError(f"view {self} expects a tensor of {len(stored)} axes, got shape {tuple(shape)}")
        lengths = {"1": 1, **{key: sum(size) for key, size in self.sizes.items()}}
        for axis, length in zip(stored, shape, strict=True):
            known = prod(lengths[name] for name in axis if name in lengths)
            unknown = [name for name in axis if name not in lengths]
            if length % known or len(unknown) > 1 or (not unknown and known != length):
                raise ValueError(f"view {self} does not divide shape {tuple(shape)}: axis {axis} has {length}")
            lengths.update(dict.fromkeys(unknown, length // known))
        return lengths

    def shape(self, stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape of the stack.

        Args:
            stored_shape: The shape of one stored tensor.

        Returns:
            `(b, m, n)`.

        Raises:
            ValueError: The sizes do not divide the shape, or it has another number of axes.
        """
        self._lengths(stored_shape)  # refuses the extra axis in front that `_rearrangement` accepts
        return _rearrangement(self, tuple(stored_shape)).stack

    def sections(self, stored: Tensor) -> list[tuple["MatrixView", Tensor]]:
        """Split a stored tensor into its blocks of unequal size.

        Args:
            stored: One stored tensor, or several of one shape with one more axis in front.

        Returns:
            `(view, block)` of each block: a torch view of `stored`, and the MatrixView that reads it. A view without
            unequal blocks gives itself and `stored`.

        Raises:
            ValueError: The sizes do not divide the shape.
        """
        if not self.unequal:
            return [(self, stored)]
        left, _ = self._sides
        first = stored.ndim - len(left)
        lengths = self._lengths(tuple(stored.shape[first:]))
        names = [name for axis in left for name in axis]
        split = stored
        for k in reversed(range(len(left))):  # splitting axes never copies
            split = split.unflatten(first + k, [lengths[name] for name in left[k]]) if len(left[k]) > 1 else split
        blocks = split.split(self.sizes[self.unequal[0]], dim=first + names.index(self.unequal[0]))
        stacks = self.pattern.split("->")[1].split("|")
        each = stacks if len(stacks) > 1 else stacks * len(blocks)
        return [
            (MatrixView(f"{' '.join(names)} -> {stack.strip()}"), part)
            for stack, part in zip(each, blocks, strict=True)
        ]

    def of_interval(self, shape: tuple[int, ...], intervals: tuple[tuple[int, int], ...]) -> "MatrixView | None":
        """Return the view of one part of the flat stored tensor, if every part holds whole matrices.

        Args:
            shape: The shape of the stored tensor.
            intervals: `(start, stop)` of each part in the flat tensor.

        Returns:
            The view that reads a part with any number of whole matrices; None if some part splits a matrix.
        """
        if all(edge in (0, prod(shape)) for interval in intervals for edge in interval):
            return self
        left, right = self._sides
        first, lengths = left[0][0], self._lengths(shape)
        unit = prod(shape) // lengths[first]
        if right[0][:1] != (first,) or self.unequal:
            return None
        if any(edge % unit for interval in intervals for edge in interval):
            return None
        sizes = {key: size for key, size in self.sizes.items() if key != first}
        inner = {name: (lengths[name],) for name in left[0][1:]}
        return MatrixView(self.pattern, {**sizes, **inner})

    def consecutive(self, stored_shape: tuple[int, ...]) -> int | None:
        """Return the number of matrices of a contiguous tensor, if the entries of each are consecutive in memory.

        Args:
            stored_shape: The shape of the tensor.

        Returns:
            The number; None if a matrix has entries of others between its own, or blocks stack differently.
        """
        return None if self.unequal else _consecutive(self, tuple(stored_shape))

    def to_matrices(self, stored: Tensor) -> Tensor:
        """Return the stack of a stored tensor, a torch view of it where strides allow.

        Args:
            stored: One stored tensor, or k of one shape with one more axis in front.

        Returns:
            The stack, (b, m, n); of k tensors their stacks one after the other, (k·b, m, n).

        Raises:
            ValueError: The sizes do not divide the shape, or it has another number of axes.
        """
        return _rearrangement(self, tuple(stored.shape)).stacked(stored)

    def from_matrices(self, stack: Tensor, stored_shape: tuple[int, ...]) -> Tensor:
        """Return the stored tensor of a stack, the exact inverse of `to_matrices`.

        Args:
            stack: The matrices, (b, m, n).
            stored_shape: The shape that `to_matrices` was given.

        Returns:
            A tensor of that shape.

        Raises:
            ValueError: The sizes do not divide the shape, or it has another number of axes.
        """
        return _rearrangement(self, tuple(stored_shape)).unstacked(stack, tuple(stored_shape))


@lru_cache(maxsize=4096)
def _consecutive(view: MatrixView, shape: tuple[int, ...]) -> int | None:
    """Return the number of matrices of a contiguous tensor, or None, as `MatrixView.consecutive` says."""
    stack = view.to_matrices(torch.empty(shape, device="meta"))  # a copy of other strides is no view
    return len(stack) if stack._is_view() and (stack.is_contiguous() or stack.mT.is_contiguous()) else None


@lru_cache(maxsize=4096)  # it is asked for every batch of every step
def _rearrangement(view: MatrixView, shape: tuple[int, ...]) -> Rearrangement:
    """Return the rearrangement of one stored shape, or of several tensors of it with one more axis in front."""
    left, right = view._sides
    first = max(0, len(shape) - len(left))
    if first > 1:
        raise ValueError(f"view {view} expects {len(left)} axes, or many with one in front, got shape {shape}")
    return Rearrangement.of(left, right, view._lengths(shape[first:]), shape[:first])
