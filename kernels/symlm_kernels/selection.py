"""Whose products a stack is multiplied with: Triton's, or torch's."""

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from symlm_kernels import reference

CHOICES = ("auto", "torch", "triton")
LARGEST_ROW = 8_192  # a fused row step holds a row in registers, and from twice this on they spill
# From which shorter side products, and from which length of a row fused row steps, were measured to be faster; none
# until a GPU's record says so (kernels/README.md), so "auto" is torch's everywhere.
FASTER_FROM: dict[str, int | None] = {"products": None, "rows": None}


def select_products(X: Tensor, kernels: str = "auto") -> ModuleType:
    """Return the module with `gram`, `symmetric_product` and `apply_polynomial` for this stack (b, m, n).

    Raises: as `choose`.
    """
    if choose(X.device.type, X.dtype, X.shape[-2], kernels) == "torch":
        return reference
    from symlm_kernels import products

    return products


def choose(device: str, dtype: torch.dtype, side: int, kernels: str = "auto", what: str = "products") -> str:
    """Return whose `what` serve, "torch" or "triton": products of matrices of this shorter side, or rows this long.

    Raises: ValueError for an unknown choice; RuntimeError, with the reason, where "triton" is asked for in vain.
    """
    if kernels not in CHOICES:
        raise ValueError(f"unknown kernels {kernels!r}; choose one of {CHOICES}")
    least = FASTER_FROM[what]
    if kernels == "torch" or (kernels == "auto" and (least is None or side < least)):
        return "torch"
    reason = why_not_triton(device, dtype)
    if kernels == "triton" and reason:
        raise RuntimeError(f"Triton's {what} were asked for, but {reason}; use kernels='auto' or 'torch'")
    return "torch" if reason else "triton"


def why_not_triton(device: str, dtype: torch.dtype) -> str | None:
    """Return why Triton's products cannot serve here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and not _interpreting():
        return f"the stack is on {device}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"they have no {dtype}"
    return None


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
