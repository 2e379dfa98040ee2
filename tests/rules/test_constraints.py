"""Every constraint is its source's formula in float64, matrix by matrix, and keeps the symmetry that it claims."""

import pytest
import torch
from numerics import EXACT, MUST_FAIL, relative
from torch import nn

import symlm
from symlm.distributed.layout import layout_of_shards
from symlm.roles.role import Role
from symlm.routing import ROUTES, Route, make_table
from symlm.sizes.constraints import CONSTRAINTS, get_constraint
from symlm.step.member import Member
from symlm.symmetry import Symmetry, act, rotations, signed_permutations
from symlm.update.spectral_decay import refuse_cut

LR, DECAY, FLOOR = 0.3, 0.2, 4.0
NAMES = [
    *CONSTRAINTS,
    "relative+radial_brake",
    "cautious_decay+radial_brake",
    "decay+relative",
    "independent_decay+relative",
    "relative+spectral_decay",
]


def matrix(m, n, seed=0):
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stepped(name, W, G, view="whole"):
    """Return W after one step of G's polar factor under the constraint, and that factor, both by the optimizer."""
    net = nn.Module()
    net.weight = nn.Parameter(W.clone())
    net.weight.grad = G.clone()
    settings = {"matrix": {"constraint": name, "scale": "unit", "polar_method": "svd", "lr": LR, "floor": FLOOR}}
    options = {"momentum": 0.0, "nesterov": False, "weight_decay": DECAY}
    symlm.SymOptimizer(net, 0.02, "muon", settings, {"weight": "matrix"}, **options).step()
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return net.weight.detach(), U @ Vh


def on_sphere(W, X):
    return X * W.norm() / X.norm()


def floored(W, U):
    return U * max(1.0, (FLOOR * W.norm() / U.norm()).item())


def braked(W, U):
    """The growth along W is halved, and the norm after the step is the norm before times 1 + c."""
    c = (-LR * U * W).sum() / W.square().sum()
    X = W - LR * U
    return X * W.norm() * (1 + (c / 2 if c > 0 else c)) / X.norm()


def cautious(W, U):
    return W * (1 - LR * DECAY * (U * W >= 0).to(W.dtype))


def shrunk(W, U):
    Z = W - LR * U
    P, _, Qh = torch.linalg.svd(Z, full_matrices=False)
    return Z - LR * DECAY * P @ Qh


FORMULAS = {
    "spectral_decay": shrunk,
    "relative+spectral_decay": lambda W, U: shrunk(W, floored(W, U)),
    "none": lambda W, U: W - LR * U,
    "decay": lambda W, U: (1 - LR * DECAY) * W - LR * U,
    "corrected_decay": lambda W, U: (1 - LR * DECAY) * W - LR * U,  # without a schedule
    "independent_decay": lambda W, U: (1 - DECAY) * W - LR * U,
    "cautious_decay": lambda W, U: cautious(W, U) - LR * U,
    "fixed_norm": lambda W, U: on_sphere(W, W - LR * W.norm() * U / U.norm()),
    "relative": lambda W, U: W - LR * floored(W, U),
    "radial_brake": braked,
    "relative+radial_brake": lambda W, U: braked(W, floored(W, U)),
    "cautious_decay+radial_brake": lambda W, U: cautious(braked(W, U), U),
    "independent_decay+relative": lambda W, U: (1 - DECAY) * W - LR * floored(W, U),
    "decay+relative": lambda W, U: (1 - LR * DECAY) * W - LR * floored(W, U),
}


def test_every_constraint_has_a_formula_here():
    assert set(FORMULAS) == set(NAMES)


