"""Blocks in the styles of public repositories have the roles that their loss shows, or are refused by name."""

import plain
import plain_public as public
import pytest
import torch
from judge import judged, loud
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import symlm
from symlm.roles import UnplacedParameters

OF_HEADS = {"q": "attention_q", "k": "attention_k", "v": "attention_v", "proj": "attention_o"}
ROLES = {  # of matrices in a block
    public.TalkingHeads: OF_HEADS | {"mix": "vector", "proj_w": "vector"},
    public.DistanceBias: OF_HEADS | {"rel_pos": "vector"},
    public.Forgetting: OF_HEADS | {"fgate_proj": "mlp_in"},
    public.OutputGate: OF_HEADS | {"q_gate": "mlp_in"},
    public.Conformer: {"pointwise_conv1": "mlp_in", "pointwise_conv2": "mlp_out", "depthwise_conv": "vector"},
    public.OwnLayers: {"up": "mlp_in", "down": "mlp_out"},
    public.Stacked: {"experts.w1": "expert_in", "experts.w2": "expert_out", "gate": "router"},
    public.Square: {"experts.w1": "expert_in", "experts.w2": "expert_out", "gate": "router"},
    public.Chosen: {"gate": "router", "ffns.0.w1": "mlp_in"},
    public.ReMoE: {"gate": "sigmoid_router"},
    public.Softplus: {"gate": "sigmoid_router"},
    public.ByModule: {"gate": "sigmoid_router"},
    public.ByCosine: {"gate": "sigmoid_router"},
    public.ManyGates: {"gates.0": "router", "gates.1": "router"},
    public.ChannelMix: {"key": "mlp_in", "receptance": "mlp_in", "value": "mlp_out"},
    public.GatedUnit: {"to_hidden.0": "mlp_in", "to_out.0": "mlp_out"},
}


@pytest.mark.parametrize("kind", ROLES, ids=lambda kind: kind.__name__)
def test_the_loss_confirms_the_roles_of_public_styles(kind):
    verdict, roles = judged(loud(plain.Model(kind)))
    for leaf, role in ROLES[kind].items():
        name = f"layers.0.0.{leaf}" + ".weight" * ("experts.w" not in leaf)
        assert (roles[name], verdict[name]) == (role, "right"), name
    assert set(verdict.values()) <= {"right", "undecided"}


HEADS = {
    public.SigmoidCap: "capped_lm_head",
    public.HelpersCap: "capped_lm_head",
    public.CosineHead: "capped_lm_head",
    public.ScaledTokens: "capped_lm_head",
    plain.Model: "lm_head",
}


@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
def test_a_head_is_centered_only_where_its_loss_ignores_a_shift(kind):
    verdict, roles = judged(loud(kind(plain.Expert)))
    assert (roles["lm_head.weight"], verdict["lm_head.weight"]) == (HEADS[kind], "right")


def holder(kind="Block", forward=None, **parts):
    """Return a module of a class of that name, with these layers, parameters and numbers."""
    module = type(kind, (nn.Module,), {} if forward is None else {"forward": forward})()
    for name, part in parts.items():
        setattr(module, name, nn.Parameter(torch.zeros(*part)) if isinstance(part, tuple) else part)
    return module


def dense(inputs=32, outputs=32):
    return nn.Linear(inputs, outputs, bias=False)


class Skew(nn.Module):
    def forward(self, weight):
        return weight.triu(1) - weight.triu(1).mT


def parametrized(how, *args):
    layer = dense()
    how(layer, *args)
    return holder(proj=layer)


def by_einsum(self, x, sums="...i,oi->...o"):
    return torch.einsum(sums, x, self.weight)


def by_sum(self, x):
    return torch.einsum("...i,oi->...o", x, self.weight)


def by_rows(self, x):
    return F.linear(x, self.weight)


def activated(self, x):
    return F.silu(x)


