"""The paper's routers on a mixture of experts of bytes:  python recipes/reproduce/paper_routers.py

Source: arXiv 2605.18106, whose router study has one rate, 7.5e-4, for rules that move by other lengths at it. Its
losses are of the token after the next, of one seed, at 4.9 billion tokens (OLMoE): what is printed beside ours is their
distance from the row router, and no criterion; of the hybrid and the uncentered router no figure was found. Every
router has the same trials, that rate times 1, 10 and 100; one seed chooses, another is reported. `--steps 5`: a look.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial

import matplotlib.pyplot as plt
import tiny_lm
import torch
from shared import Check, finish
from torch import Tensor, nn
from tqdm import tqdm

import symlm
from symlm.diagnostics import router_metrics

RATE, MULTIPLES, CHOICES = 7.5e-4, (1.0, 10.0, 100.0), 2
MODEL = {"num_experts": 8, "num_experts_per_tok": CHOICES, "intermediate_size": 48, "num_key_value_heads": 4}
ROUTERS = {
    "paper-row": "0",
    "paper-left-router": "none: its scripts have alpha = 1",
    "paper-left-router-alpha-1": "-0.012",
    "paper-hybrid-router": "none",
    "paper-uncentered-router": "none",
    "paper-row-adamw-router": "+0.023",
}


def arm(preset: str, multiple: float, model: nn.Module) -> symlm.SymOptimizer:
    """Return the row arm with a router of the study, whose rate is multiplied."""
    return symlm.SymOptimizer(model, 0.02, preset, {"router": {"lr": RATE * multiple}}, weight_decay=1e-3)


class Routed:
    """Take an arm's steps, and have the model for its routers' load."""

    def __init__(self, build: Callable[[nn.Module], symlm.SymOptimizer], model: nn.Module) -> None:
        self.model, self.optimizer = model, build(model)

    def step(self, **inputs: Tensor) -> None:
        self.optimizer.step()

    @torch.no_grad()
    def load(self) -> tuple[float, float]:
        """Return the load's coefficient of variation and the share of dead experts, held out, means over layers."""
        held = tiny_lm.text()[: tiny_lm.HELD * tiny_lm.LENGTH].view(tiny_lm.HELD, tiny_lm.LENGTH)
        logits = self.model(input_ids=held, output_router_logits=True).router_logits
        layers = [router_metrics(z, CHOICES) for z in logits]
        cv, dead = (
            float(torch.stack([layer[key] for layer in layers]).mean()) for key in ("load_cv", "dead_expert_fraction")
        )
        return cv, dead


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="of each of the 24 runs")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    how = {"kind": "olmoe", **MODEL}
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    checks, losses = [], {}
    for name, target in tqdm(ROUTERS.items(), desc="routers", mininterval=2):
        found, best, _ = tiny_lm.tuned(partial(arm, name), MULTIPLES, steps, [], **how)
        _, loss, routed = tiny_lm.train(partial(Routed, partial(arm, name, best)), steps, seed=1, **how)
        losses[name] = loss
        axes.plot(found.keys(), found.values(), marker="o", label=name.removeprefix("paper-"))
        cv, dead = routed.load()
        text = f"{loss:.3f}; {cv:.2f}; {dead:.2f}"
        checks.append(Check(f"{name}, router × {best:g}: held-out loss; load CV; dead experts", target, text))
    apart = abs(losses["paper-uncentered-router"] - losses["paper-left-router"])  # a softmax router's G is centered
    checks.append(Check("uncentered beside left-spectral, without a z-loss", "0: 1ᵀG = 0", apart, apart < 0.01))
    axes.set(xscale="log", xlabel="multiple of 7.5e-4", ylabel="held-out loss", title=f"{steps} steps, seed 0")
    axes.legend(fontsize=8)
    finish(__file__, checks, figure)


if __name__ == "__main__":
    main()
