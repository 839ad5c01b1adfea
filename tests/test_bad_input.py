"""Bad input is refused by the name of the argument, what it was and what it should be; the model stays as it was."""

import copy

import numpy as np
import pytest

import fastbp

from .checks import small_data, small_model, state_of

X, Y = small_data(20)


def with_value(x, value, place=(3, 2)):
    x = x.copy()
    x[place] = value
    return x


BAD_X = {
    "wrong feature count": (X[:, :3], r"X must have shape \(rows, 4\), got \(20, 3\)"),
    "one dimension": (X[0], r"X must have shape \(rows, 4\), got \(4,\); a single row is X.reshape\(1, -1\)"),
    "three dimensions": (X[None], r"X must have shape \(rows, 4\), got \(1, 20, 4\)"),
    "number": (1.0, r"X must have shape \(rows, 4\), got \(\)"),
    "empty": (X[:0], r"X must have shape \(rows, 4\), got \(0, 4\)"),
    "no features": (X[:, :0], r"X must have shape \(rows, 4\), got \(20, 0\)"),
    "empty list": ([], r"X must have shape \(rows, 4\), got \(0,\)"),
    "nan": (with_value(X, np.nan), r"X must hold finite .*numbers, got nan at \(3, 2\)"),
    "inf": (with_value(X, np.inf), r"X must hold finite .*numbers, got inf at \(3, 2\)"),
    "nan in float32": (with_value(X, np.nan).astype("f4"), r"X must hold finite .*numbers, got nan at \(3, 2\)"),
    "nan in float16": (with_value(X, np.nan).astype("f2"), r"X must hold finite .*numbers, got nan at \(3, 2\)"),
    "complex": (X + 0j, "X must hold real numbers, got dtype complex128"),
    "object": (X.astype(object), "X must hold real numbers, got dtype object"),
    "text": (X.astype(str), "X must hold real numbers, got dtype <U32"),
    "dates": (X.astype("M8[s]"), r"X must hold real numbers, got dtype datetime64\[s\]"),
    "masked": (np.ma.masked_array(X), "X is a masked array"),
    "ragged": ([[1, 2, 3, 4], [1, 2]], "X must .*"),
    "nothing": (None, "X must hold real numbers, got dtype object"),
    "text itself": ("digits", "X must hold real numbers, got dtype <U6"),
}
BAD_Y = {
    "another length": (Y[:7], r"y must hold 20 labels, shape \(20,\), or rows of shape \(20, 3\); got \(7,\)"),
    "column": (Y[:, None], r"y must hold 20 labels, .*got \(20, 1\)"),
    "number": (1, r"y must hold 20 labels, .*got \(\)"),
    "empty": (Y[:0], r"y must hold 20 labels, .*got \(0,\)"),
    "too large": (with_value(Y, 3, 5), "y must hold labels from 0 to 2, got 3"),
    "negative": (with_value(Y, -1, 5), "y must hold labels from 0 to 2, got -1"),
    "far too large": (with_value(Y.astype(float), 1e30, 5), r"y must hold labels from 0 to 2, got 1e\+30"),
    "fractional": (with_value(Y.astype(float), 0.5, 5), r"y must hold whole numbers, got 0\.5"),
    "nan": (with_value(Y.astype(float), np.nan, 5), r"y must hold finite .*numbers, got nan at \(5,\)"),
    "inf": (with_value(Y.astype(float), np.inf, 5), r"y must hold finite .*numbers, got inf at \(5,\)"),
    "complex": (Y + 0j, "y must hold real numbers, got dtype complex128"),
    "names": (Y.astype(str), "y must hold real numbers, got dtype <U21"),
    "object": (Y.astype(object), "y must hold real numbers, got dtype object"),
    "masked": (np.ma.masked_array(Y), "y is a masked array; fill or drop what is masked first$"),
    "negative rows": (np.full((20, 3), -0.5), "y of two dimensions must hold one-hot rows or probabilities, got -0.5"),
    "rows of nan": (np.full((20, 3), np.nan), r"y must hold finite .*numbers, got nan at \(0, 0\)"),
    "too many classes": (np.eye(4)[Y], r"y must hold 20 labels, .*got \(20, 4\)"),
    "ragged": ([[0], [0, 1]], "y must .*"),
    "nothing": (None, "y must hold real numbers, got (dtype object|None)"),
}
USES = {
    "fit": lambda m, X, y: m.fit(X, y, epochs=1),
    "validation_data": lambda m, *data: m.fit(*small_data(20), epochs=1, validation_data=data),
    "evaluate": lambda m, X, y: m.evaluate(X, y),
    "gradients": lambda m, X, y: m.gradients(X, y),
}
LOOKS = {
    "predict": lambda m, X: m.predict(X),
    "predict_proba": lambda m, X: m.predict_proba(X),
    "forward": lambda m, X: m.forward(X),
}


