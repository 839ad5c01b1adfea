"""What public calls check, once, of a user's arrays. Replay checks nothing."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from .interop import in_bounds, is_sparse
from .kernels.engine import DTypeError, Engine, native, real_array
from .kernels.ops import Array

__all__ = [
    "as_array",
    "as_choice",
    "as_count",
    "as_features",
    "as_flag",
    "as_float_type",
    "as_labels",
    "as_metrics",
    "as_number",
    "as_samples",
    "as_seed",
    "as_tuple",
    "as_values",
    "as_weights",
    "check_finite",
    "check_metrics",
    "on_host",
    "optional",
]

T = TypeVar("T")
_ELEMENTS_AT_A_TIME = 1 << 20


def as_array(x: Any, name: str, engine: Engine, dtype: Any = None) -> Array:
    """`x` as an engine's array, or an error that names it."""
    try:
        return engine.asarray(x, dtype)
    except DTypeError:
        real_array(x, name)  # the same again, with its name
        raise


def on_host(x: Any, engine: Engine) -> Any:
    """`x`, or a copy of it where it lies in memory that an engine has apart from the host's."""
    array = engine.resident(x)
    return x if array is None else engine.asnumpy(array)


def as_features(
    x: Any, features: int | None, name: str = "X", dtype: Any = np.float64, engine: Engine | None = None
) -> Array:
    """Check a table of numbers that `dtype` can hold, shape (rows, `features`); its own dtype stays.

    A sparse one stays sparse, in rows, and what lies in an engine's own memory stays there.
    """
    array: Any = engine.resident(x) if engine else None
    if array is None:
        array = in_bounds(x, name).tocsr() if is_sparse(x) else real_array(x, name)
    if is_sparse(array):
        real_array(array.data, name)  # of what they are is all that is looked at
    if array.ndim != 2 or 0 in array.shape or features not in (None, array.shape[1]):
        hint = "; a single row is X.reshape(1, -1)" if array.ndim == 1 else ""
        raise ValueError(f"{name} must have shape (rows, {features or 'features'}), got {array.shape}{hint}")
    sparse = is_sparse(array)
    check_finite(array.data if sparse else array, f"{name}.data" if sparse else name, dtype)
    return array if sparse else native(array)


def as_values(y: Any, rows: int, width: int, name: str = "y", dtype: Any = np.float64) -> Array:
    """Check the targets of a regression, shape (rows, width)."""
    array = real_array(y, name)
    if array.shape != (rows, width):
        column = f"{name}.reshape(-1, 1)" if hasattr(y, "reshape") else f"numpy.reshape({name}, (-1, 1))"
        hint = f"; use {column}" if array.shape == (rows,) and width == 1 else ""
        raise ValueError(f"{name} must have the shape of the outputs, {(rows, width)}, got {array.shape}{hint}")
    return as_features(array, width, name, dtype)


def as_labels(
    y: Any, rows: int, classes: int, name: str = "y", ignore_index: int | None = None, dtype: Any = np.float64
) -> tuple[Array, Array]:
    """Check labels, shape (rows,), or rows, shape (rows, classes), one-hot or probabilities.

    Returns
    -------
    targets : array
        int64 labels, shape (rows,), or rows that `dtype` can hold, shape (rows, classes), where they are not one-hot.
    ignored : array of bool, shape (rows,)
        Where the label is `ignore_index`; the targets have class 0 there.
    """
    try:
        array = real_array(y, name)
    except DTypeError as error:
        masked = isinstance(y, np.ma.MaskedArray)
        hint = "" if masked else "; np.unique(labels, return_inverse=True) numbers labels of any kind"
        raise DTypeError(f"{error}{hint}") from error
    if array.shape == (rows, classes) and array.ndim == 2:
        check_finite(array, name, dtype)
        if array.min() < 0:
            raise ValueError(f"{name} of two dimensions must hold one-hot rows or probabilities, got {array.min()}")
        if (array.max(axis=1) != array.sum(axis=1)).any() or (array.max(axis=1) != 1).any():
            ignored = np.zeros(rows, bool)
            if ignore_index is not None and 0 <= ignore_index < classes:
                ignored = (array[:, ignore_index] > 0) & (array[:, ignore_index] == array.sum(axis=1))
            return native(array), ignored
        array = np.argmax(array, axis=1)
    if array.shape != (rows,):
        hint = f"; use {name}.ravel()" if array.shape == (rows, 1) else ""
        raise ValueError(
            f"{name} must hold {rows} labels, shape ({rows},), or rows of shape ({rows}, {classes}); "
            f"got {array.shape}{hint}"
        )
    check_finite(array, name)
    if array.dtype.kind == "f" and (fractional := array != np.floor(array)).any():
        raise ValueError(f"{name} must hold whole numbers, got {array[fractional][0]}")
    ignored = np.zeros(rows, bool) if ignore_index is None else array == ignore_index
    labels = np.where(ignored, 0, array) if ignored.any() else array
    for extreme in (labels.min(), labels.max()):
        if not 0 <= extreme < classes:
            raise ValueError(f"{name} must hold labels from 0 to {classes - 1}, got {extreme}")
    return labels.astype(np.int64, copy=False), ignored


