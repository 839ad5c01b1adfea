"""Losses on their own, against values worked out by hand, slopes, and torch."""

import numpy as np
import pytest

import fastbp

from .checks import slopes

LOSSES = {
    "SoftmaxCrossEntropy": fastbp.SoftmaxCrossEntropy,
    "CategoricalCrossEntropy": fastbp.CategoricalCrossEntropy,
    "MeanSquaredError": fastbp.MeanSquaredError,
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def problem(name, rng, rows=6, classes=4):
    """Outputs of a last layer, and targets."""
    if name == "MeanSquaredError":
        return rng.standard_normal((rows, classes)), rng.standard_normal((rows, classes))
    outputs = rng.standard_normal((rows, classes))
    if name == "CategoricalCrossEntropy":
        outputs = rng.dirichlet(np.ones(classes), rows) * 0.9 + 0.1 / classes
    return outputs, rng.integers(0, classes, rows)


@each_loss
@pytest.mark.parametrize(("rows", "classes"), [(6, 4), (1, 4), (6, 1), (1, 1)])
def test_backward_is_the_slope_of_forward(engine, name, rows, classes, rng):
    loss = LOSSES[name](engine=engine)
    outputs, y = problem(name, rng, rows, classes)
    if name == "CategoricalCrossEntropy":
        outputs *= 0.9  # away from the clip
    loss.forward(outputs, y)
    gradient = loss.backward()
    np.testing.assert_allclose(gradient, slopes(lambda: loss.forward(outputs, y), outputs), atol=1e-8)
    assert loss.dinputs.shape == outputs.shape


@each_loss
def test_against_torch(engine, name, dtype, rng):
    torch = pytest.importorskip("torch")
    outputs, y = problem(name, rng, 33, 5)
    outputs = outputs.astype(dtype)
    leaf = torch.tensor(outputs, dtype=torch.float64, requires_grad=True)
    target = torch.tensor(y)
    functional = torch.nn.functional
    expected = {
        "SoftmaxCrossEntropy": lambda: functional.cross_entropy(leaf, target),
        "CategoricalCrossEntropy": lambda: functional.nll_loss(leaf.log(), target),
        "MeanSquaredError": lambda: functional.mse_loss(leaf, target),
    }[name]()
    expected.backward()
    loss = LOSSES[name](engine=engine)
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    assert loss.forward(outputs, y.astype(dtype) if name == "MeanSquaredError" else y) == pytest.approx(
        expected.item(), rel=rtol
    )
    np.testing.assert_allclose(loss.backward(), leaf.grad.numpy(), rtol=rtol, atol=rtol / 33)
    assert loss.backward().dtype == dtype


def test_softmax_cross_entropy_by_hand(engine):
    loss = fastbp.SoftmaxCrossEntropy(engine=engine)
    outputs = np.log([[1.0, 2.0, 1.0], [4.0, 2.0, 2.0]])
    assert loss.forward(outputs, [1, 2]) == pytest.approx((np.log(2) + np.log(4)) / 2)
    np.testing.assert_allclose(loss.backward(), [[0.125, -0.25, 0.125], [0.25, 0.125, -0.375]], rtol=1e-14)


def test_categorical_cross_entropy_by_hand(engine):
    loss = fastbp.CategoricalCrossEntropy(engine=engine)
    assert loss.forward([[0.5, 0.5], [0.75, 0.25]], [0, 1]) == pytest.approx((np.log(2) + np.log(4)) / 2)
    np.testing.assert_allclose(loss.backward(), [[-1, 0], [0, -2]], rtol=1e-14)


def test_mean_squared_error_by_hand(engine):
    loss = fastbp.MeanSquaredError(engine=engine)
    assert loss.forward([[1, 2], [3, 4]], [[1, 0], [0, 4]]) == (0 + 4 + 9 + 0) / 4
    assert loss.backward().tolist() == [[0, 1], [1.5, 0]]


def test_probabilities_are_clipped_in_the_loss_as_in_the_notebook(engine):
    loss = fastbp.CategoricalCrossEntropy(engine=engine)
    assert loss.forward([[1.0, 0.0]], [1]) == pytest.approx(-np.log(1e-7))
    assert loss.forward([[1.0, 0.0]], [0]) == pytest.approx(1e-7, rel=1e-6)
    assert loss.forward([[np.float32(1), 0]], [0]) > 0


def test_logits_are_not_clipped(engine, dtype):
    loss = fastbp.SoftmaxCrossEntropy(engine=engine)
    assert loss.forward(np.array([[500, 0]], dtype), [1]) == pytest.approx(500)
    np.testing.assert_allclose(loss.backward(), [[1, -1]], rtol=1e-6)
    assert loss.forward(np.array([[0, 500]], dtype), [1]) == 0


@pytest.mark.parametrize("name", ["SoftmaxCrossEntropy", "CategoricalCrossEntropy"])
@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64, np.float64, list])
def test_sparse_and_one_hot_targets_agree(engine, name, kind, rng):
    outputs, y = problem(name, rng)
    loss = LOSSES[name](engine=engine)
    expected, gradient = loss.forward(outputs, y), loss.backward()
    for targets in (y, np.eye(4, dtype=int)[y]):
        given = targets.tolist() if kind is list else targets.astype(kind)
        assert loss.forward(outputs, given) == expected
        np.testing.assert_array_equal(loss.backward(), gradient)


