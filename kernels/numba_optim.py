"""Optimizers as loops, for Numba to compile; see `numba_layers`."""

from __future__ import annotations

import numpy as np

from .numba_math import flushed, sign
from .ops import Array


def clip_value(g: Array, limit: Array) -> None:
    top = g.dtype.type(limit[0])
    for i in range(len(g)):
        g[i] = top if g[i] > top else -top if g[i] < -top else g[i]  # the comparisons let NaN through


def clip_norm(g: Array, limit: Array) -> None:
    squares = 0.0
    for i in range(len(g)):
        squares += np.float64(g[i]) * np.float64(g[i])  # which cannot overflow
    factor = limit[0] / (np.sqrt(squares) + 1e-6)
    if not factor >= 1:
        scale = g.dtype.type(factor)
        for i in range(len(g)):
            g[i] *= scale


def penalize(p: Array, g: Array, l2: Array, l1: Array) -> None:
    square, absolute = p.dtype.type(l2[0]), p.dtype.type(l1[0])
    for i in range(len(p)):
        g[i] += square * p[i] + absolute * sign(p[i])


def decay(p: Array, lr: Array, weight_decay: Array) -> None:
    kept, tiny = p.dtype.type(1 - lr[0] * weight_decay[0]), np.finfo(p.dtype).tiny
    for i in range(len(p)):
        p[i] = flushed(p[i] * kept, tiny)


def l2_loss(
    p: Array, g: Array, alpha: Array, share: Array, width: Array, rows: Array, batch: Array, total: Array
) -> None:
    if batch[1] != 0:
        strength = alpha[0] * width[0] / batch[1]
        factor = p.dtype.type(strength)
        squares = 0.0
        for i in range(len(p)):
            squares += np.float64(p[i]) * np.float64(p[i])
            g[i] += factor * p[i]
        total[0] += rows[0] * (share[0] * batch[0] / batch[1] + strength / 2 * squares)
    total[1] += rows[0]
    batch[:] = 0


def accumulate(g: Array, total: Array, mean: Array, seen: Array, count: Array, sum: Array) -> None:
    share = total[1] - seen[0] if mean[0] != 0 else 1.0
    seen[0] = total[1]
    count[0] = count[0] + share if mean[0] != 0 else 1.0
    factor = g.dtype.type(share)
    for i in range(len(g)):
        sum[i] += factor * g[i]


def average(sum: Array, count: Array, g: Array) -> None:
    factor = g.dtype.type(1 / count[0] if count[0] != 0 else 0.0)
    for i in range(len(g)):
        g[i] = factor * sum[i]
        sum[i] = 0
    count[0] = 0


def sgd(p: Array, g: Array, lr: Array) -> None:
    rate = p.dtype.type(lr[0])
    for i in range(len(p)):
        p[i] -= rate * g[i]


def sgd_momentum(p: Array, velocity: Array, g: Array, lr: Array, momentum: Array, nesterov: Array) -> None:
    rate, mu = p.dtype.type(lr[0]), p.dtype.type(momentum[0])
    ahead, tiny = nesterov[0] != 0, np.finfo(p.dtype).tiny
    for i in range(len(p)):
        velocity[i] = flushed(mu * velocity[i] + g[i], tiny)
        p[i] -= rate * (g[i] + mu * velocity[i] if ahead else velocity[i])


def rmsprop(
    p: Array,
    v: Array,
    m: Array,
    velocity: Array,
    g: Array,
    lr: Array,
    alpha: Array,
    eps: Array,
    momentum: Array,
    centered: Array,
) -> None:
    real = p.dtype.type
    new, rate, small, mu = real(1 - alpha[0]), real(lr[0]), real(eps[0]), real(momentum[0])
    center, heavy, tiny = centered[0] != 0, momentum[0] != 0, np.finfo(p.dtype).tiny
    for i in range(len(p)):
        v[i] = flushed(v[i] + new * (g[i] * g[i] - v[i]), tiny)
        spread = v[i]
        if center:
            m[i] = flushed(m[i] + new * (g[i] - m[i]), tiny)
            spread -= m[i] * m[i]
            spread = real(0) if spread < 0 else spread  # as rounding may leave it
        step = g[i] / (np.sqrt(spread) + small)
        if heavy:
            velocity[i] = flushed(mu * velocity[i] + step, tiny)
            step = velocity[i]
        p[i] -= rate * step


def lion(p: Array, m: Array, g: Array, lr: Array, betas: Array) -> None:
    # Chen et al., 2023, algorithm 2
    real = p.dtype.type
    new1, new2, rate, tiny = real(1 - betas[0]), real(1 - betas[1]), real(lr[0]), np.finfo(p.dtype).tiny
    for i in range(len(p)):
        toward = g[i] - m[i]
        p[i] -= rate * sign(m[i] + new1 * toward)
        m[i] = flushed(m[i] + new2 * toward, tiny)


def adam(p: Array, m: Array, v: Array, g: Array, lr: Array, betas: Array, eps: Array, steps: Array) -> None:
    # Kingma and Ba, 2015, algorithm 1
    real = p.dtype.type
    steps[0] += 1
    new1, new2 = real(1 - betas[0]), real(1 - betas[1])
    rate = real(lr[0] / (1 - betas[0] ** steps[0]))
    growth = (1 - betas[1] ** steps[0]) ** -0.5
    unbias, small, tiny = real(growth), real(eps[0] + eps[1] * growth), np.finfo(p.dtype).tiny
    for i in range(len(p)):
        m[i] = flushed(m[i] + new1 * (g[i] - m[i]), tiny)
        v[i] = flushed(v[i] + new2 * (g[i] * g[i] - v[i]), tiny)
        p[i] -= rate * m[i] / (np.sqrt(v[i]) * unbias + small)
