"""Other libraries' arrays: those that come in are read where they lie, and results go back as the kind that came.

NumPy reads a CPU's tensors by DLPack, without a copy (`fastbp.kernels.engine.real_array`), and so does the engine
"cupy" a GPU's. Data frames, lists and sparse matrices get NumPy's arrays in return, as from scikit-learn.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .kernels.engine import native
from .kernels.ops import Array

__all__ = ["WIDE", "dense", "dense_if_narrow", "in_bounds", "is_sparse", "like"]

#: Columns from which sparse rows are multiplied as they are stored; narrower ones are made dense first, which gives the
#: bits of dense rows.
WIDE = 1024


def is_sparse(x: Any) -> bool:
    """Whether `x` is one of SciPy's sparse matrices or arrays."""
    sparse = sys.modules.get("scipy.sparse")  # without which there is none
    return sparse is not None and bool(sparse.issparse(x))


def dense(x: Any) -> Array:
    """`x`, or what it holds where it is sparse."""
    return native(x.toarray()) if is_sparse(x) else x


def dense_if_narrow(x: Any, name: str = "X") -> Any:
    """`x`, or what it holds where it is sparse and has few columns: of those a batch is small."""
    return x if is_sparse(x) and x.shape[-1] >= WIDE else dense(in_bounds(x, name))


def in_bounds(x: Any, name: str = "X") -> Any:
    """`x`, unless it is a sparse matrix whose indices lead outside of it, where SciPy would follow them."""
    if hasattr(x, "check_format"):
        try:
            x.check_format(full_check=True)
        except ValueError as error:
            raise ValueError(f"{name} is a sparse matrix of a wrong format: {error}") from error
    return x


def like(x: Any, result: Array) -> Any:
    """NumPy's `result` as a tensor of `x`'s library, on its device; on a CPU both then share memory.

    Where `x` is no tensor, `result` itself.
    """
    if isinstance(x, np.ndarray) or not hasattr(x, "__dlpack__"):
        return result
    own = getattr(x, "__array_namespace__", None)
    library = own() if own else sys.modules[type(x).__module__.partition(".")[0]]
    if not hasattr(library, "asarray"):
        return result
    made = library.asarray(result)
    return made.to(x.device) if hasattr(made, "to") else made
