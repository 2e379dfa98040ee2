"""Torch twins of the passes of `symlm_kernels.stacks`, before and behind the products of a polar factor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from symlm_kernels.reference.rows import normal


def stack_inputs(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    beta: float,
    finite: Tensor,
    matrices: int,
    bound: float,
    nesterov: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute `M <- βM + (1−β)G` of k parameters of one shape, and `X / (bound·‖X‖_F)` of each matrix X of them.

    Args:
        gradients: G of each parameter.
        momenta: M of each parameter, same shape, updated in place.
        beta: The momentum's decay β.
        finite: M does not change, and G counts as M, if it is 0; one element.
        matrices: The number of matrices of a parameter, each of consecutive entries.
        bound: The factor of the norm.
        nesterov: Whether X is `(1−β)G + βM` in place of M.
        dtype: The dtype of the result.

    Returns:
        The divided inputs, (k, *shape); a zero matrix stays zero.
    """
    M, G = torch.stack(list(momenta)), torch.stack(list(gradients))
    G = torch.where(finite != 0, G.float(), M.float())
    M.copy_(M.float().lerp(G, 1 - beta))
    for momentum, new in zip(momenta, M, strict=True):
        momentum.copy_(new)
    X = (M.float().lerp(G, 1 - beta) if nesterov else M.float()).view(len(M) * matrices, -1)
    Y = X / normal(X.abs().amax(dim=1, keepdim=True))
    Y = Y / (normal(torch.linalg.vector_norm(Y, dim=1, keepdim=True)) * bound)
    return Y.to(dtype).view(M.shape)


def stack_step(
    U: Tensor, weights: Sequence[Tensor], active: Tensor, rate: Tensor, scale: float, decay: float
) -> Tensor:
    """Compute `W <- (1 − rate·decay)W − rate·scale·a·U` in place, of k parameters of one shape.

    Args:
        U: The directions, (k, *shape).
        weights: W of each parameter.
        active: The factor a of each part of a parameter, (k, parts); parts are equal and have consecutive entries.
        rate: The rate, 0 for a step that does not happen, one element.
        scale: The scale of the directions.
        decay: The weight decay.

    Returns:
        `Σ(rate·scale·a·U)²` of the programs that share the work, whose sum is that of all entries.
    """
    change = (U.float().view(*active.shape, -1) * (rate * scale * active)[..., None]).view(U.shape)
    for W, part in zip(weights, change, strict=True):
        W.copy_((1 - rate * decay) * W.float() - part)
    return change.square().sum()[None]
