"""Teleports of MLPs, published and exact:  python recipes/reproduce/teleport_mlp.py

Source: Zhao et al., NeurIPS 2022, and its code (Rose-STL-Lab/Symmetry-Teleportation): `½|f(X) − Y|²`, LeakyReLU, widths
5-6-7-8, four samples, 300 steps, one teleport before step 5. The published action takes I − T for (I + T)^{-1} and the
inputs of a layer as they were before the layer below moved: of first order, it changes the loss. Beside it the exact
action, schedules, biases and tanh, mini-batches (algorithm 2), data that move too (algorithm 3, [RECONSTRUCTED]).
"""

from collections.abc import Callable, Iterable
from functools import partial
from statistics import fmean as mean

import matplotlib.pyplot as plt
import torch
from shared import Check, finish
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from tqdm import tqdm

from symlm.teleport import act_on_mlp, extended_atanh, extended_tanh
from symlm.teleport.nonlinear import with_ones

Weights = list[Tensor]
Loss = Callable[[Weights], Tensor]
LEAKY = (partial(leaky_relu, negative_slope=0.1), partial(leaky_relu, negative_slope=10.0))
TANH = (extended_tanh, extended_atanh)
SEEDS = range(5)


def forward(weights: Weights, X: Tensor, activation=LEAKY[0], bias: bool = False) -> Tensor:
    h = with_ones(X) if bias else X
    for W in weights[:-1]:
        h = with_ones(activation(W @ h)) if bias else activation(W @ h)
    return weights[-1] @ h


def split(theta: Tensor, weights: Weights) -> list[Tensor]:
    """Return a matrix T of the Lie algebra for each hidden layer."""
    widths = [len(W) for W in weights[:-1]]
    return [T.view(k, k) for T, k in zip(theta.split([k * k for k in widths]), widths, strict=True)]


def published(theta: Tensor, weights: Weights, X: Tensor, stale: bool = True) -> Weights:
    """Act to first order, as the authors' code does; its search alone has the inputs that the layer below moved."""
    moved, h = list(weights), X
    for m, T in enumerate(split(theta, weights)):
        eye = torch.eye(len(T), dtype=T.dtype)
        outputs = (eye + T) @ LEAKY[0](moved[m] @ h)
        moved[m], moved[m + 1] = LEAKY[1](outputs) @ torch.linalg.pinv(h), moved[m + 1] @ (eye - T)
        h = LEAKY[0]((weights if stale else moved)[m] @ h)
    return moved


def exact(theta: Tensor, weights: Weights, X: Tensor, pair=LEAKY, bias: bool = False) -> Weights:
    """Act with `I + T` and its inverse, one layer after the other."""
    for m, T in enumerate(split(theta, weights)):
        weights = act_on_mlp(weights, X, m, torch.eye(len(T), dtype=T.dtype) + T, *pair, bias=bias)
    return weights


def jump(
    act, loss: Loss, weights: Weights, X: Tensor, rate: float, ascents: int, longest: float = torch.inf
) -> Weights:
    """Climb in steps at the identity, each of which is taken before the next."""
    search = partial(published, stale=False) if act is published else act
    for _ in range(ascents):
        weights = [W.detach().requires_grad_() for W in weights]
        theta = weights[0].new_zeros(sum(len(W) ** 2 for W in weights[:-1])).requires_grad_()
        moved = search(theta, weights, X)
        gradients = torch.autograd.grad(loss(moved), moved, create_graph=True)
        (direction,) = torch.autograd.grad(torch.stack([G.square().sum() for G in gradients]).sum(), theta)
        weights = act(direction * (longest / direction.norm()).clamp(max=rate), weights, X)
    return [W.detach() for W in weights]


def square(loss: Loss, weights: Weights) -> float:
    weights = [W.detach().requires_grad_() for W in weights]
    return sum(float(G.square().sum()) for G in torch.autograd.grad(loss(weights), weights))


def problem(n: int, bias: bool = False, activation=LEAKY[0]) -> tuple[Weights, Tensor, Loss]:
    """Draw the weights, the data and the loss of a seed, in the order of the authors' code."""
    torch.manual_seed(n * n * 12345)
    weights = [torch.rand(m, k + bias).double() for m, k in ((6, 5), (7, 6), (8, 7))]
    X, Y = torch.rand(5, 4).double(), torch.rand(8, 4).double()
    return weights, X, lambda W: 0.5 * (forward(W, X, activation, bias) - Y).square().sum()


def run(build, act, rate: float, ascents: int, jumps: Iterable[int], n: int, longest=torch.inf, **kind):
    """Return the losses before each step, and of each teleport the loss and |∇L|² there, over those here."""
    weights, X, loss = problem(n, **kind)
    parameters = [nn.Parameter(W) for W in weights]
    optimizer, losses, moves = build(parameters), [], []
    for step in range(300):
        if act is not None and step in jumps:
            here = [p.detach().clone() for p in parameters]
            there = jump(act, loss, here, X, rate, ascents, longest)
            moves.append((float(loss(there) / loss(here)), square(loss, there) / square(loss, here)))
            for p, W in zip(parameters, there, strict=True):
                p.data.copy_(W)
        optimizer.zero_grad()
        value = loss(parameters)
        value.backward()
        losses.append(value.item())
        optimizer.step()
    return losses, moves


