"""Recording runs nothing and lets nothing by; replaying computes what calling the layers one by one computes."""

import copy
import math
import tracemalloc

import numpy as np
import pytest

import fastbp
from fastbp.steps import record_training
from fastbp.tape import Recorder

from .checks import (
    Bottleneck,
    assert_allclose,
    assert_same_parameters,
    on_host,
    parameters_of,
    small_data,
    small_model,
    state_of,
)

LEAKS = {
    "product": lambda self, x: x * 0.5,
    "reversed product": lambda self, x: 0.5 * x,
    "array product": lambda self, x: np.float32(0.5) * x,
    "matrix product": lambda self, x: x @ np.ones((4, 4)),
    "tanh": lambda self, x: np.tanh(x),
    "numpy sum": lambda self, x: np.sum(x),
    "numpy dot": lambda self, x: np.dot(x, x),
    "numpy where": lambda self, x: np.where(x, x, 0),
    "numpy concatenate": lambda self, x: np.concatenate([x, x]),
    "numpy array": lambda self, x: np.array([x, x]),
    "numpy einsum": lambda self, x: np.einsum("ij->ij", x),
    "numpy asarray": lambda self, x: np.asarray(x),
    "numpy zeros_like": lambda self, x: np.zeros_like(x),
    "branch on max": lambda self, x: x if x.max() > 0 else self.engine.relu_forward(x),
    "branch on comparison": lambda self, x: x if x > 0 else self.engine.relu_forward(x),
    "branch on equality": lambda self, x: x if x == 0 else self.engine.relu_forward(x),
    "branch on inequality": lambda self, x: x if x != 0 else self.engine.relu_forward(x),
    "truth": lambda self, x: x if x else self.engine.relu_forward(x),
    "containment": lambda self, x: x if 0 in x else self.engine.relu_forward(x),
    "constant array": lambda self, x: self.engine.relu_backward(x, np.ones(x.shape)),
    "constant array alone": lambda self, x: self.engine.relu_forward(np.ones(x.shape)),
    "field that is no state": lambda self, x: self.engine.relu_backward(x, self.table),
    "output that is an array": lambda self, x: np.ones(x.shape),
    "output that is nothing": lambda self, x: None,
    "allocation": lambda self, x: self.engine.zeros(x.shape, x.dtype),
    "Python float": lambda self, x: self.engine.relu_backward(x, 0.5),
    "Python float for a scalar": lambda self, x: self.engine.dropout_forward(x, 0.5, self.key)[0],
    "float of": lambda self, x: self.engine.scalar(float(x)) and x,
    "math": lambda self, x: math.sqrt(x),
    "length": lambda self, x: self.engine.scalar(len(x)) and x,
    "iteration": lambda self, x: list(x),
    "unpacking": lambda self, x: next(iter([*x])),
    "element": lambda self, x: x[0],
    "assignment": lambda self, x: x.__setitem__(0, 1) or x,
    "transpose": lambda self, x: x.T,
    "method": lambda self, x: x.sum(axis=0),
    "copy": lambda self, x: x.copy(),
    "negation": lambda self, x: -x,
    "integer division": lambda self, x: x // 2,
    "out": lambda self, x: self.engine.relu_forward(x, out=np.ones(x.shape)),
    "too few arguments": lambda self, x: self.engine.relu_backward(x),
    "unknown op": lambda self, x: self.engine.sine_forward(x),
}


def in_place(self, x):
    x *= 0.5
    return x


def in_place_sum(self, x):
    x += 1
    return x


LEAKS |= {"in-place product": in_place, "in-place sum": in_place_sum}


class Planted(fastbp.Layer):
    """Computes something in the given method that is no op; what it should do is nothing."""

    state = ("key",)

    def __init__(self, method, leak):
        super().__init__()
        self.method, self.leak = method, leak
        self.key = np.zeros(4, np.uint64)
        self.table = np.ones((10, 8))

    def forward(self, x):
        return LEAKS[self.leak](self, x) if self.method == "forward" else self.engine.relu_forward(x)

    def backward(self, dvalues):
        return LEAKS[self.leak](self, dvalues) if self.method == "backward" else dvalues


