"""The ops as plain loops and calls of `product`, for Numba to compile.

A function here is named as its op in `ops.OPS`; it takes the op's inputs, then its outputs, and writes the outputs.
`scratch` is room for what is in between: flat, of the float type, several times as long as any float argument.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .numba_math import FAST, exp, log, philox
from .numba_products import BLAS_FROM, VECTOR_BYTES, copy_row, narrow_product, product
from .ops import Array


def next_batch(order: Array, cursor: Array, rows: Array) -> None:
    for i in range(len(rows)):
        rows[i] = order[cursor[0] + i]
    cursor[0] += len(rows)


def take(x: Array, rows: Array, xb: Array) -> None:
    for i in range(len(rows)):
        copy_row(x, rows[i], xb, i)


def take_labels(t: Array, rows: Array, tb: Array) -> None:
    for i in range(len(rows)):
        tb[i] = t[rows[i]]


def dense_forward(x: Array, w: Array, b: Array, z: Array, scratch: Array) -> None:
    if is_narrow_product(x, w):
        zt, _ = narrow_forward(x, w, b, scratch)
        transpose(zt, z)
    else:
        product(x, w, z, bias=b)


def dense_input_grad(dz: Array, w: Array, dx: Array, scratch: Array) -> None:
    if is_small(dz, w.T):
        wt, _ = transposed(w, scratch)
        product(dz, wt, dx)
    else:
        product(dz, w.T, dx)


def dense_weight_grad(x: Array, dz: Array, dw: Array, scratch: Array) -> None:
    if is_narrow(dz):
        dwt, _ = room(scratch, dz.shape[1], x.shape[1])
        product(dz.T, x, dwt)
        transpose(dwt, dw)
    else:
        product(x.T, dz, dw)


def dense_bias_grad(dz: Array, db: Array) -> None:
    product(None, dz, db)


def relu_forward(x: Array, y: Array) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = 0 if x[i, j] <= 0 else x[i, j]  # the comparison lets NaN through


def relu_backward(dy: Array, y: Array, dx: Array) -> None:
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            dx[i, j] = 0 if y[i, j] <= 0 else dy[i, j]


def dense_relu_forward(x: Array, w: Array, b: Array, y: Array) -> None:
    product(x, w, y, bias=b, relu=True)


def dense_relu_input_grad(dz: Array, w: Array, y: Array, dx: Array, scratch: Array) -> None:
    if is_small(dz, w.T):
        wt, _ = transposed(w, scratch)
        product(dz, wt, dx, mask=y)
    else:
        product(dz, w.T, dx, mask=y)


def dense_relu_grads(dz: Array, w: Array, y: Array, dx: Array, db: Array, scratch: Array) -> None:
    db[:] = 0
    if is_small(dz, w.T):
        wt, _ = transposed(w, scratch)
        product(dz, wt, dx, mask=y, sums=db)
    else:
        product(dz, w.T, dx, mask=y, sums=db)


def dense_weight_sgd(x: Array, dz: Array, w: Array, lr: Array, scratch: Array) -> None:
    rate = w.dtype.type(lr[0])
    if is_narrow(dz):
        dwt, _ = room(scratch, dz.shape[1], x.shape[1])
        product(dz.T, x, dwt)
        for j in range(w.shape[1]):
            for i in range(w.shape[0]):
                w[i, j] -= rate * dwt[j, i]
    else:
        product(x.T, dz, w, rate=rate)


def dense_bias_sgd(dz: Array, b: Array, lr: Array) -> None:
    product(None, dz, b, rate=b.dtype.type(lr[0]))


def dense_softmax_cross_entropy(
    x: Array, w: Array, b: Array, t: Array, total: Array, dz: Array, scratch: Array
) -> None:
    if is_narrow_product(x, w):
        zt, rest = narrow_forward(x, w, b, scratch)
        cross_entropy_by_class(zt, t, total, rest)
        transpose(zt, dz)
    else:
        product(x, w, dz, bias=b)
        softmax_cross_entropy_of(dz, t, total, dz, scratch)


def classifier_grads(
    x: Array, w: Array, b: Array, t: Array, total: Array, dz: Array, dx: Array, db: Array, scratch: Array
) -> None:
    classifier(x, w, b, t, total, dz, dx, db, scratch)


def classifier_sgd(
    x: Array, w: Array, b: Array, t: Array, total: Array, lr: Array, dx: Array, db: Array, scratch: Array
) -> None:
    rate = w.dtype.type(lr[0])
    if is_narrow_product(x, w):
        db[:] = 0
        wt, rest = transposed(w, scratch)
        dzt, rest = room(rest, w.shape[1], x.shape[0])
        narrow_product(x, wt, b, dzt)
        cross_entropy_by_class(dzt, t, total, rest)
        product(dzt.T, wt, dx, mask=x, sums=db)
        dwt, _ = room(rest, w.shape[1], w.shape[0])
        product(dzt, x, dwt)
        for j in range(w.shape[1]):
            for i in range(w.shape[0]):
                w[i, j] -= rate * dwt[j, i]
            db_j = b.dtype.type(0)
            for i in range(x.shape[0]):
                db_j += dzt[j, i]
            b[0, j] -= rate * db_j
    else:
        dz, rest = room(scratch, x.shape[0], w.shape[1])
        classifier(x, w, b, t, total, dz, dx, db, rest)
        product(None, dz, b, rate=rate)
        product(x.T, dz, w, rate=rate)


def dropout_forward(x: Array, rate: Array, key: Array, y: Array, mask: Array) -> None:
    columns = x.shape[1]
    scale = 1 / (1 - rate[0]) if rate[0] < 1 else 0.0
    for start in range(0, x.size, 8):
        block = philox(key, np.uint64(start // 8 + 1))
        for k in range(start, min(start + 8, x.size)):
            i, j = k // columns, k % columns
            half = block[(k - start) // 2] >> np.uint64(32 * (k % 2))
            uniform = np.uint32(half) >> np.uint32(8)
            mask[i, j] = scale if uniform * 2.0**-24 >= rate[0] else 0
            y[i, j] = x[i, j] * mask[i, j]
    key[2] += np.uint64(1)


def dropout_backward(dy: Array, mask: Array, dx: Array) -> None:
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            dx[i, j] = dy[i, j] * mask[i, j]


def softmax_forward(z: Array, p: Array) -> None:
    for i in range(z.shape[0]):
        divide(p[i], exp_shifted(z[i], p[i]))


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


def sgd(p: Array, g: Array, lr: Array) -> None:
    rate = p.dtype.type(lr[0])
    for i in range(len(p)):
        p[i] -= rate * g[i]


def sgd_momentum(p: Array, velocity: Array, g: Array, lr: Array, momentum: Array, nesterov: Array) -> None:
    rate, mu = p.dtype.type(lr[0]), p.dtype.type(momentum[0])
    ahead = nesterov[0] != 0
    for i in range(len(p)):
        velocity[i] = mu * velocity[i] + g[i]
        p[i] -= rate * (g[i] + mu * velocity[i] if ahead else velocity[i])


def adam(p: Array, m: Array, v: Array, g: Array, lr: Array, betas: Array, eps: Array, steps: Array) -> None:
    # Kingma and Ba, 2015, algorithm 1
    real = p.dtype.type
    steps[0] += 1
    new1, new2, tiny = real(1 - betas[0]), real(1 - betas[1]), real(eps[0])
    rate = real(lr[0] / (1 - betas[0] ** steps[0]))
    unbias = real((1 - betas[1] ** steps[0]) ** -0.5)
    for i in range(len(p)):
        m[i] += new1 * (g[i] - m[i])
        v[i] += new2 * (g[i] * g[i] - v[i])
        p[i] -= rate * m[i] / (np.sqrt(v[i]) * unbias + tiny)


@njit(**FAST)
def is_narrow(x: Array) -> Any:
    """Whether x has so many rows and so few columns that vectors should not run along its columns."""
    lanes = VECTOR_BYTES // x.itemsize
    return x.shape[1] < lanes <= x.shape[0]


@njit(**FAST)
def is_narrow_product(x: Array, w: Array) -> Any:
    """Whether x @ w is small, and narrow as `is_narrow` says."""
    lanes = VECTOR_BYTES // x.itemsize
    return w.shape[1] < lanes <= x.shape[0] and is_small(x, w)


@njit(**FAST)
def is_small(a: Array, b: Array) -> Any:
    """Whether the product of a and b is one for tiles, not for BLAS."""
    return a.shape[0] * a.shape[1] * b.shape[1] < BLAS_FROM


@njit(**FAST)
def room(scratch: Array, rows: int, columns: int) -> Any:
    """A matrix at the start of the scratch, and what is left behind it, both on a boundary of 256 bytes."""
    used = (rows * columns + 63) // 64 * 64
    return scratch[: rows * columns].reshape(rows, columns), scratch[used:]


@njit(**FAST)
def transpose(a: Array, at: Array) -> None:
    for j in range(at.shape[0]):
        for i in range(at.shape[1]):
            at[j, i] = a[i, j]


@njit(**FAST)
def transposed(a: Array, scratch: Array) -> Any:
    """The transposed matrix, in scratch, and what is left of that."""
    at, rest = room(scratch, a.shape[1], a.shape[0])
    transpose(a, at)
    return at, rest


@njit(**FAST)
def narrow_forward(x: Array, w: Array, b: Array, scratch: Array) -> Any:
    """The output of a layer with few neurons, transposed, in scratch, and what is left of that."""
    wt, rest = transposed(w, scratch)
    zt, rest = room(rest, w.shape[1], x.shape[0])
    narrow_product(x, wt, b, zt)
    return zt, rest


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
def classifier(
    x: Array, w: Array, b: Array, t: Array, total: Array, dz: Array, dx: Array, db: Array, scratch: Array
) -> None:
    db[:] = 0
    if not is_small(x, w):
        product(x, w, dz, bias=b)
        softmax_cross_entropy_of(dz, t, total, dz, scratch)
        product(dz, w.T, dx, mask=x, sums=db)
        return
    wt, rest = transposed(w, scratch)
    if is_narrow(dz):
        zt, rest = room(rest, w.shape[1], x.shape[0])
        narrow_product(x, wt, b, zt)
        cross_entropy_by_class(zt, t, total, rest)
        transpose(zt, dz)
    else:
        product(x, w, dz, bias=b)
        softmax_cross_entropy_of(dz, t, total, dz, rest)
    product(dz, wt, dx, mask=x, sums=db)


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


@njit(**FAST)
def largest(x: Array) -> Any:
    best = x[0]
    for i in range(len(x)):
        best = best if x[i] <= best else x[i]
    return best


@njit(**FAST)
def exp_shifted(x: Array, y: Array) -> Any:
    """y = exp(x - max x); returns the sum of y."""
    top, total = largest(x), x.dtype.type(0)
    for i in range(len(x)):
        y[i] = exp(x[i] - top)
        total += y[i]
    return total


@njit(**FAST)
def divide(x: Array, by: Any) -> None:
    factor = 1 / x.dtype.type(by)
    for i in range(len(x)):
        x[i] *= factor
