"""The dtype in which a polar iteration multiplies."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import Tensor


def fastest_dtype(device_type: str, gram: bool = False) -> torch.dtype:
    """Return the dtype in which this device multiplies fastest within the error bound of the iteration.

    On a CPU it is fp32, so that every CPU gives the same numbers: bf16 takes a hundred times as long where it is
    emulated, and was measured to take 1.5 to 3 times as long with AVX-512's bf16 instructions; AMX was not measured.

    Args:
        device_type: "cpu", "cuda", ...
        gram: Whether it is for the Gram iteration, which squares the condition number, so that bf16's eight bits are
            too few.

    Returns:
        fp32 on a CPU; on a GPU fp16 for the Gram iteration and bf16 otherwise.
    """
    if device_type == "cpu":
        return torch.float32
    return torch.float16 if gram else torch.bfloat16


def resolve_dtype(M: Tensor, compute_dtype: str | torch.dtype, gram: bool = False) -> torch.dtype:
    """Return the dtype in which M is multiplied.

    Args:
        M: The matrices; float64 stays float64 unless a `torch.dtype` is given.
        compute_dtype: "auto" for `fastest_dtype`, the name of a dtype, or a `torch.dtype`.
        gram: Whether it is for the Gram iteration, see `fastest_dtype`.

    Returns:
        The dtype.

    Raises:
        ValueError: The name is not a floating-point dtype of torch.
    """
    if isinstance(compute_dtype, torch.dtype):
        return compute_dtype
    if M.dtype == torch.float64:
        return torch.float64
    if compute_dtype == "auto":
        return fastest_dtype(M.device.type, gram)
    dtype = getattr(torch, compute_dtype, None) if isinstance(compute_dtype, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"compute_dtype is 'auto' or a floating-point dtype such as 'float32', got {compute_dtype!r}")
    return dtype


def refuse_gram_iteration(method: str, dtype: torch.dtype) -> None:
    """Refuse the Gram iteration in a dtype in which its singular values leave their bound.

    Args:
        method: The method of `symlm.polar.polar`.
        dtype: The dtype of its products.

    Raises:
        ValueError: The method is "gram_newton_schulz" and the dtype bf16.
    """
    if method == "gram_newton_schulz" and dtype == torch.bfloat16:
        raise ValueError(
            "gram_newton_schulz squares the condition, for which bfloat16's eight bits are too few: take "
            "compute_dtype='float16' or 'float32', or method 'newton_schulz' or 'auto'"
        )


@cache
def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32, or the dtype if it is wider.

    Args:
        dtype: A floating-point dtype.
    """
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32 inside this context, also where TF32 is allowed.

    TF32's ten bits are too few for a Gram matrix, whose condition number is squared.
    """
    matmul = torch.backends.cuda.matmul
    reduced = matmul.fp32_precision == "tf32"
    if reduced:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if reduced:
            matmul.fp32_precision = "tf32"


@contextmanager
def without_autocast() -> Iterator[None]:
    """Multiply in the dtypes of the operands, also inside a training loop's `torch.autocast`."""
    device = torch.accelerator.current_accelerator()
    kinds = {"cpu", device.type} if device else {"cpu"}
    with ExitStack() as stack:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
