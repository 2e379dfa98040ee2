"""Every rule is held to its symmetry claim, to the next larger group's refusal, to its formula and to its degree."""

import pytest
import torch
from models import tiny, train
from numerics import BRAKE, EXACT, MUST_FAIL, ROTATED, relative
from torch import nn

import symlm
from symlm.polar import CUTOFF, get_schedule
from symlm.polar.factor import METHODS, polar
from symlm.rules import RULES
from symlm.symmetry import Symmetry, act

SHAPES = [(12, 7), (7, 12), (9, 9)]
POLAR_EXPRESS = get_schedule("polar_express")


def matrix(shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rounding(rule):
    return ROTATED if {"rotation", "right_basis", "right_factor"} & set(rule.state) else EXACT


def first_state(rule, M):
    """Return what the rule keeps after two steps on other matrices: nothing special."""
    state = rule.start(M)
    for step in (1, 2):
        state = rule.refreshed(matrix(M.shape, seed=step), state)
    return state


def violation(rule, symmetry, M, transported=True):
    """Return the largest relative departure of U and of the next state from the claim over a few group elements."""
    worst, before = 0.0, first_state(rule, M)
    after = rule.refreshed(M, before)
    U = rule.direction(M, after, step=3)
    for seed in range(4):
        L, R = symmetry.sample(*M.shape[-2:], torch.Generator().manual_seed(seed))
        sides = {"left": L, "right": R, "both": (L, R)}
        factors = {key: sides[kind.side] for key, kind in rule.state.items()}
        moved = {key: rule.state[key].act(x, factors[key]) if transported else x for key, x in before.items()}
        state = rule.refreshed(act(M, L, R), moved)
        found = rule.direction(act(M, L, R), state, step=3)
        worst = max(worst, relative(found, act(U, L, R)))
        for key, value in state.items() if transported else ():
            worst = max(worst, relative(value, rule.state[key].act(after[key], factors[key])))
    if symmetry.shift:
        shifted = M + matrix((1, M.shape[-1]), seed=9)
        found = rule.direction(shifted, rule.refreshed(shifted, before), step=3)
        worst = max(worst, relative(found, U), U.sum(-2).norm().item())
    return worst


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rule_keeps_the_symmetry_it_claims(rule, shape):
    assert violation(rule, rule.symmetry, matrix(shape)) < rounding(rule)


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.state], ids=lambda rule: rule.name)
def test_a_state_left_behind_breaks_it(rule):
    # Of either shape: a wide polar factor has rows of one length, which a mean of their squares does not tell apart.
    departures = [violation(rule, rule.symmetry, matrix(shape), transported=False) for shape in ((7, 12), (12, 7))]
    assert max(departures) > MUST_FAIL


@pytest.mark.parametrize(
    ("rule", "larger"),
    [(rule, larger) for rule in RULES.values() for larger in rule.symmetry.larger()],
    ids=lambda value: value.name if hasattr(value, "name") else str(value),
)
def test_rule_breaks_the_next_larger_symmetry(rule, larger):
    if rule.symmetry.shift and larger.left > rule.symmetry.left:
        larger = Symmetry(larger.left, larger.right)  # signs and rotations move the vector of ones
    assert violation(rule, larger, matrix((12, 7))) > (BRAKE if "auon" in rule.name else MUST_FAIL)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("factor", [7.0, 1e-30, 1e30])
def test_rule_has_its_degree(rule, factor):
    M = matrix((12, 7))
    assert relative(rule(factor * M) / factor**rule.degree, rule(M)) < rounding(rule)


def exact(M):
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


def D(M):
    return M / M.norm(dim=-1, keepdim=True)


def F(M):
    return M / M.norm()


def Y(M, steps=1):
    U, S, Vh = torch.linalg.svd(F(M), full_matrices=False)
    for _ in range(steps):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return U @ torch.diag(S) @ Vh


def C(M):
    return M - M.mean(0)


