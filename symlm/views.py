"""MatrixView: a stored tensor as a stack of matrices (b, m, n), by a pattern that is also its exact inverse."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from torch import Tensor

from symlm.roles import Role, Site

Axis = tuple[str, ...]


def _axes(side: str) -> list[Axis]:
    """Parse `"(h m) n"` to `[("h", "m"), ("n",)]`."""
    tokens = re.findall(r"\([^)]*\)|\S+", side)
    return [tuple(token.strip("()").split()) for token in tokens]


@dataclass(frozen=True)
class MatrixView:
    """A rearrangement `"stored -> b m n"` in the notation of einops, without a copy where strides allow.

    Axes in parentheses are merged, row-major; a `1` on the right is a new axis. `sizes` gives those that the
    stored shape does not tell. `str(view)` is plain text for a parameter group, and `MatrixView.parse` reads it.

    >>> str(MatrixView("(h m) n -> h m n", {"h": 16}))
    '(h m) n -> h m n, h=16'
    """

    pattern: str
    sizes: dict[str, int] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, text: str) -> "MatrixView":
        """Read the form that `str` writes.  Raises: ValueError for any other text."""
        pattern, *sizes = (part.strip() for part in text.split(","))
        if pattern.count("->") != 1:
            raise ValueError(f"a view reads 'stored -> b m n, axis=size', got {text!r}")
        return cls(pattern, {key: int(value) for key, value in (size.split("=") for size in sizes)})

    def __str__(self) -> str:
        return ", ".join([self.pattern, *(f"{key}={value}" for key, value in self.sizes.items())])

    @cached_property
    def _sides(self) -> tuple[list[Axis], list[Axis]]:
        stored, stack = (_axes(side) for side in self.pattern.split("->"))
        flat = [name for axis in stored for name in axis]
        if sorted(flat) != sorted(n for axis in stack for n in axis if n != "1") or len(stack) != 3:
            raise ValueError(f"{self.pattern!r} is no rearrangement into three axes b m n")
        return stored, stack

    def _lengths(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Solve for every axis length of a stored tensor of this shape."""
        stored, _ = self._sides
        if len(stored) != len(shape):
            raise ValueError(f"view {self} wants a tensor of {len(stored)} axes, got shape {tuple(shape)}")
        lengths = {"1": 1, **self.sizes}
        for axis, length in zip(stored, shape, strict=True):
            known = prod(lengths[name] for name in axis if name in lengths)
            unknown = [name for name in axis if name not in lengths]
            if length % known or len(unknown) > 1 or (not unknown and known != length):
                raise ValueError(f"view {self} does not divide shape {tuple(shape)}: axis {axis} has {length}")
            lengths.update(dict.fromkeys(unknown, length // known))
        return lengths

    def shape(self, stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return (b, m, n) for a stored shape.  Raises: ValueError when the sizes do not divide it."""
        lengths = self._lengths(stored_shape)
        b, m, n = (prod(lengths[name] for name in axis) for axis in self._sides[1])
        return b, m, n

    def to_matrices(self, stored: Tensor) -> Tensor:
        """Return the stack (b, m, n) of a stored tensor; a view of it where strides allow."""
        left, right = self._sides
        lengths = self._lengths(tuple(stored.shape))
        source = [name for axis in left for name in axis]
        target = [name for axis in right for name in axis if name != "1"]
        split = stored.reshape([lengths[name] for name in source])
        return split.permute([source.index(name) for name in target]).reshape(self.shape(tuple(stored.shape)))

    def from_matrices(self, stack: Tensor, stored_shape: tuple[int, ...]) -> Tensor:
        """Invert `to_matrices`: (b, m, n) -> a tensor of `stored_shape`."""
        left, right = self._sides
        lengths = self._lengths(tuple(stored_shape))
        source = [name for axis in left for name in axis]
        target = [name for axis in right for name in axis if name != "1"]
        split = stack.reshape([lengths[name] for name in target])
        return split.permute([target.index(name) for name in source]).reshape(stored_shape)


WHOLE = MatrixView("m n -> 1 m n")
TRANSPOSED = MatrixView("n m -> 1 m n")
VECTOR = MatrixView("n -> 1 1 n")
STACK = MatrixView("b m n -> b m n")
TRANSPOSED_STACK = MatrixView("b n m -> b m n")


def row_heads(heads: int) -> MatrixView:
    """q, k, v: `[h·head_dim, d]` as one (head_dim, d) matrix a head."""
    return MatrixView("(h m) n -> h m n", {"h": heads})


def column_heads(heads: int) -> MatrixView:
    """o: `[d, h·head_dim]` as one (d, head_dim) matrix a head."""
    return MatrixView("m (h n) -> h m n", {"h": heads})


def gate_up(transposed: bool, concatenated: bool, paired: bool) -> MatrixView:
    """Experts' fused gate and up: separate (r, d) matrices, or one (r, 2d) matrix whose row is a neuron's pair.

    `transposed` stores `[E, d, 2r]`, else `[E, 2r, d]`; `concatenated` puts all gates first, else they alternate.
    """
    neurons = "(p m)" if concatenated else "(m p)"
    stored = f"b n {neurons}" if transposed else f"b {neurons} n"
    return MatrixView(f"{stored} -> {'b m (p n)' if paired else '(b p) m n'}", {"p": 2})


def view_of(site: Site, role: Role, granularity: str) -> MatrixView:
    """Return the view of a parameter where it stands: its storage from its module, its split from the route.

    granularity: "whole", "heads" (attention), "transposed" (neurons of a down projection as rows) or "pair"
    (gate and up of an expert's neuron in one row). Raises: ValueError when head counts do not divide the projection.
    """
    tensor = site.parameter
    if role is Role.VECTOR or tensor.ndim < 2:
        return VECTOR if tensor.ndim == 1 else _rows_as_vectors(tensor.ndim)
    if tensor.ndim == 3:
        return _expert_view(site, role, granularity)
    if granularity == "heads":
        return _head_view(site, role)
    return TRANSPOSED if granularity == "transposed" else WHOLE


def _rows_as_vectors(ndim: int) -> MatrixView:
    axes = [f"a{k}" for k in range(ndim)]
    return MatrixView(f"{' '.join(axes)} -> 1 1 ({' '.join(axes)})")


def _head_view(site: Site, role: Role) -> MatrixView:
    columns = role is Role.ATTENTION_O
    width = site.parameter.shape[1 if columns else 0]
    head_dim = getattr(site.parent, "head_dim", None)
    if not isinstance(head_dim, int):
        raise ValueError(f"{site}: its attention module has no head_dim; route it as a whole: view 'whole'")
    if width % head_dim:
        raise ValueError(f"{site}: head_dim {head_dim} does not divide its {width} head channels")
    return (column_heads if columns else row_heads)(width // head_dim)


def _expert_view(site: Site, role: Role, granularity: str) -> MatrixView:
    transposed = bool(getattr(site.module, "is_transposed", False))
    if role is Role.EXPERT_IN and site.leaf == "gate_up_proj":
        concatenated = bool(getattr(site.module, "is_concatenated", True))
        return gate_up(transposed, concatenated, paired=granularity == "pair")
    return TRANSPOSED_STACK if transposed != (granularity == "transposed") else STACK
