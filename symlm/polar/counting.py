"""Counts of the floating-point operations of a polar factor, from which the cheaper iteration is chosen."""

import torch
from symlm_kernels.selection import choose
from torch import Tensor

from symlm.polar.newton_schulz import RESTART


def operations(m: int, n: int, steps: int, method: str, halves: bool = False) -> int:
    """Count the floating-point operations of the polar factor of one (m, n) matrix.

    With m <= n, Newton–Schulz takes `steps·(4m²n + 2m³)`. Gram Newton–Schulz takes 4m²n to form the Gram matrix and to
    apply the result, twice if it restarts, and 2m³ for each of at most four (m, m) products a step.

    Args:
        m: Rows of the matrix.
        n: Its columns.
        steps: Steps of the iteration.
        method: "newton_schulz", "gram_newton_schulz", or "auto" for the smaller count of the two.
        halves: Whether only one triangle of a symmetric product is computed, as by Triton's kernels: then m²n and m³
            for such a product in place of 2m²n and 2m³.

    Returns:
        The count of additions and multiplications.
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


def traffic(m: int, n: int, steps: int, gram: bool) -> tuple[int, int]:
    """Count the products of a polar factor of one (m, n) matrix, and the elements that they read and write.

    An operand counts once a product: `X Xᵀ` reads X and writes m², `βC + αAB` of one Gram matrix reads m² or 2m² and
    writes m², `aX + BX` reads m² and X and writes X. Newton–Schulz moves `steps·(3mn + 4m²)`; the Gram form at five
    steps `6mn + 41m²`.

    Args:
        m: Rows of the matrix.
        n: Its columns.
        steps: Steps of the iteration.
        gram: Whether it is Gram Newton–Schulz.

    Returns:
        The number of products, and of elements.
    """
    m, n = min(m, n), max(m, n)
    if not gram:
        return 3 * steps, steps * (3 * m * n + 4 * m * m)
    launches, squares, times = 0, 0, 1 + (steps > RESTART)
    for k in range(steps):
        first, last = k in (0, RESTART), k in (RESTART - 1, steps - 1)
        launches += 1 + (not first) + 2 * (not last)
        squares += 2 + 3 * (not first) + 6 * (not last)
    return launches + 2 * times, (squares + 2 * times) * m * m + 3 * times * m * n


def gram_is_cheaper(X: Tensor, dtype: torch.dtype, steps: int, kernels: str) -> bool:
    """Decide whether the Gram iteration on X takes fewer operations, in a dtype in which its error bound holds.

    Args:
        X: The wide orientation of the matrices, (..., m, n).
        dtype: The dtype of the iteration; in bf16 the bound of the Gram iteration does not hold.
        steps: Steps of the iteration.
        kernels: "torch", "triton" or "auto", see `symlm.polar.polar`.

    Returns:
        True if the Gram iteration is cheaper; False also for tall X and for bf16.
    """
    m, n = X.shape[-2:]
    if m > n or dtype == torch.bfloat16:
        return False
    halves = choose(X.device.type, dtype, m, kernels) == "triton"
    return operations(m, n, steps, "gram_newton_schulz", halves) < operations(m, n, steps, "newton_schulz", halves)
