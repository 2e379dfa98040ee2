"""The three products of a Newton–Schulz step in Triton; `reference` has a torch twin of each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from symlm_kernels.launching import on_its_device
from symlm_kernels.reference import is_transposed
from symlm_kernels.tiles import Tile, choose_tile


@on_its_device
def gram(X: Tensor, tile: Tile | None = None) -> Tensor:
    """Compute `A = X Xᵀ`: one triangle of tiles is computed and mirrored, which halves the operations.

    Args:
        X: Matrices, (b, m, n), any strides.
        tile: The tile; chosen by shape if None.

    Returns:
        The Gram matrices, (b, m, m), accumulated in fp32.
    """
    return _symmetric(X, X, None, 1.0, 0.0, tile)


@on_its_device
def symmetric_product(A: Tensor, B: Tensor, C: Tensor, alpha: float, beta: float, tile: Tile | None = None) -> Tensor:
    """Compute `β C + α A B` for polynomials A, B, C of one Gram matrix: the result is symmetric, computed as in `gram`.

    Args:
        A: Matrices, (b, m, m), any strides.
        B: Matrices, (b, m, m), any strides.
        C: Matrices, (b, m, m), any strides.
        alpha: The factor α.
        beta: The factor β.
        tile: The tile; chosen by shape if None.

    Returns:
        The matrices, (b, m, m), accumulated in fp32.
    """
    return _symmetric(A, B, C, alpha, beta, tile)


@on_its_device
def apply_polynomial(B: Tensor, X: Tensor, a: float, tile: Tile | None = None) -> Tensor:
    """Compute `a X + B X` in one pass for a symmetric B; a transposed view stays one.

    Args:
        B: Matrices, (b, m, m), any strides.
        X: Matrices, (b, m, n), any strides.
        a: The factor of X.
        tile: The tile; chosen by shape if None.

    Returns:
        The matrices, (b, m, n), contiguous or the transposed view of what is, accumulated in fp32.
    """
    batch, m, n = X.shape
    out = torch.empty_like(X.mT).mT if is_transposed(X) else torch.empty_like(X, memory_format=torch.contiguous_format)
    tile = tile or choose_tile("apply_polynomial", m, n, X.element_size(), _aligned(B, X, out))
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n) * batch,)  # the other axes of a grid are limited to 65,535
    _apply_kernel[grid](
        B,
        X,
        out,
        m,
        n,
        a,
        *B.stride(),
        *X.stride(),
        *out.stride(),
        PRECISION=_precision(X),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _symmetric(X: Tensor, Y: Tensor, C: Tensor | None, alpha: float, beta: float, tile: Tile | None) -> Tensor:
    """Launch `α X Yᵀ + β C` for a symmetric result."""
    batch, m, k = X.shape
    out = torch.empty(batch, m, m, dtype=X.dtype, device=X.device)
    added = X if C is None else C
    product = "gram" if C is None else "symmetric_product"
    tile = tile or choose_tile(product, m, m, X.element_size(), _aligned(X, Y, added, out))
    tiles = triton.cdiv(m, tile.m)
    _symmetric_kernel[(tiles * (tiles + 1) // 2 * batch,)](
        X,
        Y,
        added,
        out,
        m,
        k,
        alpha,
        beta,
        *X.stride(),
        *Y.stride(),
        *added.stride(),
        *out.stride(),
        HAS_C=C is not None,
        PRECISION=_precision(X),
        BLOCK=tile.m,
        BLOCK_K=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _aligned(*stacks: Tensor) -> bool:
    """Return whether Triton reads sixteen bytes at a time: one unit stride, all other sizes multiples of 16."""
    return all(
        T.data_ptr() % 16 == 0
        and 1 in T.stride()[1:]
        and all(number % 16 == 0 for number in (*T.shape[1:], *T.stride()) if number != 1)
        for T in stacks
    )


def _precision(X: Tensor) -> str:
    """Return the precision of fp32 products."""
    return "ieee" if X.dtype == torch.float32 else "tf32"  # ignored for 16-bit inputs


@triton.jit
def _symmetric_kernel(
    x_ptr,
    y_ptr,
    c_ptr,
    d_ptr,
    m,
    k,
    alpha,
    beta,
    x_b,
    x_m,
    x_k,
    y_b,
    y_m,
    y_k,
    c_b,
    c_m,
    c_n,
    d_b,
    d_m,
    d_n,
    HAS_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write one tile (row, column), column <= row, of `α X Yᵀ + β C`, and its mirrored tile."""
    tiles = tl.cdiv(m, BLOCK) * (tl.cdiv(m, BLOCK) + 1) // 2
    pid = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = ((tl.sqrt(8.0 * pid.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > pid, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= pid, row + 1, row)
    column = pid - row * (row + 1) // 2
    i = (row * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    j = (column * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inner = tl.arange(0, BLOCK_K).to(tl.int64)
    advance = tl.full((), BLOCK_K, tl.int64)  # a stride may be an int32, its multiple may not fit one
    x_tile = x_ptr + batch * x_b + i[:, None] * x_m + inner[None, :] * x_k
    y_tile = y_ptr + batch * y_b + j[None, :] * y_m + inner[:, None] * y_k
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        valid = inner < k - start
        x = tl.load(x_tile, mask=(i[:, None] < m) & valid[None, :], other=0.0)
        y = tl.load(y_tile, mask=valid[:, None] & (j[None, :] < m), other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        x_tile += advance * x_k
        y_tile += advance * y_k
    total = alpha * total
    inside = (i[:, None] < m) & (j[None, :] < m)
    if HAS_C:
        c = tl.load(c_ptr + batch * c_b + i[:, None] * c_m + j[None, :] * c_n, mask=inside, other=0.0)
        total += beta * c.to(tl.float32)
    result = total.to(d_ptr.dtype.element_ty)
    # In diagonal tiles too, one half mirrors the other, bit for bit; a mask of it would store entry by entry.
    result = tl.where(i[:, None] >= j[None, :], result, tl.trans(result))
    tl.store(d_ptr + batch * d_b + i[:, None] * d_m + j[None, :] * d_n, result, mask=inside)
    mirrored = (j[:, None] < m) & (i[None, :] < m)
    tl.store(d_ptr + batch * d_b + j[:, None] * d_m + i[None, :] * d_n, tl.trans(result), mask=mirrored)


@triton.jit
def _apply_kernel(
    b_ptr,
    x_ptr,
    d_ptr,
    m,
    n,
    a,
    b_b,
    b_m,
    b_k,
    x_b,
    x_m,
    x_n,
    d_b,
    d_m,
    d_n,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write one tile of `a X + B X`; neighbouring programs share a column of X."""
    rows = tl.cdiv(m, BLOCK_M)
    tiles = rows * tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    i = ((pid % rows) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    j = ((pid // rows) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inner = tl.arange(0, BLOCK_K).to(tl.int64)
    advance = tl.full((), BLOCK_K, tl.int64)  # a stride may be an int32, its multiple may not fit one
    b_tile = b_ptr + batch * b_b + i[:, None] * b_m + inner[None, :] * b_k
    x_tile = x_ptr + batch * x_b + inner[:, None] * x_m + j[None, :] * x_n
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, m, BLOCK_K):
        valid = inner < m - start
        b = tl.load(b_tile, mask=(i[:, None] < m) & valid[None, :], other=0.0)
        x = tl.load(x_tile, mask=valid[:, None] & (j[None, :] < n), other=0.0)
        total = tl.dot(b, x, total, input_precision=PRECISION)
        b_tile += advance * b_k
        x_tile += advance * x_m
    inside = (i[:, None] < m) & (j[None, :] < n)
    x_block = tl.load(x_ptr + batch * x_b + i[:, None] * x_m + j[None, :] * x_n, mask=inside, other=0.0)
    total += a * x_block.to(tl.float32)
    tl.store(d_ptr + batch * d_b + i[:, None] * d_m + j[None, :] * d_n, total.to(d_ptr.dtype.element_ty), mask=inside)
