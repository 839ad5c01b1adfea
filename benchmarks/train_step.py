"""A training step beside other libraries: the same network, batches, initial weights and rate, through each one's API.

    python benchmarks/train_step.py [--json FILE] [--networks 64-128-10 ...] [--repeats N]

Every contender first trains a few steps from the same weights, and is compared with float64 NumPy; one that computes
something else is an error. Then all take turns in one run, 5 epochs a turn; the table shows medians and ratios.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

import fastbp

# sizes, rows of a batch, steps of an epoch
NETWORKS = {
    "2-64-3": (300, 200),
    "30-100-2": (200, 200),
    "64-128-10": (32, 400),
    "784-512-256-10": (128, 40),
    "1024-1024-1024-1024-10": (512, 4),
}
EPOCHS = 5
LR = 0.01
PAUSE = 0.2  # seconds in which the last contender's threads go to sleep: for a while they wait in a loop, on our cores
Run = Callable[[int], list[np.ndarray]]


class Task:
    """One network with its data and initial weights, all float32."""

    def __init__(self, name: str) -> None:
        self.name, (self.batch, self.steps) = name, NETWORKS[name]
        self.sizes = [int(n) for n in name.split("-")]
        rng = np.random.default_rng(0)
        rows = self.batch * self.steps
        self.X = rng.standard_normal((rows, self.sizes[0])).astype(np.float32)
        self.y = rng.integers(0, self.sizes[-1], rows)
        self.weights = [
            (rng.standard_normal((k, n)) * np.sqrt(2 / k)).astype(np.float32) for k, n in itertools.pairwise(self.sizes)
        ]

    @property
    def flops(self) -> int:
        products = [k * n for k, n in itertools.pairwise(self.sizes)]
        return 2 * self.batch * (3 * sum(products) - products[0])

    def start(self, steps: int) -> Task:
        """The same task on its first few batches."""
        task = Task.__new__(Task)
        task.__dict__ |= self.__dict__ | {"X": self.X[: steps * self.batch], "y": self.y[: steps * self.batch]}
        task.steps = steps
        return task


def notebook(task: Task, dtype: type = np.float32) -> Run:
    """The teaching notebook's way, with the combined gradient: fresh arrays, call by call."""
    weights = [w.astype(dtype) for w in task.weights]
    biases = [np.zeros((1, w.shape[1]), dtype) for w in weights]
    X = task.X.astype(dtype)

    def step(x: np.ndarray, y: np.ndarray) -> None:
        inputs, outputs = [x], []
        for w, b in zip(weights, biases, strict=True):
            outputs.append(np.dot(inputs[-1], w) + b)
            inputs.append(np.maximum(0, outputs[-1]))
        exponentials = np.exp(outputs[-1] - np.max(outputs[-1], axis=1, keepdims=True))
        probabilities = exponentials / np.sum(exponentials, axis=1, keepdims=True)
        np.mean(-np.log(np.clip(probabilities, 1e-7, 1 - 1e-7)[range(len(y)), y]))
        d = probabilities.copy()
        d[range(len(y)), y] -= 1
        d = d / len(y)
        for i in reversed(range(len(weights))):
            dw, db = np.dot(inputs[i].T, d), np.sum(d, axis=0, keepdims=True)
            if i:
                d = np.dot(d, weights[i].T)
                d[outputs[i - 1] <= 0] = 0
            weights[i] -= dtype(LR) * dw
            biases[i] -= dtype(LR) * db

    def run(epochs: int) -> list[np.ndarray]:
        for _ in range(epochs):
            for start in range(0, len(X), task.batch):
                step(X[start : start + task.batch], task.y[start : start + task.batch])
        return weights

    return run


def by_fastbp(engine: str, threads: int | None = None) -> Callable[[Task], Run]:
    def prepare(task: Task) -> Run:
        dense = [fastbp.Dense(k, n) for k, n in itertools.pairwise(task.sizes)]
        for layer, w in zip(dense, task.weights, strict=True):
            layer.weights = w
        stack = [part for layer in dense for part in (layer, fastbp.ReLU())][:-1]
        model = fastbp.Sequential(
            stack, loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.SGD(LR), engine=engine, threads=threads
        )

        def run(epochs: int) -> list[np.ndarray]:
            model.fit(task.X, task.y, epochs=epochs, batch_size=task.batch, shuffle=False, verbose=False)
            return [layer.weights for layer in dense]

        return run

    return prepare


