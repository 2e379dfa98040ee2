"""Time the optimizer's step on Qwen3-0.6B-shaped parameters, beside its floor and its peers, in one run.

The floor is what must be spent: the counted operations of the polar factors and of the head's Gram matrix over the
measured rate of a large product, and the bytes of one pass (read gradient, momentum and weight; write momentum and
weight) over the measured copy rate.
torch.optim.Muon multiplies in bf16 whatever the machine, which many CPUs emulate; here it takes fp32, as all do.
"""

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable
from math import prod
from unittest.mock import patch

import torch
from launches import Launches
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import symlm
from symlm.polar import fastest_dtype, operations
from symlm.rules import RULES
from symlm.step.rows.row_step import operations_of
from symlm.views import MatrixView

NOISE = 1e-3
SELDOM = "symlm default, gram_every=4"  # timed over four steps, of which one computes the Gram matrix


def qwen3(layers: int, vocabulary: int, hidden: int = 1024) -> nn.Module:
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        head_dim=min(128, hidden // 2),
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
                flops += b * operations_of(rule, (m, n), group["gram_every"])
            size += 5 * p.element_size() * prod(p.shape)
    A = torch.randn(2048, 2048, device=device, dtype=fastest_dtype(device))
    big = torch.randn(2**26, device=device)
    other = torch.empty_like(big)
    A @ A, other.copy_(big)
    rate = 2 * 2048**3 / median_seconds(lambda: A @ A, max(runs, 5))
    bandwidth = 2 * big.nbytes / median_seconds(lambda: other.copy_(big), max(runs, 5))
    print(f"measured: {rate / 1e9:.0f} GFLOP/s ({A.dtype}), copy {bandwidth / 1e9:.1f} GB/s")
    return flops / rate, size / bandwidth


def muon_in_fp32(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> Callable[[], None]:
    """Return the step of torch.optim.Muon and AdamW, whose products are in fp32 as all others' here are."""
    muon, adamw = torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-3, fused=True)

    def step() -> None:
        with patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
            muon.step()
        adamw.step()

    return step


class Many(nn.Module):
    """200 matrices of 256 × 256 and an embedding of 8,192 × 256."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8192, 256)
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(200))


def four_steps(optimizer: symlm.SymOptimizer) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(4):
            optimizer.step()

    return steps


def compared(model: nn.Module, roles: dict[str, str] | None, runs: int) -> dict[str, dict[str, float]]:
    """Return time and launches of a step of symlm's default and Muon, of torch's Muon + AdamW in fp32, and of AdamW."""
    for p in model.parameters():
        p.grad = torch.randn_like(p) * NOISE
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    taken = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in taken]
    fp32 = {"schedule": "muon", "polar_method": "newton_schulz", "compute_dtype": "float32", "roles": roles}
    steps: dict[str, Callable[[], object]] = {
        "symlm default": symlm.SymOptimizer(model, roles=roles).step,
        SELDOM: four_steps(symlm.SymOptimizer(model, roles=roles, gram_every=4)),
        "symlm muon": symlm.SymOptimizer(model, preset="muon", nesterov=True, **fp32).step,
        "torch.optim.Muon + AdamW, fp32": muon_in_fp32(matrices, rest),
        "foreach AdamW": torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True).step,
        "fused AdamW": torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step,
    }
    table = {}
    for name, step in steps.items():
        step()
        with Launches() as launches:
            step()
        count = 4 if name == SELDOM else 1
        table[name] = {"seconds": median_seconds(step, runs) / count, "launches": launches.by_name.total() / count}
    return table


def show(table: dict[str, dict[str, float]], base: str, floor: float | None = None) -> None:
    """Print a table of steps, as multiples of one of them and of the floor."""
    for name, row in table.items():
        seconds, unit = row["seconds"], table[base]["seconds"]
        of_floor = f"{seconds / floor:6.2f} × floor" if floor else ""
        print(f"{name:31}{seconds:9.4f} s {seconds / unit:6.2f} × {base} {of_floor} {row['launches']:6.0f} launches")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2], help="one table for each")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--host", action="store_true", help="28 layers of d = 64: what the host does, one thread")
    parser.add_argument("--many", action="store_true", help="200 matrices of 256 × 256, one thread")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.host or arguments.many:
        torch.set_num_threads(1)
        model = qwen3(28, 256, hidden=64) if arguments.host else Many()
        roles = None if arguments.host else {"embedding.weight": "embedding", "layers.*": "matrix"}
        show(compared(model.to(device), roles, arguments.runs), "foreach AdamW" if arguments.host else "symlm default")
        arguments.layers = []
    for layers in arguments.layers:
        model = qwen3(layers, arguments.vocabulary).to(device)
        multiply, move = floor_seconds(symlm.SymOptimizer(model), device, arguments.runs)
        print(f"{layers} layers: floor {multiply + move:.3f} s, products {multiply:.3f}, bytes {move:.3f}")
        table = compared(model, None, arguments.runs)
        show(table, "torch.optim.Muon + AdamW, fp32", multiply + move)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
