"""SymOptimizer as one torch optimizer: parity, resume, low precision, bad gradients, and the whole stack's symmetry."""

import copy
import io
import pickle

import pytest
import torch
from models import loss_of, tiny, tokens, train
from numerics import BF16_POLAR, EXACT, FP32, RUN, relative
from torch import nn

import symlm
from symlm.rules import RULES
from symlm.update.rounding import stochastic_round

OPTIONS = {"polar_method": "svd"}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, neurons, vocabulary, heads):
    """Permute a Qwen3's MLP neurons, tokens and key-value heads (with their query heads), leaving its function."""
    d = model.config.head_dim
    ratio = model.config.num_attention_heads // model.config.num_key_value_heads
    kv = torch.cat([torch.arange(h * d, (h + 1) * d) for h in heads])
    q = torch.cat([torch.arange(h * ratio * d, (h + 1) * ratio * d) for h in heads])
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight.copy_(projection.weight[neurons])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, neurons])
            layer.self_attn.q_proj.weight.copy_(layer.self_attn.q_proj.weight[q])
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight[:, q])
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.copy_(projection.weight[kv])
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[vocabulary])
        model.lm_head.weight.copy_(model.lm_head.weight[vocabulary])
    return model


@pytest.mark.parametrize(
    ("preset", "inner"), [("default", None), ("paper-hybrid", None), ("muon", None), ("default", "muown")]
)
def test_training_commutes_with_the_models_symmetries(preset, inner):
    overrides = {role: {"rule": inner} for role in ("attention_q", "mlp_in", "mlp_out")} if inner else None
    neurons, vocabulary = torch.randperm(48), torch.randperm(64)
    heads = torch.tensor([1, 0])
    renamed = torch.argsort(vocabulary)
    plain = tiny(dtype=torch.float64)
    other = moved(copy.deepcopy(plain), neurons, vocabulary, heads)
    first, second = (symlm.SymOptimizer(m, preset=preset, overrides=overrides) for m in (plain, other))
    train(plain, first, 2)
    train(other, second, 2, move=lambda x: renamed[x])
    train(plain, first, 3, first=2)
    train(other, second, 3, first=2, move=lambda x: renamed[x])
    moved(plain, neurons, vocabulary, heads)
    for name, W in weights(plain).items():
        assert relative(weights(other)[name], W) < RUN, name


def test_shift_of_the_head_changes_nothing_but_the_shift():
    plain = tiny(dtype=torch.float64)
    other = copy.deepcopy(plain)
    shift = torch.randn(32, dtype=torch.float64)
    with torch.no_grad():
        other.lm_head.weight.add_(shift)
    for model in (plain, other):
        train(model, symlm.SymOptimizer(model), 5)
    assert relative(other.lm_head.weight - shift, plain.lm_head.weight) < RUN


def test_vectors_and_the_adamw_preset_are_torch_adamw():
    ours, theirs = tiny(), tiny()
    opt = symlm.SymOptimizer(ours, lr=1e-3, preset="adamw", weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    train(ours, opt, 20)
    train(theirs, reference, 20)
    for name, W in weights(theirs).items():
        assert relative(weights(ours)[name], W) < FP32, name


def test_the_muon_rule_is_torch_muon():
    torch.manual_seed(0)
    ours = nn.Linear(24, 40, bias=False)
    theirs = copy.deepcopy(ours)
    opt = symlm.SymOptimizer(
        ours,
        preset="muon",
        roles={"weight": "matrix"},
        nesterov=True,
        weight_decay=0.1,
        schedule="muon",
        polar_method="newton_schulz",
        compute_dtype="bfloat16",
    )
    reference = torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    start = ours.weight.detach().clone()
    for k in range(20):
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(k))
        for model, optimizer in ((ours, opt), (theirs, reference)):
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
    assert relative(ours.weight - start, theirs.weight - start) < BF16_POLAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True, "momentum_dtype": "bfloat16"}, {"rounding": "compensated"}, {"momentum_dtype": "int8"}],
)
def test_a_saved_run_goes_on_bit_for_bit(dtype, options):
    whole, half = tiny(dtype=dtype), tiny(dtype=dtype)
    train(whole, symlm.SymOptimizer(whole, **options), 6)
    opt = symlm.SymOptimizer(half, **options)
    train(half, opt, 3)
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = tiny(dtype=dtype, seed=5)
    resumed.load_state_dict(saved["model"])
    opt = symlm.SymOptimizer(resumed, **options)
    opt.load_state_dict(saved["optimizer"])
    train(resumed, opt, 3, first=3)
    for name, W in weights(whole).items():
        assert torch.equal(weights(resumed)[name], W), name


