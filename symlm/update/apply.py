"""Phase 3: from a direction to the weight, under the constraint of its route."""

from typing import Any

import torch
from torch import Tensor

from symlm.distributed.layout import Layout
from symlm.sizes.constraints import effective_decay, get_constraint
from symlm.step.directions import multiplies_norm
from symlm.step.member import Member
from symlm.step.momentum import masked
from symlm.step.rows.blocks import Block
from symlm.update.constrained import factors, nuclear_norms
from symlm.update.size import Change
from symlm.update.spectral_decay import shrink


def apply(group: dict[str, Any], members: list[Member], block: Block, updates: list[Tensor], finite: Tensor) -> Change:
    """Update a block of weights by `step_by`, then decay their singular values under `spectral_decay`.

    Args:
        group: The parameter group.
        members: The parameters of the block; their masters are updated, in fp32 or wider.
        block: The block of their parts; all of them under `spectral_decay`.
        updates: `s·U` of each member's block.
        finite: Whether the step happens, a bool of one element.

    Returns:
        The size of the change without the decay.
    """
    lr = group["lr"] if members[0].parameter.device.type == "cpu" else group["lr"] * finite
    change = step_by(group, members, block, updates, finite, lr)
    if get_constraint(group["constraint"]).spectral:
        shrink(group, members, lr)
    return change


def step_by(
    group: dict[str, Any],
    members: list[Member],
    block: Block,
    updates: list[Tensor],
    finite: Tensor,
    lr: Any,
) -> Change:
    """Update a block of weights, `W <- (1 − ηλ)W − η·s·U` under `decay`; see `symlm.sizes.constraints` for the others.

    With a momentum of directions, that takes the place of U.

    Args:
        group: The parameter group.
        members: The parameters of the block; their masters are updated, in fp32 or wider.
        block: The block of their parts.
        updates: `s·U` of each member's block.
        finite: Whether the step happens, a bool of one element.
        lr: The rate η, 0 on a device whose step does not happen.

    Returns:
        The size of the change without the decay.
    """
    if group["momentum_of"] == "directions":
        momenta = [block.of(member.momentum) for member in members]
        norms_of = nuclear_norms(group, members, updates) if multiplies_norm(group) else None
        pairs = zip(momenta, updates, strict=True)
        updates = [M.lerp_(masked(U, M, finite), 1 - group["momentum"]) for M, U in pairs]
        if norms_of:  # of a gradient that is not finite ν is not either, and no rate of zero would undo it
            updates = [torch.where(finite, nu, 0.0) * M for nu, M in zip(norms_of, updates, strict=True)]
    if get_constraint(group["constraint"]).measures:
        return _apply_measured(group, members, updates, lr)
    weights = [block.of(member.master) for member in members]
    _decay(group, weights, updates, lr)
    if not isinstance(lr, Tensor) and all(member.active is None for member in members):
        torch._foreach_sub_(weights, updates, alpha=lr)
        return Change(lr, torch._foreach_norm(updates))
    norms, steps = [], []
    for member, W, U in zip(members, weights, updates, strict=True):
        active = None if member.active is None else _spread(member.active, member.layout, U)
        norms.append(_norm(U, active))
        steps.append(finite if active is None or active.ndim else active)
        if active is None and not isinstance(lr, Tensor):
            W.sub_(U, alpha=lr)
        elif active is None or isinstance(group["lr"], Tensor):
            W.addcmul_(U, (lr if active is None else lr * active).to(U.dtype), value=-1)
        else:
            W.addcmul_(U, active.to(U.dtype), value=-group["lr"])
    sizes = torch.stack(norms)
    if any(member.active is not None for member in members):  # one launch for all members
        sizes = sizes * torch.stack([step.to(sizes.dtype) for step in steps])
    return Change(1.0, (lr * sizes,))


def _decay(group: dict[str, Any], weights: list[Tensor], updates: list[Tensor], lr: float | Tensor) -> None:
    """Decay blocks of weights, in place: all entries, or those that the step does not make larger."""
    constraint = get_constraint(group["constraint"])
    value = effective_decay(group)
    rate = lr * value
    if group["weight_decay"] and constraint.cautious:
        for W, U in zip(weights, updates, strict=True):
            W.mul_(1 - rate * (U * W >= 0).to(W.dtype))  # of a bool torch makes fp32
    elif value and constraint.decays:
        torch._foreach_mul_(weights, 1 - rate)


def _apply_measured(group: dict[str, Any], members: list[Member], updates: list[Tensor], lr: float | Tensor) -> Change:
    """Update weights under a constraint that measures them, `W <- κW − γU`; return the size of `γU`."""
    norms = []
    for member, U, (keep, move) in zip(members, updates, factors(group, members, updates, lr), strict=True):
        W = member.master
        if member.active is not None:
            active = _spread(member.active, member.layout, U)
            keep, move = torch.where(active > 0, keep, 1.0), move * active
        change = U * move
        norms.append(torch.linalg.vector_norm(change))
        W.mul_(keep).sub_(change)
        if get_constraint(group["constraint"]).cautious:
            _decay(group, [W], [U], lr)
    return Change(1.0, norms)


def _spread(active: Tensor, layout: Layout, U: Tensor) -> Tensor:
    """Return the flags of a matrix or of a stack, in a shape that multiplies this rank's part U of it."""
    if layout.matrices == 1:
        return active[0]
    if U.ndim == 3:
        return active[:, None, None]
    return torch.cat([flag.expand(length) for flag, length in zip(active, layout.pieces, strict=True)])


def _norm(U: Tensor, active: Tensor | None) -> Tensor:
    """Return the norm of the active matrices of a stack U; the norm of all of U for one matrix."""
    if active is None or not active.ndim:
        return torch.linalg.vector_norm(U)
    parts = torch.linalg.vector_norm(U, dim=(1, 2), keepdim=True) if active.ndim == 3 else U  # whole: without a copy
    return torch.linalg.vector_norm(parts * active)
