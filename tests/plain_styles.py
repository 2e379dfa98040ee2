"""Modules in the styles of public code, in which the code shows what names, classes and neighbours hide."""

import torch
from plain import HEADS, VOCABULARY, D, Model, attend, dense
from torch import nn
from torch.nn import functional as F


class SigmoidGated(nn.Module):
    """A gated MLP beside a gate of the whole (torchtitan's shared experts), all as wide as the stream."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3, self.gate = dense(D, D), dense(D, D), dense(D, D), dense(D, 1)

    def forward(self, x):
        return torch.sigmoid(self.gate(x)) * self.w2(F.silu(self.w1(x)) * self.w3(x))


class OutSecond(nn.Module):
    """Numbers in another order than that of the code (Lumina, Mixtral's w1 to w3)."""

    def __init__(self):
        super().__init__()
        self.linear_1, self.linear_2, self.linear_3 = dense(D, 48), dense(48, D), dense(D, 48)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)) * self.linear_3(x))


class Conditioned(nn.Module):
    """An MLP beside a layer that is none of its own (ConvNext blocks of diffusion models)."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.mapper = dense(D, 48), dense(48, D), dense(D, D)
        self.act = nn.GELU()

    def forward(self, x):
        return self.second(self.act(self.first(x + self.mapper(x))))


class TwiceAsWide(nn.Module):
    """Into twice the width and on in it (PixArt, FunASR)."""

    def __init__(self):
        super().__init__()
        self.linear_1, self.linear_2 = dense(20, 40), dense(40, 40)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x[..., :20])))[..., :D]


class Projection(nn.Module):
    """A layer in a class of one's own."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x):
        return F.linear(x, self.weight)


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Projection(D, D) for _ in range(4))

    def forward(self, x):
        return self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class OwnMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = Projection(D, 48), Projection(48, D)

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x)))


class GroupedExperts(nn.Module):
    """Names with the axes at their end (torchtitan)."""

    def __init__(self):
        super().__init__()
        self.w1_EFD, self.w3_EFD = (nn.Parameter(torch.zeros(4, 24, D)) for _ in range(2))
        self.w2_EDF = nn.Parameter(torch.zeros(4, D, 24))

    def forward(self, x):
        x = x[..., None, :, :]
        return (F.silu(x @ self.w1_EFD.mT) * (x @ self.w3_EFD.mT)) @ self.w2_EDF.mT


class ByOption(nn.Module):
    """A router whose score is an option: the branch that is on counts."""

    score_func = "softmax"

    def __init__(self):
        super().__init__()
        self.gate, self.experts = dense(D, 4), GroupedExperts()

    def score(self, logits):
        if self.score_func == "sigmoid":
            return torch.sigmoid(logits)
        elif self.score_func == "softmax":
            return logits.softmax(-1)

    def forward(self, x):
        return (self.score(self.gate(x)).mT[..., None] * self.experts(x)).sum(1)


class ByOptionSigmoid(ByOption):
    score_func = "sigmoid"


class Capped(nn.Linear):
    """A head that caps its own logits."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


class CapsItself(Model):
    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.lm_head = Capped(D, VOCABULARY, bias=False)


class TiedLayer:
    """No module, but it makes logits of a table."""

    def __init__(self, table):
        self.tied = table

    def __call__(self, x):
        return F.linear(x, self.tied.weight)


class TiedByObject(Model):
    def __init__(self, *kinds):
        super().__init__(*kinds)
        del self.lm_head
        self.lm_head = TiedLayer(self.tok)


class Logits(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight, self.norm = weight, nn.LayerNorm(D)

    def forward(self, x):
        return F.linear(self.norm(x), self.weight)


class TiedByParameter(Model):
    """A module with a table's own parameter (fairseq, ESM)."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.lm_head = Logits(self.tok.weight)


class VocabParallelEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(VOCABULARY, D))

    def forward(self, ids):
        return F.embedding(ids, self.weight)


class ColumnParallelLinear(Projection):
    """Its product is in a helper, as Megatron's."""

    def forward(self, x):
        return product(x, self.weight)


def product(x, weight):
    return F.linear(x, weight)


class ParallelEnds(Model):
    """Tables and layers in the classes of tensor parallel code (Megatron, Llama, DeepSeek)."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.tok, self.lm_head = VocabParallelEmbedding(), ColumnParallelLinear(D, VOCABULARY)


class Recurrent(nn.Module):
    """A layer that reads the channels of a recurrence."""

    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(D, 20, batch_first=True, bias=False), dense(20, D)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


class Around(Model):
    """Three layers around a stack activate nothing."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.enter, self.into, self.back = dense(D, D), dense(D, 24), dense(24, D)

    def logits(self, x):
        return self.lm_head(self.back(self.into(self.enter(x))))
