"""The benchmark's model: GPT-2's shape with RMS norms, rotated and normalized queries and keys, and squared ReLUs.

Source: modded-nanogpt, records/track_3_optimization, its baseline of 2026-06-11.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST_WAVE = 1024  # the base of the rotation's frequencies
TEMPERATURE = 0.12  # the factor on the products of unit-RMS queries and keys


@dataclass
class ModelConfig:
    """The network; its defaults are the benchmark's, and a figure is comparable with no others.

    Args:
        vocab_size: rows of embedding and head, the GPT-2 tokenizer's 50,257 padded.
        layers: blocks.
        width: of the residual stream.
        head_dim: of an attention head.
        logit_cap: the bound of the logits.
    """

    vocab_size: int = 50304
    layers: int = 12
    width: int = 768
    head_dim: int = 128
    logit_cap: float = 15.0

    def __post_init__(self) -> None:
        if self.width % self.head_dim or self.head_dim % 4:
            raise ValueError(f"model.width {self.width} is in heads of {self.head_dim}, and these in four equal parts")


class Linear(nn.Linear):
    """A layer whose fp32 weights are cast to the activations' dtype: the model computes in the embedding's bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x), self.bias.type_as(x))


class RMSNorm(nn.Module):
    """`x / RMS(x)` times a gain an entry, in the activations' dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.gains.shape, self.gains.type_as(x))


def half_truncated_frequencies(head_dim: int) -> Tensor:
    """Return radians a token of each pair of entries, from 1 down to 1/1024; half of the pairs do not rotate.

    Shapes: (head_dim/2,).
    """
    rotating = LONGEST_WAVE ** -torch.linspace(0, 1, head_dim // 4)
    return torch.cat([rotating, torch.zeros_like(rotating)])


def rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotate entries k and k + d/2 of each head together, clockwise, by position times frequency, in fp32.

    Shapes: (b, t, heads, d), (d/2,) -> (b, t, heads, d).
    """
    angles = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=torch.float32), frequencies)[:, None]
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal attention over whole sequences; queries and keys have RMS 1 before they are rotated."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(width, width) for _ in range(4))
        self.register_buffer("frequencies", half_truncated_frequencies(head_dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(F.rms_norm(each, (self.head_dim,)), self.frequencies) for each in (q, k))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=TEMPERATURE)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """`down(relu(up(x))²)`, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, head_dim), RMSNorm(width)
        self.mlp, self.mlp_norm = MLP(width), RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """The model; `config.logit_cap` says to `symlm.assign_roles` that its head is capped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width, dtype=torch.bfloat16)
        self.embed_norm = RMSNorm(config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.head_dim) for _ in range(config.layers))
        self.head_norm = RMSNorm(config.width)
        self.lm_head = Linear(config.width, config.vocab_size)
        self.apply(initialize_)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the next-token losses, in nats.

        Logits are capped by `c·x / √(x² + c²)`.

        Shapes: (b, t), (b, t) -> ().
        """
        x = self.embed_norm(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        logits, cap = self.lm_head(self.head_norm(x)).float(), self.config.logit_cap
        capped = cap * logits * torch.rsqrt(logits.square() + cap**2)
        return F.cross_entropy(capped.flatten(0, 1), targets.flatten(), reduction="sum")


@torch.no_grad()
def initialize_(module: nn.Module) -> None:
    """Initialize one module: what writes to the stream and the head are zero, other layers normal with 0.33/inputs."""
    if isinstance(module, Linear):
        module.bias.zero_()
        module.weight.normal_(std=(0.33 / module.in_features) ** 0.5)
    elif isinstance(module, nn.Embedding):
        module.weight.normal_()
    for name in ("o_proj", "down_proj", "lm_head"):  # a module comes after its layers
        if isinstance(layer := getattr(module, name, None), Linear):
            layer.weight.zero_()
