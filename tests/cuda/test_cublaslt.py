"""What is said to cuBLASLt: against the real library as far as it goes without a GPU, and row by row against NumPy."""

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastbp.kernels import cublaslt
from fastbp.kernels.cublaslt import Blas, BlasError, Matrix

from . import standin


@pytest.fixture
def real():
    """The library itself, without a handle: that needs a GPU."""
    pytest.importorskip("cuda.pathfinder", reason="needs cuda-pathfinder", exc_type=ImportError)
    try:
        return Blas(*cublaslt.load_libraries())
    except ImportError as error:
        pytest.skip(f"needs cuBLAS: {error}")


@pytest.fixture
def blas():
    if standin.COMPILER is None:
        pytest.skip("needs g++")
    library = standin.compiled((standin.HERE / "blas.cpp").read_text())
    return Blas(library, library)


def matrix(x):
    return Matrix(x.ctypes.data, *x.shape, x.strides[0] // x.itemsize, cublaslt.TYPES[x.dtype.name])


def test_the_library_takes_descriptors_layouts_and_attributes(real, monkeypatch):
    monkeypatch.setattr(cublaslt._Product, "find", lambda self: [cublaslt.Algorithm()])
    x, w, z, b = (np.ones(shape, np.float32) for shape in ((5, 3), (3, 2), (5, 2), (1, 2)))
    prepared = real.product((matrix(x), matrix(w), matrix(z)), 256, bias=b.ctypes.data)

    def said(attribute, kind):
        value, written = kind(), ctypes.c_size_t()
        get = real._libraries["cublasLt"].cublasLtMatmulDescGetAttribute
        size = ctypes.c_size_t(ctypes.sizeof(value))
        assert not get(prepared._product, attribute, ctypes.byref(value), size, ctypes.byref(written))
        assert written.value == size.value
        return value.value

    assert said(cublaslt.EPILOGUE, ctypes.c_uint32) == cublaslt.BIAS
    assert said(cublaslt.BIAS_POINTER, ctypes.c_void_p) == b.ctypes.data
    assert said(cublaslt.TRANSA, ctypes.c_int) == said(cublaslt.TRANSB, ctypes.c_int) == 0


def test_the_library_refuses_what_is_wrong(real):
    made, number = ctypes.c_void_p(), ctypes.c_int(0)
    real.call("cublasLtMatmulDescCreate", ctypes.byref(made), cublaslt.COMPUTE["fp32"], cublaslt.TYPES["float32"])
    with pytest.raises(BlasError, match=r"cublasLtMatmulDescSetAttribute returned \d+"):
        real.call("cublasLtMatmulDescSetAttribute", made, cublaslt.TRANSA, ctypes.byref(number), 1)
    real.call("cublasLtMatmulDescDestroy", made)


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_of_rows(blas, rng, transpose_a, transpose_b, dtype):
    """c = a @ b, and a @ b + bias, of padded rows."""
    a, b, c = (
        rng.standard_normal((rows, columns + 3)).astype(dtype)[:, :columns]
        for rows, columns in ((5, 4)[:: -1 if transpose_a else 1], (4, 7)[:: -1 if transpose_b else 1], (5, 7))
    )
    bias, options = rng.standard_normal(7).astype(dtype), {"transpose_a": transpose_a, "transpose_b": transpose_b}
    wanted = (a.T if transpose_a else a) @ (b.T if transpose_b else b)
    for extra, expected in (({}, wanted), ({"bias": bias.ctypes.data}, wanted + bias)):
        c[...] = np.nan
        blas.product((matrix(a), matrix(b), matrix(c)), 256, **options, **extra)(0)
        np.testing.assert_allclose(c, expected, rtol=1e-5, atol=1e-5)


def test_threads_do_not_set_what_another_one_is_about_to_use(blas, monkeypatch):
    """The library cuBLAS has one stream and one workspace for a handle, which are set before each product."""
    x, w, z = (np.ones(shape, np.float32) for shape in ((5, 3), (3, 2), (5, 2)))
    problem = cublaslt.Problem((matrix(x), matrix(w), matrix(z)), 256, False, False, cublaslt.COMPUTE["fp32"], 0)
    launch, call, callers = blas._classic(problem), blas.call, []

    def slowly(*arguments):
        callers.append(threading.get_ident())
        time.sleep(1e-3)
        call(*arguments)

    monkeypatch.setattr(blas, "call", slowly)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(launch, [0] * 8))
    assert len(callers) == 4 * 8
    assert all(len({*callers[start : start + 4]}) == 1 for start in range(0, len(callers), 4))


def test_a_turned_matrix_has_whole_rows():
    m = Matrix(256, 5, 40, 48, 0)
    assert m.turned == Matrix(256, 40, 5, 16, 0)
    assert m.turned.turned == Matrix(256, 5, 40, 48, 0)


def test_a_missing_library_is_an_import_error(monkeypatch):
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="needs cuda-pathfinder", exc_type=ImportError)

    def missing(name):
        raise pathfinder.DynamicLibNotFoundError(name)

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", missing)
    with pytest.raises(ImportError, match="the CUDA libraries lack cuBLAS: cublasLt"):
        cublaslt.load_libraries()
