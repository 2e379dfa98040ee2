"""Phase 3: from a direction to the weight."""

from typing import Any

import torch
from torch import Tensor

from symlm.distributed.layout import Layout
from symlm.step.member import Member
from symlm.step.momentum import masked
from symlm.step.rows.blocks import Block


def apply(group: dict[str, Any], members: list[Member], block: Block, updates: list[Tensor], finite: Tensor) -> Tensor:
    """Phase 3: `W <- (1 − ηλ)W − η·s·U`, on this block of the fp32 master; or with U's own momentum in its place.

    Returns `Σ(ηsU)²`, of which diagnostics make the size of a role's update.
    """
    lr = group["lr"] if members[0].parameter.device.type == "cpu" else group["lr"] * finite
    decay = group["weight_decay"] * group["weight_decay_multiplier"]
    keep = 1 - lr * decay
    norms, steps = [], []
    for member, U in zip(members, updates, strict=True):
        W = block.of(member.master)
        if group["momentum_of"] == "directions":
            M = block.of(member.momentum)
            U = M.lerp_(masked(U, M, finite), 1 - group["momentum"])
        if decay:
            W.mul_(keep)
        taken = None if member.active is None else _spread(member.active, member.layout, U)
        norms.append(_norm(U, taken))
        steps.append(finite if taken is None or taken.ndim else taken)
        if taken is None and not isinstance(lr, Tensor):
            W.sub_(U, alpha=lr)
        elif taken is None or isinstance(group["lr"], Tensor):
            W.addcmul_(U, (lr if taken is None else lr * taken).to(U.dtype), value=-1)
        else:
            W.addcmul_(U, taken.to(U.dtype), value=-group["lr"])
    sizes = torch.stack(norms)
    if any(member.active is not None for member in members):  # of all in one launch
        sizes = sizes * torch.stack([step.to(sizes.dtype) for step in steps])
    return (lr * sizes).square().sum()


def _spread(active: Tensor, layout: Layout, U: Tensor) -> Tensor:
    """Shape a matrix's flag, or a stack's, to multiply this rank's part U of it."""
    if layout.matrices == 1:
        return active[0]
    if U.ndim == 3:
        return active[:, None, None]
    return torch.cat([flag.expand(length) for flag, length in zip(active, layout.pieces, strict=True)])


def _norm(U: Tensor, taken: Tensor | None) -> Tensor:
    """Return the norm of what is taken of a stack U, without a copy where its parts are whole; of one matrix, all."""
    if taken is None or not taken.ndim:
        return torch.linalg.vector_norm(U)
    parts = torch.linalg.vector_norm(U, dim=(1, 2), keepdim=True) if taken.ndim == 3 else U
    return torch.linalg.vector_norm(parts * taken)
