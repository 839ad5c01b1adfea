"""The GPU kernels on the host: their sources, compiled by g++ against `shim.h`, driven by the engine's own Python."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastbp
from fastbp.conformance import keep
from fastbp.kernels import cupy_sources
from fastbp.kernels.cupy_sources import KERNELS, SOURCES, Stage
from fastbp.kernels.ops import OPS
from fastbp.trial import FLOATS, SIZES, Trial

from . import standin

pytestmark = pytest.mark.skipif(standin.COMPILER is None, reason="needs g++")

ENGINE, REPLAY = standin.engine_module(), standin.replay_module()
# the kernels that give a row of a matrix to a group of threads, and the ops that take them
BY_ROW = {name for name, kernel in KERNELS.items() if kernel.pattern == "ROWS"}
OF_ROWS = [name for name in OPS if BY_ROW.intersection(ENGINE.STAGES.get(name, (name,)))]
BARRIER, OF_WARP = "__syncthreads();", "__syncwarp();"
# an op that needs it, for each barrier of a file; the fifth of `sums` is between blocks, which run one by one; without
# an op, it matters where kernels are parts of one
BARRIERS = {
    "sums": [
        "softmax_forward", "softmax_forward", "batch_statistics", "batch_statistics", "", "softmax_cross_entropy",
        "", "",
    ],
    "packs": ["dense_bias_grad", "dense_bias_grad"],
    "layers": ["next_batch"],
    "optim": ["adam"],
    "factors": ["", ""],
    "tiles": ["dense_forward", "dense_forward"],
    "replay": ["", ""],
}  # fmt: skip


@pytest.fixture
def engine():
    return standin.engine_on_host()


@pytest.fixture
def narrow(monkeypatch):
    """Make rows count as wide that are not, so that they get a block each."""
    for part in (ENGINE, cupy_sources):
        monkeypatch.setattr(part, "WIDE", 20)
    standin.module_of_file.cache_clear()
    yield
    standin.module_of_file.cache_clear()


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_promises(engine, op):
    report = fastbp.check(engine, [op.name])
    assert report.passed, f"\n{report}"


def test_every_op_that_must_be_there_is(engine):
    missing = {name for name, op in OPS.items() if not engine.supports(op)}
    assert missing == {
        "dense_weight_sgd", "dense_bias_sgd", "dense_relu_sgd", "dense_softmax_cross_entropy", "classifier_grads",
        "classifier_sgd", "sparse_forward", "sparse_weight_grad",
    }  # fmt: skip


@pytest.mark.parametrize("name", OF_ROWS)
def test_wide_rows_get_a_block_each(engine, name, narrow):
    result = keep(engine, OPS[name], "values")
    assert result.outcome == "passed", result


def is_wrong(name, *fault):
    """Whether an op gives wrong numbers in float32, or none, where rows that are not wide count as wide."""
    standin.plant(*fault)
    ENGINE.WIDE = cupy_sources.WIDE = 20
    trial = Trial(standin.engine_on_host(), OPS[name])
    try:
        for sizes in SIZES[3:]:
            trial.compare(trial.draw(sizes, FLOATS[0]), FLOATS[0])
    except RuntimeError:
        return True
    return bool(trial.failure)


@pytest.mark.parametrize(
    ("file", "barrier", "which", "name"),
    [(file, BARRIER, n, name) for file in BARRIERS for n, name in enumerate(BARRIERS[file]) if name]
    + [("tiles", OF_WARP, 0, "dense_forward")],
)
def test_a_missing_barrier_is_found(file, barrier, which, name):
    assert standin.in_process(is_wrong, name, file, barrier, barrier, which) is False
    assert standin.in_process(is_wrong, name, file, barrier, "", which) in (True, None)


def is_transposed_wrongly(*fault):
    standin.plant(*fault)
    engine = standin.engine_on_host()
    x = engine.asarray(np.arange(200 * 201.0).reshape(200, 201))  # more tiles than blocks
    t = engine.empty((201, 200), np.float64)
    for launch in engine.launches(Stage("transpose", {"x": x, "t": t})):
        launch()
    return not np.array_equal(t.get(), x.get().T)


@pytest.mark.parametrize("which", [0, 1])
def test_a_barrier_of_the_transpose_is_needed(which):
    assert standin.in_process(is_transposed_wrongly, "factors", BARRIER, BARRIER, which) is False
    assert standin.in_process(is_transposed_wrongly, "factors", BARRIER, "", which) is True


def test_barriers_are_counted():
    found = {file: source.count(BARRIER) for file, source in SOURCES.items() if BARRIER in source}
    assert found == {file: len(names) for file, names in BARRIERS.items()}


@pytest.mark.parametrize(
    ("file", "old", "new", "name"),
    [
        ("arrays", "data[i * (Index)step + j]", "data[i * (Index)step + j + 1]", "relu_forward"),
        ("arrays", "j < (n); j += lanes.count", "j < (n) - 1; j += lanes.count", "layer_norm_forward"),
        ("sums", "& -count", "& -count / 2", "softmax_forward"),
        ("sums", "distance >= lanes.count", "distance > lanes.count", "batch_statistics"),
        ("packs", "j + n < x.columns ? j + n", "j + n + 1 < x.columns ? j + n + 1", "sgd"),
        ("packs", "warp < warps && keeps", "warp + 1 < warps && keeps", "dense_bias_grad"),
        ("sums", "i < grid_size();", "i < grid_size() - 1;", "softmax_cross_entropy"),
        ("sums", "int warp = 1;", "int warp = 2;", "layer_norm_forward"),
        ("losses", "(j == t[i])", "(j == t[i] + 1)", "softmax_cross_entropy_backward"),
    ],
)
def test_a_wrong_index_is_found(file, old, new, name):
    assert standin.in_process(is_wrong, name, file, old, old) is False
    assert standin.in_process(is_wrong, name, file, old, new) in (True, None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [1, 4, 10, 16, 256])
@pytest.mark.parametrize("aligned", [True, False])
def test_several_blocks_share_the_rows_of_a_sum(engine, columns, dtype, aligned):
    rows, rng = 4200, np.random.default_rng(0)
    drawn = [rng.standard_normal((rows, columns)).astype(dtype) for _ in range(2)]
    arrays = [engine.buffer((rows, columns + 1), dtype)[:, 1 - aligned :][:, :columns] for _ in drawn]
    for array, numbers in zip(arrays, drawn, strict=True):
        array[...] = engine.asarray(numbers)
    (y, dx), db = arrays, engine.empty((1, columns), dtype)
    bent = np.where(drawn[0] > 0, drawn[1], 0)
    grid, _ = ENGINE.spread("SUMS", dx, 4)
    assert (grid[1] > 1) == (columns < 64)
    room, found = engine.zeros((REPLAY.room_for(REPLAY.MOST_BLOCKS),), np.float64), []
    for _ in range(3):
        dx[...] = engine.asarray(drawn[1])
        REPLAY.run_all(engine.launches(Stage("relu_grads", {"y": y, "dx": dx, "db": db, "room": room})))
        found.append(engine.asnumpy(db))
        assert np.array_equal(engine.asnumpy(dx), bent)
    np.testing.assert_allclose(found[0], bent.sum(0, dtype=np.float64, keepdims=True), rtol=1e-5, atol=1e-4)
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize("columns", [3, 16, 130, 4100, 8200])
@pytest.mark.parametrize("aligned", [True, False])
def test_softmax_of_rows_of_any_length(engine, columns, aligned):
    rng = np.random.default_rng(0)
    z = 5 * rng.standard_normal((3, columns)).astype(np.float32)
    p = np.exp(z - z.max(1, keepdims=True).astype(np.float64))
    p /= p.sum(1, keepdims=True)
    arrays = [engine.buffer((3, columns + 1), np.float32)[:, 1 - aligned :][:, :columns] for _ in range(2)]
    arrays[0][...] = engine.asarray(z)
    REPLAY.run_all(engine.launches(Stage("softmax_forward", dict(zip("zp", arrays, strict=True)))))
    np.testing.assert_allclose(engine.asnumpy(arrays[1]), p, rtol=2e-5, atol=1e-9)


def test_subnormal_numbers_have_a_sign(engine):
    """Though the GPU takes them for 0 where it computes; g++ does as well, on x86."""
    tiny = np.float32(1e-40) * np.array([[1, -1, 0, 4]], np.float32)
    ones, at_half = np.ones((1, 4), np.float32), [1, 0.5, 0.5, 1]
    assert engine.asnumpy(engine.relu_backward(ones, tiny)).tolist() == [[1, 0, 0, 1]]
    assert engine.asnumpy(engine.leaky_relu_backward(ones, tiny, [0.5])).tolist() == [at_half]
    assert engine.asnumpy(engine.elu_backward(ones, tiny, [0.5])).tolist() == [at_half]
    p, g = engine.asarray(tiny[0]), engine.asarray(np.zeros(4, np.float32))
    engine.penalize(p, g, [0.0], [1.0])
    assert engine.asnumpy(g).tolist() == [1, -1, 0, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
@pytest.mark.parametrize("columns", [3, 8, 64])
def test_rows_are_taken_from_tables_of_any_layout(engine, columns, dtype):
    table = np.random.default_rng(0).integers(-99, 99, (50, columns)).astype(dtype)
    rows = engine.asarray([7, 0, 49, 7, 20])
    batch = engine.buffer((5, columns), np.float32)
    for x in (engine.asarray(table), engine.asarray(np.repeat(table, 2, 1))[:, ::2], engine.asarray(table.T.copy()).T):
        batch[...] = np.nan
        REPLAY.run_all(engine.launches(Stage("take", {"x": x, "rows": rows, "xb": batch})))
        assert np.array_equal(engine.asnumpy(batch), table[[7, 0, 49, 7, 20]])


def test_an_argument_of_the_wrong_size_is_found(engine, monkeypatch):
    by_value = ENGINE.by_value
    monkeypatch.setattr(ENGINE, "by_value", lambda x, kind: by_value(x, "Vector" if kind == "Matrix" else kind))
    with pytest.raises(TypeError, match="relu_forward: argument 1 is not of its parameter's size"):
        engine.relu_forward([[1.0]])


@pytest.mark.parametrize("lacking", ["fused_epilogues", "any_algorithm"])
def test_without_what_cublaslt_may_lack(engine, monkeypatch, lacking):
    """Products without epilogues, and then by cublasGemmEx."""
    monkeypatch.setattr(ENGINE, "tile_for", lambda *_: None)
    switch = ctypes.c_int.in_dll(engine._blas._libraries["cublasLt"].loaded, lacking)
    switch.value = 0
    engine._blas._algorithms.clear()
    engine._ways.clear()
    try:
        for name in ENGINE.PRODUCTS.keys() & OPS:
            result = keep(engine, OPS[name], "values")
            assert result.outcome == "passed", result
    finally:
        switch.value = 1
        engine._blas._algorithms.clear()
        engine._ways.clear()


# what runs with the address sanitizer: each op on odd shapes, on arrays of exactly their size
WITHIN_BOUNDS = """
import sys
from fastbp.conformance import keep
from fastbp.trial import FLOATS, SIZES, Trial
from fastbp.kernels.cupy_sources import SOURCES
from fastbp.kernels.ops import OPS
from tests.cuda import standin
standin.OPTIONS.append("-fsanitize=address")
engine = standin.engine_on_host()
SOURCES["layers"] = SOURCES["layers"].replace(*sys.argv[1:])
for op in OPS.values():
    for dtype in FLOATS if engine.supports(op) else ():
        trial = Trial(engine, op)
        trial.compare(trial.draw(SIZES[4], dtype), dtype)
        assert not trial.failure, trial.failure
print("all within bounds")
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("what is not there", "", "all within bounds"),
        ("rows[i] = order[start + i]", "rows[i + 1] = 0", "heap-buffer-overflow"),
    ],
)
def test_all_stays_within_bounds(old, new, said):
    path = subprocess.run([standin.COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout
    if not Path(path.strip()).is_file():
        pytest.skip("needs the address sanitizer of g++")
    environment = os.environ | {"LD_PRELOAD": path.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WITHIN_BOUNDS, old, new],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert said in done.stdout + done.stderr, done.stderr[-3000:]
