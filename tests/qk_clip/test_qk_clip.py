"""QK-clip: the largest logits by their formula, and what a clip moves and what it leaves alone, on real models."""

import copy
import itertools
import pickle

import pytest
import torch
from models import EXTRA, loss_of, tiny, tokens
from numerics import FP32, relative
from torch import nn
from torch.nn import functional

import symlm
from symlm.qk_clip import QKClip, largest_logits
from symlm.qk_clip import logits as logits_module

KINDS = sorted(set(EXTRA) - {"llama4_text"})  # which normalizes without gains
DOUBLE = torch.float64


def dense(q, k, attends, scale):
    """The largest logits from the whole matrix of scores."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.mT * scale).masked_fill(~attends, -torch.inf)
    return scores.amax((0, 2, 3)).float()


@pytest.mark.parametrize("scores", [1, 300, 2**22])
@pytest.mark.parametrize("masked", ["no", "bool", "numbers", "by heads", "padding"])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3), (False, 2)])
def test_the_largest_logits_are_those_of_the_whole_matrix(monkeypatch, scores, masked, causal, window):
    monkeypatch.setattr(logits_module, "SCORES", scores)
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 9, 4, dtype=DOUBLE), torch.randn(2, 3, 11, 4, dtype=DOUBLE)
    attends = torch.ones(2, 6, 9, 11, dtype=torch.bool)
    place, other = torch.arange(9)[:, None] + 2, torch.arange(11)
    attends = attends & (other <= place) if causal else attends
    attends = attends & (other > place - window) if window else attends
    shape = {"by heads": (2, 6, 9, 11), "padding": (2, 11)}.get(masked, (2, 1, 9, 11))
    some = torch.rand(shape) > 0.5
    if masked != "no":
        attends = attends & (some[:, None, None] if masked == "padding" else some)
    mask = None if masked == "no" else some
    if masked == "numbers":
        mask = torch.zeros(shape).masked_fill_(~some, torch.finfo(torch.float32).min)
    found = largest_logits(q, k, mask, causal=causal, window=window, scale=0.3)
    assert torch.allclose(found, dense(q, k, attends, 0.3), rtol=FP32, atol=0)


def measured(model, clip, x):
    """Return the largest logits of a training forward pass."""
    loss_of(model, x)
    clip.clip()
    return clip.largest


def clipped(kind, share=0.5, dtype=torch.float32, **changes):
    """Return a model before and after a clip at a share of its first layer's largest logit."""
    model = tiny(kind, dtype, **changes)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    clip = QKClip(model, torch.optim.SGD(model.parameters(), 0.1), threshold=1e30)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: value.clone() for name, value in measured(model, clip, tokens()).items()}
    clip.threshold = share * float(first[clip.attentions[0].name].max())
    measured(model, clip, tokens())
    return model, clip, before, first


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_clip_the_largest_logit_is_the_threshold(kind):
    model, clip, before, first = clipped(kind)
    threshold, clip.threshold = clip.threshold, 1e30
    name = clip.attentions[0].name  # a later layer's inputs have changed
    after = measured(model, clip, tokens())[name]
    assert float(first[name].max()) == pytest.approx(2 * threshold, rel=1e-6)
    assert float(after.max()) == pytest.approx(threshold, rel=1e-5)
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved
    assert moved <= {tensor.name for attention in clip.attentions for tensor in attention.tensors}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"gpt_oss"}))  # whose sinks SDPA has no place for
def test_eager_and_sdpa_are_seen_alike(kind):
    found = []
    for implementation in ("eager", "sdpa"):
        model = tiny(kind)
        model.set_attn_implementation(implementation)
        clip = QKClip(model.train(), torch.optim.SGD(model.parameters(), 0.0))
        torch.manual_seed(0)
        found.append(torch.cat(list(measured(model, clip, tokens()).values())))
    assert torch.allclose(*found, rtol=1e-4)


LOUD = {  # the outputs of query 1 of a first layer, and with those of the key that it meets
    "llama": ("model.layers.0.self_attn", {"q_proj.weight": [(8, 16)], "k_proj.weight": [(0, 8)]}),
    "olmo2": ("model.layers.0.self_attn", {"q_norm.weight": [(8, 16)], "k_norm.weight": [(0, 8)]}),
    "phi3": ("model.layers.0.self_attn", {"qkv_proj.weight": [(8, 16), (32, 40)]}),
    "gpt2": ("transformer.h.0.attn", {"c_attn.weight": [(8, 16), (40, 48)], "c_attn.bias": [(8, 16), (40, 48)]}),
    "gpt_neox": (
        "gpt_neox.layers.0.attention",
        {"query_key_value.weight": [(24, 40)], "query_key_value.bias": [(24, 40)]},
    ),
}


