"""Step control by the softmax radius: a step that would change some position's logits too unevenly is shortened."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from symlm.distributed.collectives import averaged_everywhere, largest_everywhere
from symlm.distributed.tensors import local
from symlm.step.directions import wide

REDUCTIONS = ("max", "mean")


@dataclass
class StepReport:
    """Report the last step.

    Args:
        proposed: The ratio r of the optimizer's step.
        factor: The factor that the step was multiplied by.
    """

    proposed: float
    factor: float

    @property
    def taken(self) -> float:
        """The ratio r of the clipped step."""
        return self.proposed * self.factor


class StepControl:
    """Clip a step p to `p·min(1, r_target/r)`, `r = Δ_a/π`, with `a = J p` the first-order change of the logits.

    Δ_a is the spread `max_k a_k − min_k a_k` of a position, reduced over positions. `π/Δ_a` is a lower bound of the
    radius within which the Taylor series of the loss along the step converges: below r = 1 it does, beyond it may. The
    exact radius of two classes is `exact_binary_radius`. The step is what the optimizer changed in the parameters, so
    that any optimizer can be controlled. It costs a copy of the parameters, and a forward pass with its tangent. With
    DDP r is that of the rank with the largest, or for "mean" the mean of all; shards are refused.

    Args:
        model: The model.
        optimizer: Its optimizer, any of torch's or symlm's.
        logits: Maps the model and the inputs to logits, (..., classes); by default the output itself, or its `logits`.
        r_target: The largest r of a step; 1, or 0.5 for more caution.
        over: How the spreads are reduced over positions, "max", "mean", or a quantile in (0, 1).
        standalone: Whether shorter steps are lengthened to the target, in the place of a rate and its schedule.
        difference: Whether `J p` is a finite difference; set by itself once a kernel has no forward derivative.

    Raises:
        ValueError: `r_target` is not positive and finite, or `over` is unknown.

    Source:
        arXiv 2603.13552, the ghost radius.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        logits: Callable[..., Tensor] | None = None,
        r_target: float = 1.0,
        over: str | float = "max",
        difference: bool = False,
        standalone: bool = False,
    ) -> None:
        if isinstance(r_target, bool) or not isinstance(r_target, int | float) or not 0 < r_target < inf:
            raise ValueError(f"r_target must be positive and finite, got {r_target!r}")
        if over not in REDUCTIONS and not (isinstance(over, float) and 0 < over < 1):
            raise ValueError(f"over must be one of {REDUCTIONS} or a quantile between 0 and 1, got {over!r}")
        self.model, self.optimizer, self.logits = model, optimizer, logits or _logits
        self.r_target, self.over, self.difference, self.standalone = r_target, over, difference, standalone
        self.last: StepReport | None = None
        self._warned = False

    @torch.no_grad()
    def step(self, *inputs: Any, **named: Any) -> Any:
        """Run the optimizer's step, measure it on these inputs, and shorten it if r exceeds the target.

        The optimizer's state is that of the whole step. Without logits or with a derivative that is not finite the
        step stays, and a warning is given once.

        Args:
            inputs: The model's positional inputs.
            named: The model's keyword inputs.

        Returns:
            What the optimizer's step returns.

        Raises:
            RuntimeError: Parameters are sharded. No step was made.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if any(local(p) is not p for p in parameters):
            raise RuntimeError("step control runs the model on copies of whole weights, which shards are not: use DDP")
        before = [self._exact(p) for p in parameters]
        result = self.optimizer.step()
        step = [self._exact(p).sub_(old) for p, old in zip(parameters, before, strict=True)]
        r = self._measured(before, step, inputs, named)
        factor = self.r_target / r if r and (r > self.r_target or self.standalone) else 1.0
        for p, old, change in zip(parameters, before, step, strict=True) if factor != 1 else ():
            short = old + factor * change  # an interpolation from the other end would lose a small factor to rounding
            p.copy_(short)
            if (compensation := self._compensation(p)) is not None:
                compensation.copy_(short - p)
        self.last = None if r is None else StepReport(r, factor)
        return result

    def _exact(self, p: Tensor) -> Tensor:
        """Return a copy of a weight, in fp32 or wider, its rounding error added if that is stored."""
        compensation = self._compensation(p)
        return wide(p.detach()).clone() if compensation is None else wide(p) + compensation

    def _compensation(self, p: Tensor) -> Tensor | None:
        """Return the rounding error of a bf16 weight, which compensated rounding stores; None without it."""
        return self.optimizer.state.get(p, {}).get("compensation")

    def _measured(self, before: list[Tensor], step: list[Tensor], inputs: Any, named: Any) -> float | None:
        """Return r of a step, or None, with one warning, if it cannot be measured."""
        try:
            r = self._ratio(before, step, inputs, named)
            reason = None if isfinite(r) else "the derivative of the logits is not finite"
        except (TypeError, AttributeError) as error:
            r, reason = 0.0, f"the model gives no logits ({error}); pass logits="
        if reason and not self._warned:
            warnings.warn(f"step control leaves the step alone: {reason}", stacklevel=3)
            self._warned = True
        return None if reason else r

    @torch.no_grad()
    def radius_ratio(self, step: Iterable[Tensor], *inputs: Any, **named: Any) -> float:
        """Compute r of a step from the current parameters.

        Args:
            step: The step, one tensor for each trainable parameter.
            inputs: The model's positional inputs.
            named: The model's keyword inputs.

        Returns:
            The ratio r.

        Raises:
            TypeError: The logits have no axis of classes.
        """
        now = [p.detach() for p in self.model.parameters() if p.requires_grad]
        return self._ratio(now, list(step), inputs, named)

    def _ratio(self, start: list[Tensor], step: list[Tensor], inputs: tuple[Any, ...], named: dict[str, Any]) -> float:
        """Return r of a step from `start`; raise TypeError if the logits have no axis of classes."""
        trained = [(name, p.dtype) for name, p in self.model.named_parameters() if p.requires_grad]
        values, tangents = (
            {name: value.to(dtype) for (name, dtype), value in zip(trained, tensors, strict=True)}
            for tensors in (start, step)
        )
        with evaluating(self.model):
            change = self._change(values, tangents, inputs, named)
        if change.ndim < 1 or change.shape[-1] < 2:
            raise TypeError(f"logits of shape {tuple(change.shape)} have no axis of two classes or more; pass logits=")
        r = (reduce_spread(change, self.over) / pi).nan_to_num(inf, inf)
        return float(averaged_everywhere(r) if self.over == "mean" else largest_everywhere(r))

    def _change(
        self, values: dict[str, Tensor], tangents: dict[str, Tensor], inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor:
        """Return `J p` of the logits, by forward differentiation or a finite difference."""

        def function(parameters: dict[str, Tensor]) -> Tensor:
            return self.logits(_Call(self.model, parameters), *inputs, **named)

        if not self.difference:
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward derivative
                    return torch.func.jvp(function, (values,), (tangents,))[1]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # nor have the grouped products of experts, nor many custom functions
                self.difference = True
        scale = max(float(torch.stack([d.abs().amax() for d in tangents.values() if d.numel()]).max()), 1e-30)
        width = 1e-3 / scale if scale > 1e-3 else 1.0
        moved = {name: value + width * tangents[name] for name, value in values.items()}
        return (function(moved) - function(values)) / width


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and restore the mode of every module afterwards.

    Args:
        model: The model.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Call:
    """Call a model with other parameters."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.model, self.parameters = model, parameters

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return torch.func.functional_call(self.model, self.parameters, inputs, named, tie_weights=True)


