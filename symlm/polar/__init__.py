"""The polar factor `U_r V_rᵀ` of a matrix: exact (SVD, QDWH), Newton–Schulz and Gram Newton–Schulz, batched."""

from symlm.polar.counting import operations
from symlm.polar.factor import METHODS, polar
from symlm.polar.inverse_roots import CUTOFF, inverse_root
from symlm.polar.precision import fastest_dtype, full_precision, resolve_dtype
from symlm.polar.schedules import SCHEDULES, Schedule, get_schedule

__all__ = [
    "CUTOFF",
    "METHODS",
    "SCHEDULES",
    "Schedule",
    "fastest_dtype",
    "full_precision",
    "get_schedule",
    "inverse_root",
    "operations",
    "polar",
    "resolve_dtype",
]
