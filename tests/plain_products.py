"""Models whose matrices no layer holds, or that use one in two places: their code alone shows what multiplies what."""

import torch
from plain import HEADS, MLA, VOCABULARY, D, Expert, GroupedExperts, Model, attend, dense
from torch import nn
from torch.nn import functional as F


class TopKRouter(nn.Module):
    """A router that stores [d, experts] and multiplies by it from the left."""

    def __init__(self):
        super().__init__()
        self.w_gate = nn.Parameter(torch.zeros(D, 4))

    def forward(self, x):
        return (x @ self.w_gate).softmax(-1)


class Routed(nn.Module):
    """Experts in a list behind a router of its own class."""

    kind = TopKRouter

    def __init__(self):
        super().__init__()
        self.router, self.experts = self.kind(), nn.ModuleList([Expert() for _ in range(4)])

    def forward(self, x):
        return sum(score[..., None] * e(x) for score, e in zip(self.router(x).unbind(-1), self.experts, strict=True))


class RowsRouter(nn.Module):
    """A router that stores [experts, d], as torch's layers do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, D))

    def forward(self, x):
        return F.linear(x, self.weight).softmax(-1)


class RoutedByRows(Routed):
    kind = RowsRouter


class SigmoidRouter(TopKRouter):
    """The same, scored by sigmoids, in another order of the product."""

    def forward(self, x):
        return torch.einsum("bld,de->ble", x, self.w_gate).sigmoid()


class RoutedBySigmoid(Routed):
    kind = SigmoidRouter


class Shazeer(nn.Module):
    """The router's weight and that of its noise stand beside the experts, stored [d, experts]."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([Expert() for _ in range(4)])
        self.w_gate, self.w_noise = (nn.Parameter(torch.zeros(D, 4)) for _ in range(2))

    def forward(self, x):
        noise = torch.linspace(-1, 1, 4, dtype=x.dtype)
        scores = (x @ self.w_gate + noise * F.softplus(x @ self.w_noise)).softmax(-1)
        return sum(score[..., None] * e(x) for score, e in zip(scores.unbind(-1), self.experts, strict=True))


class ConditionalFeedForward(GroupedExperts):
    """Stacked experts in a class whose name does not say so (gpt-fast)."""


class MOEFeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.cond_ffn = dense(D, 4), ConditionalFeedForward()

    def forward(self, x):
        return (self.gate(x).softmax(-1)[..., None] * self.cond_ffn(x)).sum(-2)


class StacksAndRouter(nn.Module):
    """Stacked experts and their router's weight in one module, all stored [inputs, outputs]."""

    def __init__(self):
        super().__init__()
        self.gate_weight = nn.Parameter(torch.zeros(D, 4))
        self.w1, self.w2 = nn.Parameter(torch.zeros(4, D, 24)), nn.Parameter(torch.zeros(4, 24, D))

    def forward(self, x):
        scores = (x @ self.gate_weight).softmax(-1)
        return (scores.mT[..., None] * (F.gelu(x[..., None, :, :] @ self.w1) @ self.w2)).sum(1)


