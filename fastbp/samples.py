"""Samples to train on, and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .interop import dense, is_sparse
from .kernels.engine import native
from .kernels.ops import Array

__all__ = ["Data", "batches", "stored", "tables"]


class Data(NamedTuple):
    """Samples that were checked against a model."""

    X: Array
    y: Array
    #: How much each row counts, shape (rows,); None where all count 1.
    weights: Array | None = None

    @property
    def rows(self) -> int:
        return self.X.shape[0]

    def take(self, rows: Any) -> Data:
        """Some of the rows, by their numbers or a slice."""
        return Data(self.X[rows], self.y[rows], None if self.weights is None else self.weights[rows])


def batches(data: Data, order: Array, size: int) -> Iterator[Data]:
    """The batches of an epoch over rows in an order; sparse ones are made dense a batch at a time."""
    for start in range(0, len(order), size):
        batch = data.take(order[start : start + size])
        yield batch._replace(X=dense(batch.X))


def tables(data: Data, dtype: Any) -> dict[str, Array]:
    """What the slots of a recording are bound to, by their names, for a model of this float type."""
    rows = stored(data.X, dtype) if is_sparse(data.X) else {"X": data.X}
    return rows | {"y": data.y} | ({} if data.weights is None else {"weights": data.weights})


def stored(X: Any, dtype: Any) -> dict[str, Array]:
    """A sparse table by rows as the op `sparse_rows` reads it: its arguments by name, but `rows`."""
    if not X.has_canonical_format:
        X = X.copy()
        X.sum_duplicates()
    values, columns, ends = native(X.data), X.indices.astype(np.int64, copy=False), X.indptr.astype(np.int64)
    if not len(values):  # which no array of an op may be
        values, columns = np.zeros(1, values.dtype), np.zeros(1, np.int64)
    zeros = np.zeros((1, X.shape[1]), dtype)
    return {"values": values, "columns": columns, "starts": ends[:-1], "stops": ends[1:], "zeros": zeros}
