"""ARO's rotation is state: transported with the gradient the map is equivariant, left behind it is not."""

import pytest
import torch
from numerics import EXACT, MUST_FAIL, relative

from symlm.aro import BASES, aro, cholesky_qr, orthonormal
from symlm.polar import polar


def matrix(m, n, seed=0):
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(n, seed=1):
    return torch.linalg.qr(matrix(n, n, seed))[0]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("qr", ["householder", "cholesky"])
def test_a_rotation_of_rows_moves_direction_and_state(base, qr):
    M, R, Q = matrix(7, 12), orthogonal(7, 2), orthogonal(7, 3)
    U, new = aro(M, R, base, qr)
    rotated, rotated_new = aro(Q @ M, Q @ R, base, qr)
    assert relative(rotated, Q @ U) < 1e3 * EXACT
    assert relative(rotated_new, Q @ new) < 1e3 * EXACT


@pytest.mark.parametrize("base", BASES)
def test_untransported_state_breaks_it(base):
    M, R, Q = matrix(7, 12), orthogonal(7, 2), orthogonal(7, 3)
    assert relative(aro(Q @ M, R, base)[0], Q @ aro(M, R, base)[0]) > MUST_FAIL


def test_columns_are_permuted_and_rows_alone_allow_rotations():
    M, R, P, Q = matrix(7, 12), orthogonal(7), torch.eye(12).double()[torch.randperm(12)], orthogonal(12)
    for base in BASES:
        assert relative(aro(M @ P, R, base)[0], aro(M, R, base)[0] @ P) < 1e3 * EXACT
        departure = relative(aro(M @ Q, R, base)[0], aro(M, R, base)[0] @ Q)
        assert departure < 1e3 * EXACT if base == "rows" else departure > MUST_FAIL


def test_with_row_norm_the_fixed_point_is_the_polar_factor():
    M, R = matrix(7, 12), torch.eye(7, dtype=torch.float64)
    for _ in range(2000):
        U, R = aro(M, R, "rows", "householder")
    assert relative(U, 12**0.5 * polar(M, "svd")) < 1e-10


def test_both_factorizations_agree_and_a_singular_matrix_falls_back():
    A = matrix(7, 7)
    assert relative(cholesky_qr(A), orthonormal(A)) < 1e-3
    singular = A.clone()
    singular[:, 3] = 0
    for Q in (cholesky_qr(singular), cholesky_qr(torch.zeros(3, 3)), cholesky_qr(1e-30 * A.float())):
        assert Q.isfinite().all()
        assert relative(Q.mT @ Q, torch.eye(len(Q), dtype=Q.dtype)) < 1e-2


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown base 'adam'"):
        aro(matrix(2, 2), torch.eye(2), "adam")
    with pytest.raises(ValueError, match="unknown qr 'lu'"):
        aro(matrix(2, 2), torch.eye(2), qr="lu")
