"""Each polar method against the SVD in float64, its singular-value range and its edges."""

import pytest
import torch
from numerics import EXACT, EXACT_POLAR_FP32, relative
from symlm_kernels import reference
from torch import nn

from symlm import SymOptimizer
from symlm.polar import SCHEDULES, operations
from symlm.polar.factor import METHODS, polar
from symlm.polar.inverse_roots import CUTOFF, inverse_root
from symlm.polar.newton_schulz import gram_newton_schulz
from symlm.polar.precision import fastest_dtype, full_precision


def spectrum(m, n, smallest, seed=0):
    """Return a matrix whose singular values run from 1 to `smallest` of the Frobenius norm, logarithmically."""
    generator = torch.Generator().manual_seed(seed)
    r = min(m, n)
    U = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64, generator=generator)).Q
    S = torch.logspace(0, torch.tensor(smallest).log10().item(), r, dtype=torch.float64)
    return (U * S) @ V.mT, U @ V.mT


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (8, 8), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("method", ["svd", "qdwh"])
def test_exact_methods_give_the_polar_factor(method, shape):
    M, U = spectrum(*shape, 1e-2)
    assert relative(polar(M, method), U) < 1e-11
    assert relative(polar(M.float(), method).double(), U) < EXACT_POLAR_FP32


@pytest.mark.parametrize("shape", [(12, 7), (7, 30), (8, 8)])
def test_long_schedules_converge_to_the_polar_factor(shape):
    M, U = spectrum(*shape, 1e-2)
    assert relative(polar(M, schedule="polar_express_long", steps=10), U) < 1e-7
    assert relative(polar(M, schedule="newton_schulz", steps=40), U) < EXACT


