"""The step of the row rules in Triton, one fused pass a row; twins of the same signatures are in `reference`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from symlm_kernels.reference import MeanNorms
from symlm_kernels.selection import LARGEST_ROW
from symlm_kernels.tiles import row_warps


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
    """Do `M <- βM + (1−β)G`, `W <- keep·W − size·M_i/|M_i|` in one pass: G is read, M and W are read and written.

    nesterov: the direction is of `(1−β)G + βM` instead. mean: rows over their norms in the mean of steps, refreshed.
    Shapes: G, M, W (m, n), rows contiguous; size, keep, finite: one element each, on the device; where `finite` is 0
    nothing changes. A zero row gives a zero direction. M, W and the mean norms are written in place, G never.
    Raises: ValueError for rows longer than LARGEST_ROW.
    """
    m, n, r, bias, beta2, constants = _told(G, M, W, nesterov, mean)
    strides = (G.stride(0), M.stride(0), W.stride(0))
    _row_kernel[(m,)](G, M, W, r, bias, size, keep, finite, n, beta, beta2, *strides, **constants)


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
    """Do the same with the direction `C D C M`: two more looks at M, for the mean row and for the directions' mean.

    With nesterov two more at G as well. Shapes, contract and errors: as `row_norm_step`.
    """
    m, n, r, bias, beta2, constants = _told(G, M, W, nesterov, mean)
    rows = max(1, triton.cdiv(m, PARTS))
    parts = triton.cdiv(m, rows)
    sums = torch.empty(parts, n, dtype=torch.float32, device=M.device)
    strides, plain = (G.stride(0), M.stride(0)), {key: value for key, value in constants.items() if key != "MEAN"}
    _momentum_kernel[(parts,)](G, M, sums, finite, m, n, rows, beta, *strides, **plain)
    shift = sums.sum(0) / m
    _direction_sum_kernel[(parts,)](G, M, r, bias, shift, sums, m, n, rows, beta, beta2, *strides, **constants)
    row = sums.sum(0) / m
    told = (G, M, W, r, bias, shift, row, size, keep, finite, n, beta, beta2, *strides, W.stride(0))
    _centered_apply_kernel[(m,)](*told, **constants)


PARTS = 1024  # partial column sums: enough programs to fill a GPU, few enough to add up


def _told(
    G: Tensor, M: Tensor, W: Tensor, nesterov: bool, mean: MeanNorms | None
) -> tuple[int, int, Tensor, Tensor, float, dict[str, Any]]:
    """Check the shapes; return them, the mean norms (M in their place, unread, where there are none) and constants."""
    m, n = M.shape
    if n > LARGEST_ROW:
        raise ValueError(f"rows of {n} are longer than the {LARGEST_ROW} that a program holds")
    if any(T.shape != M.shape or T.stride(1) != 1 for T in (G, M, W)):
        raise ValueError("G, M and W have one shape, and contiguous rows")
    block = triton.next_power_of_2(n)
    constants = {"BLOCK": block, "MEAN": mean is not None, "NESTEROV": nesterov, "num_warps": row_warps(block)}
    return m, n, *(mean or MeanNorms(M, M, 0.0)), constants


TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # what is below counts as zero, as in `reference.normal`


@triton.jit
def _divisor(row, r_ptr, place, bias_ptr, beta2, MEAN: tl.constexpr):
    """Return what the row is divided by, and its mean norm to be kept; sizes go first, so that no square overflows."""
    largest = tl.max(tl.abs(row), axis=0)
    scaled = row / tl.where(largest < TINY, float("inf"), largest)
    norm = largest * tl.sqrt(tl.sum(scaled * scaled, axis=0))
    kept = norm
    divisor = norm
    if MEAN:
        old = tl.load(r_ptr + place)
        size = tl.maximum(old, norm)
        by = tl.where(size > 0, size, 1.0)
        kept = size * tl.sqrt(beta2 * (old / by) * (old / by) + (1 - beta2) * (norm / by) * (norm / by))
        divisor = kept / tl.sqrt(tl.load(bias_ptr))
    return tl.where(divisor < TINY, float("inf"), divisor), kept


@triton.jit
def _seen(g_ptr, m_ptr, columns, inside, beta, NESTEROV: tl.constexpr):
    """Return what the rule sees of a row whose momentum is up to date: M, or its look-ahead."""
    x = tl.load(m_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if NESTEROV:
        x = x + (1 - beta) * (tl.load(g_ptr + columns, mask=inside, other=0.0).to(tl.float32) - x)
    return x


@triton.jit
def _row_kernel(
    g_ptr,
    m_ptr,
    w_ptr,
    r_ptr,
    bias_ptr,
    size_ptr,
    keep_ptr,
    finite_ptr,
    n,
    beta,
    beta2,
    g_row,
    m_row,
    w_row,
    BLOCK: tl.constexpr,
    MEAN: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    g = tl.load(g_ptr + row * g_row + columns, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + row * m_row + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + row * w_row + columns, mask=inside, other=0.0).to(tl.float32)
    new = (m + (1 - beta) * (g - m)).to(m_ptr.dtype.element_ty)
    m = new.to(tl.float32)  # the direction is of what is kept
    x = m
    if NESTEROV:
        x = m + (1 - beta) * (g - m)
    divisor, kept = _divisor(x, r_ptr, row, bias_ptr, beta2, MEAN)
    w = tl.load(keep_ptr) * w - tl.load(size_ptr) * (x / divisor)
    finite = tl.load(finite_ptr) > 0
    written = columns < tl.where(finite, n, 0)
    tl.store(m_ptr + row * m_row + columns, new, mask=written)
    tl.store(w_ptr + row * w_row + columns, w.to(w_ptr.dtype.element_ty), mask=written)
    if MEAN:
        tl.store(r_ptr + row, kept, mask=finite)


@triton.jit
def _momentum_kernel(
    g_ptr,
    m_ptr,
    sums_ptr,
    finite_ptr,
    m,
    n,
    rows,
    beta,
    g_row,
    m_row,
    BLOCK: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """Update the momentum of `rows` rows and write the sum of what the rule sees."""
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    written = columns < tl.where(tl.load(finite_ptr) > 0, n, 0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(part * rows, tl.minimum(part * rows + rows, m)):
        g = tl.load(g_ptr + row * g_row + columns, mask=inside, other=0.0).to(tl.float32)
        old = tl.load(m_ptr + row * m_row + columns, mask=inside, other=0.0).to(tl.float32)
        new = (old + (1 - beta) * (g - old)).to(m_ptr.dtype.element_ty)
        tl.store(m_ptr + row * m_row + columns, new, mask=written)
        x = new.to(tl.float32)
        if NESTEROV:
            x = x + (1 - beta) * (g - x)
        total += x
    tl.store(sums_ptr + part * n + columns, total, mask=inside)


@triton.jit
def _direction_sum_kernel(
    g_ptr,
    m_ptr,
    r_ptr,
    bias_ptr,
    shift_ptr,
    sums_ptr,
    m,
    n,
    rows,
    beta,
    beta2,
    g_row,
    m_row,
    BLOCK: tl.constexpr,
    MEAN: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """Write the sum of the directions of `rows` rows of `C M`."""
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    shift = tl.load(shift_ptr + columns, mask=inside, other=0.0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(part * rows, tl.minimum(part * rows + rows, m)):
        x = _seen(g_ptr + row * g_row, m_ptr + row * m_row, columns, inside, beta, NESTEROV) - shift
        divisor, _ = _divisor(x, r_ptr, row, bias_ptr, beta2, MEAN)
        total += x / divisor
    tl.store(sums_ptr + part * n + columns, total, mask=inside)


@triton.jit
def _centered_apply_kernel(
    g_ptr,
    m_ptr,
    w_ptr,
    r_ptr,
    bias_ptr,
    shift_ptr,
    mean_ptr,
    size_ptr,
    keep_ptr,
    finite_ptr,
    n,
    beta,
    beta2,
    g_row,
    m_row,
    w_row,
    BLOCK: tl.constexpr,
    MEAN: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    shift = tl.load(shift_ptr + columns, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + columns, mask=inside, other=0.0)
    x = _seen(g_ptr + row * g_row, m_ptr + row * m_row, columns, inside, beta, NESTEROV) - shift
    w = tl.load(w_ptr + row * w_row + columns, mask=inside, other=0.0).to(tl.float32)
    divisor, kept = _divisor(x, r_ptr, row, bias_ptr, beta2, MEAN)
    w = tl.load(keep_ptr) * w - tl.load(size_ptr) * (x / divisor - mean)
    finite = tl.load(finite_ptr) > 0
    tl.store(w_ptr + row * w_row + columns, w.to(w_ptr.dtype.element_ty), mask=columns < tl.where(finite, n, 0))
    if MEAN:
        tl.store(r_ptr + row, kept, mask=finite)
