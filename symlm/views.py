"""MatrixView: a stored tensor as stacks of matrices (b, m, n), by a pattern that is also its exact inverse."""

import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

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


WHOLE = MatrixView("m n -> 1 m n")
TRANSPOSED = MatrixView("n m -> 1 m n")
VECTOR = MatrixView("n -> 1 1 n")
STACK = MatrixView("b m n -> b m n")
TRANSPOSED_STACK = MatrixView("b n m -> b m n")


def row_heads(heads: int, transposed: bool = False) -> MatrixView:
    """q, k, v, stored `[h·head_dim, d]` (or its transpose), as one (head_dim, d) matrix a head."""
    return MatrixView(_stored("(h m)", "n", transposed) + " -> h m n", {"h": (heads,)})


def column_heads(heads: int, transposed: bool = False) -> MatrixView:
    """o, stored `[d, h·head_dim]` (or its transpose), as one (d, head_dim) matrix a head."""
    return MatrixView(_stored("m", "(h n)", transposed) + " -> h m n", {"h": (heads,)})


def gate_up(transposed: bool, concatenated: bool, paired: bool) -> MatrixView:
    """Experts' fused gate and up: separate (r, d) matrices, or one (r, 2d) matrix whose row is a neuron's pair.

    `transposed` stores `[E, d, 2r]`, else `[E, 2r, d]`; `concatenated` puts all gates first, else they alternate.
    """
    stored = _stored("(p m)" if concatenated else "(m p)", "n", transposed)
    return MatrixView(f"b {stored} -> {'b m (p n)' if paired else '(b p) m n'}", {"p": (2,)})


def view_of(site: Site, role: Role, granularity: str) -> MatrixView:
    """Return the view of a parameter where it stands: its storage from its module, its split from the route.

    granularity: "whole", "heads" (attention), "qk_heads" (those of q and k; v and o whole), "transposed" (neurons of a
    down projection as rows) or "pair" (gate and up of a neuron in one row).
    Raises: ValueError when head counts do not divide the projection.
    """
    axes = len(site.shape)
    if role is Role.VECTOR or axes < 2:
        return VECTOR if axes == 1 else _rows_as_vectors(axes)
    if axes == 3:
        return _expert_view(site, role, granularity)
    if role is Role.ATTENTION_QKV:
        return _fused_view(site, granularity)
    if site.leaf == "gate_up_proj" and granularity != "transposed":
        stored = _stored("(p m)", "n", site.transposed)
        return MatrixView(f"{stored} -> {'1 m (p n)' if granularity == 'pair' else 'p m n'}", {"p": (2,)})
    if site.leaf == "kv_a_proj_with_mqa":
        return MatrixView("m n -> 1 m n", {"m": _sizes(site, "kv_lora_rank", "qk_rope_head_dim")})
    if granularity == "heads" or (granularity == "qk_heads" and role in (Role.ATTENTION_Q, Role.ATTENTION_K)):
        return _head_view(site, role)
    return TRANSPOSED if (granularity == "transposed") != site.transposed else WHOLE


def _stored(outputs: str, inputs: str, transposed: bool) -> str:
    return f"{inputs} {outputs}" if transposed else f"{outputs} {inputs}"


def _rows_as_vectors(ndim: int) -> MatrixView:
    axes = [f"a{k}" for k in range(ndim)]
    return MatrixView(f"{' '.join(axes)} -> 1 1 ({' '.join(axes)})")


HEAD_DIMS = {
    Role.ATTENTION_Q: ("qk_head_dim", "head_dim", "head_size"),
    Role.ATTENTION_O: ("v_head_dim", "head_dim", "head_size"),
}
HEAD_COUNTS = ("num_heads", "n_head", "n_heads", "num_attention_heads")


def head_dim(site: Site, role: Role) -> int:
    """Return the width of a head as its attention module tells it, or as its number of heads cuts the stream.

    Raises: ValueError when it tells neither.
    """
    owners = (site.parent, site.module)
    told = [getattr(owner, name, None) for owner in owners for name in HEAD_DIMS.get(role, ("head_dim", "head_size"))]
    stream = site.shape[int((role is not Role.ATTENTION_O) != site.transposed)]
    counts = [getattr(owner, name, None) for owner in owners for name in HEAD_COUNTS]
    told += [stream // count for count in counts if isinstance(count, int) and count > 0 and stream % count == 0]
    for value in told:
        if isinstance(value, int):
            return value
    raise ValueError(
        f"{site}: {type(site.parent).__name__} tells no head_dim and no num_heads; set one of them on the module, or "
        f"give this parameter the role 'matrix', which is one matrix: roles={{{site.name!r}: 'matrix'}}"
    )


def _head_view(site: Site, role: Role) -> MatrixView:
    columns, width = role is Role.ATTENTION_O, head_dim(site, role)
    channels = site.shape[int(columns != site.transposed)]
    if channels % width:
        raise ValueError(f"{site}: head_dim {width} does not divide its {channels} head channels")
    return (column_heads if columns else row_heads)(channels // width, site.transposed)


def _fused_view(site: Site, granularity: str) -> MatrixView:
    """Split a fused projection in the order that `site.fused` names: into heads, or q, k and v one after the other."""
    if site.fused == "heads of k v":
        stacks = {"heads": "h m n", "qk_heads": "h m n | 1 (h m) n"}.get(granularity, "1 (h m) n")
        sizes = {"h": _sizes(site, "num_heads"), "m": _sizes(site, "qk_nope_head_dim", "v_head_dim")}
        return MatrixView(f"(h m) n -> {stacks}", sizes)
    channels, width = site.shape[int(site.transposed)], head_dim(site, Role.ATTENTION_QKV)
    if channels % width:
        raise ValueError(f"{site}: head_dim {width} does not divide its {channels} head channels")
    if site.fused == "heads of q k v":
        stacks = {"heads": "(h p) m n", "qk_heads": "(h p) m n | p (h m) n"}.get(granularity, "p (h m) n")
        sizes = {"p": (2, 1) if granularity == "qk_heads" else (3,), "m": (width,)}
        return MatrixView(f"{_stored('(h p m)', 'n', site.transposed)} -> {stacks}", sizes)
    heads = channels // width
    if granularity == "heads":
        return row_heads(heads, site.transposed)
    # Query heads for each head of k and v; a cross-attention has its queries apart.
    groups = 0 if site.fused == "k v" else getattr(site.parent, "num_key_value_groups", 1)
    kv_heads = heads // (groups + 2)
    if kv_heads * (groups + 2) != heads:
        raise ValueError(f"{site}: {channels} channels are no q, k, v with {groups} query heads for one of k and v")
    if granularity == "qk_heads":
        stacks, sizes = "h m n | 1 (h m) n", {"h": (heads - kv_heads, kv_heads)}
        return MatrixView(f"{_stored('(h m)', 'n', site.transposed)} -> {stacks}", sizes)
    blocks = (groups * kv_heads * width,) * (groups > 0) + (kv_heads * width,) * 2
    return MatrixView(f"{_stored('m', 'n', site.transposed)} -> 1 m n", {"m": blocks})


def _sizes(site: Site, *names: str) -> tuple[int, ...]:
    return tuple(int(getattr(site.parent, name)) for name in names)


def _expert_view(site: Site, role: Role, granularity: str) -> MatrixView:
    if role is Role.EXPERT_IN and site.leaf == "gate_up_proj" and granularity != "transposed":
        concatenated = bool(getattr(site.module, "is_concatenated", True))
        return gate_up(site.transposed, concatenated, paired=granularity == "pair")
    return TRANSPOSED_STACK if site.transposed != (granularity == "transposed") else STACK
