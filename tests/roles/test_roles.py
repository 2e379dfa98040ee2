"""Every parameter of a real model has one role; what has none is named."""

import pytest
import torch
from models import tiny, train
from torch import nn

import symlm
from symlm.roles import UnplacedParameters


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_moe", "olmoe"])
def test_real_models_are_placed(kind):
    model = tiny(kind)
    roles = symlm.assign_roles(model)
    assert set(roles) == {name for name, _ in model.named_parameters()}
    expected = {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "lm_head",
        "model.norm.weight": "vector",
        "model.layers.0.self_attn.q_proj.weight": "attention_q",
        "model.layers.1.self_attn.o_proj.weight": "attention_o",
    }
    if kind in ("qwen3", "llama"):
        expected |= {
            "model.layers.0.mlp.gate_proj.weight": "mlp_in",
            "model.layers.0.mlp.down_proj.weight": "mlp_out",
        }
    else:
        expected |= {
            "model.layers.0.mlp.gate.weight": "router",
            "model.layers.0.mlp.experts.gate_up_proj": "expert_in",
            "model.layers.0.mlp.experts.down_proj": "expert_out",
        }
    assert {name: str(roles[name]) for name in expected} == expected
    assert str(symlm.Role.MATRIX) not in map(str, roles.values())


def test_tied_weights_are_one_parameter():
    roles = symlm.assign_roles(tiny(tie_word_embeddings=True))
    assert roles["model.embed_tokens.weight"] == symlm.Role.TIED_EMBEDDING
    assert "lm_head.weight" not in roles


def test_frozen_parameters_have_no_role():
    model = tiny()
    model.model.embed_tokens.weight.requires_grad_(False)
    assert "model.embed_tokens.weight" not in symlm.assign_roles(model)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(50, 8)
        self.mix = nn.Parameter(torch.zeros(3, 4, 5))
        self.head = nn.Linear(8, 50, bias=False)


def test_the_unplaced_are_named_with_the_remedy():
    with pytest.raises(UnplacedParameters, match=r"(?s)roles=\{'mix'.*\n  mix \[3, 4, 5\] in Odd"):
        symlm.assign_roles(Odd())
    roles = symlm.assign_roles(Odd(), {"mix": "expert_in"})
    assert roles == {"wte.weight": "embedding", "mix": "expert_in", "head.weight": "lm_head"}


def test_bad_overrides_are_refused():
    with pytest.raises(ValueError, match="unknown role 'matrx'"):
        symlm.assign_roles(Odd(), {"mix": "matrx"})
    with pytest.raises(ValueError, match=r"\['mxi'\] in roles match no trainable parameter"):
        symlm.assign_roles(Odd(), {"mxi": "matrix", "mix": "matrix"})


def test_the_remedy_fits_what_it_is_for():
    model = nn.Module()
    model.odd = nn.Parameter(torch.ones(3, 4, 5, 6))
    with pytest.raises(UnplacedParameters, match=r"roles=\{'odd': 'vector'\}"):
        symlm.SymOptimizer(model)
    assert symlm.SymOptimizer(model, roles={"odd": "vector"})
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="the model has no trainable one"):
        symlm.SymOptimizer(model, roles={"odd": "vector"})


def test_heads_that_do_not_divide_are_named():
    model = tiny()
    model.model.layers[1].self_attn.head_dim = 7
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.*head_dim 7 does not divide its 32"):
        symlm.param_groups(model)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.down_proj.weight = self.up_proj.weight


def test_a_tensor_with_two_roles_is_refused():
    with pytest.raises(ValueError, match=r"two roles: up_proj.weight .* is mlp_in, down_proj.weight .* is mlp_out"):
        symlm.assign_roles(Twice())
    assert symlm.assign_roles(Twice(), {"*": "matrix"}) == {"up_proj.weight": "matrix"}


def test_a_tensor_shared_between_layers_is_one_parameter():
    model = tiny()
    model.model.layers[1] = model.model.layers[0]
    assert not any("layers.1." in name for name in symlm.assign_roles(model))


def test_sparse_embeddings_are_refused_before_training():
    with pytest.raises(ValueError, match=r"\['wte'\] give sparse gradients.*sparse=False"):
        symlm.assign_roles(nn.ModuleDict({"wte": nn.Embedding(50, 8, sparse=True)}))


def test_quantized_parameters_are_left_out_or_refused():
    model = tiny()
    packed = torch.zeros(512, 1, dtype=torch.uint8)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    assert "model.layers.0.mlp.up_proj.weight" not in symlm.assign_roles(model)
    low = model.model.layers[1].mlp.up_proj
    low.weight = nn.Parameter(low.weight.detach().to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight is torch.float8_e4m3fn: train it in float32 or"):
        symlm.SymOptimizer(model)


def test_adapters_have_a_role_of_their_own():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"]))
    roles = symlm.assign_roles(model)
    assert set(map(str, roles.values())) == {"lora"}
    assert len(roles) == 10
    opt = symlm.SymOptimizer(model)
    train(model, opt, 2)
    assert opt.verify()
