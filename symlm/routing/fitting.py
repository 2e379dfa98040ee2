"""What does not fit a rule: a constraint that its step cannot respect, a momentum that it does not have."""

from collections.abc import Mapping
from typing import Any

from symlm.rules import Rule
from symlm.rules.constraints import get_constraint


def check_momentum(role: str, rule: Rule, group: Mapping[str, Any]) -> None:
    """Refuse a momentum in 8 bits where there is none, and one before a rule that has its own.

    Args:
        role: The group's role, for the message.
        rule: Its rule.
        group: The group.

    Raises:
        ValueError: The rule has AdamW's means, unless of vectors, which are few and stay in fp32; or it stores a mean
            itself.
    """
    if group["momentum_dtype"] == "int8" and rule.elementwise and role != "vector":
        raise ValueError(
            f"group {role}: momentum_dtype='int8' is of one mean, and rule {rule.name!r} has two by entries; set "
            f"another rule, or overrides={{{role!r}: {{'momentum_dtype': 'float32'}}}}"
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
