"""Matrix products on a GPU: cuBLASLt, or else cuBLAS, called through ctypes.

CuPy's own wrapper of cuBLAS refuses to work while a CUDA graph is captured, and has no fused epilogues. The libraries
take matrices column by column, so that for ``c = a @ b`` they are given the transposed ``c.T = b.T @ a.T``, which is
the same memory.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import POINTER, byref, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple

import numpy as np

from .ops import Array

__all__ = [
    "CANDIDATES",
    "COMPUTE",
    "TYPES",
    "WORKSPACE_BYTES",
    "Blas",
    "BlasError",
    "Matrix",
    "alignment",
    "load_libraries",
]

WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends for Hopper
CANDIDATES = 8  # how many algorithms the library is asked for
LARGE = 1 << 24  # results, several tiles for each multiprocessor: none idles when the terms of each are not split up
PARTS_OF_SUMS = 1 << 20  # bytes, with less of which to work in a large product cannot split them up

# names and numbers of cublasLt.h, cublas_api.h and library_types.h
INVALID_VALUE, NOT_SUPPORTED = 7, 15  # what it answers where it has no such product
TYPES = {"float32": 0, "float64": 1, "uint16": 14}  # the last holds the bits of bfloat16
COMPUTE = {"fp32": 68, "tf32": 77, "bf16": 68}  # the last with factors of bfloat16
COMPUTE_64F = 70
POINTER_MODE, TRANSA, TRANSB, EPILOGUE, BIAS_POINTER = 2, 3, 4, 7, 8
ON_DEVICE = 1  # the factors of the product and of the result
NO_EPILOGUE, BIAS = 1, 4
MAX_WORKSPACE_BYTES, REDUCTION_SCHEME_MASK, MIN_ALIGNMENT_A_BYTES = 1, 3, 5
# where a result is of bfloat16, its parts are added up in float32 all the same
REDUCTION_IN_COMPUTE_TYPE, DISALLOW_REDUCED_PRECISION_REDUCTION = 2, 16
DEFAULT_ALGORITHM = -1


class Matrix(NamedTuple):
    """Rows that are contiguous, `step` elements apart, at an address."""

    address: int
    rows: int
    columns: int
    step: int
    kind: int  # one of TYPES

    @property
    def turned(self) -> Matrix:
        """Its transpose, as if that lay there."""
        return Matrix(self.address, self.columns, self.rows, -(-self.rows // 16) * 16, self.kind)


class Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", ctypes.c_float),
        ("reserved", c_int * 4),
    )


class BlasError(RuntimeError):
    """A call of cuBLAS failed."""

    def __init__(self, function: str, status: int) -> None:
        super().__init__(f"{function} returned {status}")
        self.status = status


_handle = POINTER(c_void_p)
_four = [c_void_p] * 4
SIGNATURES: dict[str, list[Any]] = {
    "cublasLtCreate": [_handle],
    "cublasLtMatmulDescCreate": [_handle, c_int, c_int],
    "cublasLtMatmulDescSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatmulDescDestroy": [c_void_p],
    "cublasLtMatrixLayoutCreate": [_handle, c_int, c_uint64, c_uint64, c_int64],
    "cublasLtMatrixLayoutDestroy": [c_void_p],
    "cublasLtMatmulPreferenceCreate": [_handle],
    "cublasLtMatmulPreferenceSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatmulPreferenceDestroy": [c_void_p],
    # handle, descriptor, layouts of a, b, c and d, preference, how many are wanted, results, how many came
    "cublasLtMatmulAlgoGetHeuristic": [c_void_p, c_void_p, *_four, c_void_p, c_int, POINTER(Algorithm), POINTER(c_int)],
    # handle, descriptor, layouts of a, b, c and d, algorithm, result
    "cublasLtMatmulAlgoCheck": [c_void_p, c_void_p, *_four, POINTER(Algorithm), POINTER(Algorithm)],
    # handle, descriptor, alpha, a, its layout, b, its layout, beta, c, its layout, d, its layout, algorithm,
    # workspace, bytes of it, stream
    "cublasLtMatmul": [*[c_void_p] * 12, POINTER(Algorithm), c_void_p, c_size_t, c_void_p],
    "cublasCreate_v2": [_handle],
    "cublasSetMathMode": [c_void_p, c_int],
    "cublasSetPointerMode_v2": [c_void_p, c_int],
    "cublasSetStream_v2": [c_void_p, c_void_p],
    "cublasSetWorkspace_v2": [c_void_p, c_void_p, c_size_t],
    # handle, transpose a and b, m, n, k, alpha, each of a, b (beta between) and c: address, type, step; compute type,
    # algorithm
    "cublasGemmEx": [
        c_void_p, *[c_int] * 5, c_void_p, *[c_void_p, c_int, c_int] * 2, c_void_p, c_void_p, c_int, c_int, c_int, c_int
    ],
}  # fmt: skip


def load_libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """cuBLASLt and cuBLAS, wherever pip, conda or the system have put them.

    Raises
    ------
    ImportError
        Where there is no such library.
    """
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        paths = [load_nvidia_dynamic_lib(name).abs_path for name in ("cublasLt", "cublas")]
    except (DynamicLibNotFoundError, OSError) as error:
        raise ImportError(f"the CUDA libraries lack cuBLAS: {error}") from error
    return ctypes.CDLL(paths[0]), ctypes.CDLL(paths[1])


class Problem(NamedTuple):
    """A product of matrices on fixed memory, however it is computed."""

    matrices: tuple[Matrix, Matrix, Matrix]
    workspace: int
    transpose_a: bool
    transpose_b: bool
    compute: int
    factors: int

    @property
    def scale_type(self) -> int:
        """The type of the numbers by which the product and the result are multiplied."""
        return TYPES["float64" if self.compute == COMPUTE_64F else "float32"]

    def one_and_zero(self) -> Array:
        return np.array([1, 0], "f8" if self.compute == COMPUTE_64F else "f4")

    def factors_at(self, one_and_zero: Array) -> tuple[int, int]:
        """The addresses of the factors, or else of these numbers."""
        address = self.factors or int(one_and_zero.ctypes.data)
        return address, address + one_and_zero.itemsize


def alignment(address: int) -> int:
    """What the library may rely on: the power of two that divides an address, up to 256 bytes."""
    return min(address & -address, 256)


class Blas:
    """The libraries, and a handle of each on the current device, made when it is first needed.

    Parameters
    ----------
    lt, classic : CDLL
        cuBLASLt and cuBLAS.
    """

    def __init__(self, lt: ctypes.CDLL, classic: ctypes.CDLL) -> None:
        self._libraries = {"cublasLt": lt, "cublas": classic}
        self._handles: dict[str, c_void_p] = {}
        self._algorithms: dict[Any, list[Algorithm]] = {}
        self._classic_lock = threading.Lock()

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the libraries; raises BlasError where it returns anything but success."""
        function = getattr(self._libraries["cublasLt" if name.startswith("cublasLt") else "cublas"], name)
        function.argtypes = SIGNATURES[name]
        if status := function(*arguments):
            raise BlasError(name, status)

    def handle(self, name: str) -> c_void_p:
        if name not in self._handles:
            made = c_void_p()
            self.call(name, byref(made))
            self._handles[name] = made
        return self._handles[name]

    def product(
        self,
        matrices: tuple[Matrix, Matrix, Matrix],
        workspace: int,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        compute: int = COMPUTE["fp32"],
        bias: int = 0,
        factors: int = 0,
        rank: int = 0,
    ) -> Callable[[int], None] | None:
        """Prepare ``c = a @ b + bias``.

        Parameters
        ----------
        matrices : (Matrix, Matrix, Matrix)
            a, b and c as they lie in memory; `transpose_a` and `transpose_b` say which of them count as transposed.
            a and b are of one type; where that is bfloat16, c may be float32.
        workspace : int
            The address of WORKSPACE_BYTES of memory for the library to work in.
        compute : int
            One of COMPUTE; float64 is always exact.
        bias : int
            The address of as many numbers as `c` has columns, of its type, at a multiple of 16 bytes; 0 for none.
        factors : int
            The address of two numbers on the device, of the type of `c`: ``c = factors[0] * (a @ b) + factors[1] * c``;
            0 for one and none.
        rank : int, below CANDIDATES
            By which algorithm, in the order in which the library expects them to be fast.

        Returns
        -------
        callable or None
            Given a stream, it launches the product. None where the library has no algorithm of this rank; a plain
            product of rank 0 is always there.
        """
        compute = COMPUTE_64F if matrices[2].kind == TYPES["float64"] else compute
        problem = Problem(matrices, workspace, transpose_a, transpose_b, compute, factors)
        prepared = _Product(self, problem, bias)
        if prepared.key not in self._algorithms:
            self._algorithms[prepared.key] = prepared.find()
        algorithms = self._algorithms[prepared.key]
        if rank < len(algorithms):
            prepared.algorithm = algorithms[rank]
            return prepared
        return None if bias or rank else self._classic(problem)

    def _classic(self, problem: Problem) -> Callable[[int], None]:
        (a, b, c), workspace, transpose_a, transpose_b, compute, factors = problem
        handle, numbers = self.handle("cublasCreate_v2"), problem.one_and_zero()
        inner = a.rows if transpose_a else a.columns
        self.call("cublasSetMathMode", handle, DISALLOW_REDUCED_PRECISION_REDUCTION)

        def launch(stream: int) -> None:
            alpha, beta = problem.factors_at(numbers)
            with self._classic_lock:  # what is set is of all threads
                self.call("cublasSetStream_v2", handle, stream)
                self.call("cublasSetPointerMode_v2", handle, ON_DEVICE if factors else 0)
                self.call("cublasSetWorkspace_v2", handle, workspace, WORKSPACE_BYTES)  # which setting a stream undoes
                self.call(
                    "cublasGemmEx", handle, transpose_b, transpose_a, c.columns, c.rows, inner, alpha, b.address,
                    b.kind, b.step, a.address, a.kind, a.step, beta, c.address, c.kind, c.step, compute,
                    DEFAULT_ALGORITHM,
                )  # fmt: skip

        return launch