def test_pickle_schedulers_hooks_and_closures_work():
    model = tiny()
    opt = pickle.loads(pickle.dumps(symlm.SymOptimizer(model)))
    assert opt.param_groups[0]["rule"] == "row_adam"
    opt = symlm.SymOptimizer(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 0.5, 1.0, 4)
    assert all(g["lr"] == pytest.approx(0.5 * g["initial_lr"]) for g in opt.param_groups)
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append(1))
    x = tokens()

    def closure():
        opt.zero_grad()
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(5)]
    scheduler.step()
    assert losses[-1] < losses[0]
    assert len(calls) == 5


def test_lr_as_a_tensor_is_the_same_run():
    a, b = tiny(), tiny()
    train(a, symlm.SymOptimizer(a, lr=0.01), 3)
    train(b, symlm.SymOptimizer(b, lr=torch.tensor(0.01, dtype=torch.float64)), 3)
    for name, W in weights(a).items():
        assert relative(weights(b)[name], W) < FP32, name


def test_a_skipped_group_is_counted_where_groups_step_by_themselves():
    """As DeepSpeed has them step, whose optimizer has one group at a time."""
    model = tiny()
    opt = symlm.SymOptimizer(model)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    model.lm_head.weight.grad[3, 4] = float("nan")
    groups = opt.param_groups
    assert all(p is not model.lm_head.weight for p in groups[0]["params"])
    for group in groups:
        opt.param_groups = [group]
        opt.step()
    opt.param_groups = groups
    assert opt.skipped_steps == 1


def test_a_step_that_others_skipped_is_counted_and_is_in_the_state():
    model = tiny()
    opt = symlm.SymOptimizer(model)
    opt.count_skipped_step()
    train(model, opt, 1)
    assert opt.update_size is not None
    opt.count_skipped_step()
    assert opt.skipped_steps == 2
    assert opt.update_size is None
    again = symlm.SymOptimizer(tiny())
    again.load_state_dict(opt.state_dict())
    assert again.skipped_steps == 2
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    model.lm_head.weight.grad[3, 4] = float("nan")
    opt.step()
    assert (opt.skipped_steps, again.skipped_steps) == (3, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_change_nothing(bad):
    model = tiny()
    opt = symlm.SymOptimizer(model)
    train(model, opt, 2)
    before = weights(model)
    momenta = [s.clone() for state in opt.state.values() for s in state.values()]
    opt.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    model.lm_head.weight.grad[3, 4] = bad
    opt.step()
    assert opt.skipped_steps == 1
    assert all(torch.equal(W, before[name]) for name, W in weights(model).items())
    after = [s for state in opt.state.values() for s in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(momenta, after, strict=True))
    strict = symlm.SymOptimizer(model, nonfinite="raise")
    with pytest.raises(FloatingPointError, match=r"\['lm_head.weight'\]"):
        strict.step()


def test_missing_and_zero_gradients_are_harmless():
    model = tiny()
    opt = symlm.SymOptimizer(model)
    before = weights(model)
    opt.step()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.lm_head.weight.grad = None
    opt.step()
    assert all(torch.equal(W, before[name]) for name, W in weights(model).items())
    assert len(opt.state) == len(before)


def test_bf16_steps_below_half_an_ulp_are_kept_on_average():
    x = torch.full((200_000,), 1.0 + 2**-10)
    rounded = stochastic_round(x, seed=1).double()
    assert abs(rounded.mean().item() - (1 + 2**-10)) < 5e-5
    assert torch.equal(stochastic_round(x, 1), stochastic_round(x, 1))
    assert not torch.equal(stochastic_round(x, 1), stochastic_round(x, 2))
    assert stochastic_round(torch.tensor([torch.inf, -0.0, 2.0]), 0).tolist() == [torch.inf, -0.0, 2.0]


def test_gradients_are_not_written_to():
    model = tiny()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    before = [p.grad.clone() for p in model.parameters()]
    symlm.SymOptimizer(model, nesterov=True).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_clipping_is_not_felt_by_rules_of_degree_zero():
    a, b = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    for model, factor in ((a, 1.0), (b, 1e-3)):
        opt = symlm.SymOptimizer(model)
        (factor * loss_of(model, tokens())).backward()
        opt.step()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert relative(weights(b)[name], weights(a)[name]) < 1e-10


def test_bad_input_is_named():
    model = tiny()
    with pytest.raises(TypeError, match="pass the model"):
        symlm.SymOptimizer(model.parameters())
    with pytest.raises(ValueError, match="did you mean 'momentum'"):
        symlm.SymOptimizer(model, momentun=0.9)
    with pytest.raises(ValueError, match="did you mean 'lr'"):
        symlm.SymOptimizer(model, overrides={"lm_head": {"lrr": 0.9}})
    with pytest.raises(ValueError, match="lr must be a positive number"):
        symlm.SymOptimizer(model, lr=-1.0)
    with pytest.raises(ValueError, match="unknown polar_method 'ns'"):
        symlm.SymOptimizer(model, polar_method="ns")
    for no_model in (None, [model], model.parameters(), "qwen3"):
        for build in (symlm.param_groups, symlm.assign_roles, symlm.describe_routing):
            with pytest.raises(TypeError, match=r"a model is a torch\.nn\.Module, got"):
                build(no_model)
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        symlm.SymOptimizer(nn.Sequential(nn.LazyLinear(4)))
    with pytest.raises(ValueError, match="complex parameters"):
        symlm.SymOptimizer(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="sparse=False"):
        symlm.SymOptimizer(nn.Embedding(8, 4, sparse=True))
    table = nn.Embedding(8, 4)
    opt = symlm.SymOptimizer(table)
    nn.functional.embedding(torch.tensor([1]), table.weight, sparse=True).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        opt.step()


class Ends(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.emb, self.mix = nn.Embedding(20, 8), nn.Linear(8, 8, bias=False)
        self.lm_head = nn.Linear(8, 30, bias=False)
        self.to(dtype)


def quiet(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model


def test_a_roles_own_decay_is_absolute():
    model = quiet(Ends())
    before = weights(model)
    symlm.SymOptimizer(model, overrides={"lm_head": {"weight_decay": 0.5, "lr": 0.1}}).step()
    assert relative(model.lm_head.weight, 0.95 * before["lm_head.weight"]) < FP32
    assert torch.equal(model.emb.weight, before["emb.weight"])


def test_a_role_that_becomes_adamws_takes_its_rate():
    (head,) = (
        group
        for group in symlm.param_groups(Ends(), overrides={"lm_head": {"rule": "adamw"}})
        if group["role"] == "lm_head"
    )
    assert head["lr"] == pytest.approx(0.01)


def test_overrides_are_checked_wherever_they_are_given():
    for build in (symlm.param_groups, symlm.SymOptimizer, symlm.describe_routing):
        with pytest.raises(ValueError, match="did you mean 'momentum'"):
            build(Ends(), overrides={"lm_head": {"momentun": 0.5}})
        with pytest.raises(ValueError, match="key 'nonfinite'"):
            build(Ends(), overrides={"lm_head": {"nonfinite": "raise"}})
    for bad in ({"betas": (0.9, 1.0)}, {"eps": -1.0}, {"compute_dtype": "flaot32"}):
        with pytest.raises(ValueError, match=r"betas|eps|floating-point"):
            symlm.SymOptimizer(Ends(), **bad)


@pytest.mark.parametrize("preset", ["default", "paper-row", "adamw-compatible"])
def test_a_token_that_is_never_seen_again_comes_to_rest(preset):
    model = Ends()
    opt = symlm.SymOptimizer(model, preset=preset)
    for k in range(4500):
        model.emb.weight.grad = torch.zeros(20, 8)
        if k < 5:
            model.emb.weight.grad[3] = torch.randn(8)
        if k == 4480:
            before = model.emb.weight.detach().clone()
        opt.step()
    assert torch.equal(model.emb.weight, before)


@pytest.mark.parametrize("preset", ["default", "muon", "aro", "auon", "scion"])
@pytest.mark.parametrize(
    ("kind", "lr"), [("olmoe", 0.02), ("gpt_oss", 0.02), ("qwen3", 0.02), ("qwen3", torch.tensor(0.02))]
)
def test_a_matrix_without_a_gradient_rests_and_its_neighbours_go_on(kind, lr, preset):
    model = tiny(kind)
    opt = symlm.SymOptimizer(model, preset=preset, lr=lr)
    train(model, opt, 3)
    leaf = "mlp.down_proj.weight" if kind == "qwen3" else "mlp.experts.down_proj"
    W, V = (model.get_parameter(f"model.layers.{k}.{leaf}") for k in (0, 1))
    quiet = slice(None) if kind == "qwen3" else slice(1, 2)
    before, momentum = W.detach().clone(), opt.state[W]["momentum"].clone()
    for k in range(3):
        opt.zero_grad()
        loss_of(model, tokens(k)).backward()
        W.grad[quiet] = 0
        opt.step()
    assert torch.equal(W[quiet], before[quiet])
    assert not torch.equal(opt.state[W]["momentum"][quiet], momentum[quiet])
    if kind != "qwen3":
        assert all((W[k] - before[k]).abs().max() > 1e-4 for k in (0, 2, 3))
    assert V.grad.any()
    size = symlm.diagnostics.update_rms(opt)["mlp_out" if kind == "qwen3" else "expert_out"]
    opt.zero_grad()
    loss_of(model, tokens(3)).backward()
    opt.step()
    assert not torch.equal(W[quiet], before[quiet])
    assert size < symlm.diagnostics.update_rms(opt)["mlp_out" if kind == "qwen3" else "expert_out"]


def test_verify_names_what_no_gradient_has_reached():
    model = Ends()
    opt = symlm.SymOptimizer(model)
    model.mix.weight.grad = torch.randn(8, 8)
    opt.step()
    with pytest.raises(
        RuntimeError, match=r"emb.weight \(embedding\): the last step did not move it.*\n.*lm_head.weight"
    ):
        opt.verify()


def stepped(model, **options):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt = symlm.SymOptimizer(model, **options)
    opt.step()
    return opt


def test_a_state_that_is_not_ours_is_refused_and_nothing_is_lost():
    model = Ends()
    opt = stepped(model)
    groups = [{"params": group["params"]} for group in opt.param_groups]
    foreign = torch.optim.AdamW(groups)
    foreign.step()
    other = Ends()
    other.emb = nn.Embedding(21, 8)
    fewer = nn.ModuleDict({"emb": nn.Embedding(20, 8)})
    for state, message in (
        (foreign.state_dict(), "not the state of a SymOptimizer: a group of it has no 'role'"),
        (
            stepped(other).state_dict(),
            r"of emb.weight .* is of another size: its saved momentum is \[21, 8\], the parameter is \[20, 8\]",
        ),
        (stepped(fewer).state_dict(), "other parameters than this optimizer: it lacks "),
    ):
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(state)
    opt.step()


def test_a_state_goes_to_the_parameters_of_its_names():
    a, b = (nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in names}) for names in ("ab", "ba"))
    first, second = stepped(a), stepped(b)
    second.load_state_dict(first.state_dict())
    for name in "ab":
        saved, loaded = first.state[a[name].weight]["momentum"], second.state[b[name].weight]["momentum"]
        assert torch.equal(saved, loaded), name
    assert [group["param_names"] for group in second.param_groups] == [["b.weight", "a.weight"]]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "student."])
