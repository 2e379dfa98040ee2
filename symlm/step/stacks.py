"""The step of polar factors in Triton passes around the products, where kernels exist and are chosen."""

from typing import Any

import torch
from symlm_kernels.selection import choose
from torch import Tensor

from symlm.polar.factor import choose_iteration
from symlm.rules import get_rule
from symlm.step.directions import POLAR_OPTIONS, scale_of
from symlm.step.member import Member
from symlm.views.matrix_view import MatrixView


def serves(group: dict[str, Any], batch: list[Member], view: MatrixView) -> bool:
    """Return whether the passes can run this group's step on a batch of whole parameters.

    They need matrices of consecutive entries, and tensors that are contiguous and of one dtype.

    Args:
        group: The parameter group.
        batch: Members of one layout, dtype and device.
        view: The group's view.

    Returns:
        Whether `step` can be called.

    Raises:
        ValueError: The group's `kernels` is unknown.
        RuntimeError: The group's `kernels` is "triton", and Triton cannot run here.
    """
    rule = get_rule(group["rule"])
    if not rule.fused or not rule.spectral or group["momentum_of"] != "gradients" or group["constraint"] != "decay":
        return False
    if group["polar_method"] not in ("auto", "newton_schulz", "gram_newton_schulz"):
        return False
    parameter, shape = batch[0].parameter, batch[0].layout.shape
    side = min(view.shape(shape)[1:])
    if choose(parameter.device.type, torch.float32, side, group["kernels"], "stacks") != "triton":
        return False
    if batch[0].dtype != torch.float32 or view.consecutive(shape) is None:
        return False
    stored = ((member.parameter, member.gradient, member.state["momentum"]) for member in batch)
    for tensors in zip(*stored, strict=True):
        if any(T.dtype != tensors[0].dtype or not T.is_contiguous() for T in tensors):
            return False
    return True


def step(group: dict[str, Any], batch: list[Member], view: MatrixView, finite: Tensor) -> Tensor:
    """Compute `M <- βM + (1−β)G`, `W <- (1 − ηλ)W − η·s·polar(X)`, X the rule's input, in place.

    Args:
        group: The parameter group.
        batch: Members of one layout; their masters are updated.
        view: The group's view.
        finite: Whether the step happens, a bool of one element; nothing changes if not.

    Returns:
        Parts of `Σ(ηsU)²`.
    """
    from symlm_kernels import stacks

    shape, momenta = batch[0].layout.shape, [member.momentum for member in batch]
    b, m, n = view.shape(shape)
    like = momenta[0].float() if momenta[0].dtype != torch.float32 else momenta[0]
    like = like.new_empty(()).expand(b, min(m, n), max(m, n))
    iteration = choose_iteration(like, *(group[key] for key in POLAR_OPTIONS))
    happens = finite.float()
    gradients, settings = [member.gradient for member in batch], (b, iteration.bound, group["nesterov"])
    X = stacks.stack_inputs(gradients, momenta, group["momentum"], happens, *settings, iteration.dtype)
    S = view.to_matrices(X)
    U = iteration(S.mT).mT if m > n else iteration(S)
    U = view.from_matrices(U, tuple(X.shape)).contiguous()
    active = torch.stack([happens[None] if member.active is None else member.active for member in batch])
    decay = group["weight_decay"] * group["weight_decay_multiplier"]
    weights = [member.master for member in batch]
    return stacks.stack_step(U, weights, active, (group["lr"] * happens).float(), scale_of(group, view, shape), decay)
