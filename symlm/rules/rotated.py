"""ARO: a base rule f in rotated coordinates; the rotation R is refreshed each step, from the momentum and from f.

`R <- QR(M f(RᵀM)ᵀ + εR)`, `U = R f(RᵀM)`, scaled to an RMS of 1. The rows are the residual stream's dimensions. R is
state: under M -> QM it has to be moved along, R -> QR, or the map is not equivariant. The term εR is added here.

Source:
    arXiv 2602.09006.
"""

from collections.abc import Callable
from math import sqrt

import torch
from symlm_kernels.reference import unit_rows
from torch import Tensor

from symlm.polar.exact import cholesky_qr
from symlm.polar.precision import accumulation_dtype
from symlm.rules.rule import A_ROTATION, ROTATED_ROOTS, rule
from symlm.symmetry import Symmetry, rotations, signed_permutations

# ε, relative to the other term: where M has no component the old rotation stays, so that no QR is of a singular matrix.
# The value was chosen here; no record.
RETAINED = 1e-3
ROTATED = Symmetry(left=rotations, right=signed_permutations)
Base = Callable[[Tensor], Tensor]


def sinkhorn(M: Tensor, rounds: int = 5) -> Tensor:
    """Scale rows to unit length, then columns, `rounds` times.

    Args:
        M: Matrices, (..., m, n).
        rounds: How often; 5 in ARO.

    Returns:
        The scaled matrices, same shape. Re-implementations differ in whether rows and columns alternate, as here, or
        are scaled at once.
    """
    for _ in range(rounds):
        M = unit_rows(unit_rows(M).mT).mT
    return M


def pull(base: Base) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function `(M, R) -> M f(RᵀM)ᵀ`, M at an RMS of 1: the next R is the orthogonal factor of its value.

    Args:
        base: The base rule f, of matrices (..., m, n).

    Returns:
        A function of M, (..., m, n), and R, (..., m, m), with values (..., m, m); of matrices that share R they add.
    """

    def pulled(M: Tensor, rotation: Tensor) -> Tensor:
        X = _wide(M)
        return X @ base(rotation.to(X.dtype).mT @ X).mT

    return pulled


def next_rotation(A: Tensor, R: Tensor, qr: Base | None = None, retained: float = RETAINED) -> Tensor:
    """Compute the next rotation, `QR(A + ε|A|R)` with |A| the RMS singular value of A.

    Args:
        A: The pulls, (..., m, m).
        R: The rotations before, same shape.
        qr: The orthogonal factor of a matrix, `cholesky_qr` if None.
        retained: ε.

    Returns:
        The rotations, same shape.
    """
    size = torch.linalg.matrix_norm(A, keepdim=True) / sqrt(A.shape[-1])
    return (qr or cholesky_qr)(A + retained * size * R.to(A.dtype))


def refresh(base: Base, qr: Base | None = None) -> Callable[..., dict[str, Tensor]]:
    """Return the function `(M, R) -> QR(M f(RᵀM)ᵀ + εR)`, the `Rule.refresh` of a base rule f.

    Args:
        base: The base rule f, of matrices (..., m, n).
        qr: The orthogonal factor of a matrix, `cholesky_qr` if None.

    Returns:
        A function of M and the rotation with the refreshed state; a `shared_rotation` is returned as it is.
    """

    def refreshed(
        M: Tensor, rotation: Tensor, shared_rotation: Tensor | None = None, retained: float = RETAINED
    ) -> dict[str, Tensor]:
        if shared_rotation is not None:
            return {"rotation": shared_rotation}
        return {"rotation": next_rotation(pull(base)(M, rotation), rotation, qr, retained)}

    return refreshed


def rotate(M: Tensor, R: Tensor, base: Base) -> Tensor:
    """Compute ARO's direction, `R f(RᵀM)` scaled to an RMS of 1.

    Args:
        M: The momentum, (..., m, n).
        R: The rotations, (..., m, m).
        base: The base rule f.

    Returns:
        The directions, shape and dtype of M.
    """
    X = _wide(M)
    R = R.to(X.dtype)
    return unit_rms(R @ base(R.mT @ X)).to(M.dtype)


@rule(ROTATED, state={"rotation": A_ROTATION}, refresh=refresh(sinkhorn), pull=pull(sinkhorn))
def aro_sinkhorn(M: Tensor, rotation: Tensor) -> Tensor:
    """Return ARO's direction with `sinkhorn` as its base, the recommended one.

    Args:
        M: The momentum, (..., m, n).
        rotation: The refreshed rotation, (..., m, m).

    Returns:
        The directions, same shape as M, at an RMS of 1.
    """
    return rotate(M, rotation, sinkhorn)


@rule(ROTATED, state={"rotation": A_ROTATION}, refresh=refresh(torch.sign), pull=pull(torch.sign))
def aro_sign(M: Tensor, rotation: Tensor) -> Tensor:
    """Return ARO's direction with the sign of each entry as its base.

    Args:
        M: The momentum, (..., m, n).
        rotation: The refreshed rotation, (..., m, m).

    Returns:
        The directions, same shape as M, at an RMS of 1.
    """
    return rotate(M, rotation, torch.sign)


@rule(
    Symmetry(left=rotations, right=rotations),
    state={"rotation": A_ROTATION},
    refresh=refresh(unit_rows),
    pull=pull(unit_rows),
)
def aro_rows(M: Tensor, rotation: Tensor) -> Tensor:
    """Return ARO's direction with unit rows as its base; for a constant M it converges to `polar(M)` at an RMS of 1.

    Args:
        M: The momentum, (..., m, n).
        rotation: The refreshed rotation, (..., m, m).

    Returns:
        The directions, same shape as M, at an RMS of 1.
    """
    return rotate(M, rotation, unit_rows)


def mean_root(root: Tensor, Y: Tensor, beta2: float) -> Tensor:
    """Return `√(β₂r² + (1−β₂)Y²)` by entries, without a square that overflows.

    Args:
        root: r, the root of the mean before this step, any shape.
        Y: What is averaged, same shape.
        beta2: The decay β₂ of the mean.
    """
    return torch.hypot(sqrt(beta2) * root, sqrt(1 - beta2) * Y)


def _pull_adam(M: Tensor, rotation: Tensor, roots: Tensor, beta2: float) -> Tensor:
    """Return the pull of `aro_adam`, whose base divides by the mean square of the old rotation's coordinates."""
    Y = rotation.mT.to(raw(M).dtype) @ raw(M)
    return _wide(M) @ over(Y, mean_root(roots.to(Y.dtype), Y, beta2)).mT


