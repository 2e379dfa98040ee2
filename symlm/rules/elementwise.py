"""Rules by elements, which preserve no rotation: the baselines and the negative controls."""

import torch
from symlm_kernels.reference import row_norms, unit_rows
from torch import Tensor

from symlm.polar.schedules import get_schedule
from symlm.rules.rule import ELEMENTS, rule


@rule(ELEMENTS)
def sign(M: Tensor) -> Tensor:
    """Return the sign of every entry, the negative control of the rotation tests.

    Args:
        M: The momentum, (..., m, n).

    Returns:
        The directions, same shape, of -1, 0 and 1.

    Source:
        Scion's sign norm, arXiv 2502.07529; Adam without its means.
    """
    return M.sign()


def brake(X: Tensor) -> Tensor:
    """Return AuON's divisor `√(mean cosh²X)` of each matrix, `1 + γ²/2N` to first order for N entries of `γM/|M|_F`.

    Args:
        X: Matrices, (..., m, n).

    Returns:
        The divisors, (..., 1, 1).

    Source:
        arXiv 2509.24320.
    """
    return X.cosh().square().mean(dim=(-2, -1), keepdim=True).sqrt()


def unit_matrix(M: Tensor) -> Tensor:
    """Scale each matrix to Frobenius norm 1, `M/|M|_F`.

    Args:
        M: Matrices, (..., m, n).

    Returns:
        The scaled matrices, same shape; a zero matrix stays zero.
    """
    return unit_rows(M.flatten(-2)).reshape(M.shape)


@rule(ELEMENTS)
def auon(M: Tensor, gamma: float = 1.0) -> Tensor:
    """Return `X/√(mean cosh²(γX))`, `X = M/|M|_F`: the direction of the momentum itself, of Frobenius norm near 1.

    Args:
        M: The momentum, (..., m, n).
        gamma: γ, 1 in the paper.

    Returns:
        The directions, same shape.

    Source:
        arXiv 2509.24320, the paper's rule.
    """
    X = unit_matrix(M)
    return X / brake(gamma * X)


@rule(ELEMENTS, degree=1)
def auon_unnormalized(M: Tensor, gamma: float = 1.5) -> Tensor:
    """Return `M/√(mean cosh²(γM/|M|_F))`, which is not normalized.

    Args:
        M: The momentum, (..., m, n).
        gamma: γ, 1.5 in the code.

    Returns:
        The directions, same shape, in the units of M.

    Source:
        arXiv 2509.24320, the published code.
    """
    return M / brake(gamma * unit_matrix(M))


@rule(ELEMENTS)
def hybrid_auon(M: Tensor, gamma: float = 1.0) -> Tensor:
    """Return `Y/√(mean cosh²(γY))`, where Y is `M/|M|_F` after one Newton–Schulz step.

    Args:
        M: The momentum, (..., m, n).
        gamma: γ, 1 in the paper.

    Returns:
        The directions, same shape.

    Source:
        arXiv 2509.24320, the hybrid of the paper.
    """
    Y = _partly_polar(M, steps=1)
    return Y / brake(gamma * Y)


@rule(ELEMENTS)
def hybrid_auon_five(M: Tensor, gamma: float = 1.5) -> Tensor:
    """Return `Y/√(mean cosh²(γY/|Y|_F))`; Y is `M/|M|_F` after five Newton–Schulz steps.

    Args:
        M: The momentum, (..., m, n).
        gamma: γ, 1.5 in the code.

    Returns:
        The directions, same shape.

    Source:
        arXiv 2509.24320, the hybrid of the published code.
    """
    Y = _partly_polar(M, steps=5)
    return Y / brake(gamma * unit_matrix(Y))


def _partly_polar(M: Tensor, steps: int) -> Tensor:
    """Return `M/|M|_F` after `steps` Newton–Schulz steps with Muon's coefficients."""
    tall = M.shape[-2] > M.shape[-1]
    Y = unit_matrix(M.mT if tall else M)
    for a, b, c in get_schedule("muon").steps(steps):
        A = Y @ Y.mT
        Y = a * Y + (b * A + c * A @ A) @ Y
    return Y.mT if tall else Y


@rule(ELEMENTS)
def sinkhorn_rows(M: Tensor) -> Tensor:
    """Return M after eleven scalings, of rows to RMS 1, of columns, and so on to the rows: the sizes of both are equal.

    Rows below a thousandth of the mean row's length are left out: tokens that did not occur lately do not step.

    Args:
        M: The momentum, (..., m, n).

    Returns:
        The directions, same shape; rows have RMS 1 or are zero.

    Source:
        The embedding's rule in DeepSeek's V4.1 report, by Emerging-Optimizers' issue 299; its rate is 0.18 of AdamW's.
    """
    size = row_norms(M)
    X = unit_rows(torch.where(size > 1e-3 * size.mean(dim=-2, keepdim=True), M, 0.0))
    for _ in range(5):
        X = unit_rows(unit_rows(X.mT).mT)
    return X * M.shape[-1] ** 0.5


@rule(ELEMENTS, elementwise=True)
def adamw(M: Tensor) -> Tensor:
    """Return AdamW's first direction from zero state, `M / |M|` by entries; the optimizer runs torch's AdamW instead.

    Args:
        M: The gradient, (..., m, n).

    Returns:
        The directions, same shape; a zero entry stays zero. AdamW has degree 0 only up to its absolute eps.

    Source:
        Loshchilov & Hutter, arXiv 1711.05101.
    """
    return M / torch.where(M == 0, 1.0, M.abs())
