"""What the code does to a layer's outputs decides where shapes and names say nothing."""

import plain
import plain_flow as flow
import pytest
import torch
from judge import judged, loud
from torch import nn

import symlm
from symlm.roles import UnplacedParameters
from symlm.roles.source.flow import flow_of

BESIDE = (("to_q", "attention_q"), ("to_kv", "attention_qkv"), ("to_out", "attention_o"))
BLOCKS = {
    **dict.fromkeys((flow.Router, flow.Gaps, flow.SigmoidElsewhere), (("gate", "router"),)),
    flow.ExpertsChoose: {"gate": "sigmoid_router"},
    flow.ExpertsChooseFromBehind: {"gate": "sigmoid_router"},
    flow.Slots: {"gate": "sigmoid_router"},
    flow.FlatTokens: {"gate": "router"},
    flow.Temperatures: {"gate": "sigmoid_router"},
    flow.OneTemperature: {"gate": "router"},
    flow.Normed: {"gate": "sigmoid_router"},
    flow.Clamped: {"gate": "sigmoid_router"},
    **{
        kind: {"qkv": "attention_qkv", "proj": "attention_o"}
        for kind in (
            flow.Fused,
            flow.BlocksOnAnAxis,
            flow.BlocksMapped,
            flow.BlocksScaled,
            flow.BlocksWhole,
            flow.CausalSelfAttention,
            flow.HeadsOnAnAxis,
        )
    },
    **dict.fromkeys((flow.KeysAndValues, flow.KeysBeside), BESIDE),
    flow.NarrowHeads: {"to_qkv": "attention_qkv", "to_out": "attention_o", "to_v_gate.0": "mlp_in"},
    flow.Boxed: {"ff.0.0": "mlp_in", "ff.2": "mlp_out"},
    flow.SelfAttention: {"linear_qkv": "attention_qkv", "linear_proj": "attention_o"},
    flow.Groups: {"wq": "attention_q", "wk": "attention_k", "wv": "attention_v", "wo": "attention_o"},
    flow.LettersFirst: {"qw": "attention_q", "kw": "attention_k", "vw": "attention_v", "ow": "attention_o"},
}
MODELS = {flow.ClampedHead: "capped_lm_head", flow.NormedHead: "capped_lm_head", flow.ActiveBefore: "lm_head"}


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_the_loss_confirms_what_the_code_says_of_a_block(kind):
    verdict, roles = judged(loud(plain.Model(kind)))
    for leaf, role in dict(BLOCKS[kind]).items():
        name = f"layers.0.0.{leaf}.weight"
        assert (roles[name], verdict[name]) == (role, "right"), name
    assert "wrong" not in verdict.values()


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_the_loss_confirms_what_the_code_says_of_a_head(kind):
    verdict, roles = judged(loud(kind(plain.Expert)))
    assert (roles["lm_head.weight"], verdict["lm_head.weight"]) == (MODELS[kind], "right")


@pytest.mark.parametrize("kind", [flow.WrappedTokens, flow.WrappedTied], ids=lambda kind: kind.__name__)
def test_a_table_makes_logits_where_a_function_of_the_model_says_so(kind):
    verdict, roles = judged(loud(kind(flow.Boxed)))
    assert "wrong" not in verdict.values()
    assert str(roles["token.emb.weight"]) == ("tied_embedding" if kind.tie else "embedding")
    assert str(roles["pos.emb.weight"]) == "embedding"
    assert kind.tie or str(roles["to_logits.weight"]) == "lm_head"


def test_a_head_that_is_there_comes_before_code_of_a_tied_table():
    roles = symlm.assign_roles(flow.Untied(plain.Expert))
    assert (str(roles["tok.weight"]), str(roles["to_out.weight"])) == ("embedding", "lm_head")


def test_what_an_option_has_switched_on_counts():
    class Squashed(flow.WrappedTokens):
        squash = True

    assert symlm.assign_roles(Squashed(plain.Expert))["to_logits.weight"] == "capped_lm_head"


def test_a_model_of_classes_says_how_many_it_has():
    model = nn.ModuleDict({"attention": flow.Fused(), "head": nn.Linear(32, 7)})
    with pytest.raises(UnplacedParameters, match="head"):
        symlm.assign_roles(nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "head": nn.Linear(32, 64)}))
    model.num_classes = 7
    assert symlm.assign_roles(model)["head.weight"] == "lm_head"


