"""PolarGrad's problems with the source's mini-batches and schedules:  python recipes/reproduce/polargrad_schedule.py

Source: arXiv 2505.21799: matrix regression (1000, 500, 100, 250), logistic regression (10,000 samples, batches of a
tenth) and completion (500 × 250, rank 5). `--size 0.5 --steps 1` is half of the source's; by default a tenth and a
quarter of its steps. Rates follow the curvature from the source's to a size s: by 1/s³ in the regressions, by s in the
completion; Muon's and Adam's are the source's. Its losses were not at hand: who is below whom is printed, and fails
nothing.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from polargrad import Problem, build
from shared import Check, finish
from torch import Tensor
from torch.nn.functional import softplus
from torch.optim.lr_scheduler import StepLR
from tqdm import tqdm


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def uniform(g: torch.Generator, *shape: int) -> Tensor:
    return 2 * torch.rand(*shape, generator=g, dtype=torch.float64) - 1


class Regression(Problem):
    """`½|AXB − C|²` above its minimum."""

    def __init__(self, size: float, g: torch.Generator) -> None:
        p, m, n, q = (int(size * k) for k in (1000, 500, 100, 250))
        super().__init__(X=uniform(g, m, n))
        self.A, self.B, self.C = normal(g, p, m), normal(g, n, q), normal(g, p, q)
        best = torch.linalg.pinv(self.A) @ self.C @ torch.linalg.pinv(self.B)
        self.minimum = 0.5 * (self.A @ best @ self.B - self.C).square().sum().item()

    def loss(self, rows: Tensor | None = None) -> Tensor:
        return 0.5 * (self.A @ self.X @ self.B - self.C).square().sum() - self.minimum


class Logistic(Problem):
    """`Σ softplus(−C∘(AXB))`, of a batch of samples or of all, a sample's share."""

    def __init__(self, size: float, g: torch.Generator) -> None:
        self.samples, m, n, q = (int(size * k) for k in (10_000, 1000, 100, 400))
        super().__init__(X=uniform(g, m, n))
        self.A, self.B = normal(g, self.samples, m), normal(g, n, q)
        self.C = 2 * (normal(g, self.samples, q) > 0.5).double() - 1

    def loss(self, rows: Tensor | None = None) -> Tensor:
        A, C = (self.A, self.C) if rows is None else (self.A[rows], self.C[rows])
        total = softplus(-C * (A @ self.X @ self.B)).sum()
        return total / self.samples if rows is None else total


class Completion(Problem):
    """`Σ mask·(XYᵀ − T)²/Σ mask`, T of rank 5, 30 % observed."""

    def __init__(self, size: float, g: torch.Generator) -> None:
        m, n = int(size * 500), int(size * 250)
        super().__init__(X=uniform(g, m, 5), Y=uniform(g, n, 5))
        self.T = normal(g, m, 5) @ normal(g, 5, n)
        self.mask = torch.rand(m, n, generator=g) < 0.3

    def loss(self, rows: Tensor | None = None) -> Tensor:
        return (self.X @ self.Y.mT - self.T)[self.mask].square().mean()


def arms(size: float) -> dict:
    """Return each problem: its class, steps, whether in mini-batches, and the arms with rate and decay in 25 steps."""
    cube = size**3
    regression = {"PolarGrad": (4e-8 / cube, 1.0), "PolarGrad, schedule": (4.75e-8 / cube, 0.99)}
    logistic = {"PolarGrad": (1.5e-7 / cube, 1.0), "PolarGrad, schedule": (1.5e-7 / cube, 0.95)}
    completion = {"PolarGrad": (50 * size, 1.0), "Muon": (0.25, 1.0), "Adam": (0.05, 1.0)}
    return {
        "regression": (Regression, 4000, False, {**regression, "Muon": (0.1, 1.0), "Adam": (0.05, 1.0)}),
        "logistic": (Logistic, 1500, True, {**logistic, "Muon, schedule": (0.1, 0.95), "Adam": (5e-3, 1.0)}),
        "completion": (Completion, 1000, False, completion),
    }


def run(problem: Problem, arm: str, lr: float, decay: float, steps: int, in_batches: bool) -> list[float]:
    """Return the whole loss at every 25th step, and at the end."""
    optimizer = build(arm.partition(",")[0], problem, lr)
    scheduler, losses = StepLR(optimizer, 25, decay), []
    g = torch.Generator().manual_seed(1)
    for step in range(steps + 1):
        if step % 25 == 0:
            with torch.no_grad():
                losses.append(problem.loss().item())
        rows = torch.randperm(problem.samples, generator=g)[: problem.samples // 10] if in_batches else None
        optimizer.zero_grad()
        problem.loss(rows).backward()
        optimizer.step()
        scheduler.step()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=float, default=0.1, help="of the source's sizes; 1 is theirs")
    parser.add_argument("--steps", type=float, default=0.25, help="share of the source's steps; 1 is theirs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figure, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    checks = []
    for axes, (name, (kind, steps, in_batches, rates)) in zip(panels, arms(options.size).items(), strict=True):
        for arm, (lr, decay) in tqdm(rates.items(), desc=name):
            problem = kind(options.size, torch.Generator().manual_seed(0))
            losses = run(problem, arm, lr, decay, int(options.steps * steps), in_batches)
            axes.plot(range(0, 25 * len(losses), 25), losses, label=arm)
            falls = losses[-1] < 0.5 * losses[0] if "Polar" in arm else None
            checks.append(Check(f"{name}, {arm}: last loss", f"{losses[0]:.3g} at first", losses[-1], falls))
        axes.set(title=name, yscale="log", xlabel="step")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