@pytest.fixture(scope="module", params=["untrained", "trained"])
def trained(request):
    return request.param == "trained"


def refused(engine, use, error, match, trained=True):
    model = small_model(engine, dropout=0.2, dtype=np.float32)
    if trained:
        model.fit(*small_data(20), epochs=1)
    before = state_of(model)
    with pytest.raises(error, match=match) as caught:
        use(model)
    assert state_of(model) == before
    return caught


@pytest.mark.parametrize("use", [*USES, *LOOKS])
@pytest.mark.parametrize("bad", BAD_X)
def test_bad_x(engine, use, bad, trained):
    x, match = BAD_X[bad]
    prefix = "validation_data: " if use == "validation_data" else ""
    call = (lambda m: USES[use](m, x, Y)) if use in USES else (lambda m: LOOKS[use](m, x))
    refused(engine, call, ValueError, f"^{prefix}{match}", trained)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("bad", BAD_Y)
def test_bad_y(engine, use, bad, trained):
    y, match = BAD_Y[bad]
    prefix = "validation_data: " if use == "validation_data" else ""
    refused(engine, lambda m: USES[use](m, X, y), ValueError, f"^{prefix}{match}", trained)


@pytest.mark.parametrize(
    ("shape", "hint"), [((20,), r"; use y.reshape\(-1, 1\)"), ((20, 2), ""), ((19, 1), ""), ((1, 20), ""), ((), "")]
)
def test_numbers_of_another_shape(engine, shape, hint):
    layers, loss = [fastbp.Dense(4, 1)], fastbp.MeanSquaredError()
    model = fastbp.Sequential(layers, loss=loss, optimizer=fastbp.SGD(0.1), engine=engine, seed=0)
    before = state_of(model)
    got = str(shape).replace("(", r"\(").replace(")", r"\)")
    for use in (model.fit, model.evaluate, model.gradients):
        with pytest.raises(ValueError, match=rf"y must have the shape of the outputs, \(20, 1\), got {got}{hint}$"):
            use(X, np.zeros(shape))
    assert state_of(model) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_float32_cannot_hold(engine, value):
    layers, loss = [fastbp.Dense(4, 4)], fastbp.MeanSquaredError()
    model = fastbp.Sequential(layers, loss=loss, optimizer=fastbp.SGD(0.1), engine=engine, seed=0)
    before, bad = state_of(model), with_value(X, value)
    for name, use in {"X": lambda: model.fit(bad, X), "y": lambda: model.fit(X, bad)}.items():
        with pytest.raises(ValueError, match=rf"{name} must hold finite float32 numbers, got .* at \(3, 2\)"):
            use()
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, r"epochs must be an integer, got 1\.5"),
        ({"epochs": "3"}, TypeError, "epochs must be an integer, got '3'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": -5}, ValueError, "batch_size must be at least 1, got -5"),
        ({"batch_size": None}, TypeError, "batch_size must be an integer, got None"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer, got True"),
        (
            {"validation_data": X},
            (TypeError, ValueError),
            r"validation_data must be \(X, y\) or .*, got ndarray",
        ),
        ({"validation_data": (X,)}, ValueError, r"validation_data must be \(X, y\) or"),
        ({"validation_data": (X, Y, Y, Y)}, ValueError, r"validation_data must be \(X, y\) or"),
        (
            {"validation_data": 0.2},
            (TypeError, ValueError),
            r"validation_data must be \(X, y\) or .*, got float",
        ),
    ],
)
def test_bad_options_of_fit(engine, options, error, match):
    refused(engine, lambda m: m.fit(X, Y, **options), error, match)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: fastbp.Sequential([]), ValueError, "layers must hold at least one layer"),
        (lambda: fastbp.Sequential([fastbp.ReLU]), TypeError, r"layers\[0\] must be a fastbp Layer, got <class"),
        (lambda: fastbp.Sequential([fastbp.Dense(2, 2), 3]), TypeError, r"layers\[1\] must be a fastbp Layer, got 3"),
        (
            lambda: fastbp.Sequential([fastbp.Dense(2, 3), fastbp.ReLU(), fastbp.Dense(4, 2)]),
            ValueError,
            r"Dense\(inputs=4, neurons=2\) takes 4 features, but the layer before it gives 3",
        ),
        (lambda: fastbp.Sequential([fastbp.ReLU()], loss="mse"), TypeError, "loss must be a fastbp Loss, got 'mse'"),
        (
            lambda: fastbp.Sequential([fastbp.ReLU()], optimizer="adam"),
            TypeError,
            "optimizer must be a fastbp Optimizer, got 'adam'",
        ),
        (lambda: fastbp.Sequential([fastbp.ReLU()], dtype="float16"), ValueError, "dtype must be float32 or float64"),
        (lambda: fastbp.Sequential([fastbp.ReLU()], dtype=int), ValueError, "dtype must be .*64, got int"),
        (lambda: fastbp.Sequential([fastbp.ReLU()], dtype="real"), (TypeError, ValueError), "dtype must be .*real"),
        (lambda: fastbp.Sequential([fastbp.ReLU()], engine="abacus"), ValueError, "engine must be one of .*'abacus'"),
        (lambda: fastbp.Sequential([fastbp.ReLU()], engine=3), ValueError, "engine must be one of .*got 3"),
        (lambda: fastbp.Sequential([fastbp.ReLU()], threads=0), ValueError, "threads must be at least 1, got 0"),
        (lambda: fastbp.Sequential([fastbp.ReLU()], seed=-1), ValueError, "seed must be .*-1"),
        (lambda: fastbp.Sequential([fastbp.ReLU()], seed="one"), (TypeError, ValueError), "seed must be .*'one'"),
        (lambda: fastbp.Dense(2, 2, engine="abacus"), ValueError, "engine must be one of numpy, numba, .*'abacus'"),
        (lambda: fastbp.spiral_data(0, 3), ValueError, "samples must be at least 1, got 0"),
        (lambda: fastbp.spiral_data(10, 2.5), TypeError, r"classes must be an integer, got 2\.5"),
    ],
)
def test_bad_parts(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_refused_stack_takes_nothing():
    layer, optimizer = fastbp.Dense(2, 3), fastbp.Adam()
    with pytest.raises(ValueError, match="takes 4 features"):
        fastbp.Sequential([layer, fastbp.Dense(4, 2)], optimizer=optimizer)
    assert layer.owner is None and optimizer.owner is None and "weights" not in layer.__dict__
    fastbp.Sequential([layer], optimizer=optimizer)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda m: setattr(m, "layers", []), ValueError, "at least one layer"),
        (lambda m: setattr(m, "layers", [*m.layers, fastbp.Dense(9, 1)]), ValueError, "takes 9 features"),
        (lambda m: setattr(m, "layers", None), TypeError, "layers must be .*None"),
        (lambda m: setattr(m, "optimizer", "sgd"), TypeError, "optimizer must be a fastbp Optimizer, got 'sgd'"),
        (lambda m: setattr(m, "loss", "mse"), TypeError, "loss must be a fastbp Loss, got 'mse'"),
        (lambda m: setattr(m.optimizer, "lr", -1), ValueError, "lr must be at least 0.*, got -1"),
        (lambda m: setattr(m.layers[2], "rate", 2), ValueError, "rate must be at least 0 and at most 1, got 2"),
        (lambda m: setattr(m.layers[0], "weights", np.ones(3)), ValueError, r"weights must have shape \(4, 8\)"),
        (lambda m: setattr(m.layers[0], "weights", [[1j] * 8] * 4), ValueError, "weights must hold real numbers"),
    ],
)
def test_bad_changes(engine, change, error, match):
    refused(engine, change, error, match)


def test_what_is_missing_is_named(engine):
    model = fastbp.Sequential([fastbp.Dense(4, 3)], engine=engine)
    for use in (model.fit, model.evaluate, model.gradients):
        with pytest.raises(ValueError, match="this needs a model with loss="):
            use(X, Y)
    with pytest.raises(ValueError, match="this needs a model with loss="):
        model.predict_proba(X)
    model.loss = fastbp.SoftmaxCrossEntropy()
    with pytest.raises(ValueError, match="this needs a model with optimizer="):
        model.fit(X, Y)
    with pytest.raises(ValueError, match="this needs a model with optimizer="):
        model.step()


def test_a_model_goes_on_after_errors(engine):
    model = small_model(engine, dropout=0.2).fit(X, Y, epochs=1)
    untroubled = copy.deepcopy(model)
    for bad, _ in BAD_X.values():
        with pytest.raises(ValueError, match="X"):
            model.fit(bad, Y)
    assert state_of(model.fit(X, Y, epochs=2)) == state_of(untroubled.fit(X, Y, epochs=2))
