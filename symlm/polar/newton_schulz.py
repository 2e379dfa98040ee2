"""Newton–Schulz on a matrix, and the same iteration on its Gram matrix alone."""

from types import ModuleType

import torch
from torch import Tensor

from symlm.polar.schedules import Triple

RESTART = 2  # the Gram iteration forms X anew before this step: half precision loses definiteness otherwise


def newton_schulz(X: Tensor, triples: list[Triple], products: ModuleType) -> Tensor:
    """Iterate `X <- aX + (bA + cA²)X`, `A = XXᵀ`.  Shapes: (b, m, n), normalized -> same."""
    for a, b, c in triples:
        A = products.gram(X)
        X = products.apply_polynomial(products.symmetric_product(A, A, A, alpha=c, beta=b), X, a)
    return X


def gram_newton_schulz(X: Tensor, triples: list[Triple], products: ModuleType) -> Tensor:
    """Iterate on the Gram matrix alone, `U = QX` with Q of `collected_polynomial`, and again from there at `RESTART`.

    Shapes: (b, m, n), normalized -> same. Equal to `newton_schulz` in exact arithmetic.
    Source: Zhang, Amsel, Chen, Dao 2026, Gram Newton–Schulz.
    """
    for chunk in (triples[:RESTART], triples[RESTART:]):
        if chunk:
            X = torch.bmm(collected_polynomial(products.gram(X), chunk, products), X)
    return X


def collected_polynomial(R: Tensor, triples: list[Triple], products: ModuleType) -> Tensor:
    """Return Q with `U = QX` for `R = XXᵀ`: `Z = bR + cR²`, `Q <- (a+Z)Q`, `R <- (a+Z)R(a+Z)`.

    Shapes: (b, m, m) -> same.
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
