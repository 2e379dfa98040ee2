"""Time every tile of the table, and others, for the three products, beside torch's: the table follows from the record.

python kernels/benchmarks/bench_tiles.py            # in Triton's interpreter add --quick
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch
from measuring import DEVICE, arguments, attempted, ceilings, replayed, seconds, write
from symlm_kernels import reference
from symlm_kernels.tiles import ANY_STRIDE, GRAM, Tile
from torch import Tensor

SHAPES = {  # the stacks of a step: at most 2²⁶ elements
    "square 512": (64, 512, 512),
    "q, a head": (448, 128, 1024),
    "experts": (32, 1024, 2048),
    "square 1024": (28, 1024, 1024),
    "gate, up": (21, 1024, 3072),
    "square 2048": (8, 2048, 2048),
    "square 4096": (2, 4096, 4096),
}
SQUARE = [ANY_STRIDE, GRAM] + [
    Tile(side, side, k, warps, stages)
    for side, k, warps, stages in (
        *((64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3)),
        *((128, 32, 4, 4), (128, 32, 8, 4), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 2)),
        *((256, 32, 8, 3), (256, 64, 8, 2), (256, 64, 16, 2)),
    )
]
WIDE = [
    Tile(m, n, k, warps, stages)
    for m, n, k, warps, stages in (
        *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4)),
        *((64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 256, 64, 4, 3), (128, 128, 64, 4, 3)),
    )
]


def works(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], tuple, int]]:
    """Return, by name, each product with its arguments, and the operations that it must do."""
    b, m, n = shape
    X = (torch.randn(shape, device=DEVICE) / n**0.5).to(dtype)
    A = reference.gram(X)
    B = reference.gram(A)
    return {
        "gram": (_kernel("gram"), (X,), b * m * m * n),
        "symmetric_product": (_kernel("symmetric_product"), (A, B, A, 1.0, 0.5), b * m**3),
        "apply_polynomial": (_kernel("apply_polynomial"), (A, X, 0.5), 2 * b * m * m * n),
    }


def _kernel(name: str) -> Callable[..., Tensor]:
    from symlm_kernels import products

    return getattr(products, name)


def compile_one(case: tuple[str, Tile]) -> None:
    """Compile a tile's kernel into Triton's cache, in a process of its own."""
    name, tile = case
    kernel, operands, _ = works((1, 512, 512), torch.float16)[name]
    attempted(lambda: kernel(*operands, tile=tile).sum().item())


def tiles_of(name: str) -> list[Tile]:
    """Return the tiles that a product can take: a symmetric result needs square ones."""
    return [*SQUARE, *WIDE] if name == "apply_polynomial" else SQUARE


def main() -> None:
    """Compile on all cores, measure one after the other, write the record."""
    options = arguments(__doc__, quick={"action": "store_true", "help": "one small shape, two tiles"})
    measured = ceilings(torch.float16 if DEVICE == "cuda" else torch.float32)
    names = ("gram", "symmetric_product", "apply_polynomial")
    if DEVICE == "cuda":
        cases = [(name, tile) for name in names for tile in tiles_of(name)]
        with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
            list(pool.map(compile_one, cases))
    rows: list[dict[str, object]] = []
    shapes = {"small": (2, 64, 96)} if options.quick else SHAPES
    for (label, shape), name in product(shapes.items(), names):
        kernel, operands, operations = works(shape, torch.float16)[name]
        twin = getattr(reference, name)
        runs = 3 if options.quick else 7
        peer = _measured(twin, operands, None, runs)
        timed = {}
        for tile in tiles_of(name)[: 2 if options.quick else None]:
            timed[tile] = attempted(partial(_measured, kernel, operands, tile, runs))
        row: dict[str, object] = {"shape": f"{label} {shape}", "product": name, "torch ms": 1e3 * peer}
        whole = sorted(((spent, tile) for tile, spent in timed.items() if isinstance(spent, float)), key=lambda x: x[0])
        if whole:
            spent, best = whole[0]
            row |= {"best ms": 1e3 * spent, "of torch": spent / peer, "TFLOP/s": operations / spent / 1e12}
            row |= {"tile": _text(best), "all ms": {_text(tile): round(1e3 * spent, 4) for spent, tile in whole}}
        rows.append(row)
        path = write("tiles", rows, measured, options)
    print(path)


def _measured(product: Callable[..., Tensor], operands: tuple, tile: Tile | None, runs: int) -> float:
    """Return the seconds of a product, of a graph's replay on a GPU: a launch from Python takes longer than many."""
    return seconds(replayed(partial(product, *operands, **({"tile": tile} if tile else {}))), runs, calls=4)


def _text(tile: Tile) -> str:
    return f"{tile.m}×{tile.n}×{tile.k}, {tile.warps} warps, {tile.stages} stages"


if __name__ == "__main__":
    main()
