"""Reading the user's tables: a data set by its name, or a CSV, TSV, Parquet or NPZ file."""

from __future__ import annotations

import importlib
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from .data import spiral_data
from .encoding import Category, Columns, Encoder, listed
from .kernels.engine import real_array
from .kernels.ops import Array

__all__ = ["load_table", "need", "read_table"]

_BOOLS = {"False", "True", None}


def need(module: str) -> Any:
    """Import a module of the ``cli`` extra, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"this needs {module.split('.')[0]}: pip install 'fastbp[cli]'") from None


def load_table(source: str, target: str | None, seed: int) -> Columns:
    """Get a table to train on, by the name ``spiral`` or ``digits`` or from a file; the target stands last."""
    if source == "spiral":
        X, y = spiral_data(1000, 3, noise=0.1, seed=seed)
        table = {"x": X[:, 0], "y": X[:, 1], "arm": y}
    elif source == "digits":
        digits = need("sklearn.datasets").load_digits()
        table = dict(zip(digits.feature_names, digits.data.T, strict=True)) | {"digit": digits.target}
    else:
        if not Path(source).exists() and not Path(source).suffix:
            raise FileNotFoundError(f"no data set and no file {source!r}; the data sets are spiral and digits")
        table = read_table(source, target=target or "y")
    name = target or list(table)[-1]
    if name not in table:
        raise ValueError(f"{source} has no column {name!r}; the columns are {listed(table)}")
    return {other: values for other, values in table.items() if other != name} | {name: table[name]}


def read_table(path: str | Path, *, target: str | None = None, like: Encoder | None = None) -> Columns:
    """Read a CSV, TSV, Parquet or NPZ file; its suffix says which it is.

    Parameters
    ----------
    path : path
    target : str, optional
        The array of an NPZ file that is the target; the columns of its array X are called X0, X1 and so on.
    like : Encoder, optional
        Whose features the table shall have: it gives their names to the columns of X, and says which are texts.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        if suffix in (".csv", ".tsv"):
            table = _read_csv(path, like)
        elif suffix in (".parquet", ".pq"):
            need("pyarrow")
            table = _from_pandas(need("pandas").read_parquet(path, engine="pyarrow"))
        elif suffix == ".npz":
            table = _read_npz(path, target, like)
        else:
            raise ValueError("its name must end in .csv, .tsv, .parquet or .npz")
    except (ValueError, TypeError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not table or not len(next(iter(table.values()))):
        raise ValueError(f"{path} holds no rows")
    return table


def _read_csv(path: Path, like: Encoder | None) -> Columns:
    pandas = need("pandas")
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if b"\0" in start:
        raise ValueError("it holds no text in UTF-8")
    first_line = start.decode("utf-8-sig", "replace").partition("\n")[0]
    # a column that was text in training stays text: 007 must not become 7; but pandas turns TRUE into True
    texts = {
        x.name: str
        for x in (like.features if like else ())
        if isinstance(x, Category) and not _BOOLS.issuperset(x.values)
    }
    how = {"sep": max(",;\t", key=first_line.count), "encoding": "utf-8-sig", "skipinitialspace": True}
    names = pandas.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False, **how).loc[0]
    for name in names[names.duplicated() & (names != "")]:  # of which pandas would rename one
        raise ValueError(f"column {name!r} stands there twice")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        try:
            frame = pandas.read_csv(path, dtype=texts, na_values="?", index_col=False, low_memory=False, **how)
        except pandas.errors.ParserWarning:
            raise ValueError("its rows have more fields than its first line has names") from None
    # pandas writes its row numbers under an empty name
    return _from_pandas(frame.drop(columns=[name for name in frame if name.startswith("Unnamed: ")]))


def _read_npz(path: Path, target: str | None, like: Encoder | None) -> Columns:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no NPZ file")
    texts = [x.name for x in like.features if isinstance(x, Category)] if like else []
    if texts:
        raise ValueError(f"the model takes texts, {listed(texts)}, which X of an NPZ file does not have")
    with np.load(path, allow_pickle=False) as arrays:
        for name in ("X", target):
            if name is not None and name not in arrays:
                raise ValueError(f"no array {name!r} (a target is named by --target); it holds {listed(arrays)}")
        X = real_array(arrays["X"], "X")
        y = None if target is None else arrays[target]
    X = X.reshape(len(X), -1) if X.ndim > 2 else X  # images, for example
    names = [column.name for column in like.features] if like else [f"X{i}" for i in range(X.shape[-1])]
    if X.ndim != 2 or X.shape[1] != len(names):
        raise ValueError(f"X must have shape (rows, {len(names) if like else 'features'}), got {X.shape}")
    table = dict(zip(names, X.T, strict=True))
    if y is None:
        return table
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (len(X),) or y.dtype.kind not in "biufU":
        raise ValueError(f"{target} must hold {len(X)} numbers or texts, got {y.dtype} of shape {y.shape}")
    return table | {str(target): y.astype(object) if y.dtype.kind == "U" else y}


def _from_pandas(frame: Any) -> Columns:
    if not frame.columns.is_unique:
        raise ValueError(f"column {frame.columns[frame.columns.duplicated()][0]!r} stands there twice")
    return {str(name): _column(frame[name]) for name in frame}


def _column(series: Any) -> Array:
    """A pandas column as an array; dates and durations in seconds."""
    pandas = need("pandas")
    kind = pandas.api.types.infer_dtype(series, skipna=True)
    if kind in ("datetime64", "datetime", "date"):
        series = pandas.to_datetime(series, utc=True) - pandas.Timestamp(0, tz="UTC")
    if kind in ("datetime64", "datetime", "date", "timedelta64", "timedelta"):
        series = series.dt.total_seconds()
    elif kind == "boolean" and not series.hasnans:
        return np.asarray(series, bool)
    elif kind not in ("integer", "floating", "mixed-integer-float", "decimal", "empty"):
        return np.array([None if gone else str(x) for x, gone in zip(series, series.isna(), strict=True)], object)
    if kind == "integer" and not series.hasnans:
        return np.asarray(series, np.int64)
    return np.asarray(series.astype("float64"))
