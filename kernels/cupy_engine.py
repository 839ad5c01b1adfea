"""GPU kernels of CuPy arrays: `.cu` files beside this one, and cuBLASLt for matrix products.

A kernel is named as its op, and its parameters as the op's arguments; a line such as
``ROWS softmax_forward(Matrix z, Matrix p)`` in a `.cu` file says all that is needed to launch it. Each array is passed
by value, as a structure of whole numbers of 64 bits, which its C++ type in `cupy_math.cu` mirrors.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cupy
import numpy as np

from .cublaslt import CANDIDATES, COMPUTE, TYPES, WORKSPACE_BYTES, Blas, Matrix, alignment, load_libraries
from .cupy_bfloat16 import in_bfloat16
from .cupy_replay import MOST_BLOCKS, Graph, Launch, Replay, room_for, run_all
from .cupy_sources import KERNELS, OPTIONS, WIDE, Stage, address, by_value, float_type, source
from .engine import Call, Engine, Program, native, real_array
from .ops import Array, Op

__all__ = ["CupyEngine"]

Shape2D = tuple[int, int]

THREADS = 256  # of a block, where it does not depend on the arrays
PIECE_BYTES = 256 << 20  # of tables for which there is no room
# so many results, by the bytes of each, would hardly all be rounded alike if they were added up in another order
TELLING = {2: 1 << 22, 4: 64, 8: 64}
BIAS_ALIGNMENT = 16  # bytes, for a product that adds it: its kernels read as many at a time
DLPACK_CUDA = 2  # where DLPack says that an array is
HELD_UP = 1.0  # seconds for which the GPU waits at most, while what is timed is launched


# the ops that take several kernels; fused ops with a part of an optimizer in them are left out, because one kernel that
# updates all parameters at once is faster
STAGES = {
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


# where these are parts of one kernel, which computes products by itself
STAGES_OF_SMALL = STAGES | {
    "dense_relu_input_grad": ("dense_relu_input_grad",),
    "dense_relu_grads": ("dense_relu_input_grad", "bias_grad"),
}


class CupyEngine(Engine):
    name = "cupy"
    device = "cuda"

    def __init__(self, precision: str = "fp32") -> None:
        self.precision = precision
        self._blas = Blas(*self.load_blas())
        self._workspaces: dict[tuple[int, int], Array] = {}
        self._ways: dict[Any, Way] = {}
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
        if self.owns(x):
            array = x
        elif hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] == DLPACK_CUDA:
            try:
                array = cupy.from_dlpack(x)
            except (ValueError, TypeError, RuntimeError, BufferError):
                return None  # `real_array` says why
        else:
            return None
        return native(array) if array.dtype.kind in "fiub" else None

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
        return isinstance(x, cupy.ndarray)

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
        if precision not in COMPUTE:
            raise ValueError(f"precision must be {', '.join(map(repr, COMPUTE))}, got {precision!r}")
        return self if precision == self.precision else engine_at(precision)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.precision,)

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
        stages = STAGES_OF_SMALL if small else STAGES
        return [Stage(kernel, names | {"room": room}, frozenset(written)) for kernel in stages.get(op.name, (op.name,))]

    def at_its_precision(
        self, stages: Sequence[Stage], passing: Sequence[Array] = ()
    ) -> tuple[Sequence[Stage], list[Array]]:
        """Stages whose products read bfloat16, if that is the precision, and the memory that they need for that."""
        if self.precision == "bf16" and float_type(stages) == "float32":
            return in_bfloat16(self, stages, passing)
        return stages, []

    def launches(self, stage: Stage, lane: int = 0) -> list[Launch]:
        """What runs a stage, on the stream that is current then; stages of one lane do not run side by side."""
        kernel = KERNELS[stage.kernel]
        if stage.kernel in PRODUCTS:
            arrays = {name: stage.arrays[name] for _, name in kernel.parameters}
            return PRODUCTS[stage.kernel](self, arrays, self.way(stage.kernel, arrays), lane)
        kinds = "Matrix", "Halves", "Vector", "Integers"
        large = [stage.arrays[name] for kind, name in kernel.parameters if kind in kinds]
        extent = (large or [np.empty(1)])[-1 if kernel.pattern == "ELEMENTS" else 0].shape
        function = module(kernel.file, float_type([stage])).get_function(stage.kernel)
        values = tuple(by_value(stage.arrays[name], kind) for kind, name in kernel.parameters)
        return [functools.partial(function, *spread(kernel.pattern, extent, most_blocks()), values)]

    def product(self, a: Array, b: Array, c: Array, way: Way, lane: int, **options: Any) -> list[Launch]:
        """``c = a @ b``, with the options of `Blas.product`; nothing where the library cannot do it."""
        workspace, compute = address(self._workspace(lane)), COMPUTE[self.precision]
        matrices = matrix_of(a), matrix_of(b), matrix_of(c)
        prepared = self._blas.product(matrices, workspace, compute=compute, rank=way.rank, **options)
        return [lambda: prepared(cupy.cuda.get_current_stream().ptr)] if prepared else []

    def way(self, kernel: str, arrays: Mapping[str, Array]) -> Way:
        """How to compute a product on these arrays: the fastest way of those that give the same bits as the first.

        The first is the library's own choice, the same each time. Which is the fastest is measured, once in a process
        for arrays of one shape, layout and alignment, and the next process may find another. One seed gives the same
        bits in both, with nothing kept on disk for them to depend on, because a way that adds up in another order, and
        so rounds differently, does not count.
        """
        key = kernel, *((x.shape, x.strides, x.dtype, alignment(address(x))) for x in arrays.values())
        if key not in self._ways:
            ways = [way for way in WAYS if PRODUCTS[kernel](self, arrays, way, 0)]
            if cupy.cuda.get_current_stream().is_capturing():  # when nothing can be timed
                return ways[0]
            try:
                self._ways[key] = self._fastest(kernel, {name: noise_like(x) for name, x in arrays.items()}, ways)
            except cupy.cuda.memory.OutOfMemoryError:
                self._ways[key] = ways[0]
        return self._ways[key]

    def _fastest(self, kernel: str, arrays: Mapping[str, Array], ways: Sequence[Way]) -> Way:
        """The fastest way on arrays that are there to be overwritten."""
        *_, output = arrays.values()
        if output.size < TELLING[output.itemsize]:
            return ways[0]
        launches = {way: PRODUCTS[kernel](self, arrays, way, 0) for way in ways}

        def bits(way: Way) -> Array:
            run_all(launches[way])
            return output.view(f"i{output.itemsize}").copy()

        def seconds(way: Way) -> float:
            run = functools.partial(run_all, launches[way] * 4)
            return min(self.device_seconds(run) for _ in range(3))

        wanted = bits(ways[0])
        return min([way for way in ways if (bits(way) == wanted).all()], key=seconds)

    def _workspace(self, lane: int) -> Array:
        """Where products of a lane of the current stream work: they follow each other, those of others may not."""
        key = cupy.cuda.get_current_stream().ptr, lane
        if key not in self._workspaces:
            self._workspaces[key] = self.empty((WORKSPACE_BYTES,), np.uint8)
        return self._workspaces[key]


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


class Way(NamedTuple):
    """How a product is computed: with what follows it in the same kernel or not, and by which algorithm."""

    fused: bool
    rank: int


WAYS = [Way(fused, rank) for fused in (True, False) for rank in range(CANDIDATES)]


# what launches a product in a way; nothing where that way is not there


def dense_forward(engine: CupyEngine, arrays: Mapping[str, Array], way: Way, lane: int) -> list[Launch]:
    x, w, b, z = (arrays[name] for name in ("x", "w", "b", "z"))
    if way.fused:
        return engine.product(x, w, z, way, lane, bias=address(b)) if address(b) % BIAS_ALIGNMENT == 0 else []
    product = engine.product(x, w, z, way, lane)
    return product and [*product, *engine.launches(in_place("add_bias", z, b=b))]


def dense_relu_forward(engine: CupyEngine, arrays: Mapping[str, Array], way: Way, lane: int) -> list[Launch]:
    """With a ReLU of its own: that of cuBLASLt makes NaN 0."""
    z = arrays["y"]
    product = dense_forward(engine, {**arrays, "z": z}, way, lane)
    return product and [*product, *engine.launches(in_place("rectify", z))]


def dense_input_grad(engine: CupyEngine, arrays: Mapping[str, Array], way: Way, lane: int) -> list[Launch]:
    dz, w, dx = (arrays[name] for name in ("dz", "w", "dx"))
    return [] if way.fused else engine.product(dz, w, dx, way, lane, transpose_b=True)


def dense_weight_grad(engine: CupyEngine, arrays: Mapping[str, Array], way: Way, lane: int) -> list[Launch]:
    x, dz, dw = (arrays[name] for name in ("x", "dz", "dw"))
    return [] if way.fused else engine.product(x, dz, dw, way, lane, transpose_a=True)


def in_place(kernel: str, z: Array, **others: Array) -> Stage:
    """A kernel that changes a product, or its twin where that is of bfloat16."""
    return Stage(kernel + ("_bfloat16" if z.dtype == np.uint16 else ""), {"z": z, **others})


PRODUCTS: dict[str, Callable[[CupyEngine, Mapping[str, Array], Way, int], list[Launch]]] = {
    "dense_forward": dense_forward,
    "dense_relu_forward": dense_relu_forward,
    "dense_input_grad": dense_input_grad,
    "dense_weight_grad": dense_weight_grad,
}


@functools.cache
def engine_at(precision: str) -> CupyEngine:
    return CupyEngine(precision)


@functools.cache
def module(file: str, floats: str) -> Any:
    """The kernels of a file; compiled when the first is looked up, once for all processes: CuPy keeps them on disk."""
    return cupy.RawModule(code=source([file], floats), options=OPTIONS)


@functools.cache
def most_blocks() -> int:
    """As many blocks as the device computes at a time."""
    return min(MOST_BLOCKS, 8 * int(cupy.cuda.Device().attributes["MultiProcessorCount"]))


def spread(pattern: str, extent: tuple[int, ...], most: int) -> tuple[Shape2D, Shape2D]:
    """Grid and block for an array of this shape, over which `Lanes` in cupy_math.cu lays a block's threads."""
    rows, columns = extent[0], math.prod(extent[1:])
    if pattern == "ONE_BLOCK":
        return (1, 1), (THREADS, 1)
    if pattern == "COLUMNS":
        return (min(most, -(-columns // 16)), 1), (max(32, 16 * min(64, power_of_two(rows))), 1)
    if pattern == "ROWS":
        lanes = min(32, power_of_two(-(-columns // 4))) if len(extent) > 1 else 32
        rows_of_block = THREADS // lanes if columns < WIDE else 1
        return (min(most, -(-rows // rows_of_block)), 1), (THREADS, 1)
    if len(extent) == 1:
        return (min(most, -(-rows // THREADS)), 1), (THREADS, 1)
    width = min(THREADS, power_of_two(columns))
    across = min(most, -(-columns // width))
    return (across, min(most // across, -(-rows // (THREADS // width)))), (THREADS, 1)


def pinned(x: Array) -> Array:
    """Memory of the host for an array, which the GPU can read while the host does something else."""
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(x.nbytes), x.dtype, x.size).reshape(x.shape)


def noise_like(x: Array) -> Array:
    """Random numbers at the strides and the alignment of a matrix."""
    _, rows, columns, step, _ = matrix_of(x)
    noise: Array = np.random.Generator(np.random.Philox(0)).standard_normal(65_537)  # a prime: no two rows are alike
    if x.dtype == np.uint16:  # the first half of a float32 is a bfloat16
        noise = noise.astype(np.float32).view(np.uint32) >> 16
    block = cupy.asarray(np.resize(noise.astype(x.dtype), rows * step + 256 // x.itemsize))
    start = (address(x) - address(block)) % 256 // x.itemsize
    array: Array = block[start : start + rows * step].reshape(rows, step)[:, :columns]
    return array


def power_of_two(n: int) -> int:
    """The first that is not below `n`."""
    return 1 << (n - 1).bit_length()


def matrix_of(x: Array) -> Matrix:
    """Rows as cuBLAS takes them; one row alone may have any stride."""
    rows, columns = x.shape
    return Matrix(address(x), rows, columns, max(columns, x.strides[0] // x.itemsize), TYPES[x.dtype.name])
