"""ARO's direction: a base rule in coordinates that are rotated anew each step, from the momentum and the rule itself.

A map with state, the rotation R: under M -> QM it must move along, R -> QR, or the map is not equivariant. These are
the pure functions; no route of the table takes them yet.
"""

from collections.abc import Callable
from math import sqrt

import torch
from symlm_kernels.reference import unit_rows
from torch import Tensor

SHIFT = 1e-7  # of the Gram matrix, relative to its mean eigenvalue
Base = Callable[[Tensor], Tensor]


def sinkhorn(M: Tensor, rounds: int = 5) -> Tensor:
    """Return M after `rounds` of unit rows, then unit columns.  Shapes: (..., m, n) -> same."""
    for _ in range(rounds):
        M = unit_rows(unit_rows(M).mT).mT
    return M


def scaled_rows(M: Tensor) -> Tensor:
    """Return `√n·M_i/|M_i|`.  Shapes: (..., m, n) -> same."""
    return sqrt(M.shape[-1]) * unit_rows(M)


BASES: dict[str, Base] = {"sinkhorn": sinkhorn, "sign": torch.sign, "rows": scaled_rows}


def aro(M: Tensor, R: Tensor, base: str | Base = "sinkhorn", qr: str = "cholesky") -> tuple[Tensor, Tensor]:
    """Return the direction `U = R'f(R'ᵀM)` and the new rotation `R' = QR(M f(RᵀM)ᵀ)`.

    Shapes: M (..., m, n), its rows the residual stream; R (..., m, m), orthogonal, the identity at first -> both alike.
    base: f, by name ("sinkhorn", "sign", "rows") or a function. qr: "cholesky", shifted, with one Newton step and a
    fall-back, or "householder".
    Raises: ValueError for an unknown base or method.
    Source: arXiv 2602.09006; whether Sinkhorn's rows and columns take turns is told both ways.
    """
    if isinstance(base, str) and base not in BASES:
        raise ValueError(f"unknown base {base!r}; choose one of {sorted(BASES)}")
    if qr not in ("cholesky", "householder"):
        raise ValueError(f"unknown qr {qr!r}; choose 'cholesky' or 'householder'")
    f = BASES[base] if isinstance(base, str) else base
    A = M @ f(R.mT @ M).mT
    R = orthonormal(A) if qr == "householder" else cholesky_qr(A)
    return R @ f(R.mT @ M), R


def orthonormal(A: Tensor) -> Tensor:
    """Return the Q of Householder's QR with a positive diagonal of R.  Shapes: (..., m, m) -> same."""
    Q, R = torch.linalg.qr(A)
    signs = R.diagonal(dim1=-2, dim2=-1).sign()
    return Q * torch.where(signs == 0, 1.0, signs)[..., None, :]


def cholesky_qr(A: Tensor) -> Tensor:
    """Return the same by `K = AᵀA + εI = LLᵀ`, `Q = A L^{-T}`, `Q(3I − QᵀQ)/2`; by Householder where that fails.

    Shapes: (..., m, m) -> same. Fails for a singular A: then K's smallest eigenvalue is the shift.
    """
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    A = A / A.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
    K = A.mT @ A
    shift = SHIFT * K.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    L, failed = torch.linalg.cholesky_ex(K + shift * eye)
    Q = torch.linalg.solve_triangular(L.mT, A, upper=True, left=False)
    Q = Q @ (1.5 * eye - 0.5 * Q.mT @ Q)
    bad = (failed > 0) | ~((Q.mT @ Q - eye).abs().amax(dim=(-2, -1)) < 1e-2)
    return torch.where(bad[..., None, None], orthonormal(A), Q) if bad.any() else Q
