"""Neighbouring ops in one, in NumPy; see `numpy_layers`."""

from __future__ import annotations

import numpy as np

from .numpy_activations import relu_backward, relu_forward
from .numpy_layers import dense_bias_grad, dense_forward, dense_input_grad, ones
from .numpy_losses import softmax_cross_entropy
from .ops import Array


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
    dw = np.matmul(x.T, dz, out=scratch[: w.size].reshape(w.shape))
    dw *= w.dtype.type(lr[0])
    w -= dw


def dense_relu_sgd(x: Array, dz: Array, w: Array, lr: Array, dx: Array, db: Array, scratch: Array) -> None:
    dense_relu_grads(dz, w, x, dx, db, scratch)
    dense_weight_sgd(x, dz, w, lr, scratch)


def dense_bias_sgd(dz: Array, b: Array, lr: Array, scratch: Array) -> None:
    b -= ones(len(dz), scratch) @ dz * b.dtype.type(lr[0])


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
