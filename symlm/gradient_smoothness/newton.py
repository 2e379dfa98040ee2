"""Newton's method regularized by the size of the gradient over one radius, which adapts."""

from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from symlm.gradient_smoothness.hessians import Function, Hessian, RankOne, exact

RETRIES, SMALLEST = 40, 1e-9  # of the source


class NotPositive(ValueError):
    """`H + λB` is not positive definite; a smaller γ, which is a larger λ, may make it so."""


class Metric:
    """Measure vectors by `|h|² = ⟨h, Bh⟩` and gradients by `|g|_*² = ⟨g, B⁻¹g⟩`.

    Args:
        B: Symmetric and positive definite, (n, n); None is the identity.

    Raises:
        ValueError: B is not symmetric and positive definite.
    """

    def __init__(self, B: Tensor | None) -> None:
        self.B, self.L = B, None if B is None or not torch.allclose(B, B.mT) else _factored(B)
        if B is not None and self.L is None:
            raise ValueError("the metric B is not symmetric and positive definite")

    def raised(self, g: Tensor) -> Tensor:
        """Return `B⁻¹g`, (n,)."""
        return g if self.L is None else torch.cholesky_solve(g[:, None], self.L)[:, 0]

    def dual_norm(self, g: Tensor) -> Tensor:
        """Return `|g|_*`, a scalar."""
        return (g @ self.raised(g)).clamp(min=0).sqrt()

    def regularized(self, H: Tensor, amount: Tensor) -> Tensor:
        """Return `H + λB`, (n, n)."""
        return H + amount * (torch.eye(len(H), dtype=H.dtype, device=H.device) if self.B is None else self.B)


def _refuse_other_than_symmetric(what: str, A: Tensor, n: int) -> None:
    """Raise ValueError for a matrix that is not a symmetric (n, n), beyond rounding; one with NaN is not refused."""
    if A.shape != (n, n):
        raise ValueError(f"the {what} must be a matrix of {n} rows and columns, as the gradient has, got {[*A.shape]}")
    if (A - A.mT).norm() > 1e-3 * A.norm():
        raise ValueError(f"the {what} is not symmetric: H + λB is factored as L Lᵀ; give (H + Hᵀ)/2")


def _factored(A: Tensor) -> Tensor | None:
    """Return the Cholesky factor, None if there is none."""
    L, info = torch.linalg.cholesky_ex(A)
    return None if info else L


def newton_step(g: Tensor, H: Tensor | RankOne, gamma: float, metric: Metric | None = None) -> tuple[Tensor, Tensor]:
    """Compute the step `−(H + λB)⁻¹g` with `λ = |g|_*/γ`; of `H = c v vᵀ` by the formula of Sherman and Morrison.

    Args:
        g: The gradient, (n,).
        H: The Hessian, or what is known of it, (n, n).
        gamma: The radius γ, positive.
        metric: The norms; None is Euclid's.

    Returns:
        The step, and λ.

    Raises:
        ValueError: γ is not positive and finite, H is not a symmetric (n, n), or `H + λB` is not positive definite.
    """
    metric = metric or Metric(None)
    if not (isinstance(gamma, int | float) and 0 < gamma < inf):
        raise ValueError(f"the radius gamma must be positive and finite, got {gamma!r}")
    if not isinstance(H, RankOne):
        _refuse_other_than_symmetric("Hessian", H, len(g))
    amount = metric.dual_norm(g) / gamma
    if isinstance(H, RankOne):
        direct, v = metric.raised(g) / amount, metric.raised(H.v) / amount
        bottom = 1 + H.c * (H.v @ v)
        if bottom > 0:
            return -(direct - H.c * (H.v @ direct) / bottom * v), amount
    elif (L := _factored(metric.regularized(H, amount))) is not None:
        return -torch.cholesky_solve(g[:, None], L)[:, 0], amount
    raise NotPositive(f"the Hessian plus {amount:g} B is not positive definite: take a smaller gamma than {gamma:g}")


