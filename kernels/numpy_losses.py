"""Losses and their gradients in the shortest correct NumPy; see `numpy_layers`."""

from __future__ import annotations

import numpy as np

from .ops import Array


def cross_entropy_forward(p: Array, t: Array, total: Array, cost: Array) -> None:
    np.negative(np.log(np.clip(p[np.arange(len(t)), t], 1e-7, 1 - 1e-7)), out=cost)
    total += cost.sum(dtype=np.float64), len(t)


def cross_entropy_backward(p: Array, t: Array, dp: Array) -> None:
    row = np.arange(len(t))
    dp[...] = 0
    # the smallest normal number keeps the gradient finite where a probability has underflowed to 0
    dp[row, t] = -1 / (np.maximum(p[row, t], np.finfo(p.dtype).tiny) * len(t))


def softmax_cross_entropy(z: Array, t: Array, total: Array, dz: Array, scratch: Array) -> None:
    row = np.arange(len(t))
    # class by class where there are few, because NumPy reduces few long rows faster than many short ones
    p = scratch[: z.size].reshape(z.shape[::-1]) if z.shape[1] < 32 else dz.T
    np.copyto(p, z.T)
    p -= p.max(axis=0)
    total[0] -= p[t, row].sum(dtype=np.float64)
    np.exp(p, out=p)
    sums = p.sum(axis=0)
    total += np.log(sums).sum(dtype=np.float64), len(t)
    sums *= len(t)
    p /= sums
    p[t, row] -= 1 / len(t)
    np.copyto(dz, p.T)


def softmax_cross_entropy_backward(p: Array, t: Array, dz: Array) -> None:
    np.copyto(dz, p)
    dz[np.arange(len(t)), t] -= 1
    dz /= len(t)


def mean_squared_error(y: Array, t: Array, total: Array, dy: Array, scratch: Array) -> None:
    np.subtract(y, t, out=dy)
    squares = scratch.view(np.float64)[: dy.size].reshape(dy.shape)
    total += np.square(dy, out=squares, dtype=np.float64).sum(), dy.size
    dy *= 2 / dy.size
