"""The type of an update rule: a map from a stack of matrices to directions, with the symmetry that it claims."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
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
    """Describe one state tensor that a rule stores for a matrix: its first value, and how `M -> L M Rᵀ` moves it.

    Args:
        start: Maps matrices (..., m, n) to the state before the first step.
        side: The factor that moves the state, "left" for L, "right" for R, or "both".
        act: Maps the state and that factor, or the pair of both, to the moved state.
        rotations: Whether every rotation can move the state, or signed permutations alone.
        stored: Whether the optimizer stores it. False for the parameter's weight and momentum, which are there already,
            and for what the refresh computes for the direction.
    """

    start: Callable[[Tensor], Tensor]
    side: str
    act: Callable[[Tensor, Any], Tensor]
    rotations: bool = True
    stored: bool = True


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
ROTATED_ROOTS = State(torch.zeros_like, "right", lambda V, R: V @ R.abs().mT, rotations=False)


@dataclass(frozen=True)
class Rule:
    """Map matrices to directions, `U(M)`, with a claimed symmetry and a degree, `U(cM) = c^degree U(M)` for c > 0.

    Call it as `rule(M)`, or `rule(M, polar=f)` to choose how polar factors are computed. A rule with a state s is a map
    `U(M, s)` after `s <- refresh(M, s)`; it preserves its symmetry if s is moved along. `rule(M)` is its first step.

    Args:
        name: The key in `RULES`.
        function: Maps M, and what it names of `polar`, `step`, `beta1`, `beta2` and the state, to directions.
        symmetry: The claim, to which the tests hold the rule.
        degree: The exponent of a positive factor of M in the result.
        state: The state tensors by name, empty for a rule without state.
        refresh: Maps M and the state to the next state.
        pull: Maps M and the state to the matrix that the next rotation is the orthogonal factor of; None for a rule
            without a rotation.
        row_map: Maps the norms of rows to what divides the rows, the part of the rule between its centerings, and the
            next state of the rows; None where rows mix.
        fused: Whether Triton kernels do the whole step: of a row rule, or of one whose direction is the polar factor.
        elementwise: Whether the optimizer runs torch's AdamW in the rule's place, on a tensor of any shape.
        own_mean: Whether M is the gradient, of which the rule stores a mean itself: the group's momentum is 0.
    """

    name: str
    function: Callable[..., Any]
    symmetry: Symmetry
    degree: int = 0
    state: Mapping[str, State] = field(default_factory=dict)
    refresh: Callable[..., dict[str, Tensor]] | None = None
    pull: Callable[..., Tensor] | None = None  # of matrices that share a rotation, the pulls add
    row_map: Callable[..., Any] | None = None
    fused: bool = False
    elementwise: bool = False
    own_mean: bool = False

    def __call__(self, M: Tensor, *, polar: Polar = polar_factor) -> Tensor:
        """Compute the direction of the first step, `U(M, refresh(M, start(M)))`.

        Args:
            M: The rule's input, (..., m, n).
            polar: How polar factors are computed.

        Returns:
            The directions, same shape.

        Raises:
            ValueError: M has fewer than two axes.
        """
        if M.ndim < 2:
            raise ValueError(f"rule {self.name!r} expects matrices (..., m, n), got shape {tuple(M.shape)}; reshape M")
        polar = cache(polar)  # of M: the refresh and the direction may both ask for it
        return self.direction(M, self.refreshed(M, self.start(M), polar=polar), polar=polar)

    def start(self, M: Tensor) -> dict[str, Tensor]:
        """Return the state before the first step.

        Args:
            M: Matrices, (..., m, n); their values do not matter.

        Returns:
            The state tensors by name.
        """
        return {key: state.start(M) for key, state in self.state.items()}

    def refreshed(
        self,
        M: Tensor,
        state: Mapping[str, Tensor],
        beta2: float = 0.95,
        shared_rotation: Tensor | None = None,
        step: Any = 1,
        polar: Polar = polar_factor,
        beta1: float = 0.9,
        **constants: float,
    ) -> dict[str, Tensor]:
        """Return the state after a step of M, `refresh(M, s)`.

        Args:
            M: The rule's input, (..., m, n).
            state: The state before the step.
            beta2: The decay β₂ of the means over steps, where the state is one.
            shared_rotation: The next rotation, where the matrices of a layer share one.
            step: How often the state was refreshed, this time included.
            polar: How polar factors are computed.
            beta1: The decay β₁ of the rule's mean of gradients, where it has one.
            constants: Numbers of some rules, in place of their defaults.

        Returns:
            The state tensors by name; empty for a rule without state.
        """
        arguments = {"beta1": beta1, "beta2": beta2, "shared_rotation": shared_rotation, "step": step, "polar": polar}
        arguments |= {**constants, **state}
        return _call(self.refresh, M, arguments) if self.refresh else {}

    def pulled(self, M: Tensor, state: Mapping[str, Tensor], beta2: float = 0.95) -> Tensor:
        """Return the matrix that the next rotation of M is the orthogonal factor of, up to the share of the old one.

        Args:
            M: The rule's input, (..., m, n).
            state: The state before the step.
            beta2: The decay β₂ of the means over steps, where the state has one.

        Returns:
            The pulls, (..., m, m); those of matrices that share a rotation add.
        """
        assert self.pull is not None
        return _call(self.pull, M, {"beta2": beta2, **state})

    def direction(
        self,
        M: Tensor,
        state: Mapping[str, Tensor],
        *,
        polar: Polar = polar_factor,
        step: Any = 1,
        beta1: float = 0.9,
        beta2: float = 0.95,
        **constants: float,
    ) -> Tensor:
        """Compute `U(M, s)` for a state s that is refreshed already.

        Args:
            M: The rule's input, (..., m, n).
            state: The state after `refreshed`.
            polar: How polar factors are computed.
            step: How often the state was refreshed, this time included.
            beta1: The decay β₁ of the rule's mean of gradients, where it has one.
            beta2: The decay β₂ of the means over steps.
            constants: Numbers of some rules, in place of their defaults.

        Returns:
            The directions, same shape as M.
        """
        return _call(
            self.function, M, {"polar": polar, "step": step, "beta1": beta1, "beta2": beta2, **constants, **state}
        )

    @property
    def stored(self) -> dict[str, State]:
        """Return the states that the optimizer stores for the rule."""
        return {key: kind for key, kind in self.state.items() if kind.stored}

    @property
    def reads_weight(self) -> bool:
        """Whether the rule reads the weight, and steps the momentum itself, of a gradient in other coordinates."""
        return "weight" in self.state

    @property
    def row_state_keys(self) -> set[str]:
        """Return the names of the state tensors that have one number a row; they are sharded as the rows are."""
        return {key for key, kind in self.state.items() if self.row_map and kind.side == "left"}

    @property
    def whitens(self) -> bool:
        """Whether mapped rows are multiplied by the inverse root of their Gram matrix, which is stored as `gram`."""
        return "gram" in self.state

    @property
    def spectral(self) -> bool:
        """Whether the rule computes a polar factor."""
        return any("polar" in signature(f).parameters for f in (self.function, self.refresh) if f)


def _call(function: Callable[..., Any], M: Tensor, arguments: Mapping[str, Any]) -> Any:
    """Call a function of M with those of the arguments that are parameters of it."""
    return function(M, **{key: value for key, value in arguments.items() if key in signature(function).parameters})


RULES: dict[str, Rule] = {}


def rule(symmetry: Symmetry, **properties: Any) -> Callable[[Callable[..., Any]], Rule]:
    """Register the decorated function in `RULES` under its name.

    Args:
        symmetry: The claim of the rule.
        properties: Further fields of `Rule`.

    Returns:
        The decorator, which replaces the function by its `Rule`.
    """

    def register(function: Callable[..., Any]) -> Rule:
        RULES[function.__name__] = Rule(function.__name__, function, symmetry, **properties)
        return RULES[function.__name__]

    return register


def get_rule(name: str) -> Rule:
    """Return the named rule.

    Args:
        name: A key of `RULES`.

    Returns:
        The rule.

    Raises:
        ValueError: There is no rule of that name; the message lists the names.
    """
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}; choose one of {sorted(RULES)}")
    return RULES[name]
