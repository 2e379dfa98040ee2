"""SOAP before the polar factor: the momentum is whitened by entries in the eigenbases of its Gram matrices.

The bases are state, and so are the Gram matrices: under `M -> L M Rᵀ` they are moved along, and the coordinates in the
bases stay as they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from symlm.polar.exact import orthonormal
from symlm.rules.rotated import mean_root, next_rotation, raw, unit_rms
from symlm.rules.rule import A_GRAM_MATRIX, A_ROTATION, DENSE, ROWS, Polar, State, rule

# Added to √V, relative to its largest entry: coordinates that are rounding alone, as of a tall matrix's null space,
# stay small. The value was chosen here; no record.
FLOOR = 1e-4


def _square_of(axis: int) -> Callable[[Tensor], Tensor]:
    """Return the function that makes a square matrix of zeros, as wide as an axis of M."""
    return lambda M: M.new_zeros(*M.shape[:-2], M.shape[axis], M.shape[axis])


LEFT = {"left_gram": State(_square_of(-2), "left", A_GRAM_MATRIX.act), "left_basis": A_ROTATION}
RIGHT = {"right_gram": A_GRAM_MATRIX, "right_basis": State(lambda M: A_ROTATION.start(M.mT), "right", A_ROTATION.act)}
ROOTS = State(torch.zeros_like, "left", lambda V, L: V)
ROWS_ROOTS = State(torch.zeros_like, "left", lambda V, L: L.abs() @ V, rotations=False)


def _turned(D: Tensor, gram: Tensor, basis: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """Return the next mean of `DDᵀ`, and its eigenbasis, one power step and a QR ahead."""
    K, Q = gram.to(D.dtype).lerp(D @ D.mT, 1 - beta2), basis.to(D.dtype)
    return K, next_rotation(K @ Q, Q, orthonormal)


def _unit(M: Tensor) -> Tensor:
    """Return M in fp32 or wider, at a Frobenius norm of 1."""
    return unit_rms(raw(M)) / (M.shape[-2] * M.shape[-1]) ** 0.5


def _whitened(P: Tensor, roots: Tensor) -> Tensor:
    """Return `P/√V` by entries, with a floor."""
    bounds = roots + FLOOR * roots.amax((-2, -1), keepdim=True)
    return P / torch.where(bounds > 0, bounds, 1.0)  # of denormals both may vanish


def _refresh(
    M: Tensor,
    left_gram: Tensor,
    right_gram: Tensor,
    left_basis: Tensor,
    right_basis: Tensor,
    roots: Tensor,
    beta2: float,
) -> dict[str, Tensor]:
    """Return the next Gram matrices, bases, and mean roots in these."""
    D = _unit(M)
    L, Q = _turned(D, left_gram, left_basis, beta2)
    K, R = _turned(D.mT, right_gram, right_basis, beta2)
    roots = mean_root(roots.to(D.dtype), Q.mT @ raw(M) @ R, beta2)
    return {"left_gram": L, "left_basis": Q, "right_gram": K, "right_basis": R, "roots": roots}


@rule(DENSE, state={**LEFT, **RIGHT, "roots": ROOTS}, refresh=_refresh)
def soap_polar(M: Tensor, polar: Polar, left_basis: Tensor, right_basis: Tensor, roots: Tensor) -> Tensor:
    """Return `Q_L polar(P/√V) Q_Rᵀ`, `P = Q_Lᵀ M Q_R`, `V <- β₂V + (1−β₂)P²`, Q the eigenbases of M's Gram matrices.

    `L <- β₂L + (1−β₂)MMᵀ/|M|²` and `R <- β₂R + (1−β₂)MᵀM/|M|²`; a basis is one power step and a QR ahead of the last,
    `Q <- QR(LQ + εQ)`. The sources take the gradient's Gram matrices; a rule sees the momentum alone.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.
        left_basis: Q_L after this step, (..., m, m).
        right_basis: Q_R after this step, (..., n, n).
        roots: `√V` after this step, (..., m, n).

    Returns:
        The directions, same shape.

    Source:
        SOAP, arXiv 2409.11321; SOAP-Muon, modded-nanogpt, track 3.
    """
    X = raw(M)
    Q, R = left_basis.to(X.dtype), right_basis.to(X.dtype)
    return (Q @ polar(_whitened(Q.mT @ X @ R, roots.to(X.dtype))) @ R.mT).to(M.dtype)


def _refresh_rows(M: Tensor, right_gram: Tensor, right_basis: Tensor, roots: Tensor, beta2: float) -> dict[str, Tensor]:
    """Return the next Gram matrix of the columns, its basis, and the mean roots in it."""
    K, R = _turned(_unit(M).mT, right_gram, right_basis, beta2)
    return {"right_gram": K, "right_basis": R, "roots": mean_root(roots.to(R.dtype), raw(M) @ R, beta2)}


@rule(ROWS, state={**RIGHT, "roots": ROWS_ROOTS}, refresh=_refresh_rows)
def soap_rows_polar(M: Tensor, polar: Polar, right_basis: Tensor, roots: Tensor) -> Tensor:
    """Return `polar(P/√V) Q_Rᵀ`, `P = M Q_R`: `soap_polar` on the side where rotations are a symmetry and rows are not.

    Rows are neurons, each with a basis vector of its own already. It stores `mn + 2n²` numbers beside the momentum.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.
        right_basis: Q_R after this step, (..., n, n).
        roots: `√V` after this step, (..., m, n).

    Returns:
        The directions, same shape.

    Source:
        One-sided SOAP, arXiv 2409.11321, section 5; the polar factor behind it as SOAP-Muon.
    """
    X, R = raw(M), right_basis.to(raw(M).dtype)
    return (polar(_whitened(X @ R, roots.to(X.dtype))) @ R.mT).to(M.dtype)


FIRST_VALUE = 0.1  # λ before the first step, of the source's code

# A gradient that many times the first begins anew: beside its square nothing of what was is left in fp32, and its
# fourth power has to stay finite.
FORGOTTEN = 1e8

VALUES = State(lambda M: torch.full_like(M[..., :1], FIRST_VALUE), "left", lambda v, L: v)
KL = {
    **LEFT,
    **RIGHT,
    "left_values": VALUES,
    "right_values": State(lambda M: VALUES.start(M.mT), "right", lambda v, R: v),
    "coordinates": ROOTS,
    "roots": ROOTS,
    "size": State(lambda M: torch.zeros_like(M[..., :1, :1]), "left", lambda s, L: s),
}


def _rms(M: Tensor) -> Tensor:
    """Return the RMS of each matrix, (..., 1, 1), without a square that overflows; of zeros 0."""
    largest = M.abs().amax((-2, -1), keepdim=True)
    scaled = M / torch.where(largest > 0, largest, 1.0)
    return largest * scaled.square().mean((-2, -1), keepdim=True).sqrt()


def _inverse(values: Tensor) -> Tensor:
    """Return `1/λ` with a floor."""
    return 1 / (values + FLOOR * values.amax((-2, -1), keepdim=True))


def _ahead(gram: Tensor, basis: Tensor, first: Tensor) -> Tensor:
    """Return the basis one power step of the Gram matrix ahead; of this step's in the first."""
    known = gram.abs().amax((-2, -1), keepdim=True) > 0
    K = torch.where(known, gram, first)
    ahead = next_rotation(K @ basis, basis, orthonormal)
    return torch.where(K.abs().amax((-2, -1), keepdim=True) > 0, ahead, basis)


