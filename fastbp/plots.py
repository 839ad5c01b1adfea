"""The picture of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .encoding import Category, Number, Split
from .kernels.ops import Array
from .tables import need

if TYPE_CHECKING:
    from .model import Sequential

__all__ = ["plot_training"]

GRID = 400  # points a side at which the decision regions are computed
MOST_POINTS = 2000  # drawn of the data
MOST_NAMES = 12  # of classes in the legend


def plot_training(path: str | Path, model: Sequential, data: Split, held_out: dict[int, float], title: str) -> None:
    """Draw the loss curves and, for classes and two numbers as inputs, the decision regions beside them.

    Parameters
    ----------
    path : path
        Its suffix says what kind of picture, such as ``.png``.
    model : Sequential
        Its history has the loss of each epoch.
    data : Split
        Its held-out rows are drawn as points over the regions.
    held_out : dict of int to float
        The loss on held-out data after some epochs.
    title : str
    """
    need("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    target = data.encoder.target
    axes = [x for x in data.encoder.features if isinstance(x, Number)]
    with_regions = isinstance(target, Category) and len(axes) == len(data.encoder.features) == 2
    figure = Figure(figsize=(12 if with_regions else 7, 5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)  # no window, whatever the user's settings say
    figure.suptitle(title)
    curves, *others = figure.subplots(1, 1 + with_regions, squeeze=False)[0]
    _draw_loss(curves, model.history["loss"], held_out)
    if others and isinstance(target, Category):
        _draw_regions(others[0], model, axes, target, *data.held_out)
    figure.savefig(path)


def _draw_loss(axes: Any, training: Sequence[float], held_out: dict[int, float]) -> None:
    axes.plot(range(1, len(training) + 1), training, color="C0", label="training")
    axes.plot(list(held_out), list(held_out.values()), color="C1", label="held out")
    axes.set(xlabel="epoch", ylabel="loss", title="Loss")
    if min(*training, *held_out.values()) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_regions(
    axes: Any, model: Sequential, columns: Sequence[Number], target: Category, X: Array, y: Array
) -> None:
    from matplotlib import colormaps

    count = len(target.values)
    colours = np.array(
        [colormaps["tab10" if count <= 10 else "turbo"](i if count <= 10 else i / count) for i in range(count)]
    )
    low, high = X.min(axis=0), X.max(axis=0)
    margin = 0.06 * np.where(high > low, high - low, 1)
    low, high = low - margin, high + margin
    across, up = (np.linspace(low[i], high[i], GRID, dtype=np.float32) for i in (0, 1))
    grid = np.stack(np.meshgrid(across, up), axis=-1).reshape(-1, 2)
    # the probabilities mix the classes' colours, so that doubt shows
    shades = (model.predict_proba(grid) @ colours[:, :3]).reshape(GRID, GRID, 3)
    (left, right), (bottom, top) = (
        column.mean + (column.std or 1.0) * np.array([low[i], high[i]]) for i, column in enumerate(columns)
    )
    axes.imshow(
        1 - 0.45 * (1 - np.clip(shades, 0, 1)), extent=(left, right, bottom, top), origin="lower", aspect="auto"
    )
    some = np.random.default_rng(0).permutation(len(X))[:MOST_POINTS]
    for place, name in enumerate(target.values):
        rows = some[y[some] == place]
        points = [column.mean + column.std * X[rows, i] for i, column in enumerate(columns)]
        axes.scatter(*points, s=14, color=colours[place], edgecolors="white", linewidths=0.5, label=name)
    axes.set(xlabel=columns[0].name, ylabel=columns[1].name, title="Decision regions and held-out rows")
    if count <= MOST_NAMES:
        axes.legend(title=target.name, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
