"""Dion: a polar factor of low rank by one power step, whose error is fed back into the mean.

The rule has a mean of its own, so that the optimizer's is off (`momentum=0`): M is the gradient. Under `M -> L M Rᵀ`
the residual and both factors are moved along.
"""

import torch
from symlm_kernels.reference import unit_rows
from torch import Tensor

from symlm.polar.exact import orthonormal
from symlm.rules.rotated import raw
from symlm.rules.rule import A_ROTATION, DENSE, State, rule

RESIDUAL = State(torch.zeros_like, "both", lambda E, sides: sides[0] @ E @ sides[1].mT)


def _states(divisor: int) -> dict[str, State]:
    """Return the states of a rank of `min(m, n)` over a divisor, rounded up; Q begins as columns of the identity."""

    def rank(M: Tensor) -> int:
        return -(-min(M.shape[-2:]) // divisor)

    return {
        "residual": RESIDUAL,
        "left_factor": State(lambda M: torch.zeros_like(M[..., : rank(M)]), "left", A_ROTATION.act),
        "right_factor": State(lambda M: A_ROTATION.start(M.mT)[..., : rank(M)], "right", A_ROTATION.act),
    }


def _refresh(M: Tensor, residual: Tensor, right_factor: Tensor, beta1: float) -> dict[str, Tensor]:
    """Return the next residual and factors; a column at rounding level moves nothing, and Q's stays."""
    B = residual.to(raw(M).dtype) + raw(M)
    Q = right_factor.to(B.dtype)
    P = orthonormal(B @ Q)
    R = B.mT @ P
    sizes = R.abs().amax(-2, keepdim=True)
    seen = sizes > max(M.shape[-2:]) * torch.finfo(B.dtype).eps * sizes.amax(-1, keepdim=True)
    return {
        "residual": B - (1 - beta1) * P @ R.mT,
        "left_factor": torch.where(seen, P, 0.0),
        "right_factor": torch.where(seen, unit_rows(R.mT).mT, Q),
    }


@rule(DENSE, state=_states(1), refresh=_refresh, own_mean=True)
def dion(M: Tensor, left_factor: Tensor, right_factor: Tensor) -> Tensor:
    """Return `P Qᵀ` at full rank: `B = E + G`, `P = orth(BQ)`, `R = BᵀP`, `Q <- R` by unit columns.

    `E <- B − (1−μ)PRᵀ`; μ is β₁ of `betas`. It stores `2mn + (m + n)r` numbers a matrix, the gradient among them.

    Args:
        M: The gradient, (..., m, n).
        left_factor: P, (..., m, r).
        right_factor: Q after this step, (..., n, r).

    Returns:
        The directions, same shape.

    Source:
        Dion, arXiv 2504.05295, algorithm 1; there Q begins at random.
    """
    return (left_factor @ right_factor.mT).to(M.dtype)


@rule(DENSE, state=_states(4), refresh=_refresh, own_mean=True)
def dion_quarter(M: Tensor, left_factor: Tensor, right_factor: Tensor) -> Tensor:
    """Return `dion`'s direction at a quarter of the full rank: the rest stays in the residual for later steps.

    Args:
        M: The gradient, (..., m, n).
        left_factor: P, (..., m, r).
        right_factor: Q after this step, (..., n, r).

    Returns:
        The directions, same shape.

    Source:
        Dion, arXiv 2504.05295, rank fraction 1/4.
    """
    return (left_factor @ right_factor.mT).to(M.dtype)
