"""Modules whose code, and nothing else, says what happens to a layer's outputs."""

import torch
from plain import HEADS, VOCABULARY, WIDTH, D, Expert, Model, attend, dense
from torch import nn
from torch.nn import functional as F


class Router(nn.Module):
    """A router that holds its experts."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = dense(D, 4), nn.ModuleList([Expert() for _ in range(4)])

    def score(self, logits):
        return logits.softmax(-1)

    def forward(self, x):
        scores = self.score(self.gate(x)).unbind(-1)
        return sum(score[..., None] * expert(x) for score, expert in zip(scores, self.experts, strict=True))


class ExpertsChoose(Router):
    """Every expert chooses among the tokens."""

    def score(self, logits):
        return F.softmax(logits, dim=1)


class ExpertsChooseFromBehind(Router):
    def score(self, logits):
        return torch.softmax(logits, dim=-2, dtype=logits.dtype)


class Slots(Router):
    """Mixtures of tokens go to experts, and come back by another softmax of the same logits."""

    def forward(self, x):
        logits = self.gate(x)
        slots = torch.einsum("bte,btd->bed", logits.softmax(1), x)
        outputs = torch.stack([expert(slots[:, k]) for k, expert in enumerate(self.experts)], 1)
        return torch.einsum("bte,bed->btd", logits.softmax(-1), outputs)


class FlatTokens(Router):
    """The second axis is that of the experts here."""

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        scores = F.softmax(self.gate(flat), dim=1).unbind(-1)
        return sum(s[:, None] * expert(flat) for s, expert in zip(scores, self.experts, strict=True)).view(x.shape)


class Temperatures(Router):
    """A temperature for each expert."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def score(self, logits):
        return (logits * self.scale).softmax(-1)


class OneTemperature(Temperatures):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Normed(Router):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(4)

    def score(self, logits):
        return self.norm(logits).softmax(-1)


class Clamped(Router):
    def score(self, logits):
        return torch.softmax(logits.clamp(-0.5, 0.5), -1)


class ClampedHead(Model):
    def logits(self, x):
        y = self.lm_head(x)
        return torch.clamp(y, min=-0.5, max=0.5)


class NormedHead(Model):
    def logits(self, x):
        y = self.lm_head(x)
        return F.rms_norm(y, (y.shape[-1],))


class ActiveBefore(Model):
    """A sigmoid and a clamp in front of the head leave its logits alone."""

    def logits(self, x):
        return self.lm_head(x.clamp(-9, 9) * torch.sigmoid(x))


class Fused(nn.Module):
    """A fused projection: what follows says how its outputs are taken apart."""

    def __init__(self):
        super().__init__()
        self.n_head = HEADS
        self.qkv, self.proj = dense(D, 3 * D), dense(D, D)

    def parts(self, x):
        q, k, v = self.qkv(x).split(D, dim=2)
        return q, k, v

    def forward(self, x):
        return self.proj(attend(*(part.flatten(2) for part in self.parts(x))))


class BlocksOnAnAxis(Fused):
    def parts(self, x):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.n_head, x.shape[-1] // self.n_head).permute(2, 0, 1, 3, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        return q, k, v


class BlocksMapped(Fused):
    def parts(self, x):
        qkv = self.qkv(x).chunk(3, dim=-1)
        q, k, v = map(lambda part: part.unflatten(-1, (HEADS, WIDTH)), qkv)  # noqa: C417
        return q, k, v


class CausalSelfAttention(Fused):
    """Head by head, in a class with a well-known name."""

    def parts(self, x):
        heads = self.qkv(x).view(*x.shape[:2], self.n_head, 3 * WIDTH)
        q, k, v = heads.split(WIDTH, dim=-1)
        return q, k, v


class HeadsOnAnAxis(Fused):
    def parts(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, WIDTH)).unbind(-2)
        return q, k, v


class BlocksWhole(Fused):
    """Blocks on an axis, heads not yet."""

    def parts(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, D)).unbind(-2)
        return q, k, v


class BlocksOrHeads(Fused):
    """`[rows, tokens, 3, d]`, or `[tokens, heads, 3, width]`: the code does not say."""

    def parts(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:1], x.shape[1], 3, D).unbind(2)
        return q, k, v


class KeysFirst(Fused):
    def parts(self, x):
        k, q, v = self.qkv(x).chunk(3, dim=-1)
        return q, k, v


class KeysAndValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_kv, self.to_out = dense(D, D), dense(D, 2 * D), dense(D, D)

    def forward(self, x):
        k, v = self.to_kv(x).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(x), k, v))


class SelfAttention(nn.Module):
    """Megatron's: the queries of a group, then the key and the value that they share."""

    def __init__(self):
        super().__init__()
        self.num_attention_heads, self.num_query_groups, self.kv_channels = HEADS, 2, WIDTH
        self.linear_qkv, self.linear_proj = dense(D, 2 * D), dense(D, D)

    def forward(self, x):
        groups = self.linear_qkv(x).unflatten(-1, (2, 4, WIDTH))
        q, k, v = groups[..., :2, :], groups[..., 2:3, :], groups[..., 3:, :]
        k, v = (part.expand(*part.shape[:-2], 2, WIDTH) for part in (k, v))
        return self.linear_proj(attend(q.flatten(2), k.flatten(2), v.flatten(2)))


