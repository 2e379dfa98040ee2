"""Scion's initialization: every weight has the norm of its ball, and the constrained step leaves it inside."""

import pytest
import torch
from models import tiny, tokens
from numerics import EXACT
from torch import nn

import symlm
from symlm import agd, scion


def test_weights_begin_on_the_boundary_of_their_ball():
    """Radius 50 inside and for tokens, 3,000 for the head: spectral norms, rows, entries."""
    model = scion.initialize_(tiny("qwen3", torch.float64))
    for name, role in symlm.assign_roles(model).items():
        W = model.get_parameter(name).detach()
        if role == "embedding":
            assert W.square().mean(1).sqrt().tolist() == pytest.approx([50.0] * len(W), rel=EXACT)
        elif role == "lm_head":
            assert torch.equal(W.abs(), torch.full_like(W, 3000 / W.shape[1]))
            assert 0.4 < (W > 0).double().mean() < 0.6
        elif role != "vector":
            size = 50 * (W.shape[0] / W.shape[1]) ** 0.5
            assert torch.linalg.svdvals(W).tolist() == pytest.approx([size] * min(W.shape), rel=1e-9)
        else:
            assert torch.equal(W, torch.ones_like(W))


@pytest.mark.parametrize("initialize_", [scion.initialize_, agd.initialize_])
def test_a_model_without_weights_is_refused(initialize_):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8, bias=False))
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        initialize_(model)


def test_the_constrained_step_stays_in_the_ball():
    model = scion.initialize_(tiny("qwen3", torch.float64))
    opt = symlm.SymOptimizer(model, 0.5, "scion-constrained", polar_method="svd", nesterov=False)
    q = model.model.layers[0].self_attn.q_proj.weight
    for seed in range(3):
        x = tokens(seed)
        model(input_ids=x, labels=x).loss.backward()
        opt.step()
        assert torch.linalg.matrix_norm(q.detach(), 2) <= 50 * (1 + EXACT)


def test_biases_become_zero_and_a_seed_is_one_draw():
    nets = [nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)) for _ in range(3)]
    nets[0][1].weight.data += 1
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        scion.initialize_(net, seed)
    assert not nets[0][0].bias.any()
    assert torch.equal(nets[0][1].weight, torch.full((7,), 2.0))
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)
    assert not torch.equal(nets[0][0].weight, nets[2][0].weight)
