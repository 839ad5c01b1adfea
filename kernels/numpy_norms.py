"""Normalisation and embeddings in the shortest correct NumPy; see `numpy_layers`.

Statistics, and the differences from a mean, are computed in float64: columns whose mean is large lose nothing.
"""

from __future__ import annotations

import numpy as np

from .ops import Array


def layer_norm_forward(
    x: Array, w: Array, b: Array, eps: Array, y: Array, normal: Array, scale: Array, scratch: Array
) -> None:
    wide = as_float64(x, scratch)
    wide -= wide.mean(axis=1, keepdims=True)
    np.einsum("bn,bn->b", wide, wide, out=scale)
    np.reciprocal(np.sqrt(scale / x.shape[1] + eps), out=scale)
    np.multiply(wide, scale[:, None], out=normal, casting="same_kind")
    np.multiply(normal, w, out=y)
    y += b


def layer_norm_backward(
    dy: Array, w: Array, normal: Array, scale: Array, dx: Array, dw: Array, db: Array, scratch: Array
) -> None:
    column_sums(dy, normal, dw, db, scratch)
    np.multiply(dy, w, out=dx)
    mean = dx.mean(axis=1, keepdims=True)
    share = np.einsum("bn,bn->b", dx, normal)[:, None] / np.float32(dx.shape[1])
    dx -= mean
    dx -= np.multiply(normal, share, out=room(scratch, dx))
    dx *= scale[:, None].astype(dx.dtype)


def batch_statistics(
    x: Array, momentum: Array, running_mean: Array, running_var: Array, mean: Array, var: Array, scratch: Array
) -> None:
    wide = as_float64(x, scratch)
    wide.mean(axis=0, out=mean)
    wide -= mean
    np.square(wide, out=wide).mean(axis=0, out=var)
    if len(x) > 1:
        running_mean *= 1 - momentum
        running_mean += momentum * mean
        running_var *= 1 - momentum
        running_var += momentum * var * (len(x) / (len(x) - 1))


def batch_norm_forward(
    x: Array,
    w: Array,
    b: Array,
    mean: Array,
    var: Array,
    eps: Array,
    y: Array,
    normal: Array,
    scale: Array,
    scratch: Array,
) -> None:
    np.reciprocal(np.sqrt(var + eps), out=scale)
    wide = as_float64(x, scratch)
    wide -= mean
    np.multiply(wide, scale, out=normal, casting="same_kind")
    np.multiply(normal, w, out=y)
    y += b


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
    column_sums(dy, normal, dw, db, scratch)
    if by_batch[0]:
        share = np.float32(1 / len(dy)) if dy.itemsize == 4 else 1 / len(dy)
        np.multiply(normal, dw * share, out=dx)
        dx += db * share
        np.subtract(dy, dx, out=dx)
    else:
        np.copyto(dx, dy)
    dx *= w
    dx *= scale.astype(dx.dtype)


def embedding_forward(
    x: Array, w: Array, column: Array, start: Array, codes: Array, stride: Array, y: Array, scratch: Array
) -> None:
    index, known, found = look_up(x, column, start, codes, stride, scratch)
    np.take(x, column, axis=1, out=y, mode="clip")
    np.copyto(y, np.nan, where=codes > 0)
    np.copyto(y, np.take(w, index, out=found, mode="clip"), where=known)


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
    scratch: Array,
) -> None:
    index, known, found = look_up(x, column, start, codes, stride, scratch)
    found.fill(0)
    np.copyto(found, dy, where=known)
    dw.fill(0)
    np.add.at(dw, index.reshape(-1), found.reshape(-1))
    dx.fill(0)
    for j in np.flatnonzero(codes == 0):
        dx[:, column[j]] += dy[:, j]


def look_up(
    x: Array, column: Array, start: Array, codes: Array, stride: Array, scratch: Array
) -> tuple[Array, Array, Array]:
    """Each element's place in the table, whether it has one, and room for as many floats."""
    shape, size = (len(x), len(column)), len(x) * len(column)
    index = scratch.view(np.int64)[:size].reshape(shape)
    code, floor = scratch[2 * size : 4 * size].reshape(2, *shape)
    known, other = scratch[4 * size :].view(bool)[: 2 * size].reshape(2, *shape)
    np.take(x, column, axis=1, out=code, mode="clip")
    np.equal(code, np.floor(code, out=floor), out=known)
    known &= np.greater_equal(code, 0, out=other)
    known &= np.less(code, codes, out=other)
    index.fill(0)
    np.copyto(index, code, where=known, casting="unsafe")
    index *= stride
    index += start
    return index, known, code


def column_sums(dy: Array, normal: Array, dw: Array, db: Array, scratch: Array) -> None:
    np.sum(np.multiply(dy, normal, out=room(scratch, dy)), axis=0, keepdims=True, out=dw)
    np.sum(dy, axis=0, keepdims=True, out=db)


def as_float64(x: Array, scratch: Array) -> Array:
    wide = scratch.view(np.float64)[: x.size].reshape(x.shape)
    np.copyto(wide, x)
    return wide


def room(scratch: Array, x: Array) -> Array:
    return scratch[: x.size].reshape(x.shape)
