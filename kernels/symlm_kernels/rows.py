"""The step of the row rules in Triton: one fused pass, or two around a product; the torch twins are in `reference`."""

from typing import Any

import torch
import triton
from torch import Tensor

from symlm_kernels.jit import rows as kernels
from symlm_kernels.launching import on_its_device
from symlm_kernels.reference import MeanNorms
from symlm_kernels.selection import LARGEST_ROW
from symlm_kernels.tiles import row_warps


@on_its_device
def row_norm_step(
    G: Tensor,
    M: Tensor,
    W: Tensor,
    beta: float,
    size: Tensor,
    decay_factor: Tensor,
    finite: Tensor,
    nesterov: bool = False,
    mean: MeanNorms | None = None,
) -> Tensor:
    """Compute `M <- βM + (1−β)G`, `W <- decay_factor·W − size·X_i/|X_i|` in one pass, in place, X the rule's input M.

    With mean norms r the direction is `X_i·√bias/r_i`. A zero row has a zero direction.

    Args:
        G: The gradient, (m, n); rows must be contiguous.
        M: The momentum, same shape, updated in place.
        W: The weights, same shape, updated in place.
        beta: The momentum's decay β.
        size: The factor of the direction, one element on the device.
        decay_factor: The factor of the weights, `1 − ηλ`, one element on the device.
        finite: Nothing changes if it is 0, one element on the device.
        nesterov: Whether the rule's input is `(1−β)G + βM` in place of M.
        mean: The mean norms, which are refreshed; None to divide by the rows' norms.

    Returns:
        `Σ(ΔW)²` of each row, without the decay.

    Raises:
        ValueError: Rows are longer than `LARGEST_ROW` or not contiguous, or the shapes differ.
    """
    (m, n), (constants, (r, bias, beta2)) = M.shape, _checked(G, M, W, nesterov, mean)
    strides = (G.stride(0), M.stride(0), W.stride(0))
    squares = torch.empty(m, dtype=torch.float32, device=W.device)
    arguments = (G, M, W, r, bias, squares, size, decay_factor, finite, n, beta, beta2)
    kernels.row_kernel[(m,)](*arguments, *strides, **constants)
    return squares


@on_its_device
def centered_row_norm_step(
    G: Tensor,
    M: Tensor,
    W: Tensor,
    beta: float,
    size: Tensor,
    decay_factor: Tensor,
    finite: Tensor,
    nesterov: bool = False,
    mean: MeanNorms | None = None,
) -> Tensor:
    """Compute the same step as `row_norm_step` with the direction `C D C X`; C subtracts the mean row, D divides rows.

    M is read twice more, for the mean row and for the mean of the directions; with Nesterov momentum G too.

    Args:
        G: The gradient, (m, n); rows must be contiguous.
        M: The momentum, same shape, updated in place.
        W: The weights, same shape, updated in place.
        beta: The momentum's decay β.
        size: The factor of the direction, one element on the device.
        decay_factor: The factor of the weights, `1 − ηλ`, one element on the device.
        finite: Nothing changes if it is 0, one element on the device.
        nesterov: Whether the rule's input is `(1−β)G + βM` in place of M.
        mean: The mean norms, which are refreshed; None to divide by the rows' norms.

    Returns:
        `Σ(ΔW)²` of each row, without the decay.

    Raises:
        ValueError: As `row_norm_step`.
    """
    (m, n), (constants, norms) = M.shape, _checked(G, M, W, nesterov, mean)
    shift = _mean_row(G, M, beta, finite, constants)
    row = _directions(G, M, beta, finite, shift, None, norms, constants)
    r, bias, beta2 = norms
    strides = (G.stride(0), M.stride(0), W.stride(0))
    squares = torch.empty(m, dtype=torch.float32, device=W.device)
    arguments = (G, M, W, r, bias, shift, row, squares, size, decay_factor, finite, n, beta, beta2)
    kernels.centered_apply_kernel[(m,)](*arguments, *strides, **constants)
    return squares


