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


SMALL = Tile(64, 64, 32, warps=4, stages=3)
LARGE = Tile(128, 128, 64, warps=8, stages=3)
FP32 = Tile(64, 64, 16, warps=4, stages=2)  # full-precision products run without tensor cores: fewer live registers
SMALL_SIDE = 256  # below this a large tile leaves most of the machine idle


def choose_tile(m: int, n: int, element_size: int, aligned: bool) -> Tile:
    """Choose the tile of a product.

    Args:
        m: Rows of the result.
        n: Columns of the result.
        element_size: Bytes of an element.
        aligned: Whether every operand is read sixteen bytes at a time. If not, each element has its own address, and
            the addresses of a large tile would spill registers.

    Returns:
        The tile.
    """
    if element_size > 2:
        return FP32
    return LARGE if aligned and min(m, n) > SMALL_SIDE else SMALL


def row_warps(block: int) -> int:
    """Return the warps of a program that holds one row in registers.

    Args:
        block: The elements of the row, padded to a power of two.

    Returns:
        The number of warps, with at most 16 elements for each thread; more would spill registers.
    """
    return max(4, min(32, block // 512))
