"""Tiny real transformers models."""

import torch
from pretraining.models import in_float64
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
EXTRA = {
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, **MOE},
    "qwen2_moe": {"shared_expert_intermediate_size": 24, **MOE},
    "gemma3_text": {"head_dim": 8, "tie_word_embeddings": True},
    "llama": {},
    "mistral": {},
    "mixtral": LOCAL,
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    "gpt_oss": {"head_dim": 8, **LOCAL},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "n_group": 2,
        "topk_group": 1,
        **ROUTED,
    },
    "qwen3_next": {
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
        **MOE,
    },
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32, "n_inner": 48},
    "gpt_neox": {},
    "granitemoe": LOCAL,
    "glm4_moe": {"head_dim": 8, **ROUTED},
    "llama4_text": {"head_dim": 8, **LOCAL, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
}


def tiny(kind="qwen3", dtype=torch.float32, seed=0, **changes):
    config = AutoConfig.for_model(kind, **{**SIZES, **EXTRA[kind], **changes})
    torch.manual_seed(seed)
    attention = "eager" if kind == "gpt_oss" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    return in_float64(model) if dtype == torch.float64 else model


def loss_of(model, x):
    """Return the next-token cross-entropy in the model's own dtype: transformers' own casts logits to fp32."""
    logits = model(input_ids=x).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def tokens(seed=0, shape=(4, 16), vocab=64):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, steps, first=0, move=lambda x: x):
    for k in range(first, first + steps):
        x = move(tokens(k))
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