class _Product:
    """A product on fixed memory; it owns its descriptors."""

    algorithm: Algorithm

    def __init__(self, blas: Blas, problem: Problem, bias: int) -> None:
        self._problem, self._bias = problem, bias
        (a, b, c), workspace, transpose_a, transpose_b, compute, factors = problem
        self._blas, self._memory, self._workspace = blas, (b.address, a.address, c.address), workspace
        self._made: list[tuple[str, c_void_p]] = []
        self._one_and_zero = problem.one_and_zero()
        self._alpha, self._beta = problem.factors_at(self._one_and_zero)
        self._product = self._make("MatmulDesc", compute, problem.scale_type)
        self._layouts = [self._make("MatrixLayout", x.kind, x.columns, x.rows, x.step) for x in (b, a, c)]
        numbers = {
            TRANSA: c_int(transpose_b), TRANSB: c_int(transpose_a),
            EPILOGUE: c_uint32(BIAS if bias else NO_EPILOGUE),
            **({BIAS_POINTER: c_void_p(bias)} if bias else {}),
            **({POINTER_MODE: c_int(ON_DEVICE)} if factors else {}),
        }  # fmt: skip
        for attribute, value in numbers.items():
            self._set("MatmulDesc", self._product, attribute, value)
        self._halves_result = c.kind == TYPES["uint16"]
        self._alignments = [alignment(x) for x in (*self._memory, c.address)]
        shapes = [x[1:] for x in problem.matrices]
        self.key = compute, transpose_a, transpose_b, bool(bias), bool(factors), *shapes, *self._alignments

    def __call__(self, stream: int) -> None:
        (b, a, c), (of_b, of_a, of_c) = self._memory, self._layouts
        self._blas.call(
            "cublasLtMatmul", self._blas.handle("cublasLtCreate"), self._product, self._alpha, b, of_b, a, of_a,
            self._beta, c, of_c, c, of_c, self.algorithm, self._workspace, WORKSPACE_BYTES, stream,
        )  # fmt: skip

    def __del__(self) -> None:
        for kind, made in self._made:
            self._blas.call(f"cublasLt{kind}Destroy", made)

    def _make(self, kind: str, *arguments: int) -> c_void_p:
        made = c_void_p()
        self._blas.call(f"cublasLt{kind}Create", byref(made), *arguments)
        self._made.append((kind, made))
        return made

    def _set(self, kind: str, where: c_void_p, attribute: int, value: Any) -> None:
        self._blas.call(f"cublasLt{kind}SetAttribute", where, attribute, byref(value), ctypes.sizeof(value))

    def find(self) -> list[Algorithm]:
        """The algorithms to choose from, the one to take unseen first; nothing where the library cannot do it.

        Of a large product, those that keep parts of sums in memory come last, because each rounds in a way of its own.
        For some ways in which the factors can lie the library names few, though it has those that it names for others.
        """
        found, (a, b, c) = self._named(), self._problem.matrices
        if c.rows * c.columns < LARGE or not found:
            return found
        found.sort(key=lambda each: each.workspace_bytes >= PARTS_OF_SUMS)
        for turned in (
            self._problem._replace(matrices=(a, b.turned, c), transpose_b=not self._problem.transpose_b),
            self._problem._replace(matrices=(a.turned, b, c), transpose_a=not self._problem.transpose_a),
        ):
            if len(found) < CANDIDATES:
                known = [bytes(each.algorithm) for each in found]
                others = _Product(self._blas, turned, self._bias)._named()
                found += [each for each in others if bytes(each.algorithm) not in known and self._takes(each)]
        return found[:CANDIDATES]

    def _takes(self, algorithm: Algorithm) -> bool:
        """Whether an algorithm is for this product, too."""
        handle, layouts, checked = self._blas.handle("cublasLtCreate"), (*self._layouts, self._layouts[2]), Algorithm()
        try:
            self._blas.call("cublasLtMatmulAlgoCheck", handle, self._product, *layouts, algorithm, byref(checked))
        except BlasError:
            return False
        return int(checked.workspace_bytes) <= WORKSPACE_BYTES

    def _named(self) -> list[Algorithm]:
        """What the library thinks is fast, the fastest first."""
        preference = self._make("MatmulPreference")
        self._set("MatmulPreference", preference, MAX_WORKSPACE_BYTES, c_uint64(WORKSPACE_BYTES))
        if self._halves_result:
            self._set("MatmulPreference", preference, REDUCTION_SCHEME_MASK, c_uint32(REDUCTION_IN_COMPUTE_TYPE))
        for place, alignment in enumerate(self._alignments):
            self._set("MatmulPreference", preference, MIN_ALIGNMENT_A_BYTES + place, c_uint32(alignment))
        found, count = (Algorithm * CANDIDATES)(), c_int()
        handle, layouts = self._blas.handle("cublasLtCreate"), (*self._layouts, self._layouts[2])
        try:
            self._blas.call(
                "cublasLtMatmulAlgoGetHeuristic", handle, self._product, *layouts, preference, CANDIDATES, found,
                byref(count),
            )  # fmt: skip
        except BlasError as error:
            if error.status not in (INVALID_VALUE, NOT_SUPPORTED):
                raise
        return [algorithm for algorithm in found[: count.value] if not algorithm.state]
