"""Products of precision "bf16", on the stand-in for a GPU: of factors rounded to bfloat16, with sums in float32."""

import numpy as np
import pytest

import fastbp
from fastbp.kernels.engine import Call
from fastbp.kernels.ops import OPS
from fastbp.tape import Recorder

from .checks import state_of
from .cuda import standin

pytestmark = pytest.mark.skipif(standin.COMPILER is None, reason="needs g++")

REPLAY = standin.replay_module()


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(REPLAY, "blocks_for", lambda *_: [])
    return standin.engine_on_host().at_precision("bf16")


@pytest.fixture
def stages(monkeypatch):
    """The kernels of each graph that is made."""
    made, meetings = [], REPLAY.meetings
    monkeypatch.setattr(
        REPLAY, "meetings", lambda engine, stages: made.append([s.kernel for s in stages]) or meetings(engine, stages)
    )
    return made


def rounded(x):
    """The nearest bfloat16 of float32 numbers, halfway ones to the even: float32 with 8 bits of the mantissa."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32)


def test_rounding(engine):
    """A bfloat16 has steps of 2**-7 from 1 to 2."""
    largest = np.finfo(np.float32).max
    x = [1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8 - 2**-20, 3e-40, largest, -np.inf, np.nan, -0.0]
    expected = [1, 1, 1 + 2**-6, 1 + 2**-7, -1 - 2**-7, 3 * 2**-133, np.inf, -np.inf, np.nan, -0.0]
    given, w = engine.asarray(np.float32(x)[:, None]), engine.asarray(np.float32([[1]]))
    found = engine.dense_forward(given, w, engine.asarray(np.float32([[0]]))).get()
    np.testing.assert_array_equal(found.ravel(), np.float32(expected))


@pytest.fixture(params=[1, 0])
def fused(engine, request):
    """Whether the library can add a bias."""
    library_can = standin.ctypes.c_int.in_dll(engine._blas._libraries["cublasLt"].loaded, "fused_epilogues")
    library_can.value = request.param
    engine._ways.clear()
    engine._blas._algorithms.clear()
    yield request.param
    library_can.value = 1
    engine._ways.clear()
    engine._blas._algorithms.clear()


def test_products_are_of_rounded_factors(engine, rng, fused):
    x, w, dz = (rng.standard_normal(shape).astype(np.float32) for shape in ((9, 13), (13, 11), (9, 11)))
    b, y = rng.standard_normal((1, 11)).astype(np.float32), rng.standard_normal((9, 13)).astype(np.float32)
    given = {"x": x, "w": w, "dz": dz, "b": b, "y": y}
    half = {name: rounded(array).astype(np.float64) for name, array in given.items()}
    expected = {
        "dense_forward": half["x"] @ half["w"] + b,
        "dense_relu_forward": np.maximum(half["x"] @ half["w"] + b, 0),
        "dense_input_grad": half["dz"] @ half["w"].T,
        "dense_weight_grad": half["x"].T @ half["dz"],
        "dense_relu_input_grad": np.where(y <= 0, 0, half["dz"] @ half["w"].T),
    }
    for name, wanted in expected.items():
        found = getattr(engine, name)(*(engine.asarray(given[arg.name]) for arg in OPS[name].inputs))
        np.testing.assert_allclose(found.get(), wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def trained_by_hand(X, labels, parameters, lr, fused, exact=""):
    """Steps of six rows written out in NumPy; what is named in `exact` is not rounded."""

    def half(name, x):
        return x if name in exact else rounded(x).astype(np.float64)

    w1, b1, w2, b2 = parameters
    for start in range(0, len(X), 6):
        x, t = half("x", X[start : start + 6]), labels[start : start + 6]
        product = x @ half("w", w1)
        product = product if fused else half("h", product)
        h = half("h", np.maximum(product + half("b", b1), 0))
        z = h @ half("w", w2) + b2
        p = np.exp(z - z.max(axis=1, keepdims=True))
        dz = half("d", (p / p.sum(axis=1, keepdims=True) - np.eye(3)[t]) / 6)
        dh = np.where(h > 0, half("e", dz @ half("w", w2).T), 0)
        w2, b2 = w2 - lr * h.T @ dz, b2 - lr * dz.sum(axis=0)
        w1, b1 = w1 - lr * x.T @ dh, b1 - lr * dh.sum(axis=0)
    return np.concatenate([parameter.ravel() for parameter in (w1, b1, w2, b2)])


def test_training_rounds_what_each_step_has_written(engine, stages, fused):
    """As each step written out in NumPy does, but not if any rounding is left out there."""
    rng = np.random.default_rng(0)
    X, labels = rng.standard_normal((18, 5)).astype(np.float32), np.arange(18) % 3
    layers = [fastbp.Dense(5, 8), fastbp.ReLU(), fastbp.Dense(8, 3)]
    options = {"loss": fastbp.SoftmaxCrossEntropy(), "optimizer": fastbp.SGD(1.0), "precision": "bf16", "seed": 0}
    model = fastbp.Sequential(layers, engine=engine, **options)
    layers[0].biases = np.linspace(-0.3, 0.3, 8)[None]
    started = [x.get().astype(np.float64) for layer in layers[::2] for x in (layer.weights, layer.biases)]
    model.fit(X, labels, epochs=1, batch_size=6, shuffle=False, verbose=False)
    found = np.concatenate([x.get().ravel() for layer in layers[::2] for x in (layer.weights, layer.biases)])
    np.testing.assert_allclose(found, trained_by_hand(X, labels, started, 1.0, fused), atol=1e-5, rtol=0)
    for name in "xwbhde":
        assert np.abs(found - trained_by_hand(X, labels, started, 1.0, fused, name)).max() > 1e-4, name
    (step,) = {tuple(kernels) for kernels in stages if "sgd" in kernels}
    assert step.count("to_bfloat16") == 3  # w1, b1 and w2; all else is of bfloat16, and z, which no product multiplies


PRODUCTS = ("dense_relu_forward", "x", "w", "b", "y"), ("dense_forward", "y", "w", "b", "z")
COPIED = ["to_bfloat16", "to_bfloat16", "dense_relu_forward", "to_bfloat16", "dense_forward"]  # x, w, and y


@pytest.mark.parametrize(
    ("calls", "passing", "kernels"),
    [
        # x, w and b are copied, but not y
        (PRODUCTS, "yz", ["to_bfloat16"] * 3 + ["dense_relu_forward", "dense_forward"]),
        # somebody reads y afterwards
        (PRODUCTS, "z", COPIED),
        # what follows can read it, and write u beside it
        (
            [*PRODUCTS, ("dense_relu_grads", "d", "w", "y", "u", "db"), ("dense_weight_grad", "x", "u", "v")],
            "yzuv",
            ["to_bfloat16"] * 3
            + ["dense_relu_forward", "dense_forward", "to_bfloat16", "dense_input_grad", "relu_grads_bfloat16"]
            + ["dense_weight_grad"],
        ),
        # not beside it, where no product multiplies u
        (
            [*PRODUCTS, ("dense_relu_grads", "d", "w", "y", "u", "db")],
            "yzu",
            [*COPIED, "to_bfloat16", "dense_input_grad", "relu_grads"],
        ),
        # not at all
        ([*PRODUCTS, ("scale", "y", "half", "u")], "yzu", [*COPIED, "scale"]),
        # as a bias of what is float32
        ([*PRODUCTS, ("dense_forward", "x", "w", "y", "u")], "yzu", [*COPIED, "dense_forward"]),
    ],
)
def test_what_needs_no_other_type_is_of_bfloat16(engine, calls, passing, kernels):
    arrays = {name: engine.zeros((6, 6), np.float32) for name in "xwyzuvd"}
    arrays |= {"b": engine.zeros((1, 6), np.float32), "db": engine.zeros((1, 6), np.float32)}
    arrays["half"], room = engine.scalar(0.5), engine.zeros((5,), np.float64)
    stages = [stage for op, *names in calls for stage in engine.stages(OPS[op], [arrays[n] for n in names], room)]
    found, owned = engine.at_its_precision(stages, [arrays[name] for name in passing])
    assert [stage.kernel for stage in found] == kernels
    halves = {x.data.ptr for stage in found for x in stage.used().values() if x.dtype == np.uint16}
    assert halves == {x.data.ptr for x in owned}


@pytest.mark.parametrize("wanted", [False, True])
def test_what_is_read_after_a_replay_is_written(engine, rng, stages, wanted):
    x, w = rng.standard_normal((4, 6)).astype(np.float32), rng.standard_normal((6, 6)).astype(np.float32)
    recorder = Recorder(engine, np.float32)
    given = [recorder.adopt(engine.asarray(a)) for a in (x, w, np.zeros((1, 6), np.float32))]
    hidden = recorder.dense_relu_forward(*given)
    output = recorder.want(recorder.dense_forward(hidden, *given[1:]))
    read = recorder.want(hidden) if wanted else None
    tape = recorder.tape()
    tape.bind()
    tape.run()
    (kernels,) = stages
    assert kernels.count("to_bfloat16") == 3  # of x, w, and the hidden outputs or the biases added to them
    expected = np.maximum(rounded(x) @ rounded(w), 0)
    np.testing.assert_allclose(output.get(), rounded(expected) @ rounded(w), rtol=1e-5, atol=1e-5)
    if wanted:
        np.testing.assert_allclose(read.get(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_written_is_rounded_again(engine):
    x, w, z, u = (engine.zeros((4, 4), np.float32) for _ in range(4))
    ops = [("dense_input_grad", x, w, z), ("dense_weight_grad", x, w, u), ("relu_forward", u, x)]
    calls = [*ops, ("dense_input_grad", x, w, z), ("relu_forward", u, w[1:]), ("dense_weight_grad", x, w, u)]
    stages = [stage for name, *arrays in calls for stage in engine.stages(OPS[name], arrays, u)]
    rounded = [stage.arrays["x"] for stage in engine.at_its_precision(stages)[0] if stage.kernel == "to_bfloat16"]
    assert [array.data.ptr for array in rounded] == [array.data.ptr for array in (x, w, x, w)]


def test_the_same_bits_in_any_order(engine):
    def trained():
        layers = [fastbp.Dense(5, 8), fastbp.ReLU(), fastbp.Dense(8, 8), fastbp.Tanh(), fastbp.Dense(8, 3)]
        options = {"loss": fastbp.SoftmaxCrossEntropy(), "optimizer": fastbp.Adam(0.01), "precision": "bf16", "seed": 0}
        model = fastbp.Sequential(layers, engine=engine, **options)
        X, labels = np.random.default_rng(0).standard_normal((160, 5)), np.arange(160) % 3
        with model.training() as trainer:
            trainer.bind(model.checked(X, labels), 4)
            ((tape, steps),) = trainer._replays
            tape.run(steps)
        return state_of(model)

    assert trained() == trained() == trained()


def test_float64_is_not_rounded(engine):
    w, b = engine.asarray(np.array([[1 + 2**-30]])), engine.asarray(np.zeros((1, 1)))
    assert engine.dense_forward(w, w, b).get() == (1 + 2**-30) ** 2


def test_copies_live_as_long_as_what_reads_them(engine):
    x, w, b, z = (engine.asarray(np.full((64, 64), 1.5, np.float32)) for _ in range(4))
    program = engine.program([Call(OPS["dense_forward"], (x, w, b[:1], z))])
    program.bind()
    for _ in range(20):
        engine.empty((64, 64), np.uint16)  # where copies would have been that nobody keeps
        program.run(1)
        assert (z.get() == 64 * 1.5**2 + 1.5).all()
