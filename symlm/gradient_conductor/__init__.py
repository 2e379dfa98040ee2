"""The gradient conductor: conflicts between several losses' gradients are resolved before the optimizer's step.

Every step is linear in the gradients, so that conflicts are resolved on the matrix of their inner products alone.

Source:
    Limarenko et al., GCond, arXiv 2509.07252.
"""

from symlm.gradient_conductor.conductor import GradientConductor, Report
from symlm.gradient_conductor.conflicts import Arbitration, Conflict

__all__ = ["Arbitration", "Conflict", "GradientConductor", "Report"]
