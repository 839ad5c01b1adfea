"""Several cores for one replay: calls in parts, and who computes them."""

import os
import sys
import threading

import numpy as np
import pytest

import fastbp
from fastbp.kernels.engine import Call
from fastbp.kernels.ops import OPS
from fastbp.kernels.threads import allowed_threads, blas_libraries, limited

from .checks import assert_allclose, assert_array_equal, on_host

CUTS = [(op, along) for op in OPS.values() for along in op.cuts]
HELPERS = [0, 1, 5]


@pytest.mark.parametrize(("op", "along"), CUTS, ids=[f"{op.name}-{along}" for op, along in CUTS])
def test_parts_of_a_call_are_parts_of_its_results(cpu_engine, rng, op, along):
    if not cpu_engine.supports(op):
        pytest.skip(f"{cpu_engine.name} does not have it")
    sizes = {d: 5 + i for i, d in enumerate("BKNMP")}
    inputs = op.sample(rng, sizes, np.dtype(np.float64))
    outputs = [np.full(op.shape(arg, sizes), np.nan) for arg in op.outputs]
    whole, in_parts = ([array.copy() for array in [*inputs, *outputs]] for _ in range(2))
    cpu_engine.execute(op, whole)
    for start, stop in [(0, 3), (3, 4), (4, sizes[along])]:
        part = op.part(in_parts, along, start, stop)
        for i, arg in enumerate(op.inputs):
            if arg.inplace and along not in arg.dims:
                part[i] = in_parts[i] = inputs[i].copy()
        cpu_engine.execute(op, part)
    for a, b in zip(in_parts, whole, strict=True):
        assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_an_op_is_cut_only_where_all_that_it_writes_can_be():
    for op, along in CUTS:
        for arg in op.outputs:
            assert along in arg.dims, op
        for arg in op.inputs:
            assert not arg.inplace or along in arg.dims or arg.dims == ("1",), op


@pytest.fixture(params=HELPERS, ids="helpers={}".format)
def numba_in_parts(request, monkeypatch):
    """The Numba engine as on a machine with other cores, which cuts calls that are small."""
    module = pytest.importorskip("fastbp.kernels.numba_engine")
    engine = fastbp.engine("numba")
    monkeypatch.setattr(module, "PART", 1e-9)
    monkeypatch.setattr(module, "UNIT", 16)
    monkeypatch.setattr(module, "allowed_threads", lambda *_: 4)
    ask_for_help = module.ask_for_help
    monkeypatch.setattr(module, "ask_for_help", lambda team, _: ask_for_help(team, request.param))
    return engine


def test_each_part_is_computed_once(numba_in_parts):
    p, g = np.arange(1000.0), np.ones(1000)
    program = numba_in_parts.program([Call(OPS["sgd"], (p, g, numba_in_parts.scalar(1.0)))])
    program.bind()
    program.run(20_000)
    assert_array_equal(p, np.arange(1000.0) - 20_000)


@pytest.mark.parametrize("optimizer", [lambda: fastbp.SGD(0.01), lambda: fastbp.Adam(0.01)], ids=["SGD", "Adam"])
def test_training_in_parts_gives_what_numpy_gives(numba_in_parts, rng, optimizer):
    X, y = rng.standard_normal((300, 50)), rng.integers(0, 40, 300)
    trained = []
    for engine in (numba_in_parts, "numpy"):
        model = fastbp.Sequential(
            [fastbp.Dense(50, 100), fastbp.ReLU(), fastbp.Dense(100, 70), fastbp.Tanh(), fastbp.Dense(70, 40)],
            loss=fastbp.SoftmaxCrossEntropy(), optimizer=optimizer(), engine=engine, seed=0, dtype=np.float64,
        )  # fmt: skip
        model.fit(X, y, epochs=3, batch_size=64)
        model.fit(X, y, epochs=2, batch_size=64)  # what counts steps goes on
        trained.append(model)
    in_parts, whole = trained
    assert_allclose(in_parts.predict(X), whole.predict(X), rtol=1e-8)
    assert_allclose(in_parts.history["loss"], whole.history["loss"], rtol=1e-8)


