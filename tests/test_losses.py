"""Losses for numbers and what all share, against values worked out by hand, slopes, and torch."""

import copy
import pickle

import numpy as np
import pytest

import fastbp

from .checks import assert_allclose, on_host, slopes

LOSSES = {
    "SoftmaxCrossEntropy": fastbp.SoftmaxCrossEntropy,
    "CategoricalCrossEntropy": fastbp.CategoricalCrossEntropy,
    "MeanSquaredError": fastbp.MeanSquaredError,
    "MeanAbsoluteError": fastbp.MeanAbsoluteError,
    "Huber": lambda **options: fastbp.Huber(0.7, **options),
    "Poisson": fastbp.Poisson,
    "Poisson of rates": lambda **options: fastbp.Poisson(log_input=False, **options),
    "BinaryCrossEntropy": fastbp.BinaryCrossEntropy,
    "BinaryCrossEntropy weighted": lambda **options: fastbp.BinaryCrossEntropy(3, **options),
}
FOR_NUMBERS = [name for name in LOSSES if "Softmax" not in name and "Categorical" not in name]
each_loss = pytest.mark.parametrize("name", LOSSES)
each_loss_for_numbers = pytest.mark.parametrize("name", FOR_NUMBERS)


def problem(name, rng, rows=6, classes=4):
    """Outputs of a last layer, and targets."""
    outputs = rng.standard_normal((rows, classes))
    if name == "CategoricalCrossEntropy":
        outputs = rng.dirichlet(np.ones(classes), rows) * 0.9 + 0.1 / classes
    if name == "Poisson of rates":
        outputs = rng.uniform(0.2, 3, (rows, classes))
    if name.startswith("Poisson"):
        return outputs, rng.poisson(2, (rows, classes))
    if name.startswith("Binary"):
        return outputs, rng.integers(0, 2, (rows, classes))
    return outputs, rng.standard_normal((rows, classes)) if name in FOR_NUMBERS else rng.integers(0, classes, rows)


def torch_loss(name, outputs, y, reduction):
    """The same by torch in float64; for classes only what is not in test_cross_entropy."""
    import torch

    functional, target = torch.nn.functional, torch.tensor(y)
    if name in FOR_NUMBERS:
        target = target.double()
    return {
        "SoftmaxCrossEntropy": lambda: functional.cross_entropy(outputs, target, reduction=reduction),
        "CategoricalCrossEntropy": lambda: functional.nll_loss(outputs.log(), target, reduction=reduction),
        "MeanSquaredError": lambda: functional.mse_loss(outputs, target, reduction=reduction),
        "MeanAbsoluteError": lambda: functional.l1_loss(outputs, target, reduction=reduction),
        "Huber": lambda: functional.huber_loss(outputs, target, delta=0.7, reduction=reduction),
        "Poisson": lambda: functional.poisson_nll_loss(outputs, target, reduction=reduction),
        "Poisson of rates": lambda: functional.poisson_nll_loss(outputs, target, log_input=False, reduction=reduction),
        "BinaryCrossEntropy": lambda: functional.binary_cross_entropy_with_logits(outputs, target, reduction=reduction),
        "BinaryCrossEntropy weighted": lambda: functional.binary_cross_entropy_with_logits(
            outputs, target, reduction=reduction, pos_weight=torch.tensor(3.0)
        ),
    }[name]()


@each_loss
@pytest.mark.parametrize(("rows", "classes"), [(6, 4), (1, 4), (6, 1), (1, 1)])
def test_backward_is_the_slope_of_forward(engine, name, rows, classes, rng):
    loss = LOSSES[name](engine=engine)
    outputs, y = problem(name, rng, rows, classes)
    if name == "CategoricalCrossEntropy":
        outputs *= 0.9  # away from the clip
    loss.forward(outputs, y)
    gradient = loss.backward()
    assert_allclose(gradient, slopes(lambda: loss.forward(outputs, y), outputs), atol=1e-8)
    assert loss.dinputs.shape == outputs.shape


