"""Losses: `forward` gives the loss of a batch, `backward` its gradient; those for numbers, and what all share."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import numpy as np

from .boundary import as_array, as_choice, as_flag, as_number, as_values, as_weights
from .kernels.engine import Engine, real_array
from .kernels.ops import Array
from .part import Part, Setting
from .selection import engine as choose_engine

__all__ = ["BinaryCrossEntropy", "Huber", "Loss", "MeanAbsoluteError", "MeanSquaredError", "Poisson"]


class Loss(Part):
    """What training makes small.

    A subclass computes with ops alone, in `gradient`; the same method serves for a call at once and for a recording.
    Arrays named in `state` move to the engine of the model that the loss was last given to.

    `config` returns the arguments of the constructor, for files: `reduction`, and what a subclass adds to
    ``super().config()``.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}, default "mean"
        What `forward` gives: the mean, where each row counts as often as its weight says; the sum; or, as an array,
        the losses of rows or elements. `backward` gives the gradient of the mean, or else of the sum.
    engine : str or Engine, optional

    Examples
    --------
    The mean of the squared and the absolute error:

    >>> import numpy as np, fastbp
    >>> class Both(fastbp.Loss):
    ...     def gradient(self, outputs, targets, weights, total):
    ...         squared = self.elementwise("mean_squared_error", outputs, targets, weights, total)
    ...         absolute = self.elementwise("mean_absolute_error", outputs, targets, weights, total)
    ...         return self.engine.scale(self.engine.add(squared, absolute), self.engine.scalar(0.5))
    >>> loss = Both()
    >>> loss.forward(np.array([[3.0], [1.0]]), np.array([[1.0], [1.0]]))
    1.5
    >>> fastbp.gradcheck(loss, np.array([[3.0], [1.0]]), np.array([[1.0], [2.0]]))
    True
    """

    #: Whether there are classes to predict.
    classifies = False
    reduction = Setting(partial(as_choice, choices=("mean", "sum", "none")), default="mean")
    dinputs: Array
    costs: Array

    def __init__(self, *, reduction: str = "mean", engine: str | Engine | None = None) -> None:
        self.engine = choose_engine(engine)
        self.reduction = reduction

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        """The gradient of the loss by `outputs`; adds the loss to `total`, as the two numbers that `value` divides.

        Stores in `costs` what `forward` returns where `reduction` is "none".

        Parameters
        ----------
        outputs : array, shape (batch, width)
        targets : array, shape (batch,) of int64 or (batch, width)
            What `targets` made of a user's labels or numbers.
        weights : array, shape (batch,), or None
            How much each row counts; None where all count 1.
        total : array, shape (2,) of float64

        Returns
        -------
        array, shape (batch, width)
        """
        raise NotImplementedError(f"{type(self).__name__} must define gradient(outputs, targets, weights, total)")

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
        if self.reduction != "mean":
            return float(numerator)
        return float(numerator / denominator) if denominator else 0.0

    def forward(self, outputs: Array, y: Array, sample_weight: Any = None) -> Any:
        """Compute the loss of a batch.

        Parameters
        ----------
        outputs : array, shape (batch, classes or outputs)
            The last layer's output.
        y : array
            For classes labels of shape (batch,), integers from 0, or rows of shape (batch, classes), one-hot or
            probabilities; for numbers an array in the shape of `outputs`.
        sample_weight : array, shape (batch,), optional
            How often each row counts, at least 0.

        Returns
        -------
        float, or array where `reduction` is "none"

        Raises
        ------
        ValueError
            Where `y` or `sample_weight` has another length or shape, or what is not allowed in it.
        """
        outputs = as_array(outputs, "outputs", self.engine)
        if outputs.ndim != 2 or 0 in outputs.shape:
            raise ValueError(f"outputs must have shape (batch, classes), got {outputs.shape}")
        rows, width = outputs.shape
        targets, weights = self.targets(y, rows, width, sample_weight)
        total = self.engine.zeros((2,), np.float64)
        self.dinputs = self.gradient(outputs, targets, weights, total)
        return self.costs if self.reduction == "none" else self.value(total)

    def backward(self) -> Array:
        """Return the gradient of the last `forward`'s loss by `outputs`; also kept as `dinputs`."""
        if "dinputs" not in self.__dict__:
            raise AttributeError(f"{self!r} has no gradient yet: call forward(outputs, y) first")
        return self.dinputs

    def targets(
        self, y: Any, rows: int, width: int, sample_weight: Any = None, name: str = "y", dtype: Any = np.float64
    ) -> tuple[Array, Array | None]:
        """Check `y` and `sample_weight` against outputs of shape (rows, width); returns what `gradient` takes."""
        weights = as_weights(sample_weight, rows, f"{name.removesuffix('y')}sample_weight")
        return as_values(y, rows, width, name, dtype), weights

    @classmethod
    def stored(cls) -> tuple[str, ...]:
        return "dinputs", "costs"

    def decide(self, outputs: Array) -> Array:
        """Predictions from the last layer's outputs, both as NumPy arrays: labels, or numbers in the units of `y`."""
        return outputs

    def decide_targets(self, targets: Array) -> Array:
        """What `decide` should give."""
        return targets

    def with_class_weight(self, class_weight: Any) -> Self:
        """A twin of this loss with class weights in place of its own."""
        raise ValueError(f"{self!r} takes no class_weight")

    def probabilities(self, outputs: Array) -> Array:
        """Class probabilities from the last layer's output."""
        raise ValueError(f"{self!r} is a loss for numbers: its model has no probabilities")

    def elementwise(
        self, op: str, outputs: Array, targets: Array, weights: Array | None, total: Array, *settings: Array
    ) -> Array:
        """`gradient` by an op that takes outputs, targets, rows' weights, settings, whether for a mean, and `total`."""
        weights = self.row_weights(weights, outputs.shape[0])
        mean = self.engine.scalar(self.reduction == "mean")
        self.costs, gradient = getattr(self.engine, op)(outputs, targets, weights, *settings, mean, total)
        return gradient

    def row_weights(self, weights: Array | None, rows: int) -> Array:
        """The weights, 1 where there are none."""
        return self.engine.vector(np.ones(rows)) if weights is None else weights


