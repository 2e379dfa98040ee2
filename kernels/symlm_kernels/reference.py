"""Pure torch twins of the Newton–Schulz kernels; every matrix argument is a stack (b, m, n)."""

from collections.abc import Callable

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


def row_norm_step(G: Tensor, M: Tensor, W: Tensor, beta: float, size: Tensor, keep: Tensor, finite: Tensor) -> None:
    """Do `M <- βM + (1−β)G`, `W <- keep·W − size·M_i/|M_i|` in place; nothing where `finite` is 0.

    Shapes: G, M, W (m, n); size, keep, finite: one element each.
    """
    _rows_step(G, M, W, beta, size, keep, finite, unit_rows)


def centered_row_norm_step(
    G: Tensor, M: Tensor, W: Tensor, beta: float, size: Tensor, keep: Tensor, finite: Tensor
) -> None:
    """Do the same with the direction `C D C M`, C taking the mean row from every row."""
    _rows_step(G, M, W, beta, size, keep, finite, lambda M: center(unit_rows(center(M))))


def unit_rows(M: Tensor) -> Tensor:
    """Return `M_i / |M_i|`, zero rows staying zero; through each row's largest entry, so that no square overflows."""
    largest = M.abs().amax(dim=-1, keepdim=True)
    U = M / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(U, dim=-1, keepdim=True)
    return U.div_(torch.where(norm > 0, norm, 1.0))


def center(M: Tensor) -> Tensor:
    """Return `(I − 11ᵀ/m) M`: the mean row is taken from every row."""
    return M - M.mean(dim=-2, keepdim=True)


def _rows_step(
    G: Tensor,
    M: Tensor,
    W: Tensor,
    beta: float,
    size: Tensor,
    keep: Tensor,
    finite: Tensor,
    direction: Callable[[Tensor], Tensor],
) -> None:
    new = M.float().lerp(G.float(), 1 - beta).to(M.dtype)
    stepped = keep * W.float() - size * direction(new.float())
    M.copy_(torch.where(finite != 0, new, M))
    W.copy_(torch.where(finite != 0, stepped.to(W.dtype), W))
