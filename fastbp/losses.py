"""Losses: `forward` gives the mean over a batch, `backward` its gradient by the outputs."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from .boundary import as_labels, as_values
from .kernels.engine import Engine
from .kernels.ops import Array
from .part import Part
from .selection import engine as choose_engine

__all__ = ["CategoricalCrossEntropy", "Loss", "MeanSquaredError", "SoftmaxCrossEntropy"]


class Loss(Part):
    """What training makes small.

    A subclass computes with ops alone, in `gradient`; the same method serves for a call at once and for a recording.
    """

    #: Whether targets are class labels; otherwise they are numbers, shaped as the outputs.
    classifies = True
    reduction = "mean"
    dinputs: Array

    def __init__(self, *, engine: str | Engine | None = None) -> None:
        self.engine = choose_engine(engine)

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        """The gradient of the loss by `outputs`; adds the loss to `total`, as the two numbers that `value` divides.

        Parameters
        ----------
        outputs : array, shape (batch, width)
        targets : array, shape (batch,) of int64 or (batch, width)
            What `targets` made of a user's labels or numbers.
        weights : array, shape (batch,), or None
            How much each row counts; None where all count 1.
        total : array, shape (2,) of float64
        """
        raise NotImplementedError

    def penalize(self, rows: int, parameters: Array, gradients: Array, total: Array) -> None:
        """Add what this loss makes of the weights themselves, after the backward pass of each step; by default nothing.

        Parameters
        ----------
        rows : int
            The batch's.
        parameters, gradients : array, shape (decayed size,)
            All weights to which decay applies, flat, and their gradients, to be changed in place.
        total : array, shape (2,) of float64
            As in `gradient`.
        """

    def value(self, total: Array) -> float:
        """The loss, from what `gradient` added up."""
        numerator, denominator = self.engine.asnumpy(total)
        return float(numerator / denominator) if denominator else 0.0

    def forward(self, outputs: Array, y: Array) -> float:
        """Compute the mean loss of a batch.

        Parameters
        ----------
        outputs : array, shape (batch, classes or outputs)
            The last layer's output.
        y : array
            Labels of shape (batch,), integers from 0, or one-hot rows of shape (batch, classes); for a regression
            numbers in the shape of `outputs`.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            Where `y` has another length or shape, or labels that are fractional or out of range.
        """
        outputs = self.engine.asarray(outputs)
        if outputs.ndim != 2:
            raise ValueError(f"outputs must have shape (batch, classes), got {outputs.shape}")
        targets, weights = self.targets(y, *outputs.shape)
        total = self.engine.zeros((2,), np.float64)
        self.dinputs = self.gradient(outputs, targets, weights, total)
        return self.value(total)

    def backward(self) -> Array:
        """Return the gradient of the last `forward`'s mean loss by `outputs`; also kept as `dinputs`."""
        if "dinputs" not in self.__dict__:
            raise AttributeError(f"{self!r} has no gradient yet: call forward(outputs, y) first")
        return self.dinputs

    def targets(
        self, y: Any, rows: int, width: int, sample_weight: Any = None, name: str = "y", dtype: Any = np.float64
    ) -> tuple[Array, Array | None]:
        """Check `y` and `sample_weight` against outputs of shape (rows, width); returns what `gradient` takes."""
        if self.classifies:
            return as_labels(y, rows, width, name), None
        return as_values(y, rows, width, name, dtype), None

    @classmethod
    def stored(cls) -> tuple[str, ...]:
        return "dinputs", "costs"

    def decide(self, outputs: Array) -> Array:
        """Predictions from the last layer's outputs: labels, or the outputs themselves."""
        return outputs.argmax(axis=1) if self.classifies else outputs

    def decide_targets(self, targets: Array) -> Array:
        """What `decide` should give."""
        return targets.argmax(axis=1) if self.classifies and targets.ndim == 2 else targets

    def with_class_weight(self, class_weight: Any) -> Self:
        """A twin of this loss with class weights in place of its own."""
        raise ValueError(f"{self!r} takes no class_weight")

    def probabilities(self, outputs: Array) -> Array:
        """Class probabilities from the last layer's output."""
        raise ValueError(f"{self!r} is a loss for numbers: its model has no probabilities")


class SoftmaxCrossEntropy(Loss):
    """Softmax and cross-entropy in one, on logits: the loss from log-sum-exp, the gradient ``(p - target) / batch``.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> loss = fastbp.SoftmaxCrossEntropy()
    >>> round(loss.forward(np.array([[0.0, 0.0]]), np.array([1])), 6)
    0.693147
    >>> loss.backward()
    array([[ 0.5, -0.5]])
    """

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        gradient: Array = self.engine.softmax_cross_entropy(outputs, targets, total)
        return gradient

    def probabilities(self, outputs: Array) -> Array:
        probabilities: Array = self.engine.softmax_forward(outputs)
        return probabilities


class CategoricalCrossEntropy(Loss):
    """Cross-entropy on probabilities, such as a `Softmax` layer gives: the mean of ``-log p[target]``.

    Probabilities are clipped to [1e-7, 1 - 1e-7] for the loss. On logits, `SoftmaxCrossEntropy` is faster and exact.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> loss = fastbp.CategoricalCrossEntropy()
    >>> round(loss.forward(np.array([[0.25, 0.75]]), np.array([0])), 6)
    1.386294
    >>> loss.backward()
    array([[-4.,  0.]])
    """

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        self.costs = self.engine.cross_entropy_forward(outputs, targets, total)
        gradient: Array = self.engine.cross_entropy_backward(outputs, targets)
        return gradient

    def probabilities(self, outputs: Array) -> Array:
        return outputs


class MeanSquaredError(Loss):
    """The mean over all elements of ``(output - target) ** 2``.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> loss = fastbp.MeanSquaredError()
    >>> loss.forward(np.array([[3.0], [1.0]]), np.array([[1.0], [1.0]]))
    2.0
    >>> loss.backward()
    array([[2.],
           [0.]])
    """

    classifies = False

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        gradient: Array = self.engine.mean_squared_error(outputs, targets, total)
        return gradient
