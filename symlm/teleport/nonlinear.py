"""Exact actions that are not linear in the weights: on a quadratic, and on a layer of an MLP."""

from collections.abc import Callable

import torch
from torch import Tensor


def act_on_quadratic(A: Tensor, R: Tensor, w: Tensor) -> Tensor:
    """Let a rotation R act on the w of `wᵀAw`, `w' = A^{-1/2} R A^{1/2} w`.

    Args:
        A: A symmetric positive definite matrix, (n, n).
        R: An orthogonal matrix, (n, n).
        w: A vector, (n).

    Returns:
        w', (n), at which the quadratic has the same value.

    Raises:
        ValueError: A is not positive definite, or R is not orthogonal: another w' would have another value.

    Source:
        Zhao et al., NeurIPS 2022.
    """
    values, vectors = torch.linalg.eigh(A)
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    if not (values > 0).all() or not torch.allclose(A, A.mT) or not torch.allclose(R @ R.mT, eye, atol=1e-5):
        raise ValueError("the action on a quadratic needs a symmetric positive definite A and an orthogonal R")
    return vectors @ ((vectors.mT @ (R @ (vectors @ (values.sqrt() * (vectors.mT @ w))))) / values.sqrt())


def act_on_mlp(
    weights: list[Tensor],
    X: Tensor,
    layer: int,
    g: Tensor,
    activation: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    bias: bool = False,
) -> list[Tensor]:
    """Let g of GL(k) act on the outputs of a layer of `h_m = σ(W_m h_{m-1})`, exactly, for the data X.

    `W_m' = σ^{-1}(g σ(W_m h)) h^+`, `W_{m+1}' = W_{m+1} g^{-1}`, with h the layer's inputs. With biases, h has a row of
    ones below, each W its bias as its last column, and g leaves that row alone.

    Args:
        weights: The weights of the layers, (outputs, inputs) each.
        X: The data, (inputs, samples).
        layer: The index m of the layer, from 0; the last one has no next layer.
        g: An invertible matrix, (k, k), with k the outputs of the layer.
        activation: The activation σ.
        inverse: Its inverse σ^{-1}.
        bias: Whether the last column of each weight is a bias.

    Returns:
        The weights after the action; those of other layers are the same tensors.

    Raises:
        ValueError: The layer is the last one, or no weights give the moved outputs: h has more samples than rows, its
            samples are linearly dependent, `inverse` is not the inverse of σ, or g leads out of the range of σ.

    Source:
        Zhao et al., NeurIPS 2022.
    """
    if not 0 <= layer < len(weights) - 1:
        raise ValueError(
            f"layer {layer} of {len(weights)} has no next layer for the inverse of g; choose an earlier one"
        )
    h = with_ones(X) if bias else X
    for W in weights[:layer]:
        h = with_ones(activation(W @ h)) if bias else activation(W @ h)
    if h.shape[1] > h.shape[0]:
        raise ValueError(
            f"a batch of {h.shape[1]} samples is larger than the width {h.shape[0]} of layer {layer}, where the action "
            "is not exact: use fewer samples"
        )
    moved, outputs, k = list(weights), g @ activation(weights[layer] @ h), len(g)
    moved[layer] = inverse(outputs) @ torch.linalg.pinv(h)
    moved[layer + 1] = torch.cat([weights[layer + 1][:, :k] @ torch.linalg.inv(g), weights[layer + 1][:, k:]], dim=1)
    with torch.no_grad():
        error = (activation(moved[layer] @ h) - outputs).norm() / outputs.norm()
    if not error <= 1e-6:
        raise ValueError(
            f"the outputs of layer {layer} are off by {error:.1e}: samples are linearly dependent, or the activation "
            "is not bijective or has not these values; use other samples, a smaller g, or a bijective activation"
        )
    return moved


def with_ones(h: Tensor) -> Tensor:
    """Append a row of ones, which a bias is multiplied by.

    Args:
        h: Values, (k, samples).

    Returns:
        The values, (k + 1, samples).
    """
    return torch.cat([h, h.new_ones(1, h.shape[1])])
