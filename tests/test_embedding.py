"""Embeddings: by torch and by hand, alone and in models, and what is no code."""

import copy
import pickle

import numpy as np
import pytest

import fastbp

from .checks import assert_allclose, assert_array_equal, assert_same_parameters, on_host, slopes, state_of
from .conftest import ENGINES
from .test_training import step_by_step

ROWS = 50
SIZES = {"features": 5, "columns": (1, 4), "num_embeddings": (3, 6), "embedding_dim": (2, 4)}


def table(rows=ROWS, dtype=np.float64):
    """Numbers in columns 0, 2 and 3, codes in the others, each of which occurs."""
    rng = np.random.default_rng(1)
    X = rng.standard_normal((rows, 5))
    X[:, 1], X[:, 4] = np.arange(rows) % 3, rng.permutation(rows) % 6
    return X.astype(dtype)


X = table()
Y = (X[:, 1] + X[:, 4]).astype(int) % 3


def model_with_embedding(engine="numpy", optimizer=None, **options):
    layers = [
        fastbp.Embedding(**SIZES),
        fastbp.Residual([fastbp.Dense(9, 9), fastbp.ReLU()]),
        fastbp.Dense(9, 3),
    ]
    options = {"loss": fastbp.SoftmaxCrossEntropy(), "dtype": np.float64, "seed": 0} | options
    return fastbp.Sequential(layers, optimizer=optimizer or fastbp.Adam(0.02), engine=engine, **options)


def test_by_hand(engine, dtype):
    layer = fastbp.Embedding(3, 0, 2, 2, engine=engine)
    layer.weights = [1, 2, 3, 4]
    x = np.array([[1, 7, 8], [0, 5, 6], [1, 9, 9]], dtype)
    assert layer.forward(x).tolist() == [[3, 4, 7, 8], [1, 2, 5, 6], [3, 4, 9, 9]]
    dvalues = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [10, 20, 30, 40]], dtype)
    assert layer.backward(dvalues).tolist() == [[0, 3, 4], [0, 7, 8], [0, 30, 40]]
    assert layer.dweights.tolist() == [5, 6, 11, 22]
    assert layer.output.dtype == layer.dinputs.dtype == layer.dweights.dtype == dtype


def test_by_torch(engine, rng):
    torch = pytest.importorskip("torch")
    layer = fastbp.Embedding(**SIZES, engine=engine)
    first, second = (torch.tensor(t, requires_grad=True) for t in map(on_host, layer.tables.values()))
    leaf = torch.tensor(X, requires_grad=True)
    codes = torch.tensor(X[:, [1, 4]].astype(int))
    embedded = [torch.nn.functional.embedding(codes[:, i], t) for i, t in enumerate((first, second))]
    output = torch.cat([leaf[:, :1], embedded[0], leaf[:, 2:4], embedded[1]], dim=1)
    dvalues = rng.standard_normal(output.shape)
    output.backward(torch.tensor(dvalues))
    assert_array_equal(layer.forward(X), output.detach().numpy())
    assert_array_equal(layer.backward(dvalues), leaf.grad.numpy())
    for gradient, expected in zip(layer.dtables.values(), (first.grad, second.grad), strict=True):
        assert_allclose(gradient, expected.numpy(), rtol=1e-12)


def test_backward_is_the_slope_of_forward(engine, rng):
    layer = fastbp.Embedding(**SIZES, engine=engine)
    weighting = rng.standard_normal((ROWS, 9))
    layer.forward(X)
    layer.backward(weighting)
    found = slopes(lambda: (on_host(layer.forward(X)) * weighting).sum(), layer.weights)
    assert_allclose(layer.dweights, found, atol=1e-7)


def test_columns_may_come_in_any_order(engine):
    layer = fastbp.Embedding(5, [4, 1], [6, 3], 2, engine=engine)
    layer.weights = np.arange(18.0)
    assert layer.tables.keys() == {1, 4} and layer.tables[4][5].tolist() == [10, 11]
    x = [[0.5, 2, 0.1, 0.2, 5], [0.5, 0, 0.1, 0.2, 0]]
    assert layer.forward(x).tolist() == [[0.5, 16, 17, 0.1, 0.2, 10, 11], [0.5, 12, 13, 0.1, 0.2, 0, 1]]
    assert layer.width(5) == 7


def test_tables_are_views(engine):
    model = model_with_embedding(engine)
    layer = model.layers[0]
    assert {column: t.shape for column, t in layer.tables.items()} == {1: (3, 2), 4: (6, 4)}
    layer.tables[4][2] = 7
    assert (layer.weights[6 + 8 : 6 + 12] == 7).all()
    model.memory.parameters[...] = 8
    assert (layer.tables[4] == 8).all()


@pytest.mark.parametrize("batch_size", [7, 16, 50])
def test_replay_is_what_the_layers_compute(engine, batch_size):
    model = model_with_embedding(engine)
    expected = step_by_step(model, X, Y, batch_size)
    assert_same_parameters(model.fit(X, Y, epochs=1, batch_size=batch_size, shuffle=False), expected)


