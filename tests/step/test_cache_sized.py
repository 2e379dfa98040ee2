"""What a CPU computes in pieces that its cache holds, or by half, is what it computes whole."""

import pytest
import torch
from numerics import EXACT, FP32, relative
from symlm_kernels import reference
from symlm_kernels.reference import triangles
from torch import nn

import symlm
from symlm.polar import factor, newton_schulz, polar
from symlm.step import bucket


@pytest.fixture
def small_panels(monkeypatch):
    monkeypatch.setattr(triangles, "HALVED_FROM", 2)
    monkeypatch.setattr(triangles, "PANEL", 3)


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 9, 20), (3, 3, 3), (2, 4, 4)])
def test_symmetric_products_by_panels_are_the_products(shape, small_panels):
    """The upper triangle is not computed: a factor that is not symmetric shows it."""
    X = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = reference.gram(X)
    assert relative(A, X @ X.mT) < EXACT
    assert relative(reference.symmetric_product(A, A, A, 0.5, 2.0), 2.0 * A + 0.5 * A @ A) < EXACT
    skew = torch.arange(float(shape[1] ** 2), dtype=torch.float64).view(1, shape[1], shape[1]).expand_as(A)
    found = reference.symmetric_product(A, skew, A, 1.0, 0.0)
    assert torch.equal(found.tril(), found.mT.triu().mT.tril())
    assert (relative(found, A @ skew) > 0.01) == (shape[1] > 3)


def test_the_head_and_polar_factors_by_panels_are_those_of_whole_products(small_panels, monkeypatch):
    by_panels = [p.detach().clone() for p in trained(nn.Linear(10, 24, bias=False), "lm_head").parameters()]
    factors = polar(torch.eye(8, 12).double() + 0.1)
    monkeypatch.setattr(triangles, "HALVED_FROM", 10**9)
    whole = trained(nn.Linear(10, 24, bias=False), "lm_head")
    assert relative(by_panels[0], whole.weight.detach()) < EXACT
    assert relative(factors, polar(torch.eye(8, 12).double() + 0.1)) < EXACT


def trained(model, role, steps=3, **options):
    """Return the model, with weights that depend on its shape alone, after steps of seeded gradients."""
    model, generator = model.double(), torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, dtype=p.dtype, generator=generator)
    optimizer = symlm.SymOptimizer(model, roles={"*weight": role}, **options)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        optimizer.step()
    return model


@pytest.mark.parametrize("role", ["matrix", "mlp_out"])
@pytest.mark.parametrize("options", [{}, {"momentum_of": "directions"}, {"constraint": "fixed_norm"}])
def test_parts_of_a_bucket_are_the_bucket(role, options, monkeypatch):
    """All phases of a part run before the next part's first, and numbers stay as they are, bit for bit."""

    def model():
        return nn.Sequential(*(nn.Linear(6, 4, bias=False) for _ in range(5)))

    whole = trained(model(), role, **options)
    parts = []
    inputs = bucket.rule_inputs
    monkeypatch.setattr(bucket, "JOINED_ELEMENTS", 0)
    monkeypatch.setattr(bucket, "CPU_PART_ELEMENTS", 50)
    monkeypatch.setattr(
        bucket, "rule_inputs", lambda group, some, finite: (parts.append(len(some)), inputs(group, some, finite))[1]
    )
    split = trained(model(), role, **options)
    assert parts == [2, 2, 1] * 3
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.equal(p, q)


def test_matrices_iterated_alone_are_those_of_the_stack(monkeypatch):
    M = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0))
    together = polar(M)
    monkeypatch.setattr(factor, "CPU_PART", 60)
    assert torch.equal(polar(M), together)


@pytest.mark.parametrize("shape", [(6, 9), (5, 5)])
def test_a_matrix_multiplied_as_it_is_is_that_of_a_stack(shape, monkeypatch):
    M = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stacked, called = polar(M), []
    of_one = newton_schulz._of_one
    monkeypatch.setattr(newton_schulz, "_of_one", lambda *given: (called.append(1), of_one(*given))[1])
    monkeypatch.setattr(newton_schulz, "ALONE_FROM", 2)
    assert relative(polar(M), stacked) < EXACT
    assert called


@pytest.mark.parametrize("scale", [1e-30, 1e30, 0.0])
def test_only_rows_and_matrices_of_extreme_squares_are_divided_first(scale):
    """Squares of 1e30 overflow and of 1e-30 vanish; the others' numbers do not depend on what is beside them."""
    X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    mixed = torch.cat([X[:2], X[2:] * scale])
    norms = reference.row_norms(mixed)
    assert torch.equal(norms[:2], reference.row_norms(X)[:2])
    assert relative(norms[2:].double(), X[2:].double().norm(dim=1, keepdim=True) * scale) < FP32
    stack = torch.stack([X, X * scale])
    assert torch.equal(polar(stack)[0], polar(X))
    assert relative(polar(stack)[1], polar(X) if scale else torch.zeros_like(X)) < 10 * FP32
