"""Measure the gradient's noise scale of a finished run, by role: the batch, in tokens, at which noise equals gradient.

    python recipes/benchmarks/noise_scale.py runs/default

Far below it all optimizers look alike, and a larger batch is nearly as good as more steps; far above it tokens are
wasted. `B = tr Σ/|G|²` for the covariance Σ of a token's gradient and the mean gradient G, from the gradients g of n
blocks: `|G|² ≈ (n|ḡ|² − mean|g|²)/(n − 1)`, `tr Σ ≈ length·(mean|g|² − |ḡ|²)·n/(n − 1)`.

Source: McCandlish et al., arXiv 1812.06162, appendix A.
"""

import json
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path

import torch
from pretraining import corpus
from pretraining.config import DataConfig
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import symlm


class NoiseScale:
    """Sums over blocks, by role: of the gradients' squares, and of the gradients themselves."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.roles, self.blocks = model, symlm.assign_roles(model), 0
        self.squares: dict[str, float] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, x: Tensor) -> None:
        """Take the gradient of one block, of shape (1, length)."""
        self.model.zero_grad()
        self.model(input_ids=x, labels=x).loss.backward()
        self.blocks += 1
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                role = str(self.roles[name])
                self.squares[role] = self.squares.get(role, 0.0) + p.grad.double().square().sum().item()
                self.sums[name] = self.sums.get(name, torch.zeros_like(p)) + p.grad

    def tokens(self, length: int) -> dict[str, float]:
        """Return B in tokens by role and of "all"; infinity where the mean gradient does not stand out of the noise."""
        n, of_mean = self.blocks, dict.fromkeys(self.squares, 0.0)
        for name, total in self.sums.items():
            of_mean[str(self.roles[name])] += (total / n).double().square().sum().item()
        pairs = {role: (self.squares[role] / n, of_mean[role]) for role in self.squares}
        pairs["all"] = tuple(map(sum, zip(*pairs.values(), strict=True)))
        scales = {}
        for role, (small, large) in pairs.items():
            gradient, noise = (n * large - small) / (n - 1), (small - large) * n / (n - 1)
            scales[role] = length * noise / gradient if gradient > 0 else float("inf")
        return scales


def measured(folder: Path, blocks: Iterable[Tensor]) -> dict[str, float]:
    """Return B of a finished run's model on these blocks, each of shape (length,)."""
    scale, length = NoiseScale(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)), 0
    for block in blocks:
        scale.add(block[None])
        length = len(block)
    return scale.tokens(length)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run of pretrain.py")
    parser.add_argument("--blocks", type=int, default=256, help="how many blocks of held-out text; 2 or more")
    given = parser.parse_args()
    if given.blocks < 2 or not (given.run / "model").is_dir():
        parser.error(f"--blocks is at least 2 and {given.run} a finished run, with a folder model/")
    data = DataConfig(**json.loads((given.run / "config.json").read_text())["data"])
    *_, held = corpus.load(data, 0, 1)
    some = [held[k].long() for k in range(min(given.blocks, len(held)))]
    print(f"tokens at which noise equals gradient, {len(some)} blocks of {len(some[0])} tokens")
    for role, tokens in sorted(measured(given.run, tqdm(some)).items(), key=lambda pair: pair[1]):
        print(f"{role:<16} {tokens:>14,.0f}")


if __name__ == "__main__":
    main()
