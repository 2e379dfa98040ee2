"""The checks of the gradients before a step: whether all are finite, and which matrices have no gradient.

A direction of degree 0 does not depend on its momentum's size. An expert that no token reaches, or a tower that no
batch uses, would be updated at full length for hundreds of steps after its last gradient. Such a matrix is skipped
until it has a gradient.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.collectives import anywhere
from symlm.rules import get_rule
from symlm.step.member import Member

# Entries from here on count as not finite: sums of a million of them, as over a vocabulary, would not be.
LARGEST = 2.0**107


def examine(pairs: Sequence[tuple[dict[str, Any], Member]], common: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Check on all ranks whether all gradients are finite, and mark the matrices that have a gradient.

    It takes one pass over the gradients and one exchange of flags, and does not wait for a device. All ranks call this
    together.

    Args:
        pairs: Groups and members of the step. Where matrices get no update without a gradient, `active` of the member
            is set, on a CPU only if one of them is skipped.
        common: Names and shapes of the skippable parameters that several ranks store, the same on all ranks, with a
            gradient on this rank or not.

    Returns:
        A bool of one element: all gradients are finite on all ranks.
    """
    members = [member for _, member in pairs]
    device, on_cpu = members[0].gradient.device, members[0].gradient.device.type == "cpu"
    pieces = [_matrices_of(member) for member in members]
    sizes = _sizes([piece for part in pieces for piece in part], device)
    if on_cpu and not common and all(0 < size < LARGEST for size in sizes.tolist()):
        return ~anywhere(torch.zeros((), dtype=torch.bool))
    counts = [len(part) for part in pieces]
    places, total = {}, 1
    for name, shape in common.items():
        places[name], total = total, total + (shape[0] if len(shape) == 3 else 1)
    flags = torch.zeros(total, dtype=torch.bool, device=device)
    flags[0] = ~(sizes < LARGEST).all()
    for member, nonzero in zip(members, (sizes != 0).split(counts), strict=True):
        if member.name in places and len(nonzero):
            flags[_flags_of(member, places[member.name])] = nonzero
    flags = anywhere(flags)
    finite = ~flags[0]
    shared, local = ((x & finite).float() for x in (flags, sizes != 0))
    if on_cpu and bool(local.all() & shared[1:].all()):
        return finite
    may_skip = {id(group): skips_without_gradient(group) for group, _ in pairs}
    for (group, member), nonzero in zip(pairs, local.split(counts), strict=True):
        active = shared[_flags_of(member, places[member.name])] if member.name in places else nonzero
        if may_skip[id(group)] and not (on_cpu and active.all()):
            member.active = active.to(member.parameter.device)
    return finite


def _flags_of(member: Member, place: int) -> slice:
    """Return the places of the flags of this rank's part, where the parameter's flags begin at `place`."""
    layout = member.layout
    if layout.matrices == 1:
        return slice(place, place + 1)
    first = place + layout.interval[0] * layout.matrices // prod(layout.shape)
    return slice(first, first + len(layout.pieces))


def _matrices_of(member: Member) -> list[Tensor]:
    """Split this rank's part of a gradient into its matrices; an empty part has none."""
    G = member.gradient
    if member.layout.matrices == 1:
        return [G] if G.numel() else []
    return list(G.reshape(-1).split(member.layout.pieces))


def _sizes(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return a size of each tensor: zero if all entries are, not finite if any entry is not; one pass, few launches."""
    if not tensors:
        return torch.zeros(0, device=device)
    if device.type != "cpu":
        return torch.stack([size.to(device) for size in torch._foreach_norm(tensors, torch.inf)])
    # Euclidean norms are eight times faster there, but squares overflow and vanish: then the entries are looked at.
    sizes = torch.stack([size.float() for size in torch._foreach_norm(tensors)])
    for k in (k for k, size in enumerate(sizes.tolist()) if not 0 < size < LARGEST):
        low, high = torch.aminmax(tensors[k])
        sizes[k] = torch.maximum(high, -low)
    return sizes


def refuse_nonfinite(members: Sequence[Member], finite: Tensor) -> None:
    """Raise where a step must not happen.

    Args:
        members: The members of the step.
        finite: Whether all gradients are finite on all ranks.

    Raises:
        FloatingPointError: They are not; names this rank's parameters whose gradients are not.
    """
    if not finite:
        bad = [member.name for member in members if not (member.gradient.abs() < LARGEST).all()]
        raise FloatingPointError(f"non-finite gradients in {bad or 'other ranks'}; nothing was updated")


def skips_without_gradient(group: dict[str, Any]) -> bool:
    """Return whether a group's matrices are skipped without a gradient, by their direction's degree 0."""
    rule = get_rule(group["rule"])
    return rule.row_map is None and not rule.elementwise and group["momentum_of"] == "gradients"
