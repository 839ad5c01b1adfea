"""What `Sequential.fit` calls after each epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .boundary import as_count
from .kernels.ops import Array

if TYPE_CHECKING:
    from .model import Sequential

__all__ = ["Callback", "EarlyStopping", "EpochFunction", "told"]

#: What is called with the model and an epoch's figures; where it returns True, training ends.
EpochFunction: TypeAlias = "Callable[[Sequential, dict[str, float]], bool | None]"


class Callback:
    """Something that `Sequential.fit` tells of its epochs.

    A subclass overrides what it needs. A function of a model and an epoch's figures serves as well, as `epoch` does.
    What changes in the model, its optimizer or its layers takes effect in the next epoch.

    Examples
    --------
    >>> import fastbp
    >>> class Halve(fastbp.Callback):
    ...     def epoch(self, model, figures):
    ...         model.optimizer.lr *= 0.5
    >>> X, y = fastbp.spiral_data(50, 3, seed=0)
    >>> model = fastbp.Sequential([fastbp.Dense(2, 3)], loss=fastbp.SoftmaxCrossEntropy(),
    ...                           optimizer=fastbp.SGD(1.0), seed=0)
    >>> model.fit(X, y, epochs=3, callbacks=[Halve()]).optimizer.lr
    0.125
    """

    def begin(self, model: Sequential, figures: tuple[str, ...]) -> None:
        """Training begins; `figures` are the names of what each epoch will give."""

    def epoch(self, model: Sequential, figures: dict[str, float]) -> bool | None:
        """An epoch is done, and in the history. Return True to end training."""

    def end(self, model: Sequential) -> None:
        """Training is over; called after an error or Ctrl-C as well."""

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: arrays, and what JSON holds."""
        return {}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go back to what `progress` gave; called after `begin`."""


class EarlyStopping(Callback):
    """End training when a figure no longer improves, and keep the best epoch's weights.

    Parameters
    ----------
    monitor : str, default "val_loss"
        Which figure of an epoch to look at: ``"loss"``, or with validation data ``"val_loss"``, ``"val_accuracy"`` or
        ``"val_"`` before the name of a metric.
    patience : int, default 10
        After how many epochs without improvement training ends.
    min_delta : float, default 0.0
        By how much an epoch must be better to count as better.
    mode : {"min", "max"}, optional
        Which is better; by default less of a loss or an error, more of anything else.
    restore_best : bool, default True
        Go back to the best epoch's parameters, and the layers' other state, at the end.

    Attributes
    ----------
    best : float
        The best figure.
    best_epoch : int
        Its epoch, counted from 1 over all calls of `fit`.

    Examples
    --------
    >>> import fastbp
    >>> stop = fastbp.EarlyStopping(patience=3)
    >>> model = fastbp.Sequential([fastbp.Dense(2, 3)], loss=fastbp.SoftmaxCrossEntropy(),
    ...                           optimizer=fastbp.SGD(1.0), seed=0)
    >>> X, y = fastbp.spiral_data(50, 3, seed=0)
    >>> model = model.fit(X, y, epochs=500, validation_data=(X, y), callbacks=[stop])
    >>> len(model.history["loss"]) - stop.best_epoch
    3
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        *,
        patience: int = 10,
        min_delta: float = 0.0,
        mode: str | None = None,
        restore_best: bool = True,
    ) -> None:
        if mode not in (None, "min", "max"):
            raise ValueError(f"mode must be 'min', 'max' or None, got {mode!r}")
        self.monitor = monitor
        self.patience = as_count(patience, "patience")
        self.min_delta = float(min_delta)
        self.mode = mode or ("min" if monitor.endswith(("loss", "error")) else "max")
        self.restore_best = restore_best

    def begin(self, model: Sequential, figures: tuple[str, ...]) -> None:
        if self.monitor not in figures:
            hint = "; pass validation_data" if self.monitor.startswith("val_") else ""
            raise ValueError(f"monitor must be one of {', '.join(figures)}, got {self.monitor!r}{hint}")
        self.best = np.inf if self.mode == "min" else -np.inf
        self.best_epoch = len(model.history.get("loss", []))
        self._kept: list[Array] = []

    def epoch(self, model: Sequential, figures: dict[str, float]) -> bool | None:
        figure, epoch = figures[self.monitor], len(model.history["loss"])
        better = self.best - figure if self.mode == "min" else figure - self.best
        if better > self.min_delta:
            self.best, self.best_epoch = figure, epoch
            if self.restore_best:
                self._kept = [array.copy() for array in model.weights_and_state()]
        return epoch - self.best_epoch >= self.patience

    def progress(self) -> dict[str, Any]:
        kept = {f"kept_{place}": array for place, array in enumerate(self._kept)}
        return {"best": self.best, "best_epoch": self.best_epoch} | kept

    def resume(self, progress: Mapping[str, Any]) -> None:
        self.best, self.best_epoch = progress["best"], progress["best_epoch"]
        self._kept = [progress[f"kept_{place}"] for place in range(len(progress) - 2)]

    def end(self, model: Sequential) -> None:
        for array, kept in zip(model.weights_and_state(), self._kept, strict=bool(self._kept)):
            array[...] = kept
        self._kept = []


@contextlib.contextmanager
def told(
    callbacks: Sequence[Callback | EpochFunction], model: Sequential, figures: tuple[str, ...]
) -> Iterator[list[EpochFunction]]:
    """Tell callbacks of begin and end; gives what to call after each epoch."""
    for callback in callbacks:
        if not isinstance(callback, Callback) and not callable(callback):
            raise TypeError(f"callbacks must hold fastbp Callbacks or functions, got {callback!r}")
    with contextlib.ExitStack() as ends:
        for callback in callbacks:
            if isinstance(callback, Callback):
                callback.begin(model, figures)
                ends.callback(callback.end, model)
        yield [callback.epoch if isinstance(callback, Callback) else callback for callback in callbacks]