class MeanSquaredError(Loss):
    """The mean over all elements of ``(output - target) ** 2``.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}, default "mean"
        See `Loss`.
    engine : str or Engine, optional

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

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        return self.elementwise("mean_squared_error", outputs, targets, weights, total)


class MeanAbsoluteError(Loss):
    """The mean over all elements of ``abs(output - target)``, whose gradient is 0 where both are equal.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}, default "mean"
        See `Loss`.
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> loss = fastbp.MeanAbsoluteError()
    >>> loss.forward(np.array([[3.0], [1.0]]), np.array([[1.0], [2.0]]))
    1.5
    >>> loss.backward()
    array([[ 0.5],
           [-0.5]])
    """

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        return self.elementwise("mean_absolute_error", outputs, targets, weights, total)


class Huber(Loss):
    """The mean of ``e**2 / 2`` for errors up to `delta`, and of ``delta * (abs(e) - delta / 2)`` beyond.

    Huber, 1964: outliers pull with no more than `delta`.

    Parameters
    ----------
    delta : float, default 1.0
        Above 0.
    reduction : {"mean", "sum", "none"}, default "mean"
        See `Loss`.
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> loss = fastbp.Huber()
    >>> loss.forward(np.array([[3.0], [1.0]]), np.array([[1.0], [0.5]]))
    0.8125
    >>> loss.backward()
    array([[0.5 ],
           [0.25]])
    """

    delta = Setting(partial(as_number, above=0), default=1.0)

    def __init__(self, delta: float = 1.0, *, reduction: str = "mean", engine: str | Engine | None = None) -> None:
        super().__init__(reduction=reduction, engine=engine)
        self.delta = delta

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        return self.elementwise("huber", outputs, targets, weights, total, self.engine.scalar(self.delta))


class Poisson(Loss):
    """For counts: the mean of ``exp(output) - target * output``, or of ``output - target * log(output + 1e-8)``.

    The negative log-likelihood but for what does not depend on the output, as ``torch.nn.PoissonNLLLoss`` has it.

    Parameters
    ----------
    log_input : bool, default True
        Whether outputs are logarithms of rates, as a last `Dense` layer gives them. `Sequential.predict` gives rates.
    reduction : {"mean", "sum", "none"}, default "mean"
        See `Loss`.
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> loss = fastbp.Poisson()
    >>> loss.forward(np.array([[0.0], [0.0]]), np.array([[1.0], [3.0]]))
    1.0
    >>> loss.backward()
    array([[ 0.],
           [-1.]])
    """

    log_input = Setting(as_flag, default=True)

    def __init__(self, log_input: bool = True, *, reduction: str = "mean", engine: str | Engine | None = None) -> None:
        super().__init__(reduction=reduction, engine=engine)
        self.log_input = log_input

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        return self.elementwise("poisson", outputs, targets, weights, total, self.engine.scalar(self.log_input))

    def targets(
        self, y: Any, rows: int, width: int, sample_weight: Any = None, name: str = "y", dtype: Any = np.float64
    ) -> tuple[Array, Array | None]:
        targets, weights = super().targets(y, rows, width, sample_weight, name, dtype)
        if (targets < 0).any():
            raise ValueError(f"{name} must hold counts, at least 0, got {targets.min()}")
        return targets, weights

    def decide(self, outputs: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.exp(outputs) if self.log_input else outputs


class BinaryCrossEntropy(Loss):
    """For each output a yes or no of its own: the mean of ``log(1 + exp(-output))`` for yes, of ``output`` for no.

    On logits, as ``torch.nn.BCEWithLogitsLoss``: the mean is over all elements. One output makes a binary classifier,
    several a multi-label one.

    Parameters
    ----------
    pos_weight : float or array, shape (outputs,), optional
        What the cost of a yes is multiplied by, at least 0.
    reduction : {"mean", "sum", "none"}, default "mean"
        See `Loss`.
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> loss = fastbp.BinaryCrossEntropy()
    >>> round(loss.forward(np.array([[0.0, 0.0]]), np.array([[1, 0]])), 6)
    0.693147
    >>> loss.backward()
    array([[-0.25,  0.25]])
    """

    classifies = True
    pos_weight = Setting(lambda value, name: _pos_weight(value, name), default=None)

    def __init__(self, pos_weight: Any = None, *, reduction: str = "mean", engine: str | Engine | None = None) -> None:
        super().__init__(reduction=reduction, engine=engine)
        self.pos_weight = pos_weight

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        yes: Any = 1.0 if self.pos_weight is None else self.pos_weight
        pos_weight = self.engine.scalar(*np.broadcast_to(yes, (outputs.shape[1],)))
        return self.elementwise("binary_cross_entropy", outputs, targets, weights, total, pos_weight)

    def targets(
        self, y: Any, rows: int, width: int, sample_weight: Any = None, name: str = "y", dtype: Any = np.float64
    ) -> tuple[Array, Array | None]:
        if isinstance(self.pos_weight, tuple) and len(self.pos_weight) != width:
            raise ValueError(f"pos_weight must hold {width} numbers, one for each output, got {len(self.pos_weight)}")
        targets, weights = super().targets(y, rows, width, sample_weight, name, dtype)
        if not (0 <= targets.min() <= targets.max() <= 1):
            raise ValueError(f"{name} must hold numbers from 0 to 1, got {targets.min()} to {targets.max()}")
        return targets, weights

    def decide(self, outputs: Array) -> Array:
        return (outputs > 0).astype(np.int64)

    def decide_targets(self, targets: Array) -> Array:
        return (targets > 0.5).astype(np.int64)

    def probabilities(self, outputs: Array) -> Array:
        return self.engine.sigmoid_forward(outputs)


def _pos_weight(value: Any, name: str) -> float | tuple[float, ...] | None:
    if value is None or isinstance(value, int | float | np.number):
        return None if value is None else as_number(value, name)
    return tuple(as_number(number, name) for number in real_array(value, name).ravel())
