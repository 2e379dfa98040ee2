"""Blocks in the styles of public repositories, in torch alone: the judge moves their weights, as those of `plain`."""

import torch
from plain import HEADS, VOCABULARY, D, Expert, Model, attend, dense
from torch import nn
from torch.nn import functional as F


def split(*layers):
    """Return what layers make of a sequence, by heads."""
    return lambda x: [layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in layers]


class Attention(nn.Module):
    """What the attentions here share."""

    def __init__(self, **layers):
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v, self.proj = (dense(D, D) for _ in range(4))
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        q, k, v = split(self.q, self.k, self.v)(x)
        return self.proj((self.weights(q @ k.mT, x) @ v).transpose(1, 2).flatten(2))


class TalkingHeads(Attention):
    """Logits and weights of every head from those of all (x-transformers, CaiT)."""

    def __init__(self):
        super().__init__(mix=nn.Conv2d(HEADS, HEADS, 1, bias=False), proj_w=dense(HEADS, HEADS))

    def weights(self, scores, x):
        return self.proj_w(self.mix(scores).softmax(-1).movedim(1, -1)).movedim(-1, 1)


class DistanceBias(Attention):
    """A table of a number for each distance and head, under a name without "bias"."""

    def __init__(self):
        super().__init__(rel_pos=nn.Embedding(12, HEADS))

    def weights(self, scores, x):
        places = torch.arange(x.shape[1])
        return (scores + self.rel_pos((places[:, None] - places).clamp(0, 11)).movedim(-1, 0)).softmax(-1)


class Forgetting(Attention):
    """A gate for each head, by a layer whose name says nothing."""

    def __init__(self):
        super().__init__(fgate_proj=nn.Linear(D, HEADS))

    def weights(self, scores, x):
        past = F.logsigmoid(self.fgate_proj(x)).cumsum(1).mT
        return (scores + past[..., None] - past[:, :, None]).softmax(-1)


class OutputGate(Attention):
    """A gate of the outputs that is named as if it were one with the queries."""

    def __init__(self):
        super().__init__(q_gate=dense(D, D))

    def forward(self, x):
        return self.proj(attend(self.q(x), self.k(x), self.v(x)) * self.q_gate(x).sigmoid())


class Conformer(nn.Module):
    """A convolution's module: values and gates in one layer, a filter for each channel, and back."""

    def __init__(self):
        super().__init__()
        self.pointwise_conv1, self.pointwise_conv2 = nn.Conv1d(D, 96, 1), nn.Conv1d(48, D, 1)
        self.depthwise_conv = nn.Conv1d(48, 48, 3, padding=1, groups=48)

    def forward(self, x):
        return self.pointwise_conv2(F.silu(self.depthwise_conv(F.glu(self.pointwise_conv1(x.mT), 1)))).mT


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.freq = nn.Parameter(torch.ones(1, 16))

    def forward(self, x):
        return torch.sin(self.freq * x)


class SharedActivation(nn.Module):
    """One activation with factors of its own at two places of a sequence (Hyena's filter)."""

    def __init__(self):
        super().__init__()
        sine = Sine()
        self.net = nn.Sequential(dense(D, 16), sine, dense(16, 16), sine, dense(16, D))

    def forward(self, x):
        return self.net(x)


class GatedUnit(nn.Module):
    """Values and gates in one layer, and a layer for scores beside them (FLASH)."""

    def __init__(self):
        super().__init__()
        self.to_hidden = nn.Sequential(nn.Linear(D, 96), nn.SiLU())
        self.to_qk = nn.Sequential(nn.Linear(D, 16), nn.SiLU())
        self.to_out = nn.Sequential(nn.Linear(48, D), nn.Dropout(0.0))

    def forward(self, x):
        (v, gate), z = self.to_hidden(x).chunk(2, -1), self.to_qk(x)
        return self.to_out((F.relu(z @ z.mT).tril() / x.shape[1] @ v) * gate)


class Linear(nn.Module):
    """A layer of one's own, stored [inputs, outputs]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


class OwnLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = Linear(D, 48), Linear(48, D)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Experts(nn.Module):
    """Stacked experts, stored [experts, inputs, outputs]: x @ W."""

    def __init__(self, width=24):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.zeros(4, D, width)), nn.Parameter(torch.zeros(4, width, D))

    def forward(self, x):
        return F.gelu(x[..., None, :, :] @ self.w1) @ self.w2


class Stacked(nn.Module):
    """Experts of x-transformers' author; `width` is that of a hidden layer."""

    def __init__(self, width=24):
        super().__init__()
        self.experts, self.gate = Experts(width), dense(D, 4)

    def forward(self, x):
        return (self.gate(x).softmax(-1).mT[..., None] * self.experts(x)).sum(1)


class Square(Stacked):
    """As wide as the stream: the code shows which axis is which."""

    def __init__(self):
        super().__init__(D)


class Mixture(nn.Module):
    """Experts in a list whose name says nothing, chosen by what `score` makes of the gate's logits."""

    def __init__(self):
        super().__init__()
        self.gate, self.ffns = dense(D, 3), nn.ModuleList([Expert() for _ in range(3)])

    def forward(self, x):
        scores = self.score(self.gate(x)).unbind(-1)
        return sum(score[..., None] * expert(x) for score, expert in zip(scores, self.ffns, strict=True))


class Chosen(Mixture):
    def score(self, logits):
        return logits.softmax(-1)


class ReMoE(Mixture):
    def score(self, logits):
        return F.relu(logits)


class Softplus(Mixture):
    def score(self, logits):
        return F.softplus(logits)


class ByModule(Mixture):
    def __init__(self):
        super().__init__()
        self.score = nn.Sigmoid()


class ByCosine(Mixture):
    def forward(self, x):
        scores = F.linear(x, F.normalize(self.gate.weight, dim=-1)).softmax(-1).unbind(-1)
        return sum(score[..., None] * expert(x) for score, expert in zip(scores, self.ffns, strict=True))


class ManyGates(nn.Module):
    """A gate for each task, in a list."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList([dense(D, 3) for _ in range(2)])
        self.experts = nn.ModuleList([Expert() for _ in range(3)])

    def forward(self, x):
        outputs = torch.stack([expert(x) for expert in self.experts], -2)
        return sum((gate(x).softmax(-1)[..., None] * outputs).sum(-2) for gate in self.gates)


class ChannelMix(nn.Module):
    """RWKV's, with a square gate."""

    def __init__(self):
        super().__init__()
        self.key, self.receptance, self.value = dense(D, 80), dense(D, D), dense(80, D)

    def forward(self, x):
        return self.receptance(x).sigmoid() * self.value(F.relu(self.key(x)) ** 2)


class SigmoidCap(Model):
    """modded-nanogpt's logits."""

    def logits(self, x):
        return 30 * torch.sigmoid(self.lm_head(x) / 7.5)


def softcap(logits):
    return 5 * torch.tanh(logits / 5)


class HelpersCap(Model):
    def logits(self, x):
        return softcap(self.lm_head(x))


class CosineHead(Model):
    def logits(self, x):
        return 10 * F.linear(x, F.normalize(self.lm_head.weight, dim=-1))


class ScaledTokens(Model):
    """nGPT's factor for every token."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.sz = nn.Parameter(torch.ones(VOCABULARY))

    def logits(self, x):
        return self.sz * self.lm_head(x)
