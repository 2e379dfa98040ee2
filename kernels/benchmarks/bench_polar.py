"""Time polar factors: symlm's Triton and torch products, eager and compiled, beside torch.optim.Muon's iteration.

    python kernels/benchmarks/bench_polar.py            # every shape; on a CPU add --quick

A row's floor is the counted operations of the cheaper iteration, of a symmetric result one triangle, divided by the
measured rate of a large product. Eager calls are also captured in a CUDA graph, which leaves out Python's launches.
"""

from collections.abc import Callable

import torch
from measuring import DEVICE, arguments, attempted, ceilings, replayed, rotating, seconds, write
from symlm_kernels.selection import why_not_triton
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from symlm.polar import fastest_dtype, operations, polar

MUON = (3.4445, -4.7750, 2.0315)
SHAPES = {  # of a step's stacks, which hold 2²⁶ elements at most, and single squares
    "Qwen3-0.6B gate, up": (21, 3072, 1024),
    "Qwen3-0.6B o": (28, 1024, 2048),
    "Qwen3-0.6B q, a head": (448, 128, 1024),
    "Gemma3-1B gate, up": (8, 6912, 1152),
    "OLMoE experts": (32, 2048, 1024),
    **{f"square {side}": (1, side, side) for side in (512, 1024, 2048, 4096, 8192)},
}


def contenders(compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the functions to measure, by name; each maps matrices (b, m, n) to polar factors."""

    def eager(M: Tensor) -> Tensor:
        return polar(M, "auto", compute_dtype="auto", kernels="torch")

    functions: dict[str, Callable[[Tensor], Tensor]] = {"torch": eager}
    if compiled:
        torch._dynamo.reset()  # else the code of an earlier shape may be reused, made for any shape
        functions["torch.compile"] = torch.compile(eager, dynamic=False)
    if why_not_triton(DEVICE, fastest_dtype(DEVICE)) is None:
        functions["triton"] = lambda M: polar(M, "auto", compute_dtype="auto", kernels="triton")
    functions["torch.optim.Muon"] = lambda M: torch.stack([_zeropower_via_newtonschulz(m, MUON, 5, 1e-7) for m in M])
    try:
        from gram_newton_schulz import GramNewtonSchulz

        functions["gram-newton-schulz"] = GramNewtonSchulz()
    except ImportError:
        pass
    return functions


def main() -> None:
    """Measure all contenders and write the record."""
    options = arguments(
        __doc__,
        quick={"action": "store_true", "help": "a small shape, few runs"},
        compile={"action": "store_true", "help": "torch.compile too, which takes seconds a shape"},
    )
    measured = ceilings(fastest_dtype(DEVICE))
    rows: list[dict[str, object]] = []
    for name, (b, m, n) in {"small": (2, 96, 128)}.items() if options.quick else SHAPES.items():
        inputs = rotating(lambda shape=(b, m, n): torch.randn(shape, device=DEVICE))
        floor = b * operations(m, n, 5, "auto", halves=True) / measured["product FLOP/s"]
        row: dict[str, object] = {"shape": f"{name} {b}×{m}×{n}", "floor ms": 1e3 * floor}
        rows.append(row)
        for contender, work in contenders(options.compile).items():
            still = next(inputs)  # a graph always reads the same memory
            ways = {contender: lambda work=work, inputs=inputs: work(next(inputs))}
            if DEVICE == "cuda" and contender in ("torch", "triton"):
                ways[f"{contender}, graph"] = lambda work=work, still=still: work(still)
            for way, call in ways.items():
                spent = attempted(lambda way=way, call=call: _seconds(way, call, options.quick))
                share = floor / spent if isinstance(spent, float) else ""
                row |= {f"{way} ms": 1e3 * spent if isinstance(spent, float) else spent, f"{way} floor share": share}
        path = write("polar", rows, measured, options)
    print(path)


def _seconds(way: str, call: Callable[[], Tensor], quick: bool) -> float:
    """Return the median time of a call, captured in a graph for a way with "graph" in its name."""
    return seconds(replayed(call) if "graph" in way else call, 3 if quick else 10, calls=5)


if __name__ == "__main__":
    main()
