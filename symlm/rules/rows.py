"""Rules by rows: what a row's length, of this step or in the mean of steps, makes of the row; and the rows' spread."""

from math import sqrt

from symlm_kernels.reference import center, mean_norms, normal, over_rms, row_norms, unit_rows
from torch import Tensor

from symlm.polar.inverse_roots import inverse_root
from symlm.rules.rule import A_GRAM_MATRIX, A_NUMBER_A_ROW, CENTERED_ROWS, ROWS, rule

Rows = tuple[Tensor, dict[str, Tensor]]


def over_norm(X: Tensor, norm: Tensor) -> Rows:
    """Return `X_i/|X_i|`, zero rows staying zero.  Shapes: X (..., m, n), norm (..., m, 1)."""
    return X / normal(norm), {}


def _bias(beta2: float, step: Tensor | int, X: Tensor) -> Tensor | float:
    """Return `1 − β₂^t`, what a mean that began at zero has seen of t steps, in the dtype of X."""
    return 1 - beta2 ** (step.to(X.dtype) if isinstance(step, Tensor) else step)


def over_mean(X: Tensor, norm: Tensor, row_rms: Tensor, step: Tensor | int, beta2: float) -> Rows:
    """Return rows over their mean norms, and these, refreshed."""
    refreshed = mean_norms(norm, row_rms, beta2)
    return over_rms(X, refreshed, _bias(beta2, step, X)), {"row_rms": refreshed}


@rule(ROWS, row_map=over_norm, fused=True)
def row_norm(M: Tensor) -> Tensor:
    """Scale each row to unit length, `U_i = M_i / |M_i|`.  Source: arXiv 2605.18106, section 3.3."""
    return unit_rows(M)


@rule(CENTERED_ROWS, row_map=over_norm, fused=True)
def centered_row_norm(M: Tensor) -> Tensor:
    """Return `C D C M`: center, scale rows to unit length, center again.  Rows have length near 1, `1ᵀU = 0`.

    Source: arXiv 2605.18106, section 3.4; a shared shift of all rows is invisible to a softmax.
    """
    return center(unit_rows(center(M)))


@rule(
    ROWS,
    row_map=over_mean,
    fused=True,
    state={"row_rms": A_NUMBER_A_ROW},
    refresh=lambda M, row_rms, beta2: {"row_rms": mean_norms(row_norms(M), row_rms, beta2)},
)
def row_adam(M: Tensor, row_rms: Tensor, step: Tensor | int, beta2: float) -> Tensor:
    """Scale each row by its length in the mean of steps, `U_i = M_i·√(1−β₂^t)/r_i`, `r² <- β₂r² + (1−β₂)|M_i|²`.

    Adam's second moment, one number a row, which rotations of the columns leave alone: a token that was not seen lately
    makes a short step. Source: rows as blocks of one second moment, Adam-mini, Zhang et al., arXiv 2406.16793.
    """
    return over_rms(M, row_rms, _bias(beta2, step, M))


@rule(
    CENTERED_ROWS,
    row_map=over_mean,
    fused=True,
    state={"row_rms": A_NUMBER_A_ROW},
    refresh=lambda M, row_rms, beta2: {"row_rms": mean_norms(row_norms(center(M)), row_rms, beta2)},
)
def centered_row_adam(M: Tensor, row_rms: Tensor, step: Tensor | int, beta2: float) -> Tensor:
    """Do the same on the centered M, and center again: a shared shift of all rows is invisible to a softmax."""
    return center(over_rms(center(M), row_rms, _bias(beta2, step, M)))


def whitener(gram: Tensor, rows: int) -> Tensor:
    """Return nearly `(min(m, n)·K/tr K)^{-1/2}`: rows of unit length and Gram matrix K keep it in the mean."""
    return inverse_root(gram) / sqrt(min(rows, gram.shape[-1]))


def _spread(X: Tensor, row_rms: Tensor, gram: Tensor, step: Tensor | int, beta2: float) -> dict[str, Tensor]:
    """Return the state that the rows of X leave of a whitened rule."""
    D, kept = over_mean(X, row_norms(X), row_rms, step, beta2)
    return {**kept, "gram": gram.lerp(D.mT @ D / X.shape[-2], 1 - beta2)}


def _whitened(X: Tensor, row_rms: Tensor, gram: Tensor, step: Tensor | int, beta2: float) -> Tensor:
    return over_rms(X, row_rms, _bias(beta2, step, X)) @ whitener(gram, X.shape[-2])


@rule(
    ROWS,
    row_map=over_mean,
    fused=True,
    state={"row_rms": A_NUMBER_A_ROW, "gram": A_GRAM_MATRIX},
    refresh=_spread,
)
def whitened_row_adam(M: Tensor, row_rms: Tensor, gram: Tensor, step: Tensor | int, beta2: float) -> Tensor:
    """Return `D (min(m, n)·K/tr K)^{-1/2}`, D the rows of `row_adam`, `K <- β₂K + (1−β₂)DᵀD/m`.

    The rows of a head's gradient lie along a few directions, the mean hidden state first; the right Gram matrix in the
    mean of steps gives the others an equal say. With one step it is `√max(1, m/n)` times `row_then_polar`.
    Source: the hybrid of arXiv 2605.18106, section 3.6, with Adam's and Shampoo's memory (arXiv 1802.09568).
    """
    return _whitened(M, row_rms, gram, step, beta2)


@rule(
    CENTERED_ROWS,
    row_map=over_mean,
    fused=True,
    state={"row_rms": A_NUMBER_A_ROW, "gram": A_GRAM_MATRIX},
    refresh=lambda M, row_rms, gram, step, beta2: _spread(center(M), row_rms, gram, step, beta2),
)
def centered_whitened_row_adam(M: Tensor, row_rms: Tensor, gram: Tensor, step: Tensor | int, beta2: float) -> Tensor:
    """Do the same on the centered M, and center again: a shared shift of all rows is invisible to a softmax."""
    return center(_whitened(center(M), row_rms, gram, step, beta2))
