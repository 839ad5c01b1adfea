"""Turning the columns of a table into the numbers that a network takes, and its outputs into an answer.

A table is a dict of columns by name: 1-D arrays of numbers or bools, or object arrays of texts. A missing number is
NaN, a missing text None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .boundary import as_number
from .kernels.ops import Array

__all__ = ["Category", "Columns", "Encoder", "Number", "Split", "choose_task", "listed", "prepare", "split_rows"]

Columns: TypeAlias = dict[str, Array]

FEW_VALUES = 20  # integers with more distinct values than this are no classes
MANY_TEXTS = 1000  # a text column with more distinct values than this is a name or a note, not a feature
TOO_LARGE = 1e100  # its square would overflow
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """A column of numbers, standardised: ``(value - mean) / std``; a missing one counts as the mean.

    Examples
    --------
    >>> import numpy as np
    >>> age = Number.of("age", np.array([20.0, 40.0, np.nan]))
    >>> age
    Number(name='age', mean=30.0, std=10.0)
    >>> age.encode(np.array([20.0, np.nan])).tolist()
    [[-1.0], [0.0]]
    """

    name: str
    mean: float
    std: float

    @classmethod
    def of(cls, name: str, values: Array) -> Number:
        """Look at the values to train on."""
        known = _numbers(name, values)
        known = known[~np.isnan(known)]
        if not known.size or known.min() == known.max():  # the std of equal numbers may round to more than 0
            return cls(name, float(known[0]) if known.size else 0.0, 0.0)
        return cls(name, float(known.mean()), float(known.std()))

    def encode(self, values: Array) -> Array:
        """One column; zeros where all values to train on were equal, since nothing was learnt from them."""
        numbers = _numbers(self.name, values)
        numbers = np.where(np.isnan(numbers), self.mean, numbers) - self.mean
        return (numbers / self.std if self.std else np.zeros_like(numbers))[:, None]

    def decode(self, encoded: Array) -> Array:
        """What `encode` was given."""
        return self.mean + self.std * encoded[:, 0].astype(np.float64)


@dataclass(frozen=True)
class Category:
    """A column of texts, one-hot. A missing text, None, is a value of its own; an unknown one becomes all zeros.

    Examples
    --------
    >>> import numpy as np
    >>> colour = Category.of("colour", np.array(["red", "blue", "red"], object))
    >>> colour.values
    ['blue', 'red']
    >>> colour.encode(np.array(["red", "green"], object)).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """

    name: str
    values: list[str | None]

    @classmethod
    def of(cls, name: str, values: Array) -> Category:
        """Look at the values to train on. Numbers keep their order, texts are sorted."""
        known = values if values.dtype == object else np.unique(values[values == values])
        texts = dict.fromkeys(_texts(known))
        return cls(name, sorted(texts, key=lambda x: (x is None, x or "")) if values.dtype == object else list(texts))

    def codes(self, values: Array) -> Array:
        """The place of each value in `values`, -1 where it is unknown."""
        places = {value: place for place, value in enumerate(self.values)}
        return np.array([places.get(text, -1) for text in _texts(values)], np.int64)

    def encode(self, values: Array) -> Array:
        """One column for each of `values`."""
        return np.equal.outer(self.codes(values), np.arange(len(self.values))).astype(np.float32)


@dataclass(frozen=True)
class Encoder:
    """How the columns of a table become the inputs of a network, and its outputs an answer.

    Parameters
    ----------
    features : list of Number or Category
    target : Number or Category
        A `Category` has the classes, a `Number` is the quantity of a regression.
    """

    features: list[Number | Category]
    target: Number | Category

    @classmethod
    def of(cls, columns: Mapping[str, Array], target: Number | Category, rows: Array) -> tuple[Encoder, list[str]]:
        """Look at the rows to train on; also returns notes on what the user may not expect."""
        features: list[Number | Category] = []
        notes: list[str] = []
        for name, values in columns.items():
            if name == target.name:
                continue
            if values.dtype != object and values.dtype != bool:
                features.append(Number.of(name, values[rows]))
                continue
            category = Category.of(name, values[rows])
            if example := _odd_one_out(category.values):
                notes.append(f"column {name!r} is taken as text: it holds numbers, but also {example!r}")
            if len(category.values) > min(max(2, len(rows) // 2), MANY_TEXTS):
                notes.append(f"column {name!r} is left out: {len(category.values)} different texts in {len(rows)} rows")
            else:
                features.append(category)
        if not features:
            raise ValueError(f"no column is left to predict {target.name!r} from")
        return cls(features, target), notes

    def encode(self, columns: Mapping[str, Array]) -> Array:
        """The inputs of a network, float32, from a table that has at least the features."""
        missing = [column.name for column in self.features if column.name not in columns]
        if missing:
            raise ValueError(f"no column {listed(missing)}; the columns are {listed(columns)}")
        return np.concatenate([x.encode(columns[x.name]).astype(np.float32) for x in self.features], axis=1)

    def missing(self, columns: Mapping[str, Array]) -> list[str]:
        """Notes on missing numbers."""
        numbers = {x.name: _numbers(x.name, columns[x.name]) for x in self.features if isinstance(x, Number)}
        counts = {name: (int(np.isnan(values).sum()), len(values)) for name, values in numbers.items()}
        return [
            f"column {x!r}: {n} of {m} numbers are missing; the mean stands in" for x, (n, m) in counts.items() if n
        ]

    @property
    def outputs(self) -> int:
        """How many outputs a network needs."""
        return len(self.target.values) if isinstance(self.target, Category) else 1

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, which `from_json` reads."""
        return {"features": [asdict(column) for column in self.features], "target": asdict(self.target)}

    @classmethod
    def from_json(cls, about: Mapping[str, Any]) -> Encoder:
        """Read what `to_json` gave; a ValueError says that it is something else."""
        try:
            columns = [_column(**x) for x in (*about["features"], about["target"])]
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                "the model file does not say what columns it takes: 'fastbp train' did not save it"
            ) from None
        return cls(columns[:-1], columns[-1])


