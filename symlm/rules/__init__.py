"""The update rules: maps from a stack of matrices to directions, each declaring the symmetry it claims."""

from symlm.rules import elementwise, gains, low_rank, rotated, rows, soap, spectral
from symlm.rules.rule import RULES, Rule, get_rule

__all__ = ["RULES", "Rule", "elementwise", "gains", "get_rule", "low_rank", "rotated", "rows", "soap", "spectral"]
