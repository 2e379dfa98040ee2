"""DTensors and plain tensors behind the same functions: this rank's part, the whole, and the conversions."""

from typing import Any

from torch import Tensor


def local(x: Any) -> Tensor:
    """Return this rank's part of a DTensor, sharing its memory; a plain tensor unchanged."""
    return x.to_local() if hasattr(x, "placements") else x


def gathered(x: Any) -> Tensor:
    """Gather a DTensor of any placement as a whole; a plain tensor is returned unchanged."""
    return x.full_tensor() if hasattr(x, "placements") else x


def regrouped(part: Tensor, like: Any) -> Tensor:
    """Combine the ranks' parts to a DTensor with another one's mesh, placements and shape.

    Args:
        part: This rank's part, the shape of `like`'s local tensor.
        like: The DTensor, or a plain tensor.

    Returns:
        The DTensor; `part` if `like` is a plain tensor.
    """
    if not hasattr(like, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def repeated_like(whole: Tensor, p: Any) -> Any:
    """Mark a tensor that every rank has whole as replicated, so that checkpoints store it once.

    Args:
        whole: The tensor, the same on every rank.
        p: The parameter whose mesh is used.

    Returns:
        A replicated DTensor on p's mesh; `whole` if p is a plain tensor.
    """
    if not hasattr(p, "placements"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(whole, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)


def placed_like(whole: Tensor, x: Any) -> Tensor:
    """Return this rank's part of a whole tensor, sharded as the DTensor x.

    Args:
        whole: The tensor, the same on every rank.
        x: The DTensor with the mesh and placements.

    Returns:
        The local part; nothing is exchanged.
    """
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None).to_local()


def aligned(gradient: Any, p: Any) -> Tensor:
    """Return this rank's part of a gradient, redistributed first if its placements are not its parameter's.

    Args:
        gradient: The gradient, a DTensor or a plain tensor.
        p: Its parameter.

    Returns:
        The local part.
    """
    if hasattr(p, "placements") and gradient.placements != p.placements:
        gradient = gradient.redistribute(placements=p.placements)
    return local(gradient)
