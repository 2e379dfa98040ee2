"""The radius of a model's loss along a step, by groups of its parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Smoothness:
    """Report how a group's gradient changes along a step p, by Euclidean norms of the group's parts.

    Args:
        gradient: |∇f|.
        step: |p|.
        change: |∇²f p|, to first order how much ∇f changes over the step.
    """

    gradient: float
    step: float
    change: float

    @property
    def steps(self) -> float:
        """How many such steps change the gradient by as much as it is long, |∇f|/|∇²f p|; infinity if none do."""
        return self.gradient / self.change if self.change else float("inf")

    @property
    def gamma(self) -> float:
        """The radius γ along the step with H = 0, |∇f| |p|/|∇²f p|."""
        return self.step * self.steps


def along_step(
    model: nn.Module,
    step: Mapping[str, Tensor],
    loss: Callable[[Callable[..., Any]], Tensor],
    at: Mapping[str, Tensor] | None = None,
    groups: Mapping[str, Any] | None = None,
) -> dict[str, Smoothness]:
    """Measure the radius along a step: one forward derivative of one backward pass gives ∇f and ∇²f p.

    Where a kernel of the model has no forward derivative, a second backward pass at x + p gives the change itself. The
    norms are those of the parameters as they are, so that the radius does not change with an orthogonal symmetry of the
    loss that moves the step along.

    Args:
        model: The model, in the mode in which it is to be measured.
        step: p, a tensor for each parameter that moves, by its name.
        loss: Computes the loss, a scalar, calling what it is given as the model, for example
            `lambda call: call(input_ids=x, labels=x).loss`.
        at: x, where it is measured, by name; None is where the model is.
        groups: The group of each name, for example `symlm.assign_roles(model)`; None is one group, "all".

    Returns:
        The smoothness of each group, those that do not move left out, and of "all".

    Raises:
        ValueError: A name of the step is no parameter of the model, or has another shape.
    """
    named = dict(model.named_parameters())
    if wrong := [name for name, p in step.items() if name not in named or named[name].shape != p.shape]:
        raise ValueError(f"the step has {wrong}, which the model has not, or not of this shape")
    x = {name: (at or named)[name].detach().to(named[name].dtype) for name in step}
    p = {name: change.detach().to(named[name].dtype) for name, change in step.items()}
    gradients, changes = _derivatives(model, loss, x, p)
    squares: dict[str, list[Tensor]] = {}
    for name in step:
        sizes = torch.stack([value.double().square().sum() for value in (gradients[name], p[name], changes[name])])
        for group in {str((groups or {}).get(name, "all")), "all"}:
            squares.setdefault(group, []).append(sizes)
    totals = {group: torch.stack(parts).sum(0).sqrt().tolist() for group, parts in squares.items()}
    return {group: Smoothness(*sizes) for group, sizes in totals.items() if sizes[1] > 0}


def _derivatives(
    model: nn.Module, loss: Callable[[Callable[..., Any]], Tensor], x: dict[str, Tensor], p: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return ∇f(x), and ∇²f(x) p or ∇f(x + p) − ∇f(x)."""

    def function(values: dict[str, Tensor]) -> Tensor:
        def call(*inputs: Any, **options: Any) -> Any:
            return torch.func.functional_call(model, values, inputs, options, tie_weights=True)

        return loss(call)

    gradient = torch.func.grad(function)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward derivative
            gradients, changes = torch.func.jvp(gradient, (x,), (p,))[:2]
            return gradients, changes
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # nor have the grouped products of experts
        before, after = gradient(x), gradient({name: x[name] + p[name] for name in x})
        return before, {name: after[name] - before[name] for name in x}