def _refresh_kl(
    M: Tensor,
    left_gram: Tensor,
    right_gram: Tensor,
    left_basis: Tensor,
    right_basis: Tensor,
    left_values: Tensor,
    right_values: Tensor,
    coordinates: Tensor,
    roots: Tensor,
    size: Tensor,
    beta1: float,
    beta2: float,
) -> dict[str, Tensor]:
    """Return the next bases, by the Gram matrices before this step; then these, their values, and Adam's means."""
    X, (m, n) = raw(M), M.shape[-2:]
    A, B, Q, R, a, b, P, V, s = (
        x.to(X.dtype)
        for x in (left_gram, right_gram, left_basis, right_basis, left_values, right_values, coordinates, roots, size)
    )
    rms = _rms(X)
    begins = rms > FORGOTTEN * s
    s = torch.where(begins, rms, s)
    A, B, P, V = (torch.where(begins, 0.0, x) for x in (A, B, P, V))
    a, b = (torch.where(begins, FIRST_VALUE, x) for x in (a, b))
    G = X / torch.where(s > 0, s, 1.0)
    mean = Q @ P @ R.mT
    Q, R = _ahead(A, Q, G @ G.mT), _ahead(B, R, G.mT @ G)
    Y = Q.mT @ G @ R
    over_a, over_b = _inverse(a), _inverse(b)
    left, right = G @ R * over_b.mT.sqrt(), G.mT @ Q * over_a.mT.sqrt()
    return {
        "left_gram": beta2 * A + (1 - beta2) / n * left @ left.mT,
        "right_gram": beta2 * B + (1 - beta2) / m * right @ right.mT,
        "left_basis": Q,
        "right_basis": R,
        "left_values": beta2 * a + (1 - beta2) * (Y.square() * over_b.mT).mean(-1, keepdim=True),
        "right_values": beta2 * b + (1 - beta2) * (Y.square() * over_a).mean(-2, keepdim=True).mT,
        "coordinates": Q.mT @ torch.lerp(G, mean, beta1) @ R,
        "roots": mean_root(V, Y, beta2),
        "size": s,
    }


@rule(DENSE, state=KL, refresh=_refresh_kl, own_mean=True)
def kl_soap(
    M: Tensor,
    left_basis: Tensor,
    right_basis: Tensor,
    coordinates: Tensor,
    roots: Tensor,
    step: Tensor | int,
    beta1: float,
    beta2: float,
) -> Tensor:
    """Return `Q_a (P/√V) Q_bᵀ`, Adam in the eigenbases of two factors that whiten each other.

    `S_a` is the mean of `GS_b⁻¹Gᵀ/n` and `S_b` that of `GᵀS_a⁻¹G/m`, of β₂; `S⁻¹ = QΛ⁻¹Qᵀ`, λ the mean of the diagonal
    in Q. A basis is one power step and a QR ahead of the last. M is the gradient, in units of its first RMS; a gradient
    1e8 times as large begins anew.

    Args:
        M: The gradient, (..., m, n).
        left_basis: Q_a of this step, (..., m, m).
        right_basis: Q_b of this step, (..., n, n).
        coordinates: P, the mean of gradients in these bases, (..., m, n).
        roots: √V, (..., m, n).
        step: The number of the step t, for Adam's `1 − β^t`.
        beta1: β₁.
        beta2: β₂.

    Returns:
        The directions, same shape.

    Source:
        KL-SOAP, Lin et al., arXiv 2509.03378, claims 2 and 3; Adam's corrections as in NVIDIA's Emerging-Optimizers.
    """
    Q, R = left_basis.to(raw(M).dtype), right_basis.to(raw(M).dtype)
    t = step.to(Q.dtype) if isinstance(step, torch.Tensor) else step
    P, V = coordinates.to(Q.dtype) / (1 - beta1**t), roots.to(Q.dtype) / (1 - beta2**t) ** 0.5
    return (Q @ _whitened(P, V) @ R.mT).to(M.dtype)
