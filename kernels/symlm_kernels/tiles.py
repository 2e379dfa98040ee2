"""Tile configurations by shape: a fixed table, without autotuning at train time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Configure one program of a product.

    Args:
        m: Rows of its tile of the result.
        n: Columns of the tile.
        k: The length of the inner axis that is loaded at once.
        warps: The warps of the program.
        stages: The stages of its software pipeline.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


# The record of an H200, kernels/benchmarks/results/tiles-*: the fastest of twelve square tiles, or of twenty-one, that
# does not spill registers; with four warps and three stages a symmetric product spills, and is up to 12 % faster.
GRAM = Tile(128, 128, 64, warps=8, stages=3)
SYMMETRIC = Tile(128, 128, 64, warps=8, stages=4)
WIDE = Tile(128, 256, 64, warps=8, stages=3)
SMALL = Tile(64, 64, 64, warps=4, stages=3)
ANY_STRIDE = Tile(64, 64, 32, warps=4, stages=3)  # each element has its own address: those of a large tile would spill
FP32 = Tile(64, 64, 16, warps=4, stages=2)  # full-precision products run without tensor cores: fewer live registers
LARGE_SIDE = 1024  # below this, larger tiles leave a part of the machine idle


def choose_tile(product: str, m: int, n: int, element_size: int, aligned: bool) -> Tile:
    """Choose the tile of a product.

    Args:
        product: "gram", "symmetric_product" or "apply_polynomial".
        m: Rows of the result.
        n: Columns of the result.
        element_size: Bytes of an element.
        aligned: Whether every operand is read sixteen bytes at a time.

    Returns:
        The tile.
    """
    if element_size > 2:
        return FP32
    if not aligned:
        return ANY_STRIDE
    large = min(m, n) >= LARGE_SIDE
    if product == "symmetric_product":
        return SYMMETRIC if large else SMALL
    return WIDE if product == "apply_polynomial" and large else GRAM


def row_warps(block: int) -> int:
    """Return the warps of a program that holds one row in registers.

    Args:
        block: The elements of the row, padded to a power of two.

    Returns:
        The number of warps, with at most 16 elements for each thread; more would spill registers.
    """
    return max(4, min(32, block // 512))
