"""Groups as values, how their elements act, and the symmetry of a matrix map: `U(L M Rᵀ) = L U(M) Rᵀ`."""

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


@dataclass(frozen=True)
class Transport:
    """How a group element acts on a weight (m, n): `W' = L W R^{-1} + shift`.

    left, right: None for the identity; a vector, the diagonal; or a stack (b, k, k), the blocks on the diagonal.
    shift: added to every row (n), as softmax ignores it in a head or a router.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    shift: Tensor | None = None

    def weight(self, W: Tensor) -> Tensor:
        """Return `L W R^{-1} + shift`.  Shapes: (m, n) -> same."""
        moved = _times(self.left, W)
        moved = _times(_inverse_transposed(self.right), moved.mT).mT
        return moved if self.shift is None else moved + self.shift

    def covector(self, G: Tensor) -> Tensor:
        """Return `L^{-T} G R^T`, how gradients and momenta move.  Shapes: (m, n) -> same."""
        return _times(self.right, _times(_inverse_transposed(self.left), G).mT).mT

    @property
    def group(self) -> Group | None:
        """The smallest group of more than one element that both sides lie in; None if they are no rotations."""
        groups = [_group_of(A) for A in (self.left, self.right) if A is not None]
        return None if None in groups else max(filter(None, groups), default=permutations)


def _times(A: Tensor | None, W: Tensor) -> Tensor:
    if A is None:
        return W
    if A.ndim == 1:
        return A[:, None] * W
    wide = torch.promote_types(A.dtype, W.dtype)
    A, W = A.to(wide), W.to(wide)
    return (A @ W.reshape(len(A), -1, W.shape[-1])).reshape(W.shape)


def _group_of(A: Tensor) -> Group | None:
    """Return the smallest group of more than one element that a diagonal, or a stack of blocks, lies in, if any."""
    Q = torch.diag_embed(A[:, None]) if A.ndim == 1 else A
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if not torch.allclose(Q @ Q.mT, eye.expand_as(Q), atol=1e-5):
        return None
    if not torch.allclose(Q.abs().amax(dim=-1), Q.new_ones(()), atol=1e-5):
        return rotations
    return permutations if (Q > -1e-5).all() else signed_permutations


def _inverse_transposed(A: Tensor | None) -> Tensor | None:
    if A is None:
        return None
    return 1 / A if A.ndim == 1 else torch.linalg.inv(A).mT
