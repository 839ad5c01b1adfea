"""Races: processes that take turns at the same work, each with a package of its own, to compare revisions of it.

A process times an op of the Numba engine, or an epoch of training, when it is asked to, and waits in between. Those
that race share a processor where they can: one may be much slower than another for what else the machine does on it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

import fastbp
from fastbp.kernels.ops import OPS

from .cases import Turn
from .ops import by_engine, op_case
from .training import NETWORKS, by_fastbp, task_of

__all__ = ["HERE", "RACED", "Racer", "race"]

RACED = [name for name in OPS if name not in ("next_batch", "next_rate", "softmax_jacobian")] + list(NETWORKS)[:4]
HERE = Path(fastbp.__file__).resolve().parents[1]
TURNS = 20  # of each
SHORTER = 8  # times fewer steps of training than in the other benchmarks' epochs
TURN, PART = 2e-3, 0.5e-3  # seconds; parts are short, so that some are not interrupted on a busy machine


class Racer:
    """A process that times the work of the package in a folder, and looks `times` times as slow.

    On Linux it runs on one processor, and racers of the same `place` on the same one.
    """

    def __init__(self, folder: Path, times: int = 1, place: int = 0) -> None:
        command = [sys.executable, "-m", "fastbp.benchmarks.racing", str(times), str(place)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, text=True)
        self._folder = folder
        found, self.can = self._answer("the start")
        if Path(found) != folder:
            self.close()
            raise RuntimeError(f"the package was to come from {folder}, and came from {found}")

    def seconds(self, name: str, calls: int) -> float:
        """What a call of an op, or an epoch of a network, takes: the least of a turn, in parts of so many calls.

        The least, because whatever else happens on a machine only slows down.
        """
        assert self._process.stdin is not None
        print(json.dumps([name, calls]), file=self._process.stdin, flush=True)
        return float(self._answer(name))

    def _answer(self, place: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"the process with the package in {self._folder} ended at {place}")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


def serve(times: int, place: int) -> None:
    """Be a `Racer`'s process."""
    if sys.platform == "linux":
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[place % len(processors)]})
    engine = fastbp.engine("numba")
    can = [name for name in RACED if name in NETWORKS or engine.supports(OPS[name])]
    print(json.dumps([str(HERE), can]), flush=True)

    @functools.cache
    def ready(name: str) -> tuple[Turn, int]:
        if name in NETWORKS:
            task = task_of(name)
            return Turn(by_fastbp(engine, threads=1)(task.start(task.steps // SHORTER))), sys.maxsize
        case = op_case(OPS[name], "numba", by_engine(engine), "medium", "float32", {})
        return case.prepare(), case.most

    with threadpool_limits(1):
        for line in sys.stdin:
            name, calls = json.loads(line)
            turn, most = ready(name)
            print(min(parts(turn, min(calls, most), times)), flush=True)


def parts(turn: Turn, calls: int, times: int) -> Iterator[float]:
    """The seconds of a call, in each part of a turn; `times` times those of as many calls."""
    end = time.perf_counter() + TURN
    while True:
        seconds = 0.0
        for _ in range(times):
            turn.reset()
            start = time.perf_counter()
            turn.run(calls)
            seconds += time.perf_counter() - start
        yield seconds / calls
        if time.perf_counter() > end:
            return


def race(new: Racer, base: Racer, name: str) -> list[tuple[float, float]]:
    """The seconds of both, in each pair of turns."""
    calls = 1
    for _ in range(3):
        calls = max(1, round(PART / base.seconds(name, calls)))
    return [(new.seconds(name, calls), base.seconds(name, calls)) for _ in range(TURNS)]


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
