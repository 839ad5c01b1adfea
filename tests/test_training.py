"""What `fit` may be told: callbacks, early stopping, metrics, frozen and nested layers, accumulation, batches."""

import copy
import pickle

import numpy as np
import pytest

import fastbp
from fastbp.samples import Data

from .checks import assert_allclose, assert_same_parameters, on_host, parameters_of, small_data, small_model, state_of

X, Y = small_data(50)


def residual_model(engine="numpy", **options):
    layers = [
        fastbp.Dense(4, 6),
        fastbp.Residual([fastbp.Dense(6, 9), fastbp.ReLU(), fastbp.Dropout(0.3), fastbp.Dense(9, 6)]),
        fastbp.ReLU(),
        fastbp.Residual([fastbp.ReLU(), fastbp.Residual([fastbp.Dense(6, 6)])]),
        fastbp.Dense(6, 3),
    ]
    options = {"loss": fastbp.SoftmaxCrossEntropy(), "optimizer": fastbp.Adam(0.01)} | options
    return fastbp.Sequential(layers, engine=engine, dtype=np.float64, seed=0, **options)


def step_by_step(model, X, y, batch_size):
    """One epoch without shuffling, layer by layer, on a copy."""
    model = copy.deepcopy(model)
    for start in range(0, len(X), batch_size):
        rows = slice(start, start + batch_size)
        model.loss.forward(model.forward(X[rows]), y[rows])
        model.backward(model.loss.backward())
        model.step()
    return model


def test_layers_within_layers_replay_what_they_compute(engine):
    model = residual_model(engine)
    expected = step_by_step(model, X, Y, 16)
    assert_same_parameters(model.fit(X, Y, epochs=1, batch_size=16, shuffle=False), expected)


def test_layers_within_layers_by_torch(engine):
    torch = pytest.importorskip("torch")
    block = fastbp.Residual([fastbp.Dense(3, 5), fastbp.ReLU(), fastbp.Dense(5, 3)], engine=engine)
    down, up = block.layers[0], block.layers[2]
    x = np.random.default_rng(0).standard_normal((7, 3))
    parameters = down.weights, down.biases, up.weights, up.biases
    leaves = [torch.tensor(a, requires_grad=True) for a in map(on_host, (x, *parameters))]
    tx, w1, b1, w2, b2 = leaves
    output = tx + torch.relu(tx @ w1 + b1) @ w2 + b2
    assert_allclose(block.forward(x), output.detach().numpy(), rtol=1e-12)
    output.square().sum().backward()
    block.backward(2 * block.output)
    found = block.dinputs, down.dweights, down.dbiases, up.dweights, up.dbiases
    for actual, leaf in zip(found, leaves, strict=True):
        assert_allclose(actual, leaf.grad.numpy(), rtol=1e-10, atol=1e-12)


def test_layers_within_layers_are_copied_pickled_and_saved(engine, tmp_path):
    pytest.importorskip("safetensors")
    model = residual_model(engine).fit(X, Y, epochs=2)
    model.layers[1].layers[0].trainable = False
    model.save(tmp_path / "model")
    again = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fastbp.load(tmp_path / "model", engine=engine)]
    for other in again:
        assert state_of(other) == state_of(model)
        assert [x.trainable for x in other.walk()] == [x.trainable for x in model.walk()]
    expected = parameters_of(model.fit(X, Y, epochs=2))
    for other in again:
        assert_same_parameters(other.fit(X, Y, epochs=2), expected, rtol=0)


def test_gradients_of_inner_layers_are_found_by_their_path():
    found = residual_model().gradients(X, Y).layers
    assert found[1].keys() == {f"layers.{i}.{name}" for i in (0, 3) for name in ("weights", "biases")}
    assert found[3].keys() == {"layers.1.layers.0.weights", "layers.1.layers.0.biases"}
    assert "layers.1" not in residual_model().summary() and residual_model().summary().count("\n") > 8


def test_a_residual_must_keep_its_width():
    with pytest.raises(ValueError, match=r"Residual.* adds its input of 4 features to its layers' output of 3"):
        fastbp.Residual([fastbp.Dense(4, 3)])
    for bad in ([], [1], 3):
        with pytest.raises(TypeError, match=r"layers must be|not iterable"):
            fastbp.Residual(bad)


