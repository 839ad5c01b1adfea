"""Optimizers in the shortest correct NumPy; see `numpy_layers`."""

from __future__ import annotations

import numpy as np

from .ops import Array


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
