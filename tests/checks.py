"""Helpers of the tests: finite differences, comparisons, a model to look at, and the whole state of a model."""

import numpy as np

import fastbp


def slopes(function, x, step=1e-6):
    """The gradient of a number by `x`, by central differences; `function` sees `x` change in place."""
    gradient = np.empty(x.shape)
    for place in np.ndindex(x.shape):
        kept = x[place]
        x[place] = kept + step
        above = function()
        x[place] = kept - step
        gradient[place] = (above - function()) / (2 * step)
        x[place] = kept
    return gradient


def assert_close(actual, expected, rtol):
    """Compare relative to the largest element; what is not finite must stand in the same places."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(actual), finite)
    largest = np.abs(expected[finite]).max(initial=0.01)
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=rtol, atol=rtol * largest)


def small_model(engine="numpy", *, dropout=0.0, optimizer=None, dtype=np.float64, seed=0, **options):
    """4 features, 3 classes."""
    layers = [fastbp.Dense(4, 8), fastbp.ReLU(), *([fastbp.Dropout(dropout)] if dropout else []), fastbp.Dense(8, 3)]
    optimizer = optimizer or fastbp.Adam(0.01)
    options = {"loss": fastbp.SoftmaxCrossEntropy()} | options
    return fastbp.Sequential(layers, optimizer=optimizer, engine=engine, dtype=dtype, seed=seed, **options)


def small_data(rows=50, dtype=np.float64):
    rng = np.random.default_rng(1)
    return rng.standard_normal((rows, 4)).astype(dtype), rng.integers(0, 3, rows)


def state_of(model):
    """All that a further call of `fit` depends on, to compare bit for bit."""
    arrays = {
        f"{place}.{name}": layer.__dict__[name] for place, layer in enumerate(model.layers) for name in layer.arrays()
    }
    arrays |= {name: getattr(model.optimizer, name) for name in model.optimizer.state}
    return {name: array.tobytes() for name, array in arrays.items()} | {
        "history": {name: list(values) for name, values in model.history.items()},
        "random": model.random_state(),
    }


def parameters_of(model):
    return {f"{i}.{name}": getattr(x, name).copy() for i, x in enumerate(model.layers) for name in x.parameters()}


def assert_same_parameters(a, b, rtol=1e-9):
    a, b = (x if isinstance(x, dict) else parameters_of(x) for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=rtol, err_msg=name)
