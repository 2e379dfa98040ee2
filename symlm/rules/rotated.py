"""ARO: a base rule in coordinates that are rotated anew each step, from the momentum and the base rule itself.

`R <- QR(M f(RᵀM)ᵀ + εR)`, `U = R f(RᵀM)`, scaled to an RMS of 1. The rows are the residual stream's dimensions. R is
state: under M -> QM it moves along, R -> QR, or the map is not equivariant. Source: arXiv 2602.09006.
"""

from collections.abc import Callable
from math import sqrt

import torch
from symlm_kernels.reference import unit_rows
from torch import Tensor

from symlm.rules.rule import A_ROTATION, ROTATED_SQUARES, rule
from symlm.symmetry import Symmetry, rotations, signed_permutations

RETAINED = 1e-3  # ε, relative to the other term: where M says nothing, the old rotation stays, and no QR is singular
ROTATED = Symmetry(left=rotations, right=signed_permutations)
Base = Callable[[Tensor], Tensor]


def sinkhorn(M: Tensor, rounds: int = 5) -> Tensor:
    """Return M after `rounds` of unit rows, then unit columns; whether they take turns is told both ways."""
    for _ in range(rounds):
        M = unit_rows(unit_rows(M).mT).mT
    return M


def pull(base: Base) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `(M, R) -> M f(RᵀM)ᵀ` at M's direction alone, which draws R; of matrices that share one, the pulls add."""

    def pulled(M: Tensor, rotation: Tensor) -> Tensor:
        X = _wide(M)
        return X @ base(rotation.to(X.dtype).mT @ X).mT

    return pulled


def next_rotation(A: Tensor, R: Tensor, qr: Base | None = None) -> Tensor:
    """Return `QR(A + εR)`, by `cholesky_qr`, or by `orthonormal`.  Shapes: (..., m, m) twice -> same."""
    size = torch.linalg.matrix_norm(A, keepdim=True) / sqrt(A.shape[-1])
    return (qr or cholesky_qr)(A + RETAINED * size * R.to(A.dtype))


def refresh(base: Base, qr: Base | None = None) -> Callable[..., dict[str, Tensor]]:
    """Return `(M, R) -> QR(M f(RᵀM)ᵀ + εR)` for a base f; a rotation that the layer shares is taken as it is."""

    def refreshed(M: Tensor, rotation: Tensor, shared_rotation: Tensor | None = None) -> dict[str, Tensor]:
        if shared_rotation is not None:
            return {"rotation": shared_rotation}
        return {"rotation": next_rotation(pull(base)(M, rotation), rotation, qr)}

    return refreshed


def rotate(M: Tensor, R: Tensor, base: Base) -> Tensor:
    """Return `R f(RᵀM)` at an RMS of 1.  Shapes: M (..., m, n), R (..., m, m) -> as M."""
    X = _wide(M)
    R = R.to(X.dtype)
    return unit_rms(R @ base(R.mT @ X)).to(M.dtype)


@rule(ROTATED, state={"rotation": A_ROTATION}, refresh=refresh(sinkhorn), pull=pull(sinkhorn))
def aro_sinkhorn(M: Tensor, rotation: Tensor) -> Tensor:
    """Return ARO's direction with rows and columns of unit length as its base."""
    return rotate(M, rotation, sinkhorn)


@rule(ROTATED, state={"rotation": A_ROTATION}, refresh=refresh(torch.sign), pull=pull(torch.sign))
def aro_sign(M: Tensor, rotation: Tensor) -> Tensor:
    """Return ARO's direction with the sign of each entry as its base."""
    return rotate(M, rotation, torch.sign)


@rule(
    Symmetry(left=rotations, right=rotations),
    state={"rotation": A_ROTATION},
    refresh=refresh(unit_rows),
    pull=pull(unit_rows),
)
def aro_rows(M: Tensor, rotation: Tensor) -> Tensor:
    """Return ARO's direction with unit rows as its base; a constant M makes it polar(M)."""
    return rotate(M, rotation, unit_rows)


def _pull_adam(M: Tensor, rotation: Tensor, squares: Tensor, beta2: float) -> Tensor:
    V = squares.to(_wide(M).dtype)
    return pull(lambda Y: over_root(Y, V.lerp(Y.square(), 1 - beta2)))(M, rotation)


def _refresh_adam(
    M: Tensor, rotation: Tensor, squares: Tensor, beta2: float, shared_rotation: Tensor | None = None
) -> dict[str, Tensor]:
    X = _wide(M)
    R = next_rotation(_pull_adam(M, rotation, squares, beta2), rotation) if shared_rotation is None else shared_rotation
    return {"rotation": R, "squares": squares.to(X.dtype).lerp((R.to(X.dtype).mT @ X).square(), 1 - beta2)}


@rule(ROTATED, state={"rotation": A_ROTATION, "squares": ROTATED_SQUARES}, refresh=_refresh_adam, pull=_pull_adam)
def aro_adam(M: Tensor, rotation: Tensor, squares: Tensor) -> Tensor:
    """Return ARO's direction with Adam's `RᵀM/√V` as its base, `V <- β₂V + (1−β₂)(RᵀM)²`."""
    return rotate(M, rotation, lambda Y: over_root(Y, squares.to(Y.dtype)))


def over_root(X: Tensor, V: Tensor) -> Tensor:
    """Return `X/√V`, and 0 where V is."""
    return X * V.rsqrt().nan_to_num(posinf=0.0)


def _wide(M: Tensor) -> Tensor:
    """Return M in fp32 or wider, at an RMS of 1, so that no square overflows."""
    return unit_rms(M.to(torch.promote_types(M.dtype, torch.float32)))


def unit_rms(M: Tensor) -> Tensor:
    """Return M scaled to an RMS of 1 over its entries; a zero matrix stays zero.  Shapes: (..., m, n) -> same."""
    return sqrt(M.shape[-2] * M.shape[-1]) * unit_rows(M.flatten(-2)).reshape(M.shape)


def orthonormal(A: Tensor) -> Tensor:
    """Return the Q of Householder's QR with a positive diagonal of R.  Shapes: (..., m, m) -> same."""
    Q, R = torch.linalg.qr(A)
    signs = R.diagonal(dim1=-2, dim2=-1).sign()
    return Q * torch.where(signs == 0, 1.0, signs)[..., None, :]


def cholesky_qr(A: Tensor) -> Tensor:
    """Return the same by `K = AᵀA + εI = LLᵀ`, `Q = A L^{-T}`, `Q(3I − QᵀQ)/2`; by Householder where that fails.

    Shapes: (..., m, m) -> same. Fails for a singular A: then K's smallest eigenvalue is the shift. Reads the device.
    """
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    A = A / A.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
    K = A.mT @ A
    shift = torch.finfo(A.dtype).eps * K.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    L, failed = torch.linalg.cholesky_ex(K + shift * eye)
    Q = torch.linalg.solve_triangular(L.mT, A, upper=True, left=False)
    Q = Q @ (1.5 * eye - 0.5 * Q.mT @ Q)
    bad = (failed > 0) | ~((Q.mT @ Q - eye).abs().amax(dim=(-2, -1)) < 1e-2)
    return torch.where(bad[..., None, None], orthonormal(A), Q) if bad.any() else Q
