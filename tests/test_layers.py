"""Layers on their own: what they compute, store and refuse."""

import copy

import numpy as np
import pytest

import fastbp

from .checks import assert_allclose, assert_array_equal, on_host, slopes
from .notebook_reference import ActivationSoftmax

LAYERS = {
    "Dense": lambda **options: fastbp.Dense(5, 4, **options),
    "ReLU": fastbp.ReLU,
    "Softmax": fastbp.Softmax,
    "Dropout": lambda **options: fastbp.Dropout(0.3, seed=7, **options),
    "LayerNorm": lambda **options: fastbp.LayerNorm(5, **options),
    "BatchNorm": lambda **options: fastbp.BatchNorm(5, **options),
}
WIDTH = {"Dense": 4}

each_layer = pytest.mark.parametrize("name", LAYERS)


@each_layer
@pytest.mark.parametrize("rows", [1, 7])
def test_backward_is_the_slope_of_forward(engine, name, rows, rng):
    layer = LAYERS[name](engine=engine)
    x, weighting = rng.standard_normal((rows, 5)), rng.standard_normal((rows, WIDTH.get(name, 5)))
    key = layer.key.copy() if name == "Dropout" else None

    def weighted_sum():
        if key is not None:
            layer.key[...] = key  # the same mask each time
        return (on_host(layer.forward(x)) * weighting).sum()

    weighted_sum()
    layer.backward(weighting)
    assert_allclose(layer.dinputs, slopes(weighted_sum, x), atol=1e-8)
    for parameter in layer.parameters():
        expected = slopes(weighted_sum, getattr(layer, parameter))
        assert_allclose(getattr(layer, f"d{parameter}"), expected, atol=1e-8)


@each_layer
def test_forward_and_backward_return_what_they_store(engine, name, rng):
    layer, x = LAYERS[name](engine=engine), rng.standard_normal((3, 5))
    assert layer.forward(x) is layer.output
    assert layer.backward(np.ones(layer.output.shape)) is layer.dinputs
    assert_array_equal(layer.inputs, x)
    assert layer.dinputs.shape == x.shape
    for parameter in layer.parameters():
        assert getattr(layer, f"d{parameter}").shape == getattr(layer, parameter).shape


@each_layer
def test_a_layer_alone_computes_in_the_dtype_of_x(engine, name, dtype, rng):
    layer = LAYERS[name](engine=engine)
    layer.forward(rng.standard_normal((3, 5)).astype(dtype))
    layer.backward(np.ones(layer.output.shape, dtype))
    arrays = [layer.inputs, layer.output, layer.dinputs, *(getattr(layer, f"d{p}") for p in layer.parameters())]
    assert {array.dtype for array in arrays} == {dtype}


@each_layer
def test_attributes_that_are_not_there_yet_say_what_to_call(engine, name):
    layer = LAYERS[name](engine=engine)
    for attribute in ["inputs", "output"]:
        with pytest.raises(AttributeError, match=rf"{name}\(.*has no {attribute}: call forward\(x\)"):
            getattr(layer, attribute)
    for attribute in ["dinputs", *(f"d{p}" for p in layer.parameters())]:
        with pytest.raises(AttributeError, match=rf"{name}\(.*has no {attribute}: call backward\(dvalues\)"):
            getattr(layer, attribute)
    with pytest.raises(AttributeError, match=f"'{name}' object has no attribute 'colour'"):
        layer.colour  # noqa: B018


@each_layer
def test_backward_before_forward_says_what_to_call(engine, name):
    with pytest.raises(AttributeError, match=r"call forward\(x\)"):
        LAYERS[name](engine=engine).backward(np.ones((2, WIDTH.get(name, 5))))


def test_jacobian_before_forward_says_what_to_call(engine):
    with pytest.raises(AttributeError, match=r"call forward\(x\)"):
        fastbp.Softmax(engine=engine).jacobian()


@each_layer
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5), (3, 0)])
def test_wrong_shapes_of_x_are_refused(engine, name, shape):
    with pytest.raises(ValueError, match=rf"{name}\(.*x must have shape \(batch, .*got \({shape[0]},"):
        LAYERS[name](engine=engine).forward(np.ones(shape))


@each_layer
def test_wrong_shapes_of_dvalues_are_refused(engine, name):
    layer = LAYERS[name](engine=engine)
    layer.forward(np.ones((3, 5)))
    with pytest.raises(ValueError, match=rf"{name}\(.*dvalues must have shape \(.*got \(3, 9\)"):
        layer.backward(np.ones((3, 9)))
    with pytest.raises(ValueError, match=rf"{name}\(.*dvalues must have shape \(.*got \(2, "):
        layer.backward(np.ones((2, WIDTH.get(name, 5))))


def test_dense_refuses_another_number_of_features(engine):
    with pytest.raises(ValueError, match=r"Dense\(inputs=5, neurons=4\): x must have shape \(batch, 5\), got \(3, 6\)"):
        fastbp.Dense(5, 4, engine=engine).forward(np.ones((3, 6)))


@each_layer
@pytest.mark.parametrize(
    "x", [[[1j] * 5], [["a"] * 5], np.ma.masked_array([[1.0] * 5])], ids=["complex", "str", "mask"]
)
def test_what_is_no_real_number_is_refused(engine, name, x):
    with pytest.raises((TypeError, ValueError), match=r"real numbers|masked"):
        LAYERS[name](engine=engine).forward(x)


@each_layer
def test_lists_are_taken_and_float64(engine, name):
    assert LAYERS[name](engine=engine).forward([[1, 2, 3, 4, 5]]).dtype == np.float64


