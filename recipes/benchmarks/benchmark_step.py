"""Time the optimizer's step on Qwen3-0.6B-shaped parameters, beside its floor and its peers, in one run.

The floor is what must be spent: the counted operations of the polar factors and of the head's Gram matrix over the
measured rate of a large product, and the bytes of one pass (read gradient, momentum and weight; write momentum and
weight) over the measured copy rate.
torch.optim.Muon multiplies in bf16 whatever the machine; where bf16 is emulated, the row "Muon in fp32" (its own five
steps, one whole matrix at a time) is the fairer peer.
"""

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable
from math import prod

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import symlm
from symlm.polar import fastest_dtype, operations
from symlm.rules import RULES
from symlm.step.rows.row_step import operations_of
from symlm.views import MatrixView

NOISE = 1e-3


def qwen3(layers: int, vocabulary: int, hidden: int = 1024) -> nn.Module:
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=128,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config)


def median_seconds(work: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def floor_seconds(optimizer: symlm.SymOptimizer, device: str, runs: int) -> tuple[float, float]:
    """Return the seconds of the counted operations and of the counted bytes, at the rates measured here."""
    flops, size = 0, 0
    for group in optimizer.param_groups:
        view, rule = MatrixView.parse(group["view"]), RULES[group["rule"]]
        for p in group["params"]:
            for part_view, part in view.sections(p):
                b, m, n = part_view.shape(tuple(part.shape))
                flops += b * operations(m, n, group["steps"], "auto") if rule.spectral else 0
                flops += b * operations_of(rule, (m, n))
            size += 5 * p.element_size() * prod(p.shape)
    A = torch.randn(2048, 2048, device=device, dtype=fastest_dtype(device))
    big = torch.randn(2**26, device=device)
    other = torch.empty_like(big)
    A @ A, other.copy_(big)
    rate = 2 * 2048**3 / median_seconds(lambda: A @ A, max(runs, 5))
    bandwidth = 2 * big.nbytes / median_seconds(lambda: other.copy_(big), max(runs, 5))
    print(f"measured: {rate / 1e9:.0f} GFLOP/s ({A.dtype}), copy {bandwidth / 1e9:.1f} GB/s")
    return flops / rate, size / bandwidth


def muon_and_adamw(model: nn.Module) -> Callable[[], None]:
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    taken = set(map(id, hidden))
    rest = [p for p in model.parameters() if id(p) not in taken]
    muon, adamw = torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=1e-3, fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--skip-torch-muon", action="store_true", help="its emulated bf16 takes minutes a step")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = qwen3(arguments.layers, arguments.vocabulary).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * NOISE
    ours = symlm.SymOptimizer(model)
    fp32 = {"schedule": "muon", "polar_method": "newton_schulz", "compute_dtype": "float32"}
    peers: dict[str, Callable[[], object]] = {
        "symlm default": ours.step,
        "Muon in fp32 + AdamW": symlm.SymOptimizer(model, preset="muon", nesterov=True, **fp32).step,
        "fused AdamW": torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step,
    }
    if not arguments.skip_torch_muon:
        peers["torch.optim.Muon + AdamW"] = muon_and_adamw(model)
    for step in peers.values():
        step()
    multiply, move = floor_seconds(ours, device, arguments.runs)
    seconds = {name: median_seconds(step, arguments.runs) for name, step in peers.items()}
    base = seconds["symlm default"]
    print(f"{'floor (products + bytes)':28} {multiply + move:8.3f} s   {multiply:.3f} + {move:.3f}")
    for name, value in seconds.items():
        print(f"{name:28} {value:8.3f} s   {value / base:5.2f} × symlm   {value / (multiply + move):5.2f} × floor")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {arguments.layers} layers")


if __name__ == "__main__":
    main()
