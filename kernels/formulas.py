"""What each op computes, as plain formulas of float64 arrays, to check engines against.

A formula takes the op's inputs and returns what is updated in place, then the outputs. It shares no code with any
engine: no BLAS, no ``out=``, no scratch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .op import Array

__all__ = ["FORMULAS"]


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


@np.vectorize
def normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def gelu_tanh_backward(dy: Array, x: Array) -> tuple[Array, ...]:
    scale = 2 * np.sqrt(2 / np.pi)
    s = sigmoid(scale * (x + 0.044715 * x**3))
    return (dy * s * (1 + x * (1 - s) * scale * (1 + 3 * 0.044715 * x**2)),)


def product(a: Array, b: Array) -> Array:
    return (a[:, :, None] * b).sum(1)


def relu_input_grad(dz: Array, w: Array, y: Array) -> tuple[Array, ...]:
    return (np.where(y <= 0, 0, product(dz, w.T)),)


def relu_grads(dz: Array, w: Array, y: Array) -> tuple[Array, ...]:
    (dx,) = relu_input_grad(dz, w, y)
    return dx, dx.sum(0)[None]


def grads_through(name: str) -> Callable[..., tuple[Array, ...]]:
    """Input gradient, activation backward and bias gradient in a row."""

    def grads(dz: Array, w: Array, y: Array, *settings: Array) -> tuple[Array, ...]:
        (dx,) = FORMULAS[f"{name}_backward"](product(dz, w.T), y, *settings)
        return dx, dx.sum(0)[None]

    return grads


def one_hot(t: Array, p: Array) -> Array:
    return np.eye(p.shape[1])[t]


def shuffled(keys: list[int], size: int) -> Array:
    def place(row: int) -> int:
        for key in keys:
            high, low = divmod(key, 2**32)
            other = (high * size // 2**32 - row) % size
            row = other if max(row, other) * low % 2**32 >= 2**31 else row
        return row

    return np.array([place(row) for row in range(size)])


def masked(x: Array, rate: Array, key: Array) -> tuple[Array, ...]:
    """NumPy's own Philox, whose counter is (block, step, layer, 0)."""
    random = np.random.Generator(np.random.Philox(key=key[:2], counter=[0, key[2], key[3], 0]))
    mask = (random.random(x.shape, np.float32) >= rate) / (1 - rate[0])
    return key + np.array([0, 0, 1, 0], np.uint64), x * mask, mask


def momentum(p: Array, velocity: Array, g: Array, lr: Array, mu: Array, nesterov: Array) -> tuple[Array, ...]:
    velocity = mu * velocity + g
    return p - lr * (g + mu * velocity if nesterov else velocity), velocity


def adam(
    p: Array, m: Array, v: Array, g: Array, lr: Array, betas: Array, eps: Array, steps: Array
) -> tuple[Array, ...]:
    a, b = betas
    m, v, k = a * m + (1 - a) * g, b * v + (1 - b) * g**2, steps + 1
    return p - lr * (m / (1 - a**k)) / ((np.sqrt(v) + eps[1]) / np.sqrt(1 - b**k) + eps[0]), m, v, k


def rmsprop(
    p: Array,
    v: Array,
    m: Array,
    velocity: Array,
    g: Array,
    lr: Array,
    alpha: Array,
    eps: Array,
    mu: Array,
    centered: Array,
) -> tuple[Array, ...]:
    v = alpha * v + (1 - alpha) * g**2
    m = alpha * m + (1 - alpha) * g if centered else m
    scaled = g / (np.sqrt(np.maximum(v - m**2, 0) if centered else v) + eps)
    velocity = mu * velocity + scaled if mu else velocity
    return p - lr * (velocity if mu else scaled), v, m, velocity


def lion(p: Array, m: Array, g: Array, lr: Array, betas: Array) -> tuple[Array, ...]:
    a, b = betas
    return p - lr * np.sign(a * m + (1 - a) * g), b * m + (1 - b) * g


def cross_entropy(p: Array, t: Array, total: Array) -> tuple[Array, ...]:
    cost = -np.log(np.clip(p[np.arange(len(t)), t], 1e-7, 1 - 1e-7))
    return total + np.array([cost.sum(), len(t)]), cost


def softmax_cross_entropy(z: Array, t: Array, total: Array) -> tuple[Array, ...]:
    top = z.max(1)
    costs = top + np.log(np.exp(z - top[:, None]).sum(1)) - z[np.arange(len(t)), t]
    return total + np.array([costs.sum(), len(t)]), (softmax(z) - one_hot(t, z)) / len(t)


def logits_costs(z: Array) -> Array:
    z = z - z.max(1, keepdims=True)
    return np.log(np.exp(z).sum(1, keepdims=True)) - z


