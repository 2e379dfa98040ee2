"""The action of a group element on a model and on its optimizer's state; both stay unchanged if it raises."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from symlm.rules import get_rule
from symlm.rules.rule import State
from symlm.symmetry import Group, Transport, permutations, rotations, signed_permutations
from symlm.teleport.actions import Transports, _dtype
from symlm.views.matrix_view import MatrixView
from symlm.views.storage import TRANSPOSED, WHOLE

TOLERANCE = 1e-10  # of float64, relative; fp32 gets 1e-5


@torch.no_grad()
def teleport(
    model: nn.Module,
    transports: Transports,
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    tolerance: float | None = None,
) -> None:
    """Act on a model's weights and gradients, and on the optimizer's state; leave all unchanged if anything raises.

    Args:
        model: The model.
        transports: The action on its weights, by parameter name.
        loss: Evaluates the loss, before the action and after; it must be deterministic.
        optimizer: The optimizer whose state is moved too, any of torch's or symlm's; None to move no state.
        tolerance: The largest change of the loss, relative to the larger of it and 1; by default 1e-10 in float64 and
            1e-5 otherwise.

    Raises:
        ValueError: The loss changed, a weight is unknown, below fp32 or of another shape than the action's, or a state
            cannot move: elementwise squares under an element that is not a permutation, means of directions under one
            that is not a rotation.
    """
    weights = dict(model.named_parameters())
    if unknown := sorted(set(transports) - set(weights)):
        raise ValueError(f"the model has no parameters {unknown}; transports are keyed by its parameter names")
    if narrow := [name for name in transports if weights[name].dtype.itemsize < 4]:
        raise ValueError(
            f"{narrow[0]} is {weights[narrow[0]].dtype}, whose rounding would change the loss: convert the model to "
            "float32 first"
        )
    _refuse_other_shapes(weights, transports)
    tolerance = tolerance or (TOLERANCE if _dtype(model) == torch.float64 else 1e-5)
    states = [(value, moved(value)) for value, moved in _states(optimizer, transports, weights)] if optimizer else []
    original = {name: weights[name].detach().clone() for name in transports}
    try:
        before = loss().item()
        for name, transport in transports.items():
            weights[name].copy_(transport.weight(original[name]))
        after = loss().item()
        if not abs(after - before) <= tolerance * max(1.0, abs(before)):
            raise ValueError(
                f"the loss went from {before:.12g} to {after:.12g}: the action is not a symmetry of this model (norm "
                "gains that are not 1? biases? dropout?); nothing was changed"
            )
    except BaseException:
        for name, W in original.items():
            weights[name].copy_(W)
        raise
    for value, moved in states:
        value.copy_(moved)
    for name, transport in transports.items():
        gradient = weights[name].grad
        if gradient is not None:
            weights[name].grad = transport.covector(gradient).contiguous()  # fused steps read in memory order


def _refuse_other_shapes(weights: Mapping[str, Tensor], transports: Transports) -> None:
    """Raise ValueError for an action whose matrices do not fit a weight."""
    for name, transport in transports.items():
        rows, columns = weights[name].shape
        for A, length, what in (
            (transport.left, rows, "rows"),
            (transport.right, columns, "columns"),
            (transport.shift, columns, "columns"),
        ):
            size = length if A is None else len(A) * (A.shape[-1] if A.ndim == 3 else 1)
            if size != length:
                raise ValueError(
                    f"the action moves {size} {what} of {name}, which has {length}: give one with the model's heads, "
                    "neurons and widths"
                )


MEANS_OF_GRADIENTS = ("momentum", "momentum_buffer", "exp_avg")  # of symlm, SGD and Adam


def _states(
    optimizer: torch.optim.Optimizer, transports: Transports, weights: Mapping[str, nn.Parameter]
) -> list[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Return every tensor of the optimizer's state that moves, with the function that moves it."""
    moves: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, transport in transports.items():
        if transport.left is None and transport.right is None:
            continue  # a shift moves no gradient
        group = groups.get(weights[name], {})
        of_rule = get_rule(group["rule"]).state if "rule" in group else {}
        for key, value in optimizer.state.get(weights[name], {}).items():
            if not isinstance(value, Tensor) or not value.ndim:
                continue
            if key in of_rule:
                moves.append((value, partial(_moved_by_rule, of_rule[key], group["view"], transport, name)))
            elif value.shape == weights[name].shape and transport.group in _groups_that_move(key, group):
                moves.append((value, transport.covector))
            else:
                raise ValueError(
                    f"{key} of {name} cannot move with this group element (elementwise?); reset the state first"
                )
    return moves


def _groups_that_move(key: str, group: Mapping[str, Any]) -> tuple[Group | None, ...]:
    """Return the groups under which a tensor of the state moves like a gradient; None stands for GL."""
    if key not in MEANS_OF_GRADIENTS:
        return (permutations,)
    if group.get("momentum_of") == "directions":
        return (permutations, signed_permutations, rotations)
    return (permutations, signed_permutations, rotations, None)


def refuse_unmovable(optimizer: torch.optim.Optimizer, model: nn.Module, names: Collection[str]) -> None:
    """Check before any step that the states of these weights will move with any group element.

    Args:
        optimizer: The optimizer.
        model: The model.
        names: The names of the parameters that will be moved.

    Raises:
        ValueError: A parameter has an elementwise rule, a rule with a state, or a momentum of directions or in 8 bits.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name in names:
        group = groups.get(model.get_parameter(name), {})
        rule = get_rule(group["rule"]) if "rule" in group else None
        fixed = group.get("momentum_of") == "directions" or group.get("momentum_dtype") == "int8"
        if (rule and (rule.elementwise or rule.state)) or fixed:
            raise ValueError(
                f"{name}: the state of {group['rule']!r} does not move with a teleport; choose another rule for it, "
                "and a wide momentum of gradients"
            )


def _moved_by_rule(state: State, view: str, transport: Transport, name: str, value: Tensor) -> Tensor:
    """Move a rule's state as the rule declares, in the coordinates of its view; raise ValueError if it cannot move."""
    parsed = MatrixView.parse(view)
    if parsed not in (WHOLE, TRANSPOSED) or state.side == "both":
        raise ValueError(f"the rule's state of {name} cannot move in its view {view!r}; reset the state first")
    side = transport.left if (state.side == "left") == (parsed == WHOLE) else transport.right
    if side is None:
        return value
    group = Transport(left=side).group
    if group is None:
        raise ValueError(f"the rule's state of {name} moves with rotations alone; reset the state first")
    if group == rotations and not state.rotations:
        raise ValueError(f"the rule's state of {name} moves with signed permutations alone; reset the state first")
    return state.act(value, torch.diag(side) if side.ndim == 1 else torch.block_diag(*side))
