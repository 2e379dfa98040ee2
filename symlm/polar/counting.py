"""The floating-point operations of a polar factor, counted."""

import torch
from symlm_kernels.selection import choose
from torch import Tensor

from symlm.polar.newton_schulz import RESTART


def operations(m: int, n: int, steps: int, method: str, halves: bool = False) -> int:
    """Count the floating-point operations of one (m, n) polar factor; `auto` takes the smaller count.

    With m <= n: Newton–Schulz `steps·(4m²n + 2m³)`; Gram Newton–Schulz 2m²n to form, restart (two) and apply,
    and at most four m × m products a step. halves: only one triangle of a symmetric result is computed, as Triton's
    products do: `steps·(3m²n + m³)`, and 6m²n with m³ a product.
    """
    m, n = min(m, n), max(m, n)
    triangle = 1 if halves else 2
    standard = steps * ((triangle + 2) * m * m * n + triangle * m**3)
    if method == "newton_schulz":
        return standard
    products = 0
    for k in range(steps):
        first, last = k in (0, RESTART), k in (RESTART - 1, steps - 1)
        products += 1 + (not first) + 2 * (not last)
    times = 1 + (steps > RESTART)
    gram_form = times * (triangle + 2) * m * m * n + products * triangle * m**3
    return gram_form if method == "gram_newton_schulz" else min(standard, gram_form)


def gram_is_cheaper(X: Tensor, dtype: torch.dtype, steps: int, kernels: str) -> bool:
    """Tell whether the Gram iteration on X, in a dtype in which it keeps its bound, takes fewer operations."""
    m, n = X.shape[-2:]
    if m > n or dtype == torch.bfloat16:
        return False
    halves = choose(X.device.type, dtype, m, kernels) == "triton"
    return operations(m, n, steps, "gram_newton_schulz", halves) < operations(m, n, steps, "newton_schulz", halves)
