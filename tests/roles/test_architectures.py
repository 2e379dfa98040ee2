"""Every architecture is placed whole, in its right layout; what peers misroute is placed right."""

import pytest
import torch
from models import EXTRA, loss_of, tiny, tokens, train
from numerics import EXACT, RUN, relative
from torch import nn
from transformers import AutoModelForSequenceClassification

import symlm
from symlm.roles.assignment import place
from symlm.views import view_of

ATTENTION = {f"self_attn.{p}_proj": f"attention_{p}" for p in "qkvo"}
DENSE = {"mlp.gate_proj": "mlp_in", "mlp.up_proj": "mlp_in", "mlp.down_proj": "mlp_out"}
EXPERTS = {"mlp.gate": "router", "mlp.experts.gate_up_proj": "expert_in", "mlp.experts.down_proj": "expert_out"}
SHARED = {f"mlp.shared_experts.{leaf.split('.')[1]}": role for leaf, role in DENSE.items()}
EXPECTED = {  # the roles of the last layer's matrices
    "qwen3": ATTENTION | DENSE,
    "llama": ATTENTION | DENSE,
    "mistral": ATTENTION | DENSE,
    "olmo2": ATTENTION | DENSE,
    "gemma3_text": ATTENTION | DENSE,
    "qwen3_moe": ATTENTION | EXPERTS,
    "mixtral": ATTENTION | EXPERTS,
    "olmoe": ATTENTION | EXPERTS,
    "qwen2_moe": ATTENTION
    | EXPERTS
    | {f"mlp.shared_expert.{leaf.split('.')[1]}": role for leaf, role in DENSE.items()}
    | {"mlp.shared_expert_gate": "vector"},
    "gpt_oss": ATTENTION
    | {"mlp.router": "router", "mlp.experts.gate_up_proj": "expert_in", "mlp.experts.down_proj": "expert_out"}
    | {"mlp.experts.gate_up_proj_bias": "vector", "mlp.experts.down_proj_bias": "vector"},
    "deepseek_v3": {
        "self_attn.q_a_proj": "mlp_in",
        "self_attn.q_b_proj": "attention_q",
        "self_attn.kv_a_proj_with_mqa": "mlp_in",
        "self_attn.kv_b_proj": "attention_qkv",
        "self_attn.o_proj": "attention_o",
    }
    | EXPERTS
    | SHARED
    | {"mlp.gate": "sigmoid_router"},
    "glm4_moe": ATTENTION | EXPERTS | SHARED | {"mlp.gate": "sigmoid_router"},
    "llama4_text": ATTENTION
    | {"feed_forward.router": "sigmoid_router", "feed_forward.experts.gate_up_proj": "expert_in"}
    | {"feed_forward.experts.down_proj": "expert_out"}
    | {f"feed_forward.shared_expert.{leaf.split('.')[1]}": role for leaf, role in DENSE.items()},
    "granitemoe": ATTENTION | {f"block_sparse_moe.{k.split('.', 1)[1]}": role for k, role in EXPERTS.items()},
    "phi3": {
        "self_attn.qkv_proj": "attention_qkv",
        "self_attn.o_proj": "attention_o",
        "mlp.gate_up_proj": "mlp_in",
        "mlp.down_proj": "mlp_out",
    },
    "gpt2": {
        "attn.c_attn": "attention_qkv",
        "attn.c_proj": "attention_o",
        "mlp.c_fc": "mlp_in",
        "mlp.c_proj": "mlp_out",
    },
    "gpt_neox": {
        "attention.query_key_value": "attention_qkv",
        "attention.dense": "attention_o",
        "mlp.dense_h_to_4h": "mlp_in",
        "mlp.dense_4h_to_h": "mlp_out",
    },
}
EXPECTED["qwen3_next"] = EXPECTED["qwen2_moe"]  # its last layer; the first is linear attention
EXPECTED["granitemoe"]["block_sparse_moe.router"] = EXPECTED["granitemoe"].pop("block_sparse_moe.gate")


