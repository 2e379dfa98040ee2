"""Rounding in a captured step: a replay repeats Python's seed, and a count of steps on the device moves the bits on."""

import pytest
import torch
from torch import nn

import symlm
from symlm.update import rounding
from symlm.update.rounding import bits_at, stochastic_round


def test_bits_are_even_and_differ_by_place_seed_and_count():
    x, counts = torch.empty(500, 400), [torch.tensor(float(t)) for t in range(3)]
    drawn = [bits_at(x, seed, t) for seed in (0, 1, 2**32 - 1) for t in counts]
    assert torch.equal(drawn[0], bits_at(x, 0, counts[0]))
    for k, bits in enumerate(drawn):
        unit = bits.double() / 2**16
        assert 0 <= unit.min() < 1e-4 < 0.9999 < unit.max() < 1
        assert unit.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / x.numel()) ** 0.5)
        columns = torch.corrcoef(torch.stack([unit.flatten()[:-1], unit.flatten()[1:]]))
        assert columns[0, 1].abs() < 5 / x.numel() ** 0.5
        for other in drawn[:k]:
            pair = torch.corrcoef(torch.stack([bits.double().flatten(), other.double().flatten()]))
            assert pair[0, 1].abs() < 5 / x.numel() ** 0.5
    for bit in range(16):
        assert (drawn[0] >> bit & 1).double().mean().item() == pytest.approx(0.5, abs=2.5 / x.numel() ** 0.5)


def test_rounding_by_a_count_has_the_exact_mean():
    x = torch.full((200_000,), 1 + 2**-10)  # an eighth of the step between bf16 numbers at 1
    rounded = stochastic_round(x, 7, torch.tensor(3.0)).double()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert rounded.mean().item() == pytest.approx(1 + 2**-10, abs=5 * 2**-7 * (7 / 64 / x.numel()) ** 0.5)


def replayed(monkeypatch, vector, steps=3):
    """Return a bf16 weight's moves in steps that see one number of the step, as a graph's replays do."""
    monkeypatch.setattr(rounding, "is_captured", lambda x: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=vector)).bfloat16()
    optimizer = symlm.SymOptimizer(model, lr=1e-4, roles={"*weight": "matrix"}, momentum=0.0)
    gradients = [torch.randn_like(p) for p in model.parameters()]
    moves = []
    for _ in range(steps):
        before = model[0].weight.detach().clone()
        for p, G in zip(model.parameters(), gradients, strict=True):
            p.grad = G.clone()
        optimizer.step()
        for group in optimizer.param_groups:
            group["step"] = 0
        moves.append(model[0].weight.detach() - before)
    return moves


def test_replays_draw_other_bits_and_a_run_is_repeated(monkeypatch):
    moves = replayed(monkeypatch, vector=True)
    assert not torch.equal(moves[0], moves[1])
    assert not torch.equal(moves[1], moves[2])
    assert all(map(torch.equal, moves, replayed(monkeypatch, vector=True)))


def test_without_a_count_on_the_device_it_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="this stochastic rounding is seeded by the number of the step"):
        replayed(monkeypatch, vector=False)
