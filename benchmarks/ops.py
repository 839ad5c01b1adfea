"""Every op of the contract, on every engine and in the notebook's own way.

An engine's figure is that of a replay, as in training: what its kernel takes, without the cost of a Python call. Arrays
are contiguous. Before it is timed, a kernel is compared with the op's formula where arrays are small, and at its own
size with NumPy's kernel in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import numpy as np

import fastbp
from fastbp.kernels.engine import Call, Engine
from fastbp.kernels.formulas import FORMULAS
from fastbp.kernels.ops import OPS, Array, Op

from . import notebook_ops
from .cases import AWAKE, LARGE, Case, Turn
from .devices import phases, synchronize, timing_of

__all__ = ["SIZES", "op_cases"]

SIZES = {
    "small": {"B": 32, "K": 64, "N": 10, "M": 2000, "P": 10_000},
    "medium": {"B": 128, "K": 256, "N": 128, "M": 5000, "P": 200_000},
    "large": {"B": 512, "K": 512, "N": 256, "M": 20_000, "P": 2_000_000},
}
EMPTYING = {"l2_loss"}

Calls: TypeAlias = "Callable[[Engine, Sequence[Array]], list[Call]]"


class Problem:
    """One op at one size: inputs, and what must come of them."""

    def __init__(self, op: Op, size: str, dtype: str) -> None:
        letters = {d for arg in (*op.inputs, *op.outputs) for d in arg.dims if not d.isdigit()}
        self.op, self.size, self.dtype = op, size, np.dtype(dtype)
        self.sizes = {letter: n for letter, n in SIZES[size].items() if letter in letters}
        self.inputs = op.sample(np.random.default_rng(0), self.sizes, self.dtype)
        self.changed = [i for i, arg in enumerate(op.inputs) if arg.inplace]

    @cached_property
    def expected(self) -> list[Array]:
        """What is updated, then the outputs."""
        op, numpy = self.op, fastbp.engine("numpy")
        wide = [x.astype(np.float64) if x.dtype == np.float32 else x.copy() for x in self.inputs]
        if self.size == "small" or not numpy.supports(op):  # a formula takes more memory
            with np.errstate(all="ignore"):
                return [np.asarray(x) for x in FORMULAS[op.name](*wide)]
        results = [np.zeros(op.shape(arg, self.sizes), arg.dtype(np.dtype(np.float64))) for arg in op.outputs]
        numpy.execute(op, [*wide, *results])
        return [*(wide[i] for i in self.changed), *results]

    def compare(self, results: Sequence[Array], who: str) -> None:
        """Raise where results differ by more than 10 times the op's tolerance, of an element and of the largest."""
        rtol = self.op.rtol[self.dtype.itemsize]
        for result, wanted in zip(results, self.expected, strict=True):
            largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=1)
            np.testing.assert_allclose(
                result, wanted, rtol=10 * rtol, atol=2 * rtol * largest,
                err_msg=f"{self.op.name} by {who} is wrong, {self.size}, {self.dtype}",
            )  # fmt: skip


@lru_cache(maxsize=4)  # a case wants its own size and the small one
def problem(name: str, size: str, dtype: str) -> Problem:
    return Problem(OPS[name], size, dtype)


