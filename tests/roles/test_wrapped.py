"""Roles do not depend on what is around a model: value heads, teachers, wrappers, adapters, compiled leaves."""

import copy
import re

import pytest
import torch
from models import tiny
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BertConfig, BertForMaskedLM

import symlm
from symlm.roles import UnplacedParameters
from symlm.routing.options import named_parameters


def qwen(**more):
    return tiny("qwen3", vocab_size=96, **more)


class Plain(nn.Module):
    """A net of one's own: tokens, a block and a head, under names that say little."""

    def __init__(self, head="out", vocabulary=96, rows=None):
        super().__init__()
        self.emb = nn.Embedding(vocabulary, 32)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32)) for _ in range(2)])
        setattr(self, head, nn.Linear(32, rows or vocabulary, bias=False))


def holder(**children):
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def frozen(module):
    return module.requires_grad_(False)


WRAPPED = {
    "value head": lambda: holder(policy=qwen(), value_head=nn.Linear(32, 1)),
    "probe": lambda: holder(policy=qwen(), probe=nn.Linear(32, 5)),
    "teacher": lambda: holder(model=qwen(), teacher=frozen(qwen())),
    "lightning": lambda: holder(net=qwen(), criterion=nn.CrossEntropyLoss()),
    "checkpointed": lambda: holder(net=checkpoint_wrapper(qwen())),
    "compiled": lambda: holder(net=torch.compile(qwen())),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_a_models_roles_are_those_it_has_alone(case):
    alone = symlm.assign_roles(qwen())
    wrapped = symlm.assign_roles(WRAPPED[case]())
    for name, role in alone.items():
        (match,) = [found for full, found in wrapped.items() if full.endswith(name) and "teacher" not in full]
        assert match is role, name
    assert sum(role == "lm_head" for role in wrapped.values()) == 1


def test_a_tied_model_in_a_wrapper_is_tied():
    roles = symlm.assign_roles(holder(policy=qwen(tie_word_embeddings=True), value_head=nn.Linear(32, 1)))
    assert roles["policy.model.embed_tokens.weight"] == "tied_embedding"


@pytest.mark.parametrize(
    "around", [lambda net: net, lambda net: holder(net=net), lambda net: holder(a=holder(net=net))]
)
def test_a_plain_nets_head_is_the_one_over_its_tokens(around):
    net = Plain()
    net.probe = nn.Linear(32, 7)
    roles = {name.rpartition("net.")[2]: role for name, role in symlm.assign_roles(around(net)).items()}
    assert roles["out.weight"] == "lm_head"
    assert roles["emb.weight"] == "embedding"
    assert roles["probe.weight"] == "matrix"
    assert roles["blocks.0.0.weight"] == "mlp_in"  # as wide as the vocabulary, and hidden


def test_a_frozen_copy_beside_a_plain_net_does_not_take_its_head():
    net = Plain()
    roles = symlm.assign_roles(holder(net=net, ema=frozen(copy.deepcopy(net))))
    assert roles["net.out.weight"] == "lm_head"


def test_a_padded_vocabulary_in_a_submodule_has_a_head():
    assert symlm.assign_roles(holder(net=Plain("lm_head", rows=128)))["net.lm_head.weight"] == "lm_head"


def test_heads_of_many_tokens_are_all_heads():
    net = Plain()
    net.later = nn.ModuleList([nn.Linear(32, 96, bias=False) for _ in range(3)])
    roles = symlm.assign_roles(holder(net=net))
    assert [roles[f"net.later.{k}.weight"] for k in range(3)] == ["lm_head"] * 3
    assert roles["net.out.weight"] == "lm_head"


def test_the_head_of_a_later_pipeline_stage_is_refused_with_the_remedy():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.n_heads, self.head_dim = 4, 8
            for name in ("wq", "wk", "wv", "wo"):
                setattr(self, name, nn.Linear(32, 32, bias=False))

    stage = holder(layers=nn.ModuleList([Attention()]), output=nn.Linear(32, 96, bias=False))
    with pytest.raises(UnplacedParameters, match=r"roles=\{'output.weight': 'lm_head'\}"):
        symlm.assign_roles(stage)
    roles = symlm.assign_roles(stage, {"output.weight": "lm_head"})
    assert [roles[f"layers.0.w{x}.weight"] for x in "qkvo"] == [f"attention_{x}" for x in "qkvo"]


def test_a_compiled_leaf_keeps_its_role():
    model = qwen()
    model.model.layers[0].self_attn.q_proj = torch.compile(model.model.layers[0].self_attn.q_proj)
    assert symlm.assign_roles(model)["model.layers.0.self_attn.q_proj._orig_mod.weight"] == "attention_q"
    symlm.SymOptimizer(model)


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForMaskedLM(BertConfig(vocab_size=96, **sizes))


BOXES = {  # of attention and MLP, each wrapped alone
    "bert": (bert, r"attention\.self|attention\.output|intermediate|layer\.\d\.output|attention"),
    "qwen3": (qwen, r"self_attn|mlp|q_proj|o_proj|down_proj|layers\.\d"),
    "olmoe": (lambda: tiny("olmoe"), r"self_attn|mlp|gate|experts"),
}


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda module: torch.compile(module, backend="eager")])
@pytest.mark.parametrize("kind", BOXES)
def test_a_wrapper_around_any_box_of_a_block_changes_no_role_and_no_view(kind, wrap):
    build, boxes = BOXES[kind]
    plain = described(build())
    paths = [path for path, _ in build().named_modules() if re.search(rf"(^|\.)({boxes})$", path)]
    assert len(paths) > 6
    for path in paths[: len(paths) // 2]:  # of the first layer
        model = build()
        above, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(above), leaf, wrap(model.get_submodule(path)))
        assert described(model) == plain, path


