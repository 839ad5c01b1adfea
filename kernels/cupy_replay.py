"""How recordings are replayed on a GPU: as one kernel, or as CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from .cupy_sources import KERNELS, OPTIONS, Stage, address, by_value, float_type, source_of_parts, words_of
from .engine import Call
from .ops import Array, Op

if TYPE_CHECKING:
    from .cupy_engine import CupyEngine

__all__ = ["MOST_BLOCKS", "Graph", "Launch", "Replay", "room_for", "run_all"]

Launch = Callable[[], None]

MOST_BLOCKS = 1024  # of a kernel
MOST_READY = 4  # as many as there are for tables that come by pieces: in two places, a whole or the last one
STEPS_OF_A_GRAPH = 16
LANES = 3  # in which stages of a graph run side by side
BLOCK = 512, 1  # of the one kernel; THREADS in cupy_math.cu
CLUSTER = 8  # blocks, which may be in any cluster
# floating-point operations of a step up to which it is one kernel: of one block, where the GPU has no clusters or has
# them, and of a cluster; estimated, for no GPU has been at hand
OF_LONE_BLOCK, OF_BLOCK, OF_CLUSTER = 2_000_000, 1_000_000, 10_000_000
KERNELS_OWN = 48 << 10  # bytes of shared memory that a kernel may ask for by itself
ALIGNMENT = 16  # bytes, of what lies in shared memory: as many as a thread copies at a time


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
        places = ((name, address(x), x.shape, x.strides, x.dtype) for name, x in slots.items())
        key = cupy.cuda.get_current_stream().ptr, *places
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
        blocks = blocks_for(*self._size(calls)) if slots else 0
        room = self._room[: room_for(blocks)] if blocks else self._room
        stages = [stage for op, arrays in calls for stage in self._engine.stages(op, arrays, room, blocks > 0)]
        stages = taken_at_once(stages)
        if blocks:
            return OneKernel(self._engine, stages, slots.values(), blocks)
        return Graph(self._engine, stages, self._passing)

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
    users = [n for n, stage in enumerate(stages) if rows in map(address, stage.used()) and n != first]
    if not users or not all(stages[n].kernel.startswith("take") for n in users):
        return stages
    result = list(stages)
    for n in users:
        result[n] = stages[n]._replace(kernel=f"{stages[n].kernel}_next", arrays={**stages[n].arrays, **coming})
    result.insert(users[-1] + 2, Stage("move_cursor", coming, frozenset({"cursor"})))
    del result[first]
    return result


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


def meetings(engine: CupyEngine, stages: Sequence[Stage]) -> Array:
    """Which stages must not run side by side, because one writes what the other uses; shape (stages, stages), bool."""
    if len(stages) == 1:  # as an op called by itself is, which should not take long
        return np.ones((1, 1), bool)
    uses = [
        (place, *engine.span(stage.arrays[name]), name in stage.written)
        for place, stage in enumerate(stages)
        for _, name in KERNELS[stage.kernel].parameters
    ]
    place, start, stop, writes = np.array(uses, np.int64).reshape(-1, 4).T
    found = (start[:, None] < stop) & (start < stop[:, None]) & ((writes[:, None] | writes) == 1)
    result = np.zeros((len(stages), len(stages)), bool)
    one, other = found.nonzero()
    result[place[one], place[other]] = True
    return result


def lanes_for(meet: Array, count: int) -> list[int]:
    """In which of `count` lanes each stage runs in all steps: where it can start first, if all stages take as long."""
    lanes, ends, free = [0] * len(meet), np.zeros(len(meet), int), [0] * count  # ends of stages; when lanes are free
    for stage in [*range(len(meet))] * 2:  # once more, behind a step before
        ready = int(ends[meet[stage]].max(initial=0))
        lane = min(range(count), key=lambda lane: (max(ready, free[lane]), -free[lane]))
        lanes[stage] = lane
        ends[stage] = free[lane] = max(ready, free[lane]) + 1
    return lanes


class OneKernel:
    """Stages as one kernel of a few blocks, which takes any number of steps without being launched again.

    It is made of the same kernels, and reads from a table which is next and on what arrays. One block keeps these
    arrays in its shared memory for the length of a run, as far as there is room, because a small network's step spends
    its time on waiting for memory. What lies in the same memory as a slot stays where its owner has it.
    """

    def __init__(self, engine: CupyEngine, stages: Sequence[Stage], slots: Iterable[Array], blocks: int) -> None:
        kernels = tuple(dict.fromkeys(stage.kernel for stage in stages))
        words: list[int] = []
        pointers: dict[int, range] = {}  # which of the words are addresses, and the memory there
        for stage, waits in zip(stages, waiting(meetings(engine, stages)), strict=True):
            words += waits, kernels.index(stage.kernel)
            for kind, name in KERNELS[stage.kernel].parameters:
                pointers[len(words)] = range(*engine.span(stage.arrays[name]))
                words += words_of(stage.arrays[name], kind)

        self._kernel = module_of_parts(kernels, float_type(stages), blocks).get_function("replay")
        room, fixed = shared_memory_of(self._kernel), [range(*engine.span(x)) for x in slots]
        table = 8 * len(words) if 8 * len(words) <= room else 0  # bytes of shared memory
        places = places_for(pointers.values() if blocks == 1 else (), fixed, table, room if table else 0)
        self._shared = max([table, *(place + len(span) for span, place in places.items())])
        moved = [0] * len(words)
        for at in pointers:
            for span, place in places.items():
                if words[at] in span:
                    words[at] += place - span.start
                    moved[at] = 1
                    break
        spans = [number for span, place in places.items() for number in (span.start, place, len(span))]
        self._tables = [engine.integers(*numbers) for numbers in (words, moved, spans)]
        self._arguments = [*(by_value(x, "Integers") for x in self._tables), np.int64(table > 0)]
        self._grid = 1, blocks

    def __call__(self, steps: int) -> None:
        self._kernel(self._grid, BLOCK, (*self._arguments, np.int64(steps)), shared_mem=self._shared)


def blocks_for(work: int, size: int) -> int:
    """How many blocks run a training step as one kernel; 0 where a graph is faster.

    Parameters
    ----------
    work : int
        The floating-point operations of a step.
    size : int
        Bytes that it reads and writes, but for the user's tables.
    """
    device = cupy.cuda.Device()
    has_clusters = int(device.compute_capability) >= 90
    fits = size + KERNELS_OWN <= int(device.attributes["MaxSharedMemoryPerBlockOptin"])
    if fits and work <= (OF_BLOCK if has_clusters else OF_LONE_BLOCK):
        return 1
    return CLUSTER if has_clusters and work <= OF_CLUSTER else 0


def waiting(meet: Array) -> list[bool]:
    """Which stages have to wait for those before them, in a step that follows a step."""
    waits = [False] * len(meet)
    for _ in range(2):  # once more with what is known then, because a step begins where another ends
        since: list[int] = []  # somebody waited
        for stage in [*range(len(meet))] * 2:
            waits[stage] = waits[stage] or bool(meet[stage, since].any())
            since = [*([] if waits[stage] else since), stage]
    return waits


def places_for(used: Collection[range], fixed: Sequence[range], start: int, room: int) -> dict[range, int]:
    """Where in shared memory to put the memory that is used: as much as there is room for.

    Parameters
    ----------
    used : collection of range
        Addresses, once for each time that they are used. Those used most for their size have the first choice.
    fixed : sequence of range
        Addresses that stay.
    start, room : int
        The first byte of shared memory that is free, and how many it has.

    Returns
    -------
    dict of range to int
        The first byte of each span that has a place; what overlaps, as views of one array do, is one span.
    """
    spans = [span for span in joined([*used, *fixed]) if not any(each.start in span for each in fixed)]
    uses = Counter(span for each in used for span in spans if each.start in span)
    places = {}
    for span in sorted(uses, key=lambda span: len(span) / uses[span]):
        place = -(-start // ALIGNMENT) * ALIGNMENT
        if place + len(span) <= room:
            places[span] = place
            start = place + len(span)
    return places


def joined(spans: Iterable[range]) -> list[range]:
    """Ranges of addresses, those that overlap as one."""
    result: list[range] = []
    for span in sorted(filter(None, spans), key=lambda span: span.start):
        if result and span.start in result[-1]:
            before = result.pop()
            span = range(before.start, max(before.stop, span.stop))
        result.append(span)
    return result


def shared_memory_of(kernel: Any) -> int:
    """How many bytes of shared memory a launch of a kernel may ask for.

    Beyond 48 KB that has to be said before, which holds for everybody who launches this kernel: so it is always all.
    """
    room = int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]) - int(kernel.shared_size_bytes)
    kernel.max_dynamic_shared_size_bytes = room
    return room


@functools.cache
def module_of_parts(kernels: tuple[str, ...], floats: str, blocks: int) -> Any:
    return cupy.RawModule(code=source_of_parts(kernels, floats, blocks), options=OPTIONS)


def room_for(blocks: int) -> int:
    """How many numbers a Room holds; see cupy_math.cu."""
    return 3 + 2 * blocks


def run_all(launches: Iterable[Launch]) -> None:
    for launch in launches:
        launch()
