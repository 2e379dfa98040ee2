"""Names that sizes or code contradict do not decide a role."""

import plain
import plain_named as named
import pytest
import torch
from judge import judged, loud
from torch import nn
from torch.nn import functional as F

import symlm

BLOCKS = {
    named.GateNamedSecond: {"fc1": "mlp_in", "fc2": "mlp_in", "fc3": "mlp_out"},
    named.LayersOfExperts: {"gate": "router", "fc1.0": "mlp_in", "fc2.3": "mlp_in", "fc3.1": "mlp_out"},
    named.Adapter: {"down_proj": "mlp_in", "up_proj": "mlp_out"},
    named.OutFirst: {"wi": "mlp_in", "wo": "mlp_out"},
    named.ThirdOut: {"gate": "router", "w1": "expert_in", "w2": "expert_in", "w3": "expert_out"},
    named.GateAndUp: {"w1": "expert_in", "w2": "expert_out"},
    named.OutputOverDistances: {"q": "attention_q", "v": "attention_v", "output": "attention_o"},
    named.TwoScores: {"gate": "sigmoid_router"},
    named.Down: {"up": "mlp_in", "gate": "mlp_in", "down": "mlp_out"},
}
MODELS = {
    named.AroundAStack: {"word": "embedding", "project_in": "matrix", "project_out": "matrix", "lm_head": "lm_head"},
    named.Shared: {"tok": "tied_embedding"},
    named.Regularized: {"lm_head": "capped_lm_head"},
}


@pytest.mark.parametrize("kind", [*BLOCKS, *MODELS], ids=lambda kind: kind.__name__)
def test_the_loss_confirms_what_sizes_and_code_say(kind):
    block = kind in BLOCKS
    verdict, roles = judged(loud(plain.Model(kind) if block else kind(plain.Expert)))
    for leaf, role in (BLOCKS | MODELS)[kind].items():
        above = "layers.0.0." * block
        name = next(name for name in (f"{above}{leaf}", f"{above}{leaf}.weight") if name in roles)
        assert (roles[name], verdict[name]) == (role, "right"), name
    assert "wrong" not in verdict.values()


def test_layers_one_behind_the_other_are_an_mlp_under_any_names():
    roles = symlm.assign_roles(plain.Model(named.Deep))
    assert [str(roles[f"layers.0.0.{leaf}.weight"]) for leaf in ("inp", "hid", "outp")] == [
        "mlp_in",
        "mlp_in",
        "mlp_out",
    ]


class Regression(nn.Module):
    """Values beside tokens: no softmax is over them."""

    def __init__(self, loss=None):
        super().__init__()
        self.tok, self.head = nn.Embedding(64, 32), nn.Linear(32, 7)
        if loss is not None:
            self.criterion = loss

    def forward(self, ids, labels):
        return F.mse_loss(self.head(self.tok(ids)), labels)


def test_a_head_without_a_softmax_is_not_centered():
    assert symlm.assign_roles(Regression())["head.weight"] == "matrix"
    assert symlm.assign_roles(Regression(nn.CrossEntropyLoss()))["head.weight"] == "lm_head"


@pytest.mark.parametrize("config", [{"final_logit_softcapping": 30.0}, {"hidden": 32}, "small", (1, 2)])
def test_configs_of_any_kind_are_read(config):
    model = plain.Model(plain.Expert)
    model.config = config
    capped = isinstance(config, dict) and "hidden" not in config
    assert symlm.assign_roles(model)["lm_head.weight"] == ("capped_lm_head" if capped else "lm_head")


def test_numbers_by_distance_and_head_are_no_table():
    attention = plain.WithoutAName()
    attention.rel_pos = nn.Parameter(torch.zeros(12, plain.HEADS))
    assert symlm.assign_roles(nn.ModuleDict({"block": attention}))["block.rel_pos"] == "vector"


@pytest.mark.parametrize("stack", [nn.ModuleList([plain.Sequence(), plain.Sequence()]), nn.LSTM(32, 32), nn.Identity()])
def test_two_layers_that_do_not_lead_back_around_blocks_or_nothing_are_no_mlp(stack):
    """A series' projections, with a recurrence or blocks between, or two layers side by side without an activation.

    What is behind a recurrence reads its channels.
    """
    model = nn.Module()
    model.series, model.blocks, model.values = nn.Linear(20, 32), stack, nn.Linear(32, 7)
    roles = symlm.assign_roles(nn.ModuleDict({"model": model}))
    behind = "mlp_out" if isinstance(stack, nn.LSTM) else "matrix"
    assert (roles["model.series.weight"], roles["model.values.weight"]) == ("matrix", behind)
