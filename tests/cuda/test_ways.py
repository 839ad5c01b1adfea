"""How the way to compute a product is chosen, on the stand-in, where an algorithm takes as long as a test says.

Those numbered 0, 1 and 2 have an epilogue, 10, 11 and 12 have none; 2 and 12 round otherwise.
"""

import ctypes
import itertools

import numpy as np
import pytest

from fastbp.kernels import cublaslt
from fastbp.kernels.cublaslt import INVALID_VALUE, NOT_SUPPORTED
from fastbp.kernels.engine import Call
from fastbp.kernels.ops import OPS

from . import standin

pytestmark = pytest.mark.skipif(standin.COMPILER is None, reason="needs g++")

PLAIN = 10
US = standin.KERNEL_SECONDS


@pytest.fixture
def blas(engine):
    return engine._blas._libraries["cublasLt"]


@pytest.fixture
def engine(monkeypatch):
    """The engine, before it has chosen anything; it leaves all products to the library."""
    engine = standin.engine_on_host()
    monkeypatch.setattr(standin.engine_module(), "tile_for", lambda *_: None)
    blas = engine._blas._libraries["cublasLt"]
    monkeypatch.setattr(engine, "_ways", {})
    monkeypatch.setattr(engine._blas, "_algorithms", {})
    monkeypatch.setattr(blas, "seconds", {})
    blas.ran.clear()
    return engine


def call_of(engine, name="dense_relu_forward", *, rows=16, inputs=24, outputs=16, dtype=np.float32):
    """A call of an op on random numbers; its last argument is the output."""
    op, sizes = OPS[name], {"B": rows, "K": inputs, "N": outputs}
    given = [engine.asarray(x) for x in op.sample(np.random.default_rng(0), sizes, np.dtype(dtype))]
    return Call(op, (*given, engine.empty(op.shape(op.outputs[0], sizes), dtype)))


def taken(engine, blas, *what, **sizes):
    """The algorithm that an op takes, once it has been chosen."""
    call = call_of(engine, *what, **sizes)
    program = engine.program([call])
    program.bind()
    blas.ran.clear()
    program.run(1)
    (algorithm,) = blas.ran
    return algorithm


