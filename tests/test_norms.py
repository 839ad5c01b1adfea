"""Layer and batch normalisation: by torch and by formulas, alone and in models, in training and for prediction."""

import copy
import pickle

import numpy as np
import pytest

import fastbp

from .checks import (
    assert_allclose,
    assert_array_equal,
    assert_same_parameters,
    on_host,
    parameters_of,
    slopes,
    small_data,
    state_of,
)
from .conftest import ENGINES
from .test_training import step_by_step

NORMS = {"LayerNorm": fastbp.LayerNorm, "BatchNorm": fastbp.BatchNorm}
X, Y = small_data(49)  # three batches of 16, and one row

each_norm = pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)


def filled(layer, rng):
    """The layer, with random parameters."""
    for name, shape in layer.shapes().items():
        setattr(layer, name, rng.standard_normal(shape))
    return layer


def model_with(kind, engine="numpy", optimizer=None, **options):
    layers = [
        fastbp.Dense(4, 8),
        kind(8),
        fastbp.ReLU(),
        fastbp.Residual([fastbp.Dense(8, 8), kind(8), fastbp.ReLU()]),
        fastbp.Dense(8, 3),
    ]
    # Adam would make steps of what rounding leaves of a gradient that is 0, that of biases in front of a BatchNorm
    optimizer = optimizer or fastbp.SGD(0.05, momentum=0.9)
    options = {"loss": fastbp.SoftmaxCrossEntropy(), "dtype": np.float64, "seed": 0} | options
    return fastbp.Sequential(layers, optimizer=optimizer, engine=engine, **options)


def running_of(model):
    """Copies on the host."""
    norms = [x for x in model.walk() if isinstance(x, fastbp.BatchNorm)]
    return [tuple(on_host(a).copy() for a in (x.running_mean, x.running_var)) for x in norms]


@each_norm
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [2, 7, 33])
def test_by_torch(engine, kind, training, rows, rng):
    torch = pytest.importorskip("torch")
    layer = filled(kind(5, eps=1e-3, engine=engine), rng)
    theirs = getattr(torch.nn, {"BatchNorm": "BatchNorm1d"}.get(kind.__name__, kind.__name__))(5, 1e-3).double()
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(on_host(layer.weights)[0]))
        theirs.bias.copy_(torch.tensor(on_host(layer.biases)[0]))
    for step in range(4):
        if step == 3:
            layer.training = training  # by running statistics that have moved
            theirs.train(training)
        x, dvalues = 3 * rng.standard_normal((rows, 5)) + 1, rng.standard_normal((rows, 5))
        leaf = torch.tensor(x, requires_grad=True)
        theirs.zero_grad()
        output = theirs(leaf)
        output.backward(torch.tensor(dvalues))
        layer.forward(x)
        layer.backward(dvalues)
        pairs = {
            "output": output.detach(),
            "dinputs": leaf.grad,
            "dweights": theirs.weight.grad[None],
            "dbiases": theirs.bias.grad[None],
        }
        if kind is fastbp.BatchNorm:
            pairs |= {name: getattr(theirs, name) for name in layer.state}
        for name, expected in pairs.items():
            assert_allclose(getattr(layer, name), expected.numpy(), rtol=1e-9, atol=1e-9, err_msg=name)


@each_norm
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_backward_is_the_slope_of_forward(engine, kind, training, rows, rng):
    layer = filled(kind(4, eps=0.1, engine=engine), rng)
    layer.training = training
    if kind is fastbp.BatchNorm:
        layer.running_mean[...], layer.running_var[...] = map(engine.asarray, ([1, -1, 0, 2], [4, 0.1, 1, 2]))
    x, weighting = rng.standard_normal((rows, 4)), rng.standard_normal((rows, 4))

    def weighted_sum():
        return (on_host(layer.forward(x)) * weighting).sum()

    weighted_sum()
    layer.backward(weighting)
    assert_allclose(layer.dinputs, slopes(weighted_sum, x), atol=1e-8)
    for name in layer.parameters():
        assert_allclose(getattr(layer, f"d{name}"), slopes(weighted_sum, getattr(layer, name)), atol=1e-8)


