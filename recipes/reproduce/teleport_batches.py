"""Teleports on mini-batches, and of the data, on the digits:  python recipes/reproduce/teleport_batches.py

Source: Zhao et al., NeurIPS 2022, algorithms 2 and 3. Its MNIST settings are in neither text nor code at hand, so that
everything here is [RECONSTRUCTED] and has no target: in the first epochs the first mini-batches are teleported on, then
gradient descent goes on as ever. An action that is exact for a batch is not for other samples: their loss is printed.
"""

from functools import partial
from statistics import fmean as mean

import matplotlib.pyplot as plt
import torch
from digits import CLASSES, digits
from shared import Check, finish
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, leaky_relu
from tqdm import tqdm

from symlm.teleport import DataTransform, act_on_mlp, ascend, climb, data_transformation, fold_, teleport

WIDTH, BATCH, EPOCHS, LR = 64, 32, 6, 0.05  # a batch that is no larger than the width, where the action is exact
TELEPORTED, BATCHES = (0, 1), 4  # epochs, and the mini-batches of each
SEEDS = range(3)
ACTIVATION, INVERSE = partial(leaky_relu, negative_slope=0.1), partial(leaky_relu, negative_slope=10.0)


def samples(seed: int) -> tuple[Tensor, Tensor]:
    X, y, _, _ = digits("unit", seed)
    return X.double(), y


def network(seed: int) -> nn.Sequential:
    """Return three layers without biases, behind a transformation of the data that is the identity at first."""
    torch.manual_seed(seed)
    layers = [
        nn.Linear(64, WIDTH, bias=False),
        nn.LeakyReLU(0.1),
        nn.Linear(WIDTH, WIDTH, bias=False),
        nn.LeakyReLU(0.1),
    ]
    return nn.Sequential(DataTransform(64), *layers, nn.Linear(WIDTH, CLASSES, bias=False)).double()


def jump(model: nn.Sequential, X: Tensor, y: Tensor) -> None:
    """Climb both hidden layers on one mini-batch, two steps of length 0.1 each."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p.detach() for p in trained]

    def loss(W: list[Tensor]) -> Tensor:
        return cross_entropy((W[2] @ ACTIVATION(W[1] @ ACTIVATION(W[0] @ X.mT))).mT, y)

    for layer in (0, 1, 0, 1):
        eye = torch.eye(WIDTH).double()

        def act(T: Tensor, W: list[Tensor], layer=layer, eye=eye) -> list[Tensor]:
            return act_on_mlp(W, X.mT, layer, eye + T, ACTIVATION, INVERSE)

        weights = ascend(act, loss, weights, torch.zeros_like(eye), 1e9, 1, longest=0.1)
    with torch.no_grad():
        for p, W in zip(trained, weights, strict=True):
            p.copy_(W)


def stochastic(seed: int, teleported: bool, faster: float) -> tuple[list[float], list[float], list[float]]:
    """Return the training loss after each epoch, and what a teleport made of the batch's loss and of all samples'."""
    X, y = samples(seed)
    model = network(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], faster * LR)
    losses, on_batch, on_all = [], [], []

    @torch.no_grad()
    def value(rows: Tensor | slice = slice(None)) -> float:
        return cross_entropy(model(X[rows]), y[rows]).item()

    for epoch in range(EPOCHS):
        for place, batch in enumerate(torch.randperm(len(X)).split(BATCH)):
            if teleported and epoch in TELEPORTED and place < BATCHES:
                before = value(batch), value()
                jump(model, X[batch], y[batch])
                on_batch.append(value(batch) / before[0])
                on_all.append(value() / before[1])
            optimizer.zero_grad()
            cross_entropy(model(X[batch]), y[batch]).backward()
            optimizer.step()
        losses.append(value())
    return losses, on_batch, on_all


def with_data(seed: int, teleported: bool, faster: float, steps: int = 60) -> tuple[list[float], float, float]:
    """Return the losses of full-batch descent, |∇L| there over here, and how far folding moves the outputs.

    The data move with the first layer before step 5, and are folded back into it at the end.
    """
    X, y = samples(seed)
    model, ratio, losses = network(seed), 1.0, []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], faster * LR)

    def loss() -> Tensor:
        return cross_entropy(model(X), y)

    for step in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        if teleported and step == 5:
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            family = partial(data_transformation, "0", "1")
            T, ratio = climb(family, torch.zeros(64, 64).double(), gradients, lr=0.1, steps=10)
            teleport(model, family(T), loss, optimizer)
        optimizer.step()
    with torch.no_grad():
        outputs = model(X)
        fold_(model[0], model[1])
        return losses, ratio, float((model(X) - outputs).norm() / outputs.norm())


def main() -> None:
    torch.set_num_threads(1)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    arms = {"plain": (False, 1.0), "plain, twice the rate": (False, 2.0), "teleported": (True, 1.0)}
    runs = {arm: [stochastic(seed, *how) for seed in tqdm(SEEDS, desc=arm)] for arm, how in arms.items()}
    data = {arm: [with_data(seed, *how) for seed in SEEDS] for arm, how in arms.items()}
    checks = []
    for arm in arms:
        curve = [mean(values) for values in zip(*(losses for losses, *_ in runs[arm]), strict=True)]
        panels[0].plot(curve, label=arm)
        for epoch in (0, 1, EPOCHS - 1):
            checks.append(Check(f"mini-batches, {arm}: training loss after epoch {epoch + 1}", "none", curve[epoch]))
    on_batch = max(abs(ratio - 1) for _, ratios, _ in runs["teleported"] for ratio in ratios)
    on_all = [ratio - 1 for _, _, ratios in runs["teleported"] for ratio in ratios]
    checks.append(Check("mini-batches: change of the batch's loss", "< 1e-6", on_batch, on_batch < 1e-6))
    checks.append(Check("mini-batches: change of all samples' loss", "", f"{min(on_all):+.2g} … {max(on_all):+.2g}"))
    for arm in arms:
        curve = [mean(values) for values in zip(*(losses for losses, *_ in data[arm]), strict=True)]
        panels[1].plot(curve, label=arm)
        checks.append(Check(f"data transformation, {arm}: loss after 59 steps", "none", curve[-1]))
    grown, off = min(ratio for _, ratio, _ in data["teleported"]), max(off for *_, off in data["teleported"])
    checks.append(Check("data transformation: |∇L| of the first layer, there / here", "> 1", grown, grown > 1))
    checks.append(Check("data transformation: outputs after folding it back", "< 1e-10", off, off < 1e-10))
    for axes, title, x in zip(panels, ("mini-batches", "data transformation"), ("epoch", "step"), strict=True):
        axes.set(title=title, yscale="log", xlabel=x, ylabel="training loss")
        axes.legend()
        axes.grid(alpha=0.3)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
