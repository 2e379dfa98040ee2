"""Muown is its source's formula over steps, whatever the layout of its rows, and moves only what has a gradient."""

import copy
import io

import pytest
import torch
from models import tiny, train
from numerics import MUST_FAIL, RUN, relative
from torch import nn

import symlm

RATE = 0.0035
OVERRIDE = {"rule": "muown", "scale": "match_adamw_rms", "lr": RATE, "nesterov": True, "momentum": 0.9}
BETAS, EPS = (0.9, 0.95), 1e-8


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Reference:
    """Weight normalization written out: v and g are variables, W is made of them."""

    def __init__(self, W, rate=RATE, momentum=0.9, nesterov=True):
        zeros = W.norm(dim=1, keepdim=True) == 0
        self.g = torch.where(zeros, 0.33**0.5, W.norm(dim=1, keepdim=True))
        self.v, self.rate, self.momentum, self.nesterov = W.clone(), rate, momentum, nesterov
        self.first = self.square = torch.zeros_like(self.g)
        self.m, self.t = torch.zeros_like(W), 0

    def step(self, G):
        self.t += 1
        length = self.v.norm(dim=1, keepdim=True)
        unit = self.v / length.clamp(min=1e-300)
        length = torch.where(length > 0, length, self.g)
        by_g = (G * unit).sum(1, keepdim=True)
        by_v = self.g / length * (G - unit * by_g)
        self.m = self.momentum * self.m + by_v  # a sum, where symlm has a mean
        U, _, Vh = torch.linalg.svd(by_v + self.momentum * self.m if self.nesterov else self.m, full_matrices=False)
        self.v = self.v - self.rate * 0.2 * max(G.shape) ** 0.5 * U @ Vh
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * by_g
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * by_g**2
        root = (self.square / (1 - BETAS[1] ** self.t)).sqrt()
        self.g = self.g - self.rate * self.first / (1 - BETAS[0] ** self.t) / (root + EPS)
        return self.g * self.v / self.v.norm(dim=1, keepdim=True)


def problem(W):
    module = nn.Module()
    module.W = nn.Parameter(W.clone())
    return module


def optimizer(module, **changes):
    overrides = {"matrix": {**OVERRIDE, **changes}}
    return symlm.SymOptimizer(module, roles={"W": "matrix"}, overrides=overrides, polar_method="svd")


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_it_is_its_formula_over_steps(shape, nesterov):
    W = drawn(*shape)
    W[2] = 0  # a row that begins at zero
    W[3] *= RATE / W[3].norm()  # and one whose gain crosses zero
    module, reference = problem(W), Reference(W, nesterov=nesterov)
    opt = optimizer(module, nesterov=nesterov)
    signs = []
    for k in range(8):
        G = drawn(*shape, seed=k + 1) + 3 * W / W.norm(dim=1, keepdim=True).clamp(min=1e-300)
        module.W.grad = G
        opt.step()
        assert relative(module.W.detach(), reference.step(G)) < RUN
        signs.append(reference.g[3].item() > 0)
    assert set(signs) == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "int8"}, {"rounding": "compensated"}])
def test_a_saved_run_goes_on_bit_for_bit(dtype, options):
    def built(seed=0):
        model = tiny(dtype=dtype, seed=seed)
        roles = ("attention_q", "attention_o", "mlp_in", "mlp_out")
        return model, symlm.SymOptimizer(model, overrides=dict.fromkeys(roles, OVERRIDE), **options)

    whole, opt = built()
    train(whole, opt, 6)
    half, opt = built()
    train(half, opt, 3)
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, opt = built(seed=5)
    resumed.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    train(resumed, opt, 3, first=3)
    for (name, W), V in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(W, V), name


def test_a_narrow_weight_follows_the_wide_one():
    W = drawn(24, 16).float()
    ends = []
    for dtype, rounding in ((torch.float32, "stochastic"), (torch.bfloat16, "compensated")):
        module = problem(W.to(torch.bfloat16).to(dtype))
        opt = symlm.SymOptimizer(
            module, roles={"W": "matrix"}, overrides={"matrix": OVERRIDE}, polar_method="svd", rounding=rounding
        )
        for k in range(20):
            module.W.grad = drawn(24, 16, seed=k).to(torch.bfloat16).to(dtype)
            opt.step()
        ends.append(module.W.detach().float() + opt.state[module.W].get("compensation", 0.0))
    start = W.to(torch.bfloat16).float()
    assert relative(ends[1] - start, ends[0] - start) < MUST_FAIL


def test_an_expert_without_a_gradient_stays_with_its_length():
    model = tiny("qwen3_moe")
    opt = symlm.SymOptimizer(model, overrides={"expert_in": OVERRIDE})
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    train(model, opt, 2)
    before, state = experts.detach().clone(), copy.deepcopy(opt.state[experts])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    experts.grad[1] = 0
    opt.step()
    moved = [not torch.equal(experts[k], before[k]) for k in range(len(experts))]
    assert moved == [True, False, True, True]
    lengths = opt.state[experts]["length"]
    share = len(lengths) // len(experts)
    assert torch.equal(lengths[share : 2 * share], state["length"][share : 2 * share])
    assert not torch.equal(lengths[:share], state["length"][:share])


def test_a_head_without_a_gradient_stays():
    rule, G = symlm.rules.RULES["muown"], drawn(2, 6, 5)
    state = rule.refreshed(G, rule.start(G))
    G[1] = 0
    after = rule.refreshed(G, state)
    assert after["direction"][0].any()
    assert not after["direction"][1].any()
    assert torch.equal(after["weight"][1], state["weight"][1])


def test_a_rate_of_zero_moves_nothing():
    W = drawn(12, 7)
    module = problem(W)
    opt = optimizer(module)
    opt.param_groups[0]["lr"] = 0.0
    module.W.grad = drawn(12, 7, seed=1)
    opt.step()
    assert torch.equal(module.W.detach(), W)


def test_a_momentum_of_directions_is_refused():
    with pytest.raises(ValueError, match=r"group mlp_in: rule 'muown' has its momentum in coordinates of its own"):
        symlm.SymOptimizer(tiny(), overrides={"mlp_in": {"rule": "muown", "momentum_of": "directions"}})
