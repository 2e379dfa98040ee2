"""Every parameter of a real model has one role; what has none is named."""

import pytest
import torch
from models import tiny
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
    with pytest.raises(UnplacedParameters, match=r"mix \[3, 4, 5\] in Odd\n.*overrides=\{'mix'"):
        symlm.assign_roles(Odd())
    roles = symlm.assign_roles(Odd(), {"mix": "expert_in"})
    assert roles == {"wte.weight": "embedding", "mix": "expert_in", "head.weight": "lm_head"}


def test_bad_overrides_are_refused():
    with pytest.raises(ValueError, match="unknown role 'matrx'"):
        symlm.assign_roles(Odd(), {"mix": "matrx"})
    with pytest.raises(ValueError, match=r"\['mxi'\] place no parameter"):
        symlm.assign_roles(Odd(), {"mxi": "matrix", "mix": "matrix"})


def test_heads_that_do_not_divide_are_named():
    model = tiny()
    model.model.layers[1].self_attn.head_dim = 7
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.*head_dim 7 does not divide its 32"):
        symlm.param_groups(model)
