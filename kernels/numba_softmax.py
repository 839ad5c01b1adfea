"""Softmax, and the losses after it with their gradients, for Numba to compile; see `numba_layers`."""

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
from .numba_losses import weigh_targets
from .numba_math import FAST, divide, exp, exp_of, exp_shifted, largest, log, log_of
from .numba_vectors import INDEX, INT, VECTOR_BYTES, Number, Vectors
from .ops import Array

WIDE = 96  # classes from which vectors run along them,
TOGETHER = 128  # and else along so many rows at a time


def softmax_forward(z: Array, p: Array, scratch: Array) -> None:
    if has_few_classes(z):
        for start in range(0, len(z), TOGETHER):
            some = slice(start, start + TOGETHER)
            pt, _ = by_columns(scratch, len(z[some]), z.shape[1])
            transpose(z[some], pt)
            softmax_by_class(pt)
            transpose(pt, p[some])
    else:
        for i in range(len(z)):
            divide(p[i], exp_shifted(z[i], largest(z[i]), p[i]))


def softmax_jacobian(p: Array, j: Array) -> None:
    for i in range(p.shape[0]):
        for a in range(p.shape[1]):
            for b in range(p.shape[1]):
                j[i, a, b] = -p[i, a] * p[i, b]
            j[i, a, a] += p[i, a]


def softmax_backward(dp: Array, p: Array, dz: Array) -> None:
    for i in range(p.shape[0]):
        mean = p.dtype.type(0)
        for c in range(p.shape[1]):
            mean += p[i, c] * dp[i, c]
        for c in range(p.shape[1]):
            dz[i, c] = p[i, c] * (dp[i, c] - mean)


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
    scale, smooth = weigh_targets(t, weights, class_weight, mean, total), z.dtype.type(smoothing[0])
    if has_few_classes(z):
        for start in range(0, len(z), TOGETHER):
            some = slice(start, start + TOGETHER)
            soft_by_class(z[some], t[some], weights[some], class_weight, smooth, scale, cost[some], dz[some], scratch)
    else:
        soft_by_row(z, t, weights, class_weight, smooth, scale, cost, dz)
    for i in range(len(cost)):
        total[0] += cost[i]


weighted_softmax_cross_entropy = soft_softmax_cross_entropy  # for labels in place of rows


@njit(**FAST)
def has_few_classes(z: Array) -> Any:
    """Whether vectors run along the rows of logits, or else along each row."""
    return z.shape[1] < WIDE and len(z) >= VECTOR_BYTES // z.itemsize


@njit(**FAST)
def soft_by_row(
    z: Array,
    t: Array,
    weights: Array,
    class_weight: Array,
    smoothing: Any,
    scale: Any,
    cost: Array,
    dz: Array,
) -> None:
    real, classes = z.dtype.type, z.shape[1]
    for i in range(len(z)):
        top, wanted, linear = largest(z[i]), real(0), real(0)
        sums = exp_shifted(z[i], top, dz[i])
        for c in range(classes):
            q = target(t, i, c, smoothing, classes) * real(class_weight[c])
            wanted += q
            linear += q * (z[i, c] - top) if q != 0 else real(0)
        if weights[i] != 0 and wanted != 0:
            cost[i] = weights[i] * (wanted * log(sums) - linear)
            share, ratio = real(weights[i] * scale), wanted / sums
            for c in range(classes):
                q = target(t, i, c, smoothing, classes) * real(class_weight[c])
                dz[i, c] = share * (ratio * dz[i, c] - q)
        else:
            cost[i] = 0
            dz[i] = 0


@njit(**FAST)
def soft_by_class(
    z: Array,
    t: Array,
    weights: Array,
    class_weight: Array,
    smoothing: Any,
    scale: Any,
    cost: Array,
    dz: Array,
    scratch: Array,
) -> None:
    real, (rows, classes) = z.dtype.type, z.shape
    zt, rest = transposed(z, scratch)
    t, rest = targets_by_class(t, rest)
    vectors, _ = room(rest, 4, rows)
    wanted, linear, share, sums = vectors[0], vectors[1], vectors[2], vectors[3]
    shift_by_class(zt, sums)
    wanted[:] = 0
    linear[:] = 0
    for c in range(classes):
        weight = real(class_weight[c])
        for i in range(rows):
            q = target(t, i, c, smoothing, classes) * weight
            wanted[i] += q
            linear[i] += q * zt[c, i] if q != 0 else real(0)
    exp_by_class(zt, sums)
    for i in range(rows):
        counts = weights[i] != 0 and wanted[i] != 0
        cost[i] = weights[i] * (wanted[i] * log(sums[i]) - linear[i]) if counts else real(0)
        share[i] = weights[i] * scale if counts else 0.0
        sums[i] = wanted[i] / sums[i]
    for c in range(classes):
        weight = real(class_weight[c])
        for i in range(rows):
            slope = sums[i] * zt[c, i] - target(t, i, c, smoothing, classes) * weight
            zt[c, i] = share[i] * slope if share[i] != 0 else real(0)
    transpose(zt, dz)


@njit(forceinline=True, **FAST)
def target(t: Array, i: int, c: int, smoothing: Any, classes: int) -> Any:
    """Whether, or how much, row i shall belong to class c."""
    one = type(smoothing)(1)
    keep, even = one - smoothing, smoothing / type(smoothing)(classes)
    if t.ndim == 1:
        return keep + even if np.int32(t[i]) == np.int32(c) else even
    else:
        return keep * type(smoothing)(t[i, c]) + even