@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.parametrize("leak", LEAKS)
def test_what_is_no_op_is_refused_by_the_layers_name(engine, method, leak):
    X, y = small_data()
    layers = [fastbp.Dense(4, 8), Planted(method, leak), fastbp.Dense(8, 3)]
    model = fastbp.Sequential(
        layers, loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.SGD(0.1), engine=engine, dtype=np.float64, seed=0
    )
    before = state_of(model)
    with pytest.raises(fastbp.RecordingError, match=rf"Planted\(\): {method} cannot be recorded: "):
        model.fit(X, y, batch_size=10)
    assert state_of(model) == before
    if method == "forward":
        with pytest.raises(fastbp.RecordingError, match=r"Planted\(\): forward cannot be recorded"):
            model.predict(X)


def test_what_is_no_op_in_a_loss_is_refused(engine):
    class Difference(fastbp.MeanSquaredError):
        def gradient(self, outputs, targets, weights, total):
            return outputs - targets

    X, _ = small_data()
    with pytest.raises(fastbp.RecordingError, match=r"Difference\(\): gradient cannot be recorded"):
        small_model(engine, loss=Difference()).fit(X, X[:, :3])


def test_what_is_no_op_in_an_optimizer_is_refused(engine):
    class Descent(fastbp.SGD):
        def update(self, parameters, gradients, decayed):
            parameters -= self.lr * gradients

    with pytest.raises(fastbp.RecordingError, match=r"Descent\(.*: update cannot be recorded"):
        small_model(engine, optimizer=Descent(0.1)).fit(*small_data())


def test_what_another_thread_changes_while_a_step_is_recorded_is_none_of_the_recordings(engine):
    class Recorded(fastbp.SGD):
        def advance(self, parameters, gradients):
            model.optimizer.lr, model.layers[0].rate = 0.3, 0.4  # as another thread would
            super().advance(parameters, gradients)

    layers = [fastbp.Dropout(0.2), fastbp.Dense(4, 3)]
    model = fastbp.Sequential(layers, loss=fastbp.SoftmaxCrossEntropy(), optimizer=Recorded(0.1), engine=engine)
    assert model.fit(*small_data()).optimizer.lr == 0.3


def test_a_network_that_computes_nothing_gives_its_inputs(engine):
    X, _ = small_data()
    np.testing.assert_array_equal(fastbp.Sequential([fastbp.Identity()], engine=engine, dtype=np.float64).predict(X), X)


def test_a_layer_that_counts_its_steps_in_python_is_refused(engine):
    class Counts(fastbp.Dense):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.steps = 0

        def forward(self, inputs):
            self.steps += 1
            return super().forward(inputs)

    model = fastbp.Sequential([Counts(4, 3)], loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.SGD(0.1))
    with pytest.raises(fastbp.RecordingError, match="steps changed while a step was recorded"):
        model.fit(*small_data())


def test_a_layer_that_forgets_a_gradient_is_refused(engine):
    class Forgetful(fastbp.Dense):
        def backward(self, dvalues):
            return self.engine.dense_input_grad(dvalues, self.weights)

    layers = [Forgetful(4, 3)]
    model = fastbp.Sequential(layers, loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.SGD(0.1), engine=engine)
    with pytest.raises(fastbp.RecordingError, match=r"Forgetful\(.*: backward cannot be recorded: .*dweights"):
        model.fit(*small_data())


def recording(model, batch=10):
    X, y = small_data(dtype=model.dtype)
    recorder = Recorder(model.engine, model.dtype)
    record_training(model, recorder, {"X": X, "y": y, "order": np.arange(len(X))}, batch, model.loss)
    return recorder.tape()


def outputs_of(tape):
    return [array for op, arguments in tape.calls for array in arguments[len(op.inputs) :]]


def test_recording_runs_nothing(engine, dtype, monkeypatch):
    model = small_model(engine, dropout=0.3, dtype=dtype)
    before, random = state_of(model), np.random.get_state()[1].copy()
    monkeypatch.setattr(type(engine), "execute", pytest.fail)
    tape = recording(model)
    assert state_of(model) == before
    assert (np.random.get_state()[1] == random).all()
    assert not model.memory.gradients.any() and not model.memory.total.any() and not model.memory.cursor.any()
    start, end = engine.span(model.memory.gradients)
    poisoned = [x for x in outputs_of(tape) if x.dtype == dtype and not start <= engine.span(x)[0] < end]
    assert len(poisoned) > 5
    assert all(np.isnan(on_host(x)).all() for x in poisoned)


