"""Pure torch twins of the Newton–Schulz kernels; every matrix argument is a stack (b, m, n)."""

from math import sqrt
from typing import NamedTuple

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


class MeanNorms(NamedTuple):
    """Rows' norms in the mean of steps, `r² <- β₂r² + (1−β₂)|X_i|²`: r (m, 1), contiguous; `1 − β₂^t` at step t; β₂."""

    row_rms: Tensor
    bias: Tensor
    beta2: float


def row_norm_step(
    G: Tensor,
    M: Tensor,
    W: Tensor,
    beta: float,
    size: Tensor,
    keep: Tensor,
    finite: Tensor,
    nesterov: bool = False,
    mean: MeanNorms | None = None,
) -> None:
    """Do `M <- βM + (1−β)G`, `W <- keep·W − size·M_i/|M_i|` in place; nothing where `finite` is 0.

    nesterov: the direction is of `(1−β)G + βM` instead. mean: `X_i·√bias/r_i` instead, r refreshed.
    Shapes: G, M, W (m, n); size, keep, finite: one element each.
    """
    _step(_directions(G, M, beta, finite, nesterov, mean, False), W, size, keep, finite)


def centered_row_norm_step(
    G: Tensor,
    M: Tensor,
    W: Tensor,
    beta: float,
    size: Tensor,
    keep: Tensor,
    finite: Tensor,
    nesterov: bool = False,
    mean: MeanNorms | None = None,
) -> None:
    """Do the same with the direction `C D C M`, C taking the mean row from every row."""
    _step(center(_directions(G, M, beta, finite, nesterov, mean, True)), W, size, keep, finite)


def mean_norms(norm: Tensor, row_rms: Tensor, beta2: float) -> Tensor:
    """Return `√(β₂r² + (1−β₂)|X_i|²)`, without a square that could overflow.  Shapes: (..., m, 1) twice -> same."""
    return torch.hypot(sqrt(beta2) * row_rms, sqrt(1 - beta2) * norm)


def over_rms(X: Tensor, row_rms: Tensor, bias: Tensor | float) -> Tensor:
    """Return `X_i·√bias/r_i`, zero rows staying zero.  Shapes: X (..., m, n), row_rms (..., m, 1)."""
    return X / normal(row_rms / bias**0.5)


def normal(size: Tensor) -> Tensor:
    """Return a size to divide by: infinity where it is below its dtype's normal numbers, which are counted as zero.

    There a mean that only decays gets stuck, and what is divided by it would grow again.
    """
    return torch.where(size < torch.finfo(size.dtype).tiny, torch.inf, size)


def row_norms(M: Tensor) -> Tensor:
    """Return `|M_i|`, through each row's largest entry: no square overflows.  Shapes: (..., m, n) -> (..., m, 1)."""
    largest = M.abs().amax(dim=-1, keepdim=True)
    scaled = M / normal(largest)
    return largest * torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)


def unit_rows(M: Tensor) -> Tensor:
    """Return `M_i / |M_i|`, zero rows staying zero; through each row's largest entry, so that no square overflows."""
    largest = M.abs().amax(dim=-1, keepdim=True)
    U = M / normal(largest)
    return U.div_(normal(torch.linalg.vector_norm(U, dim=-1, keepdim=True)))


def center(M: Tensor) -> Tensor:
    """Return `(I − 11ᵀ/m) M`: the mean row is taken from every row."""
    return M - M.mean(dim=-2, keepdim=True)


def row_directions(
    G: Tensor,
    M: Tensor,
    beta: float,
    finite: Tensor,
    nesterov: bool = False,
    mean: MeanNorms | None = None,
    centered: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Do `M <- βM + (1−β)G` and return the rows' directions in `dtype`, and their mean row; for a product of them.

    nesterov, mean: as `row_norm_step`, norms refreshed; centered: of `C M`. Shapes: G, M (m, n) -> (m, n), (n) in fp32.
    """
    U = _directions(G, M, beta, finite, nesterov, mean, centered)
    return U.to(dtype), U.mean(dim=0)


def step_by_directions(U: Tensor, row: Tensor, W: Tensor, size: Tensor, keep: Tensor, finite: Tensor) -> None:
    """Do `W <- keep·W − size·(U − 1 rowᵀ)` in place; nothing where `finite` is 0.

    Shapes: U, W (m, n), row (n); size, keep, finite: one element each.
    """
    _step(U.float() - row, W, size, keep, finite)


def _directions(
    G: Tensor, M: Tensor, beta: float, finite: Tensor, nesterov: bool, mean: MeanNorms | None, centered: bool
) -> Tensor:
    """Update the momentum and the mean norms, and return the rows' directions of what the rule sees."""
    new = M.float().lerp(G.float(), 1 - beta).to(M.dtype)
    M.copy_(torch.where(finite != 0, new, M))
    X = new.float().lerp(G.float(), 1 - beta) if nesterov else new.float()
    X = center(X) if centered else X
    if mean is None:
        return unit_rows(X)
    refreshed = mean_norms(row_norms(X), mean.row_rms, mean.beta2)
    mean.row_rms.copy_(torch.where(finite != 0, refreshed, mean.row_rms))
    return over_rms(X, refreshed, mean.bias)


def _step(U: Tensor, W: Tensor, size: Tensor, keep: Tensor, finite: Tensor) -> None:
    stepped = (keep * W.float() - size * U).to(W.dtype)
    W.copy_(torch.where(finite != 0, stepped, W))
