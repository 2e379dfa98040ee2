"""A language model of bytes, small enough for seconds: what reproductions that need one train on."""

import argparse
import doctest
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shared import Check
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import symlm

Arm = Callable[[float, nn.Module], Any]  # a dial and a model -> what `train` builds

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
LENGTH, BATCH, HELD = 64, 16, 64


def text() -> Tensor:
    """Return the source of some modules of Python's standard library, as bytes."""
    sources = [Path(module.__file__).read_bytes() for module in (argparse, inspect, typing, doctest)]
    return torch.frombuffer(bytearray(b"".join(sources)), dtype=torch.uint8).long()


def train(
    build: Callable[[torch.nn.Module], Any],
    steps: int,
    seed: int = 0,
    rate: Callable[[int], float] = lambda step: 1.0,
    clip: float | None = None,
    kind: str = "qwen3",
    batch: int = BATCH,
    **changes: int,
) -> tuple[list[float], float, Any]:
    """Train on random windows; return the training losses, the held-out loss and what `build` made.

    build: model -> an optimizer, or a `StepControl` around one; rate: what its rates are multiplied by at a step;
    kind: the architecture, one of transformers'; batch: windows a step; changes: of `SIZES`.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes}))
    taker = build(model)
    optimizer = getattr(taker, "optimizer", taker)
    rates, data, losses = [group["lr"] for group in optimizer.param_groups], text(), []
    held, data = data[: HELD * LENGTH].view(HELD, LENGTH), data[HELD * LENGTH :]
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * rate(step)
        starts = torch.randint(len(data) - LENGTH, (batch,))
        x = torch.stack([data[start : start + LENGTH] for start in starts.tolist()])
        optimizer.zero_grad()
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if taker is optimizer:
            optimizer.step()
        else:
            taker.step(input_ids=x)
        losses.append(loss.item())
    with torch.no_grad():
        return losses, model(input_ids=held, labels=held).loss.item(), taker


def tuned(
    arm: Arm, dials: Iterable[float], steps: int, seeds: Iterable[int], **how: Any
) -> tuple[dict[float, float], float, list[float]]:
    """Train an arm at every dial on seed 0, and at the best on other seeds.

    Returns: held-out losses by dial; the best dial; its losses on the other seeds.
    """
    found = {dial: train(partial(arm, dial), steps, **how)[1] for dial in dials}
    best = min(found, key=found.__getitem__)
    return found, best, [train(partial(arm, best), steps, seed, **how)[1] for seed in seeds]


def preset(name: str, dial: float, model: nn.Module) -> symlm.SymOptimizer:
    """Return the arm of a preset."""
    return symlm.SymOptimizer(model, dial, name)


def compare(axes, arms: Mapping[str, Arm], dials: Iterable[float], steps: int, seeds: Iterable[int]) -> list[Check]:
    """Tune each arm, plot its losses over the dial, and return its losses on the other seeds."""
    checks = []
    for name, arm in tqdm(arms.items(), desc="language model", mininterval=2):
        found, best, losses = tuned(arm, dials, steps, seeds)
        axes.plot(found.keys(), found.values(), marker="o", label=name)
        text = f"{sum(losses) / len(losses):.3f}: {', '.join(f'{loss:.3f}' for loss in losses)}"
        checks.append(Check(f"bytes, {name}, dial {best:g}: mean held-out loss: of each seed", "none published", text))
    axes.set(xscale="log", xlabel="dial", ylabel="held-out loss", title=f"tiny Qwen3, {steps} steps, seed 0")
    axes.legend()
    return checks
