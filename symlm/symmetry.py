"""Groups as values, how their elements act, and the symmetry of a matrix map: `U(L M Rᵀ) = L U(M) Rᵀ`."""

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor


class Group(IntEnum):
    """Name a subgroup of O(n), one of a chain in which each contains the one before: `{1} < S_n < ±S_n < O(n)`."""

    TRIVIAL = 0
    PERMUTATIONS = 1
    SIGNED_PERMUTATIONS = 2
    ROTATIONS = 3

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw one element, uniformly.

        Args:
            n: The size of the matrix.
            generator: The source of randomness; torch's default one if None.

        Returns:
            A float64 matrix, (n, n).
        """
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
    """Describe the group `left × right` that acts on an (m, n) matrix, `M -> L M Rᵀ`.

    A map with a shift is defined on a quotient: `U(M + 1vᵀ) = U(M)` and `1ᵀU = 0`. Every left group larger than the
    permutations moves the vector of ones, so `shift` goes with permutations on the left.

    Args:
        left: The group of L, (m, m).
        right: The group of R, (n, n).
        shift: Whether `M -> M + 1vᵀ`, one vector added to every row, belongs to the symmetry.
    """

    left: Group = trivial
    right: Group = trivial
    shift: bool = False

    def __le__(self, other: "Symmetry") -> bool:
        return self.left <= other.left and self.right <= other.right and self.shift <= other.shift

    def sample(self, m: int, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw one element of `left × right`.

        Args:
            m: Rows of the matrices that the group acts on.
            n: Their columns.
            generator: The source of randomness; torch's default one if None.

        Returns:
            `(L, R)`, float64, (m, m) and (n, n).
        """
        return self.left.sample(m, generator), self.right.sample(n, generator)

    def larger(self) -> list["Symmetry"]:
        """Return the symmetries that are larger by one step; a tight claim must fail under each of them."""
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
    """Move M by a group element, `L M Rᵀ`.

    Args:
        M: Matrices, (..., m, n).
        L: The left element, (m, m).
        R: The right element, (n, n).

    Returns:
        The moved matrices, (..., m, n).
    """
    return L @ M @ R.mT


@dataclass(frozen=True)
class Transport:
    """Describe how a group element acts on a weight, `W' = L W R^{-1} + 1 shiftᵀ`, and on its gradient.

    Args:
        left: L: None for the identity; its diagonal, (m,); or the blocks on its diagonal, (b, k, k) with b·k = m.
        right: R: None for the identity; its diagonal, (n,); or the blocks on its diagonal, (b, k, k) with b·k = n.
        shift: What is added to every row, (n,); the softmax after a head or a router ignores it.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    shift: Tensor | None = None

    def weight(self, W: Tensor) -> Tensor:
        """Move a weight, `L W R^{-1} + 1 shiftᵀ`.

        Args:
            W: The weight, (m, n).

        Returns:
            The moved weight, (m, n).
        """
        moved = _times(self.left, W)
        moved = _times(_inverse_transposed(self.right), moved.mT).mT
        return moved if self.shift is None else moved + self.shift

    def covector(self, G: Tensor) -> Tensor:
        """Move a gradient or a momentum, `L^{-T} G Rᵀ`.

        Args:
            G: The gradient, (m, n).

        Returns:
            The moved gradient, (m, n).
        """
        return _times(self.right, _times(_inverse_transposed(self.left), G).mT).mT

    @property
    def group(self) -> Group | None:
        """Return the smallest group of both sides, from the permutations on; None if one is not orthogonal."""
        groups = [_group_of(A) for A in (self.left, self.right) if A is not None]
        return None if None in groups else max(filter(None, groups), default=permutations)


def _times(A: Tensor | None, W: Tensor) -> Tensor:
    """Multiply W from the left by a matrix that is given as `Transport.left` is, in the wider of the two dtypes."""
    if A is None:
        return W
    if A.ndim == 1:
        return A[:, None] * W
    wide = torch.promote_types(A.dtype, W.dtype)
    A, W = A.to(wide), W.to(wide)
    return (A @ W.reshape(len(A), -1, W.shape[-1])).reshape(W.shape)


def _group_of(A: Tensor) -> Group | None:
    """Return the smallest group, from the permutations on, that contains a diagonal or a stack of blocks, if any."""
    Q = torch.diag_embed(A[:, None]) if A.ndim == 1 else A
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if not torch.allclose(Q @ Q.mT, eye.expand_as(Q), atol=1e-5):
        return None
    if not torch.allclose(Q.abs().amax(dim=-1), Q.new_ones(()), atol=1e-5):
        return rotations
    return permutations if (Q > -1e-5).all() else signed_permutations


def _inverse_transposed(A: Tensor | None) -> Tensor | None:
    """Return `A^{-T}` of a matrix that is given as `Transport.left` is."""
    if A is None:
        return None
    return 1 / A if A.ndim == 1 else torch.linalg.inv(A).mT
