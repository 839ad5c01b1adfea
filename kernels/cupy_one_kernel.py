"""Training steps of small networks as one kernel, of a block or of a cluster of blocks that share each batch."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from .cupy_sources import KERNELS, OPTIONS, Stage, by_value, float_type, source_of_parts, words_of
from .engine import Engine
from .ops import Array

__all__ = ["NotShared", "OneKernel", "joined", "meetings", "room_of_block", "shared_memory_of"]

BLOCK = 256, 1  # THREADS in cupy_arrays.cu
ALIGNMENT = 16  # bytes, of what lies in shared memory and of all of it: as many as a thread copies at a time
MOST_MODULES = 256  # that are kept for networks to come
KERNELS_OWN = 48 << 10  # bytes of shared memory that kernels need for themselves, at most
GRANULE = 16  # parameters that one block changes, or a multiple
WAITS_FOR_ALL, WAITS_FOR_PARAMETERS = 2, 3  # before a stage; see WAITS in cupy_sources.py

# what blocks that share a batch do, by kernels: the same with each row, with each parameter, or all of them the same
ACTIVATIONS = "relu", "leaky_relu", "elu", "tanh", "sigmoid", "gelu", "gelu_tanh", "silu", "softplus", "softmax"
TAKES = {f"take{what}{how}" for what in ("", "_labels", "_weights") for how in ("", "_next")}
BY_ROWS = TAKES | {
    "dense_forward", "dense_relu_forward", "dense_input_grad", "dense_relu_input_grad", "dense_weight_grad",
    "dense_weight_and_bias_grad", "dense_bias_grad", "bias_grad",
    "layer_norm_forward", "layer_norm_input_grad", "layer_norm_weight_grads",
    "add", "multiply", "scale", "cross_entropy_forward", "cross_entropy_backward", "softmax_cross_entropy",
    "weigh_labels", "weigh_rows", "weigh_elements", "weighted_softmax_cross_entropy", "soft_softmax_cross_entropy",
    "soft_cross_entropy", "mean_squared_error", "mean_absolute_error", "huber", "poisson", "binary_cross_entropy",
    *(f"{name}_{way}" for name in ACTIVATIONS for way in ("forward", "backward", "grads")),
}  # fmt: skip
BY_PARAMETERS = {
    "clip_value", "squares_of_gradients", "clip_norm", "penalize", "decay", "sgd", "sgd_momentum", "rmsprop", "lion",
    "adam",
}  # fmt: skip
ALIKE = {"next_batch", "next_rate", "move_cursor"}
EXCHANGES = {"add_shares", "send_share"}


class NotShared(Exception):
    """Blocks cannot work on some stages together, or there is no room for what each needs near."""


class OneKernel:
    """Stages as one kernel of a few blocks, which takes any number of steps without being launched again.

    It is made of the same kernels, one after the other, for these shapes; where memory of slots lies, and how long that
    is, it reads from a table. Each block keeps all other arrays in its shared memory for the length of a run, as far as
    there is room, because a small network's step spends its time on waiting for memory.

    Parameters
    ----------
    most : int
        How many blocks share each batch, at most; one runs any stages alone.

    Raises
    ------
    NotShared
        Where several blocks cannot share the stages, or there is no room in shared memory for all that these write, or
        the device cannot run so many at once.
    """

    def __init__(self, engine: Engine, stages: Sequence[Stage], slots: Iterable[Array], most: int) -> None:
        shares = Shares(engine, stages, [range(*engine.span(x)) for x in slots], most)
        blocks = shares.blocks
        uses = [uses_of(engine, [stage]) for stage in shares.stages]
        most = 8 * sum(len(words_of(use.array, use.kind)) for use in itertools.chain(*uses))  # bytes of a table
        places = shares.places(most, room_of_block())
        self._shared = aligned(max([most, *(place + shares.size(span) for span, place in places.items())]))
        given: list[list[int]] = []  # what the source leaves open, for each block

        def source_of(use: Use) -> list[str]:
            """The members of an array's structure, as C++."""
            span = shares.around(use)
            words = [words_of(shares.part(use, block), use.kind) for block in range(blocks)]
            pointers, *sizes = map(list, zip(*words, strict=True))
            if span in places:
                pointers = [x + places[span] - shares.near(span, block).start for block, x in enumerate(pointers)]
            far = span not in places  # where it lies, and how many rows it has, is another time different
            pointer = member(pointers, far)
            return [
                f"__cvta_global_to_generic({pointer})" if far else f"(char *)near + {pointer}",
                member(sizes[0], far),
                *(member(each, False) for each in sizes[1:]),
            ]

        def member(values: Sequence[int], is_open: bool) -> str:
            if not is_open and len(set(values)) == 1:
                return str(values[0])
            given.append(list(values))
            return f"given[{len(given) - 1}]"

        parts = [
            (stage.kernel, waits, [source_of(use) for use in uses_of_stage])
            for stage, waits, uses_of_stage in zip(shares.stages, shares.waits, uses, strict=True)
        ]
        source = source_of_parts(parts, float_type(stages), blocks, shares.rows, taken_ahead(uses))
        self._kernel = module_of_parts(source).get_function("replay")
        shared_memory_of(self._kernel)

        def copied(of: Callable[[range, int], range]) -> list[int]:
            numbers: list[int] = []
            for block in range(blocks):
                for span, place in places.items():
                    copy = of(span, block)
                    numbers += copy.start, place + copy.start - shares.near(span, block).start, len(copy)
            return numbers

        totals = [place for span, place in places.items() if shares.roles[span] == "total"]
        by_blocks = itertools.chain(*zip(*given, strict=True))
        tables = by_blocks, copied(shares.near), copied(shares.kept), totals
        self._tables = [engine.integers(*numbers) for numbers in tables]
        self._kept = engine.zeros((2 * len(totals) * (blocks + 1),), np.float64)
        self._arguments = [*(by_value(x, "Integers") for x in self._tables), by_value(self._kept, "Doubles")]
        self._grid = blocks, 1
        if blocks > 1:  # for which a part of a GPU may have no room at once
            try:
                self(0)
            except cupy.cuda.driver.CUDADriverError as error:
                if error.status not in (701, 912):  # CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, _INVALID_CLUSTER_SIZE
                    raise
                raise NotShared from error

    def __call__(self, steps: int) -> None:
        self._kernel(self._grid, BLOCK, (*self._arguments, np.int64(steps)), shared_mem=self._shared)


