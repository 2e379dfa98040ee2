"""Regularized Newton steps, and γ along an optimizer's steps:  python recipes/reproduce/gradient_smoothness.py

Source: arXiv 2506.13710. The targets are what the authors' code gives on these problems, iterations and solves: its
data (NumPy's old seed 3124) at a tenth and at half of its size. Then a tiny Qwen3 of bytes, where γ is a diagnostic.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tiny_lm
import torch
from shared import Check, finish
from torch import Tensor

import symlm
from symlm.gradient_smoothness import (
    Minimum,
    along_step,
    exact,
    fisher,
    gauss_newton,
    minimize,
    softmax_gauss_newton,
    zero,
)
from symlm.gradient_smoothness.hessians import Function, Hessian

START = torch.tensor([-2.0, 2.0], dtype=torch.float64)


def residuals(x: Tensor) -> Tensor:
    return torch.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)])


def square(u: Tensor) -> Tensor:
    return u @ u


def composed(outer: Function, inner: Function) -> Function:
    return lambda x: outer(inner(x))


def power(p: float) -> Function:
    return lambda u: (u @ u) ** (p / 2) / p


def drawn(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the source's data, uniform in [−1, 1]."""
    state = np.random.RandomState(3124)
    return torch.tensor(state.rand(rows, columns) * 2 - 1), torch.tensor(state.rand(rows) * 2 - 1)


def rosenbrock() -> dict[str, tuple[Minimum, tuple[int, int]]]:
    """Return each Hessian's minimization of |u|² and of |u|⁵/5, and the authors' iterations and solves."""
    found = {}
    for name, outer, counts in (
        ("Rosenbrock", square, ((51, 105), (50, 101))),
        ("Rosenbrock, fifth power", power(5), ((56, 114), (57, 116))),
    ):
        f = composed(outer, residuals)
        found[f"{name}, exact"] = minimize(f, START, target=1e-8), counts[0]
        found[f"{name}, Gauss–Newton"] = minimize(f, START, gauss_newton(outer, residuals), target=1e-8), counts[1]
    return found


def log_sum_exp(n: int = 100) -> dict[str, tuple[Minimum, tuple[int, int]]]:
    """Return the same of `log Σ exp(Ax − b)` with its minimum at zero, in the metric AᵀA."""
    rows, b = drawn(n, n)
    A = rows.T - rows @ (-b).softmax(0)

    def inner(x: Tensor) -> Tensor:
        return A @ x - b

    f, start = composed(lambda u: u.logsumexp(0), inner), torch.ones(n, dtype=torch.float64)
    target = float(f(torch.zeros_like(start))) + 1e-8
    hessians: dict[str, tuple[Hessian, tuple[int, int]]] = {
        "exact": (exact(f), (14, 22)),
        "weighted Gauss–Newton": (softmax_gauss_newton(inner), (21, 33)),
    }
    return {
        f"log-sum-exp, {name}": (minimize(f, start, hessian, B=rows @ rows.T, target=target), counts)
        for name, (hessian, counts) in hessians.items()
    }


def linear(m: int = 50, n: int = 100) -> dict[str, tuple[Minimum, tuple[int, int]]]:
    """Return the same of `|Ax − b|⁴/4`, in the metric AᵀA + 1e-8."""
    A, b = drawn(m, n)

    def inner(x: Tensor) -> Tensor:
        return A @ x - b

    f, start = composed(power(4), inner), torch.ones(n, dtype=torch.float64)
    B = A.T @ A + 1e-8 * torch.eye(n, dtype=torch.float64)
    return {
        "fourth power of a norm, exact": (minimize(f, start, B=B, target=1e-8), (25, 51)),
        "fourth power of a norm, Fisher": (minimize(f, start, fisher(inner, 4), B=B, target=1e-8), (17, 32)),
    }


class Probe:
    """Measure each fifth step that an optimizer makes on a model, on one batch: how many such steps γ is long."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.taken = model, 0
        self.lengths: list[float] = []
        self.batch = tiny_lm.text()[: 16 * tiny_lm.LENGTH].view(16, tiny_lm.LENGTH)
        optimizer.register_step_pre_hook(lambda *_: self.before_step())
        optimizer.register_step_post_hook(lambda *_: self.after_step())

    def before_step(self) -> None:
        self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def after_step(self) -> None:
        self.taken += 1
        if self.taken % 5 == 0:
            step = {name: p.detach() - self.before[name] for name, p in self.model.named_parameters()}
            self.lengths.append(along_step(self.model, step, self.loss, self.before)["all"].steps)

    def loss(self, call: Any) -> Tensor:
        return call(input_ids=self.batch, labels=self.batch).loss


def language_model(rate: float, steps: int = 60) -> tuple[list[float], float]:
    """Return γ over the length of the step, each fifth step of a run, and the held-out loss."""
    probes = []

    def build(model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = symlm.SymOptimizer(model, lr=0.02)
        probes.append(Probe(model, optimizer))
        return optimizer

    held = tiny_lm.train(build, steps, rate=lambda step: rate)[1]
    return probes[0].lengths, held


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    checks = []
    for name, (found, counts) in {**rosenbrock(), **log_sum_exp(), **linear()}.items():
        both = counts, (len(found.steps), found.solves)
        target, here = (f"{steps} steps, {solves} solves" for steps, solves in both)
        checks.append(Check(name, target, here, found.reason == "target" and here == target))
        left.semilogy([step.gradient for step in found.steps], label=name)
    f = composed(square, residuals)
    normalized = minimize(f, START, zero(f), steps=2000)
    checks.append(Check("Rosenbrock, zero, f after 2,000 steps", "none reported", normalized.value))
    for rate in (0.1, 1.0, 10.0):
        lengths, held = language_model(rate)
        right.semilogy(range(5, 61, 5), lengths, label=f"rate × {rate:g}, held-out loss {held:.2f}")
        checks.append(Check(f"tiny Qwen3, rate × {rate:g}: γ/|step| at the end", "none reported", lengths[-1]))
        checks.append(Check(f"tiny Qwen3, rate × {rate:g}: held-out loss", "none reported", held))
    left.set(xlabel="iteration", ylabel="|∇f|*", title="Newton steps that γ regularizes")
    right.set(xlabel="step", ylabel="γ over the step's length", title="tiny Qwen3, the default optimizer")
    for panel in (left, right):
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
