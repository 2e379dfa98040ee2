"""What a step refuses before anything moves, what it warns of, and what construction refuses."""

import warnings
from fractions import Fraction

import pytest
import torch
from models import loss_of, tiny, tokens
from numerics import FP32, relative
from torch import nn

import symlm
from symlm.routing.options import check_options


def backward(model, seed=0):
    model.zero_grad()
    loss_of(model, tokens(seed)).backward()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("nesterov", "false", "True or False"),
        ("shared", "false", "True or False"),
        ("nesterov", 1, "True or False"),
        ("weight_decay", float("nan"), "a finite number"),
        ("momentum", "0.8", "a finite number"),
        ("momentum", True, "a finite number"),
        ("eps", float("inf"), "a finite number"),
        ("steps", 3.0, "a whole number from 1 to 100"),
        ("steps", 10**400, "a whole number from 1 to 100"),
        ("gram_every", 0, "a whole number, 1 or more"),
        ("weight_decay", 10**400, "a finite number"),
        ("floor", -1.0, "a finite number, not negative"),
        ("momentum", Fraction(1, 2), "a finite number"),
        ("eps", torch.tensor(True), "a finite number"),
        ("weight_decay", torch.tensor(float("nan")), "a finite number"),
        ("constraint", ["decay"], "text"),
        ("compute_dtype", torch.int32, "'auto' or a floating-point dtype"),
        ("betas", 0.9, "a pair of finite numbers"),
        ("betas", (0.9, float("nan")), "a pair of finite numbers"),
    ],
)
def test_an_option_of_the_wrong_type_is_named_with_its_value(option, value, expected):
    with pytest.raises(ValueError, match=rf"{option} must be {expected}.*, got"):
        symlm.SymOptimizer(tiny(), **{option: value})
    groups = symlm.param_groups(tiny())
    groups[0][option] = value
    refused = pytest.raises(ValueError, match=rf"{option} must be {expected}.*, got")
    with refused:
        symlm.SymOptimizer(groups)
    with refused:
        symlm.SymOptimizer(tiny(), overrides={"mlp_in": {option: value}})
    with refused:
        symlm.SymOptimizer(symlm.param_groups(tiny()), **{option: value})
    more = symlm.SymOptimizer(groups[1:])
    with refused:
        more.add_param_group(groups[0])
    model = tiny()
    changed = symlm.SymOptimizer(model)
    changed.param_groups[3][option] = value
    before = weights(model)
    backward(model)
    with refused:
        changed.step()
    assert all(torch.equal(W, before[name]) for name, W in weights(model).items())


@pytest.mark.parametrize("option", ["rule", "scale", "schedule", "polar_method", "rounding", "rotation", "momentum_of"])
@pytest.mark.parametrize("value", ["best", None, ["polar"]])
def test_a_name_that_became_none_of_the_known_is_refused_before_anything_moves(option, value):
    model = tiny()
    opt = symlm.SymOptimizer(model)
    opt.param_groups[3][option] = value
    before = weights(model)
    backward(model)
    with pytest.raises(ValueError, match=rf"group attention_v: unknown {option} .*; choose one of"):
        opt.step()
    assert all(torch.equal(W, before[name]) for name, W in weights(model).items())


def test_a_filled_rate_that_is_no_number_reaches_no_group():
    rate = torch.tensor(0.02)
    model = tiny()
    opt = symlm.SymOptimizer(model, lr=rate, overrides={"embedding": {"lr": 0.01}})
    rate.fill_(torch.inf)
    backward(model)
    with pytest.raises(ValueError, match="lr must be a finite number"):
        opt.step()
    assert all(torch.as_tensor(group["lr"]).isfinite().all() for group in opt.param_groups)


@pytest.mark.parametrize("lr", ["0.1", float("nan"), float("inf"), torch.tensor([0.1, 0.2]), None, True])
def test_a_rate_that_is_not_one_positive_number_is_refused(lr):
    with pytest.raises(ValueError, match="lr must be a positive number, got"):
        symlm.SymOptimizer(tiny(), lr=lr)
    groups = symlm.param_groups(tiny())
    groups[1]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr must be a finite number"):
        symlm.SymOptimizer(groups)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_that_changed_its_dtype_is_refused_by_name_before_anything_moves(dtype):
    model = tiny()
    opt = symlm.SymOptimizer(model)
    backward(model)
    opt.step()
    model.to(dtype)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=rf"model.embed_tokens.weight is {dtype} now"):
        opt.step()
    assert all(torch.equal(W, before[name]) for name, W in weights(model).items())


def test_a_table_that_grew_is_refused_by_name_before_anything_moves():
    model = tiny()
    opt = symlm.SymOptimizer(model)
    backward(model)
    opt.step()
    model.resize_token_embeddings(80)
    before = weights(model)
    backward(model)
    with pytest.raises(RuntimeError, match=r"embed_tokens.weight has shape \[80, 32\] now and had \[64, 32\]"):
        opt.step()
    assert all(torch.equal(W, before[name]) for name, W in weights(model).items())