class Use(NamedTuple):
    """An array of a stage, and where it lies."""

    stage: Stage
    kind: str
    name: str
    array: Array
    span: range

    @property
    def written(self) -> bool:
        return self.name in self.stage.written

    @property
    def role(self) -> str:
        """What of it a block has that shares a batch with others."""
        kernel, kind, name = self.stage.kernel, self.kind, self.name
        if kernel in TAKES:
            return "rows" if name in ("xb", "tb", "wb") else "coming" if name in ("order", "rows") else "all"
        if kernel in BY_PARAMETERS or kernel in EXCHANGES:
            return "parameters" if kind == "Vector" else "all"
        if name == "total":
            return "total"
        if kernel in ALIKE or name in ("w", "b", "dw", "db") or kind in ("Room", "Words"):
            return "all"
        return "all" if kind == "Doubles" and name != "scale" else "rows"


def uses_of(engine: Engine, stages: Iterable[Stage]) -> list[Use]:
    return [
        Use(stage, kind, name, stage.arrays[name], range(*engine.span(stage.arrays[name])))
        for stage in stages
        for kind, name in KERNELS[stage.kernel].parameters
    ]


class Shares:
    """How blocks share stages: each takes some rows of a batch, as far as gradients of all parameters.

    Then each adds up a share of all gradients, changes the parameters that these are of, and sends them to the others.
    One block alone does all of it, whatever the stages are.
    """

    def __init__(self, engine: Engine, stages: Sequence[Stage], fixed: Sequence[range], most: int) -> None:
        uses = uses_of(engine, stages)
        spans = joined([*(use.span for use in uses), *fixed])
        spans = [span for span in spans if not any(each.start in span for each in fixed)]
        self.blocks, self.stages, self.rows = most, list(stages), 0
        self._around = {use.span: span for use in uses for span in spans if use.span and use.span.start in span}
        self._uses = Counter(self._around[use.span] for use in uses if use.span in self._around)
        self.roles = dict.fromkeys(spans, "all")
        self._steps: dict[range, int] = {}  # bytes from row to row
        self._written: set[range] = set()
        if most > 1:
            self._share(uses)
        meet = meetings(engine, self.stages)
        self.waits = list(map(int, waiting(meet)))
        if most > 1:  # before gradients are added up, and before somebody uses parameters that others have sent
            add = next(n for n, stage in enumerate(self.stages) if stage.kernel == "add_shares")
            use_sent = next(n for n, stage in enumerate(self.stages) if meet[-1, n] or stage.kernel.startswith("weigh"))
            self.waits[add], self.waits[use_sent] = WAITS_FOR_ALL, WAITS_FOR_PARAMETERS

    def _share(self, uses: Sequence[Use]) -> None:
        by_rows, by_parameters = (
            [n for n, stage in enumerate(self.stages) if stage.kernel in kernels]
            for kernels in (BY_ROWS, BY_PARAMETERS)
        )
        others = {stage.kernel for stage in self.stages} - BY_ROWS - BY_PARAMETERS - ALIKE
        demand(by_rows and by_parameters and by_rows[-1] < by_parameters[0] and not others)
        vectors: dict[str, Array] = {}
        for use in uses:
            span = self._around.get(use.span)
            if use.role == "rows":
                self.rows = self.rows or len(use.array)
                demand(len(use.array) == self.rows > 1)
            if span is None:  # that of a slot
                demand(not use.written)
                continue
            if use.written:
                self._written.add(span)
            if use.role in ("rows", "parameters", "total"):
                demand(self.roles[span] in ("all", use.role))
                self.roles[span] = use.role
            if use.role == "rows":
                demand(self._steps.setdefault(span, use.array.strides[0]) == use.array.strides[0])
            if use.role == "parameters" and use.span == span:
                vectors[use.name] = use.array
        for use in uses:
            if use.span in self._around:
                role = self.roles[self._around[use.span]]
                if use.name in ("dw", "db"):
                    demand(role == "parameters")
                else:
                    demand(role == use.role or (role, use.role) in (("parameters", "all"), ("all", "coming")))
        demand({"g", "p"} <= vectors.keys())
        g, p = (vectors[name] for name in ("g", "p"))
        demand(p.size % GRANULE == 0)
        # as many rows for each, if that takes not too few blocks: the kernel is made for as many
        most = min(self.blocks, self.rows)
        self.blocks = next((n for n in range(most, most // 2, -1) if self.rows % n == 0), most)
        self._bytes, self._itemsize = p.nbytes, p.itemsize
        demand({len(span) for span, role in self.roles.items() if role == "parameters"} == {p.nbytes})
        self.stages.insert(by_parameters[0], Stage("add_shares", {"g": g}, frozenset({"g"})))
        self.stages.append(Stage("send_share", {"p": p}, frozenset({"p"})))

    def around(self, use: Use) -> range | None:
        """All that overlaps with an array, and with what does; None for what lies where a slot does."""
        return self._around.get(use.span)

    def part(self, use: Use, block: int) -> Array:
        """What a block works on, of an array."""
        if self.blocks == 1 or use.role in ("all", "total"):
            return use.array
        if use.role == "parameters":
            before = (use.span.start - self._around[use.span].start) // self._itemsize
            mine = self._parameters(block)
            return use.array[max(mine.start - before, 0) : max(mine.stop - before, 0)]
        rows = cut(self.rows, block, self.blocks)
        return use.array[rows.start : rows.stop if use.role == "rows" else None]

    def _parameters(self, block: int) -> range:
        return cut(self._bytes // self._itemsize, block, self.blocks, GRANULE)

    def near(self, span: range, block: int) -> range:
        """What of a span a block keeps near."""
        if self.roles[span] != "rows":
            return span
        rows, step = cut(self.rows, block, self.blocks), self._steps[span]
        return span[rows.start * step : rows.stop * step]

    def kept(self, span: range, block: int) -> range:
        """What of that outlives the kernel."""
        if self.roles[span] == "rows":
            return self.near(span, block)
        if self.roles[span] == "parameters":
            mine = self._parameters(block)
            return span[mine.start * self._itemsize : mine.stop * self._itemsize]
        return span if block == 0 else span[:0]

    def size(self, span: range) -> int:
        """Bytes that are enough for what any block keeps near of a span."""
        return max(len(self.near(span, block)) for block in range(self.blocks))

    def places(self, start: int, room: int) -> dict[range, int]:
        """Where in shared memory to put spans: as many as there is room for, those used most for their size first.

        Parameters
        ----------
        start, room : int
            The first byte of shared memory that is free, and how many it has.
        """
        demand(start <= room)
        places = {}
        most_used = sorted(self._uses, key=lambda span: self.size(span) / self._uses[span])
        for span in sorted(most_used, key=lambda span: span not in self._written):
            place = aligned(start)
            if place + self.size(span) <= room:
                places[span] = place
                start = place + self.size(span)
        demand(self._written <= places.keys())
        return places


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def demand(condition: object) -> None:
    if not condition:
        raise NotShared


def cut(size: int, part: int, parts: int, granule: int = 1) -> range:
    """One of so many parts of a whole, as alike as can be of whole granules."""
    granules = -(-size // granule)
    start, stop = (min(size, granules * n // parts * granule) for n in (part, part + 1))
    return range(start, stop)


def meetings(engine: Engine, stages: Sequence[Stage]) -> Array:
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


def waiting(meet: Array) -> list[bool]:
    """Which stages have to wait for those before them, in a step that follows a step."""
    waits = [False] * len(meet)
    for _ in range(2):  # once more with what is known then, because a step begins where another ends
        since: list[int] = []  # somebody waited
        for stage in [*range(len(meet))] * 2:
            waits[stage] = waits[stage] or bool(meet[stage, since].any())
            since = [*([] if waits[stage] else since), stage]
    return waits


def taken_ahead(uses: Sequence[Sequence[Use]]) -> list[int]:
    """Which stages may take a batch's rows before it is due: where no step changes what they take."""
    written = [use.span for use in itertools.chain(*uses) if use.written]

    def lasts(use: Use) -> bool:
        return not any(use.span.start < other.stop and other.start < use.span.stop for other in written)

    return [
        n
        for n, (first, *others) in enumerate(uses)
        if first.stage.kernel in TAKES
        and first.stage.kernel.endswith("_next")
        and all(map(lasts, (first, *(use for use in others if use.name == "order"))))
    ]


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


def room_of_block() -> int:
    """How many bytes of shared memory there are for arrays."""
    return int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]) - KERNELS_OWN


@functools.lru_cache(MOST_MODULES)
def module_of_parts(source: str) -> Any:
    return cupy.RawModule(code=source, options=OPTIONS)
