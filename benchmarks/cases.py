"""What a benchmark measures: a case, one way to do one thing, and how its figures are taken."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from .machine import Look, look

__all__ = ["AWAKE", "LARGE", "Case", "Key", "Row", "Turn", "key", "measure", "median", "time_group"]

#: A measured case as it stands in the JSON file.
Row: TypeAlias = "dict[str, Any]"
Key: TypeAlias = "tuple[str, str, str, str]"

LARGE = 1 << 23  # flops of a matrix product that NumPy may leave to BLAS's threads
AWAKE = 0.3  # seconds until BLAS's threads no longer wait for more in a loop; those of other libraries would be held up


def nothing() -> None:
    pass


class Turn(NamedTuple):
    """A case made ready: ``run(n)`` does it n times; `reset`, outside of the clock, puts back what it changes."""

    run: Callable[[int], object]
    reset: Callable[[], object] = nothing


@dataclass(frozen=True)
class Case:
    """One way to do one thing.

    Parameters
    ----------
    suite, name, size, dtype : str
        What is done. Cases that share all four are rivals, and take turns.
    who : str
        The engine, library or formula that does it.
    prepare : callable
        Makes it ready.
    check : callable
        Raises AssertionError where what it computes is wrong.
    sizes : mapping of str to int
        The dimensions.
    flops, bytes : int
        Operations and least memory traffic of one.
    parts : int
        How many of them one call does.
    most : int
        Calls in a turn, at most.
    awake : float
        Seconds for which its threads may wait in a loop for more work, on the next one's cores.
    phases : callable, optional
        Measures what a device spends where; see `devices`.
    """

    suite: str
    name: str
    who: str
    prepare: Callable[[], Turn]
    check: Callable[[], None]
    size: str = ""
    dtype: str = "float32"
    sizes: Mapping[str, int] = field(default_factory=dict)
    flops: int = 0
    bytes: int = 0
    parts: int = 1
    most: int = 1000
    awake: float = 0.0
    phases: Callable[[], dict[str, float]] | None = None

    @property
    def group(self) -> Key:
        return self.suite, self.name, self.size, self.dtype

    def __str__(self) -> str:
        return ", ".join(filter(None, [self.name, self.size, self.dtype, self.who]))

    def row(self, **found: Any) -> Row:
        names = ("suite", "name", "size", "dtype", "who", "flops", "bytes")
        return {name: getattr(self, name) for name in names} | {"sizes": dict(self.sizes)} | found


def key(row: Row) -> Key:
    """What a row measures; rows that share it are rivals."""
    return row["suite"], row["name"], row["size"], row["dtype"]


def median(row: Row) -> float:
    """The median of a row's seconds."""
    return float(statistics.median(row["seconds"]))


def measure(
    cases: Sequence[Case],
    repeats: int,
    seconds: float,
    done: Callable[[Case], object] = lambda case: None,
    passes: int = 1,
) -> tuple[list[Row], list[Look]]:
    """Check and time the cases, group by group.

    Parameters
    ----------
    cases : sequence of Case
        Rivals stand side by side.
    repeats : int
        Turns of each case, in all passes together.
    seconds : float
        About how long a turn takes, or one call if that takes longer.
    done : callable, optional
        Called after each case, in each pass.
    passes : int, default 1
        How often to go through all cases, so that a while in which the machine is slow does not meet all turns of one.

    Returns
    -------
    rows : list of dict
        A case that computes something wrong is not timed: its row has ``"error"`` and no seconds.
    looks : list of Look
        At a core, before each group's turns.
    """
    rows, wrong, looks = [case.row(seconds=[]) for case in cases], set(), []
    for turn in range(passes):
        for _, group in itertools.groupby(enumerate(cases), key=lambda place: place[1].group):
            rivals = list(group)
            for i, case in rivals:
                if turn == 0 and (error := error_of(case)):
                    rows[i]["error"] = error
                    wrong.add(i)
            looks.append(look())
            right = [(i, case) for i, case in rivals if i not in wrong]
            taken = time_group([case for _, case in right], len(range(turn, repeats, passes)), seconds)
            for i, case in right:
                rows[i]["seconds"] += taken[case.who]
                rows[i].setdefault("core_flops", []).append(looks[-1].flops)
                if case.phases and turn == 0:
                    rows[i]["phases"] = case.phases()
            for _, case in rivals:
                done(case)
    return rows, looks


def error_of(case: Case) -> str:
    """What is wrong with a case's results; empty where they are right."""
    try:
        case.check()
    except Exception as error:  # whatever a kernel may do wrong
        return " ".join((str(error) if isinstance(error, AssertionError) else repr(error)).split())
    return ""


def time_group(rivals: Sequence[Case], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Let rivals take turns; the seconds of each, by who it is, for one of what the case does."""
    turns = [(case, case.prepare()) for case in rivals]
    counts = {case.who: calls_in(turn, seconds, case.most) for case, turn in turns}
    taken: dict[str, list[float]] = {case.who: [] for case in rivals}
    for _ in range(repeats):
        for case, turn in turns:
            calls = counts[case.who]
            turn.reset()
            start = time.perf_counter()
            turn.run(calls)
            taken[case.who].append((time.perf_counter() - start) / calls / case.parts)
            if case.awake:
                time.sleep(case.awake)
    return taken


def calls_in(turn: Turn, seconds: float, most: int) -> int:
    """How many calls fill so many seconds; the first of them warm up."""
    calls = 1
    while True:
        turn.reset()
        start = time.perf_counter()
        turn.run(calls)
        taken = time.perf_counter() - start
        if calls == most or (taken > seconds / 4 and calls > 1) or taken > 4 * seconds:
            return max(1, min(most, round(calls * seconds / max(taken, 1e-9))))
        calls = min(most, max(calls + 1, round(calls * min(10, seconds / 2 / max(taken, 1e-9)))))
