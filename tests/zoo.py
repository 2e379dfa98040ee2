"""Every model class of a mapping of transformers, as small as its config allows."""

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {  # one value for all fields that mean one thing
    32: "hidden_size d_model n_embd dim n_embed embed_dim model_dim embedding_size dim_model emb_dim "
    "lru_width word_embed_proj_dim attention_hidden_size image_size out_hidden_size",
    48: "intermediate_size hidden_dim d_ff n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
    "dim_feedforward d_inner dim_ff intermediate_size_mlp",
    24: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size shared_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_key_value_heads num_kv_heads multi_query_group_num n_head_kv num_experts_per_tok moe_topk "
    "moe_top_k n_mamba_heads mamba_expand linear_num_key_heads type_vocab_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_encoder_attention_heads num_decoder_attention_heads num_local_experts n_routed_experts moe_num_experts "
    "qk_rope_head_dim time_step_rank mamba_dt_rank linear_num_value_heads linear_conv_kernel_dim rotary_dim",
    8: "head_dim d_head d_kv kv_channels attention_head_size qk_nope_head_dim v_head_dim mamba_n_heads mamba_d_head "
    "mamba_d_state mamba_num_heads mamba_head_dim ssm_state_size state_size mamba_headdim linear_key_head_dim "
    "linear_value_head_dim patch_size",
    12: "q_lora_rank",
    16: "kv_lora_rank attention_window_size sliding_window",
    64: "vocab_size mamba_d_ssm",
    40: "max_position_embeddings n_positions n_ctx max_seq_len max_encoder_position_embeddings "
    "max_decoder_position_embeddings",
    1: "mamba_n_groups n_groups mamba_ngroups n_group topk_group first_k_dense_replace",
    0: "pad_token_id bos_token_id eos_token_id",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}


MORE = {  # fields of single kinds, where the sizes above contradict each other or leave a part large
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bailing_hybrid": {"n_group": 1, "num_expert_group": 1, "num_key_value_heads": 4, "head_dim": 8},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "cohere2_vision": {"alignment_intermediate_size": 128},
    "ctrl": {"dff": 48},
    "dots3_note_text": {
        "per_layer_config": {},
        "head_dim": 12,
        "index_head_dim": 8,
        "index_n_heads": 4,
        "num_key_value_heads": 4,
    },
    "deepseek_v4": {
        **{"o_lora_rank": 4, "o_groups": 2, "index_head_dim": 8, "index_n_heads": 4},
    },
    "dots1": {"n_shared_experts": 1},
    "esmc": {"num_key_value_heads": 4},
    "fsmt": {"src_vocab_size": 64, "tgt_vocab_size": 64},
    "funnel": {"block_sizes": [2], "block_repeats": [1]},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 6,
        "laurel_rank": 12,
        "num_kv_shared_layers": 0,
    },
    "gemma4_text": {"per_layer_config": {}, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 6},
    "gemma4_unified_text": {"per_layer_config": {}, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 6},
    "inkling2_text": {"swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2},
    "inkling_text": {"swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2},
    "gemma3": {"mm_tokens_per_image": 4},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "led": {"attention_window": [16, 16]},
    "longformer": {"attention_window": [16, 16]},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "marian": {"decoder_vocab_size": 64, "decoder_start_token_id": 0},
    **{name: {"image_grid_pinpoints": [[32, 32]]} for name in ("llava_next", "llava_next_video", "llava_onevision")},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8},
    "mobilebert": {"intra_bottleneck_size": 24, "embedding_size": 20},
    "paligemma": {"projection_dim": 32},
    "perceiver": {"d_latents": 24, "num_latents": 6, "num_self_attends_per_block": 2, "d_model": 24},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
        **{"indexer_compress_ratio": 2, "hc_lowrank": 12},
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "roc_bert": {
        **{
            "shape_vocab_size": 20,
            "pronunciation_vocab_size": 20,
            "pronunciation_embed_dim": 32,
            "shape_embed_dim": 32,
        },
    },
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "xglm": {"attention_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "kv_channels": 16,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_query_groups": 4,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 12},
}
SECTIONS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text")
SECTIONS += ("glm4v_text", "glm46v_text", "glm_ocr_text")
ABSENT = {  # which a config does not let one set
    "funnel": ("num_hidden_layers",),
    "prophetnet": ("num_hidden_layers",),
    "xlnet": ("max_position_embeddings", "n_ctx", "max_seq_len", "n_positions"),
}