def test_replaying_overwrites_all_poison(engine, dtype):
    model = small_model(engine, dropout=0.3, dtype=dtype)
    tape = recording(model)
    X, y = small_data(dtype=dtype)
    with tape.bound(X=engine.table(X), y=engine.table(y), order=engine.integers(*range(len(X)))):
        tape.run(2)
    assert all(map(engine.is_finite, outputs_of(tape)))


def test_calls_that_nothing_reads_are_dropped(engine, monkeypatch):
    monkeypatch.setattr(fastbp.tape, "fuse", lambda calls, engine, kept: list(calls))
    names = [op.name for op, _ in recording(small_model(engine)).calls]
    assert names.count("dense_input_grad") == 1  # the first layer's is not wanted
    assert sorted(names) == sorted(
        ["next_batch", "take", "take_labels", "dense_forward", "relu_forward", "dense_forward", "softmax_cross_entropy"]
        + 2 * ["dense_weight_grad", "dense_bias_grad"]
        + ["dense_input_grad", "relu_backward", "adam"]
    )


STACKS = {
    "linear": lambda: [fastbp.Dense(4, 3)],
    "deep": lambda: [
        fastbp.Dense(4, 9), fastbp.ReLU(), fastbp.Dense(9, 1), fastbp.ReLU(), fastbp.Dense(1, 7), fastbp.ReLU(),
        fastbp.Dense(7, 3),
    ],
    "dropout": lambda: [fastbp.Dropout(0.1), fastbp.Dense(4, 8), fastbp.ReLU(), fastbp.Dropout(), fastbp.Dense(8, 3)],
    "relu first and last": lambda: [fastbp.ReLU(), fastbp.Dense(4, 3), fastbp.ReLU()],
    "relu twice": lambda: [fastbp.Dense(4, 3), fastbp.ReLU(), fastbp.ReLU()],
    "own layer": lambda: [Bottleneck(4, 2), fastbp.ReLU(), Bottleneck(4, 3), fastbp.Dense(4, 3)],
    "reads the sums again": lambda: [fastbp.Dense(4, 5), Rectifier(), fastbp.Dense(5, 3)],
    "masks by its gradient": lambda: [fastbp.Dense(4, 5), Upward(), fastbp.Dense(5, 3)],
    "activations": lambda: [
        fastbp.Dense(4, 5), fastbp.Tanh(), fastbp.Dense(5, 6), fastbp.LeakyReLU(0.2), fastbp.Dense(6, 4),
        fastbp.ELU(0.7),
        fastbp.Dense(4, 5), fastbp.Sigmoid(), fastbp.Dense(5, 4), fastbp.GELU(), fastbp.Dense(4, 3), fastbp.SiLU(),
    ],
    "normalised": lambda: [
        fastbp.Dense(4, 6), fastbp.LayerNorm(6), fastbp.Tanh(), fastbp.Residual([fastbp.Dense(6, 6), fastbp.ReLU()]),
        fastbp.Dense(6, 3),
    ],
    "softmax within": lambda: [fastbp.Dense(4, 5), fastbp.Softmax(), fastbp.Dense(5, 3)],
}  # fmt: skip
OPTIMIZERS = {
    "sgd": lambda: fastbp.SGD(0.1),
    "nesterov": lambda: fastbp.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: fastbp.Adam(0.01),
}


class Rectifier(fastbp.ReLU):
    """Masks by its inputs, as the notebook does: what the layer before it writes has two readers."""

    def backward(self, dvalues):
        self.dinputs = self.engine.relu_backward(dvalues, self.inputs)
        return self.dinputs


class Upward(fastbp.ReLU):
    """Passes gradients back where they are positive: one array is two arguments of an op."""

    def backward(self, dvalues):
        self.dinputs = self.engine.relu_backward(dvalues, dvalues)
        return self.dinputs


