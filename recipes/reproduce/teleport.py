"""Teleports of Rosenbrock, Booth, an ellipse, a quadratic, a tiny Qwen3:  python recipes/reproduce/teleport.py

Source: Zhao et al., NeurIPS 2022; its MLPs are in `teleport_mlp.py` and `teleport_batches.py`. The transformer's
teleport is ours: [RECONSTRUCTED] has no target.
"""

import sys
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
from shared import Check, finish
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from symlm.teleport import teleport
from symlm.teleport.actions import neuron_scales, value_output
from symlm.teleport.nonlinear import act_on_quadratic
from symlm.teleport.search import ascend, climb

sys.path.insert(0, str(Path(__file__).parents[1]))
DOUBLE = torch.float64


def rosenbrock(w: Tensor) -> Tensor:
    return 100 * (w[0] ** 2 - w[1]) ** 2 + (w[0] - 1) ** 2


def booth(w: Tensor) -> Tensor:
    return (w[0] + 2 * w[1] - 7) ** 2 + (2 * w[0] + w[1] - 5) ** 2


def rotate(theta: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return theta.cos() * u - theta.sin() * v, theta.sin() * u + theta.cos() * v


def act_on_rosenbrock(theta: Tensor, w: Tensor) -> Tensor:
    u, v = rotate(theta, 10 * (w[0] ** 2 - w[1]), w[0] - 1)
    return torch.stack([v + 1, (v + 1) ** 2 - u / 10])


def act_on_booth(theta: Tensor, w: Tensor) -> Tensor:
    u, v = rotate(theta, w[0] + 2 * w[1] - 7, 2 * w[0] + w[1] - 5)
    return torch.stack([-u / 3 + 2 * v / 3 + 1, 2 * u / 3 - v / 3 + 3])


def descend(loss, act, start, lr, steps, jump, ascent, seed) -> tuple[list[float], list[tuple[float, float]]]:
    """Gradient descent on two numbers, with a teleport before each step that `jump` names.

    Returns the losses, and of each teleport the change of the loss and of the gradient's norm.
    """
    w, losses, jumps = torch.tensor(start, dtype=DOUBLE), [], []
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if jump(step):
            theta = torch.pi * torch.rand((), generator=generator, dtype=DOUBLE)
            moved = ascend(act, loss, w, theta, *ascent)
            jumps.append((abs(loss(moved) - loss(w)).item(), (size([moved], loss) / size([w], loss)) ** 0.5))
            w = moved
        w = w.requires_grad_()
        (g,) = torch.autograd.grad(loss(w), w)
        w = (w - lr * g).detach()
        losses.append(loss(w).item())
    return losses, jumps


def two_numbers(panels) -> list[Check]:
    checks = []
    cases = (
        ("Rosenbrock", rosenbrock, act_on_rosenbrock, (-1.0, -1.0), 1e-3, 1000, lambda t: t % 100 == 99, (0.1, 10)),
        ("Booth", booth, act_on_booth, (5.0, -5.0), 0.08, 10, lambda t: t == 4, (1e-3, 10)),
    )
    targets = {"Rosenbrock": (0.1113, 2.9e-9), "Booth": (2.2025, 9.45e-4)}
    for axes, (name, loss, act, start, lr, steps, jump, ascent) in zip(panels, cases, strict=True):
        plain, _ = descend(loss, act, start, lr, steps, lambda t: False, ascent, 0)
        runs = [descend(loss, act, start, lr, steps, jump, ascent, seed) for seed in range(10)]
        found = median(losses[-1] for losses, _ in runs)
        change = max(jump[0] for _, jumps in runs for jump in jumps)
        grown = min(jump[1] for _, jumps in runs for jump in jumps)
        passed = found < 1e-6 if name == "Rosenbrock" else abs(found / targets[name][1] - 1) < 0.01
        checks.append(Check(f"{name}, gradient descent: last loss", targets[name][0], plain[-1]))
        checks.append(Check(f"{name}, teleports: last loss, median of 10", targets[name][1], found, passed))
        axes.plot(plain, label="gradient descent")
        checks.append(
            Check(f"{name}: change of the loss in a teleport, the largest", "< 1e-10", change, change < 1e-10)
        )
        checks.append(Check(f"{name}: |∇L| there / here, the smallest", "> 1", grown, grown > 1))
        axes.plot(runs[0][0], label="with teleports")
        axes.set(title=name, yscale="log", xlabel="step")
        axes.legend(fontsize=8)
    return checks


def quadratic() -> list[Check]:
    """Climb the group of `wᵀAw`; from there on the gradient stays the largest of its level set at every step."""
    A = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=DOUBLE))
    start = torch.tensor([1.0, 0.5, 0.2], dtype=DOUBLE)
    values, vectors = torch.linalg.eigh(A)

    def loss(w: Tensor) -> Tensor:
        return w @ A @ w

    def act(angles: Tensor, w: Tensor) -> Tensor:
        first, second, third = angles
        none = torch.zeros_like(first)
        rows = ((none, first, second), (-first, none, third), (-second, -third, none))
        return act_on_quadratic(A, torch.linalg.matrix_exp(torch.stack([torch.stack(row) for row in rows])), w)

    w = ascend(act, loss, start, torch.zeros(3, dtype=DOUBLE), lr=0.01, steps=300)
    best = (loss(start) / values[-1]).sqrt() * vectors[:, -1]
    change, grown = abs(loss(w) - loss(start)).item(), (size([w], loss) / size([start], loss)) ** 0.5
    off = min(float((w - best).norm()), float((w + best).norm()))
    checks = [
        Check("quadratic: change of the loss in the teleport", "< 1e-10", change, change < 1e-10),
        Check("quadratic: |∇L| there / here", "> 1", grown, grown > 1),
        Check("quadratic: distance to ±√(L/λ) v of the largest λ", 0.0, off, off < 1e-6),
    ]
    worst = 0.0
    for _ in range(20):
        largest = 2 * (w @ A @ w * values[-1]).sqrt()
        worst = max(worst, abs(float((2 * A @ w).norm() / largest) - 1))
        w = w - 0.02 * 2 * A @ w
    return [*checks, Check("quadratic: |∇L| / largest on the level set − 1", 0.0, worst, worst < 1e-10)]


