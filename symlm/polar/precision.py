"""The dtype that a polar iteration multiplies in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def fastest_dtype(device_type: str, gram: bool = False) -> torch.dtype:
    """Return the dtype in which this device multiplies fastest within the error bound of the iteration.

    bf16 on a GPU, and fp32 on a CPU, any of which then gives the same numbers: bf16 takes a hundred times as long where
    it is emulated, and was measured to take 1.5 to 3 times as long with AVX-512's own; nobody has measured AMX.
    gram: of the Gram iteration, which squares the condition, so that bf16's eight bits are too few: fp16 on a GPU.
    """
    if device_type == "cpu":
        return torch.float32
    return torch.float16 if gram else torch.bfloat16


def resolve_dtype(M: Tensor, asked: str | torch.dtype, gram: bool = False) -> torch.dtype:
    """Return the dtype in which M is multiplied.  asked: "auto" (`fastest_dtype`), a name or a `torch.dtype`.

    float64 stays what it is unless a `torch.dtype` is given. Raises: ValueError for a name that is no floating dtype.
    """
    if isinstance(asked, torch.dtype):
        return asked
    if M.dtype == torch.float64:
        return torch.float64
    if asked == "auto":
        return fastest_dtype(M.device.type, gram)
    dtype = getattr(torch, asked, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"compute_dtype is 'auto' or a floating-point dtype of torch, got {asked!r}")
    return dtype


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, also where TF32 is allowed: its ten bits are too few for a squared condition."""
    matmul = torch.backends.cuda.matmul
    reduced = matmul.fp32_precision == "tf32"
    if reduced:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if reduced:
            matmul.fp32_precision = "tf32"