@each_loss
def test_weights_of_which_float32_holds_no_reciprocal_count_as_any_others(engine, name, rng):
    if engine.device == "cuda":
        pytest.skip("takes them for 0")
    loss = LOSSES[name](engine=engine)
    outputs, y = problem(name, rng)
    loss.forward(outputs.astype(np.float32), y)
    expected = loss.backward()
    loss.forward(outputs.astype(np.float32), y, sample_weight=np.full(6, 1e-42))
    assert_allclose(loss.backward(), expected, rtol=1e-5, atol=1e-7)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_torch(engine, name, reduction, dtype, rng):
    torch = pytest.importorskip("torch")
    outputs, y = problem(name, rng, 33, 5)
    outputs = outputs.astype(dtype)
    leaf = torch.tensor(outputs, dtype=torch.float64, requires_grad=True)
    expected = torch_loss(name, leaf, y, reduction)
    expected.sum().backward()
    loss = LOSSES[name](engine=engine, reduction=reduction)
    rtol = 1e-5 if dtype == np.float32 else 1e-9
    actual = loss.forward(outputs, y)
    assert_allclose(actual, expected.detach().numpy(), rtol=rtol, atol=rtol)
    assert_allclose(loss.backward(), leaf.grad.numpy(), rtol=rtol, atol=rtol)
    assert loss.backward().dtype == dtype


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sample_weight_is_a_repeat_count(engine, name, reduction, rng):
    outputs, y = problem(name, rng)
    times = np.array([2, 0, 1, 3, 1, 0])
    loss = LOSSES[name](engine=engine, reduction=reduction)
    expected = loss.forward(np.repeat(outputs, times, axis=0), np.repeat(y, times, axis=0))
    gradient = np.zeros(outputs.shape)
    np.add.at(gradient, np.repeat(np.arange(6), times), on_host(loss.backward()))
    assert loss.forward(outputs, y, times) == pytest.approx(expected, rel=1e-12)
    assert_allclose(loss.backward(), gradient, rtol=1e-12, atol=1e-15)
    assert loss.forward(outputs, y, np.zeros(6)) == 0
    assert not loss.backward().any()


@each_loss_for_numbers
def test_losses_of_elements_are_weighted_by_row(engine, name, rng):
    outputs, y = problem(name, rng)
    loss = LOSSES[name](engine=engine, reduction="none")
    plain = on_host(loss.forward(outputs, y))
    assert_allclose(loss.forward(outputs, y, np.arange(6)), plain * np.arange(6)[:, None], rtol=1e-12)


def test_softmax_cross_entropy_by_hand(engine):
    loss = fastbp.SoftmaxCrossEntropy(engine=engine)
    outputs = np.log([[1.0, 2.0, 1.0], [4.0, 2.0, 2.0]])
    assert loss.forward(outputs, [1, 2]) == pytest.approx((np.log(2) + np.log(4)) / 2)
    assert_allclose(loss.backward(), [[0.125, -0.25, 0.125], [0.25, 0.125, -0.375]], rtol=1e-14)


def test_categorical_cross_entropy_by_hand(engine):
    loss = fastbp.CategoricalCrossEntropy(engine=engine)
    assert loss.forward([[0.5, 0.5], [0.75, 0.25]], [0, 1]) == pytest.approx((np.log(2) + np.log(4)) / 2)
    assert_allclose(loss.backward(), [[-1, 0], [0, -2]], rtol=1e-14)


def test_mean_squared_error_by_hand(engine):
    loss = fastbp.MeanSquaredError(engine=engine)
    assert loss.forward([[1, 2], [3, 4]], [[1, 0], [0, 4]]) == (0 + 4 + 9 + 0) / 4
    assert loss.backward().tolist() == [[0, 1], [1.5, 0]]