@dataclass(frozen=True)
class Step:
    """Record one iteration.

    Args:
        value: f before it.
        gradient: `|∇f|_*` before it.
        gamma: The radius of the step that was taken.
    """

    value: float
    gradient: float
    gamma: float


@dataclass(frozen=True)
class Minimum:
    """Report a minimization.

    Args:
        x: The last point.
        value: f there.
        reason: Why it ended: "target", "gradient", "steps", or "stuck", where no radius gave the decrease.
        solves: How many steps were computed, those that were not taken too.
        steps: The iterations.
    """

    x: Tensor
    value: float
    reason: str
    solves: int
    steps: list[Step] = field(default_factory=list)


def minimize(
    f: Function,
    x: Tensor,
    hessian: Hessian | None = None,
    B: Tensor | None = None,
    gamma: float = 1.0,
    steps: int = 1000,
    target: float | None = None,
    tolerance: float = 0.0,
) -> Minimum:
    """Minimize a function by regularized Newton steps whose radius doubles when they help enough, and is halved if not.

    A step to x⁺ is taken if `f(x) − f(x⁺) >= |∇f(x⁺)|_*²/(8λ)`; then γ doubles. Otherwise, and where `H + λB` is not
    positive definite, γ is halved and the step is computed again, at most 40 times.

    Args:
        f: The function, (n,) -> scalar.
        x: Where it begins, (n,), float64 for small tolerances.
        hessian: x -> H, one of this package's or any; None is the exact one.
        B: The metric, (n, n); None is the identity.
        gamma: γ at the beginning.
        steps: The most iterations.
        target: It ends where f is below.
        tolerance: It ends where `|∇f|_*` is not above.

    Returns:
        What it reached. The iterates move with any affine map of x, if B moves along.

    Raises:
        ValueError: B is not positive definite, γ is not positive and finite, x is no vector, f is not finite at it, or
            no radius makes `H + λB` positive definite.

    Source:
        arXiv 2506.13710, algorithm 1.
    """
    _refuse_other_shapes(x, B)
    metric, hessian = Metric(B), hessian or exact(f)
    gradient = torch.func.grad_and_value(f)
    record: list[Step] = []
    x, solves = x.detach().clone(), 0
    g, value = gradient(x)
    if not (value.isfinite() and g.isfinite().all()):
        raise ValueError("the function or its gradient is not finite where minimize begins: begin elsewhere")
    while (reason := _reason(value, metric.dual_norm(g), len(record), steps, target, tolerance)) is None:
        H = hessian(x)
        for retry in range(RETRIES):
            try:
                h, amount = newton_step(g, H, gamma, metric)
            except NotPositive:
                if retry == RETRIES - 1:
                    raise
                gamma /= 2
                continue
            solves += 1
            g_new, new = gradient(x + h)
            if value - new >= metric.dual_norm(g_new) ** 2 / (8 * amount):
                break
            gamma /= 2
        else:
            return Minimum(x, float(value), "stuck", solves, record)
        record.append(Step(float(value), float(metric.dual_norm(g)), gamma))
        gamma = max(2 * gamma, SMALLEST)
        x, g, value = x + h, g_new, new
    return Minimum(x, float(value), reason, solves, record)


def _refuse_other_shapes(x: Tensor, B: Tensor | None) -> None:
    """Raise ValueError unless x is a vector and the metric as wide."""
    if x.ndim != 1 or (B is not None and B.shape != (len(x), len(x))):
        got = [[*x.shape], None if B is None else [*B.shape]]
        raise ValueError(f"minimize needs a vector x, (n,), and a metric B of (n, n), got {got[0]} and {got[1]}")


def _reason(value: Tensor, size: Tensor, done: int, steps: int, target: float | None, tolerance: float) -> str | None:
    """Return why a minimization ends here, None if it goes on."""
    if target is not None and value < target:
        return "target"
    if size <= tolerance:
        return "gradient"
    return "steps" if done >= steps else None
