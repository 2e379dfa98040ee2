"""Schedulers and callers write to groups between steps: rates keep the table's proportions, momenta are cycled."""

import warnings

import pytest
import torch
from models import loss_of, tiny, tokens
from numerics import RANKS, relative
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

import symlm
from symlm.rules import get_rule


def step(model, opt, scheduler=None, steps=1):
    for k in range(steps):
        opt.zero_grad()
        loss_of(model, tokens(k)).backward()
        opt.step()
        if scheduler:
            scheduler.step(1.0) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()


@pytest.mark.parametrize("make", [OneCycleLR, CyclicLR])
def test_every_groups_momentum_is_cycled(make):
    model = tiny()
    opt = symlm.SymOptimizer(model)
    rates = [group["lr"] for group in opt.param_groups]
    if make is OneCycleLR:
        scheduler = OneCycleLR(opt, max_lr=rates, total_steps=10, base_momentum=0.6, max_momentum=0.9)
    else:
        low = [rate / 10 for rate in rates]
        scheduler = CyclicLR(opt, low, rates, step_size_up=5, base_momentum=0.6, max_momentum=0.9)
    seen = set()
    for _ in range(6):
        step(model, opt)
        assert all(group["momentum"] == group["betas"][0] for group in opt.param_groups)
        seen.add(opt.param_groups[0]["momentum"])
        scheduler.step()
    assert len(seen) > 3
    assert max(seen) == 0.9


@pytest.mark.parametrize("preset", ["kl-soap", "dion"])
def test_a_rule_with_a_mean_of_its_own_is_cycled_once(preset):
    opt = symlm.SymOptimizer(model := tiny(), preset=preset)
    rates = [group["lr"] for group in opt.param_groups]
    scheduler = OneCycleLR(opt, max_lr=rates, total_steps=10, base_momentum=0.6, max_momentum=0.9)
    own = [get_rule(group["rule"]).own_mean for group in opt.param_groups]
    assert any(own)
    step(model, opt, scheduler)
    assert [group["momentum"] for group in opt.param_groups] == [0.0 if alone else 0.9 for alone in own]
    step(model, opt)
    assert all(0.6 < group["betas"][0] < 0.9 for group in opt.param_groups)


def test_momenta_of_the_table_stay_where_nobody_cycles_them():
    opt = symlm.SymOptimizer(model := tiny())
    before = [(group["momentum"], group["betas"]) for group in opt.param_groups]
    step(model, opt, LambdaLR(opt, lambda k: 0.5**k), 3)
    assert before == [(group["momentum"], group["betas"]) for group in opt.param_groups]


BREAK = {
    "swa": lambda opt: SWALR(opt, 0.01, anneal_epochs=1),
    "cyclic": lambda opt: CyclicLR(opt, 0.001, 0.01, step_size_up=2, cycle_momentum=False),
    "plateau": lambda opt: ReduceLROnPlateau(opt, factor=0.1, patience=0, min_lr=0.005),
    "eta_min": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 4, eta_min=0.005),
}


@pytest.mark.parametrize("name", BREAK)
def test_a_schedule_that_breaks_the_proportions_is_warned_of_once(name):
    opt = symlm.SymOptimizer(model := tiny())
    scheduler = BREAK[name](opt)
    with pytest.warns(UserWarning, match=r"the rates of .*lm_head.* left the table's proportions.*max_lr=") as caught:
        step(model, opt, scheduler, 6)
    assert len([w for w in caught if "proportions" in str(w.message)]) == 1


def test_steps_of_one_group_at_a_time_are_warned_of_too():
    """As DeepSpeed's ZeRO-1 and 2 step, whose own WarmupLR sets one rate."""
    opt = symlm.SymOptimizer(model := tiny())
    loss_of(model, tokens()).backward()
    groups = opt.param_groups

    def step_one_by_one():
        for group in groups:
            opt.param_groups = [group]
            opt.step()

    step_one_by_one()
    for group in groups:
        group["lr"] = 5e-5
    with pytest.warns(UserWarning, match=r"the rates of .*lm_head.* left the table's proportions") as caught:
        step_one_by_one()
    assert len([w for w in caught if "proportions" in str(w.message)]) == 1


def test_a_schedule_that_multiplies_is_not_warned_of():
    opt = symlm.SymOptimizer(model := tiny())
    scheduler = LambdaLR(opt, lambda k: min(1, k / 3) * (1 - k / 7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, opt, scheduler, 7)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("preset", ["default", "scion", "adamw"])
def test_a_rate_that_the_caller_fills_reaches_every_group(shape, preset):
    ours, theirs = tiny(), tiny()
    rate = torch.full(shape, 0.02)
    opt = symlm.SymOptimizer(ours, lr=rate, preset=preset)
    reference = symlm.SymOptimizer(theirs, lr=0.02, preset=preset)
    step(ours, opt)
    step(theirs, reference)
    rate.fill_(0.01)
    for group in reference.param_groups:
        group["lr"] /= 2
    step(ours, opt)
    step(theirs, reference)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative(p, q) < RANKS  # a rate in fp32 rounds


@pytest.mark.parametrize("freeze", [False, True])
def test_the_rate_that_frameworks_log_is_the_dial(freeze):
    model = tiny()
    model.model.embed_tokens.weight.requires_grad_(not freeze)
    opt = symlm.SymOptimizer(model, lr=0.02)
    assert opt.param_groups[0]["lr"] == 0.02
    scheduler = LambdaLR(opt, lambda k: 0.5)
    assert scheduler.get_last_lr()[0] == 0.01


def test_groups_have_names_of_their_own():
    names = [group["name"] for group in symlm.param_groups(tiny("phi3"))]
    assert len(set(names)) == len(names)
    assert {"embedding", "lm_head", "mlp_in"} <= set(names)


def test_a_filled_rate_reaches_the_others_where_a_role_has_its_own():
    rate = torch.tensor(0.02)
    for role in ("embedding", "mlp_in"):
        rate.fill_(0.02)
        opt = symlm.SymOptimizer(model := tiny(), lr=rate, overrides={role: {"lr": 5e-3}})
        before = {group["role"]: float(group["lr"]) for group in opt.param_groups}
        rate.fill_(0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(model, opt)
        after = {group["role"]: float(group["lr"]) for group in opt.param_groups}
        assert after == {name: lr if name == role else pytest.approx(lr / 2) for name, lr in before.items()}
