"""Rules by rows: rows are divided by their length, of this step or in the mean of steps, and may be whitened."""

from collections.abc import Callable
from math import sqrt

from symlm_kernels.reference import center, mean_norms, normal, over_rms, rms_divisors, row_norms, unit_rows
from torch import Tensor

from symlm.polar.inverse_roots import inverse_root
from symlm.rules.rule import A_GRAM_MATRIX, A_NUMBER_A_ROW, CENTERED_ROWS, ROWS, rule

Divisors = tuple[Tensor, dict[str, Tensor]]


def over_norm(norm: Tensor) -> Divisors:
    """Divide rows by their norms, `X_i/|X_i|`.

    Args:
        norm: The norms of rows, (..., m, 1).

    Returns:
        The divisors of the rows, same shape, infinity for a zero row; and no state.
    """
    return normal(norm), {}


def _bias(beta2: float, step: Tensor | int, X: Tensor) -> Tensor | float:
    """Return `1 − β₂^t`, the total weight of t steps in a mean that began at zero, in the dtype of X."""
    return 1 - beta2 ** (step.to(X.dtype) if isinstance(step, Tensor) else step)


def over_mean(norm: Tensor, row_rms: Tensor, step: Tensor | int, beta2: float) -> Divisors:
    """Divide rows by their norms in the mean of steps, `X_i·√(1−β₂^t)/r_i`, `r² <- β₂r² + (1−β₂)|X_i|²`.

    Args:
        norm: The norms of rows, (..., m, 1).
        row_rms: The mean norms r before this step, same shape.
        step: The step t, from 1.
        beta2: The decay β₂ of the mean.

    Returns:
        The divisors of the rows, same shape; and the state with r refreshed.
    """
    refreshed = mean_norms(norm, row_rms, beta2)
    return rms_divisors(refreshed, _bias(beta2, step, norm)), {"row_rms": refreshed}


@rule(ROWS, row_map=over_norm, fused=True)
def row_norm(M: Tensor) -> Tensor:
    """Scale each row to unit length, `U_i = M_i / |M_i|`.

    Args:
        M: The momentum, (..., m, n).

    Returns:
        The directions, same shape. A zero row stays zero.

    Source:
        arXiv 2605.18106, section 3.3.
    """
    return unit_rows(M)


@rule(CENTERED_ROWS, row_map=over_norm, fused=True)
def centered_row_norm(M: Tensor) -> Tensor:
    """Center, scale each row to unit length, and center again, `C D C M`: a softmax ignores a shared shift of all rows.

    Args:
        M: The momentum, (..., m, n).

    Returns:
        The directions, same shape, with `1ᵀU = 0`; rows have length near 1.

    Source:
        arXiv 2605.18106, section 3.4.
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
    """Divide each row by its length in the mean of steps, `U_i = M_i·√(1−β₂^t)/r_i`, `r² <- β₂r² + (1−β₂)|M_i|²`.

    It is Adam's second moment with one number a row, which rotations of the columns do not change: a token that did
    not occur lately makes a short step.

    Args:
        M: The momentum, (..., m, n).
        row_rms: The refreshed r, (..., m, 1).
        step: The step t, from 1.
        beta2: The decay β₂ of the mean.

    Returns:
        The directions, same shape as M. A zero row stays zero.

    Source:
        Adam-mini, arXiv 2406.16793, for one second moment a block.
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
    """Do `row_adam` on the centered M, and center the result: a softmax ignores a shared shift of all rows.

    Args:
        M: The momentum, (..., m, n).
        row_rms: The refreshed mean norms of the rows of the centered M, (..., m, 1).
        step: The step t, from 1.
        beta2: The decay β₂ of the mean.

    Returns:
        The directions, same shape as M, with `1ᵀU = 0`.
    """
    return center(over_rms(center(M), row_rms, _bias(beta2, step, M)))


def whitener(gram: Tensor, rows: int, root: Callable[[Tensor], Tensor] = inverse_root) -> Tensor:
    """Approximate `(min(m, n)·K/tr K)^{-1/2}`; rows of unit length with the Gram matrix K stay near it in the mean.

    Args:
        gram: The Gram matrices K, (..., n, n).
        rows: The number m of rows.
        root: Computes the inverse root, or returns one that is stored.

    Returns:
        The roots, (..., n, n), by which the rows are multiplied from the right.
    """
    return root(gram) / sqrt(min(rows, gram.shape[-1]))


def _spread(X: Tensor, row_rms: Tensor, gram: Tensor, step: Tensor | int, beta2: float) -> dict[str, Tensor]:
    """Return the refreshed state of a whitened rule: mean norms, and the mean Gram matrix of the rows over these."""
    divisors, mean_state = over_mean(row_norms(X), row_rms, step, beta2)
    D = X / divisors
    return {**mean_state, "gram": gram.lerp(D.mT @ D / X.shape[-2], 1 - beta2)}


def _whitened(X: Tensor, row_rms: Tensor, gram: Tensor, step: Tensor | int, beta2: float) -> Tensor:
    """Return the rows over their mean norms, times the whitener."""
    return over_rms(X, row_rms, _bias(beta2, step, X)) @ whitener(gram, X.shape[-2])


@rule(
    ROWS,
    row_map=over_mean,
    fused=True,
    state={"row_rms": A_NUMBER_A_ROW, "gram": A_GRAM_MATRIX},
    refresh=_spread,
)
def whitened_row_adam(M: Tensor, row_rms: Tensor, gram: Tensor, step: Tensor | int, beta2: float) -> Tensor:
    """Whiten the rows D of `row_adam`, `D (min(m, n)·K/tr K)^{-1/2}`, `K <- β₂K + (1−β₂)DᵀD/m`.

    The rows of a head's gradient are concentrated in a few directions, the mean hidden state first; the right Gram
    matrix in the mean of steps gives the others equal weight. At the first step it is `√max(1, m/n)` times
    `row_then_polar`.

    Args:
        M: The momentum, (..., m, n).
        row_rms: The refreshed r of `row_adam`, (..., m, 1).
        gram: The refreshed K, (..., n, n).
        step: The step t, from 1.
        beta2: The decay β₂ of both means.

    Returns:
        The directions, same shape as M. A zero row stays zero.

    Source:
        The hybrid of arXiv 2605.18106, section 3.6, with the means of Adam and of Shampoo (arXiv 1802.09568).
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
    """Do `whitened_row_adam` on the centered M, and center the result: a softmax ignores a shared shift of all rows.

    Args:
        M: The momentum, (..., m, n).
        row_rms: The refreshed mean norms of the rows of the centered M, (..., m, 1).
        gram: The refreshed K, (..., n, n).
        step: The step t, from 1.
        beta2: The decay β₂ of both means.

    Returns:
        The directions, same shape as M, with `1ᵀU = 0`.
    """
    return center(_whitened(center(M), row_rms, gram, step, beta2))
