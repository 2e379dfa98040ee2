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


def mean_norms(norm: Tensor, row_rms: Tensor, beta2: float) -> Tensor:
    """Return `√(β₂r² + (1−β₂)|X_i|²)`, without a square that could overflow.  Shapes: (..., m, 1) twice -> same."""
    return torch.hypot(sqrt(beta2) * row_rms, sqrt(1 - beta2) * norm)


def over_rms(X: Tensor, row_rms: Tensor, step: Tensor | int, beta2: float) -> Tensor:
    """Return `X_i·√(1 − β₂^t)/r_i`, zero rows staying zero.  Shapes: X (..., m, n), row_rms (..., m, 1)."""
    unbiased = row_rms / (1 - beta2**step) ** 0.5
    return X / torch.where(unbiased > 0, unbiased, 1.0)


def over_mean(X: Tensor, norm: Tensor, row_rms: Tensor, step: Tensor | int, beta2: float) -> Rows:
    """Return rows over their mean norms, and these, refreshed."""
    refreshed = mean_norms(norm, row_rms, beta2)
    return over_rms(X, refreshed, step, beta2), {"row_rms": refreshed}


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


@rule(
    ROWS,
    row_map=over_mean,
    state={"row_rms": A_NUMBER_A_ROW},
    refresh=lambda M, row_rms, beta2: {"row_rms": mean_norms(row_norms(M), row_rms, beta2)},
)
def row_adam(M: Tensor, row_rms: Tensor, step: Tensor | int, beta2: float) -> Tensor:
    """Scale each row by its length in the mean of steps, `U_i = M_i·√(1−β₂^t)/r_i`, `r² <- β₂r² + (1−β₂)|M_i|²`.

    Adam's second moment, one number a row, which rotations of the columns leave alone: a token that was not seen lately
    makes a short step. Source: rows as blocks of one second moment, Adam-mini, Zhang et al., arXiv 2406.16793.
    """
    return over_rms(M, row_rms, step, beta2)


@rule(
    CENTERED_ROWS,
    row_map=over_mean,
    state={"row_rms": A_NUMBER_A_ROW},
    refresh=lambda M, row_rms, beta2: {"row_rms": mean_norms(row_norms(center(M)), row_rms, beta2)},
)
def centered_row_adam(M: Tensor, row_rms: Tensor, step: Tensor | int, beta2: float) -> Tensor:
    """Do the same on the centered M, and center again: a shared shift of all rows is invisible to a softmax."""
    return center(over_rms(center(M), row_rms, step, beta2))
