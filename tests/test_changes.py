"""What may happen to a model while it trains: by its callbacks, by what gives its batches, by other threads."""

import copy
import dataclasses
import pickle
import threading

import numpy as np
import pytest

import fastbp

from .checks import assert_same_parameters, parameters_of, small_data, small_model, state_of

X, Y = small_data(50)


def deep_model(engine, **options):
    layers = [
        fastbp.Dense(4, 6), fastbp.BatchNorm(6), fastbp.Residual([fastbp.Dense(6, 6), fastbp.Dropout(0.3)]),
        fastbp.Dense(6, 6), fastbp.Dense(6, 3),
    ]  # fmt: skip
    options = {"loss": fastbp.SoftmaxCrossEntropy(), "optimizer": fastbp.Adam(0.01)} | options
    return fastbp.Sequential(layers, engine=engine, dtype=np.float64, seed=0, **options)


def arrays_of(model):
    return {(layer, name): layer.__dict__[name].copy() for layer in model.walk() for name in layer.arrays()}


RESHAPE = {
    "freeze": lambda m: setattr(m.layers[0], "trainable", False),
    "freeze inside": lambda m: setattr(m.layers[2].layers[0], "trainable", False),
    "unfreeze": lambda m: setattr(m.layers[3], "trainable", True),
    "add": lambda m: setattr(m, "layers", [*m.layers[:1], fastbp.Dense(6, 6), *m.layers[1:]]),
    "remove": lambda m: setattr(m, "layers", [*m.layers[:3], m.layers[4]]),
    "swap": lambda m: setattr(m, "layers", [m.layers[0], *m.layers[3:0:-1], m.layers[4]]),
    "replace": lambda m: setattr(m, "layers", [*m.layers[:4], fastbp.Dense(6, 3)]),
}


@pytest.mark.parametrize("change", RESHAPE)
def test_the_best_epoch_comes_back_layer_by_layer(engine, change):
    best = {}

    class Scripted(fastbp.EarlyStopping):
        def epoch(self, model, _):
            epoch = len(model.history["loss"])
            if epoch == 2:
                best.update(arrays_of(model))
            if epoch == 3:
                RESHAPE[change](model)
            return super().epoch(model, {"loss": abs(2.0 - epoch)})

    model = deep_model(engine)
    model.layers[3].trainable = change != "unfreeze"
    model.fit(X, Y, epochs=6, batch_size=16, callbacks=[Scripted("loss")])
    after = arrays_of(model)
    stayed = after.keys() & best.keys()
    assert len(stayed) == len(best) - 2 * (change in ("remove", "replace"))
    for place in stayed:
        assert after[place].tobytes() == best[place].tobytes(), place


@pytest.mark.parametrize("stop_after", [2, 3, 5])
def test_a_checkpoint_goes_on_with_what_callbacks_changed(engine, stop_after, tmp_path):
    pytest.importorskip("safetensors")

    def change(model, figures):
        epoch = len(model.history["loss"])
        model.optimizer.lr *= 0.9
        model.loss.label_smoothing = 0.01 * epoch
        if epoch == 2:
            model.layers[0].trainable = False
        if epoch == 4:
            model.layers[3].trainable = False

    class Stop(fastbp.Callback):
        def epoch(self, model, figures):
            if len(model.history["loss"]) == self.at:
                raise KeyboardInterrupt

    def train(path, at, **options):
        stopping, stop = fastbp.EarlyStopping("loss", mode="max"), Stop()
        stop.at = at
        callbacks = [stopping, change, stop]
        model = deep_model(engine)
        return model.fit(X, Y, epochs=7, batch_size=16, callbacks=callbacks, checkpoint=path, **options)

    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train(path, stop_after)
    resumed, whole = train(path, 99, resume=True), train(None, 99)
    assert state_of(resumed) == state_of(whole)
    assert resumed.optimizer.lr == whole.optimizer.lr
    assert [x.trainable for x in resumed.walk()] == [x.trainable for x in whole.walk()]


