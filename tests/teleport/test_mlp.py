"""Teleports of MLPs: biases, tanh and the sigmoid extended to bijections, and data that move with the first layer."""

from functools import partial

import pytest
import torch
from numerics import EXACT, RUN, relative
from torch import nn

from symlm import teleport as t


def random(*shape, seed=0):
    return 0.5 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leaky(h):
    return nn.functional.leaky_relu(h, 0.1)


def unleaky(h):
    return nn.functional.leaky_relu(h, 10.0)


BIJECTIONS = {
    "leaky relu": (leaky, unleaky),
    "tanh": (t.extended_tanh, t.extended_atanh),
    "sigmoid": (t.extended_sigmoid, t.extended_logit),
}


def output(weights, X, activation):
    """Run a network with biases, written out with matrices and vectors apart."""
    for k, W in enumerate(weights):
        X = W[:, :-1] @ X + W[:, -1:]
        X = X if k == len(weights) - 1 else activation(X)
    return X


@pytest.mark.parametrize("name", BIJECTIONS)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_bias_is_a_column_that_a_row_of_ones_is_multiplied_by(name, layer):
    activation, inverse = BIJECTIONS[name]
    weights, X = [random(5, 4), random(4, 6, seed=1), random(2, 5, seed=2)], random(3, 4, seed=3)  # one more than width
    k = len(weights[layer])
    g = torch.eye(k).double() + random(k, k, seed=4)
    moved = t.act_on_mlp(weights, X, layer, g, activation, inverse, bias=True)
    assert relative(output(moved, X, activation), output(weights, X, activation)) < RUN
    assert relative(moved[layer], weights[layer]) > 0.1
    assert torch.equal(moved[layer + 1][:, -1], weights[layer + 1][:, -1])  # g leaves the row of ones alone


@pytest.mark.parametrize("name", BIJECTIONS)
def test_an_extended_activation_is_a_bijection_with_a_continuous_slope(name):
    activation, inverse = BIJECTIONS[name]
    x = torch.linspace(-40, 40, 4001, dtype=torch.float64).requires_grad_()
    y = activation(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert relative(inverse(y), x) < EXACT
    assert (slope > 0).all()
    back = y.detach().requires_grad_()
    (inverse_slope,) = torch.autograd.grad(inverse(back).sum(), back)
    assert relative(inverse_slope * slope, torch.ones_like(slope)) < 1e-10


def test_inside_its_range_an_extended_activation_is_the_activation():
    x = torch.linspace(-1.4, 1.4, 99).double()
    assert torch.equal(t.extended_tanh(x), x.tanh())
    assert relative(t.extended_sigmoid(2 * x, 0.96), (2 * x).sigmoid()) < EXACT
    jump = t.extended_tanh(torch.tensor([1.4722194, 1.4722195], dtype=torch.float64))  # atanh(0.9) is between
    assert jump.diff().item() == pytest.approx((1 - 0.81) * 1e-7, rel=1e-2)


@pytest.mark.parametrize("largest", [0.0, 1.0, 1.5])
def test_a_curve_that_tanh_has_not_is_refused(largest):
    for function in (t.extended_tanh, t.extended_atanh):
        with pytest.raises(ValueError, match="between 0 and 1"):
            function(torch.zeros(3), largest)
    with pytest.raises(ValueError, match="between 1/2 and 1"):
        t.extended_sigmoid(torch.zeros(3), 0.5)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.data, self.first, self.last = t.DataTransform(4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.first(self.data(x)).tanh())


def trained(model, x, y, steps, lr=0.1):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model


def test_data_move_with_the_layer_that_reads_them():
    """The loss stays, the gradient grows, and a step is one along `G gᵀg` once the layer is folded back."""
    model, x, y = Network().double(), random(9, 4), random(9, 2, seed=1)

    def loss():
        return (model(x) - y).square().mean()

    loss().backward()
    G, W = model.first.weight.grad.clone(), model.first.weight.detach().clone()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    family = partial(t.data_transformation, "data", "first")
    T, ratio = t.climb(family, torch.zeros(4, 4).double(), gradients, lr=0.1, steps=5)
    t.teleport(model, family(T), loss)
    g = torch.linalg.matrix_exp(T)
    assert ratio > 1.2
    assert model.first.weight.grad.norm().item() == pytest.approx(ratio * G.norm().item())
    assert relative(model.data.matrix, g) < EXACT
    trained(model, x, y, 1)
    before = model(x)
    t.fold_(model.data, model.first)
    assert relative(model(x), before) < EXACT
    assert torch.equal(model.data.matrix, torch.eye(4).double())
    assert relative(model.first.weight, W - 0.1 * G @ g.T @ g) < 1e-10


def test_a_rotation_of_the_data_changes_no_trajectory():
    """An orthogonal g preserves the metric of gradient descent: after folding, all is as if nothing had moved."""
    x, y = random(9, 4), random(9, 2, seed=1)
    plain, moved = Network().double(), Network().double()
    T = random(4, 4, seed=5)
    t.teleport(moved, t.data_transformation("data", "first", T - T.T), lambda: (moved(x) - y).square().mean())
    for model in (plain, moved):
        trained(model, x, y, 20)
    assert relative(moved.first.weight, plain.first.weight) > 0.1
    t.fold_(moved.data, moved.first)
    assert relative(moved.first.weight, plain.first.weight) < RUN


def test_a_search_without_gradients_is_refused():
    family = partial(t.data_transformation, "data", "first")
    with pytest.raises(ValueError, match="has a gradient"):
        t.climb(family, torch.zeros(4, 4), {})