@each_norm
@pytest.mark.parametrize("rows", [300, 7])
def test_a_large_mean_loses_nothing(engine, kind, rows, dtype, rng):
    x = (1e6 if dtype == np.float32 else 1e8) + rng.standard_normal((rows, 300)).astype(dtype)
    assert x.dtype == dtype
    axis = 1 if kind is fastbp.LayerNorm else 0
    exact = x.astype(np.longdouble)
    expected = (exact - exact.mean(axis, keepdims=True)) / np.sqrt(exact.var(axis, keepdims=True) + 1e-5)
    assert_allclose(kind(300, engine=engine).forward(x), expected.astype(np.float64), rtol=1e-6, atol=1e-6)


def test_layer_norm_by_hand(engine):
    layer = fastbp.LayerNorm(4, eps=1e-12, engine=engine)
    layer.weights, layer.biases = [[1, 2, 3, 4]], [[0, 0, 10, 10]]
    assert on_host(layer.forward([[2.0, 4.0, 4.0, 2.0]])).round(6).tolist() == [[-1, 2, 13, 6]]


def test_batch_norm_by_hand(engine):
    layer = fastbp.BatchNorm(1, eps=1e-12, momentum=0.5, engine=engine)
    assert on_host(layer.forward([[2.0], [6.0]])).round(6).tolist() == [[-1], [1]]
    assert layer.running_mean.tolist() == [2] and layer.running_var.tolist() == [4.5]  # (1 + 8) / 2
    layer.training = False
    layer.running_var[...] = 4
    assert on_host(layer.forward([[2.0], [6.0]])).round(6).tolist() == [[0], [2]]
    assert layer.running_mean.tolist() == [2] and layer.running_var.tolist() == [4]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_running_statistics_at_the_ends_of_momentum(engine, momentum, rng):
    layer, x = fastbp.BatchNorm(3, momentum=momentum, engine=engine), rng.standard_normal((5, 3))
    layer.forward(x)
    assert_allclose(layer.running_mean, momentum * x.mean(axis=0))
    assert_allclose(layer.running_var, x.var(axis=0, ddof=1) if momentum else np.ones(3))


def test_a_batch_of_one_row_gives_biases_and_moves_nothing(engine, dtype, rng):
    layer = filled(fastbp.BatchNorm(3, engine=engine), rng)
    x = 1e6 * rng.standard_normal((1, 3)).astype(dtype)
    assert_allclose(layer.forward(x), layer.biases, rtol=1e-6)
    assert not layer.backward(x).any() and not layer.dweights.any()
    assert_array_equal(layer.dbiases, x)
    assert layer.running_mean.tolist() == [0, 0, 0] and layer.running_var.tolist() == [1, 1, 1]


def test_running_statistics_are_float64_whatever_the_batch(engine, dtype):
    layer = fastbp.BatchNorm(2, engine=engine)
    assert layer.forward(np.ones((3, 2), dtype)).dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == np.float64


@each_norm
@pytest.mark.parametrize("batch_size", [7, 16, 1])
def test_replay_is_what_the_layers_compute(engine, kind, batch_size):
    model = model_with(kind, engine)
    expected = step_by_step(model, X, Y, batch_size)
    model.fit(X, Y, epochs=1, batch_size=batch_size, shuffle=False)
    assert_same_parameters(model, expected)
    if kind is fastbp.BatchNorm:
        assert_allclose(running_of(model), running_of(expected), rtol=1e-9)
    assert np.isfinite(model.history["loss"]).all()


