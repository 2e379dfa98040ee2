"""What a step will cost on machines that are not there: bytes moved, memory borrowed, work shared; counted, not run."""

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
    """One rank's share of a step. Bytes are of fp32, which momenta and directions travel in.

    received: what the rank that gets most gets from others, sums by rings; gradients: the same of reducing the
    gradients, a yardstick;
    temporary: the most that a rank borrows for the buckets in flight, the polar iteration included;
    imbalance: the operations of the busiest rank over an equal share: 1 is perfect, the number of ranks no sharing;
    what a rule with a state by matrices repeats on every rank is counted as a polar factor each, and what a whitened
    head's copies repeat is counted.
    """

    received: int
    gradients: int
    temporary: int
    imbalance: float


def plan(model: nn.Module, shards: int = 1, copies: int = 1, **options: Any) -> Plan:
    """Count a step of `SymOptimizer(model, **options)` on `shards · copies` ranks.

    model: may lie on the meta device. shards: the ranks over which FSDP2 cuts each parameter by rows; copies: how often
    that is repeated (HSDP), or with one shard the ranks of DDP.
    Raises: as `SymOptimizer`; ValueError for fewer than one rank.
    """
    if shards < 1 or copies < 1:
        raise ValueError(f"there is at least one shard and one copy, got {shards} and {copies}")
    optimizer = SymOptimizer(model, **options)
    loads: dict[Any, list[float]] = {}
    received, temporary, returning = [0] * (shards * copies), [0], [0]
    repeated, where_it_lies = 0.0, 0.0
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
                received = [told + times * (size - size // shards) for told in received]
                temporary.append(2 * size)
            if bucket.by_rows:
                where_it_lies += operations_of(get_rule(group["rule"]), bucket.layout.shape) * len(batch)
            if bucket.by_rows and shards > 1:
                size = MASTER * entries_to_sum(get_rule(group["rule"]), bucket.layout) * len(batch)
                received = [told + 2 * size * (shards - 1) // shards for told in received]
            if get_rule(group["rule"]).state and not bucket.by_rows:
                repeated += cost_of(group, bucket.layout) * len(batch)
            part = MASTER * len(batch) * max(stop - start for start, stop in bucket.layout.intervals)
            if not (bucket.exchange or bucket.by_rows or bucket.everywhere):  # experts, heads, or all of one rank's
                spectral = get_rule(group["rule"]).spectral
                where_it_lies += cost_of(group, bucket.layout) * len(batch) * spectral
                temporary.append(7 * part)
            if not bucket.exchange:
                continue
            returning.append(part)
            for rank in range(shards * copies):
                received[rank] += bucket.exchange.bytes_to_receive(MASTER, divmod(rank, shards))
            temporary.append(_temporary(bucket))
    numel, ranks = sum(p.numel() for p in model.parameters()), shards * copies
    owned = max(loads.values(), key=sum, default=[0.0] * ranks)
    busiest, once = max(owned) + repeated + where_it_lies / shards, sum(owned) + repeated + where_it_lies
    return Plan(
        max(received),
        2 * MASTER * numel * (ranks - 1) // ranks,
        sum(sorted(temporary)[-2:]) + max(returning),
        busiest * ranks / once if once else 1.0,
    )


def _member(p: Tensor, layout: Layout) -> Member:
    part = torch.empty(layout.interval[1] - layout.interval[0], device="meta")
    return Member("", part, part, {}, layout)


def _temporary(bucket: Bucket) -> int:
    """Bound what the busiest rank borrows for a bucket, by tensors alive at once.

    Its parts: the look-ahead, what is sent, what comes back. Its owned matrices: what arrived, the same in rows, and of
    the polar iteration X, X' and two Gram matrices, none of which is larger than X; seven where nothing travels.
    """
    exchange, layout = bucket.exchange, bucket.layout
    assert exchange is not None
    owned = max(exchange.owners.count(owner) for owner in set(exchange.owners))
    part = max(stop - start for start, stop in layout.intervals)
    return MASTER * (3 * part * len(bucket.batch) + 6 * owned * prod(layout.shape))