@pytest.mark.parametrize("kind", EXTRA)
def test_every_parameter_of_every_architecture_has_its_role(kind):
    model = tiny(kind)
    roles = {name: str(role) for name, role in symlm.assign_roles(model).items()}
    matrices = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    assert set(roles) == {name for name, _ in model.named_parameters()}
    ends = {"embedding", "lm_head"} if kind != "gemma3_text" else {"tied_embedding"}
    named = {name.removesuffix(".weight").split(".1.", 1)[1]: roles[name] for name in matrices if ".1." in name}
    assert named == EXPECTED[kind]
    assert {roles[name] for name in matrices if ".0." not in name and ".1." not in name} == ends


@pytest.mark.parametrize("preset", symlm.PRESETS)
@pytest.mark.parametrize("kind", EXTRA)
def test_every_architecture_trains_and_every_matrix_moves(kind, preset):
    model = tiny(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = symlm.SymOptimizer(model, lr=1e-3, preset=preset)
    x = tokens()
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        if p.grad is not None and p.grad.any():
            assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("kind", [k for k in EXTRA if k not in ("gpt2", "gpt_neox")])
def test_orientation_agrees_with_the_models_own_tensor_parallel_plan(kind):
    """A column-parallel projection makes heads or neurons, a row-parallel one takes them."""
    model = tiny(kind)
    plan = model.config.base_model_tp_plan or {}
    makes = {"attention_q", "attention_k", "attention_v", "attention_qkv", "mlp_in"}
    checked = 0
    for site, role in place(model):
        name = ".".join("*" if part.isdigit() else part for part in site.name.split(".")[1:-1])
        style = plan.get(name, "")
        split = style.startswith(("colwise", "rowwise")) and "gather" not in style
        if role in (*makes, "attention_o", "mlp_out") and split:
            assert (role in makes) == style.startswith("colwise"), site
            checked += 1
    assert checked or kind in ("gpt_oss", "granitemoe")  # without a plan for these projections


EXPERT_KINDS = [kind for kind, roles in EXPECTED.items() if "expert_in" in roles.values()]


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_rows_of_an_experts_matrices_are_its_neurons(kind):
    """Permuting the neurons of gate, up and down leaves the loss alone; of down alone it does not."""
    model = tiny(kind, initializer_range=0.2).eval()  # in fp32: the grouped products of experts have no float64
    loss = loss_of(model, tokens()).item()
    for role, granularity, same in (("expert_out", "transposed", False), ("expert_in", "whole", True)):
        for site, found in place(model):
            if found == role:
                view, W = view_of(site, found, granularity), site.parameter.detach()
                W.copy_(view.from_matrices(view.to_matrices(W).flip(1), tuple(W.shape)))
        change = abs(loss_of(model, tokens()).item() - loss)
        assert change < 1e-5 if same else change > 1e-3


def sections(model, leaf, granularity="heads"):
    """Return the head matrices of layer 0's projection, views of its storage: [(heads, rows, columns), ...]."""
    site, role = next((s, r) for s, r in place(model) if s.leaf == leaf and ".0." in s.name)
    parts = view_of(site, role, granularity).sections(site.parameter.detach())
    return [view.to_matrices(part) for view, part in parts]


@pytest.mark.parametrize(
    ("kind", "fused", "out"), [("gpt2", "c_attn", "c_proj"), ("gpt_neox", "query_key_value", "dense"), ("phi3", "", "")]
)
def test_fused_blocks_are_where_the_models_own_code_has_them(kind, fused, out):
    """Symmetries of the loss that hold for the right blocks alone: q·s with k/s, and v·g with o·g⁻¹, one head."""
    model = tiny(kind, torch.float64, initializer_range=0.2).eval()
    loss = loss_of(model, tokens()).item()
    (heads,) = sections(model, fused or "qkv_proj")
    (o,) = sections(model, out or "o_proj")
    if kind == "gpt_neox":  # head by head: q, k, v of the first, then of the second
        q, k, v = heads[0:1], heads[1:2], heads[2:3]
    elif kind == "gpt2":  # all q, all k, all v
        q, k, v = heads[0:1], heads[4:5], heads[8:9]
    else:  # two query heads share the first of two key and value heads
        q, k, v = heads[0:2], heads[4:5], heads[6:7]
    q *= 3
    k /= 3
    g = torch.randn(8, 8, dtype=torch.float64)
    v.copy_(g @ v)
    o[: len(q)] = o[: len(q)] @ torch.linalg.inv(g)
    assert abs(loss_of(model, tokens()).item() - loss) < 1e-6  # transformers' softmax is fp32
    q *= 1.5
    assert abs(loss_of(model, tokens()).item() - loss) > 1e-4


def test_a_cross_attention_keeps_its_queries_apart():
    model = tiny("gpt2", torch.float64, add_cross_attention=True)
    roles = symlm.assign_roles(model)
    assert roles["transformer.h.0.crossattention.q_attn.weight"] == "attention_q"
    (site,) = (s for s, _ in place(model) if s.name == "transformer.h.0.crossattention.c_attn.weight")
    view = view_of(site, roles[site.name], "qk_heads")
    (k, K), (v, V) = view.sections(site.parameter.detach())
    keys, values = site.parameter.detach().mT.chunk(2)
    assert torch.equal(k.to_matrices(K).reshape(32, 32), keys)
    assert torch.equal(v.to_matrices(V)[0], values)
    assert view_of(site, roles[site.name], "whole").sections(site.parameter)[0][1].numel() == keys.numel()


def test_torchs_own_attention_is_split_once_it_is_named():
    layer = nn.TransformerEncoderLayer(16, 2)
    groups = symlm.param_groups(layer, roles={"*in_proj_weight": "attention_qkv"})
    assert [g["view"] for g in groups if g["role"] == "attention_qkv"] == ["(h m) n -> h m n | 1 (h m) n, h=4+2"]


def test_low_rank_attention_is_split_between_keys_and_values():
    model = tiny("deepseek_v3", torch.float64, first_k_dense_replace=2)
    loss = loss_of(model, tokens()).item()
    k, v = sections(model, "kv_b_proj")
    (o,) = sections(model, "o_proj")
    assert (k.shape, v.shape, o.shape) == ((4, 8, 10), (4, 6, 10), (4, 32, 6))
    g = torch.randn(6, 6, dtype=torch.float64)
    v[2] = g @ v[2]
    o[2] = o[2] @ torch.linalg.inv(g)
    assert abs(loss_of(model, tokens()).item() - loss) < 1e-6


@pytest.mark.parametrize(
    ("kind", "fused", "of_v"),
    [
        ("gpt2", "c_attn", slice(8, None)),
        ("gpt_neox", "query_key_value", slice(2, None, 3)),
        ("phi3", "qkv_proj", slice(6, None)),
        ("deepseek_v3", "kv_b_proj", None),
    ],
)
def test_of_a_fused_projection_q_and_k_are_taken_by_head_and_v_whole(kind, fused, of_v):
    options = {"first_k_dense_replace": 2} if kind == "deepseek_v3" else {}
    model = tiny(kind, torch.float64, **options)
    by_head = sections(model, fused)
    v = by_head[0][of_v] if of_v else by_head[1]
    qk, whole_v = sections(model, fused, "qk_heads")
    assert torch.equal(whole_v, v.reshape(1, -1, v.shape[-1]))
    assert qk.shape[0] == sum(len(part) for part in by_head) - len(v)
    left = {tuple(matrix.flatten().tolist()) for part in by_head for matrix in part}
    assert left - {tuple(matrix.flatten().tolist()) for matrix in v} == {tuple(x.flatten().tolist()) for x in qk}


def unfused(phi3):
    """Return the Mistral model that computes what a Phi-3 model computes, with the same weights."""
    twin = tiny("mistral", torch.float64, sliding_window=None, rms_norm_eps=1e-5)
    state = dict(phi3.state_dict())
    for name in [name for name in state if "qkv_proj" in name or "gate_up_proj" in name]:
        W = state.pop(name)
        if "qkv_proj" in name:
            parts = zip(("q_proj", "k_proj", "v_proj"), W.split([32, 16, 16]), strict=True)
            state |= {name.replace("qkv_proj", own): part for own, part in parts}
        else:
            parts = zip(("gate_proj", "up_proj"), W.chunk(2), strict=True)
            state |= {name.replace("gate_up_proj", own): part for own, part in parts}
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("preset", ["default", "paper-row", "muon"])
def test_a_fused_model_and_its_unfused_twin_take_the_same_steps(preset):
    fused = tiny("phi3", torch.float64, sliding_window=None)
    twin = unfused(fused)
    assert abs(loss_of(fused, tokens()).item() - loss_of(twin, tokens()).item()) < EXACT
    for model in (fused, twin):
        train(model, symlm.SymOptimizer(model, preset=preset, polar_method="svd"), 3)
    again = unfused(fused)
    for (name, W), (_, V) in zip(twin.named_parameters(), again.named_parameters(), strict=True):
        assert relative(V, W) < RUN, name


class Peers(nn.Module):
    """Names that peers misroute by substring."""

    def __init__(self, head="output"):
        super().__init__()
        self.tokens = nn.Embedding(50, 8)
        self.embedding_proj = nn.Linear(8, 8, bias=False)
        self.router_norm = nn.LayerNorm(8)
        setattr(self, head, nn.Linear(8, 50 if head != "score" else 3, bias=False))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)


