"""How recordings are replayed on a GPU: as one kernel, or as CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from .cupy_one_kernel import NotShared, OneKernel, joined, meetings, room_of_block
from .cupy_sources import Stage, address
from .engine import Call
from .ops import Array, Op

if TYPE_CHECKING:
    from .cupy_engine import CupyEngine

__all__ = [
    "MOST_BLOCKS",
    "Graph",
    "Launch",
    "Replay",
    "check_device",
    "current_stream",
    "device_of_process",
    "room_for",
    "run_all",
]

Launch = Callable[[], None]

MOST_BLOCKS = 1024  # of a kernel
MOST_READY = 4  # as many as there are for tables that come by pieces: in two places, a whole or the last one
STEPS_OF_A_GRAPH = 16
OF_A_THREAD = 2  # the pointer of CuPy's `Stream.ptds`
LANES = 3  # in which stages of a graph run side by side
CLUSTER = 8  # blocks, which may be in any cluster
MOST_ROWS = 1 << 30  # of a table, for one kernel, which counts in 32 bits, and two batches ahead
# floating-point operations of a step up to which it is one kernel: of one block, and of a cluster
OF_BLOCK, OF_CLUSTER = 1_000_000, 10_000_000


class Replay:
    """A recording on the GPU: training steps of small networks as one kernel, others as a CUDA graph.

    What is replayed reads and writes where arrays were when it was made ready: this owns all of them but those in the
    slots. For others in these, or on another stream, it is made ready anew, unless they lie where some lay lately.
    """

    def __init__(self, engine: CupyEngine, calls: Sequence[Call], passing: Sequence[Array] = ()) -> None:
        self._engine, self._calls, self._passing = engine, calls, passing
        self._room = engine.zeros((room_for(MOST_BLOCKS),), np.float64)
        self._slots: dict[str, Array] = {}
        self._ready: dict[Any, Callable[[int], None]] = {}
        self._run: Callable[[int], None] | None = None

    def bind(self, **slots: Array) -> None:
        check_device()
        key = *current_stream(), *((name, *place_of(x)) for name, x in slots.items())
        if key not in self._ready:
            while len(self._ready) >= MOST_READY:
                del self._ready[next(iter(self._ready))]
            self._ready[key] = self._made_ready(slots)
        self._slots, self._run = slots, self._ready[key]

    def run(self, steps: int) -> None:
        if self._run is not None and steps:
            self._run(steps)

    def release(self) -> None:
        if self._slots:
            self._slots, self._run = {}, None

    def _made_ready(self, slots: Mapping[str, Array]) -> Callable[[int], None]:
        calls = [(op, [slots[a] if isinstance(a, str) else a for a in arguments]) for op, arguments in self._calls]
        few_rows = all(len(x) <= MOST_ROWS for x in slots.values())
        for blocks in blocks_for(*self._size(calls)) if slots and few_rows else ():
            with contextlib.suppress(NotShared):
                return OneKernel(self._engine, self._stages(calls, True), slots.values(), blocks)
        return Graph(self._engine, self._stages(calls, False), self._passing)

    def _stages(self, calls: Sequence[tuple[Op, Sequence[Array]]], small: bool) -> list[Stage]:
        room = self._room[: room_for(1)] if small else self._room
        stages = [stage for op, arrays in calls for stage in self._engine.stages(op, arrays, room, small)]
        return done_at_once(self._engine, taken_at_once(stages)) if small else taken_at_once(stages)

    def _size(self, calls: Sequence[tuple[Op, Sequence[Array]]]) -> tuple[int, int]:
        """The floating-point operations of a step, and the bytes of all arrays but those in the slots."""
        work = sum(op.flops(op.sizes([x.shape for x in arrays[: len(op.inputs)]])) for op, arrays in calls)
        owned = [x for call in self._calls for x in call.arguments if not isinstance(x, str)]
        return work, sum(map(len, joined(range(*self._engine.span(x)) for x in owned)))


def taken_at_once(stages: list[Stage]) -> list[Stage]:
    """Stages that take the rows of a batch without waiting until somebody has written down which these are.

    Only then, if nobody else wants to know, the cursor moves on: where others wait for what was taken anyway.
    """
    first = next((n for n, stage in enumerate(stages) if stage.kernel == "next_batch"), None)
    if first is None:
        return stages
    coming = stages[first].arrays
    rows = address(coming["rows"])
    users = [n for n, stage in enumerate(stages) if rows in map(address, stage.used().values()) and n != first]
    if not users or not all(stages[n].kernel.startswith("take") for n in users):
        return stages
    result = list(stages)
    for n in users:
        result[n] = stages[n]._replace(kernel=f"{stages[n].kernel}_next", arrays={**stages[n].arrays, **coming})
    result.insert(users[-1] + 2, Stage("move_cursor", coming, frozenset({"cursor"})))
    del result[first]
    return result


# kernels one after the other, of which one can do both at once
AT_ONCE = {
    ("dense_bias_grad", "dense_weight_grad"): "dense_weight_and_bias_grad",
    ("bias_grad", "dense_weight_grad"): "dense_weight_and_bias_grad",
}


def done_at_once(engine: CupyEngine, stages: Iterable[Stage]) -> list[Stage]:
    """Stages, with one in place of two where one kernel does both on the same arrays, and none waits for the other."""
    result: list[Stage] = []
    for stage in stages:
        if result and (kernel := AT_ONCE.get((result[-1].kernel, stage.kernel))):
            before = result[-1]
            first = {"dz" if name == "dy" else name: array for name, array in before.used().items()}
            second = stage.used()
            same = all(place_of(first[name]) == place_of(second[name]) for name in first.keys() & second.keys())
            if same and not meetings(engine, [before, stage])[0, 1]:
                stage = Stage(kernel, first | second, before.written | stage.written)
                result.pop()
        result.append(stage)
    return result


def place_of(x: Array) -> tuple[Any, ...]:
    return address(x), x.shape, x.strides, x.dtype


class Graph:
    """Stages as CUDA graphs of several steps and of one, where stages that do not meet may run side by side."""

    def __init__(self, engine: CupyEngine, stages: Sequence[Stage], passing: Sequence[Array] = ()) -> None:
        stages, self._owned = engine.at_its_precision(stages, passing)
        self._meet = meetings(engine, stages)
        self._lanes = lanes_for(self._meet, LANES)
        self._launches = [engine.launches(stage, lane) for stage, lane in zip(stages, self._lanes, strict=True)]
        self._graphs: dict[int, Any] = {}
        self._warm = False

    def __call__(self, steps: int) -> None:
        if not self._warm:  # what is loaded when it is first launched cannot be loaded in a capture
            run_all(itertools.chain.from_iterable(self._launches))
            self._warm, steps = True, steps - 1
        for size in (STEPS_OF_A_GRAPH, 1):
            times, steps = divmod(steps, size)
            for _ in range(times):
                self._captured(size).launch()

    def _captured(self, steps: int) -> Any:
        """So many steps as one graph, which is launched on the stream that is current then."""
        if steps not in self._graphs:
            first, *others = streams = [
                cupy.cuda.Stream(non_blocking=True) for _ in range(1 + max(self._lanes, default=0))
            ]
            first.begin_capture()
            try:
                begun = first.record()
                for stream in others:
                    stream.wait_event(begun)
                self._launch(steps, streams)
                for stream in others:
                    first.wait_event(stream.record())
            except BaseException:  # such as Ctrl-C; that the streams are not joined now is no news
                with contextlib.suppress(RuntimeError):
                    first.end_capture()
                raise
            self._graphs[steps] = first.end_capture()
        return self._graphs[steps]

    def _launch(self, steps: int, streams: Sequence[Any]) -> None:
        """Launch each stage in its lane, behind those in other lanes that it meets."""
        done: list[list[tuple[int, Any]]] = [[] for _ in streams]  # by lanes: stages, and events behind them
        for stage in [*range(len(self._lanes))] * steps:
            lane = self._lanes[stage]
            for before in done[:lane] + done[lane + 1 :]:
                event = next((event for other, event in reversed(before) if self._meet[stage, other]), None)
                if event is not None:
                    streams[lane].wait_event(event)
            with streams[lane]:
                run_all(self._launches[stage])
            done[lane].append((stage, streams[lane].record()))


@functools.cache
def device_of_process() -> int:
    """The GPU for which handles and workspaces are made, and kernels are loaded."""
    return int(cupy.cuda.Device().id)


def check_device() -> None:
    """Raise RuntimeError where another GPU than that of the process is current."""
    if (current := cupy.cuda.Device().id) != (mine := device_of_process()):
        raise RuntimeError(f"in this process the engine 'cupy' works on GPU {mine}, where it began, not on {current}")


def current_stream() -> tuple[int, int]:
    """What tells the stream that is current from others: CuPy has one pointer for all that are a thread's own."""
    pointer = cupy.cuda.get_current_stream().ptr
    return pointer, threading.get_ident() if pointer == OF_A_THREAD else 0


