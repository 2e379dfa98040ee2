"""Torch twins of the row steps of `symlm_kernels.rows`, and the formulas that rules share with them."""

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_PLAIN = 1e-16  # of longer rows, squares that vanish in fp32 are beyond its precision


class MeanNorms(NamedTuple):
    """Store the norms of rows in the mean of steps, `r² <- β₂r² + (1−β₂)|X_i|²`.

    Args:
        row_rms: The mean norms r, (m, 1), contiguous.
        bias: `1 − β₂^t` at step t, one element.
        beta2: The decay β₂ of the mean.
    """

    row_rms: Tensor
    bias: Tensor
    beta2: float


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
    """Compute `M <- βM + (1−β)G`, `W <- decay_factor·W − size·X_i/|X_i|` in place, X the rule's input M.

    With mean norms r the direction is `X_i·√bias/r_i`. A zero row has a zero direction.

    Args:
        G: The gradient, (m, n).
        M: The momentum, same shape, updated in place.
        W: The weights, same shape, updated in place.
        beta: The momentum's decay β.
        size: The factor of the direction, one element.
        decay_factor: The factor of the weights, `1 − ηλ`, one element.
        finite: Nothing changes if it is 0, one element.
        nesterov: Whether the rule's input is `(1−β)G + βM` in place of M.
        mean: The mean norms, which are refreshed; None to divide by the rows' norms.

    Returns:
        `Σ(ΔW)²` of each row, without the decay.
    """
    return _step(_directions(G, M, beta, finite, nesterov, mean, False), W, size, decay_factor, finite)


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

    Args:
        G: The gradient, (m, n).
        M: The momentum, same shape, updated in place.
        W: The weights, same shape, updated in place.
        beta: The momentum's decay β.
        size: The factor of the direction, one element.
        decay_factor: The factor of the weights, `1 − ηλ`, one element.
        finite: Nothing changes if it is 0, one element.
        nesterov: Whether the rule's input is `(1−β)G + βM` in place of M.
        mean: The mean norms, which are refreshed; None to divide by the rows' norms.

    Returns:
        `Σ(ΔW)²` of each row, without the decay.
    """
    return _step(center(_directions(G, M, beta, finite, nesterov, mean, True)), W, size, decay_factor, finite)


def mean_norms(norm: Tensor, row_rms: Tensor, beta2: float) -> Tensor:
    """Compute the refreshed mean norms, `√(β₂r² + (1−β₂)|X_i|²)`, without a square that could overflow.

    Args:
        norm: The norms of the rows, (..., m, 1).
        row_rms: The mean norms r, same shape.
        beta2: The decay β₂ of the mean.

    Returns:
        The mean norms, same shape.
    """
    return torch.hypot(sqrt(beta2) * row_rms, sqrt(1 - beta2) * norm)


def over_rms(X: Tensor, row_rms: Tensor, bias: Tensor | float) -> Tensor:
    """Divide rows by their mean norms, `X_i·√bias/r_i`.

    Args:
        X: Rows, (..., m, n).
        row_rms: The mean norms r, (..., m, 1).
        bias: `1 − β₂^t` at step t.

    Returns:
        The divided rows, same shape as X; zero rows stay zero.
    """
    return X / rms_divisors(row_rms, bias)


def rms_divisors(row_rms: Tensor, bias: Tensor | float) -> Tensor:
    """Compute what divides rows by their mean norms, `r_i/√bias`, and infinity for a mean norm of zero.

    Args:
        row_rms: The mean norms r, (..., m, 1).
        bias: `1 − β₂^t` at step t.

    Returns:
        The divisors, (..., m, 1).
    """
    return normal(row_rms / bias**0.5)


def normal(size: Tensor) -> Tensor:
    """Return a divisor that gives zero for a size of zero: infinity below the normal numbers.

    A mean that only decays stops changing among the subnormal numbers; divided by it, a decaying row would grow again.

    Args:
        size: Sizes, any shape.

    Returns:
        The divisors, same shape.
    """
    return torch.nn.functional.threshold(size, torch.finfo(size.dtype).tiny, torch.inf)


def row_norms(M: Tensor) -> Tensor:
    """Compute the norms of rows, `|M_i|`, without a square that overflows or vanishes.

    On a CPU, where reading costs nothing, only rows of such squares are divided by their largest entry before.

    Args:
        M: Rows, (..., m, n).

    Returns:
        The norms, (..., m, 1).
    """
    if M.device.type != "cpu":
        return _scaled_row_norms(M)
    norms = torch.linalg.vector_norm(M, dim=-1, keepdim=True)
    plain = is_plain(norms).squeeze(-1)
    if not plain.all():
        norms[~plain] = _scaled_row_norms(M[~plain])
    return norms


def is_plain(norms: Tensor) -> Tensor:
    """Return whether norms are of entries whose squares neither overflow nor vanish.

    Args:
        norms: Euclidean norms, any shape.

    Returns:
        Bools, same shape; False also for a norm of zero or NaN.
    """
    return (norms > SMALLEST_PLAIN) & (norms < 1 / SMALLEST_PLAIN)


def _scaled_row_norms(M: Tensor) -> Tensor:
    """Return the norms of rows after division by each row's largest entry."""
    largest = M.abs().amax(dim=-1, keepdim=True)
    scaled = M / normal(largest)
    return largest * torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)


