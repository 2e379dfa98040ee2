"""The update rules: maps from a stack of matrices to directions, each declaring the symmetry it claims."""

from symlm.rules import elementwise, low_rank, rotated, rows, soap, spectral
from symlm.rules.rule import RULES, Rule, get_rule

__all__ = ["RULES", "Rule", "elementwise", "get_rule", "low_rank", "rotated", "rows", "soap", "spectral"]