@each_norm
def test_engines_agree(kind, dtype):
    models = [model_with(kind, name, dtype=dtype).fit(X, Y, epochs=5) for name in ENGINES]
    rtol = 1e-9 if dtype == np.float64 else 1e-3
    for model in models[1:]:
        assert_same_parameters(model, models[0], rtol)
        assert_allclose(model.predict_proba(X), models[0].predict_proba(X), rtol=rtol, atol=rtol)


@each_norm
def test_models_learn(engine, kind):
    X, y = fastbp.spiral_data(100, 3, noise=0.1, seed=0)
    layers = [fastbp.Dense(2, 64), fastbp.ReLU(), kind(64), fastbp.Dense(64, 64), fastbp.ReLU(), fastbp.Dense(64, 3)]
    model = fastbp.Sequential(
        layers, loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(0.01), engine=engine, seed=0
    )
    assert model.fit(X, y, epochs=100, batch_size=100).evaluate(X, y)["accuracy"] > 0.9


def test_batch_norm_in_front_takes_data_of_any_scale(engine):
    X, y = fastbp.spiral_data(100, 3, noise=0.1, seed=0)
    X = X * [1e-3, 1e3] + [1.0, 1e4]
    layers = [fastbp.BatchNorm(2), fastbp.Dense(2, 64), fastbp.ReLU(), fastbp.Dense(64, 64), fastbp.ReLU()]
    model = fastbp.Sequential(
        [*layers, fastbp.Dense(64, 3)], loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(0.01),
        engine=engine, seed=0,
    )  # fmt: skip
    assert model.fit(X, y, epochs=200, batch_size=100).evaluate(X, y)["accuracy"] > 0.9


def test_prediction_takes_the_running_statistics_and_moves_nothing(engine):
    model = model_with(fastbp.BatchNorm, engine).fit(X, Y, epochs=2)
    before = running_of(model)
    outputs = model.predict_proba(X)
    model.evaluate(X, Y)
    model.gradients(X, Y)
    for then, after in zip(before, running_of(model), strict=True):
        assert_array_equal(then, after)
    assert_allclose(model.predict_proba(X[:1]), outputs[:1], rtol=1e-12)  # whatever else is predicted
    for layer in model.walk():
        layer.training = False
    assert_allclose(model.loss.probabilities(model.forward(X)), outputs, rtol=1e-12)


def test_a_frozen_batch_norm_does_not_change(engine):
    model = model_with(fastbp.BatchNorm, engine).fit(X, Y, epochs=2)
    layer = model.layers[1]
    layer.trainable = False
    before = {name: on_host(layer.__dict__[name]).copy() for name in layer.arrays()}
    expected = step_by_step(model, X, Y, 16)
    model.fit(X, Y, epochs=1, batch_size=16, shuffle=False)
    assert_same_parameters(model, expected)
    for name, then in before.items():
        assert_array_equal(layer.__dict__[name], then)
    assert (running_of(model)[1][0] != running_of(expected)[0][0]).any()
    layer.trainable = True
    model.fit(X, Y, epochs=1)
    assert (running_of(model)[0][0] != before["running_mean"]).all()
    assert (on_host(layer.weights) != before["weights"]).any()


@each_norm
def test_weight_decay_leaves_norms_alone(kind):
    models = [
        model_with(kind, optimizer=fastbp.AdamW(0.01, weight_decay=decay)).fit(X, Y, epochs=1, batch_size=49)
        for decay in (0.0, 0.5)
    ]
    plain, decayed = map(parameters_of, models)
    for name in ("1.weights", "1.biases"):
        assert_array_equal(plain[name], decayed[name])
    assert (plain["0.weights"] != decayed["0.weights"]).all()


def test_accumulated_batches_of_layer_norm_are_one_large_batch(engine):
    model, large = (model_with(fastbp.LayerNorm, engine) for _ in range(2))
    model.fit(X, Y, epochs=2, batch_size=8, accumulate=3, shuffle=False)
    large.fit(X, Y, epochs=2, batch_size=24, shuffle=False)
    assert_same_parameters(model, large)


