"""Groups as values, and the symmetry of a matrix map: `U(L M Rᵀ) = L U(M) Rᵀ`, with or without a shared shift."""

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor


class Group(IntEnum):
    """A chain of subgroups of O(n), each contained in the next: `{1} < S_n < signed S_n < O(n)`."""

    TRIVIAL = 0
    PERMUTATIONS = 1
    SIGNED_PERMUTATIONS = 2
    ROTATIONS = 3

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw one element as a float64 matrix of shape (n, n)."""
        eye = torch.eye(n, dtype=torch.float64)
        if self is Group.TRIVIAL:
            return eye
        if self is Group.ROTATIONS:
            Q, R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
            return Q * R.diagonal().sign()
        P = eye[torch.randperm(n, generator=generator)]
        if self is Group.PERMUTATIONS:
            return P
        signs = torch.randint(0, 2, (n, 1), generator=generator, dtype=torch.float64) * 2 - 1
        return P * signs


trivial, permutations, signed_permutations, rotations = Group


@dataclass(frozen=True)
class Symmetry:
    """The group `left × right` acting on an (m, n) matrix; `shift` adds `M -> M + 1vᵀ`, which U must ignore.

    A map with a shift is a quotient: `U(M + 1vᵀ) = U(M)` and `1ᵀU = 0`. An orthogonal left group larger than the
    signed permutations moves the vector of ones, so `shift` goes with permutations on the left.
    """

    left: Group = trivial
    right: Group = trivial
    shift: bool = False

    def __le__(self, other: "Symmetry") -> bool:
        return self.left <= other.left and self.right <= other.right and self.shift <= other.shift

    def sample(self, m: int, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw `(L, R)` of shapes (m, m), (n, n)."""
        return self.left.sample(m, generator), self.right.sample(n, generator)

    def larger(self) -> list["Symmetry"]:
        """Return the symmetries one step up, for negative controls."""
        ups = []
        if self.left < rotations:
            ups.append(replace(self, left=Group(self.left + 1)))
        if self.right < rotations:
            ups.append(replace(self, right=Group(self.right + 1)))
        if not self.shift:
            ups.append(replace(self, shift=True))
        return ups

    def __str__(self) -> str:
        names = {trivial: "1", permutations: "S", signed_permutations: "±S", rotations: "O"}
        return f"{names[self.left]}(m) × {names[self.right]}(n)" + (", shift" if self.shift else "")


def act(M: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """Move M by a group element, `L M Rᵀ`.  Shapes: (..., m, n), (m, m), (n, n) -> (..., m, n)."""
    return L @ M @ R.mT
