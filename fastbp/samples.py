"""Samples to train on, and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .interop import dense
from .kernels.ops import Array

__all__ = ["Data", "batches"]


class Data(NamedTuple):
    """Samples that were checked against a model."""

    X: Array
    y: Array
    #: How much each row counts, shape (rows,); None where all count 1.
    weights: Array | None = None

    def take(self, rows: Any) -> Data:
        """Some of the rows, by their numbers or a slice."""
        return Data(self.X[rows], self.y[rows], None if self.weights is None else self.weights[rows])


def batches(data: Data, order: Array, size: int) -> Iterator[Data]:
    """The batches of an epoch over rows in an order; sparse ones are made dense a batch at a time."""
    for start in range(0, len(order), size):
        batch = data.take(order[start : start + size])
        yield batch._replace(X=dense(batch.X))