def as_weights(sample_weight: Any, rows: int, name: str = "sample_weight") -> Array | None:
    """Check how much each row counts, shape (rows,); None stays."""
    if sample_weight is None:
        return None
    array = real_array(sample_weight, name)
    if array.shape != (rows,):
        raise ValueError(f"{name} must hold {rows} numbers, shape ({rows},), got {array.shape}")
    check_finite(array, name, np.float32)
    if array.min() < 0:
        raise ValueError(f"{name} must hold numbers of at least 0, got {array.min()}")
    return native(array)


def as_count(value: Any, name: str, least: int = 1) -> int:
    """Check a whole number of at least `least`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def optional(check: Callable[..., T]) -> Callable[..., T | None]:
    """A check that lets None pass."""
    return lambda value, name: None if value is None else check(value, name)


def as_seed(value: Any, name: str = "seed") -> int | None:
    """Check a seed; None, for a random one, stays."""
    return None if value is None else as_count(value, name, least=0)


def as_tuple(value: Any, name: str, of: str) -> tuple[Any, ...]:
    """Check a sequence, or whatever can be gone through."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, str):  # of which each letter would be one
            return tuple(value)
    raise TypeError(f"{name} must be a sequence of {of}, got {value!r}")


def as_number(
    value: Any,
    name: str,
    *,
    least: float = 0.0,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> float:
    """Check a finite number of at least `least`, more than `above`, less than `below` and at most `most`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (least <= value <= most and above < value < below and math.isfinite(value)):
        limits = [f"above {above:g}" if above >= least else f"at least {least:g}"] if least > -math.inf else []
        limits.append(f"at most {most:g}" if most < math.inf else f"below {below:g}" if below < math.inf else "finite")
        raise ValueError(f"{name} must be {' and '.join(limits)}, got {value}")
    return float(value)


def as_flag(value: Any, name: str) -> bool:
    """Check a truth value."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def as_choice(value: Any, name: str, *, choices: Sequence[str]) -> str:
    """Check one of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return value


def as_samples(value: Any, name: str) -> tuple[Any, Any, Any]:
    """Check (X, y) or (X, y, sample_weight); the last of three is None where there are two."""
    if isinstance(value, tuple | list) and len(value) in (2, 3):
        return value[0], value[1], value[2] if len(value) == 3 else None
    size = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    raise ValueError(f"{name} must be (X, y) or (X, y, sample_weight), got {type(value).__name__}{size}")


def as_metrics(metrics: Any) -> dict[str, Callable[..., float]]:
    """Check functions of targets and predictions; returns them by name."""
    if isinstance(metrics, Mapping):
        items = list(metrics.items())
    else:
        functions = as_tuple(metrics, "metrics", "functions, or a dict of them")
        items = [(getattr(metric, "__name__", repr(metric)), metric) for metric in functions]
    named = dict(items)
    if len(named) < len(items):
        twice = next(name for name in named if sum(name == other for other, _ in items) > 1)
        raise ValueError(f"metrics must have different names, got {twice!r} twice; a dict gives them names")
    for name, metric in named.items():
        if not callable(metric):
            raise TypeError(f"metrics must be functions of targets and predictions, got {metric!r}")
        if name in ("loss", "accuracy"):
            raise ValueError(f"metrics must have names of their own, got {name!r}")
    return named


def check_metrics(metrics: Mapping[str, Callable[..., float]], *, weighted: bool) -> None:
    """Raise TypeError where metrics cannot be called, as far as their signatures tell."""
    options = {"sample_weight": None} if weighted else {}
    for name, metric in metrics.items():
        try:
            parameters = inspect.signature(metric)
        except ValueError:
            continue  # some that are written in C do not tell
        try:
            parameters.bind(None, None, **options)
        except TypeError as error:
            wanted = ", ".join(["targets", "predictions", *options])
            raise TypeError(f"metrics[{name!r}] must take {wanted}: {error}") from error


def as_float_type(dtype: Any, name: str = "dtype") -> np.dtype[Any]:
    """Check a dtype to compute in: float32 or float64, as a type, a dtype or a name."""
    given = getattr(dtype, "name", getattr(dtype, "__name__", dtype))
    known = None
    if isinstance(given, str):
        with contextlib.suppress(TypeError, ValueError):
            known = np.dtype(given)
    if known not in (np.float32, np.float64):
        raise ValueError(f"{name} must be float32 or float64, got {given}")
    return known


@functools.cache
def _largest(dtype: Any) -> Any:
    return np.finfo(dtype).max


def check_finite(array: Array, name: str, dtype: Any = np.float64) -> None:
    """Raise ValueError for the first number that is not finite, or that `dtype` cannot hold."""
    if array.dtype.kind != "f":
        return
    limit = _largest(dtype)
    host = isinstance(array, np.ndarray)
    if host and array.size < 1 << 12 and array.dtype.itemsize >= 4 and np.vdot(array, array) < limit:
        return  # the quickest way to see it of some rows
    # in pieces, so that an array mapped from a file is never in memory whole
    rows = max(1, _ELEMENTS_AT_A_TIME // max(1, array[:1].size))
    for start in range(0, len(array), rows):
        piece = array[start : start + rows]
        if not (piece.min() >= -limit and piece.max() <= limit):  # both are NaN where there is one
            piece = real_array(piece)
            where = tuple(int(i) for i in np.argwhere(~(np.abs(piece) <= limit))[0])
            position = (start + where[0], *where[1:])
            raise ValueError(f"{name} must hold finite {np.dtype(dtype)} numbers, got {piece[where]} at {position}")
