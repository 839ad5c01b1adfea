"""Training steps and epochs by network and library, and time to accuracy: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest

from fastbp.benchmarks.accuracy import GOALS, contenders, reach
from fastbp.benchmarks.cases import Case, median
from fastbp.benchmarks.faces import CLOCK, bench
from fastbp.benchmarks.libraries import LIBRARIES, check_installed
from fastbp.benchmarks.suite import engines_of
from fastbp.benchmarks.training import NETWORKS, training_cases


def installed(library: str) -> bool:
    try:
        check_installed(library)
    except ImportError:
        return False
    return library != "torch.compile"  # compiles for minutes


FOUND = list(filter(installed, LIBRARIES))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = metafunc.config.getoption("benchmark_disable")
    if "case" in metafunc.fixturenames:
        cases = training_cases(["64-128-10"] if smoke else list(NETWORKS), engines_of(None), FOUND)
        metafunc.parametrize("case", [x for x in cases if not smoke or x.suite == "epochs"], ids=str)
    else:
        metafunc.parametrize("goal", list(GOALS)[: 1 if smoke else None])


@pytest.mark.benchmark(timer=CLOCK)
def test_training(benchmark: Any, case: Case) -> None:
    bench(benchmark, case)


def test_time_to_accuracy(benchmark: Any, goal: str) -> None:
    smoke = benchmark.disabled
    who = contenders(engines_of(None), [] if smoke else FOUND)
    rows = benchmark.pedantic(lambda: list(reach(goal, who, seeds=1 if smoke else 5)), rounds=1)
    benchmark.extra_info |= {row["who"]: median(row) for row in rows}
    assert not [row["error"] for row in rows if "error" in row]
    assert all(all(row["epochs"]) for row in rows)
