"""Gradient-normalized smoothness: how far a step may go before the gradient has changed by as much as it is long.

The radius γ at x is the largest with `|∇f(x+h) − ∇f(x) − Hh|_* <= |∇f(x)|_* |h|/γ` for all `|h| <= γ`, where H is what
is known of the Hessian, `|h|² = ⟨h, Bh⟩` and `|g|_*² = ⟨g, B⁻¹g⟩`. `minimize` takes Newton steps that γ regularizes;
`along_step` measures it on a model, along a step that an optimizer has made.

Source:
    Semenov, Jaggi & Doikov, ICLR 2026, arXiv 2506.13710; the wording of γ is reconstructed from second hands.
"""

from symlm.gradient_smoothness.along import Smoothness, along_step
from symlm.gradient_smoothness.hessians import RankOne, exact, fisher, gauss_newton, softmax_gauss_newton, zero
from symlm.gradient_smoothness.newton import Minimum, Step, minimize, newton_step

__all__ = [
    "Minimum",
    "RankOne",
    "Smoothness",
    "Step",
    "along_step",
    "exact",
    "fisher",
    "gauss_newton",
    "minimize",
    "newton_step",
    "softmax_gauss_newton",
    "zero",
]