QKV = {name: dense() for name in ("k_proj", "v_proj", "o_proj")}
REFUSED = {  # what is refused, and the parameter that the error has to name
    "queries and their gate in one layer": (
        lambda: holder("Attention", num_heads=4, q_gate_proj=dense(32, 64), **QKV),
        "q_gate_proj",
    ),
    "an attention by no known name": (
        lambda: holder("Latent", n_heads=4, **{f"W_{x}": dense() for x in ("DQ", "UQ", "DKV", "UK", "UV", "O")}),
        "W_DQ",
    ),
    "receptance, key and value": (
        lambda: holder("TimeMix", n_head=4, **{x: dense() for x in ("receptance", "key", "value", "output")}),
        "receptance",
    ),
    "factors of queries": (
        lambda: holder("TPAttention", c_q=holder("CPLinear", W_A_q=dense(32, 12), W_B_q=dense(32, 24)), c_proj=dense()),
        "W_A_q",
    ),
    "keys of a product": (lambda: holder("PEER", heads=2, queries=nn.Sequential(dense(32, 24))), "queries"),
    "heads first": (lambda: holder("Attention", n_heads=4, q=(4, 32, 8)), r"\.q "),
    "splines": (lambda: holder("KANLinear", base_weight=(8, 8), spline_scaler=(8, 8)), "base_weight"),
    "noise": (lambda: holder("NoisyLinear", weight_mu=(8, 8), weight_sigma=(8, 8)), "weight_sigma"),
    "blocks with biases": (lambda: holder("BlockDiagonalLinear", w=(4, 8, 8), b=(4, 8)), r"\.b "),
    "a layer of one's own whose code does not show its order": (
        lambda: holder("Linear", by_einsum, weight=(8, 16)),
        "weight",
    ),
    "square experts whose code does not": (lambda: holder("Experts", by_einsum, w1=(4, 8, 8), w2=(4, 8, 8)), "w1"),
    "a maximum over four": (lambda: holder("MLP", activated, up=dense(32, 96), down=dense(24, 32)), "up"),
    "a square behind one of twice its width": (
        lambda: holder("minGRU", activated, to_hidden=dense(32, 64), to_y=dense()),
        r"to_hidden.*\n.*to_y",
    ),
    "the gates of a cell": (
        lambda: holder(
            "Cell", lambda self, x: torch.sigmoid(x), **{f"W{x}": dense(32, 24) for x in "ifoc"}, out=dense(24, 32)
        ),
        "Wi",
    ),
    "an MLP's last layer over tokens": (
        lambda: holder("Model", activated, emb=nn.Embedding(64, 10), fc1=dense(30, 40), fc2=dense(40, 64)),
        "fc2",
    ),
    "layers around torch's attention under no name": (
        lambda: holder("Block", lambda self, x: F.scaled_dot_product_attention(x, x, x), a=dense(), b=dense()),
        r"\.a\.weight.*\n.*\.b\.weight",
    ),
    "a layer of torch's under the name of tokens": (lambda: holder(token_mix=nn.Bilinear(8, 8, 8)), "token_mix"),
    "what makes elements": (lambda: holder(dynamic_alpha_fn=(32, 5)), "dynamic_alpha_fn"),
    "an orthogonal weight": (lambda: parametrized(parametrizations.orthogonal), "proj.*original"),
    "a skew weight": (lambda: parametrized(parametrize.register_parametrization, "weight", Skew()), "proj.*original"),
    "heads of fewer tokens": (
        lambda: holder(emb=nn.Embedding(65, 32), linears=nn.ModuleList([dense(32, 64) for _ in range(3)])),
        "linears",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_only_the_code_knows_is_refused_by_name(case):
    made, name = REFUSED[case]
    with pytest.raises(UnplacedParameters, match=name):
        symlm.assign_roles(holder(block=made()))


PLACED = {
    "one activation at two places": (
        public.SharedActivation,
        {"net.0": "mlp_in", "net.2": "mlp_in", "net.4": "mlp_out"},
    ),
    "adaptive softmax": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(32, 64, [20, 40]),
        {"head": "lm_head", "tail.0.0": "matrix", "tail.0.1": "lm_head"},
    ),
    "a norm of several axes": (lambda: holder(norm=nn.LayerNorm((4, 8))), {"norm": "vector"}),
    "factors of layers and streams": (
        lambda: holder(lambdas=(12, 2), skip_scales=(4, 2)),
        {"lambdas": "vector", "skip_scales": "vector"},
    ),
    "queries without keys": (
        lambda: holder("CrossLayer", num_heads=4, q_proj=dense(), o_proj=dense()),
        {"q_proj": "attention_q", "o_proj": "attention_o"},
    ),
    "low ranks that a layer holds": (
        lambda: holder("LoRALinear", by_rows, weight=(8, 8), lora_A=(2, 8), lora_B=(8, 2)),
        {"lora_A": "lora", "lora_B": "lora"},
    ),
    "a flat model": (
        lambda: holder(
            "Model", activated, wte=nn.Embedding(64, 32), fc1=dense(32, 48), fc2=dense(48, 32), lm_head=dense(32, 64)
        ),
        {"fc1": "mlp_in", "fc2": "mlp_out", "lm_head": "lm_head"},
    ),
    "a layer and a head of one's own, by an einsum": (
        lambda: holder("Model", wte=nn.Embedding(64, 32), lm_head=holder("Linear", by_sum, weight=(64, 32))),
        {"lm_head": "lm_head"},
    ),
    "experts beside their stacks": (
        lambda: holder("MoE", activated, gate=dense(32, 4), in_gate_weight=(4, 48, 32), out_gate_weight=(4, 32, 24)),
        {"gate": "router"},
    ),
    "the last layer of a mixer": (
        lambda: holder(conv1d=nn.Conv1d(48, 48, 3, groups=48), in_proj=dense(32, 96), proj_out=dense(48, 32)),
        {"in_proj": "mlp_in", "proj_out": "mlp_out"},
    ),
    "a projection of shifts and scales": (
        lambda: holder(adaLN_modulation=dense(32, 192), to_gamma=dense()),
        {"adaLN_modulation": "mlp_in", "to_gamma": "mlp_in"},
    ),
}


@pytest.mark.parametrize("case", PLACED)
def test_public_styles_are_placed(case):
    made, expected = PLACED[case]
    roles = {name.removesuffix(".weight"): str(role) for name, role in symlm.assign_roles(holder(block=made())).items()}
    assert {name: roles[f"block.{name}"] for name in expected} == expected
