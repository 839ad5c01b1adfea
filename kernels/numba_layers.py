"""Batches and layers as plain loops and calls of `product`, for Numba to compile.

A function here is named as its op in `ops.OPS`; it takes the op's inputs, then its outputs, and writes the outputs.
`scratch` is room for what is in between: flat, of the float type, as long as the op's `room` says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .numba_copies import copy_row, prefetch_row, room, transpose
from .numba_math import FAST, philox
from .numba_narrow import is_narrow, narrow_forward
from .numba_products import product
from .ops import Array

CACHED = 1 << 20  # bytes of a table that a core's own cache may hold
PIECE = 64  # rows that are shuffled together, as vector code without a loop
AHEAD = 16  # rows of a larger table that are asked for before they are read


def shuffle(keys: Array, order: Array, scratch: Array) -> None:
    rows, size = scratch.view(np.uint32)[:PIECE], np.uint32(len(order))
    for start in range(0, len(order), PIECE):
        for i in range(PIECE):
            rows[i] = np.uint32(start + i)
        for key in keys:
            middle = np.uint32((key >> np.uint64(32)) * np.uint64(size) >> np.uint64(32))
            factor = np.uint32(key & np.uint64(0xFFFFFFFF))
            for i in range(PIECE):
                row = rows[i]
                other = np.uint32(middle - row)  # which is huge below 0
                other = min(other, np.uint32(other + size))
                rows[i] = other if np.int32(max(row, other) * factor) < 0 else row
        for i in range(min(PIECE, len(order) - start)):
            order[start + i] = rows[i]


def next_batch(order: Array, cursor: Array, rows: Array) -> None:
    for i in range(len(rows)):
        rows[i] = order[cursor[0] + i]
    cursor[0] += len(rows)


def next_rate(rates: Array, step: Array, rate: Array) -> None:
    rate[0] = rates[step[0]]
    step[0] += 1


def take(x: Array, rows: Array, xb: Array) -> None:
    if x.size * x.itemsize <= CACHED:
        for i in range(len(rows)):
            copy_row(x, rows[i], xb, i)
    else:
        for i in range(len(rows)):
            prefetch_row(x, rows[min(i + AHEAD, len(rows) - 1)])
            copy_row(x, rows[i], xb, i)


def take_labels(t: Array, rows: Array, tb: Array) -> None:
    for i in range(len(rows)):
        tb[i] = t[rows[i]]


def take_weights(w: Array, rows: Array, wb: Array) -> None:
    for i in range(len(rows)):
        wb[i] = w[rows[i]]


def sparse_rows(
    values: Array, columns: Array, starts: Array, stops: Array, rows: Array, zeros: Array, xb: Array
) -> None:
    for i in range(len(rows)):
        for k in range(xb.shape[1]):
            xb[i, k] = zeros[0, k]
        for n in range(starts[rows[i]], stops[rows[i]]):
            xb[i, columns[n]] = values[n]


def sparse_forward(
    values: Array, columns: Array, starts: Array, stops: Array, rows: Array, w: Array, b: Array, z: Array
) -> None:
    for i in range(len(rows)):
        for j in range(z.shape[1]):
            z[i, j] = b[0, j]
        for n in range(starts[rows[i]], stops[rows[i]]):
            u, k = z.dtype.type(values[n]), columns[n]
            for j in range(z.shape[1]):
                z[i, j] += u * w[k, j]


def sparse_weight_grad(
    values: Array, columns: Array, starts: Array, stops: Array, rows: Array, zeros: Array, dz: Array, dw: Array
) -> None:
    for k in range(dw.shape[0]):
        for j in range(dw.shape[1]):
            dw[k, j] = zeros[0, k]
    for i in range(len(rows)):
        for n in range(starts[rows[i]], stops[rows[i]]):
            u, k = dw.dtype.type(values[n]), columns[n]
            for j in range(dw.shape[1]):
                dw[k, j] += u * dz[i, j]


def dense_forward(x: Array, w: Array, b: Array, z: Array, scratch: Array) -> None:
    if is_narrow(*z.shape):
        zt, _ = narrow_forward(x, w, b, scratch)
        transpose(zt, z)
    else:
        product(x, w, z, bias=b, scratch=scratch)


def dense_input_grad(dz: Array, w: Array, dx: Array, scratch: Array) -> None:
    product(dz, w.T, dx, scratch=scratch)


def dense_weight_grad(x: Array, dz: Array, dw: Array, scratch: Array) -> None:
    if is_narrow(*dz.shape):
        dwt, _ = room(scratch, dz.shape[1], x.shape[1])
        product(dz.T, x, dwt)
        transpose(dwt, dw)
    else:
        product(x.T, dz, dw, scratch=scratch)


def dense_bias_grad(dz: Array, db: Array) -> None:
    product(None, dz, db)


def dropout_forward(x: Array, rate: Array, key: Array, y: Array, mask: Array) -> None:
    rows, columns = x.shape
    i = j = 0
    for start in range(0, x.size, 8):
        words = philox(key, np.uint64(start // 8 + 1))
        if j == columns:
            i, j = i + 1, 0
        if j + 8 <= columns:
            for k in range(8):  # which is unrolled, so that the words stay in registers
                mask[i, j + k] = some_bits(words, k)
            j += 8
        else:
            for k in range(min(8, x.size - start)):
                if j == columns:
                    i, j = i + 1, 0
                mask[i, j] = some_bits(words, k)
                j += 1
    key[2] += np.uint64(1)
    least, scale = x.dtype.type(np.ceil(rate[0] * 2.0**24)), x.dtype.type(1 / (1 - rate[0]) if rate[0] < 1 else 0.0)
    for i in range(rows):
        for j in range(columns):
            mask[i, j] = scale if mask[i, j] >= least else 0
            y[i, j] = x[i, j] * mask[i, j]


@njit(**FAST)
def some_bits(words: Any, k: int) -> Any:
    """The k-th of eight numbers of 24 random bits, which also float32 holds exactly."""
    return np.int32(np.uint32(words[k // 2] >> np.uint64(32 * (k % 2))) >> np.uint32(8))


def dropout_backward(dy: Array, mask: Array, dx: Array) -> None:
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            dx[i, j] = dy[i, j] * mask[i, j]


def add(x: Array, y: Array, z: Array) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            z[i, j] = x[i, j] + y[i, j]


def multiply(x: Array, y: Array, z: Array) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            z[i, j] = x[i, j] * y[i, j]


def scale(x: Array, factor: Array, y: Array) -> None:
    real = x.dtype.type(factor[0])
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = real * x[i, j]