@each_loss
def test_forward_is_a_float_and_backward_before_it_an_error(engine, name, rng):
    loss = LOSSES[name](engine=engine)
    with pytest.raises(AttributeError, match=rf"{name}\(\) has no gradient yet: call forward\(outputs, y\)"):
        loss.backward()
    assert type(loss.forward(*problem(name, rng))) is float


@pytest.mark.parametrize("name", ["SoftmaxCrossEntropy", "CategoricalCrossEntropy"])
@pytest.mark.parametrize(
    ("y", "match"),
    [
        ([0, 1], r"y must hold 3 labels, shape \(3,\), or one-hot rows, shape \(3, 2\); got \(2,\)"),
        ([[0], [1], [0]], r"y must hold 3 labels, .*got \(3, 1\)"),
        ([0, 1, 2], "y must hold labels from 0 to 1, got 2"),
        ([0, 1, -1], "y must hold labels from 0 to 1, got -1"),
        ([0, 1, 0.5], r"y must hold whole numbers, got 0\.5"),
        ([0, 1, np.nan], r"y must hold finite .*numbers, got nan at \(2,\)"),
        ([[0, 1], [1, 0], [1, 1]], "y of two dimensions must hold one-hot rows"),
        ([[0, 1], [1, 0], [0.5, 0.5]], "y of two dimensions must hold one-hot rows"),
        ([[0, 1], [1, 0], [np.nan, 1]], "y of two dimensions must hold one-hot rows"),
        (["a", "b", "a"], "y must hold real numbers, got dtype"),
        ([0j, 1, 0], "y must hold real numbers, got dtype complex128"),
        (np.ma.masked_array([0, 1, 1]), "y is a masked array"),
    ],
)
def test_bad_labels(engine, name, y, match):
    loss = LOSSES[name](engine=engine)
    with pytest.raises(ValueError, match=match):
        loss.forward(np.full((3, 2), 0.5), y)


def test_bad_numbers(engine):
    loss = fastbp.MeanSquaredError(engine=engine)
    with pytest.raises(ValueError, match=r"y must have the shape of the outputs, \(3, 1\), got \(3,\); use y.reshape"):
        loss.forward(np.ones((3, 1)), np.ones(3))
    with pytest.raises(ValueError, match=r"y must hold finite .*numbers, got inf at \(1, 0\)"):
        loss.forward(np.ones((2, 1)), [[0], [np.inf]])


@each_loss
@pytest.mark.parametrize("shape", [(3,), (1, 3, 2)])
def test_bad_outputs(engine, name, shape):
    with pytest.raises(ValueError, match=r"outputs must have shape \(batch, .*got \("):
        LOSSES[name](engine=engine).forward(np.ones(shape), np.zeros(3, int))
