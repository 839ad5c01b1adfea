"""`Sequential`: training, looking, predicting, owning layers."""

import copy
import pickle
import signal
import threading
import time

import numpy as np
import pytest

import fastbp

from .checks import (
    Bottleneck,
    assert_allclose,
    assert_array_equal,
    assert_same_parameters,
    on_host,
    parameters_of,
    slopes,
    small_data,
    small_model,
    state_of,
)
from .conftest import ENGINES


def gradient_descent(lr):
    return lambda p, g: p - lr * g


def adam(lr):
    m, v, t = {}, {}, {}

    def step(p, g):
        key = p.shape  # all parameters of the network below differ in shape
        t[key] = t.get(key, 0) + 1
        m[key] = 0.9 * m.get(key, 0) + 0.1 * g
        v[key] = 0.999 * v.get(key, 0) + 0.001 * g**2
        return p - lr * (m[key] / (1 - 0.9 ** t[key])) / (np.sqrt(v[key] / (1 - 0.999 ** t[key])) + 1e-8)

    return step


def train_in_numpy(X, y, update, *, epochs, batch, shuffle, rate, seed):
    """4-8-3 with ReLU, dropout and softmax cross-entropy; draws what fastbp documents that it draws."""
    seeds = np.random.SeedSequence(seed)
    rng = np.random.Generator(np.random.Philox(seeds))
    w1, b1 = rng.normal(0, np.sqrt(2 / 4), (4, 8)), np.zeros((1, 8))
    limit = np.sqrt(6 / (8 + 3))
    w2, b2 = rng.uniform(-limit, limit, (8, 3)), np.zeros((1, 3))
    losses, step = [], 0
    for _ in range(epochs):
        order = rng.permutation(len(X)) if shuffle else np.arange(len(X))
        total = 0
        for start in range(0, len(X), batch):
            rows = order[start : start + batch]
            x, t = X[rows], np.eye(3)[y[rows]]
            hidden = np.maximum(x @ w1 + b1, 0)
            counter = np.array([0, step, 2, 0], np.uint64)  # block, step, the layer's place
            bits = np.random.Philox(key=seeds.generate_state(2, np.uint64), counter=counter)
            mask = (np.random.Generator(bits).random(hidden.shape, np.float32) >= rate) / (1 - rate)
            z = (hidden * mask) @ w2 + b2
            z -= z.max(1, keepdims=True)
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            total -= (t * np.log(p)).sum()
            dz = (p - t) / len(rows)
            dhidden = dz @ w2.T * mask * (hidden > 0)
            gradients = x.T @ dhidden, dhidden.sum(0, keepdims=True), (hidden * mask).T @ dz, dz.sum(0, keepdims=True)
            w1, b1, w2, b2 = map(update, (w1, b1, w2, b2), gradients)
            step += 1
        losses.append(total / len(X))
    return losses, {"0.weights": w1, "0.biases": b1, "3.weights": w2, "3.biases": b2}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rate", [0.3, 1e-12])
@pytest.mark.parametrize(
    ("optimizer", "update"),
    [(lambda: fastbp.SGD(0.1), lambda: gradient_descent(0.1)), (lambda: fastbp.Adam(0.02), lambda: adam(0.02))],
    ids=["sgd", "adam"],
)
def test_fit_is_the_loop_written_in_numpy(engine, optimizer, update, rate, shuffle):
    X, y = small_data(50)
    model = small_model(engine, dropout=rate, optimizer=optimizer(), seed=11)
    assert model.fit(X, y, epochs=4, batch_size=16, shuffle=shuffle) is model
    losses, parameters = train_in_numpy(X, y, update(), epochs=4, batch=16, shuffle=shuffle, rate=rate, seed=11)
    assert_allclose(model.history["loss"], losses, rtol=1e-9)
    assert_same_parameters(model, parameters, 1e-9)


