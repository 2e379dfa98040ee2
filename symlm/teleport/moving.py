"""Act on a model and on its optimizer's state, or leave both alone and raise."""

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
    """Act on a model, and on the gradients' means in its optimizer's state; or leave both alone and raise.

    loss: evaluated before and after, and must not change by more than `tolerance` (relative; by dtype).
    Raises: ValueError where the loss changed, for an unknown weight, for weights of less than fp32, and for a state
    that cannot move: elementwise squares under what is no permutation, means of steps under what is no rotation.
    Whatever raises, everything is then as it was.
    """
    weights = dict(model.named_parameters())
    if unknown := sorted(set(transports) - set(weights)):
        raise ValueError(f"the model has no {unknown}")
    if narrow := [name for name in transports if weights[name].dtype.itemsize < 4]:
        raise ValueError(
            f"{narrow[0]} is {weights[narrow[0]].dtype}, whose rounding would change the loss: widen it first"
        )
    tolerance = tolerance or (TOLERANCE if _dtype(model) == torch.float64 else 1e-5)
    states = [(value, moved(value)) for value, moved in _states(optimizer, transports, weights)] if optimizer else []
    kept = {name: weights[name].detach().clone() for name in transports}
    try:
        before = loss().item()
        for name, transport in transports.items():
            weights[name].copy_(transport.weight(kept[name]))
        after = loss().item()
        if not abs(after - before) <= tolerance * max(1.0, abs(before)):
            raise ValueError(
                f"the loss went from {before:.12g} to {after:.12g}: the action is no symmetry of this model (norm "
                "gains that are not 1? biases? dropout?); the weights are as they were"
            )
    except BaseException:
        for name, W in kept.items():
            weights[name].copy_(W)
        raise
    for value, moved in states:
        value.copy_(moved)
    for name, transport in transports.items():
        gradient = weights[name].grad
        if gradient is not None:
            weights[name].grad = transport.covector(gradient).contiguous()  # fused steps read along memory


MEANS_OF_GRADIENTS = ("momentum", "momentum_buffer", "exp_avg")  # ours and torch's


def _states(
    optimizer: torch.optim.Optimizer, transports: Transports, weights: Mapping[str, nn.Parameter]
) -> list[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Return every tensor of the optimizer's state that moves, and how."""
    found: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, transport in transports.items():
        if transport.left is None and transport.right is None:
            continue  # a shift moves no gradient
        group = groups.get(weights[name], {})
        kept = get_rule(group["rule"]).state if "rule" in group else {}
        for key, value in optimizer.state.get(weights[name], {}).items():
            if not isinstance(value, Tensor) or not value.ndim:
                continue
            if key in kept:
                found.append((value, partial(_moved_by_rule, kept[key], group["view"], transport, name)))
            elif value.shape == weights[name].shape and transport.group in _groups_that_move(key, group):
                found.append((value, transport.covector))
            else:
                raise ValueError(f"{key} of {name} cannot move with this group element (elementwise?); reset it first")
    return found


def _groups_that_move(key: str, group: Mapping[str, Any]) -> tuple[Group | None, ...]:
    """Return the groups under which a tensor of the state moves like a gradient; None stands for GL."""
    if key not in MEANS_OF_GRADIENTS:
        return (permutations,)
    if group.get("momentum_of") == "directions":
        return (permutations, signed_permutations, rotations)
    return (permutations, signed_permutations, rotations, None)


def refuse_unmovable(optimizer: torch.optim.Optimizer, model: nn.Module, names: Collection[str]) -> None:
    """Tell before any step whether these weights' states will move with more than permutations.

    Raises: ValueError for elementwise rules, rules with a state and means of steps, which do not.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name in names:
        group = groups.get(model.get_parameter(name), {})
        rule = get_rule(group["rule"]) if "rule" in group else None
        if (rule and (rule.elementwise or rule.state)) or group.get("momentum_of") == "directions":
            raise ValueError(f"{name}: what {group['rule']!r} keeps does not move with a teleport; choose another rule")


def _moved_by_rule(state: State, view: str, transport: Transport, name: str, value: Tensor) -> Tensor:
    """Move what a rule keeps as the rule declares, in the coordinates of its view.

    Raises: ValueError for a view with other coordinates, and for a factor that the state has no move for.
    """
    parsed = MatrixView.parse(view)
    if parsed not in (WHOLE, TRANSPOSED):
        raise ValueError(f"what the rule keeps of {name} cannot move in its view {view!r}; reset it first")
    side = transport.left if (state.side == "left") == (parsed == WHOLE) else transport.right
    if side is None:
        return value
    group = Transport(left=side).group
    if group is None:
        raise ValueError(f"what the rule keeps of {name} moves with rotations alone; reset it first")
    if group == rotations and not state.rotations:
        raise ValueError(f"what the rule keeps of {name} moves with signed permutations alone; reset it first")
    return state.act(value, torch.diag(side) if side.ndim == 1 else torch.block_diag(*side))
