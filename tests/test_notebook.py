"""The notebook's cells with fastbp's classes in place of its own, on each engine."""

import itertools

import numpy as np
import pytest

from fastbp import notebook

from . import notebook_reference as reference
from .checks import assert_allclose, assert_array_equal, on_host

TARGETS = {"sparse": lambda y, classes: y, "one-hot": lambda y, classes: np.eye(classes)[y]}

pytestmark = pytest.mark.usefixtures("engine_in_use")


def run(classes, X, y, widths, seed):
    """The last cell of the notebook, for any number of layers; all that it leaves behind, by name."""
    np.random.seed(seed)
    dense = [classes.LayerDense(a, b) for a, b in itertools.pairwise(widths)]
    relus = [classes.ActivationRelU() for _ in dense[1:]]
    softmax_cost = classes.ActivationSoftmaxCost()
    x = X
    for layer, relu in zip(dense, relus, strict=False):
        layer.forward(x)
        relu.forward(layer.output)
        x = relu.output
    dense[-1].forward(x)
    left = {"cost": softmax_cost.forward(dense[-1].output, y), "output": softmax_cost.output}
    softmax_cost.backward(softmax_cost.output, y)
    dense[-1].backward(softmax_cost.dinputs)
    for i in reversed(range(len(relus))):
        relus[i].backward(dense[i + 1].dinputs)
        dense[i].backward(relus[i].dinputs)
    for i, layer in enumerate(dense):
        left |= {
            f"{name} {i}": getattr(layer, name) for name in ("weights", "dweights", "dbiases", "dinputs", "output")
        }
    return left


def assert_alike(ours, theirs, atol=1e-9):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        actual = np.asarray(on_host(ours[name]))
        assert_allclose(actual, expected, rtol=1e-9, atol=atol, err_msg=name)
        assert actual.dtype == np.float64 and actual.shape == np.shape(expected)


def test_the_printed_table(capsys):
    softmax_outputs = np.array([[0.7, 0.1, 0.2], [0.1, 0.5, 0.4], [0.02, 0.9, 0.08]])
    softmax_cost = notebook.ActivationSoftmaxCost()
    softmax_cost.backward(softmax_outputs, np.array([0, 1, 1]))
    print(softmax_cost.dinputs)
    assert capsys.readouterr().out == (
        "[[-0.1         0.03333333  0.06666667]\n"
        " [ 0.03333333 -0.16666667  0.13333333]\n"
        " [ 0.00666667 -0.03333333  0.02666667]]\n"
    )
    one_hot = notebook.ActivationSoftmaxCost()
    one_hot.backward(softmax_outputs, np.eye(3)[[0, 1, 1]])
    assert_array_equal(one_hot.dinputs, softmax_cost.dinputs)


def test_the_spiral_cell():
    np.random.seed(0)
    X, y = notebook.spiral_data(100, 3)
    assert X.shape == (300, 2) and X.dtype == np.float64 and y.tolist() == [0] * 100 + [1] * 100 + [2] * 100
    assert np.hypot(*X.T).max() <= 1 + 1e-12
    assert_alike(run(notebook, X, y, (2, 3, 3), 0), run(reference, X, y, (2, 3, 3), 0), atol=1e-15)


@pytest.mark.parametrize("seed", range(60))
def test_random_networks(seed):
    rng = np.random.default_rng(seed)
    widths = rng.integers(1, 20, rng.integers(2, 6))
    widths[-1] = rng.integers(2, 12)
    rows = rng.integers(1, 70)
    X = 10 ** rng.uniform(-2, 3) * rng.standard_normal((rows, widths[0]))
    y = TARGETS[rng.choice(list(TARGETS))](rng.integers(0, widths[-1], rows), widths[-1])
    assert_alike(run(notebook, X, y, widths, seed), run(reference, X, y, widths, seed))


@pytest.mark.parametrize("targets", TARGETS)
def test_softmax_and_cost_one_after_the_other(targets, rng):
    x, y = 3 * rng.standard_normal((20, 5)), TARGETS[targets](rng.integers(0, 5, 20), 5)
    for classes in (notebook, reference):
        softmax, cost = classes.ActivationSoftmax(), classes.CategoricalCrossEntropy()
        softmax.forward(x)
        costs = cost.forward(softmax.output, y)
        mean = cost.calculate(softmax.output, y)
        cost.backward(softmax.output, y)
        softmax.backward(cost.dinputs)
        left = {"costs": costs, "mean": mean, "cost": cost.dinputs, "softmax": softmax.dinputs, "p": softmax.output}
        if classes is notebook:
            ours = left
    assert_alike(ours, left)
    assert isinstance(cost, reference.Cost) and issubclass(notebook.CategoricalCrossEntropy, notebook.Cost)


