"""Neighbouring ops in one, for Numba to compile; see `numba_layers`."""

from __future__ import annotations

from typing import Any

from numba import njit

from .numba_copies import by_columns, room, transpose, transposed
from .numba_math import FAST
from .numba_narrow import is_narrow, narrow_backward, narrow_forward
from .numba_products import SLOPES, product
from .numba_softmax import cross_entropy_by_class, softmax_cross_entropy_of
from .ops import Array


def dense_relu_forward(x: Array, w: Array, b: Array, y: Array, scratch: Array) -> None:
    product(x, w, y, bias=b, relu=True, scratch=scratch)


def dense_relu_input_grad(dz: Array, w: Array, y: Array, dx: Array, scratch: Array) -> None:
    product(dz, w.T, dx, mask=y, scratch=scratch)


def dense_relu_grads(dz: Array, w: Array, y: Array, dx: Array, db: Array, scratch: Array) -> None:
    through_relu(dz, w, y, dx, db, None, scratch)


def dense_leaky_relu_grads(
    dz: Array, w: Array, y: Array, negative_slope: Array, dx: Array, db: Array, scratch: Array
) -> None:
    leaky_relu_grads(dz, w, y, negative_slope[0], dx, db, scratch)


def dense_elu_grads(dz: Array, w: Array, y: Array, alpha: Array, dx: Array, db: Array, scratch: Array) -> None:
    elu_grads(dz, w, y, alpha[0], dx, db, scratch)


def dense_tanh_grads(dz: Array, w: Array, y: Array, dx: Array, db: Array, scratch: Array) -> None:
    tanh_grads(dz, w, y, 0, dx, db, scratch)


def dense_sigmoid_grads(dz: Array, w: Array, y: Array, dx: Array, db: Array, scratch: Array) -> None:
    sigmoid_grads(dz, w, y, 0, dx, db, scratch)


def dense_relu_sgd(x: Array, dz: Array, w: Array, lr: Array, dx: Array, db: Array, scratch: Array) -> None:
    through_relu(dz, w, x, dx, db, w.dtype.type(lr[0]), scratch)


def dense_weight_sgd(x: Array, dz: Array, w: Array, lr: Array, scratch: Array) -> None:
    rate = w.dtype.type(lr[0])
    if is_narrow(*dz.shape):
        dwt, _ = room(scratch, dz.shape[1], x.shape[1])
        product(dz.T, x, dwt)
        for j in range(w.shape[1]):
            for i in range(w.shape[0]):
                w[i, j] -= rate * dwt[j, i]
    else:
        product(x.T, dz, w, rate=rate, scratch=scratch)


def dense_bias_sgd(dz: Array, b: Array, lr: Array) -> None:
    product(None, dz, b, rate=b.dtype.type(lr[0]))


def dense_softmax_cross_entropy(
    x: Array, w: Array, b: Array, t: Array, total: Array, dz: Array, scratch: Array
) -> None:
    if is_narrow(len(x), w.shape[1]):
        zt, _ = narrow_forward(x, w, b, scratch)
        cross_entropy_by_class(zt, t, total)
        transpose(zt, dz)
    else:
        product(x, w, dz, bias=b, scratch=scratch)
        softmax_cross_entropy_of(dz, t, total, dz, scratch)


def classifier_grads(
    x: Array, w: Array, b: Array, t: Array, total: Array, dz: Array, dx: Array, db: Array, scratch: Array
) -> None:
    db[:] = 0
    if is_narrow(len(x), w.shape[1]):
        dzt, wt = narrow_forward(x, w, b, scratch)
        cross_entropy_by_class(dzt, t, total)
        transpose(dzt, dz)
        narrow_backward(dzt, wt, x, dx, db, None)
    else:
        wide_classifier(x, w, b, t, total, dz, dx, db, scratch)


def classifier_sgd(
    x: Array, w: Array, b: Array, t: Array, total: Array, lr: Array, dx: Array, db: Array, scratch: Array
) -> None:
    rate = w.dtype.type(lr[0])
    db[:] = 0
    if is_narrow(len(x), w.shape[1]):
        dzt, wt = narrow_forward(x, w, b, scratch)
        cross_entropy_by_class(dzt, t, total)
        narrow_backward(dzt, wt, x, dx, db, rate)
        transpose(wt, w)
        for j in range(w.shape[1]):
            db_j = b.dtype.type(0)
            for i in range(x.shape[0]):
                db_j += dzt[j, i]
            b[0, j] -= rate * db_j
    else:
        dz, rest = room(scratch, x.shape[0], w.shape[1])
        wide_classifier(x, w, b, t, total, dz, dx, db, rest)
        product(None, dz, b, rate=rate)
        product(x.T, dz, w, rate=rate, scratch=rest)


def grads_through(slope: int) -> Any:
    """The gradients in front of an activation, by its place in SLOPES."""

    def grads(dz: Array, w: Array, y: Array, number: Any, dx: Array, db: Array, scratch: Array) -> None:
        setting = w.dtype.type(number)
        db[:] = 0
        product(dz, w.T, dx, mask=y, slope=slope, number=setting, sums=db, scratch=scratch)

    grads.__qualname__ += str(slope)  # by which compiled code is told apart
    return njit(**FAST)(grads)


relu_grads, leaky_relu_grads, elu_grads, tanh_grads, sigmoid_grads = map(grads_through, range(len(SLOPES)))


@njit(**FAST)
def through_relu(dz: Array, w: Array, x: Array, dx: Array, db: Array, rate: Any, scratch: Array) -> None:
    """The gradients in front of the ReLU whose output is x; unless the rate is None, w learns."""
    if is_narrow(*dz.shape):
        dzt, rest = by_columns(scratch, dz.shape[0], dz.shape[1])
        transpose(dz, dzt)
        wt, _ = transposed(w, rest)
        db[:] = 0
        narrow_backward(dzt, wt, x, dx, db, rate)
        if rate is not None:
            transpose(wt, w)
    else:
        relu_grads(dz, w, x, 0, dx, db, scratch)
        if rate is not None:
            product(x.T, dz, w, rate=rate, scratch=scratch)


@njit(**FAST)
def wide_classifier(
    x: Array, w: Array, b: Array, t: Array, total: Array, dz: Array, dx: Array, db: Array, scratch: Array
) -> None:
    product(x, w, dz, bias=b, scratch=scratch)
    softmax_cross_entropy_of(dz, t, total, dz, scratch)
    product(dz, w.T, dx, mask=x, sums=db, scratch=scratch)
