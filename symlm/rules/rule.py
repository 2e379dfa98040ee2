"""What an update rule is: a map from a stack of matrices to directions, with the symmetry that it claims."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from symlm.polar.factor import polar as polar_factor
from symlm.symmetry import Symmetry, permutations, rotations, signed_permutations

Polar = Callable[[Tensor], Tensor]
DENSE = Symmetry(left=rotations, right=rotations)
ROWS = Symmetry(left=signed_permutations, right=rotations)
CENTERED_ROWS = Symmetry(left=permutations, right=rotations, shift=True)
ELEMENTS = Symmetry(left=signed_permutations, right=signed_permutations)


@dataclass(frozen=True)
class State:
    """One tensor that a rule keeps of a matrix: how it begins for M, and how `M -> L M Rᵀ` moves it.

    side: "left" or "right", the factor that moves it; act: from the tensor and that factor; rotations: whether any
    rotation does, or signed permutations alone.
    """

    start: Callable[[Tensor], Tensor]
    side: str
    act: Callable[[Tensor, Tensor], Tensor]
    rotations: bool = True


A_NUMBER_A_ROW = State(lambda M: torch.zeros_like(M[..., :1]), "left", lambda s, L: L.abs() @ s, rotations=False)
A_GRAM_MATRIX = State(
    lambda M: M.new_zeros(*M.shape[:-2], M.shape[-1], M.shape[-1]),
    "right",
    lambda K, R: R @ K @ R.mT,
)
A_ROTATION = State(
    lambda M: torch.eye(M.shape[-2], dtype=M.dtype, device=M.device).repeat(*M.shape[:-2], 1, 1),
    "left",
    lambda Q, L: L @ Q,
)
ROTATED_SQUARES = State(torch.zeros_like, "right", lambda V, R: V @ R.abs().mT, rotations=False)


@dataclass(frozen=True)
class Rule:
    """A map (..., m, n) -> (..., m, n) with the symmetry it claims and its degree, `U(cM) = c^degree U(M)`.

    Call it as `rule(M)`, or `rule(M, polar=f)` to choose how polar factors are computed. A rule with a state s is a map
    `U(M, s)`, where first `s <- refresh(M, s)`; it keeps the symmetry if s is moved along. `rule(M)` is its first step.
    """

    name: str
    function: Callable[..., Any]
    symmetry: Symmetry
    degree: int = 0
    state: Mapping[str, State] = field(default_factory=dict)
    refresh: Callable[..., dict[str, Tensor]] | None = None
    pull: Callable[..., Tensor] | None = None  # what draws a rotation: that of matrices which share one is their sum
    row_map: Callable[..., Any] | None = None  # the rule, between its centerings, where rows do not mix
    fused: bool = False  # a row rule whose whole step a Triton kernel does
    elementwise: bool = False  # torch's own AdamW, which the optimizer runs on whatever shape

    def __call__(self, M: Tensor, *, polar: Polar = polar_factor) -> Tensor:
        if M.ndim < 2:
            raise ValueError(f"rule {self.name!r} wants (..., m, n), got shape {tuple(M.shape)}")
        return self.direction(M, self.refreshed(M, self.start(M)), polar=polar)

    def start(self, M: Tensor) -> dict[str, Tensor]:
        """Return the state of a matrix that no step has reached."""
        return {key: state.start(M) for key, state in self.state.items()}

    def refreshed(
        self,
        M: Tensor,
        state: Mapping[str, Tensor],
        beta2: float = 0.95,
        shared_rotation: Tensor | None = None,
        step: Any = 1,
    ) -> dict[str, Tensor]:
        """Return the state that M leaves.

        beta2: of means over the steps, where the state is one; shared_rotation: the one of its layer, if there is one;
        step: how often the state was refreshed, this time included.
        """
        told = {"beta2": beta2, "shared_rotation": shared_rotation, "step": step, **state}
        return _call(self.refresh, M, told) if self.refresh else {}

    def pulled(self, M: Tensor, state: Mapping[str, Tensor], beta2: float = 0.95) -> Tensor:
        """Return what draws the rotation of M.  Shapes: (..., m, n) -> (..., m, m)."""
        assert self.pull is not None
        return _call(self.pull, M, {"beta2": beta2, **state})

    def direction(
        self, M: Tensor, state: Mapping[str, Tensor], *, polar: Polar = polar_factor, step: Any = 1, beta2: float = 0.95
    ) -> Tensor:
        """Return `U(M, s)`.  step: how often the state was refreshed, this time included."""
        return _call(self.function, M, {"polar": polar, "step": step, "beta2": beta2, **state})

    @property
    def row_state_keys(self) -> set[str]:
        """Return what of the state is a number a row, and lies where the rows do."""
        return {key for key, kind in self.state.items() if self.row_map and kind.side == "left"}

    @property
    def whitens(self) -> bool:
        """Tell whether rows, once mapped, are shared_rotation by their Gram matrix, which is the rest of the state."""
        return "gram" in self.state

    @property
    def spectral(self) -> bool:
        """Tell whether the rule computes a polar factor."""
        return "polar" in signature(self.function).parameters


def _call(function: Callable[..., Any], M: Tensor, told: Mapping[str, Any]) -> Any:
    """Call a function of M with what it names of the rest."""
    return function(M, **{key: value for key, value in told.items() if key in signature(function).parameters})


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