@pytest.mark.parametrize(
    ("schedule", "steps", "smallest", "low", "high"),
    [
        ("muon", 5, 1e-2, 0.68, 1.13),
        ("muon", 5, 1e-3, 0.47, 1.20),
        ("polar_express", 5, 1e-3, 0.859, 1.141),
        ("polar_express_long", 5, 1e-2, 0.846, 1.124),
        ("polar_express_long", 8, 1e-3, 0.9999, 1.0001),
    ],
)
@pytest.mark.parametrize("method", ["newton_schulz", "gram_newton_schulz"])
def test_singular_values_end_in_their_range(schedule, steps, smallest, low, high, method):
    diagonal = torch.logspace(0, torch.tensor(smallest).log10().item(), 200, dtype=torch.float64)
    diagonal = torch.cat([diagonal, torch.ones(1, dtype=torch.float64) * 0])
    M = torch.diag(diagonal / diagonal.norm())
    keep = torch.diag(M) >= smallest * SCHEDULES[schedule].bound  # the target counts from the first step's input
    S = torch.diag(polar(M, method, schedule=schedule, steps=steps))[keep]
    assert S.min() > low - 0.01
    assert S.max() < high + 0.01


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16), (5, 3, 40)])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_gram_iteration_is_newton_schulz(shape, schedule, steps):
    M = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    arguments = {"schedule": schedule, "steps": steps}
    assert relative(polar(M, "gram_newton_schulz", **arguments), polar(M, **arguments)) < EXACT


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["newton_schulz", "gram_newton_schulz"])
def test_either_gram_side_gives_the_same_matrix(side, method):
    M, _ = spectrum(12, 7, 1e-1)
    assert relative(polar(M, method, side=side), polar(M, method)) < EXACT


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_edges_are_defined(method, dtype):
    deficient = torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 9.0))
    M = torch.stack([torch.zeros(5, 8), deficient, torch.eye(5, 8)]).to(dtype)
    before = M.clone()
    U = polar(M, method)
    assert torch.equal(M, before)
    assert U.dtype == dtype
    assert U[0].eq(0).all()
    assert torch.linalg.matrix_norm(U.double(), 2).max() < 1.3
    assert polar(torch.zeros(0, 4), method).shape == (0, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_scale_is_ignored(method, factor):
    M = spectrum(6, 9, 1e-1)[0].float()
    assert relative(polar(M * factor, method), polar(M, method)) < EXACT_POLAR_FP32


def test_bad_arguments_name_themselves():
    M = torch.eye(3)
    with pytest.raises(ValueError, match="unknown polar method 'qr'"):
        polar(M, "qr")
    with pytest.raises(ValueError, match="unknown schedule 'moun'"):
        polar(M, schedule="moun")
    with pytest.raises(ValueError, match="side is"):
        polar(M, side="top")
    with pytest.raises(TypeError, match="real floating-point"):
        polar(M.to(torch.complex64))


def halves_out_of_range(dtype, monkeypatch=None, restart=2):
    """Return how far singular values of a Gram iteration in this dtype are from [0.859, 1.141], condition 1e2."""
    if monkeypatch:
        monkeypatch.setattr("symlm.polar.newton_schulz.RESTART", restart)
    M, _ = spectrum(64, 128, 1e-2)
    X, table = (M.float() / (1.02 * M.norm().float())).to(dtype), SCHEDULES["polar_express"]
    S = torch.linalg.svdvals(gram_newton_schulz(X[None], table.steps(5), reference)[0].double())
    return max(S.max().item() - 1.141, 0.859 - S.min().item())


def test_the_gram_iteration_is_for_fp16_and_not_for_bf16(monkeypatch):
    assert halves_out_of_range(torch.float16) < 0.02
    assert halves_out_of_range(torch.bfloat16) > 0.05
    assert halves_out_of_range(torch.float16, monkeypatch, restart=5) > 0.05
    assert fastest_dtype("cuda", gram=True) == torch.float16


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_gram_iteration_is_refused_in_bf16(dtype):
    chosen = {"compute_dtype": dtype}
    with pytest.raises(ValueError, match="take compute_dtype='float16'"):
        polar(torch.eye(4).bfloat16(), "gram_newton_schulz", **chosen)
    with pytest.raises(ValueError, match="take compute_dtype='float16'"):
        SymOptimizer(nn.Linear(4, 4), polar_method="gram_newton_schulz", roles={"weight": "matrix"}, **chosen)


@pytest.mark.parametrize("method", ["newton_schulz", "gram_newton_schulz"])
@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_fp16_has_room_for_any_scale(method, factor):
    M = spectrum(6, 9, 1e-1)[0].float()
    found = [polar(x, method, compute_dtype=torch.float16) for x in (M * factor, M)]
    assert relative(*found) < 1e-3


def test_auto_takes_the_cheaper_iteration():
    counts = [operations(64, 72, 5, method, halves=True) for method in ("gram_newton_schulz", "newton_schulz")]
    assert counts[0] < counts[1]  # of half products already where whole ones cost more
    assert operations(64, 72, 5, "auto") == operations(64, 72, 5, "newton_schulz")
    assert operations(1024, 3072, 5, "auto") == operations(3072, 1024, 5, "gram_newton_schulz")
    assert operations(64, 64, 5, "auto") == operations(64, 64, 5, "newton_schulz")


def test_auto_takes_one_dtype_on_every_cpu_and_never_the_gram_iteration_in_bf16():
    assert fastest_dtype("cpu") == torch.float32
    assert fastest_dtype("cuda") == torch.bfloat16
    M = spectrum(32, 128, 1e-1)[0].float()
    for told, method in (("auto", "gram_newton_schulz"), ("bfloat16", "newton_schulz")):
        assert torch.equal(polar(M, "auto", compute_dtype=told), polar(M, method, compute_dtype=told))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_inverse_root_is_the_root_of_the_inverse_above_the_cutoff(dtype):
    Q, _ = torch.linalg.qr(torch.randn(2, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    eigenvalues = torch.logspace(-9, 3, 40, dtype=torch.float64)
    K = Q * eigenvalues @ Q.mT
    found = (Q.mT @ inverse_root(K.to(dtype)).double() @ Q).diagonal(dim1=-2, dim2=-1)
    exact = (eigenvalues / eigenvalues.sum() + CUTOFF).rsqrt()
    assert (found / exact - 1).abs().max() < 0.16
    assert inverse_root(torch.zeros(3, 3)).isfinite().all()
    assert relative(inverse_root(1e-30 * K.to(dtype)), inverse_root(K.to(dtype))) < 1e-2


@pytest.mark.parametrize("allowed", ["tf32", "ieee"])
def test_tf32_is_off_for_a_whiteners_products_and_comes_back(allowed):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = allowed
    with full_precision():
        inside = matmul.fp32_precision
    after, matmul.fp32_precision = matmul.fp32_precision, before
    assert (inside, after) == ("ieee", allowed)
