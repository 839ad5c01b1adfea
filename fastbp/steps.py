"""What a model records, one training step and one forward pass, and how it replays steps in slices."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np

from .kernels.ops import Array
from .layers import Layer
from .losses import Loss
from .network import Network
from .part import Part
from .signatures import PLAIN
from .tape import Recorder, RecordingError, Tape

__all__ = ["Run", "record_forward", "record_training", "record_update"]

SLICE_SECONDS = 0.05  # how long one replay may keep Ctrl-C waiting
SNAPSHOT_SECONDS = 1.0

P = TypeVar("P", bound=Part)


def record_training(
    model: Network,
    recorder: Recorder,
    data: dict[str, Array],
    batch: int,
    loss: Loss,
    *,
    accumulate: bool = False,
) -> None:
    """Write down a step: take a batch, forward, loss, backward, update.

    Parameters
    ----------
    model : Network
    recorder : Recorder
    data : dict of array
        Examples of what the slots will hold: order, what `samples.tables` gives, and where there is a schedule, the
        steps' learning rates.
    batch : int
        Rows of a step.
    loss : Loss
    accumulate : bool, default False
        Add the gradients to those of other batches in place of the update.
    """
    memory = model.memory
    slots = {name: recorder.slot(name, x.shape, x.dtype) for name, x in data.items() if name != "rates"}
    rows = recorder.adopt(model.engine.zeros((batch,), np.int64))
    recorder.next_batch(slots["order"], recorder.adopt(memory.cursor), rows)
    if "X" in slots:
        outputs = recorder.take(slots["X"], rows)
    else:
        *table, zeros = (slots[name] for name in ("values", "columns", "starts", "stops", "zeros"))
        outputs = recorder.sparse_rows(*table, rows, zeros)
    targets = (recorder.take_labels if data["y"].ndim == 1 else recorder.take)(slots["y"], rows)
    weights = recorder.take_weights(slots["weights"], rows) if "weights" in slots else None

    layers = [recorded(layer, recorder) for layer in model.layers]
    twins = [twin for layer in layers for _, twin in layer.walk()]
    numbers = list(map(plain_numbers, twins))
    for layer in layers:
        with named(layer, "forward"):
            outputs = recorder.asarray(layer.forward(outputs))
    twin_of_loss = recorded(loss, recorder)
    numbers_of_loss = plain_numbers(twin_of_loss)
    with named(loss, "gradient"):
        total = recorder.adopt(memory.total)
        dvalues = recorder.asarray(twin_of_loss.gradient(outputs, targets, weights, total))
    for layer in reversed(layers):
        with named(layer, "backward"):
            dvalues = recorder.asarray(layer.backward(dvalues))
    for layer, twin, before in zip(model.walk(), twins, numbers, strict=True):
        check_unchanged(layer, twin, before)
        with named(layer, "backward"):
            for name, where in memory.gradients_of(layer).items():
                if f"d{name}" not in twin.__dict__:
                    raise RecordingError(f"it must store the gradient of {name} as self.d{name}")
                recorder.want(getattr(twin, f"d{name}"), where)
    check_unchanged(loss, twin_of_loss, numbers_of_loss)
    if memory.decayed is not None:
        with named(loss, "penalize"):
            decayed, slopes = map(recorder.adopt, memory.decayed)
            twin_of_loss.penalize(batch, decayed, slopes, total)
    if accumulate:
        mean = recorder.scalar(loss.reduction == "mean")
        counters = recorder.adopt(memory.seen), recorder.adopt(memory.weight), recorder.adopt(memory.sums)
        recorder.accumulate(recorder.adopt(memory.gradients), total, mean, *counters)
    else:
        record_update(model, recorder, data)


def record_update(model: Network, recorder: Recorder, data: dict[str, Array], *, average: bool = False) -> None:
    """Write down the optimizer's part of a step; `average` takes the mean of gradients that were added up.

    Without an optimizer, the gradients stay in the model's memory.
    """
    memory, optimizer = model.memory, model.optimizer
    if average:
        mean = recorder.average(recorder.adopt(memory.sums), recorder.adopt(memory.weight))
        recorder.want(mean, memory.gradients)
    if optimizer is None:
        return
    if "rates" in data:
        rates = recorder.slot("rates", data["rates"].shape, np.float64)
        recorder.next_rate(rates, recorder.adopt(memory.step), recorder.adopt(optimizer.rate))
    twin = recorded(optimizer, recorder)
    before = plain_numbers(twin)
    decayed = memory.decayed and (recorder.adopt(memory.decayed[0]), recorder.adopt(memory.decayed[1]))
    with named(optimizer, "update"):
        twin.update(recorder.adopt(memory.trained), recorder.adopt(memory.gradients), decayed)
    check_unchanged(optimizer, twin, before)


def plain_numbers(twin: Part) -> dict[str, Any]:
    return {name: value for name, value in twin.__dict__.items() if type(value) in (*PLAIN, float)}


def check_unchanged(part: Part, twin: Part, before: dict[str, Any]) -> None:
    """See that recording changed no plain number of a part's twin; another thread may change the part's own."""
    for name, value in before.items():
        if twin.__dict__[name] != value:
            raise RecordingError(
                f"{part!r}: {name} changed while a step was recorded, which happens once, not once a step; "
                "what changes from step to step is an array named in `state`, updated by an op"
            )


def record_forward(
    model: Network, recorder: Recorder, rows: int, features: int, loss: Loss | None = None, done: int = 0
) -> None:
    """Write down a forward pass for prediction, from the tape's memory "X" to its memory "outputs".

    With a loss, to what that takes for probabilities. The first layers may be `done` already: "X" is their output.
    """
    recorder.memory["X"] = model.engine.zeros((rows, features), model.dtype)
    outputs = inputs = recorder.adopt(recorder.memory["X"])
    for layer in model.layers[done:]:
        with named(layer, "forward"):
            outputs = recorder.asarray(recorded(layer, recorder, training=False).forward(outputs))
    if loss is not None:
        with named(loss, "probabilities"):
            outputs = recorder.asarray(recorded(loss, recorder).probabilities(outputs))
    recorder.memory["outputs"] = recorder.memory["X"] if outputs is inputs else recorder.want(outputs)


def recorded(part: P, recorder: Recorder, **attributes: Any) -> P:
    """A twin of a part that calls the recorder and holds handles for its arrays."""
    handles = {name: recorder.adopt(part.__dict__[name]) for name in part.arrays()}
    if isinstance(part, Layer) and part.layers:
        handles["layers"] = tuple(recorded(layer, recorder, **attributes) for layer in part.layers)
    return part.twin(engine=recorder, **handles, **attributes)


@contextlib.contextmanager
def named(part: Part, method: str) -> Iterator[None]:
    """Say which part cannot be recorded."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        raise RecordingError(f"{part!r}: {method} cannot be recorded: {error}") from error


