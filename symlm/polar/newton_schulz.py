"""Newton–Schulz on a matrix, and the same iteration on its Gram matrix alone."""

from types import ModuleType

import torch
from symlm_kernels import reference
from symlm_kernels.reference import apply
from symlm_kernels.reference.triangles import is_halved
from torch import Tensor

from symlm.polar.schedules import Triple

# The Gram iteration forms X anew before this step (Gram Newton–Schulz, the published code: after step 2); without it,
# the Gram matrix loses definiteness in half precision.
RESTART = 2
# The side from which one matrix on a CPU is multiplied as it is: at 256 what Python does for a stack takes an eighth of
# the time. Below, a batch of one may be rounded otherwise than the matrix.
ALONE_FROM = 128


def newton_schulz(X: Tensor, triples: list[Triple], products: ModuleType) -> Tensor:
    """Iterate `X <- aX + (bA + cA²)X`, `A = XXᵀ`.

    Args:
        X: Normalized matrices, (b, m, n), wide or square for the lowest cost.
        triples: The coefficients `(a, b, c)` of each step.
        products: The module whose matrix products are called, torch's or Triton's.

    Returns:
        The approximate polar factors, same shape.
    """
    alone = len(X) == 1 and X.device.type == "cpu" and min(X.shape[1:]) >= ALONE_FROM
    if alone and products is reference and not is_halved(X, X.shape[1]):
        return _of_one(X[0], triples)[None]
    for a, b, c in triples:
        A = products.gram(X)
        X = products.apply_polynomial(products.symmetric_product(A, A, A, alpha=c, beta=b), X, a)
    return X


def _of_one(X: Tensor, triples: list[Triple]) -> Tensor:
    """Run `newton_schulz` on one matrix, (m, n)."""
    for a, b, c in triples:
        A = torch.mm(X, X.mT)
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def gram_newton_schulz(X: Tensor, triples: list[Triple], products: ModuleType) -> Tensor:
    """Iterate on the Gram matrix alone, `U = QX` with Q of `collected_polynomial`, restarted from U at `RESTART`.

    In exact arithmetic the result is that of `newton_schulz`.

    Args:
        X: Normalized matrices, (b, m, n), wide or square for the lowest cost.
        triples: The coefficients `(a, b, c)` of each step.
        products: The module whose matrix products are called, torch's or Triton's.

    Returns:
        The approximate polar factors, same shape.

    Source:
        Zhang, Amsel, Chen, Dao 2026, Gram Newton–Schulz.
    """
    for chunk in (triples[:RESTART], triples[RESTART:]):
        if chunk:
            X = apply(collected_polynomial(products.gram(X), chunk, products), X)
    return X


def collected_polynomial(R: Tensor, triples: list[Triple], products: ModuleType) -> Tensor:
    """Collect the steps of Newton–Schulz into Q, `U = QX`: `Z = bR + cR²`, `Q <- (a+Z)Q`, `R <- (a+Z)R(a+Z)`.

    Args:
        R: The Gram matrices `XXᵀ`, (b, m, m).
        triples: The coefficients `(a, b, c)` of each step, at least one.
        products: The module whose matrix products are called, torch's or Triton's.

    Returns:
        Q, same shape.
    """
    product, Q = products.symmetric_product, None
    for k, (a, b, c) in enumerate(triples):
        Z = product(R, R, R, alpha=c, beta=b)
        if k + 1 < len(triples):
            RZ = product(R, Z, R, alpha=1.0, beta=a)
            R = product(Z, RZ, RZ, alpha=1.0, beta=a)
        if Q is None:
            Q = Z
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            Q = product(Q, Z, Q, alpha=1.0, beta=a)
    assert Q is not None
    return Q
