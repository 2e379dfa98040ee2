"""A state goes to the parameters of its names, whoever saved it, or is refused before anything changes."""

import copy
import warnings

import pytest
import torch
from numerics import relative
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import symlm
from symlm.state.loading import FORMAT


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
        (lambda state: state.update(state=None), "has no 'state' and 'param_groups'"),
        (lambda state: state.update(state={0: None}), "has no 'state' and 'param_groups'"),
        (lambda state: state.update(param_groups=[None]), "has no 'state' and 'param_groups'"),
        (lambda state: state["param_groups"][0].update(params=3), "params must be a list, got 3"),
        (lambda state: state["param_groups"][0].update(param_names=None), "param_names must be a list, got None"),
        (lambda state: state["param_groups"][0].update(step="x"), "step must be a whole number, 0 or more, got 'x'"),
        (
            lambda state: state["param_groups"][0].update(skipped=-1),
            "skipped must be a whole number, 0 or more, got -1",
        ),
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


DAMAGES = {
    "type": (lambda x: None, "lacks"),
    "shape": (lambda x: torch.zeros(3, 3, 3, 3), "is of another size: its saved"),
    "whole numbers": (lambda x: x.to(torch.int64), r"is damaged: its saved \w+ is torch.int64"),
    "complex": (lambda x: x.to(torch.complex64), r"is damaged: its saved \w+ is torch.complex64"),
    "meta": (lambda x: x.to("meta"), "has no numbers"),
    "nan": (lambda x: torch.full_like(x, torch.nan, dtype=torch.float32), "is not finite|is torch.float32"),
}


