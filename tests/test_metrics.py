"""What `evaluate`, and `fit` with validation data, say of predictions."""

import numpy as np
import pytest

import fastbp

from .checks import small_data, small_model, state_of

X, Y = small_data(50)


def test_metrics_are_called_with_targets_and_predictions(engine):
    def misses(y_true, y_pred):
        return (y_true != y_pred).sum()

    model = small_model(engine).fit(X, Y, epochs=3, validation_data=(X, Y), metrics=[misses])
    right = np.array(model.history["val_accuracy"])
    np.testing.assert_allclose(model.history["val_misses"], 50 * (1 - right), atol=1e-9)
    scores = model.evaluate(X, Y, metrics={"errors": misses})
    assert scores["errors"] == (model.predict(X) != Y).sum() and set(scores) == {"loss", "accuracy", "errors"}


def count(y_true, y_pred):
    return len(y_true)


def lowest(y_true, y_pred):
    return y_true.min()


@pytest.mark.parametrize("lowest_label", [0, -100])
def test_rows_that_are_ignored_are_not_shown_to_metrics(engine, lowest_label):
    y = np.where(np.arange(50) < 10, lowest_label, Y % 2 + 1)
    model = small_model(engine, loss=fastbp.SoftmaxCrossEntropy(ignore_index=lowest_label))
    model.fit(X, y, epochs=1, validation_data=(X, y), metrics=[count, lowest])
    assert model.history["val_count"] == [40] and model.history["val_lowest"] == [1]
    assert model.history["val_accuracy"][0] == (model.predict(X)[10:] == y[10:]).mean()


def test_metrics_get_the_weights_that_were_given(engine):
    def weight(y_true, y_pred, sample_weight):
        return sample_weight.sum()

    weights = np.arange(50) % 3
    model = small_model(engine)
    scores = model.evaluate(X, Y, sample_weight=weights, metrics=[weight])
    right = model.predict(X) == Y
    assert scores["weight"] == weights.sum() and np.isclose(scores["accuracy"], np.average(right, weights=weights))
    with pytest.raises(TypeError, match=r"metrics\['count'\] must take targets, predictions, sample_weight: "):
        model.fit(X, Y, validation_data=(X, Y, weights), metrics=[count])
    assert model.history == {}


def test_where_no_row_counts_there_are_no_figures():
    scores = small_model().evaluate(X, Y, sample_weight=np.zeros(50), metrics={"max": lambda t, p, sample_weight: 1})
    assert scores["loss"] == 0 and np.isnan(scores["accuracy"]) and np.isnan(scores["max"])


@pytest.mark.parametrize(
    ("metrics", "match"),
    [
        ([3], "metrics must be functions"),
        ("accuracy", "metrics must be a sequence of functions, or a dict of them, got 'accuracy'"),
        ({"loss": max}, "names of their own"),
        ([count, count], "metrics must have different names, got 'count' twice; a dict gives them names"),
        (count, "metrics must be a sequence of functions, or a dict of them, got <function count"),
        ([lambda y: 0], r"metrics\['<lambda>'\] must take targets, predictions: "),
    ],
)
def test_bad_metrics_are_refused(metrics, match):
    model = small_model()
    with pytest.raises((TypeError, ValueError), match=match):
        model.evaluate(X, Y, metrics=metrics)
    with pytest.raises((TypeError, ValueError), match=match):
        model.fit(X, Y, validation_data=(X, Y), metrics=metrics)
    assert model.history == {}


@pytest.mark.parametrize("value", [None, np.ones(2), np.ones(1), "0.5", 1j, [[1], [1, 2]]], ids=repr)
def test_a_metric_that_returns_no_number_is_named_and_the_epoch_counts(engine, value):
    def odd(y_true, y_pred):
        return value

    model, expected = small_model(engine), small_model(engine).fit(X, Y, epochs=1)
    with pytest.raises(TypeError, match=r"metrics\['odd'\] must return a number, got "):
        model.evaluate(X, Y, metrics=[odd])
    with pytest.raises(TypeError, match=r"metrics\['odd'\] must return a number, got "):
        model.fit(X, Y, epochs=3, validation_data=(X, Y), metrics=[odd])
    assert state_of(model) == state_of(expected)  # the epoch that has trained


def test_metrics_need_data_held_out():
    with pytest.raises(ValueError, match="metrics need validation_data"):
        small_model().fit(X, Y, metrics=[count])


def test_outputs_that_are_nan_say_no_class(engine):
    model = small_model(engine, dtype=np.float32)
    model.layers[0].weights = np.full((4, 8), 1e10)
    model.layers[2].weights = np.zeros((8, 3))  # times infinity
    huge = np.full((3, 4), 1e30)
    huge[0] = 0
    with pytest.raises(FloatingPointError, match="the outputs for row 1 of X are NaN: they say no class"):
        model.predict(huge)
    assert model.evaluate(huge, [int(np.argmax(model.predict(huge[:1]))), 0, 0])["accuracy"] <= 1 / 3
