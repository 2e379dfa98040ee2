"""Torch twins of the products of `symlm_kernels.products`; they take stacks (b, m, n)."""

import torch
from torch import Tensor


def gram(X: Tensor) -> Tensor:
    """Compute `A = X Xᵀ`.

    Args:
        X: Matrices, (b, m, n).

    Returns:
        The Gram matrices, (b, m, m).
    """
    return torch.bmm(X, X.mT)


def symmetric_product(A: Tensor, B: Tensor, C: Tensor, alpha: float, beta: float) -> Tensor:
    """Compute `β C + α A B`, which is symmetric for polynomials A, B, C of one Gram matrix.

    Args:
        A: Matrices, (b, m, m).
        B: Matrices, (b, m, m).
        C: Matrices, (b, m, m).
        alpha: The factor α.
        beta: The factor β.

    Returns:
        The matrices, (b, m, m).
    """
    return torch.baddbmm(C, A, B, alpha=alpha, beta=beta)


def apply_polynomial(B: Tensor, X: Tensor, a: float) -> Tensor:
    """Compute `a X + B X` for a symmetric B; a transposed view stays one, since `(B X)ᵀ = XᵀB`.

    Args:
        B: Matrices, (b, m, m).
        X: Matrices, (b, m, n).
        a: The factor of X.

    Returns:
        The matrices, (b, m, n).
    """
    if is_transposed(X):
        return torch.baddbmm(X.mT, X.mT, B, beta=a).mT
    return torch.baddbmm(X, B, X, beta=a)


def apply(Q: Tensor, X: Tensor) -> Tensor:
    """Compute `Q X` for a symmetric Q; a transposed view stays one.

    Args:
        Q: The matrices, (b, m, m).
        X: Matrices, (b, m, n).

    Returns:
        The matrices, (b, m, n).
    """
    return torch.bmm(X.mT, Q).mT if is_transposed(X) else torch.bmm(Q, X)


def is_transposed(X: Tensor) -> bool:
    """Return whether a stack is the transposed view of a contiguous one, whose passes read in memory order.

    Args:
        X: Matrices, (b, m, n).
    """
    return X.mT.is_contiguous() and not X.is_contiguous()
