"""Other libraries' arrays, in and out."""

import numpy as np
import pytest

import fastbp
from fastbp.boundary import as_features

from .checks import assert_allclose, assert_array_equal, small_data, small_model, state_of

X, Y = small_data(20, np.float32)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def sparse():
    return pytest.importorskip("scipy.sparse")


def frames(name):
    """Makers of the table X, by name, from a library that may be missing."""
    columns = dict(zip("abcd", X.T, strict=True))
    library = pytest.importorskip(name.split()[0])
    return {
        "pandas": lambda: library.DataFrame(columns),
        "pandas nullable": lambda: library.DataFrame(columns).convert_dtypes(),
        "polars": lambda: library.DataFrame(columns),
        "pyarrow": lambda: library.table(columns),
        "pyarrow batch": lambda: library.RecordBatch.from_pydict({k: v.copy() for k, v in columns.items()}),
        "torch": lambda: library.tensor(X),
        "torch strided": lambda: library.tensor(X.T.copy()).T,
        "jax": lambda: library.numpy.asarray(X),
    }[name]()


def test_a_tensor_that_is_negated_when_it_is_read(torch):
    z = torch.complex(torch.tensor(X), torch.tensor(-X))
    lazily = z.conj().imag
    assert lazily.is_neg()
    model = small_model()
    assert_array_equal(model.predict_proba(lazily), model.predict_proba(X))


@pytest.mark.parametrize("kind", ["csr_array", "csc_array", "bsr_array", "csr_matrix"])
@pytest.mark.parametrize("index", [10**6, -7])
@pytest.mark.parametrize("use", ["fit", "train_on_batch", "predict", "forward", "gradients", "batches", "evaluate"])
def test_sparse_indices_that_lead_outside(sparse, kind, index, use):
    table, model = getattr(sparse, kind)(X), small_model()
    table.indices[0] = index
    before = state_of(model)
    arguments = {"predict": (table,), "forward": (table,), "batches": ([(table, Y)],)}.get(use, (table, Y))
    with pytest.raises(ValueError, match="X is a sparse matrix of a wrong format: "):
        getattr(model, "fit" if use == "batches" else use)(*arguments)
    assert state_of(model) == before


TENSORS = "torch", "torch strided", "jax"
FRAMES = "pandas", "pandas nullable", "polars", "pyarrow", "pyarrow batch"


@pytest.mark.parametrize("name", [*TENSORS, *FRAMES])
def test_results_come_back_in_the_kind_given(engine, name):
    model = small_model(engine, dtype=np.float32).fit(X, Y, epochs=2)
    given = frames(name)
    kind = type(given) if name in TENSORS else np.ndarray
    for method in ("predict", "predict_proba", "forward"):
        result, expected = getattr(model, method)(given), getattr(model, method)(X)
        assert isinstance(result, kind)
        assert_array_equal(np.asarray(result), expected)
    found, expected = model.gradients(given, Y), model.gradients(X, Y)
    assert isinstance(found.inputs, kind) and isinstance(found.layers[0]["weights"], kind)
    assert_array_equal(np.asarray(found.inputs), expected.inputs)
    slope = model.backward(model.forward(given))
    assert isinstance(slope, kind) and slope.shape == X.shape


@pytest.mark.parametrize("name", [*TENSORS, *FRAMES])
def test_each_kind_trains_to_the_same_bits(engine, name):
    ours, theirs = (small_model(engine, dtype=np.float32) for _ in range(2))
    ours.fit(X, Y, epochs=2)
    given = frames(name)
    labels = given.new_tensor(Y) if name.startswith("torch") else Y
    assert state_of(theirs.fit(given, labels, epochs=2)) == state_of(ours)


@pytest.mark.parametrize("name", ["pandas", "polars", "pyarrow"])
def test_columns_of_labels(engine, name):
    library = pytest.importorskip(name)
    make = {"pandas": "Series", "polars": "Series", "pyarrow": "array"}[name]
    labels = getattr(library, make)(Y.tolist())
    ours, theirs = (small_model(engine) for _ in range(2))
    assert state_of(ours.fit(X, Y, epochs=1)) == state_of(theirs.fit(X, labels, epochs=1))


