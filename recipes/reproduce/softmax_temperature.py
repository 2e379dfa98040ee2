"""How a step changes the loss, at six temperatures:  python recipes/reproduce/softmax_temperature.py

Source: arXiv 2603.13552, the temperature fingerprint: digits, an MLP 64-128-128-10 trained at the temperature T, a step
of length τ along the gradient. By τ the curves are apart, by `r = τΔ/(πT)` nearly one. How the source's 0.992 and 0.164
are computed is not public: here it is the deviation over temperatures of ln(loss ratio), in the mean from 0.1 on.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from digits import digits
from shared import Check, finish
from torch import Tensor, nn
from tqdm import tqdm

from symlm.step_control import StepControl

TEMPERATURES, SEEDS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), range(3)
STEPS, RATE, BATCH, POINTS = 120, 0.01, 256, 60


def trained(T: float, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the network after Adam's steps on `cross_entropy(z/T)`, and the training set."""
    torch.manual_seed(seed)
    X, y, _, _ = digits("unit", seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        batch = torch.randperm(len(X))[:BATCH]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[batch]) / T, y[batch]).backward()
        optimizer.step()
    return model, X, y


def curve(T: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return step lengths τ, their r, and the logarithm of the loss there over the loss before."""
    model, X, y = trained(T, seed)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(X) / T, y)

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    size = torch.stack([G.norm() for G in gradients]).norm()
    direction = [-G / size for G in gradients]
    control = StepControl(model, torch.optim.SGD(parameters, lr=1.0), logits=lambda model, X: model(X) / T)
    ratio = control.radius_ratio(direction, X)  # of a step of length 1
    start, found = [p.detach().clone() for p in parameters], []
    lengths = torch.logspace(-2, torch.tensor(max(4 / ratio, 2.0)).log10().item(), POINTS)
    with torch.no_grad():
        before = loss()
        for tau in lengths.tolist():
            for p, W, U in zip(parameters, start, direction, strict=True):
                p.copy_(W + tau * U)
            found.append((loss() / before).log())
    return lengths, lengths * ratio, torch.stack(found)


def deviation(places: list[Tensor], values: list[Tensor]) -> float:
    """Return the deviation over curves, in the mean of the places that all of them have from 0.1 on."""
    grid = torch.logspace(-1, torch.tensor(min(float(x.max()) for x in places)).log10().item(), 100)
    rows = [torch.as_tensor(np.interp(grid, x, v)) for x, v in zip(places, values, strict=True)]
    return float(torch.stack(rows).std(0, correction=0).mean())


def main() -> None:
    torch.set_num_threads(1)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    spread: dict[str, list[float]] = {"τ": [], "r": []}
    for seed in tqdm(SEEDS):
        curves = [curve(T, seed) for T in TEMPERATURES]
        for k, name in enumerate(spread):
            spread[name].append(deviation([c[k] for c in curves], [c[2] for c in curves]))
            for T, c in zip(TEMPERATURES, curves, strict=True):
                if seed == 0:
                    panels[k].plot(c[k], c[2], label=f"T = {T:g}")
            panels[k].set(xscale="log", xlabel=name, ylabel="ln of the loss over the loss before")
    panels[0].legend()
    raw, scaled = (sum(values) / len(SEEDS) for values in spread.values())
    checks = [
        Check("deviation over temperatures of ln(loss ratio), by τ [definition RECONSTRUCTED]", 0.992, raw, raw > 0.8),
        Check("the same by r", 0.164, scaled, scaled < 0.4),
        Check("their ratio", 0.165, scaled / raw, scaled / raw < 0.35),
    ]
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
