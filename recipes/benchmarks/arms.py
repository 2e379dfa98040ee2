"""What is timed by `benchmark_step.py`: models with gradients, and the steps of symlm and of its peers on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import symlm

NOISE = 1e-3
PERIOD = 4  # of the arm that computes a head's Gram matrix every fourth step
MUON, FOREACH, FUSED = "torch.optim.Muon + AdamW, fp32", "foreach AdamW", "fused AdamW"
ADAMW_BYTES = 7 * 4  # an entry: gradient, weight and two means are read, the last three written


def qwen3(layers: int, vocabulary: int, hidden: int = 1024) -> nn.Module:
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        head_dim=min(128, hidden // 2),
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config)


class Many(nn.Module):
    """200 matrices of 256 × 256, or of another side, and an embedding of 32 times as many rows."""

    def __init__(self, side: int = 256) -> None:
        super().__init__()
        self.roles = {"embedding.weight": "embedding", "layers.*": "matrix"}
        self.embedding = nn.Embedding(32 * side, side)
        self.layers = nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(200))


@dataclass
class Arm:
    """Hold a step, after how many it repeats itself, and the operations and bytes that it must spend."""

    step: Callable[[], object]
    operations: int
    bytes: int
    period: int = 1


def arms_of(model: nn.Module) -> dict[str, Arm]:
    """Return the arms of a model, which gets random gradients.

    Their states share memory, since a value costs no time; the matrices' momenta of torch.optim.Muon are beside them.
    """
    for p in model.parameters():
        p.grad = torch.randn_like(p) * NOISE
    roles, parameters = getattr(model, "roles", None), list(model.parameters())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    fused, foreach = (torch.optim.AdamW(parameters, lr=1e-3, **{how: True}) for how in ("fused", "foreach"))
    adamw, muon = torch.optim.AdamW(rest, lr=1e-3, fused=True), torch.optim.Muon(matrices, lr=0.02)
    fp32 = {"schedule": "muon", "polar_method": "newton_schulz", "compute_dtype": "float32", "nesterov": True}
    ours = {
        "symlm default": symlm.SymOptimizer(model, roles=roles),
        f"symlm default, gram_every={PERIOD}": symlm.SymOptimizer(model, roles=roles, gram_every=PERIOD),
        "symlm muon": symlm.SymOptimizer(model, preset="muon", roles=roles, **fp32),
    }
    fused.step()
    for optimizer in (foreach, adamw, *ours.values()):
        optimizer.state = fused.state
    every = {"lm_head": {"gram_every": PERIOD}}
    floors = [least(model), least(model, overrides=every if roles is None else None), least(model, "muon")]
    arms = {name: Arm(opt.step, *floor) for (name, opt), floor in zip(ours.items(), floors, strict=True)}
    arms[f"symlm default, gram_every={PERIOD}"].period = PERIOD
    adamw_bytes = ADAMW_BYTES * sum(p.numel() for p in parameters)
    return {
        **arms,
        MUON: Arm(muon_in_fp32(muon, adamw), *floors[-1]),
        FOREACH: Arm(foreach.step, 0, adamw_bytes),
        FUSED: Arm(fused.step, 0, adamw_bytes),
    }


def least(model: nn.Module, preset: str = "default", **options: Any) -> tuple[int, int]:
    """Return the operations of a step's products, and the bytes of one pass over what it stores."""
    rows = symlm.describe_routing(model, preset=preset, roles=getattr(model, "roles", None), **options)
    return sum(row.operations for row in rows), sum(row.bytes for row in rows)


def muon_in_fp32(muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> Callable[[], None]:
    """Return the step of torch.optim.Muon and AdamW, whose products are in fp32 as all others' here are."""

    def step() -> None:
        with patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
            muon.step()
        adamw.step()

    return step
