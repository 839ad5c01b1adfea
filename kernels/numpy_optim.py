"""Optimizers in the shortest correct NumPy; see `numpy_layers`."""

from __future__ import annotations

import numpy as np

from .ops import Array


def clip_value(g: Array, limit: Array) -> None:
    np.clip(g, -limit.astype(g.dtype), limit.astype(g.dtype), out=g)


def clip_norm(g: Array, limit: Array, scratch: Array) -> None:
    squares = np.multiply(g, g, out=scratch.view(np.float64)[: len(g)], dtype=np.float64)  # which cannot overflow
    g *= g.dtype.type(np.minimum(limit[0] / (np.sqrt(squares.sum()) + 1e-6), 1))


def penalize(p: Array, g: Array, l2: Array, l1: Array, scratch: Array) -> None:
    real, penalty = p.dtype.type, scratch[: len(p)]
    if l2[0]:
        g += np.multiply(p, real(l2[0]), out=penalty)
    if l1[0]:
        np.sign(p, out=penalty)
        penalty *= real(l1[0])
        g += penalty


def decay(p: Array, lr: Array, weight_decay: Array) -> None:
    p *= p.dtype.type(1 - lr[0] * weight_decay[0])


def l2_loss(
    p: Array,
    g: Array,
    alpha: Array,
    share: Array,
    width: Array,
    rows: Array,
    batch: Array,
    total: Array,
    scratch: Array,
) -> None:
    if batch[1]:
        mean, strength = share[0] * batch[0] / batch[1], alpha[0] * width[0] / batch[1]
        squares = np.multiply(p, p, out=scratch.view(np.float64)[: len(p)], dtype=np.float64)
        total[0] += rows[0] * (mean + strength / 2 * squares.sum())
        g += np.multiply(p, p.dtype.type(strength), out=scratch[: len(p)])
    total[1] += rows[0]
    batch[:] = 0


def accumulate(g: Array, total: Array, mean: Array, seen: Array, count: Array, sum: Array, scratch: Array) -> None:
    share = total[1] - seen[0] if mean[0] else 1.0
    seen[0] = total[1]
    count[0] = count[0] + share if mean[0] else 1
    sum += np.multiply(g, sum.dtype.type(share), out=scratch[: len(g)])


def average(sum: Array, count: Array, g: Array) -> None:
    np.multiply(sum, g.dtype.type(1 / count[0] if count[0] else 0), out=g)
    sum[:] = count[:] = 0


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
    scratch: Array,
) -> None:
    real, step = p.dtype.type, scratch[: len(p)]
    new = real(1 - alpha[0])
    np.multiply(g, g, out=step)
    step -= v
    step *= new
    v += step
    if centered[0]:
        np.subtract(g, m, out=step)
        step *= new
        m += step
        np.multiply(m, m, out=step)
        np.subtract(v, step, out=step)
        np.maximum(step, 0, out=step)  # rounding may leave a variance just below 0
        np.sqrt(step, out=step)
    else:
        np.sqrt(v, out=step)
    step += real(eps[0])
    np.divide(g, step, out=step)
    if momentum[0]:
        velocity *= real(momentum[0])
        velocity += step
        np.copyto(step, velocity)
    step *= real(lr[0])
    p -= step


def lion(p: Array, m: Array, g: Array, lr: Array, betas: Array, scratch: Array) -> None:
    # Chen et al., 2023, algorithm 2
    real, (toward, step) = p.dtype.type, scratch[: 2 * len(p)].reshape(2, -1)
    np.subtract(g, m, out=toward)
    np.multiply(toward, real(1 - betas[0]), out=step)
    step += m
    np.sign(step, out=step)
    step *= real(lr[0])
    p -= step
    toward *= real(1 - betas[1])
    m += toward


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
    step += real(eps[1])
    step *= real(unbias2**-0.5)
    step += real(eps[0])
    np.divide(m, step, out=step)
    step *= real(lr[0] / unbias1)
    p -= step