@pytest.mark.parametrize("kind", LOUD)
def test_heads_below_the_threshold_stay_bit_for_bit(kind):
    """One query is made loud; the clip scales it and its key, and no other number of the model."""
    model, (attention, outputs) = tiny(kind, DOUBLE), LOUD[kind]
    watched(model)
    leaf, [(start, _), *_] = next(iter(outputs.items()))
    loud = model.get_parameter(f"{attention}.{leaf}").data
    (loud.T if kind == "gpt2" else loud)[start : start + 8] *= 50
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    clip = QKClip(model, torch.optim.SGD(model.parameters(), 0.0), threshold=1e30)
    logits = torch.cat(list(measured(model, clip, tokens()).values()))
    second, first = logits.sort().values[-2:].tolist()
    assert clip.largest[attention].argmax() == 1
    clip.threshold = (first + second) / 2
    measured(model, clip, tokens())
    for name, p in model.named_parameters():
        changed = (p != before[name]).float()
        rows = (changed.T if kind == "gpt2" and p.ndim == 2 else changed).flatten(1 if p.ndim > 1 else 0)
        rows = rows.amax(1) if p.ndim > 1 else rows
        allowed = torch.zeros(len(rows))
        for first_output, last in outputs.get(name.removeprefix(attention + "."), []):
            allowed[first_output:last] = 1
        assert (rows <= allowed).all(), name
        assert p.ndim == 1 or torch.equal(rows, allowed), name


