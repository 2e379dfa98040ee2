"""Rules by elements, which keep no rotation: the baselines and the negative controls."""

import torch
from symlm_kernels.reference import unit_rows
from torch import Tensor

from symlm.polar.schedules import get_schedule
from symlm.rules.rule import ELEMENTS, rule


@rule(ELEMENTS)
def sign(M: Tensor) -> Tensor:
    """Return the sign of every entry: the negative control that Adam stands for."""
    return M.sign()


def brake(X: Tensor) -> Tensor:
    """Return `√(mean cosh²X)` of each matrix: `1 + γ²/2N` to first order for N entries of `γM/|M|_F`."""
    return X.cosh().square().mean(dim=(-2, -1), keepdim=True).sqrt()


def unit_matrix(M: Tensor) -> Tensor:
    """Return `M/|M|_F`; a zero matrix stays zero.  Shapes: (..., m, n) -> same."""
    return unit_rows(M.flatten(-2)).reshape(M.shape)


@rule(ELEMENTS)
def auon(M: Tensor) -> Tensor:
    """Return `X/√(mean cosh²X)`, `X = M/|M|_F`: the momentum's own direction, of Frobenius norm near 1.

    Source: arXiv 2509.24320, the paper's rule.
    """
    X = unit_matrix(M)
    return X / brake(X)


@rule(ELEMENTS, degree=1)
def auon_unnormalized(M: Tensor) -> Tensor:
    """Return `M/√(mean cosh²(γM/|M|_F))`, γ = 1.5: not normalized.  Source: arXiv 2509.24320, the code."""
    return M / brake(1.5 * unit_matrix(M))


@rule(ELEMENTS)
def hybrid_auon(M: Tensor) -> Tensor:
    """Return `Y/√(mean cosh²Y)`, Y one Newton–Schulz step of `M/|M|_F`.  Source: arXiv 2509.24320, the hybrid."""
    return _hybrid(M, steps=1)


@rule(ELEMENTS)
def hybrid_auon_five(M: Tensor) -> Tensor:
    """Return the same of five steps, nearly the polar factor, as the code does.  Source: arXiv 2509.24320, the code."""
    return _hybrid(M, steps=5)


def _hybrid(M: Tensor, steps: int) -> Tensor:
    tall = M.shape[-2] > M.shape[-1]
    Y = unit_matrix(M.mT if tall else M)
    for a, b, c in get_schedule("muon").steps(steps):
        A = Y @ Y.mT
        Y = a * Y + (b * A + c * A @ A) @ Y
    return (Y.mT if tall else Y) / brake(Y)


@rule(ELEMENTS, elementwise=True)
def adamw(M: Tensor) -> Tensor:
    """Return AdamW's first direction from zero state, `M / |M|` entrywise; the optimizer runs torch's own, with state.

    Source: Loshchilov & Hutter, arXiv 1711.05101; degree 0 up to its absolute eps.
    """
    return M / torch.where(M == 0, 1.0, M.abs())
