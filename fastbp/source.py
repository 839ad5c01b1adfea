"""What `Sequential.fit` trains on, checked against the model as it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .boundary import as_samples
from .interop import dense_if_narrow
from .losses import Loss
from .network import Network
from .samples import Data
from .signatures import signature

__all__ = ["Source"]


class Source:
    """Data or batches, held out data, and the loss; whatever a callback may change is looked at anew.

    Parameters
    ----------
    model : Network
    X, y, sample_weight, class_weight, validation_data
        As in `Sequential.fit`.

    Attributes
    ----------
    data : Data or None
        What to train on; None where there are batches.
    held_out : Data or None
    held_out_is_weighted : bool
        Whether sample weights were given for it.
    """

    data: Data | None
    held_out: Data | None

    def __init__(
        self, model: Network, X: Any, y: Any, sample_weight: Any, class_weight: Any, validation_data: Any
    ) -> None:
        if y is None:
            if hasattr(X, "shape") or hasattr(X, "dtypes") or not (callable(X) or isinstance(X, Iterable)):
                raise ValueError("y must hold real numbers, got None; only batches, an iterable of (X, y), need no y")
            if sample_weight is not None or isinstance(class_weight, str):
                raise ValueError(
                    "with batches, sample_weight is each batch's third part, and class_weight has no 'balanced'"
                )
        self._model, self._given, self._class_weight = model, (X, y, sample_weight), class_weight
        self._held_out = None if validation_data is None else as_samples(validation_data, "validation_data")
        self.held_out_is_weighted = self._held_out is not None and self._held_out[2] is not None
        self._balanced: dict[int, float] | None = None
        self._checked_for: Any = None
        self._begun: tuple[Iterator[Data], int | None] | None = None
        self.look()

    def loss(self) -> Loss:
        """The model's, with the class weights of this call of `fit` where there are any."""
        balanced = isinstance(self._class_weight, str)
        return self._model.loss_with(self._balanced if balanced else self._class_weight)

    def look(self) -> None:
        """Check the data, unless they were checked for the same layers and loss."""
        model, (X, y, sample_weight) = self._model, self._given
        loss = self.loss()
        checked_for = model.layers, signature(loss)
        if checked_for == self._checked_for:
            return
        self.held_out = None if self._held_out is None else model.checked(*self._held_out, "validation_data: ")
        self.data = None if y is None else model.checked(X, y, sample_weight, loss=loss)
        if isinstance(self._class_weight, str) and self.data is not None:
            self._balanced = balanced(self._class_weight, self.data)
        self._checked_for = model.layers, signature(self.loss())

    def batches(self) -> tuple[Iterator[Data], int | None]:
        """An epoch's batches, and how many there are where that can be told."""
        if self._begun is not None:
            begun, self._begun = self._begun, None
            return begun
        X = self._given[0]
        batches = X() if callable(X) else X
        return self._checked(batches), len(batches) if hasattr(batches, "__len__") else None

    def sample(self, batch_size: int) -> tuple[Data, int | None]:
        """What a step takes its rows from, and how many; None where it takes all of them, a batch that comes alone."""
        if self.data is not None:
            return self.data, batch_size
        coming, count = self.batches()
        first = next(coming)
        self._begun = itertools.chain([first], coming), count  # the first epoch has it all the same
        return first, None

    def _checked(self, batches: Iterable[Any]) -> Iterator[Data]:
        place = -1
        for place, batch in enumerate(batches):
            X, y, weights = as_samples(batch, f"batch {place}")
            yield self._model.checked(dense_if_narrow(X), y, weights, f"batch {place}: ", self.loss())
        if place < 0:
            raise ValueError("there is no batch (left): pass a list, or a function that returns an iterator")


def balanced(class_weight: str, data: Data) -> dict[int, float]:
    """Class weights that make all classes count the same."""
    if class_weight != "balanced" or data.y.ndim != 1:
        raise ValueError(f"class_weight must be numbers, or 'balanced' with labels, got {class_weight!r}")
    counts = np.bincount(data.y, data.weights)
    labels = np.flatnonzero(counts)
    return {int(label): float(counts.sum() / (len(labels) * counts[label])) for label in labels}
