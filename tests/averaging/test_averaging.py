"""Averages over steps: each is its formula, changes nothing that is trained, and resumes bit for bit."""

import copy

import pytest
import torch
from models import loss_of, tiny, tokens
from numerics import EXACT, relative
from torch import nn

import symlm
from symlm.averaging import EMANesterov, TailAverage

STEPS = 20


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def train(model, optimizer, steps, first=0, seen=None):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, tokens(step)).backward()
        optimizer.step()
        if seen is not None:
            seen.append(weights(model))


def made(make, dtype=torch.float64):
    model = tiny("qwen3", dtype=dtype)
    return model, make(model)


OPTIMIZERS = [
    lambda model: symlm.SymOptimizer(model, lr=0.02),
    lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_tail_average_is_its_formula_and_changes_nothing_that_is_trained(make):
    model, optimizer = made(make)
    average = TailAverage(optimizer, STEPS, start=0.5, horizon=0.2, share=0.6, excluded=())
    seen = []
    train(model, optimizer, STEPS, seen=seen)
    plain, other = made(make)
    train(plain, other, STEPS)
    assert all((a == b).all() for a, b in zip(weights(model), weights(plain), strict=True))
    expected = seen[9]  # behind the tenth step
    for W in seen[10:]:
        expected = [E + (w - E) / 4 for E, w in zip(expected, W, strict=True)]
    expected = [0.4 * w + 0.6 * E for w, E in zip(seen[-1], expected, strict=True)]
    before = weights(model)
    with average.applied():
        assert all(relative(p, E) < EXACT for p, E in zip(weights(model), expected, strict=True))
    assert all((a == b).all() for a, b in zip(weights(model), before, strict=True))
    average.finish()
    assert all(relative(p, E) < EXACT for p, E in zip(weights(model), expected, strict=True))


def test_the_embedding_is_left_out_of_a_tail_average():
    model, optimizer = made(OPTIMIZERS[0])
    average = TailAverage(optimizer, STEPS, horizon=0.3)
    train(model, optimizer, STEPS)
    before, head = model.model.embed_tokens.weight.detach().clone(), model.lm_head.weight.detach().clone()
    with average.applied():
        assert (model.model.embed_tokens.weight == before).all()
        assert not (model.lm_head.weight == head).all()


def test_before_the_tail_the_last_weights_are_evaluated():
    model, optimizer = made(OPTIMIZERS[1])
    average = TailAverage(optimizer, STEPS, start=0.8)
    train(model, optimizer, 10)
    before = weights(model)
    with average.applied():
        assert all((a == b).all() for a, b in zip(weights(model), before, strict=True))


def test_ema_nesterov_is_its_formula():
    """Against the iteration written for a quadratic, whose gradient is H(x + βm)."""
    torch.manual_seed(0)
    H, x = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    H, p = H @ H.mT, nn.Parameter(x.clone())
    optimizer = torch.optim.SGD([p], lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / 40)
    ahead = EMANesterov(optimizer, 40, reach=0.6, decay=0.8, start=0.1, until=0.75)
    m = torch.zeros_like(x)
    for step in range(40):
        rate = 0.02 * (1 - step / 40)
        beta = 0.6 * (1 - (step - 1) / 40) if 4 <= step < 30 else 0.0  # the last step's rate: its schedule comes later
        y = x + beta * m
        assert relative(p.detach(), y) < EXACT
        after = y - rate * H @ y
        m = 0.8 * m + 0.2 * (after - x)  # from the first step on, before it is used
        x = after
        p.grad = H @ p.detach()
        optimizer.step()
        schedule.step()
        with ahead.paused():
            assert relative(p.detach(), x) < EXACT


@pytest.mark.parametrize(
    ("make", "dtype"),
    [*((make, torch.float32) for make in OPTIMIZERS), (OPTIMIZERS[0], torch.bfloat16)],  # torch's own round states
)
def test_averages_resume_bit_for_bit(make, dtype, tmp_path):
    torch.manual_seed(0)

    def begin():
        model, optimizer = made(make, dtype)
        options = {"start": 0.2, "until": 0.7}
        return model, optimizer, (EMANesterov(optimizer, STEPS, **options), TailAverage(optimizer, STEPS, start=0.5))

    model, optimizer, parts = begin()
    train(model, optimizer, 12)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved["random"] = torch.get_rng_state()
    torch.save(copy.deepcopy(saved), tmp_path / "saved.pt")
    train(model, optimizer, 8, first=12)
    parts[1].finish()
    again, other, more = begin()
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    again.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    assert [part.steps for part in more] == [12, 12]
    torch.set_rng_state(loaded["random"])
    train(again, other, 8, first=12)
    more[1].finish()
    assert all((a == b).all() for a, b in zip(weights(model), weights(again), strict=True))


class Parts(nn.Module):
    """A part that the loss uses from the start, and one that it uses later, as an expert or unfrozen layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.early, self.late = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
        self.none = nn.Parameter(torch.zeros(0, dtype=torch.float64))

    def loss(self, step):
        used = (self.early, self.late, self.none) if step > 2 else (self.early,)
        return sum((p - step).square().sum() for p in used)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.SGD])
def test_a_parameter_whose_first_gradient_comes_late_is_stepped_and_averaged(make):
    """torch's optimizers begin a parameter where its state is empty: a mean in it must not stand in their way."""
    whole, plain = Parts(), Parts()
    optimizer, other = (make(model.parameters(), lr=0.1) for model in (whole, plain))
    ahead = EMANesterov(optimizer, 10, reach=0.0, decay=0.5, start=0.0, until=1.0)
    tail = TailAverage(optimizer, 10, start=0.1, horizon=0.2, share=1.0)
    expected, mean, before = None, torch.zeros(3, dtype=torch.float64), plain.late.detach().clone()
    for step in range(6):
        for model, one in ((whole, optimizer), (plain, other)):
            one.zero_grad()
            model.loss(step).backward()
            one.step()
        now = plain.late.detach().clone()
        expected = now if step == 0 else expected + (now - expected) / 2
        mean, before = mean.lerp(now - before, 0.5), now
    assert all((a == b).all() for a, b in zip(weights(whole), weights(plain), strict=True))
    assert relative(optimizer.state[whole.late]["mean_step"], mean) < EXACT
    with tail.applied():
        assert relative(whole.late.detach(), expected) < EXACT
    assert ahead.steps == tail.steps == 6


def test_a_rate_of_zero_looks_nowhere_ahead():
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.0)
    EMANesterov(optimizer, 10, start=0.0)
    p.grad = torch.ones(3)
    optimizer.step()
    assert (p == 1).all()