def test_mean_absolute_error_and_huber_by_hand(engine):
    outputs, y = [[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [6.0, 3.5]]  # errors 0, 2, -3, 0.5
    loss = fastbp.MeanAbsoluteError(engine=engine)
    assert loss.forward(outputs, y) == 5.5 / 4
    assert loss.backward().tolist() == [[0, 0.25], [-0.25, 0.25]]
    loss = fastbp.Huber(2.0, engine=engine)
    assert loss.forward(outputs, y) == (0 + 2 + 4 + 0.125) / 4
    assert loss.backward().tolist() == [[0, 0.5], [-0.5, 0.125]]


def test_poisson_by_hand(engine):
    loss = fastbp.Poisson(engine=engine)
    assert loss.forward([[0.0, np.log(3)]], [[2, 1]]) == pytest.approx((1 + 3 - np.log(3)) / 2)
    assert_allclose(loss.backward(), [[-0.5, 1]], rtol=1e-12)
    loss = fastbp.Poisson(log_input=False, engine=engine)
    assert loss.forward([[2.0]], [[4]]) == pytest.approx(2 - 4 * np.log(2 + 1e-8))


def test_binary_cross_entropy_by_hand(engine):
    loss = fastbp.BinaryCrossEntropy([1, 2], engine=engine)
    assert loss.forward([[np.log(3), 0.0]], [[1, 1]]) == pytest.approx((np.log(4 / 3) + 2 * np.log(2)) / 2)
    assert_allclose(loss.backward(), [[-0.125, -0.5]], rtol=1e-12)


def test_binary_cross_entropy_far_from_the_middle(engine, dtype):
    loss = fastbp.BinaryCrossEntropy(engine=engine, reduction="none")
    outputs = np.array([[-80, -80, 80, 80, 500, -500]], dtype)
    assert_allclose(
        loss.forward(outputs, [[0, 1, 0, 1, 0, 1]]), [[np.exp(-80), 80, 80, np.exp(-80), 500, 500]], rtol=1e-5
    )
    assert_allclose(loss.backward(), [[np.exp(-80), -1, 1, -np.exp(-80), 1, -1]], rtol=1e-5)


def test_predictions_are_in_the_units_of_y():
    assert fastbp.Poisson().decide(np.array([[0.0]])).tolist() == [[1]]
    assert fastbp.Poisson(log_input=False).decide(np.array([[0.5]])).tolist() == [[0.5]]
    assert fastbp.BinaryCrossEntropy().decide(np.array([[-1.0, 2.0]])).tolist() == [[0, 1]]
    assert fastbp.MeanSquaredError().decide(np.array([[-1.0]])).tolist() == [[-1]]


def test_probabilities_are_clipped_in_the_loss_as_in_the_notebook(engine):
    loss = fastbp.CategoricalCrossEntropy(engine=engine)
    assert loss.forward([[1.0, 0.0]], [1]) == pytest.approx(-np.log(1e-7))
    assert loss.forward([[1.0, 0.0]], [0]) == pytest.approx(1e-7, rel=1e-6)
    assert loss.forward([[np.float32(1), 0]], [0]) > 0


def test_logits_are_not_clipped(engine, dtype):
    loss = fastbp.SoftmaxCrossEntropy(engine=engine)
    assert loss.forward(np.array([[500, 0]], dtype), [1]) == pytest.approx(500)
    assert_allclose(loss.backward(), [[1, -1]], rtol=1e-6)
    assert loss.forward(np.array([[0, 500]], dtype), [1]) == 0


@each_loss
def test_forward_is_a_float_and_backward_before_it_an_error(engine, name, rng):
    loss = LOSSES[name](engine=engine)
    with pytest.raises(AttributeError, match=r"\) has no gradient yet: call forward\(outputs, y\)"):
        loss.backward()
    assert type(loss.forward(*problem(name, rng))) is float


def test_bad_numbers(engine):
    loss = fastbp.MeanSquaredError(engine=engine)
    with pytest.raises(ValueError, match=r"y must have the shape of the outputs, \(3, 1\), got \(3,\); use y.reshape"):
        loss.forward(np.ones((3, 1)), np.ones(3))
    with pytest.raises(ValueError, match=r"y must hold finite .*numbers, got inf at \(1, 0\)"):
        loss.forward(np.ones((2, 1)), [[0], [np.inf]])


@each_loss
@pytest.mark.parametrize("shape", [(3,), (1, 3, 2), (0, 3), (3, 0)])
def test_bad_outputs(engine, name, shape):
    with pytest.raises(ValueError, match=r"outputs must have shape \(batch, .*got \("):
        LOSSES[name](engine=engine).forward(np.ones(shape), np.zeros(3, int))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: fastbp.MeanSquaredError(reduction="max"), "reduction must be 'mean' or 'sum' or 'none', got 'max'"),
        (lambda: fastbp.Huber(0), "delta must be above 0 and finite, got 0"),
        (lambda: fastbp.Huber("1"), "delta must be a number, got '1'"),
        (lambda: fastbp.Poisson(log_input=1), "log_input must be True or False, got 1"),
        (lambda: fastbp.BinaryCrossEntropy(-1), "pos_weight must be at least 0 and finite, got -1"),
        (lambda: fastbp.BinaryCrossEntropy([1, np.inf]), "pos_weight must be at least 0 and finite, got inf"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()


@pytest.mark.parametrize(
    ("loss", "y", "match"),
    [
        (fastbp.Poisson(), [[1.0, -2.0]], r"y must hold counts, at least 0, got -2\.0"),
        (fastbp.BinaryCrossEntropy(), [[0.5, 1.5]], r"y must hold numbers from 0 to 1, got 0\.5 to 1\.5"),
        (fastbp.BinaryCrossEntropy(), [1, 0], r"y must have the shape of the outputs, \(1, 2\), got \(2,\)"),
        (fastbp.BinaryCrossEntropy([1, 2, 3]), [[1, 0]], "pos_weight must hold 2 numbers, one for each output, got 3"),
    ],
)
def test_bad_targets(loss, y, match):
    with pytest.raises(ValueError, match=match):
        loss.forward(np.ones((1, 2)), y)


@each_loss
@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([1, 2], r"sample_weight must hold 6 numbers, shape \(6,\), got \(2,\)"),
        (np.ones((6, 1)), r"sample_weight must hold 6 numbers, shape \(6,\), got \(6, 1\)"),
        ([1, 1, 1, 1, 1, -1], "sample_weight must hold numbers of at least 0, got -1"),
        ([1, 1, 1, 1, 1, np.nan], r"sample_weight must hold finite .* numbers, got nan at \(5,\)"),
        (["a"] * 6, "sample_weight must hold real numbers"),
    ],
)
def test_bad_sample_weights(name, weights, match, rng):
    with pytest.raises(ValueError, match=match):
        LOSSES[name]().forward(*problem(name, rng), weights)


