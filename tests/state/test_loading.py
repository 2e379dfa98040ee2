"""A state goes to the parameters of its names, whoever saved it, or is refused before anything changes."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import symlm


def layers(names):
    return nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in names})


def stepped(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    opt = symlm.SymOptimizer(model)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    opt.step()
    return opt


def momenta(model, opt):
    return {name: opt.state[p]["momentum"] for name, p in model.named_parameters()}


def test_a_distributed_checkpoint_goes_by_name():
    saved, other = layers("abc"), layers("cba")
    first, second = stepped(saved), stepped(other, seed=1)
    set_optimizer_state_dict(other, second, optim_state_dict=get_optimizer_state_dict(saved, first))
    loaded = momenta(other, second)
    assert all(torch.equal(M, loaded[name]) for name, M in momenta(saved, first).items())


@pytest.mark.parametrize(("before", "after"), [("model", "net"), ("a.b", "c"), ("student", "teacher.inner")])
def test_one_prefix_may_be_another(before, after):
    def around(path, module):
        for part in reversed(path.split(".")):
            module = nn.ModuleDict({part: module})
        return module

    saved, other = around(before, layers("ab")), around(after, layers("ba"))
    first, second = stepped(saved), stepped(other, seed=1)
    second.load_state_dict(first.state_dict())
    loaded = momenta(other, second)
    for name, M in momenta(saved, first).items():
        assert torch.equal(M, loaded[name.replace(before, after, 1)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("param_groups"), "has no 'state' and 'param_groups'"),
        (lambda state: state["state"][0].update(step=None), r"lacks \['step'\]"),
        (lambda state: state["state"][0].update(momentum=[1.0]), r"lacks \['momentum'\]"),
        (lambda state: state["state"][0].update(momentum=torch.ones(2)), r"its saved momentum is \[2\]"),
    ],
)
def test_a_damaged_state_is_refused_and_the_optimizer_goes_on(change, message):
    model = nn.ModuleDict({"emb": nn.Embedding(8, 4)})
    opt = stepped(model)
    state = stepped(model).state_dict()
    before = opt.state[model["emb"].weight]["momentum"].clone()
    change(state)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert torch.equal(opt.state[model["emb"].weight]["momentum"], before)
    opt.step()


def test_a_state_that_lacks_a_tensor_before_a_step_is_completed():
    model = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    opt = stepped(model)
    opt.state[model["norm"].weight].pop("exp_avg_sq")
    opt.step()