def test_one_seed_is_one_run_on_all_engines(engine, dtype):
    X, y = small_data()
    one, other = (small_model(name, dropout=0.3, dtype=dtype, seed=5) for name in (engine, "numpy"))
    assert_same_parameters(one, other, rtol=0)
    assert_array_equal(one.forward(X) == 0, other.forward(X) == 0)
    assert_array_equal(one.layers[2].mask == 0, other.layers[2].mask == 0)
    for model in (one, other):
        model.fit(X, y, epochs=3, batch_size=16)
    assert_allclose(one.history["loss"], other.history["loss"], rtol=1e-5 if dtype == np.float32 else 1e-12)
    assert one.random_state() == other.random_state()


def test_seeds(engine):
    X, y = small_data()
    same = [small_model(engine, dropout=0.1, seed=seed).fit(X, y, epochs=2) for seed in (1, 1, 2, None, None)]
    assert state_of(same[0]) == state_of(same[1])
    losses = [model.history["loss"][-1] for model in same]
    assert len(set(losses)) == 4


def test_continuing_is_one_long_fit(engine, dtype):
    X, y = small_data()
    twice, once = (small_model(engine, dropout=0.3, dtype=dtype) for _ in range(2))
    for epochs in (2, 3):
        twice.fit(X, y, epochs=epochs, batch_size=16)
    once.fit(X, y, epochs=5, batch_size=16)
    assert state_of(twice) == state_of(once)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_train_on_alike(engine, again, trained):
    X, y = small_data()
    model = small_model(engine, dropout=0.3)
    if trained:
        model.fit(X, y, epochs=2)
    before, twin = state_of(model), again(model)
    assert state_of(twin) == before
    twin.fit(X, y, epochs=2)
    assert state_of(model) == before
    assert state_of(model.fit(X, y, epochs=2)) == state_of(twin)
    assert all(layer.owner is twin for layer in twin.layers)