class Masked(fastbp.MeanSquaredError):
    """Leaves some outputs out, and so has an array of its own."""

    state = ("mask",)

    def __init__(self, mask, **options):
        super().__init__(**options)
        self.mask = mask

    def gradient(self, outputs, targets, weights, total):
        return self.engine.multiply(super().gradient(outputs, targets, weights, total), self.mask)


@pytest.mark.parametrize("how", ["made", "given", "moved", "of its engine"])
def test_arrays_of_a_loss_go_where_its_model_computes(engine, rng, how):
    X, y, mask = rng.standard_normal((6, 4)), rng.standard_normal((6, 3)), rng.integers(0, 2, (6, 3)).astype(float)
    loss = Masked(mask, engine=engine if how == "of its engine" else None)

    def model(loss, engine):
        layer = fastbp.Dense(4, 3)
        layer.weights = np.ones((4, 3))
        return fastbp.Sequential([layer], loss=loss, optimizer=fastbp.SGD(0.1), engine=engine, dtype=np.float64)

    made = model(None if how == "given" else loss, "numpy" if how == "moved" else engine)
    made.loss = loss
    made.move_to(engine)
    slopes = 2 / y.size * X.T @ ((X @ np.ones((4, 3)) - y) * mask)
    for each in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert engine.owns(each.loss.mask)
        each.train_on_batch(X, y)
        assert_allclose(each.layers[0].weights, 1 - 0.1 * slopes, rtol=1e-12)
    other = model(made.loss, "numpy")
    other.train_on_batch(X, y)
    assert_allclose(other.layers[0].weights, 1 - 0.1 * slopes, rtol=1e-12)


class Counting(fastbp.MeanSquaredError):
    """Adds up, in an array of its own, what it has seen."""

    state = ("seen",)

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = self.engine.zeros((2,), np.float64)

    def gradient(self, outputs, targets, weights, total):
        return super().gradient(outputs, targets, weights, self.seen)


@pytest.mark.parametrize("how", ["given", "loaded"])
def test_read_only_arrays_of_a_loss_are_copied(cpu_engine, rng, how):
    X, y = rng.standard_normal((6, 4)), rng.standard_normal((6, 3))
    loss = Counting(engine=cpu_engine)
    kept = loss.seen
    kept.flags.writeable = False
    if how == "loaded":  # as what joblib maps is
        buffers = []
        pickled = pickle.dumps(loss, protocol=5, buffer_callback=buffers.append)
        kept = np.frombuffer(bytes(buffers[0]))
        loss = pickle.loads(pickled, buffers=[kept])
        loss.forward(X[:, :3], y)
        assert loss.seen[1] == y.size
    model = fastbp.Sequential([fastbp.Dense(4, 3)], loss=loss, optimizer=fastbp.SGD(0.1), engine=cpu_engine, seed=0)
    before = loss.seen.copy()
    model.train_on_batch(X, y)
    assert (loss.seen - before)[1] == y.size and not kept.any()
