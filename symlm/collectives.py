"""Gather whole matrices to their owners, and scatter what they compute; the only file that imports torch.distributed.

Every rank holds a flat interval of each row-major parameter: all of it (DDP), whole rows (FSDP2), any interval (ZeRO).
So there is one description of a shard, `Layout`, and one path, `Exchange`. Where parameters are repeated as well as cut
(HSDP), each repetition computes a share of the matrices for all.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from symlm.ownership import assign_owners


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
        return _size(self.copies), _size(self.shards)

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
        world = dist.group.WORLD if shared and _initialized() else None
        return Layout(shape, alone, copies=world if _size(world) > 1 else None)
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
    return Layout(shape, _row_intervals(shape, _size(shards[0])), shards[0], copies[0])


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
    if _size(group) == 1:
        return [(interval,) for interval in own]
    told = torch.tensor(own, dtype=torch.int64, device=device).reshape(-1, 2)
    found = [torch.empty_like(told) for _ in range(_size(group))]
    dist.all_gather(found, told, group=group)
    return [tuple((start, stop) for start, stop in each) for each in torch.stack(found, dim=1).tolist()]


def local(x: Any) -> Tensor:
    """Return the part of a DTensor that this rank holds, sharing its memory; a plain tensor as it is."""
    return x.to_local() if hasattr(x, "placements") else x


def gathered(x: Any) -> Tensor:
    """Return a DTensor of any placement whole."""
    return x.full_tensor() if hasattr(x, "placements") else x


def regrouped(part: Tensor, like: Any) -> Tensor:
    """Return the DTensor, placed as another one, of which every rank has this part; the part, if that is no DTensor."""
    if not hasattr(like, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def repeated_like(whole: Tensor, p: Any) -> Any:
    """Return a tensor that every rank has whole as a DTensor on p's mesh, so that checkpoints know it is one."""
    if not hasattr(p, "placements"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(whole, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)


def placed_like(whole: Tensor, x: Any) -> Tensor:
    """Return this rank's part of a whole tensor that every rank has, cut as the DTensor x."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None).to_local()


def aligned(gradient: Any, p: Any) -> Tensor:
    """Return the local part of a gradient, moved first to its parameter's placement where they differ."""
    if hasattr(p, "placements") and gradient.placements != p.placements:
        gradient = gradient.redistribute(placements=p.placements)
    return local(gradient)


def summed(x: Tensor, layout: Layout) -> Tensor:
    """Return the sum of x over the shards of a parameter."""
    if layout.shards is not None:
        dist.all_reduce(x, group=layout.shards)
    return x


def summed_everywhere(x: Tensor) -> Tensor:
    """Return the sum of x over all ranks."""
    if _initialized():
        dist.all_reduce(x)
    return x


def world_size() -> int:
    """Return how many ranks there are, one without a process group."""
    return dist.get_world_size() if _initialized() else 1


def anywhere(flags: Tensor) -> Tensor:
    """Return which flags any rank has up."""
    if world_size() == 1:
        return flags
    agreed = flags.to(torch.int32)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return agreed.bool()


def check_agreement(plan: str, device: torch.device) -> None:
    """Compare a digest of the plan over all ranks.  Raises: RuntimeError on every rank, with the digests."""
    if world_size() == 1:
        return
    digest = int.from_bytes(hashlib.sha256(plan.encode()).digest()[:7], "big")
    own = torch.tensor([digest], device=device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    digests = [f"{int(x):014x}" for x in found]
    if len(set(digests)) > 1:
        raise RuntimeError(
            f"the ranks disagree on model, table or options: rank {dist.get_rank()} has plan {digest:014x}, all have "
            f"{digests}; build them alike, or pass shared=False where plain parameters are a rank's own"
        )


class Exchange:
    """One bucket of equal matrices on its way: `send` parts to owners, `compute`, `receive` the directions' parts.

    The three are called in this order, with other buckets' in between, so that communication overlaps computation.
    `moved` counts the bytes that this rank got from others.
    """

    def __init__(self, layout: Layout, count: int, loads: list[float], cost: float = 1.0) -> None:
        copies, shards = layout.size
        self.layout = layout
        self.owners = [divmod(owner, shards) for owner in assign_owners([cost] * count, copies * shards, loads)]
        for copy, shard in self.owners:
            loads[copy * shards + shard] += cost
        self.moved = 0
        self.work: Any = None

    def _owned(self, copy: int, shard: int) -> list[int]:
        return [k for k, owner in enumerate(self.owners) if owner == (copy, shard)]

    @property
    def mine(self) -> list[int]:
        """The matrices that this rank computes."""
        return self._owned(*self.layout.rank)

    def bytes_to_receive(self, element_size: int, rank: tuple[int, int] | None = None) -> int:
        """Count what a rank (copy, shard), this one if none is named, will get from others, from the plan alone."""
        (copies, shards), (copy, own) = self.layout.size, rank or self.layout.rank
        lengths = [stop - start for start, stop in self.layout.intervals]
        here, mine = sum(owner[0] == copy for owner in self.owners), self.owners.count((copy, own))
        elements = (len(self.owners) - here) * lengths[own] if copies > 1 else 0
        if shards > 1:
            elements += mine * (sum(lengths) - lengths[own]) + (here - mine) * lengths[own]
        return elements * element_size

    def send(self, parts: Tensor) -> None:
        """Start to send this rank's part of every matrix to its owner.  parts: flat, one a row."""
        self.parts, self.size, self.like = parts, parts.shape[1], parts.new_empty(0)
        if self.layout.whole:
            return
        copy, _ = self.layout.rank
        queues = [self._owned(copy, shard) for shard in range(self.layout.size[1])]
        lengths = [stop - start for start, stop in self.layout.intervals]
        sent = [len(queue) * self.size for queue in queues]
        out = _joined([parts[k] for queue in queues for k in queue], parts[0])
        self.arrived = out.new_empty(len(self.mine) * sum(lengths))
        self.work = self._all_to_all(self.arrived, out, [len(self.mine) * length for length in lengths], sent)

    def compute(self, directions: Callable[[Tensor], Tensor]) -> None:
        """Compute the owned matrices' directions, (k, *shape) -> same, and start to send the parts back."""
        mine, lengths = self.mine, [stop - start for start, stop in self.layout.intervals]
        if self.layout.whole:
            wholes = torch.stack([self.parts[k] for k in mine]) if mine else self.like
        else:
            self.work.wait()
            blocks = self.arrived.split([len(mine) * length for length in lengths])
            wholes = torch.cat([x.view(len(mine), n) for x, n in zip(blocks, lengths, strict=True)], dim=1)
        found = list(directions(wholes.view(len(mine), *self.layout.shape)).flatten(1)) if mine else []
        self.parts, self.arrived = self.like, self.like  # these would stay until the directions are received
        if self.layout.whole:
            self._spread(found)
            return
        out = _joined([U[a:b] for a, b in self.layout.intervals for U in found], self.like)
        copy, _ = self.layout.rank
        self.queues = [self._owned(copy, shard) for shard in range(self.layout.size[1])]
        self.back = out.new_empty(sum(len(queue) for queue in self.queues) * self.size)
        counts = [len(queue) * self.size for queue in self.queues]
        self.work = self._all_to_all(self.back, out, counts, [len(mine) * length for length in lengths])

    def receive(self) -> list[Tensor]:
        """Return this rank's flat part of every matrix's direction."""
        if not self.layout.whole:
            self.work.wait()
            order = [k for queue in self.queues for k in queue]
            empty = not (order and self.size)
            parts = [self.like] * len(order) if empty else list(self.back.view(len(order), self.size))
            if self.layout.copies is None:
                return [part for _, part in sorted(zip(order, parts, strict=True), key=lambda pair: pair[0])]
            self._spread(parts)
        for work in self.spreading:
            work.wait()
        order = [k for queue in self._by_copy() for k in queue]
        return [row for _, row in sorted(zip(order, self.spread, strict=True), key=lambda pair: pair[0])]

    def _by_copy(self) -> list[list[int]]:
        copies, shards = self.layout.size
        return [[k for shard in range(shards) for k in self._owned(copy, shard)] for copy in range(copies)]

    def _all_to_all(self, into: Tensor, out: Tensor, arriving: list[int], leaving: list[int]) -> Any:
        own = self.layout.rank[1]
        self.moved += (sum(arriving) - arriving[own]) * out.element_size()
        return dist.all_to_all_single(into, out, arriving, leaving, group=self.layout.shards, async_op=True)

    def _spread(self, parts: list[Tensor]) -> None:
        """Start to spread what each copy has: one all-gather of equal shares, else a broadcast of each share."""
        by_copy, group = self._by_copy(), self.layout.copies
        self.spread = self.like.new_empty(len(self.owners), self.size)
        shares = list(self.spread.split([len(queue) for queue in by_copy]))
        own = _joined(parts, self.like)
        self.moved += (self.spread.numel() - own.numel()) * own.element_size()
        if len({len(queue) for queue in by_copy}) == 1:
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13
            self.spreading = [gather(self.spread.view(-1), own, group=group, async_op=True)]
        else:
            shares[self.layout.rank[0]].copy_(own.view(-1, self.size))
            sent = [(copy, share) for copy, share in enumerate(shares) if share.numel()]
            self.spreading = [dist.broadcast(share, group=group, group_src=copy, async_op=True) for copy, share in sent]


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _size(group: Any) -> int:
    if isinstance(group, AbsentGroup):
        return group.size
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: Any) -> int:
    """Return this process's place in a group; 0 where there is none."""
    return 0 if group is None or isinstance(group, AbsentGroup) else dist.get_rank(group)
