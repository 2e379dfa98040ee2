"""The rounding of low-precision parameters and momenta."""

from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from symlm.distributed.tensors import local
from symlm.state.quantization import SCALES, quantized
from symlm.step.member import Member


def store(group: dict[str, Any], member: Member, finite: Tensor) -> None:
    """Round the fp32 master into a low-precision parameter, and the momentum into 8 bits; what is wide needs nothing.

    Args:
        group: The parameter group; its step seeds stochastic rounding.
        member: The parameter; its wide copies are freed.
        finite: Whether the step happens, a bool of one element on the parameter's device.
    """
    if SCALES in member.state:
        _store_momentum(group, member, finite)
    p, master = member.parameter, member.master
    if master is p:
        return
    del member.master  # the wide copies of a whole model would be twice its size
    if "compensation" in member.state:
        rounded = master.to(p.dtype)
        local(member.state["compensation"]).copy_(master - rounded.float())
    else:
        rounded = stochastic_round(master, _seed(group, member), member.clock)
    p.copy_(rounded if p.device.type == "cpu" else torch.where(finite, rounded, p))


def _store_momentum(group: dict[str, Any], member: Member, finite: Tensor) -> None:
    """Round this rank's part of the momentum into 8 bits."""
    M = member.momentum
    del member.momentum
    parts = quantized(M, seeded(M, _seed(group, member, " momentum")))
    for key, part in zip(("momentum", SCALES), parts, strict=True):
        stored = local(member.state[key])
        stored.copy_(part if M.device.type == "cpu" else torch.where(finite, part, stored))


def _seed(group: dict[str, Any], member: Member, what: str = "") -> int:
    """Return a seed of this step, of this rank's part of a parameter, and of what is rounded."""
    return crc32(f"{group['step']} {member.name} {member.layout.interval[0]}{what}".encode())


def seeded(x: Tensor, seed: int) -> torch.Generator:
    """Return a generator on the device of x.

    Args:
        x: The tensor that is rounded.
        seed: The seed.

    Raises:
        RuntimeError: A CUDA graph is being captured; every replay would draw the same bits.
    """
    if is_captured(x):
        raise RuntimeError(
            "this stochastic rounding is seeded by the number of the step, which a CUDA graph would repeat; capture "
            "with rounding='compensated' and a momentum_dtype other than 'int8'"
        )
    return torch.Generator(device=x.device).manual_seed(seed)


def is_captured(x: Tensor) -> bool:
    """Return whether what is done with x is captured in a CUDA graph.

    Args:
        x: A tensor.
    """
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def set_clocks(members: Iterable[Member], states: Mapping[Tensor, dict[str, Any]], finite: Tensor) -> None:
    """Give the members of a captured step a clock: the count of steps that some state on their device has.

    Args:
        members: The members; one on a device where no rule counts steps gets none.
        states: The optimizer's state.
        finite: Whether the step happens, which a captured step has on its device.
    """
    if not is_captured(finite):
        return
    clocks = {state["step"].device: state["step"] for state in states.values() if "step" in state}
    for member in members:
        if is_captured(member.parameter):
            member.clock = clocks.get(member.parameter.device)


def bits_at(x: Tensor, seed: int, clock: Tensor) -> Tensor:
    """Return 16 random bits for each entry, a function of its place, of a seed and of a count on the device.

    Args:
        x: A tensor of the shape and device wanted.
        seed: A seed of 32 bits, fixed when a graph is captured.
        clock: The count of steps, one element, which a replay moves on.

    Returns:
        int32, same shape, in [0, 65536).

    Source:
        The finalizer of MurmurHash3 (Appleby 2008), applied to the place, and again with seed and count added.
    """
    signed = (seed & 0xFFFFFFFF) - 0x80000000
    places = torch.arange(x.numel(), device=x.device).to(torch.int32)
    key = _mixed(_mixed(clock.to(torch.int32).view(1)) ^ signed)  # of one seed and count alone, as a sum would not be
    return (_mixed(_mixed(places) ^ key) & 0xFFFF).view(x.shape)


def _mixed(h: Tensor) -> Tensor:
    """Return 32 bits of which each depends on all bits of h; products of int32 wrap around."""
    h = (h ^ (h >> 16 & 0xFFFF)) * -2048144789
    h = (h ^ (h >> 13 & 0x7FFFF)) * -1028477387
    return h ^ (h >> 16 & 0xFFFF)


def stochastic_round(x: Tensor, seed: int, clock: Tensor | None = None) -> Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the mean exact.

    A bf16 number is the upper half of an fp32 number: 16 random bits are added to the lower half, which is then
    dropped.

    Args:
        x: fp32, any shape.
        seed: The seed of the random bits.
        clock: A count on the device that the bits depend on besides, in a captured step.

    Returns:
        bf16, same shape; infinities and NaN are unchanged.

    Raises:
        RuntimeError: A CUDA graph is being captured without a clock; every replay would draw the same bits.

    Source:
        Zamirai et al., arXiv 2010.06192, section 4.
    """
    if clock is None:
        generator = seeded(x, seed)
        noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    else:
        noise = bits_at(x, seed, clock)
    bits = (x.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)