class Groups(nn.Module):
    """`groups` beside heads."""

    def __init__(self):
        super().__init__()
        self.heads, self.groups = HEADS, 2
        self.wq, self.wk, self.wv, self.wo = dense(D, D), dense(D, D // 2), dense(D, D // 2), dense(D, D)

    def forward(self, x):
        k, v = (layer(x).unflatten(-1, (2, WIDTH)).repeat_interleave(2, -2).flatten(2) for layer in (self.wk, self.wv))
        return self.wo(attend(self.wq(x), k, v))


class LettersFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_heads = HEADS
        self.qw, self.kw, self.vw, self.ow = (dense(D, D) for _ in range(4))

    def forward(self, x):
        return self.ow(attend(self.qw(x), self.kw(x), self.vw(x)))


class TwoMLPs(nn.Module):
    """One behind the other, in one module."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = dense(D, 48), dense(48, D), dense(D, 40), dense(40, D)

    def forward(self, x):
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.fc4(F.gelu(self.fc3(x)))


class LowRank(nn.Module):
    """A layer with the factors of an adapter beside it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = dense(inputs, outputs)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(4, inputs)), nn.Parameter(torch.zeros(outputs, 4))

    def forward(self, x):
        return self.linear(x) + x @ self.lora_A.T @ self.lora_B.T


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = LowRank(D, 48), LowRank(48, D)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Table(nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.emb = nn.Embedding(tokens, D)

    def forward(self, ids):
        return self.emb(ids)


class ReluSquared(nn.Module):
    """An activation of one's own, named by its class alone."""

    def forward(self, x):
        return x.clamp(min=0) ** 2


class Boxed(nn.Module):
    """An MLP as wide as the vocabulary is long, its first layer in a box."""

    def __init__(self):
        super().__init__()
        self.ff = nn.Sequential(
            nn.Sequential(dense(D, VOCABULARY), ReluSquared()), nn.LayerNorm(VOCABULARY), dense(VOCABULARY, D)
        )

    def forward(self, x):
        return self.ff(x)


class WrappedTokens(Model):
    """Tokens and positions in boxes of one class, and a head that is a layer, or a function where it is tied."""

    tie, squash = False, False

    def __init__(self, *kinds):
        super().__init__(*kinds)
        del self.tok, self.lm_head
        self.token, self.pos = Table(VOCABULARY), Table(64)
        if self.tie:
            self.to_logits = lambda x: x @ self.token.emb.weight.t()
        else:
            self.to_logits = nn.Linear(D, VOCABULARY, bias=False)

    def tok(self, ids):
        return self.token(ids) + self.pos(torch.arange(ids.shape[1]))

    def logits(self, x):
        y = self.to_logits(x)
        if self.squash:
            y = torch.tanh(y)
        return y


class WrappedTied(WrappedTokens):
    tie = True


class Untied(Model):
    """Code for a tied table stands behind that for the head that is there."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.to_out = self.lm_head
        del self.lm_head

    def logits(self, x):
        if hasattr(self, "to_out"):
            return self.to_out(x)
        return x @ self.tok.weight.t()


class NarrowHeads(nn.Module):
    """Heads narrower than the stream, a number of heads alone, and a gate of every head in a box."""

    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.to_qkv, self.to_out = dense(D, 3 * HEADS * 6), dense(HEADS * 6, D)
        self.to_v_gate = nn.Sequential(nn.Linear(D, HEADS), nn.Sigmoid())

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        heads = attend(q, k, v).unflatten(-1, (HEADS, -1)) * self.to_v_gate(x)[..., None]
        return self.to_out(heads.flatten(2))


class KeysBeside(KeysAndValues):
    """Queries in front of the parts of another layer."""

    def forward(self, x):
        qkv = (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1))
        q, k, v = map(lambda part: part * 1.0, qkv)  # noqa: C417
        return self.to_out(attend(q, k, v))


class Gaps(Router):
    """A list of experts beside one with a gap."""

    def __init__(self):
        super().__init__()
        self.gaps = nn.ModuleList([None, Expert()])


class LerpLinear(nn.Module):
    """A module whose name ends as a layer's, with the layer inside."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear, self.mu = dense(inputs, outputs), nn.Parameter(torch.zeros(inputs))

    def forward(self, x):
        return self.linear(x + (x.roll(1, 1) - x) * self.mu)


class ChannelMix(nn.Module):
    """RWKV's, with mixes in its layers."""

    def __init__(self):
        super().__init__()
        self.key, self.value, self.receptance = LerpLinear(D, 48), dense(48, D), LerpLinear(D, D)

    def forward(self, x):
        return self.receptance(x).sigmoid() * self.value(torch.relu(self.key(x)) ** 2)


class SigmoidElsewhere(Router):
    """A sigmoid of something else in the router's class."""

    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(1))

    def score(self, logits):
        return torch.sigmoid(self.strength) * logits.softmax(-1)


class BlocksScaled(Fused):
    def parts(self, x):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.n_head, -1).permute(2, 0, 1, 3, 4)
        q, k, v = qkv[0] * 0.7, qkv[1], qkv[2]
        return q, k, v
