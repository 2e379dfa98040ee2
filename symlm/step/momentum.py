"""Phase 1: momentum, and what the rule sees of it."""

from typing import Any

import torch
from torch import Tensor

from symlm.step.directions import wide
from symlm.step.member import Member
from symlm.step.rows.blocks import ALL, Block


def update_momentum(group: dict[str, Any], member: Member, finite: Tensor) -> Tensor:
    """Phase 1: `M <- βM + (1−β)G`, nothing yet where the momentum is of directions; return G, or M in its place."""
    M, G = member.momentum, masked(member.gradient, member.momentum, finite)
    if group["momentum_of"] == "gradients":
        M.lerp_(G, 1 - group["momentum"])
    return G


def rule_input_of_block(group: dict[str, Any], member: Member, finite: Tensor, block: Block = ALL) -> Tensor:
    """Return what the rule sees of these rows of an updated momentum."""
    M = block.of(member.momentum)
    return rule_input(group, M, masked(block.of(member.gradient), M, finite))


def rule_input(group: dict[str, Any], M: Tensor, G: Tensor, out: Tensor | None = None) -> Tensor:
    """Return in fp32 the momentum, its Nesterov look-ahead `(1−β)G + βM`, or G where the momentum is of directions.

    out: where it is written, if there is such a place.
    """
    seen = G if group["momentum_of"] == "directions" else M
    if seen is M and group["nesterov"]:
        into = out if out is not None and out.dtype == M.dtype else None
        seen = torch.lerp(G, M, group["momentum"], out=into)
    if out is None or seen is out:
        return wide(seen)
    return out.copy_(seen)


def masked(G: Tensor, M: Tensor, finite: Tensor) -> Tensor:
    """Return the gradient, or M on a device whose step must not happen; a CPU has not come here with a bad one."""
    G = G.to(M.dtype)
    return G if G.device.type == "cpu" else torch.where(finite, G, M)
