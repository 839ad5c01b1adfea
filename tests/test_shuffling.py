"""In which order an epoch takes its rows."""

import math

import numpy as np
import pytest

import fastbp
from fastbp.kernels.engine import Call
from fastbp.kernels.ops import OPS
from fastbp.shuffling import KEYS, MANY_ROWS, MOST_ROWS, shuffler

from .checks import state_of
from .conftest import ENGINES

SIZES = [MANY_ROWS - 1, MANY_ROWS, 5000]


def model_of(engine, seed=3):
    layers = fastbp.Dense(2, 4), fastbp.ReLU(), fastbp.Dense(4, 1)
    return fastbp.Sequential(
        layers, loss=fastbp.MeanSquaredError(), optimizer=fastbp.SGD(0.01), engine=engine, seed=seed, dtype="float64"
    )


def orders_of(rows, count, keys=KEYS):
    """Orders that the op draws, shape (count, rows); keys beyond the first ones exchange nothing."""
    engine, rng = fastbp.engine("numba" if "numba" in ENGINES else "numpy"), np.random.Philox(0)
    order, given, drawn = engine.zeros((rows,), np.int64), engine.asarray(np.zeros(KEYS, np.uint64)), []
    program = engine.program([Call(OPS["shuffle"], (given, order))])
    program.bind()
    for _ in range(count):
        given[:keys] = rng.random_raw(keys)
        program.run(1)
        drawn.append(order.copy())
    return np.array(drawn)


def is_even(counts):
    """Whether counts are as even as chance leaves them, by Pearson's chi-squared: within four deviations."""
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return abs(chi_squared - (counts.size - 1)) < 4 * math.sqrt(2 * (counts.size - 1))


@pytest.mark.parametrize("rows", [2, 3, 4, 5])
def test_all_orders_of_few_rows_come_equally_often(rows):
    def counts(keys):
        orders = orders_of(rows, 40_000, keys) @ rows ** np.arange(rows)
        return np.unique(orders, return_counts=True)[1]

    assert counts(KEYS).size == math.factorial(rows) and is_even(counts(KEYS))
    assert not is_even(counts(5))  # which shows how much is seen


def test_rows_of_many_come_to_all_places_beside_all_others():
    rows, parts = 5000, 50
    part = np.arange(rows) * parts // rows

    def evenness(keys):
        orders = orders_of(rows, 100, keys)
        assert (np.sort(orders) == np.arange(rows)).all()
        places = np.bincount((part[orders] * parts + part).ravel(), minlength=parts**2)
        apart = np.bincount((np.diff(orders) % rows).ravel(), minlength=rows)[1:]  # neighbours
        return is_even(places), is_even(apart)

    assert evenness(KEYS) == (True, True)
    assert evenness(8) == (False, False)


@pytest.mark.parametrize("rows", SIZES)
def test_one_seed_gives_the_same_orders_on_all_engines(engine, rows):
    order = engine.zeros((rows,), np.int64)
    shuffle, rng = shuffler(engine, np.random.Generator(np.random.Philox(7)), order), np.random.Philox(7)
    for _ in range(2):
        shuffle()
        if rows < MANY_ROWS:
            expected = np.random.Generator(rng).permutation(rows)
        else:
            expected = np.empty(rows, np.int64)
            fastbp.engine("numpy").shuffle(rng.random_raw(KEYS), expected)
        np.testing.assert_array_equal(engine.asnumpy(order), expected)


@pytest.mark.parametrize("rows", SIZES)
def test_an_epoch_takes_each_row_once(engine, rows):
    """Rates too small to change the weights: each epoch's loss is that of all rows, in another order each time."""
    X = np.random.default_rng(0).standard_normal((rows, 2))
    y = X.sum(axis=1, keepdims=True)
    model = model_of(engine)
    expected = model.evaluate(X, y)["loss"]
    model.optimizer.lr = 1e-300
    with model.training() as trainer:
        trainer.bind(model.checked(X, y), 100)
        orders = []
        for _ in range(3):
            trainer.shuffle()
            orders.append(engine.asnumpy(trainer._slots["order"]).copy())
            assert trainer.epoch() == pytest.approx(expected, rel=1e-9)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(rows))
    assert len({order.tobytes() for order in orders}) == 3


@pytest.mark.parametrize("rows", SIZES)
def test_a_batch_of_all_rows_keeps_their_order(engine, rows):
    X = np.random.default_rng(0).standard_normal((rows, 2))
    fits = [
        model_of(engine).fit(X, X[:, :1], epochs=3, batch_size=size, shuffle=shuffle)
        for size, shuffle in [(rows, True), (rows + 1, True), (rows, False)]
    ]
    assert state_of(fits[0]) == state_of(fits[1]) == state_of(fits[2])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_many_rows_are_shuffled_alike_however_they_come(engine, monkeypatch, accumulate):
    """At once, by pieces, sparse, and in two calls."""
    X = np.random.default_rng(0).standard_normal((5003, 2))
    y = X.sum(axis=1, keepdims=True)

    def trained(X, *epochs):
        model = model_of(engine)
        for count in epochs:
            model.fit(X, y, epochs=count, batch_size=64, accumulate=accumulate)
        return state_of(model)

    expected = trained(X, 3)
    assert trained(X, 1, 2) == expected
    table = pytest.importorskip("scipy.sparse").csr_array(X)
    assert trained(table, 3) == expected
    monkeypatch.setattr(engine, "rows_at_a_time", lambda tables: 1000)
    assert trained(X, 3) == trained(table, 3) == expected


def test_more_rows_than_can_be_shuffled():
    order = np.broadcast_to(np.int64(0), MOST_ROWS + 1)
    with pytest.raises(ValueError, match="at most 2,147,483,648 rows to be shuffled, got 2,147,483,649"):
        shuffler(fastbp.engine("numpy"), np.random.default_rng(0), order)