@pytest.mark.parametrize("options", [{}, {"preset": "kl-soap"}, {"momentum_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damaged_tensor_is_refused_or_begun_anew(damage, options):
    """Also what a rule stores beside its momentum: it would fail in the middle of a step, or reach a weight."""
    change, message = DAMAGES[damage]
    good = made(Three(), **options).state_dict()
    for index, key in [(index, key) for index, state in good["state"].items() for key in state]:
        state = copy.deepcopy(good)
        state["state"][index][key] = change(state["state"][index][key])
        model = Three()
        opt = made(model, 1, **options)
        before = {(p, key): x.clone() for p, of in opt.state.items() for key, x in of.items()}
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(state)
        assert all(torch.equal(opt.state[p][key], x) for (p, key), x in before.items())
        with pytest.warns(UserWarning, match=f"begun anew: .*{key}"):
            opt.load_state_dict(state, strict=False)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        assert all(p.isfinite().all() for p in model.parameters())


def test_levels_of_eight_bits_are_no_momentum():
    model = Three()
    opt = symlm.SymOptimizer(model)
    with pytest.warns(UserWarning, match="begun anew: momentum"):
        opt.load_state_dict(made(Three(), momentum_dtype="int8").state_dict(), strict=False)
    assert model.mid.weight not in opt.state


@pytest.mark.parametrize("state", [None, "state", [{}]])
def test_what_is_no_state_at_all_is_refused(state):
    with pytest.raises(ValueError, match="this is not the state of a SymOptimizer"):
        symlm.SymOptimizer(Three()).load_state_dict(state)


def test_a_state_that_lacks_a_tensor_before_a_step_is_completed():
    model = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    opt = stepped(model)
    opt.state[model["norm"].weight].pop("exp_avg_sq")
    opt.step()


OTHER = {
    "preset": ({"preset": "adamw"}, r"rule 'row_adam'.* for embedding, .*rule 'adamw'"),
    "rule": ({"overrides": {"matrix": {"rule": "normuon"}}}, "rule 'polar'.* for matrix, .*rule 'normuon'"),
    "scale": ({"overrides": {"matrix": {"scale": "unit"}}}, "for matrix, this optimizer has scale 'unit'"),
    "role": ({"roles": {"mid.weight": "mlp_in"}}, "role 'matrix'.*this optimizer has role 'mlp_in'"),
    "constraint": ({"constraint": "none"}, "constraint 'decay'.*this optimizer has constraint 'none'"),
    "momentum_dtype": ({"momentum_dtype": "bfloat16"}, "momentum_dtype 'float32'.*momentum_dtype 'bfloat16'"),
    "momentum_of": ({"momentum_of": "directions"}, "momentum_of 'gradients'.*momentum_of 'directions'"),
    "nesterov": ({"nesterov": True}, "nesterov False.*nesterov True"),
    "rounding": ({"rounding": "compensated"}, "rounding 'stochastic'.*rounding 'compensated'"),
    "rotation": ({"rotation": "layer"}, "rotation 'own'.*rotation 'layer'"),
}


class Three(nn.Module):
    def __init__(self, dtype=torch.float32, vocabulary=12):
        super().__init__()
        self.emb = nn.Embedding(vocabulary, 8, dtype=dtype)
        self.mid = nn.Linear(8, 8, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)


def made(model, steps=2, **options):
    opt = symlm.SymOptimizer(model, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.step()
    return opt


def groups_of(opt):
    return [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]


@pytest.mark.parametrize("name", OTHER)
def test_a_state_of_another_table_is_refused_with_all_that_differs(name):
    options, message = OTHER[name]
    model = Three()
    opt = made(model, **options)
    before = groups_of(opt)
    with pytest.raises(ValueError, match=f"(?s)the state was saved with .*{message}.*strict=False"):
        opt.load_state_dict(made(Three()).state_dict())
    assert groups_of(opt) == before


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_fits_of_another_tables_state_is_taken_and_the_table_stays(name, dtype):
    options, _ = OTHER[name]
    saved, model = made(Three(dtype)), Three(dtype)
    opt = symlm.SymOptimizer(model, lr=0.001, **options)
    table = groups_of(opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.load_state_dict(saved.state_dict(), strict=False)
    assert [{**group, "step": 2} for group in table] == groups_of(opt)
    taken = {key for p in model.parameters() for key in opt.state[p]}
    stays = name not in ("preset", "momentum_of")
    assert ("momentum" in taken) == stays
    assert bool(caught) == (name in ("preset", "momentum_of"))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert opt.state[model.norm.weight]["step"] == (1 if name == "momentum_of" else 3)


def test_a_mean_that_is_taken_is_the_saved_one_in_the_dtype_of_the_table():
    first, model = Three(), Three()
    saved = made(first)
    opt = symlm.SymOptimizer(model, preset="paper-row", momentum_dtype="bfloat16")
    with pytest.warns(UserWarning, match=r"not taken .*: row_rms, step of embedding"):
        opt.load_state_dict(saved.state_dict(), strict=False)
    M = opt.state[model.emb.weight]["momentum"]
    assert torch.equal(M, saved.state[first.emb.weight]["momentum"].bfloat16())
    assert M.dtype == torch.bfloat16


def test_a_state_of_another_vocabulary_gives_what_has_its_shape():
    saved, model = made(Three()), Three(vocabulary=14)
    model.more = nn.Linear(8, 8, bias=False)
    del model.norm
    opt = symlm.SymOptimizer(model)
    with pytest.warns(UserWarning, match="not taken") as caught:
        opt.load_state_dict(saved.state_dict(), strict=False)
    (text,) = [str(w.message) for w in caught]
    assert "norm.bias, which this optimizer does not have; norm.weight, which" in text
    assert "momentum, row_rms, step of embedding" in text
    assert "more.weight, which it does not have" in text
    assert set(opt.state[model.mid.weight]) == {"momentum"}
    assert model.emb.weight not in opt.state


def test_a_state_has_the_number_of_its_format_and_a_newer_one_is_refused():
    opt = made(Three())
    state = opt.state_dict()
    assert state["format"] == FORMAT
    for version in (FORMAT + 1, "2", None, -1):
        for strict in (True, False):
            with pytest.raises(
                ValueError, match=rf"the state has format {version!r}, and this symlm reads .* {FORMAT}"
            ):
                opt.load_state_dict({**state, "format": version}, strict=strict)
    del state["format"]
    opt.load_state_dict(state)


def test_a_bf16_parameter_whose_state_has_no_compensation_gets_one():
    model = Three(torch.bfloat16)
    state = made(Three(torch.bfloat16), rounding="compensated").state_dict()
    for entry in state["state"].values():
        del entry["compensation"]
    opt = made(model, rounding="compensated")
    opt.load_state_dict(state)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert all("compensation" in opt.state[p] for p in model.parameters())


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_goes_on_beside_weights_of_another_precision(before, after, strict):
    source, model = Three(before), Three(after)
    saved, opt = made(source), made(model)
    for _ in range(2):
        for p in source.parameters():
            p.grad = torch.ones_like(p)
        saved.step()
    opt.load_state_dict(copy.deepcopy(saved.state_dict()), strict=strict)
    for p, q in zip(source.parameters(), model.parameters(), strict=True):
        for key, value in saved.state[p].items():
            assert opt.state[q][key].dtype == (torch.float32 if key == "step" else after)
            assert relative(opt.state[q][key], value.to(opt.state[q][key].dtype)) == 0
        q.grad = torch.ones_like(q)
    opt.step()
