"""A layer that turns integer codes into vectors."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from .boundary import as_count, as_tuple
from .interop import dense
from .kernels.engine import Engine, real_array
from .kernels.ops import Array
from .layers import Layer, Parameter

__all__ = ["Embedding"]

MOST_CODES = 1 << 24  # whole numbers that float32 tells apart
ROWS_AT_A_TIME = 1 << 16


class Embedding(Layer):
    """Replace each code in some columns by a vector that is learnt for it; let the other columns pass.

    The layer stands first in a model. Its input holds, besides numbers, columns of codes: whole numbers from 0 to
    below `num_embeddings`, which say to which category a row belongs. The output has the columns in the same order,
    with `embedding_dim` of them in place of each column of codes (Guo and Berkhahn, 2016).

    Parameters
    ----------
    features : int
        Of the input, all columns counted.
    columns : int or sequence of int
        Which ones hold codes, from 0.
    num_embeddings : int or sequence of int
        How many codes there are, in each of these columns, or one number for all; at most 2**24, which is how far
        float32 counts.
    embedding_dim : int or sequence of int
        Sizes of their vectors, likewise.
    engine : str or Engine, optional

    Attributes
    ----------
    weights : array, shape (size of all tables,)
        All vectors, one table after the other in the order of `columns`; drawn from the standard normal distribution,
        as `torch.nn.Embedding` does.
    dweights : array
        Their gradient, of the same shape, after `backward`; 0 for codes that the batch does not hold.
    tables, dtables : dict of array
        For each column a view of `weights` (`dweights`), shape (num_embeddings, embedding_dim).

    Raises
    ------
    ValueError
        For a column that is not there, or that is given twice, for numbers that do not fit together or are out of
        range; from `forward`, and from a model before anything changes, for a code that is out of range or no whole
        number.

    Notes
    -----
    ``dinputs`` is 0 in columns of codes. Codes are checked where the layer is the first to see X, alone or within a
    `Residual`; what is no code gives NaN otherwise, of which `Sequential.predict` makes no class.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> layer = fastbp.Embedding(features=3, columns=1, num_embeddings=4, embedding_dim=2)
    >>> layer.weights = np.arange(8.0)
    >>> layer.tables[1]
    array([[0., 1.],
           [2., 3.],
           [4., 5.],
           [6., 7.]])
    >>> layer.forward(np.array([[0.5, 3, -0.5], [0.1, 0, -0.1]]))
    array([[ 0.5,  6. ,  7. , -0.5],
           [ 0.1,  0. ,  1. , -0.1]])
    """

    weights = Parameter()
    dweights: Array
    features: int

    def __init__(
        self,
        features: int,
        columns: int | Iterable[int],
        num_embeddings: int | Iterable[int],
        embedding_dim: int | Iterable[int],
        *,
        engine: str | Engine | None = None,
    ) -> None:
        super().__init__(engine=engine)
        self.features = as_count(features, "features")
        places = _counts(columns, "columns", least=0)
        if not places or len(set(places)) < len(places) or max(places) >= self.features:
            raise ValueError(f"columns must be different numbers from 0 to {self.features - 1}, got {columns!r}")
        most = _counts(num_embeddings, "num_embeddings", of=len(places))
        if max(most) > MOST_CODES:
            raise ValueError(f"num_embeddings must be at most 2**24, got {max(most)}")
        dims = _counts(embedding_dim, "embedding_dim", of=len(places))
        starts = itertools.accumulate(map(operator.mul, most, dims), initial=0)
        # for each column where its table begins in `weights`, how many codes it has, and the size of a vector
        self._layout = dict(zip(places, zip(starts, most, dims, strict=False), strict=True))

    @property
    def columns(self) -> tuple[int, ...]:
        return tuple(self._layout)

    @property
    def num_embeddings(self) -> tuple[int, ...]:
        return tuple(codes for _, codes, _ in self._layout.values())

    @property
    def embedding_dim(self) -> tuple[int, ...]:
        return tuple(dim for *_, dim in self._layout.values())

    @property
    def tables(self) -> dict[int, Array]:
        return self._split(self.weights)

    @property
    def dtables(self) -> dict[int, Array]:
        return self._split(self.dweights)

    def forward(self, x: Array) -> Array:
        self.inputs = self.read(x, self.features)
        if isinstance(self.engine, Engine):  # and not a recorder, whose arrays have no values
            self.check_rows(self.engine.asnumpy(self.inputs), "x")
        self.output = self.engine.embedding_forward(self.inputs, self.weights, *self._places())
        return self.output

    def backward(self, dvalues: Array) -> Array:
        dvalues = self.read_gradient(dvalues)
        self.dinputs, self.dweights = self.engine.embedding_backward(
            dvalues, self.inputs, self.weights, *self._places()
        )
        return self.dinputs

    def check_rows(self, X: Array, name: str = "X") -> None:
        for column, most in zip(self.columns, self.num_embeddings, strict=True):
            for start in range(0, X.shape[0], ROWS_AT_A_TIME):  # X may be larger than memory
                codes = real_array(dense(X[start : start + ROWS_AT_A_TIME, [column]]))[:, 0]
                right = (codes >= 0) & (codes < most) & (codes == np.floor(codes))
                if not right.all():
                    row = int(right.argmin())
                    raise ValueError(
                        f"{name} must hold codes, whole numbers from 0 to {most - 1}, in column {column}; "
                        f"got {codes[row]} in row {start + row}"
                    )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weights": (sum(most * dim for _, most, dim in self._layout.values()),)}

    def draw(self, rng: np.random.Generator, *, before_relu: bool = True) -> None:
        if "weights" not in self.__dict__:
            self.weights = rng.standard_normal(self.shapes()["weights"])

    def width(self, features: int) -> int:
        return super().width(features) + sum(dim - 1 for dim in self.embedding_dim)

    def config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("features", "columns", "num_embeddings", "embedding_dim")}

    def _split(self, values: Array) -> dict[int, Array]:
        return {
            column: values[start : start + most * dim].reshape(most, dim)
            for column, (start, most, dim) in self._layout.items()
        }

    def _places(self) -> list[Array]:
        """What each column of the output is made of, as `embedding_forward` takes it."""
        places: list[tuple[int, int, int, int]] = []
        for column in range(self.features):
            start, codes, dim = self._layout.get(column, (0, 0, 1))
            places += [(column, start + place, codes, dim) for place in range(dim)]
        return [self.engine.integers(*numbers) for numbers in zip(*places, strict=True)]


def _counts(value: Any, name: str, *, of: int | None = None, least: int = 1) -> tuple[int, ...]:
    """Check some whole numbers, or `of` of them, which may be given as one for all."""
    if not isinstance(value, Iterable) or isinstance(value, str):
        return (as_count(value, name, least),) * (of or 1)
    items = as_tuple(value, name, "whole numbers")
    counts = tuple(as_count(item, f"{name}[{place}]", least) for place, item in enumerate(items))
    if of not in (None, len(counts)):
        raise ValueError(f"{name} must be a number, or one for each of {of} columns, got {value!r}")
    return counts