def _refresh_adam(
    M: Tensor,
    rotation: Tensor,
    roots: Tensor,
    beta2: float,
    shared_rotation: Tensor | None = None,
    retained: float = RETAINED,
) -> dict[str, Tensor]:
    """Return the next rotation, and the mean size of the coordinates in it."""
    R = shared_rotation
    if R is None:
        R = next_rotation(_pull_adam(M, rotation, roots, beta2), rotation, retained=retained)
    Y = R.to(raw(M).dtype).mT @ raw(M)
    return {"rotation": R, "roots": mean_root(roots.to(Y.dtype), Y, beta2)}


@rule(ROTATED, state={"rotation": A_ROTATION, "roots": ROTATED_ROOTS}, refresh=_refresh_adam, pull=_pull_adam)
def aro_adam(M: Tensor, rotation: Tensor, roots: Tensor) -> Tensor:
    """Return ARO's direction with Adam's `RᵀM/√V` as its base, `V <- β₂V + (1−β₂)(RᵀM)²` of M itself.

    Args:
        M: The momentum, (..., m, n).
        rotation: The refreshed rotation R, (..., m, m).
        roots: The refreshed √V, (..., m, n), which is stored since squares of large gradients overflow.

    Returns:
        The directions, same shape as M, at an RMS of 1.
    """
    R = rotation.to(raw(M).dtype)
    Y = R.mT @ raw(M)
    return unit_rms(R @ over(Y, roots.to(Y.dtype))).to(M.dtype)


def over(X: Tensor, root: Tensor) -> Tensor:
    """Return `X/r` by entries, 0 where r is 0."""
    return X / torch.where(root > 0, root, torch.inf)


def raw(M: Tensor) -> Tensor:
    """Return M in fp32 or wider.

    Args:
        M: Matrices of any shape.
    """
    return M.to(accumulation_dtype(M.dtype))


def _wide(M: Tensor) -> Tensor:
    """Return M in fp32 or wider, at an RMS of 1, so that no square overflows."""
    return unit_rms(M.to(accumulation_dtype(M.dtype)))


def unit_rms(M: Tensor) -> Tensor:
    """Scale each matrix to an RMS of 1 over its entries, `√(mn)·M/|M|_F`.

    Args:
        M: Matrices, (..., m, n).

    Returns:
        The scaled matrices, same shape; a zero matrix stays zero.
    """
    return sqrt(M.shape[-2] * M.shape[-1]) * unit_rows(M.flatten(-2)).reshape(M.shape)
