"""The momentum in 8 bits: each block of a row has one fp32 scale, and its entries are whole multiples of it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from symlm.distributed.layout import layout_of
from symlm.rules import get_rule

BLOCK = 64  # entries that share a scale, which then costs half a bit an entry
LEVELS = 127  # of each sign
SCALES = "momentum_scale"


def is_quantized(group: dict[str, Any]) -> bool:
    """Return whether a group's momenta are stored in 8 bits; torch's AdamW, of vectors, stays in fp32.

    Args:
        group: The parameter group.
    """
    return group["momentum_dtype"] == "int8" and not get_rule(group["rule"]).elementwise


def zero_momentum(name: str, p: Tensor, partitioned: bool) -> dict[str, Tensor]:
    """Make a momentum of zeros in 8 bits, sharded as the parameter is.

    Args:
        name: The parameter's name.
        p: The parameter, (..., n).
        partitioned: Whether p is a partition of ZeRO.

    Returns:
        `momentum`, int8, of p's shape, and `momentum_scale`, fp32, (..., ⌈n/64⌉).

    Raises:
        RuntimeError: p is sharded other than by whole rows.
    """
    rows_are_cut = layout_of(p).gathered or (p.ndim < 2 and hasattr(p, "placements"))
    if partitioned or rows_are_cut:
        raise RuntimeError(
            f"{name}: momentum_dtype='int8' stores blocks of whole rows, which ZeRO and tensor parallelism cut; "
            "train it with DDP or FSDP2, or set momentum_dtype='bfloat16'"
        )
    scales = p[..., : -(-p.shape[-1] // BLOCK)]
    return {"momentum": torch.zeros_like(p, dtype=torch.int8), SCALES: torch.zeros_like(scales, dtype=torch.float32)}


def quantized(M: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Round a momentum to 8 bits, up or down with the probability that makes the mean exact: `M ≈ s·q`, `|q| ≤ 127`.

    Args:
        M: The momentum, (..., n), fp32.
        generator: The source of the random numbers, on M's device.

    Returns:
        q, int8, (..., n), and `s = max|M|/127` of each block, (..., ⌈n/64⌉); zeros stay zeros.

    Source:
        Dettmers et al., arXiv 2110.02861, section 2 (blocks with a scale each); levels here are equally spaced.
    """
    blocks = _blocks(M)
    scales = blocks.abs().amax(-1, keepdim=True) / LEVELS
    q = blocks / torch.where(scales > 0, scales, 1.0)
    q.add_(torch.rand(q.shape, generator=generator, device=q.device)).floor_().clamp_(-LEVELS, LEVELS)
    return q.flatten(-2)[..., : M.shape[-1]].to(torch.int8), scales.squeeze(-1)


def dequantized(q: Tensor, scales: Tensor) -> Tensor:
    """Return the momentum `s·q`.

    Args:
        q: int8, (..., n).
        scales: s of each block, (..., ⌈n/64⌉), fp32.

    Returns:
        The momentum, (..., n), fp32.
    """
    return q * scales.repeat_interleave(BLOCK, -1)[..., : q.shape[-1]]


def _blocks(M: Tensor) -> Tensor:
    """Return the blocks of the rows, (..., ⌈n/64⌉, 64), the last one filled with zeros."""
    return pad(M, (0, -M.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