def ellipse() -> list[Check]:
    """Teleport once on `w₁² + 9w₂²`; descent then contracts by `1 − 2ηλ` of the largest λ at every step."""
    steps, lr, ascent = 20, 0.02, (0.002, 200)

    def loss(w: Tensor) -> Tensor:
        return w[0] ** 2 + 9 * w[1] ** 2

    def act(theta: Tensor, w: Tensor) -> Tensor:
        u, v = rotate(theta, w[0], 3 * w[1])
        return torch.stack([u, v / 3])

    plain, _ = descend(loss, act, (3.0, 0.5), lr, steps, lambda t: False, ascent, 0)
    runs = [descend(loss, act, (3.0, 0.5), lr, steps, lambda t: t == 0, ascent, seed) for seed in range(10)]
    found = median(losses[-1] for losses, _ in runs)
    change = max(jump[0] for _, jumps in runs for jump in jumps)
    best = 11.25 * (1 - 2 * lr * 9) ** (2 * steps)
    return [
        Check("ellipse, gradient descent: last loss", "", plain[-1]),
        Check("ellipse, one teleport: last loss, median of 10", best, found, abs(found / best - 1) < 0.01),
        Check("ellipse: change of the loss in the teleport", "< 1e-10", change, change < 1e-10),
    ]


def size(weights: list[Tensor], loss) -> float:
    """Return `|∇L|²`, of one tensor or of several."""
    weights = [W.detach().requires_grad_() for W in weights]
    value = loss(weights if len(weights) > 1 else weights[0])
    return sum(G.square().sum().item() for G in torch.autograd.grad(value, weights))


def transformer(axes) -> list[Check]:
    """Gradient descent on a tiny Qwen3 in float64, teleported once along neuron scales and V–O before step 10."""
    from pretraining.models import build_model, in_float64

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
    checks, found = [], {}
    for arm in ("plain", "teleported"):
        torch.manual_seed(0)
        model = in_float64(build_model("qwen3-tiny", None, sizes, None, None))
        x = torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss(model=model, x=x) -> Tensor:
            return cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())

        losses = []
        for step in tqdm(range(40), desc=arm, mininterval=2):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            losses.append(value.item())
            if arm == "teleported" and step == 10:
                layers = len(model.model.layers)
                for family, start in (
                    (neuron_scales, torch.zeros(layers, 96)),
                    (value_output, torch.zeros(layers, 2, 16, 16)),
                ):
                    gradients = {name: p.grad for name, p in model.named_parameters()}
                    T, ratio = climb(partial(family, model), start.double(), gradients, lr=0.1, steps=20)
                    teleport(model, family(model, T), loss)
                    checks.append(Check(f"tiny Qwen3, {family.__name__}: |∇L| there / here", "> 1", ratio, ratio > 1))
                    change = abs(loss().item() / losses[-1] - 1)
                    checks.append(Check("tiny Qwen3: change of the loss", "< 1e-10", change, change < 1e-10))
            optimizer.step()
        axes.plot(losses, label=arm)
        found[arm] = losses[20]
    axes.set(title="tiny Qwen3, gradient descent", xlabel="step")
    axes.legend(fontsize=8)
    return [
        *checks,
        Check(
            "tiny Qwen3, loss at step 20, teleported / plain", "[RECONSTRUCTED]", found["teleported"] / found["plain"]
        ),
    ]


def main() -> None:
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    checks = [*two_numbers(panels[:2]), *ellipse(), *quadratic(), *transformer(panels[2])]
    for axes in panels:
        axes.grid(alpha=0.3)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
