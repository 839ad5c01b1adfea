"""The reference engine: the shortest correct NumPy for each op.

A function here is named as its op in `ops.OPS`; it takes the op's inputs, then its outputs, and writes the outputs.
`scratch` is room for what is in between: flat, of the float type, several times as long as any float argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .engine import Engine
from .ops import Array, Op

__all__ = ["NumpyEngine"]


class NumpyEngine(Engine):
    name = "numpy"
    device = "cpu"

    def supports(self, op: Op) -> bool:
        return op.name in globals()

    def kernel(self, op: Op, arguments: Sequence[Array]) -> Callable[..., None]:
        kernel: Callable[..., None] = globals()[op.name]
        return kernel


def next_batch(order: Array, cursor: Array, rows: Array) -> None:
    start = int(cursor[0])
    rows[:] = order[start : start + len(rows)]
    cursor += len(rows)


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


def dense_forward(x: Array, w: Array, b: Array, z: Array) -> None:
    np.matmul(x, w, out=z)
    np.add(z, b, out=z)


def dense_input_grad(dz: Array, w: Array, dx: Array) -> None:
    np.matmul(dz, w.T, out=dx)


def dense_weight_grad(x: Array, dz: Array, dw: Array) -> None:
    np.matmul(x.T, dz, out=dw)


def dense_bias_grad(dz: Array, db: Array, scratch: Array) -> None:
    np.matmul(_ones(len(dz), scratch), dz, out=db)  # twice as fast as a sum over the rows


def relu_forward(x: Array, y: Array) -> None:
    np.maximum(x, 0, out=y)


def relu_backward(dy: Array, y: Array, dx: Array, scratch: Array) -> None:
    # by bits, because a copy through a mask takes 20 times as long: all of them set where y > 0, or NaN
    keep = np.less_equal(y, 0, out=scratch.view(bool)[: y.size].reshape(y.shape)).view(np.int8)
    keep -= 1
    whole = np.int32 if dx.itemsize == 4 else np.int64
    np.bitwise_and(dy.view(whole), keep, out=dx.view(whole))


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


def softmax_forward(z: Array, p: Array) -> None:
    np.subtract(z, z.max(axis=1, keepdims=True), out=p)
    np.exp(p, out=p)
    p /= p.sum(axis=1, keepdims=True)


def softmax_jacobian(p: Array, j: Array) -> None:
    np.einsum("bi,bj->bij", p, -p, out=j)
    np.einsum("bii->bi", j)[...] += p


def softmax_backward(dp: Array, p: Array, dz: Array) -> None:
    np.subtract(dp, np.einsum("bc,bc->b", p, dp)[:, None], out=dz)
    dz *= p


def cross_entropy_forward(p: Array, t: Array, total: Array, cost: Array) -> None:
    np.negative(np.log(np.clip(p[np.arange(len(t)), t], 1e-7, 1 - 1e-7)), out=cost)
    total += cost.sum(dtype=np.float64), len(t)


def cross_entropy_backward(p: Array, t: Array, dp: Array) -> None:
    row = np.arange(len(t))
    dp[...] = 0
    # the smallest normal number keeps the gradient finite where a probability has underflowed to 0
    dp[row, t] = -1 / (np.maximum(p[row, t], np.finfo(p.dtype).tiny) * len(t))


def softmax_cross_entropy(z: Array, t: Array, total: Array, dz: Array, scratch: Array) -> None:
    row = np.arange(len(t))
    # class by class where there are few, because NumPy reduces few long rows faster than many short ones
    p = scratch[: z.size].reshape(z.shape[::-1]) if z.shape[1] < 32 else dz.T
    np.copyto(p, z.T)
    p -= p.max(axis=0)
    total[0] -= p[t, row].sum(dtype=np.float64)
    np.exp(p, out=p)
    sums = p.sum(axis=0)
    total += np.log(sums).sum(dtype=np.float64), len(t)
    sums *= len(t)
    p /= sums
    p[t, row] -= 1 / len(t)
    np.copyto(dz, p.T)


def softmax_cross_entropy_backward(p: Array, t: Array, dz: Array) -> None:
    np.copyto(dz, p)
    dz[np.arange(len(t)), t] -= 1
    dz /= len(t)


def mean_squared_error(y: Array, t: Array, total: Array, dy: Array, scratch: Array) -> None:
    np.subtract(y, t, out=dy)
    squares = scratch.view(np.float64)[: dy.size].reshape(dy.shape)
    total += np.square(dy, out=squares, dtype=np.float64).sum(), dy.size
    dy *= 2 / dy.size


def dense_relu_forward(x: Array, w: Array, b: Array, y: Array) -> None:
    dense_forward(x, w, b, y)
    relu_forward(y, y)


def dense_relu_input_grad(dz: Array, w: Array, y: Array, dx: Array, scratch: Array) -> None:
    dense_input_grad(dz, w, dx)
    relu_backward(dx, y, dx, scratch)


def dense_relu_grads(dz: Array, w: Array, y: Array, dx: Array, db: Array, scratch: Array) -> None:
    dense_relu_input_grad(dz, w, y, dx, scratch)
    dense_bias_grad(dx, db, scratch)


def dense_weight_sgd(x: Array, dz: Array, w: Array, lr: Array, scratch: Array) -> None:
    scaled = np.multiply(dz, w.dtype.type(lr[0]), out=scratch[: dz.size].reshape(dz.shape))
    w -= np.matmul(x.T, scaled, out=scratch[dz.size : dz.size + w.size].reshape(w.shape))


def dense_bias_sgd(dz: Array, b: Array, lr: Array, scratch: Array) -> None:
    b -= _ones(len(dz), scratch) @ dz * b.dtype.type(lr[0])


def dense_softmax_cross_entropy(
    x: Array, w: Array, b: Array, t: Array, total: Array, dz: Array, scratch: Array
) -> None:
    dense_forward(x, w, b, dz)
    softmax_cross_entropy(dz, t, total, dz, scratch)


def classifier_grads(
    x: Array, w: Array, b: Array, t: Array, total: Array, dz: Array, dx: Array, db: Array, scratch: Array
) -> None:
    dense_softmax_cross_entropy(x, w, b, t, total, dz, scratch)
    dense_relu_grads(dz, w, x, dx, db, scratch)


def classifier_sgd(
    x: Array, w: Array, b: Array, t: Array, total: Array, lr: Array, dx: Array, db: Array, scratch: Array
) -> None:
    size = len(x) * w.shape[1]
    dz, rest = scratch[:size].reshape(len(x), w.shape[1]), scratch[size:]
    classifier_grads(x, w, b, t, total, dz, dx, db, rest)
    dense_bias_sgd(dz, b, lr, rest)
    dense_weight_sgd(x, dz, w, lr, rest)


def sgd(p: Array, g: Array, lr: Array, scratch: Array) -> None:
    p -= np.multiply(g, p.dtype.type(lr[0]), out=scratch[: len(g)])


def sgd_momentum(
    p: Array, velocity: Array, g: Array, lr: Array, momentum: Array, nesterov: Array, scratch: Array
) -> None:
    mu, step = p.dtype.type(momentum[0]), scratch[: len(p)]
    velocity *= mu
    velocity += g
    if nesterov[0]:
        np.multiply(velocity, mu, out=step)
        step += g
    else:
        np.copyto(step, velocity)
    step *= p.dtype.type(lr[0])
    p -= step


def adam(
    p: Array, m: Array, v: Array, g: Array, lr: Array, betas: Array, eps: Array, steps: Array, scratch: Array
) -> None:
    # Kingma and Ba, 2015, algorithm 1
    steps += 1
    real, step = p.dtype.type, scratch[: len(p)]
    unbias1, unbias2 = 1 - betas ** steps[0]
    np.subtract(g, m, out=step)
    step *= real(1 - betas[0])
    m += step
    np.multiply(g, g, out=step)
    step -= v
    step *= real(1 - betas[1])
    v += step
    np.sqrt(v, out=step)
    step *= real(unbias2**-0.5)
    step += real(eps[0])
    np.divide(m, step, out=step)
    step *= real(lr[0] / unbias1)
    p -= step


def _ones(rows: int, scratch: Array) -> Array:
    ones = scratch[:rows]
    ones.fill(1)
    return ones[None]
