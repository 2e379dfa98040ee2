"""One step of length r·ρ along the gradient, six architectures:  python recipes/reproduce/softmax_architectures.py

Source: arXiv 2603.13552, "a single step can wipe learned accuracy": networks trained on the digits, then one step, and
the share of the test accuracy that it leaves. None fails below r = 1, and most have at 10; in the source those with
norms fail first, which is printed and not required. The targets are read off its figure; sizes and training are ours.
"""

from statistics import median

import matplotlib.pyplot as plt
import torch
from digits import CLASSES, accuracy, digits
from shared import Check, finish
from torch import Tensor, nn
from tqdm import tqdm

from symlm.step_control import StepControl, evaluating

SEEDS, STEPS, BATCH, WIDTH = range(3), 200, 64, 64
RATIOS = torch.logspace(-2, 2, 25).tolist()


class Tokens(nn.Module):
    """Attention of one head over the rows of an image, and a feed-forward part, both behind norms."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(8, width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.places = nn.Parameter(0.1 * torch.randn(8, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.view(-1, 8, 8)) + self.places
        q, k, v = self.qkv(self.norms[0](h)).chunk(3, dim=-1)
        h = h + self.out((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
        h = h + self.ffn(self.norms[1](h))
        return self.head(self.norms[2](h).mean(1))


def mlp(norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (64, WIDTH):
        layers += [nn.Linear(inputs, WIDTH), *([nn.LayerNorm(WIDTH)] if norm else []), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def cnn(norm: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, CLASSES))


ARCHITECTURES = {  # how it is built, and the share that is left at r = 1 and at r = 10, read off the source's figure
    "linear": (lambda: nn.Linear(64, CLASSES), "1.00", "0.86"),
    "MLP": (lambda: mlp(False), "1.00", "0.81"),
    "MLP + LayerNorm": (lambda: mlp(True), "0.97", "0.23"),
    "CNN": (lambda: cnn(False), "0.99", "0.26"),
    "CNN + BatchNorm": (lambda: cnn(True), "0.92", "0.11"),
    "Transformer": (Tokens, "0.93", "0.14"),
}


def trained(build, seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    data = digits("unit", seed)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        batch = torch.randint(len(data[0]), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0][batch]), data[1][batch]).backward()
        optimizer.step()
    return model, data


def left(build, seed: int) -> list[float]:
    """Return the test accuracy after one step of each r, over that before."""
    model, (X, y, held, held_y) = trained(build, seed)
    parameters = list(model.parameters())
    with evaluating(model):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(model(X), y), parameters)
        size = torch.stack([G.norm() for G in gradients]).norm()
        direction = [-G / size for G in gradients]
        unit = StepControl(model, torch.optim.SGD(parameters, lr=1.0)).radius_ratio(direction, X)  # r of length 1
        start, before = [p.detach().clone() for p in parameters], accuracy(model, held, held_y)
        shares = []
        for r in RATIOS:
            for p, W, U in zip(parameters, start, direction, strict=True):
                p.data.copy_(W + r / unit * U)
            shares.append(accuracy(model, held, held_y) / before)
    return shares


def main() -> None:
    torch.set_num_threads(1)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    checks, below, failed = [], 1.0, 0
    for name, (build, at_one, at_ten) in tqdm(ARCHITECTURES.items()):
        curve = [median(shares) for shares in zip(*(left(build, seed) for seed in SEEDS), strict=True)]
        axes.plot(RATIOS, curve, label=name)
        below = min(below, *(share for r, share in zip(RATIOS, curve, strict=True) if r < 1))
        for r, target in ((1, at_one), (10, at_ten)):
            found = curve[min(range(len(RATIOS)), key=lambda k: abs(RATIOS[k] - r))]
            failed += r == 10 and found < 0.6
            checks.append(Check(f"{name}, r = {r}: share of the test accuracy, median of 3", target, found))
    checks.append(Check("r < 1: the smallest share of all six", "none fails", below, below > 0.85))
    checks.append(Check("r = 10: architectures below 0.6", "most", f"{failed} of 6", failed >= 3))
    axes.axvline(1, color="gray", linestyle="--")
    axes.set(xscale="log", xlabel="r", ylabel="share of the test accuracy that one step leaves")
    axes.legend()
    axes.grid(alpha=0.3)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