def test_engines_agree(dtype):
    models = [model_with_embedding(name, dtype=dtype).fit(X, Y, epochs=5) for name in ENGINES]
    for model in models[1:]:
        assert_same_parameters(model, models[0], 1e-9 if dtype == np.float64 else 1e-3)


def test_models_learn_from_codes_alone(engine):
    model = model_with_embedding(engine).fit(X, Y, epochs=300)
    assert model.evaluate(X, Y)["accuracy"] == 1


@pytest.mark.parametrize("kind", ["uint8", "int16", "int64", "float32"])
def test_tables_of_whole_numbers(engine, kind):
    codes = (np.arange(100).reshape(50, 2) % 6).astype(kind)
    model = fastbp.Sequential(
        [fastbp.Embedding(2, (0, 1), 6, 3), fastbp.Dense(6, 3)],
        loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(), engine=engine, seed=0,
    )  # fmt: skip
    assert model.fit(codes, Y, epochs=2).predict(codes).shape == (50,)


def test_the_largest_code_of_all_is_exact_in_float32(engine):
    layer = fastbp.Embedding(1, 0, 2**24, 1, engine=engine)
    layer.weights = np.arange(2**24, dtype=np.float32)
    x = np.array([[2**24 - 1], [2**24 - 2]], np.float32)
    assert_array_equal(layer.forward(x), x)


def test_gradients_are_added_up_in_order(engine, rng):
    layer, x = fastbp.Embedding(1, 0, 3, 2, engine=engine), np.ones((1000, 1), np.float32)
    layer.forward(x)
    dvalues = rng.standard_normal((1000, 2)).astype(np.float32)
    layer.backward(dvalues)
    first = layer.dweights.copy()
    for _ in range(3):
        layer.backward(dvalues)
        assert_array_equal(layer.dweights, first)
    assert_allclose(layer.dtables[0][1], dvalues.astype(np.float64).sum(axis=0), rtol=1e-4, atol=1e-4)
    assert not on_host(layer.dtables[0])[[0, 2]].any()


@pytest.mark.parametrize(
    ("code", "said"), [(3, "3.0"), (-1, "-1.0"), (0.5, "0.5"), (1 + 1e-9, "1.000000001"), (1e30, "1e\\+30")]
)
def test_what_is_no_code_is_refused_before_anything_changes(engine, code, said):
    bad = X.copy()
    bad[7, 1] = code
    model = model_with_embedding(engine).fit(X, Y, epochs=1)
    before = state_of(model)
    where = rf"must hold codes, whole numbers from 0 to 2, in column 1; got {said} in row 7"
    for call in (
        lambda: model.fit(bad, Y),
        lambda: model.fit([(bad, Y)]),
        lambda: model.train_on_batch(bad, Y),
        lambda: model.predict(bad),
        lambda: model.predict_proba(bad),
        lambda: model.evaluate(bad, Y),
        lambda: model.gradients(bad, Y),
        lambda: model.forward(bad),
    ):
        with pytest.raises(ValueError, match=f"X {where}"):
            call()
    with pytest.raises(ValueError, match=f"validation_data: X {where}"):
        model.fit(X, Y, validation_data=(bad, Y))
    with pytest.raises(ValueError, match=f"x {where}"):
        fastbp.Embedding(**SIZES, engine=engine).forward(bad)
    assert state_of(model) == before


def test_codes_are_checked_within_a_leading_block(engine):
    block = fastbp.Residual(fastbp.Residual(fastbp.Embedding(2, 1, num_embeddings=3, embedding_dim=1)))
    model = fastbp.Sequential([block, fastbp.Dense(2, 2)], loss=fastbp.SoftmaxCrossEntropy(), engine=engine, seed=0)
    with pytest.raises(ValueError, match=r"X must hold codes, .* from 0 to 2, in column 1; got 7\.0 in row 1"):
        model.predict([[0.5, 1], [0.5, 7]])


def test_rows_far_down_are_checked(monkeypatch):
    monkeypatch.setattr("fastbp.embedding.ROWS_AT_A_TIME", 8)
    bad = X.copy()
    bad[20, 4] = 6
    with pytest.raises(ValueError, match=r"from 0 to 5, in column 4; got 6\.0 in row 20"):
        model_with_embedding().predict(bad)


def test_nan_is_no_code(engine):
    bad = X.copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="in column 1; got nan in row 3"):
        fastbp.Embedding(**SIZES, engine=engine).forward(bad)