class Run:
    """Replays steps in slices; between them, if `watched`, it looks at the loss.

    Where that is no longer finite, the model's memory goes back to a snapshot, at most a second or so old.
    """

    def __init__(self, model: Network, *, watched: bool = True) -> None:
        self._model, self._watched = model, watched
        self._seconds_a_step: dict[Tape, float] = {}
        self._steps = 0
        if watched:
            self._take_snapshot()

    def __call__(self, tape: Tape, steps: int) -> None:
        while steps:
            seconds = self._seconds_a_step.get(tape)
            size = min(steps, max(1, int(SLICE_SECONDS / seconds)) if seconds else 1)
            start = time.perf_counter()
            with self._model.turns:
                tape.run(size)
                self._model.engine.synchronize()
            self._model.turns.let_others()
            self._seconds_a_step[tape] = (time.perf_counter() - start) / size
            steps -= size
            self._check(size)

    def finish(self) -> Array:
        """The epoch's `Memory.total`, once the last step is seen to have left finite weights."""
        self._check(0, thoroughly=True)
        return self._total if self._watched else self._model.engine.asnumpy(self._model.memory.total)

    def _check(self, steps: int, thoroughly: bool = False) -> None:
        if not self._watched:
            return
        if steps:
            self._total = self._model.engine.asnumpy(self._model.memory.total)
        loss = float(self._total[0])
        snapshot_is_due = time.perf_counter() - self._snapshot_time > SNAPSHOT_SECONDS
        if not np.isfinite(loss) or ((thoroughly or snapshot_is_due) and not self._weights_are_finite()):
            with self._model.turns:
                for array, kept in zip(self._arrays(), self._snapshot, strict=True):
                    array[...] = kept
            what = "weights became infinite" if np.isfinite(loss) else f"loss became {loss}"
            raise FloatingPointError(
                f"the {what} in epoch {len(self._model.history.get('loss', [])) + 1}, between the steps "
                f"{self._steps + bool(steps)} and {self._steps + steps} of this call; the weights are back at step "
                f"{self._snapshot_step}. Try a smaller lr, inputs scaled to about 1, or dtype=np.float64"
            )
        self._steps += steps
        if snapshot_is_due:
            self._take_snapshot()

    def _weights_are_finite(self) -> bool:
        return self._model.engine.is_finite(self._model.memory.parameters)

    def _arrays(self) -> list[Array]:
        """What goes back. It lies where it did when this was made, or another `Run` has taken over."""
        model, optimizer = self._model, self._model.optimizer
        state = [layer.__dict__[name] for layer in model.walk() for name in layer.state]
        moments = [] if optimizer is None else [optimizer.__dict__[name] for name in optimizer.state]
        return [model.memory.parameters, *state, *moments]

    def _take_snapshot(self) -> None:
        self._snapshot = [array.copy() for array in self._arrays()]
        self._snapshot_step, self._snapshot_time = self._steps, time.perf_counter()
