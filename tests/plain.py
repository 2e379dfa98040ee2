"""Models in torch alone, by the names that people write, called as transformers' are: the judge moves their weights."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

D, HEADS, WIDTH, VOCABULARY = 32, 4, 8, 64


def dense(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def attend(q, k, v, heads=HEADS):
    """Return causal attention over heads, of [rows, length, channels]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return (scores.masked_fill(~mask, -1e9).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Lucid(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_k, self.to_v = (dense(D, D) for _ in range(3))
        self.to_out = nn.Sequential(dense(D, D), nn.Dropout(0.0))

    def forward(self, x):
        return self.to_out(attend(self.to_q(x), self.to_k(x), self.to_v(x)))


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(D), nn.Linear(D, 48), nn.GELU(), nn.Dropout(0.0), nn.Linear(48, D), nn.Dropout(0.0)
        )

    def forward(self, x):
        return self.net(x)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (dense(D, WIDTH) for _ in range(3))

    def forward(self, x):
        return attend(self.query(x), self.key(x), self.value(x), heads=1)


class MultiHead(nn.Module):
    """One module a head, as in a well-known lecture."""

    def __init__(self):
        super().__init__()
        self.heads, self.proj = nn.ModuleList([Head() for _ in range(HEADS)]), nn.Linear(D, D)

    def forward(self, x):
        return self.proj(torch.cat([head(x) for head in self.heads], -1))


class WithoutAName(nn.Module):
    """The output of the attention is the layer that is left."""

    def __init__(self):
        super().__init__()
        self.n_head = HEADS
        self.w_qs, self.w_ks, self.w_vs, self.fc = (dense(D, D) for _ in range(4))

    def forward(self, x):
        return self.fc(attend(self.w_qs(x), self.w_ks(x), self.w_vs(x)))


class Gated(nn.Module):
    """An output gate by channel."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate = (dense(D, D) for _ in range(5))

    def forward(self, x):
        return self.o_proj(self.gate(x).sigmoid() * attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class Interleaved(nn.Module):
    """A fused projection head by head, whose order the module states."""

    fused_order = "heads of q k v"

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = dense(D, 3 * D), dense(D, D)

    def forward(self, x):
        q, k, v = (part.flatten(2) for part in self.qkv(x).unflatten(-1, (HEADS, 3, WIDTH)).unbind(-2))
        return self.proj(attend(q, k, v))


class MLA(nn.Module):
    """Latent attention under the names of its authors, without positions."""

    def __init__(self):
        super().__init__()
        self.n_heads, self.q_lora_rank, self.kv_lora_rank = HEADS, 12, 16
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.qk_head_dim, self.v_head_dim = 8, 4, 12, 6
        self.wq_a, self.q_norm, self.wq_b = dense(D, 12), nn.RMSNorm(12), dense(12, HEADS * 12)
        self.wkv_a, self.kv_norm, self.wkv_b = dense(D, 16 + 4), nn.RMSNorm(16), dense(16, HEADS * (8 + 6))
        self.wo = dense(HEADS * 6, D)

    def queries(self, x):
        return self.wq_b(self.q_norm(self.wq_a(x)))

    def forward(self, x):
        latent, shared = self.wkv_a(x).split([16, 4], -1)
        k, v = self.wkv_b(self.kv_norm(latent)).unflatten(-1, (HEADS, -1)).split([8, 6], -1)
        k = torch.cat([k, shared[..., None, :].expand(*k.shape[:-1], 4)], -1)
        return self.wo(attend(self.queries(x), k.flatten(2), v.flatten(2)))


class OtherWidths(nn.Module):
    """torch's attention with keys and values of other widths."""

    def __init__(self):
        super().__init__()
        self.tokens, self.more_tokens = (nn.Parameter(torch.zeros(1, 5, n)) for n in (24, 16))
        self.cross = nn.MultiheadAttention(D, HEADS, bias=False, kdim=24, vdim=16, batch_first=True)

    def forward(self, x):
        k, v = (part.expand(len(x), -1, -1) for part in (self.tokens, self.more_tokens))
        return self.cross(x, k, v, need_weights=False)[0]


class FusedGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.w12, self.w3 = nn.Linear(D, 96), nn.Linear(48, D)

    def forward(self, x):
        gate, up = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * up)


class Square(nn.Module):
    """As wide as the stream: names say which layer leads out."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = dense(D, D), dense(D, D), dense(D, D)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = dense(D, 24), dense(24, D), dense(D, 24)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Gate(nn.Module):
    """A router that holds its weight itself, scored by sigmoids."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, D))

    def forward(self, x):
        return F.linear(x, self.weight).sigmoid()


class MoE(nn.Module):
    """Experts in a list."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = Gate(), nn.ModuleList([Expert() for _ in range(4)])

    def forward(self, x):
        return sum(score[..., None] * e(x) for score, e in zip(self.gate(x).unbind(-1), self.experts, strict=True))


class GroupedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.zeros(4, 24, D)) for _ in range(2))
        self.w2 = nn.Parameter(torch.zeros(4, D, 24))

    def forward(self, x):
        hidden = F.silu(torch.einsum("bld,ehd->bleh", x, self.w1)) * torch.einsum("bld,ehd->bleh", x, self.w3)
        return torch.einsum("bleh,edh->bled", hidden, self.w2)


class Grouped(nn.Module):
    """Experts in three tensors, and a router by its place beside them."""

    def __init__(self):
        super().__init__()
        self.experts, self.gating = GroupedExperts(), dense(D, 4)

    def forward(self, x):
        return (self.gating(x).softmax(-1)[..., None] * self.experts(x)).sum(-2)


class Flat(nn.Module):
    """A whole block in one module."""

    def __init__(self):
        super().__init__()
        self.n_heads = HEADS
        self.wq, self.wk, self.wv, self.wo = (dense(D, D) for _ in range(4))
        self.w1, self.w2, self.w3 = dense(D, 48), dense(48, D), dense(D, 48)
        self.norm = nn.RMSNorm(D)

    def forward(self, x):
        x = x + self.wo(attend(self.wq(x), self.wk(x), self.wv(x)))
        y = self.norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Model(nn.Module):
    """Tokens, two blocks of some layers each, and a head."""

    def __init__(self, *kinds):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCABULARY, is_encoder_decoder=False)
        self.config.get_text_config = lambda: self.config
        self.tok = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList([nn.ModuleList([kind() for kind in kinds]) for _ in range(2)])
        self.norms = nn.ModuleList([nn.RMSNorm(D) for _ in range(2 * len(kinds) + 1)])
        self.lm_head = dense(D, VOCABULARY)

    def forward(self, input_ids, labels):
        x, norms = self.tok(input_ids), iter(self.norms)
        for layer in (layer for block in self.layers for layer in block):
            x = x + layer(next(norms)(x))
        logits = self.logits(next(norms)(x))
        return SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))

    def logits(self, x):
        return self.lm_head(x)
