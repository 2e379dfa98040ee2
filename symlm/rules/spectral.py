"""Rules by polar factors: those of dense matrices, and the two hybrids with rows of unit length."""

from symlm_kernels.reference import center, unit_rows
from torch import Tensor

from symlm.rules.rule import CENTERED_ROWS, DENSE, ROWS, Polar, rule
from symlm.rules.scaling import nuclear_norm


@rule(DENSE)
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


@rule(DENSE)
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


@rule(DENSE)
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
    return nuclear_norm(M, polar(M))


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
