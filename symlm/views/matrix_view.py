"""MatrixView: a stored tensor as stacks of matrices (b, m, n), by a pattern that is also its exact inverse."""

import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

from torch import Tensor

Axis = tuple[str, ...]


def _axes(side: str) -> list[Axis]:
    """Parse `"(h m) n"` to `[("h", "m"), ("n",)]`."""
    tokens = re.findall(r"\([^)]*\)|\S+", side)
    return [tuple(token.strip("()").split()) for token in tokens]


@dataclass(frozen=True)
class MatrixView:
    """A rearrangement `"stored -> b m n"` in the notation of einops, without a copy where strides allow.

    Axes in parentheses are merged, row-major; a `1` on the right is a new axis. `sizes` gives those that the
    stored shape does not tell. A size that is a sum names an axis of unequal blocks, each a stack of its own
    (`sections`): fused q, k and v. Blocks that stack differently have a right side each, set apart by `|`.
    `str(view)` is plain text for a parameter group; `MatrixView.parse` reads it.

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
        """Read the form that `str` writes.  Raises: ValueError for any other text."""
        pattern, *sizes = (part.strip() for part in text.split(","))
        if pattern.count("->") != 1:
            raise ValueError(f"a view reads 'stored -> b m n, axis=size', got {text!r}")
        named = (size.split("=") for size in sizes)
        return cls(pattern, {key: tuple(int(part) for part in value.split("+")) for key, value in named})

    def __str__(self) -> str:
        sizes = (f"{key}={'+'.join(map(str, value))}" for key, value in self.sizes.items())
        return ", ".join([self.pattern, *sizes])

    @cached_property
    def _sides(self) -> tuple[list[Axis], list[Axis]]:
        """Return the axes of the stored tensor and of the stack; of the first block's, if there are several."""
        left, right = self.pattern.split("->")
        stored, stacks = _axes(left), [_axes(stack) for stack in right.split("|")]
        flat = sorted(name for axis in stored for name in axis)
        for stack in stacks:
            if flat != sorted(n for axis in stack for n in axis if n != "1") or len(stack) != 3:
                raise ValueError(f"{self.pattern!r} is no rearrangement into three axes b m n")
        if len(stacks) not in (1, *(len(self.sizes[key]) for key in self.unequal)):
            raise ValueError(f"view {self} has {len(stacks)} right sides for another number of blocks")
        return stored, stacks[0]

    @property
    def axes(self) -> int:
        """Return how many axes the stored tensor has."""
        return len(self._sides[0])

    @property
    def unequal(self) -> list[str]:
        """Return the axes that are cut in blocks of unequal size."""
        return [key for key, size in self.sizes.items() if len(size) > 1]

    def _lengths(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Solve for every axis length of a stored tensor of this shape."""
        stored, _ = self._sides
        if len(stored) != len(shape):
            raise ValueError(f"view {self} wants a tensor of {len(stored)} axes, got shape {tuple(shape)}")
        lengths = {"1": 1, **{key: sum(size) for key, size in self.sizes.items()}}
        for axis, length in zip(stored, shape, strict=True):
            known = prod(lengths[name] for name in axis if name in lengths)
            unknown = [name for name in axis if name not in lengths]
            if length % known or len(unknown) > 1 or (not unknown and known != length):
                raise ValueError(f"view {self} does not divide shape {tuple(shape)}: axis {axis} has {length}")
            lengths.update(dict.fromkeys(unknown, length // known))
        return lengths

    def shape(self, stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return (b, m, n) for a stored shape.  Raises: ValueError when the sizes do not divide it."""
        self._lengths(stored_shape)  # of one tensor alone
        return _rearrangement(self, tuple(stored_shape)).stack

    def sections(self, stored: Tensor) -> list[tuple["MatrixView", Tensor]]:
        """Return the blocks of unequal size, each a view of the stored tensor with the MatrixView that reads it."""
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
            (MatrixView(f"{' '.join(names)} -> {own.strip()}"), part) for own, part in zip(each, blocks, strict=True)
        ]

    def of_interval(self, shape: tuple[int, ...], intervals: tuple[tuple[int, int], ...]) -> "MatrixView | None":
        """Return the view of one part of the flat stored tensor, if every part holds whole matrices; else None."""
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

    def to_matrices(self, stored: Tensor) -> Tensor:
        """Return the stack (b, m, n) of a stored tensor; a view of it where strides allow.

        stored: also many of one shape, with an axis more in front: their stacks one behind the other.
        """
        found = _rearrangement(self, tuple(stored.shape))
        return stored.reshape(found.split).permute(found.order).reshape(found.stack)

    def from_matrices(self, stack: Tensor, stored_shape: tuple[int, ...]) -> Tensor:
        """Invert `to_matrices`: (b, m, n) -> a tensor of `stored_shape`."""
        found = _rearrangement(self, tuple(stored_shape))
        return stack.reshape([found.split[k] for k in found.order]).permute(found.back).reshape(stored_shape)


class Rearrangement(NamedTuple):
    """A view of one stored shape: its axes split, their order in the stack, the stack's shape, and the order back."""

    split: list[int]
    order: list[int]
    stack: tuple[int, int, int]
    back: list[int]


@lru_cache(maxsize=4096)  # of every batch of every step
def _rearrangement(view: MatrixView, shape: tuple[int, ...]) -> Rearrangement:
    left, right = view._sides
    first = max(0, len(shape) - len(left))
    if first > 1:
        raise ValueError(f"view {view} wants tensors of {len(left)} axes, or many with one in front, got shape {shape}")
    many, lengths = shape[:first], view._lengths(shape[first:])
    source = [name for axis in left for name in axis]
    target = [name for axis in right for name in axis if name != "1"]
    b, m, n = (prod(lengths[name] for name in axis) for axis in right)
    order, back = [source.index(name) for name in target], [target.index(name) for name in source]
    return Rearrangement(
        [*many, *(lengths[name] for name in source)],
        [*range(first), *(first + k for k in order)],
        (prod(many) * b, m, n),
        [*range(first), *(first + k for k in back)],
    )