def _column(name: str, **about: Any) -> Number | Category:
    """A column by its description, or an error."""
    values = about.get("values", [])
    if not all(isinstance(text, str) for text in (name, *(value for value in values if value is not None))):
        raise TypeError("what a column and its values are called must be text")
    if "values" in about:
        return Category(name, list(values))
    return Number(name, **{key: as_number(about[key], key, least=-np.inf) for key in about})


class Split(NamedTuple):
    """A table as a network takes it: inputs X and targets y."""

    encoder: Encoder
    train: tuple[Array, Array]
    held_out: tuple[Array, Array]


def prepare(columns: Columns, task: str | None, test_size: float, seed: int) -> tuple[Split, str, list[str]]:
    """Split a table, whose target stands last, and encode it as its rows to train on say.

    Returns
    -------
    split : Split
    about : str
        What was taken for what.
    notes : list of str
        What the user may not expect.
    """
    notes = []
    name, values = next(reversed(columns.items()))
    for column, x in columns.items():  # before rows are left out, so that what is refused is named by the table's row
        if x.dtype.kind in "iuf" or (column == name and task == "regression"):
            _numbers(column, x)
    there = np.array([x is not None for x in values]) if values.dtype == object else values == values
    if not there.all():
        notes.append(f"{np.sum(~there)} of {len(there)} rows are left out: they have no {name!r}")
        columns = {column: x[there] for column, x in columns.items()}
        values = columns[name]
        if values.dtype.kind == "f" and (np.round(values) == values).all() and (np.abs(values) < 2**53).all():
            values = values.astype(np.int64)  # pandas makes integers float where some are missing
    if not len(values):
        raise ValueError(f"no row has a target, {name!r}")
    chosen, kind = choose_task(values)
    task = task or chosen
    if (values == values[0]).all():
        raise ValueError(f"target {name!r} has one value only, {values[0]}: there is nothing to learn")
    target: Number | Category
    if task == "classification":
        target = Category.of(name, values)
        y = target.codes(values)
        train, test = split_rows(y, test_size, seed)
        answers = f"{len(target.values)} classes"
    else:
        train, test = split_rows(np.zeros(len(values)), test_size, seed)
        target = Number.of(name, values[train])
        y = target.encode(values)
        answers = f"mean {target.mean:.4g}, standard deviation {target.std:.4g}"
    encoder, more = Encoder.of(columns, target, train)
    X = encoder.encode(columns)
    about = (
        f"{len(y):,} rows, {len(train):,} to train on and {len(test):,} held out\n"
        f"inputs      {X.shape[1]} from {len(encoder.features)} of {len(columns) - 1} columns\n"
        f"target      {name!r}: {task} of {kind}, {answers}"
    )
    split = Split(encoder, (X[train], y[train]), (X[test], y[test]))
    return split, about, [*notes, *more, *encoder.missing(columns)]


