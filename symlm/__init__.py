"""Symmetry-compatible optimizers for pretraining language models."""

from symlm import diagnostics, hf, polar, rules
from symlm.optimizer import SymOptimizer
from symlm.roles import Role, assign_roles
from symlm.routing import PRESETS, ROUTES, describe_routing, param_groups

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
