"""Symmetry-compatible optimizers for pretraining language models."""

from symlm import diagnostics, polar, rules
from symlm.optimizer import SymOptimizer
from symlm.roles import Role, assign_roles
from symlm.routes import PRESETS, ROUTES, describe_routing, param_groups

__all__ = [
    "PRESETS",
    "ROUTES",
    "Role",
    "SymOptimizer",
    "assign_roles",
    "describe_routing",
    "diagnostics",
    "param_groups",
    "polar",
    "rules",
]
