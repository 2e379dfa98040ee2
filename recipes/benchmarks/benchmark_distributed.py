"""Time the optimizer's step on many processes: symlm's shared step, the redundant one, and FSDP2 with torch.optim.Muon.

    torchrun --nproc_per_node 2 recipes/benchmarks/benchmark_distributed.py

All in one run, on Qwen3-0.6B's shapes with few layers and a small vocabulary: rows are not what is shared. On a CPU the
processes share the cores, so two processes with one thread each stand for two machines; and bf16, in which
torch.optim.Muon multiplies, may be emulated: `--hidden 256` ends in a minute all the same.
"""

import os
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from arms import qwen3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import symlm
from symlm.distributed.exchange import Exchange
from symlm.step import directions

NOISE = 1e-3


def seconds(step: Callable[[], object], runs: int) -> float:
    """Return the median over the runs of the slowest rank's time."""
    step()
    times = []
    for _ in range(runs):
        dist.barrier()
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(slowest(time.perf_counter() - start))
    return statistics.median(times)


def with_gradients(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * NOISE
    return model


def sharded(layers: int, hidden: int, device: str) -> nn.Module:
    model, mesh = qwen3(layers, 1000, hidden).to(device), init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return with_gradients(fully_shard(model, mesh=mesh))


class Implicit(TorchDispatchMode):
    """Count the bytes that DTensor's own operations receive, each by the least that its kind needs."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # come again as the operations on its local parts
        found = func(*args, **(kwargs or {}))
        kind, others = func.name().partition("::")[2].partition(".")[0], dist.get_world_size() - 1
        if func.namespace == "_c10d_functional" and kind in RECEIVED:
            self.bytes += RECEIVED[kind] * others / (others + 1) * max(args[0].nbytes, found.nbytes)
        return found


# Of the larger of what goes in and what comes out, times (n - 1) / n for n ranks.
RECEIVED = {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_to_all_single": 1, "all_reduce": 2}


class Watched:
    """Count the bytes that this rank's exchanges receive, and the seconds that it spends on polar factors."""

    def __init__(self) -> None:
        self.bytes, self.polar_seconds = 0, 0.0
        self.receive, self.polar = Exchange.receive, directions.polar

    def __enter__(self) -> "Watched":
        def receive(exchange: Exchange) -> list[torch.Tensor]:
            found = self.receive(exchange)
            self.bytes += exchange.received_bytes
            return found

        def polar(*arguments: Any, **more: Any) -> torch.Tensor:
            synchronize()
            start = time.perf_counter()
            found = self.polar(*arguments, **more)
            synchronize()
            self.polar_seconds += time.perf_counter() - start
            return found

        Exchange.receive, directions.polar = receive, polar  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Exchange.receive, directions.polar = self.receive, self.polar  # type: ignore[method-assign]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def slowest(value: float) -> float:
    largest = torch.tensor([value], device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--skip-torch-muon", action="store_true", help="its emulated bf16 takes minutes a step")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = with_gradients(qwen3(arguments.layers, 1000, arguments.hidden).to(device))
    cut = sharded(arguments.layers, arguments.hidden, device)
    modes: dict[str, torch.optim.Optimizer] = {
        "every rank computes all": symlm.SymOptimizer(plain, shared=False),
        "symlm, DDP": symlm.SymOptimizer(plain),
        "symlm, FSDP2": symlm.SymOptimizer(cut),
    }
    if not arguments.skip_torch_muon:
        matrices = [p for name, p in cut.named_parameters() if p.ndim == 2 and "layers" in name]
        modes["torch.optim.Muon, FSDP2 (matrices only)"] = torch.optim.Muon(matrices)
    spent, moved, polar = {}, {}, {}
    for name, optimizer in modes.items():
        with Implicit() as implicit:
            optimizer.step()
        factors = []
        for _ in range(arguments.runs):
            with Watched() as watched:
                dist.barrier()
                optimizer.step()
            factors.append(slowest(watched.polar_seconds))
        moved[name], polar[name] = watched.bytes + implicit.bytes, statistics.median(factors)
        spent[name] = seconds(optimizer.step, arguments.runs)
    if dist.get_rank() == 0:
        first = next(iter(modes))
        print(f"{'':40} {'step':>8}   × redundant   {'polar':>8}   × redundant    received")
        for name, value in spent.items():
            share = f"{polar[name]:6.3f} s   {polar[name] / polar[first]:11.2f}" if polar[name] else f"{'':8}   {'':11}"
            print(f"{name:40} {value:6.3f} s   {value / spent[first]:11.2f}   {share}   {moved[name] / 2**20:5.1f} MiB")
        ranks = f"{dist.get_world_size()} processes"
        print(f"torch {torch.__version__}, {device}, {ranks}, {arguments.layers} layers, d = {arguments.hidden}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
