"""The reference engine: the shortest correct NumPy for each op.

A function here is named as its op in `ops.OPS`; it takes the op's inputs, then its outputs, and writes the outputs.
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


def take(x: Array, rows: Array, xb: Array) -> None:
    if x.dtype == xb.dtype:
        np.take(x, rows, axis=0, out=xb, mode="clip")  # any other mode buffers a copy of `out`
    else:
        xb[...] = x[rows]


take_labels = take


def dense_forward(x: Array, w: Array, b: Array, z: Array) -> None:
    np.matmul(x, w, out=z)
    np.add(z, b, out=z)


def dense_input_grad(dz: Array, w: Array, dx: Array) -> None:
    np.matmul(dz, w.T, out=dx)


def dense_param_grads(x: Array, dz: Array, dw: Array, db: Array) -> None:
    np.matmul(x.T, dz, out=dw)
    np.sum(dz, axis=0, keepdims=True, out=db)


def relu_forward(x: Array, y: Array) -> None:
    np.maximum(x, 0, out=y)


def relu_backward(dy: Array, y: Array, dx: Array) -> None:
    np.copyto(dx, dy)
    np.copyto(dx, 0, where=y <= 0)


def dropout_forward(x: Array, rate: Array, key: Array, y: Array, mask: Array) -> None:
    # key = (two words of the seed, step, layer); a block of eight 32-bit numbers is Philox of (block, step, layer)
    philox = np.random.Philox(key=key[:2], counter=[0, key[2], key[3], 0])
    uniform = np.random.Generator(philox).random(x.shape, dtype=np.float32)
    scale = 1 / (1 - rate[0]) if rate[0] < 1 else 0
    np.multiply(uniform >= rate[0], scale, out=mask, casting="unsafe")
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


def softmax_cross_entropy(z: Array, t: Array, total: Array, dz: Array) -> None:
    row = np.arange(len(t))
    np.subtract(z, z.max(axis=1, keepdims=True), out=dz)
    target_logit = dz[row, t]
    np.exp(dz, out=dz)
    sums = dz.sum(axis=1)
    total += (np.log(sums) - target_logit).sum(dtype=np.float64), len(t)
    dz /= (sums * len(t))[:, None]
    dz[row, t] -= 1 / len(t)


def softmax_cross_entropy_backward(p: Array, t: Array, dz: Array) -> None:
    np.copyto(dz, p)
    dz[np.arange(len(t)), t] -= 1
    dz /= len(t)


def mean_squared_error(y: Array, t: Array, total: Array, dy: Array) -> None:
    np.subtract(y, t, out=dy)
    total += np.einsum("bn,bn->", dy, dy, dtype=np.float64), dy.size
    dy *= 2 / dy.size


def sgd(p: Array, g: Array, lr: Array) -> None:
    p -= g * p.dtype.type(lr[0])


def sgd_momentum(p: Array, velocity: Array, g: Array, lr: Array, momentum: Array, nesterov: Array) -> None:
    mu = p.dtype.type(momentum[0])
    velocity *= mu
    velocity += g
    p -= p.dtype.type(lr[0]) * (g + mu * velocity if nesterov[0] else velocity)


def adam(p: Array, m: Array, v: Array, g: Array, lr: Array, betas: Array, eps: Array, steps: Array) -> None:
    # Kingma and Ba, 2015, algorithm 1
    steps += 1
    beta1, beta2 = betas.astype(p.dtype)
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    unbias1, unbias2 = 1 - betas ** steps[0]
    p -= p.dtype.type(lr[0] / unbias1) * m / (np.sqrt(v) * p.dtype.type(unbias2**-0.5) + p.dtype.type(eps[0]))
