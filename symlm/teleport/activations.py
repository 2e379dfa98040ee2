"""Activations that are bijections of the reals, which the action on an MLP needs, and their inverses."""

from math import atanh

import torch
from torch import Tensor


def extended_tanh(x: Tensor, largest: float = 0.9) -> Tensor:
    """Compute tanh, and beyond ±atanh(`largest`) its tangent, so that every real number is a value.

    Args:
        x: Any numbers.
        largest: The value y in (0, 1) beyond which the curve is a line of slope `1 − y²`.

    Returns:
        The values, same shape; tanh's wherever they are at most `largest`.

    Raises:
        ValueError: `largest` is not between 0 and 1.

    Source:
        Zhao et al., NeurIPS 2022, extend tanh and the sigmoid; how is not in the code, this is ours.
    """
    edge = atanh(_checked(largest))
    return torch.where(x.abs() <= edge, x.tanh(), x.sign() * (largest + (1 - largest**2) * (x.abs() - edge)))


def extended_atanh(y: Tensor, largest: float = 0.9) -> Tensor:
    """Invert `extended_tanh`.

    Args:
        y: Any numbers.
        largest: That of `extended_tanh`.

    Returns:
        The x of which y are the values, same shape.

    Raises:
        ValueError: `largest` is not between 0 and 1.
    """
    edge, inside = atanh(_checked(largest)), y.abs() <= largest
    curve = torch.where(inside, y, 0.0).atanh()  # no infinity where it is not taken: it would make NaN gradients
    return torch.where(inside, curve, y.sign() * (edge + (y.abs() - largest) / (1 - largest**2)))


def extended_sigmoid(x: Tensor, largest: float = 0.95) -> Tensor:
    """Compute the sigmoid, and beyond the values `largest` and `1 − largest` its tangents.

    It is `(1 + t(x/2))/2` with t the extended tanh.

    Args:
        x: Any numbers.
        largest: The value in (1/2, 1) beyond which the curve is a line.

    Returns:
        The values, same shape.

    Raises:
        ValueError: `largest` is not between 1/2 and 1.
    """
    return (1 + extended_tanh(x / 2, 2 * largest - 1)) / 2


def extended_logit(y: Tensor, largest: float = 0.95) -> Tensor:
    """Invert `extended_sigmoid`.

    Args:
        y: Any numbers.
        largest: That of `extended_sigmoid`.

    Returns:
        The x of which y are the values, same shape.

    Raises:
        ValueError: `largest` is not between 1/2 and 1.
    """
    return 2 * extended_atanh(2 * y - 1, 2 * largest - 1)


def _checked(largest: float) -> float:
    if not 0 < largest < 1:
        raise ValueError(
            f"an extended curve leaves tanh between 0 and 1, got {largest}; "
            "of a sigmoid, give a value between 1/2 and 1"
        )
    return largest