def cross_entropy_of_rows(
    slopes: Callable[[Array, Array], Array],
    costs: Array,
    t: Array,
    weights: Array,
    class_weight: Array,
    smoothing: Array,
    mean: Array,
    total: Array,
) -> tuple[Array, ...]:
    """`slopes` are those of the costs' sum for one row, given its q and their sum."""
    q = ((1 - smoothing) * t + smoothing / t.shape[1]) * class_weight
    sums = q.sum(1, keepdims=True)
    counts = (weights != 0) & (sums[:, 0] != 0)
    cost = np.where(counts, weights * np.where(q == 0, 0, q * costs).sum(1), 0)
    weight = (weights * (t * class_weight).sum(1)).sum()
    scale = np.where(counts, weights / weight if weight else 0 * weights, 0) if mean else np.where(counts, weights, 0)
    gradient = np.where(counts[:, None], scale[:, None] * slopes(q, sums), 0)
    return total + np.array([cost.sum(), weight]), cost, gradient


def weighted_softmax_cross_entropy(z: Array, t: Array, *options: Array) -> tuple[Array, ...]:
    return soft_softmax_cross_entropy(z, one_hot(t, z), *options)


def soft_softmax_cross_entropy(z: Array, t: Array, *options: Array) -> tuple[Array, ...]:
    return cross_entropy_of_rows(lambda q, sums: sums * softmax(z) - q, logits_costs(z), t, *options)


def soft_cross_entropy(p: Array, t: Array, *options: Array) -> tuple[Array, ...]:
    costs = -np.log(np.clip(p, 1e-7, 1 - 1e-7))
    return cross_entropy_of_rows(lambda q, sums: np.where(q == 0, 0, -q / p), costs, t, *options)


def elementwise(cost: Callable[..., Array], slope: Callable[..., Array]) -> Callable[..., tuple[Array, ...]]:
    """A loss that is a weighted sum over elements: of costs, from outputs, targets and settings, and their slopes."""

    def loss(y: Array, t: Array, weights: Array, *rest: Array) -> tuple[Array, ...]:
        *settings, mean, total = rest
        costs = weights[:, None] * cost(y, t, *settings)
        weight = weights.sum() * y.shape[1]
        scale = (weights / weight if weight else 0 * weights) if mean else weights
        return total + np.array([costs.sum(), weight]), costs, scale[:, None] * slope(y, t, *settings)

    return loss


def classifier_grads(x: Array, w: Array, b: Array, t: Array, total: Array) -> tuple[Array, ...]:
    total, dz = softmax_cross_entropy(product(x, w) + b, t, total)
    return total, dz, *relu_grads(dz, w, x)


def classifier_sgd(x: Array, w: Array, b: Array, t: Array, total: Array, lr: Array) -> tuple[Array, ...]:
    total, dz, dx, db = classifier_grads(x, w, b, t, total)
    return w - lr * product(x.T, dz), b - lr * dz.sum(0), total, dx, db


def accumulate(g: Array, total: Array, mean: Array, seen: Array, count: Array, sums: Array) -> tuple[Array, ...]:
    share = total[1:] - seen if mean else np.ones(1)
    return total[1:], count + share if mean else share, sums + share * g


def l2_loss(
    p: Array, g: Array, alpha: Array, share: Array, width: Array, rows: Array, batch: Array, total: Array
) -> tuple[Array, ...]:
    if not batch[1]:
        return g, np.zeros(2), total + rows * np.array([0, 1])
    count = batch[1] / width
    loss = share * batch[0] / batch[1] + alpha / 2 * (p**2).sum() / count
    return g + alpha / count * p, np.zeros(2), total + rows * np.array([loss[0], 1])


def layer_norm(x: Array, w: Array, b: Array, eps: Array) -> tuple[Array, ...]:
    scale = 1 / np.sqrt(x.var(1) + eps)
    normal = (x - x.mean(1, keepdims=True)) * scale[:, None]
    return normal * w + b, normal, scale


def layer_norm_backward(dy: Array, w: Array, normal: Array, scale: Array) -> tuple[Array, ...]:
    g = dy * w
    dx = g - g.mean(1, keepdims=True) - normal * (g * normal).mean(1, keepdims=True)
    return dx * scale[:, None], (dy * normal).sum(0)[None], dy.sum(0)[None]


def batch_statistics(x: Array, momentum: Array, running_mean: Array, running_var: Array) -> tuple[Array, ...]:
    mean, var = x.mean(0), x.var(0)
    if len(x) > 1:
        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var = (1 - momentum) * running_var + momentum * x.var(0, ddof=1)
    return running_mean, running_var, mean, var


def batch_norm(x: Array, w: Array, b: Array, mean: Array, var: Array, eps: Array) -> tuple[Array, ...]:
    scale = 1 / np.sqrt(var + eps)
    normal = (x - mean) * scale
    return normal * w + b, normal, scale


