"""CPU kernels compiled by Numba, called through pointers.

Each op of `numba_layers` and its neighbours becomes a C function of one argument: the address of a *row*, which lists
for each of the op's arrays its address, shape and strides. A table of rows, each behind the address of its op, is a
program that `replay` runs without the GIL. It knows no op; an eager call is a table of one row.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np import arrayobj

from . import numba_activations, numba_fused, numba_layers, numba_losses, numba_norms, numba_optim, numba_softmax
from .engine import Call, Engine, Program, kernels_of, needs_scratch, scratch_for
from .numba_cache import with_disk_cache
from .numba_math import FAST
from .numba_team import OPEN, RUN_PARTS, WORD, ask_for_help, call, new_team
from .numba_vectors import VECTOR_BYTES
from .ops import OPS, Array, Op
from .threads import allowed_threads, blas_libraries

__all__ = ["NumbaEngine"]

PART = 2e-5  # seconds that a part of a call takes at least, beside which handing it over costs little
UNIT = 64  # what a part begins at a multiple of, so that it does not share cache lines and vectors with its neighbour
KERNELS = kernels_of(
    numba_layers, numba_activations, numba_norms, numba_softmax, numba_losses, numba_optim, numba_fused
)
WITH_ROOM = {name for name, kernel in KERNELS.items() if needs_scratch(kernel, OPS[name])}  # to work in
NO_ROOM, FIRST_ROW = np.empty(0), np.zeros(1, np.int64)

log = logging.getLogger("fastbp")


class NumbaEngine(Engine):
    name = "numba"
    device = "cpu"

    def supports(self, op: Op) -> bool:
        return op.name in KERNELS

    def fuses(self, call: Call) -> bool:
        """Not what is worth several cores and can only be computed whole, where its gradient could be cut."""
        if call.op.cuts or not is_large(call):
            return True
        return sizes_of(call)["K"] < 2 * UNIT

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A matrix whose rows each begin on a boundary of vectors."""
        if len(shape) != 2 or shape[1] * np.dtype(dtype).itemsize < VECTOR_BYTES:
            return self.empty(shape, dtype)
        step = VECTOR_BYTES // np.dtype(dtype).itemsize
        return self.empty((shape[0], -(-shape[1] // step) * step), dtype)[:, : shape[1]]

    def program(self, calls: Sequence[Call]) -> Program:
        return Table(self, calls)

    def execute(self, op: Op, arguments: Sequence[Array]) -> None:
        call = Call(op, tuple(arguments))
        if is_large(call):
            super().execute(op, arguments)
        else:  # without a table, which takes longer to make than such a call
            room = room_for(self, [call])
            replay(np.array(described(op, arguments, room), np.int64), FIRST_ROW, 1)


class Table:
    """A recording as one array of integers.

    A call that takes long enough becomes one of `RUN_PARTS`, with a part for each thread that is allowed.
    """

    def __init__(self, engine: Engine, calls: Sequence[Call]) -> None:
        self._engine = engine
        self._calls = calls
        self._open = [i for i, call in enumerate(calls) if any(isinstance(a, str) for a in call.arguments)]
        self._rooms = [room_for(engine, calls)]  # one for each part, because they work at the same time
        self._most = numba.config.NUMBA_NUM_THREADS if any(map(is_large, calls)) else 1
        self._threads = 1
        self._counters: list[tuple[Array, Array]] = []  # what counts calls, and its copy for another part
        self._slots: dict[str, Array] = {}
        self._bound = False
        self._table = self._starts = self._team = np.empty(0, np.int64)

    def bind(self, **slots: Array) -> None:
        self._slots = slots
        if not len(self._starts):
            self._write()
        else:
            for i in self._open:
                row, start = self._row(self._calls[i]), self._starts[i]
                self._table[start : start + len(row)] = row
        self._bound = True

    def _write(self) -> None:
        self._starts = self._starts[:0]  # what is half written, should this be interrupted, is not run
        self._threads, self._counters = self._allowed_threads(), []
        rows = self._rows_in_parts() if self._threads > 1 else [self._row(call) for call in self._calls]
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)[:-1]  # none, where there are no calls
        self._table, self._starts = np.concatenate([np.empty(0, np.int64), *rows]), starts

    def _rows_in_parts(self) -> list[list[int]]:
        self._team = new_team()
        cut = [parts_of(call, self._threads) for call in self._calls]
        parts = [Call(call.op, tuple(part)) for call, some in zip(self._calls, cut, strict=True) for part in some]
        self._rooms[1:] = [room_for(self._engine, parts) for _ in range(1, max(map(len, cut)))]
        return [
            self._row_of_parts(call, some) if some else self._row(call)
            for call, some in zip(self._calls, cut, strict=True)
        ]

    def _row(self, call: Call) -> list[int]:
        arrays = [self._slots[a] if isinstance(a, str) else a for a in call.arguments]
        return described(call.op, arrays, self._rooms[0])

    def _row_of_parts(self, call: Call, parts: Sequence[list[Array]]) -> list[int]:
        for i, arg in enumerate(call.op.inputs):
            if arg.inplace and not set(arg.dims) & set(call.op.cuts):
                for part in parts[1:]:
                    part[i] = part[i].copy()
                    self._counters.append((call.arguments[i], part[i]))
        rows = [described(call.op, part, room) for part, room in zip(parts, self._rooms, strict=False)]
        return sum(rows, [RUN_PARTS.address, self._team.ctypes.data, len(rows), WORD * len(rows[0])])

    def run(self, steps: int) -> None:
        if not self._bound:
            return
        if not len(self._starts) or self._threads != self._allowed_threads():
            self._write()
        if self._threads == 1:
            replay(self._table, self._starts, steps)
            return
        for counter, copy in self._counters:
            copy[...] = counter
        try:
            ask_for_help(self._team, len(self._rooms) - 1)
            replay(self._table, self._starts, steps)
        finally:
            self._team[OPEN] = 0

    def _allowed_threads(self) -> int:
        return allowed_threads(self._most, counted_libraries()) if self._most > 1 else 1

    def release(self) -> None:
        if self._slots:
            self._slots = {}
            self._bound = False


def room_for(engine: Engine, calls: Sequence[Call]) -> Array:
    """Room for those of some calls whose kernels work in it, one after the other."""
    in_room = [call for call in calls if call.op.name in WITH_ROOM]
    return engine.empty(*scratch_for(in_room)) if in_room else NO_ROOM


@functools.cache
def counted_libraries() -> list[Any]:
    """The BLAS libraries whose threads can be counted, since a user who limits these means all."""
    try:
        return blas_libraries()
    except ImportError:
        return []


def sizes_of(call: Call) -> Mapping[str, int]:
    return call.op.sizes([a.shape for a in call.arguments[: len(call.op.inputs)]])


def seconds_of(call: Call) -> float:
    """What a call takes one core of a processor of these years, roughly; 0 where its arrays are not known yet."""
    op, arrays = call
    if any(isinstance(a, str) for a in arrays):
        return 0.0
    arguments = zip((*op.inputs, *op.outputs), arrays, strict=True)
    traffic = sum((1 + arg.inplace) * array.nbytes for arg, array in arguments)
    return max(op.flops(sizes_of(call)) * arrays[0].itemsize / 4e11, traffic / 2e10)


def is_large(call: Call) -> bool:
    """Whether a call is worth more than one core."""
    return seconds_of(call) >= 2 * PART


def parts_of(call: Call, most: int) -> list[list[Array]]:
    """Parts of a call that can be computed at once; none where it is better computed whole."""
    if not call.op.cuts or not is_large(call):
        return []
    sizes = sizes_of(call)
    along = max(call.op.cuts, key=sizes.__getitem__)
    count = min(most, int(seconds_of(call) / PART), sizes[along] // UNIT)
    ends = [round(sizes[along] * i / count / UNIT) * UNIT for i in range(count)]
    parts = [call.op.part(call.arguments, along, *some) for some in itertools.pairwise([*ends, sizes[along]])]
    return parts if count > 1 else []


def described(op: Op, arrays: Sequence[Array], room: Array) -> list[int]:
    """The row of a call, behind the address of its function."""
    if op.name in WITH_ROOM:
        arrays = [*arrays, room]
    return [address_of(op, arrays), *(word for a in arrays for word in (a.ctypes.data, *a.shape, *a.strides))]


def address_of(op: Op, arguments: Sequence[Array]) -> int:
    """The address of the C function for `op` on arrays of these types; compiled, or from the cache."""
    return compiled(op.name, tuple((a.dtype.str[1:], a.ndim, layout(a)) for a in arguments))


def layout(a: Array) -> str:
    """C: contiguous; R: each row is; A: any strides."""
    return "C" if a.flags.c_contiguous else "R" if a.strides[-1] == a.itemsize else "A"


@functools.cache
def compiled(name: str, kinds: tuple[tuple[str, int, str], ...]) -> int:
    kernel = KERNELS[name]
    # The kernel becomes part of the function before anything is optimised, so that it profits from what `reader` knows
    # of the arrays.
    unique = "_".join([name, *(f"{d}{ndim}{layout}" for d, ndim, layout in kinds)])
    arguments = ", ".join(f"arrays[{i}]" for i in range(len(kinds)))
    source = f"def {unique}(row):\n    arrays = arrays_at(row)\n    kernel({arguments})\n"
    names: dict[str, Any] = {"__name__": kernel.__module__, "arrays_at": reader(kinds)}
    names["kernel"] = numba.njit(inline="always", **FAST)(kernel)
    exec(compile(source, kernel.__code__.co_filename, "exec"), names)
    pointer = with_disk_cache(functools.partial(numba.cfunc, types.void(types.intp), **FAST), names[unique])
    KEPT_ALIVE.append(pointer)
    if not pointer.cache_hits:
        say_compiling()
    return int(pointer.address)


KEPT_ALIVE: list[Any] = []


@functools.cache
def say_compiling() -> None:
    log.warning("fastbp: compiling CPU kernels that are new here, once; later runs take them from the disk cache")


def reader(kinds: Sequence[tuple[str, int, str]]) -> Callable[[int], tuple[Array, ...]]:
    """A compiled function that makes arrays of these dtypes, dimensions and layouts from the words of a row."""
    array_types = [types.Array(numba.from_dtype(np.dtype(d)), ndim, "AC"[order == "C"]) for d, ndim, order in kinds]
    result = types.Tuple(array_types)

    @intrinsic
    def arrays_at(typing_context: Any, row: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
            arrays = []
            for array_type, (_, _, order) in zip(array_types, kinds, strict=True):
                words = []
                for _ in range(1 + 2 * array_type.ndim):
                    words.append(builder.load(word))
                    word = builder.gep(word, [ir.Constant(ir.IntType(64), 1)])
                array = arrayobj.make_array(array_type)(context, builder)
                itemsize = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
                if order == "R":
                    words[-1] = ir.Constant(ir.IntType(64), itemsize)  # which makes loops over a row vector code
                arrayobj.populate_array(
                    array,
                    data=builder.inttoptr(words[0], array.data.type),
                    shape=words[1 : 1 + array_type.ndim],
                    strides=words[1 + array_type.ndim :],
                    itemsize=context.get_constant(types.intp, itemsize),
                    meminfo=None,
                )
                arrays.append(array._getvalue())
            return context.make_tuple(builder, result, arrays)

        return result(types.intp), build

    result_function: Callable[[int], tuple[Array, ...]] = arrays_at
    return result_function


def interpret(table: Array, starts: Array, steps: int) -> None:
    for _ in range(steps):
        for start in starts:
            call(table[start], table.ctypes.data + WORD * (start + 1))


replay = with_disk_cache(functools.partial(numba.njit, "void(int64[::1], int64[::1], intp)", nogil=True), interpret)
