"""The digits of scikit-learn and small networks for them: what several of the reproductions train on."""

from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

CLASSES = 10


def digits(scale: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test inputs (…, 64) and labels, split 80/20; scale: "unit" pixels, or "rows" of norm 8."""
    X, y = load_digits(return_X_y=True)
    parts = train_test_split(X, y, test_size=0.2, stratify=y, random_state=seed)
    X, held, y, held_y = (torch.as_tensor(part) for part in parts)
    X, held = (x.float() / 16 for x in (X, held))
    if scale == "rows":
        X, held = (8 * x / x.norm(dim=1, keepdim=True) for x in (X, held))
    return X, y, held, held_y


class ScaledReLU(nn.Module):
    """`√2·relu(x)`, which keeps the mean square of a symmetric input."""

    def forward(self, x: Tensor) -> Tensor:
        return 2**0.5 * x.relu()


def network(depth: int, width: int, bias: bool = False) -> nn.Sequential:
    """Return `depth` linear layers with scaled ReLUs between them."""
    sizes = [64] + [width] * (depth - 1) + [CLASSES]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), ScaledReLU()]
    return nn.Sequential(*layers[:-1])


def accuracy(model: nn.Module, X: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(X).argmax(1) == y).double().mean().item()
