"""ARO's two factorizations agree, its fixed point is the polar factor, and its state is what makes it equivariant."""

import pytest
import torch
from numerics import EXACT, relative

from symlm.polar import polar
from symlm.polar.exact import cholesky_qr, orthonormal
from symlm.rules import RULES
from symlm.rules.rotated import refresh, rotate, sinkhorn


def matrix(m, n, seed=0):
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("qr", [cholesky_qr, orthonormal])
def test_a_rotation_of_rows_moves_direction_and_state(qr):
    M, R, Q = matrix(7, 12), orthonormal(matrix(7, 7, 2)), orthonormal(matrix(7, 7, 3))
    state, shared_rotation = refresh(sinkhorn, qr)(M, R), refresh(sinkhorn, qr)(Q @ M, Q @ R)
    assert relative(shared_rotation["rotation"], Q @ state["rotation"]) < 1e3 * EXACT
    U = rotate(M, state["rotation"], sinkhorn)
    assert relative(rotate(Q @ M, shared_rotation["rotation"], sinkhorn), Q @ U) < 1e3 * EXACT


def test_with_unit_rows_the_fixed_point_is_the_polar_factor():
    M = matrix(7, 12)
    state = RULES["aro_rows"].start(M)
    for _ in range(2000):
        state = RULES["aro_rows"].refreshed(M, state)
    assert relative(RULES["aro_rows"].direction(M, state), 12**0.5 * polar(M, "svd")) < 1e-7


def test_both_factorizations_agree_and_a_singular_matrix_falls_back():
    A = matrix(7, 7)
    assert relative(cholesky_qr(A), orthonormal(A)) < 1e-3
    singular = A.clone()
    singular[:, 3] = 0
    for Q in (cholesky_qr(singular), cholesky_qr(torch.zeros(3, 3)), cholesky_qr(1e-30 * A.float())):
        assert Q.isfinite().all()
        assert relative(Q.mT @ Q, torch.eye(len(Q), dtype=Q.dtype)) < 1e-2


@pytest.mark.parametrize("name", [name for name in RULES if name.startswith("aro_")])
def test_the_direction_has_unit_rms_and_the_rotation_stays_one(name):
    M, rule = matrix(7, 12), RULES[name]
    state = rule.start(M)
    for k in range(5):
        state = rule.refreshed(matrix(7, 12, k), state)
        U = rule.direction(matrix(7, 12, k), state)
        assert U.square().mean().item() == pytest.approx(1)
        R = state["rotation"]
        assert relative(R.mT @ R, torch.eye(7)) < 1e-6