def lanes_for(meet: Array, count: int) -> list[int]:
    """In which of `count` lanes each stage runs in all steps: where it can start first, if all stages take as long."""
    lanes, ends, free = [0] * len(meet), np.zeros(len(meet), int), [0] * count  # ends of stages; when lanes are free
    for stage in [*range(len(meet))] * 2:  # once more, behind a step before
        ready = int(ends[meet[stage]].max(initial=0))
        lane = min(range(count), key=lambda lane: (max(ready, free[lane]), -free[lane]))
        lanes[stage] = lane
        ends[stage] = free[lane] = max(ready, free[lane]) + 1
    return lanes


def blocks_for(work: int, size: int) -> list[int]:
    """How many blocks to run a training step as one kernel, the fastest first; none where a graph is faster.

    Parameters
    ----------
    work : int
        The floating-point operations of a step.
    size : int
        Bytes that it reads and writes, but for the user's tables.
    """
    counts = [CLUSTER] if int(cupy.cuda.Device().compute_capability) >= 90 and work <= OF_CLUSTER else []
    return [*counts, *([1] if size <= room_of_block() and work <= OF_BLOCK else [])]


def room_for(blocks: int) -> int:
    """How many numbers a Room holds: 256 bytes a block to add up columns, and a count; see cupy_arrays.cu."""
    return 1 + 32 * blocks + -(-blocks // 2)


def run_all(launches: Iterable[Launch]) -> None:
    for launch in launches:
        launch()
