"""The momentum in 8 bits: its formula, its size, what a step makes of it, and where it is refused."""

import pytest
import torch
from models import tiny, tokens, train
from numerics import FP32, relative
from torch import nn

import symlm
from symlm.diagnostics import state_bytes
from symlm.state.quantization import BLOCK, dequantized, quantized, zero_momentum
from symlm.teleport import neuron_scales, teleport
from symlm.teleport.moving import refuse_unmovable

IN_8_BITS = {"momentum_dtype": "int8"}


def random(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(5, 64), (3, 150), (2, 4, 7), (1, 1)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_every_entry_is_a_neighbour_of_its_value_in_units_of_its_blocks_largest(shape, size):
    M = size * torch.randn(shape, generator=random(0))
    q, scales = quantized(M, random(1))
    assert q.shape == M.shape
    assert scales.shape == (*shape[:-1], -(-shape[-1] // BLOCK))
    for row, units, found in zip(M.double().flatten(0, -2), scales.flatten(0, -2), q.flatten(0, -2), strict=True):
        for k, (block, unit) in enumerate(zip(row.split(BLOCK), units, strict=True)):
            assert relative(unit.double(), block.abs().max() / 127) < FP32
            levels = block * 127 / block.abs().max()
            assert ((found[k * BLOCK : (k + 1) * BLOCK] - levels).abs() < 1 + 1e-4).all()
    assert relative(dequantized(q, scales).double() / size, M.double() / size) < 0.02


def test_the_mean_of_many_roundings_is_the_value_and_zeros_stay_zeros():
    M = torch.randn(6, 80, generator=random(0))
    M[2], M[3, 64:] = 0, 0
    parts = [quantized(M, random(seed)) for seed in range(400)]
    mean = torch.stack([dequantized(*part) for part in parts]).mean(0)
    unit = parts[0][1].repeat_interleave(BLOCK, -1)[:, :80]
    assert ((mean - M).abs() <= 5 * unit / 2 / 400**0.5).all()  # five standard errors
    nearest = (M / unit.clamp(min=1e-9)).round() * unit
    assert (mean - M).norm() < (nearest - M).norm() / 5  # which rounding to the nearest level is not
    assert mean[2].eq(0).all()
    assert mean[3, 64:].eq(0).all()


@pytest.mark.parametrize("preset", ["default", "scion"])
def test_it_takes_less_than_three_tenths_of_adamws_bytes(preset):
    model = tiny(hidden_size=128, vocab_size=2048, intermediate_size=384, head_dim=32)
    sizes = {}
    for name, options in (("adamw", {}), (preset, IN_8_BITS)):
        optimizer = symlm.SymOptimizer(model, preset=name, **options)
        train(model, optimizer, 1)
        sizes[name] = state_bytes(optimizer)
    assert sizes[preset] < 0.3 * sizes["adamw"]
    assert sizes["adamw"] >= 8 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("momentum_of", ["gradients", "directions"])
def test_a_step_is_that_of_fp32_and_stores_its_momentum_rounded(momentum_of):
    a, b = tiny(), tiny()
    options = {"momentum_of": momentum_of, "nesterov": False}
    wide, narrow = symlm.SymOptimizer(a, **options), symlm.SymOptimizer(b, **options, **IN_8_BITS)
    train(a, wide, 1)
    train(b, narrow, 1)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert relative(q, p) < FP32
        if "momentum" in wide.state[p]:
            M, state = wide.state[p]["momentum"], narrow.state[q]
            found = dequantized(state["momentum"], state["momentum_scale"])
            units = state["momentum_scale"].repeat_interleave(BLOCK, -1)[..., : M.shape[-1]]
            assert ((found - M).abs() <= units * (1 + 1e-4)).all()
            assert not torch.equal(found, M)
    assert len(narrow.verify()) == len(wide.verify())


def test_two_seeds_of_a_step_differ_and_one_is_repeatable():
    M = torch.randn(4, 64, generator=random(0))
    assert torch.equal(quantized(M, random(1))[0], quantized(M, random(1))[0])
    assert not torch.equal(quantized(M, random(1))[0], quantized(M, random(2))[0])


def test_where_there_is_no_such_momentum_it_is_refused():
    with pytest.raises(ValueError, match=r"group embedding: momentum_dtype='int8' is of one mean, and rule 'adamw'"):
        symlm.SymOptimizer(tiny(), preset="muon", **IN_8_BITS)
    with pytest.raises(ValueError, match="has no effect on AdamW's means of vectors"):
        symlm.SymOptimizer(tiny(), overrides={"vector": IN_8_BITS})
    with pytest.raises(ValueError, match="is float64, and momentum_dtype='int8' is of float32 and bfloat16"):
        symlm.SymOptimizer(tiny(dtype=torch.float64), **IN_8_BITS)
    wide = {"embedding": {"momentum_dtype": "float32"}, "lm_head": {"momentum_dtype": "float32"}}
    symlm.SymOptimizer(tiny(), preset="muon", overrides=wide, **IN_8_BITS)


def test_a_teleport_leaves_it_alone():
    model = tiny()
    optimizer = symlm.SymOptimizer(model, **IN_8_BITS)
    train(model, optimizer, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = [name for name in before if "mlp" in name]
    with pytest.raises(ValueError, match="choose another rule for it, and a wide momentum"):
        refuse_unmovable(optimizer, model, names)
    scales = neuron_scales(model, 0.1 * torch.randn(2, 48))
    with pytest.raises(ValueError, match="cannot move with this group element"):
        teleport(model, scales, lambda: model(input_ids=tokens(), labels=tokens()).loss, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_partition_of_zero_is_refused():
    with pytest.raises(RuntimeError, match="stores blocks of whole rows, which ZeRO"):
        zero_momentum("W", nn.Parameter(torch.zeros(10)), partitioned=True)
