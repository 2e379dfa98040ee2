"""The options of a parameter group: their defaults, the checks of their values, and parameters' names."""

from collections.abc import Collection, Iterator
from difflib import get_close_matches
from math import isfinite
from numbers import Real
from typing import Any

import torch
from symlm_kernels.selection import CHOICES
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from symlm.polar.factor import METHODS
from symlm.polar.precision import refuse_gram_iteration, resolve_dtype
from symlm.polar.schedules import get_schedule
from symlm.roles.role import whole_shape
from symlm.rules import Rule, get_rule
from symlm.rules.constraints import get_constraint
from symlm.rules.scaling import SCALES
from symlm.views.matrix_view import MatrixView
from symlm.views.storage import WHOLE

DEFAULTS: dict[str, Any] = {
    "momentum": 0.95,
    "nesterov": False,
    "momentum_of": "gradients",
    "weight_decay": 0.0,
    "weight_decay_multiplier": 1.0,
    "constraint": "decay",
    "floor": 0.57,  # 0.0143 of the weight's norm at the rate 0.025: modded-nanogpt, track 3
    "lr_multiplier": 1.0,  # of the group's lr, where frameworks log that of the first group: it is the dial itself
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "polar_method": "auto",
    "schedule": "polar_express",
    "steps": 5,
    "compute_dtype": "auto",
    "kernels": "auto",
    "momentum_dtype": "float32",
    "rounding": "stochastic",
    "nonfinite": "skip",
    "shared": True,
    "rotation": "own",
    "gram_every": 1,
}


UNCOMPARED = ("params", "param_names", "skipped", "step")  # not part of the plan on which ranks must agree


ROUTED = ("role", "view", "rule", "scale", "outputs", "lr")


def refuse_unknown(what: str, key: str, known: Collection[str]) -> None:
    """Refuse a key that is not known.

    Args:
        what: What the key is, for the message.
        key: The key.
        known: The allowed keys.

    Raises:
        ValueError: The key is not among them; the message has the nearest one, or else all.
    """
    if key not in known:
        near = get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; choose one of {sorted(known)}"
        raise ValueError(f"unknown {what} {key!r}{hint}")


def check_group(group: dict[str, Any]) -> None:
    """Refuse a group with a value that no step can use.

    Args:
        group: A parameter group with every option.

    Raises:
        ValueError: A value is unknown or out of range, the rule's state has no place in the view, or a parameter has a
            dtype that cannot be trained. The message names the group.
    """
    role, rule, view = group["role"], get_rule(group["rule"]), MatrixView.parse(group["view"])
    if rule.state and (view != WHOLE if rule.row_map else view.unequal):
        needed = "view 'whole'" if rule.row_map else "a view of equal matrices"
        raise ValueError(
            f"group {role}: rule {rule.name!r} has a state, which needs {needed}, and its view is {view}; set "
            f"another rule, e.g. overrides={{{role!r}: {{'rule': 'row_norm'}}}}"
        )
    check_constraint(role, rule, group["constraint"])
    check_options(group)
    get_schedule(group["schedule"]).steps(group["steps"])
    choices = {
        "scale": tuple(SCALES),
        "polar_method": METHODS,
        "kernels": CHOICES,
        "rounding": ("stochastic", "compensated"),
        "nonfinite": ("skip", "raise"),
        "momentum_of": ("gradients", "directions"),
        "momentum_dtype": ("float32", "bfloat16"),
        "outputs": ("rows", "columns"),
        "rotation": ("own", "layer"),
    }
    for key, allowed in choices.items():
        if group[key] not in allowed:
            raise ValueError(f"group {role}: unknown {key} {group[key]!r}; choose one of {allowed}")
    refuse_gram_iteration(group["polar_method"], resolve_dtype(torch.empty(0), group["compute_dtype"]))
    for name, p in named_parameters(group):
        view.shape(whole_shape(p))
        if p.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            raise ValueError(f"{name} is {p.dtype}: train it in float32 or bfloat16 (autocast may compute in float16)")
        if is_traceable_wrapper_subclass(p.data) and not hasattr(p, "placements"):
            raise ValueError(
                f"{name} is a {type(p.data).__name__}, whose storage is not that of its values: train plain weights, "
                "or freeze it (requires_grad_(False)) and train adapters"
            )
        if any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)):
            raise ValueError(f"{name} is expanded, many of its entries are one number: make it a tensor of its own")