def W(M):
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    root = (S.square() / S.square().sum() + CUTOFF).sqrt() / POLAR_EXPRESS.bound
    P = root
    for a, b, c in POLAR_EXPRESS.steps(5):
        P = a * P + b * P**3 + c * P**5
    return (len(M) / min(M.shape)) ** 0.5 * U @ torch.diag(S / S.norm() / POLAR_EXPRESS.bound * P / root) @ Vh


def aro(f, epsilon=1e-3):
    def rule(M):
        A = M / M.square().mean().sqrt() @ f(M).T
        Q, R = torch.linalg.qr(A + epsilon * A.norm() / len(A) ** 0.5 * torch.eye(len(A)))
        Q = Q * R.diagonal().sign()
        U = Q @ f(Q.T @ M)
        return U / U.square().mean().sqrt()

    return rule


def S(M):
    for _ in range(5):
        M = D(M)
        M = M / M.norm(dim=0)
    return M


def soap(M, state=None, beta2=0.95):
    """One step of SOAP before the polar factor, from its formulas and with a basis of each side."""
    m, n = M.shape
    L, R, Q, P, V = state or soap_start(m, n)
    L, R = (beta2 * K + (1 - beta2) * X @ X.T / M.square().sum() for K, X in ((L, M), (R, M.T)))
    Q, P = (basis(K @ B + 1e-3 * (K @ B).norm() / len(B) ** 0.5 * B) for K, B in ((L, Q), (R, P)))
    Y = Q.T @ M @ P
    V = beta2 * V + (1 - beta2) * Y.square()
    U = Q @ exact(Y / (V.sqrt() + 1e-4 * V.max().sqrt())) @ P.T
    if state is not None:
        state[:] = L, R, Q, P, V
    return U


def soap_of_rows(M, beta2=0.95):
    """Its first step: the columns in the eigenbasis of their Gram matrix, one power step from the identity."""
    K = (1 - beta2) * M.T @ M / M.square().sum()
    Q = basis(K + 1e-3 * K.norm() / len(K) ** 0.5 * torch.eye(len(K)).double())
    V = (1 - beta2) * (M @ Q).square()
    return exact(M @ Q / (V.sqrt() + 1e-4 * V.max().sqrt())) @ Q.T


def soap_start(m, n):
    start = torch.zeros(m, m), torch.zeros(n, n), torch.eye(m), torch.eye(n), torch.zeros(m, n)
    return [x.double() for x in start]


def kl_start(m, n):
    values = [torch.full((k,), 0.1, dtype=torch.float64) for k in (m, n)]
    return [*soap_start(m, n)[:4], *values, *[torch.zeros(m, n).double()] * 2, None]


def kl_soap(G, state=None, beta1=0.9, beta2=0.95, step=1):
    """One step of KL-SOAP from its formulas, in units of the first gradient's RMS."""
    m, n = G.shape
    A, B, Q, R, a, b, mean, V, unit = state or kl_start(m, n)
    unit = unit or G.square().mean().sqrt()
    G = G / unit
    K, L = (A, B) if A.any() else (G @ G.T, G.T @ G)
    Q, R = (basis(K @ X + 1e-3 * (K @ X).norm() / len(X) ** 0.5 * X) for K, X in ((K, Q), (L, R)))
    over_a, over_b = (1 / (v + 1e-4 * v.max()) for v in (a, b))
    A = beta2 * A + (1 - beta2) / n * G @ R @ torch.diag(over_b) @ R.T @ G.T
    B = beta2 * B + (1 - beta2) / m * G.T @ Q @ torch.diag(over_a) @ Q.T @ G
    Y = Q.T @ G @ R
    a = beta2 * a + (1 - beta2) / n * (Y @ torch.diag(over_b) @ Y.T).diagonal()
    b = beta2 * b + (1 - beta2) / m * (Y.T @ torch.diag(over_a) @ Y).diagonal()
    mean, V = beta1 * mean + (1 - beta1) * G, beta2 * V + (1 - beta2) * Y.square()
    root = (V / (1 - beta2**step)).sqrt()
    if state is not None:
        state[:] = A, B, Q, R, a, b, mean, V, unit
    return Q @ (Q.T @ mean @ R / (1 - beta1**step) / (root + 1e-4 * root.max())) @ R.T


