"""The ops as plain loops that Numba compiles; products go to BLAS through ``np.dot``.

A function here is named as its op in `ops.OPS`; it takes the op's inputs, then its outputs, and writes the outputs.
Everything that kernels share lives in this file, because Numba's disk cache watches the file of the kernel alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from .ops import Array

FAST: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}


def next_batch(order: Array, cursor: Array, rows: Array) -> None:
    for i in range(len(rows)):
        rows[i] = order[cursor[0] + i]
    cursor[0] += len(rows)


def take(x: Array, rows: Array, xb: Array) -> None:
    for i in range(len(rows)):
        row = rows[i]
        for k in range(xb.shape[1]):
            xb[i, k] = x[row, k]


def take_labels(t: Array, rows: Array, tb: Array) -> None:
    for i in range(len(rows)):
        tb[i] = t[rows[i]]


def dense_forward(x: Array, w: Array, b: Array, z: Array) -> None:
    np.dot(x, w, z)
    for i in range(z.shape[0]):
        for j in range(z.shape[1]):
            z[i, j] += b[0, j]


def dense_input_grad(dz: Array, w: Array, dx: Array) -> None:
    np.dot(dz, w.T, dx)


def dense_param_grads(x: Array, dz: Array, dw: Array, db: Array) -> None:
    np.dot(x.T, dz, dw)
    db[:] = 0
    for i in range(dz.shape[0]):
        for j in range(dz.shape[1]):
            db[0, j] += dz[i, j]


def relu_forward(x: Array, y: Array) -> None:
    x, y = x.ravel(), y.ravel()
    for i in range(len(x)):
        y[i] = 0 if x[i] <= 0 else x[i]  # the comparison lets NaN through


def relu_backward(dy: Array, y: Array, dx: Array) -> None:
    dy, y, dx = dy.ravel(), y.ravel(), dx.ravel()
    for i in range(len(y)):
        dx[i] = 0 if y[i] <= 0 else dy[i]


def dense_relu_forward(x: Array, w: Array, b: Array, y: Array) -> None:
    np.dot(x, w, y)
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            z = y[i, j] + b[0, j]
            y[i, j] = 0 if z <= 0 else z


def dense_relu_input_grad(dz: Array, w: Array, y: Array, dx: Array) -> None:
    np.dot(dz, w.T, dx)
    y, dx = y.ravel(), dx.ravel()
    for i in range(len(y)):
        dx[i] = 0 if y[i] <= 0 else dx[i]


def dense_sgd(x: Array, dz: Array, w: Array, b: Array, lr: Array, scratch: Array) -> None:
    rate = w.dtype.type(lr[0])
    dw = scratch[: w.size].reshape(w.shape)
    np.dot(x.T, dz, dw)
    for k in range(w.shape[0]):
        for j in range(w.shape[1]):
            w[k, j] -= rate * dw[k, j]
    for i in range(dz.shape[0]):
        for j in range(dz.shape[1]):
            b[0, j] -= rate * dz[i, j]


def dropout_forward(x: Array, rate: Array, key: Array, y: Array, mask: Array) -> None:
    x, y, mask = x.ravel(), y.ravel(), mask.ravel()
    scale = 1 / (1 - rate[0]) if rate[0] < 1 else 0.0
    for start in range(0, len(x), 8):
        block = philox(key, np.uint64(start // 8 + 1))
        for i in range(start, min(start + 8, len(x))):
            half = block[(i - start) // 2] >> np.uint64(32 * (i % 2))
            uniform = np.uint32(half) >> np.uint32(8)
            mask[i] = scale if uniform * 2.0**-24 >= rate[0] else 0
            y[i] = x[i] * mask[i]
    key[2] += np.uint64(1)


def dropout_backward(dy: Array, mask: Array, dx: Array) -> None:
    dy, mask, dx = dy.ravel(), mask.ravel(), dx.ravel()
    for i in range(len(dy)):
        dx[i] = dy[i] * mask[i]


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


def softmax_cross_entropy(z: Array, t: Array, total: Array, dz: Array) -> None:
    for i in range(len(t)):
        row = dz[i]
        total_exp = exp_shifted(z[i], row)
        # the target's share before normalising: log(sum) - shifted logit, without keeping the shifted logits
        total[0] += np.log(total_exp) - (z[i, t[i]] - largest(z[i]))
        divide(row, total_exp * len(t))
        row[t[i]] -= 1 / len(t)
    total[1] += len(t)


def softmax_cross_entropy_backward(p: Array, t: Array, dz: Array) -> None:
    scale = p.dtype.type(1 / len(t))
    for i in range(len(t)):
        for c in range(p.shape[1]):
            dz[i, c] = p[i, c] * scale
        dz[i, t[i]] -= scale


def mean_squared_error(y: Array, t: Array, total: Array, dy: Array) -> None:
    y, t, dy = y.ravel(), t.ravel(), dy.ravel()
    scale = y.dtype.type(2 / len(y))
    squares = 0.0
    for i in range(len(y)):
        error = y[i] - t[i]
        squares += np.float64(error) * error
        dy[i] = scale * error
    total[0] += squares
    total[1] += len(y)


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


# The exponential below is a polynomial, because a loop that calls the C library's does not vectorise. It multiplies
# 2^k, put together from bits, by a polynomial (Chebyshev fit on |r| <= ln 2 / 2) of the rest r = x - k ln 2; ln 2 is
# split in two so that k times its first part is exact. Sums must keep their order here, hence the fewer flags.
EXACT: dict[str, Any] = {"fastmath": {"contract", "nsz"}, "error_model": "numpy"}


def exp(x: Any) -> Any:
    raise NotImplementedError("compiled only")


@overload(exp, jit_options=EXACT)
def exp_of(x: Any) -> Any:
    return exp32 if x.bitwidth == 32 else exp64


def exp32(x: Any) -> Any:
    f = np.float32
    k = np.rint(x * f(1.4426950408889634))
    r = x - k * f(0.693359375) - k * f(-2.12194440e-4)
    y = f(0.00139411084339726746)
    y = y * r + f(0.00837512639815333568)
    y = y * r + f(0.0416663528967751568)
    y = y * r + f(0.166664155146532754)
    y = y * r + f(0.500000004711775767)
    y = y * r + f(1.00000003771621384)
    y = y * r + f(1)
    inside = abs(x) < f(87)
    power = (np.int32(k if inside else f(0)) + np.int32(127)) << np.int32(23)
    y *= np.int32(power).view(np.float32)
    return y if inside else f(0) if x < 0 else f(np.inf) if x > 0 else x


def exp64(x: Any) -> Any:
    k = np.rint(x * 1.4426950408889634)
    r = x - k * 0.693147180369123816490 - k * 1.90821492927058770002e-10
    y = 2.51100376059637777e-8
    y = y * r + 2.76326396390410297e-7
    y = y * r + 2.75572409185789698e-6
    y = y * r + 0.0000248014854823284924
    y = y * r + 0.000198412698900471137
    y = y * r + 0.00138888889523147747
    y = y * r + 0.00833333333331960061
    y = y * r + 0.0416666666664880955
    y = y * r + 0.166666666666666808
    y = y * r + 0.500000000000001839
    y = y * r + 1.0
    y = y * r + 0.999999999999999997
    inside = abs(x) < 708
    power = (np.int64(k if inside else 0.0) + 1023) << 52
    y *= np.int64(power).view(np.float64)
    return y if inside else 0.0 if x < 0 else np.inf if x > 0 else x


@njit(**EXACT)
def philox(key: Array, block: Any) -> Any:
    """Four random words of Philox4x64-10 (Salmon et al., 2011), as ``np.random.Philox`` gives them."""
    c0, c1, c2, c3 = block, key[2], key[3], np.uint64(0)
    k0, k1 = key[0], key[1]
    for _ in range(10):
        high0, low0 = multiply_high(np.uint64(0xD2E7470EE14C6C93), c0)
        high1, low1 = multiply_high(np.uint64(0xCA5A826395121157), c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += np.uint64(0x9E3779B97F4A7C15)
        k1 += np.uint64(0xBB67AE8584CAA73B)
    return c0, c1, c2, c3


@intrinsic
def multiply_high(typing_context: Any, a: Any, b: Any) -> Any:
    """The high and the low word of a product of two unsigned words."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide, word = ir.IntType(128), ir.IntType(64)
        product = builder.mul(*(builder.zext(x, wide) for x in arguments))
        high = builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), word)
        return context.make_tuple(builder, signature.return_type, [high, builder.trunc(product, word)])

    return types.UniTuple(types.uint64, 2)(types.uint64, types.uint64), build