def stacked(stack, optimizer, engine, dtype):
    loss, optimizer = fastbp.SoftmaxCrossEntropy(), OPTIMIZERS[optimizer]()
    return fastbp.Sequential(STACKS[stack](), loss=loss, optimizer=optimizer, engine=engine, dtype=dtype, seed=3)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replay_is_the_loop_by_hand(engine, stack, optimizer, dtype):
    X, y = small_data(50, dtype)
    fitted, by_hand = (stacked(stack, optimizer, engine, dtype) for _ in range(2))
    fitted.fit(X, y, epochs=3, batch_size=16, shuffle=False)  # the last batch has 2 rows
    loss = fastbp.SoftmaxCrossEntropy(engine=engine)
    for _ in range(3):
        losses = []
        for start in range(0, 50, 16):
            batch = slice(start, start + 16)
            losses += [loss.forward(by_hand.forward(X[batch]), y[batch])] * len(y[batch])
            by_hand.backward(loss.backward())
            by_hand.step()
        by_hand.history.setdefault("loss", []).append(np.mean(losses))
    rtol = 1e-4 if dtype == np.float32 else 1e-11
    assert_same_parameters(fitted, by_hand, rtol)
    assert_allclose(fitted.history["loss"], by_hand.history["loss"], rtol=rtol)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fusion_changes_nothing_but_rounding(engine, stack, optimizer, monkeypatch):
    X, y = small_data()
    fused, plain = (stacked(stack, optimizer, engine, np.float64) for _ in range(2))
    fused.fit(X, y, epochs=2, batch_size=16)
    with monkeypatch.context() as patch:
        patch.setattr(fastbp.tape, "fuse", lambda calls, engine, kept: list(calls))
        plain.fit(X, y, epochs=2, batch_size=16)
        expected = plain.predict_proba(X)
    assert_same_parameters(fused, plain, 1e-11)
    assert_allclose(fused.predict_proba(X), expected, rtol=1e-10)


