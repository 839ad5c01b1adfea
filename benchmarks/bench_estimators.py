"""The estimators beside scikit-learn's: the same arguments, data and seeds.

    python -m fastbp.benchmarks.bench_estimators [--json FILE] [--cases digits ...] [--repeats N]

Of each case both first train for a few epochs, and their losses are compared: one that computes something else is an
error. Then they take turns in one run; the table shows medians, and how many times longer scikit-learn took. As
``pytest benchmarks`` it runs each case once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pytest
import scipy.sparse
import sklearn.neural_network
from sklearn.datasets import load_digits, make_classification, make_multilabel_classification, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

import fastbp.estimators
from fastbp.benchmarks.machine import machine
from fastbp.kernels.ops import Array

CONTENDERS = {"fastbp": fastbp.estimators, "scikit-learn": sklearn.neural_network}
PAUSE = 0.1  # seconds in which the last contender's threads go to sleep
CALLS = 200  # of partial_fit or predict in a turn
Data: TypeAlias = tuple[Array, Array]


class Case(NamedTuple):
    """What is timed: ``fit``, calls of ``partial_fit`` on batches of 32, or of ``predict`` on some rows."""

    kind: str
    data: Callable[[], Data]
    options: dict[str, Any]
    what: str = "fit"
    rows: int = 0


@cache
def digits() -> Data:
    X, y = load_digits(return_X_y=True)
    return X / 16, y


@cache
def table() -> Data:
    X, y = make_classification(20_000, 30, n_informative=10, n_classes=3, random_state=0)
    return X, y


@cache
def numbers() -> Data:
    X, y = make_regression(5_000, 10, noise=0.1, random_state=0)
    return X, y / y.std()


@cache
def labels() -> Data:
    X, y = make_multilabel_classification(2_000, 20, n_classes=5, random_state=0)
    return X / 20, y


@cache
def texts() -> Data:
    """Words of 4,000 texts, each about 60 of 12,541, as sparse rows; of 20 kinds, each with words of its own."""
    rng = np.random.default_rng(0)
    y, lengths = rng.integers(0, 20, 4_000), rng.poisson(60, 4_000) + 1
    often = (1 / np.arange(2, 12_543)).cumsum()  # Zipf's law
    words = [
        np.unique((np.searchsorted(often, often[-1] * rng.random(n)) + 37 * kind * (rng.random(n) < 0.3)) % 12_541)
        for n, kind in zip(lengths, y, strict=True)
    ]
    ends = np.cumsum([0, *map(len, words)])
    return scipy.sparse.csr_array((rng.uniform(0.1, 0.3, ends[-1]), np.concatenate(words), ends), (4_000, 12_541)), y


def part(data: Callable[[], Data], rows: int, features: int, classes: int | None = None) -> Callable[[], Data]:
    def some() -> Data:
        X, y = data()
        y = y[:rows] if classes is None else y[:rows] % classes
        return np.ascontiguousarray(X[:rows, -features:]), y

    return some


C, R = "MLPClassifier", "MLPRegressor"
CASES = {
    "digits, 128": Case(C, digits, {"hidden_layer_sizes": 128, "max_iter": 100}),
    "table 20000 x 30": Case(C, table, {"max_iter": 10}),
    "digits, 128, lbfgs": Case(C, digits, {"hidden_layer_sizes": 128, "solver": "lbfgs", "max_iter": 50}),
    "table, lbfgs": Case(C, table, {"solver": "lbfgs", "max_iter": 30}),
    "numbers, lbfgs": Case(R, numbers, {"solver": "lbfgs", "max_iter": 50}),
    "partial_fit, 3 classes": Case(C, table, {}, "partial_fit", 32),
    "partial_fit, digits": Case(C, digits, {}, "partial_fit", 32),
    "partial_fit, numbers": Case(R, numbers, {}, "partial_fit", 32),
    "predict, 1 row": Case(C, digits, {}, "predict", 1),
    "predict, 32 rows": Case(C, digits, {}, "predict", 32),
    "predict, 1797 rows": Case(C, digits, {}, "predict", 1797),
    "predict, 20000 rows": Case(C, table, {}, "predict", 20_000),
    "predict_proba, 32 rows": Case(C, digits, {}, "predict_proba", 32),
    "predict_proba, 20000 rows": Case(C, table, {}, "predict_proba", 20_000),
    "texts": Case(C, texts, {"max_iter": 2}),
    "texts, 50": Case(C, texts, {"hidden_layer_sizes": 50, "max_iter": 2}),
    "partial_fit, texts": Case(C, texts, {}, "partial_fit", 32),
    "predict, texts": Case(C, texts, {}, "predict", 4_000),
    "predict, numbers": Case(R, numbers, {}, "predict", 32),
    # a grid of others
    "100 x 4, 10": Case(C, part(table, 100, 4), {"hidden_layer_sizes": 10, "max_iter": 100}),
    "100 x 4, 10, 10 epochs": Case(C, part(table, 100, 4), {"hidden_layer_sizes": 10, "max_iter": 10}),
    "150 x 4, 100, sgd": Case(C, part(table, 150, 4), {"solver": "sgd", "max_iter": 100}),
    "two classes, 64-32": Case(C, part(table, 5000, 20, 2), {"hidden_layer_sizes": (64, 32), "max_iter": 20}),
    "several labels": Case(C, labels, {"max_iter": 30}),
    "numbers, tanh": Case(R, numbers, {"activation": "tanh", "max_iter": 20}),
    "numbers, logistic, 50-50": Case(
        R, numbers, {"activation": "logistic", "hidden_layer_sizes": (50, 50), "max_iter": 20}
    ),
    "numbers, batches of 32": Case(R, numbers, {"batch_size": 32, "max_iter": 10}),
    "digits, early stopping": Case(C, digits, {"early_stopping": True, "max_iter": 50}),
    "digits, 512": Case(C, digits, {"hidden_layer_sizes": 512, "max_iter": 20}),
    "digits, 1024": Case(C, digits, {"hidden_layer_sizes": 1024, "max_iter": 10}),
    "digits, 1024-1024": Case(C, digits, {"hidden_layer_sizes": (1024, 1024), "max_iter": 5}),
    "digits, all rows at once": Case(C, digits, {"batch_size": 1797, "max_iter": 30}),
}


def estimator(contender: str, case: Case, **options: Any) -> Any:
    return getattr(CONTENDERS[contender], case.kind)(**{"random_state": 0} | case.options | options)


def check(case: Case, dtype: str) -> None:
    """Raise where the losses of a few epochs differ."""
    X, y = case.data()
    losses = []
    for contender in CONTENDERS:
        model = estimator(contender, case, max_iter=3).fit(X[:2000].astype(dtype), y[:2000])
        losses.append([*getattr(model, "loss_curve_", ()), model.loss_])
    ours, others = map(np.array, losses)
    np.testing.assert_allclose(ours, others, rtol=1e-6 if dtype == "float64" else 2e-3)


def prepare(contender: str, case: Case, dtype: str) -> Callable[[], Any]:
    """What one turn runs."""
    X, y = case.data()
    X = X.astype(dtype)
    if case.what == "fit":
        return lambda: estimator(contender, case).fit(X, y)
    model = estimator(contender, case, max_iter=1).fit(X, y)
    if case.what == "partial_fit":
        batches = [(X[i * 32 : i * 32 + 32], y[i * 32 : i * 32 + 32]) for i in range(40)]
        return lambda: [model.partial_fit(*batches[i % 40]) for i in range(CALLS)]
    call, rows = getattr(model, case.what), X[: case.rows]
    return lambda: [call(rows) for _ in range(CALLS if case.rows < 1000 else 10)]


def measure(name: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Let both take turns; seconds of each."""
    runs = {contender: prepare(contender, CASES[name], dtype) for contender in CONTENDERS}
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for _ in range(repeats):
        for contender, run in runs.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            seconds[contender].append(time.perf_counter() - start)
    return {"case": name, "dtype": dtype, "seconds": seconds}