def test_costs_are_clipped():
    p, y = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 0])
    ours, theirs = (c.CategoricalCrossEntropy().forward(p, y) for c in (notebook, reference))
    assert_allclose(ours, theirs, rtol=1e-12)


def test_a_cost_of_ones_own():
    class Quadratic(notebook.Cost):
        def forward(self, output, y):
            return ((output - y) ** 2).sum(axis=1)

    assert Quadratic().calculate(np.array([[1.0, 2.0], [3.0, 4.0]]), np.zeros((2, 2))) == (5 + 25) / 2


def test_numpy_seed_draws_the_weights():
    np.random.seed(5)
    layer = notebook.LayerDense(3, 4)
    np.random.seed(5)
    assert_array_equal(layer.weights, 0.01 * np.random.randn(3, 4))
    assert layer.biases.tolist() == [[0] * 4]
    spirals = []
    for _ in range(2):
        np.random.seed(5)
        spirals.append(notebook.spiral_data(10, 2)[0])
    assert_array_equal(*spirals)


def test_training_by_hand_as_in_the_book(rng):
    """Attributes are assigned from outside: parameters in place and anew, outputs, gradients."""
    X, y = rng.standard_normal((30, 2)), rng.integers(0, 3, 30)
    left = []
    for classes in (notebook, reference):
        np.random.seed(1)
        layer, cost = classes.LayerDense(2, 3), classes.ActivationSoftmaxCost()
        layer.biases = np.full((1, 3), 0.5)
        for _ in range(20):
            layer.forward(X)
            cost.forward(layer.output, y)
            cost.backward(cost.output, y)
            layer.backward(cost.dinputs)
            layer.weights -= 0.5 * layer.dweights
            layer.biases = layer.biases - 0.5 * layer.dbiases
        left.append({"weights": layer.weights, "biases": layer.biases})
    assert_alike(*left)


def test_what_forward_stores_can_be_assigned(rng):
    x, p, dvalues = rng.standard_normal((4, 3)), rng.dirichlet(np.ones(3), 4), rng.standard_normal((4, 3))
    left = []
    for classes in (notebook, reference):
        dense, relu, softmax = classes.LayerDense(3, 3), classes.ActivationRelU(), classes.ActivationSoftmax()
        dense.weights = np.arange(9.0).reshape(3, 3)
        dense.inputs, relu.inputs, softmax.output = x, x, p
        for layer in (dense, relu, softmax):
            layer.backward(dvalues)
        left.append({"dense": dense.dweights, "relu": relu.dinputs, "softmax": softmax.dinputs})
        for name in ("weights", "biases", "inputs", "output", "dweights", "dbiases", "dinputs"):
            value = np.ones((1, 3)) if name == "biases" else x[:3]
            setattr(dense, name, value)
            assert_array_equal(getattr(dense, name), value)
    assert_alike(*left)


def test_float32_stays_float32():
    layer = notebook.LayerDense(2, 3)
    layer.forward(np.ones((4, 2), np.float32))
    assert layer.output.dtype == np.float32


def test_the_star_import_brings_the_notebooks_names():
    names = {}
    exec("from fastbp.notebook import *", names)
    assert names.keys() - {"__builtins__"} == {
        "LayerDense", "ActivationRelU", "Cost", "CategoricalCrossEntropy", "ActivationSoftmax", "ActivationSoftmaxCost",
        "spiral_data",
    }  # fmt: skip


def test_bad_targets_are_refused():
    cost = notebook.ActivationSoftmaxCost()
    with pytest.raises(ValueError, match="y_true must hold labels from 0 to 1, got 2"):
        cost.forward(np.ones((2, 2)), np.array([0, 2]))
    with pytest.raises(ValueError, match=r"y_true must hold 2 labels, .*got \(3,\)"):
        cost.backward(np.full((2, 2), 0.5), np.array([0, 1, 1]))