def test_the_same_layer_within_another_is_refused():
    layer = fastbp.Dense(4, 4)
    with pytest.raises(ValueError, match=r"layers\[1\]\.layers\.0, Dense.* stands in the model twice"):
        fastbp.Sequential([layer, fastbp.Residual([layer])])
    model = fastbp.Sequential([fastbp.Residual([layer])])
    assert layer.owner is model
    with pytest.raises(ValueError, match="belongs to another model"):
        fastbp.Sequential([layer])


def test_frozen_layers_stay_as_they_are(engine):
    model, other = small_model(engine, optimizer=fastbp.SGD(0.1)), small_model(engine, optimizer=fastbp.SGD(0.1))
    before = parameters_of(model)
    model.layers[0].trainable = False
    model.fit(X, Y, epochs=1, batch_size=50, shuffle=False)
    other.fit(X, Y, epochs=1, batch_size=50, shuffle=False)
    after, all_trained = parameters_of(model), parameters_of(other)
    for name in before:
        expected = before[name] if name.startswith("0.") else all_trained[name]
        assert_allclose(after[name], expected, rtol=0 if expected is before[name] else 1e-12)
    model.layers[0].trainable = True
    model.fit(X, Y, epochs=1)
    assert (parameters_of(model)["0.weights"] != before["0.weights"]).any()


def test_frozen_layers_are_not_computed(engine):
    from .test_tape import recording

    model = small_model(engine, optimizer=fastbp.Adam())
    model.layers[0].trainable = False
    names = [call.op.name for call in recording(model).calls]
    assert not any("input_grad" in name or name in ("classifier_grads", "relu_backward") for name in names), names


def test_training_more_than_before_makes_the_optimizer_forget(engine):
    """What is frozen takes nothing from the others; what is thawed has no moments, and steps count for all together."""
    model = small_model(engine).fit(X, Y, epochs=1)
    steps, others = float(model.optimizer.steps[0]), model.memory.parts_of(model.layers[0], model.optimizer.m)
    kept = {name: on_host(moment).copy() for name, moment in others.items()}
    assert steps and len(kept) == 2 and all(moment.any() for moment in kept.values())
    model.layers[2].trainable = False
    assert model.optimizer.steps[0] == steps
    for name, moment in model.memory.parts_of(model.layers[0], model.optimizer.m).items():
        np.testing.assert_array_equal(on_host(moment), kept[name])
    model.layers[2].trainable = True
    assert not model.optimizer.steps[0] and not on_host(model.optimizer.m).any()


def test_all_frozen_is_refused(engine):
    model = small_model(engine)
    for layer in model.layers:
        layer.trainable = False
    with pytest.raises(ValueError, match="no layer of this model has parameters to train"):
        model.fit(X, Y)


@pytest.mark.parametrize("batch_size", [5, 7, 25])
@pytest.mark.parametrize("accumulate", [2, 3, 100])
def test_accumulated_batches_are_one_large_batch(engine, batch_size, accumulate):
    model, large = (small_model(engine, optimizer=fastbp.Adam(0.01)) for _ in range(2))
    model.fit(X, Y, epochs=3, batch_size=batch_size, accumulate=accumulate, shuffle=False)
    large.fit(X, Y, epochs=3, batch_size=batch_size * accumulate, shuffle=False)
    assert_same_parameters(model, large)
    assert_allclose(model.history["loss"], large.history["loss"], rtol=1e-12)


def weighted_fit(engine, X, y, *, loss=None, **options):
    """A model after a few steps on all rows at once."""
    model = small_model(engine, optimizer=fastbp.SGD(0.1), loss=loss or fastbp.SoftmaxCrossEntropy())
    return model.fit(X, y, epochs=3, batch_size=len(X), shuffle=False, **options)