def test_a_missing_value_in_a_frame_is_named(engine):
    rows = {"a": [1.0, None], "b": [1.0, 2.0], "c": [1, 2], "d": [1, 2]}
    for name, make in {"pandas": "DataFrame", "polars": "DataFrame", "pyarrow": "table"}.items():
        library = pytest.importorskip(name)
        with pytest.raises(ValueError, match=r"X must hold (finite|real)"):
            small_model(engine).fit(getattr(library, make)(rows), [0, 1])


def test_tensors_are_read_where_they_lie(torch):
    for tensor in (torch.tensor(X), torch.tensor(X)[::2, 1:], torch.tensor(X.T.copy()).T, torch.tensor(X).double()):
        assert np.shares_memory(as_features(tensor, None), tensor.numpy())


def test_results_lie_where_fastbp_wrote_them(cpu_engine, torch):
    model = small_model(cpu_engine, dtype=np.float32)
    result = model.forward(torch.tensor(X))
    assert np.shares_memory(result.numpy(), model.layers[-1].output)
    weights = torch.from_dlpack(model.layers[0].weights)
    weights += 1
    assert_array_equal(weights.numpy(), model.layers[0].weights)


def test_tensors_that_cannot_be_read_say_why(engine, torch):
    model = small_model(engine)
    for tensor, match in {
        torch.tensor(X, requires_grad=True): "X must be an array of numbers, got Tensor: .*grad",
        torch.tensor(X).to(torch.bfloat16): "X must be an array of numbers, got Tensor: .*",
        torch.tensor(X).to_sparse(): "X must be an array of numbers, got Tensor: .*",
        torch.tensor(X).to(torch.complex64): "X must hold real numbers, got dtype complex64",
    }.items():
        with pytest.raises(ValueError, match=match):
            model.fit(tensor, Y)


@pytest.mark.parametrize("form", ["csr_array", "csc_matrix", "coo_array", "bsr_matrix"])
@pytest.mark.parametrize("schedule", [None, "cosine"])
def test_sparse_rows_train_to_the_bits_of_dense_ones(engine, dtype, sparse, form, schedule):
    rows = np.where(np.abs(X) > 0.7, X, 0).astype(dtype)
    weights = np.linspace(0, 1, len(rows))

    def trained(table):
        rates = fastbp.CosineAnnealingLR(3) if schedule else None
        optimizer = fastbp.Adam(0.01, schedule=rates)
        model = small_model(engine, dropout=0.2, dtype=dtype, optimizer=optimizer)
        model.fit(table, Y, epochs=2, batch_size=7, sample_weight=weights, validation_data=(table, Y))
        model.fit(table, Y, epochs=2, batch_size=3, accumulate=2, shuffle=False)
        model.train_on_batch(table, Y, epoch=1.5)
        return model

    table = getattr(sparse, form)(rows)
    ours, theirs = trained(rows), trained(table)
    assert state_of(ours) == state_of(theirs)
    for method in ("predict", "predict_proba", "forward"):
        result = getattr(theirs, method)(table)
        assert type(result) is np.ndarray
        assert_array_equal(result, getattr(ours, method)(rows))
    assert_array_equal(theirs.gradients(table, Y).inputs, ours.gradients(rows, Y).inputs)
    assert (table != getattr(sparse, form)(rows)).nnz == 0


def test_a_column_of_no_numbers_is_named():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"age": [1.0, 2.0], "city": pandas.Categorical(["Oslo", "Rome"])})
    with pytest.raises(TypeError, match="X must hold real numbers, got dtype object, because column 'city' holds cat"):
        small_model().fit(frame, [0, 1])
    with pytest.raises(ValueError, match=r"outputs, \(2, 1\), got \(2,\); use numpy.reshape\(y, \(-1, 1\)\)$"):
        fastbp.Sequential([fastbp.Dense(2, 1)], loss=fastbp.MeanSquaredError()).evaluate(np.eye(2), frame["age"])


