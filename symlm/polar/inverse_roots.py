"""The inverse square root of a Gram matrix, by the polar iteration on that matrix alone."""

import torch
from symlm_kernels.selection import select_products
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from symlm.polar.newton_schulz import collected_polynomial
from symlm.polar.precision import full_precision
from symlm.polar.schedules import get_schedule

# Relative to a Gram matrix's trace. Rounding may leave eigenvalues below zero, from which the iteration diverges. The
# value was chosen here; no record.
CUTOFF = 1e-5
STEPS = 5
LAUNCHES = 4 * STEPS - 3  # products of `collected_polynomial`
_ROOTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of stored matrices: the version, and its root


def inverse_root(K: Tensor) -> Tensor:
    """Approximate `(K/tr K + εI)^{-1/2}`, ε = `CUTOFF`, by `STEPS` steps of Polar Express on the Gram matrix alone.

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
        Q = collected_polynomial(R, table.steps(STEPS), select_products(R.device.type, R.dtype, R.shape[-1], "torch"))
    return (Q / table.bound).reshape(K.shape)


def stored_root(K: Tensor) -> Tensor:
    """Return `inverse_root(K)`, which is computed again only after K has changed in place.

    It is not part of any state: a resumed run computes it from its K, bit for bit the same. Of a view, whose object may
    be new in every step, it is stored with the tensor that has the memory.

    Args:
        K: Positive semidefinite matrices that live as long as the root is wanted, (..., n, n), in fp32 or wider.

    Returns:
        The roots, same shape, which must not be written to.
    """
    owner, place = K if K._base is None else K._base, (K.storage_offset(), K.shape)
    roots = _ROOTS.setdefault(owner, {})
    version, root = roots.get(place, (None, None))
    if version != K._version:
        root = inverse_root(K)
        roots[place] = K._version, root
    assert root is not None
    return root
