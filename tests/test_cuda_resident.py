"""Data that lies on a GPU already, on the stand-in: it is checked, trained on and predicted from where it is."""

import numpy as np
import pytest

import fastbp

from .checks import on_host, small_data, small_model, state_of
from .cuda import standin

pytestmark = pytest.mark.skipif(standin.COMPILER is None, reason="needs g++")
REPLAY = standin.replay_module()

ROWS = 50
X, Y = small_data(ROWS)
X *= 10
WEIGHTS = np.linspace(0.5, 2, ROWS)


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(REPLAY, "blocks_for", lambda *_: [])
    return standin.engine_on_host()


class Tensor:
    """Of another library, on a GPU; one of None cannot be read."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **_):
        if self.array is None:
            raise BufferError("it needs a gradient")
        return self.array


def plain(x):
    return standin.asarray(x)


def tensor(x):
    return Tensor(plain(x))


def by_columns(x):
    return plain(x.T.copy()).T


def part(x):
    wide = standin.zeros((2 * ROWS, 7), x.dtype)
    wide[::2, 1:5] = plain(x)
    return wide[::2, 1:5]


@pytest.fixture
def stays(monkeypatch):
    """Tells of a table that nobody may copy it to the host."""

    def watch(x):
        array = getattr(x, "array", x)._array
        get = standin.ndarray.get

        def watched(self):
            assert not np.shares_memory(self._array, array)
            return get(self)

        monkeypatch.setattr(standin.ndarray, "get", watched)
        return x

    return watch


@pytest.mark.parametrize("place", [plain, tensor, by_columns, part])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8", "uint16", "bool"])
def test_it_gives_the_same_bits_and_stays(engine, place, dtype, stays):
    def used(X, y, weights):
        model = small_model(engine)
        model.fit(X, y, epochs=2, batch_size=8, sample_weight=weights, validation_data=(X, y, weights))
        model.train_on_batch(X, y)
        found = model.predict(X), model.predict_proba(X), model.forward(X), model.gradients(X, y).inputs
        return state_of(model), [on_host(x).tobytes() for x in found], model.evaluate(X, y)

    x, small = X.astype(dtype), tensor if place is tensor else plain
    expected = used(x, Y, WEIGHTS)
    assert used(stays(place(x)), small(Y), small(WEIGHTS)) == expected


@pytest.mark.parametrize("place", [plain, tensor])
def test_a_table_is_read_where_it_lies(engine, place):
    x = place(X)
    array = getattr(x, "array", x)
    assert engine.table(x).data.ptr == engine.asarray(x).data.ptr == array.data.ptr
    assert engine.resident(X) is None and engine.resident([1.0]) is None
    assert fastbp.engine("numpy").resident(array) is None


def test_it_does_not_come_by_pieces_where_the_gpu_is_full(engine, monkeypatch):
    monkeypatch.setattr(standin.engine_module(), "PIECE_BYTES", 400)
    monkeypatch.setattr(standin, "free", {"device": 0, "pool": 0})
    monkeypatch.setattr(type(engine), "ahead", None)
    expected = small_model("numpy").fit(X, Y, epochs=2).history["loss"]
    assert small_model(engine).fit(engine.asarray(X), Y, epochs=2).history["loss"] == pytest.approx(expected)


def test_results_are_of_the_gpu_too(engine):
    model, x = small_model(engine), engine.asarray(X)
    for result in (model.forward(x), model.gradients(x, Y).inputs, model.backward(model.forward(x))):
        assert engine.owns(result)


@pytest.mark.parametrize("place", [plain, tensor, by_columns, part])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_as_on_the_host(engine, place, dtype, bad):
    x, model = X.astype(dtype), small_model(engine)
    x[[7, 31], [2, 0]] = bad
    before = state_of(model)
    for use in (model.predict, model.forward, lambda x: model.fit(x, Y), lambda x: model.train_on_batch(x, Y)):
        with pytest.raises(ValueError) as expected:
            use(x)
        assert f"X must hold finite float64 numbers, got {bad} at (7, 2)" == str(expected.value)
        with pytest.raises(ValueError) as found:
            use(place(x))
        assert str(found.value) == str(expected.value)
    assert state_of(model) == before


def test_numbers_too_large_for_the_model(engine):
    x = X.copy()
    x[3, 1] = 1e39
    with pytest.raises(ValueError, match=r"X must hold finite float32 numbers, got 1e\+39 at \(3, 1\)"):
        small_model(engine, dtype=np.float32).fit(engine.asarray(x), Y)


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (lambda: plain(X[:, :3]), lambda: Y, r"X must have shape \(rows, 4\), got \(50, 3\)"),
        (lambda: plain(X[0]), lambda: Y, r"X must have shape .*; a single row is X.reshape\(1, -1\)"),
        (lambda: plain(X[:0]), lambda: Y[:0], r"X must have shape \(rows, 4\), got \(0, 4\)"),
        (lambda: standin.ndarray(X + 1j), lambda: Y, "X must hold real numbers, got dtype complex128"),
        (lambda: Tensor(standin.ndarray(X + 1j)), lambda: Y, "X must be an array of numbers, got Tensor: "),
        (lambda: Tensor(None), lambda: Y, "X must be an array of numbers, got Tensor: it needs a gradient"),
        (lambda: plain(X), lambda: plain(Y + 1), "y must hold labels from 0 to 2, got 3"),
        (lambda: plain(X), lambda: Tensor(None), "y must be an array of numbers, got Tensor: it needs a gradient"),
    ],
)
def test_what_does_not_fit_is_named(engine, x, y, match):
    model = small_model(engine)
    before = state_of(model)
    with pytest.raises(ValueError, match=match):
        model.fit(x(), y())
    assert state_of(model) == before


def test_of_a_table_with_codes_only_these_are_looked_at_on_the_host(engine):
    x = X.copy()
    x[:, 1] = Y

    def model(engine):
        layers = [fastbp.Embedding(4, columns=[1], num_embeddings=[3], embedding_dim=[2]), fastbp.Dense(5, 3)]
        return fastbp.Sequential(
            layers, loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.SGD(0.1), engine=engine, seed=0
        )

    expected = model("numpy").fit(x, Y, epochs=1).history["loss"]
    standin.copied.clear()
    assert model(engine).fit(engine.asarray(x), Y, epochs=1).history["loss"] == pytest.approx(expected)
    assert max(standin.copied) < x.nbytes / 2
    x[9, 1] = 1.5
    with pytest.raises(
        ValueError, match=r"X must hold codes, whole numbers from 0 to 2, in column 1; got 1\.5 in row 9"
    ):
        model(engine).predict(engine.asarray(x))


def elsewhere(x):
    """On another GPU."""
    return standin.ndarray(x.copy(), 1)


@pytest.mark.parametrize(
    "place", [elsewhere, lambda x: Tensor(elsewhere(x)), lambda x: standin.ndarray(x.repeat(2, axis=0)[::2], 1)]
)
def test_what_lies_on_another_gpu_is_fetched_from_there(engine, place):
    model, expected = small_model(engine), small_model(engine)
    assert state_of(model.fit(place(X), place(Y))) == state_of(expected.fit(X, Y))
    assert np.array_equal(model.predict(place(X)), expected.predict(X))
    assert engine.owns(engine.asarray(place(X))) and engine.owns(engine.table(place(X)))
    assert np.array_equal(engine.relu_forward(place(X)).get(), np.maximum(X, 0))
    with pytest.raises(TypeError, match="relu_forward: y must be a writeable C-contiguous float64 array"):
        engine.relu_forward(X, out=elsewhere(X))


class Negated(Tensor):
    """As torch has it: to be negated when it is read."""

    def resolve_neg(self):
        return Tensor(plain(-self.array.get()))


def test_what_torch_negates_when_it_is_read_is_read_right(engine):
    assert np.array_equal(engine.asarray(Negated(plain(X))).get(), -X)
    model = small_model(engine)
    assert np.array_equal(model.predict(Negated(plain(X))), model.predict(-X))


class Nowhere(Tensor):
    """As torch has it: without memory."""

    def __dlpack_device__(self):
        raise ValueError("Unknown device type meta for Dlpack")


def test_what_is_nowhere_is_named(engine):
    with pytest.raises(TypeError, match="X must be an array of numbers, got Nowhere: "):
        small_model(engine).predict(Nowhere(None))
