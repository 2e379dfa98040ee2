"""The cost of a step on many ranks, counted without running it: bytes exchanged, temporary memory, balance of work."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from symlm.distributed.layout import Layout, layout_of_shards
from symlm.optimizer import SymOptimizer
from symlm.rules import get_rule
from symlm.step.bucket import Bucket
from symlm.step.directions import cost_of, shares_layer_rotation
from symlm.step.member import Member, batches
from symlm.step.rows.row_step import entries_to_sum, operations_of

MASTER = 4  # bytes of an fp32 element


@dataclass(frozen=True)
class Plan:
    """Report one rank's share of a step. Bytes are of fp32, in which momenta and directions are exchanged.

    Args:
        received: The bytes that the rank which receives most receives from others; sums are counted as ring
            all-reduces.
        gradients: The bytes that reducing the gradients takes, for comparison.
        temporary: The largest temporary memory of a rank, in bytes, for the buckets in flight and the polar iteration.
        imbalance: The operations of the busiest rank over an equal share: 1 is perfect, the number of ranks means that
            no work is shared. Work that every rank repeats is counted: of a rule with a state by matrices, as one polar
            factor each, and of a whitened head with copies.
    """

    received: int
    gradients: int
    temporary: int
    imbalance: float


def plan(model: nn.Module, shards: int = 1, copies: int = 1, **options: Any) -> Plan:
    """Count a step of `SymOptimizer(model, **options)` on `shards · copies` ranks.

    Args:
        model: The model, which may be on the meta device.
        shards: The number of ranks over which FSDP2 shards each parameter by rows.
        copies: The number of ranks over which each shard is replicated (HSDP); with one shard, the ranks of DDP.
        options: The arguments of `SymOptimizer`.

    Returns:
        The counts of the step.

    Raises:
        ValueError: Fewer than one shard or copy; or as `SymOptimizer`.
        TypeError: As `SymOptimizer`.
    """
    if shards < 1 or copies < 1:
        raise ValueError(f"a plan needs at least one shard and one copy, got shards={shards} and copies={copies}")
    optimizer = SymOptimizer(model, **options)
    loads: dict[Any, list[float]] = {}
    costs, numel = _Costs(shards, copies), sum(p.numel() for p in model.parameters())
    for group in optimizer.param_groups:
        if get_rule(group["rule"]).elementwise:
            continue
        for batch in batches(_member(p, layout_of_shards(tuple(p.shape), shards, copies)) for p in group["params"]):
            shares = loads.setdefault(batch[0].layout.size, [0.0] * costs.ranks)
            costs.add(Bucket(group, batch, shares, torch.ones((), dtype=torch.bool)))
    return Plan(
        max(costs.received),
        2 * MASTER * numel * (costs.ranks - 1) // costs.ranks,
        sum(sorted(costs.temporary)[-2:]) + max(costs.returning),
        costs.imbalance(max(loads.values(), key=sum, default=[0.0] * costs.ranks)),
    )


class _Costs:
    """Sum up what the buckets of a step cost each rank."""

    def __init__(self, shards: int, copies: int) -> None:
        self.shards, self.ranks = shards, shards * copies
        self.received, self.temporary, self.returning = [0] * self.ranks, [0], [0]
        self.repeated, self.in_place = 0.0, 0.0  # operations of every rank, and of those that store a matrix's shards

    def add(self, bucket: Bucket) -> None:
        rule = get_rule(bucket.group["rule"])
        operations = cost_of(bucket.group, bucket.layout) * len(bucket.batch)
        if rule.state and not bucket.by_rows:
            self.repeated += operations
        if bucket.by_rows:
            self._add_rows(bucket)
        elif bucket.everywhere:
            self._add_gathered(bucket)
        elif bucket.exchange:
            self.returning.append(_largest_part(bucket))
            self.temporary.append(_temporary(bucket))
            for rank in range(self.ranks):
                self.received[rank] += bucket.exchange.bytes_to_receive(MASTER, divmod(rank, self.shards))
        else:  # experts, heads, or all of one rank's
            self.in_place += operations * (rule.spectral and not rule.state)
            self.temporary.append(7 * _largest_part(bucket))  # the input, and the six of `_temporary`

    def _add_rows(self, bucket: Bucket) -> None:
        """Add rows that are computed where they are stored; what mixes them is summed over the shards."""
        rule, count = get_rule(bucket.group["rule"]), len(bucket.batch)
        self.in_place += operations_of(rule, bucket.layout.shape, bucket.group["gram_every"]) * count
        if self.shards > 1:
            size = MASTER * entries_to_sum(rule, bucket.layout, bucket.group["gram_every"]) * count
            self.received = [each + 2 * size * (self.shards - 1) // self.shards for each in self.received]

    def _add_gathered(self, bucket: Bucket) -> None:
        """Add matrices that every rank gathers: gradient, weight and momentum of a rule that reads the weight.

        Where a layer shares a rotation, matrices are gathered for that and for their direction.
        """
        size = MASTER * prod(bucket.layout.shape) * len(bucket.batch)
        tensors = 3 if get_rule(bucket.group["rule"]).reads_weight else 1
        times = 2 if shares_layer_rotation(bucket.group) else tensors
        self.received = [each + times * (size - size // self.shards) for each in self.received]
        self.temporary.append(2 * size * tensors)

    def imbalance(self, owned: list[float]) -> float:
        """Return the operations of the busiest rank over an equal share, of what owners compute and the rest."""
        once = sum(owned) + self.repeated + self.in_place
        busiest = max(owned) + self.repeated + self.in_place / self.shards
        return busiest * self.ranks / once if once else 1.0


def _member(p: Tensor, layout: Layout) -> Member:
    """Return a member of this layout without data."""
    part = torch.empty(layout.interval[1] - layout.interval[0], device="meta")
    return Member("", part, part, {}, layout)


def _largest_part(bucket: Bucket) -> int:
    """Return the bytes of the largest rank's parts of a bucket."""
    return MASTER * len(bucket.batch) * max(stop - start for start, stop in bucket.layout.intervals)


def _temporary(bucket: Bucket) -> int:
    """Bound the busiest rank's temporary memory for a bucket, in bytes, by the tensors that are allocated at once.

    Three of its parts: the rule's input, what is sent, what is received. Six of its owned matrices: what arrived, the
    same as rows, and of the polar iteration X, X' and two Gram matrices, none of which is larger than X.
    """
    exchange = bucket.exchange
    assert exchange is not None
    owned = max(exchange.owners.count(owner) for owner in set(exchange.owners))
    return 3 * _largest_part(bucket) + 6 * MASTER * owned * prod(bucket.layout.shape)
