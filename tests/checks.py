"""Helpers of the tests: finite differences, comparisons, a model to look at, and the whole state of a model."""

import numpy as np

import fastbp


def on_host(x):
    """NumPy's array of one that an engine may keep elsewhere."""
    return x.get() if hasattr(x, "__cuda_array_interface__") else x


def assert_allclose(actual, expected, **options):
    np.testing.assert_allclose(on_host(actual), on_host(expected), **options)


def assert_array_equal(actual, expected, **options):
    np.testing.assert_array_equal(on_host(actual), on_host(expected), **options)


def slopes(function, x, step=1e-6):
    """The gradient of a number by `x`, by central differences; `function` sees `x` change in place."""
    gradient = np.empty(x.shape)
    for place in np.ndindex(x.shape):
        kept = float(x[place])
        x[place] = kept + step
        above = function()
        x[place] = kept - step
        gradient[place] = (above - function()) / (2 * step)
        x[place] = kept
    return gradient


def assert_close(actual, expected, rtol):
    """Compare relative to the largest element; what is not finite must stand in the same places."""
    actual, expected = on_host(actual), on_host(expected)
    finite = np.isfinite(expected)
    assert_array_equal(np.isfinite(actual), finite)
    largest = np.abs(expected[finite]).max(initial=0.01)
    assert_allclose(actual[finite], expected[finite], rtol=rtol, atol=rtol * largest)


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
    return {name: on_host(array).tobytes() for name, array in arrays.items()} | {
        "history": {name: list(values) for name, values in model.history.items()},
        "random": model.random_state(),
    }


def parameters_of(model):
    return {
        f"{i}.{name}": model.engine.asnumpy(getattr(x, name)).copy()
        for i, x in enumerate(model.layers)
        for name in x.parameters()
    }


def assert_same_parameters(a, b, rtol=1e-9):
    a, b = (x if isinstance(x, dict) else parameters_of(x) for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert_allclose(a[name], b[name], rtol=rtol, atol=rtol, err_msg=name)


class Bottleneck(fastbp.Layer):
    """A layer of one's own, with parameters under names of its own: x @ down + down_shift, then @ up + up_shift."""

    down, up = fastbp.Parameter(), fastbp.Parameter()
    down_shift, up_shift = fastbp.Parameter(decay=False), fastbp.Parameter(decay=False)

    def __init__(self, size, narrow, *, engine=None):
        super().__init__(engine=engine)
        self.features = self.size = size
        self.narrow = narrow

    def config(self):
        return {"size": self.size, "narrow": self.narrow}

    def shapes(self):
        return {
            "down": (self.size, self.narrow),
            "up": (self.narrow, self.size),
            "down_shift": (1, self.narrow),
            "up_shift": (1, self.size),
        }

    def draw(self, rng, *, before_relu=True):
        for name, shape in self.shapes().items():
            if name not in self.__dict__:
                setattr(self, name, rng.normal(0, 0.5, shape))

    def forward(self, x):
        self.inputs = self.read(x, self.size)
        self.hidden = self.engine.dense_forward(self.inputs, self.down, self.down_shift)
        self.output = self.engine.dense_forward(self.hidden, self.up, self.up_shift)
        return self.output

    def backward(self, dvalues):
        self.dup = self.engine.dense_weight_grad(self.hidden, dvalues)
        self.dup_shift = self.engine.dense_bias_grad(dvalues)
        dhidden = self.engine.dense_input_grad(dvalues, self.up)
        self.ddown = self.engine.dense_weight_grad(self.inputs, dhidden)
        self.ddown_shift = self.engine.dense_bias_grad(dhidden)
        self.dinputs = self.engine.dense_input_grad(dhidden, self.down)
        return self.dinputs