def test_a_linear_inside_a_router_is_the_router():
    assert symlm.assign_roles(nn.ModuleDict({"mlp": Router()})) == {"mlp.gate.weight": "router"}


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models_have_the_roles_of_the_model(wrap):
    assert list(symlm.assign_roles(wrap(Peers("score"))).values()) == list(symlm.assign_roles(Peers("score")).values())


def test_only_a_head_whose_loss_may_be_a_softmax_is_centered():
    config = tiny("llama").config
    config.num_labels = 3
    for task, role in (("single_label_classification", "lm_head"), ("multi_label_classification", "matrix")):
        config.problem_type = task
        model = AutoModelForSequenceClassification.from_config(config)
        assert symlm.assign_roles(model)["score.weight"] == role
    regression = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 3)})
    assert symlm.assign_roles(regression)["head.weight"] == "matrix"


def test_a_head_without_a_name_is_the_last_layer_of_a_tables_shape():
    small = nn.ModuleDict({"wpe": nn.Embedding(256, 8), "wte": nn.Embedding(65, 8), "to_logits": nn.Linear(8, 65)})
    assert symlm.assign_roles(small)["to_logits.weight"] == "lm_head"
    inner = nn.Sequential(nn.Embedding(16, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    assert symlm.assign_roles(inner)["1.weight"] == "matrix"


@pytest.mark.parametrize("head", ["output", "embed_out", "score"])
def test_names_that_peers_misroute(head):
    roles = symlm.assign_roles(Peers(head))
    assert roles[f"{head}.weight"] == "lm_head"
    assert roles["embedding_proj.weight"] == "matrix"
    assert roles["router_norm.weight"] == "vector"
    assert roles["tokens.weight"] == "embedding"


def test_a_classifier_of_transformers_has_a_head():
    config = tiny("llama").config
    config.num_labels = 3
    assert symlm.assign_roles(AutoModelForSequenceClassification.from_config(config))["score.weight"] == "lm_head"


class CausalSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_head, self.n_embd = 2, 8
        self.c_attn = nn.Linear(8, 24, bias=False)
        self.c_proj = nn.Linear(8, 8, bias=False)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(8, 32)
        self.c_proj = nn.Linear(32, 8)


class NanoGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, 8), nn.Embedding(16, 8)
        self.attn, self.mlp = CausalSelfAttention(), MLP()
        self.lm_head = nn.Linear(8, 50, bias=False)
        self.lm_head.weight = self.wte.weight


def test_nanogpt_is_placed():
    roles = {name: str(role) for name, role in symlm.assign_roles(NanoGPT()).items()}
    assert roles == {
        "wte.weight": "tied_embedding",
        "wpe.weight": "embedding",
        "attn.c_attn.weight": "attention_qkv",
        "attn.c_proj.weight": "attention_o",
        "mlp.c_fc.weight": "mlp_in",
        "mlp.c_fc.bias": "vector",
        "mlp.c_proj.weight": "mlp_out",
        "mlp.c_proj.bias": "vector",
    }
    groups = symlm.param_groups(NanoGPT())
    (qkv,) = (group["view"] for group in groups if group["role"] == "attention_qkv")
    assert qkv == "(h m) n -> h m n | 1 (h m) n, h=4+2"


def test_first_pattern_wins():
    roles = symlm.assign_roles(NanoGPT(), {"attn.*": "matrix", "*.c_attn.weight": "vector", "mlp.c_fc.bias": "vector"})
    assert roles["attn.c_attn.weight"] == "matrix"
    assert roles["attn.c_proj.weight"] == "matrix"
