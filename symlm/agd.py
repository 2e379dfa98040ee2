"""AGD, automatic gradient descent: an optimizer whose rate is global, computed from all layers' gradients at once."""

from collections.abc import Callable
from math import inf, prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from symlm.polar.precision import accumulation_dtype
from symlm.roles.assignment import refuse_other_than_module, refuse_without_weights
from symlm.routing.values import check_values


class AGD(torch.optim.Optimizer):
    """Update every layer by `W_k <- W_k − gain·(η/L)·s_k·g_k/|g_k|`, with one rate η for all layers and no tuning.

    s_k = √(outputs/inputs), of an embedding √(dim/tokens). Every position of a convolution's kernel is a matrix with a
    norm of its own, and s_k is divided by the root of their number; L is the number of layers;
    `G = (1/L) Σ s_k |g_k|_F`, `η = log((1 + √(1 + 4G))/2)`, the minimizer of `−ηG + (e^η − 1)²/2`.
    Call `initialize_(model)` first. Momentum, layerwise steps and weight decay are reconstructed from descriptions, not
    from a published formula.

    Args:
        model: The model; its layers, linear, convolutions or embeddings, are in the order of use.
        gain: A factor of every step.
        momentum: β of the mean `m <- βm + (1−β)g`, which takes the place of g.
        layerwise: Whether the step of layer k is divided by k, which is 1 at the input.
        weight_decay: λ. g_k includes λW_k, and η solves `e^η(e^η − 1) + λd̃/L·η = G`, d̃ the mean of outputs/inputs.

    Raises:
        TypeError: The model is no module.
        ValueError: A trainable bias, gain or other layer, which the bound does not cover; a value out of its range; or
            a second parameter group.

    Source:
        Bernstein et al., arXiv 2304.05187, algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        gain: float = 1.0,
        momentum: float = 0.0,
        layerwise: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        numbers = all(isinstance(value, int | float) for value in (gain, momentum, weight_decay))
        if not numbers or not (0 < gain < inf and 0 <= momentum < 1 and 0 <= weight_decay < inf):
            raise ValueError(
                "gain must be positive, 0 <= momentum < 1, and weight_decay must not be negative, all finite, got "
                f"{gain!r}, {momentum!r}, {weight_decay!r}"
            )
        if not isinstance(layerwise, bool):
            raise ValueError(f"layerwise must be True or False, got {layerwise!r}")
        defaults = {"lr": gain, "momentum": momentum, "layerwise": layerwise, "weight_decay": weight_decay}
        layers = _layers(model)
        super().__init__(list(layers), {**defaults, "tables": list(layers.values())})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the group of all layers, which the constructor does.

        Args:
            param_group: The group.

        Raises:
            ValueError: There is a group already.
        """
        if self.param_groups:
            raise ValueError("AGD has one rate for all layers, so one group: construct it with the model that has all")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all layers once.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the closure returns, None without one.

        Raises:
            ValueError: A scheduler or the caller wrote a value to the group that no step can use.
            RuntimeError: A layer has no gradient, and the rate needs all, or a sparse one, or is sharded; nothing was
                updated.
            FloatingPointError: A gradient is not finite; nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        check_values("AGD", group)
        layers = group["params"]
        if any(hasattr(p, "placements") or p.ndim < 2 for p in layers):
            raise RuntimeError("AGD's rate is of whole layers, which shards and partitions are not: train with DDP")
        if any(p.grad is None for p in layers):
            missing = [k for k, p in enumerate(layers) if p.grad is None]
            raise RuntimeError(
                f"every layer needs a gradient, since AGD's rate is computed from all; layers {missing}, counted from "
                "0, have none: set requires_grad=False on those that the loss does not use"
            )
        if sparse := [k for k, p in enumerate(layers) if p.grad is not None and p.grad.is_sparse]:
            raise RuntimeError(f"layers {sparse}, counted from 0, have sparse gradients: build them with sparse=False")
        finite = torch.stack([p.grad.isfinite().all() for p in layers if p.grad is not None]).tolist()
        if not all(finite):
            bad = [k for k, good in enumerate(finite) if not good]
            raise FloatingPointError(f"non-finite gradients in layers {bad}, counted from 0; nothing was updated")
        gradients = [self._gradient(group, p) for p in layers]
        norms = [torch.linalg.vector_norm(g, dim=(0, 1), keepdim=True) for g in gradients]  # one a position of a kernel
        scales = [layer_scale(p, is_table) for p, is_table in zip(layers, group["tables"], strict=True)]
        summary = sum(s * norm.sum() for s, norm in zip(scales, norms, strict=True)) / len(layers)
        fans = [_fans(p, is_table) for p, is_table in zip(layers, group["tables"], strict=True)]
        decay = group["weight_decay"] * sum(outputs / inputs for outputs, inputs in fans) / len(layers) ** 2
        eta = rate(torch.as_tensor(summary), decay)
        for k, (p, g, s, norm) in enumerate(zip(layers, gradients, scales, norms, strict=True), start=1):
            size = group["lr"] * s / len(layers) / (k if group["layerwise"] else 1)
            p.sub_(eta * size * g / torch.where(norm > 0, norm, 1.0))
        return loss

    def _gradient(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """Return the gradient with the decay, or its mean with momentum, which is updated."""
        assert p.grad is not None
        g = p.grad + group["weight_decay"] * p if group["weight_decay"] else p.grad
        if not group["momentum"]:
            return g
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"].lerp_(g, 1 - group["momentum"])


def rate(G: Tensor, decay: float = 0.0) -> Tensor:
    """Solve `e^η(e^η − 1) + decay·η = G` for η, in closed form without decay, else by eight Newton steps from that.

    The left side is convex and increasing, and the start is above the root, so that no step overshoots.

    Args:
        G: The gradient summary, a scalar, not negative.
        decay: The coefficient of η, not negative.

    Returns:
        η, a scalar.
    """
    eta = torch.log((1 + torch.sqrt(1 + 4 * G)) / 2)
    for _ in range(8 if decay else 0):
        e = eta.exp()
        eta = eta - (e * (e - 1) + decay * eta - G) / (2 * e * e - e + decay)
    return eta


def layer_scale(W: Tensor, is_table: bool = False) -> float:
    """Compute the scale of a layer, `√(outputs/(inputs·positions))`.

    Args:
        W: The weight, (outputs, inputs), or (outputs, inputs, ...) with the positions of a convolution's kernel.
        is_table: Whether it is an embedding, whose rows are inputs.

    Returns:
        The scale.
    """
    outputs, inputs = _fans(W, is_table)
    return sqrt(outputs / inputs / prod(W.shape[2:]))


@torch.no_grad()
def initialize_(model: nn.Module) -> None:
    """Initialize every layer as a random semi-orthogonal matrix times its scale, each position of a kernel separately.

    Args:
        model: The model, changed in place.

    Raises:
        ValueError: As `AGD`, or the model is on the meta device, or sharded.

    Source:
        Bernstein et al., arXiv 2304.05187, algorithm 1.
    """
    refuse_without_weights(model)
    for p, is_table in _layers(model).items():
        for position in p.flatten(2).unbind(2) if p.ndim > 2 else [p]:
            position.copy_(nn.init.orthogonal_(torch.empty_like(position, dtype=accumulation_dtype(p.dtype))))
        p.mul_(layer_scale(p, is_table))


def _layers(model: nn.Module) -> dict[nn.Parameter, bool]:
    """Return the trainable weights in order, and whether each is an embedding alone.

    Raises: ValueError, for those that are not a layer with a known scale.
    """
    refuse_other_than_module(model)
    layers: dict[nn.Parameter, bool] = {}  # a tied weight is one layer, the head
    for path, module in model.named_modules():
        known = isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS))
        for leaf, p in module.named_parameters(path, recurse=False):
            if p.requires_grad and (p.ndim < 2 or not known):
                raise ValueError(
                    f"AGD has no rate for {leaf} of {type(module).__name__}: build the model of nn.Linear, "
                    "nn.Embedding and convolutions, without biases and norm gains (or freeze them)"
                )
            if p.requires_grad:
                layers[p] = layers.get(p, True) and isinstance(module, nn.Embedding)
    return layers


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _fans(W: Tensor, is_table: bool = False) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of a weight; the rows of an embedding are inputs."""
    return (W.shape[1], W.shape[0]) if is_table else (W.shape[0], W.shape[1])