def _logits(model: Callable[..., Any], *inputs: Any, **named: Any) -> Tensor:
    """Return the model's output, or the `logits` of it."""
    output = model(*inputs, **named)
    return output if isinstance(output, Tensor) else output.logits


def exact_binary_radius(logits: Tensor, change: Tensor) -> Tensor:
    """Compute the radius of convergence of a two-class cross-entropy along a step, `√(δ² + π²)/|Δ_a|`, a sample.

    Args:
        logits: The logits z, (..., 2).
        change: Their change a, same shape.

    Returns:
        The radius in units of the step, (...); infinity where the change has no gap. `π/Δ_a` is its lower bound.

    Raises:
        ValueError: There are not two classes.

    Source:
        arXiv 2603.13552.
    """
    if logits.shape[-1] != 2 or change.shape != logits.shape:
        got = f"logits {list(logits.shape)} and change {list(change.shape)}"
        raise ValueError(f"the exact radius is of two classes, got {got}; for more, StepControl has a lower bound")
    gap, moved = logits.diff(dim=-1).squeeze(-1), change.diff(dim=-1).squeeze(-1).abs()
    return torch.hypot(gap, torch.full_like(gap, pi)) / moved


def reduce_spread(change: Tensor, over: str | float = "max") -> Tensor:
    """Compute the spread of each position, `max_k a_k − min_k a_k`, reduced over positions.

    Args:
        change: The change a of the logits, (..., classes).
        over: "max", "mean", or a quantile in (0, 1).

    Returns:
        A scalar.
    """
    spread = (change.amax(-1) - change.amin(-1)).flatten().float()
    if isinstance(over, float):
        return spread.quantile(over)
    return spread.max() if over == "max" else spread.mean()
