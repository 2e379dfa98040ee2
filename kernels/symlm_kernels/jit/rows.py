"""The kernels of the row rules' step; `symlm_kernels.rows` has the functions that launch them."""

import torch
import triton
import triton.language as tl

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # smaller sizes count as zero, as in `reference.normal`


@triton.jit
def _divisor(row, r_ptr, place, bias_ptr, beta2, MEAN: tl.constexpr):
    """Return the divisor of a row and its refreshed mean norm; the row is scaled first, so that no square overflows."""
    old = 0.0
    if MEAN:
        old = tl.load(r_ptr + place)  # all threads read it before the reductions' barrier: one stores it refreshed
    largest = tl.max(tl.abs(row), axis=0)
    scaled = row / tl.where(largest < TINY, float("inf"), largest)
    norm = largest * tl.sqrt(tl.sum(scaled * scaled, axis=0))
    refreshed = norm
    divisor = norm
    if MEAN:
        size = tl.maximum(old, norm)
        by = tl.where(size > 0, size, 1.0)
        refreshed = size * tl.sqrt(beta2 * (old / by) * (old / by) + (1 - beta2) * (norm / by) * (norm / by))
        divisor = refreshed / tl.sqrt(tl.load(bias_ptr))
    return tl.where(divisor < TINY, float("inf"), divisor), refreshed


@triton.jit
def _rule_input(g_ptr, m_ptr, columns, inside, beta, NESTEROV: tl.constexpr):
    """Return the rule's input of a row whose momentum is updated: M, or `(1−β)G + βM` with Nesterov momentum."""
    x = tl.load(m_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if NESTEROV:
        x = x + (1 - beta) * (tl.load(g_ptr + columns, mask=inside, other=0.0).to(tl.float32) - x)
    return x


@triton.jit
def row_kernel(
    g_ptr,
    m_ptr,
    w_ptr,
    r_ptr,
    bias_ptr,
    squares_ptr,
    size_ptr,
    decay_factor_ptr,
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
    """Run the whole step of one row of a rule without centering; write the sum of squares of its change."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    g = tl.load(g_ptr + row * g_row + columns, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + row * m_row + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + row * w_row + columns, mask=inside, other=0.0).to(tl.float32)
    new = (m + (1 - beta) * (g - m)).to(m_ptr.dtype.element_ty)
    m = new.to(tl.float32)  # the direction is of the momentum as it is stored
    x = m
    if NESTEROV:
        x = m + (1 - beta) * (g - m)
    divisor, refreshed = _divisor(x, r_ptr, row, bias_ptr, beta2, MEAN)
    change = tl.load(size_ptr) * (x / divisor)
    w = tl.load(decay_factor_ptr) * w - change
    finite = tl.load(finite_ptr) > 0
    tl.store(squares_ptr + row, tl.where(finite, tl.sum(change * change, axis=0), 0.0))
    written = columns < tl.where(finite, n, 0)
    tl.store(m_ptr + row * m_row + columns, new, mask=written)
    tl.store(w_ptr + row * w_row + columns, w.to(w_ptr.dtype.element_ty), mask=written)
    if MEAN:
        tl.store(r_ptr + row, refreshed, mask=finite)


@triton.jit
def momentum_kernel(
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
    """Update the momentum of `rows` rows and write the sum of the rule's inputs."""
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
def direction_kernel(
    g_ptr,
    m_ptr,
    r_ptr,
    bias_ptr,
    shift_ptr,
    sums_ptr,
    d_ptr,
    finite_ptr,
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
    WRITE: tl.constexpr,
):
    """Write the sum of the directions of `rows` rows of `C X`; with WRITE also the directions and the mean norms."""
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    shift = tl.load(shift_ptr + columns, mask=inside, other=0.0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(part * rows, tl.minimum(part * rows + rows, m)):
        x = _rule_input(g_ptr + row * g_row, m_ptr + row * m_row, columns, inside, beta, NESTEROV) - shift
        divisor, refreshed = _divisor(x, r_ptr, row, bias_ptr, beta2, MEAN)
        total += x / divisor
        if WRITE:
            tl.store(d_ptr + row * n + columns, (x / divisor).to(d_ptr.dtype.element_ty), mask=inside)
            if MEAN:
                tl.store(r_ptr + row, refreshed, mask=tl.load(finite_ptr) > 0)
    tl.store(sums_ptr + part * n + columns, total, mask=inside)


@triton.jit
def centered_apply_kernel(
    g_ptr,
    m_ptr,
    w_ptr,
    r_ptr,
    bias_ptr,
    shift_ptr,
    mean_ptr,
    squares_ptr,
    size_ptr,
    decay_factor_ptr,
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
    """Update the weights of one row of a centered rule, and its mean norm; write its change's sum of squares."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    shift = tl.load(shift_ptr + columns, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + columns, mask=inside, other=0.0)
    x = _rule_input(g_ptr + row * g_row, m_ptr + row * m_row, columns, inside, beta, NESTEROV) - shift
    w = tl.load(w_ptr + row * w_row + columns, mask=inside, other=0.0).to(tl.float32)
    divisor, refreshed = _divisor(x, r_ptr, row, bias_ptr, beta2, MEAN)
    change = tl.load(size_ptr) * (x / divisor - mean)
    change = tl.where(inside, change, 0.0)
    w = tl.load(decay_factor_ptr) * w - change
    finite = tl.load(finite_ptr) > 0
    tl.store(squares_ptr + row, tl.where(finite, tl.sum(change * change, axis=0), 0.0))
    tl.store(w_ptr + row * w_row + columns, w.to(w_ptr.dtype.element_ty), mask=columns < tl.where(finite, n, 0))
    if MEAN:
        tl.store(r_ptr + row, refreshed, mask=finite)


@triton.jit
def step_kernel(
    u_ptr,
    w_ptr,
    mean_ptr,
    squares_ptr,
    size_ptr,
    decay_factor_ptr,
    finite_ptr,
    n,
    u_row,
    w_row,
    BLOCK: tl.constexpr,
):
    """Update the weights of one row by its direction minus the mean row; write its change's sum of squares."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    u = tl.load(u_ptr + row * u_row + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + row * w_row + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + columns, mask=inside, other=0.0)
    change = tl.load(size_ptr) * (u - mean)
    w = tl.load(decay_factor_ptr) * w - change
    finite = tl.load(finite_ptr) > 0
    tl.store(squares_ptr + row, tl.where(finite, tl.sum(change * change, axis=0), 0.0))
    written = columns < tl.where(finite, n, 0)
    tl.store(w_ptr + row * w_row + columns, w.to(w_ptr.dtype.element_ty), mask=written)
