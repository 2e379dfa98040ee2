"""AGD: its rate is the root it claims, its step the paper's formula, and all layers turn together under rotations."""

from math import inf, log, nan, sqrt

import pytest
import torch
from models import tiny
from numerics import BF16_POLAR, EXACT, relative
from torch import nn

from symlm.agd import AGD, initialize_, layer_scale, rate


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 4, bias=False)).double()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def frozen_gains(model):
    for p in model.parameters():
        p.requires_grad_(p.ndim > 1)
    return model


def test_a_tied_weight_is_one_layer():
    assert len(AGD(frozen_gains(tiny("qwen3", tie_word_embeddings=True))).param_groups[0]["params"]) == 1 + 2 * 7


@pytest.mark.parametrize("decay", [0.0, 0.03, 0.5])
@pytest.mark.parametrize("G", [0.0, 1e-6, 0.3, 7.0, 1e6])
def test_the_rate_is_the_root_of_its_equation(G, decay):
    eta = rate(torch.tensor(G, dtype=torch.float64), decay)
    assert float(eta.exp() * (eta.exp() - 1) + decay * eta) == pytest.approx(G, rel=1e-10, abs=1e-12)


def test_a_step_is_the_papers_formula():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    AGD(model).step()
    scales = [sqrt(9 / 6), sqrt(4 / 9)]
    G = sum(s * float(p.grad.norm()) for s, p in zip(scales, model.parameters(), strict=True)) / 2
    eta = log((1 + sqrt(1 + 4 * G)) / 2)
    for W, s, p in zip(before, scales, model.parameters(), strict=True):
        assert relative(p.detach(), W - eta / 2 * s * p.grad / p.grad.norm()) < EXACT


def test_layerwise_divides_a_layers_step_by_its_number():
    plain, layerwise = network(), network()
    before = [p.detach().clone() for p in plain.parameters()]
    AGD(plain).step()
    AGD(layerwise, layerwise=True).step()
    for k, (W, p, q) in enumerate(zip(before, plain.parameters(), layerwise.parameters(), strict=True), start=1):
        assert relative(q.detach() - W, (p.detach() - W) / k) < EXACT


def test_momentum_is_the_mean_of_gradients():
    model = network()
    optimizer = AGD(model, momentum=0.9)
    first, second = ([torch.randn_like(p) for p in model.parameters()] for _ in range(2))
    for gradients in (first, second):
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
        optimizer.step()
    for p, a, b in zip(model.parameters(), first, second, strict=True):
        assert relative(optimizer.state[p]["momentum"], 0.9 * 0.1 * a + 0.1 * b) < EXACT


def test_a_rotation_of_both_sides_of_a_layer_turns_its_step():
    plain, turned = network(), network()
    L = torch.linalg.qr(torch.randn(9, 9).double())[0]
    for W in (turned[0].weight, turned[0].weight.grad):
        W.data = L @ W.data
    for W in (turned[1].weight, turned[1].weight.grad):
        W.data = W.data @ L.T
    for model in (plain, turned):
        AGD(model, weight_decay=0.1).step()
    assert relative(turned[0].weight, L @ plain[0].weight) < EXACT
    assert relative(turned[1].weight, plain[1].weight @ L.T) < EXACT


def test_initialization_is_semi_orthogonal_times_the_scale():
    model = nn.Sequential(nn.Conv2d(5, 3, 2, bias=False), nn.Linear(9, 4, bias=False)).double()
    initialize_(model)
    kernel, W = (p.detach() / layer_scale(p) for p in model.parameters())
    assert relative(W @ W.T, torch.eye(4)) < EXACT
    for position in kernel.flatten(2).unbind(2):
        assert relative(position @ position.T, torch.eye(3)) < EXACT


def test_a_kernel_is_stepped_position_by_position_and_a_table_by_its_inputs():
    """The source's code: norms over outputs and inputs alone, one a position; rows of an embedding are inputs."""
    kernel = nn.Conv2d(5, 3, 2, bias=False).double()
    table = nn.Embedding(11, 4).double()
    model = nn.ModuleList([table, kernel])
    before = [p.detach().clone() for p in model.parameters()]
    for seed, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(seed))
    scales = [(4 / 11) ** 0.5, (3 / 5 / 4) ** 0.5]
    norms = [p.grad.norm(dim=(0, 1), keepdim=True) for p in model.parameters()]
    G = sum(s * norm.sum() for s, norm in zip(scales, norms, strict=True)) / 2
    eta = torch.log((1 + (1 + 4 * G).sqrt()) / 2)
    AGD(model).step()
    for p, W, s, norm in zip(model.parameters(), before, scales, norms, strict=True):
        assert relative(p, W - eta / 2 * s * p.grad / norm) < EXACT


def test_what_the_bound_does_not_cover_is_refused():
    with pytest.raises(ValueError, match=r"no rate for .*bias"):
        AGD(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"no rate for .* of Olmoe"):
        AGD(frozen_gains(tiny("olmoe")))
    with pytest.raises(ValueError, match="one group"):
        AGD(network()).add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    for bad in ({"gain": 0}, {"gain": nan}, {"gain": inf}, {"momentum": 1}, {"weight_decay": nan}, {"gain": "1"}):
        with pytest.raises(ValueError, match="gain must be positive"):
            AGD(network(), **bad)
    with pytest.raises(ValueError, match="layerwise must be True or False, got 'false'"):
        AGD(network(), layerwise="false")
    with pytest.raises(TypeError, match="got generator"):
        AGD(network().parameters())
    table = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"layers \[0\].*sparse=False"):
        AGD(table).step()
    model = network()
    model[1].weight.grad = None
    with pytest.raises(RuntimeError, match="every layer needs a gradient"):
        AGD(model).step()


def test_what_a_scheduler_wrote_is_checked_before_anything_moves():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    optimizer = AGD(model)
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.ones(3, 3)
    optimizer.param_groups[0]["lr"] = nan
    with pytest.raises(ValueError, match="AGD: lr must be a finite number"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_bf16_weights_begin_semi_orthogonal_too():
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).bfloat16()
    initialize_(model)
    W = model[0].weight.float()
    assert relative(W @ W.mT, torch.eye(8)) < BF16_POLAR


def test_a_bad_gradient_updates_nothing():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    optimizer = AGD(model, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [p.detach().clone() for p in model.parameters()]
    momenta = [state["momentum"].clone() for state in optimizer.state.values()]
    model[1].weight.grad[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"layers \[1\]"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), kept, strict=True))
    assert all(torch.equal(s["momentum"], m) for s, m in zip(optimizer.state.values(), momenta, strict=True))
