"""Whatever the network: gradients are slopes, and one step of `fit` is a step along them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbp

from .checks import Bottleneck, assert_same_parameters, parameters_of, slopes
from .conftest import ENGINES

LR = 1 / 64
modest = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def problems(draw, *dtypes):
    """A model and a batch for it."""
    loss = draw(st.sampled_from([fastbp.SoftmaxCrossEntropy, fastbp.CategoricalCrossEntropy, fastbp.MeanSquaredError]))
    features, outputs, rows = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    layers, width = [], features
    for kind in draw(st.lists(st.sampled_from(["Dense", "ReLU", "Softmax", "Dropout", "Bottleneck"]), max_size=5)):
        if kind == "Dense":
            neurons = draw(st.integers(1, 6))
            layers.append(fastbp.Dense(width, neurons))
            width = neurons
        elif kind == "Dropout":
            layers.append(fastbp.Dropout(draw(st.floats(0, 0.9))))
        elif kind == "Bottleneck":
            layers.append(Bottleneck(width, draw(st.integers(1, 3))))
        else:
            layers.append(getattr(fastbp, kind)())
    layers.append(fastbp.Dense(width, outputs))
    if loss is fastbp.CategoricalCrossEntropy:
        layers.append(fastbp.Softmax())
    choices = {"engine": draw(st.sampled_from(ENGINES)), "dtype": draw(st.sampled_from(dtypes))}
    seed = draw(st.integers(0, 2**32))
    model = fastbp.Sequential(layers, loss=loss(), optimizer=fastbp.SGD(LR), seed=seed, **choices)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    for layer in layers:  # biases too, because sums of exactly 0 lie on the edge of a ReLU
        for name, shape in layer.shapes().items():
            setattr(layer, name, rng.normal(0, 0.5, shape))
    X, labels = rng.standard_normal((rows, features)), rng.integers(0, outputs, rows)
    if not loss.classifies:
        return model, X, rng.standard_normal((rows, outputs))
    return model, X, draw(st.sampled_from([labels, np.eye(outputs)[labels], labels.astype(np.uint8)]))


@given(problems("float64"))
@modest
def test_gradients_are_slopes(problem):
    model, X, y = problem
    found = model.gradients(X, y)

    def loss():
        return model.gradients(X, y).loss

    close = {"atol": 1e-6, "rtol": 1e-6}
    np.testing.assert_allclose(found.inputs, slopes(loss, X), **close)
    for layer, gradients in zip(model.layers, found.layers, strict=True):
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, slopes(loss, getattr(layer, name)), **close)


@given(problems("float32", "float64"))
@modest
def test_a_step_of_fit_follows_the_gradients(problem):
    model, X, y = problem
    found, before = model.gradients(X, y), parameters_of(model)
    expected = {
        f"{place}.{name}": before[f"{place}.{name}"] - LR * gradient
        for place, gradients in enumerate(found.layers)
        for name, gradient in gradients.items()
    }
    model.fit(X, y, epochs=1, batch_size=len(X), shuffle=False)
    rtol = 1e-4 if model.dtype == np.float32 else 1e-10
    assert_same_parameters(model, expected, rtol)
    np.testing.assert_allclose(model.history["loss"], [found.loss], rtol=rtol)


@given(problems("float32", "float64"), st.integers(1, 10))
@modest
def test_a_fit_in_batches_is_steps_by_hand(problem, batch):
    model, X, y = problem
    state = {(i, name): layer.__dict__[name].copy() for i, layer in enumerate(model.layers) for name in layer.state}
    start = parameters_of(model)
    model.fit(X, y, epochs=2, batch_size=batch, shuffle=False)
    fitted = parameters_of(model)
    for key, value in start.items():
        place, name = key.split(".")
        setattr(model.layers[int(place)], name, value)
    for (place, name), value in state.items():
        getattr(model.layers[place], name)[...] = value
    loss = type(model.loss)(engine=model.engine)
    for _ in range(2):
        for first in range(0, len(X), batch):
            rows = slice(first, first + batch)
            loss.forward(model.forward(X[rows]), y[rows])
            model.backward(loss.backward())
            model.step()
    assert_same_parameters(model, fitted, 1e-3 if model.dtype == np.float32 else 1e-9)