def test_momentum_grows_over_its_warm_up_and_not_beyond():
    """Against a run whose momentum is written by hand before every step."""
    model, optimizer = made(lambda m: symlm.SymOptimizer(m, lr=0.02, momentum=0.95, momentum_warmup=5))
    twin, by_hand = made(lambda m: symlm.SymOptimizer(m, lr=0.02, momentum=0.95))
    for step in range(1, 9):
        for group in by_hand.param_groups:
            group["momentum"] = 0.95 - 0.1 * max(0.0, 1 - step / 5)
        for each, its in ((model, optimizer), (twin, by_hand)):
            train(each, its, 1, first=step)
    assert all(relative(a, b) < EXACT for a, b in zip(weights(model), weights(twin), strict=True))
    assert {group["momentum"] for group in optimizer.param_groups} == {0.95}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: TailAverage(o, 0), "total_steps must be the number of the run's steps, got 0"),
        (lambda o: TailAverage(o, 10, start=1.5), "start must be from 0 to 1, got 1.5"),
        (lambda o: TailAverage(o, 10, share=float("nan")), "share must be from 0 to 1, got nan"),
        (lambda o: EMANesterov(o, 10, reach=-0.1), "reach must be from 0 to 1, got -0.1"),
        (lambda o: TailAverage(o, 10, excluded="embedding"), "excluded must be a collection of roles"),
        (lambda o: TailAverage(o, 10, excluded=("embeding",)), "unknown role 'embeding'; did you mean 'embedding'"),
        (lambda o: EMANesterov(o, 10, start=0.8, until=0.2), "start must be below until, got 0.8 and 0.2"),
        (lambda o: EMANesterov(o, 10, decay="0.9"), "decay must be from 0 to 1, got '0.9'"),
    ],
)
def test_what_no_average_can_use_is_named(make, message):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=message):
        make(optimizer)
