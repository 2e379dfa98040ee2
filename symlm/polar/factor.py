"""The polar factor `U_r V_rᵀ` of a matrix, batched: the methods behind one function."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from symlm_kernels.reference import SMALLEST_PLAIN, is_plain, normal
from symlm_kernels.selection import select_products
from torch import Tensor

from symlm.polar.counting import gram_is_cheaper
from symlm.polar.exact import qdwh_polar, svd_polar
from symlm.polar.newton_schulz import gram_newton_schulz, newton_schulz
from symlm.polar.precision import accumulation_dtype, refuse_gram_iteration, resolve_dtype
from symlm.polar.schedules import Triple, get_schedule

CPU_STACK = 2**20  # entries; a larger stack's temporaries leave a CPU's cache
CPU_PART = 2**16  # a quarter of a megabyte in fp32; of sides of 256 0.92 to 0.96 of the time that 2¹⁷ take
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
        ValueError: An unknown method, schedule, side or dtype, steps < 1, M with fewer than two axes, or the Gram
            iteration in bf16.
        TypeError: M is complex or of integers.
        RuntimeError: Triton is asked for and cannot run here.

    Source:
        Higham 2008, ch. 8; arXiv 2505.16932 (Polar Express); Nakatsukasa & Higham 2013 (QDWH).
    """
    _refuse_unusable(M, method, side)
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
        iteration = choose_iteration(X, method, schedule, steps, compute_dtype, kernels)
        divided = [iteration(_normalize(part, iteration.bound, iteration.dtype)) for part in _parts(X)]
        U = torch.cat(divided) if len(divided) > 1 else divided[0]
    return (U.mT if flipped else U).to(M.dtype).reshape(M.shape)


def _refuse_unusable(M: Tensor, method: str, side: str | None) -> None:
    """Raise what `polar` raises for no real matrices, or an unknown method or side."""
    if M.ndim < 2:
        raise ValueError(f"polar expects matrices (..., m, n), got shape {tuple(M.shape)}; reshape M")
    if not M.is_floating_point():
        raise TypeError(f"polar expects a real floating-point matrix, got {M.dtype}; convert M, e.g. to torch.float32")
    if method not in METHODS:
        raise ValueError(f"unknown polar method {method!r}; choose one of {METHODS}")
    if side not in (None, "left", "right"):
        raise ValueError(f"side is 'left', 'right' or None, got {side!r}; None forms the smaller Gram matrix")


def _parts(X: Tensor) -> Sequence[Tensor]:
    """Return the parts of a stack that are iterated one after the other: on a CPU what its cache holds."""
    size = X.shape[-2] * X.shape[-1]
    if X.device.type != "cpu" or (X.numel() <= CPU_STACK and size < CPU_PART):
        return (X,)
    return X.split(max(1, CPU_PART // size))


class Iteration(NamedTuple):
    """Hold an iteration to polar factors, as it was chosen for a stack; call it with the divided stack.

    Args:
        function: Maps a stack, triples and products to polar factors.
        triples: The coefficients of its steps.
        products: The module whose products it calls.
        bound: Each matrix X of the stack is divided to `X / (bound·‖X‖_F)`.
        dtype: The dtype of the divided stack.
    """

    function: Callable[[Tensor, list[Triple], ModuleType], Tensor]
    triples: list[Triple]
    products: ModuleType
    bound: float
    dtype: torch.dtype

    def __call__(self, X: Tensor) -> Tensor:
        """Return the polar factors of a divided stack, (b, m, n), in its dtype and memory order."""
        return self.function(X, self.triples, self.products)


def choose_iteration(
    X: Tensor, method: str, schedule: str, steps: int, compute_dtype: str | torch.dtype, kernels: str
) -> Iteration:
    """Choose the iteration, dtype and products for a stack.

    Args:
        X: The stack in the orientation whose Gram matrix is formed, (b, m, n); its values do not matter.
        method: "newton_schulz", "gram_newton_schulz" or "auto".
        schedule: As in `polar`.
        steps: As in `polar`.
        compute_dtype: As in `polar`.
        kernels: As in `polar`.

    Returns:
        The iteration.

    Raises:
        ValueError: As `polar`.
        RuntimeError: As `polar`.
    """
    table = get_schedule(schedule)
    use_gram = method == "gram_newton_schulz" or (
        method == "auto" and gram_is_cheaper(X, resolve_dtype(X, compute_dtype, gram=True), steps, kernels)
    )
    dtype = resolve_dtype(X, compute_dtype, use_gram)
    refuse_gram_iteration(method, dtype)
    products = select_products(X.device.type, dtype, X.shape[-2], kernels)
    return Iteration(
        gram_newton_schulz if use_gram else newton_schulz, table.steps(steps), products, table.bound, dtype
    )


def _normalize(X: Tensor, bound: float, dtype: torch.dtype) -> Tensor:
    """Scale each matrix to `X / (bound·‖X‖_F)`, by its largest entry first so that no square overflows or vanishes.

    On a CPU, where reading costs nothing, only matrices of such squares are divided by their largest entry. The result
    is contiguous there, so that the products' roundings do not depend on how a matrix was stored.
    """
    wide = X.to(torch.promote_types(accumulation_dtype(X.dtype), dtype))
    axes, on_cpu = (-2, -1), wide.device.type == "cpu"
    norm = torch.linalg.vector_norm(wide, dim=axes, keepdim=True) if on_cpu else None
    if norm is None or not all(SMALLEST_PLAIN < size < 1 / SMALLEST_PLAIN for size in norm.flatten().tolist()):
        largest = normal(torch.maximum(wide.amax(dim=axes, keepdim=True), -wide.amin(dim=axes, keepdim=True)))
        wide = wide / (largest if norm is None else torch.where(is_plain(norm), 1.0, largest))
        norm = torch.linalg.vector_norm(wide, dim=axes, keepdim=True)
    size = normal(norm) * bound
    if on_cpu:
        return torch.div(wide, size, out=torch.empty(wide.shape, dtype=dtype))
    return wide.div_(size) if dtype == wide.dtype else torch.div(wide, size, out=torch.empty_like(wide, dtype=dtype))
