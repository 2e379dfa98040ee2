"""What multiplies what is read from code where no layer shows it: routers, stacks, tables that make logits."""

import plain
import plain_products as products
import pytest
import torch
from judge import judged, loud
from torch import nn
from torch.nn import functional as F

import symlm
from symlm.roles import UnplacedParameters

EXPERTS = {"experts.0.w1": "mlp_in", "experts.3.w2": "mlp_out"}
FILTERED = {"query.0": "mlp_in", "key.0": "mlp_in", "value.0": "mlp_in", "output": "mlp_out"}
BLOCKS = {
    products.Routed: EXPERTS | {"router.w_gate": "router"},
    products.RoutedByRows: EXPERTS | {"router.weight": "router"},
    products.RoutedBySigmoid: EXPERTS | {"router.w_gate": "sigmoid_router"},
    products.Shazeer: EXPERTS | {"w_gate": "router", "w_noise": "sigmoid_router"},
    products.MOEFeedForward: {"gate": "router", "cond_ffn.w1": "expert_in", "cond_ffn.w2": "expert_out"},
    products.StacksAndRouter: {"gate_weight": "router", "w1": "expert_in", "w2": "expert_out"},
    products.Primer: {"q_proj": "mlp_in", "k_proj": "mlp_in", "v_proj": "mlp_in", "o_proj": "mlp_out"},
    products.PrimerInBoxes: FILTERED,
    products.LatentWithoutRank: {"wq": "attention_q", "wkv_b": "attention_qkv", "wo": "attention_o"},
}
MODELS = {
    products.DeepHead: {"tok": "embedding", "lm_head.0": "mlp_in", "lm_head.2": "lm_head"},
    products.Headless: {"tok": "tied_embedding"},
    products.TiedByTranspose: {"tok": "tied_embedding"},
    products.TiedByCast: {"tok": "tied_embedding"},
    products.TiedByEinsum: {"tok": "tied_embedding"},
    products.TiedByModule: {"tok": "tied_embedding"},
    products.TiedParameter: {"tok_emb": "tied_embedding"},
    products.NarrowTable: {"tok.0": "embedding", "tok.1": "matrix", "lm_head": "lm_head"},
    products.ListOfProjections: {"word": "tied_embedding", "emb_projs.0": "matrix"},
    products.MultiToken: {"mtp.eh_proj": "matrix", "mtp.shared_head": "lm_head", "lm_head": "lm_head"},
}


def confirms(model, expected, above=""):
    """Assert the roles of matrices, that the loss confirms them, and that it shows no other wrong."""
    verdict, roles = judged(loud(model))
    for leaf, role in expected.items():
        name = next(name for name in (f"{above}{leaf}", f"{above}{leaf}.weight") if name in roles)
        assert (roles[name], verdict[name]) == (role, "right"), name
    assert "wrong" not in verdict.values()


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_the_loss_confirms_what_a_block_multiplies_by(kind):
    confirms(plain.Model(kind), BLOCKS[kind], "layers.0.0.")


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_the_loss_confirms_what_stands_at_the_ends(kind):
    confirms(kind(plain.Expert), MODELS[kind])


def test_a_table_is_tied_only_by_a_product_with_its_transpose_that_makes_logits():
    assert symlm.assign_roles(products.MixedTokens(plain.Expert))["tok.weight"] == "embedding"
    scored = symlm.assign_roles(plain.Model(products.RelativeScores))
    assert scored["layers.0.0.rel_emb.weight"] == "embedding"
    assert symlm.assign_roles(TiedInInit())["tok.weight"] == "embedding"


class TiedInInit(nn.Module):
    """Reads its table's weight, and multiplies by another's, where it only gives it values."""

    def __init__(self):
        super().__init__()
        self.tok, self.lm_head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.reset_parameters()

    def reset_parameters(self):
        self.tok.weight.data = F.linear(self.tok.weight, torch.eye(32))

    def forward(self, ids):
        return self.lm_head(self.tok(ids).to(self.tok.weight.dtype) @ torch.eye(32))


def routing(forward, **shapes):
    """Return a router of its own class beside four experts, without a number of them."""
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    router = type("Router", (nn.Module,), {"forward": forward})()
    for name, parameter in parameters.items():
        setattr(router, name, parameter)
    return nn.ModuleDict({"router": router, "tok": nn.Embedding(64, 32)})


def test_a_router_that_shows_neither_sizes_nor_a_product_is_refused():
    unread = routing(lambda self, x: self.helper(x, self.weight).softmax(-1), weight=(32, 4))
    with pytest.raises(UnplacedParameters, match=r"router\.weight"):
        symlm.assign_roles(unread)
    by_columns = routing(lambda self, x: (x @ self.weight).softmax(-1), weight=(32, 4))
    by_rows = routing(lambda self, x: F.linear(x, self.weight).softmax(-1), weight=(4, 32))
    views = [{g["role"]: g["view"] for g in symlm.param_groups(model)} for model in (by_columns, by_rows)]
    assert [view["router"] for view in views] == ["n m -> 1 m n", "m n -> 1 m n"]


def test_a_weight_that_is_stored_flat_is_refused():
    flat = routing(lambda self, x: F.linear(x, self.weight.view(4, -1)).softmax(-1), weight=(128,), bias=(4,))
    with pytest.raises(UnplacedParameters, match=r"router\.weight"):
        symlm.assign_roles(flat)
    sharded = nn.Module()
    sharded._flat_param = nn.Parameter(torch.zeros(4096))
    with pytest.raises(UnplacedParameters, match="_flat_param"):
        symlm.assign_roles(nn.ModuleDict({"layer": sharded}))


def test_the_remedy_for_a_head_stored_by_columns_is_no_head():
    model = nn.Module()
    model.tok, model.lm_head = nn.Embedding(64, 32), nn.Parameter(torch.zeros(32, 64))
    with pytest.raises(UnplacedParameters, match=r"roles=\{'lm_head': 'matrix'\}"):
        symlm.assign_roles(model)
