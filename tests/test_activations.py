"""Activations on their own and in models: against torch, slopes, and values worked out by hand."""

import numpy as np
import pytest

import fastbp

from .checks import (
    assert_allclose,
    assert_array_equal,
    assert_close,
    assert_same_parameters,
    on_host,
    slopes,
    small_data,
)

ACTIVATIONS = {
    "Identity": fastbp.Identity,
    "ReLU": fastbp.ReLU,
    "LeakyReLU": fastbp.LeakyReLU,
    "LeakyReLU steep": lambda **options: fastbp.LeakyReLU(0.3, **options),
    "LeakyReLU flat": lambda **options: fastbp.LeakyReLU(0.0, **options),
    "ELU": fastbp.ELU,
    "ELU deep": lambda **options: fastbp.ELU(1.7, **options),
    "GELU": fastbp.GELU,
    "GELU tanh": lambda **options: fastbp.GELU("tanh", **options),
    "SiLU": fastbp.SiLU,
    "Tanh": fastbp.Tanh,
    "Sigmoid": fastbp.Sigmoid,
    "Softplus": fastbp.Softplus,
    "Softplus sharp": lambda **options: fastbp.Softplus(3.0, 2.0, **options),
}
each_activation = pytest.mark.parametrize("name", ACTIVATIONS)

NUMBERS = np.concatenate([[0.0, 1e-30, -1e-30, 1e-6, -1e-6], np.linspace(-30, 30, 601), [-700, -90, 90, 700]])


def torch_activation(name):
    from torch import nn

    return {
        "Identity": nn.Identity(),
        "ReLU": nn.ReLU(),
        "LeakyReLU": nn.LeakyReLU(),
        "LeakyReLU steep": nn.LeakyReLU(0.3),
        "LeakyReLU flat": nn.LeakyReLU(0.0),
        "ELU": nn.ELU(),
        "ELU deep": nn.ELU(1.7),
        "GELU": nn.GELU(),
        "GELU tanh": nn.GELU("tanh"),
        "SiLU": nn.SiLU(),
        "Tanh": nn.Tanh(),
        "Sigmoid": nn.Sigmoid(),
        "Softplus": nn.Softplus(),
        "Softplus sharp": nn.Softplus(3.0, 2.0),
    }[name]


@each_activation
def test_against_torch(engine, name, dtype):
    torch = pytest.importorskip("torch")
    x = np.tile(NUMBERS.astype(dtype), (2, 1))
    dvalues = np.stack([np.ones(NUMBERS.size), np.linspace(-2, 2, NUMBERS.size)]).astype(dtype)
    leaf = torch.tensor(x.astype(np.float64), requires_grad=True)
    expected = torch_activation(name)(leaf)
    expected.backward(torch.tensor(dvalues.astype(np.float64)))
    layer = ACTIVATIONS[name](engine=engine)
    tolerance = {"rtol": 1e-10, "atol": 1e-14} if dtype == np.float64 else {"rtol": 1e-5, "atol": 3e-7}
    output = layer.forward(x)
    assert output.dtype == dtype
    assert_allclose(output, expected.detach().numpy(), **tolerance)
    assert_allclose(layer.backward(dvalues), leaf.grad.numpy(), **tolerance)


@each_activation
def test_backward_is_the_slope_of_forward(engine, name, rng):
    layer = ACTIVATIONS[name](engine=engine)
    x, dvalues = rng.uniform(-4, 4, (3, 5)), rng.standard_normal((3, 5))
    layer.forward(x)
    gradient = layer.backward(dvalues)
    assert_allclose(gradient, slopes(lambda: (on_host(layer.forward(x)) * dvalues).sum(), x), atol=1e-8)


@pytest.mark.parametrize(
    ("layer", "x", "output", "slope"),
    [
        (fastbp.Identity, [-2, 3], [-2, 3], [1, 1]),
        (fastbp.LeakyReLU, [-2, 0, 3], [-0.02, 0, 3], [0.01, 0.01, 1]),
        (fastbp.ELU, [-np.log(4), 0, 3], [-0.75, 0, 3], [0.25, 1, 1]),
        (fastbp.SiLU, [0, np.log(3)], [0, 0.75 * np.log(3)], [0.5, 0.75 + np.log(3) * 3 / 16]),
        (fastbp.Tanh, [-np.log(2), 0], [-0.6, 0], [0.64, 1]),
        (fastbp.Sigmoid, [-np.log(4), 0], [0.2, 0.5], [0.16, 0.25]),
        (fastbp.Softplus, [0, 25], [np.log(2), 25], [0.5, 1]),
        (fastbp.GELU, [0, 10], [0, 10], [0.5, 1]),
    ],
)
def test_by_hand(engine, layer, x, output, slope):
    layer = layer(engine=engine)
    assert_allclose(layer.forward([x]), [output], rtol=1e-14, atol=1e-300)
    assert_allclose(layer.backward(np.ones((1, len(x)))), [slope], rtol=1e-14)


@each_activation
def test_nan_comes_through(engine, name, dtype):
    layer = ACTIVATIONS[name](engine=engine)
    output = layer.forward(np.array([[np.nan, 1.0]], dtype))
    assert np.isnan(output[0, 0]) and np.isfinite(output[0, 1])


