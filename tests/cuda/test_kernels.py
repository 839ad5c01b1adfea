"""The GPU kernels on the host: their sources, compiled by g++ against `shim.h`, driven by the engine's own Python."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastbp
from fastbp.conformance import keep
from fastbp.kernels import cupy_sources
from fastbp.kernels.cupy_sources import KERNELS, SOURCES
from fastbp.kernels.ops import OPS
from fastbp.trial import FLOATS, SIZES, Trial

from . import standin

pytestmark = pytest.mark.skipif(standin.COMPILER is None, reason="needs g++")

ENGINE = standin.engine_module()
# the kernels that give a row of a matrix to a group of threads, and the ops that take them
BY_ROW = {name for name, kernel in KERNELS.items() if kernel.pattern == "ROWS"}
OF_ROWS = [name for name in OPS if BY_ROW.intersection(ENGINE.STAGES.get(name, (name,)))]
BARRIER = "__syncthreads();"
# an op that needs it, for each barrier of a file; the fifth of `math` is between blocks, which run one by one; without
# an op, it matters where kernels are parts of one
BARRIERS = {
    "math": ["softmax_forward", "softmax_forward", "batch_statistics", "batch_statistics", "", "softmax_cross_entropy"],
    "layers": ["next_batch"],
    "optim": ["adam"],
    "products": ["", ""],
    "replay": ["", "", ""],
}


@pytest.fixture
def engine():
    return standin.engine_on_host()


@pytest.fixture
def narrow(monkeypatch):
    """Make rows count as wide that are not, so that they get a block each."""
    for part in (ENGINE, cupy_sources):
        monkeypatch.setattr(part, "WIDE", 20)
    ENGINE.module.cache_clear()
    yield
    ENGINE.module.cache_clear()


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_promises(engine, op):
    report = fastbp.check(engine, [op.name])
    assert report.passed, f"\n{report}"


def test_every_op_that_must_be_there_is(engine):
    missing = {name for name, op in OPS.items() if not engine.supports(op)}
    assert missing == {
        "dense_weight_sgd", "dense_bias_sgd", "dense_relu_sgd", "dense_softmax_cross_entropy", "classifier_grads",
        "classifier_sgd",
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
    ("file", "which", "name"), [(file, n, name) for file in BARRIERS for n, name in enumerate(BARRIERS[file]) if name]
)
def test_a_missing_barrier_is_found(file, which, name):
    assert standin.in_process(is_wrong, name, file, BARRIER, BARRIER, which) is False
    assert standin.in_process(is_wrong, name, file, BARRIER, "", which) in (True, None)


def test_barriers_are_counted():
    found = {file: source.count(BARRIER) for file, source in SOURCES.items() if BARRIER in source}
    assert found == {file: len(names) for file, names in BARRIERS.items()}


@pytest.mark.parametrize(
    ("file", "old", "new", "name"),
    [
        ("math", "data[i * (Index)step + j]", "data[i * (Index)step + j + 1]", "relu_forward"),
        ("math", "j < (n); j += lanes.count", "j < (n) - 1; j += lanes.count", "softmax_forward"),
        ("math", "& -count", "& -count / 2", "softmax_forward"),
        ("math", "distance >= lanes.count", "distance > lanes.count", "dense_bias_grad"),
        ("math", "i < grid_size();", "i < grid_size() - 1;", "softmax_cross_entropy"),
        ("math", "int warp = 1;", "int warp = 2;", "layer_norm_forward"),
        ("losses", "(j == t[i])", "(j == t[i] + 1)", "softmax_cross_entropy_backward"),
    ],
)
def test_a_wrong_index_is_found(file, old, new, name):
    assert standin.in_process(is_wrong, name, file, old, old) is False
    assert standin.in_process(is_wrong, name, file, old, new) in (True, None)


def test_an_argument_of_the_wrong_size_is_found(engine, monkeypatch):
    by_value = ENGINE.by_value
    monkeypatch.setattr(ENGINE, "by_value", lambda x, kind: by_value(x, "Vector" if kind == "Matrix" else kind))
    with pytest.raises(TypeError, match="relu_forward: argument 1 is not of its parameter's size"):
        engine.relu_forward([[1.0]])


@pytest.mark.parametrize("lacking", ["fused_epilogues", "any_algorithm"])
def test_without_what_cublaslt_may_lack(engine, lacking):
    """Products without epilogues, and then by cublasGemmEx."""
    switch = ctypes.c_int.in_dll(engine._blas._libraries["cublasLt"].loaded, lacking)
    switch.value = 0
    engine._blas._algorithms.clear()
    engine._ways.clear()
    try:
        for name in ENGINE.PRODUCTS:
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
