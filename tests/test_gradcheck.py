"""`fastbp.gradcheck`: what fastbp exports passes, and faults in a user's own layer or loss are found."""

import inspect

import numpy as np
import pytest

import fastbp

from .checks import Bottleneck, assert_array_equal, small_model

# how to make each exported layer and loss; a new one needs a line here
LAYERS = {
    "BatchNorm": lambda **options: fastbp.BatchNorm(4, **options),
    "Dense": lambda **options: fastbp.Dense(4, 3, **options),
    "Dropout": lambda **options: fastbp.Dropout(0.4, seed=0, **options),
    "ELU": fastbp.ELU,
    "Embedding": lambda **options: fastbp.Embedding(4, [0, 2], 3, 2, **options),
    "GELU": fastbp.GELU,
    "Identity": fastbp.Identity,
    "LayerNorm": lambda **options: fastbp.LayerNorm(4, **options),
    "LeakyReLU": fastbp.LeakyReLU,
    "ReLU": fastbp.ReLU,
    "Residual": lambda **options: fastbp.Residual(
        [fastbp.Dense(4, 6), fastbp.Residual([fastbp.Dense(6, 6), fastbp.Tanh()]), fastbp.Dense(6, 4)], **options
    ),
    "SiLU": fastbp.SiLU,
    "Sigmoid": fastbp.Sigmoid,
    "Softmax": fastbp.Softmax,
    "Softplus": fastbp.Softplus,
    "Tanh": fastbp.Tanh,
}
LOSSES = {
    "BinaryCrossEntropy": lambda **options: fastbp.BinaryCrossEntropy(2.0, **options),
    "CategoricalCrossEntropy": lambda **options: fastbp.CategoricalCrossEntropy({1: 2.0}, 0.1, **options),
    "Huber": fastbp.Huber,
    "MeanAbsoluteError": fastbp.MeanAbsoluteError,
    "MeanSquaredError": fastbp.MeanSquaredError,
    "Poisson": fastbp.Poisson,
    "SoftmaxCrossEntropy": lambda **options: fastbp.SoftmaxCrossEntropy({1: 2.0}, 0.1, **options),
}


def numbers(rng):
    """A few rows, none of whose numbers is near 0, where some layers have a kink."""
    x = rng.uniform(0.2, 2, (5, 4))
    return x * rng.choice([-1, 1], x.shape)


@pytest.mark.parametrize(("kind", "known"), [(fastbp.Layer, LAYERS), (fastbp.Loss, LOSSES)])
def test_all_that_is_exported_is_checked(kind, known):
    exported = {name: getattr(fastbp, name) for name in fastbp.__all__}
    parts = {n for n, x in exported.items() if inspect.isclass(x) and issubclass(x, kind) and x is not kind}
    assert parts == known.keys()


@pytest.mark.parametrize("name", LAYERS)
def test_layers_pass(engine, name, rng):
    layer, x = LAYERS[name](engine=engine), numbers(rng)
    if name == "Embedding":
        x[:, [0, 2]] = rng.integers(0, 3, (5, 2))
    assert fastbp.gradcheck(layer, x, inputs=name != "Embedding")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_pass(engine, name, reduction, rng):
    loss, outputs = LOSSES[name](reduction=reduction, engine=engine), numbers(rng)
    y = rng.integers(0, 2, outputs.shape)
    if "Cross" in name and "Binary" not in name:
        outputs, y = np.abs(outputs) / np.abs(outputs).sum(axis=1, keepdims=True), rng.integers(0, 4, 5)
    assert fastbp.gradcheck(loss, outputs, y)
    assert fastbp.gradcheck(loss, outputs, y, sample_weight=[1, 0, 2, 0.5, 1])


def test_a_layer_of_ones_own_passes(engine, rng):
    assert fastbp.gradcheck(Bottleneck(4, 2, engine=engine), rng.standard_normal((3, 4)))


class WrongMask(fastbp.ReLU):
    def backward(self, dvalues):
        self.dinputs = self.engine.relu_backward(dvalues, self.engine.scale(self.output, self.engine.scalar(-1)))
        return self.dinputs


class Transposed(fastbp.Dense):
    def backward(self, dvalues):
        super().backward(dvalues)
        self.dweights = np.ascontiguousarray(self.dweights.T)
        return self.dinputs


class ForgottenBias(fastbp.Dense):
    def backward(self, dvalues):
        super().backward(dvalues)
        del self.dbiases
        return self.dinputs


class ZeroBias(fastbp.Dense):
    def backward(self, dvalues):
        super().backward(dvalues)
        self.dbiases[...] = 0
        return self.dinputs


class NotANumber(fastbp.Identity):
    def backward(self, dvalues):
        self.dinputs = self.engine.scale(dvalues, self.engine.scalar(np.nan))
        return self.dinputs


class DoubledInPlace(fastbp.Identity):
    def backward(self, dvalues):
        dvalues *= 2
        return super().backward(dvalues)


class NoMean(fastbp.MeanSquaredError):
    def gradient(self, outputs, targets, weights, total):
        gradient = super().gradient(outputs, targets, weights, total)
        return self.engine.scale(gradient, self.engine.scalar(float(outputs.shape[0])))


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (WrongMask(), r"WrongMask\(\): dinputs is 0 at \(\d, \d\), by differences it is"),
        (Transposed(4, 4), r"Transposed\(.*\): dweights is .* at \(\d, \d\), by differences it is"),
        (Transposed(4, 3), r"dweights is of shape \(3, 4\), it should have shape \(4, 3\)"),
        (ForgottenBias(4, 3), r"dbiases is missing, it should have shape \(1, 3\)"),
        (ZeroBias(4, 3), r"dbiases is 0 at \(0, \d\)"),
        (NotANumber(), "dinputs is nan at"),
        (DoubledInPlace(), r"dinputs is .* by differences it is"),
        (fastbp.Residual([fastbp.Tanh(), ZeroBias(4, 4)]), r"layers\.1\.dbiases is 0 at"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, fastbp.Layer) else None,
)
def test_faults_in_a_layer_are_found(part, match, rng):
    with pytest.raises(fastbp.GradientError, match=match):
        fastbp.gradcheck(part, numbers(rng))


