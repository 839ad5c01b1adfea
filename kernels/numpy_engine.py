"""The reference engine: the shortest correct NumPy for each op, in `numpy_layers` and its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import numpy_activations, numpy_fused, numpy_layers, numpy_losses, numpy_norms, numpy_optim
from .engine import Engine, kernels_of
from .ops import Array, Op

__all__ = ["NumpyEngine"]

KERNELS = kernels_of(numpy_layers, numpy_activations, numpy_norms, numpy_losses, numpy_optim, numpy_fused)


class NumpyEngine(Engine):
    name = "numpy"
    device = "cpu"

    def supports(self, op: Op) -> bool:
        return op.name in KERNELS

    def kernel(self, op: Op, arguments: Sequence[Array]) -> Callable[..., None]:
        return KERNELS[op.name]
