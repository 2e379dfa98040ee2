"""The polar factor `U_r V_rᵀ` of a matrix: exact (SVD, QDWH), Newton–Schulz and Gram Newton–Schulz, batched."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from types import ModuleType

import torch
from symlm_kernels.reference import normal
from symlm_kernels.selection import choose, select_products
from torch import Tensor

from symlm.coefficients import Triple, get_schedule

CUTOFF = 1e-5  # of a Gram matrix's trace: rounding may leave eigenvalues below zero, from where no step returns
RESTART = 2  # the Gram iteration forms X anew before this step: half precision loses definiteness otherwise


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
    """Return the orthogonal polar factor of each matrix, `U_r V_rᵀ` of its thin SVD.

    Shapes: (..., m, n) -> same, in M's dtype. Scale-free in M; a zero matrix gives zero, a rank-deficient one a
    partial isometry (`svd`) or a direction of bounded spectral norm (the iterations). M is never written to.

    method: `svd`, `qdwh`, `newton_schulz`, `gram_newton_schulz`, or `auto` (the iteration of fewer operations).
    schedule, steps: coefficients of the iterations, see `symlm.coefficients.SCHEDULES`.
    compute_dtype: dtype of the iteration, or "auto" (`fastest_dtype`); float64 input stays in float64 unless a
        `torch.dtype` is given.
    side: Gram matrix to form, "left" (m × m) or "right" (n × n); by default the smaller.
    kernels: "torch", "triton", or "auto" for the one that was measured to be faster.

    Source: Higham 2008, ch. 8; arXiv 2505.16932 (Polar Express); Nakatsukasa & Higham 2013 (QDWH).
    Raises: ValueError for an unknown method, schedule or side, or for fewer than two axes; TypeError for complex M;
    RuntimeError where Triton is asked for and not to be had.
    """
    if M.ndim < 2:
        raise ValueError(f"polar wants (..., m, n), got shape {tuple(M.shape)}")
    if not M.is_floating_point():
        raise TypeError(f"polar wants a real floating-point matrix, got {M.dtype}")
    if method not in METHODS:
        raise ValueError(f"unknown polar method {method!r}; choose one of {METHODS}")
    if side not in (None, "left", "right"):
        raise ValueError(f"side is 'left', 'right' or None, got {side!r}")
    if M.numel() == 0:
        return torch.zeros_like(M)
    m, n = M.shape[-2:]
    stack = M.reshape(-1, m, n)
    flipped = side == "right" or (side is None and m > n)
    X = stack.mT if flipped else stack
    if method == "svd":
        U = _svd(_normalize(X, 1.0, resolve_dtype(M, "float32")))
    elif method == "qdwh":
        X = _normalize(X, 1.0, resolve_dtype(M, "float32"))
        U = _qdwh(X.mT).mT if X.shape[-2] <= X.shape[-1] else _qdwh(X)
    else:
        table = get_schedule(schedule)
        use_gram = method == "gram_newton_schulz" or (
            method == "auto" and _gram_is_cheaper(X, resolve_dtype(M, compute_dtype, gram=True), steps, kernels)
        )
        X = _normalize(X, table.bound, resolve_dtype(M, compute_dtype, use_gram))
        iterate = _gram_newton_schulz if use_gram else _newton_schulz
        U = iterate(X, table.steps(steps), select_products(X, kernels))
    return (U.mT if flipped else U).to(M.dtype).reshape(M.shape)


METHODS = ("svd", "qdwh", "newton_schulz", "gram_newton_schulz", "auto")


def operations(m: int, n: int, steps: int, method: str, halves: bool = False) -> int:
    """Count the floating-point operations of one (m, n) polar factor; `auto` takes the smaller count.

    With m <= n: Newton–Schulz `steps·(4m²n + 2m³)`; Gram Newton–Schulz 2m²n to form, restart (two) and apply,
    and at most four m × m products a step. halves: only one triangle of a symmetric result is computed, as Triton's
    products do: `steps·(3m²n + m³)`, and 6m²n with m³ a product.
    """
    m, n = min(m, n), max(m, n)
    triangle = 1 if halves else 2
    standard = steps * ((triangle + 2) * m * m * n + triangle * m**3)
    if method == "newton_schulz":
        return standard
    products = 0
    for k in range(steps):
        first, last = k in (0, RESTART), k in (RESTART - 1, steps - 1)
        products += 1 + (not first) + 2 * (not last)
    times = 1 + (steps > RESTART)
    gram_form = times * (triangle + 2) * m * m * n + products * triangle * m**3
    return gram_form if method == "gram_newton_schulz" else min(standard, gram_form)


def _gram_is_cheaper(X: Tensor, dtype: torch.dtype, steps: int, kernels: str) -> bool:
    """Tell whether the Gram iteration on X, in a dtype in which it keeps its bound, takes fewer operations."""
    m, n = X.shape[-2:]
    if m > n or dtype == torch.bfloat16:
        return False
    halves = choose(X.device.type, dtype, m, kernels) == "triton"
    return operations(m, n, steps, "gram_newton_schulz", halves) < operations(m, n, steps, "newton_schulz", halves)


def fastest_dtype(device_type: str, gram: bool = False) -> torch.dtype:
    """Return the dtype in which this device multiplies fastest within the error bound of the iteration.

    bf16 on a GPU, and fp32 on a CPU, any of which then gives the same numbers: bf16 takes a hundred times as long where
    it is emulated, and was measured to take 1.5 to 3 times as long with AVX-512's own; nobody has measured AMX.
    gram: of the Gram iteration, which squares the condition, so that bf16's eight bits are too few: fp16 on a GPU.
    """
    if device_type == "cpu":
        return torch.float32
    return torch.float16 if gram else torch.bfloat16


def resolve_dtype(M: Tensor, asked: str | torch.dtype, gram: bool = False) -> torch.dtype:
    """Return the dtype in which M is multiplied.  asked: "auto" (`fastest_dtype`), a name or a `torch.dtype`.

    float64 stays what it is unless a `torch.dtype` is given. Raises: ValueError for a name that is no floating dtype.
    """
    if isinstance(asked, torch.dtype):
        return asked
    if M.dtype == torch.float64:
        return torch.float64
    if asked == "auto":
        return fastest_dtype(M.device.type, gram)
    dtype = getattr(torch, asked, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"compute_dtype is 'auto' or a floating-point dtype of torch, got {asked!r}")
    return dtype


def _normalize(X: Tensor, bound: float, dtype: torch.dtype) -> Tensor:
    """Return X / (bound·‖X‖_F) for each matrix; through the largest entry, so that nothing leaves a dtype's range."""
    wide = X.to(torch.promote_types(torch.promote_types(X.dtype, dtype), torch.float32))
    axes = (-2, -1)
    largest = torch.maximum(wide.amax(dim=axes, keepdim=True), -wide.amin(dim=axes, keepdim=True))
    Y = wide / normal(largest)
    norm = torch.linalg.vector_norm(Y, dim=axes, keepdim=True)
    size = normal(norm) * bound
    return Y.div_(size) if dtype == Y.dtype else torch.div(Y, size, out=torch.empty_like(Y, dtype=dtype))