CHANGES = {
    "dropout rate": lambda m: setattr(m.layers[2], "rate", 0.9),
    "dropout rate 0": lambda m: setattr(m.layers[2], "rate", 0),
    "momentum": lambda m: setattr(m.optimizer, "momentum", 0.1),
    "momentum in float32": lambda m: setattr(m.optimizer, "momentum", np.float32(0.1)),
    "nesterov": lambda m: setattr(m.optimizer, "nesterov", False),
    "lr": lambda m: setattr(m.optimizer, "lr", 0.5),
    "replaced layer": lambda m: setattr(m, "layers", (*m.layers[:-1], fastbp.Dense(8, 3))),
    "removed layer": lambda m: setattr(m, "layers", (*m.layers[:2], m.layers[3])),
    "loss": lambda m: setattr(m, "loss", fastbp.MeanSquaredError()),
    "weights": lambda m: setattr(m.layers[0], "weights", np.ones((4, 8))),
    "optimizer": lambda m: setattr(m, "optimizer", fastbp.Adam(0.1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect(engine, change):
    X, labels = small_data()
    y = np.eye(3)[labels]
    optimizer = fastbp.SGD(0.1, momentum=0.9, nesterov=True)
    changed = small_model(engine, dropout=0.2, optimizer=optimizer).fit(X, y, epochs=1)
    unchanged, without_tapes = copy.deepcopy(changed), copy.deepcopy(changed)
    for model in (changed, without_tapes):
        CHANGES[change](model)
    for model in (changed, without_tapes, unchanged):
        model.fit(X, y, epochs=1)
    assert state_of(changed) == state_of(without_tapes) != state_of(unchanged)


@pytest.mark.parametrize("values", [(0.5, 0.9), (np.float32(0.5), np.float32(0.9)), (np.float64(0.5), np.float64(0.9))])
def test_a_second_change_takes_effect_too(engine, values):
    X, y = small_data()
    model = small_model(engine, optimizer=fastbp.SGD(0.1, momentum=0.1))
    for value in values:
        model.optimizer.momentum = value
        without_tapes = copy.deepcopy(model)
        assert state_of(model.fit(X, y, epochs=1)) == state_of(without_tapes.fit(X, y, epochs=1))


class Scaled(fastbp.Layer):
    """Has a setting that any kind of number may be: what it keeps is 1 - rate."""

    state = ("key",)
    scale = None

    def __init__(self):
        super().__init__()
        self.key = np.zeros(4, np.uint64)

    def forward(self, x):
        self.output, self.mask = self.engine.dropout_forward(x, self.engine.scalar(*np.ravel(self.scale)), self.key)
        return self.output

    def backward(self, dvalues):
        return self.engine.dropout_backward(dvalues, self.mask)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, lambda x: [x], lambda x: (x,), np.array])
def test_any_kind_of_setting_counts(engine, kind):
    X, y = small_data()
    layers, loss = [fastbp.Dense(4, 3), Scaled()], fastbp.SoftmaxCrossEntropy()
    model = fastbp.Sequential(layers, loss=loss, optimizer=fastbp.SGD(0.1), engine=engine, seed=0)
    for value in (0.25, 0.75):
        layers[1].scale = kind(value)
        without_tapes = copy.deepcopy(model)
        assert state_of(model.fit(X, y, epochs=1)) == state_of(without_tapes.fit(X, y, epochs=1))


def test_other_batches_and_data_take_effect(engine):
    X, y = small_data()
    model = small_model(engine)
    others = [(X, 50), (X, 7), (X.astype(np.float32), 7), (X[:20], 7), (np.asfortranarray(X), 7)]
    for data, batch in others:
        without_tapes = copy.deepcopy(model)
        for each in (model, without_tapes):
            each.fit(data, y[: len(data)], epochs=1, batch_size=batch)
        assert state_of(model) == state_of(without_tapes)


def test_recordings_are_kept(engine, monkeypatch):
    X, y = small_data()
    model = small_model(engine, dropout=0.1).fit(X, y, epochs=1, batch_size=16)
    model.predict(X)
    monkeypatch.setattr("fastbp.training.record_training", pytest.fail)
    monkeypatch.setattr(fastbp.model, "record_forward", pytest.fail)
    model.fit(X + 1, 2 - y, epochs=2, batch_size=16, shuffle=False)
    model.predict(X + 1)


def test_many_sizes_do_not_spoil_each_other(engine):
    X, _ = small_data()
    model = small_model(engine)
    expected = model.predict_proba(X)
    for _ in range(2):
        for rows in range(1, 51):
            assert_allclose(model.predict_proba(X[:rows]), expected[:rows], rtol=1e-12)


def test_a_replayed_step_allocates_no_array(cpu_engine):
    layers = [fastbp.Dense(64, 128), fastbp.ReLU(), fastbp.Dense(128, 10)]
    loss, optimizer = fastbp.SoftmaxCrossEntropy(), fastbp.SGD(0.1)
    model = fastbp.Sequential(layers, loss=loss, optimizer=optimizer, engine=cpu_engine, seed=0)
    X, y = np.ones((256, 64), np.float32), np.zeros(256, np.int64)
    recorder = Recorder(cpu_engine, np.float32)
    data = {"X": X, "y": y, "order": np.arange(256)}
    record_training(model, recorder, data, 64, loss)
    tape = recorder.tape()
    with tape.bound(**data):
        tape.run(1)
        tracemalloc.start()
        tape.run(3)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 * 128 * 4 / 2  # half of the hidden layer's output


def test_parameters_survive_what_recording_refuses(engine):
    X, y = small_data()
    model = small_model(engine).fit(X, y, epochs=1)
    before = parameters_of(model)
    layers = model.layers
    model.layers = (*layers[:-1], Planted("forward", "tanh"), layers[-1])
    with pytest.raises(fastbp.RecordingError):
        model.fit(X, y)
    model.layers = layers
    assert_same_parameters(model, before, 0)
    model.fit(X, y, epochs=1)


def test_what_a_model_keeps_of_recordings_is_bounded_in_bytes(monkeypatch):
    model = small_model()
    X, y = small_data(110)
    model.train_on_batch(X[:100], y[:100])
    (first,) = model._tapes.values()
    assert first.nbytes > 100 * (8 + 3) * 8  # what the layers give, and their gradients
    monkeypatch.setattr("fastbp.network.TAPES_BYTES", 3 * first.nbytes)
    for rows in range(101, 110):
        model.train_on_batch(X[:rows], y[:rows])
    assert len(model._tapes) in (3, 4)


def test_a_recording_in_use_outlives_those_used_once(monkeypatch):
    monkeypatch.setattr("fastbp.network.TAPES", 3)
    model = small_model()
    X, y = small_data(20)
    model.train_on_batch(X, y)
    (training,) = model._tapes.values()
    for rows in range(1, 10):
        model.predict(X[:rows])
        model.train_on_batch(X, y)
    assert training in model._tapes.values()
