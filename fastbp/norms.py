"""Layers that shift and scale their input to mean 0 and variance 1."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import numpy as np

from .boundary import as_count, as_number
from .kernels.engine import Engine
from .kernels.ops import Array
from .layers import Layer, Parameter
from .part import Setting

__all__ = ["BatchNorm", "LayerNorm"]


class Norm(Layer):
    """``output = normal * weights + biases``, with ``normal = (x - mean) / sqrt(variance + eps)``."""

    weights = Parameter(decay=False)
    biases = Parameter(decay=False)
    dweights: Array
    dbiases: Array
    normal: Array
    scale: Array

    eps = Setting(partial(as_number, above=0.0), default=1e-5)
    features: int

    def __init__(self, features: int, eps: float, engine: str | Engine | None) -> None:
        super().__init__(engine=engine)
        self.features = as_count(features, "features")
        self.eps = eps

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weights": (1, self.features), "biases": (1, self.features)}

    def draw(self, rng: np.random.Generator, *, before_relu: bool = True) -> None:
        for name, value in (("weights", 1.0), ("biases", 0.0)):
            if name not in self.__dict__:
                setattr(self, name, np.full((1, self.features), value))

    def config(self) -> dict[str, Any]:
        return {"features": self.features} | super().config()

    @classmethod
    @functools.cache
    def stored(cls) -> tuple[str, ...]:
        return *super().stored(), "normal", "scale"


class LayerNorm(Norm):
    """Give each row mean 0 and variance 1, then scale and shift each feature (Ba et al., 2016).

    ``output = (x - mean) / sqrt(variance + eps) * weights + biases``, with the mean and the variance (divided by the
    number of features) of each row: the same in training and for prediction, and independent of the batch.

    Parameters
    ----------
    features : int
        Of the input, and of the output.
    eps : float, default 1e-5
        Keeps the division finite; above 0.
    engine : str or Engine, optional

    Attributes
    ----------
    weights, biases : array, shape (1, features)
        At first 1 and 0. Weight decay does not apply to them.
    dweights, dbiases : array
        Their gradients, of the same shapes, after `backward`.
    normal : array, shape (batch, features)
        What is scaled and shifted, after `forward`.

    Raises
    ------
    ValueError
        For `features` below 1, or `eps` that is not above 0.

    Notes
    -----
    The mean, and the differences from it, are computed in float64. Values and names are those of
    `torch.nn.LayerNorm`, but for the shape of `weights` and `biases`.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> layer = fastbp.LayerNorm(2)
    >>> layer.weights = [[1.0, 10.0]]
    >>> layer.forward(np.array([[3.0, 5.0], [100.0, 0.0]])).round(3)
    array([[ -1.,  10.],
           [  1., -10.]])
    """

    def __init__(self, features: int, eps: float = 1e-5, *, engine: str | Engine | None = None) -> None:
        super().__init__(features, eps, engine)

    def forward(self, x: Array) -> Array:
        self.inputs = self.read(x, self.features)
        self.output, self.normal, self.scale = self.engine.layer_norm_forward(
            self.inputs, self.weights, self.biases, self.engine.scalar(self.eps)
        )
        return self.output

    def backward(self, dvalues: Array) -> Array:
        self.dinputs, self.dweights, self.dbiases = self.engine.layer_norm_backward(
            self.read_gradient(dvalues), self.weights, self.normal, self.scale
        )
        return self.dinputs


class BatchNorm(Norm):
    """Give each feature mean 0 and variance 1 over the batch, then scale and shift it (Ioffe and Szegedy, 2015).

    ``output = (x - mean) / sqrt(variance + eps) * weights + biases``. In training the mean and the variance (divided by
    the number of rows) are the batch's; `predict` and `evaluate`, and a layer that is not `trainable`, take
    `running_mean` and `running_var`, which each batch in training moves:
    ``running = (1 - momentum) * running + momentum * batch's``.

    Parameters
    ----------
    features : int
        Of the input, and of the output.
    eps : float, default 1e-5
        Keeps the division finite; above 0.
    momentum : float, default 0.1
        From 0, never moving, to 1, the last batch's.
    engine : str or Engine, optional

    Attributes
    ----------
    weights, biases : array, shape (1, features)
        At first 1 and 0. Weight decay does not apply to them.
    dweights, dbiases : array
        Their gradients, of the same shapes, after `backward`.
    running_mean, running_var : array of float64, shape (features,)
        At first 0 and 1; the variance is divided by the number of rows - 1.
    normal : array, shape (batch, features)
        What is scaled and shifted, after `forward`.

    Raises
    ------
    ValueError
        For `features` below 1, `eps` that is not above 0, or `momentum` outside of [0, 1].

    Notes
    -----
    A batch of a single row has no variance: its output is `biases`, its gradient by `x` 0, and the running statistics
    stay (torch raises an error). So the last, short batch of an epoch does no harm, but with ``batch_size=1`` only
    `biases` learn.

    `forward` of a layer, or of a model, is a training pass and moves the running statistics; set ``training = False``
    on a layer to see what it does in `predict`. Frozen layers (``trainable = False``) do not change at all.

    Statistics, and the differences from a mean, are computed in float64. Values and names are otherwise those of
    `torch.nn.BatchNorm1d`, but for the shape of `weights` and `biases`.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> layer = fastbp.BatchNorm(2)
    >>> layer.forward(np.array([[3.0, 100.0], [5.0, 0.0]])).round(3)
    array([[-1.,  1.],
           [ 1., -1.]])
    >>> layer.running_mean
    array([0.4, 5. ])
    """

    state = ("running_mean", "running_var")
    running_mean: Array
    running_var: Array

    momentum = Setting(partial(as_number, most=1), default=0.1)

    def __init__(
        self, features: int, eps: float = 1e-5, momentum: float = 0.1, *, engine: str | Engine | None = None
    ) -> None:
        super().__init__(features, eps, engine)
        self.momentum = momentum
        self.running_mean = self.engine.zeros((self.features,), np.float64)
        self.running_var = self.engine.zeros((self.features,), np.float64)
        self.running_var[...] = 1

    @property
    def by_batch(self) -> bool:
        """Whether statistics are the batch's, not the running ones."""
        return self.training and self.trainable

    def forward(self, x: Array) -> Array:
        self.inputs = self.read(x, self.features)
        running = self.running_mean, self.running_var
        mean, var = (
            self.engine.batch_statistics(self.inputs, self.engine.scalar(self.momentum), *running)
            if self.by_batch
            else running
        )
        self.output, self.normal, self.scale = self.engine.batch_norm_forward(
            self.inputs, self.weights, self.biases, mean, var, self.engine.scalar(self.eps)
        )
        return self.output

    def backward(self, dvalues: Array) -> Array:
        self.dinputs, self.dweights, self.dbiases = self.engine.batch_norm_backward(
            self.read_gradient(dvalues), self.weights, self.normal, self.scale, self.engine.scalar(self.by_batch)
        )
        return self.dinputs