def by_torch(compiled: bool) -> Callable[[Task], Run]:
    def prepare(task: Task) -> Run:
        import torch

        dense = [torch.nn.Linear(k, n) for k, n in itertools.pairwise(task.sizes)]
        with torch.no_grad():
            for layer, w in zip(dense, task.weights, strict=True):
                layer.weight[:] = torch.from_numpy(w.T.copy())
                layer.bias[:] = 0
        model = torch.nn.Sequential(*[part for layer in dense for part in (layer, torch.nn.ReLU())][:-1])
        optimizer = torch.optim.SGD(model.parameters(), LR)
        X, y = torch.from_numpy(task.X), torch.from_numpy(task.y)

        def loss_of(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(model(x), t)

        if compiled:
            loss_of = torch.compile(loss_of)

        def run(epochs: int) -> list[np.ndarray]:
            for _ in range(epochs):
                for start in range(0, len(X), task.batch):
                    optimizer.zero_grad()
                    loss_of(X[start : start + task.batch], y[start : start + task.batch]).backward()
                    optimizer.step()
            return [layer.weight.detach().numpy().T for layer in dense]

        return run

    return prepare


def by_jax(task: Task) -> Run:
    import jax
    import jax.numpy as jnp

    parameters = [(jnp.array(w), jnp.zeros(w.shape[1])) for w in task.weights]
    X = jnp.array(task.X.reshape(task.steps, task.batch, -1))
    y = jnp.array(task.y.reshape(task.steps, task.batch))

    def loss_of(parameters, x, t):
        for w, b in parameters[:-1]:
            x = jax.nn.relu(x @ w + b)
        w, b = parameters[-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(x @ w + b), t[:, None], axis=1).mean()

    def step(parameters, batch):
        loss, gradients = jax.value_and_grad(loss_of)(parameters, *batch)
        return jax.tree.map(lambda p, g: p - LR * g, parameters, gradients), loss

    epoch = jax.jit(lambda parameters, X, y: jax.lax.scan(step, parameters, (X, y)), donate_argnums=0)

    def run(epochs: int) -> list[np.ndarray]:
        nonlocal parameters
        for _ in range(epochs):
            parameters, losses = epoch(parameters, X, y)
            losses.mean().block_until_ready()
        return [np.asarray(w) for w, _ in parameters]

    return run


def by_sklearn(task: Task) -> Run:
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier(
        task.sizes[1:-1], solver="sgd", alpha=0, batch_size=task.batch, learning_rate_init=LR, momentum=0,
        nesterovs_momentum=False, shuffle=False, warm_start=True, max_iter=1, tol=0, n_iter_no_change=1000,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(task.X[: task.batch], np.arange(task.batch) % task.sizes[-1])
    for mine, w in zip(model.coefs_, task.weights, strict=True):
        if len(task.weights) > 1 or task.sizes[-1] > 2:
            mine[:] = w if mine.shape == w.shape else w[:, 1:] - w[:, :1]  # two classes: one logit
    for bias in model.intercepts_:
        bias[:] = 0

    def run(epochs: int) -> list[np.ndarray]:
        model.max_iter = epochs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(task.X, task.y)
        return model.coefs_

    return run


def gemms(task: Task) -> Run:
    """The step's matrix products alone, into arrays that are there."""
    layers = []
    for place, w in enumerate(task.weights):
        k, n = w.shape
        x, z, dz = (np.ones((task.batch, size), np.float32) for size in (k, n, n))
        layers.append((x, w, z, dz, np.empty_like(w), np.empty_like(x) if place else None))

    def run(epochs: int) -> list[np.ndarray]:
        for _ in range(epochs * task.steps):
            for x, w, z, dz, dw, dx in layers:
                np.matmul(x, w, out=z)
                np.matmul(x.T, dz, out=dw)
                if dx is not None:
                    np.matmul(dz, w.T, out=dx)
        return []

    return run


CONTENDERS: dict[str, Callable[[Task], Run]] = {
    "fastbp numba": by_fastbp("numba"),
    "fastbp numba, 1 thread": by_fastbp("numba", threads=1),
    "fastbp numpy": by_fastbp("numpy"),
    "notebook": notebook,
    "torch eager": by_torch(compiled=False),
    "torch.compile": by_torch(compiled=True),
    "jax scan": by_jax,
    "scikit-learn": by_sklearn,
    "GEMMs alone": gemms,
}
NEEDS = {"torch eager": "torch", "torch.compile": "torch", "jax scan": "jax", "scikit-learn": "sklearn"}


def installed(contender: str) -> bool:
    try:
        __import__(NEEDS.get(contender, "numpy"))
    except ImportError:
        return False
    return True


def check(task: Task, contender: str, steps: int = 3) -> None:
    """Raise where a contender's weights after a few steps are not those of the float64 reference."""
    short = task.start(steps)
    if contender == "GEMMs alone":
        return
    expected = notebook(short, np.float64)(1)
    weights = CONTENDERS[contender](short)(1)
    for place, (w, e, start) in enumerate(zip(weights, expected, task.weights, strict=True)):
        if contender == "scikit-learn" and w.shape != e.shape:
            continue  # two classes as one logit: another parametrisation
        moved = np.abs(e - start).max()
        np.testing.assert_allclose(w - start, e - start, rtol=0.02, atol=0.02 * moved, err_msg=f"{contender} {place}")


def lanes_of_a_vector() -> int:
    from fastbp.kernels.numba_vectors import VECTOR_BYTES

    return VECTOR_BYTES // 4


@cache
def multiply_add_chains() -> Callable[[int, float], float]:
    """A compiled loop of 12 independent chains of fused multiply-adds on vectors of float32, in registers."""
    import numba
    from llvmlite import ir
    from numba.core import cgutils
    from numba.extending import intrinsic

    lanes = lanes_of_a_vector()

    @intrinsic
    def chains(typing_context, n, x):
        def build(context, builder, signature, arguments):
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

    @numba.njit
    def run(n, x):
        return chains(n, x)

    run(1, np.float32(0.5))
    return run


CHAINS = 12


def peak_gflops() -> float:
    """The most arithmetic that one core does now, in float32: the best of a few runs, since a rest slows the first."""
    n, best = 1_000_000, float("inf")
    for _ in range(5):
        start = time.perf_counter()
        multiply_add_chains()(n, np.float32(0.5))
        best = min(best, time.perf_counter() - start)
    return 2 * lanes_of_a_vector() * CHAINS * n / best / 1e9


def measure(task: Task, contenders: list[str], repeats: int) -> dict[str, Any]:
    """Let all take turns; microseconds a step of each, and the peak measured between the turns."""
    runs = {name: CONTENDERS[name](task) for name in contenders}
    for run in runs.values():
        run(1)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = []
    for _ in range(repeats):
        peaks.append(peak_gflops())
        for name, run in runs.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run(EPOCHS)
            seconds[name].append(time.perf_counter() - start)
    us = {name: [1e6 * s / (EPOCHS * task.steps) for s in values] for name, values in seconds.items()}
    return {"network": task.name, "batch": task.batch, "flops": task.flops, "us_per_step": us, "peak_gflops": peaks}


def table(results: list[dict[str, Any]]) -> str:
    """One row a network: fastbp's step, and how many times longer the others take."""
    others = [name for name in CONTENDERS if not name.startswith(("fastbp numba", "GEMMs"))]
    head = ["network, batch", "numba us", *others, "GEMMs / 1", "1 thread us", "share of peak"]
    rows = [head, ["---"] * len(head)]
    for result in results:
        us = result["us_per_step"]

        def ratio(name: str, to: str = "fastbp numba", us: dict[str, list[float]] = us) -> str:
            if name not in us or to not in us:
                return ""
            return f"{statistics.median(a / b for a, b in zip(us[name], us[to], strict=True)):.2f}"

        one = us["fastbp numba, 1 thread"]
        share = statistics.median(
            result["flops"] / s / 1e3 / p for s, p in zip(one, result["peak_gflops"], strict=True)
        )
        rows.append(
            [
                f"{result['network']}, {result['batch']}",
                f"{statistics.median(us['fastbp numba']):.1f}",
                *map(ratio, others),
                ratio("fastbp numba", "GEMMs alone"),
                f"{statistics.median(one):.1f}",
                f"{share:.0%}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def machine() -> dict[str, Any]:
    """What the figures depend on."""

    def installed_version(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    packages = ["fastbp", "numpy", "numba", "scipy", "torch", "jax", "scikit-learn"]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "blas": [f"{lib['internal_api']} {lib['version']} {lib.get('architecture')}" for lib in threadpool_info()],
        "pinned": {name: os.environ[name] for name in os.environ if name.startswith("OPENBLAS_")},
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if any(name.startswith("OPENBLAS_") for name in os.environ):
        print(
            "warning: OPENBLAS_ variables are set and may hold BLAS below this processor; unset them", file=sys.stderr
        )
    contenders = [name for name in options.contenders if installed(name)]
    results = []
    for name in options.networks:
        task = Task(name)
        for contender in contenders:
            check(task, contender)
        results.append(measure(task, contenders, options.repeats))
        print(table(results[-1:]).splitlines()[-1], flush=True)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