def batch_norm_backward(dy: Array, w: Array, normal: Array, scale: Array, by_batch: Array) -> tuple[Array, ...]:
    dw, db = (dy * normal).sum(0)[None], dy.sum(0)[None]
    dx = dy - (db + normal * dw) / len(dy) if by_batch else dy
    return dx * w * scale, dw, db


def entries(x: Array, column: Array, start: Array, codes: Array, stride: Array) -> tuple[Array, Array]:
    """For each element of an embedding's output its place in the table, and whether it has one."""
    code = x[:, column]
    known = (code >= 0) & (code < codes) & (code == np.floor(code))
    return start + np.where(known, code, 0).astype(int) * stride, known


def embedding(x: Array, w: Array, column: Array, start: Array, codes: Array, stride: Array) -> tuple[Array, ...]:
    index, known = entries(x, column, start, codes, stride)
    return (np.where(known, w[index], np.where(codes, np.nan, x[:, column])),)


def embedding_backward(
    dy: Array, x: Array, w: Array, column: Array, start: Array, codes: Array, stride: Array
) -> tuple[Array, ...]:
    index, known = entries(x, column, start, codes, stride)
    dx, dw = np.zeros(x.shape), np.zeros(w.shape)
    for i, j in np.ndindex(dy.shape):
        if codes[j] == 0:
            dx[i, column[j]] += dy[i, j]
        elif known[i, j]:
            dw[index[i, j]] += dy[i, j]
    return dx, dw


def sparse_rows(
    values: Array, columns: Array, starts: Array, stops: Array, rows: Array, zeros: Array
) -> tuple[Array, ...]:
    x = np.repeat(zeros, len(rows), axis=0)
    for i, row in enumerate(rows):
        for n in range(starts[row], stops[row]):
            x[i, columns[n]] = values[n]
    return (x,)


def sparse_forward(
    values: Array, columns: Array, starts: Array, stops: Array, rows: Array, w: Array, b: Array
) -> tuple[Array, ...]:
    z = np.repeat(b, len(rows), axis=0)
    for i, row in enumerate(rows):
        for n in range(starts[row], stops[row]):
            z[i] += values[n] * w[columns[n]]
    return (z,)


def sparse_weight_grad(
    values: Array, columns: Array, starts: Array, stops: Array, rows: Array, zeros: Array, dz: Array
) -> tuple[Array, ...]:
    dw = np.repeat(zeros.T, dz.shape[1], axis=1)
    for i, row in enumerate(rows):
        for n in range(starts[row], stops[row]):
            dw[columns[n]] += values[n] * dz[i]
    return (dw,)


