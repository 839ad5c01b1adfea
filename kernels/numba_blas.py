"""Matrix products by BLAS in compiled kernels: by NumPy's own OpenBLAS, or else by the BLAS that SciPy brings.

NumPy's is better where it is there: two libraries are two pools of threads, and the ones that wait hold up the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from pathlib import Path
from typing import Any

from llvmlite import ir
from llvmlite.binding import add_symbol
from numba.core import cgutils
from numba.np.arrayobj import make_array

from .numba_vectors import BYTES, INT

__all__ = ["BLAS_IS_NUMPYS", "blas"]


def numpys_gemm() -> dict[str, int]:
    """The addresses of "s" (float32) and "d" (float64) gemm in the OpenBLAS of NumPy's wheels; none in other builds."""
    with contextlib.suppress(ImportError):
        extension = Path(str(importlib.import_module("numpy._core._multiarray_umath").__file__))
        # a library's symbols are those of what it depends on too, except on Windows
        for path in (extension, *extension.parent.parent.parent.glob("numpy.libs/*openblas*.dll")):
            with contextlib.suppress(OSError, AttributeError):
                library = ctypes.CDLL(str(path))
                functions = {kind: getattr(library, f"scipy_{kind}gemm_64_") for kind in "sd"}
                return {kind: ctypes.cast(f, ctypes.c_void_p).value or 0 for kind, f in functions.items()}
    return {}


# Kernels that a disk cache keeps know these functions by a name, to which each process gives its own address.
SYMBOL = "fastbp_{}gemm"
ADDRESSES = numpys_gemm()
BLAS_IS_NUMPYS = bool(ADDRESSES)
for letter, address in ADDRESSES.items():
    add_symbol(SYMBOL.format(letter), address)


def blas(v: Any, operands: Any, alpha: Any, beta: Any) -> Any:
    """c = alpha * (a @ b) + beta * c, for operands a, b, c of (type, value)."""

    def operand(ty: Any, value: Any) -> Any:
        # BLAS counts columns first, so it sees each array transposed: one stored by rows needs no transposition.
        array = make_array(ty)(v.context, v.builder, value)
        shape, strides = (cgutils.unpack_tuple(v.builder, x, 2) for x in (array.shape, array.strides))
        by_rows = v.builder.icmp_signed("==", strides[1], v.index(v.size))
        if ty.layout != "A":
            by_rows = ir.Constant(by_rows.type, ty.layout == "C")
        order = v.builder.select(by_rows, *(ir.Constant(BYTES.pointee, ord(letter)) for letter in "nt"))
        step = v.builder.sdiv(v.builder.select(by_rows, *strides), v.index(v.size))
        least = v.builder.select(by_rows, shape[1], shape[0])  # the stride of an axis of one element may be anything
        step = v.builder.select(v.builder.icmp_signed("<", step, least), least, step)
        return *shape, order, v.builder.bitcast(array.data, BYTES), step

    def at(x: Any) -> Any:
        return cgutils.alloca_once_value(v.builder, x)

    (m, k, a_order, *a), (_, n, b_order, *b), (*_, c_data, c_step) = (operand(*x) for x in operands)
    alpha, beta = (v.builder.bitcast(at(x), BYTES) for x in (alpha, beta))
    args = [b_order, a_order, n, m, k, alpha, *b, *a, beta, c_data, c_step]
    kind = "s" if v.size == 4 else "d"
    if BLAS_IS_NUMPYS:  # in Fortran's manner: everything by its address, integers of 64 bits
        name, result = SYMBOL.format(kind), ir.VoidType()
        args = [x if isinstance(x.type, ir.PointerType) else at(x) for x in args]
    else:
        name, result = "numba_xxgemm", INT
        args = [ir.Constant(BYTES.pointee, ord(kind)), *args]
    function = ir.FunctionType(result, [x.type for x in args])
    v.builder.call(cgutils.get_or_insert_function(v.builder.module, function, name), args)
