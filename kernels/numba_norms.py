"""Normalisation and embeddings as loops, for Numba to compile; see `numba_layers`.

Statistics, and the differences from a mean, are computed in float64: columns whose mean is large lose nothing.
"""

from __future__ import annotations

import numpy as np

from .ops import Array


def layer_norm_forward(x: Array, w: Array, b: Array, eps: Array, y: Array, normal: Array, scale: Array) -> None:
    rows, columns = x.shape
    for i in range(rows):
        mean = squares = 0.0
        for j in range(columns):
            mean += x[i, j]
        mean /= columns
        for j in range(columns):
            difference = x[i, j] - mean
            squares += difference * difference
        factor = 1 / np.sqrt(squares / columns + eps[0])
        for j in range(columns):
            normal[i, j] = (x[i, j] - mean) * factor
            y[i, j] = normal[i, j] * w[0, j] + b[0, j]
        scale[i] = factor


def layer_norm_backward(dy: Array, w: Array, normal: Array, scale: Array, dx: Array, dw: Array, db: Array) -> None:
    rows, columns = dy.shape
    real = dy.dtype.type
    dw[:] = 0
    db[:] = 0
    for i in range(rows):
        mean = share = real(0)
        for j in range(columns):
            g = dy[i, j] * w[0, j]
            mean += g
            share += g * normal[i, j]
            dw[0, j] += dy[i, j] * normal[i, j]
            db[0, j] += dy[i, j]
        mean /= real(columns)
        share /= real(columns)
        factor = real(scale[i])
        for j in range(columns):
            dx[i, j] = (dy[i, j] * w[0, j] - mean - normal[i, j] * share) * factor


def batch_statistics(
    x: Array, momentum: Array, running_mean: Array, running_var: Array, mean: Array, var: Array
) -> None:
    rows, columns = x.shape
    mean[:] = 0
    var[:] = 0
    for i in range(rows):
        for j in range(columns):
            mean[j] += x[i, j]
    for j in range(columns):
        mean[j] /= rows
    for i in range(rows):
        for j in range(columns):
            difference = x[i, j] - mean[j]
            var[j] += difference * difference
    for j in range(columns):
        var[j] /= rows
    if rows > 1:
        kept, new = 1 - momentum[0], momentum[0]
        for j in range(columns):
            running_mean[j] = kept * running_mean[j] + new * mean[j]
            running_var[j] = kept * running_var[j] + new * var[j] * (rows / (rows - 1))


def batch_norm_forward(
    x: Array, w: Array, b: Array, mean: Array, var: Array, eps: Array, y: Array, normal: Array, scale: Array
) -> None:
    rows, columns = x.shape
    for j in range(columns):
        scale[j] = 1 / np.sqrt(var[j] + eps[0])
    for i in range(rows):
        for j in range(columns):
            normal[i, j] = (x[i, j] - mean[j]) * scale[j]
            y[i, j] = normal[i, j] * w[0, j] + b[0, j]


def batch_norm_backward(
    dy: Array,
    w: Array,
    normal: Array,
    scale: Array,
    by_batch: Array,
    dx: Array,
    dw: Array,
    db: Array,
    scratch: Array,
) -> None:
    rows, columns = dy.shape
    real = dy.dtype.type
    factor = scratch[:columns]
    dw[:] = 0
    db[:] = 0
    for i in range(rows):
        for j in range(columns):
            dw[0, j] += dy[i, j] * normal[i, j]
            db[0, j] += dy[i, j]
    for j in range(columns):
        factor[j] = w[0, j] * scale[j]
    if by_batch[0] == 0:
        for i in range(rows):
            for j in range(columns):
                dx[i, j] = dy[i, j] * factor[j]
        return
    share = real(1 / rows)
    for i in range(rows):
        for j in range(columns):
            dx[i, j] = (dy[i, j] - (db[0, j] + normal[i, j] * dw[0, j]) * share) * factor[j]


def embedding_forward(x: Array, w: Array, column: Array, start: Array, codes: Array, stride: Array, y: Array) -> None:
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            code = x[i, column[j]]
            if codes[j] == 0:
                y[i, j] = code
            elif code >= 0 and code < codes[j] and code == np.floor(code):
                y[i, j] = w[start[j] + np.int64(code) * stride[j]]
            else:
                y[i, j] = np.nan


def embedding_backward(
    dy: Array,
    x: Array,
    w: Array,
    column: Array,
    start: Array,
    codes: Array,
    stride: Array,
    dx: Array,
    dw: Array,
) -> None:
    dx[:] = 0
    dw[:] = 0
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            code = x[i, column[j]]
            if codes[j] == 0:
                dx[i, column[j]] += dy[i, j]
            elif code >= 0 and code < codes[j] and code == np.floor(code):
                dw[start[j] + np.int64(code) * stride[j]] += dy[i, j]
