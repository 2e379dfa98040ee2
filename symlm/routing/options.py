"""What a parameter group holds: options with their defaults, the checks of their values, and names."""

from collections.abc import Collection, Iterator
from difflib import get_close_matches
from typing import Any

import torch
from symlm_kernels.selection import CHOICES
from torch import nn

from symlm.polar.factor import METHODS
from symlm.polar.precision import resolve_dtype
from symlm.polar.schedules import get_schedule
from symlm.rules import get_rule
from symlm.rules.scaling import SCALES
from symlm.views.matrix_view import MatrixView
from symlm.views.storage import WHOLE

DEFAULTS: dict[str, Any] = {
    "momentum": 0.95,
    "nesterov": False,
    "momentum_of": "gradients",
    "weight_decay": 0.0,
    "weight_decay_multiplier": 1.0,
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
}


UNCOMPARED = ("params", "param_names", "skipped", "step")  # what is no part of the ranks' common plan


ROUTED = ("role", "view", "rule", "scale", "outputs", "lr")


def refuse_unknown(what: str, key: str, known: Collection[str]) -> None:
    """Raises: ValueError for a key that is not known, with the one that was meant."""
    if key not in known:
        near = get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; choose one of {sorted(known)}"
        raise ValueError(f"unknown {what} {key!r}{hint}")


def check_group(group: dict[str, Any]) -> None:
    """Raises: ValueError for a value that no step can use, naming the group."""
    role, rule, view = group["role"], get_rule(group["rule"]), MatrixView.parse(group["view"])
    if rule.state and (view != WHOLE if rule.row_map else view.unequal):
        needed = "view 'whole'" if rule.row_map else "a view of equal matrices"
        raise ValueError(
            f"group {role}: rule {rule.name!r} keeps a state, which needs {needed}; it has {view}; give "
            f"the role another rule, overrides={{{role!r}: {{'rule': 'row_norm'}}}} for one"
        )
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
    if group["lr"] < 0 or not 0 <= group["momentum"] < 1 or group["weight_decay"] < 0:
        raise ValueError(f"group {role}: lr and weight_decay are not negative, 0 <= momentum < 1")
    if not all(0 <= beta < 1 for beta in group["betas"]) or group["eps"] < 0:
        raise ValueError(f"group {role}: 0 <= beta < 1 and eps is not negative, got {group['betas']}, {group['eps']}")
    resolve_dtype(torch.empty(0), group["compute_dtype"])
    for name, p in named_parameters(group):
        if p.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            raise ValueError(f"{name} is {p.dtype}: train it in float32 or bfloat16 (autocast may compute in float16)")


def named_parameters(group: dict[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a group's parameters with their names, or with the role's where they have none."""
    names = group.get("param_names", ())
    if len(names) != len(group["params"]):  # none were given, or one partition stands for many parameters
        names = [f"{group['role']}[{k}]" for k in range(len(group["params"]))]
    return zip(names, group["params"], strict=True)


def key_of(group: dict[str, Any]) -> tuple[str, str]:
    """Return what tells a group from the others of a model."""
    return group["role"], group["view"]
