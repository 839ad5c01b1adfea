"""Holding an engine against the contract: each op of the table, promise by promise."""

from __future__ import annotations

import difflib
import math
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .fusion import FUSED
from .kernels.engine import Call, Engine
from .kernels.formulas import FORMULAS
from .kernels.op import USUAL, normal
from .kernels.ops import OPS, Array, Op
from .progress import Progress
from .selection import engine as choose_engine
from .trial import FLOATS, LARGE, MIDDLE, SIZES, TAILS, UNEVEN, Trial, expected, message_of

__all__ = ["PROMISES", "Report", "Result", "check"]

EDGE = 125  # elements on either side of an array that nobody may write
WORKING_MEMORY = 16_384  # bytes that a replay may take for a while: less than any matrix of `LARGE`


class Result(NamedTuple):
    """What `check` found of one promise for one op.

    Attributes
    ----------
    op, promise : str
    outcome : {"passed", "failed", "missing"}
        "missing" where the engine has no kernel for the op and need not have one: its promise is "kernel".
    error : float
        The worst error of a number, as a share of the tolerance; NaN where none was compared.
    message : str
        What is wrong.
    """

    op: str
    promise: str
    outcome: str
    error: float = math.nan
    message: str = ""


class Report(NamedTuple):
    """What `check` found: printed, it is a table.

    Attributes
    ----------
    engine : str
    results : tuple of Result
        One for each op and promise.
    """

    engine: str
    results: tuple[Result, ...]

    @property
    def failures(self) -> tuple[Result, ...]:
        """The promises that are not kept."""
        return tuple(result for result in self.results if result.outcome == "failed")

    @property
    def passed(self) -> bool:
        """Whether every promise is kept."""
        return not self.failures

    def __str__(self) -> str:
        rows: dict[str, dict[str, Result]] = {}
        for result in self.results:
            rows.setdefault(result.op, {})[result.promise] = result
        width = max(map(len, rows), default=0)
        lines = ["  ".join(["op".ljust(width), *PROMISES, "worst error"])]
        for op, results in rows.items():
            if "kernel" in results:
                lines.append(f"{op:{width}}  {'FAILED' if results['kernel'].outcome == 'failed' else 'not there'}")
                continue
            cells = [
                {"passed": "ok", "failed": "FAILED"}[results[name].outcome] if name in results else "-"
                for name in PROMISES
            ]
            worst = max((r.error for r in results.values() if not math.isnan(r.error)), default=math.nan)
            cells = [cell.ljust(len(name)) for cell, name in zip(cells, PROMISES, strict=True)]
            lines.append("  ".join([op.ljust(width), *cells, "" if math.isnan(worst) else f"{worst:.2g}"]).rstrip())
        lines += ["", *(f"{r.op}, {r.promise}: {r.message}" for r in self.failures)]
        lines += [
            f"engine {self.engine}: {len(rows)} ops, {len(self.failures)} of {len(self.results)} promises broken; "
            "errors are shares of the tolerance"
        ]
        return "\n".join(lines)


def check(engine: str | Engine, ops: Sequence[str] | None = None, *, verbose: bool | None = None) -> Report:
    """Check whether an engine computes each op of the contract, and keeps the promises that layers rely on.

    Parameters
    ----------
    engine : str or Engine
    ops : sequence of str, optional
        The names of the ops to check, by default all.
    verbose : bool, optional
        Show a progress bar (needs tqdm); by default on a terminal where tqdm is installed.

    Returns
    -------
    Report
        ``report.passed`` tells whether all is well; ``print(report)`` shows a table. An error that the engine raises
        is a failure in the report.

    Raises
    ------
    ValueError
        For an unknown engine (`EngineNotAvailable` for one that is not installed) or op.

    Notes
    -----
    values
        Results agree with a formula in float64, for both float types, within the op's relative tolerance, for sizes
        from one row, column or class to beyond what vectors, tiles and BLAS take at a time.
    extremes
        NaN and infinity come out where the formula has them. Huge and tiny inputs, as far as the formula itself
        bears them in the float type, come out right; denormal ones may count as 0.
    memory
        An op writes all of its outputs, and nothing but those and the arguments that its row marks with ``!``.
    arguments
        Wrong shapes, dtypes, labels and empty arrays are refused, by the names of op and argument, before anything is
        changed.
    out
        ``out=`` is written and returned; what does not fit or overlaps another argument is refused.
    replay
        `Engine.program` does the same as calls do: on arrays of `Engine.buffer`, with slots, again and again.
    allocation
        A replay allocates nothing that grows with the batch (looked at where arrays live in the host's memory).
    repeat
        The same call gives the same bits, also beside another thread's calls.

    Examples
    --------
    >>> import fastbp
    >>> fastbp.check("numpy", ["relu_forward", "dense_forward"]).passed
    True
    """
    engine = choose_engine(engine)
    if unknown := [name for name in ops or () if name not in OPS]:
        like = difflib.get_close_matches(unknown[0], OPS) or list(OPS)[:3]
        raise ValueError(f"ops must be names of ops such as {', '.join(like)}; got {unknown[0]!r}")
    names = list(OPS if ops is None else ops)
    if not names:
        raise ValueError("ops must name at least one op, got none")
    results: list[Result] = []
    with Progress(len(names), verbose, "op") as progress:
        for name in names:
            results += _check_op(engine, OPS[name])
            progress.step({})
    return Report(engine.name, tuple(results))


