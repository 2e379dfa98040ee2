"""The rounding of low-precision parameters and momenta."""

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
        rounded = stochastic_round(master, _seed(group, member))
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
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "stochastic rounding is seeded by the number of the step, which a CUDA graph would repeat; capture with "
            "rounding='compensated' and a momentum_dtype other than 'int8'"
        )
    return torch.Generator(device=x.device).manual_seed(seed)


def stochastic_round(x: Tensor, seed: int) -> Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the mean exact.

    A bf16 number is the upper half of an fp32 number: 16 random bits are added to the lower half, which is then
    dropped.

    Args:
        x: fp32, any shape.
        seed: The seed of the random bits.

    Returns:
        bf16, same shape; infinities and NaN are unchanged.

    Raises:
        RuntimeError: A CUDA graph is being captured; every replay would draw the same bits.

    Source:
        Zamirai et al., arXiv 2010.06192, section 4.
    """
    generator = seeded(x, seed)
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = (x.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)
