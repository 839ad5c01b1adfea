"""Ops in the teaching notebook's way: whole arrays through NumPy, fresh ones for each result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastbp.kernels.ops import Array

__all__ = ["WAYS"]


def dense_forward(x: Array, w: Array, b: Array) -> Array:
    z: Array = np.dot(x, w) + b
    return z


def dense_input_grad(dz: Array, w: Array) -> Array:
    dx: Array = np.dot(dz, w.T)
    return dx


def dense_weight_grad(x: Array, dz: Array) -> Array:
    dw: Array = np.dot(x.T, dz)
    return dw


def dense_bias_grad(dz: Array) -> Array:
    db: Array = np.sum(dz, axis=0, keepdims=True)
    return db


def relu_forward(x: Array) -> Array:
    return np.maximum(0, x)


def relu_backward(dy: Array, y: Array) -> Array:
    dx = dy.copy()
    dx[y <= 0] = 0
    return dx


def softmax_forward(z: Array) -> Array:
    exponentials = np.exp(z - np.max(z, axis=1, keepdims=True))
    p: Array = exponentials / np.sum(exponentials, axis=1, keepdims=True)
    return p


def jacobian_loop(dp: Array, p: Array) -> Array:
    """One sample's Jacobian after the other."""
    dz = np.empty_like(dp)
    for i, (output, dvalue) in enumerate(zip(p, dp, strict=True)):
        output = output.reshape(-1, 1)
        dz[i] = np.dot(np.diagflat(output) - np.dot(output, output.T), dvalue)
    return dz


def jacobian_einsum(dp: Array, p: Array) -> Array:
    """The Jacobians of the batch, all at once."""
    jacobians = p[:, :, None] * (np.eye(p.shape[1], dtype=p.dtype) - p[:, None, :])
    dz: Array = np.einsum("bij,bj->bi", jacobians, dp)
    return dz


def softmax_backward(dp: Array, p: Array) -> Array:
    """Without a Jacobian."""
    dz: Array = p * (dp - np.sum(dp * p, axis=1, keepdims=True))
    return dz


def cross_entropy_forward(p: Array, t: Array, total: Array) -> Array:
    cost: Array = -np.log(np.clip(p, 1e-7, 1 - 1e-7)[range(len(p)), t])
    total += np.sum(cost), len(cost)
    return cost


def cross_entropy_backward(p: Array, t: Array) -> Array:
    dp: Array = -np.eye(p.shape[1], dtype=p.dtype)[t] / p / len(p)
    return dp


def softmax_cross_entropy_backward(p: Array, t: Array) -> Array:
    dz = p.copy()
    dz[range(len(p)), t] -= 1
    return dz / len(p)


def softmax_cross_entropy(z: Array, t: Array, total: Array) -> Array:
    p = softmax_forward(z)
    cross_entropy_forward(p, t, total)
    return softmax_cross_entropy_backward(p, t)


def sgd(p: Array, g: Array, lr: Array) -> tuple[()]:
    p -= float(lr[0]) * g
    return ()


_PLAIN: list[Any] = [
    dense_forward, dense_input_grad, dense_weight_grad, dense_bias_grad, relu_forward, relu_backward, softmax_forward,
    cross_entropy_forward, cross_entropy_backward, softmax_cross_entropy_backward, softmax_cross_entropy, sgd,
]  # fmt: skip
WAYS: dict[str, dict[str, Callable[..., Any]]] = {
    **{function.__name__: {"notebook": function} for function in _PLAIN},
    "softmax_backward": {
        "notebook": jacobian_loop,
        "Jacobian einsum": jacobian_einsum,
        "closed form": softmax_backward,
    },
}
