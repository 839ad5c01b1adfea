"""Losses and their gradients as loops, for Numba to compile; see `numba_layers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from .numba_copies import by_columns, room, transpose, transposed
from .numba_math import FAST, divide, exp, exp_of, exp_shifted, largest, log, log1p, log_of, sign
from .numba_narrow import is_narrow
from .numba_vectors import INDEX, INT, VECTOR_BYTES, Number, Vectors
from .ops import Array

WIDE = 96  # classes from which vectors run along them,
TOGETHER = 128  # and else along so many rows at a time


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
            weight, share = real(weights[i] * scale), q_sum / sums[i]
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
        weight, sums = real(weights[i] * scale), real(0)
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
        rate, log_rate, slope = np.exp(y), y, np.exp(y) - t
    else:
        rate, log_rate, slope = y, np.log(y + small), 1 - t / (y + small)
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
    return inverse(weight, mean)


@njit(**FAST)
def softmax_cross_entropy_of(z: Array, t: Array, total: Array, dz: Array, scratch: Array) -> None:
    """z and dz may be the same."""
    total[1] += len(t)
    if z.shape[1] < WIDE and len(t) >= VECTOR_BYTES // z.itemsize:
        for start in range(0, len(t), TOGETHER):
            stop = min(start + TOGETHER, len(t))
            zt, _ = by_columns(scratch, stop - start, z.shape[1])
            transpose(z[start:stop], zt)
            total[0] += losses_by_class(zt, t[start:stop], len(t))
            transpose(zt, dz[start:stop])
        return
    for i in range(len(t)):
        row, top = dz[i], largest(z[i])
        target = z[i, t[i]] - top
        sum_exp = exp_shifted(z[i], top, row)
        total[0] += np.log(sum_exp) - target
        divide(row, sum_exp * len(t))
        row[t[i]] -= 1 / len(t)


@njit(**FAST)
def cross_entropy_by_class(zt: Array, t: Array, total: Array) -> None:
    """Softmax cross-entropy of logits that lie class by class, whose gradient takes their place; see `by_columns`."""
    total[0] += losses_by_class(zt, t, len(t))
    total[1] += len(t)


@intrinsic
def losses_by_class(typing_context: Any, zt: Any, t: Any, batch: Any) -> Any:
    """The sum of the losses, of some rows of a batch; vectors run along the rows."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, zt.dtype)
        (classes, _), at = v.matrix(zt, args[0])
        labels = make_array(t)(context, builder, args[1])
        (rows,), zero, one = cgutils.unpack_tuple(builder, labels.shape, 1), v.index(0), v.index(1)
        label_type, wide = ir.VectorType(INDEX, v.lanes), ir.VectorType(ir.DoubleType(), v.lanes)
        losses = cgutils.alloca_once_value(builder, ir.Constant(wide, [0.0] * v.lanes))
        top, sums, target = (cgutils.alloca_once(builder, v.type) for _ in range(3))

        def number(x: Any) -> Number:
            return Number(builder, x)

        def block(i: Any, lanes: Any = None) -> None:
            address = builder.ptrtoint(builder.gep(labels.data, [i]), INDEX)
            label = builder.trunc(v.load(address, lanes, label_type), ir.VectorType(INT, v.lanes))

            def is_target(c: Any) -> Number:
                return number(label).equals(number(v.splat(builder.trunc(c, INT))))

            builder.store(v.load(at(zero, i)), top)
            with v.each(one, classes, 1) as (c, _):
                z, best = number(v.load(at(c, i))), number(builder.load(top))
                builder.store((z < best).choose(best, z).value, top)
            builder.store(v.zero, sums)
            builder.store(v.zero, target)
            with v.each(zero, classes, 1) as (c, _):
                z = number(v.load(at(c, i))) - number(builder.load(top))
                e = exp_of(z)
                v.store(e.value, at(c, i))
                builder.store((number(builder.load(sums)) + e).value, sums)
                builder.store(is_target(c).choose(z, number(builder.load(target))).value, target)
            total = number(builder.load(sums))
            loss = (log_of(total) - number(builder.load(target))).value
            if lanes is not None:
                loss = builder.select(lanes.mask, loss, v.zero)
            builder.store(
                builder.fadd(builder.load(losses), builder.fpext(loss, wide) if v.size == 4 else loss), losses
            )
            share = number(v.one) / number(v.splat(builder.sitofp(args[2], v.element)))
            scale = share / total
            with v.each(zero, classes, 1) as (c, _):
                gradient = number(v.load(at(c, i))) * scale
                v.store((gradient - is_target(c).choose(share, 0.0)).value, at(c, i))

        whole = v.up_to(zero, rows, v.lanes)
        with v.each(zero, whole, v.lanes) as (i, _):
            block(i)
        with builder.if_then(builder.icmp_signed("<", whole, rows)):
            block(whole, v.first(builder.sub(rows, whole)))
        result = ir.Constant(ir.DoubleType(), 0.0)
        for lane in range(v.lanes):
            result = builder.fadd(result, builder.extract_element(builder.load(losses), ir.Constant(INT, lane)))
        return result

    return types.float64(zt, t, batch), codegen


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
    if is_narrow(*z.shape):
        zt, _ = transposed(z, scratch)
        largest_by_class(zt, top)
        exp_by_class(zt, top, sums)
        transpose(zt, e)
    else:
        for i in range(len(z)):
            top[i] = largest(z[i])
            sums[i] = exp_shifted(z[i], top[i], e[i])
