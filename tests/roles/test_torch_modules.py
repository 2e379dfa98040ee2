"""Models of torch alone, by the names of nobody or of well-known trainers: every parameter has its role, and steps."""

import pytest
import torch
from torch import nn

import symlm

D, HEADS, VOCABULARY = 16, 2, 40


class Attention(nn.Module):
    """torchtitan's names."""

    def __init__(self):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = HEADS, 1, D // HEADS
        self.wq, self.wo = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.wk, self.wv = (nn.Linear(D, self.head_dim, bias=False) for _ in range(2))

    def forward(self, x):
        q = self.wq(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (layer(x)[:, None].expand_as(q) for layer in (self.wk, self.wv))
        return self.wo(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(D, 24), nn.Linear(24, D), nn.Linear(D, 24)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class TitanBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(D), nn.RMSNorm(D)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class CausalSelfAttention(nn.Module):
    """litgpt's names."""

    def __init__(self):
        super().__init__()
        self.n_head, self.n_query_groups, self.head_size = HEADS, HEADS, D // HEADS
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LLaMAMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc_1, self.fc_2, self.proj = nn.Linear(D, 24), nn.Linear(D, 24), nn.Linear(24, D)

    def forward(self, x):
        return self.proj(nn.functional.silu(self.fc_1(x)) * self.fc_2(x))


class LitBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.attn, self.norm_2, self.mlp = (
            nn.LayerNorm(D),
            CausalSelfAttention(),
            nn.LayerNorm(D),
            LLaMAMLP(),
        )

    def forward(self, x):
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Model(nn.Module):
    """Tokens, blocks and a head."""

    def __init__(self, block, tokens="tok_embeddings", head="output"):
        super().__init__()
        setattr(self, tokens, nn.Embedding(VOCABULARY, D))
        self.layers = nn.ModuleList([block(), block()])
        setattr(self, head, nn.Linear(D, VOCABULARY, bias=False))
        self.ends = tokens, head

    def forward(self, ids):
        x = getattr(self, self.ends[0])(ids)
        for layer in self.layers:
            x = layer(x, x) if isinstance(layer, nn.TransformerDecoderLayer) else layer(x)
        return getattr(self, self.ends[1])(x)


class Vision(nn.Module):
    """A plain image classifier: convolutions, norms, a layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(2, 8)),
            *(nn.ReLU(), nn.Conv2d(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.classifier = nn.Linear(12, 5)

    def forward(self, images):
        return self.classifier(self.features(images))


def encoder():
    return nn.TransformerEncoderLayer(D, HEADS, 24, batch_first=True)


def decoder():
    return nn.TransformerDecoderLayer(D, HEADS, 24, batch_first=True)


QKV = {"attention_qkv", "attention_o", "mlp_in", "mlp_out", "vector", "embedding", "lm_head"}
APART = (QKV - {"attention_qkv"}) | {"attention_q", "attention_k", "attention_v"}
MODELS = {
    "torchtitan": (lambda: Model(TitanBlock), APART, "layers.0.feed_forward.w2.weight", "mlp_out"),
    "litgpt": (lambda: Model(LitBlock, "wte", "lm_head"), QKV, "layers.1.mlp.fc_2.weight", "mlp_in"),
    "nn.TransformerEncoderLayer": (lambda: Model(encoder), QKV, "layers.0.self_attn.in_proj_weight", "attention_qkv"),
    "nn.TransformerDecoderLayer": (
        *(lambda: Model(decoder), QKV, "layers.0.multihead_attn.in_proj_weight", "attention_qkv"),
    ),
    "vision": (Vision, {"matrix", "vector"}, "features.3.weight", "vector"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_without_transformers_are_placed_and_train(kind):
    torch.manual_seed(0)
    made, roles, name, role = MODELS[kind]
    model = made()
    found = symlm.assign_roles(model)
    assert set(map(str, found.values())) == roles
    assert found[name] == role
    optimizer = symlm.SymOptimizer(model, lr=0.02)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    x = torch.randn(4, 3, 8, 8) if kind == "vision" else torch.randint(VOCABULARY, (4, 8))
    model(x).log_softmax(-1)[..., 0].square().mean().backward()
    optimizer.step()
    still = {key for key, p in model.named_parameters() if p.ndim > 1 and torch.equal(p, before[key])}
    assert not still


class Bare(nn.Module):
    """Two layers with something between them that no word names."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 24), nn.Linear(24, D)

    def forward(self, x):
        return x + self.down(self.up(x) ** 2)


def test_shapes_say_what_no_name_does():
    roles = symlm.assign_roles(Model(Bare))
    assert {str(roles[f"layers.{k}.{name}.weight"]) for k in (0, 1) for name in ("up", "down")} == {"mlp_in", "mlp_out"}
