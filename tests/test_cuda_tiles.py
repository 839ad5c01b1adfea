"""Matrix products by tiles, on the stand-in for a GPU: right at any shape, and taken where they are faster."""

import numpy as np
import pytest

from fastbp.kernels.cupy_sources import KERNELS
from fastbp.kernels.cupy_tiles import TILES, tile_for
from fastbp.kernels.ops import OPS

from .cuda import standin

pytestmark = pytest.mark.skipif(standin.COMPILER is None, reason="needs g++")

ENGINE = standin.engine_module()
# rows, inputs and outputs of a layer: one, a few, primes, and more terms than all warps take at a time
SHAPES = [(1, 1, 1), (5, 3, 7), (17, 70, 31), (67, 8, 130), (34, 131, 10)]
NAMES = "x", "w", "b", "dz", "y"


@pytest.fixture
def engine():
    return standin.engine_on_host()


def placed(engine, numbers, offset, padding):
    """A matrix of these numbers, so many after a boundary of 16 bytes, in rows with so many numbers between."""
    rows, columns = numbers.shape
    step = -(-columns // 4) * 4 + padding
    array = engine.empty((rows * step + 8,), numbers.dtype)[offset : offset + rows * step].reshape(rows, step)
    array[:, :columns] = engine.asarray(numbers)
    return array[:, :columns]


def ran(engine, kernel, arrays, like, dtype, offset, padding):
    """What a kernel writes."""
    given = [placed(engine, arrays[name].astype(dtype), offset, padding) for _, name in KERNELS[kernel].parameters[:-1]]
    result = placed(engine, np.full(like.shape, np.nan, dtype), offset, padding)
    (stage,) = engine.stages(OPS[kernel], [*given, result], engine.zeros((5,), np.float64))
    for launch in engine.launches(stage):
        launch()
    return result.get()


@pytest.mark.parametrize(("offset", "padding"), [(0, 0), (1, 0), (0, 1), (2, 4)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "{}x{}".format(*tile.shape))
def test_products(engine, monkeypatch, rng, tile, dtype, shape, offset, padding):
    monkeypatch.setattr(ENGINE, "tile_for", lambda *_: tile)
    batch, inputs, outputs = shape
    sizes = (batch, inputs), (inputs, outputs), (1, outputs), (batch, outputs), (batch, inputs)
    arrays = {name: rng.standard_normal(size).astype(dtype) for name, size in zip(NAMES, sizes, strict=True)}
    x, w, b, dz, y = (arrays[name].astype(np.float64) for name in NAMES)
    expected = {
        "dense_forward": x @ w + b,
        "dense_relu_forward": np.maximum(x @ w + b, 0),
        "dense_input_grad": dz @ w.T,
        "dense_relu_input_grad": np.where(y <= 0, 0, dz @ w.T),
        "dense_weight_grad": x.T @ dz,
    }
    for kernel, wanted in expected.items():
        found = ran(engine, kernel, arrays, wanted, dtype, offset, padding)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1000 * np.finfo(dtype).eps)
        assert found.tobytes() == ran(engine, kernel, arrays, wanted, dtype, offset, padding).tobytes()


def test_what_is_not_finite_stays_where_it_is(engine):
    x, w, b = np.ones((40, 21)), np.ones((21, 35)), np.zeros((1, 35))
    x[3, 20], w[0, 34], b[0, 7] = np.nan, np.inf, -np.inf
    y = engine.dense_relu_forward(x, w, b).get()
    assert np.isnan(y[3]).all() and np.isinf(np.delete(y, 3, 0)[:, 34]).all()
    assert (np.delete(y, 3, 0)[:, 7] == 0).all() and np.isfinite(np.delete(y, 3, 0)[:, :34]).all()


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((128, 512, 784), (16, 32)),
        ((128, 256, 512), (16, 16)),
        ((128, 10, 256), (8, 16)),
        ((512, 256, 128), (32, 32)),
        ((784, 512, 128), None),
        ((64, 1024, 1024), (16, 32)),
        ((512, 512, 256), None),
        ((10, 10, 100_000), None),
    ],
)
def test_which_tiles_are_taken(sizes, shape):
    """Of those whose times are known."""
    tile = tile_for(*sizes)
    assert (tile and tile.shape) == shape


@pytest.mark.parametrize(
    ("precision", "dtype", "by_tiles"),
    [("fp32", np.float32, True), ("fp32", np.float64, True), ("tf32", np.float32, False), ("bf16", np.float64, True)],
)
def test_a_product_by_tiles_takes_its_relu_along(engine, precision, dtype, by_tiles):
    """What is computed in another precision is left to cuBLAS, as what is large is."""
    engine = type(engine)(precision)
    arrays = [engine.zeros(shape, dtype) for shape in ((4, 2), (3, 2), (4, 3), (4, 3), (1, 3))]
    kernels = [stage.kernel for stage in engine.stages(OPS["dense_relu_grads"], arrays, engine.zeros((5,), np.float64))]
    assert kernels == (["dense_relu_input_grad", "bias_grad"] if by_tiles else ["dense_input_grad", "relu_grads"])
