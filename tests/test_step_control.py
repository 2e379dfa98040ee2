"""The softmax radius: its formula, what it is invariant to, and that a clipped step is the step times a factor."""

import cmath
import copy
import warnings
from math import inf, nan, pi

import pytest
import torch
from models import loss_of, tiny, tokens
from torch import nn

import symlm
from symlm.step_control import StepControl, exact_binary_radius, reduce_spread
from symlm.teleport import neuron_scales, teleport


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


@pytest.mark.parametrize("rate", [1e-4, 1.0, 1e4])
def test_standalone_every_step_has_the_target_whatever_the_rate(rate):
    """`η = r·ρ/|u|`: the update's size does not matter, in either direction."""
    model = tiny(dtype=torch.float64)
    control = StepControl(model, torch.optim.SGD(model.parameters(), rate), r_target=0.25, standalone=True)
    x = tokens()
    for _ in range(3):
        model.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        model(input_ids=x, labels=x).loss.backward()
        control.step(input_ids=x)
        after = [p.detach().clone() for p in model.parameters()]
        for p, old in zip(model.parameters(), before, strict=True):
            p.data.copy_(old)
        step = [new - old for new, old in zip(after, before, strict=True)]
        assert control.radius_ratio(step, input_ids=x) == pytest.approx(0.25, rel=1e-6)
        for p, new in zip(model.parameters(), after, strict=True):
            p.data.copy_(new)


@pytest.mark.parametrize("rate", [1e2, 1e6, 1e12])
def test_however_long_a_step_of_any_optimizer_is_its_measured_ratio_is_the_target(rate):
    """Of the step that was really made, in fp32."""
    torch.manual_seed(0)
    model, X = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(9, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    control = StepControl(model, optimizer)
    model(X).logsumexp(1).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    control.step(X)
    moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    for p, old in zip(model.parameters(), before, strict=True):
        p.data.copy_(old)
    assert control.last.proposed > 1
    assert control.radius_ratio(moved, X) == pytest.approx(1, rel=1e-4)


def test_what_compensated_rounding_keeps_is_clipped_too():
    torch.manual_seed(0)
    model, X = nn.Linear(6, 4, bias=False).bfloat16(), torch.randn(9, 6).bfloat16()
    optimizer = symlm.SymOptimizer(model, rounding="compensated", weight_decay=0.0)
    control = StepControl(model, optimizer)
    for lr in (1e4, 1e-6):
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = model.weight.detach().clone()
        model.weight.grad = torch.randn_like(model.weight)
        control.step(X)
    assert (model.weight - before).abs().max() < 2**-8 * before.abs().max()


def test_clipped_steps_below_the_last_digit_of_a_compensated_weight_add_up():
    torch.manual_seed(0)
    exact = nn.Linear(6, 4, bias=False).bfloat16().float()
    rounded, X, moved = copy.deepcopy(exact).bfloat16(), torch.randn(9, 6).bfloat16(), []
    gradient = torch.randn(4, 6)
    for model, told in ((exact, {}), (rounded, {"rounding": "compensated"})):
        optimizer = symlm.SymOptimizer(model, weight_decay=0.0, **told)
        control, before = StepControl(model, optimizer, r_target=1e-4), model.weight.detach().float().clone()
        for _ in range(40):
            model.weight.grad = gradient.to(model.weight.dtype)
            control.step(X.to(model.weight.dtype))
            assert control.last.factor < 1
        rest = optimizer.state[model.weight].get("compensation", 0.0)
        moved.append(model.weight.detach().float() + rest - before)
    assert (moved[1] - moved[0]).norm() < 0.1 * moved[0].norm()


def test_modules_that_were_in_evaluation_mode_stay_so():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).train()
    model[1].eval()
    control = StepControl(model, torch.optim.SGD(model.parameters(), 1.0))
    model(torch.randn(9, 6)).sum().backward()
    control.step(torch.randn(9, 6))
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


class Broken(nn.Linear):
    """Finite logits, whose derivative is not."""

    def forward(self, x):
        return super().forward(x) + (self.weight.sum() * 0).sqrt()


def test_a_derivative_that_is_not_finite_leaves_the_step_alone_and_says_so():
    model = Broken(6, 4)
    control = StepControl(model, torch.optim.SGD(model.parameters(), 0.1))
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    with pytest.warns(UserWarning, match="the derivative of the logits is not finite"):
        control.step(torch.randn(9, 6))
    assert torch.allclose(model.weight, before - 0.1)
    assert control.last is None


def test_a_loss_of_two_classes_has_no_root_nearer_than_the_radius():
    """`1 + e^(δ + t·a)` is zero at `t = (−δ ± iπ)/a`: at |t| = √(δ² + π²)/|a| ≥ π/|a| = ρ."""
    W, D = (torch.randn(2, 3, dtype=torch.float64) for _ in range(2))
    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(W)
    x = torch.randn(1, 3, dtype=torch.float64)
    gap, slope = ((x @ A.T)[0] for A in (W, D))
    gap, slope = complex(gap[1] - gap[0]), complex(slope[1] - slope[0])
    root = (-gap + 1j * pi) / slope
    assert abs(1 + cmath.exp(gap + root * slope)) < 1e-12
    control = StepControl(model, torch.optim.SGD(model.parameters(), 1.0))
    assert 1 / control.radius_ratio([D], x) <= abs(root)
    assert 1 / control.radius_ratio([D], x) == pytest.approx(pi / abs(slope))


def test_the_exact_radius_of_two_classes_is_where_the_exponential_sum_vanishes():
    logits, change = torch.randn(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for z, a, radius in zip(logits, change, exact_binary_radius(logits, change), strict=True):
        gap, moved = (z[1] - z[0]).item(), (a[1] - a[0]).item()
        root = (-gap + 1j * pi) / moved  # of 1 + exp(gap + t·moved)
        assert abs(1 + cmath.exp(gap + root * moved)) < 1e-12
        assert abs(root) == pytest.approx(radius.item())
        assert radius.item() >= pi / abs(moved)  # the lower bound
    with pytest.raises(ValueError, match="of two classes"):
        exact_binary_radius(torch.zeros(4, 3), torch.zeros(4, 3))


def test_the_ratio_is_the_same_wherever_a_symmetry_of_the_loss_moves_model_and_step():
    model, x = tiny(dtype=torch.float64), tokens()
    control = StepControl(model, torch.optim.SGD(model.parameters(), 1.0))
    step = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    r = control.radius_ratio(step.values(), input_ids=x)
    generator = torch.Generator().manual_seed(0)
    scales = neuron_scales(model, 0.3 * torch.randn(2, 48, dtype=torch.float64, generator=generator))
    teleport(model, scales, lambda: loss_of(model, x))
    step |= {name: transport.weight(step[name]) for name, transport in scales.items()}
    assert control.radius_ratio(step.values(), input_ids=x) == pytest.approx(r, rel=1e-9)


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
    for bad in (0, nan, inf, "1", None, True):
        with pytest.raises(ValueError, match="r_target must be positive"):
            StepControl(model, optimizer, r_target=bad)
    with pytest.raises(ValueError, match="a quantile between 0 and 1"):
        StepControl(model, optimizer, over="median")
