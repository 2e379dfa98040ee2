"""The kernels of the passes over stacks; `symlm_kernels.stacks` has the functions that launch them.

A program works on one part of one matrix of one parameter. Parameters are found by a table of their addresses, so that
one launch serves them all.
"""

import torch
import triton
import triton.language as tl

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # smaller sizes count as zero, as in `reference.normal`


@triton.jit
def _place(entries, matrices, parts, PART: tl.constexpr):
    """Return a program's parameter, matrix and first entry in the parameter, and which of its entries there are."""
    part = tl.program_id(0) % parts
    matrix = (tl.program_id(0) // parts) % matrices
    parameter = tl.program_id(0) // (parts * matrices)
    first = matrix.to(tl.int64) * entries + part.to(tl.int64) * PART
    return parameter, matrix, first, tl.arange(0, PART) < entries - part * PART


@triton.jit
def _at(table_ptr, parameter, first, TYPE: tl.constexpr, ALIGN: tl.constexpr, PART: tl.constexpr):
    """Return the addresses of a program's entries of a parameter."""
    address = tl.load(table_ptr + parameter).to(tl.pointer_type(TYPE))
    return tl.multiple_of(address, ALIGN) + first + tl.arange(0, PART)


@triton.jit
def _rule_input(g, m, beta, NESTEROV: tl.constexpr):
    """Return M, or `(1−β)G + βM` with Nesterov momentum."""
    x = m
    if NESTEROV:
        x = m + (1 - beta) * (g - m)
    return x


@triton.jit
def momentum_kernel(
    g_table_ptr,
    m_table_ptr,
    largest_ptr,
    squares_ptr,
    finite_ptr,
    entries,
    matrices,
    parts,
    beta,
    NESTEROV: tl.constexpr,
    G_TYPE: tl.constexpr,
    M_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    PART: tl.constexpr,
):
    """Update the momentum of one part; write its largest input, and its sum of squares over the largest."""
    parameter, _, first, inside = _place(entries, matrices, parts, PART)
    at = _at(m_table_ptr, parameter, first, M_TYPE, ALIGN, PART)
    old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(_at(g_table_ptr, parameter, first, G_TYPE, ALIGN, PART), mask=inside, other=0.0).to(tl.float32)
    g = tl.where(tl.load(finite_ptr) > 0, g, old)
    new = (old + (1 - beta) * (g - old)).to(M_TYPE)
    tl.store(at, new, mask=inside)
    x = _rule_input(g, new.to(tl.float32), beta, NESTEROV)  # of the momentum as it is stored
    largest = tl.max(tl.abs(x), axis=0)
    scaled = x / tl.where(largest < TINY, float("inf"), largest)
    tl.store(largest_ptr + tl.program_id(0), largest)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(scaled * scaled, axis=0))


@triton.jit
def norm_kernel(largest_ptr, squares_ptr, divisors_ptr, parts, bound, BLOCK: tl.constexpr):
    """Write the two divisors of one matrix: its largest entry, and bound times the norm over that."""
    first = tl.program_id(0).to(tl.int64) * parts
    largest = 0.0
    for start in range(0, parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.max(tl.load(largest_ptr + first + at, mask=at < parts, other=0.0), axis=0))
    by = tl.where(largest < TINY, float("inf"), largest)
    total = 0.0
    for start in range(0, parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        share = tl.load(largest_ptr + first + at, mask=at < parts, other=0.0) / by
        total += tl.sum(tl.load(squares_ptr + first + at, mask=at < parts, other=0.0) * share * share, axis=0)
    norm = tl.sqrt(total)
    tl.store(divisors_ptr + 2 * tl.program_id(0), by)
    tl.store(divisors_ptr + 2 * tl.program_id(0) + 1, tl.where(norm < TINY, float("inf"), norm) * bound)


@triton.jit
def input_kernel(
    g_table_ptr,
    m_table_ptr,
    divisors_ptr,
    x_ptr,
    finite_ptr,
    entries,
    matrices,
    parts,
    beta,
    NESTEROV: tl.constexpr,
    G_TYPE: tl.constexpr,
    M_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    PART: tl.constexpr,
):
    """Write one part of the divided inputs, of a momentum that is updated."""
    parameter, matrix, first, inside = _place(entries, matrices, parts, PART)
    m = tl.load(_at(m_table_ptr, parameter, first, M_TYPE, ALIGN, PART), mask=inside, other=0.0).to(tl.float32)
    g = m
    if NESTEROV:
        g = tl.load(_at(g_table_ptr, parameter, first, G_TYPE, ALIGN, PART), mask=inside, other=0.0).to(tl.float32)
        g = tl.where(tl.load(finite_ptr) > 0, g, m)
    x = _rule_input(g, m, beta, NESTEROV)
    place = 2 * (parameter * matrices + matrix)
    x = x / tl.load(divisors_ptr + place) / tl.load(divisors_ptr + place + 1)
    own = parameter.to(tl.int64) * matrices * entries + first + tl.arange(0, PART)
    tl.store(x_ptr + own, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def step_kernel(
    u_ptr,
    w_table_ptr,
    active_ptr,
    rate_ptr,
    squares_ptr,
    entries,
    matrices,
    parts,
    scale,
    decay,
    W_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    PART: tl.constexpr,
):
    """Update one part of the weights; write the sum of squares of its change without the decay."""
    parameter, matrix, first, inside = _place(entries, matrices, parts, PART)
    own = parameter.to(tl.int64) * matrices * entries + first + tl.arange(0, PART)
    u = tl.load(u_ptr + own, mask=inside, other=0.0).to(tl.float32)
    at = _at(w_table_ptr, parameter, first, W_TYPE, ALIGN, PART)
    w = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(rate_ptr)
    change = rate * scale * tl.load(active_ptr + parameter * matrices + matrix) * u
    tl.store(at, ((1 - rate * decay) * w - change).to(W_TYPE), mask=inside)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(change * change, axis=0))
