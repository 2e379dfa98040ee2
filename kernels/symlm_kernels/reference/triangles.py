"""Symmetric products on a CPU by panels of rows, of which the lower triangle is computed and then mirrored."""

import torch
from torch import Tensor

HALVED_FROM = 512  # the side; of 256 panels take as long as the whole
PANEL = 256  # rows; of side 1,024, narrower or wider panels take longer


def is_halved(X: Tensor, side: int) -> bool:
    """Return whether a symmetric product of this side takes less time by panels: on a CPU, of large matrices.

    Args:
        X: A factor, of which the device and dtype matter.
        side: The side of the product.
    """
    return X.device.type == "cpu" and X.element_size() >= 4 and side >= HALVED_FROM


def panels(side: int) -> list[tuple[slice, slice]]:
    """Divide the lower triangle of a matrix into panels.

    Args:
        side: The side of the matrix.

    Returns:
        The rows of each panel, and its columns, which end with the diagonal.
    """
    stops = [min(start + PANEL, side) for start in range(0, side, PANEL)]
    return [(slice(stop - 1 - (stop - 1) % PANEL, stop), slice(0, stop)) for stop in stops]


def add_lower_product(A: Tensor, B: Tensor, C: Tensor, alpha: float, beta: float, out: Tensor) -> Tensor:
    """Write the lower triangle of `β C + α A B` into `out`.

    Args:
        A: Matrices, (b, m, k).
        B: Matrices, (b, k, m).
        C: Matrices, (b, m, m); not read if β is 0. It may be `out`.
        alpha: The factor α.
        beta: The factor β.
        out: The matrices, (b, m, m); entries above the diagonal panels are not written.

    Returns:
        `out`.
    """
    for rows, columns in panels(out.shape[-1]):
        torch.baddbmm(
            C[:, rows, columns], A[:, rows], B[..., columns], alpha=alpha, beta=beta, out=out[:, rows, columns]
        )
    return out


def mirrored(A: Tensor) -> Tensor:
    """Copy the lower triangle of panels onto the upper one, in place.

    Args:
        A: Matrices, (..., m, m), of which the panels are computed.

    Returns:
        A, symmetric but for the rounding inside the panels of the diagonal.
    """
    for rows, _ in panels(A.shape[-1])[1:]:
        A[..., : rows.start, rows] = A[..., rows, : rows.start].mT
    return A
