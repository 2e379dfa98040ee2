"""The step of the row rules in Triton, one fused pass a row; twins of the same signatures are in `reference`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_ROW = 32_768  # a row is held in registers


def row_norm_step(G: Tensor, M: Tensor, W: Tensor, beta: float, size: Tensor, keep: Tensor, finite: Tensor) -> None:
    """Do `M <- βM + (1−β)G`, `W <- keep·W − size·M_i/|M_i|` in one pass: G is read, M and W are read and written.

    Shapes: G, M, W (m, n), rows contiguous; size, keep, finite: one element each, on the device; where `finite` is 0
    nothing changes. A zero row gives a zero direction. M and W are written in place, G never.
    Raises: ValueError for rows longer than LARGEST_ROW.
    """
    m, n = _check(G, M, W)
    _row_norm_kernel[(m,)](
        G, M, W, size, keep, finite, n, beta, G.stride(0), M.stride(0), W.stride(0), BLOCK=triton.next_power_of_2(n)
    )


def centered_row_norm_step(
    G: Tensor, M: Tensor, W: Tensor, beta: float, size: Tensor, keep: Tensor, finite: Tensor
) -> None:
    """Do the same with the direction `C D C M`: two more looks at M, for the mean row and for the directions' mean.

    Shapes, contract and errors: as `row_norm_step`.
    """
    m, n = _check(G, M, W)
    block = triton.next_power_of_2(n)
    rows = max(1, triton.cdiv(m, PARTS))
    parts = triton.cdiv(m, rows)
    sums = torch.empty(parts, n, dtype=torch.float32, device=M.device)
    strides = (G.stride(0), M.stride(0))
    _momentum_kernel[(parts,)](G, M, sums, finite, m, n, rows, beta, *strides, BLOCK=block)
    shift = sums.sum(0) / m
    _direction_sum_kernel[(parts,)](M, shift, sums, m, n, rows, M.stride(0), BLOCK=block)
    mean = sums.sum(0) / m
    _centered_apply_kernel[(m,)](M, W, shift, mean, size, keep, finite, n, M.stride(0), W.stride(0), BLOCK=block)


PARTS = 1024  # partial column sums: enough programs to fill a GPU, few enough to add up


def _check(G: Tensor, M: Tensor, W: Tensor) -> tuple[int, int]:
    m, n = M.shape
    if n > LARGEST_ROW:
        raise ValueError(f"rows of {n} are longer than the {LARGEST_ROW} that a program holds")
    if any(T.shape != M.shape or T.stride(1) != 1 for T in (G, M, W)):
        raise ValueError("G, M and W have one shape, and contiguous rows")
    return m, n


@triton.jit
def _unit(row):
    """Return `row / |row|` through the largest entry, so that no square overflows; a zero row stays zero."""
    largest = tl.max(tl.abs(row), axis=0)
    scaled = row / tl.where(largest > 0, largest, 1.0)
    norm = tl.sqrt(tl.sum(scaled * scaled, axis=0))
    return scaled / tl.where(norm > 0, norm, 1.0)


@triton.jit
def _row_norm_kernel(
    g_ptr, m_ptr, w_ptr, size_ptr, keep_ptr, finite_ptr, n, beta, g_row, m_row, w_row, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    g = tl.load(g_ptr + row * g_row + columns, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + row * m_row + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + row * w_row + columns, mask=inside, other=0.0).to(tl.float32)
    m = m + (1 - beta) * (g - m)
    w = tl.load(keep_ptr) * w - tl.load(size_ptr) * _unit(m)
    written = columns < tl.where(tl.load(finite_ptr) > 0, n, 0)
    tl.store(m_ptr + row * m_row + columns, m.to(m_ptr.dtype.element_ty), mask=written)
    tl.store(w_ptr + row * w_row + columns, w.to(w_ptr.dtype.element_ty), mask=written)


@triton.jit
def _momentum_kernel(g_ptr, m_ptr, sums_ptr, finite_ptr, m, n, rows, beta, g_row, m_row, BLOCK: tl.constexpr):
    """Update the momentum of `rows` rows and write their sum."""
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
        total += new.to(tl.float32)
    tl.store(sums_ptr + part * n + columns, total, mask=inside)


@triton.jit
def _direction_sum_kernel(m_ptr, shift_ptr, sums_ptr, m, n, rows, m_row, BLOCK: tl.constexpr):
    """Write the sum of `rows` unit rows of `C M`."""
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    shift = tl.load(shift_ptr + columns, mask=inside, other=0.0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(part * rows, tl.minimum(part * rows + rows, m)):
        total += _unit(tl.load(m_ptr + row * m_row + columns, mask=inside, other=0.0).to(tl.float32) - shift)
    tl.store(sums_ptr + part * n + columns, total, mask=inside)


@triton.jit
def _centered_apply_kernel(
    m_ptr, w_ptr, shift_ptr, mean_ptr, size_ptr, keep_ptr, finite_ptr, n, m_row, w_row, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    shift = tl.load(shift_ptr + columns, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + columns, mask=inside, other=0.0)
    m = tl.load(m_ptr + row * m_row + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + row * w_row + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(keep_ptr) * w - tl.load(size_ptr) * (_unit(m - shift) - mean)
    written = columns < tl.where(tl.load(finite_ptr) > 0, n, 0)
    tl.store(w_ptr + row * w_row + columns, w.to(w_ptr.dtype.element_ty), mask=written)
