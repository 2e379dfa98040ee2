"""Layers that few models have get the roles that their loss shows; what only the code knows is refused."""

import plain
import plain_rare
import pytest
from judge import judged, loud
from torch import nn

import symlm
from symlm.roles import UnplacedParameters

ROLES = {  # of every matrix in a block
    plain_rare.Pointwise: {"fc1": "mlp_in", "fc2": "mlp_out", "dwconv": "vector"},
    plain_rare.Wide: {"w1": "mlp_in", "w2": "mlp_out", "w3": "mlp_in"},
    plain_rare.Modulated: {"adaLN_modulation.1": "mlp_in", "mlp.0": "mlp_in", "mlp.2": "mlp_out"},
    plain_rare.InFront: {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "linear"), "matrix"),
        **{"attn.in_proj_weight": "attention_qkv", "attn.out_proj": "attention_o"},
    },
    plain_rare.Merged: {"merger.layer": "matrix", "linear_1": "mlp_in", "linear_2": "mlp_out"},
    plain_rare.Normed: {"proj": "mlp_in", "gate_proj": "mlp_in", "up_proj": "mlp_in", "down_proj": "mlp_out"},
}


@pytest.mark.parametrize("kind", ROLES, ids=lambda kind: kind.__name__)
def test_the_loss_confirms_the_roles_of_rare_layers(kind):
    verdict, roles = judged(loud(plain.Model(kind)))
    for leaf, role in ROLES[kind].items():
        name = f"layers.0.0.{leaf}" + ".weight" * (not leaf.endswith("weight"))
        assert (roles[name], verdict[name]) == (role, "right"), name
    assert set(verdict.values()) == {"right"}


def test_filters_of_an_image_are_one_mlp_where_they_are_over_single_places():
    block = nn.Sequential(nn.Conv2d(8, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1))
    views = {group["role"]: group["view"] for group in symlm.param_groups(nn.ModuleDict({"block": block}))}
    assert views["mlp_in"] == "(g m) c k0 k1 -> g m (c k0 k1), g=1"
    assert views["mlp_out"] == "(g m) c k0 k1 -> g (c k0 k1) m, g=1"
    block[3] = nn.Conv2d(32, 8, 3)
    assert set(map(str, symlm.assign_roles(nn.ModuleDict({"block": block})).values())) == {"matrix", "vector"}


def test_a_layer_that_fuses_an_attention_and_an_mlp_is_refused():
    block = nn.ModuleDict({"fused_attn_ff_proj": nn.Linear(32, 96 + 128), "ff_out": nn.Linear(128, 32)})
    with pytest.raises(UnplacedParameters, match="fused_attn_ff_proj"):
        symlm.assign_roles(nn.ModuleDict({"block": block}))


def test_a_named_head_is_the_only_one_of_its_shape():
    """Another layer as long as the vocabulary is what stands around it says, or is refused."""
    final = nn.ModuleDict({"modulation": nn.Sequential(nn.SiLU(), nn.Linear(32, 64)), "linear": nn.Linear(32, 48)})
    model = nn.ModuleDict({"tok": nn.Embedding(64, 32), "final": final, "lm_head": nn.Linear(32, 64)})
    roles = symlm.assign_roles(model)
    assert (roles["lm_head.weight"], roles["final.modulation.1.weight"]) == ("lm_head", "mlp_in")
    final["other"] = nn.Linear(32, 64)
    with pytest.raises(UnplacedParameters, match=r"final\.other"):
        symlm.assign_roles(model)