@on_its_device
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
    """Compute `M <- βM + (1−β)G`, and the rows' directions for a product of them.

    Args:
        G: The gradient, (m, n); rows must be contiguous.
        M: The momentum, same shape, updated in place.
        beta: The momentum's decay β.
        finite: M and the mean norms do not change if it is 0, and the result has no meaning; one element on the device.
        nesterov: Whether the rule's input is `(1−β)G + βM` in place of M.
        mean: The mean norms, which are refreshed; None to divide by the rows' norms.
        centered: Whether the mean row is subtracted from the rule's input.
        dtype: The dtype of the directions.

    Returns:
        The directions, (m, n), and their mean row, (n,), in fp32.

    Raises:
        ValueError: As `row_norm_step`.
    """
    constants, norms = _checked(G, M, M, nesterov, mean)
    shift = _mean_row(G, M, beta, finite, constants)
    D = torch.empty(M.shape, dtype=dtype, device=M.device)
    row = _directions(G, M, beta, finite, shift if centered else torch.zeros_like(shift), D, norms, constants)
    return D, row


@on_its_device
def step_by_directions(U: Tensor, row: Tensor, W: Tensor, size: Tensor, decay_factor: Tensor, finite: Tensor) -> Tensor:
    """Compute `W <- decay_factor·W − size·(U − 1 rowᵀ)` in place.

    Args:
        U: The directions, (m, n); rows must be contiguous.
        row: What is subtracted from every row of U, (n,).
        W: The weights, (m, n), updated in place.
        size: The factor of the direction, one element on the device.
        decay_factor: The factor of the weights, `1 − ηλ`, one element on the device.
        finite: Nothing changes if it is 0, one element on the device.

    Returns:
        `Σ(ΔW)²` of each row, without the decay.

    Raises:
        ValueError: As `row_norm_step`.
    """
    (m, n), constants = W.shape, _checked(U, U, W, False, None)[0]
    squares = torch.empty(m, dtype=torch.float32, device=W.device)
    arguments = (U, W, row, squares, size, decay_factor, finite, n, U.stride(0), W.stride(0))
    kernels.step_kernel[(m,)](*arguments, BLOCK=constants["BLOCK"], num_warps=constants["num_warps"])
    return squares


def _mean_row(G: Tensor, M: Tensor, beta: float, finite: Tensor, constants: dict[str, Any]) -> Tensor:
    """Update the momentum and return the mean row of the rule's input."""
    (m, n), plain = M.shape, {key: value for key, value in constants.items() if key != "MEAN"}
    parts, rows = _parts(m)
    sums = torch.empty(parts, n, dtype=torch.float32, device=M.device)
    arguments = (G, M, sums, finite, m, n, rows, beta, G.stride(0), M.stride(0))
    kernels.momentum_kernel[(parts,)](*arguments, **plain)
    return sums.sum(0) / m


def _directions(
    G: Tensor,
    M: Tensor,
    beta: float,
    finite: Tensor,
    shift: Tensor,
    D: Tensor | None,
    norms: MeanNorms,
    constants: dict[str, Any],
) -> Tensor:
    """Return the mean of the directions, and write these to D unless it is None."""
    m, n = M.shape
    parts, rows = _parts(m)
    sums = torch.empty(parts, n, dtype=torch.float32, device=M.device)
    r, bias, beta2 = norms
    arguments = (G, M, r, bias, shift, sums, sums if D is None else D, finite, m, n, rows, beta, beta2)
    strides = (G.stride(0), M.stride(0))
    kernels.direction_kernel[(parts,)](*arguments, *strides, **constants, WRITE=D is not None)
    return sums.sum(0) / m


def _parts(m: int) -> tuple[int, int]:
    """Return how many programs sum columns, and the rows of each."""
    rows = max(1, triton.cdiv(m, PARTS))
    return triton.cdiv(m, rows), rows


PARTS = 1024  # partial column sums: enough programs to fill a GPU, few enough to be summed


def _checked(
    G: Tensor, M: Tensor, W: Tensor, nesterov: bool, mean: MeanNorms | None
) -> tuple[dict[str, Any], MeanNorms]:
    """Check the shapes, and return the kernels' constants, and the mean norms; without these M, which is not read."""
    n = M.shape[1]
    if n > LARGEST_ROW:
        raise ValueError(f"rows of {n} are longer than the {LARGEST_ROW} that a program holds; use kernels='torch'")
    if any(T.shape != M.shape or T.stride(1) != 1 for T in (G, M, W)):
        raise ValueError(
            f"G, M and W need one shape and contiguous rows, got shapes {[tuple(T.shape) for T in (G, M, W)]} and "
            f"strides {[T.stride() for T in (G, M, W)]}; call .contiguous()"
        )
    block = triton.next_power_of_2(n)
    constants = {"BLOCK": block, "MEAN": mean is not None, "NESTEROV": nesterov, "num_warps": row_warps(block)}
    return constants, mean or MeanNorms(M, M, 0.0)
