"""Losses and their gradients as loops, for Numba to compile; see `numba_layers`."""

from __future__ import annotations

import numpy as np
from numba import njit

from .numba_math import FAST, divide, exp, exp_shifted, largest, log
from .numba_products import is_narrow, room, transpose, transposed
from .ops import Array


def cross_entropy_forward(p: Array, t: Array, total: Array, cost: Array) -> None:
    low, high = p.dtype.type(1e-7), p.dtype.type(1 - 1e-7)
    for i in range(len(t)):
        target = p[i, t[i]]
        cost[i] = -np.log(low if target < low else high if target > high else target)
        total[0] += cost[i]
    total[1] += len(t)


def cross_entropy_backward(p: Array, t: Array, dp: Array) -> None:
    # the smallest normal number keeps the gradient finite where a probability has underflowed to 0
    tiny = np.finfo(p.dtype).tiny
    dp[:] = 0
    for i in range(len(t)):
        target = p[i, t[i]]
        dp[i, t[i]] = -1 / ((tiny if target < tiny else target) * len(t))


def softmax_cross_entropy(z: Array, t: Array, total: Array, dz: Array, scratch: Array) -> None:
    softmax_cross_entropy_of(z, t, total, dz, scratch)


def softmax_cross_entropy_backward(p: Array, t: Array, dz: Array) -> None:
    scale = p.dtype.type(1 / len(t))
    for i in range(len(t)):
        for c in range(p.shape[1]):
            dz[i, c] = p[i, c] * scale
        dz[i, t[i]] -= scale


def mean_squared_error(y: Array, t: Array, total: Array, dy: Array) -> None:
    scale = y.dtype.type(2 / y.size)
    squares = 0.0
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            error = y[i, j] - t[i, j]
            squares += np.float64(error) * error
            dy[i, j] = scale * error
    total[0] += squares
    total[1] += y.size


@njit(**FAST)
def softmax_cross_entropy_of(z: Array, t: Array, total: Array, dz: Array, scratch: Array) -> None:
    """z and dz may be the same."""
    if is_narrow(z):
        zt, rest = transposed(z, scratch)
        cross_entropy_by_class(zt, t, total, rest)
        transpose(zt, dz)
        return
    for i in range(len(t)):
        row = dz[i]
        target = z[i, t[i]] - largest(z[i])
        sum_exp = exp_shifted(z[i], row)
        total[0] += np.log(sum_exp) - target
        divide(row, sum_exp * len(t))
        row[t[i]] -= 1 / len(t)
    total[1] += len(t)


@njit(**FAST)
def cross_entropy_by_class(zt: Array, t: Array, total: Array, scratch: Array) -> None:
    """Softmax cross-entropy of logits that lie class by class, so that vectors run along the batch.

    Leaves the gradient where the logits were.
    """
    classes, batch = zt.shape
    real = zt.dtype.type
    rows, _ = room(scratch, 3, batch)
    top, target, sum_exp = rows[0], rows[1], rows[2]
    for i in range(batch):
        top[i] = zt[0, i]
        sum_exp[i] = 0
    for c in range(1, classes):
        for i in range(batch):
            top[i] = max(top[i], zt[c, i])
    for i in range(batch):
        target[i] = zt[t[i], i] - top[i]
    for c in range(classes):
        for i in range(batch):
            zt[c, i] = exp(zt[c, i] - top[i])
            sum_exp[i] += zt[c, i]
    loss = 0.0
    for i in range(batch):
        loss += log(sum_exp[i]) - target[i]
        sum_exp[i] = real(1) / (sum_exp[i] * real(batch))
    for c in range(classes):
        for i in range(batch):
            zt[c, i] *= sum_exp[i]
    for i in range(batch):
        zt[t[i], i] -= real(1) / real(batch)
    total[0] += loss
    total[1] += batch
