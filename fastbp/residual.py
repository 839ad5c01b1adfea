"""Layers around which the input goes unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .boundary import as_tuple
from .kernels.engine import Engine
from .kernels.ops import Array
from .layers import Layer

__all__ = ["Residual"]


class Residual(Layer):
    """Some layers, to whose output the input is added: ``output = x + block(x)`` (He et al., 2016).

    Parameters
    ----------
    layers : Layer or sequence of Layer
        Their output has as many features as their input.
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> block = fastbp.Residual(fastbp.Dense(2, 2))
    >>> block.layers[0].weights = [[1.0, 0.0], [0.0, -1.0]]
    >>> block.forward(np.array([[3.0, 4.0]]))
    array([[6., 0.]])
    >>> block.backward(np.array([[1.0, 1.0]]))
    array([[2., 0.]])
    """

    def __init__(self, layers: Layer | Sequence[Layer], *, engine: str | Engine | None = None) -> None:
        super().__init__(engine=engine)
        self.layers = (layers,) if isinstance(layers, Layer) else as_tuple(layers, "layers", "layers")
        if not self.layers or not all(isinstance(layer, Layer) for layer in self.layers):
            raise TypeError(f"layers must be a sequence of at least one layer, got {layers!r}")
        self.features = next((layer.features for layer in self.layers if layer.features is not None), None)
        if self.features is not None:
            self.width(self.features)
        for _, layer in self.walk():
            layer.engine = self.engine

    def forward(self, x: Array) -> Array:
        self.inputs = outputs = self.read(x, self.features)
        for layer in self.layers:
            outputs = layer.forward(outputs)
        self.output = self.engine.add(self.inputs, outputs)
        return self.output

    def backward(self, dvalues: Array) -> Array:
        dvalues = gradient = self.read_gradient(dvalues)
        for layer in reversed(self.layers):
            gradient = layer.backward(gradient)
        self.dinputs = self.engine.add(dvalues, gradient)
        return self.dinputs

    def draw(self, rng: np.random.Generator, *, before_relu: bool = True) -> None:
        for layer, following in zip(self.layers, (*self.layers[1:], None), strict=True):
            layer.draw(rng, before_relu=before_relu if following is None else following.rectifies)

    def width(self, features: int) -> int:
        width = features
        for layer in self.layers:
            width = layer.width(width)
        if width != features:
            raise ValueError(f"{self!r} adds its input of {features} features to its layers' output of {width}")
        return width

    def forget(self) -> None:
        super().forget()
        for layer in self.layers:
            layer.forget()

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in super().settings().items() if name != "layers"}

    def config(self) -> dict[str, Any]:
        return {"layers": list(self.layers)}
