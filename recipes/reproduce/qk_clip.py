"""Attention logits that explode, with and without QK-clip:  python recipes/reproduce/qk_clip.py

Source: Kimi K2, arXiv 2507.20534, section 2.1: with Muon logits pass 1,000, with the clip at 100 they stay there and
the loss shows no spike. Here a Llama of bytes, which normalizes neither queries nor keys, whose queries and keys get 50
times the rate of the table: 120 steps, three seeds.
"""

from functools import partial
from statistics import mean, median
from time import process_time

import matplotlib.pyplot as plt
import tiny_lm
import torch
from shared import Check, finish
from torch import nn
from tqdm import tqdm

import symlm
from symlm.qk_clip import QKClip

THRESHOLD, STEPS, SEEDS = 100.0, 120, 3
LOUD = {role: {"lr": 0.7} for role in ("attention_q", "attention_k")}


def recorded(model: nn.Module, threshold: float | None, largest: list[float]) -> torch.optim.Optimizer:
    """Return an optimizer that writes down the largest logit of every step, and bounds it if there is a threshold."""
    optimizer = symlm.SymOptimizer(model, 0.02, overrides=LOUD)
    clip = QKClip(model, optimizer, threshold or 1e30)
    optimizer.register_step_post_hook(
        lambda *_: largest.append(max(float(heads.max()) for heads in clip.largest.values()))
    )
    return optimizer


def share_of_a_step() -> float:
    """Return the processor time that the clip adds to a step, relative to one without, the median of five pairs."""
    ratios = []
    for _ in range(5):
        seconds = {}
        for bounded in (False, True):
            started = process_time()
            tiny_lm.train(with_clip if bounded else plain, 12, kind="llama")
            seconds[bounded] = process_time() - started
        ratios.append(seconds[True] / seconds[False] - 1)
    return median(ratios)


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return symlm.SymOptimizer(model, 0.02)


def with_clip(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = plain(model)
    QKClip(model, optimizer, THRESHOLD)
    return optimizer


def main() -> None:
    torch.set_num_threads(1)
    checks, ended, figure = [], {}, plt.figure(figsize=(9, 4))
    axes = figure.subplots(1, 2)
    for name, threshold in (("plain", None), ("QK-clip", THRESHOLD)):
        losses, held, largest = [], [], [list[float]() for _ in range(SEEDS)]
        for seed in tqdm(range(SEEDS), desc=name):
            build = partial(recorded, threshold=threshold, largest=largest[seed])
            series, loss, _ = tiny_lm.train(build, STEPS, seed, kind="llama")
            losses.append(series)
            held.append(loss)
        ended[name] = mean(held)
        top = max(max(series[STEPS // 2 :]) for series in largest)
        bound = 2 * THRESHOLD if threshold else None  # a step beyond it
        checks.append(Check(f"{name}: largest logit, second half", "> 1,000" if bound is None else f"< {bound:g}", top))
        checks[-1].passed = top > 1000 if bound is None else top < bound
        checks.append(Check(f"{name}: held-out loss, {SEEDS} seeds", "", ended[name]))
        axes[0].plot(largest[0], label=name)
        axes[1].plot(losses[0], label=name)
    below = ended["QK-clip"] < ended["plain"]
    checks.append(Check("  with the clip below without", "yes", str(below), below))
    checks.append(Check("processor time that the clip adds to a step", "0.05", share_of_a_step()))
    axes[0].set(yscale="log", xlabel="step", title="largest attention logit")
    axes[0].axhline(THRESHOLD, color="gray", linestyle=":")
    axes[1].set(xlabel="step", title="training loss")
    axes[1].legend()
    figure.tight_layout()
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
