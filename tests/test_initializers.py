"""How weights start: by name, by a function of one's own, and whose seed counts."""

import copy
import pickle

import numpy as np
import pytest

import fastbp
from fastbp.initializers import INITIALIZERS

from .checks import assert_allclose, assert_array_equal, on_host

INPUTS, NEURONS = 300, 200
# (variance, and the largest weight in standard deviations: of a uniform distribution sqrt(3))
DISTRIBUTIONS = {
    "he": (2 / 300, np.inf),
    "he_normal": (2 / 300, np.inf),
    "he_uniform": (2 / 300, np.sqrt(3)),
    "glorot": (2 / 500, np.sqrt(3)),
    "glorot_normal": (2 / 500, np.inf),
    "glorot_uniform": (2 / 500, np.sqrt(3)),
    "lecun_normal": (1 / 300, np.inf),
    "lecun_uniform": (1 / 300, np.sqrt(3)),
    "normal": (1e-4, np.inf),
    "torch": (1 / 900, np.sqrt(3)),
}


def in_model(layer, *following, engine="numpy", seed=0):
    fastbp.Sequential([layer, *following], engine=engine, seed=seed, dtype=np.float64)
    return layer


def assert_distributed(values, variance, largest):
    values = on_host(values).ravel() / np.sqrt(variance)
    assert abs(values.mean()) < 5 / np.sqrt(values.size)
    assert abs(values.std() - 1) < 5 / np.sqrt(values.size)
    assert np.abs(values).max() > 3.5 if largest == np.inf else largest - 0.01 < np.abs(values).max() <= largest


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_weights_have_the_variance_of_the_formula(engine, name):
    layer = in_model(fastbp.Dense(INPUTS, NEURONS, init=name), engine=engine)
    assert_distributed(layer.weights, *DISTRIBUTIONS[name])
    assert name == "torch" or not layer.biases.any()


def test_every_name_is_tested():
    assert {*DISTRIBUTIONS, "orthogonal", "zeros"} == INITIALIZERS.keys()


def test_zeros():
    assert not in_model(fastbp.Dense(3, 2, init="zeros")).weights.any()


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (1, 4), (4, 1), (25, 25)])
def test_orthogonal(shape):
    weights = in_model(fastbp.Dense(*shape, init="orthogonal")).weights
    gram = weights.T @ weights if shape[0] >= shape[1] else weights @ weights.T
    assert_allclose(gram, np.eye(min(shape)), atol=1e-14)


def test_orthogonal_prefers_no_sign():
    weights = [in_model(fastbp.Dense(2, 2, init="orthogonal"), seed=seed).weights for seed in range(400)]
    assert np.abs(np.mean(weights, axis=0)).max() < 5 * np.sqrt(0.5 / 400)


def test_torch_draws_biases_too():
    torch = pytest.importorskip("torch")
    layer = in_model(fastbp.Dense(4, 100_000, init="torch"))
    linear = torch.nn.Linear(4, 100_000)
    for ours, theirs in [(layer.weights, linear.weight), (layer.biases, linear.bias)]:
        theirs = theirs.detach().numpy()
        for figure in (np.std, np.max, np.min):
            assert_allclose(figure(ours), figure(theirs), rtol=0.01)
    assert not np.isin(layer.biases, layer.weights).any()


@pytest.mark.parametrize(
    ("following", "name"), [([fastbp.ReLU()], "he"), ([], "glorot"), ([fastbp.Softmax()], "glorot")]
)
def test_by_default_what_follows_decides(engine, following, name):
    assert_distributed(in_model(fastbp.Dense(INPUTS, NEURONS), *following, engine=engine).weights, *DISTRIBUTIONS[name])


def test_a_layer_alone_starts_as_he_does(engine):
    assert_distributed(fastbp.Dense(INPUTS, NEURONS, engine=engine).weights, *DISTRIBUTIONS["he"])


def test_a_function_of_ones_own(engine):
    layer = in_model(fastbp.Dense(3, 2, init=lambda rng, shape: np.full(shape, rng.random())), engine=engine)
    assert (layer.weights == layer.weights[0, 0]).all() and layer.weights.shape == (3, 2) and layer.weights.any()
    assert "init" not in layer.config()


def test_a_function_that_gives_another_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"Dense\(inputs=3, neurons=2\): weights must have shape \(3, 2\), got \(2, 3\)"
    ):
        fastbp.Sequential([fastbp.Dense(3, 2, init=lambda rng, shape: rng.random(shape[::-1]))])


@pytest.mark.parametrize("name", ["xavier", "He", 3, ["he"]])
def test_a_wrong_name_lists_the_right_ones(name):
    with pytest.raises(ValueError, match=r"init must be one of 'he_normal', .*'torch', .*None, or a function") as error:
        fastbp.Dense(2, 2, init=name)
    assert all(repr(known) in str(error.value) for known in INITIALIZERS) and repr(name) in str(error.value)


@pytest.mark.parametrize("init", [None, "torch", "orthogonal"])
def test_a_seed_gives_the_same_weights_on_every_engine(engine, init):
    layer, reference = (in_model(fastbp.Dense(5, 4, init=init), engine=e, seed=3) for e in (engine, "numpy"))
    assert_array_equal(layer.weights, reference.weights)
    assert_array_equal(layer.biases, reference.biases)


def test_looking_at_weights_does_not_change_what_a_seed_gives(engine):
    looked_at, other = (fastbp.Dense(5, 4, init="torch", engine=engine) for _ in range(2))
    assert looked_at.weights is looked_at.weights
    looked_at.forward(np.ones((2, 5)))
    for layer in (looked_at, other):
        in_model(layer, fastbp.ReLU(), engine=engine)
    assert_array_equal(looked_at.weights, other.weights)
    assert_array_equal(looked_at.biases, other.biases)


def changed_in_place(layer):
    layer.weights[0, 0] += 1


def assigned(layer):
    layer.weights = layer.weights


@pytest.mark.parametrize("change", [changed_in_place, assigned])
@pytest.mark.parametrize(
    "copied", [lambda layer: layer, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_weights_that_somebody_gave_stay(engine, change, copied):
    layer = fastbp.Dense(5, 4, engine=engine)
    change(layer)
    before = layer.weights.copy()
    assert_array_equal(in_model(copied(layer), engine=engine).weights, before)


def test_weights_of_a_layer_that_left_its_model_stay(engine):
    layer = fastbp.Dense(5, 4)
    layer.weights  # noqa: B018
    model = fastbp.Sequential([layer, fastbp.ReLU()], engine=engine)
    before = layer.weights.copy()
    model.layers = [model.layers[1]]
    assert_array_equal(in_model(layer, engine=engine).weights, before)
