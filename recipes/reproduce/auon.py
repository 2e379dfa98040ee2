"""AuON's brake is nearly 1, so the rule is the normalized momentum:  python recipes/reproduce/auon.py

Source: arXiv 2509.24320. `r² = 1 + γ²/N + O(γ⁴/N)`; the direction is the momentum's own.
"""

import matplotlib.pyplot as plt
import torch
from shared import Check, finish

from symlm.rules import RULES
from symlm.rules.elementwise import brake, unit_matrix

TARGETS = {16: 1.074, 1024: 1.0011, 1_000_000: 1.000001}  # γ = 1.5


def matrix(count: int, seed: int = 0) -> torch.Tensor:
    side = round(count**0.5)
    return torch.randn(side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def measured(count: int) -> float:
    return float(brake(1.5 * unit_matrix(matrix(count))))


def main() -> None:
    checks, sizes = [], [4**k for k in range(1, 10)]
    for count, target in TARGETS.items():
        r = measured(count)
        formula = (1 + 1.5**2 / count) ** 0.5
        checks.append(Check(f"brake of {count:,} entries, γ = 1.5", target, r, abs(r / target - 1) < 1e-3))
        checks.append(Check("  and √(1 + γ²/N)", formula, r, count < 100 or abs(r / formula - 1) < 1e-3))
    M = matrix(4096)
    U = RULES["auon"](M)
    cosine = float((U * M).sum() / U.norm() / M.norm())
    spectral = float(torch.linalg.matrix_norm(U, 2))
    checks += [
        Check("cosine of direction and momentum", 1.0, cosine, abs(cosine - 1) < 1e-12),
        Check("Frobenius norm of the direction", "near 1", float(U.norm()), abs(float(U.norm()) - 1) < 1e-3),
        Check("spectral norm of the direction", "< 1", spectral, spectral < 1),
    ]
    hybrid = torch.linalg.svdvals(RULES["hybrid_auon"](M))
    plain = torch.linalg.svdvals(U)
    flatter = float(hybrid.max() / hybrid.median()) < float(plain.max() / plain.median())
    checks.append(Check("hybrid: one Newton–Schulz step flattens the spectrum", "yes", str(flatter), flatter))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    axes[0].plot(sizes, [measured(n) - 1 for n in sizes], marker="o", label="measured")
    axes[0].plot(sizes, [(1 + 1.5**2 / n) ** 0.5 - 1 for n in sizes], ls="--", label="√(1 + γ²/N) − 1")
    axes[0].set(xscale="log", yscale="log", xlabel="entries N", ylabel="brake − 1", title="AuON's brake")
    axes[1].plot(plain / plain.max(), label="auon")
    axes[1].plot(hybrid / hybrid.max(), label="hybrid_auon")
    axes[1].set(xlabel="index", ylabel="singular value / largest", title="spectrum of the direction, 64 × 64")
    for panel in axes:
        panel.legend()
        panel.grid(alpha=0.3)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
