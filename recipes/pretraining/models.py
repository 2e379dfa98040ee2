"""The models by name: the paper's four at their real size (arXiv 2605.18106), each again small enough for two cores."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

QWEN3 = {"model_type": "qwen3", "tie_word_embeddings": False}
GEMMA3 = {
    "model_type": "gemma3_text",
    "tie_word_embeddings": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
OLMOE = {"model_type": "olmoe", "tie_word_embeddings": False, "norm_topk_prob": False}
GPT_OSS = {"model_type": "gpt_oss", "tie_word_embeddings": False}
TINY = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
QWEN3_NEXT = {"model_type": "qwen3_next", "tie_word_embeddings": False}
DEEPSEEK_V3 = {"model_type": "deepseek_v3", "tie_word_embeddings": False}
FEW_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 96, "intermediate_size": 384}
NO_HEAD_DIM = {key: value for key, value in TINY.items() if key != "head_dim"}

MODELS: dict[str, dict[str, Any]] = {
    "qwen3-tiny": QWEN3 | TINY | {"intermediate_size": 384},
    "qwen3-0.6b": QWEN3
    | {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "num_hidden_layers": 20,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "gemma3-tiny": GEMMA3 | TINY | {"num_key_value_heads": 1, "intermediate_size": 512, "sliding_window": 128},
    "gemma3-1b": GEMMA3
    | {
        "vocab_size": 262_144,
        "hidden_size": 1152,
        "num_hidden_layers": 18,
        "intermediate_size": 6912,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
    },
    "olmoe-tiny": OLMOE | NO_HEAD_DIM | {"intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2},
    "olmoe-1b-7b": OLMOE
    | {
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "num_hidden_layers": 12,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "gpt-oss-tiny": GPT_OSS
    | TINY
    | {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 64},
    "gpt-oss-small": GPT_OSS
    | {
        "vocab_size": 201_088,
        "hidden_size": 2048,
        "num_hidden_layers": 12,
        "intermediate_size": 2048,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
    },
    # Linear attention in three layers of four, a mixture of experts in all.
    "qwen3-next-tiny": QWEN3_NEXT
    | TINY
    | FEW_EXPERTS
    | {"num_experts": 8, "shared_expert_intermediate_size": 96, "output_router_logits": True}
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    | {"linear_key_head_dim": 32, "linear_value_head_dim": 32},
    # Latent attention, sigmoid routers.
    "deepseek-v3-tiny": DEEPSEEK_V3
    | NO_HEAD_DIM
    | FEW_EXPERTS
    | {"num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    | {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32},
    # State spaces alone; and with attention and MLPs between them.
    "mamba2-tiny": {"model_type": "mamba2", "hidden_size": 128, "num_hidden_layers": 4, "expand": 2}
    | {"state_size": 32, "head_dim": 32, "num_heads": 8, "n_groups": 1, "chunk_size": 64},
    "nemotron-h-tiny": {"model_type": "nemotron_h"}
    | TINY
    | {"intermediate_size": 384, "ssm_state_size": 32, "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 1}
    | {"layers_block_type": ["mamba", "mlp", "attention", "mlp"]},
}


def build_model(
    preset: str, path: str | None, sizes: dict[str, Any], vocabulary: int | None, end: int | None
) -> PreTrainedModel:
    """Make a model from scratch: by preset, or by a Hugging Face config's name or path; `sizes` change its fields.

    One without a vocabulary of its own takes the tokenizer's. Raises: ValueError for an unknown preset or field, and
    for a tokenizer larger than the model's vocabulary.
    """
    if path is None and preset not in MODELS:
        raise ValueError(f"unknown model preset {preset!r}; choose one of {sorted(MODELS)}")
    fields = {} if path else dict(MODELS[preset])
    config = AutoConfig.from_pretrained(path) if path else AutoConfig.for_model(**fields)
    if unknown := [key for key in sizes if not hasattr(config, key)]:
        raise ValueError(f"{type(config).__name__} has no field {unknown}, asked for by model.sizes")
    if sizes:  # made anew, so that what follows from the sizes follows: the layers' types from their number
        base = {k: v for k, v in config.to_dict().items() if k != "layer_types"} if path else fields
        config = AutoConfig.for_model(**base | sizes)
    if vocabulary and not path and "vocab_size" not in fields | sizes:
        config.vocab_size = vocabulary
        config.bos_token_id = config.eos_token_id = config.pad_token_id = end
    if vocabulary and vocabulary > config.vocab_size:
        raise ValueError(f"the tokenizer has {vocabulary} tokens, the model's vocabulary only {config.vocab_size}")
    return AutoModelForCausalLM.from_config(config)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model float64 through and through, to test it: transformers' own norms compute in fp32."""
    model = model.double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model
