"""How a model trains: recordings of a step, bound to data and replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Self

import numpy as np

from .interop import is_sparse
from .kernels.engine import Engine
from .kernels.ops import Array
from .losses import Loss
from .memory import Memory
from .network import Network
from .samples import Data, batches, tables
from .steps import Run, record_training, record_update
from .tape import Tape

__all__ = ["Trainer"]


class Trainer:
    """What one call of `fit` does to a model, in a ``with`` block that no other thread may enter meanwhile.

    Parameters
    ----------
    model : Network
    loss : function
        Returns the loss, which may be another one in each epoch.
    accumulate : int, default 1
        How many batches' gradients make one update. A model without an optimizer keeps them in its memory.
    watched : bool, default True
        Raise FloatingPointError where loss or weights are no longer finite, and go back to the last that were.
    """

    def __init__(self, model: Network, loss: Callable[[], Loss], accumulate: int = 1, *, watched: bool = True) -> None:
        self._model, self._loss_now = model, loss
        self._accumulate, self._watched = accumulate, watched
        self._bound = contextlib.ExitStack()
        self._memory: Memory | None = None  # that `_run` looks after
        self._data: Data | None = None  # of which `_tables` are
        self._whole: Data | None = None  # to train on
        self._engine: Engine | None = None  # whose tables these are
        self._room: int | None = None  # for so many rows of it; None for all
        self._tables: dict[str, Array] = {}
        self._slots: dict[str, Array] = {}
        self._shuffle: Callable[[], None] | None = None  # what is in the slot "order"
        self._numbers: dict[tuple[str, int], Array] = {}  # slots for pieces, where a replay may find them again

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bound.close()

    def bind(self, data: Data, batch_size: int) -> None:
        """Make ready for epochs over `data`: recordings for the model as it is now.

        Where the engine has no room for all of it, an epoch goes through it by pieces, of whole updates each.
        """
        engine = self._model.engine
        self._batch_size, self._order = batch_size, np.arange(data.rows)
        if data is not self._whole or engine is not self._engine:
            self._bound.close()
            self._whole, self._data, self._tables, self._slots = data, None, {}, {}  # room for the new tables
            self._engine, self._shuffle = engine, None
            self._numbers.clear()
            given = tables(data, self._model.dtype)
            self._room = self._rows_at_a_time(data, given)
            if self._room is None:
                self._load(data, given)
        if self._room is None:
            self._replays = self._prepare(data, self._plan(data.rows, batch_size))

    def shuffle(self) -> None:
        """Draw a new order of the rows, for the epochs to come."""
        if self._room is not None:
            self._order = self._model.permutation(len(self._order))
            return
        if self._shuffle is None:
            self._shuffle = self._model.shuffler(self._slots["order"])
        self._shuffle()

    def epoch(self, order: Array | None = None, start: float | None = None) -> float:
        """Train for an epoch over what `bind` was given; returns its loss.

        Parameters
        ----------
        order : array of int64, shape (rows,), optional
            The rows in the order to take; by default the last one, at first as they come.
        start : float, optional
            When the epoch begins, for a schedule; by default after those in the model's history.
        """
        self._model.memory.start_epoch()
        start = self._epochs if start is None else start
        if order is not None:
            self._order = order
        if self._room is not None:
            self._replay_pieces(start)
        else:
            if order is not None:
                self._slots["order"][...] = self._model.engine.asarray(order)
            self._replay(start)
        return self._end()

    def epoch_through(self, batches: Iterable[Data], count: int | None = None) -> float:
        """Train for an epoch over batches as they come; returns its loss.

        Parameters
        ----------
        batches : iterable of Data
        count : int, optional
            How many there are, which a schedule wants to know; by default as many as this model was given last.
        """
        self._model.memory.start_epoch()
        count = self._model.batches if count is None else count
        expected = None if count is None else -(-count // self._accumulate)
        given = updates = waiting = 0

        def start() -> float:
            return self._epochs + (min(updates / expected, 1) if expected else 0)

        for data in batches:
            given += 1
            waiting += 1
            self._model.memory.cursor[...] = 0
            plan = [("step" if self._accumulate == 1 else "gradients", data.rows, 1)]
            if waiting == self._accumulate > 1:
                plan.append(("update", 0, 1))
            waiting %= self._accumulate
            self._replays = self._prepare(data, plan)
            self._replay(start())
            updates += not waiting
        if waiting and self._accumulate > 1:
            self._replays = self._prepare(data, [("update", 0, 1)])
            self._replay(start())
            updates += 1
        self._model.batches = given
        return self._end()

    @property
    def _epochs(self) -> int:
        return len(self._model.history.get("loss", ()))

    def _end(self) -> float:
        return self._loss.value(self._run.finish())

    def _plan(self, rows: int, batch_size: int) -> list[tuple[str, int, int]]:
        """What an epoch replays: the kind of recording, its rows, and how often."""
        full, rest = divmod(rows, batch_size)
        if self._accumulate == 1:
            return [("step", batch, times) for batch, times in ((batch_size, full), (rest, 1)) if batch and times]
        groups, left = divmod(full, self._accumulate)
        plan = groups * [("gradients", batch_size, self._accumulate), ("update", 0, 1)]
        plan += [("gradients", batch, times) for batch, times in ((batch_size, left), (rest, 1)) if batch and times]
        return [*plan, ("update", 0, 1)] if left or rest else plan

    def _prepare(self, data: Data, plan: Sequence[tuple[str, int, int]]) -> list[tuple[Tape, int]]:
        self._bound.close()
        model, optimizer = self._model, self._model.optimizer
        self._loss = self._loss_now()
        if data is not self._data:
            self._load(data, tables(data, model.dtype))
        slots = self._tables | {"order": self._numbers_for("order", np.arange(data.rows))}
        if optimizer is not None and optimizer.schedule is not None:
            slots["rates"] = self._numbers_for("rates", np.zeros(updates_of(plan) or 1))
        self._slots, self._shuffle = slots, None
        tapes: dict[tuple[str, int], Tape] = {}
        for kind, batch, _ in plan:
            if (kind, batch) not in tapes:
                needed = {name: x for name, x in slots.items() if self._needs(kind, name)}
                tape = tapes[kind, batch] = self._tape(kind, batch, needed)
                self._bound.enter_context(tape.bound(**needed))
        if self._memory is not model.memory:
            with model.turns:
                for layer in model.walk():
                    layer.forget()
            self._memory, self._run = model.memory, Run(model, watched=self._watched)
        return [(tapes[kind, batch], times) for kind, batch, times in plan]

    def _load(self, data: Data, given: dict[str, Array]) -> None:
        """Put the tables of some data where the engine's replays can read them."""
        self._data, self._tables = data, {name: self._model.engine.table(x) for name, x in given.items()}

    def _rows_at_a_time(self, data: Data, given: dict[str, Array]) -> int | None:
        """How many rows the engine has room for; None for all. Sparse ones that are too many are made dense."""
        engine, zero = self._model.engine, self._model.dtype.type(0)
        room = engine.rows_at_a_time([*given.values()])
        if room is None or not is_sparse(data.X):
            return room
        return engine.rows_at_a_time(present(data._replace(X=np.broadcast_to(zero, data.X.shape))))

    def _numbers_for(self, slot: str, numbers: Array) -> Array:
        """Numbers for a slot, which may be overwritten; pieces of one size share theirs, where only rates are."""
        if self._room is None:
            return self._model.engine.asarray(numbers)
        key = slot, len(numbers)
        if key not in self._numbers:
            self._numbers[key] = self._model.engine.asarray(numbers)
        return self._numbers[key]

    @staticmethod
    def _needs(kind: str, slot: str) -> bool:
        return slot == "rates" if kind == "update" else slot != "rates" or kind == "step"

    def _tape(self, kind: str, batch: int, slots: dict[str, Array]) -> Tape:
        record: Callable[..., None] = (
            partial(record_update, self._model, data=slots, average=True)
            if kind == "update"
            else partial(
                record_training, self._model, data=slots, batch=batch, loss=self._loss, accumulate=kind == "gradients"
            )
        )
        shapes = [(name, x.shape[1:], x.dtype) for name, x in slots.items()]
        parts = [part for part in (*self._model.walk(), self._loss, self._model.optimizer) if part is not None]
        return self._model.tape(kind, batch, *shapes, record=record, parts=parts)

    def _replay_pieces(self, start: float) -> None:
        assert self._whole is not None and self._room is not None
        done, total = 0, updates_of(self._plan(len(self._order), self._batch_size))
        update = self._batch_size * self._accumulate
        size = max(update, self._room // update * update)
        pieces = map(present, batches(self._whole, self._order, size))
        for piece in self._model.engine.ahead(pieces):
            self._model.memory.cursor[...] = 0
            plan = self._plan(len(piece[0]), self._batch_size)
            self._replays = self._prepare(Data(*piece), plan)
            self._replay(start, done, total)
            done += updates_of(plan)

    def _replay(self, start: float, done: int = 0, total: int | None = None) -> None:
        """Train by the recordings at hand, when `done` of an epoch's `total` updates are done."""
        optimizer = self._model.optimizer
        if "rates" in self._slots and optimizer is not None:
            rates = self._slots["rates"]
            moments = start + (done + np.arange(len(rates))) / (total or len(rates))
            rates[...] = self._model.engine.asarray(optimizer.rates(moments))
            self._model.memory.step[...] = 0
        for tape, times in self._replays:
            self._run(tape, times)


def present(data: Data) -> list[Array]:
    """The arrays that there are."""
    return [x for x in data if x is not None]


def updates_of(plan: Sequence[tuple[str, int, int]]) -> int:
    """How many updates of the weights a plan makes."""
    return sum(times for kind, _, times in plan if kind != "gradients")
