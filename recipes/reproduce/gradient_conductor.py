"""Two losses that conflict, summed and conducted:  python recipes/reproduce/gradient_conductor.py

Source: arXiv 2509.07252, whose experiments (masked autoencoders on ImageNet and CT, L1 against SSIM) take GPUs. Here:
two quadratics in closed form; and the same two losses on an autoencoder of the digits, as the source sets Adam: the
conductor's mean of 0.85 in the place of Adam's. Each arm has the same trials, three rates on a seed that is not
reported, and sees the same number of images a step.
"""

from statistics import fmean

import matplotlib.pyplot as plt
import torch
from digits import digits
from shared import Check, finish
from torch import Tensor, nn
from tqdm import tqdm

from symlm.gradient_conductor import GradientConductor

SEEDS, STEPS, BATCH, RATES = 3, 400, 64, (2e-3, 4e-3, 8e-3)
WEIGHTS = {"l1": 0.85, "ssim": 0.15}  # those of the source's README
ARMS = ("summed", "conducted", "stochastic")


def quadratics(is_conducted: bool) -> float:
    """Descend on `100|w|²` and `|w − 1|²` by steps of unit length; return how far along from 0 to 1 it ends."""
    torch.manual_seed(0)
    w, target = nn.Parameter(3 * torch.randn(12, dtype=torch.float64)), torch.ones(12, dtype=torch.float64)
    conductor = GradientConductor(nn.ParameterList([w]), ("large", "small"))
    for step in range(1000):
        losses = {"large": 100 * w.square().sum(), "small": (w - target).square().sum()}
        if is_conducted:
            conductor.backward(losses)
            conductor.step()
        else:
            w.grad = torch.autograd.grad(losses["large"] + losses["small"], w)[0]
        with torch.no_grad():
            w -= 0.5 * 0.99**step * w.grad / w.grad.norm().clamp(min=1e-12)
    return float(w.detach().mean())


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean structural similarity of images, (b, 64) in [0, 1], with one window, the whole image."""
    means, spreads = (x.mean(-1), y.mean(-1)), (x.var(-1, correction=0), y.var(-1, correction=0))
    across = (x * y).mean(-1) - means[0] * means[1]
    light = (2 * means[0] * means[1] + 1e-4) / (means[0] ** 2 + means[1] ** 2 + 1e-4)
    return (light * (2 * across + 9e-4) / (spreads[0] + spreads[1] + 9e-4)).mean()


def losses_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = model(x)
    return {"l1": WEIGHTS["l1"] * (y - x).abs().mean(), "ssim": WEIGHTS["ssim"] * (1 - ssim(y, x))}


def train(arm: str, lr: float, seed: int) -> tuple[dict[str, float], list[float]]:
    """Return the held-out losses, and the training sums."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    X, _, held, _ = digits("unit", seed)
    code = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    model = nn.Sequential(code, nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 64))
    conductor = GradientConductor(model, tuple(WEIGHTS), momentum=0.85)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.85 if arm == "summed" else 0.0, 0.95))
    sums = []
    for _ in range(STEPS):
        x = X[torch.randint(len(X), (BATCH,))]
        if arm == "stochastic":
            parts = [(name, losses_of(model, part)) for name, part in zip(WEIGHTS, x.chunk(2), strict=True)]
            for name, losses in parts:
                conductor.backward({name: losses[name]})
            sums.append(sum(losses[name].item() for name, losses in parts))
        else:
            losses = losses_of(model, x)
            sums.append(sum(losses.values()).item())
            if arm == "conducted":
                conductor.backward(losses)
            else:
                sum(losses.values()).backward()
        if arm != "summed":
            conductor.step()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        y = model(held)
        return {"L1": (y - held).abs().mean().item(), "1 − SSIM": (1 - ssim(y, held)).item()}, sums


def main() -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    summed, conducted = quadratics(False), quadratics(True)
    checks = [
        Check("quadratics 100 : 1, summed: place between the minima", 1 / 101, summed, abs(summed - 1 / 101) < 1e-3),
        Check("quadratics 100 : 1, conducted", "between", conducted, 0.05 < conducted < 0.95),
    ]
    runs = {}
    for arm in tqdm(ARMS):
        trials = {lr: train(arm, lr, SEEDS)[0] for lr in RATES}
        best = min(RATES, key=lambda lr: WEIGHTS["l1"] * trials[lr]["L1"] + WEIGHTS["ssim"] * trials[lr]["1 − SSIM"])
        runs[arm] = [train(arm, best, seed) for seed in range(SEEDS)]
        curve = torch.tensor([sums for _, sums in runs[arm]]).mean(0).unfold(0, 20, 20).mean(-1)
        axes.plot(curve, label=f"{arm}, {best:g}")
        checks.append(Check(f"digits, {arm}: best rate", "none reported", best))
    for what in ("L1", "1 − SSIM"):
        for arm in ARMS:
            found = fmean(held[what] for held, _ in runs[arm])
            checks.append(Check(f"digits, {arm}: held-out {what}", "none reported", found))
    means = {arm: fmean(held["1 − SSIM"] for held, _ in runs[arm]) for arm in ARMS}
    checks.append(Check("digits: conducted, 1 − SSIM of the sum's", "< 1", means["conducted"] / means["summed"]))
    axes.set(yscale="log", xlabel="20 steps", ylabel="0.85 L1 + 0.15 (1 − SSIM)", title="autoencoder of the digits")
    axes.legend()
    axes.grid(alpha=0.3)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