class Primer(nn.Module):
    """A filter for each channel of q, k and v behind their layers: no channel of a head rotates."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (dense(D, D) for _ in range(4))
        self.q_dconv, self.k_dconv, self.v_dconv = (nn.Conv1d(D, D, 3, padding=2, groups=D) for _ in range(3))

    def forward(self, x):
        filters = (self.q_dconv, self.k_dconv, self.v_dconv)
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(layer(x).mT)[..., : x.shape[1]].mT for f, layer in zip(filters, layers, strict=True))
        return self.o_proj(attend(q, k, v))


class Filter(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Conv1d(D, D, 3, padding=2, groups=D)

    def forward(self, x):
        return self.filter(x.mT)[..., : x.shape[1]].mT


class PrimerInBoxes(nn.Module):
    """The same, a layer and its filter in one sequence."""

    def __init__(self):
        super().__init__()
        self.n_heads = HEADS
        self.query, self.key, self.value = (nn.Sequential(dense(D, D), Filter()) for _ in range(3))
        self.output = dense(D, D)

    def forward(self, x):
        return self.output(attend(self.query(x), self.key(x), self.value(x)))


class RelativeScores(nn.Module):
    """A table of distances, of which the queries make scores."""

    last = "out"

    def __init__(self):
        super().__init__()
        self.n_heads = HEADS
        self.q, self.k, self.v = (dense(D, D) for _ in range(3))
        setattr(self, self.last, dense(D, D))
        self.rel_emb = nn.Embedding(12, D // HEADS)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        places = torch.arange(x.shape[1])
        distances = (places[:, None] - places).clamp(0, 11).expand(*q.shape[:2], -1, -1)
        scores = q @ k.mT + (q @ self.rel_emb.weight.T).gather(-1, distances)
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return getattr(self, self.last)((scores.masked_fill(~mask, -1e9).softmax(-1) @ v).transpose(1, 2).flatten(2))


class LatentWithoutRank(MLA):
    """Latent attention under its authors' names, whose queries have no rank of their own."""

    def __init__(self):
        super().__init__()
        del self.wq_a, self.q_norm, self.wq_b
        self.q_lora_rank, self.wq = 0, dense(D, HEADS * 12)

    def queries(self, x):
        return self.wq(x)


class DeepHead(Model):
    """A head that is an MLP."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.lm_head = nn.Sequential(dense(D, 48), nn.GELU(), dense(48, VOCABULARY))


class Headless(Model):
    """The table of tokens makes the logits too."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        del self.lm_head

    def logits(self, x):
        return F.linear(x, self.tok.weight)


class TiedByTranspose(Headless):
    def logits(self, x):
        return x @ self.tok.weight.T


class TiedByCast(Headless):
    """Whisper's."""

    def logits(self, x):
        return x @ torch.transpose(self.tok.weight.to(x.dtype), 0, 1)


class TiedByEinsum(Headless):
    def logits(self, x):
        weight = self.tok.weight
        return torch.einsum("bld,vd->blv", x, weight)


class Reader(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return F.linear(x, self.table.weight)


class TiedByModule(Headless):
    """A head that holds the table."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.head = Reader(self.tok)

    def logits(self, x):
        return self.head(x)


class TiedParameter(Headless):
    """A table that no layer holds."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        del self.tok
        self.tok_emb = nn.Parameter(torch.zeros(VOCABULARY, D))

    def tok(self, ids):
        return self.tok_emb[ids]

    def logits(self, x):
        return x @ self.tok_emb.T


class MixedTokens(Model):
    """What is fed back is a mean of tokens: their table is a table still."""

    def logits(self, x):
        return self.lm_head(x + self.lm_head(x).softmax(-1) @ self.tok.weight)


class NarrowTable(Model):
    """A table that is narrower than the stream, and its layer into it (ALBERT, Transformer-XL)."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.word = nn.Embedding(VOCABULARY, 12)
        self.tok = nn.Sequential(self.word, dense(12, D))


class ListOfProjections(Headless):
    """Transformer-XL's matrix between a narrower table and the stream, on both sides."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.word, self.emb_projs = nn.Embedding(VOCABULARY, 12), nn.ParameterList([torch.zeros(D, 12)])
        del self.tok

    def tok(self, ids):
        return F.linear(self.word(ids), self.emb_projs[0])

    def logits(self, x):
        return F.linear(x @ self.emb_projs[0], self.word.weight)


class MultiToken(Model):
    """A second prediction from the next token's embedding, in a dictionary of layers (DeepSeek)."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.mtp = nn.ModuleDict(
            {
                "enorm": nn.RMSNorm(D),
                "hnorm": nn.RMSNorm(D),
                "eh_proj": dense(2 * D, D),
                "block": kinds[0](),
                "shared_head": dense(D, VOCABULARY),
            }
        )

    def logits(self, x):
        mtp = self.mtp
        joined = mtp["eh_proj"](torch.cat([mtp["enorm"](x.roll(1, 1)), mtp["hnorm"](x)], -1))
        return self.lm_head(x) + mtp["shared_head"](joined + mtp["block"](joined))
