"""What `Sequential.fit` calls after each epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .boundary import as_count, as_flag, as_number
from .kernels.ops import Array
from .layers import Layer
from .schedules import Schedule

if TYPE_CHECKING:
    from .model import Sequential

__all__ = ["Callback", "EarlyStopping", "EpochFunction", "as_callbacks", "tell", "told"]

#: What is called with the model and an epoch's figures; where it returns True, and nothing else, training ends.
EpochFunction: TypeAlias = "Callable[[Sequential, dict[str, float]], object]"


class Callback:
    """Something that `Sequential.fit` tells of its epochs.

    A subclass overrides what it needs. A function of a model and an epoch's figures serves as well, as `epoch` does.
    What changes in the model, its layers, loss or optimizer, or by another one of those, takes effect in the next
    epoch. A callback may predict and evaluate with the model; training it raises RuntimeError.

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

    def epoch(self, model: Sequential, figures: dict[str, float]) -> object:
        """An epoch is done, and in the history. Return True to end training; anything else means nothing."""

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
        Which is better; by default less of what ends with loss, error or deviance, and more of what ends with accuracy,
        score or auc.
    restore_best : bool, default True
        Go back to the best epoch's parameters, and the layers' other state, at the end. Layers that have come since
        then stay as they are, and those that have gone stay away.

    Raises
    ------
    ValueError
        Where the name does not say which is better, and `mode` does not either.

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
        if not isinstance(monitor, str):
            raise TypeError(f"monitor must be the name of a figure, got {monitor!r}")
        self.monitor = monitor
        self.patience = as_count(patience, "patience")
        self.min_delta = as_number(min_delta, "min_delta")
        self.mode = mode or better_of(monitor)
        self.restore_best = as_flag(restore_best, "restore_best")

    def begin(self, model: Sequential, figures: tuple[str, ...]) -> None:
        if self.monitor not in figures:
            hint = "; pass validation_data" if self.monitor.startswith("val_") else ""
            raise ValueError(f"monitor must be one of {', '.join(figures)}, got {self.monitor!r}{hint}")
        self.best = np.inf if self.mode == "min" else -np.inf
        self.best_epoch = len(model.history.get("loss", []))
        self._model = model
        self._kept: dict[tuple[Layer, str], Array] = {}

    def epoch(self, model: Sequential, figures: dict[str, float]) -> bool:
        if self.monitor not in figures:
            raise ValueError(f"monitor must be one of {', '.join(figures)}, got {self.monitor!r}")
        figure, epoch = figures[self.monitor], len(model.history["loss"])
        better = self.best - figure if self.mode == "min" else figure - self.best
        if better > self.min_delta:
            self.best, self.best_epoch = figure, epoch
            if self.restore_best:
                places = model.places().values()
                self._kept = {(layer, name): layer.__dict__[name].copy() for layer, name in places}
        return epoch - self.best_epoch >= self.patience

    def progress(self) -> dict[str, Any]:
        show = self._model.engine.asnumpy
        kept = {path: show(self._kept[place]) for path, place in self._model.places().items() if place in self._kept}
        return {"best": self.best, "best_epoch": self.best_epoch} | kept

    def resume(self, progress: Mapping[str, Any]) -> None:
        self.best, self.best_epoch = progress["best"], progress["best_epoch"]
        own = self._model.engine.asarray
        self._kept = {place: own(progress[path]) for path, place in self._model.places().items() if path in progress}

    def end(self, model: Sequential) -> None:
        with model.turns:
            for layer, name in model.places().values():
                if (layer, name) in self._kept:
                    layer.__dict__[name][...] = self._kept[layer, name]
        del self._model, self._kept


def better_of(monitor: str) -> str:
    """Which is better, as the name of a figure says."""
    for mode, endings in (("min", ("loss", "error", "deviance")), ("max", ("accuracy", "score", "auc"))):
        if monitor.endswith(endings) and "neg_" not in monitor:
            return mode
    raise ValueError(f"mode must be 'min' or 'max', because the name {monitor!r} does not say which is better")


def as_callbacks(value: Any, name: str = "callbacks") -> Sequence[Callback | EpochFunction]:
    """Check a sequence of callbacks; None is an empty one."""
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of fastbp Callbacks or functions, got {value!r}")
    for callback in value:
        if isinstance(callback, type) or not (isinstance(callback, Callback) or callable(callback)):
            raise TypeError(f"{name} must hold fastbp Callbacks or functions, got {callback!r}")
        if isinstance(callback, Schedule):
            raise TypeError(f"{name} cannot hold a schedule, which an optimizer takes as schedule=: got {callback!r}")
    return value


@contextlib.contextmanager
def told(
    callbacks: Sequence[Callback | EpochFunction] | None, model: Sequential, figures: tuple[str, ...]
) -> Iterator[list[EpochFunction]]:
    """Tell callbacks of begin and end; gives what to call after each epoch."""
    callbacks = as_callbacks(callbacks)
    with contextlib.ExitStack() as ends:
        for callback in callbacks:
            if isinstance(callback, Callback):
                callback.begin(model, figures)
                ends.callback(callback.end, model)
        yield [callback.epoch if isinstance(callback, Callback) else callback for callback in callbacks]


def tell(listeners: Sequence[EpochFunction], model: Sequential, figures: dict[str, float]) -> bool:
    """Tell all of an epoch; whether one of them ends training."""
    answers = [listener(model, figures) for listener in listeners]
    return any(isinstance(answer, bool | np.bool_) and bool(answer) for answer in answers)
