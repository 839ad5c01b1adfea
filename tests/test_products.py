"""Products of the Numba engine at the sizes where it begins to copy or takes other tiles, and with other vectors."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastbp
from fastbp.kernels.engine import Call
from fastbp.kernels.ops import OPS

from .checks import assert_close

# rows, terms, columns: single ones; beside what a tile, a strip, a part or a block holds; matrices that are copied
SHAPES = [
    (1, 1, 1), (7, 257, 65), (6, 256, 256), (33, 512, 513), (3, 513, 511), (2, 2000, 300),
    (40, 600, 300), (13, 1000, 259), (64, 300, 800), (97, 700, 401), (193, 90, 1100), (100, 3000, 20),
]  # fmt: skip
DTYPES = {np.float32: 1e-5, np.float64: 1e-12}  # relative to the largest element
LINUX_X86 = sys.platform == "linux" and platform.machine() == "x86_64"


def wider(array):
    """The array as a part of one with longer rows, all else of which is NaN."""
    room = np.full((len(array), array.shape[1] + 5), np.nan, array.dtype)
    room[:, : array.shape[1]] = array
    return room[:, : array.shape[1]]


def check_products(rows, terms, columns, dtype, placed=np.array):
    engine, rng = fastbp.engine("numba"), np.random.default_rng(0)

    def normal(*shape):
        return placed(rng.standard_normal(shape).astype(dtype))

    x, w, b, dz = normal(rows, terms), normal(terms, columns), normal(1, columns), normal(rows, columns)
    y, learns, lr = placed(np.maximum(x, 0)), placed(w), engine.scalar(0.5)
    inputs = {
        "dense_forward": [x, w, b],
        "dense_relu_forward": [x, w, b],
        "dense_input_grad": [dz, w],
        "dense_relu_grads": [dz, w, y],
        "dense_weight_grad": [x, dz],
        "dense_weight_sgd": [x, dz, learns, lr],
    }
    sizes = {"B": rows, "K": terms, "N": columns}
    ours = {}
    for name, arrays in inputs.items():
        outputs = [placed(np.full(OPS[name].shape(arg, sizes), np.nan, dtype)) for arg in OPS[name].outputs]
        program = engine.program([Call(OPS[name], (*arrays, *outputs))])
        program.bind()
        program.run(1)
        ours[name] = outputs or [learns]
    X, W, B, DZ = (array.astype(np.float64) for array in (x, w, b, dz))
    dx = (DZ @ W.T) * (X > 0)
    right = {
        "dense_forward": [X @ W + B],
        "dense_relu_forward": [np.maximum(X @ W + B, 0)],
        "dense_input_grad": [DZ @ W.T],
        "dense_relu_grads": [dx, dx.sum(axis=0, keepdims=True)],
        "dense_weight_grad": [X.T @ DZ],
        "dense_weight_sgd": [W - 0.5 * (X.T @ DZ)],
    }
    for name, results in right.items():
        for actual, expected in zip(ours[name], results, strict=True):
            assert_close(actual, expected, DTYPES[dtype])
    for array in (x, w, b, dz, y, learns, *(array for arrays in ours.values() for array in arrays)):
        if array.base is not None:  # what lies beside it is as it was
            assert np.isnan(array.base[:, array.shape[1] :]).all()


@pytest.mark.parametrize("placed", [np.array, wider], ids=["alone", "within longer rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}-{0[1]}-{0[2]}".format)
def test_products_are_right_at_any_size(shape, dtype, placed):
    pytest.importorskip("numba")
    check_products(*shape, dtype, placed)


@pytest.mark.skipif(not LINUX_X86, reason="the names of features are those of x86")
@pytest.mark.parametrize(
    ("vector", "processor", "features"),
    [(32, "haswell", "+avx2,+fma,+avx,+sse4.2,+bmi,+bmi2,+f16c"), (16, "x86-64", "+sse2,+sse")],
    ids=["AVX2", "SSE2"],
)
def test_products_are_right_with_shorter_vectors(vector, processor, features, tmp_path):
    pytest.importorskip("numba")
    if vector == 32 and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no such vectors")
    code = f"""
from fastbp.kernels.numba_vectors import VECTOR_BYTES
from tests.test_products import DTYPES, SHAPES, check_products
assert VECTOR_BYTES == {vector}
for shape in SHAPES:
    for dtype in DTYPES:
        check_products(*shape, dtype)
"""
    environment = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], env=os.environ | environment
    )
