"""Where the ranks' parts of a parameter are: every rank stores a flat interval of the row-major whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Layout:
    """Describe how a parameter is sharded and replicated over the ranks.

    Args:
        shape: The shape of the whole parameter.
        intervals: [start, stop) of each shard in the flat whole.
        shards: The process group over which it is sharded; None for one rank.
        copies: The process group over which it is replicated; None for one rank.
        gathered: Whether its placement is not an interval, so that every rank gathers and computes all of it.
    """

    shape: tuple[int, ...]
    intervals: tuple[tuple[int, int], ...]
    shards: Any = None
    copies: Any = None
    gathered: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """The rank of this process among the copies, and among the shards."""
        return rank_in(self.copies), rank_in(self.shards)

    @property
    def size(self) -> tuple[int, int]:
        """The numbers of copies and of shards."""
        return group_size(self.copies), group_size(self.shards)

    @property
    def interval(self) -> tuple[int, int]:
        """[start, stop) of this process's part in the flat whole."""
        return self.intervals[self.rank[1]]

    @property
    def whole(self) -> bool:
        """Whether every rank stores all of it."""
        return self.size[1] == 1 and not self.gathered

    @property
    def matrices(self) -> int:
        """The number of matrices, stored one after the other as experts are; one unless there are three axes."""
        return self.shape[0] if len(self.shape) == 3 and not self.gathered else 1

    @property
    def pieces(self) -> list[int]:
        """The lengths of this process's part of each matrix of which it stores any."""
        start, stop = self.interval
        size = prod(self.shape) // max(1, self.matrices)
        edges = [start, *range(start // size * size + size, stop, size), stop] if stop > start else []
        return [b - a for a, b in pairwise(edges)]


def layout_of(p: Any, shared: bool = True) -> Layout:
    """Return the layout of a parameter: of a DTensor by its placements, of a plain tensor as replicated on all ranks.

    Args:
        p: The parameter.
        shared: Whether all ranks have the same plain tensors; if False, they belong to this rank alone.

    Returns:
        The layout; `gathered` for placements other than one sharding by rows and one replication.
    """
    shape = tuple(p.shape)
    alone = ((0, prod(shape)),)
    if not hasattr(p, "placements"):
        world = dist.group.WORLD if shared and is_initialized() else None
        return _replicated(shape, world if group_size(world) > 1 else None)
    mesh, sharded, replicated = p.device_mesh, [], []
    for axis, placement in enumerate(p.placements):
        if placement.is_replicate():
            replicated.append(axis)
        elif type(placement).__name__ == "Shard" and placement.dim == 0:
            sharded.append(axis)
        else:
            return Layout(shape, alone, gathered=True)
    if len(sharded) > 1 or len(replicated) > 1:
        return Layout(shape, alone, gathered=True)
    shards, copies = ([mesh.get_group(axis) for axis in axes] or [None] for axes in (sharded, replicated))
    return Layout(shape, _row_intervals(shape, group_size(shards[0])), shards[0], copies[0])


@lru_cache(maxsize=4096)  # it is asked for every parameter of every step
def _replicated(shape: tuple[int, ...], copies: Any) -> Layout:
    """Return the layout of a plain tensor that a process group stores, or one rank."""
    return Layout(shape, ((0, prod(shape)),), copies=copies)


def layout_of_shards(shape: tuple[int, ...], shards: int, copies: int) -> Layout:
    """Return the layout of a parameter sharded by rows over ranks that need not exist, for a plan that only counts.

    Args:
        shape: The shape of the whole parameter.
        shards: The number of ranks over which it is sharded.
        copies: The number of ranks over which each shard is replicated.

    Returns:
        The layout, with an `AbsentGroup` for each process group of more than one rank.
    """
    sharded, replicated = (AbsentGroup(size) if size > 1 else None for size in (shards, copies))
    return Layout(shape, _row_intervals(shape, shards), sharded, replicated)


@dataclass(frozen=True)
class AbsentGroup:
    """Stand for a process group of this size in a plan; this process has rank 0 in it."""

    size: int


def _row_intervals(shape: tuple[int, ...], parts: int) -> tuple[tuple[int, int], ...]:
    """Split rows as DTensor does: equal parts of ⌈m/parts⌉ rows, the last ones shorter or empty."""
    if parts == 1:
        return ((0, prod(shape)),)
    row, step = prod(shape[1:]), -(-shape[0] // parts)
    return tuple((min(k * step, shape[0]) * row, min((k + 1) * step, shape[0]) * row) for k in range(parts))


def intervals_of_all(
    local: Sequence[tuple[int, int]], group: Any, device: torch.device
) -> list[tuple[tuple[int, int], ...]]:
    """Gather each parameter's intervals from all ranks of a group; its ranks call this together.

    Args:
        local: This rank's [start, stop) of each parameter.
        group: The process group.
        device: The device of the exchange.

    Returns:
        For each parameter the intervals of all ranks, in their order.
    """
    if group_size(group) == 1:
        return [(interval,) for interval in local]
    mine = torch.tensor(local, dtype=torch.int64, device=device).reshape(-1, 2)
    of_ranks = [torch.empty_like(mine) for _ in range(group_size(group))]
    dist.all_gather(of_ranks, mine, group=group)
    return [tuple((start, stop) for start, stop in each) for each in torch.stack(of_ranks, dim=1).tolist()]


def is_initialized() -> bool:
    """Return whether torch has a process group."""
    return dist.is_available() and dist.is_initialized()


def group_size(group: Any) -> int:
    """Return the number of ranks of a process group, of an `AbsentGroup`, or 1 for None."""
    if isinstance(group, AbsentGroup):
        return group.size
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: Any) -> int:
    """Return the rank of this process in a process group, or 0 for an `AbsentGroup` or None."""
    return 0 if group is None or isinstance(group, AbsentGroup) else dist.get_rank(group)


def copies_of(p: Any) -> int:
    """Return how many ranks store the same part of a parameter: all of a plain one, by the placements of a DTensor."""
    world = dist.get_world_size() if is_initialized() else 1
    if not hasattr(p, "placements"):
        return world
    shards = [p.device_mesh.size(axis) for axis, placement in enumerate(p.placements) if placement.is_shard()]
    return max(1, world // prod(shards))


def cut_rows(layout: Layout) -> list[int]:
    """Return the indices of the rows that are split between ranks."""
    n = layout.shape[-1]
    return sorted({edge // n for interval in layout.intervals for edge in interval if edge % n})


def rows_held(layout: Layout) -> tuple[int, int]:
    """Return [first, last) of the rows of which this rank stores at least a piece."""
    (start, stop), n = layout.interval, layout.shape[-1]
    return start // n, start // n if start == stop else -(-stop // n)
