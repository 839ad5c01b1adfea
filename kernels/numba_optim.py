"""Optimizers as loops, for Numba to compile; see `numba_layers`."""

from __future__ import annotations

import numpy as np

from .ops import Array


def sgd(p: Array, g: Array, lr: Array) -> None:
    rate = p.dtype.type(lr[0])
    for i in range(len(p)):
        p[i] -= rate * g[i]


def sgd_momentum(p: Array, velocity: Array, g: Array, lr: Array, momentum: Array, nesterov: Array) -> None:
    rate, mu = p.dtype.type(lr[0]), p.dtype.type(momentum[0])
    ahead = nesterov[0] != 0
    for i in range(len(p)):
        velocity[i] = mu * velocity[i] + g[i]
        p[i] -= rate * (g[i] + mu * velocity[i] if ahead else velocity[i])


def adam(p: Array, m: Array, v: Array, g: Array, lr: Array, betas: Array, eps: Array, steps: Array) -> None:
    # Kingma and Ba, 2015, algorithm 1
    real = p.dtype.type
    steps[0] += 1
    new1, new2, tiny = real(1 - betas[0]), real(1 - betas[1]), real(eps[0])
    rate = real(lr[0] / (1 - betas[0] ** steps[0]))
    unbias = real((1 - betas[1] ** steps[0]) ** -0.5)
    for i in range(len(p)):
        m[i] += new1 * (g[i] - m[i])
        v[i] += new2 * (g[i] * g[i] - v[i])
        p[i] -= rate * m[i] / (np.sqrt(v[i]) * unbias + tiny)
