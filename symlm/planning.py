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
    received, temporary, returning = [0] * (shards * copies), [0], [0]
    replicated, in_place = 0.0, 0.0
    for group in optimizer.param_groups:
        if get_rule(group["rule"]).elementwise:
            continue
        members = [_member(p, layout_of_shards(tuple(p.shape), shards, copies)) for p in group["params"]]
        for batch in batches(members):
            shares = loads.setdefault(batch[0].layout.size, [0.0] * shards * copies)
            bucket = Bucket(group, batch, shares, torch.ones((), dtype=torch.bool))
            if bucket.everywhere:  # every rank gathers all of it, and computes all of it
                size = MASTER * prod(bucket.layout.shape) * len(batch)
                times = 2 if shares_layer_rotation(group) else 1
                received = [count + times * (size - size // shards) for count in received]
                temporary.append(2 * size)
            if bucket.by_rows:
                in_place += operations_of(get_rule(group["rule"]), bucket.layout.shape, group["gram_every"]) * len(
                    batch
                )
            if bucket.by_rows and shards > 1:
                size = MASTER * entries_to_sum(get_rule(group["rule"]), bucket.layout, group["gram_every"]) * len(batch)
                received = [count + 2 * size * (shards - 1) // shards for count in received]
            if get_rule(group["rule"]).state and not bucket.by_rows:
                replicated += cost_of(group, bucket.layout) * len(batch)
            part = MASTER * len(batch) * max(stop - start for start, stop in bucket.layout.intervals)
            if not (bucket.exchange or bucket.by_rows or bucket.everywhere):  # experts, heads, or all of one rank's
                counted = get_rule(group["rule"]).spectral and not get_rule(group["rule"]).state
                in_place += cost_of(group, bucket.layout) * len(batch) * counted
                temporary.append(7 * part)  # the input, and the six of `_temporary`
            if not bucket.exchange:
                continue
            returning.append(part)
            for rank in range(shards * copies):
                received[rank] += bucket.exchange.bytes_to_receive(MASTER, divmod(rank, shards))
            temporary.append(_temporary(bucket))
    numel, ranks = sum(p.numel() for p in model.parameters()), shards * copies
    owned = max(loads.values(), key=sum, default=[0.0] * ranks)
    busiest, once = max(owned) + replicated + in_place / shards, sum(owned) + replicated + in_place
    return Plan(
        max(received),
        2 * MASTER * numel * (ranks - 1) // ranks,
        sum(sorted(temporary)[-2:]) + max(returning),
        busiest * ranks / once if once else 1.0,
    )


def _member(p: Tensor, layout: Layout) -> Member:
    """Return a member of this layout without data."""
    part = torch.empty(layout.interval[1] - layout.interval[0], device="meta")
    return Member("", part, part, {}, layout)


def _temporary(bucket: Bucket) -> int:
    """Bound the busiest rank's temporary memory for a bucket, in bytes, by the tensors that are allocated at once.

    Three of its parts: the rule's input, what is sent, what is received. Six of its owned matrices: what arrived, the
    same as rows, and of the polar iteration X, X' and two Gram matrices, none of which is larger than X.
    """
    exchange, layout = bucket.exchange, bucket.layout
    assert exchange is not None
    owned = max(exchange.owners.count(owner) for owner in set(exchange.owners))
    part = max(stop - start for start, stop in layout.intervals)
    return MASTER * (3 * part * len(bucket.batch) + 6 * owned * prod(layout.shape))