def choose_task(values: Array) -> tuple[str, str]:
    """Say whether a target means classification or regression, and what it holds.

    Examples
    --------
    >>> import numpy as np
    >>> choose_task(np.array([0.5, 2.0]))
    ('regression', 'floats')
    """
    if values.dtype == object:
        return "classification", "texts"
    if values.dtype == bool:
        return "classification", "bools"
    if values.dtype.kind == "f":
        return "regression", "floats"
    distinct = len(np.unique(values))
    return "classification" if distinct <= FEW_VALUES else "regression", f"integers ({distinct} different ones)"


def split_rows(classes: Array, held_out: float, seed: int) -> tuple[Array, Array]:
    """Draw the rows to train on and the rows to hold out, in the same proportion from each class.

    Each class keeps a row to train on.

    Examples
    --------
    >>> import numpy as np
    >>> train, test = split_rows(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)
    >>> len(train), len(test)
    (6, 2)
    """
    rng = np.random.default_rng(seed)
    _, classes, counts = np.unique(classes, return_inverse=True, return_counts=True)
    # rounding the running sum, not each share, keeps the total
    shares = np.diff(np.round(np.cumsum(counts) * held_out), prepend=0).astype(int)
    shuffled = rng.permutation(len(classes))
    members = np.split(shuffled[np.argsort(classes[shuffled], kind="stable")], np.cumsum(counts)[:-1])
    takes = np.minimum(shares, counts - 1)
    test = np.concatenate([rows[:take] for rows, take in zip(members, takes, strict=True)])
    if not len(test):
        kinds = f" of {len(counts)} classes" if len(counts) > 1 else ""
        raise ValueError(f"{len(classes)} rows{kinds} are too few to hold out {held_out:g} of them")
    return np.sort(np.concatenate([rows[take:] for rows, take in zip(members, takes, strict=True)])), np.sort(test)


def _texts(values: Array) -> list[str | None]:
    """Values as texts: whole numbers without a point, None for what is missing."""
    if values.dtype.kind != "f":
        return [x if x is None else str(x) for x in values.tolist()]
    return [None if x != x else str(int(x)) if x.is_integer() else str(x) for x in values.tolist()]


def _numbers(name: str, values: Array) -> Array:
    """Values as float64, NaN where missing."""
    try:
        numbers = np.array([np.nan if x is None else x for x in values]) if values.dtype == object else values
        numbers = numbers.astype(np.float64)
    except ValueError as error:
        raise ValueError(f"column {name!r} must hold numbers: {error}") from None
    wrong = np.flatnonzero(np.abs(numbers) > TOO_LARGE)
    if wrong.size:
        raise ValueError(f"column {name!r} must hold finite numbers, got {numbers[wrong[0]]:g} in row {wrong[0] + 1}")
    return numbers


def _odd_one_out(values: list[str | None]) -> str | None:
    """The first text that is no number, where most are."""
    odd = [text for text in values if text is not None and not _NUMBER.fullmatch(text)]
    return odd[0] if 0 < len(odd) < len(values) / 2 else None


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names in quotes, not too many."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest
