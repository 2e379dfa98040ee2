"""Modules that people write by hand have the roles that their loss shows, or are refused; none is silently a matrix."""

from types import SimpleNamespace

import plain
import pytest
import torch
from judge import judged, loss_of, loud, replaced
from numerics import EXACT, LOSS_CHANGES, LOSS_STAYS
from torch import nn

import symlm
from symlm.roles import UnplacedParameters

KINDS = {  # the layers of a block: the roles that the loss has to confirm
    (plain.Lucid, plain.Sequence): "attention_q attention_k attention_v attention_o mlp_in mlp_out",
    (plain.FusedGate,): "mlp_in mlp_out",
    (plain.WithoutAName, plain.Square): "attention_q attention_k attention_v attention_o mlp_in mlp_out",
    (plain.Gated,): "attention_q attention_k attention_v attention_o mlp_in",
    (plain.Interleaved, plain.MoE): "attention_qkv attention_o mlp_in mlp_out sigmoid_router",
    (plain.MLA, plain.Grouped): "attention_q attention_qkv attention_o mlp_in expert_in expert_out router",
    (plain.OtherWidths,): "attention_q attention_k attention_v attention_o",
    (plain.Flat,): "attention_q attention_k attention_v attention_o mlp_in mlp_out",
}


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "+".join(kind.__name__ for kind in kinds))
def test_the_loss_confirms_the_roles_of_modules_written_by_hand(kinds):
    verdict, roles = judged(loud(plain.Model(*kinds)))
    assert {str(roles[name]) for name, said in verdict.items() if said == "right"} >= set(KINDS[kinds].split())
    assert not [name for name, said in verdict.items() if said == "wrong"]
    assert "matrix" not in map(str, roles.values())


def test_heads_that_are_modules_of_their_own_are_one_matrix_each():
    model = loud(plain.Model(plain.MultiHead))
    groups = symlm.param_groups(model)
    views = {name: (group["role"], group["view"]) for group in groups for name, _ in group["params"]}
    assert views["layers.0.0.heads.1.query.weight"] == ("attention_q", "(h m) n -> h m n, h=1")
    assert views["layers.0.0.heads.1.value.weight"] == ("attention_v", "m n -> 1 m n")
    assert views["layers.0.0.proj.weight"] == ("attention_o", "m n -> 1 m n")
    base, head = loss_of(model), model.layers[0][0].heads[1]
    turn = torch.linalg.qr(torch.randn(plain.WIDTH, plain.WIDTH, dtype=torch.float64))[0]
    moved = {f"layers.0.0.heads.1.{x}.weight": turn @ getattr(head, x).weight.detach() for x in ("query", "key")}
    with replaced(model, moved):
        assert abs(loss_of(model) - base) < LOSS_STAYS
    with replaced(model, {name: moved[name] for name in [*moved][:1]}):
        assert abs(loss_of(model) - base) > LOSS_CHANGES


def holder(kind="Module", forward=None, **children):
    """Return a module of a class of that name, with these children, parameters and numbers."""
    module = type(kind, (nn.Module,), {} if forward is None else {"forward": forward})()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def dense(inputs=32, outputs=32):
    return nn.Linear(inputs, outputs, bias=False)


@pytest.mark.parametrize(
    "names",
    [
        *("q_linear k_linear v_linear out", "Q K V O", "WQ WK WV WO", "q_mat k_mat v_mat o_mat", "q k v proj_out"),
        *("query_dense key_dense value_dense combine_heads", "toqueries tokeys tovalues unifyheads", "wq wk wv linear"),
        *("q_proj k_proj v_proj resid_proj", "in_q in_k in_v out", "q_map k_map v_map out_map", "lin_q lin_k lin_v fc"),
        *("query_transform key_transform value_transform final_linear", "mha_q mha_k mha_v mha_o"),
    ],
)
@pytest.mark.parametrize("kind", ["Attention", "Mixer"])
def test_attentions_are_known_by_many_names(names, kind):
    module = holder(kind, **{name: dense() for name in names.split()}, num_heads=4)
    roles = symlm.assign_roles(holder(layers=nn.ModuleList([module])))
    assert [str(role) for role in roles.values()] == [f"attention_{x}" for x in "qkvo"]


@pytest.mark.parametrize("leaf", ["attn", "proj_in", "input_projection", "c_qkv", "query_key_value_proj", "qkvw"])
def test_a_layer_of_an_attention_that_no_name_explains_is_refused(leaf):
    module = holder("SelfAttention", **{leaf: dense(32, 96), "proj": dense()}, num_heads=4)
    with pytest.raises(UnplacedParameters, match=leaf):
        symlm.assign_roles(holder(attention=module, mlp=nn.Sequential(dense(32, 48), nn.GELU(), dense(48, 32))))
    with pytest.raises(UnplacedParameters, match="linears"):
        symlm.assign_roles(holder(a=holder("MultiHeadedAttention", linears=nn.ModuleList([dense() for _ in range(4)]))))


def test_a_module_may_state_the_order_of_its_fused_projection():
    module = holder("Attention", qkv=dense(32, 96), proj=dense(), num_heads=4, fused_order="heads of q k v")
    groups = {group["role"]: group["view"] for group in symlm.param_groups(holder(attn=module))}
    assert groups["attention_qkv"] == "(h p m) n -> (h p) m n | p (h m) n, p=2+1, m=8"
    module.fused_order = "v k q"
    with pytest.raises(ValueError, match=r"attn.qkv.weight .* fused_order of Attention is 'v k q', choose one of"):
        symlm.assign_roles(holder(attn=module))
    del module.fused_order
    with pytest.raises(UnplacedParameters, match="fused_order"):
        symlm.assign_roles(holder(attn=module))


SEQUENCES = {
    "norm first, dropout last": (nn.LayerNorm(32), dense(32, 48), nn.GELU(), nn.Dropout(), dense(48, 32), nn.Dropout()),
    "norm between": (dense(32, 48), nn.LayerNorm(48), nn.GELU(), dense(48, 32)),
    "gated": (dense(32, 96), nn.GLU(), dense(48, 32)),
    "square": (dense(), nn.GELU(), dense()),
    "deep": (dense(32, 48), nn.ReLU(), dense(48, 48), nn.ReLU(), dense(48, 32)),
}


@pytest.mark.parametrize("case", SEQUENCES)
@pytest.mark.parametrize("attention", [False, True])
def test_a_sequence_with_an_activation_is_an_mlp(case, attention):
    block = holder("Block", mlp=nn.Sequential(*SEQUENCES[case]))
    if attention:
        block.attn = nn.MultiheadAttention(32, 4)
    roles = [str(role) for name, role in symlm.assign_roles(block).items() if "mlp" in name and role != "vector"]
    assert roles == ["mlp_in"] * (len(roles) - 1) + ["mlp_out"]


def test_a_sequence_without_an_activation_is_no_mlp():
    pair = holder(pair=nn.Sequential(dense(32, 8), nn.Dropout(), dense(8, 32)))
    assert set(map(str, symlm.assign_roles(pair).values())) == {"matrix"}


def test_a_block_of_equal_squares_whose_names_say_nothing_is_refused():
    block = holder("FeedForward", lambda self, x: torch.nn.functional.silu(x), w1=dense(), w2=dense(), w3=dense())
    with pytest.raises(UnplacedParameters, match=r"w1.*\n.*w2"):
        symlm.assign_roles(holder(ffn=block))


def test_matrices_that_no_layer_holds_are_not_silently_one_matrix():
    for names in (("query", "key", "value"), ("up_proj", "down_proj")):
        with pytest.raises(UnplacedParameters) as error:
            symlm.assign_roles(holder(block=holder(**{name: nn.Parameter(torch.zeros(32, 32)) for name in names})))
        assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_gates_are_blocks_of_units(layer):
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[layer]
    model = holder(rnn=layer(16, 8, batch_first=True).double(), head=dense(8, 5).double())
    groups = {name: group for group in symlm.param_groups(model) for name, _ in group["params"]}
    for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0"):
        assert (groups[name]["role"], groups[name]["view"]) == ("mlp_in", f"(p m) n -> p m n, p={gates}")
    x, order = torch.randn(2, 6, 16, dtype=torch.float64), torch.randperm(8)
    before = model.head(model.rnn(x)[0])
    with torch.no_grad():
        for name, p in model.rnn.named_parameters():
            p.copy_(p.unflatten(0, (gates, 8))[:, order].flatten(0, 1))
            if name == "weight_hh_l0":
                p.copy_(p[:, order])
        model.head.weight.copy_(model.head.weight[:, order])
    assert (model.head(model.rnn(x)[0]) - before).abs().max() < EXACT


def test_routers_are_known_beside_their_experts():
    def noisy(self, x):
        return self.topkroute_linear(x).softmax(-1)

    router = holder("NoisyTopkRouter", noisy, topkroute_linear=dense(32, 4), noise_linear=dense(32, 4))
    moe = holder(router=router, experts=nn.ModuleList([plain.Expert() for _ in range(4)]))
    roles = {name: str(role) for name, role in symlm.assign_roles(holder(moe=moe)).items() if "router" in name}
    assert roles == {"moe.router.topkroute_linear.weight": "router", "moe.router.noise_linear.weight": "sigmoid_router"}


@pytest.mark.parametrize("rows", [10, 64])
def test_a_head_of_a_model_without_tokens_is_known_by_its_config(rows):
    config = SimpleNamespace(num_labels=10, vocab_size=64, problem_type=None)
    model = holder(attn=nn.MultiheadAttention(32, 4), lm_head=dense(32, rows), config=config)
    assert symlm.assign_roles(model)["lm_head.weight"] == "lm_head"
    config.problem_type, config.vocab_size = "regression", 12
    if rows == 64:  # of nothing that the config counts
        with pytest.raises(UnplacedParameters, match="lm_head"):
            symlm.assign_roles(model)
    else:
        assert symlm.assign_roles(model)["lm_head.weight"] == "matrix"


def forward_of(name):
    return {"relu": lambda self, x: torch.relu(x), "silu": lambda self, x: nn.functional.silu(x)}[name]


FOUND = {
    "a list of layers": (
        lambda: holder("MLP", forward_of("relu"), layers=nn.ModuleList([dense(), dense(), dense(32, 4)])),
        {"layers.0": "mlp_in", "layers.1": "mlp_in", "layers.2": "mlp_out"},
    ),
    "a list side by side": (
        lambda: holder("Several", forward_of("relu"), layers=nn.ModuleList([dense(), dense(), dense()])),
        {"layers.0": "matrix", "layers.2": "matrix"},
    ),
    "layers with numbers": (
        lambda: holder("Head", forward_of("relu"), fc1=dense(), fc2=dense(), fc3=dense()),
        {"fc1": "mlp_in", "fc2": "mlp_in", "fc3": "mlp_out"},
    ),
    "a dictionary": (
        lambda: holder("Attention", n_heads=4, all=nn.ModuleDict({name: dense() for name in "qkvo"})),
        {f"all.{name}": f"attention_{name}" for name in "qkvo"},
    ),
    "one matrix for every head": (
        lambda: holder(
            "SelfAttention",
            heads=4,
            head_dim=8,
            values=dense(8, 8),
            keys=dense(8, 8),
            queries=dense(8, 8),
            fc_out=dense(),
        ),
        {"values": "attention_v", "keys": "attention_k", "queries": "attention_q", "fc_out": "attention_o"},
    ),
    "an attention beside an MLP of equal widths": (
        lambda: holder(
            "Block",
            forward_of("silu"),
            attn=nn.MultiheadAttention(32, 4),
            linear1=dense(),
            linear2=dense(),
            norm1=nn.LayerNorm(32),
        ),
        {"linear1": "mlp_in", "linear2": "mlp_out"},
    ),
    "a gate in a box with the output": (
        lambda: holder(
            "Mixer",
            num_heads=4,
            **{name: dense() for name in ("q_proj", "k_proj", "v_proj")},
            out=holder("Gated", gate_proj=dense(), o_proj=dense()),
        ),
        {"out.gate_proj": "mlp_in", "out.o_proj": "attention_o"},
    ),
    "an attention around torch's": (
        lambda: holder(
            "CrossAttention",
            num_heads=4,
            **{name: dense() for name in ("q_proj", "k_proj", "v_proj", "linear")},
            inner=nn.MultiheadAttention(32, 4),
        ),
        {"linear": "matrix", "inner.in_proj_weight": "attention_qkv"},
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_stands_around_a_layer_says_what_it_is(case):
    made, expected = FOUND[case]
    roles = {name.removesuffix(".weight"): str(role) for name, role in symlm.assign_roles(holder(it=made())).items()}
    assert {name: roles[f"it.{name}"] for name in expected} == expected
    assert symlm.param_groups(holder(it=made()))
