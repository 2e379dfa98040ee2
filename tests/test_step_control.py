"""The softmax radius: its formula, what it is invariant to, and that a clipped step is the step times a factor."""

import warnings
from math import pi

import pytest
import torch
from models import tiny, tokens
from torch import nn

import symlm
from symlm.step_control import StepControl, reduce_spread


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(6, 4, bias=False).double()


def test_the_ratio_of_a_linear_model_is_its_formula():
    model, X = linear(), torch.randn(9, 6, dtype=torch.float64)
    step = torch.randn(4, 6, dtype=torch.float64)
    change = X @ step.T
    for over, expected in (("max", (change.amax(1) - change.amin(1)).max()), ("mean", reduce_spread(change, "mean"))):
        control = StepControl(model, torch.optim.SGD(model.parameters(), 1.0), over=over)
        assert control.radius_ratio([step], X) == pytest.approx(float(expected) / pi, rel=1e-6)


def test_a_shared_shift_of_the_head_is_not_seen():
    model, X = linear(), torch.randn(9, 6, dtype=torch.float64)
    control = StepControl(model, torch.optim.SGD(model.parameters(), 1.0))
    assert control.radius_ratio([torch.ones(4, 1, dtype=torch.float64) @ torch.randn(1, 6).double()], X) < 1e-12


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "olmoe"])
def test_a_language_models_step_is_clipped_to_the_target(kind, difference):
    model = tiny(kind, dtype=torch.float64 if kind == "qwen3" else torch.float32)
    optimizer = symlm.SymOptimizer(model, lr=20.0)
    control = StepControl(model, optimizer, r_target=0.5, difference=difference)
    x = tokens()
    model(input_ids=x, labels=x).loss.backward()
    twin = [p.detach().clone() for p in model.parameters()]
    control.step(input_ids=x)
    assert control.last.proposed > 1
    assert control.last.taken == pytest.approx(0.5)
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), twin, strict=True))
    moved = [p.detach() - old for p, old in zip(model.parameters(), twin, strict=True)]
    if not control.difference:  # experts' products have no forward derivative
        for p, old in zip(model.parameters(), twin, strict=True):
            p.data.copy_(old)
        assert control.radius_ratio(moved, input_ids=x) == pytest.approx(0.5, rel=1e-3)


def test_a_small_step_is_left_as_it_is():
    one, two = tiny(), tiny()
    x = tokens()
    control = StepControl(one, symlm.SymOptimizer(one, lr=1e-4))
    plain = symlm.SymOptimizer(two, lr=1e-4)
    for model in (one, two):
        model(input_ids=x, labels=x).loss.backward()
    control.step(input_ids=x)
    plain.step()
    assert control.last.factor == 1.0
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


class NoLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return {"features": x @ self.W}


def test_without_logits_the_step_is_left_alone_and_said_once():
    model = NoLogits()
    control = StepControl(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, before = torch.randn(2, 3), model.W.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.W.grad = torch.ones(3, 3)
            control.step(x)
    assert [str(w.message)[:33] for w in caught] == ["step control leaves the step alon"]
    assert torch.allclose(model.W, before - 0.3)
    assert control.last is None


def test_bad_values_are_refused():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with pytest.raises(ValueError, match="r_target must be positive"):
        StepControl(model, optimizer, r_target=0)
    with pytest.raises(ValueError, match="a quantile between 0 and 1"):
        StepControl(model, optimizer, over="median")
