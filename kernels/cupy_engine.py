"""GPU kernels of CuPy arrays: `.cu` files beside this one, and cuBLASLt for large matrix products.

A kernel is named as its op, and its parameters as the op's arguments; a line such as
``ROWS softmax_forward(Matrix z, Matrix p)`` in a `.cu` file says all that is needed to launch it. Each array is passed
by value, as a structure of whole numbers of 64 bits, which its C++ type in `cupy_arrays.cu` mirrors.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import cupy
import numpy as np

from .cublaslt import COMPUTE, WORKSPACE_BYTES, Blas, alignment, load_libraries
from .cupy_bfloat16 import in_bfloat16
from .cupy_one_kernel import shared_memory_of
from .cupy_replay import (
    MOST_BLOCKS,
    Graph,
    Launch,
    Replay,
    check_device,
    current_stream,
    device_of_process,
    room_for,
)
from .cupy_sources import KERNELS, OPTIONS, WIDE, Stage, address, by_value, float_type, source
from .cupy_tiles import Tile, sizes_of, source_of_tiles, tile_for
from .cupy_updates import updated_by_products
from .cupy_ways import PRODUCTS, WAYS, Way, fastest, matrix_of, noise_like
from .engine import Call, Engine, Program, native, real_array, resolved
from .ops import Array, Op

__all__ = ["CupyEngine"]

Shape2D = tuple[int, int]

THREADS = 256  # of a block, where it does not depend on the arrays
MOST_THREADS = 512
PACK, LINE = 16, 128  # bytes of a row that a thread and a block read at a time, to add up rows
ROWS_OF_SUM = 8  # rows that a thread adds up, from which on more blocks share them
PIECE_BYTES = 256 << 20  # of tables for which there is no room
DLPACK_CUDA = 2  # where DLPack says that an array is
HELD_UP = 1.0  # seconds for which the GPU waits at most, while what is timed is launched


# the ops that take several kernels; fused ops with a part of an optimizer in them are left out, because one kernel that
# updates all parameters at once is faster
STAGES: dict[str, tuple[str, ...]] = {
    "sparse_rows": ("begin_rows", "sparse_rows"),
    "dense_relu_input_grad": ("dense_input_grad", "relu_backward"),
    **{
        f"dense_{name}_grads": ("dense_input_grad", f"{name}_grads")
        for name in ("relu", "leaky_relu", "elu", "tanh", "sigmoid")
    },
    "clip_norm": ("squares_of_gradients", "clip_norm"),
    "l2_loss": ("squares_of_parameters", "l2_loss"),
    "layer_norm_backward": ("layer_norm_input_grad", "layer_norm_weight_grads"),
    "embedding_backward": ("embedding_input_grad", "embedding_weight_grad"),
    "weighted_softmax_cross_entropy": ("weigh_labels", "weighted_softmax_cross_entropy"),
    "soft_softmax_cross_entropy": ("weigh_rows", "soft_softmax_cross_entropy"),
    "soft_cross_entropy": ("weigh_rows", "soft_cross_entropy"),
    **{
        name: ("weigh_elements", name)
        for name in ("mean_squared_error", "mean_absolute_error", "huber", "poisson", "binary_cross_entropy")
    },
}


# where the product is not left to cuBLAS
STAGES_OF_SMALL: dict[str, tuple[str, ...]] = {
    "dense_relu_input_grad": ("dense_relu_input_grad",),
    "dense_relu_grads": ("dense_relu_input_grad", "bias_grad"),
}


class CupyEngine(Engine):
    name = "cupy"
    device = "cuda"
    precisions = tuple(COMPUTE)

    def __init__(self, precision: str = "fp32") -> None:
        self.precision = precision
        self._blas = Blas(*self.load_blas())
        self._workspaces: dict[tuple[int, ...], Array] = {}
        self._turned: WeakValueDictionary[Any, Array] = WeakValueDictionary()
        self._ways: dict[Any, Way] = {}
        device_of_process()  # from now on the one that is current
        self.timing = self  # `compile`, `synchronize`, `device_seconds`: what ``fastbp bench`` tells apart

    load_blas = staticmethod(load_libraries)

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        array = self.resident(x)
        if array is None:
            array = real_array(x)
            array = native(array) if array.dtype != np.float16 else array
        contiguous: Array = cupy.ascontiguousarray(cupy.asarray(array, dtype))
        return contiguous

    def resident(self, x: Any) -> Array | None:
        if isinstance(x, cupy.ndarray):
            array = x
        elif hasattr(x, "__dlpack_device__"):
            try:
                if x.__dlpack_device__()[0] != DLPACK_CUDA:
                    return None
                array = cupy.from_dlpack(resolved(x))
            except (ValueError, TypeError, RuntimeError, BufferError):
                return None  # `real_array` says why
        else:
            return None
        return native(fetched(array)) if array.dtype.kind in "fiub" else None

    def table(self, x: Any) -> Array:
        array = self.resident(x)
        return cupy.asarray(native(real_array(x))) if array is None else array

    def rows_at_a_time(self, tables: Sequence[Array]) -> int | None:
        """All, where they take less than half of the memory that is free: a model needs some, too."""
        size = sum(x.nbytes for x in tables)
        if size <= PIECE_BYTES or any(map(self.owns, tables)):
            return None
        free = cupy.cuda.Device().mem_info[0] + cupy.get_default_memory_pool().free_bytes()
        return None if 2 * size < free else max(1, PIECE_BYTES * len(tables[0]) // size)

    def ahead(self, pieces: Iterable[Sequence[Array]]) -> Iterator[Sequence[Array]]:
        """Pieces of tables, each copied to one of two places by a stream of its own while that in the other is used."""
        coming = iter(pieces)
        first = next(coming, None)
        if first is None:
            return
        coming, places = itertools.chain([first], coming), itertools.cycle([Place(first), Place(first)])
        device, stream = cupy.cuda.Device(), cupy.cuda.Stream(non_blocking=True)
        self.synchronize()  # until what had the memory of these places before is done with it

        def load() -> Sequence[Array] | None:
            with device:  # of the caller, whose thread this is not
                piece = next(coming, None)
                return None if piece is None else next(places).fill(piece, stream)

        with ThreadPoolExecutor(1) as loader:
            loaded = loader.submit(load)
            while (arrays := loaded.result()) is not None:
                loaded = loader.submit(load)
                yield arrays

    def owns(self, x: Any) -> bool:
        return isinstance(x, cupy.ndarray) and x.device.id == device_of_process()

    def asnumpy(self, x: Array) -> Array:
        array: Array = cupy.asnumpy(x)
        return array

    def is_finite(self, x: Array) -> bool:
        return bool(cupy.isfinite(x).all())  # a byte comes back

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        array: Array = cupy.empty(shape, dtype)
        return array

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A matrix whose rows each begin on a boundary of 16 bytes, as cuBLAS likes them."""
        if len(shape) != 2:
            return self.empty(shape, dtype)
        step = 16 // np.dtype(dtype).itemsize
        return self.empty((shape[0], -(-shape[1] // step) * step), dtype)[:, : shape[1]]

    def span(self, array: Array) -> tuple[int, int]:
        bounds: tuple[int, int] = cupy.byte_bounds(array)
        return bounds

    def at_precision(self, precision: str) -> Engine:
        if precision not in self.precisions:
            raise ValueError(f"precision must be {', '.join(map(repr, self.precisions))}, got {precision!r}")
        return self if precision == self.precision else engine_at(precision)

    def __reduce__(self) -> tuple[Any, ...]:
        return engine_at, (self.precision,)

    def synchronize(self) -> None:
        cupy.cuda.get_current_stream().synchronize()

    def compile(self, op: Op, arguments: Sequence[Array]) -> None:
        """Make ready what an op takes on these arrays, kernels and the choice of products, and do not run it."""
        Graph(self, self.stages(op, arguments, self.empty((room_for(MOST_BLOCKS),), np.float64)))

    def device_seconds(self, run: Callable[[], object]) -> float:
        """How long the GPU works on what `run` launches, by its own clock; the host's part does not count.

        The stream waits for the host until all is launched. `run` must not wait for the stream itself.
        """
        stream, start, end = cupy.cuda.get_current_stream(), cupy.cuda.Event(), cupy.cuda.Event()
        launched = threading.Event()
        stream.launch_host_func(lambda _: launched.wait(HELD_UP), None)
        try:
            start.record()
            run()
            end.record()
        finally:
            launched.set()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3

    def supports(self, op: Op) -> bool:
        return op.name in KERNELS or op.name in STAGES

    def program(self, calls: Sequence[Call]) -> Program:
        return Replay(self, calls)

    def recorded(self, calls: Sequence[Call], passing: Sequence[Array]) -> Program:
        return Replay(self, calls, passing)

    def stages(self, op: Op, arguments: Sequence[Array], room: Array, small: bool = False) -> list[Stage]:
        """The kernels that compute an op on these arrays, all parts of one where they are `small`."""
        names = {arg.name: array for arg, array in zip((*op.inputs, *op.outputs), arguments, strict=True)}
        if "dx" in names:
            names = {"dy": names["dx"]} | names  # what a later stage reads, or changes in place
        written = {arg.name for arg in op.inputs if arg.inplace} | {arg.name for arg in op.outputs} | {"room"}
        by_itself = op.name in STAGES_OF_SMALL and (small or self._tile(names))
        kernels = STAGES_OF_SMALL[op.name] if by_itself else STAGES.get(op.name, (op.name,))
        return [Stage(kernel, names | {"room": room}, frozenset(written)) for kernel in kernels]

    def at_its_precision(
        self, stages: Sequence[Stage], passing: Sequence[Array] = ()
    ) -> tuple[Sequence[Stage], list[Array]]:
        """Stages whose products read bfloat16, if that is the precision, and the memory that they need for that.

        Where there are `passing` arrays, as in a recording, products may update weights.
        """
        stages, owned = updated_by_products(self, stages) if passing else (stages, [])
        if self.precision == "bf16" and float_type(stages) == "float32":
            stages, halves = in_bfloat16(self, stages, passing)
            owned = [*owned, *halves]
        return stages, owned

    def launches(self, stage: Stage, lane: int = 0) -> list[Launch]:
        """What runs a stage, on the stream that is current then; stages of one lane do not run side by side."""
        check_device()
        kernel = KERNELS[stage.kernel]
        floats = float_type([stage])
        values = tuple(by_value(stage.arrays[name], kind) for kind, name in kernel.parameters)
        if kernel.pattern == "TILES" and (tile := self._tile(stage.arrays)):
            return [by_tiles(tile, stage, floats, values)]
        if stage.kernel in PRODUCTS:
            arrays = {name: stage.arrays[name] for _, name in kernel.parameters}
            return PRODUCTS[stage.kernel](self, arrays, self.way(stage.kernel, arrays), lane)
        kinds = "Matrix", "Halves", "Vector", "Integers"
        large = [stage.arrays[name] for kind, name in kernel.parameters if kind in kinds]
        extent = (large or [np.empty(1)])[-1 if kernel.pattern == "ELEMENTS" else 0]
        function = function_of(stage.kernel, floats)
        return [functools.partial(function, *spread(kernel.pattern, extent, most_blocks()), values)]

    def _tile(self, arrays: Mapping[str, Array]) -> Tile | None:
        """By which tiles to compute the product that is taken of some arrays; None where it is left to cuBLAS."""
        floats = next(iter(arrays.values())).dtype
        return tile_for(*sizes_of(arrays)) if self.precision == "fp32" or floats == np.float64 else None

    def product(self, a: Array, b: Array, c: Array, way: Way, lane: int, **options: Any) -> list[Launch]:
        """``c = a @ b``, with the options of `Blas.product`; nothing where the library cannot do it."""
        workspace, compute = address(self._workspace(lane)), COMPUTE[self.precision]
        matrices = matrix_of(a), matrix_of(b), matrix_of(c)
        prepared = self._blas.product(matrices, workspace, compute=compute, rank=way.rank, **options)
        return [lambda: prepared(cupy.cuda.get_current_stream().ptr)] if prepared else []

    def way(self, kernel: str, arrays: Mapping[str, Array]) -> Way:
        """How to compute a product on these arrays: the fastest way of those that give the same bits as the first.

        The first is the same each time. Which is the fastest is measured, once in a process for arrays of one shape,
        layout and alignment, and the next process may find another. One seed gives the same bits in both, with nothing
        kept on disk for them to depend on, because a way that adds up in another order, and so rounds differently, does
        not count.
        """
        key = kernel, *((x.shape, x.strides, x.dtype, alignment(address(x))) for x in arrays.values())
        if key not in self._ways:
            ways = (way for way in WAYS if PRODUCTS[kernel](self, arrays, way, 0))
            first = next(ways)
            if cupy.cuda.get_current_stream().is_capturing():  # when nothing can be timed
                return first
            try:
                noise = {name: noise_like(x) for name, x in arrays.items()}
                self._ways[key] = fastest(self, kernel, noise, [first, *ways])
            except cupy.cuda.memory.OutOfMemoryError:
                self._ways[key] = first
        return self._ways[key]

    def _workspace(self, lane: int) -> Array:
        """Where products of a lane of the current stream work: they follow each other, those of others may not."""
        key = *current_stream(), lane
        array = self._workspaces.get(key)
        if array is None:  # another thread may be as far, and all must work in one that stays
            array = self._workspaces.setdefault(key, self.empty((WORKSPACE_BYTES,), np.uint8))
        return array

    def turned(self, shape: Shape2D, dtype: Any, lane: int) -> Array:
        """Where a transposed factor lies; products of a lane share it, as their workspace, for as long as they live."""
        key = *current_stream(), lane, shape, dtype
        array = self._turned.get(key)
        if array is None:
            array = self._turned[key] = self.buffer(shape, dtype)
        return array


class Place:
    """Where pieces of tables lie on the GPU, and memory of the host from which it fetches them by itself.

    None of them has more rows than the first one, by which this is made.
    """

    def __init__(self, piece: Sequence[Array]) -> None:
        arrays = [native(x) for x in piece]
        self._pairs = [(pinned(x), cupy.empty(x.shape, x.dtype)) for x in arrays]

    def fill(self, piece: Sequence[Array], stream: Any) -> list[Array]:
        """Copy a piece to the GPU."""
        arrays = []
        for x, (host, array) in zip(piece, self._pairs, strict=True):
            host[: len(x)] = x
            array[: len(x)].set(host[: len(x)], stream)
            arrays.append(array[: len(x)])
        stream.synchronize()
        return arrays


def fetched(x: Any) -> Array:
    """An array as it is, or its copy where it lies on another GPU than that of the process: by way of the host, which
    waits for who writes it, and needs no GPU to reach the other.
    """
    array: Array = x if x.device.id == device_of_process() else cupy.asarray(cupy.asnumpy(x))
    return array


_engines: dict[str, CupyEngine] = {}


def engine_at(precision: str = "fp32") -> CupyEngine:
    """The engine of a precision, of which a process has one: its workspaces, handles and choices are for all models."""
    if precision not in _engines:
        _engines.setdefault(precision, CupyEngine(precision))
    return _engines[precision]


@functools.cache
def function_of(kernel: str, floats: str) -> Any:
    """A kernel, compiled when it is first looked up, once for all processes: CuPy keeps it on disk."""
    code = source([KERNELS[kernel].file], floats, kernel)
    return cupy.RawModule(code=code, options=OPTIONS).get_function(kernel)


def by_tiles(tile: Tile, stage: Stage, floats: str, values: tuple[Array, ...]) -> Launch:
    """What launches a product by tiles."""
    rows, columns, terms = sizes_of(stage.arrays)
    function = function_of_tiles(tile, stage.kernel, floats)
    warps = tile.warps(terms, floats, shared_memory_of(function))
    shared = warps * tile.warp_bytes(floats)
    return functools.partial(function, tile.grid(rows, columns), (32 * warps, 1), values, shared_mem=shared)


@functools.cache
def function_of_tiles(tile: Tile, kernel: str, floats: str) -> Any:
    return cupy.RawModule(code=source_of_tiles(tile, floats, kernel), options=OPTIONS).get_function(kernel)


@functools.cache
def most_blocks() -> int:
    """As many blocks as the device computes at a time."""
    return min(MOST_BLOCKS, 4 * int(cupy.cuda.Device().attributes["MultiProcessorCount"]))


def spread(pattern: str, extent: Array, most: int) -> tuple[Shape2D, Shape2D]:
    """Grid and block for an array, over which `Lanes` in cupy_arrays.cu lays a block's threads."""
    rows, columns = extent.shape[0], math.prod(extent.shape[1:])
    if pattern == "ONE_BLOCK":
        return (1, 1), (THREADS, 1)
    if pattern == "COLUMNS":
        return (min(most, -(-columns // 16)), 1), (max(32, 16 * min(64, power_of_two(rows))), 1)
    if pattern == "SUMS":
        packs = -(-columns * extent.itemsize // PACK)
        lanes = min(LINE // PACK, power_of_two(packs))
        across = min(most, -(-packs // lanes))
        down = rows // (ROWS_OF_SUM * THREADS // lanes)
        return (across, max(1, min(most // across, down))), (THREADS, 1)
    if pattern == "ROWS":
        lanes = min(32, power_of_two(-(-columns // 4))) if extent.ndim > 1 else 32
        if columns >= WIDE:
            return (min(most, rows), 1), (THREADS, 1)
        if rows * lanes <= MOST_THREADS:  # one block has nobody to wait for
            return (1, 1), (max(32, power_of_two(rows * lanes)), 1)
        return (min(most, -(-rows * lanes // THREADS)), 1), (THREADS, 1)
    width = min(THREADS, power_of_two(columns))
    down = -(-rows // (THREADS // width)) if extent.ndim > 1 else -(-rows // THREADS)
    return (min(most, -(-columns // width) * down), 1), (THREADS, 1)


def pinned(x: Array) -> Array:
    """Memory of the host for an array, which the GPU can read while the host does something else."""
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(x.nbytes), x.dtype, x.size).reshape(x.shape)


def power_of_two(n: int) -> int:
    """The first that is not below `n`."""
    return 1 << (n - 1).bit_length()