def test_a_state_of_a_wrapped_model_is_that_of_the_model(prefix):
    model = Ends()
    state = stepped(Ends()).state_dict()
    for group in state["param_groups"]:
        group["param_names"] = [prefix + name for name in group["param_names"]]
    opt = stepped(model)
    opt.load_state_dict(state)
    assert torch.equal(opt.state[model.emb.weight]["momentum"], state["state"][0]["momentum"])


def test_a_state_of_other_layers_is_refused():
    saved, other = (nn.ModuleDict({f"l{k}": nn.Linear(8, 8, bias=False) for k in range(n, n + 3)}) for n in (0, 1))
    with pytest.raises(ValueError, match=r"it lacks l3.weight and has l0.weight besides"):
        stepped(other).load_state_dict(stepped(saved).state_dict())


def test_a_state_of_fewer_options_is_completed_and_another_preset_is_refused():
    state = stepped(Ends()).state_dict()
    for group in state["param_groups"]:
        del group["rotation"]
    opt = stepped(Ends())
    opt.load_state_dict(state)
    opt.step()
    with pytest.raises(ValueError, match=r"saved with rule 'row_adam', .* for embedding, .* has rule 'row_norm'"):
        stepped(Ends(), preset="paper-row").load_state_dict(state)


def test_an_incomplete_state_is_refused_and_a_plain_count_of_steps_is_taken():
    opt, state = stepped(Ends()), stepped(Ends()).state_dict()
    state["state"][0]["step"] = 1
    opt.load_state_dict(state)
    opt.step()
    del state["state"][0]["momentum"]
    with pytest.raises(ValueError, match=r"emb.weight \(embedding, row_adam\) lacks \['momentum'\]"):
        opt.load_state_dict(state)


