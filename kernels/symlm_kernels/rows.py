"""The step of the row rules in Triton, one fused pass a row, or two about a product; twins are in `reference`."""

from typing import Any

import torch
import triton
from torch import Tensor

from symlm_kernels import row_kernels
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
    (m, n), (constants, (r, bias, beta2)) = M.shape, _told(G, M, W, nesterov, mean)
    strides = (G.stride(0), M.stride(0), W.stride(0))
    row_kernels.row_kernel[(m,)](G, M, W, r, bias, size, keep, finite, n, beta, beta2, *strides, **constants)


@on_its_device
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
    (m, n), (constants, norms) = M.shape, _told(G, M, W, nesterov, mean)
    shift = _mean_row(G, M, beta, finite, constants)
    row = _directions(G, M, beta, finite, shift, None, norms, constants)
    r, bias, beta2 = norms
    told = (G, M, W, r, bias, shift, row, size, keep, finite, n, beta, beta2, G.stride(0), M.stride(0), W.stride(0))
    row_kernels.centered_apply_kernel[(m,)](*told, **constants)


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
    """Do `M <- βM + (1−β)G` and return the rows' directions in `dtype`, and their mean row; for a product of them.

    nesterov, mean: as `row_norm_step`, norms refreshed; centered: of `C M`. Shapes: G, M (m, n), rows contiguous ->
    (m, n), (n) in fp32. Where `finite` is 0 nothing changes, and what is returned means nothing. Raises: as above.
    """
    constants, norms = _told(G, M, M, nesterov, mean)
    shift = _mean_row(G, M, beta, finite, constants)
    D = torch.empty(M.shape, dtype=dtype, device=M.device)
    row = _directions(G, M, beta, finite, shift if centered else torch.zeros_like(shift), D, norms, constants)
    return D, row


@on_its_device
def step_by_directions(U: Tensor, row: Tensor, W: Tensor, size: Tensor, keep: Tensor, finite: Tensor) -> None:
    """Do `W <- keep·W − size·(U − 1 rowᵀ)` in place; nothing where `finite` is 0.

    Shapes: U, W (m, n), rows contiguous, row (n); the rest: one element each, on the device. Raises: as above.
    """
    (m, n), constants = W.shape, _told(U, U, W, False, None)[0]
    told = (U, W, row, size, keep, finite, n, U.stride(0), W.stride(0))
    row_kernels.step_kernel[(m,)](*told, BLOCK=constants["BLOCK"], num_warps=constants["num_warps"])


def _mean_row(G: Tensor, M: Tensor, beta: float, finite: Tensor, constants: dict[str, Any]) -> Tensor:
    """Update the momentum and return the mean row of what the rule sees."""
    (m, n), plain = M.shape, {key: value for key, value in constants.items() if key != "MEAN"}
    parts, rows = _parts(m)
    sums = torch.empty(parts, n, dtype=torch.float32, device=M.device)
    told = (G, M, sums, finite, m, n, rows, beta, G.stride(0), M.stride(0))
    row_kernels.momentum_kernel[(parts,)](*told, **plain)
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
    """Return the mean of the directions, which go to D if there is one."""
    m, n = M.shape
    parts, rows = _parts(m)
    sums = torch.empty(parts, n, dtype=torch.float32, device=M.device)
    r, bias, beta2 = norms
    told = (G, M, r, bias, shift, sums, sums if D is None else D, finite, m, n, rows, beta, beta2)
    strides = (G.stride(0), M.stride(0))
    row_kernels.direction_kernel[(parts,)](*told, *strides, **constants, WRITE=D is not None)
    return sums.sum(0) / m


def _parts(m: int) -> tuple[int, int]:
    """Return how many programs add up columns, and of how many rows each."""
    rows = max(1, triton.cdiv(m, PARTS))
    return triton.cdiv(m, rows), rows


PARTS = 1024  # partial column sums: enough programs to fill a GPU, few enough to add up


def _told(G: Tensor, M: Tensor, W: Tensor, nesterov: bool, mean: MeanNorms | None) -> tuple[dict[str, Any], MeanNorms]:
    """Check the shapes; return the constants, and the mean norms: M in their place, unread, where there are none."""
    n = M.shape[1]
    if n > LARGEST_ROW:
        raise ValueError(f"rows of {n} are longer than the {LARGEST_ROW} that a program holds")
    if any(T.shape != M.shape or T.stride(1) != 1 for T in (G, M, W)):
        raise ValueError("G, M and W have one shape, and contiguous rows")
    block = triton.next_power_of_2(n)
    constants = {"BLOCK": block, "MEAN": mean is not None, "NESTEROV": nesterov, "num_warps": row_warps(block)}
    return constants, mean or MeanNorms(M, M, 0.0)
