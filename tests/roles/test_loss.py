"""What a role says may be moved is moved, in all layers together, and the loss of the model stays; not one alone."""

from collections import Counter

import pytest
import torch
from judge import attention_moves, judged, loss_of, loud, replaced
from judge.stream import rotating
from numerics import LOSS_CHANGES, LOSS_STAYS
from zoo import classes, small

import symlm
from symlm.roles import assign_roles, place

QUICK = {
    "CAUSAL_LM": (
        *("Qwen3ForCausalLM", "OlmoeForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM", "Gemma2ForCausalLM"),
        *("GPT2LMHeadModel", "GPTNeoXForCausalLM", "BloomForCausalLM", "FalconForCausalLM", "CodeGenForCausalLM"),
        *("MptForCausalLM", "GPTBigCodeForCausalLM", "OpenAIGPTLMHeadModel", "PersimmonForCausalLM", "Phi3ForCausalLM"),
        *("BertLMHeadModel", "XLMWithLMHeadModel", "ModernBertDecoderForCausalLM", "Llama4ForCausalLM"),
        *("MambaForCausalLM", "BambaForCausalLM", "Qwen3NextForCausalLM", "RecurrentGemmaForCausalLM"),
        *("DeepseekV2ForCausalLM", "MiniCPM3ForCausalLM", "JetMoeForCausalLM", "Glm4MoeForCausalLM", "Lfm2ForCausalLM"),
        *("DiffLlamaForCausalLM", "DogeForCausalLM", "CpmAntForCausalLM", "RwkvForCausalLM", "MiniMaxForCausalLM"),
        *("Gemma3nForCausalLM", "ProphetNetForCausalLM", "xLSTMForCausalLM", "MusicgenForCausalLM"),
    ),
    "MASKED_LM": (
        *("BertForMaskedLM", "ModernBertForMaskedLM", "DebertaForMaskedLM", "MPNetForMaskedLM"),
        *("ConvBertForMaskedLM", "FunnelForMaskedLM", "MobileBertForMaskedLM", "AlbertForMaskedLM"),
        "SqueezeBertForMaskedLM",
    ),
    "IMAGE_TEXT_TO_TEXT": (
        *("AriaForConditionalGeneration", "Glm46VForConditionalGeneration", "Idefics3ForConditionalGeneration"),
        "Qwen2_5_VLForConditionalGeneration",
    ),
    "SEQ_TO_SEQ_CAUSAL_LM": (
        "T5ForConditionalGeneration",
        "BartForConditionalGeneration",
        "UMT5ForConditionalGeneration",
    ),
}
WITHOUT_ATTENTION = (  # this small, or at all
    *("JetMoeForCausalLM", "MambaForCausalLM", "BambaForCausalLM", "Qwen3NextForCausalLM", "RecurrentGemmaForCausalLM"),
    "RwkvForCausalLM",
)
LEAST = {"CAUSAL_LM": 0.98, "MASKED_LM": 0.98, "SEQ_TO_SEQ_CAUSAL_LM": 0.98}  # confirmed, of what the loss reaches
LARGEST = 5e6  # parameters: a part whose config has other fields may be of billions


def verdicts(kind, name):
    """Return {parameter: verdict} and the roles of one class; None where it cannot be built or run this small."""
    counted = small(kind, name)  # on the meta device
    if counted is None or sum(p.numel() for p in counted.parameters()) > LARGEST:
        return None
    if (model := small(kind, name, "cpu")) is None:
        return None
    try:
        return judged(loud(model))
    except (RuntimeError, ValueError, AttributeError, TypeError, NotImplementedError, LookupError, AssertionError):
        return None  # its small form does not run, or not in float64


@pytest.mark.parametrize(("mapping", "name"), [(mapping, name) for mapping, names in QUICK.items() for name in names])
def test_the_loss_confirms_the_roles(mapping, name):
    kinds = [kind for kind, found in classes(mapping) if found == name]
    verdict, roles = next(said for kind in kinds if (said := verdicts(kind, name)))
    wrong = {key: str(roles[key]) for key, said in verdict.items() if said == "wrong"}
    assert not wrong
    assert Counter(verdict.values())["right"] >= 0.75 * sum(said != "unreached" for said in verdict.values())
    by_role = {str(roles[key]) for key, said in verdict.items() if said == "right"}
    assert by_role & {"attention_q", "attention_qkv"} or name in WITHOUT_ATTENTION
    assert by_role & {"mlp_in", "expert_in"}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # of a machine with much other work
