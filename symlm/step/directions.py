"""From whole momenta to directions `s·U(M)`, all of one shape as one stack, and what that costs."""

from typing import Any

import torch
from torch import Tensor

from symlm.distributed.layout import Layout
from symlm.distributed.tensors import local
from symlm.polar.counting import operations
from symlm.polar.factor import polar
from symlm.rules import get_rule
from symlm.rules.scaling import SCALES
from symlm.views.matrix_view import MatrixView

States = list[dict[str, Tensor]]  # what the rule keeps, of each parameter


def rule_state(group: dict[str, Any], state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the part of a parameter's state that is its rule's, and the number of the step."""
    keys = get_rule(group["rule"]).state
    return {key: local(state[key]) for key in (*keys, "step")} if keys else {}


def shares_layer_rotation(group: dict[str, Any]) -> bool:
    """Tell whether the rule's rotation is one for all matrices of a layer, computed before their directions."""
    return group["rotation"] == "layer" and get_rule(group["rule"]).pull is not None


def whole_directions(
    group: dict[str, Any],
    momenta: Tensor,
    view: MatrixView | None = None,
    states: States | None = None,
    refresh: bool = True,
) -> tuple[Tensor, States]:
    """Return `s·rule(M)` of whole momenta of one shape, all of a section as one stack, and the rule's next states.

    momenta: (k, *shape); states: as `rule_state` gives them; without them, those of a rule's first step. refresh:
    False to compute again what a step did, from the states that it left.
    """
    view = view or MatrixView.parse(group["view"])
    parts = view.sections(wide(momenta))
    if len(parts) == 1:
        return _stack_directions(group, view, wide(momenta), states, refresh)
    result = torch.empty_like(wide(momenta), memory_format=torch.contiguous_format)
    for (section_view, part), (_, own) in zip(parts, view.sections(result), strict=True):
        own.copy_(_stack_directions(group, section_view, part)[0])
    return result, [{} for _ in momenta]


def _stack_directions(
    group: dict[str, Any], view: MatrixView, momenta: Tensor, states: States | None = None, refresh: bool = True
) -> tuple[Tensor, States]:
    rule, stack, shape = get_rule(group["rule"]), view.to_matrices(momenta), tuple(momenta.shape)
    count = len(stack) // len(momenta)
    told: dict[str, Any] = {"polar": lambda X: _polar(group, X), "beta2": group["betas"][1]}
    if rule.state and states:
        parts = {key: [state[key].view(count, -1, state[key].shape[-1]) for state in states] for key in rule.state}
        kept = {key: torch.cat(part) for key, part in parts.items()}
        told["step"] = torch.cat([state["step"].expand(count) for state in states]).view(-1, 1, 1)
    else:
        kept = rule.start(stack)
    if refresh:
        shared_rotation = kept["rotation"] if shares_layer_rotation(group) else None
        kept = rule.refreshed(stack, kept, told["beta2"], shared_rotation, told.get("step", 1))
    U = rule.direction(stack, kept, **told).mul_(scale_of(group, view, shape[1:]))
    own = [{key: value[k * count : (k + 1) * count] for key, value in kept.items()} for k in range(len(momenta))]
    return view.from_matrices(U, shape), own


def _polar(group: dict[str, Any], X: Tensor) -> Tensor:
    return polar(
        X,
        group["polar_method"],
        schedule=group["schedule"],
        steps=group["steps"],
        compute_dtype=group["compute_dtype"],
        kernels=group["kernels"],
    )


def scale_of(group: dict[str, Any], view: MatrixView, shape: tuple[int, ...]) -> float:
    """Return the scale s of a stored shape: the route's view tells which side of its matrices the outputs are."""
    _, m, n = view.shape(shape)
    outputs, inputs = (n, m) if group["outputs"] == "columns" else (m, n)
    return SCALES[group["scale"]](outputs, inputs)


def wide(M: Tensor) -> Tensor:
    """Return M in fp32, or in float64 if that is what it is."""
    return M if M.dtype == torch.float64 else M.float()


def cost_of(group: dict[str, Any], layout: Layout) -> float:
    """Count the operations of one whole parameter's direction."""
    total = 0.0
    view = MatrixView.parse(group["view"])
    for part_view, part in view.sections(torch.empty(layout.shape, device="meta")):
        b, m, n = part_view.shape(tuple(part.shape))
        total += b * operations(m, n, group["steps"], "auto")
    return total
