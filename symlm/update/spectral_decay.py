"""A decay of singular values by one amount each: the weight's polar factor is subtracted after the step."""

from typing import Any

import torch
from torch import Tensor

from symlm.sizes.constraints import effective_decay, get_constraint
from symlm.step.directions import whole_directions
from symlm.step.member import Member


def refuse_cut(group: dict[str, Any], members: list[Member]) -> None:
    """Refuse weights of which a rank has no whole matrices, before anything moves.

    Args:
        group: The parameter group.
        members: Its members.

    Raises:
        RuntimeError: The group's constraint needs whole weights, and one is sharded.
    """
    cut = [member.name for member in members if not member.layout.whole]
    if cut and get_constraint(group["constraint"]).spectral:
        raise RuntimeError(
            f"{cut[0]} is sharded, and constraint {group['constraint']!r} needs whole weights on a rank: train with "
            "DDP, or set the constraint of its role to 'decay'"
        )


def shrink(group: dict[str, Any], members: list[Member], lr: float | Tensor) -> None:
    """Subtract `ηλ·polar(W)` from whole weights W, in place: each singular value falls by ηλ.

    Args:
        group: The parameter group, whose view and settings of polar factors are used.
        members: Members of one layout; their masters have made the step.
        lr: The rate η.
    """
    amount = lr * effective_decay(group)
    weights = torch.stack([member.master for member in members])
    factors, _ = whole_directions({**group, "rule": "polar", "scale": "unit", "momentum_of": "gradients"}, weights)
    for member, U in zip(members, factors, strict=True):
        member.master.sub_(U.to(member.dtype) * amount)
