"""Time the optimizer's step beside its floor and its peers, in one table.

Arms alternate step by step and are measured in the process's own time, so that a busy machine decides as little as it
can; on a GPU, whose work that time does not have, by the clock. Figures are medians. The floor of an arm is what it
must spend: the counted operations of its products at the rate of a large product, and one pass over all that it stores
at the rate of a large copy, both measured among the arms. Its host time is that of the same step on as many small
parameters, of which the work is next to nothing. torch.optim.Muon multiplies in bf16 whatever the machine, which many
CPUs emulate; here it takes fp32, as all do.
"""

import json
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from arms import FOREACH, FUSED, MUON, PERIOD, Arm, Many, arms_of, qwen3
from recording import Launches
from torch import nn

from symlm.polar import fastest_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDE, LENGTH = 2048, 2**26  # of the product and of the copy that measure the machine
BASES = {"× Muon + AdamW": MUON, "× fused AdamW": FUSED, "× foreach AdamW": FOREACH}
COLUMNS = {
    "s": "{:.4g}",
    "× floor": "{:.2f}",
    "× Muon + AdamW": "{:.2f}",
    "× fused AdamW": "{:.1f}",
    "× foreach AdamW": "{:.2f}",
    "launches": "{:,.0f}",
    "GB": "{:.3g}",
    "host ms": "{:.3g}",
}


def seconds(work: Callable[[], object]) -> float:
    """Return the time that a call takes of this process, or on a GPU by the clock."""
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    start = clock()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def alternated(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Run all once, then time all in every round, one after the other."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    return times


def typical(times: list[float], period: int) -> float:
    """Return the median time of a step; of steps that repeat themselves after some, the mean of each one's median."""
    return statistics.mean(statistics.median(times[k::period]) for k in range(period))


def measured(arms: dict[str, Arm], rounds: int) -> tuple[dict[str, float], float, float]:
    """Return each arm's seconds, and the rates of a product and of a copy, an operation and a byte a second."""
    A = torch.randn(SIDE, SIDE, device=DEVICE, dtype=fastest_dtype(DEVICE))
    source = torch.randn(LENGTH, device=DEVICE)
    target = torch.empty_like(source)
    probes = {"product": lambda: A @ A, "copy": lambda: target.copy_(source)}
    times = alternated({name: arm.step for name, arm in arms.items()} | probes, rounds)
    rates = 2 * SIDE**3 / typical(times["product"], 1), 2 * source.nbytes / typical(times["copy"], 1)
    return {name: typical(times[name], arm.period) for name, arm in arms.items()}, *rates


def spent(arm: Arm) -> tuple[float, float]:
    """Return the operations that a step launches and the bytes that they read and write, in the mean of its period."""
    with Launches() as launches:
        for _ in range(arm.period):
            arm.step()
    return launches.by_name.total() / arm.period, launches.bytes / arm.period


def rows(title: str, model: nn.Module, small: nn.Module, rounds: int) -> list[dict[str, Any]]:
    """Measure the arms on a model, and their host time on one of as many small parameters."""
    arms = arms_of(model)
    times, product, copy = measured(arms, rounds)
    host_arms = arms_of(small)
    host = alternated({name: arm.step for name, arm in host_arms.items()}, 5 * rounds)
    table = []
    for name, arm in arms.items():
        launches, moved = spent(arm)
        floor = arm.operations / product + arm.bytes / copy
        row = {"model": title, "step": name, "s": times[name], "floor s": floor, "× floor": times[name] / floor}
        row |= {column: times[name] / times[base] for column, base in BASES.items()}
        row |= {"launches": launches, "GB": moved / 1e9, "host ms": 1e3 * typical(host[name], host_arms[name].period)}
        table.append(row)
    print(f"{title}: product {product / 1e9:.0f} GFLOP/s, copy {copy / 1e9:.1f} GB/s")
    return table


def show(table: list[dict[str, Any]]) -> None:
    """Print the table in Markdown."""
    print("| model | step | " + " | ".join(COLUMNS) + " |\n|---|---|" + "---:|" * len(COLUMNS))
    for row in table:
        cells = (form.format(row[key]) for key, form in COLUMNS.items())
        print(f"| {row['model']} | {row['step']} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 8], help="of Qwen3-0.6B's shapes")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--many", action="store_true", help="200 matrices of 256 × 256 too")
    parser.add_argument("--rounds", type=int, default=4, help="a multiple of 4")
    parser.add_argument(
        "--threads", type=int, default=1, help="more than one wait for each other in the process's time"
    )
    parser.add_argument("--out", type=Path, help="a JSON file of the record")
    parser.add_argument("--commit", help="of the measured tree")
    options = parser.parse_args()
    if options.rounds % PERIOD:
        parser.error(f"--rounds {options.rounds} is no multiple of {PERIOD}, after which an arm repeats itself")
    torch.set_num_threads(options.threads)
    sized = [(f"{n} layers", (n, options.vocabulary, options.hidden), (n, 256, 64)) for n in options.layers]
    models = [(title, lambda a=whole: qwen3(*a), lambda a=small: qwen3(*a)) for title, whole, small in sized]
    models += [("200 × 256²", Many, lambda: Many(8))] * options.many
    table: list[dict[str, Any]] = []
    for title, whole, small in models:
        table += rows(title, whole().to(DEVICE), small().to(DEVICE), options.rounds)
        show(table)
        if options.out:
            head = {"date": date.today().isoformat(), "commit": options.commit, "torch": torch.__version__}
            head |= {"device": DEVICE, "threads": options.threads, "rounds": options.rounds}
            head |= {"hidden": options.hidden, "vocabulary": options.vocabulary}
            options.out.write_text(json.dumps({**head, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
