"""Checkpoints of `Sequential.fit`: a file from which training goes on as if it had never stopped."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .callbacks import Callback
from .files import describe, describe_value, explained, read, rebuild, schedule_of, write
from .kernels.engine import Engine
from .layers import Layer
from .network import Network
from .optim import Optimizer
from .part import Part, Setting
from .selection import engine as choose_engine

__all__ = ["Checkpoints"]


class Checkpoints:
    """A model file that also knows how far a call of `fit` has come.

    Parameters
    ----------
    model : Network
    path : path
    every : int
        Epochs from one to the next.
    callbacks : sequence
        Those of the call, in order; what their `progress` gives is kept, too.
    """

    def __init__(self, model: Network, path: str | Path, every: int, callbacks: Sequence[Any]) -> None:
        self._model, self._path, self._every = model, Path(path), every
        self._callbacks = [callback for callback in callbacks if isinstance(callback, Callback)]
        self._names = [type(callback).__name__ for callback in self._callbacks]
        describe(model)  # what a file cannot hold is said before training

    def epoch(self, done: int, of: int, *, over: bool) -> None:
        """Note that `done` epochs `of` all are done, and whether a callback ended training; write, if it is time."""
        if not over and done < of and done % self._every:
            return
        tensors, about = describe(self._model)
        told: list[dict[str, Any]] = []
        for place, callback in enumerate(self._callbacks):
            progress = callback.progress()
            arrays = {name: value for name, value in progress.items() if isinstance(value, np.ndarray)}
            told.append({name: value for name, value in progress.items() if name not in arrays})
            tensors |= {f"callbacks.{place}.{name}": array for name, array in arrays.items()}
        fit = {"done": done, "over": over, "names": self._names, "callbacks": told, "engine": self._model.engine.name}
        write(self._path, tensors, about | {"fit": fit})

    def resume(self) -> tuple[int, bool]:
        """Go back to where the file stands, if there is one; returns how many epochs are done, and if they are over.

        Raises
        ------
        ValueError
            Where the file is of another model, of other callbacks or no checkpoint; nothing has changed then.

        Notes
        -----
        What callbacks did to settings, and which layers they froze, comes back; the layers themselves, the kinds of
        loss and optimizer, what their constructors take besides settings, and the schedule must be those of the model
        as it was made.
        """
        if not self._path.exists():
            return 0, False
        about, tensors = read(self._path)
        fit = about.get("fit")
        if fit is None:
            raise ValueError(
                f"{self._path} must be a checkpoint of fit, but holds a model alone; "
                "name another file, or pass resume=False to replace it"
            )
        if not isinstance(fit, dict) or fit.get("names") != self._names:
            raise ValueError(
                f"{self._path} must be a checkpoint of fit with the callbacks {self._names}; "
                "remove it, or pass resume=False"
            )
        kinds = {type(part).__name__: type(part) for part in self._model.parts()}
        with explained(self._path):
            engine, done, over, told = self._engine(fit), int(fit["done"]), bool(fit["over"]), list(fit["callbacks"])
            then = rebuild(about, tensors, engine, kinds)
        for here, there in itertools.zip_longest(self._model.parts(), then.parts()):
            if type(here) is not type(there) or _made_of(here) != _made_of(there):
                raise ValueError(f"{self._path} is a checkpoint of another model: it has {there!r}, this one {here!r}")
        if then.dtype != self._model.dtype:
            raise ValueError(
                f"{self._path} is a checkpoint of a model in {then.dtype}, this one computes in {self._model.dtype}"
            )
        self._model.keep_to(engine)
        with self._model.turns:
            for here, there in zip(self._model.parts(), then.parts(), strict=True):
                _take_over(here, there)
        self._model.history, self._model.batches = then.history, then.batches
        self._model.set_random_state(about["random"])
        schedule_of(self._model).resume(about["schedule"])
        for place, (callback, progress) in enumerate(zip(self._callbacks, told, strict=True)):
            prefix = f"callbacks.{place}."
            arrays = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            callback.resume(progress | arrays)
        return done, over

    def _engine(self, about: dict[str, Any]) -> Engine:
        """The model's; where it was free to choose, the one that it had, because another gives other bits."""
        if self._model.chooses_engine:
            with contextlib.suppress(ValueError):  # it is not here
                return choose_engine(about.get("engine"))
        return self._model.engine


def _made_of(part: Any) -> Any:
    """What a part, or an argument of its constructor, is in each run: all but settings, which may change."""
    if isinstance(part, list | tuple):
        return [_made_of(item) for item in part]
    if not isinstance(part, Part):
        return describe_value(part)
    config = {
        name: _made_of(value)
        for name, value in part.config().items()
        if name not in ("init", "lr", "schedule") and name not in part.declared(Setting)
    }
    arrays = () if isinstance(part, Optimizer) else part.arrays()  # an optimizer's depend on what is frozen
    shapes = [getattr(part.__dict__.get(name), "shape", None) for name in arrays]
    return type(part).__name__, config, shapes


def _take_over(here: Part, there: Part) -> None:
    """Give a part the settings and arrays of another one of its kind; a schedule stays the object that it is."""
    for name in here.declared(Setting):
        setattr(here, name, getattr(there, name))
    if isinstance(here, Layer) and isinstance(there, Layer):
        if here.trainable != there.trainable:
            here.trainable = there.trainable
        here.training = there.training
    if isinstance(here, Optimizer) and isinstance(there, Optimizer):
        here.lr = there.lr
    for name in here.arrays():
        here.__dict__[name][...] = there.__dict__[name]
