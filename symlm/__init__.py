"""Symmetry-compatible optimizers for pretraining language models."""

from symlm import diagnostics, hf, polar, rules
from symlm.describe import describe_routing
from symlm.optimizer import SymOptimizer
from symlm.roles import Role, assign_roles
from symlm.routes import PRESETS, ROUTES, param_groups

__all__ = [
    "PRESETS",
    "ROUTES",
    "Role",
    "SymOptimizer",
    "assign_roles",
    "describe_routing",
    "diagnostics",
    "hf",
    "param_groups",
    "polar",
    "rules",
]
