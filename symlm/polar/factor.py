"""The polar factor `U_r V_rᵀ` of a matrix, batched: the methods behind one function."""

import torch
from symlm_kernels.reference import normal
from symlm_kernels.selection import select_products
from torch import Tensor

from symlm.polar.counting import gram_is_cheaper
from symlm.polar.exact import qdwh_polar, svd_polar
from symlm.polar.newton_schulz import gram_newton_schulz, newton_schulz
from symlm.polar.precision import resolve_dtype
from symlm.polar.schedules import get_schedule

METHODS = ("svd", "qdwh", "newton_schulz", "gram_newton_schulz", "auto")


def polar(
    M: Tensor,
    method: str = "newton_schulz",
    *,
    schedule: str = "polar_express",
    steps: int = 5,
    compute_dtype: str | torch.dtype = "float32",
    side: str | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Compute the orthogonal polar factor of each matrix, `U_r V_rᵀ` of its thin SVD.

    It does not depend on the scale of M, and M is never written to.

    Args:
        M: Real matrices, (..., m, n).
        method: One of `METHODS`; "auto" is the iteration of fewer operations.
        schedule: The coefficients of the iterations, a name of `symlm.polar.SCHEDULES`.
        steps: Steps of the iterations.
        compute_dtype: The dtype of the iterations, or "auto" for `fastest_dtype`; float64 input stays in float64
            unless a `torch.dtype` is given.
        side: The Gram matrix to form, "left" (m, m) or "right" (n, n); by default the smaller one.
        kernels: "torch", "triton", or "auto" for the one that was measured to be faster.

    Returns:
        The polar factors, same shape and dtype. A zero matrix gives zero; a rank-deficient one gives a partial
        isometry ("svd") or a direction of bounded spectral norm (the iterations).

    Raises:
        ValueError: An unknown method, schedule, side or dtype, steps < 1, or M with fewer than two axes.
        TypeError: M is complex or of integers.
        RuntimeError: Triton is asked for and cannot run here.

    Source:
        Higham 2008, ch. 8; arXiv 2505.16932 (Polar Express); Nakatsukasa & Higham 2013 (QDWH).
    """
    if M.ndim < 2:
        raise ValueError(f"polar expects matrices (..., m, n), got shape {tuple(M.shape)}; reshape M")
    if not M.is_floating_point():
        raise TypeError(f"polar expects a real floating-point matrix, got {M.dtype}; convert M, e.g. to torch.float32")
    if method not in METHODS:
        raise ValueError(f"unknown polar method {method!r}; choose one of {METHODS}")
    if side not in (None, "left", "right"):
        raise ValueError(f"side is 'left', 'right' or None, got {side!r}; None forms the smaller Gram matrix")
    if M.numel() == 0:
        return torch.zeros_like(M)
    m, n = M.shape[-2:]
    stack = M.reshape(-1, m, n)
    flipped = side == "right" or (side is None and m > n)
    X = stack.mT if flipped else stack
    if method == "svd":
        U = svd_polar(_normalize(X, 1.0, resolve_dtype(M, "float32")))
    elif method == "qdwh":
        X = _normalize(X, 1.0, resolve_dtype(M, "float32"))
        U = qdwh_polar(X.mT).mT if X.shape[-2] <= X.shape[-1] else qdwh_polar(X)
    else:
        table = get_schedule(schedule)
        use_gram = method == "gram_newton_schulz" or (
            method == "auto" and gram_is_cheaper(X, resolve_dtype(M, compute_dtype, gram=True), steps, kernels)
        )
        X = _normalize(X, table.bound, resolve_dtype(M, compute_dtype, use_gram))
        iterate = gram_newton_schulz if use_gram else newton_schulz
        U = iterate(X, table.steps(steps), select_products(X, kernels))
    return (U.mT if flipped else U).to(M.dtype).reshape(M.shape)


def _normalize(X: Tensor, bound: float, dtype: torch.dtype) -> Tensor:
    """Scale each matrix to `X / (bound·‖X‖_F)`, by its largest entry first so that no square overflows."""
    wide = X.to(torch.promote_types(torch.promote_types(X.dtype, dtype), torch.float32))
    axes = (-2, -1)
    largest = torch.maximum(wide.amax(dim=axes, keepdim=True), -wide.amin(dim=axes, keepdim=True))
    Y = wide / normal(largest)
    norm = torch.linalg.vector_norm(Y, dim=axes, keepdim=True)
    size = normal(norm) * bound
    return Y.div_(size) if dtype == Y.dtype else torch.div(Y, size, out=torch.empty_like(Y, dtype=dtype))