@pytest.mark.parametrize("first", ["dense", "alone", "other", "own"])
def test_sparse_rows_are_predicted_as_dense_ones(engine, dtype, sparse, first, rng, monkeypatch):
    """Where SciPy multiplies, and where they are made dense, in pieces."""

    class Own(fastbp.Dense):
        def forward(self, inputs):
            return super().forward(self.engine.scale(inputs, self.engine.scalar(2.0)))

    monkeypatch.setattr("fastbp.model.PREDICT_NUMBERS", (200, 500))
    monkeypatch.setattr("fastbp.model.FEW", 5)
    monkeypatch.setattr("fastbp.model.WIDE", 40)
    table = sparse.random(83, 40, 0.2, format="csr", random_state=0)
    layers = {
        "dense": [fastbp.Dense(40, 7), fastbp.ReLU(), fastbp.Dense(7, 3)],
        "alone": [fastbp.Dense(40, 3)],
        "other": [fastbp.LayerNorm(40), fastbp.Dense(40, 3)],
        "own": [Own(40, 3)],
    }[first]
    model = fastbp.Sequential(layers, loss=fastbp.SoftmaxCrossEntropy(), engine=engine, seed=0, dtype=dtype)
    model.layers[-1].biases = rng.standard_normal((1, 3))
    expected = model.predict_proba(table.toarray())
    for form in (table, table.tocsc(), sparse.csr_array(table).astype(np.float32)):
        result = model.predict_proba(form)
        assert isinstance(result, np.ndarray) and result.dtype == dtype
        exact = dtype == form.dtype == np.float64
        np.testing.assert_allclose(result, expected, rtol=1e-12 if exact else 1e-5)
    assert model.evaluate(table, np.arange(83) % 3)["loss"] == pytest.approx(
        model.evaluate(table.toarray(), np.arange(83) % 3)["loss"], rel=1e-5
    )


def test_batches_may_be_sparse(engine, sparse):
    batches = [(X[:9], Y[:9]), (X[9:], Y[9:])]
    ours = small_model(engine).fit(batches, epochs=2)
    assert state_of(small_model(engine).fit([(sparse.csr_array(x), y) for x, y in batches], epochs=2)) == state_of(ours)


def wide_rows(sparse, dtype):
    """30 rows of 1,100 features: one empty, one full, one with a column stored twice, and an explicit zero."""
    rng = np.random.default_rng(3)
    rows = np.where(rng.random((30, 1100)) < 0.03, rng.standard_normal((30, 1100)), 0)
    rows[4], rows[5] = 0, rng.standard_normal(1100) / 30
    table = sparse.csr_array(rows.astype(dtype))
    table.data[0] = 0
    first = table.indptr[7]
    table.indices[first + 1] = table.indices[first]
    table.has_canonical_format = False
    return table


