"""Elementwise groups: torch's fused AdamW."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from symlm.distributed.tensors import local
from symlm.routing.costs import BATCH_ELEMENTS
from symlm.sizes.constraints import effective_decay
from symlm.step.member import Member
from symlm.update.rounding import store


def adamw_step(group: dict[str, Any], members: list[Member], finite: Tensor) -> None:
    """Run torch's fused AdamW on an elementwise group.

    Args:
        group: The parameter group.
        members: Its parameters.
        finite: Whether the step happens, a bool of one element; on a device it masks the step, on a CPU it is true.
    """
    wide = [member for member in members if member.parameter.numel() and member.parameter.dtype == member.dtype]
    narrow = [member for member in members if member.parameter.numel() and member.parameter.dtype != member.dtype]
    for some in ([wide] if wide else []) + list(_chunks(narrow)):
        _adamw_together(group, some, finite)


def _chunks(members: list[Member]) -> Iterator[list[Member]]:
    """Yield members, together at most BATCH_ELEMENTS or one alone, since their wide copies are allocated together."""
    chunk: list[Member] = []
    elements = 0
    for member in members:
        if chunk and elements + member.parameter.numel() > BATCH_ELEMENTS:
            yield chunk
            chunk, elements = [], 0
        chunk.append(member)
        elements += member.parameter.numel()
    if chunk:
        yield chunk


def _adamw_together(group: dict[str, Any], members: list[Member], finite: Tensor) -> None:
    """Run one fused AdamW call on these members, and store the low-precision ones."""
    on_cpu = members[0].master.device.type == "cpu"
    # The fused kernel reads and writes in memory order, past the end of what is not dense: that is stepped in a copy.
    weights = [member.master if _is_dense(member.master) else member.master.contiguous() for member in members]
    adamw(
        weights,
        [_strided_as(member.gradient, W) for member, W in zip(members, weights, strict=True)],
        [local(member.state["exp_avg"]) for member in members],
        [local(member.state["exp_avg_sq"]) for member in members],
        [],
        [member.state["step"] for member in members],
        fused=True,
        found_inf=None if on_cpu else (~finite).float(),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=float(effective_decay(group)) * (group["constraint"] != "none"),
        eps=group["eps"],
        maximize=False,
    )
    for member, W in zip(members, weights, strict=True):
        if W is not member.master:
            member.master.copy_(W)
        store(group, member, finite.to(member.parameter.device))


def _is_dense(W: Tensor) -> bool:
    """Tell whether a tensor's entries fill its memory without gaps or overlaps, in any order of its axes."""
    if W.is_contiguous():
        return True
    expected = 1
    for size, stride in sorted(((n, s) for n, s in zip(W.shape, W.stride(), strict=True) if n > 1), key=lambda x: x[1]):
        if stride != expected:
            return False
        expected *= size
    return True


def _strided_as(gradient: Tensor, master: Tensor) -> Tensor:
    """Return a gradient in the dtype and strides of its weight: torch's fused AdamW reads both in memory order."""
    if gradient.stride() == master.stride():
        return gradient.to(master.dtype)
    return torch.empty_like(master).copy_(gradient)


def adamw_update(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    """Compute AdamW's last update from its state, `η·m̂/(√v̂ + ε)` without the decay.

    Args:
        group: The settings `lr`, `betas` and `eps` of that step.
        state: The parameter's state after it.

    Returns:
        The update of this rank's part.
    """
    t = state["step"].clamp(min=1.0)
    first = local(state["exp_avg"]) / (1 - group["betas"][0] ** t)
    second = local(state["exp_avg_sq"]) / (1 - group["betas"][1] ** t)
    return group["lr"] * first / (second.sqrt() + group["eps"])