@dataclasses.dataclass
class Settings:
    scale: float = 1.0


class Scale(fastbp.Layer):
    """x times a number found somewhere in what the layer was given."""

    def __init__(self, where, number):
        super().__init__()
        self.where, self.number = where, number

    def forward(self, x):
        self.output = self.engine.scale(self.read(x), self.engine.scalar(float(self.number(self.where))))
        return self.output


LONG = 2000


def fresh(kind):
    """What holds a number 1 deep inside, how to find it, and how to make it 3."""
    long = np.ones(LONG)
    exact = np.ones(1)
    return {
        "array in a tuple": ((long,), lambda w: w[0][LONG // 2], lambda w: long.__setitem__(LONG // 2, 3)),
        "array in a list in a dict": ({"a": [long]}, lambda w: w["a"][0][-1], lambda w: long.__setitem__(-1, 3)),
        "digits that are not printed": (
            [exact], lambda w: 1 + 2 * (w[0][0] != 1), lambda w: exact.__setitem__(0, np.nextafter(1, 2)),
        ),
        "large array in place": (
            big := np.ones(1 << 17), lambda w: w[1 << 16], lambda w: big.__setitem__(1 << 16, 3),
        ),
        "array of objects": (o := np.array([1.0, "x"], object), lambda w: w[0], lambda w: o.__setitem__(0, 3)),
        "dict": ({"a": 1}, lambda w: w["a"], lambda w: w.update(a=3)),
        "set": ({1}, lambda w: max(w), lambda w: w.add(3)),
        "a loss's setting": (fastbp.Huber(1.0), lambda w: w.delta, lambda w: setattr(w, "delta", 3)),
        "dataclass": (Settings(), lambda w: w.scale, lambda w: setattr(w, "scale", 3)),
        "True and 1": ([True], lambda w: 1 + 2 * (w[0] is not True), lambda w: w.__setitem__(0, 1)),
        "function": ([lambda: 1], lambda w: w[0](), lambda w: (w.clear(), w.append(lambda: 3))),
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        "array in a tuple", "array in a list in a dict", "digits that are not printed", "large array in place",
        "array of objects", "dict", "set", "a loss's setting", "dataclass", "True and 1", "function",
    ],
)  # fmt: skip
def test_settings_count_by_their_content(engine, kind, monkeypatch):
    where, number, change = fresh(kind)
    model = fastbp.Sequential([Scale(where, number)], engine=engine, dtype=np.float64)
    x = np.ones((1, 2))
    np.testing.assert_array_equal(model.predict(x), [[1, 1]])
    change(where)
    np.testing.assert_array_equal(model.predict(x), [[3, 3]])
    monkeypatch.setattr(fastbp.model, "record_forward", pytest.fail)
    np.testing.assert_array_equal(model.predict(x), [[3, 3]])  # what is the same is not recorded again


def test_settings_count_by_their_names(engine):
    layer = Scale(None, lambda where: 1 if "single" in vars(layer) else 3)
    layer.single = "yes"
    model = fastbp.Sequential([layer], engine=engine, dtype=np.float64)
    for _ in range(2):
        np.testing.assert_array_equal(model.predict(np.ones((1, 2))), [[1, 1]])
    layer.triple = vars(layer).pop("single")
    np.testing.assert_array_equal(model.predict(np.ones((1, 2))), [[3, 3]])


TRAIN = {
    "fit": lambda m: m.fit(X, Y, epochs=1),
    "train_on_batch": lambda m: m.train_on_batch(X, Y),
    "training": lambda m: m.training().__enter__(),
}


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("place", ["callback", "batches", "begin", "end"])
def test_training_within_training_is_refused_at_once(engine, train, place):
    class Nested(fastbp.Callback):
        def begin(self, model, figures):
            if place == "begin":
                TRAIN[train](model)

        def epoch(self, model, figures):
            if place == "callback":
                TRAIN[train](model)

        def end(self, model):
            if place == "end":
                TRAIN[train](model)

    def batches():
        if place == "batches":
            TRAIN[train](model)
        yield X, Y

    model = small_model(engine)
    with pytest.raises(RuntimeError, match=r"this model is being trained: .* not train it; train a copy.deepcopy"):
        model.fit(batches, epochs=1, callbacks=[Nested()])
    model.fit(X, Y, epochs=1)  # it is free again


def test_callbacks_and_batches_may_look_at_the_model_and_train_copies(engine):
    def look(model, figures=None):
        seen.append(model.predict_proba(X).tobytes())
        assert model.evaluate(X, Y)["loss"] > 0 and model.gradients(X, Y).loss > 0
        copy.deepcopy(model).fit(X, Y, epochs=1)

    def batches():
        for start in range(0, 50, 16):
            look(model)
            yield X[start : start + 16], Y[start : start + 16]

    seen = []
    model, expected = small_model(engine), small_model(engine)
    model.fit(batches, epochs=2, callbacks=[look])
    expected.fit(X, Y, epochs=2, batch_size=16, shuffle=False)
    assert_same_parameters(model, expected, rtol=0)
    assert (
        len(set(seen)) == 9
    )  # each sees the weights of its own step; the callback's are those of the next first batch


def test_other_threads_predict_with_the_weights_of_one_step(engine):
    rows = np.random.default_rng(0).standard_normal((2500, 4))  # more than one piece
    model, other = (small_model(engine, dropout=0.2, optimizer=fastbp.Adam(0.05)) for _ in range(2))
    right = {model.predict_proba(rows).tobytes()}

    def note(model, figures):
        right.add(model.predict_proba(rows).tobytes())

    other.fit(X, Y, epochs=300, batch_size=50, callbacks=[note])
    seen, done = [], threading.Event()

    def look():
        while not done.is_set():
            seen.append(model.predict_proba(rows).tobytes())

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    model.fit(X, Y, epochs=300, batch_size=50)
    done.set()
    for thread in threads:
        thread.join()
    assert seen and right.issuperset(seen)
    assert_same_parameters(model, other, rtol=0)


def test_another_thread_trains_when_the_first_has_ended(engine):
    started = threading.Event()

    def batches():
        started.set()
        return iter([(X, Y)])

    model, expected = small_model(engine), small_model(engine)
    thread = threading.Thread(target=lambda: (started.wait(), model.fit(X, Y, epochs=3, shuffle=False)))
    thread.start()
    model.fit(batches, epochs=20)
    thread.join()
    expected.fit(lambda: iter([(X, Y)]), epochs=20).fit(X, Y, epochs=3, shuffle=False)
    assert_same_parameters(model, expected, rtol=0)


@pytest.mark.parametrize("trainable", [False, True])
def test_what_another_thread_freezes_is_frozen_when_training_has_ended(engine, trainable):
    model, expected = (small_model(engine, optimizer=fastbp.Adam(0.05)) for _ in range(2))
    model.layers[0].trainable = expected.layers[0].trainable = not trainable
    thread = threading.Thread(target=lambda: setattr(model.layers[0], "trainable", trainable))

    def batches():
        yield X, Y
        thread.start()
        for _ in range(5):
            thread.join(0.02)
            assert model.layers[0].trainable != trainable
            yield X, Y

    model.fit(batches, epochs=1)
    thread.join()
    assert model.layers[0].trainable == trainable
    expected.fit([(X, Y)] * 6, epochs=1)
    assert_same_parameters(model, expected, rtol=0)


ASSIGN = {
    "optimizer": lambda m: setattr(m, "optimizer", fastbp.SGD(0.5, schedule=lambda epochs, lr: lr / (1 + epochs))),
    "no schedule": lambda m: setattr(m, "optimizer", fastbp.SGD(0.2)),
    "schedule": lambda m: setattr(m.optimizer, "schedule", fastbp.StepLR(0.5, 0.1)),
    "loss": lambda m: setattr(m, "loss", fastbp.SoftmaxCrossEntropy(reduction="sum")),
    "loss's setting": lambda m: setattr(m.loss, "label_smoothing", 0.5),
    "ignore_index": lambda m: setattr(m.loss, "ignore_index", 1),
    "layers": lambda m: setattr(m, "layers", [*m.layers, fastbp.Dense(3, 3)]),
}


@pytest.mark.parametrize("source", ["data", "batches", "class_weight", "balanced"])
@pytest.mark.parametrize("change", ASSIGN)
def test_what_a_callback_assigns_takes_effect(engine, change, source):
    def train(model, epochs, callbacks=()):
        options = {"epochs": epochs, "callbacks": callbacks, "validation_data": (X, Y)}
        if source == "batches":
            return model.fit([(X[:25], Y[:25]), (X[25:], Y[25:])], **options)
        weights = {"class_weight": {0: 3.0}, "balanced": "balanced"}.get(source)
        return model.fit(X, Y, batch_size=25, class_weight=weights, **options)

    def new():
        return small_model(engine, optimizer=fastbp.SGD(0.1, schedule=lambda epochs, lr: lr / (2 + epochs)))

    def once(model, figures):
        if len(model.history["loss"]) == 1:
            ASSIGN[change](model)

    changed, expected = new(), train(new(), 1)
    train(changed, 3, [once])
    ASSIGN[change](expected)
    train(expected, 2)
    assert_same_parameters(changed, expected, rtol=0)
    assert changed.history == expected.history


def test_data_that_a_changed_loss_cannot_take_is_refused():
    def change(model, figures):
        model.loss = fastbp.MeanSquaredError()

    model = small_model()
    with pytest.raises(ValueError, match=r"y must have the shape of the outputs, \(50, 3\), got \(50,\)"):
        model.fit(X, Y, epochs=3, callbacks=[change])
    assert len(model.history["loss"]) == 1


def test_freezing_leaves_what_a_plateau_has_seen(engine):
    schedule = fastbp.ReduceLROnPlateau(factor=0.5, patience=0, threshold=1.0, threshold_mode="abs", monitor="loss")
    model = small_model(engine, optimizer=fastbp.SGD(0.1, schedule=schedule)).fit(X, Y, epochs=3)
    before = schedule.progress()
    assert before["reductions"] == 2
    model.layers[0].trainable = False
    assert schedule.progress() == before
    model.fit(X, Y, epochs=1)
    assert model.optimizer.rate[0] == 0.1 * 0.5**2
    model.optimizer = fastbp.SGD(0.1, schedule=schedule)  # a new optimizer begins anew
    assert schedule.progress()["reductions"] == 0


def test_layers_may_change_within_an_epoch_of_batches(engine):
    def batches(model, freeze):
        for start in range(0, 50, 10):
            if start == 20 and freeze:
                model.layers[0].trainable = False
            yield X[start : start + 10], Y[start : start + 10]

    model, expected = (small_model(engine, optimizer=fastbp.SGD(0.1)) for _ in range(2))
    model.fit(lambda: batches(model, True), epochs=1)
    first = expected.fit(lambda: iter([(X[:10], Y[:10]), (X[10:20], Y[10:20])]), epochs=1).history["loss"][0]
    expected.layers[0].trainable = False
    rest = [(X[i : i + 10], Y[i : i + 10]) for i in (20, 30, 40)]
    last = expected.fit(rest, epochs=1).history["loss"][1]
    assert_same_parameters(model, expected, rtol=0)
    np.testing.assert_allclose(model.history["loss"], [0.4 * first + 0.6 * last], rtol=1e-12)


@pytest.mark.parametrize("answer", [1, 0.5, "stop", [0], np.array([1, 1]), np.int64(1), None, False])
def test_only_true_ends_training(answer):
    model = small_model().fit(X, Y, epochs=3, callbacks=[lambda model, figures: answer])
    assert len(model.history["loss"]) == 3


@pytest.mark.parametrize("answer", [True, np.True_])
def test_true_ends_training(answer):
    model = small_model().fit(X, Y, epochs=3, callbacks=[lambda model, figures: answer])
    assert len(model.history["loss"]) == 1


def test_weights_that_a_last_step_made_infinite_go_back_before_callbacks_see_them(engine):
    model = small_model(engine, optimizer=fastbp.SGD(1e308), dtype=np.float64)
    model.layers[2].weights *= 1e10
    before = parameters_of(model)
    with pytest.raises(FloatingPointError, match="the weights became infinite in epoch 1"):
        model.fit(X, Y, epochs=1, batch_size=50, callbacks=[lambda model, figures: pytest.fail("called")])
    assert_same_parameters(model, before, rtol=0)


def test_a_pickle_holds_one_step_while_another_thread_trains(cpu_engine):
    wide = 200_000
    layer = fastbp.Dense(1, wide)
    layer.weights = np.zeros((1, wide), np.float32)
    loss, optimizer = fastbp.MeanSquaredError(reduction="sum"), fastbp.Adam(0.01)
    model = fastbp.Sequential([layer], loss=loss, optimizer=optimizer, engine=cpu_engine, seed=0)
    X, y = np.ones((20, 1), np.float32), np.full((20, wide), 1000, np.float32)
    done = threading.Event()

    def train():
        while not done.is_set():
            model.fit(X, y, epochs=5, batch_size=1)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(50):
            pickled = pickle.loads(pickle.dumps(model)).layers[0]
            assert np.ptp(pickled.weights) == 0
            assert pickled.weights[0, 0] == pickled.biases[0, 0]  # which have the same gradients
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("change", ["freeze", "insert", "remove", "unfreeze"])
def test_moments_stay_with_the_parameters_that_stay(engine, change):
    """As in torch, where an optimizer knows each parameter's; where more is trained than before, all begin anew."""
    torch = pytest.importorskip("torch")
    X, y = np.random.default_rng(0).standard_normal((12, 4)), np.arange(12) % 3
    layers = [fastbp.Dense(4, 6), fastbp.Tanh(), fastbp.Dense(6, 6), fastbp.Tanh(), fastbp.Dense(6, 3)]
    model = fastbp.Sequential(
        layers, loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(0.01), engine=engine, seed=0, dtype=np.float64
    )
    if change == "unfreeze":
        layers[0].trainable = False
    twin = fastbp.to_torch(model)
    optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], 0.01)

    def train(steps):
        for _ in range(steps):
            model.train_on_batch(X, y)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(twin(torch.tensor(X)), torch.tensor(y)).backward()
            optimizer.step()

    train(3)
    if change == "freeze":
        layers[0].trainable = False
        twin[0].requires_grad_(False)
    elif change == "insert":
        model.layers = [fastbp.Identity(), *layers]
    elif change == "remove":
        model.layers = [*layers[:2], layers[4]]
        twin = torch.nn.Sequential(*twin[:2], twin[4])
    else:
        layers[0].trainable = True
        twin.requires_grad_(True)
        optimizer = torch.optim.Adam(twin.parameters(), 0.01)
    train(3)
    assert float(model.optimizer.steps[0]) == (3 if change == "unfreeze" else 6)
    for dense, linear in zip([x for x in model.layers if isinstance(x, fastbp.Dense)], twin[::2], strict=True):
        np.testing.assert_allclose(
            model.engine.asnumpy(dense.weights), linear.weight.detach().numpy().T, rtol=1e-9, atol=1e-12
        )