def test_a_sample_weight_in_fit_is_a_repeat_count(engine):
    X, y = small_data(20)
    times = np.arange(20) % 4
    models = [
        weighted_fit(engine, X, y, sample_weight=times),
        weighted_fit(engine, np.repeat(X, times, axis=0), np.repeat(y, times)),
    ]
    assert_same_parameters(*models)
    assert_allclose(models[0].history["loss"], models[1].history["loss"], rtol=1e-12)
    scores = models[0].evaluate(X, y, sample_weight=times)
    assert scores == pytest.approx(models[1].evaluate(np.repeat(X, times, axis=0), np.repeat(y, times)))


def test_class_weight_in_fit_stands_in_for_the_losss(engine):
    X, y = small_data(20)
    weights = [0.5, 2.0, 1.0]
    expected = weighted_fit(engine, X, y, loss=fastbp.SoftmaxCrossEntropy(weights))
    loss = fastbp.SoftmaxCrossEntropy([9, 9, 1])
    for given in (weights, np.array(weights), {0: 0.5, 1: 2}):
        assert_same_parameters(weighted_fit(engine, X, y, loss=loss, class_weight=given), expected)
    assert loss.class_weight == (9, 9, 1)
    assert_same_parameters(weighted_fit(engine, X, y, sample_weight=np.array(weights)[y]), expected)


def test_balanced_classes_count_the_same(engine):
    X, y = small_data(20)
    y[:] = np.repeat([0, 1, 2], [14, 4, 2])
    y[0], weights = -1, np.ones(20)
    weights[1] = 3
    loss = fastbp.SoftmaxCrossEntropy(ignore_index=-1)
    balanced = weighted_fit(engine, X, y, loss=loss, class_weight="balanced", sample_weight=weights)
    counts = np.array([15, 4, 2])
    assert_same_parameters(
        balanced, weighted_fit(engine, X, y, loss=loss, class_weight=21 / (3 * counts), sample_weight=weights)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_batches_with_weights_are_one_large_batch(engine, reduction):
    X, y = small_data(20)
    loss = fastbp.SoftmaxCrossEntropy({1: 3.0}, label_smoothing=0.1, reduction=reduction)
    weights = np.arange(20) % 3
    whole = weighted_fit(engine, X, y, loss=loss, sample_weight=weights)
    pieces = small_model(engine, optimizer=fastbp.SGD(0.1), loss=loss)
    pieces.fit(X, y, epochs=3, batch_size=6, accumulate=4, shuffle=False, sample_weight=weights)
    assert_same_parameters(whole, pieces)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_soft_targets_train_as_the_losss_gradient_says(engine, reduction, rng):
    X, _ = small_data(12)
    rows = rng.dirichlet(np.ones(3), 12)
    model = small_model(engine, optimizer=fastbp.SGD(0.01), loss=fastbp.SoftmaxCrossEntropy(reduction=reduction))
    expected = {
        f"{i}.{name}": on_host(getattr(layer, name)) - 0.01 * gradient
        for i, (layer, gradients) in enumerate(zip(model.layers, model.gradients(X, rows).layers, strict=True))
        for name, gradient in gradients.items()
    }
    loss = model.train_on_batch(X, rows)
    assert_same_parameters(model, expected)
    costs = -rows * np.log(small_model(engine).predict_proba(X))
    assert loss == pytest.approx(costs.sum() / (12 if reduction == "mean" else 1), rel=1e-12)
    assert model.evaluate(X, rows)["accuracy"] == model.evaluate(X, rows.argmax(axis=1))["accuracy"]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sample_weight": [1, 2]}, ValueError, r"sample_weight must hold 20 numbers, shape \(20,\), got \(2,\)"),
        ({"class_weight": [1, 2]}, ValueError, "class_weight must hold 3 numbers, one for each class, got 2"),
        ({"class_weight": "even"}, ValueError, "class_weight must be numbers, or 'balanced' with labels, got 'even'"),
        ({"class_weight": {0: "much"}}, TypeError, r"class_weight\[0\] must be a number, got 'much'"),
    ],
)
def test_bad_weights_change_nothing(options, error, match):
    model = small_model()
    before = state_of(model)
    with pytest.raises(error, match=match):
        model.fit(*small_data(20), epochs=1, **options)
    assert state_of(model) == before


