"""What every engine is: a caller of ops, an owner of arrays, a replayer of recordings."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MethodType, ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from .ops import OPS, Arg, Array, Op

__all__ = ["Call", "DTypeError", "Engine", "OpCaller", "Program", "native", "real_array", "resolved"]


BUFFER = 512  # elements: what NumPy may allocate to broadcast or convert, in each call


class DTypeError(TypeError, ValueError):
    """An array's elements are of a type that cannot be computed with: complex numbers, objects, text, dates."""


class Call(NamedTuple):
    """One line of a recording. An argument that is a string is a slot: an array bound by that name before a replay."""

    op: Op
    arguments: tuple[Any, ...]


class Program(Protocol):
    """A recording made ready by an engine."""

    def bind(self, **slots: Array) -> None:
        """Put arrays into the slots, and keep them alive until `release`."""

    def run(self, steps: int) -> None:
        """Replay the recording `steps` times."""

    def release(self) -> None:
        """Let go of the arrays in the slots."""


class OpCaller:
    """Whatever layers can call ops on: an engine, or a recorder of calls."""

    def call(self, op: Op, *arguments: Any, out: Any = None) -> Any:
        """What ``self.name(*arguments)`` does for an op of that name."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in OPS:
            near = [] if name.startswith("_") else difflib.get_close_matches(name, OPS)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise AttributeError(f"{type(self).__name__} has no op {name!r}{hint}")
        return MethodType(method_of(OPS[name]), self)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *OPS]


@functools.cache
def method_of(op: Op) -> Callable[..., Any]:
    """A method that calls `op`, with the op's own signature and text for ``help``."""

    def method(self: OpCaller, *arguments: Any, out: Any = None) -> Any:
        return self.call(op, *arguments, out=out)

    parameter = inspect.Parameter
    names = ["self", *(arg.name for arg in op.inputs)]
    parameters = [parameter(name, parameter.POSITIONAL_ONLY) for name in names]
    parameters.append(parameter("out", parameter.KEYWORD_ONLY, default=None))
    method.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    method.__name__, method.__qualname__, method.__doc__ = op.name, op.name, op.text()
    return method


