"""Every model class of a mapping of transformers, as small as its config allows."""

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {  # one value for all fields that mean one thing
    32: "hidden_size d_model n_embd dim n_embed embed_dim model_dim embedding_size dim_model emb_dim lru_width "
    "word_embed_proj_dim attention_hidden_size image_size",
    48: "intermediate_size d_ff n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_feedforward "
    "d_inner dim_ff intermediate_size_mlp",
    24: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size shared_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_key_value_heads num_kv_heads multi_query_group_num n_head_kv num_experts_per_tok moe_topk "
    "moe_top_k n_mamba_heads mamba_expand linear_num_key_heads type_vocab_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_encoder_attention_heads num_decoder_attention_heads num_local_experts n_routed_experts moe_num_experts "
    "qk_rope_head_dim time_step_rank mamba_dt_rank linear_num_value_heads linear_conv_kernel_dim rotary_dim",
    8: "head_dim d_kv kv_channels attention_head_size qk_nope_head_dim v_head_dim mamba_n_heads mamba_d_head "
    "mamba_d_state mamba_num_heads mamba_head_dim ssm_state_size state_size mamba_headdim linear_key_head_dim "
    "linear_value_head_dim patch_size",
    12: "q_lora_rank",
    16: "kv_lora_rank attention_window_size sliding_window",
    64: "vocab_size max_position_embeddings n_positions n_ctx max_seq_len mamba_d_ssm",
    1: "mamba_n_groups n_groups mamba_ngroups n_group topk_group first_k_dense_replace",
    0: "pad_token_id bos_token_id eos_token_id",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}


def fields_of(config):
    """Return the small sizes that a config has fields for, those of its parts too."""
    sizes = {}
    for name, value in config.to_dict().items():
        part = getattr(config, name, None)
        if isinstance(value, dict) and name.endswith("_config") and hasattr(part, "to_dict"):
            sizes[name] = {**part.to_dict(), **fields_of(part), "model_type": part.model_type}
    for name, size in SMALL.items():
        before = getattr(config, name, ...)
        unset = before is None and name in ("q_lora_rank", "kv_channels")
        if before is ... or unset or isinstance(before, list | tuple | bool):
            continue
        if name in ("head_dim", "v_head_dim") and isinstance(getattr(type(config), name, None), property):
            continue
        sizes[name] = size
    if "qk_rope_head_dim" in sizes:  # of latent attention, which has as many heads of k as of q
        sizes |= {"num_key_value_heads": 4} | ({"head_dim": 4} if "head_dim" in sizes else {})
    return sizes


def classes(mapping):
    """Yield (kind of config, class) of a mapping by its short name, as "CAUSAL_LM"."""
    for kind, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
        for name in names if isinstance(names, list | tuple) else [names]:
            if hasattr(transformers, name):
                yield kind, name


def small(kind, name, device="meta"):
    """Build a class small; None if the installed transformers cannot."""
    try:
        made = CONFIG_MAPPING[kind]
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