@pytest.mark.parametrize("first", ["dense", "norm", "dropout", "residual"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_wide_sparse_rows_train_as_dense_ones(engine, dtype, sparse, first, accumulate):
    table, y = wide_rows(sparse, dtype), np.arange(30) % 3
    before = [array.copy() for array in (table.data, table.indices, table.indptr)]
    layers = {
        "dense": lambda: [fastbp.Dense(1100, 7)],
        "norm": lambda: [fastbp.LayerNorm(1100), fastbp.Dense(1100, 7)],
        "dropout": lambda: [fastbp.Dropout(0.2), fastbp.Dense(1100, 7)],
        "residual": lambda: [fastbp.Residual([fastbp.Dense(1100, 1100)]), fastbp.Dense(1100, 7)],
    }[first]

    def trained(rows):
        model = fastbp.Sequential(
            [*layers(), fastbp.ReLU(), fastbp.Dense(7, 3)],
            loss=fastbp.SoftmaxCrossEntropy(),
            optimizer=fastbp.SGD(0.1, momentum=0.9, weight_decay=0.01),
            engine=engine,
            dtype=dtype,
            seed=0,
        )
        model.fit(rows, y, epochs=2, batch_size=7, accumulate=accumulate, sample_weight=np.linspace(0.1, 1, 30))
        model.fit([(rows[:12], y[:12]), (rows[12:], y[12:])])
        model.train_on_batch(rows[3:6], y[3:6])
        return model

    ours, theirs = trained(table.toarray()), trained(table)
    rtol = 1e-4 if dtype == np.float32 else 1e-11
    for expected, found in zip(ours.layers, theirs.layers, strict=True):
        for name in expected.parameters():
            expected_array, array = (engine.asnumpy(getattr(layer, name)) for layer in (expected, found))
            np.testing.assert_allclose(array, expected_array, rtol=rtol, atol=rtol * np.abs(expected_array).max())
    assert theirs.history["loss"] == pytest.approx(ours.history["loss"], rel=rtol)
    for array, was in zip((table.data, table.indices, table.indptr), before, strict=True):
        assert_array_equal(array, was)


def test_rows_that_store_nothing(engine, sparse):
    for features in (5, 1100):
        model = fastbp.Sequential(
            [fastbp.Dense(features, 2)], loss=fastbp.MeanSquaredError(), optimizer=fastbp.SGD(0.5), engine=engine
        )
        weights = engine.asnumpy(model.layers[0].weights).copy()
        model.fit(sparse.csr_array((4, features)), np.ones((4, 2)), epochs=1)
        assert_array_equal(engine.asnumpy(model.layers[0].weights), weights)
        assert_allclose(engine.asnumpy(model.layers[0].biases), np.full((1, 2), 0.5), rtol=1e-6)


def test_sparse_codes_for_an_embedding(engine, sparse):
    codes = np.array([[0, 1.5], [2, 0], [1, 0], [0, -1]])

    def model():
        layers = [fastbp.Embedding(2, columns=[0], num_embeddings=[3], embedding_dim=[2]), fastbp.Dense(3, 2)]
        return fastbp.Sequential(
            layers, loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.SGD(0.1), engine=engine, seed=0
        )

    y = [0, 1, 1, 0]
    for form in (sparse.csr_array, sparse.csr_matrix):
        assert state_of(model().fit(form(codes), y)) == state_of(model().fit(codes, y))
        with pytest.raises(ValueError, match="X must hold codes, whole numbers from 0 to 2, in column 0; got 7"):
            model().fit(form(7 * (codes == 1) + codes * (codes != 1)), y)


def test_bad_sparse_rows(engine, sparse):
    model = small_model(engine)
    before = state_of(model)
    for table, match in [
        (sparse.csr_array(np.where(X > 1, np.nan, X)), r"X(.data)? must hold finite"),
        (sparse.csr_array(X[:, :3]), r"X must have shape \(rows, 4\), got \(20, 3\)"),
        (sparse.csr_array(X[:0]), r"X must have shape \(rows, 4\), got \(0, 4\)"),
        (sparse.csr_array(X + 1j), "X must hold real numbers, got dtype complex"),
    ]:
        for use in (lambda table: model.fit(table, Y), model.predict, model.forward):
            with pytest.raises(ValueError, match=match):
                use(table)
    with pytest.raises(ValueError, match="y must hold real numbers"):
        model.fit(X, sparse.csr_array(np.eye(3)[Y]))
    assert state_of(model) == before


@pytest.mark.parametrize("which", ["plain", "norms"])
def test_weights_shared_with_torch(cpu_engine, torch, which):
    norms = [fastbp.LayerNorm(8), fastbp.BatchNorm(8)] if which == "norms" else []
    model = fastbp.Sequential(
        [fastbp.Dense(4, 8), *norms, fastbp.ReLU(), fastbp.Dense(8, 3)],
        loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.SGD(0.1), engine=cpu_engine, dtype=np.float64, seed=0,
    )  # fmt: skip
    module = fastbp.to_torch(model, share=True)
    x, y = torch.tensor(X.astype(np.float64)), torch.tensor(Y)
    # a step of ours is seen there, and one of theirs here
    model.fit(X, Y, epochs=1)
    module.eval()
    with torch.no_grad():
        assert_allclose(module(x).softmax(1).numpy(), model.predict_proba(X), rtol=1e-9)
    module.train()
    before = model.layers[0].weights.copy()
    torch.nn.functional.cross_entropy(module(x), y).backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert (model.layers[0].weights != before).any()
    module.eval()
    with torch.no_grad():
        assert_allclose(module(x).softmax(1).numpy(), model.predict_proba(X), rtol=1e-9)
    for part in module.parameters():
        assert np.shares_memory(part.detach().numpy(), model.memory.parameters)


def test_statistics_that_cannot_be_shared(engine, torch):
    model = fastbp.Sequential([fastbp.Dense(2, 3), fastbp.BatchNorm(3)], engine=engine, seed=0)
    with pytest.raises(ValueError, match="running_mean is float64; share=True needs a model of that dtype"):
        fastbp.to_torch(model, share=True)
    fastbp.to_torch(model)