class NothingReturned(fastbp.Identity):
    def forward(self, x):
        super().forward(x)


class NoShapes(fastbp.Identity):
    weights = fastbp.Parameter()


class NoDraw(NoShapes):
    def shapes(self):
        return {"weights": (4, 4)}


@pytest.mark.parametrize(
    ("part", "error", "match"),
    [
        (NothingReturned(), TypeError, r"NothingReturned\(\): forward must return its output, got None"),
        (NoShapes(), TypeError, r"NoShapes\(\): shapes must name and draw must assign weights"),
        (fastbp.Residual([NoDraw()]), TypeError, r"NoDraw\(\): shapes must name and draw must assign weights"),
        (fastbp.Layer(), NotImplementedError, r"Layer must define forward\(x\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, fastbp.Layer) else None,
)
def test_what_a_layer_lacks_is_said(part, error, match, rng):
    with pytest.raises(error, match=match):
        fastbp.gradcheck(part, numbers(rng))


def test_a_layer_without_backward_or_a_loss_without_gradient_says_so(rng):
    class Forward(fastbp.Layer):
        forward = fastbp.Identity.forward

    with pytest.raises(NotImplementedError, match=r"Forward must define backward\(dvalues\)"):
        fastbp.gradcheck(Forward(), numbers(rng))
    with pytest.raises(NotImplementedError, match=r"Loss must define gradient\(outputs, targets, weights, total\)"):
        fastbp.gradcheck(fastbp.Loss(), numbers(rng), numbers(rng))


def test_parameters_that_are_never_drawn_say_so_where_they_are_read():
    with pytest.raises(TypeError, match=r"NoDraw\(\): shapes must name and draw must assign weights"):
        NoDraw().weights  # noqa: B018


def test_faults_in_a_loss_are_found(rng):
    with pytest.raises(fastbp.GradientError, match=r"NoMean\(\): the gradient by outputs is .* by differences it is"):
        fastbp.gradcheck(NoMean(), numbers(rng), numbers(rng))


class StoredWrong(fastbp.Identity):
    def backward(self, dvalues):
        self.dinputs = self.engine.scale(dvalues, self.engine.scalar(2))
        return dvalues


def test_a_stored_gradient_is_looked_at(rng):
    with pytest.raises(fastbp.GradientError, match=r"StoredWrong\(\): dinputs as stored is .* by differences it is"):
        fastbp.gradcheck(StoredWrong(), numbers(rng))


class Ridge(fastbp.MeanSquaredError):
    """With half the sum of squared weights, or `share` of that."""

    def __init__(self, share=1.0, **options):
        super().__init__(**options)
        self.share = share

    def penalize(self, rows, parameters, gradients, total):
        self.engine.penalize(parameters, gradients, self.engine.scalar(1), self.engine.scalar(0))
        total[0] += self.share * (parameters**2).sum() / 2 * total[1]


def test_what_a_loss_adds_for_weights_is_looked_at(engine, rng):
    assert fastbp.gradcheck(Ridge(engine=engine), numbers(rng), numbers(rng))
    with pytest.raises(fastbp.GradientError, match=r"Ridge\(\): penalize's gradient is .* by differences it is"):
        fastbp.gradcheck(Ridge(0.5, engine=engine), numbers(rng), numbers(rng))


def test_the_layer_stays_as_it_is(engine, rng):
    model = small_model(engine, dropout=0.3)
    dropout, norm = model.layers[2], fastbp.BatchNorm(4, engine=engine)
    before = dropout.key.copy(), norm.running_mean.copy(), model.layers[0].weights.copy()
    x = rng.standard_normal((3, 4))
    for layer in (dropout, norm, model.layers[0]):
        assert fastbp.gradcheck(layer, x)
        assert "output" not in layer.__dict__
    after = dropout.key, norm.running_mean, model.layers[0].weights
    for a, b in zip(before, after, strict=True):
        assert_array_equal(a, b)
    assert "weights" not in norm.__dict__


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((fastbp.ReLU(), np.ones((2, 3)), np.ones(2)), {}, ValueError, r"y and sample_weight are for losses, ReLU\(\)"),
        ((fastbp.MeanSquaredError(), np.ones((2, 3))), {}, ValueError, "y must hold a loss's targets, got None"),
        ((np.tanh, np.ones((2, 3))), {}, TypeError, "part must be a fastbp Layer or Loss, got <ufunc 'tanh'>"),
        ((fastbp.ReLU(), np.ones((2, 3))), {"eps": 0}, ValueError, "eps must be above 0"),
        ((fastbp.ReLU(), np.ones((2, 3))), {"rtol": -1}, ValueError, "rtol must be at least 0"),
        ((fastbp.Dense(2, 3), np.ones((2, 3))), {}, ValueError, r"x must have shape \(batch, 2\), got \(2, 3\)"),
    ],
)
def test_bad_arguments(arguments, options, error, match):
    with pytest.raises(error, match=match):
        fastbp.gradcheck(*arguments, **options)
