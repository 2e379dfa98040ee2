"""Step control by the softmax radius: shorten a proposed step that would drive some position's logits too far apart."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from symlm.step.directions import wide

REDUCTIONS = ("max", "mean")


@dataclass
class StepReport:
    """What the last step was: r as proposed, the factor that the step was multiplied by, r as taken."""

    proposed: float
    factor: float

    @property
    def taken(self) -> float:
        """The ratio after the clip."""
        return self.proposed * self.factor


class StepControl:
    """Clip a step p to `p·min(1, r_target/r)`, `r = Δ_a/π`, `a = J p`: the logits' change, to first order.

    Δ_a is the spread `max_k a_k − min_k a_k` of a position, reduced over positions: the largest, a quantile, the mean.
    Beyond r = 1 the loss along the step has no Taylor series that converges. Any optimizer's step can be controlled, as
    whatever it changed in the parameters. Costs a copy of the parameters, and a forward pass with its tangent.

    logits: (model, inputs) -> logits (..., classes); by default the output itself, or its `logits`.
    r_target: 1, or 0.5 to be careful. over: "max", "mean" or a quantile in (0, 1).
    difference: take a finite difference instead; done by itself once a kernel of the model has no forward derivative.
    Source: arXiv 2603.13552, the ghost radius.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        logits: Callable[..., Tensor] | None = None,
        r_target: float = 1.0,
        over: str | float = "max",
        difference: bool = False,
    ) -> None:
        if r_target <= 0:
            raise ValueError(f"r_target must be positive, got {r_target}")
        if over not in REDUCTIONS and not (isinstance(over, float) and 0 < over < 1):
            raise ValueError(f"over is one of {REDUCTIONS} or a quantile between 0 and 1, got {over!r}")
        self.model, self.optimizer = model, optimizer
        self.logits, self.r_target, self.over, self.difference = logits or _logits, r_target, over, difference
        self.last: StepReport | None = None
        self._warned = False

    @torch.no_grad()
    def step(self, *inputs: Any, **named: Any) -> Any:
        """Let the optimizer step, measure the step on these inputs, and take back what is too long of it.

        The optimizer's state moves as if the whole step were taken. Where no logits come out, or their derivative is
        not finite, the step stays as it is, with one warning.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        before = [self._exact(p) for p in parameters]
        result = self.optimizer.step()
        step = [self._exact(p).sub_(old) for p, old in zip(parameters, before, strict=True)]
        r = self._measured(before, step, inputs, named)
        factor = 1.0 if r is None or r <= self.r_target else self.r_target / r
        for p, old, change in zip(parameters, before, step, strict=True) if factor < 1 else ():
            short = old + factor * change  # an interpolation from the other end would lose a small factor to rounding
            p.copy_(short)
            if (rest := self._rest(p)) is not None:
                rest.copy_(short - p)
        self.last = None if r is None else StepReport(r, factor)
        return result

    def _exact(self, p: Tensor) -> Tensor:
        """Return a copy of a weight, in fp32 or wider, with what rounding kept of it."""
        rest = self._rest(p)
        return wide(p.detach()).clone() if rest is None else wide(p) + rest

    def _rest(self, p: Tensor) -> Tensor | None:
        """Return what compensated rounding keeps of a bf16 weight below its last digit, if anything."""
        return self.optimizer.state.get(p, {}).get("compensation")

    def _measured(self, before: list[Tensor], step: list[Tensor], inputs: Any, named: Any) -> float | None:
        try:
            r = self._ratio(before, step, inputs, named)
            reason = None if isfinite(r) else "the derivative of the logits is not finite"
        except (TypeError, AttributeError) as error:
            r, reason = 0.0, f"the model gives no logits ({error})"
        if reason and not self._warned:
            warnings.warn(f"step control leaves the step alone: {reason}", stacklevel=3)
            self._warned = True
        return None if reason else r

    @torch.no_grad()
    def radius_ratio(self, step: Iterable[Tensor], *inputs: Any, **named: Any) -> float:
        """Return r of a step from where the parameters are now.  step: one tensor a trainable parameter."""
        now = [p.detach() for p in self.model.parameters() if p.requires_grad]
        return self._ratio(now, list(step), inputs, named)

    def _ratio(self, start: list[Tensor], step: list[Tensor], inputs: tuple[Any, ...], named: dict[str, Any]) -> float:
        trained = [(name, p.dtype) for name, p in self.model.named_parameters() if p.requires_grad]
        values, tangents = (
            {name: told.to(dtype) for (name, dtype), told in zip(trained, tensors, strict=True)}
            for tensors in (start, step)
        )
        with evaluating(self.model):
            change = self._change(values, tangents, inputs, named)
        if change.ndim < 1 or change.shape[-1] < 2:
            raise TypeError(f"logits of shape {tuple(change.shape)} have no classes")
        return float(reduce_spread(change, self.over) / pi)

    def _change(
        self, values: dict[str, Tensor], tangents: dict[str, Tensor], inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor:
        def function(told: dict[str, Tensor]) -> Tensor:
            return self.logits(_Call(self.model, told), *inputs, **named)

        if not self.difference:
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward derivative
                    return torch.func.jvp(function, (values,), (tangents,))[1]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # nor have the grouped products of experts, nor many a custom function
                self.difference = True
        scale = max(float(torch.stack([d.abs().amax() for d in tangents.values() if d.numel()]).max()), 1e-30)
        width = 1e-3 / scale if scale > 1e-3 else 1.0
        moved = {name: value + width * tangents[name] for name, value in values.items()}
        return (function(moved) - function(values)) / width


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and every module of it back in its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Call:
    """The model with other parameters, called like it."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.model, self.parameters = model, parameters

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return torch.func.functional_call(self.model, self.parameters, inputs, named, tie_weights=True)


def _logits(model: Callable[..., Any], *inputs: Any, **named: Any) -> Tensor:
    output = model(*inputs, **named)
    return output if isinstance(output, Tensor) else output.logits


def reduce_spread(change: Tensor, over: str | float = "max") -> Tensor:
    """Return `max_k a_k − min_k a_k`, reduced over positions.  Shapes: (..., classes) -> scalar."""
    spread = (change.amax(-1) - change.amin(-1)).flatten().float()
    if isinstance(over, float):
        return spread.quantile(over)
    return spread.max() if over == "max" else spread.mean()
