"""The buckets of a step: made of groups, joined where they are small, and computed while others travel."""

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from symlm.routing.options import with_rate
from symlm.rules import get_rule
from symlm.step.bucket import Bucket
from symlm.step.directions import polar_factors, wide
from symlm.step.member import Member, batches
from symlm.views.matrix_view import MatrixView


def buckets_of(members: Iterable[tuple[dict[str, Any], list[Member]]], finite: Tensor) -> list[Bucket]:
    """Put the members of groups with a rule by matrices or rows in buckets, whose owners share the work evenly.

    Args:
        members: Groups and their members; elementwise groups are left out.
        finite: Whether the step happens, a bool of one element.
    """
    buckets: list[Bucket] = []
    loads: dict[Any, list[float]] = {}
    for group, some in members:
        settings = with_rate(group)
        for batch in batches(some) if not get_rule(group["rule"]).elementwise else ():
            world = batch[0].layout.size
            buckets.append(Bucket(settings, batch, loads.setdefault(world, [0.0] * prod(world)), finite))
    return buckets


def join(buckets: list[Bucket]) -> None:
    """Compute the polar factors of small buckets of equal matrices as one stack: their launches cost most.

    Args:
        buckets: The buckets of the step; phase 1 of those that are joined is run.
    """
    alike: dict[tuple[Any, ...], list[Bucket]] = {}
    for bucket in buckets:
        if key := bucket.matrices_to_join():
            alike.setdefault(key, []).append(bucket)
    for several in (some for some in alike.values() if len(some) > 1):
        for bucket in several:
            bucket.start()
        stacks = [MatrixView.parse(bucket.group["view"]).to_matrices(wide(bucket.momenta)) for bucket in several]
        factors = polar_factors(several[0].group, torch.cat([S if S.shape[1] <= S.shape[2] else S.mT for S in stacks]))
        for bucket, S, U in zip(several, stacks, factors.split(list(map(len, stacks))), strict=True):
            bucket.factors = U if S.shape[1] <= S.shape[2] else U.mT


def bytes_to_receive(buckets: list[Bucket]) -> int:
    """Count the bytes that this rank receives from others in a step.

    Args:
        buckets: The buckets of the step.
    """
    return sum(bucket.exchange.bytes_to_receive(4) for bucket in buckets if bucket.exchange)


def overlapped(buckets: list[Bucket]) -> Iterator[Bucket]:
    """Yield buckets whose directions have arrived or are about to.

    While one bucket is computed, the directions of the one before are sent back, and the matrices of the one after are
    sent to their owners.

    Args:
        buckets: The buckets, in the order in which they are computed.

    Yields:
        The buckets in the same order; each is released after its use.
    """
    returning: list[Bucket] = []
    for k, bucket in enumerate(buckets):
        bucket.start()
        for following in buckets[k + 1 : k + 2]:
            if following.exchange:  # what stays here would only take memory before its time
                following.start()
        bucket.compute()
        returning.append(bucket)
        while len(returning) > 1 or (returning and not bucket.exchange):
            yield returning[0]
            returning.pop(0).release()
    for bucket in returning:
        yield bucket
        bucket.release()