class Engine(OpCaller):
    """An array library's side of the contract.

    A subclass gives `name`, `device`, `supports`, which tells whether there is a kernel for an op, and `kernel`, which
    finds it: a function that takes the op's inputs, then its outputs, and writes the outputs. Where its arrays are not
    NumPy's, it also overrides `asarray`, `asnumpy`, `empty`, `owns`, `span` and `table`; where it replays better than
    call by call, `program`.

    ``engine.dense_forward(x, w, b)`` calls an op on arrays: shapes are checked against the op's row, the floats follow
    the first one's dtype, and outputs are allocated or, with ``out=``, written into arrays of the right shape and
    dtype, C-contiguous, that overlap nothing else.
    """

    name: str
    device: str

    def kernel(self, op: Op, arguments: Sequence[Array]) -> Callable[..., None]:
        """The function that computes `op` on such arguments; asked for where a program is bound to them."""
        raise NotImplementedError(f"{type(self).__name__} must define kernel(op, arguments)")

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        """`x` in this engine's memory, C-contiguous and aligned; not copied where it is so already."""
        array = real_array(x)
        if array.flags.carray and (dtype is None or dtype == array.dtype):
            return array  # as `require` would after a while
        return np.require(array, dtype, ["C", "A"])

    def resident(self, x: Any) -> Array | None:
        """A user's array that lies in memory which this engine has apart from the host's, at any stride, or None."""
        return None

    def table(self, x: Any) -> Array:
        """A user's table where a replay can read it: here just where it is, at any stride."""
        return native(real_array(x))

    def rows_at_a_time(self, tables: Sequence[Array]) -> int | None:
        """How many rows of a user's tables there is room for at a time; None for all of them."""
        return None

    def ahead(self, pieces: Iterable[Sequence[Array]]) -> Iterator[Sequence[Array]]:
        """Pieces of tables where a replay can read them, each until the next one is asked for."""
        return ([self.table(x) for x in piece] for piece in pieces)

    def owns(self, x: Any) -> bool:
        """Whether `x` is an array of this engine's kind."""
        return isinstance(x, np.ndarray)

    def asnumpy(self, x: Array) -> Array:
        """An array of this engine as NumPy's; where it lies in the host's memory it is not copied."""
        return np.asarray(x)

    def is_finite(self, x: Array) -> bool:
        """Whether an array of this engine holds finite numbers only."""
        return bool(np.isfinite(self.asnumpy(x)).all())

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Uninitialised memory that starts on a 256-byte boundary, as vector loads and caches like it."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        block = np.empty(size + 256, np.uint8)
        start = -block.ctypes.data % 256
        return block[start : start + size].view(dtype).reshape(shape)

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Memory for what passes between two calls of a recording, at the strides that this engine likes."""
        return self.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Memory as `empty` gives it, filled with 0."""
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def scalar(self, *values: float) -> Array:
        """Numbers for an op's ``s`` arguments."""
        return self.asarray(np.array(values, np.float64))

    def vector(self, values: Sequence[float] | Array) -> Array:
        """Numbers for an op's ``f`` argument of one dimension."""
        return self.asarray(np.asarray(values, np.float64))

    def integers(self, *values: int) -> Array:
        """Numbers for an op's ``i`` arguments."""
        return self.asarray(np.array(values, np.int64))

    precision = "fp32"  # of products of float32 matrices
    precisions: tuple[str, ...] = ("fp32",)  # that this engine can

    def at_precision(self, precision: str) -> Engine:
        """This engine, but with products of float32 matrices in "fp32", "tf32" or "bf16", whose sums are in fp32."""
        if precision != "fp32":
            raise ValueError(f"precision must be 'fp32' on engine {self.name!r}, got {precision!r}")
        return self

    def synchronize(self) -> None:
        """Wait until all that was asked for is done, where calls come back before that."""

    def program(self, calls: Sequence[Call]) -> Program:
        """Some calls made ready to be replayed, here one by one."""
        return CallByCall(self, calls)

    def recorded(self, calls: Sequence[Call], passing: Sequence[Array]) -> Program:
        """The program of a recording; nobody but its calls reads or writes the arrays that are `passing` in them."""
        return self.program(calls)

    def span(self, array: Array) -> tuple[int, int]:
        """The first address of an array of this engine, and the one behind its last."""
        return np.lib.array_utils.byte_bounds(array)

    def supports(self, op: Op) -> bool:
        """Whether this engine has a kernel for `op`."""
        raise NotImplementedError(f"{type(self).__name__} must define supports(op)")

    def fuses(self, call: Call) -> bool:
        """Whether `call`, of a fused op that this engine has, is better than the calls that it stands for."""
        return True

    def call(self, op: Op, *arguments: Any, out: Any = None) -> Any:
        """Check the arguments against the op's row, and run it.

        Parameters
        ----------
        op : Op
        *arguments : array
            The op's inputs, in order; what it updates in place must be an array of this engine.
        out : array or sequence of array, optional
            Where the outputs are written; by default new arrays.

        Returns
        -------
        array, tuple of array or None
            The output, or all where there are several.

        Raises
        ------
        TypeError, ValueError
            For arguments that do not fit; the text names the op and the argument, and nothing has changed.
        """
        if len(arguments) != len(op.inputs):
            names = ", ".join(arg.name for arg in op.inputs)
            raise TypeError(f"{op.name} takes {len(op.inputs)} arguments ({names}), got {len(arguments)}")
        inputs, floats = self._inputs(op, arguments)
        sizes = op.sizes([array.shape for array in inputs])
        for arg, array in zip(op.inputs, inputs, strict=True):
            if arg.below:
                _check_places(f"{op.name}: {arg.name} must hold numbers", sizes[arg.below], array)
        if op.reach:
            named = {arg.name: array for arg, array in zip(op.inputs, inputs, strict=True)}
            name, first, last, dimension = op.reach(named, sizes)
            _check_places(f"{op.name}: {name} must lead to places", sizes[dimension], first, last)
        if out is None:
            outputs = [self.empty(op.shape(arg, sizes), arg.dtype(floats)) for arg in op.outputs]
        else:
            outputs = list(out) if isinstance(out, tuple | list) else [out]
            if len(outputs) != len(op.outputs):
                raise TypeError(f"{op.name}: out must hold {len(op.outputs)} arrays, got {len(outputs)}")
            for arg, array in zip(op.outputs, outputs, strict=True):
                self._check_out(op, arg, array, op.shape(arg, sizes), arg.dtype(floats))
        if out is not None or any(arg.inplace for arg in op.inputs):
            self._check_apart(op, inputs, outputs)
        self.execute(op, [*inputs, *outputs])
        return tuple(outputs) if len(outputs) > 1 else outputs[0] if outputs else None

    def execute(self, op: Op, arguments: Sequence[Array]) -> None:
        """Run one op now, on arrays that were checked."""
        once = self.program([Call(op, tuple(arguments))])
        once.bind()
        once.run(1)

    def _inputs(self, op: Op, arguments: Sequence[Any]) -> tuple[list[Array], np.dtype[Any]]:
        arrays: list[Array] = []
        floats: np.dtype[Any] | None = None
        for arg, value in zip(op.inputs, arguments, strict=True):
            try:
                array = value if arg.inplace else self.table(value) if arg.kind == "a" else self.asarray(value)
            except DTypeError:
                real_array(value, f"{op.name}: {arg.name}")  # the same again, with its name
                raise
            if arg.kind in "fa" and floats is None:
                dtype = getattr(array, "dtype", None)
                floats = dtype if dtype is not None and dtype in (np.float32, np.float64) else np.dtype(np.float64)
            dtype = arg.dtype(floats or np.dtype(np.float64))
            if arg.inplace:
                self._check_written(op, arg, array, dtype)
            elif arg.kind == "i" and array.dtype.kind not in "iub":
                raise DTypeError(f"{op.name}: {arg.name} must hold integers, got {array.dtype}")
            elif arg.kind != "a" and array.dtype != dtype:
                array = self.asarray(array, dtype)
            arrays.append(array)
        return arrays, floats or np.dtype(np.float64)

    def _check_written(self, op: Op, arg: Arg, array: Any, dtype: np.dtype[Any]) -> None:
        writeable = not self.owns(array) or getattr(array.flags, "writeable", True)  # CuPy's arrays always are
        if not self.owns(array):
            got = f"a {type(array).__name__}"
        elif array.dtype != dtype or not array.flags.c_contiguous or not writeable:
            got = f"{array.dtype} with strides {array.strides}" + ("" if writeable else ", read-only")
        else:
            return
        raise DTypeError(f"{op.name}: {arg.name} must be a writeable C-contiguous {dtype} array, got {got}")

    def _check_out(self, op: Op, arg: Arg, array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._check_written(op, arg, array, dtype)
        if array.shape != shape:
            raise ValueError(f"{op.name}: out for {arg.name} must have shape {shape}, got {array.shape}")

    def _check_apart(self, op: Op, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        """See that nothing which is written lies where another argument does."""
        names = [*(arg.name for arg in op.inputs), *(f"out for {arg.name}" for arg in op.outputs)]
        places = [(name, *self.span(array)) for name, array in zip(names, (*inputs, *outputs), strict=True)]
        written = [i for i in range(len(places)) if i >= len(inputs) or op.inputs[i].inplace]
        for i in written:
            name, start, stop = places[i]
            for other, first, last in places[:i] + places[i + 1 :]:
                if first < stop and start < last:
                    raise ValueError(f"{op.name}: {name} overlaps {other}")

    def __reduce__(self) -> tuple[type[Engine], tuple[()]]:
        return type(self), ()

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Engine:
        return self

    def __repr__(self) -> str:
        return f"<fastbp engine {self.name!r} on {self.device}>"


def _check_places(what: str, count: int, *places: Array) -> None:
    least, most = min(x.min() for x in places), max(x.max() for x in places)
    if not 0 <= least <= most < count:
        raise ValueError(f"{what} from 0 to {count - 1}, got {int(least)} to {int(most)}")


class CallByCall:
    """The plain way to replay: a loop over kernels bound to their arrays."""

    def __init__(self, engine: Engine, calls: Sequence[Call]) -> None:
        self._engine = engine
        self._calls = calls
        self._scratch: Array | None = None
        self._bound: list[tuple[Callable[..., None], Sequence[Any]]] = []
        self._has_slots = False

    def bind(self, **slots: Array) -> None:
        if not slots and self._bound:
            return
        self._bound = []
        for op, arguments in self._calls:
            arrays = [slots[a] if isinstance(a, str) else a for a in arguments]
            kernel = self._engine.kernel(op, arrays)
            if needs_scratch(kernel, op):
                if self._scratch is None:
                    self._scratch = self._engine.empty(*scratch_for(self._calls))
                arrays.append(self._scratch)
            self._bound.append((kernel, arrays))
        self._has_slots = bool(slots)

    def run(self, steps: int) -> None:
        with np.errstate(all="ignore"):  # which also ends the effect of setbufsize
            np.setbufsize(BUFFER)
            for _ in range(steps):
                for kernel, arrays in self._bound:
                    kernel(*arrays)

    def release(self) -> None:
        if self._has_slots:
            self._bound = []


def kernels_of(*modules: ModuleType) -> dict[str, Callable[..., None]]:
    """The functions of some modules that are named as ops."""
    return {name: kernel for module in modules for name, kernel in vars(module).items() if name in OPS}


def needs_scratch(kernel: Callable[..., None], op: Op) -> bool:
    """Whether a kernel takes one argument more than its op: room to work in, so that it need not allocate."""
    return kernel.__code__.co_argcount > len(op.inputs) + len(op.outputs)


def scratch_for(calls: Sequence[Call]) -> tuple[tuple[int], np.dtype[Any]]:
    """Shape and dtype of the room that the kernels of a program share."""
    floats, largest = np.dtype(np.float64), 0
    for op, arguments in calls:
        if any(isinstance(array, str) for array in arguments):
            arguments = arguments[len(op.inputs) :]  # of a user's table, only what is taken out counts
            sizes = dict(enumerate(n for array in arguments for n in array.shape))
            largest = max(largest, 6 * math.prod(sorted(sizes.values())[-2:]))
        else:
            largest = max(largest, op.room(op.sizes([array.shape for array in arguments[: len(op.inputs)]])))
        floats = next((a.dtype for a in arguments if a.dtype.kind == "f" and a.dtype != np.float64), floats)
    return (-(-largest // 64) * 64 + 4096,), floats  # which other types divide


def native(array: Array) -> Array:
    """The array in a dtype that kernels read: of this machine's byte order, floats of 32 or 64 bits."""
    if array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8):
        return array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def resolved(x: Any) -> Any:
    """`x`; a tensor of torch that is to be negated when it is read is negated, because DLPack cannot say so."""
    return x.resolve_neg() if hasattr(x, "resolve_neg") else x


def real_array(x: Any, name: str = "x") -> Array:
    """`x` as a NumPy array of real numbers, in its own dtype where that is float32 or float64.

    Accepts arrays, CuPy's too, lists, data frames and whatever speaks DLPack.

    Raises
    ------
    DTypeError
        For masked arrays and for elements that are not real numbers.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise DTypeError(f"{name} is a masked array; fill or drop what is masked first")
    given = x
    if not isinstance(x, np.ndarray):
        try:
            x = resolved(x)
            if hasattr(x, "__cuda_array_interface__") and hasattr(x, "get"):
                x = x.get()  # CuPy's array, copied from the GPU
            if hasattr(x, "dtypes") and all(getattr(t, "kind", "O") in "fiub" for t in np.atleast_1d(x.dtypes)):
                x = x.to_numpy(np.float64, na_value=np.nan)  # a frame whose columns mix types would give objects
            else:
                x = np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)
        except (ValueError, TypeError, RuntimeError, BufferError) as error:
            raise DTypeError(f"{name} must be an array of numbers, got {type(x).__name__}: {error}") from error
    if x.dtype.kind not in "fiub":
        raise DTypeError(f"{name} must hold real numbers, got dtype {x.dtype}{column_of_other_kind(given)}")
    return np.asarray(x)


def column_of_other_kind(x: Any) -> str:
    """Which column of a frame of pandas holds no numbers, if one does."""
    if hasattr(x, "columns") and hasattr(x, "dtypes"):
        for column, dtype in zip(x.columns, x.dtypes, strict=True):
            if getattr(dtype, "kind", "f") not in "fiub":
                return f", because column {column!r} holds {dtype}"
    return ""
