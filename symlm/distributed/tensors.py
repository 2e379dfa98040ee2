"""DTensors and plain tensors alike: this rank's part, the whole, and the way between them."""

from typing import Any

from torch import Tensor


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