@pytest.mark.parametrize("mapping", LEAST)
def test_the_loss_shows_no_role_wrong_in_a_whole_mapping(mapping):
    total, wrong, ran = Counter(), {}, 0
    for kind, name in classes(mapping):
        if (said := verdicts(kind, name)) is None:
            continue
        ran += 1
        total += Counter(said[0].values())
        if bad := [key for key, verdict in said[0].items() if verdict == "wrong"]:
            wrong[name] = bad
    print(f"{mapping}: {ran} classes, {dict(total)}, shown wrong: {sorted(wrong)}")
    assert ran > 20
    assert not wrong
    assert total["right"] > LEAST[mapping] * (sum(total.values()) - total["unreached"])


def test_the_judge_sees_a_wrong_order():
    """Blocks of a fused projection that are moved by one head more change the loss."""
    model = loud(small("gpt2", "GPT2LMHeadModel", "cpu"))
    base = loss_of(model)
    ((moved, *_), *_) = attention_moves(place(model))
    with replaced(model, moved):
        assert abs(loss_of(model) - base) < LOSS_STAYS
    name = next(name for name in moved if "c_attn.weight" in name)
    moved[name] = moved[name].roll(8, 1)
    with replaced(model, moved):
        assert abs(loss_of(model) - base) > 1000 * LOSS_CHANGES


def roles_of(kind, name, part):
    """Return the roles of the parameters with a part in their names."""
    return {str(role) for key, role in assign_roles(small(kind, name)).items() if part in key}