@each_activation
def test_a_model_trains_alike_on_each_engine(engine, name, dtype, tmp_path):
    X, y = small_data(40, dtype)
    models = [
        fastbp.Sequential(
            [fastbp.Dense(4, 9), ACTIVATIONS[name](), fastbp.Dense(9, 3), ACTIVATIONS[name]()],
            loss=fastbp.SoftmaxCrossEntropy(),
            optimizer=fastbp.SGD(0.05, momentum=0.9),
            engine=which,
            dtype=dtype,
            seed=0,
        )
        for which in (engine, "numpy")
    ]
    for model in models:
        model.fit(X, y, epochs=5, batch_size=16)
    assert_same_parameters(*models, rtol=1e-9 if dtype == np.float64 else 2e-3)
    assert models[0].history["loss"][-1] < models[0].history["loss"][0]
    models[0].save(tmp_path / "model")
    loaded = fastbp.load(tmp_path / "model", engine=engine)
    assert repr(loaded.layers[1]) == repr(models[0].layers[1])
    assert_array_equal(loaded.predict_proba(X), models[0].predict_proba(X))


@each_activation
def test_a_replayed_step_is_the_eager_one(engine, name):
    X, y = small_data(12)
    model = fastbp.Sequential(
        [fastbp.Dense(4, 6), ACTIVATIONS[name](), fastbp.Dense(6, 3)],
        loss=fastbp.SoftmaxCrossEntropy(),
        optimizer=fastbp.SGD(0.1),
        engine=engine,
        dtype=np.float64,
        seed=0,
    )
    gradients = model.gradients(X, y).layers
    expected = [
        {n: on_host(getattr(layer, n)) - 0.1 * g[n] for n in g}
        for layer, g in zip(model.layers, gradients, strict=True)
    ]
    model.train_on_batch(X, y)
    for layer, parameters in zip(model.layers, expected, strict=True):
        for n, value in parameters.items():
            assert_close(getattr(layer, n), value, 1e-13)


def test_a_setting_changed_after_a_recording_takes_effect(engine):
    X, y = small_data(12)
    models = [
        fastbp.Sequential(
            [fastbp.Dense(4, 6), fastbp.LeakyReLU(slope), fastbp.Dense(6, 3)],
            loss=fastbp.SoftmaxCrossEntropy(),
            optimizer=fastbp.SGD(0.1),
            engine=engine,
            seed=0,
        )
        for slope in (0.5, 0.1)
    ]
    before = models[0].predict_proba(X)
    models[0].layers[1].negative_slope = 0.1
    assert (models[0].predict_proba(X) != before).any()
    for model in models:
        model.train_on_batch(X, y)
    assert_array_equal(models[0].predict_proba(X), models[1].predict_proba(X))


@pytest.mark.parametrize(
    ("layer", "gain"), [(fastbp.SiLU, 2), (fastbp.ReLU, 2), (fastbp.Tanh, 1), (fastbp.Identity, 1)]
)
def test_weights_are_drawn_larger_in_front_of_what_rectifies(layer, gain):
    model = fastbp.Sequential([fastbp.Dense(400, 400), layer(), fastbp.Dense(400, 3)], seed=0)
    assert model.layers[0].weights.var() == pytest.approx(gain / 400, rel=0.05)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: fastbp.LeakyReLU(-0.1), r"negative_slope must be at least 0 and finite, got -0\.1"),
        (lambda: fastbp.ELU(np.inf), "alpha must be at least 0 and finite, got inf"),
        (lambda: fastbp.ELU("deep"), "alpha must be a number, got 'deep'"),
        (lambda: fastbp.GELU("erf"), "approximate must be 'none' or 'tanh', got 'erf'"),
        (lambda: fastbp.Softplus(0), "beta must be above 0 and finite, got 0"),
        (lambda: fastbp.Softplus(1, np.nan), "threshold must be"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()


def test_a_bad_setting_changes_nothing():
    layer = fastbp.LeakyReLU(0.2)
    with pytest.raises(ValueError, match="negative_slope"):
        layer.negative_slope = -1
    assert layer.negative_slope == 0.2 and repr(layer) == "LeakyReLU(negative_slope=0.2)"


@pytest.mark.parametrize(
    ("name", "op"), [("Tanh", "tanh"), ("Sigmoid", "sigmoid"), ("LeakyReLU", "leaky_relu"), ("ELU", "elu")]
)
def test_what_lies_in_front_of_an_activation_is_fused_with_its_slope(name, op):
    numba = pytest.importorskip("numba") and fastbp.engine("numba")
    X, y = small_data(12)
    model = fastbp.Sequential(
        [fastbp.Dense(4, 6), ACTIVATIONS[name](), fastbp.Dense(6, 3)],
        loss=fastbp.SoftmaxCrossEntropy(),
        optimizer=fastbp.SGD(0.1),
        engine=numba,
    )
    model.train_on_batch(X, y)
    (tape,) = model._tapes.values()
    fused = [call.op.name for call in tape.calls]
    assert f"dense_{op}_grads" in fused and not {f"{op}_backward", "dense_bias_grad"} & set(fused)
