"""Learning-rate spikes, plain, clipped and controlled:  python recipes/reproduce/softmax_radius.py

Source: arXiv 2603.13552. Digits, an MLP 64-128-10, Adam, 200 steps of 64; from step 50 on the rate is multiplied. The
same on a tiny Qwen3 of bytes, 60 steps, from step 20 on.
"""

from statistics import median

import matplotlib.pyplot as plt
import tiny_lm
import torch
from digits import accuracy, digits
from shared import Check, finish
from torch import nn
from tqdm import tqdm

from symlm.step_control import StepControl

SPIKES = {(1e-4, 1000): (0.950, 0.942, 0.969), (1e-3, 1000): (0.100, 0.928, 0.964)}
SPIKES |= {(1e-2, 1000): (0.100, 0.100, 0.978), (1e-2, 10000): (0.100, 0.103, 0.978)}
ARMS = ("plain", "clipped", "controlled")


def train(arm: str, lr: float, spike: float, seed: int) -> tuple[list[float], float, float]:
    """Return the training losses, the test accuracy and the largest r that was taken."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    X, y, held, held_y = digits("unit", seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    control = StepControl(model, optimizer)
    losses, largest = [], 0.0
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = lr * (spike if step >= 50 else 1)
        batch = torch.randint(len(X), (64,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X[batch]), y[batch])
        loss.backward()
        if arm == "controlled":
            before = [p.detach().clone() for p in model.parameters()]
            control.step(X)
            largest = max(largest, ratio_taken(control, before, X))
        else:
            if arm == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        losses.append(loss.item())
    return losses, accuracy(model, held, held_y), largest


@torch.no_grad()
def ratio_taken(control: StepControl, before: list[torch.Tensor], X: torch.Tensor) -> float:
    """Measure r of the step that was really made from these parameters."""
    after = [p.clone() for p in control.model.parameters()]
    for p, old in zip(control.model.parameters(), before, strict=True):
        p.copy_(old)
    r = control.radius_ratio([new - old for new, old in zip(after, before, strict=True)], X)
    for p, new in zip(control.model.parameters(), after, strict=True):
        p.copy_(new)
    return r


def language_model(axes) -> list[Check]:
    """Multiply the rate of a language model's Adam; the loss that it ends with, uniform bytes being 5.55."""
    checks = []
    for spike in (1000, 10000):
        ended = {}
        for arm in tqdm(ARMS, desc=f"language model × {spike:,}", mininterval=2):
            losses = spiked(arm, spike)
            before, ended[arm] = sum(losses[15:20]) / 5, sum(losses[-5:]) / 5
            passed = ended[arm] < before if arm == "controlled" else None
            checks.append(Check(f"bytes, 1e-3 × {spike:,}, {arm}: loss", f"{before:.2f} before", ended[arm], passed))
            if spike == 1000:
                axes.plot(losses, label=arm)
        below = ended["controlled"] < ended["plain"]
        checks.append(Check("  controlled below plain", "yes", str(below), below))
    axes.set(yscale="log", xlabel="step", ylabel="training loss", title="tiny Qwen3, 1e-3, times 1,000 from step 20 on")
    axes.legend()
    return checks


def spiked(arm: str, spike: float) -> list[float]:
    """Return the training losses of an arm on the language model."""

    def build(model: nn.Module) -> torch.optim.Optimizer | StepControl:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        return StepControl(model, optimizer) if arm == "controlled" else optimizer

    def rate(step: int) -> float:
        return spike if step >= 20 else 1.0

    return tiny_lm.train(build, 60, rate=rate, clip=1.0 if arm == "clipped" else None)[0]


def main() -> None:
    figure, (axes, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    checks, largest = [], 0.0
    for (lr, spike), targets in tqdm(SPIKES.items()):
        for arm, target in zip(ARMS, targets, strict=True):
            runs = [train(arm, lr, spike, seed) for seed in range(3)]
            found = median(result for _, result, _ in runs)
            largest = max(largest, *(r for *_, r in runs))
            passed = found >= 0.95 if arm == "controlled" else None
            if arm == "plain" and target == 0.1:
                passed = found < 0.2
            checks.append(Check(f"{lr:g} × {spike:,}, {arm}: test accuracy", target, found, passed))
            if (lr, spike) == (1e-2, 10000):
                axes.plot(runs[0][0], label=arm)
    checks.append(Check("largest r that was taken", 1.0, largest, largest < 1 + 1e-3))
    axes.set(yscale="log", xlabel="step", ylabel="training loss", title="Adam at 1e-2, times 10,000 from step 50 on")
    axes.legend()
    checks += language_model(right)
    for panel in (axes, right):
        panel.grid(alpha=0.3)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
