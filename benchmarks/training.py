"""Training steps and epochs beside other libraries: the same network, batches, initial weights and rate.

Each contender goes through its library's own interface. Before it is timed it trains a few steps, and its weights are
compared with those of the notebook's code in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, TypeAlias

import numpy as np

import fastbp
from fastbp.kernels.engine import Engine
from fastbp.kernels.ops import Array

from .cases import AWAKE, LARGE, Case, Turn
from .libraries import LIBRARIES, Task, quiet

__all__ = ["EPOCHS", "NETWORKS", "contenders", "training_cases"]

# rows of a batch, steps of an epoch
NETWORKS = {
    "2-64-3": (300, 200),
    "30-100-2": (200, 200),
    "64-128-10": (32, 400),
    "784-512-256-10": (128, 40),
    "1024-1024-1024-1024-10": (512, 4),
}
EPOCHS = 5  # in one call, for the time of a step
LR = 0.01

#: Trains so many more epochs, and returns the weights.
Run: TypeAlias = "Callable[[int], list[Array]]"
Prepare: TypeAlias = "Callable[[Task], Run]"


@cache
def task_of(network: str) -> Task:
    """Random rows and labels for a network, its initial weights, and plain gradient descent."""
    batch, steps = NETWORKS[network]
    sizes = [int(n) for n in network.split("-")]
    rng = np.random.default_rng(0)
    X = rng.standard_normal((batch * steps, sizes[0])).astype(np.float32)
    return Task(X, rng.integers(0, sizes[-1], len(X)), drawn(sizes, rng), batch, "sgd", LR)


def drawn(sizes: Sequence[int], rng: np.random.Generator) -> list[Array]:
    """Initial weights after He et al. (2015)."""
    return [(rng.standard_normal((k, n)) * np.sqrt(2 / k)).astype(np.float32) for k, n in itertools.pairwise(sizes)]


def notebook(task: Task, dtype: Any = np.float32) -> Run:
    """The teaching notebook's way, with the combined gradient: fresh arrays, call by call."""
    weights = [w.astype(dtype) for w in task.weights]
    biases = [np.zeros((1, w.shape[1]), dtype) for w in weights]
    X = task.X.astype(dtype)

    def step(x: Array, y: Array) -> None:
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
            weights[i] -= dtype(task.lr) * dw
            biases[i] -= dtype(task.lr) * db

    def run(epochs: int) -> list[Array]:
        for _ in range(epochs):
            for start in range(0, len(X), task.batch):
                step(X[start : start + task.batch], task.y[start : start + task.batch])
        return weights

    return run


def by_fastbp(engine: Engine, threads: int | None = None) -> Prepare:
    def prepare(task: Task) -> Run:
        model = fastbp_model(task, engine, threads)

        def run(epochs: int) -> list[Array]:
            model.fit(task.X, task.y, epochs=epochs, batch_size=task.batch, shuffle=False, verbose=False)
            return [layer.weights for layer in model.layers if isinstance(layer, fastbp.Dense)]

        return run

    return prepare


def fastbp_model(task: Task, engine: Engine, threads: int | None = None) -> fastbp.Sequential:
    """The task's network, as `Sequential` has it."""
    stack: list[fastbp.Layer] = []
    for w in task.weights:
        dense = fastbp.Dense(*w.shape)
        dense.weights = w
        stack += [dense, fastbp.ReLU()]
    optimizer = fastbp.SGD(task.lr) if task.optimizer == "sgd" else fastbp.Adam(task.lr)
    return fastbp.Sequential(
        stack[:-1], loss=fastbp.SoftmaxCrossEntropy(), optimizer=optimizer, engine=engine, threads=threads
    )


def by_library(name: str) -> Prepare:
    def prepare(task: Task) -> Run:
        trainer = LIBRARIES[name](task)
        data = trainer.load(task.X, task.y)

        def run(epochs: int) -> list[Array]:
            for _ in range(epochs):
                trainer.epoch(data)
            return trainer.weights()

        return run

    return prepare


