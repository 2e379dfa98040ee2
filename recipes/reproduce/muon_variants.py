"""Muon's variants on a matrix, and on a language model of bytes:  python recipes/reproduce/muon_variants.py

Sources: Muon's coefficients (Jordan et al. 2024), Muon+ (arXiv 2602.21545), NorMuon (2510.05491), Aurora (Tilde
Research) and Muown (2605.10797). Each reports that it is ahead of Muon, at 124 M parameters and more; at this size no
target is published, and 60 steps do not tell. `--steps 10` for a look.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial

import matplotlib.pyplot as plt
import tiny_lm
import torch
from shared import Check, finish
from torch import Tensor, nn

import symlm
from symlm.polar import get_schedule, polar
from symlm.rules import RULES

DIALS = (0.01, 0.02, 0.04)
HIDDEN = ("attention_q", "attention_k", "attention_v", "attention_o", "mlp_in", "mlp_out")


def ruled(rule: str, dial: float, model: nn.Module) -> symlm.SymOptimizer:
    """Return Muon with another rule for the hidden matrices."""
    return symlm.SymOptimizer(model, dial, "muon", {role: {"rule": rule} for role in HIDDEN})


def muown(dial: float, model: nn.Module) -> symlm.SymOptimizer:
    """Return Muon with Muown's matrices, whose rate is 0.0035 of its record at the dial 0.02."""
    settings = {"rule": "muown", "scale": "match_adamw_rms", "lr": 0.0035 * dial / 0.02}
    return symlm.SymOptimizer(model, dial, "muon", dict.fromkeys(HIDDEN, settings))


ARMS: dict[str, Callable[[float, nn.Module], symlm.SymOptimizer]] = {
    "Muon, published coefficients": lambda dial, model: symlm.SymOptimizer(model, dial, "muon", schedule="muon"),
    "Muon, Polar Express": lambda dial, model: symlm.SymOptimizer(model, dial, "muon"),
    "Muon+": lambda dial, model: symlm.SymOptimizer(model, dial, "muon-plus"),
    "NorMuon": partial(ruled, "normuon"),
    "Aurora": partial(ruled, "aurora"),
    "Muown": muown,
}


def singular_values(axes) -> list[Check]:
    """Compare the two schedules on singular values from 1 to 1e-3 to the ranges that are known of them."""
    values = torch.logspace(0, -3, 200, dtype=torch.float64)
    checks = []
    for name, least, low, high in (("muon", 1e-2, 0.68, 1.13), ("polar_express", 1e-3, 0.859, 1.141)):
        found = polar(torch.diag(values), "newton_schulz", schedule=name, compute_dtype="float64").diagonal()
        inside = found[values / values.norm() / get_schedule(name).bound >= least]  # as the iteration begins
        axes.plot(values, found, label=name)
        text = f"{inside.min():.3f} … {inside.max():.3f}"
        holds = bool(inside.min() > low - 0.01 and inside.max() < high + 0.01)
        checks.append(
            Check(f"singular values of {name}, from {least:g} of the norm on", f"{low} … {high}", text, holds)
        )
    axes.set(xscale="log", xlabel="singular value before", ylabel="after five steps", title="schedules")
    axes.legend()
    return checks


def lengths(axes) -> list[Check]:
    """Compare lengths of rows, and of columns, of the directions of one tall matrix whose rows differ tenfold."""
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(48, 16, generator=generator, dtype=torch.float64)
    M *= torch.logspace(-1, 0, 48, dtype=torch.float64)[:, None]
    spread, found = {}, {}
    for name in ("polar", "aurora", "normuon", "muon_plus"):
        U = RULES[name](M, polar=partial(polar, method="svd"))
        found[name], rows = U, U.norm(dim=1)
        spread[name] = float(rows.max() / rows.min())
        axes.plot(rows / rows.mean(), label=name)
    axes.set(xlabel="row", ylabel="length over the mean", title="rows of a tall direction")
    axes.legend()
    columns: Tensor = found["muon_plus"].norm(dim=0)
    return [
        Check("longest over shortest row, Muon", "", spread["polar"]),
        Check("the same, Aurora", "nearly 1, below Muon's", spread["aurora"], spread["aurora"] < 0.2 * spread["polar"]),
        Check("the same, NorMuon's first step", 1.0, spread["normuon"], abs(spread["normuon"] - 1) < 1e-9),
        Check("columns of Muon+", 1.0, float(columns.mean()), bool((columns - 1).abs().max() < 1e-9)),
    ]


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of each of the 30 runs")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    figure, panels = plt.subplots(1, 3, figsize=(16, 4), layout="constrained")
    checks = singular_values(panels[0]) + lengths(panels[1])
    finish(__file__, checks + tiny_lm.compare(panels[2], ARMS, DIALS, steps, [1, 2]), figure)


if __name__ == "__main__":
    main()