def unit_rows(M: Tensor) -> Tensor:
    """Scale rows to unit length, `M_i / |M_i|`, so that no square overflows.

    Args:
        M: Rows, (..., m, n).

    Returns:
        The directions, same shape; zero rows stay zero.
    """
    largest = M.abs().amax(dim=-1, keepdim=True)
    U = M / normal(largest)
    return U.div_(normal(torch.linalg.vector_norm(U, dim=-1, keepdim=True)))


def center(M: Tensor) -> Tensor:
    """Subtract the mean row from every row, `(I − 11ᵀ/m) M`.

    Args:
        M: Matrices, (..., m, n).

    Returns:
        The centered matrices, same shape.
    """
    return M - M.mean(dim=-2, keepdim=True)


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
        G: The gradient, (m, n).
        M: The momentum, same shape, updated in place.
        beta: The momentum's decay β.
        finite: M and the mean norms do not change if it is 0, one element.
        nesterov: Whether the rule's input is `(1−β)G + βM` in place of M.
        mean: The mean norms, which are refreshed; None to divide by the rows' norms.
        centered: Whether the mean row is subtracted from the rule's input.
        dtype: The dtype of the directions.

    Returns:
        The directions, (m, n), and their mean row, (n,), in fp32.
    """
    U = _directions(G, M, beta, finite, nesterov, mean, centered)
    return U.to(dtype), U.mean(dim=0)


def step_by_directions(U: Tensor, row: Tensor, W: Tensor, size: Tensor, decay_factor: Tensor, finite: Tensor) -> Tensor:
    """Compute `W <- decay_factor·W − size·(U − 1 rowᵀ)` in place.

    Args:
        U: The directions, (m, n).
        row: What is subtracted from every row of U, (n,).
        W: The weights, (m, n), updated in place.
        size: The factor of the direction, one element.
        decay_factor: The factor of the weights, `1 − ηλ`, one element.
        finite: Nothing changes if it is 0, one element.

    Returns:
        `Σ(ΔW)²` of each row, without the decay.
    """
    return _step(U.float() - row, W, size, decay_factor, finite)


def _directions(
    G: Tensor, M: Tensor, beta: float, finite: Tensor, nesterov: bool, mean: MeanNorms | None, centered: bool
) -> Tensor:
    """Update the momentum and the mean norms, and return the directions of the rule's input."""
    new = M.float().lerp(G.float(), 1 - beta).to(M.dtype)
    M.copy_(torch.where(finite != 0, new, M))
    X = new.float().lerp(G.float(), 1 - beta) if nesterov else new.float()
    X = center(X) if centered else X
    if mean is None:
        return unit_rows(X)
    refreshed = mean_norms(row_norms(X), mean.row_rms, mean.beta2)
    mean.row_rms.copy_(torch.where(finite != 0, refreshed, mean.row_rms))
    return over_rms(X, refreshed, mean.bias)


def _step(U: Tensor, W: Tensor, size: Tensor, decay_factor: Tensor, finite: Tensor) -> Tensor:
    """Update the weights by a direction, if `finite` is not 0, and return each row's sum of squares of the change."""
    stepped = (decay_factor * W.float() - size * U).to(W.dtype)
    W.copy_(torch.where(finite != 0, stepped, W))
    return torch.where(finite != 0, size * U, 0.0).square().sum(dim=-1)
