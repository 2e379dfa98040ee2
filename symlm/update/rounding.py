"""The rounding of low-precision parameters."""

from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from symlm.distributed.tensors import local
from symlm.step.member import Member


def store(group: dict[str, Any], member: Member, finite: Tensor) -> None:
    """Round the fp32 master into a low-precision parameter; a parameter that is its own master needs nothing.

    Args:
        group: The parameter group; its step seeds stochastic rounding.
        member: The parameter; its wide copy is freed.
        finite: Whether the step happens, a bool of one element on the parameter's device.
    """
    p, master = member.parameter, member.master
    if master is p:
        return
    del member.master  # the wide copies of a whole model would be twice its size
    if "compensation" in member.state:
        rounded = master.to(p.dtype)
        local(member.state["compensation"]).copy_(master - rounded.float())
    else:
        rounded = stochastic_round(master, crc32(f"{group['step']} {member.name} {member.layout.interval[0]}".encode()))
    p.copy_(rounded if p.device.type == "cpu" else torch.where(finite, rounded, p))


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
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "stochastic rounding is seeded by the number of the step, which a CUDA graph would repeat; capture with "
            "rounding='compensated'"
        )
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = (x.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)
