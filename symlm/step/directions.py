"""From whole momenta to directions `s·U(M)`, all of one shape as one stack, and the cost of that."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.layout import Layout
from symlm.distributed.tensors import local
from symlm.polar.counting import operations
from symlm.polar.factor import polar
from symlm.rules import Rule, get_rule
from symlm.sizes.scaling import SCALES
from symlm.step.rows.row_step import gram_weight
from symlm.views.matrix_view import MatrixView

States = list[dict[str, Tensor]]  # the rule's state of each parameter


def rule_state(group: dict[str, Any], state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the part of a parameter's state that its rule stores, and the number of the step.

    Args:
        group: The parameter group.
        state: The parameter's state.

    Returns:
        This rank's parts by name; empty for a rule without state.
    """
    keys = get_rule(group["rule"]).stored
    return {key: local(state[key]) for key in (*keys, "step")} if keys else {}


def shares_layer_rotation(group: dict[str, Any]) -> bool:
    """Return whether all matrices of a layer share one rotation, which is computed before their directions."""
    return group["rotation"] == "layer" and get_rule(group["rule"]).pull is not None


def whole_directions(
    group: dict[str, Any],
    momenta: Tensor,
    view: MatrixView | None = None,
    states: States | None = None,
    refresh: bool = True,
    factors: Tensor | None = None,
) -> tuple[Tensor, States]:
    """Compute `s·U(M)` of whole momenta of one shape, those of a section as one stack, and the rule's next states.

    Args:
        group: The parameter group.
        momenta: The rule's inputs, (k, *shape).
        view: How a parameter is a stack of matrices; the group's view if None.
        states: The `rule_state` of each parameter, and its weight and momentum for a rule that reads the weight; those
            before a first step if None.
        refresh: Whether the states are refreshed; False to repeat a step from the states after it.
        factors: The polar factors of the view's stack, if they are known; of a view of equal matrices.

    Returns:
        The directions, (k, *shape), fp32 or float64, and the states of the k parameters after the step.
    """
    view = view or MatrixView.parse(group["view"])
    parts = view.sections(wide(momenta))
    if len(parts) == 1:
        return _stack_directions(group, view, wide(momenta), states, refresh, factors)
    result = torch.empty_like(wide(momenta), memory_format=torch.contiguous_format)
    for (section_view, part), (_, target) in zip(parts, view.sections(result), strict=True):
        target.copy_(_stack_directions(group, section_view, part)[0])
    return result, [{} for _ in momenta]


def _stack_directions(
    group: dict[str, Any],
    view: MatrixView,
    momenta: Tensor,
    states: States | None = None,
    refresh: bool = True,
    factors: Tensor | None = None,
) -> tuple[Tensor, States]:
    """Return the directions of one section, and the rule's next states."""
    rule, stack, shape = averaged_rule(group), view.to_matrices(momenta), tuple(momenta.shape)
    count = len(stack) // len(momenta)
    constants = constants_of(group) | (steps_of(group, view, shape[1:]) if rule.reads_weight else {})
    settings: dict[str, Any] = dict(zip(("beta1", "beta2"), group["betas"], strict=True)) | constants
    settings["polar"] = (lambda X: polar_factors(group, X)) if factors is None else lambda X: factors
    if rule.state:  # the refresh and the direction may both ask for it
        settings["polar"] = cache(settings["polar"])
    if rule.state and states:
        parts = {key: [state[key].view(count, -1, state[key].shape[-1]) for state in states] for key in rule.stored}
        stacked = {key: torch.cat(part) for key, part in parts.items()}
        read = {"weight", "momentum"} & states[0].keys()
        stacked |= {key: view.to_matrices(torch.stack([state[key] for state in states])) for key in read}
        settings["step"] = torch.cat([state["step"].expand(count) for state in states]).view(-1, 1, 1)
    else:
        stacked = rule.start(stack)
    if refresh:
        shared_rotation = stacked["rotation"] if shares_layer_rotation(group) else None
        step, polar = settings.get("step", 1), settings["polar"]
        beta1, beta2 = group["betas"]
        before, stacked = (
            stacked,
            rule.refreshed(stack, stacked, beta2, shared_rotation, step, polar, beta1, **constants),
        )
        if rule.whitens and group["gram_every"] > 1:
            share = gram_weight(group) / (1 - settings["beta2"])
            stacked["gram"] = before["gram"].lerp(stacked["gram"], share)
    U, scale = rule.direction(stack, stacked, **settings), scale_of(group, view, shape[1:])
    U = U if scale == 1 else U.mul_(scale)
    after = [{key: stacked[key][k * count : (k + 1) * count] for key in rule.stored} for k in range(len(momenta))]
    if rule.reads_weight:
        for state, M in zip(after, view.from_matrices(stacked["momentum"], shape), strict=True):
            state["momentum"] = M
    return view.from_matrices(U, shape), after