@pytest.mark.parametrize("code", [3, -1, 0.5, np.nan, np.inf, -1e30])
def test_what_an_earlier_layer_makes_of_a_code_is_never_looked_up(engine, code, dtype, rng):
    # replay checks nothing: values beyond the table would be read, and written
    w = rng.standard_normal(6).astype(dtype)
    places = [np.array(numbers) for numbers in ([0, 0, 1], [0, 1, 0], [3, 3, 0], [2, 2, 1])]
    x = np.array([[code, 5], [1, 6]], dtype)
    output = engine.asnumpy(engine.embedding_forward(x, w, *places))
    assert np.isnan(output[0, :2]).all() and output[0, 2] == 5 and output[1].tolist() == [w[2], w[3], 6]
    _, dw = engine.embedding_backward(np.ones((2, 3), dtype), x, w, *places)
    assert engine.asnumpy(dw).tolist() == [0, 0, 1, 1, 0, 0]


def test_a_frozen_embedding_stays(engine):
    model = model_with_embedding(engine)
    model.layers[0].trainable = False
    before = model.layers[0].weights.copy()
    model.fit(X, Y, epochs=2)
    assert_array_equal(model.layers[0].weights, before)


def test_accumulated_batches_are_one_large_batch(engine):
    model, large = (model_with_embedding(engine) for _ in range(2))
    model.fit(X, Y, epochs=2, batch_size=7, accumulate=3, shuffle=False)
    large.fit(X, Y, epochs=2, batch_size=21, shuffle=False)
    assert_same_parameters(model, large)


def test_copied_pickled_and_saved_models_go_on_bit_for_bit(engine, dtype, tmp_path):
    pytest.importorskip("safetensors")
    model = model_with_embedding(engine, dtype=dtype).fit(X, Y, epochs=2)
    model.save(tmp_path / "model")
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fastbp.load(tmp_path / "model", engine=engine)]
    model.fit(X, Y, epochs=2)
    for other in others:
        assert repr(other) == repr(model)
        assert state_of(other.fit(X, Y, epochs=2)) == state_of(model)


def test_one_seed_gives_one_table():
    tables = [model_with_embedding(name, seed=5).layers[0].weights for name in ENGINES]
    for other in tables[1:]:
        assert_array_equal(other, tables[0])
    assert abs(fastbp.Embedding(1, 0, 5000, 4).weights.std() - 1) < 0.05  # ten standard deviations


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"features": 0}, ValueError, "features must be at least 1, got 0"),
        ({"features": 4}, ValueError, r"columns must be different numbers from 0 to 3, got \(1, 4\)"),
        ({"columns": ()}, ValueError, r"columns must be different numbers from 0 to 4, got \(\)"),
        ({"columns": (1, 1)}, ValueError, r"columns must be different numbers from 0 to 4, got \(1, 1\)"),
        ({"columns": (1, -1)}, ValueError, r"columns\[1\] must be at least 0, got -1"),
        ({"columns": np.array(1)}, TypeError, "columns must be a sequence of whole numbers, got array"),
        ({"columns": "ab"}, TypeError, "columns must be an integer, got 'ab'"),
        ({"num_embeddings": (3, 6, 7)}, ValueError, "num_embeddings must be a number, or one for each of 2 columns"),
        ({"num_embeddings": (3, 0)}, ValueError, r"num_embeddings\[1\] must be at least 1, got 0"),
        ({"num_embeddings": 2**24 + 1}, ValueError, r"num_embeddings must be at most 2\*\*24, got 16777217"),
        ({"embedding_dim": [2.5, 4]}, TypeError, r"embedding_dim\[0\] must be an integer, got 2\.5"),
        (
            {"embedding_dim": [2]},
            ValueError,
            r"embedding_dim must be a number, or one for each of 2 columns, got \[2\]",
        ),
    ],
)
def test_bad_settings(arguments, error, match):
    with pytest.raises(error, match=match):
        fastbp.Embedding(**(SIZES | arguments))


@pytest.mark.parametrize("name", ["columns", "num_embeddings", "embedding_dim"])
def test_tables_keep_their_sizes(name):
    with pytest.raises(AttributeError):
        setattr(fastbp.Embedding(**SIZES), name, (4, 5))


def test_sizes_may_be_one_number_or_arrays():
    layer = fastbp.Embedding(5, np.array([1, 4]), np.array([3, 6]), 2)
    assert layer.shapes() == {"weights": (18,)} and layer.width(5) == 7
    assert repr(layer) == "Embedding(features=5, columns=(1, 4), num_embeddings=(3, 6), embedding_dim=(2, 2))"
    assert repr(eval(repr(layer), vars(fastbp))) == repr(layer)


def test_features_must_fit(rng):
    with pytest.raises(ValueError, match=r"Embedding\(.* takes 5 features, but the layer before it gives 4"):
        fastbp.Sequential([fastbp.Dense(3, 4), fastbp.Embedding(**SIZES)])
    with pytest.raises(
        ValueError, match=r"Dense\(inputs=5, neurons=3\) takes 5 features, but the layer before it gives 9"
    ):
        fastbp.Sequential([fastbp.Embedding(**SIZES), fastbp.Dense(5, 3)])
    with pytest.raises(ValueError, match=r"X must have shape \(rows, 5\), got \(2, 4\)"):
        model_with_embedding().predict(rng.standard_normal((2, 4)))