@pytest.mark.parametrize(
    ("kind", "name", "part", "roles"),
    [
        ("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", "gate.wg", {"router"}),
        ("t5", "T5ForConditionalGeneration", "relative_attention_bias", {"vector"}),
        ("t5", "T5ForConditionalGeneration", "DenseReluDense", {"mlp_in", "mlp_out"}),
        ("nanochat", "NanoChatForCausalLM", "lm_head", {"capped_lm_head"}),
        ("gemma3_text", "Gemma3ForCausalLM", "embed", {"tied_embedding"}),
        ("deepseek_v3", "DeepseekV3ForCausalLM", "mlp.gate.weight", {"sigmoid_router"}),
        ("phimoe", "PhimoeForCausalLM", "mlp.router.weight", {"sigmoid_router"}),
        ("olmoe", "OlmoeForCausalLM", "mlp.gate.weight", {"router"}),
        ("mamba", "MambaForCausalLM", "A_log", {"vector"}),
        ("mamba", "MambaForCausalLM", "conv1d.weight", {"vector"}),
        ("mamba", "MambaForCausalLM", "in_proj", {"mlp_in"}),
        ("qwen3_next", "Qwen3NextForCausalLM", "in_proj_qkvz", {"mlp_in"}),
        ("vit", "ViTForMaskedImageModeling", "patch_embeddings.projection.weight", {"matrix"}),
        ("bert", "BertForMaskedLM", "layer.0.output.dense.weight", {"mlp_out"}),
        ("xlnet", "XLNetLMHeadModel", "rel_attn.o", {"attention_o"}),
        ("lfm2", "Lfm2ForCausalLM", "feed_forward.w", {"mlp_in", "mlp_out"}),
        ("funnel", "FunnelForMaskedLM", "attention.q_head.weight", {"attention_q"}),
        ("funnel", "FunnelForMaskedLM", "attention.post_proj.weight", {"attention_o"}),
        ("prophetnet", "ProphetNetForCausalLM", "feed_forward.output.weight", {"mlp_out"}),
        ("prophetnet", "ProphetNetForCausalLM", "relative_pos_embeddings.weight", {"mlp_in"}),
        ("cpmant", "CpmAntForCausalLM", "w_in.w_", {"mlp_in"}),
        ("cpmant", "CpmAntForCausalLM", "w_out", {"mlp_out"}),
        ("rwkv", "RwkvForCausalLM", "feed_forward.receptance", {"mlp_in"}),
        ("jetmoe", "JetMoeForCausalLM", "self_attention.experts.input_linear", {"attention_q"}),
        ("jetmoe", "JetMoeForCausalLM", "self_attention.experts.output_linear", {"attention_o"}),
        ("gemma3n_text", "Gemma3nForCausalLM", "altup.correction_coefs", {"mlp_out"}),
        ("deepseek_v4", "DeepseekV4ForCausalLM", "mlp.gate.weight", {"sigmoid_router"}),
        ("deepseek_v4", "DeepseekV4ForCausalLM", "attn_hc.fn", {"mlp_in"}),
        ("deepseek_v4", "DeepseekV4ForCausalLM", "o_b_proj", {"mlp_out"}),
        ("qwen4_exp_text", "Qwen4ExpForCausalLM", "input_mix_weight_down", {"mlp_in"}),
        ("zaya", "ZayaForCausalLM", "router_mlp.out_proj.weight", {"router"}),
        ("zamba2", "Zamba2ForCausalLM", "gate_up_proj_adapter_list.0.1.weight", {"mlp_in"}),
        ("musicgen", "MusicgenForCausalLM", "lm_heads", {"lm_head"}),
        ("bert", "BertForMaskedLM", "predictions.transform.dense.weight", {"mlp_in"}),
        ("roberta", "RobertaForMaskedLM", "lm_head.dense.weight", {"mlp_in"}),
        ("mobilebert", "MobileBertForMaskedLM", "output.bottleneck.dense.weight", {"matrix"}),
        ("squeezebert", "SqueezeBertForMaskedLM", "attention.query.weight", {"attention_q"}),
        ("squeezebert", "SqueezeBertForMaskedLM", "post_attention.conv1d.weight", {"attention_o"}),
        ("squeezebert", "SqueezeBertForMaskedLM", "intermediate.conv1d.weight", {"mlp_in"}),
        ("squeezebert", "SqueezeBertForMaskedLM", "layers.0.output.conv1d.weight", {"mlp_out"}),
        ("mobilebert", "MobileBertForMaskedLM", "cls.predictions.dense.weight", {"mlp_out"}),
        ("convbert", "ConvBertForMaskedLM", "conv_out_layer.weight", {"attention_v"}),
        ("convbert", "ConvBertForMaskedLM", "conv_kernel_layer.weight", {"mlp_out"}),
        ("neomme", "NeoMMEForMaskedLM", "output_projection.gate_proj.weight", {"mlp_in"}),
        ("neomme", "NeoMMEForMaskedLM", "output_projection.o_proj.weight", {"attention_o"}),
        ("wav2vec2", "Wav2Vec2ForCTC", "pos_conv_embed.conv.parametrizations.weight.original1", {"matrix"}),
        ("wav2vec2", "Wav2Vec2ForCTC", "lm_head.weight", {"lm_head"}),
        ("vit", "ViTForImageClassification", "classifier.weight", {"lm_head"}),
        ("hiera", "HieraModel", "qkv.weight", {"attention_qkv"}),
        ("aria", "AriaForConditionalGeneration", "feed_forward.linear_out.weight", {"mlp_out"}),
        ("evolla", "EvollaForProteinText2Text", "adapter.key_protein.weight", {"attention_k"}),
        ("eomt", "EomtForUniversalSegmentation", "mask_head.fc3.weight", {"mlp_out"}),
        ("nystromformer", "NystromformerForMaskedLM", "attention.self.query.weight", {"attention_q"}),
        ("aria", "AriaForConditionalGeneration", "cross_attn.q_proj.weight", {"matrix"}),
        ("aria", "AriaForConditionalGeneration", "multihead_attn.in_proj_weight", {"attention_qkv"}),
        ("mistral3", "Mistral3ForConditionalGeneration", "multi_modal_projector.linear_1.weight", {"mlp_in"}),
        ("mistral3", "Mistral3ForConditionalGeneration", "projector.patch_merger.merging_layer.weight", {"matrix"}),
        ("ovis2", "Ovis2ForConditionalGeneration", "head_linear.weight", {"mlp_in"}),
        ("glm46v", "Glm46VForConditionalGeneration", "merger.proj.weight", {"mlp_in"}),
        ("lfm3_vl", "Lfm3VlForConditionalGeneration", "conv.in_proj", {"mlp_in"}),
        ("bert", "BertForQuestionAnswering", "qa_outputs.weight", {"matrix"}),
        ("bert", "BertForNextSentencePrediction", "seq_relationship.weight", {"lm_head"}),
        ("flava", "FlavaForPreTraining", "mim_head.decoder.weight", {"lm_head"}),
        ("axk2", "AXK2ForCausalLM", "q_gate_proj.weight", {"attention_qkv"}),
        ("wavlm", "WavLMForCTC", "rel_attn_embed.weight", {"vector"}),
        ("mobilevitv2", "MobileViTV2ForImageClassification", "attention.qkv_proj.convolution.weight", {"mlp_in"}),
        ("wav2vec2-conformer", "Wav2Vec2ConformerForCTC", "pointwise_conv1.weight", {"mlp_in"}),
        ("pi0", "PI0ForConditionalGeneration", "action_time_mlp_in.weight", {"mlp_in"}),
    ],
)
def test_a_parameter_has_the_role_that_its_loss_shows(kind, name, part, roles):
    assert roles_of(kind, name, part) == roles


