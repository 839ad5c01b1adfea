"""Which matrix products are computed by `cupy_tiles.cu` instead of cuBLAS, and how they are spread over blocks.

The rules know shapes alone, and nothing is timed, so that one seed gives the same bits in each process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .cupy_sources import source
from .ops import Array

__all__ = ["Tile", "sizes_of", "source_of_tiles", "tile_for"]

LANES = 32  # of a warp
MOST_WARPS, STAGES = 8, 4  # of a block; chunks of terms that each has in shared memory
APART = 40  # see cupy_tiles.cu
ENOUGH_BLOCKS = 100  # to spread a product over an H100
MOST_ELEMENTS = 200_000  # of a result; with more, cuBLAS was faster there
MOST_TERMS = 1024  # of each sum, which a block adds up alone; estimated


class Tile(NamedTuple):
    """What a block computes of a product: lanes of a warp, down and across it, and rows and columns of each lane."""

    down: int
    over: int
    high: int
    broad: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.down * self.high, self.over * self.broad

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """How many there are, across and down."""
        down, across = self.shape
        return -(-columns // across), -(-rows // down)

    def chunk(self, floats: str) -> int:
        """How many terms a warp takes at a time."""
        return max(8, LANES // (self.down * self.over) * 16 // np.dtype(floats).itemsize)

    def warp_bytes(self, floats: str) -> int:
        """What a warp needs of shared memory: first for chunks, and in the end for its sums."""
        numbers = max(STAGES * self.chunk(floats) * sum(self.shape), APART * math.prod(self.shape) // LANES)
        return int(numbers * np.dtype(floats).itemsize)

    def warps(self, terms: int, floats: str, room: int) -> int:
        """How many a block has, in so many bytes of shared memory."""
        return min(MOST_WARPS, -(-terms // self.chunk(floats)), room // self.warp_bytes(floats))


TILES = [Tile(4, 8, 8, 4), Tile(4, 4, 4, 8), Tile(4, 4, 4, 4), Tile(8, 4, 1, 4)]  # the largest first


def sizes_of(arrays: Mapping[str, Array]) -> tuple[int, int, int]:
    """The rows and columns of a product, and the terms of each of its sums."""
    if "dw" in arrays:
        return *arrays["dw"].shape, len(arrays["x"])
    if "dx" in arrays:
        return *arrays["dx"].shape, arrays["dz"].shape[1]
    return len(arrays["x"]), *arrays["w"].shape[::-1]


def tile_for(rows: int, columns: int, terms: int) -> Tile | None:
    """The largest tile of which there are enough, or the smallest; None where cuBLAS is faster."""
    if rows * columns > MOST_ELEMENTS or terms > MOST_TERMS:
        return None
    return next((tile for tile in TILES if math.prod(tile.grid(rows, columns)) >= ENOUGH_BLOCKS), TILES[-1])


def source_of_tiles(tile: Tile, floats: str, kernel: str = "") -> str:
    """Products by tiles, or one of them, as CUDA C++."""
    numbers = {"DOWN": tile.down, "OVER": tile.over, "HIGH": tile.high, "BROAD": tile.broad, "STAGES": STAGES}
    head = ", ".join(f"{name} = {number}" for name, number in numbers.items())
    return f"const int {head};\n{source(['tiles', 'products'], floats, kernel)}"
