"""The search for the largest gradient on a model's orbit: ascent over the group."""

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
    """Search a group for the element that makes the gradient largest, by ascent in its Lie algebra.

    Args:
        family: Maps T to the transports of exp(T).
        start: The first T, zero for the identity.
        gradients: The gradients by parameter name; only those of the weights that move are used. A weight without one,
            such as a matrix that is not trained, counts for nothing.
        lr: The length of each step, in T.
        steps: The number of steps.

    Returns:
        T, and the norm of the moved weights' gradient at T over that at the model's weights; 1 if the gradient is zero.

    Raises:
        ValueError: No weight that moves has a gradient.
    """
    T = start.detach().clone().requires_grad_()
    if not any(name in gradients for name in family(T)):
        raise ValueError(
            f"none of {sorted(family(T))} has a gradient: call backward first, and name parameters as the model does"
        )
    with torch.no_grad():
        square_before = torch.stack([gradients[n].square().sum() for n in family(T) if n in gradients]).sum()
    for _ in range(steps):
        (direction,) = torch.autograd.grad(_square(family(T), gradients), T)
        with torch.no_grad():
            T += lr * direction / direction.norm().clamp(min=1e-30)
    with torch.no_grad():
        ratio = float((_square(family(T), gradients) / square_before).sqrt()) if square_before > 0 else 1.0
    return T.detach(), ratio


def _square(transports: Transports, gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the squared norm of the moved weights' gradient after the action."""
    moved = [t.covector(gradients[name]).square().sum() for name, t in transports.items() if name in gradients]
    return torch.stack(moved).sum()


def ascend(
    act: Callable[[Tensor, Any], Any],
    loss: Callable[[Any], Tensor],
    w: Any,
    theta: Tensor,
    lr: float,
    steps: int,
    longest: float = inf,
) -> Any:
    """Move w to `act(θ, w)` after gradient ascent of `|∇loss|²` over θ, for actions that are not linear in w.

    Args:
        act: The action, (θ, w) to a value like w; differentiable twice.
        loss: Maps a value like w to a scalar; differentiable twice.
        w: A tensor, or a list of tensors.
        theta: The first θ.
        lr: The factor of the gradient in a step of θ.
        steps: The number of steps.
        longest: The largest length of a step of θ, so that an element near the identity stays invertible.

    Returns:
        The moved w, detached.
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
