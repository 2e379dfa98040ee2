"""Constraints: what a step may do to the size of a weight, `W <- κW − γU`, from three inner products of W and U.

A constraint sees a matrix through `⟨W, W⟩`, `⟨W, U⟩` and `⟨U, U⟩` alone, which no rotation of either side changes; but
for the cautious decay, of signs, and the spectral one. Names joined by `+` are applied in turn, as in `relative+decay`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from symlm.rules.rule import DENSE, ELEMENTS
from symlm.symmetry import Symmetry


@dataclass(frozen=True)
class Step:
    """Describe the step of a stack of matrices, `W <- κW − γU`.

    Args:
        lr: The rate η, one number.
        weight_decay: The decay λ, see `effective_decay`.
        floor: The least size of a step over that of the weight, at the rate 1: `‖γU‖ ≥ η·floor·‖W‖`.
        keep: κ of each matrix, (b,), 1 at first.
        move: γ, (b,), η at first.
        weight: `‖W‖²`, (b,).
        product: `⟨W, U⟩`, (b,).
        direction: `‖U‖²`, (b,).
    """

    lr: Tensor
    weight_decay: float
    floor: float
    keep: Tensor
    move: Tensor
    weight: Tensor
    product: Tensor
    direction: Tensor

    @property
    def length(self) -> Tensor:
        """`‖κW − γU‖` of each matrix."""
        square = self.keep * self.keep * self.weight - 2 * self.keep * self.move * self.product
        return (square + self.move * self.move * self.direction).clamp(min=0).sqrt()

    def with_length(self, length: Tensor) -> "Step":
        """Return the step whose result is scaled to a length; matrices of zeros stay as they are."""
        now = self.length
        factor = torch.where((now > 0) & (length > 0), length / now.clamp(min=TINY), 1.0)
        return replace(self, keep=self.keep * factor, move=self.move * factor)


TINY = 1e-38  # in place of a norm that is zero, where the quotient is not used


@dataclass(frozen=True)
class Constraint:
    """Map a step to one that respects the constraint.

    Args:
        name: The key in `CONSTRAINTS`.
        function: The map.
        symmetry: The claim, of `W -> L W Rᵀ` and `U -> L U Rᵀ` together.
        measures: Whether it needs the inner products of whole matrices.
        cautious: Whether entries decay one by one.
    """

    name: str
    function: Callable[[Step], Step]
    symmetry: Symmetry = DENSE
    measures: bool = True
    cautious: bool = False

    @property
    def decays(self) -> bool:
        """Whether the whole weight decays beside the step."""
        return bool({"decay", "corrected_decay", "independent_decay"} & set(self.parts))

    @property
    def spectral(self) -> bool:
        """Whether the polar factor of the whole weight is subtracted after the step."""
        return "spectral_decay" in self.parts

    @property
    def parts(self) -> list[str]:
        """The names that it is joined of."""
        return self.name.split("+")


CONSTRAINTS: dict[str, Constraint] = {}


def _constraint(**properties: object) -> Callable[[Callable[[Step], Step]], Constraint]:
    """Register the decorated function in `CONSTRAINTS` under its name."""

    def register(function: Callable[[Step], Step]) -> Constraint:
        name = function.__name__
        CONSTRAINTS[name] = Constraint(name, function, **properties)  # type: ignore[arg-type]
        return CONSTRAINTS[name]

    return register


@_constraint(measures=False)
def none(step: Step) -> Step:
    """Leave the weight's size to the steps, `W <- W − ηU`; a weight decay has no effect."""
    return step


@_constraint(measures=False)
def decay(step: Step) -> Step:
    """Decay the weight beside the step, `W <- (1 − ηλ)W − ηU`.

    Source:
        Loshchilov & Hutter, arXiv 1711.05101.
    """
    return replace(step, keep=step.keep * (1 - step.lr * step.weight_decay))


@_constraint(measures=False)
def corrected_decay(step: Step) -> Step:
    """Decay as the square of the schedule, `W <- (1 − λη²/η_max)W − ηU`: the weight's size follows no schedule.

    At rest a decay of ηλ holds `‖W‖²` near `η‖U‖²/2λ`, which a falling rate moves; this one holds it. η_max is the
    `initial_lr` that torch's schedulers write; without one the decay is `decay`.

    Source:
        AdamC, Defazio, arXiv 2506.02285.
    """
    return decay.function(step)


