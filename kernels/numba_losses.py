"""Losses and their gradients as loops, for Numba to compile; see `numba_layers`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .numba_math import FAST, divide, exp, exp_shifted, largest, log, log1p, sign
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


def soft_softmax_cross_entropy(
    z: Array,
    t: Array,
    weights: Array,
    class_weight: Array,
    smoothing: Array,
    mean: Array,
    total: Array,
    cost: Array,
    dz: Array,
    scratch: Array,
) -> None:
    real, classes = z.dtype.type, z.shape[1]
    keep, even = real(1 - smoothing[0]), real(smoothing[0] / classes)
    scale = weigh_targets(t, weights, class_weight, mean, total)
    vectors, rest = room(scratch, 2, len(z))
    top, sums = vectors[0], vectors[1]
    exp_of_rows(z, dz, top, sums, rest)
    for i in range(len(z)):
        q_sum, linear = real(0), real(0)
        for c in range(classes):
            q = (keep * real(target(t, i, c)) + even) * real(class_weight[c])
            q_sum += q
            linear += q * (z[i, c] - top[i]) if q != 0 else real(0)
        if weights[i] != 0 and q_sum != 0:
            cost[i] = weights[i] * (q_sum * log(sums[i]) - linear)
            weight, share = weights[i] * scale, q_sum / sums[i]
            for c in range(classes):
                q = (keep * real(target(t, i, c)) + even) * real(class_weight[c])
                dz[i, c] = weight * (share * dz[i, c] - q)
        else:
            cost[i] = 0
            dz[i] = 0
        total[0] += cost[i]


weighted_softmax_cross_entropy = soft_softmax_cross_entropy  # for labels in place of rows


def soft_cross_entropy(
    p: Array,
    t: Array,
    weights: Array,
    class_weight: Array,
    smoothing: Array,
    mean: Array,
    total: Array,
    cost: Array,
    dp: Array,
) -> None:
    real, classes = p.dtype.type, p.shape[1]
    keep, even = real(1 - smoothing[0]), real(smoothing[0] / classes)
    low, high, tiny = real(1e-7), real(1 - 1e-7), np.finfo(p.dtype).tiny
    steepest = real(1) / tiny
    scale = weigh_targets(t, weights, class_weight, mean, total)
    for i in range(len(p)):
        weight, sums = weights[i] * scale, real(0)
        cost[i] = 0
        for c in range(classes):
            q = (keep * t[i, c] + even) * real(class_weight[c])
            clipped = low if p[i, c] < low else high if p[i, c] > high else p[i, c]
            dp[i, c] = 0
            if weights[i] != 0 and q != 0:
                sums -= q * np.log(clipped)
                slope = weight * q / (tiny if abs(p[i, c]) < tiny else abs(p[i, c]))
                # weights may take it beyond what the float type holds
                dp[i, c] = -steepest if abs(p[i, c]) < low and slope > steepest else -slope
        cost[i] = weights[i] * sums if weights[i] != 0 else real(0)
        total[0] += cost[i]


def one_hot(t: Array, p: Array, rows: Array) -> None:
    rows[:] = 0
    for i in range(len(t)):
        rows[i, t[i]] = 1


def mean_squared_error(y: Array, t: Array, weights: Array, mean: Array, total: Array, cost: Array, dy: Array) -> None:
    scale = weigh_elements(weights, y, mean, total)
    for i in range(len(y)):
        for j in range(y.shape[1]):
            error = y[i, j] - t[i, j]
            costs = np.float64(weights[i]) * error * error
            dy[i, j] = weights[i] * scale * 2 * error
            cost[i, j] = costs
            total[0] += costs


def mean_absolute_error(y: Array, t: Array, weights: Array, mean: Array, total: Array, cost: Array, dy: Array) -> None:
    scale = weigh_elements(weights, y, mean, total)
    for i in range(len(y)):
        for j in range(y.shape[1]):
            error = y[i, j] - t[i, j]
            costs = np.float64(weights[i]) * abs(error)
            dy[i, j] = weights[i] * scale * sign(error)
            cost[i, j] = costs
            total[0] += costs


def huber(y: Array, t: Array, weights: Array, delta: Array, mean: Array, total: Array, cost: Array, dy: Array) -> None:
    scale = weigh_elements(weights, y, mean, total)
    for i in range(len(y)):
        for j in range(y.shape[1]):
            # with the slope e up to delta, and +-delta beyond, both branches are slope * (e - slope / 2)
            error, end = np.float64(y[i, j] - t[i, j]), delta[0]
            slope = end if error > end else -end if error < -end else error
            costs = weights[i] * slope * (error - slope / 2)
            dy[i, j] = weights[i] * scale * slope
            cost[i, j] = costs
            total[0] += costs


def poisson(
    y: Array, t: Array, weights: Array, log_input: Array, mean: Array, total: Array, cost: Array, dy: Array
) -> None:
    scale, small = weigh_elements(weights, y, mean, total), y.dtype.type(1e-8)
    for i in range(len(y)):
        for j in range(y.shape[1]):
            if log_input[0]:
                rate, log_rate, slope = np.exp(y[i, j]), y[i, j], np.exp(y[i, j]) - t[i, j]
            else:
                rate, log_rate, slope = y[i, j], np.log(y[i, j] + small), 1 - t[i, j] / (y[i, j] + small)
            costs = np.float64(weights[i]) * (rate - t[i, j] * log_rate)
            dy[i, j] = weights[i] * scale * slope
            cost[i, j] = costs
            total[0] += costs


def binary_cross_entropy(
    y: Array, t: Array, weights: Array, pos_weight: Array, mean: Array, total: Array, cost: Array, dy: Array
) -> None:
    scale = weigh_elements(weights, y, mean, total)
    for i in range(len(y)):
        for j in range(y.shape[1]):
            z, real = y[i, j], y.dtype.type
            one, zeros, ones = real(1), real(1 - t[i, j]), real(pos_weight[j]) * t[i, j]
            e = exp(-abs(z))  # never above 1
            rest, far, near = log1p(e), one / (one + e), e / (one + e)
            # log(1 + exp(z)) where t is 0, log(1 + exp(-z)) where t is 1; the slope of the first is 1 / (1 + exp(-z))
            up, down, sigmoid, other = (rest + z, rest, far, near) if z > 0 else (rest, rest - z, near, far)
            costs = np.float64(weights[i]) * (zeros * up + ones * down)
            dy[i, j] = weights[i] * scale * (zeros * sigmoid - ones * other)
            cost[i, j] = costs
            total[0] += costs


@njit(**FAST)
def inverse(weight: Any, mean: Array) -> Any:
    """What gradients are multiplied by."""
    return 1.0 if mean[0] == 0 else 1 / weight if weight != 0 else 0.0


@njit(**FAST)
def weigh_elements(weights: Array, y: Array, mean: Array, total: Array) -> Any:
    """Add up the elements' weights; returns what gradients are multiplied by."""
    weight = 0.0
    for i in range(len(weights)):
        weight += weights[i]
    weight *= y.shape[1]
    total[1] += weight
    return y.dtype.type(inverse(weight, mean))


