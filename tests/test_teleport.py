"""Group actions leave a real model's loss alone, move gradients and momenta as covectors, and refuse what is none."""

import pytest
import torch
from models import loss_of, tiny, tokens
from numerics import relative

import symlm
from symlm import teleport as t


def random(*shape, seed=0):
    return 0.3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(n):
    return torch.linalg.qr(random(n, n))[0]


ACTIONS = {
    "neuron scales": lambda model: t.neuron_scales(model, random(2, 48)),
    "neuron permutations": lambda model: t.neuron_permutations(
        model, torch.stack([torch.randperm(48, generator=torch.Generator().manual_seed(k)) for k in range(2)])
    ),
    "value and output": lambda model: t.value_output(model, random(2, 2, 8, 8)),
    "rope rotations": lambda model: t.rope_rotations(model, random(2, 2, 4)),
    "head shift": lambda model: t.head_shift(model, random(32)),
    "residual rotation": lambda model: t.residual_rotation(model, orthogonal(32)),
}


def model_of():
    return tiny("qwen3", dtype=torch.float64)


@pytest.mark.parametrize("name", ACTIONS)
def test_the_loss_stays_and_the_gradient_moves_as_a_covector(name):
    model, x = model_of(), tokens()
    loss_of(model, x).backward()
    transports = ACTIONS[name](model)
    expected = {key: move.covector(model.get_parameter(key).grad.clone()) for key, move in transports.items()}
    before = loss_of(model, x).item()
    t.teleport(model, transports, lambda: loss_of(model, x))
    assert abs(loss_of(model, x).item() - before) < 1e-10
    for p in model.parameters():
        p.grad = None
    loss_of(model, x).backward()
    for key, G in expected.items():
        assert relative(model.get_parameter(key).grad, G) < 1e-8, key


def test_the_search_makes_the_gradient_larger():
    model, x = model_of(), tokens()
    loss_of(model, x).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for family, start in ((t.neuron_scales, torch.zeros(2, 48)), (t.value_output, torch.zeros(2, 2, 8, 8))):
        T, ratio = t.climb(lambda T, family=family: family(model, T), start.double(), gradients, lr=0.2, steps=10)
        assert ratio > 1.05
        t.teleport(model, family(model, T), lambda: loss_of(model, x))


def test_a_rotation_cannot_make_it_larger():
    model, x = model_of(), tokens()
    loss_of(model, x).backward()
    for key, move in t.residual_rotation(model, orthogonal(32)).items():
        G = model.get_parameter(key).grad
        assert move.covector(G).norm().item() == pytest.approx(G.norm().item())


ARO = {
    role: {"rule": "aro_rows", "view": "whole" if role in ("attention_o", "mlp_out") else "transposed"}
    for role in ("attention_q", "attention_k", "attention_v", "attention_o", "mlp_in", "mlp_out")
}


@pytest.mark.parametrize(
    ("rules", "rotation"), [({}, "own"), (ARO, "own"), (ARO, "layer")], ids=["default", "aro", "aro layer"]
)
def test_state_is_transported(rules, rotation):
    """Steps of symlm commute with a rotation of the residual stream, if momenta and what rules keep move along."""
    one, two = model_of(), model_of()
    overrides = {**rules, "vector": {"lr": 1e-12}}
    optimizers = [symlm.SymOptimizer(m, lr=0.002, overrides=overrides, rotation=rotation) for m in (one, two)]
    for step in range(3):
        for model, optimizer in zip((one, two), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, tokens(step)).backward()
            optimizer.step()
        if step == 0:
            turn = t.residual_rotation(two, orthogonal(32))
            t.teleport(two, turn, lambda: loss_of(two, tokens(0)), optimizers[1], tolerance=1e-6)
    for key, move in turn.items():
        assert relative(two.get_parameter(key), move.weight(one.get_parameter(key).detach())) < 1e-6, key


def test_what_is_no_symmetry_is_refused_and_undone():
    model, x = model_of(), tokens()
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.5, 2, 32))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="no symmetry of this model"):
        t.teleport(model, t.residual_rotation(model, orthogonal(32)), lambda: loss_of(model, x))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_elementwise_second_moments_do_not_move():
    model, x = model_of(), tokens()
    optimizer = torch.optim.Adam(model.parameters())
    loss_of(model, x).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"exp_avg_sq of .* is elementwise"):
        t.teleport(model, ACTIONS["value and output"](model), lambda: loss_of(model, x), optimizer)
    t.teleport(model, ACTIONS["head shift"](model), lambda: loss_of(model, x), optimizer)  # moves no gradient


def test_a_refused_teleport_leaves_everything_as_it_was():
    model, x = model_of(), tokens()
    optimizer = symlm.SymOptimizer(model, overrides={"mlp_in": {"rule": "row_adam"}})
    loss_of(model, x).backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    momenta = [state["momentum"].clone() for state in optimizer.state.values() if "momentum" in state]
    with pytest.raises(ValueError, match="moves with rotations alone"):
        t.teleport(model, ACTIONS["neuron scales"](model), lambda: loss_of(model, x), optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    kept = [state["momentum"] for state in optimizer.state.values() if "momentum" in state]
    assert all(torch.equal(a, b) for a, b in zip(kept, momenta, strict=True))


def test_numbers_of_rows_move_with_permutations_alone():
    model, x = model_of(), tokens()
    optimizer = symlm.SymOptimizer(model, overrides={"attention_o": {"rule": "row_adam", "view": "whole"}})
    loss_of(model, x).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="moves with signed permutations alone"):
        t.teleport(model, ACTIONS["residual rotation"](model), lambda: loss_of(model, x), optimizer)


def test_a_batch_larger_than_the_width_is_refused():
    W = [random(4, 3), random(2, 4)]
    with pytest.raises(ValueError, match="larger than the width 3"):
        t.act_on_mlp(W, random(3, 5), 0, torch.eye(4).double(), torch.tanh, torch.atanh)