def constants_of(group: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a rule that the group sets in place of the rule's own.

    Args:
        group: The parameter group.
    """
    return {key: group[key] for key in ("gamma", "retained") if group[key] is not None}


def steps_of(group: dict[str, Any], view: MatrixView, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return what a rule that reads the weight is given of its step besides.

    Args:
        group: The parameter group.
        view: How the parameter is a stack of matrices.
        shape: The parameter's shape.
    """
    given = {"momentum_decay": group["momentum"], "rate": group["lr"], "scale": scale_of(group, view, shape)}
    return given | {key: group[key] for key in ("nesterov", "eps")}


def averaged_rule(group: dict[str, Any]) -> Rule:
    """Return the rule of the directions: of a mean of directions that a norm multiplies, the rule without the norm.

    Args:
        group: The parameter group.
    """
    return get_rule("polar" if multiplies_norm(group) else group["rule"])


def multiplies_norm(group: dict[str, Any]) -> bool:
    """Return whether a step is `η·ν·M`, M the mean of polar factors and ν this gradient's nuclear norm (PolarGrad).

    Args:
        group: The parameter group.
    """
    return group["momentum_of"] == "directions" and group["rule"] == "polargrad"


POLAR_OPTIONS = ("polar_method", "schedule", "steps", "compute_dtype", "kernels")


def polar_factors(group: dict[str, Any], X: Tensor) -> Tensor:
    """Return the polar factors with the group's settings.

    Args:
        group: The parameter group.
        X: Matrices, (..., m, n).
    """
    method, schedule, steps, compute_dtype, kernels = (group[key] for key in POLAR_OPTIONS)
    return polar(X, method, schedule=schedule, steps=steps, compute_dtype=compute_dtype, kernels=kernels)


def scale_of(group: dict[str, Any], view: MatrixView, shape: tuple[int, ...]) -> float:
    """Return the scale s of the directions of one parameter.

    Args:
        group: The parameter group; its `outputs` is the side of a matrix that has the outputs, "rows" or "columns".
        view: How the parameter is a stack of matrices.
        shape: The parameter's shape.

    Returns:
        The factor s of a unit direction.
    """
    _, m, n = view.shape(shape)
    outputs, inputs = (n, m) if group["outputs"] == "columns" else (m, n)
    return SCALES[group["scale"]](outputs, inputs)


def wide(M: Tensor) -> Tensor:
    """Return M in fp32, or unchanged if it is float64."""
    return M if M.dtype == torch.float64 else M.float()


def cost_of(group: dict[str, Any], layout: Layout) -> float:
    """Count the operations of the polar factors of one whole parameter.

    Args:
        group: The parameter group.
        layout: The parameter's layout.

    Returns:
        The count, by which matrices are assigned to owners.
    """
    total = 0.0
    view = MatrixView.parse(group["view"])
    for part_view, part in view.sections(torch.empty(layout.shape, device="meta")):
        b, m, n = part_view.shape(tuple(part.shape))
        total += b * operations(m, n, group["steps"], "auto")
    return total
