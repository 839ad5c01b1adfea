"""GPU kernels of CuPy arrays: `.cu` files beside this one, and cuBLASLt for matrix products.

A kernel is named as its op, and its parameters as the op's arguments; a line such as
``ROWS softmax_forward(Matrix z, Matrix p)`` in a `.cu` file says all that is needed to launch it. Each array is passed
by value, as a structure of whole numbers of 64 bits, which its C++ type in `cupy_math.cu` mirrors.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import numpy as np

from .cublaslt import WORKSPACE_BYTES, Blas, Matrix, load_libraries
from .engine import Call, Engine, Program, native, real_array
from .ops import Array, Op

__all__ = ["CupyEngine"]

Launch = Callable[[], None]
Shape2D = tuple[int, int]

FILES = "math", "activations", "layers", "losses", "norms", "optim", "fused"  # the first is part of all others
SOURCES = {name: (Path(__file__).parent / f"cupy_{name}.cu").read_text() for name in FILES}
TYPES = "b1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f4", "f8"  # of a Table, in the order of cupy_math.cu
MOST_BLOCKS = 1024  # for which a Room has room
ROOM = 3 + 2 * MOST_BLOCKS
OPTIONS = ("--std=c++17",)
STEPS_OF_A_GRAPH = 16
WIDE = 1024  # columns from which a row gets a block instead of a warp


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

# the ops that take several kernels
STAGES = {
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


class CupyEngine(Engine):
    name = "cupy"
    device = "cuda"

    def __init__(self) -> None:
        self._blas = Blas(*self.load_blas())
        self._workspaces: dict[int, Array] = {}

    load_blas = staticmethod(load_libraries)

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        if not self.owns(x):
            x = real_array(x)
            x = native(x) if x.dtype != np.float16 else x
        array: Array = cupy.ascontiguousarray(cupy.asarray(x, dtype))
        return array

    def table(self, x: Any) -> Array:
        array: Array = x if self.owns(x) else cupy.asarray(native(real_array(x)))
        return array

    def owns(self, x: Any) -> bool:
        return isinstance(x, cupy.ndarray)

    def asnumpy(self, x: Array) -> Array:
        array: Array = cupy.asnumpy(x)
        return array

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

    def synchronize(self) -> None:
        cupy.cuda.get_current_stream().synchronize()

    def supports(self, op: Op) -> bool:
        return op.name in PRODUCTS or op.name in KERNELS or op.name in STAGES

    def program(self, calls: Sequence[Call]) -> Program:
        return Launches(self, calls)

    def launches(self, op: Op, arguments: Sequence[Array], room: Array) -> list[Launch]:
        """What computes an op on these arrays, on the stream that is current when it is called."""
        names = {arg.name: array for arg, array in zip((*op.inputs, *op.outputs), arguments, strict=True)}
        names["room"] = room
        if op.name in PRODUCTS:
            return PRODUCTS[op.name](self, names)
        return [self.launch(kernel, names) for kernel in STAGES.get(op.name, (op.name,))]

    def launch(self, name: str, arrays: Mapping[str, Array]) -> Launch:
        """One kernel, on the arrays that its parameters name."""
        kernel = KERNELS[name]
        large = [arrays[name] for kind, name in kernel.parameters if kind in ("Matrix", "Vector", "Integers")]
        extent = (large or [np.empty(1)])[-1 if kernel.pattern == "ELEMENTS" else 0].shape
        floats = next((array.dtype.name for array in large if array.dtype.kind == "f"), "float32")
        values = tuple(by_value(arrays[name], kind) for kind, name in kernel.parameters)
        function = module(kernel.file, floats).get_function(name)
        return functools.partial(function, *spread(kernel.pattern, extent, most_blocks()), values)

    def product(self, a: Array, b: Array, c: Array, **options: Any) -> Launch | None:
        """``c = a @ b``, with the options of `Blas.product`; None where the library cannot do it."""
        workspace = self._workspace().data.ptr
        prepared = self._blas.product(*map(matrix_of, (a, b, c)), c.dtype, workspace, **options)
        return prepared and (lambda: prepared(cupy.cuda.get_current_stream().ptr))

    def _workspace(self) -> Array:
        """Where products of the current stream work: they follow each other, those of two streams may not."""
        stream = cupy.cuda.get_current_stream().ptr
        if stream not in self._workspaces:
            self._workspaces[stream] = self.empty((WORKSPACE_BYTES,), np.uint8)
        return self._workspaces[stream]


class Launches:
    """A recording as a list of launches, replayed as a CUDA graph of several steps.

    What a graph reads and writes stays where it was captured: this owns all of it but the slots, for other arrays in
    which, or on another stream, it is captured anew.
    """

    def __init__(self, engine: CupyEngine, calls: Sequence[Call]) -> None:
        self._engine, self._calls = engine, calls
        self._room = engine.zeros((ROOM,), np.float64)
        self._slots: dict[str, Array] = {}
        self._launches: list[Launch] = []
        self._made_for: Any = None
        self._bound = self._warm = False
        self._graphs: dict[int, Any] = {}

    def bind(self, **slots: Array) -> None:
        stream = cupy.cuda.get_current_stream().ptr
        places = [(name, x.data.ptr, x.shape, x.strides, x.dtype) for name, x in slots.items()]
        if self._made_for != (stream, places):
            self._graphs, self._made_for = {}, (stream, places)
            self._launches = [
                launch
                for op, arguments in self._calls
                for launch in self._engine.launches(
                    op, [slots[a] if isinstance(a, str) else a for a in arguments], self._room
                )
            ]
        self._slots, self._bound = slots, True

    def run(self, steps: int) -> None:
        if not self._bound:
            return
        if steps and not self._warm:  # what is loaded when it is first launched cannot be loaded in a capture
            self._launch(1)
            self._warm, steps = True, steps - 1
        for size in (STEPS_OF_A_GRAPH, 1):
            times, steps = divmod(steps, size)
            for _ in range(times):
                self._graph(size).launch()

    def release(self) -> None:
        if self._slots:
            self._slots, self._bound = {}, False

    def _launch(self, steps: int) -> None:
        for _ in range(steps):
            for launch in self._launches:
                launch()

    def _graph(self, steps: int) -> Any:
        """So many steps as one graph, which is launched on the stream that is current then."""
        if steps not in self._graphs:
            with cupy.cuda.Stream(non_blocking=True) as stream:
                stream.begin_capture()
                try:
                    self._launch(steps)
                finally:
                    graph = stream.end_capture()
            self._graphs[steps] = graph
        return self._graphs[steps]


def dense_forward(engine: CupyEngine, arrays: Mapping[str, Array], relu: bool = False) -> list[Launch]:
    x, w, b, z = (arrays[name] for name in ("x", "w", "b", "y" if relu else "z"))
    if fused := engine.product(x, w, z, bias=b.data.ptr, relu=relu):
        return [fused]
    return [*alone(engine.product(x, w, z)), engine.launch("add_bias_relu" if relu else "add_bias", {"b": b, "z": z})]


def dense_input_grad(engine: CupyEngine, arrays: Mapping[str, Array]) -> list[Launch]:
    return alone(engine.product(arrays["dz"], arrays["w"], arrays["dx"], transpose_b=True))


def dense_weight_grad(engine: CupyEngine, arrays: Mapping[str, Array]) -> list[Launch]:
    return alone(engine.product(arrays["x"], arrays["dz"], arrays["dw"], transpose_a=True))


def input_grad_then(kernel: str) -> Callable[[CupyEngine, Mapping[str, Array]], list[Launch]]:
    """An input gradient, and a kernel that changes it in place."""

    def launches(engine: CupyEngine, arrays: Mapping[str, Array]) -> list[Launch]:
        in_place = {"dy": arrays["dx"]} | arrays
        return [*dense_input_grad(engine, arrays), engine.launch(kernel, in_place)]

    return launches


def alone(launch: Launch | None) -> list[Launch]:
    assert launch is not None  # a product without an epilogue is always there
    return [launch]


# Fused ops with a part of an optimizer in them are left out: one kernel that updates all parameters at once is faster.
PRODUCTS: dict[str, Callable[[CupyEngine, Mapping[str, Array]], list[Launch]]] = {
    "dense_forward": dense_forward,
    "dense_relu_forward": functools.partial(dense_forward, relu=True),
    "dense_input_grad": dense_input_grad,
    "dense_weight_grad": dense_weight_grad,
    "dense_relu_input_grad": input_grad_then("relu_backward"),
    **{
        f"dense_{name}_grads": input_grad_then(f"{name}_grads")
        for name in ("relu", "leaky_relu", "elu", "tanh", "sigmoid")
    },
}


@functools.cache
def module(file: str, floats: str) -> Any:
    """The kernels of a file; compiled when the first is launched, once for all processes: CuPy keeps them on disk."""
    return cupy.RawModule(code=source(file, floats), options=OPTIONS)


def source(file: str, floats: str) -> str:
    """The kernels of a file for one float type, as CUDA C++."""
    real = {"float32": "float", "float64": "double"}[floats]
    return f"typedef {real} Real;\n{SOURCES['math']}\n{SOURCES[file]}"


@functools.cache
def most_blocks() -> int:
    """As many blocks as the device computes at a time."""
    return min(MOST_BLOCKS, 8 * int(cupy.cuda.Device().attributes["MultiProcessorCount"]))


def spread(pattern: str, extent: tuple[int, ...], most: int) -> tuple[Shape2D, Shape2D]:
    """Grid and block for an array of this shape; see cupy_math.cu for what the patterns promise."""
    rows, columns = extent[0], math.prod(extent[1:])
    if pattern == "ONE_BLOCK":
        return (1, 1), (256, 1)
    if pattern == "COLUMNS":
        return (min(most, -(-columns // 32)), 1), (32, min(32, power_of_two(rows)))
    if pattern == "ROWS":
        block = (32, 8) if columns < WIDE else (256, 1)
        return (min(most, -(-rows // block[1])), 1), block
    if len(extent) == 1:
        return (min(most, -(-rows // 256)), 1), (256, 1)
    width = min(256, power_of_two(columns))
    height = min(256 // width, max(32 // width, power_of_two(rows)))
    across = min(most, -(-columns // width))
    return (across, min(most // across, -(-rows // height))), (width, height)


def power_of_two(n: int) -> int:
    """The first that is not below `n`."""
    return 1 << (n - 1).bit_length()


def matrix_of(x: Array) -> Matrix:
    """Rows as cuBLAS takes them; one row alone may have any stride."""
    rows, columns = x.shape
    return Matrix(x.data.ptr, rows, columns, max(columns, x.strides[0] // x.itemsize))


def by_value(x: Array, kind: str) -> Array:
    """The words of an array's C++ structure, as one item that CuPy passes by value."""
    if kind == "Table":
        rows, columns = (*x.shape, 1)[:2]
        words = [rows, columns, *(*x.strides, 0)[:2], TYPES.index("b1" if x.dtype.str[1:] == "u1" else x.dtype.str[1:])]
    elif kind == "Matrix":
        words = [x.shape[0], x.size // x.shape[0], x.strides[0] // x.itemsize]
    else:
        words = [x.size]
    item: Array = np.array([x.data.ptr, *words], np.int64).view(np.dtype((np.void, 8 * (1 + len(words)))))
    return item