def gemms(task: Task) -> Run:
    """The step's matrix products alone, into arrays that are there."""
    layers = []
    for place, w in enumerate(task.weights):
        k, n = w.shape
        x, z, dz = (np.ones((task.batch, size), np.float32) for size in (k, n, n))
        layers.append((x, w, z, dz, np.empty_like(w), np.empty_like(x) if place else None))

    def run(epochs: int) -> list[Array]:
        for _ in range(epochs * task.steps):
            for x, w, z, dz, dw, dx in layers:
                np.matmul(x, w, out=z)
                np.matmul(x.T, dz, out=dw)
                if dx is not None:
                    np.matmul(dz, w.T, out=dx)
        return []

    return run


GEMMS = "GEMMs alone"


def contenders(engines: Sequence[Engine], libraries: Sequence[str] = ()) -> dict[str, Prepare]:
    """Who trains: fastbp's engines, the notebook's code, other libraries; and the matrix products as a measure."""
    found: dict[str, Prepare] = {}
    for engine in engines:
        found[f"fastbp {engine.name}"] = by_fastbp(engine)
        if engine.name == "numba":
            found["fastbp numba, 1 thread"] = by_fastbp(engine, threads=1)
    found["notebook"] = notebook
    return found | {name: by_library(name) for name in libraries} | {GEMMS: gemms}


def check(task: Task, who: str, prepare: Prepare, steps: int = 3) -> None:
    """Raise where a contender's weights after a few steps are not those of the float64 reference."""
    short = task.start(steps)
    if who == GEMMS:
        return
    expected, weights = notebook(short, np.float64)(1), prepare(short)(1)
    for place, (w, e, start) in enumerate(zip(weights, expected, task.weights, strict=True)):
        if w.shape != e.shape:
            continue  # scikit-learn: two classes as one logit, another parametrisation
        moved = np.abs(e - start).max()
        np.testing.assert_allclose(
            w - start, e - start, rtol=0.02, atol=0.02 * moved, err_msg=f"{who} trains layer {place} wrong"
        )


def training_cases(networks: Sequence[str], engines: Sequence[Engine], libraries: Sequence[str] = ()) -> Iterator[Case]:
    """Steps, from calls of several epochs, and single epochs with what a call costs besides, by network."""
    for suite, epochs in (("steps", EPOCHS), ("epochs", 1)):
        for network in networks:
            for who, prepare in contenders(engines, libraries).items():
                if suite == "steps" or who != GEMMS:
                    yield training_case(suite, network, who, prepare, epochs)


def training_case(suite: str, network: str, who: str, prepare: Prepare, epochs: int) -> Case:
    batch, steps = NETWORKS[network]
    sizes = [int(n) for n in network.split("-")]
    products = list(itertools.pairwise(sizes))
    # three products a layer (forward, by the weights, by the inputs), but two for the first; an update reads and writes
    multiplied = [k * n for k, n in products]
    touched = [batch * k + k * n + batch * n for k, n in products]
    flops = 2 * batch * (3 * sum(multiplied) - multiplied[0])
    traffic = 4 * (3 * sum(touched) - touched[0] + sum(multiplied))
    many = 1 if suite == "steps" else steps

    def turn() -> Turn:
        run = prepare(task_of(network))
        return Turn(quiet(lambda calls: [run(epochs) for _ in range(calls)]))

    return Case(
        suite, network, who, turn, quiet(partial(check, task_of(network), who, prepare)),
        sizes={"batch": batch, "steps": steps},
        flops=flops * many,
        bytes=traffic * many,
        parts=epochs * steps if suite == "steps" else 1,
        awake=AWAKE if who in LIBRARIES or 2 * batch * max(multiplied) >= LARGE else 0.02,
    )  # fmt: skip
