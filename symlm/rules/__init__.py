"""The update rules: maps from a stack of matrices to directions, each declaring the symmetry it claims."""

from symlm.rules import elements, rotated, rows, spectral
from symlm.rules.rule import RULES, Rule, get_rule

__all__ = ["RULES", "Rule", "elements", "get_rule", "rotated", "rows", "spectral"]
