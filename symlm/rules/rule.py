"""What an update rule is: a map from a stack of matrices to directions, with the symmetry that it claims."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from symlm.polar import polar as polar_factor
from symlm.symmetry import Symmetry, permutations, rotations, signed_permutations

Polar = Callable[[Tensor], Tensor]
DENSE = Symmetry(left=rotations, right=rotations)
ROWS = Symmetry(left=signed_permutations, right=rotations)
CENTERED_ROWS = Symmetry(left=permutations, right=rotations, shift=True)
ELEMENTS = Symmetry(left=signed_permutations, right=signed_permutations)


@dataclass(frozen=True)
class State:
    """One tensor that a rule keeps of a matrix: how it begins for M, and how `M -> L M Rᵀ` moves it."""

    start: Callable[[Tensor], Tensor]
    act: Callable[[Tensor, Tensor, Tensor], Tensor]


A_NUMBER_A_ROW = State(lambda M: torch.zeros_like(M[..., :1]), lambda s, L, R: L.abs() @ s)
A_ROTATION = State(
    lambda M: torch.eye(M.shape[-2], dtype=M.dtype, device=M.device).repeat(*M.shape[:-2], 1, 1),
    lambda Q, L, R: L @ Q,
)
ROTATED_SQUARES = State(torch.zeros_like, lambda V, L, R: V @ R.abs().mT)


@dataclass(frozen=True)
class Rule:
    """A map (..., m, n) -> (..., m, n) with the symmetry it claims and its degree, `U(cM) = c^degree U(M)`.

    Call it as `rule(M)`, or `rule(M, polar=f)` to choose how polar factors are computed. A rule with `state` keeps the
    symmetry if the state is moved along, and `advance` is its step; `rule(M)` is its first.
    """

    name: str
    function: Callable[..., Any]
    symmetry: Symmetry
    degree: int = 0
    state: Mapping[str, State] = field(default_factory=dict)
    row_map: Callable[..., Any] | None = None  # the rule, between its centerings, where rows do not mix
    elementwise: bool = False  # torch's own AdamW, which the optimizer runs on whatever shape

    def __call__(self, M: Tensor, *, polar: Polar = polar_factor) -> Tensor:
        if M.ndim < 2:
            raise ValueError(f"rule {self.name!r} wants (..., m, n), got shape {tuple(M.shape)}")
        return self.advance(M, self.start(M), polar=polar)[0]

    def start(self, M: Tensor) -> dict[str, Tensor]:
        """Return the state of a matrix that no step has reached."""
        return {key: state.start(M) for key, state in self.state.items()}

    def advance(
        self, M: Tensor, state: Mapping[str, Tensor], *, polar: Polar = polar_factor, step: Any = 1, beta2: float = 0.95
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the direction and the next state.  step: the number of this one; beta2: of means that the state is."""
        told = {"polar": polar, "step": step, "beta2": beta2, **state}
        found = self.function(M, **{key: value for key, value in told.items() if key in self._parameters})
        return found if self.state else (found, {})

    @property
    def spectral(self) -> bool:
        """Tell whether the rule computes a polar factor."""
        return "polar" in self._parameters

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.function).parameters)


RULES: dict[str, Rule] = {}


def rule(symmetry: Symmetry, **properties: Any) -> Callable[[Callable[..., Any]], Rule]:
    """Register the decorated function in `RULES` under its own name."""

    def register(function: Callable[..., Any]) -> Rule:
        RULES[function.__name__] = Rule(function.__name__, function, symmetry, **properties)
        return RULES[function.__name__]

    return register


def get_rule(name: str) -> Rule:
    """Return the named rule.  Raises: ValueError, listing the names."""
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}; choose one of {sorted(RULES)}")
    return RULES[name]