@njit(**FAST)
def targets_by_class(t: Array, scratch: Array) -> Any:
    """Labels as they are, or what looks like `t` but lies class by class, and what is left of the scratch."""
    if t.ndim == 1:
        return t, scratch
    else:
        tt, rest = transposed(t, scratch)
        return tt.T, rest


@njit(**FAST)
def shift_by_class(zt: Array, top: Array) -> None:
    """Subtracts the largest logit of each column, which goes to `top`."""
    for i in range(zt.shape[1]):
        top[i] = zt[0, i]
    for c in range(1, zt.shape[0]):
        for i in range(zt.shape[1]):
            top[i] = max(top[i], zt[c, i])
    for c in range(zt.shape[0]):
        for i in range(zt.shape[1]):
            zt[c, i] -= top[i]


@njit(**FAST)
def exp_by_class(zt: Array, sums: Array) -> None:
    """zt = exp(zt), and the sum of each column."""
    for i in range(zt.shape[1]):
        sums[i] = 0
    for c in range(zt.shape[0]):
        for i in range(zt.shape[1]):
            zt[c, i] = exp(zt[c, i])
            sums[i] += zt[c, i]


@njit(**FAST)
def softmax_cross_entropy_of(z: Array, t: Array, total: Array, dz: Array, scratch: Array) -> None:
    """z and dz may be the same."""
    total[1] += len(t)
    if has_few_classes(z):
        for start in range(0, len(z), TOGETHER):
            some = slice(start, start + TOGETHER)
            zt, _ = by_columns(scratch, len(z[some]), z.shape[1])
            transpose(z[some], zt)
            total[0] += losses_by_class(zt, t[some], len(t))
            transpose(zt, dz[some])
    else:
        for i in range(len(z)):
            row, top = dz[i], largest(z[i])
            wanted = z[i, t[i]] - top
            sum_exp = exp_shifted(z[i], top, row)
            total[0] += np.log(sum_exp) - wanted
            divide(row, sum_exp * len(t))
            row[t[i]] -= 1 / len(t)


@njit(**FAST)
def cross_entropy_by_class(zt: Array, t: Array, total: Array) -> None:
    """Softmax cross-entropy of logits that lie class by class, whose gradient takes their place; see `by_columns`."""
    total[0] += losses_by_class(zt, t, len(t))
    total[1] += len(t)


def exp_of_columns(
    v: Vectors, classes: Any, at: Any, i: Any, seen: Callable[[Any, Number], None] = lambda c, z: None
) -> Number:
    """exp(z - top) in place of z, in a vector of columns from i on, each with its own top; returns their sums."""
    builder, zero = v.builder, v.index(0)
    top, sums = cgutils.alloca_once(builder, v.type), cgutils.alloca_once(builder, v.type)

    def number(x: Any) -> Number:
        return Number(builder, x)

    builder.store(v.load(at(zero, i)), top)
    with v.each(v.index(1), classes, 1) as (c, _):
        z, best = number(v.load(at(c, i))), number(builder.load(top))
        builder.store((z < best).choose(best, z).value, top)
    builder.store(v.zero, sums)
    with v.each(zero, classes, 1) as (c, _):
        z = number(v.load(at(c, i))) - number(builder.load(top))
        e = exp_of(z)
        v.store(e.value, at(c, i))
        builder.store((number(builder.load(sums)) + e).value, sums)
        seen(c, z)
    return number(builder.load(sums))


@intrinsic
def softmax_by_class(typing_context: Any, zt: Any) -> Any:
    """Softmax of logits that lie class by class, in place; see `by_columns`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, zt.dtype)
        (classes, columns), at = v.matrix(zt, args[0])
        with v.each(v.index(0), columns, v.lanes) as (i, _):
            scale = Number(builder, v.one) / exp_of_columns(v, classes, at, i)
            with v.each(v.index(0), classes, 1) as (c, _):
                v.store((Number(builder, v.load(at(c, i))) * scale).value, at(c, i))
        return context.get_dummy_value()

    return types.none(zt), codegen


@intrinsic
def losses_by_class(typing_context: Any, zt: Any, t: Any, batch: Any) -> Any:
    """The sum of the losses, of some rows of a batch; vectors run along the rows."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, zt.dtype)
        (classes, _), at = v.matrix(zt, args[0])
        labels = make_array(t)(context, builder, args[1])
        (rows,), zero = cgutils.unpack_tuple(builder, labels.shape, 1), v.index(0)
        label_type, wide = ir.VectorType(INDEX, v.lanes), ir.VectorType(ir.DoubleType(), v.lanes)
        losses = cgutils.alloca_once_value(builder, ir.Constant(wide, [0.0] * v.lanes))
        target = cgutils.alloca_once(builder, v.type)

        def number(x: Any) -> Number:
            return Number(builder, x)

        def block(i: Any, lanes: Any = None) -> None:
            address = builder.ptrtoint(builder.gep(labels.data, [i]), INDEX)
            label = builder.trunc(v.load(address, lanes, label_type), ir.VectorType(INT, v.lanes))

            def is_target(c: Any) -> Number:
                return number(label).equals(number(v.splat(builder.trunc(c, INT))))

            def keep_target(c: Any, z: Number) -> None:
                builder.store(is_target(c).choose(z, number(builder.load(target))).value, target)

            builder.store(v.zero, target)
            total = exp_of_columns(v, classes, at, i, keep_target)
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
