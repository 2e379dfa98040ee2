"""The assignment of matrices to ranks: a pure function of costs and world size, the same on all ranks."""

from collections.abc import Sequence
from heapq import heapify, heapreplace


def assign_owners(costs: Sequence[float], world_size: int, loads: Sequence[float] | None = None) -> list[int]:
    """Assign each matrix to a rank: the most expensive first, each to the rank with the least load so far.

    Ties go to the lower index and the lower rank. From equal loads, the largest load is at most
    4/3 − 1/(3·world_size) of the best possible.

    Args:
        costs: The operations of each matrix.
        world_size: The number of ranks.
        loads: The operations that each rank has already; zero if None.

    Returns:
        The owner of each matrix.

    Raises:
        ValueError: A world of no rank, a negative cost, or loads of another number of ranks.

    Source:
        Graham 1969, Bounds on multiprocessing timing anomalies, theorem 2.
    """
    if world_size < 1:
        raise ValueError(f"a world has at least one rank, got world_size={world_size}")
    if any(cost < 0 for cost in costs):
        raise ValueError(f"costs must not be negative, got {min(costs)}")
    before = [0.0] * world_size if loads is None else list(loads)
    if len(before) != world_size:
        raise ValueError(f"{len(before)} loads for a world of {world_size}; give one load for each rank")
    heap = [(load, rank) for rank, load in enumerate(before)]
    heapify(heap)
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        load, rank = heap[0]
        owners[index] = rank
        heapreplace(heap, (load + costs[index], rank))
    return owners
