"""What the figures depend on: the machine, how much it can do at best, and what makes its figures doubtful."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastbp.info import blas_libraries, pins
from fastbp.machine import cpu_name, usable_cores, version_of

__all__ = ["Look", "Roofs", "attainable", "doubts", "load_average", "look", "machine", "measure_roofs"]

PACKAGES = ["fastbp", "numpy", "numba", "scipy", "cupy", "torch", "jax", "scikit-learn"]
CHAINS = 12
PINNING = "OPENBLAS_", "OMP_", "MKL_", "NUMBA_NUM", "BLIS_", "FASTBP_"
COPIES = [1 << n for n in range(14, 27, 3)]  # bytes that are read, and as many written


def machine() -> dict[str, Any]:
    """The date, and what identifies the machine and the software."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "system": platform.platform(),
        "blas": [
            {name: x.get(name) for name in ("name", "architecture", "num_threads")} for x in blas_libraries(os.environ)
        ],
        "pinned": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(PINNING)},
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


class Roofs(NamedTuple):
    """The most that this machine was seen to do.

    Attributes
    ----------
    flops : dict of str to float
        Operations a second of a large matrix product, by dtype.
    copies : list of (int, float)
        Bytes that a copy reads and writes in all, and how many of them a second; the smaller ones stay in a cache.
    core : float or None
        Operations a second of one core in float32, in registers; None where Numba is not there.
    """

    flops: dict[str, float]
    copies: list[tuple[int, float]]
    core: float | None

    def bandwidth(self, size: int) -> float:
        """Bytes a second for a working set of `size` bytes: the best copy of that size or of a larger one."""
        return max((speed for whole, speed in self.copies if whole >= size), default=self.copies[-1][1])


def attainable(roofs: Roofs, dtype: str, flops: float, size: float) -> float:
    """The least seconds that so many operations on so many bytes can take.

    The roofline model (Williams, Waterman and Patterson, 2009): computing and moving overlap, and the slower decides.
    """
    return max(flops / roofs.flops[dtype], size / roofs.bandwidth(int(size)))


def measure_roofs(quick: bool = False) -> Roofs:
    """Measure matrix products through NumPy, copies, and the arithmetic of one core."""
    n = 1024 if quick else 2048
    flops = {}
    for dtype in ("float32", "float64"):
        a, b, c = (np.ones((n, n), dtype) for _ in range(3))
        flops[dtype] = 2 * n**3 / best(lambda a=a, b=b, c=c: np.matmul(a, b, out=c), 6)  # type: ignore[misc]
    copies = []
    for size in COPIES[: -1 if quick else None]:
        # addresses that are equal modulo 4096 would stall each other
        source, target = np.ones(size, np.uint8), np.ones(size + 4096, np.uint8)[2048 + 64 :][:size]
        calls = max(1, (1 << 22) // size)

        def copy(source: Any = source, target: Any = target, calls: int = calls) -> None:
            for _ in range(calls):
                np.copyto(target, source)

        copies.append((2 * size, 2 * size * calls / best(copy, 6)))
    return Roofs(flops, copies, look().flops)


def best(run: Callable[[], object], repeats: int) -> float:
    """The least seconds of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class Look(NamedTuple):
    """How fast one core is now, in operations a second (None without Numba), and how much of it we have, up to 1."""

    flops: float | None
    share: float


def look() -> Look:
    """Watch one core for a few milliseconds: the best of a few runs, since a rest slows the first."""
    n, numbers, compiled = 300_000, np.ones(1000), importlib.util.find_spec("numba") is not None

    def work() -> object:
        if compiled:
            return multiply_add_chains()(n, np.float32(0.5))
        return [np.exp(numbers) for _ in range(300)]

    work()
    start, worked = time.perf_counter(), time.thread_time()
    seconds = best(work, 5)
    share = (time.thread_time() - worked) / (time.perf_counter() - start)
    flops = 2 * lanes_of_a_vector() * CHAINS * n / seconds if compiled else None
    return Look(flops, min(1.0, share))


def lanes_of_a_vector() -> int:
    from fastbp.kernels.numba_vectors import VECTOR_BYTES

    return VECTOR_BYTES // 4


@cache
def multiply_add_chains() -> Callable[[int, Any], float]:
    """A compiled loop of independent chains of fused multiply-adds on vectors of float32, in registers."""
    import numba
    from llvmlite import ir
    from numba.core import cgutils
    from numba.extending import intrinsic

    lanes = lanes_of_a_vector()

    @intrinsic  # type: ignore[untyped-decorator]
    def chains(typing_context: Any, n: Any, x: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vector = ir.VectorType(ir.FloatType(), lanes)
            factor = ir.Constant(vector, ir.Undefined)
            for lane in range(lanes):
                factor = builder.insert_element(factor, arguments[1], ir.Constant(ir.IntType(32), lane))
            sums = [cgutils.alloca_once_value(builder, factor) for _ in range(CHAINS)]
            with cgutils.for_range(builder, arguments[0]):
                for chain in sums:
                    product = builder.fmul(builder.load(chain), factor, flags=["contract"])
                    builder.store(builder.fadd(product, factor, flags=["contract"]), chain)
            total = factor
            for chain in sums:
                total = builder.fadd(total, builder.load(chain))
            return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

        return numba.float32(numba.intp, numba.float32), build

    @numba.njit  # type: ignore[untyped-decorator]
    def run(n: int, x: float) -> float:
        return chains(n, x)

    run(1, np.float32(0.5))
    return run


def doubts(looks: Sequence[Look], load: float | None) -> list[str]:
    """What makes the figures of a run doubtful, from looks at a core between its turns and the load at its start."""
    cores, libraries = usable_cores(), blas_libraries(os.environ)
    found = [f"BLAS is pinned: {line}" for line in pins(libraries)]
    share = statistics.fmean(x.share for x in looks)
    if share < 0.95:
        found.append(f"the machine is busy: this process got {share:.0%} of the core that it worked on")
    elif load is not None and load > 0.5 * cores:
        found.append(f"the machine may be busy: its load was {load:.1f} at the start, on {cores} cores")
    speeds = [x.flops for x in looks if x.flops]
    if speeds:
        low, *_, high = statistics.quantiles(speeds, n=10) if len(speeds) > 1 else speeds * 2
        if low < 0.9 * high:
            found.append(
                f"the clock drifts: a core's peak went from {high / 1e9:.0f} to {low / 1e9:.0f} GFLOP/s between turns"
            )
    for library in libraries:
        if (library.get("num_threads") or 1) > cores:
            found.append(
                f"cores are oversubscribed: {library['name']} runs {library['num_threads']} threads on {cores} cores "
                "that this process may use; set OPENBLAS_NUM_THREADS or OMP_NUM_THREADS"
            )
    return found


def load_average() -> float | None:
    """How many processes wanted a core over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
