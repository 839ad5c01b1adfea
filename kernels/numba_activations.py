"""Activations as plain loops, for Numba to compile to vector code; see `numba_layers`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .numba_math import FAST, exp, expm1, log1p, normal_cdf, sigmoid, tanh
from .ops import Array

GELU, CUBIC = 2 * np.sqrt(2 / np.pi), 0.044715


def relu_forward(x: Array, y: Array) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = 0 if x[i, j] <= 0 else x[i, j]  # the comparison lets NaN through


def relu_backward(dy: Array, y: Array, dx: Array) -> None:
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            dx[i, j] = 0 if y[i, j] <= 0 else dy[i, j]


def leaky_relu_forward(x: Array, negative_slope: Array, y: Array) -> None:
    slope = x.dtype.type(negative_slope[0])
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = x[i, j] if x[i, j] > 0 else slope * x[i, j]


def leaky_relu_backward(dy: Array, y: Array, negative_slope: Array, dx: Array) -> None:
    slope = y.dtype.type(negative_slope[0])
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            dx[i, j] = dy[i, j] if y[i, j] > 0 else slope * dy[i, j]


def elu_forward(x: Array, alpha: Array, y: Array) -> None:
    scale, zero = x.dtype.type(alpha[0]), x.dtype.type(0)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = x[i, j] if x[i, j] > 0 else scale * expm1(min(x[i, j], zero))


def elu_backward(dy: Array, y: Array, alpha: Array, dx: Array) -> None:
    scale = y.dtype.type(alpha[0])
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            dx[i, j] = dy[i, j] if y[i, j] > 0 else dy[i, j] * (y[i, j] + scale)


def tanh_forward(x: Array, y: Array) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = tanh(x[i, j])


def tanh_backward(dy: Array, y: Array, dx: Array) -> None:
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            dx[i, j] = dy[i, j] * ((1 - y[i, j]) * (1 + y[i, j]))


def sigmoid_forward(x: Array, y: Array) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = sigmoid(x[i, j])


def sigmoid_backward(dy: Array, y: Array, dx: Array) -> None:
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            dx[i, j] = dy[i, j] * (y[i, j] * (1 - y[i, j]))


def gelu_forward(x: Array, y: Array) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = x[i, j] * normal_cdf(x[i, j])


def gelu_backward(dy: Array, x: Array, dx: Array) -> None:
    scale, half = x.dtype.type(1 / np.sqrt(2 * np.pi)), x.dtype.type(-0.5)
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            density = scale * exp(x[i, j] * x[i, j] * half)  # as in `normal_cdf`, and computed once
            dx[i, j] = dy[i, j] * (normal_cdf(x[i, j]) + x[i, j] * density)


def gelu_tanh_forward(x: Array, y: Array) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = x[i, j] * sigmoid(bent(x[i, j]))


def gelu_tanh_backward(dy: Array, x: Array, dx: Array) -> None:
    scale, cubic = x.dtype.type(GELU), x.dtype.type(3 * CUBIC)
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            u, bend = bent(x[i, j]), scale * (1 + cubic * x[i, j] * x[i, j])
            dx[i, j] = dy[i, j] * sigmoid(u) * (1 + x[i, j] * sigmoid(-u) * bend)


def silu_forward(x: Array, y: Array) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = x[i, j] * sigmoid(x[i, j])


def silu_backward(dy: Array, x: Array, dx: Array) -> None:
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            dx[i, j] = dy[i, j] * sigmoid(x[i, j]) * (1 + x[i, j] * sigmoid(-x[i, j]))


def softplus_forward(x: Array, beta: Array, threshold: Array, y: Array) -> None:
    scale, end, zero = x.dtype.type(beta[0]), x.dtype.type(threshold[0]), x.dtype.type(0)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            u = scale * x[i, j]
            y[i, j] = x[i, j] if u > end else (max(u, zero) + log1p(exp(-abs(u)))) / scale


def softplus_backward(dy: Array, x: Array, beta: Array, threshold: Array, dx: Array) -> None:
    scale, end = x.dtype.type(beta[0]), x.dtype.type(threshold[0])
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            u = scale * x[i, j]
            dx[i, j] = dy[i, j] if u > end else dy[i, j] * sigmoid(u)


@njit(**FAST)
def bent(x: Any) -> Any:
    """u in GELU's approximation by x * sigmoid(u)."""
    real = type(x)
    return real(GELU) * (x * (1 + real(CUBIC) * x * x))
