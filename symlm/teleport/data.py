"""Teleports that move the data too: a matrix before the first layer that is not trained, and takes what g does."""

import torch
from torch import Tensor, nn

from symlm.symmetry import Transport


class DataTransform(nn.Module):
    """Transform inputs by a matrix that is not trained, `x' = A x`, the identity at first.

    A step along the gradient after a teleport of the data by g is one along `G gᵀg` for the data as they were.

    Args:
        features: The number n of an input's features.

    Source:
        Zhao et al., NeurIPS 2022, algorithm 3, as we understand it: the text was not at hand.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform inputs.

        Args:
            x: The inputs, (..., n).

        Returns:
            The transformed inputs, same shape.
        """
        return nn.functional.linear(x, self.matrix)


def data_transformation(transform: str, layer: str, T: Tensor) -> dict[str, Transport]:
    """Act on the data and on the layer that reads them, `x' = g x`, `W' = W g^{-1}`, `g = exp(T)` in GL(n).

    Args:
        transform: The name of the model's `DataTransform`.
        layer: The name of the linear layer behind it.
        T: The logarithm of g, (n, n).

    Returns:
        The transports by parameter name.
    """
    g = torch.linalg.matrix_exp(T)[None]
    return {f"{transform}.matrix": Transport(left=g), f"{layer}.weight": Transport(right=g)}


@torch.no_grad()
def fold_(transform: DataTransform, layer: nn.Linear) -> None:
    """Put the transformation into the layer behind it, `W <- W A`, `A <- I`, so that raw data can be given to it.

    Args:
        transform: The transformation.
        layer: The layer that reads its outputs.
    """
    layer.weight.copy_(layer.weight @ transform.matrix)
    transform.matrix.copy_(torch.eye(len(transform.matrix)))
