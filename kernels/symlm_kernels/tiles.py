"""Tile configurations by shape: a committed table, not an autotuning at train time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of one program's tile, its warps, and the stages of its software pipeline."""

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
    """Return the tile for an (m, n) result of elements of this many bytes.

    aligned: every operand is read sixteen bytes at a time; where each element has an address of its own, a large tile's
    addresses alone would spill.
    """
    if element_size > 2:
        return FP32
    return LARGE if aligned and min(m, n) > SMALL_SIDE else SMALL


def row_warps(block: int) -> int:
    """Return the warps of a program that holds a row of this many elements: at most 16 a thread, or registers spill."""
    return max(4, min(32, block // 512))
