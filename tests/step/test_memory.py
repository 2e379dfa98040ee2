"""The temporary memory of a step, from torch's own record of what it allocates: one bucket's, one block of rows'."""

import pytest
import torch
from benchmarks.recording import peak_of
from torch import nn

import symlm
from symlm.step import bucket


def peak(model, role, **options):
    """Return the most that a second step allocates at one time."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = symlm.SymOptimizer(model, roles={"*weight": role}, **options)
    optimizer.step()
    return peak_of(optimizer.step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"preset": "adamw"}], ids=["default", "adamw"])
def test_a_step_allocates_what_its_largest_bucket_does(dtype, options, monkeypatch):
    """fp32 copies of a whole bf16 model, or momenta of two buckets at once, would be more than that."""
    monkeypatch.setattr("symlm.update.adamw.BATCH_ELEMENTS", 128 * 160)
    shapes = [(128, 160 - 8 * k) for k in range(8)]
    models = [nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in some)) for some in (shapes, shapes[:1])]
    whole, largest = (peak(model.to(dtype), "matrix", **options) for model in models)
    assert largest > 4 * 128 * 160 or (dtype == torch.float32 and options)
    assert whole < 1.15 * largest + 4096


def test_a_head_needs_little_more_than_a_block_of_rows(monkeypatch):
    """However many rows there are: two blocks, the roots' few matrices, and numbers by row."""
    rows, n, block = 4096, 64, 2**15
    monkeypatch.setattr(bucket, "CPU_BLOCK_ELEMENTS", block)
    peaks = [
        peak(nn.Linear(n, m, bias=False), "lm_head", **o) for m in (rows, 2 * rows) for o in ({}, {"gram_every": 4})
    ]
    matrices = 8 * n * n
    for m, found in zip((rows, rows, 2 * rows, 2 * rows), peaks, strict=True):
        assert found < 4 * (2.2 * block + matrices + 6 * m), (m, found)
    assert 4 * (2.2 * block + matrices + 6 * 2 * rows) < 4 * rows * n
