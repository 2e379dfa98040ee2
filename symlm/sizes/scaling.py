"""The factor by which a direction is multiplied, of its shape alone: m rows (outputs) and n columns (inputs).

`SCALES` has them by name. Each takes `(m, n)` and returns the factor.
"""

from collections.abc import Callable
from math import sqrt


def unit(m: int, n: int) -> float:
    """Return 1, which leaves the size that the rule gives."""
    return 1.0


def rms_to_rms(m: int, n: int) -> float:
    """Return `√(m/n)`, which gives a semi-orthogonal update the RMS-to-RMS operator norm 1.

    Source:
        arXiv 2310.17813.
    """
    return sqrt(m / n)


def match_adamw_rms(m: int, n: int) -> float:
    """Return `0.2·√max(m, n)`, which gives a semi-orthogonal update AdamW's RMS, 0.2.

    Source:
        arXiv 2502.16982, eq. 4.
    """
    return 0.2 * sqrt(max(m, n))


def keller(m: int, n: int) -> float:
    """Return `√max(1, m/n)`, Muon's factor for m outputs and n inputs.

    Source:
        Jordan et al. 2024, Muon.
    """
    return sqrt(max(1.0, m / n))


def row_rms(m: int, n: int) -> float:
    """Return `√n`, which gives a row of unit length RMS 1, so that a token's vector moves alike at every width."""
    return sqrt(n)


def inverse_row_rms(m: int, n: int) -> float:
    """Return `1/√n`: a unit row, so scaled, changes a logit by at most 1 for inputs of RMS 1, at every width."""
    return 1 / sqrt(n)


def match_adamw_rms_of_rows(m: int, n: int) -> float:
    """Return `0.2·√n`, which gives rows of unit length AdamW's RMS 0.2."""
    return 0.2 * sqrt(n)


def match_adamw_rms_of_matrix(m: int, n: int) -> float:
    """Return `0.2·√(mn)`, which gives a matrix of Frobenius norm 1 AdamW's RMS 0.2."""
    return 0.2 * sqrt(m * n)


def adamw_rms(m: int, n: int) -> float:
    """Return 0.2, which gives a direction of RMS 1 AdamW's RMS.

    Source:
        arXiv 2602.09006.
    """
    return 0.2


def inverse_inputs(m: int, n: int) -> float:
    """Return `1/n`, Scion's factor of a sign update for n inputs.

    Source:
        arXiv 2502.07529, table 3.
    """
    return 1 / n


SCALES: dict[str, Callable[[int, int], float]] = {
    f.__name__: f
    for f in (
        unit,
        rms_to_rms,
        match_adamw_rms,
        keller,
        row_rms,
        inverse_row_rms,
        match_adamw_rms_of_rows,
        match_adamw_rms_of_matrix,
        adamw_rms,
        inverse_inputs,
    )
}