def accuracies(data: Callable[[], Data], seeds: int = 10, **options: Any) -> dict[str, list[float]]:
    """Accuracy on held-out rows, by seed, in float32."""
    found: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for seed in range(seeds):
        X, X_test, y, y_test = train_test_split(*data(), random_state=seed)
        for contender, module in CONTENDERS.items():
            model = module.MLPClassifier(random_state=seed, **options).fit(X.astype("float32"), y)
            found[contender].append(model.score(X_test.astype("float32"), y_test))
    return found


def first_fit() -> dict[str, float]:
    """Seconds from the start of a new process to the end of its first fit, one epoch of digits."""
    code = (
        "import warnings; warnings.simplefilter('ignore'); from sklearn.datasets import load_digits\n"
        "from {} import MLPClassifier; MLPClassifier(max_iter=1).fit(*load_digits(return_X_y=True))"
    )
    seconds = {}
    for contender, module in CONTENDERS.items():
        taken = []
        for _ in range(4):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code.format(module.__name__)], check=True)
            taken.append(time.perf_counter() - start)
        seconds[contender] = statistics.median(taken[1:])
    return seconds


def row(result: dict[str, Any]) -> str:
    ours, others = result["seconds"]["fastbp"], result["seconds"]["scikit-learn"]
    ratio = statistics.median(b / a for a, b in zip(ours, others, strict=True))
    milliseconds = [f"{1e3 * statistics.median(times):.1f}" for times in (ours, others)]
    return f"| {' | '.join([result['case'], result['dtype'], *milliseconds, f'{ratio:.2f}'])} |"


HEAD = "| case | dtype | fastbp ms | scikit-learn ms | ratio |\n|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if any(name.startswith("OPENBLAS_") for name in os.environ):
        print("warning: OPENBLAS_ variables are set and may hold BLAS back; unset them", file=sys.stderr)
    warnings.simplefilter("ignore", ConvergenceWarning)
    results = []
    print(HEAD)
    for name in options.cases:
        for dtype in ("float32", "float64"):
            check(CASES[name], dtype)
            results.append(measure(name, dtype, options.repeats))
            print(row(results[-1]), flush=True)
    scores = {
        "digits": accuracies(digits, hidden_layer_sizes=128, max_iter=50),
        "table": accuracies(part(table, 4000, 30), max_iter=30),
    }
    for name, found in scores.items():
        for contender, values in found.items():
            print(f"{name}: {contender} {np.mean(values):.4f} +- {np.std(values):.4f} on held-out rows, 10 seeds")
    first = first_fit()
    print("a new process to the end of its first epoch of digits: ", first)
    if options.json:
        report = {"machine": machine(), "results": results, "accuracy": scores, "first_fit_seconds": first}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.what != "fit" or name.startswith("100")])
def test_turn(benchmark: Any, name: str, contender: str) -> None:
    check(CASES[name], "float32")
    benchmark.group = name
    benchmark.pedantic(prepare(contender, CASES[name], "float32"), rounds=1)


if __name__ == "__main__":
    main()