# what is updated in place, then the outputs
FORMULAS: dict[str, Callable[..., tuple[Array, ...]]] = {
    "shuffle": lambda keys, order: (shuffled(keys.tolist(), len(order)),),
    "next_batch": lambda order, cursor, rows: (cursor + len(rows), order[cursor[0] : cursor[0] + len(rows)]),
    "next_rate": lambda rates, step, rate: (step + 1, rates[step]),
    "take": lambda x, rows: (x[rows],),
    "take_labels": lambda t, rows: (t[rows],),
    "take_weights": lambda w, rows: (w[rows],),
    "sparse_rows": sparse_rows,
    "sparse_forward": sparse_forward,
    "sparse_weight_grad": sparse_weight_grad,
    "add": lambda x, y: (x + y,),
    "multiply": lambda x, y: (x * y,),
    "scale": lambda x, factor: (factor * x,),
    "l2_loss": l2_loss,
    "layer_norm_forward": layer_norm,
    "layer_norm_backward": layer_norm_backward,
    "batch_statistics": batch_statistics,
    "batch_norm_forward": batch_norm,
    "batch_norm_backward": batch_norm_backward,
    "embedding_forward": embedding,
    "embedding_backward": embedding_backward,
    "accumulate": accumulate,
    "average": lambda sums, count: (np.zeros_like(sums), np.zeros(1), sums / count if count else 0 * sums),
    "dense_forward": lambda x, w, b: (product(x, w) + b,),
    "dense_input_grad": lambda dz, w: (product(dz, w.T),),
    "dense_weight_grad": lambda x, dz: (product(x.T, dz),),
    "dense_bias_grad": lambda dz: (dz.sum(0)[None],),
    "relu_forward": lambda x: (np.where(x <= 0, 0, x),),
    "relu_backward": lambda dy, y: (np.where(y <= 0, 0, dy),),
    "leaky_relu_forward": lambda x, slope: (np.where(x > 0, x, slope * x),),
    "leaky_relu_backward": lambda dy, y, slope: (np.where(y > 0, dy, slope * dy),),
    "elu_forward": lambda x, alpha: (np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),),
    "elu_backward": lambda dy, y, alpha: (np.where(y > 0, dy, dy * (y + alpha)),),
    "tanh_forward": lambda x: (np.tanh(x),),
    "tanh_backward": lambda dy, y: (dy * (1 - y) * (1 + y),),
    "sigmoid_forward": lambda x: (sigmoid(x),),
    "sigmoid_backward": lambda dy, y: (dy * y * (1 - y),),
    "gelu_forward": lambda x: (x * normal_cdf(x),),
    "gelu_backward": lambda dy, x: (dy * (normal_cdf(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)),),
    "gelu_tanh_forward": lambda x: (x * sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)),),
    "gelu_tanh_backward": gelu_tanh_backward,
    "silu_forward": lambda x: (x * sigmoid(x),),
    "silu_backward": lambda dy, x: (dy * sigmoid(x) * (1 + x * sigmoid(-x)),),
    "softplus_forward": lambda x, beta, end: (np.where(beta * x > end, x, np.logaddexp(0, beta * x) / beta),),
    "softplus_backward": lambda dy, x, beta, end: (np.where(beta * x > end, dy, dy * sigmoid(beta * x)),),
    "dropout_forward": masked,
    "dropout_backward": lambda dy, mask: (dy * mask,),
    "softmax_forward": lambda z: (softmax(z),),
    "softmax_jacobian": lambda p: (np.stack([np.diag(row) - np.outer(row, row) for row in p]),),
    "softmax_backward": lambda dp, p: (p * (dp - (p * dp).sum(1, keepdims=True)),),
    "cross_entropy_forward": cross_entropy,
    "cross_entropy_backward": lambda p, t: (np.where(one_hot(t, p), -1 / p / len(t), 0),),
    "softmax_cross_entropy": softmax_cross_entropy,
    "softmax_cross_entropy_backward": lambda p, t: ((p - one_hot(t, p)) / len(t),),
    "weighted_softmax_cross_entropy": weighted_softmax_cross_entropy,
    "soft_softmax_cross_entropy": soft_softmax_cross_entropy,
    "soft_cross_entropy": soft_cross_entropy,
    "one_hot": lambda t, p: (one_hot(t, p),),
    "mean_squared_error": elementwise(lambda y, t: (y - t) ** 2, lambda y, t: 2 * (y - t)),
    "mean_absolute_error": elementwise(lambda y, t: np.abs(y - t), lambda y, t: np.sign(y - t)),
    "huber": elementwise(
        lambda y, t, d: np.where(np.abs(y - t) <= d, (y - t) ** 2 / 2, d * (np.abs(y - t) - d / 2)),
        lambda y, t, d: np.where(np.abs(y - t) <= d, y - t, d * np.sign(y - t)),
    ),
    "poisson": elementwise(
        lambda y, t, log_input: np.exp(y) - t * y if log_input else y - t * np.log(y + 1e-8),
        lambda y, t, log_input: np.exp(y) - t if log_input else 1 - t / (y + 1e-8),
    ),
    "binary_cross_entropy": elementwise(
        lambda z, t, pos: pos * t * np.logaddexp(0, -z) + (1 - t) * np.logaddexp(0, z),
        lambda z, t, pos: (1 - t) / (1 + np.exp(-z)) - pos * t / (1 + np.exp(z)),
    ),
    "dense_relu_forward": lambda x, w, b: (np.maximum(product(x, w) + b, 0),),
    "dense_relu_input_grad": relu_input_grad,
    "dense_relu_grads": relu_grads,
    **{f"dense_{name}_grads": grads_through(name) for name in ("leaky_relu", "elu", "tanh", "sigmoid")},
    "dense_weight_sgd": lambda x, dz, w, lr: (w - lr * product(x.T, dz),),
    "dense_relu_sgd": lambda x, dz, w, lr: (w - lr * product(x.T, dz), *relu_grads(dz, w, x)),
    "dense_bias_sgd": lambda dz, b, lr: (b - lr * dz.sum(0),),
    "dense_softmax_cross_entropy": lambda x, w, b, *targets: softmax_cross_entropy(product(x, w) + b, *targets),
    "classifier_grads": classifier_grads,
    "classifier_sgd": classifier_sgd,
    "clip_value": lambda g, limit: (np.clip(g, -limit, limit),),
    "clip_norm": lambda g, limit: (g * np.minimum(limit / (np.sqrt((g**2).sum()) + 1e-6), 1),),
    "penalize": lambda p, g, l2, l1: (g + l2 * p + l1 * np.sign(p),),
    "decay": lambda p, lr, weight_decay: (p * (1 - lr * weight_decay),),
    "sgd": lambda p, g, lr: (p - lr * g,),
    "sgd_momentum": momentum,
    "rmsprop": rmsprop,
    "lion": lion,
    "adam": adam,
}
