"""What training changes, each kind of number in one piece of an engine's memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from .kernels.engine import Engine
from .kernels.ops import Array
from .layers import Layer

__all__ = ["Memory"]

ALIGNMENT = 256  # bytes, of each parameter


class Memory:
    """All parameters of some layers in one array, decayed before undecayed before frozen ones, and their gradients.

    The layers' parameters become views of it.

    Parameters
    ----------
    layers : iterable of Layer
    engine : Engine
    dtype : dtype
    before : Memory, optional
        Where these layers' parameters were; an epoch goes on with its counters.

    Attributes
    ----------
    parameters : array, shape (size,)
    gradients : array, shape (trained,)
        Of the parameters that are not frozen.
    cursor, step : array, shape (1,) of int64
        The next row of an epoch, and the next update of it.
    total : array, shape (2,) of float64
        The losses of an epoch, added up, and what their mean is divided by.
    seen, weight : array, shape (1,) of float64
        While gradients of several batches are added up: the denominators that have been counted, and those among them
        since the last update.
    """

    def __init__(
        self, layers: Iterable[Layer], engine: Engine, dtype: np.dtype[Any], before: Memory | None = None
    ) -> None:
        self._engine = engine
        named = [
            (layer, name, shape, layer.parameters()[name].decay)
            for layer in layers
            for name, shape in layer.shapes().items()
        ]
        step = ALIGNMENT // dtype.itemsize
        self._places: list[tuple[Layer, str, slice, tuple[int, ...]]] = []
        size = self._decayed = self._trained = 0
        for layer, name, shape, decay in sorted(named, key=lambda item: (not item[0].trainable, not item[3])):
            stop = size + math.prod(shape)
            self._places.append((layer, name, slice(size, stop), shape))
            size = -(-stop // step) * step
            self._trained = size if layer.trainable else self._trained
            self._decayed = size if layer.trainable and decay else self._decayed
        self.parameters = engine.zeros((size,), dtype)
        self.gradients = engine.zeros((self._trained,), dtype)
        counters = self._counters = engine.zeros((6,), np.float64)  # in one piece, because epochs set them to 0
        self.cursor, self.step = counters[:1].view(np.int64), counters[1:2].view(np.int64)
        self.total, self.seen, self.weight = counters[2:4], counters[4:5], counters[5:]
        if before is not None:
            for name in ("cursor", "step", "total", "seen"):
                getattr(self, name)[...] = engine.asarray(before._engine.asnumpy(getattr(before, name)))
        self._sums: Array | None = None
        for layer, name, where, shape in self._places:
            view = self.parameters[where].reshape(shape)
            view[...] = engine.asarray(layer.__dict__[name])
            layer.__dict__[name] = view

    @property
    def trained(self) -> Array:
        """The parameters that are not frozen, shape (trained,)."""
        return self.parameters[: self._trained]

    @property
    def decayed(self) -> tuple[Array, Array] | None:
        """The parameters to which weight decay applies, and their gradients; None where there are none."""
        return (self.parameters[: self._decayed], self.gradients[: self._decayed]) if self._decayed else None

    @property
    def sums(self) -> Array:
        """Where the gradients of several batches are added up, shape (trained,)."""
        if self._sums is None:
            self._sums = self._engine.zeros((self._trained,), self.gradients.dtype)
        return self._sums

    def gradients_of(self, layer: Layer) -> dict[str, Array]:
        """Where the gradients of a layer's parameters are written, by name and in their shapes."""
        return self.parts_of(layer, self.gradients)

    def parts_of(self, layer: Layer, array: Array) -> dict[str, Array]:
        """What belongs to a layer's parameters in an array of a number for each, such as an optimizer's moments."""
        if not layer.trainable:
            return {}
        return {name: array[where].reshape(shape) for owner, name, where, shape in self._places if owner is layer}

    def carried(self, array: Array, before: Memory) -> Array | None:
        """An array of a number for each trained parameter of an earlier memory, laid as this one's are.

        None where a parameter is trained that was not then.
        """
        old, new = (
            {(layer, name): where for layer, name, where, _ in memory._places if where.stop <= memory._trained}
            for memory in (before, self)
        )
        if not new.keys() <= old.keys():
            return None
        carried = self._engine.zeros((self._trained,), self.gradients.dtype)
        for place, where in new.items():
            carried[where] = array[old[place]]
        return carried

    def start_epoch(self) -> None:
        """Set all counters to 0."""
        self._counters[...] = 0
