"""One rotation a layer is the one of the layer's momenta side by side, the same for all its matrices."""

import pytest
import torch
from models import loss_of, tiny, tokens
from numerics import ROTATED, relative

import symlm
from symlm.polar.exact import orthonormal
from symlm.rules.rotated import RETAINED
from symlm.step.layer_rotations import layer_of
from symlm.views import MatrixView

INNER = ("attention_q", "attention_k", "attention_v", "attention_o", "mlp_in", "mlp_out")


def optimizer_of(model, rule="aro_sign", rotation="layer"):
    overrides = {role: {"rule": rule, "nesterov": False} for role in INNER}
    return symlm.SymOptimizer(model, preset="aro", overrides=overrides, rotation=rotation)


def train(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, tokens(step)).backward()
        optimizer.step()


def layers_of(model, optimizer):
    """Return of each layer the rotations and the momenta, the residual stream's dimensions as rows."""
    found = {}
    for group in optimizer.param_groups:
        view = MatrixView.parse(group["view"])
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if "rotation" in optimizer.state[p]:
                state = optimizer.state[p]
                told = (state["rotation"].clone(), view.to_matrices(state["momentum"]).clone())
                found.setdefault(layer_of(name), []).append(told)
    return found


def test_it_is_that_of_the_stacked_momenta():
    model = tiny(dtype=torch.float64)
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    before = layers_of(model, optimizer)
    train(model, optimizer, 1)
    after = layers_of(model, optimizer)
    assert set(after) == {"model.layers.0", "model.layers.1"}
    for layer, matrices in after.items():
        assert len(matrices) == 7
        M = torch.cat([part for _, momenta in matrices for part in momenta], dim=-1)
        old = before[layer][0][0][0]
        A = M @ torch.sign(old.mT @ M).mT
        R = orthonormal(A + RETAINED * A.norm() / len(A) ** 0.5 * old)
        for rotation, _ in matrices:
            assert relative(rotation[0], R) < ROTATED


@pytest.mark.parametrize("rule", ["aro_sinkhorn", "aro_sign", "aro_rows", "aro_adam"])
def test_matrices_of_a_layer_share_it_and_layers_do_not(rule):
    model = tiny()
    optimizer = optimizer_of(model, rule)
    train(model, optimizer, 3)
    rotations = [[rotation[0] for rotation, _ in matrices] for matrices in layers_of(model, optimizer).values()]
    for first, *others in rotations:
        assert all(torch.equal(R, first) for R in others)
        assert relative(first.mT @ first, torch.eye(32)) < 1e-5
    assert relative(rotations[0][0], rotations[1][0]) > 0.1
    own = optimizer_of(other := tiny(), rule, "own")
    train(other, own, 3)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_a_matrix_alone_in_its_layer_turns_as_its_own():
    ours, theirs = torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(6, 4, bias=False)
    theirs.load_state_dict(ours.state_dict())
    told = {"preset": "aro", "overrides": {"matrix": {"rule": "aro_sinkhorn"}}}
    for model, rotation in ((ours, "layer"), (theirs, "own")):
        optimizer = symlm.SymOptimizer(model, **told, rotation=rotation)
        for step in range(3):
            model.weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert relative(ours.weight, theirs.weight) < 1e-5


def test_layers_are_told_by_their_names():
    assert layer_of("model.layers.11.mlp.experts.gate_up_proj") == "model.layers.11"
    assert layer_of("transformer.h.0.attn.c_attn.weight") == "transformer.h.0"
    assert layer_of("lm_head.weight") == "lm_head.weight"


def test_a_bad_choice_is_named():
    with pytest.raises(ValueError, match=r"unknown rotation 'shared'; choose one of \('own', 'layer'\)"):
        optimizer_of(tiny(), rotation="shared")
