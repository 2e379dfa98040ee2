"""Muown: every row is a gain times a direction, `W_i = g_i·v_i/|v_i|`; polar factors step v, and Adam steps the gains.

It is the one rule that reads the weight: its momentum is of the gradient by v, and its direction is the step of W that
follows from those of v and g. Of v only the lengths `|v_i|` are stored, since W has its rows' directions.
"""

from dataclasses import replace

import torch
from symlm_kernels.reference import mean_norms, normal, row_norms
from torch import Tensor

from symlm.rules.low_rank import RESIDUAL
from symlm.rules.rotated import raw
from symlm.rules.rule import A_NUMBER_A_ROW, ROWS, Polar, rule

# The gain of a row of zeros, which has no length: that of the other rows in modded-nanogpt, whose variance is 0.33/n.
GAIN_OF_ZEROS = 0.33**0.5
THE_PARAMETERS = replace(RESIDUAL, stored=False)
MUOWN = {
    "weight": THE_PARAMETERS,
    "momentum": THE_PARAMETERS,
    "direction": THE_PARAMETERS,
    "length": A_NUMBER_A_ROW,
    "gain_mean": A_NUMBER_A_ROW,
    "gain_rms": A_NUMBER_A_ROW,
}


def _refresh(
    M: Tensor,
    polar: Polar,
    weight: Tensor,
    momentum: Tensor,
    length: Tensor,
    gain_mean: Tensor,
    gain_rms: Tensor,
    step: Tensor | int,
    beta1: float,
    beta2: float,
    momentum_decay: float = 0.95,
    nesterov: bool = False,
    rate: float | Tensor = 0.02,
    scale: float = 1.0,
    eps: float = 1e-8,
) -> dict[str, Tensor]:
    """Return the next state, and the direction U of `W <- W − rate·scale·U`."""
    G = raw(M)
    W, mean, length, gain_mean, gain_rms = (x.to(G.dtype) for x in (weight, momentum, length, gain_mean, gain_rms))
    t = step.to(G.dtype) if isinstance(step, Tensor) else step
    norm = row_norms(W)
    E = W / normal(norm)
    gain = torch.where(norm > 0, norm, GAIN_OF_ZEROS)
    length = torch.where(length > 0, length, gain)
    slope = (G * E).sum(-1, keepdim=True)
    by_v = gain / length * (G - slope * E)
    mean = by_v.lerp(mean, momentum_decay)
    P = polar(by_v.lerp(mean, momentum_decay) if nesterov else mean)
    gain_mean, gain_rms = slope.lerp(gain_mean, beta1), mean_norms(slope.abs(), gain_rms, beta2)
    adam = gain_mean / (1 - beta1**t) / (gain_rms / (1 - beta2**t) ** 0.5 + eps)
    gain = gain - rate * adam
    U, after = _step_of_weight(E, P, adam / scale, gain, length, rate * scale)
    moves = G.abs().amax((-2, -1), keepdim=True) > 0  # a matrix without a gradient gets no update
    U = torch.where(moves, U, 0.0)
    sense = torch.where(moves & (gain < 0), -1.0, 1.0)  # a gain stays positive: the row's direction is reversed
    return {
        "weight": W - rate * scale * U,
        "momentum": sense * mean,
        "direction": U,
        "length": torch.where(moves, after, length),
        "gain_mean": sense * gain_mean,
        "gain_rms": gain_rms,
    }


def _step_of_weight(
    E: Tensor, P: Tensor, down: Tensor, gain: Tensor, length: Tensor, rate: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return `(W − g'·v'/|v'|)/rate` without a difference of near numbers, and `|v'|`, for `v' = |v|·E − rate·P`.

    Args:
        E: The rows' directions v/|v|, of zeros where W has a row of zeros.
        P: The polar factor.
        down: What the gains lose over the rate.
        gain: The gains g' after the step.
        length: |v|.
        rate: The rate of the step of v.
    """
    after = row_norms(length * E - rate * P)
    along = 2 * length * (E * P).sum(-1, keepdim=True) - rate * P.square().sum(-1, keepdim=True)
    return down * E + gain / normal(after) * (P - along / (length + after) * E), after


@rule(ROWS, state=MUOWN, refresh=_refresh)
def muown(M: Tensor, direction: Tensor) -> Tensor:
    """Return `(W − g'v'/|v'|)/ηs`, `v' = v − ηs·polar(N)`, `g' = g − η·Adam`, for rows `W_i = g_i·v_i/|v_i|`.

    N is the momentum of the gradient by v, `g_i/|v_i|·(G_i − ⟨G_i, e_i⟩e_i)`, `e_i = W_i/|W_i|`, and Adam's gradient is
    `⟨G_i, e_i⟩`. A gain is read from the weight, `g_i = |W_i|`, so that a decay is one of gains. v begins as W. It
    stores three numbers a row beside the momentum. A row of zeros begins with the gain √0.33, as in the source.

    Args:
        M: The gradient, (..., m, n).
        direction: The direction of the refreshed state, same shape.

    Returns:
        The directions, same shape.

    Source:
        Muown, arXiv 2605.10797; modded-nanogpt, track 3, there with a schedule of |v|.
    """
    return direction.to(M.dtype)
