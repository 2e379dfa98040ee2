"""The noise scale of a model whose gradient of a block is the block itself."""

from types import SimpleNamespace

import pytest
import torch
from benchmarks.noise_scale import NoiseScale
from torch import nn


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def forward(self, input_ids, labels):
        return SimpleNamespace(loss=(self.gain * input_ids[0]).sum())


def test_the_noise_scale_is_that_of_the_samples_covariance():
    blocks = 3 + torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = NoiseScale(Linear())
    for x in blocks:
        scale.add(x[None])
    noise = torch.cov(blocks.T).trace()
    expected = 6 * noise / (blocks.mean(0).square().sum() - noise / len(blocks))
    assert scale.tokens(length=6) == pytest.approx({"vector": expected.item(), "all": expected.item()}, rel=1e-9)


def test_a_gradient_that_does_not_stand_out_has_no_scale():
    scale = NoiseScale(Linear())
    for x in (torch.ones(6), -torch.ones(6)):
        scale.add(x[None].double())
    assert scale.tokens(length=6)["all"] == float("inf")