def watched(model):
    """Put the model in training mode with no dropout, so that logits are measured and deterministic."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def test_of_latent_attention_the_shared_rotated_key_stays_and_the_query_part_before_it_takes_all():
    """Kimi K2's rule: √γ on both parts without rotation, γ on the query's rotated part, nothing on the shared key."""
    model, clip, before, first = clipped("deepseek_v3")
    gamma = (clip.threshold / first["model.layers.0.self_attn"]).clamp(max=1)
    now = dict(model.named_parameters())

    def ratio(leaf, rows, width):
        name = f"model.layers.0.self_attn.{leaf}.weight"
        return (now[name] / before[name]).unflatten(0, (4, rows))[:, :width].mean((1, 2)), (
            now[name] / before[name]
        ).unflatten(0, (4, rows))[:, width:].mean((1, 2))

    nope, rope = ratio("q_b_proj", 12, 8)
    key, value = ratio("kv_b_proj", 14, 8)
    assert relative(nope, gamma.sqrt()) < FP32
    assert relative(rope, gamma) < FP32
    assert relative(key, gamma.sqrt()) < FP32
    assert torch.equal(value, torch.ones_like(value))
    assert torch.equal(now[name := "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"], before[name])


def test_a_rotation_of_queries_and_keys_that_rope_allows_changes_no_clip():
    """One angle for each pair of frequencies, the same for q and k of a group: the clip commutes with it."""
    weights = []
    angles = torch.rand(2, 4, dtype=DOUBLE)  # a key head, a frequency

    def rotated(W, heads):
        W = W.unflatten(0, (heads, 2, 4))  # RoPE pairs an entry with that half a head further
        c, s = (f(angles).repeat_interleave(heads // 2, 0)[..., None] for f in (torch.cos, torch.sin))
        return torch.stack([c * W[:, 0] - s * W[:, 1], s * W[:, 0] + c * W[:, 1]], 1).flatten(0, 2)

    for moved in (False, True):
        model = tiny("llama", DOUBLE)
        q, k = (model.get_parameter(f"model.layers.0.self_attn.{x}_proj.weight").data for x in "qk")
        q.mul_(30)
        if moved:
            q.copy_(rotated(q, 4))
            k.copy_(rotated(k, 2))
        clip = QKClip(model, torch.optim.SGD(model.parameters(), 0.0), threshold=0.5)
        assert float(measured(model, clip, tokens())["model.layers.0.self_attn"].max()) > 0.6
        weights.append((q, k) if moved else (rotated(q, 4), rotated(k, 2)))
    for one, other in zip(*weights, strict=True):
        assert relative(one, other) < FP32  # logits are stored in fp32


def test_a_model_whose_logits_explode_goes_on_training():
    """Queries and keys at a rate far too high: without the clip the logits leave every bound, with it they do not."""
    ends = {}
    for threshold in (None, 20.0):
        model = tiny("llama")
        overrides = {role: {"lr": 2.0} for role in ("attention_q", "attention_k")}
        optimizer = symlm.SymOptimizer(model, 0.01, overrides=overrides)
        clip = QKClip(model, optimizer, threshold=threshold or 1e30)
        losses, largest = [], []
        for _ in range(40):
            optimizer.zero_grad()
            loss = loss_of(model, tokens())
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            largest.append(max(float(value.max()) for value in clip.largest.values()))
        ends[threshold] = losses[-1], largest[-1]
    assert ends[None][1] > 1000
    assert ends[20.0][1] < 200  # one step beyond the threshold
    assert ends[20.0][0] < ends[None][0] / 1.5


def test_every_counts_steps_and_is_resumed():
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    clip = QKClip(model, optimizer, threshold=1e-6, every=3)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    moved = []
    for _ in range(7):
        clip.threshold /= 10
        loss_of(model, tokens()).backward()
        optimizer.step()
        moved.append(not torch.equal(model.model.layers[0].self_attn.q_proj.weight, before))
        before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    assert moved == [True, False, False, True, False, False, True]
    assert clip.state_dict() == {"steps": 7}
    clip.load_state_dict({"steps": 8})
    clip.threshold /= 10
    loss_of(model, tokens())
    optimizer.step()
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
    loss_of(model, tokens())
    optimizer.step()
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


def test_batches_that_are_accumulated_count_together_and_evaluation_does_not():
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    clip = QKClip(model, optimizer, threshold=1e30)
    single = [
        torch.cat(list({k: v.clone() for k, v in measured(model, clip, tokens(seed)).items()}.values()))
        for seed in (1, 2)
    ]
    for seed in (1, 2):
        loss_of(model, tokens(seed))
    with torch.no_grad():
        loss_of(model.eval(), tokens(3) * 0)
    model.train()
    optimizer.step()
    assert torch.equal(torch.cat(list(clip.largest.values())), torch.maximum(*single))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_measures_the_same(reentrant):
    found = []
    for checkpointed in (False, True):
        model = tiny("llama")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        clip = QKClip(model, optimizer, threshold=0.02)
        loss_of(model, tokens()).backward()
        optimizer.step()
        found.append(torch.cat([*clip.largest.values(), model.model.layers[1].self_attn.q_proj.weight.flatten()]))
    assert torch.equal(*found)


class Plain(nn.Module):
    """An attention as people write it by hand, with scaled dot products and shared keys."""

    def __init__(self, scores=True):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim, self.scores = 4, 2, 8, scores
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(32, n, bias=True) for n in (32, 16, 16, 32))

    def forward(self, x):
        q, k, v = (w(x).unflatten(-1, (-1, 8)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        if self.scores:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = (q @ k.repeat_interleave(2, 1).mT).softmax(-1) @ v.repeat_interleave(2, 1)
        return self.wo(y.transpose(1, 2).flatten(2))


def test_an_attention_by_hand_is_clipped_with_its_biases():
    torch.manual_seed(0)
    model = nn.Sequential(Plain()).double()
    clip = QKClip(model, torch.optim.SGD(model.parameters(), 0.0), threshold=1e30)
    x = torch.randn(3, 10, 32, dtype=DOUBLE)
    largest = []
    for threshold in (1e30, None, 1e30):
        clip.threshold = threshold or largest[0] / 3
        model(x)
        clip.clip()
        largest.append(float(clip.largest["0"].max()))
    assert largest[2] == pytest.approx(largest[0] / 3, rel=1e-6)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_bf16_weights_are_clipped_and_their_stored_rounding_errors_too(rounding):
    model = tiny("llama").bfloat16()
    optimizer = symlm.SymOptimizer(model, 1e-12, rounding=rounding)
    clip = QKClip(model, optimizer, threshold=1e30)
    W = model.model.layers[0].self_attn.q_proj.weight
    loss_of(model, tokens()).backward()
    optimizer.step()
    clip.threshold = float(clip.largest["model.layers.0.self_attn"].max()) / 4
    exact = W.double() + optimizer.state[W].get("compensation", torch.zeros(())).double()
    loss_of(model, tokens())
    clip.clip()
    gamma = (clip.threshold / clip.largest["model.layers.0.self_attn"]).clamp(max=1).sqrt()
    wanted = exact * gamma.double().repeat_interleave(8)[:, None]
    got = W.double() + optimizer.state[W].get("compensation", torch.zeros(())).double()
    assert gamma.amin() < 0.6
    assert relative(got, wanted) < (1e-4 if rounding == "compensated" else 4e-3)


def test_logits_that_are_not_finite_scale_nothing():
    model = tiny("llama")
    q = model.model.layers[0].self_attn.q_proj.weight
    clip = QKClip(model, torch.optim.SGD(model.parameters(), 0.0), threshold=1e-3)
    with torch.no_grad():
        q[0] = torch.nan
    before = q.detach().clone()
    measured(model, clip, tokens())
    assert torch.equal(q[:8], before[:8]) or torch.equal(q[1:8], before[1:8])
    assert q[8:].isfinite().all()
    assert not torch.equal(q[8:], before[8:])


def test_removed_it_does_nothing():
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    clip = QKClip(model, optimizer, threshold=1e-6)
    clip.remove()
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, tokens()).backward()
    optimizer.step()
    assert all(itertools.starmap(torch.equal, zip(model.parameters(), before, strict=True)))
    assert clip.largest == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0}, "threshold must be a positive"),
        ({"threshold": -1.0}, "threshold must be a positive"),
        ({"threshold": float("nan")}, "threshold must be a positive"),
        ({"threshold": float("inf")}, "threshold must be a positive"),
        ({"threshold": True}, "threshold must be a positive"),
        ({"threshold": "100"}, "threshold must be a positive"),
        ({"every": 0}, "every must be a positive"),
        ({"every": 1.5}, "every must be a positive"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        QKClip(model, torch.optim.SGD(model.parameters(), 0.0), **arguments)


def test_models_without_logits_to_clip_are_refused():
    model = tiny("llama4_text")
    with pytest.raises(ValueError, match="normalized without gains"):
        QKClip(model, torch.optim.SGD(model.parameters(), 0.0))
    with pytest.raises(ValueError, match="QKClip can scale"):
        QKClip(nn.Linear(3, 3), torch.optim.SGD([torch.zeros(1)], 0.0))


def test_a_second_clip_of_a_model_is_refused_until_the_first_is_removed():
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    first = QKClip(model, optimizer)
    with pytest.raises(ValueError, match=r"self_attn has a clip already; call remove\(\)"):
        QKClip(model, optimizer)
    first.remove()
    second = QKClip(model, optimizer)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert len(second.largest) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_not_watched_and_brings_no_optimizer_with_it(copied):
    """As EMA wrappers make one, whose forward passes are not those of the step."""
    model = tiny("llama")
    optimizer = symlm.SymOptimizer(model)
    clip = QKClip(model, optimizer, 1e-4)
    other = copied(model)
    watches = [hook.__self__ for m in other.modules() for hook in m._forward_pre_hooks.values()]
    assert len(watches) == len(clip.watches)
    assert len(pickle.dumps(watches)) < 1_000
    loss_of(other, tokens()).backward()
    assert all(watch.largest is None for watch in (*watches, *clip.watches))
    its = symlm.SymOptimizer(other)
    own = QKClip(other, its, 1e-4)
    its.step()
    loss_of(other, tokens()).backward()
    its.step()
    assert max(S.max() for S in own.largest.values()) > 0


def test_an_attention_whose_logits_cannot_be_seen_says_so():
    model = nn.Sequential(Plain(scores=False))
    QKClip(model, torch.optim.SGD(model.parameters(), 0.0))
    with pytest.raises(RuntimeError, match="sees no attention logits in 0 "):
        model(torch.randn(1, 4, 32))


def test_a_forward_pass_that_raises_leaves_nothing_behind():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny("llama")
    QKClip(model, torch.optim.SGD(model.parameters(), 0.0))
    with pytest.raises(IndexError):
        model(input_ids=tokens() + 1000)
    model.model.layers[0].self_attn.o_proj.weight.data = torch.zeros(3, 3)
    with pytest.raises(RuntimeError):
        model(input_ids=tokens())
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
