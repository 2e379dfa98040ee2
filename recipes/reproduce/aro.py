"""ARO's rotation, and ARO and AuON beside Muon at one size of update:  python recipes/reproduce/aro.py

Source: arXiv 2602.09006 and 2509.24320. Base rules, orientation and constants of ARO are the same in several second
hands [RECONSTRUCTED]; no loss table was found. The language model is of bytes, with every arm's inner updates at RMS
0.2·lr and AdamW at both ends; Hybrid-AuON's, whose Newton–Schulz step ends at no known size, within a factor of two.
"""

from functools import partial
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from shared import Check, finish
from symlm_kernels.reference import unit_rows
from tiny_lm import train
from torch import Tensor
from tqdm import tqdm

import symlm
from symlm.polar import polar
from symlm.polar.exact import orthonormal
from symlm.rules import RULES
from symlm.rules.rotated import refresh, rotate, sinkhorn

INNER = ("attention_q", "attention_k", "attention_v", "attention_o", "mlp_in", "mlp_out")
STREAM = {role: "whole" if role in ("attention_o", "mlp_out") else "transposed" for role in INNER}
ARMS = {
    "Muon": {role: {"rule": "polar", "scale": "match_adamw_rms"} for role in INNER},
    "ARO, Sinkhorn": {role: {"rule": "aro_sinkhorn", "scale": "adamw_rms", "view": STREAM[role]} for role in INNER},
    "ARO, Sinkhorn, one rotation a layer": {
        role: {"rule": "aro_sinkhorn", "scale": "adamw_rms", "view": STREAM[role], "rotation": "layer"}
        for role in INNER
    },
    "ARO, sign": {role: {"rule": "aro_sign", "scale": "adamw_rms", "view": STREAM[role]} for role in INNER},
    "ARO, Adam": {role: {"rule": "aro_adam", "scale": "adamw_rms", "view": STREAM[role]} for role in INNER},
    "AuON": {role: {"rule": "auon", "scale": "match_adamw_rms_of_matrix"} for role in INNER},
    "Hybrid-AuON": {role: {"rule": "hybrid_auon", "scale": "match_adamw_rms"} for role in INNER},
}
FACTORS = {"Hybrid-AuON": 2.5}  # of its rates, so that its updates' RMS is near the others'
RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
STEPS, SEEDS = 80, (0, 1, 2)