def described(model):
    """Return {name without wrappers: (role, view)}."""
    groups = symlm.param_groups(model)
    wrappers = r"_checkpoint_wrapped_module\.|_orig_mod\."
    return {re.sub(wrappers, "", n): (g["role"], g["view"]) for g in groups for n, _ in named_parameters(g)}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_weight_norms_direction_has_the_weights_role(norm):
    model = qwen()
    for module in (model.lm_head, model.model.layers[0].mlp.down_proj):
        norm(module)
    roles = symlm.assign_roles(model)
    old = norm is nn.utils.weight_norm
    size, direction = ("weight_g", "weight_v") if old else (f"parametrizations.weight.original{k}" for k in (0, 1))
    assert roles[f"lm_head.{direction}"] == "capped_lm_head"  # a shift of all directions is none of the weight's
    assert roles[f"lm_head.{size}"] == "vector"
    assert roles[f"model.layers.0.mlp.down_proj.{direction}"] == "mlp_out"


def test_what_peft_trains_beside_adapters_keeps_its_role():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(qwen(), LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["lm_head", "down_proj"]))
    roles = symlm.assign_roles(model)
    found = {name.removeprefix("base_model.model."): role for name, role in roles.items()}
    assert found["lm_head.modules_to_save.default.weight"] == "lm_head"
    assert found["model.layers.0.mlp.down_proj.modules_to_save.default.weight"] == "mlp_out"
    assert found["model.layers.0.self_attn.q_proj.lora_A.default.weight"] == "lora"


class Grouped(nn.Module):
    """A fused projection of eight query heads and two of k and v, as others name the numbers."""

    def __init__(self, config=None, **numbers):
        super().__init__()
        self.qkv = nn.Linear(32, (8 + 2 * 2) * 4, bias=False)
        if config:
            self.config = type("Config", (), config)()
        for name, value in numbers.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    "numbers",
    [
        {"n_head": 8, "num_kv_heads": 2},
        {"config": {"n_head": 8, "n_query_groups": 2}},
        {"head_dim": 4, "num_key_value_heads": 2},
        {"head_size": 4, "num_heads": 8},
        {"config": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}},
    ],
)
def test_grouped_queries_are_found_by_every_usual_name(numbers):
    groups = symlm.param_groups(holder(attn=Grouped(**numbers)), roles={"*.qkv.weight": "attention_qkv"})
    assert groups[0]["view"] == "(h m) n -> h m n | 1 (h m) n, h=10+2"


@pytest.mark.parametrize("numbers", [{}, {"n_head": 8}, {"head_dim": 4}])
def test_a_fused_projection_that_shows_too_little_is_refused(numbers):
    with pytest.raises(ValueError, match=r"attn.qkv.weight .*(num_key_value_heads|num_heads)"):
        symlm.param_groups(holder(attn=Grouped(**numbers)), roles={"*.qkv.weight": "attention_qkv"})


@pytest.mark.parametrize("leaf", ["in_proj_qkv", "in_proj_qkvz", "in_proj_ba", "wqkv", "kv_proj", "c_attn"])
def test_a_fused_projection_of_unknown_order_is_never_one_matrix(leaf):
    with pytest.raises(UnplacedParameters, match=leaf):
        symlm.assign_roles(holder(mixer=holder(**{leaf: nn.Linear(32, 96, bias=False)})))


NAMES = {
    "wq wk wv wo": {"n_heads": 4, "head_dim": 8},
    "query key value dense": {"num_attention_heads": 4, "attention_head_size": 8},
    "q k v o": {"n_heads": 4, "key_value_proj_dim": 8},
    "to_q to_k to_v to_out": {"heads": 4},
    "c_q c_k c_v c_proj": {"n_head": 4, "n_kv_head": 4, "head_dim": 8},
}


