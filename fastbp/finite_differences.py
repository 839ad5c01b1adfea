"""Whether a layer's or loss's backward pass is the derivative of its forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from .boundary import as_number
from .kernels.engine import real_array
from .kernels.ops import Array
from .layers import Layer
from .losses import Loss

__all__ = ["GradientError", "gradcheck"]

#: A gradient by its name, the array that it belongs to, and the number that is differentiated.
Comparison: TypeAlias = "tuple[str, Array | None, Array, Callable[[], float]]"


class GradientError(AssertionError):
    """A gradient that `gradcheck` found wrong."""


def gradcheck(
    part: Layer | Loss,
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    inputs: bool = True,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
) -> bool:
    """Compare gradients with central differences, number by number, in float64.

    Of a layer those by its inputs, returned and stored, and by all its parameters, layers inside it included, for a
    weighted sum of its outputs; of a loss that by its outputs, and what `Loss.penalize` adds to those of weights. The
    part itself stays as it is; random numbers and running statistics are
    the same in each call.

    Parameters
    ----------
    part : Layer or Loss
    x : array, shape (batch, features)
        A layer's inputs, or the outputs that a loss judges. A few rows do: there are two calls for each number in `x`
        and in the parameters. At kinks, such as 0 for a ReLU, there is no derivative; keep away from them by more
        than `eps`.
    y : array, optional
        Targets, for a loss alone.
    sample_weight : array, shape (batch,), optional
        For a loss alone.
    inputs : bool, default True
        False where `x` cannot be moved, such as the codes of an `Embedding`.
    eps : float, default 1e-6
        How far each number is moved.
    atol, rtol : float, default 1e-5, 1e-3
        A gradient may be off by ``atol + rtol * abs(difference)``.

    Returns
    -------
    bool
        True.

    Raises
    ------
    GradientError
        For a gradient that is missing, has another shape, or is wrong; it says which, where, and by how much.
    TypeError
        Where a layer's `forward` returns nothing, or parameters have no shapes or values.
    ValueError
        Where `y` is given with a layer, or lacks with a loss.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> fastbp.gradcheck(fastbp.Dense(3, 2), np.random.default_rng(0).standard_normal((4, 3)))
    True
    >>> class Doubled(fastbp.MeanSquaredError):
    ...     def gradient(self, outputs, targets, weights, total):
    ...         gradient = super().gradient(outputs, targets, weights, total)
    ...         return self.engine.add(gradient, gradient)
    >>> fastbp.gradcheck(Doubled(), np.ones((1, 2)), np.zeros((1, 2)))
    Traceback (most recent call last):
    ...
    fastbp.finite_differences.GradientError: Doubled(): the gradient by outputs is 2 at (0, 0), by differences it is 1
    """
    eps, atol, rtol = as_number(eps, "eps", above=0), as_number(atol, "atol"), as_number(rtol, "rtol")
    x = np.array(real_array(x), np.float64)
    if isinstance(part, Loss):
        if y is None:
            raise ValueError("y must hold a loss's targets, got None")
        comparisons = _of_loss(copy.deepcopy(part), x, y, sample_weight)
    elif isinstance(part, Layer):
        if y is not None or sample_weight is not None:
            raise ValueError(f"y and sample_weight are for losses, {part!r} is a layer")
        comparisons = _of_layer(_in_float64(part), x, inputs)
    else:
        raise TypeError(f"part must be a fastbp Layer or Loss, got {part!r}")
    for name, gradient, array, function in comparisons:
        if gradient is None or gradient.shape != array.shape:
            found = "missing" if gradient is None else f"of shape {gradient.shape}"
            raise GradientError(f"{part!r}: {name} is {found}, it should have shape {array.shape}")
        differences = _differences(function, array, eps)
        with np.errstate(invalid="ignore"):
            off = np.abs(gradient - differences)
            wrong = ~(off <= atol + rtol * np.abs(differences))
        if wrong.any():
            place = tuple(
                map(int, np.unravel_index(np.where(wrong, np.nan_to_num(off, nan=np.inf), -1).argmax(), off.shape))
            )
            raise GradientError(
                f"{part!r}: {name} is {gradient[place]:.6g} at {place}, by differences it is {differences[place]:.6g}"
            )
    return True


def _of_loss(loss: Loss, x: Array, y: Any, sample_weight: Any) -> list[Comparison]:
    def value() -> float:
        return float(np.sum(loss.engine.asnumpy(loss.forward(x, y, sample_weight))))

    value()
    by_outputs = _numbers(loss, loss.backward())
    if type(loss).penalize is Loss.penalize:
        return [("the gradient by outputs", by_outputs, x, value)]

    targets, row_weights = loss.targets(y, x.shape[0], x.shape[1], sample_weight)
    weights = np.random.default_rng(0).uniform(0.5, 1.5, 5)
    slopes = loss.engine.zeros(weights.shape, np.float64)

    def penalized(slopes: Array | None = None) -> float:
        total = loss.engine.zeros((2,), np.float64)
        loss.gradient(loss.engine.asarray(x), targets, row_weights, total)
        slopes = loss.engine.zeros(weights.shape, np.float64) if slopes is None else slopes
        loss.penalize(len(x), loss.engine.asarray(weights.copy()), slopes, total)
        return loss.value(total)

    penalized(slopes)
    by_weights = _numbers(loss, slopes)
    return [("the gradient by outputs", by_outputs, x, value), ("penalize's gradient", by_weights, weights, penalized)]


def _of_layer(layer: Layer, x: Array, inputs: bool) -> list[Comparison]:
    state = {(inner, name): inner.__dict__[name] for _, inner in layer.walk() for name in inner.state}

    def output() -> Array:
        for (inner, name), array in state.items():
            inner.__dict__[name] = array.copy()  # the same random numbers again
        outputs: Any = layer.forward(layer.engine.asarray(x.copy()))
        if outputs is None:
            raise TypeError(f"{layer!r}: forward must return its output, got None")
        return layer.engine.asnumpy(outputs)

    weights = np.random.default_rng(0).uniform(0.5, 1.5, output().shape)

    def value() -> float:
        return float((output() * weights).sum())

    dinputs = layer.backward(layer.engine.asarray(weights.copy()))  # which a wrong one may change
    comparisons: list[Comparison] = []
    if inputs:
        comparisons = [("dinputs", _numbers(layer, dinputs), x, value)]
        if "dinputs" in layer.__dict__ and layer.dinputs is not dinputs:
            comparisons.append(("dinputs as stored", _numbers(layer, layer.dinputs), x, value))
    for path, inner in layer.walk():
        for name in inner.shapes():
            gradient = _numbers(inner, inner.__dict__.get(f"d{name}"))
            comparisons.append((f"{path}d{name}", gradient, inner.__dict__[name], value))
    return comparisons


def _in_float64(layer: Layer) -> Layer:
    """A copy whose parameters are in float64, drawn where there are none."""
    layer = copy.deepcopy(layer)
    layer.draw(np.random.default_rng(0))
    for _, inner in layer.walk():
        inner.check_drawn()
        for name in inner.parameters():
            inner.__dict__[name] = inner.engine.asarray(inner.__dict__[name], np.float64).copy()
    return layer


def _numbers(part: Layer | Loss, gradient: Any) -> Array | None:
    return None if gradient is None else np.array(part.engine.asnumpy(gradient))


def _differences(function: Callable[[], float], x: Array, eps: float) -> Array:
    """The derivative of a function's value by `x`, which it sees change in place."""
    differences = np.empty(x.shape)
    for place in np.ndindex(x.shape):
        kept = float(x[place])
        x[place] = kept + eps
        above = function()
        x[place] = kept - eps
        differences[place] = (above - function()) / (2 * eps)
        x[place] = kept
    return differences