def dion(G, state=None, mu=0.9, divisor=1):
    """One step of Dion from its algorithm."""
    m, n = G.shape
    E, Q = state or dion_start(m, n, divisor)
    P = basis((E + G) @ Q)
    R = (E + G).T @ P
    E, Q = E + G - (1 - mu) * P @ R.T, R / R.norm(dim=0)
    if state is not None:
        state[:] = E, Q
    return P @ Q.T


def dion_start(m, n, divisor=1):
    return [torch.zeros(m, n).double(), torch.eye(n).double()[:, : -(-min(m, n) // divisor)]]


def basis(A):
    Q, R = torch.linalg.qr(A)
    return Q * R.diagonal().sign()


def balanced(M):
    """The polar factor of unit rows, and another one after a scaling by the rows' lengths in the first."""
    scales = 1 / M.norm(dim=1, keepdim=True)
    scales = scales * ((M.shape[1] / len(M)) / exact(scales * M).square().sum(1, keepdim=True)) ** 0.5
    return exact(scales * M)


def sinkhorn_of_rows(M):
    """Eleven scalings to RMS 1: of rows, of columns, and so on; rows of less than a thousandth are zero."""
    size = M.square().sum(1, keepdim=True) ** 0.5
    X = M * (size > 1e-3 * size.mean())
    for k in range(11):
        X = X / X.square().mean(1 - k % 2, keepdim=True).clamp(min=1e-300) ** 0.5
    return X


FORMULAS = {
    "polar": exact,
    "left_spectral": exact,
    "right_spectral": exact,
    "polargrad": lambda M: torch.linalg.svdvals(M).sum() * exact(M),
    "row_norm": D,
    "centered_row_norm": lambda M: C(D(C(M))),
    "row_adam": D,
    "centered_row_adam": lambda M: C(D(C(M))),
    "whitened_row_adam": lambda M: W(D(M)),
    "centered_whitened_row_adam": lambda M: C(W(D(C(M)))),
    "aro_sinkhorn": aro(S),
    "aro_sign": aro(torch.sign),
    "aro_rows": aro(D),
    "aro_adam": aro(torch.sign),
    "row_then_polar": lambda M: exact(D(M)),
    "polar_then_row": lambda M: D(exact(M)),
    "muon_plus": lambda M: D(D(exact(M)).T).T,
    "muown": lambda M: 0.33**0.5 / 0.02 * D(exact(M)),  # from a weight of zeros
    "aurora": balanced,
    "sinkhorn_rows": sinkhorn_of_rows,
    "soap_polar": soap,
    "soap_rows_polar": soap_of_rows,
    "normuon": lambda M: D(exact(M)) * (exact(M).norm() / D(exact(M)).norm()),
    "kl_soap": kl_soap,
    "dion": dion,
    "dion_quarter": lambda M: dion(M, divisor=4),
    "centered_polar": lambda M: exact(C(M)),
    "centered_polargrad": lambda M: torch.linalg.svdvals(C(M)).sum() * exact(C(M)),
    "centered_row_then_polar": lambda M: C(exact(C(D(C(M))))),
    "centered_polar_then_row": lambda M: C(D(exact(C(M)))),
    "sign": torch.sign,
    "auon": lambda M: F(M) / torch.cosh(F(M)).pow(2).mean() ** 0.5,
    "auon_unnormalized": lambda M: M / torch.cosh(1.5 * F(M)).pow(2).mean() ** 0.5,
    "hybrid_auon": lambda M: Y(M) / torch.cosh(Y(M)).pow(2).mean() ** 0.5,
    "hybrid_auon_five": lambda M: Y(M, 5) / torch.cosh(1.5 * F(Y(M, 5))).pow(2).mean() ** 0.5,
    "adamw": torch.sign,
}


def test_every_rule_has_a_formula_here():
    assert set(FORMULAS) == set(RULES)


@pytest.mark.parametrize("name", FORMULAS)
def test_rule_is_its_formula(name):
    M = matrix((12, 7), seed=3)
    assert relative(RULES[name](M, polar=lambda X: polar(X, "svd")), FORMULAS[name](M)) < rounding(RULES[name])


def test_aurora_makes_the_rows_of_a_tall_factor_nearly_equal():
    lengths = [exact(matrix((12, 7))).norm(dim=1), RULES["aurora"](matrix((12, 7))).norm(dim=1)]
    before, after = ((x.max() / x.min() - 1).item() for x in lengths)
    assert after < before / 4


def test_sinkhorn_leaves_rows_out_that_did_not_occur():
    M = matrix((12, 7))
    M[3] *= 1e-4
    U = RULES["sinkhorn_rows"](M)
    assert U[3].eq(0).all()
    assert relative(U, sinkhorn_of_rows(M)) < EXACT


@pytest.mark.parametrize("name", [name for name in RULES if "auon" in name])
def test_a_gamma_takes_the_place_of_auons(name):
    M = matrix((5, 4), seed=3)
    plain, braked = RULES[name].direction(M, {}), RULES[name].direction(M, {}, gamma=4.0)
    X = F(M) if name.startswith("auon") else Y(M) if name == "hybrid_auon" else F(Y(M, 5))
    whole = {"auon": F(M), "auon_unnormalized": M, "hybrid_auon": Y(M), "hybrid_auon_five": Y(M, 5)}[name]
    assert relative(braked, whole / torch.cosh(4 * X).pow(2).mean() ** 0.5) < EXACT
    assert relative(braked, plain) > MUST_FAIL


def test_an_epsilon_takes_the_place_of_aros():
    M, rule = matrix((7, 12), seed=3), RULES["aro_sinkhorn"]
    for epsilon in (0.0, 0.1):
        state = rule.refreshed(M, rule.start(M), retained=epsilon)
        assert relative(rule.direction(M, state), aro(S, epsilon)(M)) < ROTATED
        assert relative(rule.direction(M, state), rule(M)) > ROTATED


@pytest.mark.parametrize("rotation", ["own", "layer"])
def test_a_group_sets_the_numbers_of_its_rule(rotation):
    settings = {"retained": 0.0, "rotation": rotation, "gamma": 2.0}
    ends = []
    for options in ({}, settings, {**settings, "retained": 0.1}):
        model = tiny(dtype=torch.float64)
        rotation_alone = {"rotation": rotation}
        train(model, symlm.SymOptimizer(model, preset="aro", **{**rotation_alone, **options}), 2)
        ends.append(model.model.layers[0].mlp.up_proj.weight.detach())
    assert all(relative(a, b) > 1e-6 for a, b in ((ends[0], ends[1]), (ends[1], ends[2])))
    with pytest.raises(ValueError, match=r"gamma must be None or a number >= 0, got -1\.0"):
        symlm.SymOptimizer(tiny(), gamma=-1.0)


@pytest.mark.parametrize("name", ["dion", "kl_soap"])
def test_a_mean_before_a_rule_with_one_is_refused(name):
    with pytest.raises(ValueError, match=f"rule '{name}' stores a mean of gradients itself, by betas"):
        symlm.SymOptimizer(tiny(), overrides={"mlp_in": {"rule": name}})


def test_kl_soap_begins_anew_at_a_gradient_far_beyond_the_first():
    rule, G = RULES["kl_soap"], matrix((7, 12), seed=1).float()
    kwargs = {"beta1": 0.9, "beta2": 0.98}
    noise = rule.refreshed(matrix((7, 12)).float() * 1e-41, rule.start(G), **kwargs)
    bases = {key: noise[key] for key in ("left_basis", "right_basis")}
    found, expected = rule.refreshed(G, noise, **kwargs), rule.refreshed(G, rule.start(G) | bases, **kwargs)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(x.isfinite().all() for x in found.values())


def test_soap_is_its_formula_over_steps():
    rule = RULES["soap_polar"]
    state = rule.start(matrix((7, 12)))
    expected = soap_start(7, 12)
    for step in range(5):
        M = matrix((7, 12), seed=step)
        state = rule.refreshed(M, state, beta2=0.9)
        U = rule.direction(M, state, polar=lambda X: polar(X, "svd"))
        assert relative(U, soap(M, expected, 0.9)) < ROTATED
    for key, found in zip(("left_gram", "right_gram", "left_basis", "right_basis"), expected[:4], strict=True):
        assert relative(state[key], found) < ROTATED


STORED = {
    "kl_soap": ("left_gram", "right_gram", "left_basis", "right_basis", "left_values", "right_values"),
}


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
@pytest.mark.parametrize(
    ("name", "formula", "start"),
    [
        ("kl_soap", lambda M, state, step: kl_soap(M, state, 0.8, 0.9, step), kl_start),
        ("dion", lambda M, state, step: dion(M, state, 0.8), dion_start),
        ("dion_quarter", lambda M, state, step: dion(M, state, 0.8), lambda m, n: dion_start(m, n, 4)),
    ],
    ids=["kl_soap", "dion", "dion_quarter"],
)
def test_a_rule_with_its_own_mean_is_its_formula_over_steps(name, formula, start, shape):
    rule, expected = RULES[name], start(*shape)
    state = rule.start(matrix(shape))
    for step in range(1, 6):
        G = matrix(shape, seed=step)
        state = rule.refreshed(G, state, beta1=0.8, beta2=0.9)
        found = rule.direction(G, state, step=step, beta1=0.8, beta2=0.9)
        assert relative(found, formula(G, expected, step)) < ROTATED
    for key, value in zip(STORED.get(name, ("residual", "right_factor")), expected, strict=False):
        assert relative(state[key].squeeze(-1), value) < ROTATED, key


def test_the_residual_holds_what_a_low_rank_leaves_out():
    """Of a constant gradient, B grows in the directions that no step took, until they are taken."""
    G, rule = matrix((12, 8)), RULES["dion_quarter"]
    state, taken = rule.start(G), torch.zeros(12, 8).double()
    for _ in range(100):
        state = rule.refreshed(G, state, beta1=0.9)
        U = rule.direction(G, state)
        taken += U
    assert torch.linalg.matrix_rank(U) == 2
    sizes = torch.linalg.svdvals(taken)
    assert sizes[5] > MUST_FAIL * sizes[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", ["gradients", "directions"])
def test_polargrad_takes_every_polar_method_on_any_matrix(method, first):
    """A first step from zero momentum without look-ahead: of a mean (1 − β)G, or a mean (1 − β) of the direction."""
    problem = nn.Module()
    problem.W = nn.Parameter(matrix((12, 7)))
    problem.W.grad = matrix((12, 7), seed=3)
    before, G = problem.W.detach().clone(), problem.W.grad
    options = {"polar_method": method, "momentum_of": first, "nesterov": False, "momentum": 0.9}
    symlm.SymOptimizer(problem, lr=0.1, preset="polargrad", roles={"W": "matrix"}, **options).step()
    step = 0.1 * 0.1 * torch.linalg.svdvals(G).sum() * exact(G)
    assert relative(before - problem.W.detach(), step) < (0.2 if "newton" in method or method == "auto" else EXACT)


def test_a_whitened_matrix_of_few_rows_has_rows_of_unit_length_in_the_mean():
    M = matrix((7, 12), seed=3)
    assert relative(RULES["whitened_row_adam"](M), FORMULAS["whitened_row_adam"](M)) < EXACT


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rule_leaves_its_input_alone_and_sends_zero_to_zero(rule, dtype):
    M = matrix((3, 5, 4)).to(dtype)
    M[1], M[2, 0] = 0, 0
    before = M.clone()
    U = rule(M)
    assert torch.equal(M, before)
    assert U.isfinite().all()
    assert U[1].eq(0).all()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_rule_survives_fp32_extremes(rule, factor):
    M = matrix((12, 7)).float()
    U = rule(M * factor) / factor**rule.degree
    assert relative(U, rule(M)) < (1e-3 if rule.state else 1e-4)


def test_rule_refuses_a_vector():
    with pytest.raises(ValueError, match=r"expects matrices \(\.\.\., m, n\)"):
        RULES["row_norm"](torch.ones(3))
