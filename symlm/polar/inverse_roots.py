"""The inverse square root of a Gram matrix, by the polar iteration."""

import torch
from symlm_kernels.selection import select_products
from torch import Tensor

from symlm.polar.newton_schulz import collected_polynomial
from symlm.polar.precision import full_precision
from symlm.polar.schedules import get_schedule

CUTOFF = 1e-5  # of a Gram matrix's trace: rounding may leave eigenvalues below zero, from where no step returns


def inverse_root(K: Tensor) -> Tensor:
    """Return nearly `(K/tr K + εI)^{-1/2}`, ε = `CUTOFF`: what makes X with the Gram matrix K semi-orthogonal.

    Five steps of Polar Express on the Gram matrix alone: each eigenvalue of the result is within 15 % of its value,
    and bounded. Shapes: (..., n, n), positive semidefinite, fp32 or wider -> same. A polynomial of K, so that
    rotations of K rotate it; products alone, no factorization.
    Source: as `gram_newton_schulz`; arXiv 2505.16932 (Polar Express).
    """
    table = get_schedule("polar_express")
    trace = K.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    R = (K / (torch.where(trace > 0, trace, 1.0) * table.bound**2)).reshape(-1, *K.shape[-2:])
    R.diagonal(dim1=-2, dim2=-1).add_(CUTOFF / table.bound**2)
    with full_precision():
        Q = collected_polynomial(R, table.steps(5), select_products(R, "torch"))
    return (Q / table.bound).reshape(K.shape)
