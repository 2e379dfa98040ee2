"""Torch twins of the products of `symlm_kernels.products`; they take stacks (b, m, n)."""

import torch
from torch import Tensor

from symlm_kernels.reference.triangles import add_lower_product, is_halved, mirrored


def gram(X: Tensor) -> Tensor:
    """Compute `A = X Xᵀ`.

    Args:
        X: Matrices, (b, m, n).

    Returns:
        The Gram matrices, (b, m, m).
    """
    if not is_halved(X, X.shape[-2]):
        return torch.bmm(X, X.mT)
    A = X.new_empty(len(X), X.shape[-2], X.shape[-2])
    return mirrored(add_lower_product(X, X.mT, A, alpha=1.0, beta=0.0, out=A))


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
    if not is_halved(A, A.shape[-1]):
        return torch.baddbmm(C, A, B, alpha=alpha, beta=beta)
    return mirrored(add_lower_product(A, B, C, alpha, beta, out=torch.empty_like(C)))


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
