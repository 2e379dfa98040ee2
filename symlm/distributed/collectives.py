"""What all ranks sum, agree on and compare."""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from symlm.distributed.layout import Layout, is_initialized


def summed(x: Tensor, layout: Layout) -> Tensor:
    """Return the sum of x over the shards of a parameter."""
    if layout.shards is not None:
        dist.all_reduce(x, group=layout.shards)
    return x


def summed_everywhere(x: Tensor) -> Tensor:
    """Return the sum of x over all ranks."""
    if is_initialized():
        dist.all_reduce(x)
    return x


def world_size() -> int:
    """Return how many ranks there are, one without a process group."""
    return dist.get_world_size() if is_initialized() else 1


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
