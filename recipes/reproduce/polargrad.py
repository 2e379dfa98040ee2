"""PolarGrad's three matrix problems beside Muon, Adam and gradient descent:  python recipes/reproduce/polargrad.py

Source: arXiv 2505.21799, sizes reduced as in the targets. The descent lemma is checked at every step of the first. The
targets' gaps are of another random draw: how fast each method is depends on its condition, that Muon stalls does not.
"""

from statistics import fmean as mean

import matplotlib.pyplot as plt
import torch
from shared import Check, finish
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

import symlm

P, M, N, Q = 100, 50, 10, 25
POLAR = "PolarGrad (descent)"


class Problem(nn.Module):
    """A loss of matrices."""

    def __init__(self, **matrices: Tensor) -> None:
        super().__init__()
        for name, value in matrices.items():
            setattr(self, name, nn.Parameter(value))

    def loss(self) -> Tensor:
        raise NotImplementedError


class Regression(Problem):
    """`½|AXB − C|²`, whose smoothness is `L = |A|²|B|²` and whose minimum is a least-squares solution."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        super().__init__(X=2 * torch.rand(M, N, generator=g, dtype=torch.float64) - 1)
        shapes = ((P, M), (N, Q), (P, Q))
        self.A, self.B, self.C = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)
        self.smoothness = float(torch.linalg.matrix_norm(self.A, 2) ** 2 * torch.linalg.matrix_norm(self.B, 2) ** 2)
        best = torch.linalg.pinv(self.A) @ self.C @ torch.linalg.pinv(self.B)
        self.minimum = 0.5 * (self.A @ best @ self.B - self.C).square().sum().item()

    def loss(self) -> Tensor:
        return 0.5 * (self.A @ self.X @ self.B - self.C).square().sum() - self.minimum


class Logistic(Problem):
    """`Σ softplus(−C∘(AXB))/count`, a tenth of the paper's sizes."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        super().__init__(X=2 * torch.rand(100, 10, generator=g, dtype=torch.float64) - 1)
        self.A = torch.randn(1000, 100, generator=g, dtype=torch.float64)
        self.B = torch.randn(10, 40, generator=g, dtype=torch.float64)
        self.C = 2 * (torch.randn(1000, 40, generator=g, dtype=torch.float64) > 0.5).double() - 1

    def loss(self) -> Tensor:
        return softplus(-self.C * (self.A @ self.X @ self.B)).mean()


class Completion(Problem):
    """`Σ mask·(XYᵀ − T)²/Σ mask`, T of rank 5, 30 % observed."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        m, n, r = 100, 50, 5
        factors = [2 * torch.rand(k, r, generator=g, dtype=torch.float64) - 1 for k in (m, n)]
        super().__init__(X=factors[0], Y=factors[1])
        self.T = torch.randn(m, r, generator=g, dtype=torch.float64) @ torch.randn(r, n, generator=g).double()
        self.mask = torch.rand(m, n, generator=g) < 0.3

    def loss(self) -> Tensor:
        return (self.X @ self.Y.mT - self.T)[self.mask].square().mean()


def build(arm: str, problem: Problem, lr: float) -> torch.optim.Optimizer:
    if arm == "Adam":
        return torch.optim.Adam(problem.parameters(), lr)
    if arm == "gradient descent":
        return torch.optim.SGD(problem.parameters(), lr)
    preset = "muon" if arm == "Muon" else "polargrad"
    options = {"momentum": 0.0 if "descent" in arm else 0.95, "polar_method": "qdwh", "nesterov": False}
    options["momentum_of"] = "directions" if "polar-first" in arm else "gradients"
    groups = symlm.param_groups(problem, lr, preset, roles={"*": "matrix"})
    for group in groups:
        group.update(options, scale="unit")
    return symlm.SymOptimizer(groups, lr)


def run(arm: str, problem: Problem, lr: float, steps: int) -> tuple[list[float], int]:
    """Return the losses and how many steps broke the descent lemma, `f(X') <= f(X) − ν²/(2Lr)`."""
    optimizer, losses, broken, promised = build(arm, problem, lr), [], 0, None
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        if promised is not None:
            broken += int(loss.item() > losses[-1] - promised + 1e-12 * abs(losses[-1]))
        losses.append(loss.item())
        if "descent" in arm and "PolarGrad" in arm:
            nuclear = torch.linalg.svdvals(problem.X.grad).sum().item()
            promised = nuclear**2 / (2 * problem.smoothness * N)
        optimizer.step()
    return losses, broken


def main() -> None:
    L = Regression().smoothness
    problems = {
        "regression": (
            Regression,
            2000,
            {
                "PolarGrad (descent)": 1 / (L * N),
                "PolarGrad": 1 / (L * N),
                "PolarGrad, polar-first": 1 / (L * N),
                "Muon": 1e-2,
                "Adam": 5e-2,
                "gradient descent": 1 / L,
            },
        ),
        "logistic": (Logistic, 300, {"PolarGrad": 0.5, "Muon": 0.1, "Adam": 5e-3, "gradient descent": 5.0}),
        "completion": (Completion, 1000, {"PolarGrad": 2.0, "Muon": 0.05, "Adam": 0.05, "gradient descent": 5.0}),
    }
    figure, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    checks, gaps = [], {}
    for axes, (name, (build_problem, steps, rates)) in zip(panels, problems.items(), strict=True):
        for arm, lr in tqdm(rates.items(), desc=name):
            losses, broken = run(arm, build_problem(), lr, steps)
            gaps[name, arm] = losses
            axes.plot(losses, label=f"{arm}, {lr:.2g}")
            if "(descent)" in arm:
                checks.append(Check("regression: steps that broke the descent lemma", 0, broken, broken == 0))
        axes.set(yscale="log", xlabel="step", title=name)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss above its minimum, or loss")
    last = {key: losses[-1] for key, losses in gaps.items()}
    falls = {
        arm: mean(gaps["regression", arm][-100:]) / mean(gaps["regression", arm][-600:-500]) for arm in (POLAR, "Muon")
    }
    checks += [
        Check("regression, PolarGrad still falls: mean gap / 500 steps before", "< 0.7", f := falls[POLAR], f < 0.7),
        Check("regression, Muon at 1e-2 stays away: the same", "> 0.7", f := falls["Muon"], f > 0.7),
        Check("regression, PolarGrad: last gap (another draw)", 2.3e-3, last["regression", POLAR]),
        Check("regression, Muon: last gap (another draw)", 0.71, last["regression", "Muon"]),
        Check("regression, Adam: last gap (another draw)", 8.3, last["regression", "Adam"]),
        Check("regression, gradient descent wins (another draw)", 2e-13, last["regression", "gradient descent"]),
    ]
    for (name, arm), value in last.items():
        if name != "regression" or "first" in arm:
            checks.append(Check(f"{name}, {arm}: last loss", "falls", value, value < gaps[name, arm][0]))
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
