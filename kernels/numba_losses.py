"""Losses and their gradients as loops, for Numba to compile; see `numba_layers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from .numba_math import FAST, exp, exp_any, log, log1p, log_any, sign
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
        weight, sums = real(weights[i] * scale), real(0)
        cost[i] = 0
        for c in range(classes):
            q = (keep * t[i, c] + even) * real(class_weight[c])
            clipped = low if p[i, c] < low else high if p[i, c] > high else p[i, c]
            dp[i, c] = 0
            if weights[i] != 0 and q != 0:
                sums -= q * log(clipped)
                slope = weight * q / (tiny if abs(p[i, c]) < tiny else abs(p[i, c]))
                # weights may take it beyond what the float type holds
                dp[i, c] = -steepest if abs(p[i, c]) < low and slope > steepest else -slope
        cost[i] = weights[i] * sums if weights[i] != 0 else real(0)
        total[0] += cost[i]


def one_hot(t: Array, p: Array, rows: Array) -> None:
    rows[:] = 0
    for i in range(len(t)):
        rows[i, t[i]] = 1


def by_element(loss: Callable[..., tuple[Any, Any]]) -> Any:
    """A loss of ``loss(y, t, settings, column)``, which gives an element's cost and its slope."""
    of_element = njit(forceinline=True, **FAST)(loss)

    @njit(forceinline=True, **FAST)
    def element(
        settings: Any, y: Array, t: Array, weight: Any, scale: float, cost: Array, dy: Array, i: int, j: int
    ) -> Any:
        costs, slope = of_element(y[i, j], t[i, j], settings, j)
        costs *= np.float64(weight)
        cost[i, j] = costs
        dy[i, j] = y.dtype.type(weight * scale) * slope
        return costs

    def elements(
        settings: Any, y: Array, t: Array, weights: Array, mean: Array, total: Array, cost: Array, dy: Array
    ) -> None:
        rows, columns = y.shape
        scale, costs = weigh_elements(weights, y, mean, total), 0.0
        if columns == 1:  # so that there is a long loop within, for vector code
            for i in range(rows):
                costs += element(settings, y, t, weights[i], scale, cost, dy, i, 0)
        else:
            for i in range(rows):
                weight = weights[i]
                for j in range(columns):
                    costs += element(settings, y, t, weight, scale, cost, dy, i, j)
        total[0] += costs

    elements.__qualname__ += loss.__name__  # by which compiled code is told apart
    return njit(**FAST)(elements)


@by_element
def squared(y: Any, t: Any, settings: Any, j: int) -> Any:
    error = y - t
    return np.float64(error) * error, 2 * error


@by_element
def absolute(y: Any, t: Any, settings: Any, j: int) -> Any:
    return np.float64(abs(y - t)), sign(y - t)


@by_element
def squared_up_to(y: Any, t: Any, delta: Array, j: int) -> Any:
    # with the slope e up to delta, and +-delta beyond, both branches are slope * (e - slope / 2)
    error, end = np.float64(y - t), delta[0]
    slope = end if error > end else -end if error < -end else error
    return slope * (error - slope / 2), slope


@by_element
def of_counts(y: Any, t: Any, log_input: Array, j: int) -> Any:
    small = type(y)(1e-8)
    if log_input[0]:
        rate, log_rate = exp_any(y), y
        slope = rate - t
    else:
        rate, log_rate, slope = y, log_any(y + small), 1 - t / (y + small)
    return np.float64(rate - t * log_rate), slope


@by_element
def of_yes_or_no(z: Any, t: Any, pos_weight: Array, j: int) -> Any:
    real = type(z)
    one, zeros, ones = real(1), real(1 - t), real(pos_weight[j]) * t
    e = exp(-abs(z))  # never above 1
    both, far = log1p(e), one / (one + e)
    # log(1 + exp(z)) where t is 0, log(1 + exp(-z)) where t is 1; the slope of the first is 1 / (1 + exp(-z))
    up, down = both + (z if z > 0 else real(0)), both - (z if z < 0 else real(0))
    sigmoid, other = far if z > 0 else e * far, e * far if z > 0 else far
    return np.float64(zeros * up + ones * down), zeros * sigmoid - ones * other


def mean_squared_error(y: Array, t: Array, weights: Array, mean: Array, total: Array, cost: Array, dy: Array) -> None:
    squared(None, y, t, weights, mean, total, cost, dy)


def mean_absolute_error(y: Array, t: Array, weights: Array, mean: Array, total: Array, cost: Array, dy: Array) -> None:
    absolute(None, y, t, weights, mean, total, cost, dy)


def huber(y: Array, t: Array, weights: Array, delta: Array, mean: Array, total: Array, cost: Array, dy: Array) -> None:
    squared_up_to(delta, y, t, weights, mean, total, cost, dy)


def poisson(
    y: Array, t: Array, weights: Array, log_input: Array, mean: Array, total: Array, cost: Array, dy: Array
) -> None:
    of_counts(log_input, y, t, weights, mean, total, cost, dy)


def binary_cross_entropy(
    y: Array, t: Array, weights: Array, pos_weight: Array, mean: Array, total: Array, cost: Array, dy: Array
) -> None:
    of_yes_or_no(pos_weight, y, t, weights, mean, total, cost, dy)


@njit(**FAST)
def inverse(weight: Any, mean: Array) -> Any:
    """What gradients are multiplied by; times a row's weight in float64, since small weights' overflows float32."""
    return 1.0 if mean[0] == 0 else 1 / weight if weight != 0 else 0.0


@njit(**FAST)
def weigh_elements(weights: Array, y: Array, mean: Array, total: Array) -> Any:
    """Add up the elements' weights; returns what gradients are multiplied by."""
    weight = 0.0
    for i in range(len(weights)):
        weight += weights[i]
    weight *= y.shape[1]
    total[1] += weight
    return inverse(weight, mean)


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
    return inverse(weight, mean)
