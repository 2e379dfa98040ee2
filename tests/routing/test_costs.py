"""What a step is said to cost, against torch's own count of its products and the state that is really stored."""

import pytest
import torch
from models import loss_of, tiny, tokens
from torch.utils.flop_counter import FlopCounterMode

import symlm
from symlm.polar.inverse_roots import inverse_root


def in_place(_, a, b, out_shape=None, **__):
    """Count `addmm_`, which torch's counter leaves out."""
    return 2 * a[0] * a[1] * b[1]


def counter():
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})


def counted(model, optimizer):
    """Return torch's count of the operations of a step's matrix products."""
    optimizer.zero_grad()
    loss_of(model, tokens(0)).backward()
    with counter() as found:
        optimizer.step()
    return found.get_total_flops()


@pytest.mark.parametrize("kind", ["qwen3", "olmoe", "phi3"])
def test_operations_are_those_of_the_polar_factors(kind):
    model = tiny(kind, dtype=torch.float32)
    said = sum(row.operations for row in symlm.describe_routing(model, preset="muon"))
    assert counted(model, symlm.SymOptimizer(model, preset="muon")) == pytest.approx(said, rel=1e-9)


def test_operations_of_a_whitened_head_are_two_products_beside_the_root():
    model = tiny(dtype=torch.float32)
    for name, p in model.named_parameters():
        p.requires_grad_(name == "lm_head.weight")
    (row,) = symlm.describe_routing(model)
    with counter() as root:
        inverse_root(torch.eye(row.shape[1])[None])
    found = counted(model, symlm.SymOptimizer(model)) - root.get_total_flops()
    assert found == pytest.approx(row.operations, rel=0.02)
    (seldom,) = symlm.describe_routing(model, overrides={"lm_head": {"gram_every": 4}})
    assert seldom.operations == row.operations * 5 / 8


@pytest.mark.parametrize("preset", ["default", "soap", "muon"])
def test_the_least_bytes_have_the_state_that_is_stored(preset):
    model = tiny(dtype=torch.float32)
    optimizer = symlm.SymOptimizer(model, preset=preset)
    counted(model, optimizer)
    stored = sum(value.numel() for state in optimizer.state.values() for key, value in state.items() if key != "step")
    entries = sum(p.numel() for p in model.parameters())
    said = sum(row.bytes for row in symlm.describe_routing(model, preset=preset))
    assert said == 4 * (3 * entries + 2 * stored)


def test_costs_are_columns_that_one_asks_for():
    model = tiny()
    plain, costs = str(symlm.describe_routing(model)), str(symlm.describe_routing(model, costs=True))
    assert "GFLOP" not in plain
    assert costs.splitlines()[0].split()[:5] == ["role", "tensors", "parameters", "GFLOP", "MB"]
    assert len({len(line.split("  ")[0]) for line in costs.splitlines()}) > 1
