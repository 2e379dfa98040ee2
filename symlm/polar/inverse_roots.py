"""The inverse square root of a Gram matrix, by the polar iteration on that matrix alone."""

import torch
from symlm_kernels.selection import select_products
from torch import Tensor

from symlm.polar.newton_schulz import collected_polynomial
from symlm.polar.precision import full_precision
from symlm.polar.schedules import get_schedule

# Relative to a Gram matrix's trace. Rounding may leave eigenvalues below zero, from which the iteration diverges. The
# value was chosen here; no record.
CUTOFF = 1e-5


def inverse_root(K: Tensor) -> Tensor:
    """Approximate `(K/tr K + εI)^{-1/2}`, ε = `CUTOFF`, by five steps of Polar Express on the Gram matrix alone.

    It makes a matrix with the Gram matrix K nearly semi-orthogonal. It is a polynomial of K, so rotating K rotates
    the result; it takes products alone, no factorization.

    Args:
        K: Positive semidefinite matrices, (..., n, n), in fp32 or wider.

    Returns:
        The roots, same shape; each eigenvalue is bounded and within 15 % of the exact one.

    Source:
        Zhang, Amsel, Chen, Dao 2026, Gram Newton–Schulz; arXiv 2505.16932 (Polar Express).
    """
    table = get_schedule("polar_express")
    trace = K.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    R = (K / (torch.where(trace > 0, trace, 1.0) * table.bound**2)).reshape(-1, *K.shape[-2:])
    R.diagonal(dim1=-2, dim2=-1).add_(CUTOFF / table.bound**2)
    with full_precision():
        Q = collected_polynomial(R, table.steps(5), select_products(R.device.type, R.dtype, R.shape[-1], "torch"))
    return (Q / table.bound).reshape(K.shape)
