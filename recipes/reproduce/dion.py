"""Dion's factors on constant gradients, and on a language model of bytes beside Muon:  python recipes/reproduce/dion.py

Source: arXiv 2504.05295. Its tables are of 160 M parameters and more; at this size no target is published.
"""

from functools import partial

import matplotlib.pyplot as plt
import tiny_lm
import torch
from shared import Check, finish
from torch import Tensor

from symlm.polar import polar
from symlm.rules import RULES

RATES, STEPS = (0.01, 0.02, 0.04), 60


def gradient(rank: int) -> Tensor:
    """Return a constant gradient of 24 × 16 and of a rank, singular values 1, 1/2, 1/4 … of it."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q for n in (24, 16))
    return left * 0.5 ** torch.arange(rank, dtype=torch.float64) @ right.mT


def to_polar(axes) -> list[Check]:
    """Iterate on a constant gradient: at a rank that holds it the direction tends to the polar factor."""
    checks = []
    for name, rank in (("dion", 6), ("dion_quarter", 4)):
        G, rule = gradient(rank), RULES[name]
        state, target, errors = rule.start(G), polar(gradient(rank), "svd"), []
        for _ in range(60):
            state = rule.refreshed(G, state, beta1=0.95)
            U = rule.direction(G, state)
            errors.append(float((U - target).norm() / target.norm()))
        axes.plot(errors, label=f"{name}, gradient of rank {rank}")
        checks.append(Check(f"{name}: distance to the polar factor", 0.0, errors[-1], errors[-1] < 1e-10))
        left = float((state["residual"] / 19 - G).norm() / G.norm())  # μ/(1 − μ) of a mean whose weights add to 1/(1−μ)
        checks.append(Check(f"{name}: |E − μG/(1 − μ)| after 60 steps", "0.95^60 = 0.046", left, left < 0.06))
    axes.set(yscale="log", xlabel="step", ylabel="distance to the polar factor", title="a constant gradient")
    axes.legend()
    return checks


def main() -> None:
    torch.set_num_threads(1)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    arms = {name: partial(tiny_lm.preset, name) for name in ("muon", "dion", "dion-quarter")}
    finish(__file__, to_polar(panels[0]) + tiny_lm.compare(panels[1], arms, RATES, STEPS, [1]), figure)


if __name__ == "__main__":
    main()