def test_batches_are_trained_as_they_come(engine):
    model, expected = small_model(engine), small_model(engine)
    batches = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 50, 16)]
    model.fit(batches, epochs=2)
    expected.fit(X, Y, epochs=2, batch_size=16, shuffle=False)
    assert_same_parameters(model, expected, rtol=0)
    assert_allclose(model.history["loss"], expected.history["loss"], rtol=1e-12)

    generated = small_model(engine).fit(lambda: iter(batches), epochs=2)
    assert_same_parameters(generated, expected, rtol=0)
    accumulated = small_model(engine).fit(batches, epochs=2, accumulate=3)
    large = small_model(engine).fit(X, Y, epochs=2, batch_size=48, shuffle=False)
    assert_same_parameters(accumulated, large)


def test_a_generator_that_is_exhausted_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match=r"there is no batch \(left\): pass a list, or a function"):
        model.fit(iter([(X, Y)]), epochs=2)
    assert len(model.history["loss"]) == 1


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([(X,)], r"batch 0 must be \(X, y\) or \(X, y, sample_weight\)"),
        ([(X, Y), (X[:, :3], Y)], r"batch 1: X must have shape \(rows, 4\), got \(50, 3\)"),
        ([(X, Y[:4])], r"batch 0: y must hold 50 labels"),
    ],
)
def test_a_bad_batch_is_named(batches, match):
    with pytest.raises(ValueError, match=match):
        small_model().fit(batches)


