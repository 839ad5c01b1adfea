"""The ways in which cuBLASLt computes large products with what follows them, and which is the fastest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import cupy
import numpy as np

from .cublaslt import CANDIDATES, TYPES, BlasError, Matrix
from .cupy_replay import Launch, run_all
from .cupy_sources import Stage, address
from .ops import Array

if TYPE_CHECKING:
    from .cupy_engine import CupyEngine

__all__ = ["PRODUCTS", "WAYS", "Way", "fastest", "matrix_of", "noise_like"]

# so many results, by the bytes of each, would hardly all be rounded alike if they were added up in another order
TELLING = {2: 1 << 22, 4: 64, 8: 64}
BIAS_ALIGNMENT = 16  # bytes, for a product that adds it: its kernels read as many at a time


class Way(NamedTuple):
    """How a product is computed, and by which algorithm.

    "fused" is with what follows it in the same kernel, "plain" without, and "turned" of a copy of the first factor that
    lies as the algorithm's kernels for tf32 like it.
    """

    how: str
    rank: int


WAYS = [Way(how, rank) for how in ("fused", "plain", "turned") for rank in range(CANDIDATES)]


# what launches a product in a way; nothing where that way is not there


def dense_forward(engine: CupyEngine, arrays: Mapping[str, Array], way: Way, lane: int) -> list[Launch]:
    x, w, b, z = (arrays[name] for name in ("x", "w", "b", "z"))
    if way.how == "fused":
        return engine.product(x, w, z, way, lane, bias=address(b)) if address(b) % BIAS_ALIGNMENT == 0 else []
    product = engine.product(x, w, z, way, lane) if way.how == "plain" else []
    return product and [*product, *engine.launches(in_place("add_bias", z, b=b))]


def dense_relu_forward(engine: CupyEngine, arrays: Mapping[str, Array], way: Way, lane: int) -> list[Launch]:
    """With a ReLU of its own: that of cuBLASLt makes NaN 0."""
    z = arrays["y"]
    product = dense_forward(engine, {**arrays, "z": z}, way, lane)
    return product and [*product, *engine.launches(in_place("rectify", z))]


def dense_input_grad(engine: CupyEngine, arrays: Mapping[str, Array], way: Way, lane: int) -> list[Launch]:
    dz, w, dx = (arrays[name] for name in ("dz", "w", "dx"))
    return engine.product(dz, w, dx, way, lane, transpose_b=True) if way.how == "plain" else []


def dense_weight_grad(engine: CupyEngine, arrays: Mapping[str, Array], way: Way, lane: int) -> list[Launch]:
    return weight_product(engine, arrays["x"], arrays["dz"], arrays["dw"], way, lane)


def weight_step(engine: CupyEngine, arrays: Mapping[str, Array], way: Way, lane: int) -> list[Launch]:
    x, dz, factors, w = (arrays[name] for name in ("x", "dz", "factors", "w"))
    return weight_product(engine, x, dz, w, way, lane, factors=address(factors))


def weight_product(
    engine: CupyEngine, x: Array, dz: Array, w: Array, way: Way, lane: int, **options: Any
) -> list[Launch]:
    if way.how == "plain":
        return engine.product(x, dz, w, way, lane, transpose_a=True, **options)
    if way.how == "fused" or engine.precision != "tf32":
        return []
    turned = engine.turned(x.shape[::-1], x.dtype, lane)
    stage = Stage("transpose", {"x": x, "t": turned})
    product = engine.product(turned, dz, w, way, lane, **options)
    return product and [lambda: run_all(engine.launches(stage)), *product]  # which owns its memory


def in_place(kernel: str, z: Array, **others: Array) -> Stage:
    """A kernel that changes a product, or its twin where that is of bfloat16."""
    return Stage(kernel + ("_bfloat16" if z.dtype == np.uint16 else ""), {"z": z, **others})


PRODUCTS: dict[str, Callable[[CupyEngine, Mapping[str, Array], Way, int], list[Launch]]] = {
    "dense_forward": dense_forward,
    "dense_relu_forward": dense_relu_forward,
    "dense_input_grad": dense_input_grad,
    "dense_weight_grad": dense_weight_grad,
    "weight_step": weight_step,
}


def fastest(engine: CupyEngine, kernel: str, arrays: Mapping[str, Array], ways: Sequence[Way]) -> Way:
    """The fastest way on arrays that are there to be overwritten."""
    *_, output = arrays.values()
    if output.size < TELLING[output.itemsize]:
        return ways[0]
    before = output.copy()  # to which something may be added
    launches = {way: PRODUCTS[kernel](engine, arrays, way, 0) for way in ways}

    def bits(way: Way) -> Array:
        output[...] = before
        run_all(launches[way])
        return output.view(f"i{output.itemsize}").copy()

    def is_same(way: Way) -> bool:
        try:
            return bool((bits(way) == wanted).all())
        except BlasError:  # the library does not promise that it can do what it says it can
            return False

    wanted = bits(ways[0])
    ways = [ways[0], *filter(is_same, ways[1:])]
    runs = [functools.partial(run_all, launches[way] * 4) for way in ways]
    # in turns, of which the first does not count: a GPU slows down while it gets warm
    _, *turns = [[engine.device_seconds(run) for run in runs] for _ in range(4)]
    return ways[int(np.median(turns, axis=0).argmin())]


def noise_like(x: Array) -> Array:
    """Random numbers at the strides and the alignment of a matrix; for a vector, factors of a product and a result."""
    if x.ndim == 1:
        factors: Array = cupy.asarray(np.array([1 / 64, 1], x.dtype))  # so that both matter, and sums stay small
        return factors
    _, rows, columns, step, _ = matrix_of(x)
    noise: Array = np.random.Generator(np.random.Philox(0)).standard_normal(65_537)  # a prime: no two rows are alike
    if x.dtype == np.uint16:  # the first half of a float32 is a bfloat16
        noise = noise.astype(np.float32).view(np.uint32) >> 16
    block = cupy.asarray(np.resize(noise.astype(x.dtype), rows * step + 256 // x.itemsize))
    start = (address(x) - address(block)) % 256 // x.itemsize
    array: Array = block[start : start + rows * step].reshape(rows, step)[:, :columns]
    return array


def matrix_of(x: Array) -> Matrix:
    """Rows as cuBLAS takes them; one row alone may have any stride."""
    rows, columns = x.shape
    return Matrix(address(x), rows, columns, max(columns, x.strides[0] // x.itemsize), TYPES[x.dtype.name])
