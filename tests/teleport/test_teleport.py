"""Group actions leave a real model's loss alone, move gradients and momenta as covectors, and refuse what is none."""

import pytest
import torch
from models import loss_of, tiny, tokens
from numerics import EXACT, relative
from pretraining.teleporting import LARGEST, Teleporter

import symlm
from symlm import teleport as t
from symlm.symmetry import Transport


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
    for key, G in expected.items():
        assert relative(model.get_parameter(key).grad, G) < EXACT, key  # what a step right after it takes
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


def apart_after_a_teleport(one, two, optimizers, action, tolerance=None):
    """Train both, the second one teleported after a step; return how far it is from the first one, moved at the end."""
    for step in range(3):
        for model, optimizer in zip((one, two), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, tokens(step)).backward()
            optimizer.step()
        if step == 0:
            turn = ACTIONS[action](two)
            t.teleport(two, turn, lambda: loss_of(two, tokens(0)), optimizers[1], tolerance)
    ends = ((two.get_parameter(key), move.weight(one.get_parameter(key).detach())) for key, move in turn.items())
    return max(relative(W, expected) for W, expected in ends)


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
    assert apart_after_a_teleport(one, two, optimizers, "residual rotation", tolerance=1e-6) < 1e-6


def test_what_is_no_symmetry_is_refused_and_undone():
    model, x = model_of(), tokens()
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.5, 2, 32))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="not a symmetry of this model"):
        t.teleport(model, t.residual_rotation(model, orthogonal(32)), lambda: loss_of(model, x))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("wide", ["factor", "weight"])
def test_a_factor_and_a_weight_are_multiplied_in_the_wider_of_their_types(wide, side):
    factor, weight = (torch.float64, torch.float32) if wide == "factor" else (torch.float32, torch.float64)
    A, W = orthogonal(8)[None].to(factor), torch.randn(8, 8).to(weight)
    moved = Transport(**{side: A}).weight(W)
    exact = A[0].double() @ W.double() if side == "left" else W.double() @ torch.linalg.inv(A[0].double())
    assert moved.dtype == torch.float64
    assert relative(moved, exact) < 1e-6


SQUARES = ("Adam", "Adagrad", "RMSprop", "Adadelta", "Adamax", "Adafactor")


@pytest.mark.parametrize("name", SQUARES)
def test_elementwise_second_moments_do_not_move(name):
    model, x = model_of(), tokens()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3)
    loss_of(model, x).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"cannot move with this group element \(elementwise"):
        t.teleport(model, ACTIONS["value and output"](model), lambda: loss_of(model, x), optimizer)
    t.teleport(model, ACTIONS["head shift"](model), lambda: loss_of(model, x), optimizer)  # moves no gradient


def test_but_with_permutations():
    """Adam commutes with a permutation of neurons, if its two moments move along."""
    one, two = model_of(), model_of()
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (one, two)]
    assert apart_after_a_teleport(one, two, optimizers, "neuron permutations") < 1e-9


@pytest.mark.parametrize("name", ["neuron scales", "value and output"])
@pytest.mark.parametrize("build", [torch.optim.SGD, symlm.SymOptimizer], ids=["torch", "symlm"])
def test_a_mean_of_one_gradient_is_the_gradient_at_the_destination(name, build):
    model, x = model_of(), tokens()
    optimizer = build(model if build is symlm.SymOptimizer else model.parameters(), lr=1e-30, momentum=0.9)
    loss_of(model, x).backward()
    optimizer.step()
    transports = ACTIONS[name](model)
    t.teleport(model, transports, lambda: loss_of(model, x), optimizer)
    model.zero_grad()
    loss_of(model, x).backward()
    for key in transports:
        p = model.get_parameter(key)
        mean = next(optimizer.state[p][k] for k in t.moving.MEANS_OF_GRADIENTS if k in optimizer.state[p])
        mean = mean * (p.grad.norm() / mean.norm())  # (1 - β) g or g
        assert relative(mean, p.grad) < 1e-8, key


def test_a_mean_of_steps_moves_with_rotations_alone():
    model, x = model_of(), tokens()
    optimizer = symlm.SymOptimizer(model, preset="polargrad", momentum_of="directions")
    loss_of(model, x).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"momentum of .* cannot move with this group element"):
        t.teleport(model, ACTIONS["neuron scales"](model), lambda: loss_of(model, x), optimizer)


def test_a_bf16_momentum_moves():
    model, x = tiny("qwen3"), tokens()
    optimizer = symlm.SymOptimizer(model, momentum_dtype="bfloat16")
    loss_of(model, x).backward()
    optimizer.step()
    scales = t.neuron_scales(model, random(2, 48).float())
    before = {name: optimizer.state[model.get_parameter(name)]["momentum"].clone() for name in scales}
    t.teleport(model, scales, lambda: loss_of(model, x), optimizer)
    for name, move in scales.items():
        M = optimizer.state[model.get_parameter(name)]["momentum"]
        assert M.dtype == torch.bfloat16
        assert relative(M.float(), move.covector(before[name].float())) < 2**-8


def test_bf16_weights_are_refused_with_the_reason():
    model, x = tiny("qwen3").bfloat16(), tokens()
    with pytest.raises(ValueError, match="whose rounding would change the loss"):
        t.teleport(model, t.neuron_scales(model, random(2, 48).float()), lambda: loss_of(model, x))


