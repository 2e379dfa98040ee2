"""The choice between Triton's kernels and torch's operations."""

from importlib.util import find_spec
from types import ModuleType

import torch

from symlm_kernels import reference

CHOICES = ("auto", "torch", "triton")
LARGEST_ROW = 8_192  # a fused row step holds a row in registers; rows of twice this length spill them
# The shorter side from which products and passes over stacks, and the row length from which fused row steps, were
# measured to make a step faster: the records of an H200 in kernels/benchmarks/results. Triton's products are faster in
# a graph, but a launch of theirs takes the host three times as long, and the whole step is not faster: "auto" takes
# torch's (None).
FASTER_FROM: dict[str, int | None] = {"products": None, "rows": 128, "stacks": 32}


def select_products(device: str, dtype: torch.dtype, side: int, kernels: str = "auto") -> ModuleType:
    """Return the module whose products a stack (b, m, n) with m <= n is multiplied with.

    Args:
        device: The type of the device, such as "cuda".
        dtype: The dtype of the stack.
        side: The shorter side m.
        kernels: "torch", "triton" or "auto".

    Returns:
        A module with `gram`, `symmetric_product` and `apply_polynomial`.

    Raises:
        ValueError: As `choose`.
        RuntimeError: As `choose`.
    """
    if choose(device, dtype, side, kernels) == "torch":
        return reference
    from symlm_kernels import products

    return products


def choose(device: str, dtype: torch.dtype, side: int, kernels: str = "auto", what: str = "products") -> str:
    """Choose between Triton and torch.

    Args:
        device: The type of the device, such as "cuda".
        dtype: The dtype of the matrices.
        side: The shorter side of the matrices for products and stacks, the length of a row for rows.
        kernels: "torch", "triton", or "auto" for Triton from the size on at which it was measured to be faster, if
            its kernels agree with torch on this device (`symlm_kernels.agreement`).
        what: "products", "rows" or "stacks", a key of `FASTER_FROM`.

    Returns:
        "torch" or "triton".

    Raises:
        ValueError: `kernels` is unknown.
        RuntimeError: `kernels` is "triton", and Triton cannot run here; the message has the reason.
    """
    if kernels not in CHOICES:
        raise ValueError(f"unknown kernels {kernels!r}; choose one of {CHOICES}")
    least = FASTER_FROM[what]
    unmeasured = device != "cuda" or least is None or side < least  # Triton's interpreter is for those who ask for it
    if kernels == "torch" or (kernels == "auto" and unmeasured):
        return "torch"
    reason = why_not_triton(device, dtype)
    if kernels == "triton" and reason:
        raise RuntimeError(f"Triton's {what} were asked for, but {reason}; use kernels='auto' or 'torch'")
    if reason or (kernels == "auto" and not agrees_here(what)):
        return "torch"
    return "triton"


def why_not_triton(device: str, dtype: torch.dtype) -> str | None:
    """Return why Triton's kernels cannot run here.

    Args:
        device: The type of the device.
        dtype: The dtype of the matrices.

    Returns:
        The reason, or None if they can run.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and not _interpreting():
        return f"the stack is on {device}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"they have no {dtype}"
    return None


def agrees_here(what: str) -> bool:
    """Return whether the kernels agree with their twins on the current GPU.

    Args:
        what: A key of `FASTER_FROM`.
    """
    from symlm_kernels.agreement import agrees

    return agrees(what, f"cuda:{torch.cuda.current_device()}")


def _interpreting() -> bool:
    """Return whether Triton runs its kernels in the interpreter, which needs no GPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)