def _check_op(engine: Engine, op: Op) -> Iterator[Result]:
    try:
        supported = engine.supports(op)
    except Exception as error:
        yield Result(op.name, "kernel", "failed", message=f"supports: {message_of(error)}")
        return
    if not supported:
        must = choose_engine("numpy").supports(op) and op.name not in FUSED
        yield (
            Result(op.name, "kernel", "failed", message="there is no kernel for it")
            if must
            else Result(op.name, "kernel", "missing")
        )
        return
    for name in PROMISES:
        if name == "allocation" and not _on_host(engine):
            continue
        yield keep(engine, op, name)


def keep(engine: Engine, op: Op, promise: str) -> Result:
    """Check one promise for one op."""
    trial = Trial(engine, op)
    try:
        PROMISES[promise](trial)
    except Exception as error:
        trial.failure = trial.failure or message_of(error)
    return Result(op.name, promise, "failed" if trial.failure else "passed", trial.error, trial.failure)


def values(trial: Trial) -> None:
    product = "K" in trial.sizes(LARGE) and "M" not in trial.sizes(LARGE)
    for dtype in FLOATS:
        for sizes in [*SIZES, LARGE] if product else SIZES:
            trial.compare(trial.draw(sizes, dtype), dtype)
    for place, arg in enumerate(trial.op.inputs):
        if arg.kind == "a":
            tables(trial, place)


def tables(trial: Trial, place: int) -> None:
    """A user's tables, of any type at any strides."""
    for kind in ("bool", "uint8", "int16", "int64", "float32", "float64"):
        arguments = trial.draw(UNEVEN, FLOATS[0])
        table = (100 * arguments[place]).astype(kind)
        wide = np.repeat(table, 2, axis=-1)
        for layout in (table, table.T.copy().T, wide[..., ::2], np.flip(np.flip(table).copy())):
            arguments[place] = layout
            given = trial.given(arguments)
            given[place] = trial.engine.table(layout)
            dtype = FLOATS[0] if kind == "float32" else FLOATS[1]
            trial.judge(trial.call(given), expected(trial.op, arguments), dtype, arguments)