def test_files_larger_than_memory_are_read_a_batch_at_a_time(cpu_engine, tmp_path):
    import tracemalloc

    rows = 200_000
    table = np.lib.format.open_memmap(tmp_path / "X.npy", "w+", np.float32, (rows, 20))
    for start in range(0, rows, 10_000):
        table[start : start + 10_000] = np.random.default_rng(start).standard_normal((10_000, 20))
    y = np.arange(rows) % 3
    model = fastbp.Sequential(
        [fastbp.Dense(20, 8), fastbp.ReLU(), fastbp.Dense(8, 3)],
        loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.SGD(0.1), engine=cpu_engine, seed=0,
    )  # fmt: skip
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    model.fit(mapped[:5000], y[:5000], epochs=1, batch_size=1000)  # which compiles all, the shuffle of many rows too
    tracemalloc.start()
    model.fit(mapped, y, epochs=1, batch_size=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < table.nbytes / 2  # the order of the rows, and pieces that are looked at


def test_train_on_batch_is_one_step_of_fit(engine):
    model, expected = small_model(engine), small_model(engine)
    losses = [model.train_on_batch(X, Y) for _ in range(3)]
    expected.fit(X, Y, epochs=3, batch_size=50, shuffle=False)
    assert_same_parameters(model, expected, rtol=0)
    assert losses == expected.history["loss"] and model.history == {}


def test_callbacks_are_called_in_order_and_end_training():
    seen = []

    class Witness(fastbp.Callback):
        def begin(self, model, figures):
            seen.append(("begin", figures))

        def epoch(self, model, figures):
            seen.append(("epoch", len(model.history["loss"]), sorted(figures)))
            return len(model.history["loss"]) == 2

        def end(self, model):
            seen.append("end")

    def function(model, figures):
        seen.append("function")

    model = small_model().fit(X, Y, epochs=5, validation_data=(X, Y), callbacks=[Witness(), function])
    names = ["loss", "val_accuracy", "val_loss"]
    assert len(model.history["loss"]) == 2
    assert seen == [
        ("begin", ("loss", "val_loss", "val_accuracy")),
        ("epoch", 1, names), "function", ("epoch", 2, names), "function", "end",
    ]  # fmt: skip


def test_what_a_callback_changes_takes_effect(engine):
    model = small_model(engine, dropout=0.5)

    def stop_dropping(model, figures):
        model.layers[2].rate = 0.0
        model.layers[0].trainable = False
        model.optimizer.lr = 0.02

    model.fit(X, Y, epochs=3, batch_size=16, callbacks=[stop_dropping])
    expected = small_model(engine, dropout=0.5).fit(X, Y, epochs=1, batch_size=16)
    stop_dropping(expected, {})
    expected.fit(X, Y, epochs=2, batch_size=16)
    assert_same_parameters(model, expected, rtol=0)


def test_callbacks_hear_the_end_after_an_error():
    ended = []

    class Fails(fastbp.Callback):
        def epoch(self, model, figures):
            raise RuntimeError("as planned")

        def end(self, model):
            ended.append(True)

    with pytest.raises(RuntimeError, match="as planned"):
        small_model().fit(X, Y, callbacks=[Fails()])
    assert ended == [True]


def test_early_stopping_keeps_the_best_weights(engine):
    figures = iter([3.0, 2.0, 1.0, 1.5, 0.99999, 2.0, 2.0])
    kept = []

    class Scripted(fastbp.EarlyStopping):
        def epoch(self, model, _):
            kept.append(parameters_of(model))
            return super().epoch(model, {"val_loss": next(figures)})

    stop = Scripted(patience=3, min_delta=0.01)
    model = small_model(engine).fit(X, Y, epochs=50, validation_data=(X, Y), callbacks=[stop])
    assert len(kept) == 6 and stop.best == 1.0 and stop.best_epoch == 3
    assert_same_parameters(model, kept[2], rtol=0)


def test_early_stopping_watches_accuracy_upwards():
    stop = fastbp.EarlyStopping("val_accuracy", patience=2, restore_best=False)
    model = small_model().fit(X, Y, epochs=300, validation_data=(X, Y), callbacks=[stop])
    assert stop.best == max(model.history["val_accuracy"])
    assert len(model.history["loss"]) - stop.best_epoch in (0, 2)


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("loss", "min"),
        ("val_mean_absolute_error", "min"),
        ("val_mean_poisson_deviance", "min"),
        ("val_f1_score", "max"),
        ("val_roc_auc", "max"),
    ],
)
def test_early_stopping_knows_what_is_better(monitor, mode):
    assert fastbp.EarlyStopping(monitor).mode == mode


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"monitor": "val_loss"}, "monitor must be one of loss, got 'val_loss'; pass validation_data"),
        ({"monitor": "speed", "mode": "max"}, "monitor must be one of loss, got 'speed'"),
    ],
)
def test_a_figure_that_is_not_there_is_refused_before_training(options, match):
    model = small_model()
    before = state_of(model)
    with pytest.raises(ValueError, match=match):
        model.fit(X, Y, callbacks=[fastbp.EarlyStopping(**options)])
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("callbacks", "match"),
    [
        (fastbp.EarlyStopping("loss"), "callbacks must be a sequence of fastbp Callbacks or functions, got <fastbp"),
        ([3], "callbacks must hold fastbp Callbacks or functions, got 3"),
        ([fastbp.EarlyStopping], r"callbacks must hold fastbp Callbacks or functions, got <class .*EarlyStopping"),
        ("stop", "callbacks must be a sequence"),
        ([fastbp.StepLR(3)], r"callbacks cannot hold a schedule, .* as schedule=: got StepLR\(step_size=3"),
    ],
)
def test_bad_callbacks_are_refused(callbacks, match):
    with pytest.raises(TypeError, match=match):
        small_model().fit(X, Y, callbacks=callbacks)
    assert small_model().fit(X, Y, epochs=1, callbacks=None).history


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"monitor": 5}, "monitor must be the name of a figure, got 5"),
        ({"patience": 2.5}, "patience must be an integer"),
        ({"min_delta": "little"}, "min_delta must be a number"),
        ({"restore_best": "no"}, "restore_best must be True or False"),
        ({"mode": "up"}, "mode must be 'min', 'max' or None"),
        ({"monitor": "val_mae"}, "mode must be 'min' or 'max', because the name 'val_mae' does not say"),
        ({"monitor": "val_neg_mean_squared_error"}, "mode must be 'min' or 'max'"),
    ],
)
def test_early_stopping_checks_its_settings(arguments, match):
    with pytest.raises((TypeError, ValueError), match=match):
        fastbp.EarlyStopping(**arguments)


