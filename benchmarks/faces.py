"""How pytest-benchmark shows a case: the same check, and the same way to take its figures."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

from .cases import Case, Turn, calls_in
from .machine import Roofs, attainable, measure_roofs

__all__ = ["CLOCK", "bench"]

ROUNDS = 7
SECONDS = 0.005  # a round


class Clock:
    """A timer for pytest-benchmark that stands still but for one case's share of a turn of many."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, case: Case, turn: Turn, calls: int) -> None:
        start = time.perf_counter()
        turn.run(calls)
        self.now += (time.perf_counter() - start) / calls / case.parts


CLOCK = Clock()
roofs = cache(measure_roofs)


def bench(benchmark: Any, case: Case) -> None:
    """Check a case and, unless benchmarks are disabled, time it; AssertionError where it computes something wrong.

    The test needs the mark ``pytest.mark.benchmark(timer=CLOCK)``.
    """
    case.check()
    turn = case.prepare()
    benchmark.group = ", ".join(filter(None, case.group))
    calls = 1 if benchmark.disabled else calls_in(turn, SECONDS, case.most)
    benchmark.pedantic(CLOCK.run, (case, turn, calls), setup=turn.reset, rounds=ROUNDS)
    if not benchmark.disabled:
        benchmark.extra_info |= figures(case, benchmark.stats.stats.median, roofs())
        if case.phases:
            benchmark.extra_info["phases"] = case.phases()


def figures(case: Case, seconds: float, roofs: Roofs) -> dict[str, float]:
    """What a case attains in so many seconds."""
    return {
        "flops": case.flops,
        "bytes": case.bytes,
        "GFLOP/s": case.flops / seconds / 1e9,
        "GB/s": case.bytes / seconds / 1e9,
        "share of roof": attainable(roofs, case.dtype, case.flops, case.bytes) / seconds,
    }