def matrix(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equivariance() -> list[Check]:
    """Rotate the rows, with the rotation moved along and left behind."""
    M, Q, R = matrix(16, 24), orthonormal(matrix(16, 16, 1)), orthonormal(matrix(16, 16, 2))
    step = refresh(sinkhorn, orthonormal)

    def direction(M: Tensor, R: Tensor) -> Tensor:
        return rotate(M, step(M, R)["rotation"], sinkhorn)

    along, behind = ((direction(Q @ M, S) - Q @ direction(M, R)).norm() / direction(M, R).norm() for S in (Q @ R, R))
    return [
        Check("T(QM) = Q T(M), the state moved along", "6e-16", float(along), float(along) < 1e-12),
        Check("the same, the state left behind", "fails (0.21)", float(behind), float(behind) > 0.05),
    ]


def fixed_point(axes) -> list[Check]:
    """Iterate on one matrix with unit rows: the direction tends to the polar factor."""
    M, rule = matrix(16, 24), RULES["aro_rows"]
    state, errors, target = rule.start(M), [], 24**0.5 * polar(M, "svd")
    for _ in range(3000):
        state = refresh(unit_rows, orthonormal)(M, state["rotation"])
        errors.append(float((rule.direction(M, state) - target).norm() / target.norm()))
    axes.plot(errors)
    axes.set(
        xscale="log", yscale="log", xlabel="iteration", ylabel="distance to √n·polar(M)", title="ARO with unit rows"
    )
    return [Check("row norms, fixed M: distance to √n·polar(M)", "1.6e-15", errors[-1], errors[-1] < 1e-10)]


def objective(axes) -> list[Check]:
    """⟨M, U⟩ over the iterations: it never falls with a polar factor in QR's place, and may with QR."""
    M, found = matrix(16, 24), {}
    for name, qr in (("QR", orthonormal), ("polar factor", lambda A: polar(A, "svd"))):
        R, values = torch.eye(16, dtype=torch.float64), []
        for _ in range(60):
            values.append(float((M * (R @ torch.sign(R.mT @ M))).sum()))
            R = qr(M @ torch.sign(R.mT @ M).mT)
        found[name] = values
        axes.plot(values, label=name)
    axes.set(xlabel="iteration", ylabel="⟨M, R sign(RᵀM)⟩", title="sign as the base")
    axes.legend()
    falls = {name: sum(b < a - 1e-9 for a, b in pairwise(values)) for name, values in found.items()}
    return [
        Check(
            "steps that ⟨M, U⟩ falls, polar factor for QR", "0", float(falls["polar factor"]), not falls["polar factor"]
        ),
        Check("the same with QR", "some", float(falls["QR"]), falls["QR"] > 0),
    ]


def arms(axes) -> list[Check]:
    """Train the language model with every arm, each at every rate; seed 0 chooses the rate, the others are reported."""
    checks = []
    with tqdm(total=len(ARMS) * (len(RATES) + len(SEEDS) - 1), desc="language model", mininterval=2) as bar:
        for name, routes in ARMS.items():
            found = {}
            for rate in RATES:
                found[rate], _ = _trained(name, routes, rate, SEEDS[0])
                bar.update()
            best = min(found, key=found.__getitem__)
            losses, sizes = [], []
            for seed in SEEDS[1:]:
                loss, size = _trained(name, routes, best, seed)
                losses.append(loss)
                sizes.append(size)
                bar.update()
            axes.plot(found.keys(), found.values(), marker="o", label=name)
            checks.append(
                Check(f"bytes, {name}, lr {best:g}: held-out loss", "none published", sum(losses) / len(losses))
            )
            size, near = sum(sizes) / len(sizes), 2.0 if name in FACTORS else 1.1
            checks.append(Check("  its updates' RMS / 0.2·lr", 1.0, size, 1 / near < size < near))
    axes.set(xscale="log", xlabel="lr; updates have RMS 0.2·lr", ylabel="held-out loss (nats a byte)")
    axes.set(title=f"tiny Qwen3, {STEPS} steps, seed 0")
    axes.set_xticks(RATES, labels=[f"{rate:g}" for rate in RATES])
    axes.minorticks_off()
    axes.legend()
    losses = [check for check in checks if "held-out" in check.what]
    by_arm = {check.what.split(", lr")[0].removeprefix("bytes, "): float(check.found) for check in losses}
    worst = max(by_arm, key=by_arm.__getitem__)
    return [*checks, Check("the worst arm (the paper's LM: AuON)", "AuON", worst, None)]


def _trained(name: str, routes: dict[str, dict[str, str]], rate: float, seed: int) -> tuple[float, float]:
    """Return the held-out loss, and the mean RMS of the inner roles' last updates over 0.2·lr."""
    overrides = {role: {"lr": FACTORS.get(name, 1.0) * rate, **route} for role, route in routes.items()}
    overrides |= {role: {"lr": 5e-3} for role in ("embedding", "lm_head", "vector")}
    build = partial(symlm.SymOptimizer, preset="muon", overrides=overrides)
    _, loss, optimizer = train(build, STEPS, seed)
    sizes = [rms for role, rms in symlm.diagnostics.update_rms(optimizer).items() if role in INNER]
    return loss, sum(sizes) / len(sizes) / (0.2 * rate)


def main() -> None:
    torch.set_num_threads(1)
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    checks = [*equivariance(), *fixed_point(panels[0]), *objective(panels[1]), *arms(panels[2])]
    for axes in panels:
        axes.grid(alpha=0.3)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
