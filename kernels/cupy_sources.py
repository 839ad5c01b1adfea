"""The GPU kernels' sources, and what they say of themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

__all__ = ["FILES", "KERNELS", "SOURCES", "Kernel", "source", "source_of_parts"]

# the first is part of all others
FILES = "math", "activations", "layers", "losses", "norms", "optim", "fused", "products"
SOURCES = {name: (Path(__file__).parent / f"cupy_{name}.cu").read_text() for name in FILES}


class Kernel(NamedTuple):
    """Where a kernel is, how it is spread over threads, and the type and name of each parameter."""

    file: str
    pattern: str
    parameters: tuple[tuple[str, str], ...]


KERNEL = re.compile(r"^(ELEMENTS|ROWS|COLUMNS|ONE_BLOCK) (\w+)\(([^)]*)\)", re.MULTILINE)
KERNELS = {
    name: Kernel(file, pattern, tuple((kind, of) for kind, of in map(str.split, parameters.split(","))))
    for file, source in SOURCES.items()
    for pattern, name, parameters in KERNEL.findall(source)
}


def source(files: Iterable[str], floats: str) -> str:
    """The kernels of some files for one float type, as CUDA C++."""
    real = {"float32": "float", "float64": "double"}[floats]
    return "\n".join([f"typedef {real} Real;", SOURCES["math"], *(SOURCES[file] for file in files)])


def source_of_parts(kernels: tuple[str, ...], floats: str) -> str:
    cases = []
    for place, name in enumerate(kernels):
        parameters = KERNELS[name].parameters
        read = "".join(f"{kind} {of} = next<{kind}>(word); " for kind, of in parameters)
        cases.append(f"case {place}: {{ {read}{name}({', '.join(of for _, of in parameters)}); break; }}")
    files = [file for file in FILES[1:] if file in {KERNELS[name].file for name in kernels}]
    return f"#define PARTS\n{source(files, floats)}\n{REPLAY.replace('CASES', chr(10).join(cases))}"


REPLAY = """
template <class T> __device__ T next(const Index *&word)
{
    const T *item = (const T *)word;
    word += sizeof(T) / sizeof(Index);
    return *item;
}

extern "C" __global__ void __launch_bounds__(512) replay(Integers table, Index steps)
{
    for (; steps; steps--)
        for (const Index *word = table.data; word < table.data + table.size; __syncthreads())
            switch (*word++) {
CASES
            }
}
"""
