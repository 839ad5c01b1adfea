"""Large products in Numba's kernels: NumPy's own BLAS, or else the one that SciPy brings."""

import subprocess
import sys

import pytest

pytest.importorskip("numba")

PRODUCTS = """
import importlib, itertools, sys
whose, = sys.argv[1:]
if whose == "NumPy":
    sys.modules["scipy"] = None  # so that nothing of it can be called
else:
    importlib.import_module("numpy._core._multiarray_umath").__file__ = "/some/other/place/it"

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from fastbp.kernels.numba_blas import BLAS_IS_NUMPYS, blas
from fastbp.kernels.numba_cache import DIGEST
from fastbp.kernels.numba_engine import NumbaEngine
from fastbp.kernels.numba_vectors import Vectors
if BLAS_IS_NUMPYS != (whose == "NumPy"):
    sys.exit(f"kernels would not call {whose}'s BLAS")

@intrinsic
def write(typing_context, a, b, c, alpha, beta):
    def build(context, builder, signature, arguments):
        v = Vectors(context, builder, c.dtype)
        blas(v, zip((a, b, c), arguments[:3]), *arguments[3:])
        return context.get_dummy_value()
    return types.none(a, b, c, alpha, beta), build

@njit
def multiply(a, b, c, alpha, beta):
    write(a, b, c, alpha, beta)

rng = np.random.default_rng(0)

def matrix(kind, rows, columns, dtype):
    if "transposed" in kind:
        return matrix(kind.removeprefix("transposed "), columns, rows, dtype).T
    return rng.standard_normal((rows, columns + 3 * (kind == "padded")), dtype)[:, :columns]

KINDS = "plain", "padded", "transposed plain", "transposed padded"
for dtype, *kinds in itertools.product((np.float32, np.float64), KINDS, KINDS, KINDS[:2]):
    for m, k, n in [(130, 70, 90), (5, 1, 3), (1, 6, 1), (4, 5, 1), (1, 5, 4)]:
        a, b, c = (matrix(kind, *s, dtype) for kind, s in zip(kinds, [(m, k), (k, n), (m, n)]))
        tolerance = 200 * np.finfo(dtype).eps
        for alpha, beta in [(1, 0), (-0.3, 1)]:
            wide = c if c.base is None else c.base
            before, padding = c.astype(np.float64), wide[:, n:].copy()
            multiply(a, b, c, dtype(alpha), dtype(beta))
            right = dtype(alpha) * (a.astype(np.float64) @ b.astype(np.float64)) + beta * before
            np.testing.assert_allclose(c, right, tolerance, tolerance, err_msg=f"{dtype} {kinds} {m, k, n} {alpha}")
            np.testing.assert_array_equal(wide[:, n:], padding)

x, w = (rng.standard_normal((256, 256)) for _ in range(2))
z = NumbaEngine().dense_forward(x, w, np.ones((1, 256)))
np.testing.assert_allclose(z, x @ w + 1, 1e-10, 1e-10)
print(DIGEST)
"""


def products(whose):
    return subprocess.run([sys.executable, "-c", PRODUCTS, whose], capture_output=True, text=True)


def test_products_are_right_whoever_brings_blas():
    """Each without the other; and a cache can hold the kernels of both, which have names of their own."""
    by_scipy, by_numpy = products("SciPy"), products("NumPy")
    assert by_scipy.returncode == 0, by_scipy.stderr
    if "would not call NumPy's" in by_numpy.stderr:
        pytest.skip("this NumPy brings no OpenBLAS whose integers have 64 bits")
    assert by_numpy.returncode == 0, by_numpy.stderr
    assert by_scipy.stdout != by_numpy.stdout