def test_training_holds_for_the_layers_inside(engine):
    block = fastbp.Residual([fastbp.Dropout(0.5), fastbp.Residual(fastbp.BatchNorm(4))], engine=engine)
    block.training = False
    assert [layer.training for _, layer in block.walk()] == [False] * 4
    assert_allclose(block.forward(X), X + X + X / np.sqrt(1 + 1e-5), rtol=1e-12)
    block.training = True
    assert all(layer.training for _, layer in block.walk())
    for name in ("training", "trainable"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 'eval'"):
            setattr(block, name, "eval")


class Ridge(fastbp.MeanSquaredError):
    """With half the sum of squared weights."""

    def penalize(self, rows, parameters, gradients, total):
        one = self.engine.scalar(1)
        self.engine.penalize(parameters, gradients, one, self.engine.scalar(0))


def test_a_loss_may_depend_on_the_weights(engine, rng):
    X, y = rng.standard_normal((8, 3)), rng.standard_normal((8, 2))
    model = fastbp.Sequential(
        [fastbp.Dense(3, 2)], loss=Ridge(), optimizer=fastbp.SGD(0.1), engine=engine, dtype=np.float64, seed=0
    )
    (layer,) = model.layers
    weights, biases = on_host(layer.weights).copy(), on_host(layer.biases).copy()
    slope = X.T @ (2 * (X @ weights + biases - y) / y.size) + weights  # of the mean of squares, and of the squares
    model.train_on_batch(X, y)
    assert_allclose(layer.weights, weights - 0.1 * slope, rtol=1e-12)


def test_a_loop_of_ones_own_trains_as_fit_does(engine):
    X, y = small_data()
    model, other = small_model(engine), small_model(engine)
    order = np.random.default_rng(0).permutation(len(X))
    with model.training() as trainer:
        trainer.bind(Data(X, y, None), 16)
        losses = [trainer.epoch(order), trainer.epoch(order[::-1])]
    for rows in (order, order[::-1]):
        other.fit(X[rows], y[rows], epochs=1, batch_size=16, shuffle=False)
    assert losses == pytest.approx(other.history["loss"])
    assert_same_parameters(model, other)


@pytest.mark.parametrize("size", [16, 50])
def test_without_an_optimizer_an_epoch_gives_the_gradient_over_all_rows(engine, size):
    X, y = small_data()
    model = small_model(engine)
    model.optimizer = None
    before, expected = parameters_of(model), model.gradients(X, y)
    with model.training(accumulate=4 if size < 50 else 1) as trainer:
        trainer.bind(Data(X, y, None), size)
        assert trainer.epoch() == trainer.epoch() == pytest.approx(expected.loss)
    for layer, gradients in zip(model.layers, expected.layers, strict=True):
        for name, where in model.memory.gradients_of(layer).items():
            assert_allclose(where, gradients[f"{name}"], rtol=1e-9)
    assert_same_parameters(model, before)


def test_unwatched_training_goes_through_infinite_losses(engine):
    X, y = small_data()
    model = small_model(engine, optimizer=fastbp.SGD(1e300))
    with model.training(watched=False) as trainer:
        trainer.bind(Data(X, y, None), 10)
        assert not np.isfinite(trainer.epoch())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("room", [1, 20, 49])
def test_tables_for_which_there_is_no_room_train_to_the_same_bits(engine, monkeypatch, accumulate, room):
    def trained():
        optimizer = fastbp.Adam(0.01, schedule=fastbp.CosineAnnealingLR(3))
        model = small_model(engine, dropout=0.2, optimizer=optimizer)
        weights = np.linspace(0.5, 2, len(X))
        return state_of(model.fit(X, Y, epochs=2, batch_size=8, sample_weight=weights, accumulate=accumulate))

    def witnessed(self, pieces):
        return ahead(self, (sizes.append(len(piece[0])) or piece for piece in pieces))

    whole, sizes, ahead = trained(), [], type(engine).ahead
    monkeypatch.setattr(type(engine), "rows_at_a_time", lambda self, tables: room)
    monkeypatch.setattr(type(engine), "ahead", witnessed)
    assert trained() == whole
    size = max(8 * accumulate, room // (8 * accumulate) * 8 * accumulate)
    assert sizes == [*[size] * (50 // size), *([50 % size] if 50 % size else [])] * 2
