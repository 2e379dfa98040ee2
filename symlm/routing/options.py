"""The options of a parameter group: their defaults, the checks of their values, and parameters' names."""

from collections.abc import Collection, Iterator
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from symlm.polar.precision import refuse_gram_iteration, resolve_dtype
from symlm.roles.storage import whole_shape
from symlm.routing.values import check_constraint, check_momentum, check_options
from symlm.rules import get_rule
from symlm.views.matrix_view import MatrixView
from symlm.views.storage import WHOLE

DEFAULTS: dict[str, Any] = {
    "momentum": 0.95,
    "momentum_warmup": 0,
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
    "gamma": None,  # AuON's γ and ARO's ε; None for what the rule has
    "retained": None,
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
    check_options(group)
    role, rule, view = group["role"], get_rule(group["rule"]), MatrixView.parse(group["view"])
    if rule.state and (view != WHOLE if rule.row_map else view.unequal):
        needed = "view 'whole'" if rule.row_map else "a view of equal matrices"
        raise ValueError(
            f"group {role}: rule {rule.name!r} has a state, which needs {needed}, and its view is {view}; set "
            f"another rule, e.g. overrides={{{role!r}: {{'rule': 'row_norm'}}}}"
        )
    check_constraint(role, rule, group["constraint"])
    check_momentum(role, rule, group)
    refuse_gram_iteration(group["polar_method"], resolve_dtype(torch.empty(0), group["compute_dtype"]))
    for name, p in named_parameters(group):
        view.shape(whole_shape(p))
        if p.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            raise ValueError(f"{name} is {p.dtype}: train it in float32 or bfloat16 (autocast may compute in float16)")
        if p.dtype == torch.float64 and group["momentum_dtype"] == "int8":
            raise ValueError(f"{name} is float64, and momentum_dtype='int8' is of float32 and bfloat16")
        if is_traceable_wrapper_subclass(p.data) and not hasattr(p, "placements"):
            raise ValueError(
                f"{name} is a {type(p.data).__name__}, whose storage is not that of its values: train plain weights, "
                "or freeze it (requires_grad_(False)) and train adapters"
            )
        if any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)):
            raise ValueError(f"{name} is expanded, many of its entries are one number: make it a tensor of its own")


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


EARLY_MOMENTUM = 0.85  # that of the first step: modded-nanogpt, track 3


def with_momentum(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group whose momentum is that of its step t, `β − (β − β₀)·max(0, 1 − t/T)`, T its `momentum_warmup`.

    Args:
        group: A parameter group that has counted the step.

    Returns:
        The group, with β of the step.

    Raises:
        RuntimeError: β still grows and a CUDA graph is being captured; every replay would have the β of this step.
    """
    beta, last = group["momentum"], group["momentum_warmup"]
    if group["step"] >= last or beta <= EARLY_MOMENTUM:
        return group
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the momentum of {group['role']} grows until step {last}, and a CUDA graph would hold it at that of step "
            f"{group['step']}; capture after step {last}, or give momentum_warmup=0"
        )
    return {**group, "momentum": beta - (beta - EARLY_MOMENTUM) * (1 - group["step"] / last)}


def key_of(group: dict[str, Any]) -> tuple[str, str]:
    """Return the key that is unique to a group among those of a model, `(role, view)`."""
    return group["role"], group["view"]