def test_hooks_before_a_load_can_repair_a_state():
    model = Ends(torch.bfloat16)
    opt, state = stepped(model), stepped(Ends(torch.bfloat16)).state_dict()
    foreign = {**state, "param_groups": [{k: v for k, v in g.items() if k != "role"} for g in state["param_groups"]]}

    def repair(_, given):
        momentum = {**state["state"][0], "momentum": torch.full((20, 8), 0.1)}
        return {**given, "param_groups": state["param_groups"], "state": {**state["state"], 0: momentum}}

    opt.register_load_state_dict_pre_hook(repair)
    opt.load_state_dict(foreign)
    loaded = opt.state[model.emb.weight]["momentum"]
    assert loaded.dtype == torch.float32
    assert (loaded == torch.tensor(0.1)).all()  # in fp32, which bf16 cannot hold


def test_vectors_of_any_strides_are_torchs_adamws():
    ours, theirs = (nn.Parameter(torch.ones(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)) for _ in "ab")
    module = nn.Module()
    module.w = ours
    pair = (
        (ours, symlm.SymOptimizer(module, preset="adamw", lr=0.01, roles={"w": "vector"})),
        (theirs, torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)),
    )
    for _ in range(3):
        gradient = torch.randn(4, 3, 5, 5)
        for p, opt in pair:
            p.grad = gradient.clone()
            opt.step()
    assert relative(ours, theirs) < FP32


def test_many_narrow_vectors_are_stepped_in_parts(monkeypatch):
    torch.manual_seed(0)
    model = Ends(torch.bfloat16)
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    symlm.SymOptimizer(model, preset="adamw").step()
    alone, together = symlm.update.adamw.adamw, []
    monkeypatch.setattr("symlm.update.adamw.BATCH_ELEMENTS", 30)
    monkeypatch.setattr(
        "symlm.update.adamw.adamw", lambda W, *told, **more: (together.append(len(W)), alone(W, *told, **more))
    )
    symlm.SymOptimizer(twin, preset="adamw", roles={"*": "matrix"}).step()
    assert together == [1, 1, 1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_parameters_that_a_wrapper_cut_flat_are_refused_before_any_update():
    model = tiny()
    opt = symlm.SymOptimizer(model)
    before = weights(model)
    group = opt.param_groups[0]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
    group["params"], group["param_names"] = [flat], ["flat partition"]
    loss_of(model, tokens()).backward()
    flat.grad = torch.ones_like(flat)
    with pytest.raises(
        RuntimeError, match=r"flat partition has 1 axes .* none of DDP, FSDP2 and DeepSpeed .* use FSDP2"
    ):
        opt.step()
    assert all(torch.equal(W, before[name]) for name, W in weights(model).items())


def test_a_pickled_optimizer_steps_on():
    model = tiny()
    opt = symlm.SymOptimizer(model)
    train(model, opt, 1)
    again, optimizer = pickle.loads(pickle.dumps((model, opt)))
    train(model, opt, 1, first=1)
    train(again, optimizer, 1, first=1)
    assert all(torch.equal(W, weights(again)[name]) for name, W in weights(model).items())


@pytest.mark.parametrize(
    "change", [{"scale": "unit"}, {"constraint": "none"}, {"view": "whole"}, {"rule": "row_then_polar"}]
)
def test_a_state_of_another_route_is_refused_before_anything_changes(change):
    saved = symlm.SymOptimizer(tiny(), overrides={"attention_q": change}).state_dict()
    optimizer = symlm.SymOptimizer(tiny())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"saved with {next(iter(change))} "):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    other_rate = symlm.SymOptimizer(tiny(), lr=0.5, overrides={"attention_q": {"lr": 0.1}}).state_dict()
    optimizer.load_state_dict(other_rate)  # rates are the run's


