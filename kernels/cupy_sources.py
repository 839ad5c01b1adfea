"""The GPU kernels' sources, what they say of themselves, and arrays as they take them."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .ops import Array

__all__ = [
    "FILES",
    "KERNELS",
    "OPTIONS",
    "SOURCES",
    "WIDE",
    "Kernel",
    "Stage",
    "address",
    "by_value",
    "float_type",
    "source",
    "source_of_parts",
    "words_of",
]

COMMON = "arrays", "sums", "packs", "math"  # what all others begin with
FILES = "activations", "layers", "losses", "norms", "optim", "fused", "products", "factors"
SOURCES = {
    name: (Path(__file__).parent / f"cupy_{name}.cu").read_text() for name in (*COMMON, *FILES, "tiles", "replay")
}
OPTIONS = "--std=c++17", "-default-device"  # the latter for lambdas of any number of arguments
WIDE = 1024  # columns from which a row gets a block instead of a part of a warp
# before a part begins: nothing, or a wait for this block, for all blocks, or for this one and parameters from others
WAITS = "", "__syncthreads();\n", "wait_for_all();\n", "__syncthreads();\nwait_for_parameters();\n"
TYPES = "b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"  # of a Table, in the order of cupy_arrays.cu


class Kernel(NamedTuple):
    """Where a kernel is, how it is spread over threads, and the type and name of each parameter."""

    file: str
    pattern: str
    parameters: tuple[tuple[str, str], ...]


class Stage(NamedTuple):
    """One kernel, arrays by the names of its parameters, and the names of those that it writes."""

    kernel: str
    arrays: Mapping[str, Array]
    written: frozenset[str] = frozenset()

    def used(self) -> dict[str, Array]:
        """The arrays that the kernel takes, of all those that are there."""
        return {name: self.arrays[name] for _, name in KERNELS[self.kernel].parameters}


KERNEL = re.compile(r"^(ELEMENTS|ROWS|COLUMNS|SUMS|ONE_BLOCK|TILES) (\w+)\(([^)]*)\)", re.MULTILINE)
KERNELS = {
    name: Kernel(file, pattern, tuple((kind, of) for kind, of in map(str.split, parameters.split(","))))
    for file, source in SOURCES.items()
    for pattern, name, parameters in KERNEL.findall(source)
}
# which cuBLAS alone computes: w = factors[0] * x.T @ dz + factors[1] * w
KERNELS["weight_step"] = Kernel("", "", (("Matrix", "x"), ("Matrix", "dz"), ("Vector", "factors"), ("Matrix", "w")))


def source(files: Iterable[str], floats: str, kernel: str = "") -> str:
    """The kernels of some files for one float type, as CUDA C++; or one of them, and what it calls.

    Of the others the compiler drops what nobody calls, which saves most of its time.
    """

    def declared(found: re.Match[str]) -> str:
        _, name, parameters = found.groups()
        return found[0] if kernel in ("", name) else f"__device__ static void {name}({parameters})"

    real = {"float32": "float", "float64": "double"}[floats]
    head = f"typedef {real} Real;\nconst int WIDE = {WIDE};"
    return "\n".join([head, *(KERNEL.sub(declared, SOURCES[file]) for file in (*COMMON, *files))])


def source_of_parts(
    parts: Sequence[tuple[str, int, Sequence[Sequence[str]]]],
    floats: str,
    blocks: int,
    rows: int,
    ahead: Container[int] = (),
) -> str:
    """One kernel, "replay", which runs others one after the other, for a cluster of so many blocks.

    Each part is a kernel, before whom it waits, and the members of the structures that it is given, as C++. The blocks
    share so many rows of a batch, 0 if there is but one. Those whose places are `ahead` ask a step before for what they
    take.
    """
    before, steps = [], []
    for place, (name, waits, arguments) in enumerate(parts):
        given = ", ".join(
            f"{kind}{{(decltype({kind}::data))({data}), {', '.join(sizes)}}}"
            for (kind, _), (data, *sizes) in zip(KERNELS[name].parameters, arguments, strict=True)
        )
        call = f"{name}({given});"
        if place in ahead:
            call = f"ahead{place}.{call}"
            before.append(f"Ahead ahead{place};\n{call}")
        steps.append(WAITS[waits] + call)
    needed = {KERNELS[name].file for name, *_ in parts} | {"layers", "products"}  # of which cupy_replay.cu uses some
    files = [file for file in FILES if file in needed]
    replay = SOURCES["replay"].replace("BEFORE", "\n".join(before)).replace("STEP", "\n".join(steps))
    head = f"#define PARTS\n#define BLOCKS {blocks}\n#define ROWS_OF_ALL {rows}"
    return f"{head}\n{source(files, floats)}\n{replay}"


def float_type(stages: Sequence[Stage]) -> str:
    """The float type of some stages; any, where they have none."""
    kinds = (
        stage.arrays[name].dtype.name
        for stage in stages
        for kind, name in KERNELS[stage.kernel].parameters
        if kind in ("Matrix", "Vector")
    )
    return next(kinds, "float32")


def address(x: Any) -> int:
    return int(x.data.ptr)


def by_value(x: Array, kind: str) -> Array:
    """An array's C++ structure, as one item that CuPy passes by value."""
    words = words_of(x, kind)
    item: Array = np.array(words, np.int64).view(np.dtype((np.void, 8 * len(words))))
    return item


def words_of(x: Array, kind: str) -> list[int]:
    """The words of an array's C++ structure; the first is its address."""
    if kind == "Table":
        (rows, columns), (row_step, column_step) = (*x.shape, 1)[:2], (*x.strides, 0)[:2]
        return [address(x), rows, columns, row_step, column_step, TYPES.index(x.dtype.str[1:])]
    if kind in ("Matrix", "Halves"):
        return [address(x), x.shape[0], x.size // x.shape[0], x.strides[0] // x.itemsize]
    return [address(x), x.size]
