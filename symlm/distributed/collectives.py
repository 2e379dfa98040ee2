"""Collectives over the ranks: sums, flags, and the check that all ranks run the same plan."""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from symlm.distributed.layout import Layout, is_initialized


def summed(x: Tensor, layout: Layout) -> Tensor:
    """Sum x over the shards of a parameter, in place.

    Args:
        x: This rank's summand, any shape; the sum replaces it.
        layout: The parameter's layout; without shards nothing is exchanged.

    Returns:
        x.
    """
    if layout.shards is not None:
        dist.all_reduce(x, group=layout.shards)
    return x


def summed_everywhere(x: Tensor) -> Tensor:
    """Sum x over all ranks, in place.

    Args:
        x: This rank's summand, any shape; the sum replaces it.

    Returns:
        x.
    """
    if is_initialized():
        dist.all_reduce(x)
    return x


def whole_of_parts(part: Tensor, layout: Layout) -> Tensor:
    """Gather a parameter's parts on every rank; its ranks call this together.

    Args:
        part: This rank's part, of any shape.
        layout: The parameter's layout.

    Returns:
        The whole, of the parameter's shape.
    """
    lengths = [stop - start for start, stop in layout.intervals]
    mine = part.new_zeros(max(lengths))
    mine[: part.numel()] = part.flatten()
    of_ranks = [torch.empty_like(mine) for _ in lengths]
    dist.all_gather(of_ranks, mine, group=layout.shards)
    return torch.cat([x[:length] for x, length in zip(of_ranks, lengths, strict=True)]).view(layout.shape)


def largest_everywhere(x: Tensor) -> Tensor:
    """Take the largest of all ranks entry by entry, in place.

    Args:
        x: This rank's numbers, any shape; the largest replace them.

    Returns:
        x.
    """
    if is_initialized():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def averaged_everywhere(x: Tensor) -> Tensor:
    """Average x over all ranks, in place.

    Args:
        x: This rank's value, any shape, contiguous; the mean replaces it.

    Returns:
        x.
    """
    return summed_everywhere(x).div_(world_size()) if world_size() > 1 else x


def world_size() -> int:
    """Return the number of ranks, one without a process group."""
    return dist.get_world_size() if is_initialized() else 1


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if is_initialized():
        dist.barrier()


def anywhere(flags: Tensor) -> Tensor:
    """Reduce flags by "or" over all ranks.

    Args:
        flags: This rank's flags, bool, any shape.

    Returns:
        The flags that are set on any rank, same shape.
    """
    if world_size() == 1:
        return flags
    agreed = flags.to(torch.int32)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return agreed.bool()


def check_agreement(plan: str, device: torch.device) -> None:
    """Compare a digest of the plan over all ranks; all ranks call this together.

    Args:
        plan: A text of all that must be the same on all ranks.
        device: The device of the exchange.

    Raises:
        RuntimeError: The digests differ. Every rank raises, with the digests of all.
    """
    if world_size() == 1:
        return
    digest = int.from_bytes(hashlib.sha256(plan.encode()).digest()[:7], "big")
    mine = torch.tensor([digest], device=device)
    of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, mine)
    digests = [f"{int(x):014x}" for x in of_ranks]
    if len(set(digests)) > 1:
        raise RuntimeError(
            f"the ranks disagree on version, model, table, options or what has a gradient: rank {dist.get_rank()} has "
            f"plan {digest:014x}, all have {digests}; install the same torch and symlm, and build the same model and "
            "optimizer, on all ranks, or pass shared=False where plain parameters belong to one rank"
        )
