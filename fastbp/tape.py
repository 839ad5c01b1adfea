"""Writing a computation down once, to replay it many times.

A `Recorder` stands in for an engine: an op called on it runs nothing, but allocates its outputs and notes the call.
What passes between ops are `Handle` objects, which know a shape and a dtype and are no arrays, so that nothing can be
computed beside the ops without being noticed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np

from .fusion import fuse
from .kernels.engine import Call, Engine, OpCaller
from .kernels.ops import Array, Op
from .kernels.threads import Lock

__all__ = ["Handle", "Recorder", "RecordingError", "Tape"]


class RecordingError(TypeError):
    """A layer computes something that a recording cannot hold."""


class Handle:
    """What stands for an array while recording."""

    __slots__ = ("dtype", "memory", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], memory: Array | str) -> None:
        self.shape, self.dtype, self.memory = shape, dtype, memory

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RecordingError("an array was used outside the ops while its step was recorded; call an op of self.engine")

    __array__ = __array_ufunc__ = __bool__ = __float__ = __int__ = __index__ = __len__ = __iter__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __neg__ = __abs__ = __getitem__ = __setitem__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()


class Recorder(OpCaller):
    """Notes the ops that are called on it.

    Parameters
    ----------
    engine : Engine
        Whose memory holds the outputs.
    dtype : dtype
        The float type of everything recorded.
    """

    def __init__(self, engine: Engine, dtype: Any) -> None:
        self.engine = engine
        self.dtype = np.dtype(dtype)
        self._calls: list[tuple[Op, list[Handle]]] = []
        self._handles: dict[int, Handle] = {}  # every handle given out, by its id
        self._adopted: dict[int, Handle] = {}  # those of arrays from outside, by the array's id
        self._wanted: set[int] = set()
        #: Arrays by name that the tape's user fills or reads between replays.
        self.memory: dict[str, Array] = {}

    def call(self, op: Op, *arguments: Any, out: Any = None) -> Any:
        if len(arguments) != len(op.inputs) or out is not None:
            names = ", ".join(arg.name for arg in op.inputs)
            raise RecordingError(f"{op.name} takes {len(op.inputs)} arguments ({names}) and, in a recording, no out")
        for arg, value in zip(op.inputs, arguments, strict=True):
            if id(value) not in self._handles:
                raise RecordingError(
                    f"{op.name}: {arg.name} must come from an op, a parameter or a layer's state, "
                    f"got {type(value).__name__}"
                )
            if arg.kind != "a" and value.dtype != arg.dtype(self.dtype):
                raise RecordingError(f"{op.name}: {arg.name} must be {arg.dtype(self.dtype)}, got {value.dtype}")
        sizes = op.sizes([value.shape for value in arguments])
        outputs = [self._new(op.shape(arg, sizes), arg.dtype(self.dtype)) for arg in op.outputs]
        self._calls.append((op, [*arguments, *outputs]))
        return tuple(outputs) if len(outputs) > 1 else outputs[0] if outputs else None

    def asarray(self, x: Any, dtype: Any = None) -> Any:
        """Let handles through, as an engine lets its own arrays through, and nothing else."""
        if id(x) not in self._handles:
            hint = "; forward returns its output, backward dinputs" if x is None else ""
            raise RecordingError(
                f"expected an array from an op, a parameter or a layer's state, got {type(x).__name__}{hint}"
            )
        return x

    def scalar(self, *values: float) -> Any:
        """Numbers for an op's ``s`` arguments, fixed for as long as the recording lives."""
        return self.adopt(self.engine.scalar(*values))

    def vector(self, values: Any) -> Any:
        """Numbers of the float type, fixed for as long as the recording lives."""
        return self.adopt(self.engine.asarray(np.asarray(values, np.float64), self.dtype))

    def integers(self, *values: int) -> Any:
        """Numbers for an op's ``i`` arguments, fixed as those of `scalar` are."""
        return self.adopt(self.engine.integers(*values))

    def adopt(self, array: Array) -> Any:
        """The handle of engine memory that outlives the recording: a parameter or state."""
        if id(array) not in self._adopted:
            self._adopted[id(array)] = self._keep(Handle(array.shape, array.dtype, array))
        return self._adopted[id(array)]

    def slot(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """The handle of an array that is bound, by `name`, before each replay; `shape` is an example."""
        return self._keep(Handle(shape, np.dtype(dtype), name))

    def want(self, handle: Any, memory: Array | None = None) -> Array:
        """Say that an op's output is read after the replay, and where it shall be written, if not where it is."""
        made = any(handle is output for op, arguments in self._calls for output in arguments[len(op.inputs) :])
        if not made or id(handle) in self._wanted:
            raise RecordingError("each gradient must be an output of an op of its own")
        if memory is not None:
            handle.memory = memory
        self._wanted.add(id(handle))
        return handle.memory

    def tape(self) -> Tape:
        """The recording, without the calls that nothing reads; ends it."""
        read, kept = set(self._wanted), []
        for op, arguments in reversed(self._calls):
            outputs = arguments[len(op.inputs) :]
            if any(arg.inplace for arg in op.inputs) or any(id(output) in read for output in outputs):
                read |= {id(argument) for argument in arguments}
                kept.append(Call(op, tuple(argument.memory for argument in arguments)))
        calls = fuse(kept[::-1], self.engine, list(self.memory.values()))
        made = {
            id(output.memory)
            for op, arguments in self._calls
            for output in arguments[len(op.inputs) :]
            if id(output) not in self._wanted
        }
        passing = [array for call in calls for array in call.arguments if id(array) in made]
        for array in {id(array): array for array in passing}.values():
            if array.dtype.kind == "f":
                array[...] = np.nan  # what is read before it is written shows
        for pieces in (kept, self._calls, self._handles, self._adopted):
            pieces.clear()  # with the memory that the fused calls no longer need
        return Tape(self.engine, calls, self.memory, passing)

    def _new(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Handle:
        return self._keep(Handle(shape, dtype, self.engine.buffer(shape, dtype)))

    def _keep(self, handle: Handle) -> Handle:
        self._handles[id(handle)] = handle
        return handle


class Tape:
    """A recording, ready to replay. It owns the memory that its calls share; the lock is for who replays it.

    `nbytes` counts what passes between its calls.
    """

    def __init__(self, engine: Engine, calls: list[Call], memory: dict[str, Array], passing: list[Array]) -> None:
        self.calls = calls
        self.memory = memory
        self.nbytes = sum(array.nbytes for array in {id(array): array for array in passing}.values())
        self.lock = Lock()
        self._program = engine.recorded(calls, passing)

    def bind(self, **slots: Array) -> None:
        """Put arrays into the slots, where there are any."""
        self._program.bind(**slots)

    @contextlib.contextmanager
    def bound(self, **slots: Array) -> Iterator[None]:
        """Put arrays into the slots for a ``with`` block, which is this thread's alone."""
        with self.lock:
            self.bind(**slots)
            try:
                yield
            finally:
                self._program.release()

    def run(self, steps: int = 1) -> None:
        """Replay, `steps` times."""
        self._program.run(steps)
