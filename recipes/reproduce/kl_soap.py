"""KL-SOAP's factors of matrix-Gaussian gradients, and a language model of bytes:  python recipes/reproduce/kl_soap.py

Source: arXiv 2509.03378, claim 2: the factors are the maximum-likelihood estimate of a matrix Gaussian,
`E ggᵀ = A ⊗ B`, which Shampoo's one-sided factors are not. Its language models have 120 M parameters; at this size no
target is published.
"""

from functools import partial

import matplotlib.pyplot as plt
import tiny_lm
import torch
from shared import Check, finish
from torch import Tensor

import symlm
from symlm.rules import RULES

RATES, STEPS = (0.01, 0.02, 0.04), 60
BETA = 0.99


def covariance(n: int, condition: float, generator: torch.Generator) -> Tensor:
    """Return a positive matrix of trace n with eigenvalues from 1 to 1/condition in equal ratios."""
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    values = condition ** -torch.linspace(0, 1, n, dtype=torch.float64)
    return Q * (n * values / values.sum()) @ Q.mT


def divergence(estimate: Tensor, true: Tensor) -> float:
    """Return the KL divergence from N(0, true) to N(0, estimate) per dimension, the estimate at its best scale."""
    quotient = torch.linalg.solve(estimate, true)
    scale = quotient.trace() / len(true)
    return float((len(true) * scale.log() - torch.linalg.slogdet(quotient).logabsdet) / (2 * len(true)))


def factors(axes) -> list[Check]:
    """Feed both kinds of factors with the same gradients, and compare their Kronecker product to the covariance."""
    generator = torch.Generator().manual_seed(0)
    A, B = covariance(8, 100.0, generator), covariance(6, 100.0, generator)
    roots = [torch.linalg.cholesky(K) for K in (A, B)]
    rule, true = RULES["kl_soap"], torch.kron(A, B)
    first = roots[0] @ torch.randn(8, 6, generator=generator, dtype=torch.float64) @ roots[1].mT
    state, left, right = rule.start(first), torch.zeros_like(A), torch.zeros_like(B)
    found: dict[str, list[float]] = {"KL": [], "one-sided, as Shampoo's": []}
    for step in range(1, 2001):
        G = roots[0] @ torch.randn(8, 6, generator=generator, dtype=torch.float64) @ roots[1].mT
        state = rule.refreshed(G, state, beta1=0.9, beta2=BETA, step=step)
        left, right = torch.lerp(G @ G.mT, left, BETA), torch.lerp(G.mT @ G, right, BETA)
        if step >= 100 and step % 20 == 0:
            found["KL"].append(divergence(torch.kron(state["left_gram"], state["right_gram"]), true))
            found["one-sided, as Shampoo's"].append(divergence(torch.kron(left, right), true))
    for name, values in found.items():
        axes.plot(range(100, 2001, 20), values, label=name)
    axes.set(yscale="log", xlabel="step", ylabel="KL divergence a dimension", title="factors of Gaussian gradients")
    axes.legend()
    means = {name: sum(values[-40:]) / 40 for name, values in found.items()}
    checks = [Check(f"KL divergence from A ⊗ B, {name}", "lower for KL", value) for name, value in means.items()]
    ratio = means["KL"] / means["one-sided, as Shampoo's"]
    return [*checks, Check("their ratio", "< 1 (claim 2)", ratio, ratio < 0.8)]


def main() -> None:
    torch.set_num_threads(1)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    arms = {name: partial(tiny_lm.preset, name) for name in ("soap-muon", "kl-soap")}
    arms["adamw, its rate a quarter of the dial"] = lambda dial, model: symlm.SymOptimizer(model, dial / 4, "adamw")
    finish(__file__, factors(panels[0]) + tiny_lm.compare(panels[1], arms, RATES, STEPS, [1]), figure)


if __name__ == "__main__":
    main()
