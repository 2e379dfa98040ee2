"""What a step asks of its gradients before anything moves: are all of them finite, and which matrices got none?

A direction that forgets its momentum's size would go on at full length for hundreds of steps after the last gradient
of an expert that no token reaches, or of a tower that no batch uses. Such a matrix may_skip until there is one.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.collectives import anywhere
from symlm.rules import get_rule
from symlm.step.member import Member


def examine(members: Sequence[Member], skippable: Sequence[bool], common: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Return whether all gradients are finite on all ranks, and tell members which of their matrices got any.

    skippable: of each member, whether its matrices get no update without a gradient; their `active` is set, on a CPU
    only if one is skipped. common: names and shapes of those that several ranks hold, the same on all, with a gradient here or not. One
    pass over the gradients and one exchange of flags, no wait for a device. All ranks call this together.
    """
    device = members[0].gradient.device
    pieces = [_matrices_of(member) for member in members]
    sizes = _largest([piece for own in pieces for piece in own], device)
    counts = [len(own) for own in pieces]
    places, total = {}, 1
    for name, shape in common.items():
        places[name], total = total, total + (shape[0] if len(shape) == 3 else 1)
    flags = torch.zeros(total, dtype=torch.bool, device=device)
    flags[0] = ~sizes.isfinite().all()
    for member, found in zip(members, (sizes != 0).split(counts), strict=True):
        if member.name in places and len(found):
            flags[_here(member, places[member.name])] = found
    flags = anywhere(flags)
    finite = ~flags[0]
    shared, own = ((x & finite).float() for x in (flags, sizes != 0))
    for member, may_skip, found in zip(members, skippable, own.split(counts), strict=True):
        active = shared[_here(member, places[member.name])] if member.name in places else found
        if may_skip and not (device.type == "cpu" and active.all()):
            member.active = active.to(member.parameter.device)
    return finite


def _here(member: Member, place: int) -> slice:
    """Return which flags are those of this rank's part; of a parameter that is one matrix the only one."""
    layout = member.layout
    if layout.matrices == 1:
        return slice(place, place + 1)
    first = place + layout.interval[0] * layout.matrices // prod(layout.shape)
    return slice(first, first + len(layout.pieces))


def _matrices_of(member: Member) -> list[Tensor]:
    """Cut this rank's part of a gradient where matrices begin; nothing of an empty part."""
    G = member.gradient
    if member.layout.matrices == 1:
        return [G] if G.numel() else []
    return list(G.reshape(-1).split(member.layout.pieces))


def _largest(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return each tensor's largest absolute entry, not finite where one is not: one pass over them, few launches."""
    if not tensors:
        return torch.zeros(0, device=device)
    if device.type == "cpu":  # where norms are ten times slower
        extremes = [torch.maximum(high, -low) for low, high in map(torch.aminmax, tensors)]
    else:
        extremes = list(torch._foreach_norm(tensors, torch.inf))
    return torch.stack([extreme.to(device) for extreme in extremes])


def skips_without_gradient(group: dict[str, Any]) -> bool:
    """Tell whether a group's matrices get no update without a gradient: their direction forgets the momentum's size."""
    rule = get_rule(group["rule"])
    return rule.row_map is None and not rule.elementwise and group["momentum_of"] == "gradients"
