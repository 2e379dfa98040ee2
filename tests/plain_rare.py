"""Layers in torch alone that few models have: the judge moves their weights, as those of `plain`."""

import plain
import torch
from plain import HEADS, D, dense
from torch import nn


class Pointwise(nn.Module):
    """An MLP of convolutions over single places, a filter for each channel between them."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv1d(D, 48, 1), nn.Conv1d(48, D, 1)
        self.dwconv, self.act = nn.Conv1d(48, 48, 3, padding=1, groups=48), nn.GELU()

    def forward(self, x):
        return self.fc2(self.act(self.dwconv(self.fc1(x.mT)))).mT


class Modulated(nn.Module):
    """A shift, a scale and a gate for each coordinate, from what the block is given."""

    def __init__(self):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 3 * D))
        self.mlp = nn.Sequential(nn.Linear(D, 48), nn.GELU(), nn.Linear(48, D))

    def forward(self, x):
        shift, scale, gate = self.adaLN_modulation(x.mean(1, keepdim=True)).chunk(3, -1)
        return gate * self.mlp((1 + scale) * x + shift)


class InFront(nn.Module):
    """Layers in front of torch's attention, and one behind it, with nothing between that they do not share."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.linear = (dense(D, D) for _ in range(4))
        self.attn = nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x):
        return self.linear(self.attn(self.q_proj(x), self.k_proj(x), self.v_proj(x), need_weights=False)[0])


class Wide(nn.Module):
    """A gated MLP that is as wide as the vocabulary is long."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = dense(D, plain.VOCABULARY), dense(plain.VOCABULARY, D), dense(D, plain.VOCABULARY)

    def forward(self, x):
        return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))


class Merged(nn.Module):
    """Two equal layers with numbers, behind a layer in a box of its own."""

    def __init__(self):
        super().__init__()
        self.merger, self.act = nn.ModuleDict({"layer": dense(D, D)}), nn.GELU()
        self.linear_1, self.linear_2 = dense(D, D), dense(D, D)

    def forward(self, x):
        return self.linear_2(self.act(self.linear_1(self.merger["layer"](x))))


class Normed(nn.Module):
    """A layer with a norm and an activation of its own, in front of a gated MLP."""

    def __init__(self):
        super().__init__()
        self.proj, self.norm, self.act1 = dense(D, D), nn.LayerNorm(D), nn.GELU()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = dense(D, 48), dense(D, 48), dense(48, D), nn.SiLU()

    def forward(self, x):
        x = self.act1(self.norm(self.proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
