"""Rules by polar factors: those of dense matrices, and the two hybrids with rows of unit length."""

from math import sqrt

from symlm_kernels.reference import center, normal, row_norms, unit_rows
from torch import Tensor

from symlm.polar.exact import with_nuclear_norm
from symlm.rules.rule import A_NUMBER_A_ROW, CENTERED_ROWS, DENSE, ELEMENTS, ROWS, Polar, rule


@rule(DENSE, fused=True)
def polar(M: Tensor, polar: Polar) -> Tensor:
    """Return the polar factor, `U_r V_rᵀ` of the thin SVD.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.

    Returns:
        The directions, same shape.

    Source:
        Muon, Jordan et al. 2024; arXiv 2505.21799.
    """
    return polar(M)


@rule(DENSE, fused=True)
def left_spectral(M: Tensor, polar: Polar) -> Tensor:
    """Return `(M Mᵀ)^{-1/2} M`, which is the polar factor; the cheaper Gram matrix is formed.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.

    Returns:
        The directions, same shape.

    Source:
        arXiv 2605.18106, section 3.5.
    """
    return polar(M)


@rule(DENSE, fused=True)
def right_spectral(M: Tensor, polar: Polar) -> Tensor:
    """Return `M (Mᵀ M)^{-1/2}`, which is the polar factor; the cheaper Gram matrix is formed.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.

    Returns:
        The directions, same shape.

    Source:
        arXiv 2605.18106, section 3.3.
    """
    return polar(M)


@rule(DENSE, degree=1)
def polargrad(M: Tensor, polar: Polar) -> Tensor:
    """Return the polar factor times the nuclear norm, `ν U`, `U = polar(M)`, `ν = ⟨M, U⟩ = ‖M‖_*`.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.

    Returns:
        The directions, same shape.

    Source:
        arXiv 2505.21799, eq. 5.
    """
    return with_nuclear_norm(M, polar(M))


@rule(ROWS)
def row_then_polar(M: Tensor, polar: Polar) -> Tensor:
    """Return `polar(D M)`, where D scales each row to unit length: the hybrid with α = 0.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.

    Returns:
        The directions, same shape.

    Source:
        arXiv 2605.18106, section 3.6.
    """
    return polar(unit_rows(M))


@rule(ROWS)
def polar_then_row(M: Tensor, polar: Polar) -> Tensor:
    """Return `D polar(M)`, where D scales each row to unit length.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.

    Returns:
        The directions, same shape; rows have unit length, zero rows stay zero.

    Source:
        arXiv 2605.18106, the published code, which has the hybrid in either order.
    """
    return unit_rows(polar(M))


@rule(ELEMENTS)
def muon_plus(M: Tensor, polar: Polar) -> Tensor:
    """Return the polar factor with rows of unit length, then columns: rotations of either side change it.

    `polar_then_row` is the variant with rows alone, which rotations of the columns do not change.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.

    Returns:
        The directions, same shape; columns have unit length, zero columns stay zero.

    Source:
        Muon+, arXiv 2602.21545, mode row_col.
    """
    return unit_rows(unit_rows(polar(M)).mT).mT


def _mean_square(M: Tensor, polar: Polar, row_square: Tensor, beta2: float) -> dict[str, Tensor]:
    """Refresh the mean square of each row of the polar factor, `v_i <- β₂v_i + (1−β₂)·mean_j U_ij²`."""
    return {"row_square": row_square.lerp(polar(M).square().mean(dim=-1, keepdim=True), 1 - beta2)}


@rule(ROWS, state={"row_square": A_NUMBER_A_ROW}, refresh=_mean_square)
def normuon(M: Tensor, polar: Polar, row_square: Tensor) -> Tensor:
    """Return the polar factor with rows over their size in the mean of steps, `U_i/√v_i` at U's Frobenius norm.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.
        row_square: The mean squares v after this step, (..., m, 1); a bias of all rows cancels in the norm.

    Returns:
        The directions, same shape; a row of zeros stays one.

    Source:
        NorMuon, arXiv 2510.05491.
    """
    U = polar(M)
    scaled = U / normal(row_square).sqrt()
    norm = scaled.norm(dim=(-2, -1), keepdim=True)
    return scaled * (U.norm(dim=(-2, -1), keepdim=True) / normal(norm))


@rule(ROWS)
def aurora(M: Tensor, polar: Polar) -> Tensor:
    """Return `polar(D'D M)` with rows of nearly one length: `D_i = 1/|M_i|`, `D'_i = √(n/m)/|U_i|` of `U = polar(D M)`.

    A wide matrix's factor has rows of one length already, and is `polar` alone, as a square's is. It costs two polar
    factors of a tall.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.

    Returns:
        The directions, same shape.

    Source:
        Aurora, Tilde Research's code and modded-nanogpt, track 3, which do the same by columns for wide matrices.
    """
    m, n = M.shape[-2:]
    if m <= n:
        return polar(M)
    X = unit_rows(M)
    return polar(X * (sqrt(n / m) / normal(row_norms(polar(X)))))


@rule(CENTERED_ROWS)
def centered_polar(M: Tensor, polar: Polar) -> Tensor:
    """Return `C polar(C M)`, where C subtracts the mean row: left-spectral on the quotient by the shared shift.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.

    Returns:
        The directions, same shape, with `1ᵀU = 0`.

    Source:
        arXiv 2605.18106, section 3.5.
    """
    return center(polar(center(M)))


@rule(CENTERED_ROWS, degree=1)
def centered_polargrad(M: Tensor, polar: Polar) -> Tensor:
    """Return `ν C polar(C M)`, ν the nuclear norm of `C M`: left-spectral on the quotient, α = 1.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.

    Returns:
        The directions, same shape, with `1ᵀU = 0`.

    Source:
        arXiv 2605.18106, section 3.5, and its scripts.
    """
    X = center(M)
    return center(with_nuclear_norm(X, polar(X)))


@rule(CENTERED_ROWS)
def centered_row_then_polar(M: Tensor, polar: Polar) -> Tensor:
    """Return `C polar(C D C M)`, the centered `row_then_polar`; C subtracts the mean row.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.

    Returns:
        The directions, same shape, with `1ᵀU = 0`.

    Source:
        arXiv 2605.18106, section 3.6.
    """
    return center(polar(center(unit_rows(center(M)))))


@rule(CENTERED_ROWS)
def centered_polar_then_row(M: Tensor, polar: Polar) -> Tensor:
    """Return `C D polar(C M)`, the centered `polar_then_row`; C subtracts the mean row.

    Args:
        M: The momentum, (..., m, n).
        polar: How polar factors are computed.

    Returns:
        The directions, same shape, with `1ᵀU = 0`.

    Source:
        arXiv 2605.18106, the published code, which has the hybrid in either order.
    """
    return center(unit_rows(polar(center(M))))