def _newton_schulz(X: Tensor, triples: list[Triple], products: ModuleType) -> Tensor:
    """Iterate `X <- aX + (bA + cA²)X`, `A = XXᵀ`.  Shapes: (b, m, n), normalized -> same."""
    for a, b, c in triples:
        A = products.gram(X)
        X = products.apply_polynomial(products.symmetric_product(A, A, A, alpha=c, beta=b), X, a)
    return X


def _gram_newton_schulz(X: Tensor, triples: list[Triple], products: ModuleType) -> Tensor:
    """Iterate on the Gram matrix alone, `U = QX` with Q of `_collected`, and again from there at `RESTART`.

    Shapes: (b, m, n), normalized -> same. Equal to `_newton_schulz` in exact arithmetic.
    Source: Zhang, Amsel, Chen, Dao 2026, Gram Newton–Schulz.
    """
    for chunk in (triples[:RESTART], triples[RESTART:]):
        if chunk:
            X = torch.bmm(_collected(products.gram(X), chunk, products), X)
    return X


def _collected(R: Tensor, triples: list[Triple], products: ModuleType) -> Tensor:
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


def inverse_root(K: Tensor) -> Tensor:
    """Return nearly `(K/tr K + εI)^{-1/2}`, ε = `CUTOFF`: what makes X with the Gram matrix K semi-orthogonal.

    Five steps of Polar Express on the Gram matrix alone: each eigenvalue of the result is within 15 % of its value,
    and bounded. Shapes: (..., n, n), positive semidefinite, fp32 or wider -> same. A polynomial of K, so that
    rotations of K rotate it; products alone, no factorization.
    Source: as `_gram_newton_schulz`; arXiv 2505.16932 (Polar Express).
    """
    table = get_schedule("polar_express")
    trace = K.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    R = (K / (torch.where(trace > 0, trace, 1.0) * table.bound**2)).reshape(-1, *K.shape[-2:])
    R.diagonal(dim1=-2, dim2=-1).add_(CUTOFF / table.bound**2)
    with full_precision():
        Q = _collected(R, table.steps(5), select_products(R, "torch"))
    return (Q / table.bound).reshape(K.shape)


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, also where TF32 is allowed: its ten bits are too few for a squared condition."""
    matmul = torch.backends.cuda.matmul
    reduced = matmul.fp32_precision == "tf32"
    if reduced:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if reduced:
            matmul.fp32_precision = "tf32"


def _svd(X: Tensor) -> Tensor:
    """Return `U_r V_rᵀ` of normalized X, dropping singular values at rounding level.  Shapes: (b, m, n) -> same."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    cutoff = max(X.shape[-2:]) * torch.finfo(X.dtype).eps * S[..., :1]
    return (U * (cutoff < S).to(X.dtype).unsqueeze(-2)) @ Vh


def _qdwh(X: Tensor) -> Tensor:
    """Iterate dynamically weighted Halley on tall, normalized X.  Shapes: (b, m, n), m >= n -> same.

    `X <- (b/c)X + (a − b/c) X (I + cXᵀX)^{-1}`, by QR while c is large and by Cholesky after. Directions at rounding
    level end anywhere within the unit ball. Source: Nakatsukasa, Bai, Gygi 2010, eq. (3.5), (5.2).
    """
    m, n = X.shape[-2:]
    eps = torch.finfo(X.dtype).eps
    eye = torch.eye(n, dtype=X.dtype, device=X.device).expand(len(X), n, n)
    lower = eps
    while abs(lower - 1) > 10 * eps:
        l2 = lower * lower
        d = (4 * (1 / l2 - 1) / l2) ** (1 / 3)
        root = sqrt(1 + d)
        a = root + sqrt(2 - d + 2 * (2 - l2) / (l2 * root))
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        lower = min(1.0, lower * (a + b * l2) / (1 + c * l2))
        if c > 100:
            Q = torch.linalg.qr(torch.cat([sqrt(c) * X, eye], dim=-2)).Q
            X = (b / c) * X + (a - b / c) / sqrt(c) * Q[:, :m] @ Q[:, m:].mT
        else:
            factor = torch.linalg.cholesky(eye + c * X.mT @ X)
            X = (b / c) * X + (a - b / c) * torch.cholesky_solve(X.mT, factor).mT
    return X
