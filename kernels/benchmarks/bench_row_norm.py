"""Time the row-norm steps: the fused kernel, torch eager and compiled, and fused AdamW, as shares of a large copy.

    python kernels/benchmarks/bench_row_norm.py         # on a CPU add --quick

The floor is one read of gradient, momentum and weight and one write of momentum and weight. Centered steps need two
more reads of the momentum: for the mean row, and for the mean of the directions. The default head needs one more read
of gradient and momentum, directions in half precision written once and read twice, and 4mn² operations.
"""

from collections.abc import Callable
from itertools import product

import torch
from measuring import DEVICE, arguments, attempted, ceilings, seconds, write
from symlm_kernels import reference
from symlm_kernels.selection import why_not_triton

from symlm import SymOptimizer
from symlm.polar import fastest_dtype

SHAPES = [(4096, 128), (32_000, 256), (50_304, 768), (151_936, 1024), (262_144, 1152)]


def contenders(m: int, n: int, compiled: bool) -> dict[str, Callable[[], object]]:
    """Return the steps to measure, by name, on a matrix (m, n)."""
    G, M, W = (torch.randn(m, n, device=DEVICE) for _ in range(3))
    scalars = [torch.tensor(x, device=DEVICE) for x in (1e-3, 1.0, 1.0)]
    norms = reference.MeanNorms(torch.ones(m, 1, device=DEVICE), torch.tensor(0.5, device=DEVICE), 0.95)
    steps: dict[str, Callable[[], object]] = {}
    sources = {"torch": reference}
    if why_not_triton(DEVICE, torch.float32) is None:
        from symlm_kernels import rows

        sources["triton"] = rows
    for source, module in sources.items():
        for name, mean in product(("row_norm_step", "centered_row_norm_step"), (None, norms)):
            step, label = getattr(module, name), f"{name}{' over means' if mean else ''}"
            given = (G, M, W, 0.95, *scalars, False, mean)
            steps[f"{source} {label}"] = lambda step=step, given=given: step(*given)
            if source == "torch" and compiled:
                torch._dynamo.reset()
                fast = torch.compile(step, dynamic=False)
                steps[f"torch.compile {label}"] = lambda fast=fast, given=given: fast(*given)
    for source in sources:
        head = torch.nn.Linear(n, m, bias=False, device=DEVICE)
        head.weight.grad = G
        steps[f"{source} default head"] = SymOptimizer(head, roles={"*": "lm_head"}, kernels=source).step
    p = torch.nn.Parameter(W)
    p.grad = G
    steps["fused AdamW"] = torch.optim.AdamW([p], fused=True).step
    return steps


def main() -> None:
    """Measure all contenders and write the record."""
    options = arguments(
        __doc__,
        quick={"action": "store_true", "help": "a small shape, few runs"},
        compile={"action": "store_true", "help": "torch.compile too, which takes seconds a step"},
    )
    measured = ceilings(fastest_dtype(DEVICE))
    rows: list[dict[str, object]] = []
    for m, n in [(100, 128)] if options.quick else SHAPES:
        for name, work in contenders(m, n, options.compile).items():
            passes = 8.5 if "head" in name else 7 if "centered" in name else 5
            floor = passes * 4 * m * n / measured["copy B/s"]
            floor += 4 * m * n * n / measured["product FLOP/s"] if "head" in name else 0
            spent = attempted(lambda work=work: seconds(work, 3 if options.quick else 20))
            timed = isinstance(spent, float)
            rows.append({"shape": f"{m}×{n}", "step": name, "ms": 1e3 * spent if timed else spent})
            rows[-1]["copy share"] = floor / spent if timed else ""
        path = write("row_norm", rows, measured, options)
    print(path)


if __name__ == "__main__":
    main()