def test_dense_by_hand(engine):
    layer = fastbp.Dense(2, 2, engine=engine)
    layer.weights, layer.biases = [[1, 2], [3, 4]], [[10, 20]]
    assert layer.forward([[1, 1], [0, 2]]).tolist() == [[14, 26], [16, 28]]
    assert layer.backward([[1, 0], [0, 1]]).tolist() == [[1, 3], [2, 4]]
    assert layer.dweights.tolist() == [[1, 0], [1, 2]]
    assert layer.dbiases.tolist() == [[1, 1]]


def test_softmax_jacobian_is_the_loop(engine, rng):
    softmax, loop = fastbp.Softmax(engine=engine), ActivationSoftmax()
    x, dvalues = rng.standard_normal((6, 4)), rng.standard_normal((6, 4))
    softmax.forward(x), loop.forward(x)
    softmax.backward(dvalues), loop.backward(dvalues)
    assert_allclose(softmax.jacobian(), loop.jacobian(), atol=1e-15)
    assert_allclose(softmax.dinputs, loop.dinputs, atol=1e-15)


def test_assigned_weights_are_adopted_with_their_dtype(engine, dtype):
    layer = fastbp.Dense(3, 2, engine=engine)
    given = np.ones((3, 2), dtype)
    layer.weights = given
    assert layer.weights.dtype == dtype
    layer.weights -= 0.5
    assert (layer.weights == 0.5).all() and layer.weights.dtype == dtype


@pytest.mark.parametrize("value", [np.ones((2, 3)), np.ones(3), 1.0, [[1, 2]]])
def test_weights_of_another_shape_are_refused(engine, value):
    layer = fastbp.Dense(3, 2, engine=engine)
    before = layer.weights.copy()
    with pytest.raises(ValueError, match=r"Dense\(.*: weights must have shape \(3, 2\), got"):
        layer.weights = value
    assert_array_equal(layer.weights, before)
    with pytest.raises(ValueError, match=r"biases must have shape \(1, 2\), got \(2,\)"):
        layer.biases = [0, 0]


def test_weights_must_be_finite(engine):
    layer = fastbp.Dense(2, 2, engine=engine)
    model = fastbp.Sequential([layer], engine=engine, seed=0)
    before = layer.weights.copy()
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"weights must hold finite .*numbers, got {bad} at \(0, 1\)"):
            layer.weights = [[1, bad], [0, 1]]
        with pytest.raises(ValueError, match="biases must hold finite"):
            fastbp.Dense(2, 2).biases = [[1, bad]]
    assert_array_equal(model.layers[0].weights, before)


def test_weights_in_a_model_are_copied_into_it(engine):
    layer = fastbp.Dense(3, 2)
    model = fastbp.Sequential([layer], engine=engine, dtype=np.float32)
    given = np.arange(6.0).reshape(3, 2)
    layer.weights = given
    assert layer.weights.dtype == np.float32 and layer.weights.flags.c_contiguous
    given[...] = 0
    assert layer.weights.tolist() == [[0, 1], [2, 3], [4, 5]]
    model.memory.parameters[...] = 7
    assert (layer.weights == 7).all()


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8, int])
def test_sizes_may_be_numpy_integers(engine, kind):
    layer = fastbp.Dense(kind(3), kind(2), engine=engine)
    assert layer.weights.shape == (3, 2) and layer.biases.shape == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((0, 2), ValueError, "inputs must be at least 1, got 0"),
        ((2, -1), ValueError, "neurons must be at least 1, got -1"),
        ((2.0, 2), TypeError, r"inputs must be an integer, got 2\.0"),
        ((2, "3"), TypeError, "neurons must be an integer, got '3'"),
        ((True, 2), TypeError, "inputs must be an integer, got True"),
        ((2, None), TypeError, "neurons must be an integer, got None"),
    ],
)
def test_bad_sizes(arguments, error, match):
    with pytest.raises(error, match=match):
        fastbp.Dense(*arguments)


def test_bad_rate():
    for rate in [-0.1, 1.1, np.nan]:
        with pytest.raises(ValueError, match=f"rate must be at least 0 and at most 1, got {rate}"):
            fastbp.Dropout(rate)
    for rate in ["half", None, True]:
        with pytest.raises(TypeError, match=f"rate must be a number, got {rate!r}"):
            fastbp.Dropout(rate)


def test_dropout_alone(engine, dtype):
    x = np.ones((50, 40), dtype)
    layer, again = (fastbp.Dropout(0.25, seed=3, engine=engine) for _ in range(2))
    assert_array_equal(layer.forward(x), again.forward(x))
    assert_allclose(np.unique(on_host(layer.output)), [0, 4 / 3], rtol=1e-6)
    assert_array_equal(layer.backward(x), layer.output)
    first = layer.output
    assert (layer.forward(x) != first).any()


def test_dropout_not_training_passes_everything(engine, rng):
    layer, x = fastbp.Dropout(0.5, engine=engine), rng.standard_normal((4, 3))
    layer.training = False
    assert_array_equal(layer.forward(x), x)
    assert_array_equal(layer.backward(x), x)


@each_layer
def test_a_deep_copy_is_independent(engine, name, rng):
    layer, x = LAYERS[name](engine=engine), rng.standard_normal((3, 5))
    if name == "Dense":
        layer.weights = rng.standard_normal((5, 4))
    twin = copy.deepcopy(layer)
    assert_array_equal(layer.forward(x), twin.forward(x))
    for parameter in layer.parameters():
        getattr(twin, parameter)[...] = 0
        assert parameter == "biases" or getattr(layer, parameter).any()


@each_layer
def test_repr_makes_the_layer_again(name):
    layer = LAYERS[name]()
    again = eval(repr(layer), vars(fastbp))
    assert repr(again) == repr(layer) and type(again) is type(layer)
