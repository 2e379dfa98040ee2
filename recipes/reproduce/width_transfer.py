"""Does a rate found at one width hold at another?  python recipes/reproduce/width_transfer.py

A tiny Qwen3 of bytes at widths 64 to 256, three scales of the inner updates: the default table as it stands
(`√max(1, m/n)`), `rms_to_rms` (`√(m/n)`, the spectral condition of arXiv 2310.17813), and AdamW under maximal update
(inner and head rates over the width, arXiv 2203.03466). Weights begin at 0.02 everywhere, as transformers has it.
"""

import json
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import tiny_lm
import torch
from shared import Check, finish
from tqdm import tqdm

import symlm

INNER = ("attention_q", "attention_k", "attention_v", "attention_o", "mlp_in", "mlp_out")
WIDTHS, STEPS, BATCH = (64, 128, 256), 40, 8
RATES = {
    "the dial as it stands": (0.02, 0.04, 0.08, 0.16),
    "rms_to_rms": (0.02, 0.04, 0.08, 0.16),
    "AdamW, maximal update": (0.0025, 0.005, 0.01, 0.02),
}
RESULTS = Path("runs") / "reproduce" / "width-transfer.json"


def optimizer(arm: str, rate: float, width: int, model: torch.nn.Module) -> symlm.SymOptimizer:
    """Build an arm's optimizer for a model of a width."""
    if arm == "AdamW, maximal update":
        narrower = {role: {"lr": rate * WIDTHS[0] / width} for role in (*INNER, "lm_head")}
        return symlm.SymOptimizer(model, rate, "adamw", narrower)
    scales = {role: {"scale": "rms_to_rms"} for role in INNER} if arm == "rms_to_rms" else {}
    return symlm.SymOptimizer(model, rate, overrides=scales)


def sweep() -> dict[str, dict[str, dict[str, float]]]:
    """Return the held-out loss by arm, width and rate, one seed."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tqdm(total=sum(len(rates) for rates in RATES.values()) * len(WIDTHS), mininterval=2) as bar:
        for arm, rates in RATES.items():
            for width in WIDTHS:
                sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // 16}
                for rate in rates:
                    build = partial(optimizer, arm, rate, width)
                    kv = width // 32
                    _, loss, _ = tiny_lm.train(build, STEPS, batch=BATCH, num_key_value_heads=kv, **sizes)
                    found.setdefault(arm, {}).setdefault(str(width), {})[f"{rate:g}"] = round(loss, 4)
                    bar.update()
    return found


def checks_of(found: dict[str, dict[str, dict[str, float]]]) -> list[Check]:
    """Say for each arm which rate is best at each width, and what the narrowest width's best costs at the widest."""
    checks = []
    for arm, by_width in found.items():
        best = {width: min(losses, key=losses.__getitem__) for width, losses in by_width.items()}
        narrow, wide = (str(WIDTHS[place]) for place in (0, -1))
        cost = by_width[wide][best[narrow]] - by_width[wide][best[wide]]
        checks.append(Check(f"{arm}: best rate at {', '.join(best)}", "one rate", ", ".join(best.values())))
        checks.append(Check(f"  what the rate of {narrow} costs at {wide}", "none published", cost))
        losses = ", ".join(f"{by_width[width][rate]:.3f}" for width, rate in best.items())
        checks.append(Check("  its best losses", "falling with width", losses))
    cost = checks[1].found
    checks.append(Check("the dial: that cost", "< 0.05", cost, float(cost) < 0.05))
    return checks


def main() -> None:
    torch.set_num_threads(1)
    found = sweep()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"steps": STEPS, "batch": BATCH, "losses": found}, indent=1) + "\n")
    figure, panels = plt.subplots(1, len(found), figsize=(14, 4), layout="constrained", sharey=True)
    for axes, (arm, by_width) in zip(panels, found.items(), strict=True):
        for width, losses in by_width.items():
            axes.plot([float(rate) for rate in losses], list(losses.values()), marker="o", label=f"width {width}")
        axes.set(xscale="log", xlabel="rate", title=arm)
        axes.legend()
    panels[0].set_ylabel("held-out loss (nats a byte)")
    finish(__file__, checks_of(found), figure)


if __name__ == "__main__":
    main()
