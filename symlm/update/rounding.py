"""How a low-precision parameter is stored."""

from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from symlm.distributed.tensors import local
from symlm.step.member import Member


def store(group: dict[str, Any], member: Member, finite: Tensor) -> None:
    """Write a low-precision parameter back from its fp32 master; nothing to do where the two are one."""
    p, master = member.parameter, member.master
    if master is p:
        return
    del member.master  # wide copies of a whole model at once would be twice its size
    if "compensation" in member.state:
        rounded = master.to(p.dtype)
        local(member.state["compensation"]).copy_(master - rounded.float())
    else:
        rounded = stochastic_round(master, crc32(f"{group['step']} {member.name} {member.layout.interval[0]}".encode()))
    p.copy_(rounded if p.device.type == "cpu" else torch.where(finite, rounded, p))


def stochastic_round(x: Tensor, seed: int) -> Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the mean exact.

    A bf16 is the upper half of an fp32, so 16 random bits are added below and the lower half is cut. Infinities and
    NaN pass unchanged. Shapes: any -> same. Source: Zamirai et al., arXiv 2010.06192, section 4.
    Raises: RuntimeError under CUDA graph capture, in whose replays the bits would be the same for ever.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("stochastic rounding draws by the number of the step; capture with rounding='compensated'")
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = (x.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)