LOSSES = {
    "SoftmaxCrossEntropy": (fastbp.SoftmaxCrossEntropy, [], lambda y: y),
    "CategoricalCrossEntropy": (fastbp.CategoricalCrossEntropy, [fastbp.Softmax], lambda y: np.eye(3)[y]),
    "MeanSquaredError": (fastbp.MeanSquaredError, [], lambda y: np.eye(3)[y] - 0.5),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_gradients_are_slopes_and_change_nothing(engine, loss, rate):
    kind, last, targets = LOSSES[loss]
    layers = [fastbp.Dense(4, 6), fastbp.ReLU(), fastbp.Dropout(rate), Bottleneck(6, 2), fastbp.Dense(6, 3)]
    model = fastbp.Sequential(
        [*layers, *(x() for x in last)], loss=kind(), optimizer=fastbp.Adam(), engine=engine, dtype=np.float64, seed=2
    )
    X, y = small_data(9)
    y, before = targets(y), state_of(model)
    gradients = model.gradients(X, y)

    def loss_now():
        return model.gradients(X, y).loss

    assert_allclose(gradients.inputs, slopes(loss_now, X), atol=1e-8)
    for layer, found in zip(model.layers, gradients.layers, strict=True):
        assert found.keys() == layer.parameters().keys()
        for name in found:
            assert_allclose(found[name], slopes(loss_now, getattr(layer, name)), atol=1e-8)
    assert state_of(model) == before
    if not rate:
        assert gradients.loss == pytest.approx(model.evaluate(X, y)["loss"], rel=1e-12)
    with pytest.raises(AttributeError, match="call forward"):
        layers[0].output  # noqa: B018


def test_an_outside_gradient_goes_back_to_the_inputs(engine, rng):
    model = small_model(engine)
    X, dvalues = small_data(7)[0], rng.standard_normal((7, 3))
    model.forward(X)
    inputs = model.backward(dvalues)
    assert_allclose(inputs, slopes(lambda: (model.forward(X) * dvalues).sum(), X), atol=1e-8)
    first = model.layers[0]
    expected = slopes(lambda: (model.forward(X) * dvalues).sum(), first.weights)
    assert_allclose(first.dweights, expected, atol=1e-8)


def test_backward_refuses_another_shape(engine):
    model = small_model(engine)
    with pytest.raises(AttributeError, match="call forward"):
        model.backward(np.ones((7, 3)))
    model.forward(small_data(7)[0])
    with pytest.raises(ValueError, match=r"dvalues must have shape \(7, 3\), got \(7, 2\)"):
        model.backward(np.ones((7, 2)))


def test_step_moves_parameters_against_their_gradients(engine):
    model = small_model(engine, optimizer=fastbp.SGD(0.5))
    before = parameters_of(model)
    with pytest.raises(AttributeError, match="call backward"):
        model.step()
    model.forward(small_data(7)[0])
    model.backward(np.ones((7, 3)))
    gradients = {f"{i}.{name}": getattr(x, f"d{name}") for i, x in enumerate(model.layers) for name in x.parameters()}
    model.step()
    assert_same_parameters(model, {name: before[name] - 0.5 * on_host(gradients[name]) for name in before}, 1e-14)


@pytest.mark.parametrize("rows", [1, 50, 1024, 2500])
def test_predictions(engine, dtype, rows):
    X, y = small_data(rows)
    model = small_model(engine, dropout=0.5, dtype=dtype)
    w1, b1, w2, b2 = (array.astype(float) for array in parameters_of(model).values())
    logits = np.maximum(X @ w1 + b1, 0) @ w2 + b2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    tolerance = 1e-5 if dtype == np.float32 else 1e-13
    assert_allclose(model.predict_proba(X), p, rtol=tolerance)
    assert model.predict_proba(X).dtype == dtype
    assert_array_equal(model.predict(X), p.argmax(1))
    scores = model.evaluate(X, y)
    assert scores.keys() == {"loss", "accuracy"}
    assert scores["loss"] == pytest.approx(-np.log(p[np.arange(rows), y]).mean(), rel=tolerance)
    assert scores["accuracy"] == (p.argmax(1) == y).mean()


def test_predictions_of_numbers(engine):
    X, y = small_data()
    model = fastbp.Sequential([fastbp.Dense(4, 1)], loss=fastbp.MeanSquaredError(), engine=engine, dtype=np.float64)
    expected = X @ on_host(model.layers[0].weights)
    assert_allclose(model.predict(X), expected, rtol=1e-12)
    assert model.evaluate(X, y[:, None]) == {"loss": pytest.approx(((expected[:, 0] - y) ** 2).mean())}
    with pytest.raises(ValueError, match=r"MeanSquaredError\(\) is a loss for numbers: its model has no probabilities"):
        model.predict_proba(X)


def test_predicting_stores_nothing(engine):
    X, y = small_data()
    model = small_model(engine, dropout=0.5)
    before, names = state_of(model), [set(layer.__dict__) for layer in model.layers]
    for look in (model.predict, model.predict_proba, lambda X: model.evaluate(X, y)):
        look(X)
    assert state_of(model) == before
    assert [set(layer.__dict__) for layer in model.layers] == names


def test_results_are_the_callers_own(engine):
    X, _ = small_data()
    model = small_model(engine)
    first = model.predict_proba(X)
    kept = first.copy()
    model.predict_proba(X + 1)
    assert_array_equal(first, kept)


def test_after_fit_layers_say_what_to_call(engine):
    model = small_model(engine, dropout=0.1)
    model.forward(small_data()[0])
    model.fit(*small_data(), epochs=1)
    for name in ("output", "dinputs", "dweights", "inputs"):
        with pytest.raises(AttributeError, match=f"has no {name}: call (forward|backward).* to look"):
            getattr(model.layers[0], name)


def test_history_and_validation(engine):
    X, y = small_data()
    model = small_model(engine).fit(X, y, epochs=2)
    model.fit(X, y, epochs=1, validation_data=(X[:10], y[:10]))
    assert {name: len(values) for name, values in model.history.items()} == {
        "loss": 3,
        "val_loss": 1,
        "val_accuracy": 1,
    }
    scores = model.evaluate(X[:10], y[:10])
    assert model.history["val_loss"][-1] == scores["loss"] and model.history["val_accuracy"][-1] == scores["accuracy"]


def test_validation_does_not_change_training(engine):
    X, y = small_data()
    plain, watched = (small_model(engine, dropout=0.3) for _ in range(2))
    plain.fit(X, y, epochs=3)
    watched.fit(X, y, epochs=3, validation_data=(X, y))
    assert_same_parameters(plain, watched, rtol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parameters_are_views_of_one_aligned_array(engine, dtype):
    model = fastbp.Sequential([fastbp.Dense(3, 5), Bottleneck(5, 2), fastbp.Dense(5, 1)], engine=engine, dtype=dtype)
    first, last = engine.span(model.memory.parameters)
    places = {}
    for layer in model.layers:
        for name, parameter in layer.parameters().items():
            array = getattr(layer, name)
            start, stop = engine.span(array)
            assert first <= start < stop <= last and array.flags.c_contiguous and array.dtype == dtype
            assert start % 256 == 0
            places[start] = parameter.decay
    assert len(places) == 8
    assert [places[start] for start in sorted(places)] == [True] * 4 + [False] * 4


def test_defaults():
    model = fastbp.Sequential([fastbp.Dense(2, 2)])
    assert model.dtype == np.float32 and model.engine.name == "numpy" and model.history == {}
    assert isinstance(model.layers, tuple)


def test_assigned_weights_are_not_drawn_again(engine):
    given, layer = np.arange(12.0).reshape(4, 3), fastbp.Dense(4, 3)
    layer.weights = given
    model = fastbp.Sequential([layer, fastbp.Dense(3, 3)], engine=engine, seed=0)
    assert layer.weights.tolist() == given.tolist() and layer.biases.tolist() == [[0, 0, 0]]
    drawn = fastbp.Sequential([fastbp.Dense(3, 3)], engine=engine, seed=0).layers[0].weights
    assert_array_equal(model.layers[1].weights, drawn)


def test_a_layer_has_one_owner(engine):
    layer, optimizer = fastbp.Dense(3, 3), fastbp.SGD(0.1)
    model = fastbp.Sequential([layer], optimizer=optimizer, engine=engine)
    before = layer.weights.copy()
    with pytest.raises(ValueError, match=r"Dense\(.*\) belongs to another model"):
        fastbp.Sequential([layer])
    with pytest.raises(ValueError, match=r"SGD\(.*\) belongs to another model"):
        fastbp.Sequential([fastbp.Dense(3, 3)], optimizer=optimizer)
    with pytest.raises(ValueError, match=r"layers\[2\], Dense\(.*\), stands in the model twice"):
        fastbp.Sequential([again := fastbp.Dense(3, 3), fastbp.ReLU(), again])
    with pytest.raises(ValueError, match="stands in the model twice"):
        model.layers = [layer, layer]
    assert model.layers == (layer,)
    assert_array_equal(layer.weights, before)
    assert copy.deepcopy(layer).owner is None
    fastbp.Sequential([copy.deepcopy(layer)])
    model.layers = [fastbp.Dense(3, 3)]
    assert_array_equal(fastbp.Sequential([layer], engine=engine).layers[0].weights, before)


def test_layers_that_stay_keep_their_values(engine):
    X, y = small_data()
    model = small_model(engine).fit(X, y, epochs=1)
    kept = model.layers[0].weights.copy()
    model.layers = (*model.layers[:2], fastbp.Dense(8, 5), fastbp.Dense(5, 3))
    assert_array_equal(model.layers[0].weights, kept)
    model.fit(X, y, epochs=1)
    model.memory.parameters[...] = 7
    assert (model.layers[0].weights == 7).all()


def test_layers_take_the_models_engine(engine):
    layer, dropout = fastbp.Dense(2, 2, engine="numpy"), fastbp.Dropout(0.1, engine="numpy")
    model = fastbp.Sequential([layer, dropout], engine=engine)
    assert layer.engine is dropout.engine is model.engine is engine


@pytest.mark.parametrize("lr", [1e30, 1e12])
def test_a_loss_that_is_not_finite_takes_the_weights_back(engine, lr):
    X, y = small_data(64, np.float32)
    layers = [fastbp.Dense(4, 8), fastbp.ReLU(), fastbp.Dropout(0.1), fastbp.Dense(8, 1)]
    model = fastbp.Sequential(
        layers, loss=fastbp.MeanSquaredError(), optimizer=fastbp.SGD(0.01, momentum=0.9), engine=engine, seed=0
    ).fit(X, y[:, None], epochs=2)
    before = state_of(model)
    model.optimizer.lr = lr
    with pytest.raises(
        FloatingPointError, match=r"the loss became (inf|nan) in epoch 3, between the steps \d+ and \d+"
    ):
        model.fit(X, y[:, None], epochs=50, batch_size=8)
    after = state_of(model)
    settled = {"history", "random", "rate"}
    assert {k: v for k, v in after.items() if k not in settled} == {k: v for k, v in before.items() if k not in settled}
    model.optimizer.lr = 0.01
    assert np.isfinite(model.fit(X, y[:, None], epochs=1).history["loss"]).all()


@pytest.fixture
def ctrl_c():
    """Ctrl-C after a while, also where the tests run in the background, which ignores it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    yield timer.start
    timer.cancel()
    signal.signal(signal.SIGINT, handler)


def test_ctrl_c_leaves_a_usable_model(engine, ctrl_c):
    X, y = small_data()
    model = small_model(engine).fit(X, y, batch_size=1)  # so that what is compiled first is there
    start = time.monotonic()
    ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y, epochs=10**7, batch_size=1)
    assert time.monotonic() - start < 2
    epochs = len(model.history["loss"])
    model.fit(X, y, epochs=2, validation_data=(X, y))
    assert len(model.history["loss"]) == epochs + 2
    assert np.isfinite(model.predict_proba(X)).all()
    pickle.loads(pickle.dumps(model)).fit(X, y, epochs=1)


def tables(tmp_path):
    """One table of whole numbers in many guises."""
    X = np.random.default_rng(3).integers(0, 100, (40, 4))
    mapped = np.memmap(tmp_path / "X", np.float64, "w+", shape=X.shape)
    mapped[...] = X
    wide = np.zeros((80, 12), np.int16)
    wide[::2, 1::3] = X
    read_only = X.astype(np.float32)
    read_only.setflags(write=False)
    return X.astype(np.float32), {
        "uint8": X.astype(np.uint8),
        "int64": X,
        "float16": X.astype(np.float16),
        "float64": X.astype(np.float64),
        "longdouble": X.astype(np.longdouble),
        "big-endian": X.astype(">f4"),
        "memmap": mapped,
        "read-only": read_only,
        "transposed": np.asfortranarray(X.astype(np.float32)),
        "sliced": wide[::2, 1::3],
        "reversed": X[::-1, ::-1].astype(np.float32)[::-1, ::-1],
        "list": X.tolist(),
        "unaligned": np.frombuffer(b"\0" + X.astype(np.float32).tobytes(), np.uint8)[1:]
        .view(np.float32)
        .reshape(40, 4),
    }


TABLES = "uint8 int64 float16 float64 longdouble big-endian memmap read-only transposed sliced reversed list unaligned"


@pytest.mark.parametrize("kind", TABLES.split())
def test_any_kind_of_table_trains_alike(engine, kind, tmp_path):
    plain, guises = tables(tmp_path)
    X, y = guises[kind], plain[:, 0].astype(int) % 3
    before = np.array(X)
    models = [small_model(engine, dropout=0.2, dtype=np.float32).fit(x, y, epochs=2, batch_size=7) for x in (plain, X)]
    assert state_of(models[0]) == state_of(models[1])
    assert_array_equal(models[0].predict_proba(plain), models[1].predict_proba(X))
    assert models[0].evaluate(plain, y) == models[1].evaluate(X, y)
    for ours, theirs in zip(models[0].gradients(plain, y), models[1].gradients(X, y), strict=True):
        assert str(ours) == str(theirs)
    assert_array_equal(before, X)


@pytest.mark.parametrize("kind", ["uint8", "float64", "list", "transposed", "sliced", "big-endian"])
def test_any_kind_of_numbers_to_fit(engine, kind, tmp_path):
    plain, guises = tables(tmp_path)
    models = []
    for y in (plain, guises[kind]):
        layers, loss = [fastbp.Dense(4, 4)], fastbp.MeanSquaredError()
        model = fastbp.Sequential(layers, loss=loss, optimizer=fastbp.SGD(1e-5), engine=engine, seed=0)
        models.append(state_of(model.fit(plain, y, epochs=2, batch_size=7)))
    assert models[0] == models[1]


@pytest.mark.parametrize("kind", ["list", "uint8", "float64", "bool rows", "one-hot", "one-hot list"])
def test_any_kind_of_labels(engine, kind):
    X, y = small_data()
    guise = {
        "list": y.tolist(),
        "uint8": y.astype(np.uint8),
        "float64": y.astype(float),
        "bool rows": np.eye(3, dtype=bool)[y],
        "one-hot": np.eye(3)[y],
        "one-hot list": np.eye(3)[y].tolist(),
    }[kind]
    models = [state_of(small_model(engine).fit(X, labels, epochs=2)) for labels in (y, guise)]
    assert models[0] == models[1]


def test_data_frames_and_tensors(engine):
    pandas = pytest.importorskip("pandas")
    X, y = small_data()
    expected = state_of(small_model(engine).fit(X, y, epochs=1))
    frame = pandas.DataFrame(X, columns=list("abcd"))
    assert state_of(small_model(engine).fit(frame, pandas.Series(y), epochs=1)) == expected
    torch = pytest.importorskip("torch")
    assert state_of(small_model(engine).fit(torch.tensor(X), torch.tensor(y), epochs=1)) == expected


@pytest.mark.parametrize("pair", [(a, b) for a in ENGINES for b in ENGINES], ids="-".join)
def test_two_models_in_two_threads_train_as_alone(pair):
    X, y = small_data(400)

    def train(name, seed, results):
        model = small_model(name, dropout=0.2, seed=seed)
        results[seed] = state_of(model.fit(X, y, epochs=20, batch_size=32, validation_data=(X, y)))

    alone, together = {}, {}
    for seed, name in enumerate(pair):
        train(name, seed, alone)
    threads = [threading.Thread(target=train, args=(name, seed, together)) for seed, name in enumerate(pair)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_threads_that_predict_with_one_model(engine):
    X, _ = small_data(300)
    model = small_model(engine)
    expected = [model.predict_proba(X[: 10 * n]) for n in range(1, 31)]
    wrong = []

    def look():
        for _ in range(5):
            for n, right in enumerate(expected, 1):
                if not np.array_equal(model.predict_proba(X[: 10 * n]), right):
                    wrong.append(n)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_blas_threads_may_be_limited(engine):
    pytest.importorskip("threadpoolctl")
    X, y = small_data()
    limited, free = small_model(engine, threads=1).fit(X, y, epochs=2), small_model(engine).fit(X, y, epochs=2)
    assert_same_parameters(limited, free)


def test_quiet_unless_asked(engine, capsys):
    X, y = small_data()
    model = small_model(engine).fit(X, y, epochs=2)
    assert capsys.readouterr() == ("", "")
    pytest.importorskip("tqdm")
    model.fit(X, y, epochs=3, verbose=True, validation_data=(X, y))
    shown = capsys.readouterr()
    assert shown.out == "" and "3/3" in shown.err and "loss=" in shown.err and "val_accuracy=" in shown.err
    model.fit(X, y, epochs=1, verbose=False)
    assert capsys.readouterr() == ("", "")


def test_summary_and_repr(engine):
    model = small_model(engine, dropout=0.5, dtype=np.float32)
    lines = model.summary().splitlines()
    assert [line.split()[-1] for line in lines[:-1]] == ["40", "0", "0", "27"]
    for part in ("67 parameters", "float32", f"engine {engine.name}", "SoftmaxCrossEntropy()", "Adam(lr=0.01"):
        assert part in lines[-1]
    assert repr(model).startswith("Sequential([Dense(inputs=4, neurons=8), ReLU(), Dropout(rate=0.5), Dense(")


def test_spirals_are_learned(engine):
    X, y = fastbp.spiral_data(500, 3, noise=0.1, seed=0)
    layers = [fastbp.Dense(2, 64), fastbp.ReLU(), fastbp.Dense(64, 3)]
    loss, optimizer = fastbp.SoftmaxCrossEntropy(), fastbp.Adam(0.01, schedule=fastbp.CosineAnnealingLR(400))
    model = fastbp.Sequential(layers, loss=loss, optimizer=optimizer, engine=engine, seed=0).fit(X, y, epochs=400)
    assert model.evaluate(*fastbp.spiral_data(300, 3, noise=0.1, seed=1))["accuracy"] > 0.95
