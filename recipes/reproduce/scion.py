"""Scion, constrained and not, on a language model of bytes:  python recipes/reproduce/scion.py

Source: Pethick et al., arXiv 2502.07529. The constrained step, `W <- (1 − η)W − η·ρ·lmo`, is a convex combination with
a point of the ball, so that no weight leaves the ball in which `initialize_` puts it: that must hold at every step. The
losses have no target: the source's models were not run. One seed at the source's rate, 50 · 4e-4.
"""

import matplotlib.pyplot as plt
import tiny_lm
import torch
from shared import Check, finish
from tqdm import tqdm

import symlm
from symlm.roles.role import Role
from symlm.scion import RADIUS, initialize_

STEPS, RATE = 60, 0.02
ARMS = (
    ("unconstrained", "scion", False),
    ("constrained", "scion-constrained", False),
    ("unconstrained, from the boundary", "scion", True),
    ("constrained, from the boundary", "scion-constrained", True),
)


class Watched:
    """Take steps of Scion, and remember the largest norm of a matrix over the radius of its ball."""

    def __init__(self, model: torch.nn.Module, preset: str, initialized: bool) -> None:
        self.model, self.largest = initialize_(model) if initialized else model, 0.0
        self.roles = symlm.assign_roles(model)
        self.optimizer = symlm.SymOptimizer(model, RATE, preset, polar_method="svd")

    def step(self, **inputs: torch.Tensor) -> None:
        self.optimizer.step()
        for name, role in self.roles.items():
            if role in (Role.MLP_IN, Role.MLP_OUT):
                W = self.model.get_parameter(name).detach()
                ball = RADIUS * (W.shape[0] / W.shape[1]) ** 0.5
                self.largest = max(self.largest, float(torch.linalg.matrix_norm(W, 2)) / ball)


def main() -> None:
    torch.set_num_threads(1)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    checks = []
    for name, preset, initialized in tqdm(ARMS):
        losses, held, watched = tiny_lm.train(lambda model, arm=(preset, initialized): Watched(model, *arm), STEPS)
        axes.plot(losses, label=name)
        checks.append(Check(f"{name}: held-out loss, {losses[0]:.2f} at first", "none", held, held < losses[0]))
        inside = watched.largest < 1 + 1e-3 if "constrained" in preset else None
        checks.append(Check(f"{name}: largest |W| over its radius in the MLP", "≤ 1", watched.largest, inside))
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