@pytest.mark.parametrize("names", NAMES)
def test_q_k_and_v_are_known_by_being_together(names):
    module = nn.Module()
    leaves = names.split()
    for leaf in leaves:
        setattr(module, leaf, nn.Linear(32, 32, bias=False))
    if "to_out" in leaves:
        module.to_out = nn.ModuleList([module.to_out, nn.Dropout()])
    for key, value in NAMES[names].items():
        setattr(module, key, value)
    groups = {group["role"]: group for group in symlm.param_groups(holder(block=module))}
    assert set(groups) == {f"attention_{x}" for x in "qkvo"}
    assert groups["attention_q"]["view"] == groups["attention_k"]["view"] == "(h m) n -> h m n, h=4"


def test_a_head_of_grouped_keys_is_as_wide_as_one_of_the_queries():
    module = nn.Module()
    for leaf, rows in (("wq", 32), ("wk", 16), ("wv", 16), ("wo", 32)):
        setattr(module, leaf, nn.Linear(32, rows, bias=False))
    module.n_heads = 4
    groups = {group["role"]: group["view"] for group in symlm.param_groups(holder(block=module))}
    assert groups["attention_k"] == "(h m) n -> h m n, h=2"
    module.wk, module.wv = (nn.Linear(32, 12, bias=False) for _ in range(2))
    with pytest.raises(ValueError, match=r"wk.weight .*num_key_value_heads"):
        symlm.param_groups(holder(block=module))


def test_a_message_of_many_parameters_is_short_and_begins_with_the_remedy():
    blocks = nn.ModuleList([holder(c_attn=nn.Linear(8, 24), hada_w1=nn.Linear(8, 8)) for _ in range(40)])
    with pytest.raises(UnplacedParameters) as error:
        symlm.assign_roles(holder(blocks=blocks))
    lines = str(error.value).splitlines()
    assert len(lines) <= 20
    assert "roles={'blocks.*.c_attn.weight': 'attention_qkv'" in lines[0]
    assert "40 times" in lines[1]


@pytest.mark.parametrize(("parameter", "role"), [((4, 3, 5, 5), "matrix"), ((4, 3, 5), "embedding"), ((4,), "lm_head")])
def test_a_role_that_the_shape_does_not_have_is_refused_by_name(parameter, role):
    with pytest.raises(ValueError, match=r"^w \[4.*needs a matrix"):
        symlm.param_groups(holder(w=nn.Parameter(torch.ones(parameter))), roles={"w": role})


def test_a_head_inside_a_block_of_the_vocabularys_width_is_found():
    block = holder(c_fc=nn.Linear(32, 64), c_proj=nn.Linear(64, 32))
    net = holder(transformer=holder(wte=nn.Embedding(64, 32), h=nn.ModuleList([block])), logits=nn.Linear(32, 64))
    roles = symlm.assign_roles(net)
    assert roles["logits.weight"] == "lm_head"
    assert roles["transformer.h.0.c_fc.weight"] == "mlp_in"


UNCLEAR = {
    "padded": lambda: holder(emb=nn.Embedding(64, 32), last=nn.Linear(32, 72)),
    "medusa": lambda: holder(policy=qwen(), medusa=nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 96))),
    "bottleneck": lambda: nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 16), nn.Linear(16, 64)),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_a_layer_that_may_be_a_head_is_refused_with_the_remedy(case):
    with pytest.raises(UnplacedParameters, match="'lm_head'"):
        symlm.assign_roles(UNCLEAR[case]())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_a_plain_nets_normed_head_is_a_head(norm):
    net = Plain()
    norm(net.out)
    roles = symlm.assign_roles(net)
    assert sum(role == "capped_lm_head" for role in roles.values()) == 1


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_the_head_is_an_adapter(dora):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(qwen(), LoraConfig(r=2, target_modules=["lm_head"], use_dora=dora))
    roles = {role for name, role in symlm.assign_roles(model).items() if "lora_A" in name or "lora_B" in name}
    assert roles == {"lora"}
    symlm.SymOptimizer(model)


@pytest.mark.parametrize(
    "names", ["w_q w_k w_v w_o", "W_query W_key W_value out_proj", "queries keys values out", "fc_q fc_k fc_v fc_o"]
)
def test_other_names_of_q_k_and_v_are_known_together(names):
    module = holder(**{leaf: nn.Linear(32, 32, bias=False) for leaf in names.split()}, num_heads=4)
    roles = symlm.assign_roles(holder(block=module))
    assert [str(role) for role in roles.values()] == [f"attention_{x}" for x in "qkvo"]


@pytest.mark.parametrize("leaf", ["W_pack", "kqv", "Wkv", "key_value", "to_qk", "in_proj_zba", "to_kv", "qkv1"])
def test_more_names_of_fused_projections_are_refused(leaf):
    with pytest.raises(UnplacedParameters, match=leaf):
        symlm.assign_roles(holder(mixer=holder(**{leaf: nn.Linear(32, 96, bias=False)})))
