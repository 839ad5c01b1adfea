"""The gate of continuous integration: no kernel may become much slower than it was, beside NumPy's in one run.

    python -m fastbp.benchmarks.gate            compare with the ratios in gate.json
    python -m fastbp.benchmarks.gate --prove    run some kernels twice, and see that the gate finds them
    python -m fastbp.benchmarks.gate --update   measure the ratios of this processor, and store them

Only ratios count: how many times longer the Numba engine takes than a yardstick that takes turns with it. That is
NumPy's kernel for the same op, NumPy's `dense_forward` for an op that NumPy does not have, and the notebook's code for
an epoch of training. BLAS is held to one thread. What is beyond its bound is measured again a while later, and
fails if it always is.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import fastbp
from fastbp.kernels.engine import Call, Engine, Program
from fastbp.kernels.ops import OPS
from fastbp.threads import limited_threads

from .cases import Case, time_group
from .machine import lanes_of_a_vector, machine
from .ops import by_engine, op_case
from .training import NETWORKS, by_fastbp, notebook, training_case

__all__ = ["gate", "pairs", "ratio", "slowed"]

FACTOR = 1.7  # how much slower than stored is too slow: a kernel made twice as slow shows
ELSEWHERE = 3.0  # the same on a processor whose ratios nobody has stored
TRIES = 4
PAUSE = 2.0  # seconds between tries, in which a busy machine may become calm
FILE = Path(__file__).with_name("gate.json")
UNGATED = "next_batch", "next_rate", "softmax_jacobian"  # nanoseconds, and for eyes alone
PROOF = ["dense_forward", "softmax_cross_entropy", "layer_norm_backward", "relu_backward", "adam"]

#: The case to watch, and its yardstick.
Pair: TypeAlias = "tuple[Case, Case]"


def pairs(watched: Engine, yardstick: Engine, ops: Sequence[str], networks: Sequence[str] = ()) -> Iterator[Pair]:
    """What the gate compares."""
    for name in ops:
        if watched.supports(OPS[name]):
            other = OPS[name] if yardstick.supports(OPS[name]) else OPS["dense_forward"]
            yield (
                op_case(OPS[name], "watched", by_engine(watched), "medium", "float32", {}),
                op_case(other, "yardstick", by_engine(yardstick), "medium", "float32", {}),
            )
    for network in networks:
        case = training_case("epochs", network, "watched", by_fastbp(watched, threads=1), 1)
        yield case, training_case("epochs", network, "yardstick", notebook, 1)


def ratio(pair: Pair, repeats: int = 15) -> float:
    """How many times longer the watched case takes than its yardstick, by the least of each: others only slow down."""
    rivals = [replace(case, awake=0.0) for case in pair]  # BLAS has one thread, and after a rest a core is slower
    seconds = time_group(rivals, repeats, 0.002)
    return min(seconds["watched"]) / min(seconds["yardstick"])


def gate(found: Sequence[Pair], bounds: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Those that are always beyond their bounds: the least ratio that was measured, and the bound."""
    least: dict[str, float] = {}
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE)
        for pair in found:
            name = pair[0].name
            least[name] = min(ratio(pair), least.get(name, math.inf))
        found = [pair for pair in found if least[pair[0].name] > bounds.get(pair[0].name, math.inf)]
        if not found:
            break
    return {pair[0].name: (least[pair[0].name], bounds[pair[0].name]) for pair in found}


def slowed(engine: Engine, ops: Sequence[str]) -> Engine:
    """The same engine, but some of its ops do their work twice."""

    class Slowed(type(engine)):  # type: ignore[misc]
        def program(self, calls: Sequence[Call]) -> Program:
            twice = [call for call in calls for _ in range(1 + (call.op.name in ops))]
            program: Program = super().program(twice)
            return program

    found: Engine = Slowed()
    return found


def processor() -> str:
    """What ratios belong to."""
    about = machine()
    return ", ".join(
        [about["cpu"], *sorted({x["architecture"] for x in about["blas"]}), f"{lanes_of_a_vector()} lanes"]
    )


def stored() -> dict[str, dict[str, float]]:
    """The ratios by processor."""
    known: dict[str, dict[str, float]] = json.loads(FILE.read_text()) if FILE.is_file() else {}
    return known


def measured(found: Sequence[Pair], rounds: int = 7) -> dict[str, float]:
    """The median ratios of some rounds."""
    taken = [[ratio(pair) for pair in found] for _ in range(rounds)]
    names = [pair[0].name for pair in found]
    return {name: round(statistics.median(x), 4) for name, x in zip(names, zip(*taken, strict=True), strict=True)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate; 1 where a kernel is too slow, or, with ``--prove``, where a slow one is not found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--prove", action="store_true")
    which.add_argument("--update", action="store_true")
    options = parser.parse_args(arguments)
    numba, numpy = fastbp.engine("numba"), fastbp.engine("numpy")
    with limited_threads(1, numba):
        return run(options, numba, numpy)


def run(options: Any, numba: Engine, numpy: Engine) -> int:
    if options.prove:
        return prove(numba)
    known, here = stored(), processor()
    found = list(pairs(numba, numpy, [name for name in OPS if name not in UNGATED], list(NETWORKS)[:4]))
    if options.update:
        FILE.write_text(json.dumps(known | {here: measured(found)}, indent=1, sort_keys=True) + "\n")
        print(f"stored {len(found)} ratios of {here} in {FILE}")
        return 0
    if here in known:
        bounds = {name: FACTOR * value for name, value in known[here].items()}
    else:
        print(f"no ratios are stored for {here}: bounds are {ELSEWHERE:g} times those of others")
        bounds = {name: ELSEWHERE * max(x.get(name, 0) for x in known.values()) for name in {*OPS, *NETWORKS}}
    beyond = gate(found, bounds)
    for name, (least, bound) in beyond.items():
        print(f"{name}: takes {least:.3f} times as long as its yardstick in {TRIES} tries; the bound is {bound:.3f}")
    print(f"{len(found)} ratios, {len(beyond)} beyond their bounds")
    return 1 if beyond else 0


def prove(engine: Engine) -> int:
    """Let kernels that work twice take turns with themselves as they are; 1 where the gate is wrong."""
    bounds = dict.fromkeys(PROOF, FACTOR)
    missed = {*PROOF} - {*gate(list(pairs(slowed(engine, PROOF), engine, PROOF)), bounds)}
    blamed = {*gate(list(pairs(engine, engine, PROOF)), bounds)}
    for names, what in ((missed, "made twice as slow and not found"), (blamed, "as fast as before and found slow")):
        if names:
            print(f"{what}: {', '.join(sorted(names))}")
    if not missed | blamed:
        print(f"each of {len(PROOF)} kernels made twice as slow is found")
    return 1 if missed | blamed else 0


if __name__ == "__main__":
    sys.exit(main())
