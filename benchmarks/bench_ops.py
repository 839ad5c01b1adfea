"""Every op on every engine: ``pytest benchmarks --benchmark-only``; ``--benchmark-disable`` checks results alone."""

from __future__ import annotations

from typing import Any

import pytest

from fastbp.benchmarks.cases import Case
from fastbp.benchmarks.faces import CLOCK, bench
from fastbp.benchmarks.ops import SIZES, op_cases
from fastbp.benchmarks.suite import engines_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = ["small"] if metafunc.config.getoption("benchmark_disable") else list(SIZES)
    metafunc.parametrize("case", list(op_cases(engines=engines_of(None), sizes=sizes)), ids=str)


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark: Any, case: Case) -> None:
    bench(benchmark, case)
