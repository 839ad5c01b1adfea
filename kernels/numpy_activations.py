"""Activations in the shortest correct NumPy; see `numpy_layers`."""

from __future__ import annotations

import numpy as np

from .normal import PER_T, SHIFT, tail_series
from .ops import Array

GELU, CUBIC = 2 * np.sqrt(2 / np.pi), 0.044715


def relu_forward(x: Array, y: Array) -> None:
    np.maximum(x, 0, out=y)


def relu_backward(dy: Array, y: Array, dx: Array, scratch: Array) -> None:
    # by bits, because a copy through a mask takes 20 times as long: all of them set where y > 0, or NaN
    keep = np.less_equal(y, 0, out=scratch.view(bool)[: y.size].reshape(y.shape)).view(np.int8)
    keep -= 1
    whole = np.int32 if dx.itemsize == 4 else np.int64
    np.bitwise_and(dy.view(whole), keep, out=dx.view(whole))


def leaky_relu_forward(x: Array, negative_slope: Array, y: Array, scratch: Array) -> None:
    np.multiply(x, x.dtype.type(negative_slope[0]), out=y)
    np.copyto(y, x, where=positive(x, scratch))


def leaky_relu_backward(dy: Array, y: Array, negative_slope: Array, dx: Array, scratch: Array) -> None:
    np.multiply(dy, y.dtype.type(negative_slope[0]), out=dx)
    np.copyto(dx, dy, where=positive(y, scratch))


def elu_forward(x: Array, alpha: Array, y: Array, scratch: Array) -> None:
    np.minimum(x, 0, out=y)
    np.expm1(y, out=y)
    y *= x.dtype.type(alpha[0])
    np.copyto(y, x, where=positive(x, scratch))


def elu_backward(dy: Array, y: Array, alpha: Array, dx: Array, scratch: Array) -> None:
    np.add(y, y.dtype.type(alpha[0]), out=dx)
    dx *= dy
    np.copyto(dx, dy, where=positive(y, scratch))


def tanh_forward(x: Array, y: Array) -> None:
    np.tanh(x, out=y)


def tanh_backward(dy: Array, y: Array, dx: Array, scratch: Array) -> None:
    (slope,) = like(y, scratch, 1)
    np.subtract(1, y, out=slope)
    np.add(1, y, out=dx)
    dx *= slope
    dx *= dy


def sigmoid_forward(x: Array, y: Array) -> None:
    np.negative(x, out=y)
    np.exp(y, out=y)
    y += 1
    np.reciprocal(y, out=y)


def sigmoid_backward(dy: Array, y: Array, dx: Array) -> None:
    np.subtract(1, y, out=dx)
    dx *= y
    dx *= dy


def gelu_forward(x: Array, y: Array, scratch: Array) -> None:
    # Hendrycks and Gimpel, 2016
    normal_cdf(x, y, scratch)
    y *= x


def gelu_backward(dy: Array, x: Array, dx: Array, scratch: Array) -> None:
    normal_cdf(x, dx, scratch)
    (density,) = like(x, scratch, 1)
    np.multiply(x, x, out=density)
    density *= -0.5
    np.exp(density, out=density)
    density *= x
    density *= x.dtype.type(1 / np.sqrt(2 * np.pi))
    dx += density
    dx *= dy


def gelu_tanh_forward(x: Array, y: Array, scratch: Array) -> None:
    # (1 + tanh(u)) / 2 = sigmoid(2 * u)
    (u,) = like(x, scratch, 1)
    np.multiply(x, x, out=u)
    u *= CUBIC
    u += 1
    u *= x
    u *= GELU
    sigmoid_forward(u, y)
    y *= x


def gelu_tanh_backward(dy: Array, x: Array, dx: Array, scratch: Array) -> None:
    u, share, squares = like(x, scratch, 3)
    np.multiply(x, x, out=squares)
    np.multiply(squares, CUBIC, out=u)
    u += 1
    u *= x
    u *= GELU
    sigmoid_forward(u, share)
    np.negative(u, out=u)
    sigmoid_forward(u, dx)
    squares *= 3 * CUBIC
    squares += 1
    squares *= GELU
    dx *= x
    dx *= squares
    dx += 1
    dx *= share
    dx *= dy


def silu_forward(x: Array, y: Array) -> None:
    # Elfwing et al., 2018
    sigmoid_forward(x, y)
    y *= x


def silu_backward(dy: Array, x: Array, dx: Array, scratch: Array) -> None:
    share, other = like(x, scratch, 2)
    sigmoid_forward(x, share)
    np.negative(x, out=dx)
    sigmoid_forward(dx, other)
    np.multiply(other, x, out=dx)
    dx += 1
    dx *= share
    dx *= dy


def softplus_forward(x: Array, beta: Array, threshold: Array, y: Array, scratch: Array) -> None:
    np.multiply(x, x.dtype.type(beta[0]), out=y)
    beyond = positive(y, scratch, threshold[0])
    np.logaddexp(0, y, out=y)
    y /= x.dtype.type(beta[0])
    np.copyto(y, x, where=beyond)


def softplus_backward(dy: Array, x: Array, beta: Array, threshold: Array, dx: Array, scratch: Array) -> None:
    np.multiply(x, x.dtype.type(beta[0]), out=dx)
    beyond = positive(dx, scratch, threshold[0])
    sigmoid_forward(dx, dx)
    dx *= dy
    np.copyto(dx, dy, where=beyond)


def like(x: Array, scratch: Array, n: int) -> Array:
    """Room for `n` arrays such as x, at the start of the scratch."""
    return scratch[: n * x.size].reshape(n, *x.shape)


def positive(x: Array, scratch: Array, than: float = 0.0) -> Array:
    """Where x is larger."""
    return np.greater(x, x.dtype.type(than), out=scratch.view(bool)[: x.size].reshape(x.shape))


def normal_cdf(x: Array, p: Array, scratch: Array) -> None:
    t, above = like(x, scratch, 2)
    np.abs(x, out=t)
    np.divide(4, np.add(t, 4, out=t), out=t)
    t *= PER_T
    t -= SHIFT
    p[...] = 0
    for term in tail_series(10 if x.itemsize == 4 else 18):
        p *= t
        p += term
    np.multiply(x, x, out=t)
    t *= -0.5
    p *= np.exp(t, out=t)
    np.subtract(1, p, out=above)
    np.copyto(p, above, where=positive(x, scratch))