@_constraint(measures=False)
def independent_decay(step: Step) -> Step:
    """Decay by the schedule alone, `W <- (1 − λη/η_max)W − ηU`: another rate needs no other λ, here far below 1.

    Source:
        Loshchilov & Hutter, arXiv 1711.05101, as proposed; Wortsman et al., arXiv 2309.14322.
    """
    return decay.function(step)


@_constraint(measures=False)
def spectral_decay(step: Step) -> Step:
    """Decay all singular values by one amount, `Z = W − ηU`, `W <- Z − ηλ·polar(Z)`: the penalty `λ‖W‖_*`.

    Source:
        Spectral weight decay, arXiv 2610.11730; there the polar factor is by five Newton–Schulz steps.
    """
    return step


def effective_decay(group: Mapping[str, Any]) -> Any:
    """Return λ such that a step decays by `1 − ηλ`.

    Args:
        group: A parameter group whose lr is the rate η of its step.

    Returns:
        The group's λ, by `η/η_max` under `corrected_decay` and by `1/η_max` under `independent_decay`.
    """
    value, parts = group["weight_decay"] * group["weight_decay_multiplier"], get_constraint(group["constraint"]).parts
    if not value or not {"corrected_decay", "independent_decay"} & set(parts):
        return value
    largest = group["initial_lr"] * group["lr_multiplier"] if "initial_lr" in group else group["lr"]
    return value * group["lr"] / largest if "corrected_decay" in parts else value / largest


@_constraint(measures=False, cautious=True, symmetry=ELEMENTS)
def cautious_decay(step: Step) -> Step:
    """Decay the entries that the step does not make larger, `W <- W − ηλ·W·[U·W ≥ 0] − ηU`; rotations change it.

    It acts on the weight after all others that it is joined with.

    Source:
        Chen et al., arXiv 2510.12402.
    """
    return step


@_constraint()
def fixed_norm(step: Step) -> Step:
    """Stay on the sphere, `W <- R·(W − ηR·U/‖U‖)/‖W − ηR·U/‖U‖‖`, R = ‖W‖; the rate is an angle, the scale cancels.

    A weight of zeros has no sphere and is updated freely.

    Source:
        Wen et al., hyperball optimization; modded-nanogpt, track 3, MuonH.
    """
    angle = step.lr * (step.weight / step.direction.clamp(min=TINY)).sqrt()
    move = torch.where((step.weight > 0) & (step.direction > 0), angle, step.move)
    return replace(step, move=move).with_length(step.weight.sqrt())


@_constraint()
def relative(step: Step) -> Step:
    """Move by at least a share of the weight, `‖γU‖ = max(‖γU‖, η·floor·‖W‖)`.

    Source:
        modded-nanogpt, track 3: the u/w floor, there η·floor = 0.0143 at the full rate.
    """
    least = step.lr * step.floor * (step.weight / step.direction.clamp(min=TINY)).sqrt()
    return replace(step, move=torch.where(step.direction > 0, torch.maximum(least, step.move), step.move))


@_constraint()
def radial_brake(step: Step) -> Step:
    """Halve what a step adds to the weight's length: `‖W'‖ = ‖W‖(1 + c)`, `c = −γ⟨U, W⟩/‖W‖²`, halved where positive.

    Source:
        modded-nanogpt, track 3, record 2026-05: the radial brake with a pin.
    """
    grown = -step.move * step.product / step.weight.clamp(min=TINY)
    grown = torch.where(step.weight > 0, torch.where(grown > 0, grown / 2, grown), 0.0)
    return step.with_length(step.weight.sqrt() * (1 + grown))


@lru_cache(maxsize=64)  # it is asked for every batch of every step
def get_constraint(name: str) -> Constraint:
    """Return the named constraint, or the composition of several.

    Args:
        name: A key of `CONSTRAINTS`, or several joined by `+`.

    Returns:
        The constraint; of several it claims the smallest symmetry.

    Raises:
        ValueError: There is no constraint of that name; the message lists the names.
    """
    parts = str(name).split("+")
    if unknown := [part for part in parts if part not in CONSTRAINTS]:
        raise ValueError(f"unknown constraint {unknown[0]!r}; choose of {sorted(CONSTRAINTS)}, or join some by '+'")
    chosen = [CONSTRAINTS[part] for part in parts]

    def in_turn(step: Step) -> Step:
        for constraint in chosen:
            step = constraint.function(step)
        return step

    return Constraint(
        name,
        in_turn,
        min((constraint.symmetry for constraint in chosen), key=lambda claim: claim.left),
        any(constraint.measures for constraint in chosen),
        any(constraint.cautious for constraint in chosen),
    )
