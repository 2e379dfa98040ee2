"""Where the ranks' parts of a parameter are: every rank holds a flat interval of the row-major whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Layout:
    """Where the ranks' parts of a parameter lie.

    shape: of the whole; intervals: each shard's [start, stop) of the flat whole; shards, copies: the process groups
    over which it is cut and repeated, None for one rank; gathered: its placement is no interval, each rank does it all.
    """

    shape: tuple[int, ...]
    intervals: tuple[tuple[int, int], ...]
    shards: Any = None
    copies: Any = None
    gathered: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """This process among the copies, and among the shards."""
        return rank_in(self.copies), rank_in(self.shards)

    @property
    def size(self) -> tuple[int, int]:
        """How many copies, and how many shards."""
        return group_size(self.copies), group_size(self.shards)

    @property
    def interval(self) -> tuple[int, int]:
        """This process's own part."""
        return self.intervals[self.rank[1]]

    @property
    def whole(self) -> bool:
        """Tell whether every rank holds all of it."""
        return self.size[1] == 1 and not self.gathered

    @property
    def matrices(self) -> int:
        """How many lie one behind the other, as experts do; any other parameter is one."""
        return self.shape[0] if len(self.shape) == 3 and not self.gathered else 1

    @property
    def pieces(self) -> list[int]:
        """The lengths into which the borders of its matrices cut this process's own part."""
        start, stop = self.interval
        size = prod(self.shape) // max(1, self.matrices)
        edges = [start, *range(start // size * size + size, stop, size), stop] if stop > start else []
        return [b - a for a, b in pairwise(edges)]


def layout_of(p: Any, shared: bool = True) -> Layout:
    """Return a parameter's layout: of a DTensor by its placements, of a plain tensor as repeated on every rank.

    shared: False says that plain tensors are this rank's alone.
    """
    shape = tuple(p.shape)
    alone = ((0, p.numel()),)
    if not hasattr(p, "placements"):
        world = dist.group.WORLD if shared and is_initialized() else None
        return Layout(shape, alone, copies=world if group_size(world) > 1 else None)
    mesh, cut, repeated = p.device_mesh, [], []
    for axis, placement in enumerate(p.placements):
        if placement.is_replicate():
            repeated.append(axis)
        elif type(placement).__name__ == "Shard" and placement.dim == 0:
            cut.append(axis)
        else:
            return Layout(shape, alone, gathered=True)
    if len(cut) > 1 or len(repeated) > 1:
        return Layout(shape, alone, gathered=True)
    shards, copies = ([mesh.get_group(axis) for axis in axes] or [None] for axes in (cut, repeated))
    return Layout(shape, _row_intervals(shape, group_size(shards[0])), shards[0], copies[0])


def layout_of_shards(shape: tuple[int, ...], shards: int, copies: int) -> Layout:
    """Return the layout of a parameter cut by rows over ranks that need not exist: a plan, which only counts."""
    over, repeated = (AbsentGroup(size) if size > 1 else None for size in (shards, copies))
    return Layout(shape, _row_intervals(shape, shards), over, repeated)


@dataclass(frozen=True)
class AbsentGroup:
    """Stands for a process group of this size in a plan."""

    size: int


def _row_intervals(shape: tuple[int, ...], parts: int) -> tuple[tuple[int, int], ...]:
    """Cut rows as DTensor does: equal parts of ⌈m/parts⌉ rows, the last ones shorter or empty."""
    if parts == 1:
        return ((0, prod(shape)),)
    row, step = prod(shape[1:]), -(-shape[0] // parts)
    return tuple((min(k * step, shape[0]) * row, min((k + 1) * step, shape[0]) * row) for k in range(parts))


def intervals_of_all(
    own: Sequence[tuple[int, int]], group: Any, device: torch.device
) -> list[tuple[tuple[int, int], ...]]:
    """Return for each parameter the intervals that all ranks of a group hold, from this rank's own, one a parameter."""
    if group_size(group) == 1:
        return [(interval,) for interval in own]
    told = torch.tensor(own, dtype=torch.int64, device=device).reshape(-1, 2)
    found = [torch.empty_like(told) for _ in range(group_size(group))]
    dist.all_gather(found, told, group=group)
    return [tuple((start, stop) for start, stop in each) for each in torch.stack(found, dim=1).tolist()]


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def group_size(group: Any) -> int:
    if isinstance(group, AbsentGroup):
        return group.size
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: Any) -> int:
    """Return this process's place in a group; 0 where there is none."""
    return 0 if group is None or isinstance(group, AbsentGroup) else dist.get_rank(group)


def cut_rows(layout: Layout) -> list[int]:
    """Return the rows inside of which any rank's part begins or ends."""
    n = layout.shape[-1]
    return sorted({edge // n for interval in layout.intervals for edge in interval if edge % n})


def rows_held(layout: Layout) -> tuple[int, int]:
    """Return [first, last) of the rows of which this rank holds a piece."""
    (start, stop), n = layout.interval, layout.shape[-1]
    return start // n, start // n if start == stop else -(-stop // n)