DECAYS = {  # 1 − κ at a share s of the largest rate
    "decay": lambda lr, s: lr * s * DECAY,
    "corrected_decay": lambda lr, s: lr * s**2 * DECAY,
    "independent_decay": lambda lr, s: s * DECAY,
}


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("tensor", [False, True])
def test_a_decay_follows_the_schedule_as_its_formula_says(name, tensor):
    """Of a matrix, and of a vector by AdamW; both at a multiple of the optimizer's rate."""
    net = nn.LayerNorm(5).double()
    net.register_parameter("matrix", nn.Parameter(matrix(6, 9)))
    net.bias.data.normal_()
    values = {"matrix": {"constraint": name}, "vector": {"constraint": name}}
    groups = symlm.param_groups(net, 0.1, "muon", values, {"matrix": "matrix"})
    for group in groups:
        group["weight_decay_multiplier"] = 1.0
    optimizer = symlm.SymOptimizer(groups, torch.tensor(0.1) if tensor else 0.1, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    for step in range(4):
        before = {key: p.detach().clone() for key, p in net.named_parameters()}
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for group in optimizer.param_groups:
            for key in group["param_names"]:
                largest = float(group["initial_lr"]) * group["lr_multiplier"]
                factor = 1 - DECAYS[name](largest, 1 - step / 4)
                assert relative(net.get_parameter(key), factor * before[key]) < (1e-7 if tensor else EXACT), key
        schedule.step()


@pytest.mark.parametrize("sign", [1, -1])  # the weight grows, and shrinks
@pytest.mark.parametrize("name", NAMES)
def test_constraint_is_its_formula(name, sign):
    W = matrix(6, 9)
    G = sign * (matrix(6, 9, 1) - W)
    found, U = stepped(name, W, G)
    assert relative(found, FORMULAS[name](W, U)) < EXACT
    assert relative(found, W - LR * U) > MUST_FAIL / 5 or name in ("none", "radial_brake")


def test_an_entry_that_a_step_leaves_alone_decays_under_the_cautious_decay():
    """The source's condition is U·W ≥ 0."""
    net, G = nn.Module(), matrix(6, 9, 1)
    G[2] = 0
    W = matrix(6, 9)
    net.weight = nn.Parameter(W.clone())
    net.weight.grad = G.clone()
    settings = {"matrix": {"rule": "sign", "constraint": "cautious_decay", "scale": "unit", "lr": LR}}
    symlm.SymOptimizer(net, 0.02, "muon", settings, {"weight": "matrix"}, momentum=0.0, weight_decay=DECAY).step()
    assert relative(net.weight.detach(), cautious(W, G.sign()) - LR * G.sign()) < EXACT
    assert relative(net.weight[2].detach(), (1 - LR * DECAY) * W[2]) < EXACT


@pytest.mark.parametrize("name", [name for name in NAMES if "cautious" not in name])
def test_no_rotation_changes_what_a_constraint_does(name):
    W, G = matrix(6, 9), matrix(6, 9, 1)
    L, R = Symmetry(rotations, rotations).sample(6, 9, torch.Generator().manual_seed(0))
    assert get_constraint(name).symmetry == Symmetry(rotations, rotations)
    assert relative(stepped(name, act(W, L, R), act(G, L, R))[0], act(stepped(name, W, G)[0], L, R)) < EXACT


def test_the_cautious_decay_keeps_signed_permutations_and_no_rotation():
    W, G = matrix(6, 9), matrix(6, 9, 1)
    claim = get_constraint("cautious_decay+radial_brake").symmetry
    assert claim == Symmetry(signed_permutations, signed_permutations)
    for symmetry, holds in ((claim, True), (Symmetry(rotations, rotations), False)):
        L, R = symmetry.sample(6, 9, torch.Generator().manual_seed(0))
        moved = stepped("cautious_decay", act(W, L, R), act(G, L, R))[0]
        departure = relative(moved, act(stepped("cautious_decay", W, G)[0], L, R))
        assert (departure < EXACT) if holds else (departure > 1e-3)


@pytest.mark.parametrize("name", ["fixed_norm", "relative", "radial_brake", "relative+radial_brake"])
def test_a_weight_or_a_gradient_of_zeros_is_harmless(name):
    zero, G = torch.zeros(6, 9, dtype=torch.float64), matrix(6, 9, 1)
    free, U = stepped(name, zero, G)
    assert relative(free, -LR * U) < EXACT  # a weight of zeros has no size: the first step is free
    W = matrix(6, 9)
    net = nn.Linear(9, 6, bias=False).double()
    net.weight.data = W.clone()
    net.weight.grad = zero.clone()
    symlm.SymOptimizer(net, 0.1, "muon", {"matrix": {"constraint": name}}, {"weight": "matrix"}).step()
    assert torch.equal(net.weight.detach(), W)


@pytest.mark.parametrize("view", ["whole", "heads"])
def test_a_spectral_decay_takes_one_amount_from_every_singular_value(view):
    """Of each head apart, and of a whole matrix; a gradient of zeros moves nothing else."""
    from models import tiny

    model = tiny(vocab_size=61, dtype=torch.float64)
    settings = {"constraint": "spectral_decay", "view": view, "lr": LR, "weight_decay": 1e-3, "polar_method": "svd"}
    optimizer = symlm.SymOptimizer(model, 0.1, overrides={"attention_q": settings})
    q = model.model.layers[0].self_attn.q_proj.weight
    heads = (4 if view == "heads" else 1, -1, q.shape[1])
    before = torch.linalg.svdvals(q.detach().view(heads))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = torch.linalg.svdvals(q.detach().view(heads))
    assert relative(after, before - 1e-3 * LR) < EXACT
    assert relative(after, before) > 1e-4


def test_a_spectral_decay_refuses_shards_before_anything_moves():
    part = torch.zeros(3, 9)
    member = Member("W", part, part, {}, layout_of_shards((6, 9), shards=2, copies=1))
    with pytest.raises(
        RuntimeError, match="W is sharded, and constraint 'spectral_decay' needs whole weights on a rank"
    ):
        refuse_cut({"constraint": "spectral_decay"}, [member])
    refuse_cut({"constraint": "decay"}, [member])


def test_a_head_has_a_norm_of_its_own():
    from models import tiny

    model = tiny(vocab_size=61, dtype=torch.float64)
    q = model.model.layers[0].self_attn.q_proj.weight
    heads = (model.config.num_attention_heads, -1)
    before = q.detach().clone().view(*heads).norm(dim=1)
    optimizer = symlm.SymOptimizer(model, 0.1, overrides={"attention_q": {"constraint": "fixed_norm"}})
    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert relative(q.detach().view(*heads).norm(dim=1), before) < EXACT
    assert relative(q.detach().view(*heads), before[:, None]) > MUST_FAIL


def test_a_table_refuses_a_constraint_of_a_smaller_symmetry():
    route = Route("polar", constraint="cautious_decay")
    with pytest.raises(ValueError, match="larger than what 'cautious_decay' preserves"):
        make_table({**ROUTES, Role.MATRIX: route})
    assert make_table({**ROUTES, Role.MATRIX: route}, baseline=True)[Role.MATRIX] == route


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"matrix": {"constraint": "sphere"}}, "unknown constraint 'sphere'"),
        (
            {"lm_head": {"constraint": "spectral_decay"}},
            "group lm_head: constraint 'spectral_decay' needs a whole step",
        ),
        ({"lm_head": {"constraint": "relative"}}, "group lm_head: constraint 'relative' needs a whole step at once"),
        ({"vector": {"constraint": "cautious_decay"}}, "group vector: constraint 'cautious_decay' needs a whole step"),
        ({"mlp_in": {"constraint": "relative", "floor": -1.0}}, "floor must be a finite number, not negative"),
    ],
)
def test_a_constraint_that_cannot_be_respected_is_refused_by_name(values, message):
    from models import tiny

    with pytest.raises(ValueError, match=message):
        symlm.SymOptimizer(tiny(vocab_size=61), overrides=values)
