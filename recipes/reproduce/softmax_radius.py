"""Learning-rate spikes, plain, clipped and controlled:  python recipes/reproduce/softmax_radius.py

Source: arXiv 2603.13552. Digits, an MLP 64-128-10, Adam, 200 steps of 64; from step 50 on the rate is multiplied.
"""

from statistics import median

import matplotlib.pyplot as plt
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
            control.step(X)
            largest = max(largest, control.last.taken if control.last else 0.0)
        else:
            if arm == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        losses.append(loss.item())
    return losses, accuracy(model, held, held_y), largest


def main() -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    checks, largest = [], 0.0
    for (lr, spike), targets in tqdm(SPIKES.items()):
        for arm, target in zip(ARMS, targets, strict=True):
            runs = [train(arm, lr, spike, seed) for seed in range(3)]
            found = median(result for _, result, _ in runs)
            largest = max(largest, *(r for *_, r in runs))
            passed = found >= 0.94 if arm == "controlled" else None
            checks.append(Check(f"{lr:g} × {spike:,}, {arm}: test accuracy", target, found, passed))
            if (lr, spike) == (1e-2, 10000):
                axes.plot(runs[0][0], label=arm)
    checks.append(Check("largest r that was taken", 1.0, largest, largest < 1 + 1e-3))
    axes.set(yscale="log", xlabel="step", ylabel="training loss", title="Adam at 1e-2, times 10,000 from step 50 on")
    axes.legend()
    axes.grid(alpha=0.3)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