@pytest.mark.parametrize("kind", [flow.KeysFirst, flow.BlocksOrHeads], ids=lambda kind: kind.__name__)
def test_another_order_of_a_fused_projection_is_refused_and_one_that_is_not_seen(kind):
    with pytest.raises(UnplacedParameters, match="fused_order"):
        symlm.assign_roles(plain.Model(kind))


def test_a_layer_inside_a_module_that_is_called_a_layer_is_the_layer():
    roles = symlm.assign_roles(plain.Model(flow.ChannelMix))
    names = ("key.linear", "value", "receptance.linear")
    assert [str(roles[f"layers.0.0.{name}.weight"]) for name in names] == ["mlp_in", "mlp_out", "mlp_in"]


def test_two_mlps_in_one_module_are_two():
    roles = symlm.assign_roles(plain.Model(flow.TwoMLPs))
    assert [str(roles[f"layers.0.0.fc{k}.weight"]) for k in (1, 2, 3, 4)] == ["mlp_in", "mlp_out"] * 2


def test_a_layer_beside_the_factors_of_an_adapter_keeps_its_role():
    roles = symlm.assign_roles(plain.Model(flow.Adapted))
    names = ("c_fc.linear.weight", "c_fc.lora_A", "c_proj.linear.weight", "c_proj.lora_B")
    assert [str(roles[f"layers.0.0.{name}"]) for name in names] == ["mlp_in", "lora", "mlp_out", "lora"]


def test_a_flow_is_what_is_done_in_the_order_of_the_code():
    steps = flow_of(flow.Temperatures(), "gate").steps
    assert [(step.name, step.by) for step in steps] == [("*", "scale"), ("softmax", None)]
    assert flow_of(flow.TwoMLPs(), "fc1").steps[0].name == "gelu"
    assert flow_of(flow.CausalSelfAttention(), "qkv").names == (("q", "k", "v"),)


def test_options_are_read_without_asking_a_property():
    class Trained(flow.Router):
        @property
        def trainer(self):
            raise RuntimeError("not attached")

        def score(self, logits):
            return logits.softmax(-1) if not self.trainer else logits.sigmoid()

    assert symlm.assign_roles(plain.Model(Trained))["layers.0.0.gate.weight"] == "sigmoid_router"  # either may run


def test_whether_a_property_is_none_is_not_known():
    class Watched(flow.Router):
        @property
        def trainer(self):
            return None

        def score(self, logits):
            return logits.sigmoid() if self.trainer is None else logits.softmax(-1)

    assert symlm.assign_roles(plain.Model(Watched))["layers.0.0.gate.weight"] == "sigmoid_router"


def test_code_of_another_order_comes_before_a_well_known_name():
    class CausalSelfAttention(flow.KeysFirst):
        pass

    with pytest.raises(UnplacedParameters, match="fused_order"):
        symlm.assign_roles(plain.Model(CausalSelfAttention))


def test_an_option_that_says_sigmoid_comes_before_code_of_another_branch():
    class Passed(flow.Router):
        def __init__(self):
            super().__init__()
            self.score_function = "sigmoid"

        def score(self, logits):
            return apart(logits, self.score_function) if self.training else logits.softmax(-1)

    def apart(logits, how):
        return getattr(torch, how)(logits)

    assert symlm.assign_roles(plain.Model(Passed))["layers.0.0.gate.weight"] == "sigmoid_router"


def test_scripted_modules_and_tables_of_positions_are_read():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 16)

        def forward(self, x):
            return self.fc(x)

    parts = {"pos_emb": nn.Embedding(16, 32), "scripted": torch.jit.script(Block()), "enter": nn.Linear(32, 16)}
    with pytest.raises(UnplacedParameters, match=r"scripted\.fc"):
        symlm.assign_roles(nn.ModuleDict(parts))
    del parts["scripted"]
    assert symlm.assign_roles(nn.ModuleDict({**parts, "tok": nn.Embedding(64, 32)}))["enter.weight"] == "matrix"


def test_a_function_of_something_else_is_no_step():
    class Beside(flow.Router):
        def forward(self, x):
            [clamped] = map(lambda y: y.clamp(-1, 1).tanh(), [x])  # noqa: C417
            return super().forward(clamped)

    assert [step.name for step in flow_of(Beside(), "gate").steps] == ["softmax"]
    assert symlm.assign_roles(plain.Model(Beside))["layers.0.0.gate.weight"] == "router"


def test_a_module_without_source_has_no_flow():
    scope = {"nn": nn, "torch": torch}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return self.gate(x).softmax(0)", scope)
    assert flow_of(scope["Hidden"](), "gate") is None