def fields_of(config):
    """Return the small sizes that a config has fields for, those of its parts too."""
    sizes, values = {}, config.to_dict()
    for name, value in values.items():
        part = _field(config, name)
        if isinstance(value, dict) and name.endswith("_config") and hasattr(part, "to_dict"):
            sizes[name] = {**part.to_dict(), **fields_of(part), "model_type": part.model_type}
    for name, size in SMALL.items():
        before = _field(config, name)
        unset = before is None and name in ("q_lora_rank", "kv_channels")
        if before is ... or unset or isinstance(before, list | tuple | bool):
            continue
        if name in ("head_dim", "v_head_dim") and isinstance(getattr(type(config), name, None), property):
            continue
        sizes[name] = size
    if "qk_rope_head_dim" in sizes:  # of latent attention, which has as many heads of k as of q
        sizes |= {"num_key_value_heads": 4} | ({"head_dim": 4} if "head_dim" in sizes else {})
    sizes |= {name: [SMALL[name]] * 2 for name in ("image_size", "patch_size") if len(_pair(values.get(name))) == 2}
    if config.model_type in SECTIONS:  # the pairs of a head, by time, height and width
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    sizes = {name: size for name, size in sizes.items() if name not in ABSENT.get(config.model_type, ())}
    return sizes | _fields_by_layer(values) | MORE.get(config.model_type, {})


def _pair(value):
    """Return a value that is a list, an empty one for others."""
    return value if isinstance(value, list | tuple) else ()


def _field(config, name):
    """Return a field of a config; None for one that differs by layer, ... without one."""
    try:
        return getattr(config, name, ...)
    except Exception:  # a class of transformers' own
        return name in config.to_dict() or ...


def _fields_by_layer(values):
    """Return the fields that are lists over the layers, of one layer a kind, and the number of these layers."""
    counts = [values.get(name) for name in ("num_hidden_layers", "num_layers", "n_layer")]
    layers = next((n for n in counts if isinstance(n, int)), 0)
    lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == layers and "id" not in k}
    if not lists or layers < 3:
        return {}
    kinds = list(zip(*(map(str, values) for values in lists.values()), strict=True))
    chosen = sorted({kinds.index(kind) for kind in kinds})[:4]
    chosen += [chosen[-1]] * (len(chosen) < 2)
    fields = {name: [v[k] for k in chosen] for name, v in lists.items()}
    if "intermediate_size" in fields:
        fields["intermediate_size"] = [SMALL["intermediate_size"]] * len(chosen)
    return fields | {"num_hidden_layers": len(chosen)}


def classes(mapping):
    """Yield (kind of config, class) of a mapping by its short name, as "CAUSAL_LM"."""
    for kind, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
        for name in names if isinstance(names, list | tuple) else [names]:
            if hasattr(transformers, name):
                yield kind, name


def small(kind, name, device="meta"):
    """Build a class small; None if the installed transformers cannot."""
    try:
        made = getattr(transformers, name).config_class or CONFIG_MAPPING[kind]
        config = made(**fields_of(made()))
        config._attn_implementation = config._experts_implementation = "eager"
        with torch.device(device):
            return getattr(transformers, name)(config)
    except Exception:  # whatever a config of one of 300 classes refuses
        if device != "meta":
            return None
    try:
        with torch.device("meta"):
            return getattr(transformers, name)(CONFIG_MAPPING[kind]())
    except Exception:
        return None
