"""Losses and their gradients in the shortest correct NumPy; see `numpy_layers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .ops import Array


def cross_entropy_forward(p: Array, t: Array, total: Array, cost: Array) -> None:
    np.negative(np.log(np.clip(p[np.arange(len(t)), t], 1e-7, 1 - 1e-7)), out=cost)
    total += cost.sum(dtype=np.float64), len(t)


def cross_entropy_backward(p: Array, t: Array, dp: Array) -> None:
    row = np.arange(len(t))
    dp[...] = 0
    # the smallest normal number keeps the gradient finite where a probability has underflowed to 0
    dp[row, t] = -1 / (np.maximum(p[row, t], np.finfo(p.dtype).tiny) * len(t))


def softmax_cross_entropy(z: Array, t: Array, total: Array, dz: Array, scratch: Array) -> None:
    scale = 1 / len(t)
    for rows in blocks(z, 512):
        labels, row = t[rows], np.arange(rows.stop - rows.start)
        # class by class where there are few, because NumPy reduces few long rows faster than many short ones
        shape = z.shape[1], len(row)
        p = scratch[: shape[0] * shape[1]].reshape(shape) if shape[0] < 32 else dz[rows].T
        np.copyto(p, z[rows].T)
        p -= p.max(axis=0)
        total[0] -= p[labels, row].sum(dtype=np.float64)
        np.exp(p, out=p)
        sums = p.sum(axis=0)
        total += np.log(sums).sum(dtype=np.float64), len(row)
        sums *= len(t)
        p /= sums
        p[labels, row] -= scale
        np.copyto(dz[rows], p.T)


def softmax_cross_entropy_backward(p: Array, t: Array, dz: Array) -> None:
    np.copyto(dz, p)
    dz[np.arange(len(t)), t] -= 1
    dz /= len(t)


def soft_softmax_cross_entropy(
    z: Array,
    t: Array,
    weights: Array,
    class_weight: Array,
    smoothing: Array,
    mean: Array,
    total: Array,
    cost: Array,
    dz: Array,
    scratch: Array,
) -> None:
    shares = scratch[-len(class_weight) :]  # in the float type
    np.copyto(shares, class_weight, casting="same_kind")
    scale = weigh_targets(t, weights, shares, mean, total)
    for rows in blocks(z):
        q, d = scratch[: z[rows].size].reshape(z[rows].shape), dz[rows]
        targets(q, t[rows], shares, smoothing)
        sums = q.sum(axis=1)
        np.subtract(z[rows], z[rows].max(axis=1, keepdims=True), out=d)
        cost[rows] = -weighted_sum(q, d, scratch)
        np.exp(d, out=d)
        exp_sums = d.sum(axis=1)
        cost[rows] += sums * np.log(exp_sums)
        d *= (sums / exp_sums)[:, None]
        d -= q
        finish(cost[rows], d, np.where(sums, weights[rows], 0), scale, total)


weighted_softmax_cross_entropy = soft_softmax_cross_entropy  # for labels in place of rows


def soft_cross_entropy(
    p: Array,
    t: Array,
    weights: Array,
    class_weight: Array,
    smoothing: Array,
    mean: Array,
    total: Array,
    cost: Array,
    dp: Array,
    scratch: Array,
) -> None:
    shares = scratch[-len(class_weight) :]  # in the float type
    np.copyto(shares, class_weight, casting="same_kind")
    scale = weigh_targets(t, weights, shares, mean, total)
    for rows in blocks(p):
        q, d = scratch[: p[rows].size].reshape(p[rows].shape), dp[rows]
        targets(q, t[rows], shares, smoothing)
        np.clip(p[rows], 1e-7, 1 - 1e-7, out=d)
        np.log(d, out=d)
        cost[rows] = -weighted_sum(q, d, scratch)
        counting = np.where(q.any(axis=1), weights[rows], 0)
        finish(cost[rows], q, counting, scale, total)
        np.maximum(np.abs(p[rows], out=d), np.finfo(p.dtype).tiny, out=d)
        np.divide(q, d, out=d)
        np.negative(d, out=d)
        d[counting == 0] = 0
        # weights may take the slope at a probability of 0 beyond what the float type holds
        sizes, small = scratch[q.size : 2 * q.size].reshape(q.shape), scratch[2 * q.size :].view(bool)[: q.size]
        small = np.less(np.abs(p[rows], out=sizes), 1e-7, out=small.reshape(q.shape))
        steepest = 1 / np.finfo(p.dtype).tiny
        np.clip(d, -steepest, steepest, out=d, where=small)


def one_hot(t: Array, p: Array, rows: Array) -> None:
    rows[...] = 0
    rows[np.arange(len(t)), t] = 1


def mean_squared_error(
    y: Array, t: Array, weights: Array, mean: Array, total: Array, cost: Array, dy: Array, scratch: Array
) -> None:
    def squares(y: Array, t: Array, costs: Array, slopes: Array) -> None:
        np.subtract(y, t, out=slopes)
        np.multiply(slopes, slopes, out=costs, dtype=np.float64)
        slopes *= 2

    elementwise(squares, y, t, weights, mean, total, cost, dy, scratch)


def mean_absolute_error(
    y: Array, t: Array, weights: Array, mean: Array, total: Array, cost: Array, dy: Array, scratch: Array
) -> None:
    def distances(y: Array, t: Array, costs: Array, slopes: Array) -> None:
        np.subtract(y, t, out=slopes)
        np.abs(slopes, out=costs)
        np.sign(slopes, out=slopes)

    elementwise(distances, y, t, weights, mean, total, cost, dy, scratch)


def huber(
    y: Array, t: Array, weights: Array, delta: Array, mean: Array, total: Array, cost: Array, dy: Array, scratch: Array
) -> None:
    def bounded(y: Array, t: Array, costs: Array, slopes: Array) -> None:
        # with the slope e up to delta, and +-delta beyond, both branches are slope * (e - slope / 2)
        np.subtract(y, t, out=costs, dtype=np.float64)
        np.clip(costs, -delta, delta, out=slopes, casting="same_kind")
        costs *= 2
        costs -= slopes
        costs *= slopes
        costs /= 2

    elementwise(bounded, y, t, weights, mean, total, cost, dy, scratch)


def poisson(
    y: Array,
    t: Array,
    weights: Array,
    log_input: Array,
    mean: Array,
    total: Array,
    cost: Array,
    dy: Array,
    scratch: Array,
) -> None:
    def of_log_rates(y: Array, t: Array, costs: Array, slopes: Array) -> None:
        np.multiply(t, y, out=costs)
        np.exp(y, out=slopes)
        np.subtract(slopes, costs, out=costs)
        slopes -= t

    def of_rates(y: Array, t: Array, costs: Array, slopes: Array) -> None:
        np.add(y, 1e-8, out=slopes)
        np.log(slopes, out=costs)
        costs *= t
        np.subtract(y, costs, out=costs)
        np.divide(t, slopes, out=slopes)
        np.subtract(1, slopes, out=slopes)

    elementwise(of_log_rates if log_input[0] else of_rates, y, t, weights, mean, total, cost, dy, scratch)


def binary_cross_entropy(
    y: Array,
    t: Array,
    weights: Array,
    pos_weight: Array,
    mean: Array,
    total: Array,
    cost: Array,
    dy: Array,
    scratch: Array,
) -> None:
    def bits(z: Array, t: Array, costs: Array, slopes: Array) -> None:
        # log(1 + exp(-z)) where t is 1, of slope -1 / (1 + exp(z)), and log(1 + exp(z)) where t is 0
        u, v = scratch[-2 * z.size :].reshape(2, *z.shape)
        np.logaddexp(0, z, out=u)
        np.subtract(1, t, out=v)
        np.multiply(v, u, out=costs)
        np.exp(np.negative(u, out=u), out=u)
        u *= t
        u *= pos_weight
        np.logaddexp(0, np.negative(z, out=slopes), out=slopes)
        np.multiply(slopes, t, out=v)
        v *= pos_weight
        costs += v
        np.exp(np.negative(slopes, out=slopes), out=slopes)
        slopes *= np.subtract(1, t, out=v)
        slopes -= u

    elementwise(bits, y, t, weights, mean, total, cost, dy, scratch)


def blocks(x: Array, longest: int = 128) -> Iterator[slice]:
    """Rows in pieces, so that a loss needs little room for what is in between, and vectors of a piece are small."""
    size = max(1, min(longest, (1 << 15) // x.shape[1]))
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))


def inverse(weight: float, mean: Array) -> float:
    """What gradients are multiplied by."""
    return 1 if not mean[0] else 1 / weight if weight else 0


def elementwise(
    function: Callable[[Array, Array, Array, Array], None],
    y: Array,
    t: Array,
    weights: Array,
    mean: Array,
    total: Array,
    cost: Array,
    dy: Array,
    scratch: Array,
) -> None:
    """`function` writes costs, in float64 because squares may be large, and slopes."""
    weight = weights.sum(dtype=np.float64) * y.shape[1]
    for rows in blocks(y):
        costs, slopes = scratch.view(np.float64)[: y[rows].size].reshape(y[rows].shape), dy[rows]
        function(y[rows], t[rows], costs, slopes)
        costs *= weights[rows, None]
        total[0] += costs.sum()
        np.copyto(cost[rows], costs, casting="same_kind")
        slopes *= weights[rows, None] * inverse(weight, mean)
    total[1] += weight


def weigh_targets(t: Array, weights: Array, shares: Array, mean: Array, total: Array) -> float:
    """Add up the rows' weights; returns what gradients are multiplied by."""
    weight = 0.0
    for rows in blocks(t[:, None] if t.ndim == 1 else t):
        counted = shares[t[rows]] if t.ndim == 1 else t[rows] @ shares
        counted *= weights[rows]
        weight += counted.sum(dtype=np.float64)
    total[1] += weight
    return inverse(weight, mean)


def targets(q: Array, t: Array, shares: Array, smoothing: Array) -> None:
    """q = what each class's -log p is multiplied by."""
    real = q.dtype.type
    if t.ndim == 1:
        q[...] = 0
        q[np.arange(len(t)), t] = 1 - smoothing[0]
    else:
        np.multiply(t, real(1 - smoothing[0]), out=q)
    q += real(smoothing[0] / q.shape[1])
    q *= shares


def weighted_sum(q: Array, x: Array, scratch: Array) -> Array:
    """The sums of q * x over rows, where 0 * infinity is 0; q is at the start of the scratch."""
    terms = scratch[q.size : 2 * q.size].reshape(q.shape)
    nothing = scratch[2 * q.size :].view(bool)[: q.size].reshape(q.shape)
    np.multiply(q, x, out=terms)
    np.copyto(terms, 0, where=np.equal(q, 0, out=nothing))
    return terms.sum(axis=1)


def finish(cost: Array, d: Array, weights: Array, scale: float, total: Array) -> None:
    """Weigh the rows; those that do not count become 0, whatever they hold."""
    cost *= weights
    d *= (weights * scale)[:, None]
    d[weights == 0] = cost[weights == 0] = 0
    total[0] += cost.sum(dtype=np.float64)
