"""Roles in the styles of public code, confirmed by the loss."""

import plain
import plain_styles as styles
import pytest
from judge import judged, loud
from torch import nn

import symlm

BLOCKS = {
    styles.SigmoidGated: {"w1": "mlp_in", "w2": "mlp_out", "w3": "mlp_in", "gate": "vector"},
    styles.OutSecond: {"linear_1": "mlp_in", "linear_2": "mlp_out", "linear_3": "mlp_in"},
    styles.Conditioned: {"first": "mlp_in", "second": "mlp_out"},
    styles.TwiceAsWide: {"linear_1": "mlp_in", "linear_2": "mlp_out"},
    styles.OwnAttention: {"q_proj": "attention_q", "v_proj": "attention_v", "o_proj": "attention_o"},
    styles.OwnMLP: {"up_proj": "mlp_in", "down_proj": "mlp_out"},
    styles.ByOption: {"gate": "router", "experts.w1_EFD": "expert_in", "experts.w2_EDF": "expert_out"},
    styles.ByOptionSigmoid: {"gate": "sigmoid_router", "experts.w3_EFD": "expert_in"},
}
MODELS = {
    styles.CapsItself: {"lm_head.weight": "capped_lm_head", "tok.weight": "embedding"},
    styles.TiedByObject: {"tok.weight": "tied_embedding"},
    styles.TiedByParameter: {"tok.weight": "tied_embedding"},
    styles.ParallelEnds: {"tok.weight": "embedding", "lm_head.weight": "lm_head"},
}


@pytest.mark.parametrize("kind", [*BLOCKS, *MODELS], ids=lambda kind: kind.__name__)
def test_the_loss_confirms_the_roles_of_public_styles(kind):
    block = kind in BLOCKS
    verdict, roles = judged(loud(plain.Model(kind) if block else kind(plain.Expert)))
    for leaf, role in (BLOCKS | MODELS)[kind].items():
        above = "layers.0.0." * block
        name = next(name for name in (f"{above}{leaf}", f"{above}{leaf}.weight") if name in roles)
        assert (roles[name], verdict.get(name, "right")) == (role, "right"), name
    assert "wrong" not in verdict.values()


def test_a_sequence_that_is_the_whole_model_is_read():
    assert symlm.assign_roles(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)))["0.weight"] == "matrix"


def test_a_layer_behind_a_recurrence_leads_out_of_its_channels():
    assert symlm.assign_roles(plain.Model(styles.Recurrent))["layers.0.0.fc.weight"] == "mlp_out"


def test_layers_that_activate_nothing_are_no_mlp():
    roles = symlm.assign_roles(styles.Around(plain.Expert))
    assert {str(roles[f"{name}.weight"]) for name in ("enter", "into", "back")} == {"matrix"}


def test_a_fused_projection_by_groups_counts_them_from_what_its_module_says():
    class FusedQKVLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.head_dim, self.heads_per_kv = 8, 2
            self.wqkv = nn.Linear(32, 64, bias=False)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv_linear, self.wo = FusedQKVLinear(), nn.Linear(32, 32, bias=False)
            self.n_heads = 4

    groups = {g["role"]: g["view"] for g in symlm.param_groups(nn.ModuleDict({"attention": Attention()}))}
    assert groups["attention_qkv"] == "(h p m) n -> (h p) m n | p (h m) n, p=3+1, m=8"
