"""Where on its orbit a model's gradient is largest: ascent over the group."""

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor

from symlm.teleport.actions import Transports


def climb(
    family: Callable[[Tensor], Transports],
    start: Tensor,
    gradients: Mapping[str, Tensor],
    lr: float = 0.1,
    steps: int = 10,
) -> tuple[Tensor, float]:
    """Search a group for the place of the largest gradient, by ascent in its Lie algebra.

    family: T -> the transports of exp(T); start: T's first value, zero for the identity; each step has length `lr`.
    Returns T and `|∇L|` there over `|∇L|` here, of the weights that move; 1 where the gradient is zero.
    """
    T = start.detach().clone().requires_grad_()
    with torch.no_grad():
        here = torch.stack([gradients[name].square().sum() for name in family(T)]).sum()
    for _ in range(steps):
        (direction,) = torch.autograd.grad(_square(family(T), gradients), T)
        with torch.no_grad():
            T += lr * direction / direction.norm().clamp(min=1e-30)
    with torch.no_grad():
        ratio = float((_square(family(T), gradients) / here).sqrt()) if here > 0 else 1.0
    return T.detach(), ratio


def _square(transports: Transports, gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([t.covector(gradients[name]).square().sum() for name, t in transports.items()]).sum()


def ascend(
    act: Callable[[Tensor, Any], Any],
    loss: Callable[[Any], Tensor],
    w: Any,
    theta: Tensor,
    lr: float,
    steps: int,
    longest: float = inf,
) -> Any:
    """Return `act(θ, w)` after gradient ascent of `|∇loss|²` over θ: for actions that are not linear in w.

    w: a tensor, or a list of them; act and loss are differentiable. θ starts at `theta`; no step of it is longer than
    `longest`, so that an element near the identity stays one that can be inverted.
    """
    theta = theta.detach().clone().requires_grad_()
    many = isinstance(w, (list, tuple))
    w = [x.detach().requires_grad_() for x in w] if many else w.detach().requires_grad_()
    for _ in range(steps):
        moved = act(theta, w)
        parts = list(moved) if many else [moved]
        gradients = torch.autograd.grad(loss(moved), parts, create_graph=True)
        size = torch.stack([g.square().sum() for g in gradients]).sum()
        (direction,) = torch.autograd.grad(size, theta)
        with torch.no_grad():
            theta += direction * (longest / direction.norm()).clamp(max=lr)
    moved = act(theta.detach(), w)
    return [x.detach() for x in moved] if many else moved.detach()
