"""The names of the teaching notebook, over fastbp's own layers.

``from fastbp.notebook import *`` stands in for the cells that define the classes; every other cell runs as it is. The
classes compute in float64 on the engine in force when they are made, draw from ``np.random``, and start weights at
0.01 times a normal number.

Examples
--------
>>> import numpy as np
>>> from fastbp.notebook import *
>>> cost = ActivationSoftmaxCost()
>>> cost.backward(np.array([[0.7, 0.1, 0.2], [0.1, 0.5, 0.4]]), np.array([0, 1]))
>>> cost.dinputs
array([[-0.15,  0.05,  0.1 ],
       [ 0.05, -0.25,  0.2 ]])
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import activations, data, layers
from .boundary import as_labels
from .kernels.engine import Engine
from .kernels.ops import Array
from .part import Part
from .selection import engine

__all__ = [
    "ActivationRelU",
    "ActivationSoftmax",
    "ActivationSoftmaxCost",
    "CategoricalCrossEntropy",
    "Cost",
    "LayerDense",
    "spiral_data",
]


def spiral_data(samples: int, classes: int) -> tuple[Array, Array]:
    """Points on spirals, drawn from ``np.random``; see `fastbp.spiral_data`."""
    return data.spiral_data(samples, classes, seed=np.random.default_rng(np.random.randint(2**31, size=4)))


class LayerDense(layers.Dense):
    """`fastbp.Dense` whose weights start at 0.01 times a normal number of ``np.random``."""

    def __init__(self, inputs: int, neurons: int) -> None:
        super().__init__(inputs, neurons)
        self.weights = 0.01 * np.random.randn(inputs, neurons)
        self.biases = np.zeros((1, neurons))


class ActivationRelU(activations.ReLU):
    """`fastbp.ReLU`, masked by its `inputs`."""

    def backward(self, dvalues: Array) -> Array:
        self.dinputs = self.engine.relu_backward(dvalues, self.inputs)
        return self.dinputs


class ActivationSoftmax(layers.Softmax):
    """`fastbp.Softmax`."""


class Cost(Part):
    """A loss whose `forward` gives the cost of each row, and `calculate` their mean."""

    def __init__(self) -> None:
        self.engine = engine()

    def forward(self, y_pred: Array, y_true: Array) -> Any:
        """The cost of each row."""
        raise NotImplementedError

    def calculate(self, output: Array, y: Array) -> float:
        """The mean of the rows' costs."""
        return float(np.mean(self.forward(output, y)))


class CategoricalCrossEntropy(Cost):
    """Cross-entropy on probabilities, row by row; see `fastbp.CategoricalCrossEntropy`."""

    def forward(self, y_pred: Array, y_true: Array) -> Any:
        probabilities, targets = _checked(self.engine, y_pred, y_true)
        return self.engine.cross_entropy_forward(probabilities, targets, self.engine.zeros((2,), np.float64))

    def backward(self, dvalues: Array, y_true: Array) -> Any:
        """Store in `dinputs` the gradient of the mean cost by the probabilities `dvalues`."""
        probabilities, targets = _checked(self.engine, dvalues, y_true)
        self.dinputs = self.engine.cross_entropy_backward(probabilities, targets)


class ActivationSoftmaxCost:
    """Softmax and cross-entropy in one."""

    def __init__(self) -> None:
        self.activation = ActivationSoftmax()
        self.cost = CategoricalCrossEntropy()

    def forward(self, inputs: Array, y_true: Array) -> float:
        """Store the probabilities in `output`, and return their mean cost."""
        self.output = self.activation.forward(inputs)
        return self.cost.calculate(self.output, y_true)

    def backward(self, dvalues: Array, y_true: Array) -> None:
        """Store in `dinputs` the gradient of the mean cost by the softmax's inputs.

        Parameters
        ----------
        dvalues : array, shape (batch, classes)
            The softmax's output.
        y_true : array
            Labels or one-hot rows.
        """
        probabilities, targets = _checked(self.activation.engine, dvalues, y_true)
        self.dinputs: Array = self.activation.engine.softmax_cross_entropy_backward(probabilities, targets)


def _checked(engine: Engine, probabilities: Any, y_true: Any) -> tuple[Array, Array]:
    array = engine.asarray(probabilities)
    rows, classes = array.shape
    targets, _ = as_labels(y_true, rows, classes, "y_true")
    if targets.ndim == 2:
        raise ValueError("y_true of two dimensions must hold one-hot rows: one 1 in each, otherwise 0")
    return array, targets
