"""Rules by rows: what a row's length, of this step or in the mean of steps, makes of the row."""

from math import sqrt

import torch
from symlm_kernels.reference import center, unit_rows
from torch import Tensor

from symlm.rules.rule import A_NUMBER_A_ROW, CENTERED_ROWS, ROWS, rule

Rows = tuple[Tensor, dict[str, Tensor]]


def over_norm(X: Tensor, norm: Tensor) -> Rows:
    """Return `X_i/|X_i|`, zero rows staying zero.  Shapes: X (..., m, n), norm (..., m, 1)."""
    return X / torch.where(norm > 0, norm, 1.0), {}


def over_mean(X: Tensor, norm: Tensor, row_rms: Tensor, step: Tensor | int, beta2: float) -> Rows:
    """Return `X_i/r_i`, `r_i² = v_i/(1 − β₂^t)`, `v <- β₂v + (1−β₂)|X_i|²`, and √v, which overflows where no X does."""
    mean = torch.hypot(sqrt(beta2) * row_rms, sqrt(1 - beta2) * norm)
    r = mean / (1 - beta2**step) ** 0.5
    return X / torch.where(r > 0, r, 1.0), {"row_rms": mean}


def row_norms(M: Tensor) -> Tensor:
    """Return `|M_i|`, through each row's largest entry: no square overflows.  Shapes: (..., m, n) -> (..., m, 1)."""
    largest = M.abs().amax(dim=-1, keepdim=True)
    scaled = M / torch.where(largest > 0, largest, 1.0)
    return largest * torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)


@rule(ROWS, row_map=over_norm)
def row_norm(M: Tensor) -> Tensor:
    """Scale each row to unit length, `U_i = M_i / |M_i|`.  Source: arXiv 2605.18106, section 3.3."""
    return unit_rows(M)


@rule(CENTERED_ROWS, row_map=over_norm)
def centered_row_norm(M: Tensor) -> Tensor:
    """Return `C D C M`: center, scale rows to unit length, center again.  Rows have length near 1, `1ᵀU = 0`.

    Source: arXiv 2605.18106, section 3.4; a shared shift of all rows is invisible to a softmax.
    """
    return center(unit_rows(center(M)))


@rule(ROWS, row_map=over_mean, state={"row_rms": A_NUMBER_A_ROW})
def row_adam(M: Tensor, row_rms: Tensor, step: Tensor | int, beta2: float) -> Rows:
    """Scale each row by its length in the mean of steps, `U_i = M_i/√(v_i/(1−β₂^t))`, `v <- β₂v + (1−β₂)|M_i|²`.

    Adam's second moment, one number a row, which rotations of the columns leave alone: a token that was not seen lately
    makes a short step. Source: rows as blocks of one second moment, Adam-mini, Zhang et al., arXiv 2406.16793.
    """
    return over_mean(M, row_norms(M), row_rms, step, beta2)


@rule(CENTERED_ROWS, row_map=over_mean, state={"row_rms": A_NUMBER_A_ROW})
def centered_row_adam(M: Tensor, row_rms: Tensor, step: Tensor | int, beta2: float) -> Rows:
    """Do the same on the centered M, and center again: a shared shift of all rows is invisible to a softmax."""
    X = center(M)
    U, state = over_mean(X, row_norms(X), row_rms, step, beta2)
    return center(U), state