def placed(engine: Engine, shape: tuple[int, ...], dtype: Any, place: int) -> Array:
    """Memory at an address that is 512 * place modulo 4096.

    Where a kernel reads and writes at addresses that are equal modulo 4096, some processors stall, and whether they are
    would be another matter of luck in each process.
    """
    dtype = np.dtype(dtype)
    block = engine.empty((math.prod(shape) + 4096 // dtype.itemsize,), dtype)
    start = (512 * place - engine.span(block)[0]) % 4096 // dtype.itemsize
    return block[start : start + math.prod(shape)].reshape(shape)


class ByEngine:
    """An engine's calls, replayed."""

    def __init__(self, engine: Engine, problem: Problem, calls: Calls | None = None) -> None:
        op = problem.op
        self.engine, self.problem, self.synchronize = engine, problem, synchronize(engine)
        self.arguments = [
            self._given(arg.kind, x, i) for i, (arg, x) in enumerate(zip(op.inputs, problem.inputs, strict=True))
        ]
        self.arguments += [
            placed(engine, op.shape(arg, problem.sizes), arg.dtype(problem.dtype), i)
            for i, arg in enumerate(op.outputs, len(op.inputs))
        ]
        self.program = engine.program(calls(engine, self.arguments) if calls else [Call(op, tuple(self.arguments))])
        self.program.bind()

    def _given(self, kind: str, x: Array, place: int) -> Array:
        if kind == "a":
            return self.engine.table(x)
        array = placed(self.engine, x.shape, x.dtype, place)
        array[...] = self.engine.asarray(x)
        return array

    def run(self, calls: int) -> None:
        self.program.run(calls)
        self.synchronize()

    def reset(self) -> None:
        for i in self.problem.changed:
            self.arguments[i][...] = self.engine.asarray(self.problem.inputs[i])

    def results(self) -> list[Array]:
        wanted = [*self.problem.changed, *range(len(self.problem.inputs), len(self.arguments))]
        return [self.engine.asnumpy(self.arguments[i]) for i in wanted]


class ByFunction:
    """A Python function of the op's inputs that returns its outputs."""

    def __init__(self, function: Callable[..., Any], problem: Problem) -> None:
        self.function, self.problem = function, problem
        self.inputs = [x.copy() for x in problem.inputs]
        self.outputs: tuple[Array, ...] = ()

    def run(self, calls: int) -> None:
        for _ in range(calls):
            found = self.function(*self.inputs)
        self.outputs = found if isinstance(found, tuple) else (found,)

    def reset(self) -> None:
        for i in self.problem.changed:
            self.inputs[i][...] = self.problem.inputs[i]

    def results(self) -> list[Array]:
        return [*(self.inputs[i] for i in self.problem.changed), *self.outputs]


Attempt: TypeAlias = "Callable[[Problem], ByEngine | ByFunction]"


def by_engine(engine: Engine, calls: Calls | None = None) -> Attempt:
    return lambda problem: ByEngine(engine, problem, calls)


def by_function(function: Callable[..., Any]) -> Attempt:
    return lambda problem: ByFunction(function, problem)


def softmax_then_cross_entropy(engine: Engine, arguments: Sequence[Array]) -> list[Call]:
    """The loss and its gradient by the logits, op by op as the notebook has them at first."""
    z, t, total, dz = arguments
    p, dp = (engine.empty(z.shape, z.dtype) for _ in range(2))
    cost = engine.empty(z.shape[:1], z.dtype)
    return [
        Call(OPS["softmax_forward"], (z, p)),
        Call(OPS["cross_entropy_forward"], (p, t, total, cost)),
        Call(OPS["cross_entropy_backward"], (p, t, dp)),
        Call(OPS["softmax_backward"], (dp, p, dz)),
    ]


def ways(op: Op, engines: Sequence[Engine]) -> dict[str, Attempt]:
    """Who computes an op, and how: the engines that can, then the notebook."""
    found = {engine.name: by_engine(engine) for engine in engines if engine.supports(op)}
    if op.name == "softmax_cross_entropy":
        found |= {f"{engine.name}, four ops": by_engine(engine, softmax_then_cross_entropy) for engine in engines}
    return found | {who: by_function(function) for who, function in notebook_ops.WAYS.get(op.name, {}).items()}


def op_cases(
    ops: Sequence[str] = tuple(OPS),
    engines: Sequence[Engine] = (),
    sizes: Sequence[str] = tuple(SIZES),
    dtypes: Sequence[str] = ("float32", "float64"),
) -> Iterator[Case]:
    """The cases of some ops: engines and the notebook's ways as rivals, by size and dtype."""
    for name in ops:
        for size in sizes:
            for dtype in dtypes:
                for who, attempt in ways(OPS[name], engines).items():
                    yield op_case(OPS[name], who, attempt, size, dtype, {engine.name: engine for engine in engines})


def op_case(op: Op, who: str, attempt: Attempt, size: str, dtype: str, engines: Mapping[str, Engine]) -> Case:
    letters = {d for arg in (*op.inputs, *op.outputs) for d in arg.dims if not d.isdigit()}
    sizes = {letter: n for letter, n in SIZES[size].items() if letter in letters}

    def prepare() -> Turn:
        made = attempt(problem(op.name, size, dtype))
        return Turn(made.run, made.reset)

    def check() -> None:
        for where in dict.fromkeys(["small", size]):
            made = attempt(problem(op.name, where, dtype))
            with np.errstate(all="ignore"):
                made.run(1)
            made.problem.compare(made.results(), who)

    touched = {"M": sizes.get("B", 1)} if "M" in sizes else {}  # of a table, a batch's rows, and what these store
    if {"M", "P"} <= sizes.keys():
        touched["P"] = sizes["P"] * sizes["B"] // sizes["M"]
    # as long as a table has rows; and what a call empties leaves nothing to do for the next one
    most = 1 if op.name in EMPTYING else min(1000, sizes["M"] // sizes.get("B", 1)) if "M" in sizes else 1000
    timing = timing_of(engines[who]) if who in engines else None

    def device_phases() -> dict[str, float]:
        assert timing is not None
        calls = max(1, min(20, most // 2 - 1))  # twice, after two others
        inputs = [x.copy() for x in problem(op.name, size, dtype).inputs]  # calls update some, which others still need
        return phases(engines[who], timing, op, inputs, sizes, calls)

    return Case(
        "ops", op.name, who, prepare, check, size, dtype, sizes,
        flops=op.flops(sizes),
        bytes=op.bytes(sizes | touched, np.dtype(dtype)),
        most=most,
        awake=AWAKE if "K" in sizes and op.flops(sizes) >= LARGE else 0.0,
        phases=device_phases if timing else None,
    )  # fmt: skip