@njit(**FAST)
def target(t: Array, i: int, c: int) -> Any:
    """Whether, or how much, row i belongs to class c."""
    if t.ndim == 1:
        return t[i] == c
    else:
        return t[i, c]


@njit(**FAST)
def weigh_targets(t: Array, weights: Array, class_weight: Array, mean: Array, total: Array) -> Any:
    """Add up the rows' weights; returns what gradients are multiplied by."""
    weight = 0.0
    for i in range(len(t)):
        share = 0.0
        if t.ndim == 1:
            share = class_weight[t[i]]
        else:
            for c in range(len(class_weight)):
                share += class_weight[c] * t[i, c]
        weight += share * weights[i]
    total[1] += weight
    return weights.dtype.type(inverse(weight, mean))


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
    largest_by_class(zt, top)
    for i in range(batch):
        target[i] = zt[t[i], i] - top[i]
    exp_by_class(zt, top, sum_exp)
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


@njit(**FAST)
def largest_by_class(zt: Array, top: Array) -> None:
    for i in range(zt.shape[1]):
        top[i] = zt[0, i]
    for c in range(1, zt.shape[0]):
        for i in range(zt.shape[1]):
            top[i] = max(top[i], zt[c, i])


@njit(**FAST)
def exp_by_class(zt: Array, top: Array, sums: Array) -> None:
    for i in range(zt.shape[1]):
        sums[i] = 0
    for c in range(zt.shape[0]):
        for i in range(zt.shape[1]):
            zt[c, i] = exp(zt[c, i] - top[i])
            sums[i] += zt[c, i]


@njit(**FAST)
def exp_of_rows(z: Array, e: Array, top: Array, sums: Array, scratch: Array) -> None:
    """e = exp(z - top), for the largest number and the sum of each row."""
    if is_narrow(z):
        zt, _ = transposed(z, scratch)
        largest_by_class(zt, top)
        exp_by_class(zt, top, sums)
        transpose(zt, e)
    else:
        for i in range(len(z)):
            top[i] = largest(z[i])
            sums[i] = exp_shifted(z[i], e[i])
