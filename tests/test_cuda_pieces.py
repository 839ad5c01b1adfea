"""Tables for which a GPU has no room, on the stand-in: they come by pieces, one ahead of the one in use."""

import threading

import numpy as np
import pytest

import fastbp

from .checks import assert_same_parameters, small_data, small_model, state_of
from .cuda import standin

pytestmark = pytest.mark.skipif(standin.COMPILER is None, reason="needs g++")
MODULE, REPLAY = standin.engine_module(), standin.replay_module()


@pytest.fixture
def engine(monkeypatch):
    """An engine with a GPU that is full, and pieces of 400 bytes."""
    monkeypatch.setattr(REPLAY, "blocks_for", lambda *_: [])
    monkeypatch.setattr(MODULE, "PIECE_BYTES", 400)
    monkeypatch.setattr(standin, "free", {"device": 0, "pool": 0})
    return standin.engine_on_host()


@pytest.mark.parametrize(
    ("rows", "device", "pool", "at_a_time"),
    [(10, 0, 0, None), (11, 0, 0, 10), (100, 4001, 4000, None), (100, 4000, 4000, 10), (100, 8001, 0, None)],
)
def test_there_is_room_for_half_of_what_is_free(engine, rows, device, pool, at_a_time):
    """A row takes 40 bytes."""
    standin.free.update(device=device, pool=pool)
    assert engine.rows_at_a_time([np.zeros((rows, 4)), np.zeros(rows, np.int64)]) == at_a_time


def test_rows_larger_than_a_piece_come_one_by_one(engine):
    assert engine.rows_at_a_time([np.zeros((3, 1000))]) == 1


def test_a_table_is_never_uploaded_whole(engine, monkeypatch):
    X, y = small_data()
    expected = small_model("numpy").fit(X, y, epochs=2, batch_size=4)
    model, seen = small_model(engine), []
    table = type(engine).table
    monkeypatch.setattr(type(engine), "table", lambda self, x: seen.append(np.shape(x)) or table(self, x))
    model.fit(X, y, epochs=2, batch_size=4)
    assert X.shape not in seen and {shape for shape in seen if len(shape) == 2} == {(8, 4), (2, 4)}
    np.testing.assert_allclose(model.history["loss"], expected.history["loss"], rtol=1e-9)
    monkeypatch.setattr(standin, "free", {"device": 10**9, "pool": 0})
    assert state_of(small_model(engine).fit(X, y, epochs=2, batch_size=4)) == state_of(model)


def test_one_piece_is_read_ahead(engine):
    pulled = [threading.Event() for _ in range(4)]

    def pieces():
        for place, event in enumerate(pulled):
            event.set()
            yield [np.full((5 - place, 2), place, np.float32), np.full(5 - place, place)]

    for place, (x, y) in enumerate(engine.ahead(pieces())):
        if place < 3:
            assert pulled[place + 1].wait(60)  # without asking for it
        assert place > 1 or not pulled[place + 2].is_set()
        for array, shape in ((x, (5 - place, 2)), (y, (5 - place,))):
            assert engine.owns(array) and array.shape == shape and (array.get() == place).all()
    assert place == 3


def test_pieces_lie_in_two_places(engine):
    pieces = ([np.zeros((2, 3))] for _ in range(5))
    places = [x.data.ptr for (x,) in engine.ahead(pieces)]
    assert places[0] != places[1] and places == [*places[:2] * 2, places[0]]


def test_places_take_no_memory_while_pieces_are_used(engine, monkeypatch):
    """What is freed meanwhile may still be in use by what waits in a stream, which the copies do not wait for."""
    pieces = engine.ahead([np.full((2, 3), place, np.float32)] for place in range(4))
    places = [next(pieces)[0].data.ptr]
    monkeypatch.setattr(MODULE.cupy, "empty", None)
    places += [x.data.ptr for (x,) in pieces]
    assert len(places) == 4 and len({*places}) == 2


@pytest.mark.parametrize("blocks", [0, 1])
def test_what_was_made_ready_for_a_place_serves_the_next_piece_there(engine, monkeypatch, blocks):
    """Thirteen pieces: whole ones in either place, and a smaller last one."""
    monkeypatch.setattr(REPLAY, "blocks_for", lambda *_: [blocks] * blocks)
    kind, made = ("OneKernel" if blocks else "Graph"), []
    make = getattr(REPLAY, kind)
    monkeypatch.setattr(REPLAY, kind, lambda engine, *given: made.append(given) or make(engine, *given))
    X, y = np.random.default_rng(0).standard_normal((100, 4)), np.arange(100) % 3
    model, expected = small_model(engine), small_model("numpy")
    for each in (model, expected):
        each.optimizer.schedule = fastbp.CosineAnnealingLR(1)
    with model.training() as trainer:
        trainer.bind(model.checked(X, y), 4)
        made.clear()
        trainer.epoch()
    assert 1 <= len(made) <= 3
    expected.fit(X, y, epochs=1, batch_size=4, shuffle=False, verbose=False)
    assert_same_parameters(model, expected, rtol=1e-8)


def test_what_cannot_be_read_is_said(engine):
    def pieces():
        yield [np.zeros((2, 3))]
        raise OSError("no such disk")

    with pytest.raises(OSError, match="no such disk"):
        list(engine.ahead(pieces()))
