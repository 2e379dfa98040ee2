"""Shared parts of the kernel benchmarks: medians over rotating inputs, the two ceilings, and the written record."""

import json
import statistics
import subprocess
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from datetime import date
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CACHE_BYTES = 2**27 if DEVICE == "cuda" else 2**22  # inputs rotate through more than the last-level cache


def rotating(make: Callable[[], Tensor]) -> Iterable[Tensor]:
    """Return an endless cycle of inputs that together are larger than the cache.

    Args:
        make: Makes one input.

    Returns:
        The cycle, of at most 64 inputs.
    """
    first = make()
    count = min(64, CACHE_BYTES // max(1, first.nbytes) + 1)
    return cycle([first, *(make() for _ in range(count - 1))])


def seconds(work: Callable[[], Any], runs: int = 20, calls: int = 1) -> float:
    """Measure the median time of one call.

    Args:
        work: The call.
        runs: The number of measurements.
        calls: The calls between two events of a GPU; with one, the time of its launch is included.

    Returns:
        Seconds.
    """
    for _ in range(3):
        work()
    times = []
    for _ in range(runs):
        if DEVICE == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / calls)
        else:
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def replayed(work: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a call in a CUDA graph, whose replay takes no time for Python's launches.

    Args:
        work: The call; it must read the same memory each time.

    Returns:
        The replay of the graph; `work` on a CPU.
    """
    if DEVICE == "cpu":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def attempted(measure: Callable[[], float]) -> float | str:
    """Run a measurement, and continue if it fails, so that the other contenders are measured.

    Args:
        measure: The measurement.

    Returns:
        Its result, or the name of the error, which is printed.
    """
    try:
        return measure()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return type(error).__name__


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """Measure the device's ceilings.

    Args:
        dtype: The dtype of the product.

    Returns:
        Operations a second of a large product, and bytes a second of a large copy.
    """
    side, length = (8192, 2**28) if DEVICE == "cuda" else (2048, 2**25)
    A = torch.randn(side, side, device=DEVICE).to(dtype)
    x = torch.empty(length, device=DEVICE)
    y = torch.empty_like(x)
    return {
        "product FLOP/s": 2 * side**3 / seconds(lambda: A @ A, 10),
        "copy B/s": 2 * x.nbytes / seconds(lambda: y.copy_(x), 10),
    }


def arguments(description: str | None, **flags: dict[str, Any]) -> Namespace:
    """Read a benchmark's command line.

    Args:
        description: The help text.
        flags: The benchmark's own flags, with the keyword arguments of `add_argument`.

    Returns:
        The values: of the flags, `out`, the folder of the record, and `commit`, for a tree without git.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--commit", help="of the measured tree, where git cannot tell")
    for flag, settings in flags.items():
        parser.add_argument(f"--{flag}", **settings)
    return parser.parse_args()


def write(name: str, rows: list[dict[str, Any]], measured: dict[str, float], options: Namespace) -> Path:
    """Write a dated record with GPU, driver, versions, commit and ceilings, and print it as a table.

    Call it after each row: it overwrites the record, so that an interrupted run leaves the rows that it has.

    Args:
        name: The benchmark's name.
        rows: The rows, values by column.
        measured: The ceilings.
        options: The values of the command line.

    Returns:
        The path of the record.
    """
    head = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": options.commit or _output("git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"),
        **measured,
    }
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict)))
    print("  ".join(f"{key}: {_cell(value)}" for key, value in head.items()))
    print("| " + " | ".join(keys) + " |\n|" + "---|" * len(keys))
    for row in rows:
        print("| " + " | ".join(_cell(row.get(key, "")) for key in keys) + " |")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}-{head['device'].replace(' ', '-').lower()}-{head['date']}-{head['commit']}.json"
    path.write_text(json.dumps({**head, "rows": rows}, indent=1))
    return path


def _cell(value: Any) -> str:
    """Return a value as the text of a table's cell."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _version(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """Return what a command prints, None if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
