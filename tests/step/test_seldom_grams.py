"""A whitened head whose Gram matrix is computed every k-th step: its formula, and the same numbers on every path."""

import copy

import pytest
import torch
from models import tiny, train
from numerics import EXACT, relative
from torch import nn

import symlm
from symlm.distributed.layout import Layout
from symlm.polar import inverse_root, inverse_roots
from symlm.rules import RULES
from symlm.rules.rows import whitener
from symlm.step.directions import whole_directions
from symlm.step.rows import row_step


def steps(every, count=7, beta2=0.9, tied=False):
    """Yield a head's weight before and after each step, its gradient, and its state."""
    head = nn.Linear(5, 8, bias=False).double()
    role = "tied_embedding" if tied else "lm_head"
    options = {"momentum": 0.0, "nesterov": False, "betas": (0.9, beta2), "gram_every": every}
    overrides = {role: {"scale": "unit", "lr": 0.1, **options}}
    optimizer = symlm.SymOptimizer(head, overrides=overrides, roles={"weight": role})
    for step in range(count):
        G = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        head.weight.grad = G.clone()
        before = head.weight.detach().clone()
        optimizer.step()
        yield before, head.weight.detach().clone(), G, optimizer.state[head.weight]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_mean_takes_every_kth_gram_matrix_at_the_weight_of_k_steps(every, tied):
    beta2, r, K = 0.9, torch.zeros(8, 1, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    for step, (before, after, G, state) in enumerate(steps(every, beta2=beta2, tied=tied)):
        X = G if tied else G - G.mean(0)
        r = (beta2 * r.square() + (1 - beta2) * X.square().sum(1, keepdim=True)).sqrt()
        D = X * (1 - beta2 ** (step + 1)) ** 0.5 / r
        if step % every == 0:
            K = beta2**every * K + (1 - beta2**every) * D.T @ D / 8
        U = D @ whitener(K, 8)
        assert relative(state["gram"], K) < EXACT
        assert relative(before - after, 0.1 * (U if tied else U - U.mean(0))) < 1e3 * EXACT


def test_a_head_that_is_gathered_whole_has_the_same_state():
    """The path of placements that are no interval of rows, which computes every rule on whole matrices."""
    head = nn.Linear(5, 8, bias=False).double()
    overrides = {"lm_head": {"gram_every": 3, "momentum": 0.0, "nesterov": False, "scale": "unit"}}
    group = symlm.SymOptimizer(head, overrides=overrides, roles={"weight": "lm_head"}).param_groups[0]
    options = {"every": 3, "beta2": group["betas"][1]}
    states = None
    for step, (before, after, G, state) in enumerate(steps(**options)):
        current = None if states is None else [{**states[0], "step": torch.tensor(float(step + 1))}]
        (U,), states = whole_directions({**group, "step": step + 1}, G[None], states=current)
        assert relative(states[0]["gram"], state["gram"]) < EXACT
        assert relative(before - after, 0.1 * U) < 1e3 * EXACT


@pytest.mark.parametrize("tied", [False, True])
def test_a_root_is_computed_once_for_each_gram_matrix(tied, monkeypatch):
    computed = []
    monkeypatch.setattr(inverse_roots, "inverse_root", lambda K: (computed.append(1), inverse_root(K))[1])
    list(steps(3, count=7, tied=tied))
    assert len(computed) == 3


def test_a_root_follows_what_is_stored_under_a_view():
    """A partition's Gram matrices are views of one tensor, made anew in every step."""
    flat = torch.eye(3).repeat(2, 1).flatten()
    first = inverse_roots.stored_root(flat[:9].view(3, 3))
    assert inverse_roots.stored_root(flat[:9].view(3, 3)) is first
    assert inverse_roots.stored_root(flat[9:].view(3, 3)) is not first
    flat[:9].view(3, 3).fill_diagonal_(1.0)[0, 0] = 4.0
    again = inverse_roots.stored_root(flat[:9].view(3, 3))
    assert torch.equal(again, inverse_root(flat[:9].view(3, 3)))
    assert not torch.equal(again, first)


@pytest.mark.parametrize("tied", [False, True])
def test_shards_sum_a_gram_matrix_every_kth_step(tied, monkeypatch):
    """What is summed over k steps is what a plan counts: all else is two rows of a centered rule."""
    summed, sizes = row_step.summed, []
    monkeypatch.setattr(
        row_step, "summed", lambda total, layout: (sizes.append(total.numel()), summed(total, layout))[1]
    )
    by_step = []
    for _ in steps(5, count=10, tied=tied):
        by_step.append(sizes.copy())
        sizes.clear()
    rule = RULES["whitened_row_adam" if tied else "centered_whitened_row_adam"]
    layout = Layout((8, 5), ((0, 40),))
    assert by_step == ([[30], *[[]] * 4] if tied else [[5, 30], *[[5, 5]] * 4]) * 2
    assert sum(map(sum, by_step)) == 10 * row_step.entries_to_sum(rule, layout, 5)


def test_it_is_resumed_at_the_step_it_had_reached():
    model = tiny()
    optimizer = symlm.SymOptimizer(model, gram_every=3)
    train(model, optimizer, 2)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, 4, first=2)
    again = tiny()
    again.load_state_dict(weights)
    resumed = symlm.SymOptimizer(again, gram_every=3)
    resumed.load_state_dict(saved)
    train(again, resumed, 4, first=2)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
def test_a_count_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="gram_every"):
        symlm.SymOptimizer(tiny(), gram_every=value)