def check_constraint(role: str, rule: Rule, name: str) -> None:
    """Refuse a constraint that the rule's step cannot respect.

    Args:
        role: The group's role, for the message.
        rule: Its rule.
        name: The name of the constraint.

    Raises:
        ValueError: It is unknown; or it measures matrices, or compares signs, where a rule's step goes by rows or is
            torch's AdamW.
    """
    constraint = get_constraint(name)
    if (constraint.measures and (rule.row_map or rule.elementwise)) or (constraint.cautious and rule.elementwise):
        raise ValueError(
            f"group {role}: constraint {name!r} needs a whole step at once, and rule {rule.name!r} is not taken at "
            "once; set its constraint to 'decay' or 'none', or another rule"
        )


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite real number, or a tensor of one; a bool is not.

    Args:
        value: Any value.
    """
    if isinstance(value, Tensor):
        # A device is not waited for.
        return value.numel() == 1 and not value.is_complex() and (value.device.type != "cpu" or bool(value.isfinite()))
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def check_options(group: dict[str, Any]) -> None:
    """Refuse numbers and flags of a group that no step can use; cheap enough for every step.

    Args:
        group: A parameter group with every option.

    Raises:
        ValueError: A value has the wrong type or is out of range. The message names group, option and value.
    """
    _check_types(group)
    role = group["role"]
    if any(_is_below(group[key], 0) for key in NOT_NEGATIVE) or not _is_mean(group["momentum"]):
        raise ValueError(
            f"group {role}: lr and weight_decay must not be negative and 0 <= momentum < 1, "
            f"got {group['lr']}, {group['weight_decay']}, {group['momentum']}"
        )
    if _is_below(group["floor"], 0) or group["gram_every"] < 1:
        raise ValueError(
            f"group {role}: floor must not be negative and gram_every at least 1, "
            f"got {group['floor']}, {group['gram_every']}"
        )
    if not all(map(_is_mean, group["betas"])) or _is_below(group["eps"], 0):
        raise ValueError(
            f"group {role}: betas must have 0 <= beta < 1 and eps must not be negative, "
            f"got {group['betas']}, {group['eps']}"
        )


NOT_NEGATIVE = ("lr", "lr_multiplier", "weight_decay", "weight_decay_multiplier")


def _is_below(value: float | Tensor, bound: float) -> bool:
    """Compare a number; one on a device counts as right, since reading it would wait, or break a graph's capture."""
    return not (isinstance(value, Tensor) and value.device.type != "cpu") and bool(value < bound)


def _is_mean(beta: float | Tensor) -> bool:
    """Tell whether 0 <= beta < 1, as far as it can be read without waiting."""
    on_device = isinstance(beta, Tensor) and beta.device.type != "cpu"
    return on_device or bool(0 <= beta < 1)


def _check_types(group: dict[str, Any]) -> None:
    """Raises: ValueError, with option and value, for what is not of the option's type."""
    numbers = ("lr", "lr_multiplier", "momentum", "weight_decay", "weight_decay_multiplier", "floor", "eps")
    wrong = [(key, "a finite number") for key in numbers if not is_number(group[key])]
    wrong += [(key, "True or False") for key in ("nesterov", "shared") if not isinstance(group[key], bool)]
    for key in ("steps", "gram_every"):
        if not isinstance(group[key], int) or isinstance(group[key], bool):
            wrong.append((key, "a whole number"))
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(map(is_number, betas)):
        wrong.append(("betas", "a pair of finite numbers"))
    for key, expected in wrong:
        raise ValueError(f"group {group['role']}: {key} must be {expected}, got {group[key]!r}")


def named_parameters(group: dict[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a group's parameters with their names.

    Args:
        group: A parameter group.

    Returns:
        `(name, parameter)`; without names `role[k]` stands for the k-th.
    """
    names = group.get("param_names", ())
    if len(names) != len(group["params"]):  # groups without names, or one partition for many parameters
        names = [f"{group['role']}[{k}]" for k in range(len(group["params"]))]
    return zip(names, group["params"], strict=True)


def with_rate(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group whose lr is the rate of its step, `lr · lr_multiplier`.

    Args:
        group: A parameter group.
    """
    return group if group["lr_multiplier"] == 1 else {**group, "lr": group["lr"] * group["lr_multiplier"]}


def key_of(group: dict[str, Any]) -> tuple[str, str]:
    """Return the key that is unique to a group among those of a model, `(role, view)`."""
    return group["role"], group["view"]