DESCENT = partial(torch.optim.SGD, lr=1e-4)
ADAGRAD = partial(torch.optim.Adagrad, lr=0.1)
ARMS = {  # optimizer, action, rate and steps of ascent; the loss at 6, 50 and 299, measured from the authors' code
    "GD": (DESCENT, None, 0.0, 0, (507.7, 22.4, 1.93)),
    "GD, published": (DESCENT, published, 1e-7, 8, (118.2, 2.46, 1.58)),
    "GD, exact": (DESCENT, exact, 1e-7, 8, (119.6, 10.1, 2.2)),
    "AdaGrad": (ADAGRAD, None, 0.0, 0, (122.5, 6.95, 1.39)),
    "AdaGrad, published": (ADAGRAD, published, 1e-5, 2, (25.6, 2.48, 1.25)),
    "AdaGrad, exact": (ADAGRAD, exact, 1e-5, 2, (2816, 3.18, 1.42)),
    "AdaGrad, exact, 1e-6": (ADAGRAD, exact, 1e-6, 2, (120.4, 5.62, 1.31)),
}


def regression(axes) -> list[Check]:
    """Run every arm at the source's own setting."""
    checks, at_50 = [], {}
    for arm, (build, act, rate, ascents, targets) in tqdm(ARMS.items(), desc="regression"):
        runs = [run(build, act, rate, ascents, [5], n) for n in SEEDS]
        curve = [mean(values) for values in zip(*(losses for losses, _ in runs), strict=True)]
        axes.plot(curve, label=arm)
        at_50[arm] = curve[50]
        for place, target in zip((6, 50, 299), targets, strict=True):
            same = abs(curve[place] / target - 1) < 0.02 if act is not exact else None
            checks.append(Check(f"{arm}: loss at {place}, mean of 5", target, curve[place], same))
        if act is not None:
            changes, ratios = zip(*(move for _, moves in runs for move in moves), strict=True)
            off = max(abs(change - 1) for change in changes)
            found = f"{min(changes) - 1:+.0%} … {max(changes) - 1:+.0%}" if act is published else off
            passed = off > 0.3 if act is published else off < 1e-10
            target = "not 0: −98 % … −39 %" if act is published else "< 1e-10"
            checks.append(Check(f"{arm}: change of the loss in a teleport", target, found, passed))
            checks.append(Check(f"{arm}: |∇L|² there / here", "", f"{min(ratios):.2g} … {max(ratios):.3g}"))
    faster = at_50["GD, exact"] < at_50["GD"]
    checks.append(Check("exact action, GD: below plain at 50", "yes", str(faster), faster))
    axes.set(title="regression, mean of 5", yscale="log", xlabel="step")
    axes.legend(fontsize=7)
    return checks


SCHEDULES = {"5": [5], "50": [50], "150": [150], "5, 50, 150": [5, 50, 150], "every 10 to 100": range(5, 101, 10)}


def schedules(axes) -> list[Check]:
    """Teleport exactly at other steps, and oftener, under gradient descent."""
    checks = []
    for name, jumps in tqdm(SCHEDULES.items(), desc="schedules"):
        runs = [run(DESCENT, exact, 1e-7, 8, jumps, n, longest=0.1) for n in SEEDS]
        curve = [mean(values) for values in zip(*(losses for losses, _ in runs), strict=True)]
        axes.plot(curve, label=name)
        for place in (50, 299):
            checks.append(Check(f"teleports at {name}: loss at {place}", "none reported", curve[place]))
    axes.set(title="schedules, exact action", yscale="log", xlabel="step")
    axes.legend(fontsize=7)
    return checks


def biases() -> list[Check]:
    """Teleport networks with biases, of LeakyReLU and of tanh with its tangents."""
    checks = []
    for name, pair in (("LeakyReLU", LEAKY), ("extended tanh", TANH)):
        kind, act = {"bias": True, "activation": pair[0]}, partial(exact, pair=pair, bias=True)
        runs = [run(partial(torch.optim.SGD, lr=1e-3), act, 1e9, 8, [5], n, longest=0.1, **kind) for n in SEEDS]
        off = max(abs(change - 1) for _, moves in runs for change, _ in moves)
        grown = min(ratio for _, moves in runs for _, ratio in moves)
        checks.append(Check(f"biases, {name}: change of the loss", "< 1e-10", off, off < 1e-10))
        checks.append(Check(f"biases, {name}: |∇L|² there / here, smallest", "> 1", grown, grown > 1))
    return checks


def main() -> None:
    torch.set_num_threads(1)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    checks = [*regression(panels[0]), *schedules(panels[1]), *biases()]
    for axes in panels:
        axes.grid(alpha=0.3)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