@pytest.mark.parametrize("scale", ["unit", "rms_to_rms"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_polar_first_is_its_formula(shape, scale):
    """PolarGrad's other order, `M <- βM + (1−β)sU`, `W <- W − ηνM`, arXiv 2505.21799: the mean has no norms."""
    layer = nn.Linear(*shape[::-1], bias=False, dtype=torch.float64)
    options = {"momentum_of": "directions", "polar_method": "svd", "nesterov": False}
    opt = symlm.SymOptimizer(layer, 0.1, "polargrad", {"matrix": {"scale": scale}}, **options)
    size = symlm.sizes.scaling.SCALES[scale](*shape)
    W, M = layer.weight.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    for seed in range(6):
        G = (10.0**seed) * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        layer.weight.grad = G.clone()
        opt.step()
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        M = 0.95 * M + 0.05 * size * U @ Vh
        W = W - 0.1 * S.sum() * M
    assert relative(layer.weight, W) < EXACT
    step = 0.1 * S.sum() * M
    assert symlm.diagnostics.update_rms(opt)["matrix"] == pytest.approx(step.square().mean().sqrt().item())


def test_aro_adam_has_its_second_moment_of_the_momentum_itself():
    """`V <- β₂V + (1−β₂)(RᵀM)²` remembers sizes: two momenta of one direction and other lengths."""
    rule = RULES["aro_adam"]
    M = [
        c * torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        for k, c in enumerate((1.0, 30.0, 0.01))
    ]
    state, R, V = rule.start(M[0]), torch.eye(5, dtype=torch.float64), torch.zeros(5, 7, dtype=torch.float64)
    for X in M:
        state = rule.refreshed(X, state, 0.95)
        Y = R.T @ X
        A = X @ (Y / (0.95 * V + 0.05 * Y.square()).sqrt()).T
        A = A / A.norm() + 1e-3 * R / 5**0.5  # the term that keeps the old rotation is ours
        Q, upper = torch.linalg.qr(A)
        R = Q * upper.diagonal().sign()
        V = 0.95 * V + 0.05 * (R.T @ X).square()
        D = R @ ((R.T @ X) / V.sqrt())
        assert relative(rule.direction(X, state), D / D.square().mean().sqrt()) < 1e-6
        assert relative(state["roots"].square(), V) < 1e-6


def test_scions_constrained_form_decays_every_layer_at_one_rate():
    """`W <- (1 − η)W − ηρ·lmo`: with a zero gradient each weight shrinks by η = lr/50, whatever its radius."""
    model = tiny(dtype=torch.float64)
    opt = symlm.SymOptimizer(model, lr=0.02, preset="scion-constrained")
    for group in opt.param_groups:
        rate = group["lr"] * group["lr_multiplier"]
        assert rate * group["weight_decay"] * group["weight_decay_multiplier"] == pytest.approx(0.02 / 50), group[
            "role"
        ]


def test_row_adam_is_its_formula_over_the_steps():
    """`M <- .9M + .1G`, `X = .1G + .9M`, `r² <- .95r² + .05|X|²`, `W <- (1 − ηλ)W − η·s·X·√(1 − .95^t)/r`, by hand."""
    model = tiny(dtype=torch.float64)
    told = {"weight_decay_multiplier": 1.0, "momentum": 0.9, "nesterov": True, "betas": (0.9, 0.95)}
    opt = symlm.SymOptimizer(model, weight_decay=0.1, overrides={"embedding": told})
    p = model.model.embed_tokens.weight
    (group,) = [group for group in opt.param_groups if group["role"] == "embedding"]
    W, M, v = p.detach().clone(), torch.zeros_like(p), torch.zeros(len(p), 1, dtype=p.dtype)
    lr = group["lr"] * group["lr_multiplier"]
    for t in range(1, 5):
        p.grad = torch.randn_like(p) * torch.rand(len(p), 1, dtype=p.dtype)
        p.grad[t] = 0
        M = 0.9 * M + 0.1 * p.grad
        X = 0.1 * p.grad + 0.9 * M
        v = 0.95 * v + 0.05 * X.square().sum(1, keepdim=True)
        unbiased = (v / (1 - 0.95**t)).sqrt()
        U = torch.where(unbiased > 0, X / unbiased, 0.0)
        W = (1 - lr * 0.1) * W - lr * p.shape[1] ** 0.5 * U
        opt.step()
    assert relative(p.detach(), W) < FP32  # the count of steps is fp32
