"""The paper's grid on a language model of bytes:  python recipes/reproduce/paper_grid.py

Source: arXiv 2605.18106, Qwen3: {rows, hybrid, AdamW} at the ends by {Muon, hybrid} in the MLP. Its losses are of the
token after the next, of one seed, at 6.9 billion tokens: what is printed beside ours is their distance from the row
arm, and no criterion. Every arm has the same trials, the paper's rates of the ends times 0.1, 1 and 10, since the rules
move by other lengths at one rate; one seed chooses, two others are reported. `--steps 10` for a look.
"""

from argparse import ArgumentParser
from functools import partial
from math import log

import matplotlib.pyplot as plt
import tiny_lm
import torch
from shared import Check, finish
from torch import nn
from tqdm import tqdm

import symlm

MULTIPLES, SEEDS = (0.1, 1.0, 10.0), (1, 2)
# The paper's distances from its row arm, read off its figures (± 0.003).
ARMS = {
    "paper-row": 0.0,
    "paper-hybrid-ends": 0.004,
    "paper-adamw-ends": 0.008,
    "paper-hybrid-mlp": -0.006,
    "paper-hybrid": -0.004,
    "paper-adamw-ends-hybrid-mlp": 0.005,
}


def arm(preset: str, multiple: float, model: nn.Module) -> symlm.SymOptimizer:
    """Return an arm at the paper's rates, those of the ends multiplied."""
    table = symlm.PRESETS[preset]
    rates = {role: {"lr": 0.02 * table[role].lr * multiple} for role in ("embedding", "lm_head")}
    return symlm.SymOptimizer(model, 0.02, preset, rates, weight_decay=1e-3)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="of each of the 30 runs")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    losses, multiples = {}, {}
    for name in tqdm(ARMS, desc="the grid", mininterval=2):
        found, multiples[name], losses[name] = tiny_lm.tuned(partial(arm, name), MULTIPLES, steps, SEEDS)
        axes.plot(found.keys(), found.values(), marker="o", label=name.removeprefix("paper-"))
    axes.set(xscale="log", xlabel="multiple of the ends' rates", ylabel="held-out loss", title=f"{steps} steps, seed 0")
    axes.legend(fontsize=8)
    checks = []
    for name, values in losses.items():
        ahead = [value - base for value, base in zip(values, losses["paper-row"], strict=True)]
        text = f"{sum(values) / 2:.3f}; {ahead[0]:+.3f}, {ahead[1]:+.3f}"
        what = f"{name}, ends × {multiples[name]:g}: loss; over the row arm's, two seeds"
        checks.append(Check(what, f"{ARMS[name]:+.3f}", text))
    worst = max(map(max, losses.values()))
    checks.append(Check("the largest of these losses", "< log 256, of no text seen", worst, worst < log(256)))
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