def test_a_loss_that_cannot_be_told_again_undoes_the_teleport():
    model, x, calls = model_of(), tokens(), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss():
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return loss_of(model, x)

    with pytest.raises(torch.OutOfMemoryError):
        t.teleport(model, ACTIONS["neuron scales"](model), loss)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_teleports_at_every_step_do_not_run_away():
    torch.manual_seed(0)
    model = tiny("qwen3")
    optimizer = symlm.SymOptimizer(model, lr=0.002)
    teleporter = Teleporter(model, optimizer, 1)
    for step in range(30):
        optimizer.zero_grad()
        loss_of(model, tokens(step)).backward()
        teleporter.before_step(tokens(step))
        assert all(p.grad.norm() > 0 for p in model.parameters())
        optimizer.step()
    assert 1 < teleporter.growth <= LARGEST
    assert max(p.abs().max() for p in model.parameters() if p.ndim == 2) < 2


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("qwen3", {"preset": "adamw"}, "the state of 'adamw' does not move"),
        ("qwen3", {"overrides": {"mlp_in": {"rule": "aro_adam"}}}, "the state of 'aro_adam' does not move"),
        ("glm4_moe", {}, "neurons, T has"),
    ],
)
def test_a_run_that_could_not_teleport_is_refused_before_it_begins(kind, options, words):
    model = tiny(kind)
    with pytest.raises(ValueError, match=words):
        Teleporter(model, symlm.SymOptimizer(model, **options), 10)


def test_a_rotation_refuses_weights_that_it_does_not_know():
    model = tiny("phi3", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"qkv_proj\.weight: the residual rotation is defined for"):
        t.residual_rotation(model, orthogonal(32))


OTHER_MODELS = {
    "value_output: head_dim": lambda model: t.value_output(model, random(2, 2, 5, 5)),
    "value_output: heads": lambda model: t.value_output(model, random(2, 3, 8, 8)),
    "rope_rotations: head_dim": lambda model: t.rope_rotations(model, random(2, 2, 3)),
    "rope_rotations: heads": lambda model: t.rope_rotations(model, random(2, 3, 4)),
    "neuron_permutations": lambda model: t.neuron_permutations(model, torch.arange(40).repeat(2, 1)),
    "residual_rotation": lambda model: t.residual_rotation(model, orthogonal(16)),
    "head_shift": lambda model: t.head_shift(model, random(5)),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_an_action_of_another_models_size_is_refused_by_name(name):
    model = model_of()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"the action moves \d+ (rows|columns) of \S+weight, which has \d+: give one"):
        t.teleport(model, OTHER_MODELS[name](model), lambda: loss_of(model, tokens()))
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["gpt2", "olmoe", "phi3"])
def test_an_action_on_a_structure_that_it_does_not_know_is_refused(kind):
    """Fused projections, experts and GPT-2's layers have no such modules."""
    for family, T in ((t.neuron_scales, random(2, 24)), (t.neuron_permutations, torch.arange(24).repeat(2, 1))):
        with pytest.raises(ValueError, match=r"has 0 modules up_proj, the action has 2 layers"):
            family(tiny(kind), T)


@pytest.mark.parametrize(
    "orders", [torch.zeros(2, 48, dtype=torch.long), torch.zeros(2, 48), torch.arange(48.0).repeat(2, 1)]
)
def test_orders_that_are_no_permutation_are_refused(orders):
    with pytest.raises(ValueError, match=r"are no permutation of 0 to 47; give torch\.randperm's"):
        t.neuron_permutations(model_of(), orders)


def test_a_quadratic_without_a_rotation_is_refused():
    for A, R in (
        (-torch.eye(3), torch.eye(3)),
        (torch.eye(3), 2 * torch.eye(3)),
        (torch.ones(3, 3).triu(), torch.eye(3)),
    ):
        with pytest.raises(ValueError, match="needs a symmetric positive definite A and an orthogonal R"):
            t.act_on_quadratic(A, R, torch.ones(3))


def test_a_quadratics_action_keeps_its_value():
    A = random(4, 4)
    A, w = A @ A.T + torch.eye(4).double(), random(4, seed=1)
    moved = t.act_on_quadratic(A, orthogonal(4), w)
    assert moved @ A @ moved == pytest.approx((w @ A @ w).item(), rel=1e-12)
    assert relative(moved, w) > 0.1


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


def leaky(h):
    return torch.nn.functional.leaky_relu(h, 0.1)


def unleaky(h):
    return torch.nn.functional.leaky_relu(h, 10.0)


def test_the_exact_action_keeps_the_outputs():
    W, X = [random(4, 3), random(5, 4, seed=1), random(2, 5, seed=2)], random(3, 2, seed=3)
    moved = t.act_on_mlp(W, X, 1, torch.eye(5).double() + random(5, 5, seed=4), leaky, unleaky)
    outputs = [V[2] @ leaky(V[1] @ leaky(V[0] @ X)) for V in (W, moved)]
    assert relative(outputs[1], outputs[0]) < 1e-12
    assert relative(moved[1], W[1]) > 0.1


REFUSED = {
    "a batch larger than the width": (0, random(3, 5), leaky, unleaky, "larger than the width 3"),
    "samples that depend on each other": (
        0,
        random(3, 2) @ torch.tensor([[1, 0, 1], [0, 1, 1]]).double(),
        leaky,
        unleaky,
        "off by",
    ),
    "no bijection": (0, random(3, 2), torch.relu, torch.relu, "off by"),
    "values that the activation has not": (0, 30 * random(3, 2), torch.tanh, torch.atanh, "off by"),
    "the last layer": (1, random(3, 2), leaky, unleaky, "has no next layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_mlp_whose_outputs_would_change_is_refused(name):
    layer, X, activation, inverse, words = REFUSED[name]
    W = [random(4, 3, seed=5), random(2, 4, seed=6)]
    g = torch.eye(len(W[layer])).double() + random(len(W[layer]), len(W[layer]), seed=7)
    with pytest.raises(ValueError, match=words):
        t.act_on_mlp(W, X, layer, g, activation, inverse)
