"""Pure torch twins of the Newton–Schulz kernels; every matrix argument is a stack (b, m, n)."""

import torch
from torch import Tensor


def gram(X: Tensor) -> Tensor:
    """Return `A = X Xᵀ`.  Shapes: (b, m, n) -> (b, m, m)."""
    return torch.bmm(X, X.mT)


def symmetric_product(A: Tensor, B: Tensor, C: Tensor, alpha: float, beta: float) -> Tensor:
    """Return `β C + α A B`, symmetric because A, B, C are polynomials of one Gram matrix.

    Shapes: (b, m, m) each -> (b, m, m).
    """
    return torch.baddbmm(C, A, B, alpha=alpha, beta=beta)


def apply_polynomial(B: Tensor, X: Tensor, a: float) -> Tensor:
    """Return `a X + B X`.  Shapes: (b, m, m), (b, m, n) -> (b, m, n)."""
    return torch.baddbmm(X, B, X, beta=a)
