"""Time polar factors: symlm's Triton and torch products, eager and compiled, beside torch.optim.Muon's iteration.

    python kernels/benchmarks/bench_polar.py            # every shape; on a CPU add --quick

A row's floor is the counted operations of the cheaper iteration over the measured rate of a large product.
"""

from argparse import ArgumentParser
from collections.abc import Callable

import torch
from measuring import DEVICE, ceilings, rotating, seconds, write
from symlm_kernels.selection import why_not_triton
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from symlm.polar import fastest_dtype, operations, polar

MUON = (3.4445, -4.7750, 2.0315)
SHAPES = {
    "Qwen3-0.6B mlp": (2, 3072, 1024),
    "Qwen3-0.6B q, a head": (16, 128, 1024),
    "Gemma3-1B mlp": (2, 6912, 1152),
    "OLMoE experts": (32, 1024, 2048),
    **{f"square {side}": (1, side, side) for side in (512, 1024, 2048, 4096, 8192)},
}


def contenders(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    def eager(M: Tensor) -> Tensor:
        return polar(M, "auto", compute_dtype=dtype, kernels="torch")

    found: dict[str, Callable[[Tensor], Tensor]] = {"torch": eager, "torch.compile": torch.compile(eager)}
    if why_not_triton(DEVICE, dtype) is None:
        found["triton"] = lambda M: polar(M, "auto", compute_dtype=dtype, kernels="triton")
    found["torch.optim.Muon"] = lambda M: torch.stack([_zeropower_via_newtonschulz(m, MUON, 5, 1e-7) for m in M])
    try:
        from gram_newton_schulz import GramNewtonSchulz

        found["gram-newton-schulz"] = GramNewtonSchulz()
    except ImportError:
        pass
    return found


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, few runs, no compiler")
    quick = parser.parse_args().quick
    dtype = fastest_dtype(DEVICE)
    rate, _ = ceilings(dtype)
    rows = []
    for name, (b, m, n) in {"small": (2, 96, 128)}.items() if quick else SHAPES.items():
        inputs = rotating(lambda shape=(b, m, n): torch.randn(shape, device=DEVICE))
        floor = b * operations(m, n, 5, "auto") / rate
        row: dict[str, object] = {"shape": f"{name} {b}×{m}×{n}", "floor ms": 1e3 * floor}
        for contender, work in contenders(dtype).items():
            if quick and contender == "torch.compile":
                continue
            spent = seconds(lambda work=work, inputs=inputs: work(next(inputs)), 3 if quick else 20)
            row |= {f"{contender} ms": 1e3 * spent, f"{contender} floor share": floor / spent}
        rows.append(row)
    print(write("polar", rows))


if __name__ == "__main__":
    main()