@pytest.mark.parametrize(
    ("seconds", "op", "fastest"),
    [
        ({}, "dense_relu_forward", 0),
        ({0: 9 * US, 1: 3 * US, 10: 9 * US, 11: 9 * US}, "dense_relu_forward", 1),
        ({0: 9 * US, 1: 9 * US, 11: 7 * US}, "dense_forward", PLAIN + 0),  # 1 us, and 1 for the bias
        ({0: 3 * US, 1: 3 * US, 10: 2.5 * US, 11: 2.5 * US}, "dense_forward", 0),
        ({0: 9 * US, 1: 8 * US, 2: 1 * US, 10: 9 * US, 11: 9 * US, 12: 1 * US}, "dense_relu_forward", 1),
        ({10: 2 * US, 11: 1 * US}, "dense_input_grad", PLAIN + 1),
        ({10: 3 * US, 11: 2 * US, 12: 1 * US}, "dense_weight_grad", PLAIN + 1),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_fastest_way_with_the_same_bits_is_taken(engine, blas, seconds, op, fastest, dtype):
    blas.seconds.update(seconds)
    assert taken(engine, blas, op, dtype=dtype) == fastest


def test_a_gpu_that_slows_down_does_not_mislead(engine, blas, monkeypatch):
    """It is quick until it is warm, of which the way that is timed first has the most."""
    timed = itertools.count()
    seconds = type(engine).device_seconds
    monkeypatch.setattr(
        type(engine), "device_seconds", lambda self, run: seconds(self, run) * min(1, 0.1 + 0.5 * next(timed))
    )
    blas.seconds.update({10: 3 * US, 11: 2 * US, 12: 9 * US})
    assert taken(engine, blas, "dense_input_grad") == PLAIN + 1


def test_it_is_chosen_once_for_a_shape_and_a_precision(engine, blas):
    calls = [call_of(engine)]
    engine.program(calls).bind()
    assert blas.ran
    blas.ran.clear()
    engine.program(calls).bind()
    assert not blas.ran
    for other, which in ((engine, [call_of(engine, rows=17)]), (type(engine)("tf32"), calls)):
        other.program(which).bind()
        assert blas.ran
        blas.ran.clear()


def test_what_is_fastest_changes_no_bit(engine, blas):
    *given, _ = call_of(engine).arguments
    results = []
    for quick in (0, 1, 2, 10, 11, 12):
        engine._ways.clear()
        blas.seconds.update(dict.fromkeys((0, 1, 2, 10, 11, 12), 9 * US) | {quick: US / 2})
        results.append(engine.dense_relu_forward(*given).tobytes())
    assert len(set(results)) == 1


def test_an_algorithm_that_fails_does_not_count(engine, blas, monkeypatch):
    monkeypatch.setattr(blas, "refused", {1, 11})
    blas.seconds.update({0: 9 * US, 1: 1 * US, 10: 7 * US, 11: 1 * US})
    assert taken(engine, blas) == PLAIN


def test_few_numbers_tell_nothing(engine, blas):
    blas.seconds.update({0: 9 * US})
    assert taken(engine, blas, rows=7, outputs=9) == 0
    assert taken(engine, blas, rows=8, outputs=8) == 1


def test_results_in_bfloat16_tell_little(engine, blas):
    blas.seconds.update({0: 9 * US, 1: 9 * US})
    x, w, b, z = (engine.zeros(shape, np.uint16) for shape in ((64, 64), (64, 64), (1, 64), (64, 64)))
    way = engine.way("dense_relu_forward", {"x": x, "w": w, "b": b, "y": z})
    assert way == ("fused", 0) and not blas.ran


def test_a_users_arrays_are_left_alone(engine, blas):
    call = call_of(engine, "dense_weight_grad")
    before = [x.tobytes() for x in call.arguments]
    engine.program([call]).bind()
    assert blas.ran and [x.tobytes() for x in call.arguments] == before


def test_nothing_is_timed_in_a_capture(engine, blas):
    program = engine.program([call_of(engine)])
    with standin.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        program.bind()
        assert not stream.captured.nodes and not blas.ran and not engine._ways
        stream.end_capture()


def test_without_memory_to_try_ways_the_first_is_taken(engine, blas, monkeypatch):
    def full(x):
        raise MemoryError

    blas.seconds.update({0: 9 * US})
    monkeypatch.setattr(standin.engine_module(), "noise_like", full)
    assert taken(engine, blas) == 0


@pytest.mark.parametrize(
    ("large", "in_workspace", "first", "fastest"),
    [(1, 0, 0, 1), (1, 1, 1, 1), (1, 2, 2, 2), (1, 3, 0, 1), (1000, 2, 0, 1)],
)
def test_of_a_large_product_what_needs_a_large_workspace_is_last(
    engine, blas, monkeypatch, large, in_workspace, first, fastest
):
    """The others round otherwise; how they do is told from the bits, here of the third alone."""
    monkeypatch.setattr(cublaslt, "LARGE", large)
    monkeypatch.setattr(ctypes.c_int.in_dll(blas.loaded, "in_workspace"), "value", in_workspace)
    blas.seconds.update({0: 9 * US, 10: 9 * US, 11: 9 * US, 12: 9 * US})
    with standin.Stream(non_blocking=True) as stream:  # in a capture, nothing is tried
        stream.begin_capture()
        way = engine.way("dense_forward", dict(zip("xwbz", call_of(engine, "dense_forward").arguments, strict=True)))
        stream.end_capture()
    names = [each.algorithm[0] for each in next(iter(engine._blas._algorithms.values()))]
    assert names[way.rank] == first
    assert taken(engine, blas, "dense_forward") == fastest


@pytest.mark.parametrize(
    ("large", "named", "unfit", "fastest"), [(1, 1, -1, 11), (1, 1, 11, 10), (1, 2, 11, 11), (1000, 1, -1, 10)]
)
@pytest.mark.parametrize("op", ["dense_input_grad", "dense_weight_grad"])
def test_algorithms_named_for_other_transposes_count_for_a_large_product(
    engine, blas, monkeypatch, large, named, unfit, fastest, op
):
    monkeypatch.setattr(cublaslt, "LARGE", large)
    for name, value in (("named", named), ("unfit", unfit)):
        monkeypatch.setattr(ctypes.c_int.in_dll(blas.loaded, name), "value", value)
    blas.seconds.update({10: 9 * US, 11: 2 * US})
    assert taken(engine, blas, op) == fastest


@pytest.mark.parametrize("refusal", [INVALID_VALUE, NOT_SUPPORTED])
@pytest.mark.parametrize(("lacking", "first"), [("fused_epilogues", PLAIN), ("any_algorithm", "cublasGemmEx")])
def test_what_is_there_is_taken(engine, blas, monkeypatch, lacking, first, refusal):
    for name, value in ((lacking, 0), ("refusal", refusal)):
        monkeypatch.setattr(ctypes.c_int.in_dll(blas.loaded, name), "value", value)
    assert taken(engine, blas) == first


def test_a_bias_at_an_odd_place_is_not_left_to_the_library(engine, blas):
    x, w, b, z = call_of(engine, "dense_forward").arguments
    wide = engine.zeros((1, 17), np.float32)
    wide[:, 1:] = b
    program = engine.program([Call(OPS["dense_forward"], (x, w, wide[:, 1:], z))])
    program.bind()
    blas.ran.clear()
    program.run(1)
    assert blas.ran == {PLAIN: 1}
    np.testing.assert_allclose(z.get(), x.get() @ w.get() + b.get(), rtol=1e-4, atol=1e-5)


def test_noise_lies_as_what_it_stands_for(engine):
    module = standin.engine_module()
    x = engine.empty((6, 24), np.float32)[1:, 3:20]
    noise = module.noise_like(x)
    assert noise.shape == x.shape and noise.strides == x.strides and noise.dtype == x.dtype
    assert (noise.data.ptr - x.data.ptr) % 256 == 0
    assert np.unique(noise.get()).size == noise.size


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_factor_is_turned_where_that_pays(engine, blas, monkeypatch, precision, dtype):
    """Where one counts as transposed the library has no algorithm but a slow one; to turn it takes 1 us."""
    monkeypatch.setattr(ctypes.c_int.in_dll(blas.loaded, "named"), "value", 1)
    engine = type(engine)(precision)
    x, dz, dw = call_of(engine, "dense_weight_grad", rows=70, inputs=67, dtype=dtype).arguments
    wanted = x.get().T @ dz.get()
    for seconds, pays in ((1.5 * US, False), (9 * US, True)):
        engine._ways.clear()
        blas.seconds.update({10: seconds})
        program = engine.program([Call(OPS["dense_weight_grad"], (x, dz, dw))])
        program.bind()
        blas.ran.clear()
        dw.fill(np.nan)
        program.run(2)
        assert blas.ran == {PLAIN + (pays and precision == "tf32"): 2}
        np.testing.assert_allclose(dw.get(), wanted, rtol=1e-4, atol=1e-4)
        assert len(engine._turned) == (pays and precision == "tf32")
        del program
    assert not engine._turned
