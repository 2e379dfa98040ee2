"""The momentum in 8 bits beside bf16 and fp32, on a tiny Qwen3 of bytes:  python recipes/reproduce/eight_bits.py

Source: blocks with a scale each, arXiv 2110.02861; stochastic rounding and equally spaced levels are ours, and so is
the target: a mean difference from fp32 over equal seeds within the interval that fp32's seeds have by themselves.
"""

from functools import partial
from statistics import mean, stdev

import matplotlib.pyplot as plt
import tiny_lm
import torch
from shared import Check, finish
from tqdm import tqdm

import symlm
from symlm.diagnostics import state_bytes

DTYPES = ("float32", "bfloat16", "int8")
STEPS, SEEDS = 120, range(5)


def main() -> None:
    torch.set_num_threads(1)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    losses: dict[str, list[float]] = {}
    sizes: dict[str, float] = {}
    for dtype in tqdm((*DTYPES, "adamw"), desc="tiny Qwen3", mininterval=2):
        preset, narrow = ("adamw", "float32") if dtype == "adamw" else ("default", dtype)
        build = partial(symlm.SymOptimizer, lr=0.02, preset=preset, momentum_dtype=narrow)
        for seed in SEEDS if dtype in DTYPES else [0]:
            curve, held, optimizer = tiny_lm.train(build, STEPS if dtype in DTYPES else 1, seed)
            losses.setdefault(dtype, []).append(held)
        count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        sizes[dtype] = state_bytes(optimizer) / count
        if dtype in DTYPES:
            axes.plot(curve, label=dtype)
    axes.set(xlabel="step", ylabel="training loss", title="momentum in three dtypes")
    axes.legend()
    interval = 2 * stdev(losses["float32"]) / len(SEEDS) ** 0.5
    checks = [
        Check(f"{dtype}: held-out loss, {len(SEEDS)} seeds", "float32's", mean(losses[dtype])) for dtype in DTYPES
    ]
    for dtype in DTYPES[1:]:
        apart = mean(losses[dtype]) - mean(losses["float32"])
        checks.append(Check(f"{dtype} − float32", f"within {interval:.4f}", apart, abs(apart) < interval))
    share = sizes["int8"] / sizes["adamw"]
    checks += [Check(f"{dtype}: bytes of state a parameter", "8 of AdamW", sizes[dtype]) for dtype in sizes]
    checks.append(Check("int8: share of AdamW's bytes", "<= 0.3", share, share <= 0.3))
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
