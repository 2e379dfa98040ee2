"""Modules whose names say less than their sizes and their code, or something else."""

import torch
from plain import VOCABULARY, D, Model, dense
from plain_products import RelativeScores
from torch import nn
from torch.nn import functional as F


class GateNamedSecond(nn.Module):
    """A gated MLP in a well-known book: `fc2` is not the last."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = dense(D, 48), dense(D, 48), dense(48, D)

    def forward(self, x):
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


class LayersOfExperts(nn.Module):
    """Its experts: a list for each of their layers."""

    def __init__(self):
        super().__init__()
        self.gate = dense(D, 4)
        self.fc1, self.fc2 = (nn.ModuleList([dense(D, 24) for _ in range(4)]) for _ in range(2))
        self.fc3 = nn.ModuleList([dense(24, D) for _ in range(4)])

    def forward(self, x):
        scores = self.gate(x).softmax(-1).unbind(-1)
        layers = zip(scores, self.fc1, self.fc2, self.fc3, strict=True)
        return sum(score[..., None] * out(F.silu(gate(x)) * up(x)) for score, gate, up, out in layers)


class Adapter(nn.Module):
    """It goes down before it goes up."""

    def __init__(self):
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(D, 10), nn.Linear(10, D)

    def forward(self, x):
        return self.up_proj(F.gelu(self.down_proj(x)))


class OutFirst(nn.Module):
    """The layer out is written first."""

    def __init__(self):
        super().__init__()
        self.wo, self.wi = dense(48, D), dense(D, 48)

    def forward(self, x):
        return self.wo(F.gelu(self.wi(x)))


class ThirdOut(nn.Module):
    """Stacked experts of which `w3` leads out."""

    def __init__(self):
        super().__init__()
        self.gate = dense(D, 4)
        self.w1, self.w2 = (nn.Parameter(torch.zeros(4, D, 24)) for _ in range(2))
        self.w3 = nn.Parameter(torch.zeros(4, 24, D))

    def forward(self, x):
        x, scores = x[..., None, :, :], self.gate(x).softmax(-1).mT[..., None]
        return (scores * ((F.silu(x @ self.w1) * (x @ self.w2)) @ self.w3)).sum(1)


class GateAndUp(nn.Module):
    """Stacked experts whose gate and up are one tensor, under a name that does not say so."""

    def __init__(self):
        super().__init__()
        self.gate = dense(D, 4)
        self.w1, self.w2 = nn.Parameter(torch.zeros(4, D, 40)), nn.Parameter(torch.zeros(4, 20, D))

    def forward(self, x):
        scores, (gate, up) = self.gate(x).softmax(-1).mT[..., None], (x[..., None, :, :] @ self.w1).chunk(2, -1)
        return (scores * ((F.silu(gate) * up) @ self.w2)).sum(1)


class Deep(nn.Module):
    """Three layers one behind the other, without numbers."""

    def __init__(self):
        super().__init__()
        self.inp, self.hid, self.outp = dense(D, 48), dense(48, 20), dense(20, D)

    def forward(self, x):
        return self.outp(F.relu(self.hid(F.relu(self.inp(x)))))


class OutputOverDistances(RelativeScores):
    """An attention with a table of distances, whose last layer has the name of a head."""

    last = "output"


class TwoScores(nn.Module):
    """A router through a sigmoid, in a class that also calls a softmax."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = dense(D, 4), nn.ModuleList([GateNamedSecond() for _ in range(4)])

    def balance(self, x):
        return self.gate(x).softmax(-1).mean()

    def forward(self, x):
        scores = self.gate(x).sigmoid().unbind(-1)
        return sum(score[..., None] * expert(x) for score, expert in zip(scores, self.experts, strict=True))


class Down(nn.Module):
    """A gated convolution that leads back by a layer called `down`."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = dense(D, 48), dense(D, 48), dense(48, D)
        self.conv1d = nn.Conv1d(48, 48, 3, padding=2, groups=48)

    def forward(self, x):
        y = self.conv1d(self.up(x).mT)[..., : x.shape[1]].mT
        return self.down(F.silu(self.gate(x)) * y)


class AroundAStack(Model):
    """Projections in front of the blocks and behind them are no MLP (OPT, time series)."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.word = nn.Embedding(VOCABULARY, 12)
        del self.tok
        self.project_in, self.project_out, self.lm_head = dense(12, D), dense(D, 12), dense(12, VOCABULARY)

    def tok(self, ids):
        return self.project_in(self.word(ids))

    def logits(self, x):
        return self.lm_head(self.project_out(x))


class SharedTable(nn.Embedding):
    """A table that makes logits by itself (MPT)."""

    def forward(self, x, unembed=False):
        return F.linear(x, self.weight) if unembed else super().forward(x)


class Shared(Model):
    def __init__(self, *kinds):
        super().__init__(*kinds)
        del self.lm_head
        self.tok = SharedTable(VOCABULARY, D)

    def logits(self, x):
        return self.tok(x, unembed=True)


class Regularized(Model):
    """A z-loss feels a shift of the logits."""

    def logits(self, x):
        logits = self.lm_head(x)
        return logits + logits.logsumexp(-1, keepdim=True) * torch.eye(VOCABULARY, dtype=x.dtype)[0]
