"""Batches and layers in the shortest correct NumPy.

A function here is named as its op in `ops.OPS`; it takes the op's inputs, then its outputs, and writes the outputs.
`scratch` is room for what is in between: flat, of the float type, as long as the op's `room` says.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .ops import Array

PIECE = 1 << 14  # rows that are shuffled together, in a cache


def shuffle(keys: Array, order: Array, scratch: Array) -> None:
    """Put a random order of the rows 0 to P - 1, at most 2 ** 31 of them, into `order`.

    Each key pairs the rows whose sum is `middle`, modulo P, and exchanges every other pair at random: the swap-or-not
    shuffle of Hoang, Morris and Rogaway (2012), its random function the first bit of a product. So each row finds its
    place by itself, and a key halves what the place tells of the row.
    """
    size = len(order)
    for start in range(0, size, PIECE):
        places = order[start : start + PIECE]
        rows, others, pairs = scratch.view(np.uint32)[: 3 * len(places)].reshape(3, -1)
        exchanged = pairs.view(np.int32)
        rows[:], rows[0] = 1, start
        np.cumsum(rows, dtype=np.uint32, out=rows)
        for key in keys.tolist():
            middle, factor = np.uint32((key >> 32) * size >> 32), np.uint32(key & 0xFFFFFFFF)
            np.subtract(middle, rows, out=others)  # which is huge below 0
            np.minimum(others, np.add(others, np.uint32(size), out=pairs), out=others)
            np.multiply(np.maximum(rows, others, out=pairs), factor, out=pairs)
            np.right_shift(exchanged, 31, out=exchanged)  # all bits or none
            others ^= rows
            others &= pairs
            rows ^= others
        places[:] = rows


def next_batch(order: Array, cursor: Array, rows: Array) -> None:
    start = int(cursor[0])
    rows[:] = order[start : start + len(rows)]
    cursor += len(rows)


def next_rate(rates: Array, step: Array, rate: Array) -> None:
    rate[0] = rates[step[0]]
    step += 1


def take(x: Array, rows: Array, xb: Array, scratch: Array) -> None:
    if not x.flags.c_contiguous:  # np.take would copy all of it first
        xb[...] = x[rows]
        return
    taken = xb if x.dtype == xb.dtype else scratch.view(x.dtype)[: xb.size].reshape(xb.shape)
    np.take(x, rows, axis=0, out=taken, mode="clip")  # any other mode buffers a copy of `out`
    if taken is not xb:
        np.copyto(xb, taken, casting="unsafe")


def take_labels(t: Array, rows: Array, tb: Array) -> None:
    np.take(t, rows, out=tb, mode="clip")


def take_weights(w: Array, rows: Array, wb: Array, scratch: Array) -> None:
    taken = scratch.view(w.dtype)[: len(wb)]
    np.copyto(wb, np.take(w, rows, out=taken, mode="clip"), casting="unsafe")


def sparse_rows(
    values: Array, columns: Array, starts: Array, stops: Array, rows: Array, zeros: Array, xb: Array
) -> None:
    xb[:] = zeros
    for row, x in zip(rows.tolist(), xb, strict=True):
        x[columns[starts[row] : stops[row]]] = values[starts[row] : stops[row]]


def sparse_forward(
    values: Array,
    columns: Array,
    starts: Array,
    stops: Array,
    rows: Array,
    w: Array,
    b: Array,
    z: Array,
    scratch: Array,
) -> None:
    z[:] = b
    for row, sums in zip(rows.tolist(), z, strict=True):
        for some in pieces(starts[row], stops[row], len(scratch) // len(sums)):
            weights = np.take(w, columns[some], axis=0, out=room(scratch, some, len(sums)), mode="clip")
            sums += values[some].astype(z.dtype, copy=False) @ weights


def sparse_weight_grad(
    values: Array,
    columns: Array,
    starts: Array,
    stops: Array,
    rows: Array,
    zeros: Array,
    dz: Array,
    dw: Array,
    scratch: Array,
) -> None:
    dw[:] = zeros.T
    first, second = scratch[: 2 * (len(scratch) // 2)].reshape(2, -1)
    for row, slopes in zip(rows.tolist(), dz, strict=True):
        for some in pieces(starts[row], stops[row], len(first) // len(slopes)):
            sums = np.take(dw, columns[some], axis=0, out=room(first, some, len(slopes)), mode="clip")
            factors = values[some, None].astype(dw.dtype, copy=False)
            sums += np.matmul(factors, slopes[None], out=room(second, some, len(slopes)))  # which needs no buffer
            dw[columns[some]] = sums


def pieces(start: int, stop: int, most: int) -> Iterator[slice]:
    """From start to stop, at most so many at a time."""
    return (slice(first, min(first + most, stop)) for first in range(start, stop, most))


def room(scratch: Array, some: slice, columns: int) -> Array:
    rows = some.stop - some.start
    return scratch[: rows * columns].reshape(rows, columns)


def dense_forward(x: Array, w: Array, b: Array, z: Array) -> None:
    np.matmul(x, w, out=z)
    np.add(z, b, out=z)


def dense_input_grad(dz: Array, w: Array, dx: Array) -> None:
    np.matmul(dz, w.T, out=dx)


def dense_weight_grad(x: Array, dz: Array, dw: Array) -> None:
    np.matmul(x.T, dz, out=dw)


def dense_bias_grad(dz: Array, db: Array, scratch: Array) -> None:
    np.matmul(ones(len(dz), scratch), dz, out=db)  # twice as fast as a sum over the rows


def dropout_forward(x: Array, rate: Array, key: Array, y: Array, mask: Array, scratch: Array) -> None:
    # key = (two words of the seed, step, layer); a block of eight 32-bit numbers is Philox of (block, step, layer)
    philox = np.random.Philox(key=key[:2], counter=np.array([0, key[2], key[3], 0], np.uint64))
    uniform = scratch.view(np.float32)[: x.size].reshape(x.shape)
    np.random.Generator(philox).random(out=uniform, dtype=np.float32)
    np.greater_equal(uniform, rate[0], out=mask, casting="unsafe")
    mask *= 1 / (1 - rate[0]) if rate[0] < 1 else 0
    np.multiply(x, mask, out=y)
    key[2] += 1


def dropout_backward(dy: Array, mask: Array, dx: Array) -> None:
    np.multiply(dy, mask, out=dx)


def add(x: Array, y: Array, z: Array) -> None:
    np.add(x, y, out=z)


def multiply(x: Array, y: Array, z: Array) -> None:
    np.multiply(x, y, out=z)


def scale(x: Array, factor: Array, y: Array) -> None:
    np.multiply(x, x.dtype.type(factor[0]), out=y)


def softmax_forward(z: Array, p: Array) -> None:
    np.subtract(z, z.max(axis=1, keepdims=True), out=p)
    np.exp(p, out=p)
    p /= p.sum(axis=1, keepdims=True)


def softmax_jacobian(p: Array, j: Array) -> None:
    np.negative(np.einsum("bi,bj->bij", p, p, out=j), out=j)
    np.einsum("bii->bi", j)[...] += p


def softmax_backward(dp: Array, p: Array, dz: Array) -> None:
    np.subtract(dp, np.einsum("bc,bc->b", p, dp)[:, None], out=dz)
    dz *= p


def ones(rows: int, scratch: Array) -> Array:
    ones = scratch[:rows]
    ones.fill(1)
    return ones[None]
