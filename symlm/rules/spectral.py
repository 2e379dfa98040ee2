"""Rules by polar factors: dense matrices, and the two hybrids with rows of unit length."""

from symlm_kernels.reference import center, unit_rows
from torch import Tensor

from symlm.rules.rule import CENTERED_ROWS, DENSE, ROWS, Polar, rule
from symlm.rules.scaling import nuclear_norm


@rule(DENSE)
def polar(M: Tensor, polar: Polar) -> Tensor:
    """Return `U_r V_rᵀ` of the thin SVD.  Source: Muon, Jordan et al. 2024; arXiv 2505.21799."""
    return polar(M)


@rule(DENSE)
def left_spectral(M: Tensor, polar: Polar) -> Tensor:
    """Return `(M Mᵀ)^{-1/2} M`, which is the polar factor; the Gram side that is formed is the cheaper one.

    Source: arXiv 2605.18106, section 3.5.
    """
    return polar(M)


@rule(DENSE)
def right_spectral(M: Tensor, polar: Polar) -> Tensor:
    """Return `M (Mᵀ M)^{-1/2}`, which is the polar factor; the Gram side that is formed is the cheaper one.

    Source: arXiv 2605.18106, section 3.3.
    """
    return polar(M)


@rule(DENSE, degree=1)
def polargrad(M: Tensor, polar: Polar) -> Tensor:
    """Return `ν U`, `U = polar(M)`, `ν = ⟨M, U⟩ = ‖M‖_*`.  Source: arXiv 2505.21799, eq. 5."""
    return nuclear_norm(M, polar(M))


@rule(ROWS)
def row_then_polar(M: Tensor, polar: Polar) -> Tensor:
    """Return `polar(D M)`, D scaling rows to unit length (the hybrid with α = 0)."""
    return polar(unit_rows(M))


@rule(ROWS)
def polar_then_row(M: Tensor, polar: Polar) -> Tensor:
    """Return `D polar(M)`, D scaling rows to unit length."""
    return unit_rows(polar(M))


@rule(CENTERED_ROWS)
def centered_polar(M: Tensor, polar: Polar) -> Tensor:
    """Return `C polar(C M)`: left-spectral on the quotient by the shared shift."""
    return center(polar(center(M)))


@rule(CENTERED_ROWS)
def centered_row_then_polar(M: Tensor, polar: Polar) -> Tensor:
    """Return `C polar(C D C M)`."""
    return center(polar(center(unit_rows(center(M)))))


@rule(CENTERED_ROWS)
def centered_polar_then_row(M: Tensor, polar: Polar) -> Tensor:
    """Return `C D polar(C M)`."""
    return center(unit_rows(polar(center(M))))