@pytest.mark.parametrize("options", [{"compute_dtype": "float32"}, {"preset": "muon"}, {"preset": "aro"}])
def test_a_step_inside_autocast_has_the_same_bits(options):
    inside, outside = tiny(), tiny()
    first, second = (symlm.SymOptimizer(model, **options) for model in (inside, outside))
    for k in range(3):
        backward(inside, k)
        backward(outside, k)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first.step()
            first.verify()
        second.step()
    assert all(torch.equal(W, weights(outside)[name]) for name, W in weights(inside).items())


def test_a_strided_vector_moves_whole_and_nothing_beside_it():
    base = torch.ones(6, 3)
    module = nn.Module()
    module.w = nn.Parameter(base[:, 0])
    twin = nn.Parameter(torch.ones(6))
    ours = symlm.SymOptimizer(module, lr=0.1, preset="adamw", roles={"w": "vector"})
    theirs = torch.optim.AdamW([twin], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for k in range(3):
        gradient = torch.randn(6, generator=torch.Generator().manual_seed(k))
        for p, opt in ((module.w, ours), (twin, theirs)):
            p.grad = gradient.clone()
            opt.step()
    assert relative(module.w, twin) < FP32
    assert (base[:, 1:] == 1).all()


def test_a_step_without_any_gradient_is_warned_of_once_and_verify_names_it():
    model = tiny()
    opt = symlm.SymOptimizer(model)
    backward(model)
    opt.step()
    model.zero_grad()
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


def test_verify_names_what_the_last_step_did_not_move():
    model = tiny()
    opt = symlm.SymOptimizer(model)
    backward(model)
    opt.step()
    assert opt.verify()
    backward(model)
    model.lm_head.weight.grad = None
    opt.step()
    with pytest.raises(RuntimeError, match=r"lm_head.weight \(lm_head\): the last step did not move it"):
        opt.verify()


def test_what_others_store_before_the_first_step_stays():
    model = tiny()
    opt = symlm.SymOptimizer(model)
    for p in model.parameters():
        opt.state[p]["z"] = p.detach().clone()
    backward(model)
    opt.step()
    assert all({"z"} < set(opt.state[p]) for p in model.parameters())


def test_parameters_can_be_swapped_under_the_optimizer():
    model = tiny()
    opt = symlm.SymOptimizer(model)
    torch.utils.swap_tensors(model.lm_head.weight, nn.Parameter(model.lm_head.weight.detach().clone()))
    backward(model)
    opt.step()
    assert opt.verify()


def test_an_expanded_parameter_is_refused():
    module = nn.Module()
    module.w = nn.Parameter(torch.ones(1, 8).expand(8, 8))
    with pytest.raises(ValueError, match="w is expanded"):
        symlm.SymOptimizer(module, roles={"w": "matrix"})


def test_clipping_weighs_a_step_inside_the_momentum():
    """One large batch of four: unclipped it outweighs the others in the momentum, clipped it does not."""

    def trained(clip):
        model = tiny()
        opt = symlm.SymOptimizer(model)
        for k in range(4):
            backward(model, k)
            for p in model.parameters():
                p.grad.mul_(100 if k == 1 else 1)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
        return model.model.layers[0].mlp.up_proj.weight.detach()

    start = tiny().model.layers[0].mlp.up_proj.weight.detach()
    plain, clipped = trained(None), trained(0.1)
    assert relative(clipped - start, plain - start) > 0.1


def test_verify_after_a_step_that_moved_nothing_says_so_and_a_loaded_state_is_not_blamed():
    model = tiny()
    opt = symlm.SymOptimizer(model)
    backward(model)
    opt.step()
    again = symlm.SymOptimizer(model)
    again.load_state_dict(opt.state_dict())
    assert again.verify()
    model.lm_head.weight.grad.fill_(torch.nan)
    opt.step()
    with pytest.raises(RuntimeError, match="the last step did not move it"):
        opt.verify()


@pytest.mark.parametrize(
    ("option", "value"), [("lr", float("nan")), ("momentum", "0.8"), ("nesterov", "false"), ("lr", -1.0)]
)
def test_an_option_that_turned_wrong_is_refused_before_anything_moves(option, value):
    model = tiny()
    opt = symlm.SymOptimizer(model)
    opt.param_groups[3][option] = value
    before = weights(model)
    backward(model)
    with pytest.raises(ValueError, match=option):
        opt.step()
    assert all(torch.equal(W, before[name]) for name, W in weights(model).items())


@pytest.mark.parametrize(
    "arguments",
    [
        {"overrides": {"matrix": 3}},
        {"overrides": ["lm_head"]},
        {"roles": "matrix"},
        {"preset": ["muon"]},
        {"compute_dtype": 3},
    ],
)
def test_arguments_of_the_wrong_type_are_refused(arguments):
    with pytest.raises(ValueError, match=r"got|unknown preset"):
        symlm.SymOptimizer(tiny(), **arguments)


def test_a_rate_on_a_device_is_not_read_in_a_step():
    """A meta tensor raises where its value is asked for, as a GPU's would wait, or break the capture of a graph."""
    (group, *_) = symlm.SymOptimizer(tiny()).param_groups
    rate = torch.tensor(0.02, device="meta")
    check_options({**group, "lr": rate, "weight_decay": rate, "betas": (rate, rate)})
    with pytest.raises(ValueError, match="weight_decay must be a finite number, not negative"):
        check_options({**group, "lr": rate, "weight_decay": -1.0})