@pytest.mark.parametrize("helpers", HELPERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neither_threads_nor_helpers_change_a_bit(dtype, helpers, monkeypatch, rng):
    module = pytest.importorskip("fastbp.kernels.numba_engine")
    engine, ask_for_help = fastbp.engine("numba"), module.ask_for_help
    monkeypatch.setattr(module, "ask_for_help", lambda team, _: ask_for_help(team, helpers))
    x, w, dz = (rng.standard_normal(shape).astype(dtype) for shape in [(350, 700), (700, 420), (350, 420)])
    X, y = rng.standard_normal((1100, 300)), rng.integers(0, 70, 1100)
    results = []
    for threads in (1, 2, 3, 4):
        monkeypatch.setattr(module, "allowed_threads", lambda *_, threads=threads: threads)
        model = fastbp.Sequential(
            [fastbp.Dense(300, 500), fastbp.Tanh(), fastbp.Dense(500, 400), fastbp.ReLU(), fastbp.Dense(400, 70)],
            loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(), engine=engine, seed=0, dtype=dtype,
        )  # fmt: skip
        model.fit(X, y, epochs=2, batch_size=300)
        results.append(
            [
                engine.dense_forward(x, w, np.ones((1, 420), dtype)),
                engine.dense_input_grad(dz, w),
                engine.dense_weight_grad(x, dz),
                *engine.dense_relu_grads(dz, w, np.maximum(x, 0)),
                model.memory.parameters.copy(),
            ]
        )
    for result in results[1:]:
        for ours, alone in zip(result, results[0], strict=True):
            assert_array_equal(ours, alone)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a thread choose cores for another")
def test_a_helper_is_woken_on_another_core_and_then_runs_where_its_caller_may(monkeypatch):
    team = pytest.importorskip("fastbp.kernels.numba_team")
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("there is one core")
    waiting = threading.Event()
    helper = threading.Thread(target=waiting.wait)
    helper.start()
    try:
        for core in cores:
            monkeypatch.setattr(team, "current_core", lambda core=core: core)
            with team.kept_off_this_core([helper]):
                assert os.sched_getaffinity(helper.native_id) == cores - {core}
            assert os.sched_getaffinity(helper.native_id) == cores
        os.sched_setaffinity(0, {core})
        with team.kept_off_this_core([helper]):
            assert os.sched_getaffinity(helper.native_id) == {core}
    finally:
        os.sched_setaffinity(0, cores)
        waiting.set()
        helper.join()


class Library:
    """A BLAS library, as threadpoolctl shows it."""

    def __init__(self, threads):
        self.threads = threads

    def get_num_threads(self):
        return self.threads

    def set_num_threads(self, threads):
        self.threads = threads


def test_where_several_ask_for_threads_the_least_counts():
    blas = Library(8)
    with limited(4, [blas]):
        assert blas.threads == 4
        with limited(6, [blas]):
            assert blas.threads == 4
            with pytest.raises(ZeroDivisionError), limited(2, [blas]):
                assert blas.threads == 2
                1 / 0  # noqa: B018
            assert blas.threads == 4
    assert blas.threads == 8


def test_any_thread_may_ask():
    pytest.importorskip("threadpoolctl")
    libraries = blas_libraries()
    before, seen = [library.get_num_threads() for library in libraries], []

    def ask():
        with limited(1, libraries):
            seen.append([library.get_num_threads() for library in libraries])

    ask()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [[1] * len(libraries)] * 2
    assert [library.get_num_threads() for library in libraries] == before


def test_threads_are_as_many_as_an_engine_has_and_blas_and_those_who_ask_allow():
    blas = Library(8)
    assert (allowed_threads(3, [blas]), allowed_threads(64, [blas]), allowed_threads(64, [])) == (3, 8, 64)
    with limited(2, [blas]):
        assert allowed_threads(64, [blas]) == 2
    with limited(2, []):
        assert allowed_threads(64, []) == 2


def test_a_model_follows_the_number_of_threads(rng):
    pytest.importorskip("numba")
    engine = fastbp.engine("numba")
    X, y = rng.standard_normal((256, 700)).astype(np.float32), rng.integers(0, 10, 256)
    layers = [fastbp.Dense(700, 600), fastbp.ReLU(), fastbp.Dense(600, 10)]
    model = fastbp.Sequential(
        layers, loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.SGD(0.01), engine=engine, seed=0
    )
    before = [library.get_num_threads() for library in blas_libraries()]
    expected = model.predict(X)
    for threads in (1, None, 2):
        with limited(threads or 64, blas_libraries()):
            assert_allclose(on_host(model.predict(X)), expected, rtol=1e-4)
        model.fit(X, y, batch_size=256, threads=threads)
        expected = model.predict(X)
        assert [library.get_num_threads() for library in blas_libraries()] == before
