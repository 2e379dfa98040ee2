"""Exact actions that are not linear in the weights: on a quadratic, and on a layer of an MLP."""

from collections.abc import Callable

import torch
from torch import Tensor


def act_on_quadratic(A: Tensor, R: Tensor, w: Tensor) -> Tensor:
    """Let a rotation R act on the w of `wᵀAw`: `A^{-1/2} R A^{1/2} w`.  Shapes: (n, n), (n, n), (n) -> (n).

    A: symmetric and positive definite. Source: Zhao et al., NeurIPS 2022.
    """
    values, vectors = torch.linalg.eigh(A)
    return vectors @ ((vectors.mT @ (R @ (vectors @ (values.sqrt() * (vectors.mT @ w))))) / values.sqrt())


def act_on_mlp(
    weights: list[Tensor],
    X: Tensor,
    layer: int,
    g: Tensor,
    activation: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Let g of GL(k) act on the outputs h of a layer of `h_m = σ(W_m h_{m-1})`, exactly, for the data X.

    `W_m' = σ^{-1}(g σ(W_m h)) h^+`, `W_{m+1}' = W_{m+1} g^{-1}`, h the layer's inputs. Shapes: X (inputs, samples).
    Raises: ValueError for the last layer, and where no weights give these outputs: h has more samples than rows, or
    they depend on each other; `inverse` is not σ's, or g leads out of σ's values.
    """
    if not 0 <= layer < len(weights) - 1:
        raise ValueError(f"layer {layer} of {len(weights)}: the last has no next one to take g back")
    h = X
    for W in weights[:layer]:
        h = activation(W @ h)
    if h.shape[1] > h.shape[0]:
        raise ValueError(f"a batch of {h.shape[1]} is larger than the width {h.shape[0]}: the action is not exact")
    moved, wanted = list(weights), g @ activation(weights[layer] @ h)
    moved[layer] = inverse(wanted) @ torch.linalg.pinv(h)
    moved[layer + 1] = weights[layer + 1] @ torch.linalg.inv(g)
    with torch.no_grad():
        error = (activation(moved[layer] @ h) - wanted).norm() / wanted.norm()
    if not error <= 1e-6:
        raise ValueError(
            f"the layer's outputs are off by {error:.1e}: samples that depend on each other, or an activation that is "
            "not bijective or has not these values"
        )
    return moved