@pytest.mark.parametrize(
    ("name", "head", "labels", "free"),
    [
        ("BertForQuestionAnswering", "qa_outputs", ("start_positions", "end_positions"), False),
        ("BertForNextSentencePrediction", "cls.seq_relationship", ("labels",), True),
    ],
)
def test_two_rows_are_a_head_only_where_a_softmax_is_over_them(name, head, labels, free):
    """As many rows as there are types of tokens: a softmax over places feels a shift, one over classes does not."""
    model = loud(small("bert", name, "cpu"))
    given = {"input_ids": torch.arange(24).view(2, 12)} | {label: torch.tensor([0, 1]) for label in labels}
    weight, loss = model.get_submodule(head).weight.detach(), model(**given).loss.item()
    weight += torch.randn(weight.shape[1], dtype=torch.float64)
    assert (abs(model(**given).loss.item() - loss) < LOSS_STAYS) == free
    assert (str(symlm.assign_roles(model)[f"{head}.weight"]) == "lm_head") == free


def test_experts_of_queries_are_cut_into_heads():
    model = small("jetmoe", "JetMoeForCausalLM")
    views = {name: group["view"] for group in symlm.param_groups(model) for name in names(group)}
    assert views["model.layers.0.self_attention.experts.input_linear.weight"] == "b (h m) n -> (b h) m n, h=2"
    assert views["model.layers.0.self_attention.experts.output_linear.weight"] == "b m n -> b m n"


def test_rotations_show_what_reads_the_stream_and_leaving_one_out_breaks_them():
    """The stream turns in all that reads or writes it; in no other axis, and not with a weight of other columns."""
    model = loud(small("qwen3", "Qwen3ForCausalLM", "cpu"))
    sites = place(model)
    reads = {name for name, axis in rotating(model, sites) if axis == 1}
    assert reads == {s.name for s, role in sites if str(role) not in ("attention_o", "mlp_out", "vector")} | {
        s.name for s, role in sites if str(role) == "attention_o"
    }  # of o, heads turn along the columns
    inner = model.model.layers[0]
    inner.register_forward_hook(lambda module, args, out: out * torch.linspace(1, 2, 32, dtype=torch.float64))
    assert "lm_head.weight" not in {name for name, _ in rotating(model, sites)}


def test_blocks_of_a_state_space_are_matrices_of_their_own():
    groups = symlm.param_groups(small("bamba", "BambaForCausalLM"))
    views = {
        group["view"] for group in groups if any(n.split(".", 3)[-1] == "mamba.in_proj.weight" for n in names(group))
    }
    assert views == {"m n -> 1 m n, m=64+64+8+8+8"}  # gate, state space's input, B, C and the step's size


def names(group):
    return [name for name, _ in group["params"]]
