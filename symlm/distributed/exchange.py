"""The exchange of whole matrices: the parts are sent to owners, and the parts of the directions are sent back."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from symlm.distributed.layout import Layout
from symlm.distributed.ownership import assign_owners


class Exchange:
    """Exchange one bucket of equal matrices: `send` parts to owners, `compute` there, `receive` parts of directions.

    The three are called in this order, with those of other buckets in between, so that communication overlaps
    computation. `received_bytes` counts the bytes that this rank received from others.

    Args:
        layout: The layout of every matrix of the bucket.
        count: The number of matrices.
        loads: The operations that each rank, copies × shards, has been assigned in the step; the bucket's are added.
        cost: The operations of one matrix.
    """

    def __init__(self, layout: Layout, count: int, loads: list[float], cost: float = 1.0) -> None:
        copies, shards = layout.size
        self.layout = layout
        self.owners = [divmod(owner, shards) for owner in assign_owners([cost] * count, copies * shards, loads)]
        for copy, shard in self.owners:
            loads[copy * shards + shard] += cost
        self.received_bytes = 0
        self.work: Any = None

    def _owned(self, copy: int, shard: int) -> list[int]:
        """Return the matrices that a rank owns."""
        return [k for k, owner in enumerate(self.owners) if owner == (copy, shard)]

    @property
    def owned(self) -> list[int]:
        """The indices of the matrices that this rank owns."""
        return self._owned(*self.layout.rank)

    def bytes_to_receive(self, element_size: int, rank: tuple[int, int] | None = None) -> int:
        """Count the bytes that a rank will receive from others, from the plan alone.

        Args:
            element_size: Bytes of an element.
            rank: (copy, shard) of the rank, this one if None.

        Returns:
            The bytes of `send` and `receive` together.
        """
        (copies, shards), (copy, shard) = self.layout.size, rank or self.layout.rank
        lengths = [stop - start for start, stop in self.layout.intervals]
        of_copy, of_rank = sum(owner[0] == copy for owner in self.owners), self.owners.count((copy, shard))
        elements = (len(self.owners) - of_copy) * lengths[shard] if copies > 1 else 0
        if shards > 1:
            elements += of_rank * (sum(lengths) - lengths[shard]) + (of_copy - of_rank) * lengths[shard]
        return elements * element_size

    def send(self, parts: Tensor) -> None:
        """Start to send this rank's part of every matrix to its owner.

        Args:
            parts: The flat parts, (count, elements of this rank's part).
        """
        self.parts, self.size, self.like = parts, parts.shape[1], parts.new_empty(0)
        if self.layout.whole:
            return
        copy, _ = self.layout.rank
        queues = [self._owned(copy, shard) for shard in range(self.layout.size[1])]
        lengths = [stop - start for start, stop in self.layout.intervals]
        sent = [len(queue) * self.size for queue in queues]
        out = _joined([parts[k] for queue in queues for k in queue], parts[0])
        self.arrived = out.new_empty(len(self.owned) * sum(lengths))
        self.work = self._all_to_all(self.arrived, out, [len(self.owned) * length for length in lengths], sent)

    def compute(self, directions: Callable[[Tensor], Tensor]) -> None:
        """Compute the directions of the owned matrices, and start to send their parts back.

        Args:
            directions: Maps the owned matrices, (k, *shape), to their directions, same shape.
        """
        owned, lengths = self.owned, [stop - start for start, stop in self.layout.intervals]
        if self.layout.whole:
            wholes = torch.stack([self.parts[k] for k in owned]) if owned else self.like
        else:
            self.work.wait()
            blocks = self.arrived.split([len(owned) * length for length in lengths])
            wholes = torch.cat([x.view(len(owned), n) for x, n in zip(blocks, lengths, strict=True)], dim=1)
        results = list(directions(wholes.view(len(owned), *self.layout.shape)).flatten(1)) if owned else []
        self.parts, self.arrived = self.like, self.like  # their memory would stay until the directions are received
        if self.layout.whole:
            self._spread(results)
            return
        out = _joined([U[a:b] for a, b in self.layout.intervals for U in results], self.like)
        copy, _ = self.layout.rank
        self.queues = [self._owned(copy, shard) for shard in range(self.layout.size[1])]
        self.back = out.new_empty(sum(len(queue) for queue in self.queues) * self.size)
        counts = [len(queue) * self.size for queue in self.queues]
        self.work = self._all_to_all(self.back, out, counts, [len(owned) * length for length in lengths])

    def receive(self) -> list[Tensor]:
        """Wait for the directions.

        Returns:
            This rank's flat part of every matrix's direction, in the order of the matrices.
        """
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
        """Return the matrices that each copy's ranks own."""
        copies, shards = self.layout.size
        return [[k for shard in range(shards) for k in self._owned(copy, shard)] for copy in range(copies)]

    def _all_to_all(self, into: Tensor, out: Tensor, arriving: list[int], leaving: list[int]) -> Any:
        """Start an exchange between the shards, and count what this rank receives."""
        shard = self.layout.rank[1]
        self.received_bytes += (sum(arriving) - arriving[shard]) * out.element_size()
        return dist.all_to_all_single(into, out, arriving, leaving, group=self.layout.shards, async_op=True)

    def _spread(self, parts: list[Tensor]) -> None:
        """Start to send each copy's directions to the others: an all-gather of equal shares, else broadcasts."""
        by_copy, group = self._by_copy(), self.layout.copies
        self.spread = self.like.new_empty(len(self.owners), self.size)
        shares = list(self.spread.split([len(queue) for queue in by_copy]))
        share_here = _joined(parts, self.like)
        self.received_bytes += (self.spread.numel() - share_here.numel()) * share_here.element_size()
        if len({len(queue) for queue in by_copy}) == 1:
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13
            self.spreading = [gather(self.spread.view(-1), share_here, group=group, async_op=True)]
        else:
            shares[self.layout.rank[0]].copy_(share_here.view(-1, self.size))
            sent = [(copy, share) for copy, share in enumerate(shares) if share.numel()]
            self.spreading = [dist.broadcast(share, group=group, group_src=copy, async_op=True) for copy, share in sent]


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """Return the parts end to end, flat; an empty tensor like `like` if there is none."""
    return torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)
