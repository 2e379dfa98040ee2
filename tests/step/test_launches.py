"""How many operations a step launches: few, and no more for more layers."""

import pytest
import torch
from benchmarks.recording import Launches
from models import tiny
from numerics import relative

import symlm
from symlm.step import bucket


def stepped(layers, **sizes):
    torch.manual_seed(0)
    model = tiny(num_hidden_layers=layers, **sizes)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    optimizer = symlm.SymOptimizer(model)
    optimizer.step()
    with Launches() as launches:
        optimizer.step()
    return model, launches.by_name


def test_a_step_launches_few_operations_however_deep_the_model():
    _, shallow = stepped(4, hidden_size=64, intermediate_size=192)
    _, deep = stepped(28, hidden_size=64, intermediate_size=192)
    assert deep.total() <= 230, deep.most_common()
    assert deep == shallow


def test_bytes_are_those_of_operands_and_results():
    a, b, A = torch.ones(10), torch.ones(10), torch.ones(3, 3)
    with Launches() as found:
        a + b
        a.add_(b)
        torch._foreach_mul_([a, b], 2.0)
        A @ A
        a.view(2, 5)
    assert found.by_name.total() == 4
    assert found.bytes == 4 * (30 + 30 + 40 + 18)


def test_small_matrices_of_several_roles_are_one_stack(monkeypatch):
    """Their polar factors are those of each role alone, and a large bucket is left alone."""
    together, few = stepped(2)
    monkeypatch.setattr(bucket, "JOINED_ELEMENTS", 0)
    alone, many = stepped(2)
    assert few["baddbmm"] < many["baddbmm"]
    for (name, p), q in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert relative(p, q) < 1e-6, name


@pytest.mark.parametrize("value", [1e-30, 1e30])
def test_a_gradient_whose_squares_vanish_or_overflow_is_one(value):
    """The look at all gradients takes Euclidean norms, which see neither."""
    model = tiny(num_hidden_layers=1)
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = symlm.SymOptimizer(model, nonfinite="raise")
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True) if p.ndim > 1]
    assert sum(moved) >= len(moved) - 1  # a head whose rows have equal gradients stays: a softmax does not see them
