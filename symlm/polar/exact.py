"""Factors to rounding accuracy: polar by SVD and by dynamically weighted Halley iterations (QDWH), and QR's."""

from math import sqrt

import torch
from torch import Tensor


def svd_polar(X: Tensor) -> Tensor:
    """Compute `U_r V_rᵀ` by the thin SVD, without the singular values at rounding level.

    Args:
        X: Normalized matrices, (b, m, n).

    Returns:
        The polar factors, same shape; partial isometries where X is rank-deficient.
    """
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    cutoff = max(X.shape[-2:]) * torch.finfo(X.dtype).eps * S[..., :1]
    return (U * (cutoff < S).to(X.dtype).unsqueeze(-2)) @ Vh


def qdwh_polar(X: Tensor) -> Tensor:
    """Compute the polar factor by Halley steps, `X <- (b/c)X + (a − b/c) X (I + cXᵀX)^{-1}`, with weights a, b, c.

    A step is computed by QR while c is large and by Cholesky after.

    Args:
        X: Normalized matrices, (b, m, n) with m >= n.

    Returns:
        The polar factors, same shape. Singular values of X at rounding level end anywhere between 0 and 1.

    Source:
        Nakatsukasa, Bai, Gygi 2010, eq. (3.5), (5.2).
    """
    m, n = X.shape[-2:]
    eps = torch.finfo(X.dtype).eps
    eye = torch.eye(n, dtype=X.dtype, device=X.device).expand(len(X), n, n)
    lower = eps
    while abs(lower - 1) > 10 * eps:
        l2 = lower * lower
        d = (4 * (1 / l2 - 1) / l2) ** (1 / 3)
        root = sqrt(1 + d)
        a = root + sqrt(2 - d + 2 * (2 - l2) / (l2 * root))
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        lower = min(1.0, lower * (a + b * l2) / (1 + c * l2))
        if c > 100:
            Q = torch.linalg.qr(torch.cat([sqrt(c) * X, eye], dim=-2)).Q
            X = (b / c) * X + (a - b / c) / sqrt(c) * Q[:, :m] @ Q[:, m:].mT
        else:
            factor = torch.linalg.cholesky(eye + c * X.mT @ X)
            X = (b / c) * X + (a - b / c) * torch.cholesky_solve(X.mT, factor).mT
    return X


def orthonormal(A: Tensor) -> Tensor:
    """Compute the Q of Householder's QR with a positive diagonal of R.

    Args:
        A: Square matrices, (..., m, m).

    Returns:
        The orthogonal factors, same shape.
    """
    Q, R = torch.linalg.qr(A)
    signs = R.diagonal(dim1=-2, dim2=-1).sign()
    return Q * torch.where(signs == 0, 1.0, signs)[..., None, :]


def cholesky_qr(A: Tensor) -> Tensor:
    """Compute the Q of a QR by Cholesky, `K = AᵀA + εI = LLᵀ`, `Q = A L^{-T}`, then one Newton step `Q(3I − QᵀQ)/2`.

    It is inaccurate for a singular A, where K's smallest eigenvalue is the shift ε; there Householder's QR is taken.
    That choice waits for the device.

    Args:
        A: Square matrices, (..., m, m).

    Returns:
        The orthogonal factors, same shape.

    Source:
        arXiv 2602.09006, shifted Cholesky QR; with `A L^{-T}`, since `A L^{-1}` of some public code is not orthogonal.
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


def with_nuclear_norm(M: Tensor, U: Tensor) -> Tensor:
    """Scale polar factors by the nuclear norm, `νU`, `ν = ⟨M, U⟩`, one ν a matrix.

    Args:
        M: Matrices, (..., m, n).
        U: Their polar factors, same shape.

    Returns:
        The scaled factors, same shape. ν overflows only where the result does.

    Source:
        PolarGrad, arXiv 2505.21799, eq. 5.
    """
    return (M * U).sum(dim=(-2, -1), keepdim=True).clamp(min=0) * U
