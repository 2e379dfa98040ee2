"""SymOptimizer under what torch asks of its own optimizers: its generic tests and its schedulers, for every preset.

The schedulers and the hyper-parameters are those of the installed torch's `common_optimizers`; the tests are ours.
"""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import optim_db

import symlm
from symlm.rules import RULES

INFO = {info.optim_cls: info for info in optim_db}
SCHEDULERS = [(cls.__name__, k) for cls in (SGD, AdamW) for k in range(len(INFO[cls].scheduler_inputs))]
INPUTS = [entry.kwargs for entry in INFO[AdamW].optim_inputs_func(device="cpu", dtype=torch.float32)]
KNOWN = ("lr", "weight_decay", "betas", "eps")
WHOLE = [name for name, rule in RULES.items() if not rule.elementwise]


class Net(nn.Module):
    """A matrix and a vector, whose loss is a quadratic."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 5, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(6, dtype=dtype))
        self.x, self.y = torch.randn(16, 5, dtype=dtype), torch.randn(16, 6, dtype=dtype)

    def loss(self):
        return (self.x @ self.weight.mT + self.bias - self.y).square().mean()


def optimizer(net, preset="default", rule=None, **options):
    alone = {"momentum": 0.0, "nesterov": False} if rule and RULES[rule].own_mean else {}
    overrides = {"matrix": {"rule": rule, **alone}} if rule else None
    roles = {"weight": "matrix", "bias": "vector"}
    return symlm.SymOptimizer(net, preset=preset, overrides=overrides, roles=roles, **options)


def step(net, opt, steps=1):
    for _ in range(steps):
        opt.zero_grad()
        net.loss().backward()
        opt.step()


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


presets = pytest.mark.parametrize("preset", symlm.PRESETS)
rules = pytest.mark.parametrize("rule", WHOLE)


@presets
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda pair: "-".join(map(str, pair)))
def test_torchs_schedulers_lower_the_loss(preset, scheduler):
    cls = {"SGD": SGD, "AdamW": AdamW}[scheduler[0]]
    net = Net()
    opt = optimizer(net, preset)
    chain = [make(opt) for make in INFO[cls].scheduler_inputs[scheduler[1]]]
    before = net.loss().item()
    for _ in range(20):
        step(net, opt)
        for one in chain:
            one.step(net.loss()) if isinstance(one, ReduceLROnPlateau) else one.step()
    assert net.loss().item() < before


@pytest.mark.parametrize("kwargs", INPUTS, ids=lambda kwargs: "-".join(kwargs) or "plain")
def test_torchs_inputs_are_taken_or_refused_by_name(kwargs):
    options = {key: value for key, value in kwargs.items() if key in KNOWN}
    net = Net()
    step(net, optimizer(net, **options), 3)
    if other := [key for key in kwargs if key not in KNOWN]:
        with pytest.raises(ValueError, match=f"unknown option '{other[0]}'"):
            optimizer(Net(), **{other[0]: kwargs[other[0]]})


@rules
def test_every_rule_goes_downhill_with_a_closure_and_without(rule):
    for closure in (False, True):
        net = Net(torch.float64)
        opt = optimizer(net, rule=rule, lr=0.002)
        before = net.loss().item()

        def evaluate(net=net, opt=opt):
            opt.zero_grad()
            loss = net.loss()
            loss.backward()
            return loss

        for _ in range(30):
            if closure:
                assert math.isfinite(opt.step(evaluate).item())
            else:
                evaluate()
                opt.step()
        assert net.loss().item() < before


@presets
def test_a_state_dict_goes_on_bit_for_bit_and_holds_plain_data(preset):
    net = Net()
    opt = optimizer(net, preset)
    step(net, opt, 3)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(net)
    again = optimizer(other, preset)
    again.load_state_dict(torch.load(file, weights_only=True))
    step(net, opt, 3)
    step(other, again, 3)
    assert same(weights(net), weights(other))


@presets
def test_copies_step_alike(preset):
    net = Net()
    opt = optimizer(net, preset)
    step(net, opt, 2)
    copied, its = copy.deepcopy((net, opt))
    pickled, theirs = pickle.loads(pickle.dumps((net, opt)))
    for model, one in ((net, opt), (copied, its), (pickled, theirs)):
        step(model, one, 2)
    assert same(weights(net), weights(copied))
    assert same(weights(net), weights(pickled))


@rules
def test_without_gradients_nothing_moves_and_zeros_move_nothing(rule):
    net = Net()
    opt = optimizer(net, rule=rule)
    before = weights(net)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert same(before, weights(net))
    net.weight.grad = None
    net.bias.grad = torch.ones(6)
    opt.step()
    assert torch.equal(net.weight, before[0])
    assert not torch.equal(net.bias, before[1])


@presets
def test_hooks_run_around_a_step(preset):
    calls = []
    net = Net()
    opt = optimizer(net, preset)
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    opt.register_state_dict_post_hook(lambda _, state: calls.append("state"))
    opt.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    step(net, opt)
    opt.load_state_dict(opt.state_dict())
    assert calls == ["before", "after", "state", "loaded"]


@presets
def test_it_prints_and_profiles_under_its_name(preset):
    net = Net()
    opt = optimizer(net, preset)
    assert repr(opt).startswith("SymOptimizer (")
    with torch.profiler.profile() as profile:
        step(net, opt)
    assert any("Optimizer.step#SymOptimizer.step" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("preset", ["default", "adamw", "muon"])
def test_groups_of_other_rates_and_decays_are_their_own(preset):
    plain, decayed = Net(), Net()
    step(plain, optimizer(plain, preset))
    groups = symlm.param_groups(decayed, preset=preset, roles={"weight": "matrix", "bias": "vector"})
    for group in groups:
        group.update(weight_decay=0.5, weight_decay_multiplier=float(group["role"] == "matrix"))
    step(decayed, symlm.SymOptimizer(groups))
    assert torch.equal(plain.bias, decayed.bias)
    assert not torch.equal(plain.weight, decayed.weight)


@pytest.mark.parametrize("lr", [0.0, -1.0])
def test_a_rate_below_zero_is_refused_and_a_group_may_stand_still(lr):
    groups = symlm.param_groups(Net(), roles={"weight": "matrix", "bias": "vector"})
    groups[0]["lr"] = lr
    if lr < 0:
        with pytest.raises(ValueError, match=r"lr must be a finite number, not negative, got -1.0"):
            symlm.SymOptimizer(groups)
    else:
        symlm.SymOptimizer(groups)