def extremes(trial: Trial) -> None:
    op = trial.op
    for dtype in FLOATS:
        arguments = trial.draw(UNEVEN, dtype)
        usual = expected(op, arguments)
        for place, arg in enumerate(op.inputs):
            # what an optimizer keeps from step to step is not looked at: engines may take its terms in another order
            if arg.kind not in "fa" or (arg.inplace and arg.name not in ("p", "g", "w", "b", "sum")):
                continue
            for value, whole_row in ((math.nan, True), (math.nan, False), (math.inf, False), (-math.inf, False)):
                planted = [array.copy() for array in arguments]
                if whole_row:
                    planted[place][len(planted[place]) // 2] = value
                else:
                    planted[place].flat[planted[place].size // 2] = value
                trial.compare(planted, dtype)
            if (op.samples.get(arg.name) or USUAL.get(arg.name, normal)) is not normal:
                continue  # only some numbers make sense
            tiny = float(np.finfo(dtype).tiny)
            for scale in (huge(op, arguments, place, dtype), 2.0 ** (math.log2(tiny) * 3 // 4), tiny / 1024):
                scaled = [array * dtype.type(scale) if i == place else array for i, array in enumerate(arguments)]
                wanted = expected(op, scaled)
                # where results grow with the argument, they are as exact as it is; otherwise the usual errors remain
                floors = [
                    0.01 * (scale if scale < 1 and np.array_equal(x, y * scale) else 1)
                    for x, y in zip(wanted, usual, strict=True)
                ]
                trial.compare(scaled, dtype, floors=floors, slack=sway(trial, scaled, wanted, dtype))


def huge(op: Op, arguments: Sequence[Array], place: int, dtype: np.dtype[Any]) -> float:
    """How much one argument can grow before the formula, in this float type, overflows."""
    for power in (0.8, 0.35, 0.1):
        scale = 2.0 ** int(power * math.log2(float(np.finfo(dtype).max)))
        narrow = [array.astype(dtype) if array.dtype.kind == "f" else array for array in arguments]
        narrow[place] = narrow[place] * dtype.type(scale)
        try:
            with np.errstate(over="raise", invalid="raise", divide="ignore", under="ignore"):
                FORMULAS[op.name](*narrow)
        except FloatingPointError:
            continue
        return scale
    return 1.0


def sway(trial: Trial, arguments: Sequence[Array], wanted: Sequence[Array], dtype: np.dtype[Any]) -> list[float]:
    """How far each result moves where the arguments move in their last digits: no engine can be better."""
    wide = [array.astype(np.float64) if array.dtype.kind == "f" else array for array in arguments]
    eps = 8 * float(np.finfo(dtype).eps)
    moved = [
        array * (1 + eps * trial.rng.uniform(-1, 1, array.shape)) if arg.kind == "f" else array
        for arg, array in zip(trial.op.inputs, wide, strict=True)
    ]
    with np.errstate(all="ignore"):
        distances = [np.abs(x - y) for x, y in zip(expected(trial.op, moved), wanted, strict=True)]
    return [float(d[np.isfinite(d)].max(initial=0)) for d in distances]


def memory(trial: Trial) -> None:
    op = trial.op
    letters = list(trial.sizes(UNEVEN))
    for dtype in FLOATS:
        for n in TAILS:
            numbers = trial.rng.permutation([n, *trial.rng.integers(1, 40, len(letters))][: len(letters)])
            sizes = dict(zip(letters, numbers.tolist(), strict=True))
            if "M" in sizes and "B" in sizes:
                sizes["M"] = max(sizes["M"], sizes["B"])  # a batch is rows of a table
            arguments = trial.draw(sizes | {"K": sizes.get("K", 1)}, dtype)
            edges: list[Array] = []

            def guarded(shape: tuple[int, ...], dtype: Any, edges: list[Array] = edges) -> Array:
                size = math.prod(shape)
                block = trial.engine.empty((size + 2 * EDGE,), dtype)
                block[...] = 7
                edges += [block[:EDGE], block[-EDGE:]]
                return block[EDGE:-EDGE].reshape(shape)

            given = []
            for array in arguments:
                given.append(guarded(array.shape, array.dtype))
                given[-1][...] = trial.engine.asarray(array)
            out = trial.poisoned(sizes | {"K": sizes.get("K", 1)}, dtype, guarded)
            actual = trial.call(given, out)
            names = [arg.name for arg in (*op.inputs, *op.outputs) for _ in range(2)]
            for name, edge in zip(names, edges, strict=True):
                if (trial.engine.asnumpy(edge) != 7).any():
                    raise AssertionError(f"something was written beside {name} ({dtype}, {sizes})")
            trial.unchanged(given, arguments)
            trial.judge(actual, expected(op, arguments), dtype, arguments)


def arguments(trial: Trial) -> None:
    op, function, host = trial.op, trial.function, _on_host(trial.engine)
    for dtype in FLOATS:
        right = trial.draw(MIDDLE, dtype)
        sizes = op.sizes([array.shape for array in right])
        given = trial.given(right)
        with trial.refused("a missing argument", None, given):
            function(*given[:-1])
        settled: set[str] = set("0123456789")
        for place, arg in enumerate(op.inputs):
            array = right[place]
            wrong = {"one dimension too many": array[None], "an empty array": array[:0], "text": array.astype(str)}
            if settled.intersection(arg.dims) or any(d.isdigit() for d in arg.dims):
                wrong["a longer array"] = np.zeros([n + 1 for n in array.shape], array.dtype)
            if arg.kind == "i":
                wrong["fractions"] = array + 0.5
            if arg.below:
                wrong |= {"a number below 0": array - sizes[arg.below], "a number too high": array + sizes[arg.below]}
            if arg.inplace:
                wrong |= {"float16": trial.engine.zeros(array.shape, np.float16), "a list": array.tolist()}
                if host:
                    wrong["read-only memory"] = _read_only(array.copy())
                if array.size > 1:
                    wrong["strided memory"] = trial.engine.zeros((*array.shape, 2), array.dtype)[..., 0]
                for i, other in enumerate(given[:place]):
                    if (other.shape, other.dtype) == (given[place].shape, given[place].dtype):
                        wrong[f"the array that is {op.inputs[i].name}"] = other
            elif arg.kind != "a":
                wrong["complex numbers"] = array.astype(complex)
            for fault, bad in wrong.items():
                own = isinstance(bad, np.ndarray) and bad.dtype.kind in "fiu" and not host
                with trial.refused(f"{fault} for {arg.name}", arg, given):
                    function(*given[:place], trial.engine.asarray(bad) if own else bad, *given[place + 1 :])
            settled.update(arg.dims)


def out(trial: Trial) -> None:
    op, engine = trial.op, trial.engine
    if not op.outputs:
        return
    for dtype in FLOATS:
        right = trial.draw(MIDDLE, dtype)
        good = trial.call(trial.given(right))
        outputs = trial.poisoned(MIDDLE, dtype, engine.empty)
        result = trial.function(*trial.given(right), out=tuple(outputs) if len(outputs) > 1 else outputs[0])
        for arg, made, into in zip(op.outputs, result if len(outputs) > 1 else [result], outputs, strict=True):
            if made is not into:
                raise AssertionError(f"what was given as out for {arg.name} is not what came back")
        for arg, x, y in zip(
            (*trial.updated, *op.outputs)[-len(outputs) :], outputs, good[-len(outputs) :], strict=True
        ):
            if engine.asnumpy(x).tobytes() != y.tobytes():
                raise AssertionError(f"{arg.name} is not the same with out= as without")

        given = trial.given(right)
        with trial.refused("an empty out", None, given):
            trial.function(*given, out=())
        for place, arg in enumerate(op.outputs):
            for fault, bad in _bad_outs(engine, outputs[place]).items():
                with trial.refused(f"out for {arg.name} {fault}", arg, given):
                    trial.function(*given, out=tuple(bad if i == place else x for i, x in enumerate(outputs)))
            for i, (source, array) in enumerate(zip(op.inputs, right, strict=True)):
                if source.dtype(dtype) != arg.dtype(dtype):
                    continue
                size = math.prod(outputs[place].shape)
                block = engine.empty((array.size + size,), array.dtype)
                shared = block[: array.size].reshape(array.shape)
                shared[...] = engine.asarray(array)
                over = block[array.size - 1 : array.size - 1 + size].reshape(outputs[place].shape)
                arrays = [*given[:i], shared, *given[i + 1 :]]
                with trial.refused(f"out for {arg.name} that overlaps {source.name}", arg, arrays):
                    trial.function(*arrays, out=tuple(over if j == place else x for j, x in enumerate(outputs)))
            for i, other in enumerate(outputs[:place]):
                if (other.shape, other.dtype) == (outputs[place].shape, outputs[place].dtype):
                    with trial.refused(f"one out for {arg.name} and {op.outputs[i].name}", None, given):
                        trial.function(*given, out=tuple(other if j == place else x for j, x in enumerate(outputs)))


def _bad_outs(engine: Engine, good: Array) -> dict[str, Any]:
    shape, dtype = good.shape, good.dtype
    bad: dict[str, Any] = {
        "of another shape": engine.empty((*shape[:-1], shape[-1] + 1), dtype),
        "in float16": engine.empty(shape, np.float16),
        "that is a list": engine.asnumpy(good).tolist(),
    }
    if good.size > 1:
        bad["of another order"] = engine.empty((*shape, 2), dtype)[..., 0]
    if _on_host(engine):
        bad["that is read-only"] = _read_only(np.empty(shape, dtype))
    return bad


def replay(trial: Trial) -> None:
    op, engine = trial.op, trial.engine
    for dtype in FLOATS:
        calls, drawn, slots, others = [], [], {}, {}
        for i, (batch, inputs, neurons) in enumerate(((33, 65, 129), (17, 21, 31), (1, 7, 3))):
            # one program, whose calls share what room they take; tables are long enough for three batches
            sizes = {"B": batch, "K": inputs, "N": neurons, "P": 5 * batch, "M": 3 * batch}
            arguments = trial.draw(sizes, dtype)
            drawn.append(arguments)
            placed: list[Any] = []
            for arg, array in zip(op.inputs, arguments, strict=True):
                if arg.dims[0] == "M":  # a user's table
                    placed.append(f"{arg.name}{i}")
                    slots[placed[-1]] = engine.table(array)
                    others[placed[-1]] = engine.table(np.zeros_like(array))
                elif arg.inplace:
                    placed.append(engine.asarray(array.copy()))
                else:
                    placed.append(engine.buffer(array.shape, array.dtype))
                    placed[-1][...] = engine.asarray(array)
            calls.append(Call(op, (*placed, *trial.poisoned(sizes, dtype, engine.buffer))))
        program = engine.program(calls)
        if slots and not trial.updated:
            program.bind(**others)
            program.run(1)
            program.release()
        for steps in (1, 2):
            for call in calls:
                for arg, array in zip(op.outputs, call.arguments[len(op.inputs) :], strict=True):
                    array[...] = np.nan if arg.dtype(dtype).kind == "f" else 77
            program.bind(**slots)
            program.run(steps)
            program.release()
            for i, call in enumerate(calls):
                for _ in range(steps):
                    wanted = expected(op, drawn[i])
                    new = iter(wanted)
                    drawn[i] = [next(new) if arg.inplace else a for arg, a in zip(op.inputs, drawn[i], strict=True)]
                given = [slots[a] if isinstance(a, str) else a for a in call.arguments[: len(op.inputs)]]
                trial.judge(trial.written(given, call.arguments[len(op.inputs) :]), wanted, dtype, drawn[i])
                for arg, now, then in zip(op.inputs, given, drawn[i], strict=True):
                    if not arg.inplace and (engine.asnumpy(now) != then).any():
                        raise AssertionError(f"{arg.name} was changed in a replay")


def allocation(trial: Trial) -> None:
    op, engine = trial.op, trial.engine
    tracing = tracemalloc.is_tracing()
    for dtype in FLOATS:
        given = trial.given(trial.draw(LARGE, dtype))
        program = engine.program([Call(op, (*given, *trial.poisoned(LARGE, dtype, engine.empty)))])
        program.bind()
        program.run(1)
        tracemalloc.start()
        try:
            peaks = []
            for _ in range(3):  # other threads may allocate meanwhile
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                program.run(2)
                peaks.append(tracemalloc.get_traced_memory()[1] - before)
        finally:
            if not tracing:
                tracemalloc.stop()
        program.release()
        if min(peaks) > WORKING_MEMORY:
            raise AssertionError(f"a replay allocated {min(peaks):,} bytes ({dtype}, sizes {trial.sizes(LARGE)})")


def repeat(trial: Trial) -> None:
    for dtype in FLOATS:
        drawn = [trial.draw(MIDDLE, dtype) for _ in range(2)]
        first = [[array.tobytes() for array in trial.call(trial.given(arguments))] for arguments in drawn]
        said: list[str] = []
        barrier = threading.Barrier(2)

        def work(
            i: int, where: str, times: int, drawn: Any = drawn, first: Any = first, said: list[str] = said
        ) -> None:
            try:
                if times > 1:
                    barrier.wait(60)  # noqa: B023  both threads are joined before there is another
                for _ in range(times):
                    if [array.tobytes() for array in trial.call(trial.given(drawn[i]))] != first[i]:
                        said.append(f"the same call gave other bits {where}")
            except Exception as error:
                said.append(f"{where}: {message_of(error)}")

        work(0, "the second time", 1)
        threads = [threading.Thread(target=work, args=(i, "beside another thread", 8)) for i in range(2)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)  # so that threads do meet
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        if said:
            raise AssertionError(f"{said[0]} ({dtype})")


#: What each op is checked for, in this order.
PROMISES: dict[str, Callable[[Trial], None]] = {
    promise.__name__: promise for promise in (values, extremes, memory, arguments, out, replay, allocation, repeat)
}


def _on_host(engine: Engine) -> bool:
    return isinstance(engine.empty((1,), np.float64), np.ndarray)


def _read_only(array: Array) -> Array:
    array.setflags(write=False)
    return array
