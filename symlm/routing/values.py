"""Which values the options of a parameter group may have, alone and beside its rule."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from numbers import Integral, Rational, Real
from typing import Any

import torch
from symlm_kernels.selection import CHOICES
from torch import Tensor

from symlm.polar.factor import METHODS
from symlm.polar.schedules import SCHEDULES
from symlm.rules import RULES, Rule
from symlm.sizes.constraints import get_constraint
from symlm.sizes.scaling import SCALES


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite real number, or a tensor of one; a bool and a fraction are not.

    Args:
        value: Any value; a tensor on a device is not read, since that would wait, or break a graph's capture.
    """
    if type(value) is float:  # before the slow tests of what is seldom there
        return isfinite(value)
    if isinstance(value, Tensor):
        is_real = value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
        return is_real and (value.device.type != "cpu" or bool(value.isfinite()))
    if isinstance(value, Integral):
        return not isinstance(value, bool) and abs(int(value)) <= sys.float_info.max  # of which isfinite would raise
    return isinstance(value, Real) and not isinstance(value, Rational) and isfinite(value)


def is_not_negative(value: Any) -> bool:
    """Tell whether a value is a finite number that is not negative, as far as it can be read without waiting.

    Args:
        value: Any value.
    """
    return is_number(value) and (_is_on_device(value) or bool(value >= 0))


def _is_mean(value: Any) -> bool:
    return is_number(value) and (_is_on_device(value) or bool(0 <= value < 1))


def _is_pair_of_means(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_mean, value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_warmup(value: Any) -> bool:
    return _is_count(value) or (value == 0 and isinstance(value, int) and not isinstance(value, bool))


def _is_counter(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype in (torch.int64, torch.int32)
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_of_rule(value: Any) -> bool:
    return value is None or is_not_negative(value)


def _is_number_of_steps(value: Any) -> bool:
    return _is_count(value) and value <= MOST_STEPS


def _is_compute_dtype(value: Any) -> bool:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return (isinstance(value, str) and value == "auto") or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


@dataclass(frozen=True)
class Kind:
    """What the values of an option have in common: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


COUNTS = ("step", "skipped")  # which a group counts itself
MOST_STEPS = 100  # of Newton–Schulz, which has converged to any dtype's rounding long before
NOT_NEGATIVE = Kind("a finite number, not negative", is_not_negative)
MEAN = Kind("a finite number from 0 to below 1", _is_mean)
FLAG = Kind("True or False", _is_flag)
NAME = Kind("text", _is_text)
KINDS = {
    **dict.fromkeys(("lr", "lr_multiplier", "weight_decay", "weight_decay_multiplier", "floor", "eps"), NOT_NEGATIVE),
    "momentum": MEAN,
    "betas": Kind("a pair of finite numbers from 0 to below 1", _is_pair_of_means),
    "nesterov": FLAG,
    "shared": FLAG,
    "steps": Kind(f"a whole number from 1 to {MOST_STEPS}", _is_number_of_steps),
    "gram_every": Kind("a whole number, 1 or more", _is_count),
    "momentum_warmup": Kind("a whole number, 0 or more", _is_warmup),
    **dict.fromkeys(("gamma", "retained"), Kind("None or a number >= 0", _is_of_rule)),
    "compute_dtype": Kind("'auto' or a floating-point dtype such as 'float32'", _is_compute_dtype),
    **dict.fromkeys(COUNTS, Kind("a whole number, 0 or more", _is_counter)),
    "role": NAME,
    "view": NAME,
    "constraint": NAME,
}
NAMES: dict[str, tuple[str, ...]] = {
    "rule": tuple(RULES),
    "scale": tuple(SCALES),
    "schedule": tuple(SCHEDULES),
    "polar_method": METHODS,
    "kernels": CHOICES,
    "rounding": ("stochastic", "compensated"),
    "nonfinite": ("skip", "raise"),
    "momentum_of": ("gradients", "directions"),
    "momentum_dtype": ("float32", "bfloat16", "int8"),
    "outputs": ("rows", "columns"),
    "rotation": ("own", "layer"),
}


def check_values(where: str, values: Mapping[str, Any]) -> None:
    """Refuse the value of an option that no step can use.

    Args:
        where: Whose values they are, for the message.
        values: Options; keys that are none are passed over.

    Raises:
        ValueError: A value has the wrong type, is unknown or out of range. The message names it and its option.
    """
    for key, kind in KINDS.items():
        if key in values and not kind.holds(values[key]):
            raise ValueError(f"{where}: {key} must be {kind.words}, got {values[key]!r}")
    for key, names in NAMES.items():
        if key in values and not (isinstance(values[key], str) and values[key] in names):
            raise ValueError(f"{where}: unknown {key} {values[key]!r}; choose one of {names}")


def check_options(group: dict[str, Any]) -> None:
    """Refuse a group's options as `check_values`: before every step too, since schedulers and callers write to groups.

    Args:
        group: A parameter group with every option.

    Raises:
        ValueError: As `check_values`.
    """
    check_values(f"group {group['role']}", group)


def check_momentum(role: str, rule: Rule, group: Mapping[str, Any]) -> None:
    """Refuse a momentum in 8 bits where there is none, and one before a rule that has its own.

    Args:
        role: The group's role, for the message.
        rule: Its rule.
        group: The group.

    Raises:
        ValueError: The rule has AdamW's means, unless of vectors, which are few and stay in fp32; or it stores a mean
            itself; or it reads the weight, and the momentum is of directions.
    """
    if group["momentum_dtype"] == "int8" and rule.elementwise and role != "vector":
        raise ValueError(
            f"group {role}: momentum_dtype='int8' is of one mean, and rule {rule.name!r} has two by entries; set "
            f"another rule, or overrides={{{role!r}: {{'momentum_dtype': 'float32'}}}}"
        )
    if rule.reads_weight and group["momentum_of"] != "gradients":
        raise ValueError(
            f"group {role}: rule {rule.name!r} has its momentum in coordinates of its own, which directions have not; "
            f"set momentum_of to 'gradients', got {group['momentum_of']!r}"
        )
    if rule.own_mean and (group["momentum"] != 0 or group["momentum_of"] != "gradients"):
        raise ValueError(
            f"group {role}: rule {rule.name!r} stores a mean of gradients itself, by betas[0]; set momentum to 0 and "
            f"momentum_of to 'gradients', got {group['momentum']} and {group['momentum_of']!r}"
        )


def check_constraint(role: str, rule: Rule, name: str) -> None:
    """Refuse a constraint that the rule's step cannot respect.

    Args:
        role: The group's role, for the message.
        rule: Its rule.
        name: The name of the constraint.

    Raises:
        ValueError: It is unknown; or it measures matrices, takes their polar factors or compares signs, where a rule's
            step goes by rows or is torch's AdamW.
    """
    constraint = get_constraint(name)
    whole = constraint.measures or constraint.spectral
    if (whole and (rule.row_map or rule.elementwise)) or (constraint.cautious and rule.elementwise):
        raise ValueError(
            f"group {role}: constraint {name!r} needs a whole step at once, and rule {rule.name!r} is not taken at "
            "once; set its constraint to 'decay' or 'none', or another rule"
        )