def test_accumulated_batches_of_batch_norm_are_normalised_each_by_itself(engine):
    model = model_with(fastbp.BatchNorm, engine, fastbp.SGD(0.5))
    parts = [slice(0, 16), slice(16, 32)]
    found = [model.gradients(X[part], Y[part]).layers[0]["weights"] for part in parts]
    expected = on_host(model.layers[0].weights) - 0.5 * (found[0] + found[1]) / 2
    each = copy.deepcopy(model)
    for part in parts:
        each.forward(X[part])
    model.fit(X[:32], Y[:32], epochs=1, batch_size=16, accumulate=2, shuffle=False)
    assert_allclose(model.layers[0].weights, expected, rtol=1e-9)
    assert_allclose(running_of(model), running_of(each), rtol=1e-9)


@each_norm
def test_copied_pickled_and_saved_models_go_on_bit_for_bit(engine, kind, dtype, tmp_path):
    pytest.importorskip("safetensors")
    model = model_with(kind, engine, dtype=dtype).fit(X, Y, epochs=2)
    model.save(tmp_path / "model")
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fastbp.load(tmp_path / "model", engine=engine)]
    probabilities = model.predict_proba(X)
    for other in others:
        assert repr(other) == repr(model)
        assert_array_equal(other.predict_proba(X), probabilities)
    model.fit(X, Y, epochs=2)
    for other in others:
        other.fit(X, Y, epochs=2)
        assert state_of(other) == state_of(model)
        assert_array_equal(running_of(other), running_of(model))


def test_settings_may_change_between_fits(engine):
    model = model_with(fastbp.BatchNorm, engine).fit(X, Y, epochs=1)
    before = running_of(model)[0][0]
    for layer in model.walk():
        if isinstance(layer, fastbp.BatchNorm):
            layer.momentum = 0.0
    model.fit(X, Y, epochs=1)
    assert_array_equal(running_of(model)[0][0], before)


@each_norm
@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"features": 0}, ValueError, "features must be at least 1, got 0"),
        ({"features": 2.0}, TypeError, r"features must be an integer, got 2\.0"),
        ({"eps": 0}, ValueError, "eps must be above 0 and finite, got 0"),
        ({"eps": np.nan}, ValueError, "eps must be above 0 and finite, got nan"),
        ({"eps": "small"}, TypeError, "eps must be a number, got 'small'"),
    ],
)
def test_bad_settings(kind, arguments, error, match):
    with pytest.raises(error, match=match):
        kind(**({"features": 3} | arguments))
    layer = kind(3)
    if "features" not in arguments:
        with pytest.raises(error, match=match):
            layer.eps = arguments["eps"]
    assert repr(layer) == f"{kind.__name__}(features=3)" and layer.eps == 1e-5


@pytest.mark.parametrize("momentum", [-0.1, 1.1, np.inf, None])
def test_bad_momentum(momentum):
    expected = "a number" if momentum is None else "at least 0 and at most 1"
    with pytest.raises((TypeError, ValueError), match=f"momentum must be {expected}, got {momentum}"):
        fastbp.BatchNorm(3, momentum=momentum)
    layer = fastbp.BatchNorm(3, momentum=0.3)
    with pytest.raises((TypeError, ValueError), match="momentum must be"):
        layer.momentum = momentum
    assert layer.momentum == 0.3


@each_norm
def test_features_must_fit(kind, rng):
    with pytest.raises(ValueError, match=r"Norm\(features=5\) takes 5 features, but the layer before it gives 4"):
        fastbp.Sequential([fastbp.Dense(3, 4), kind(5)])
    with pytest.raises(ValueError, match=r"Norm\(features=5\): x must have shape \(batch, 5\), got \(2, 4\)"):
        kind(5).forward(rng.standard_normal((2, 4)))
