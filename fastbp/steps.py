"""What a model records, one training step and one forward pass, and how it replays steps in slices."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .kernels.ops import Array
from .part import Part
from .tape import Recorder, RecordingError, Tape

if TYPE_CHECKING:
    from .model import Sequential

__all__ = ["Run", "record_forward", "record_training", "signature"]

SLICE_SECONDS = 0.05  # how long one replay may keep Ctrl-C waiting
SNAPSHOT_SECONDS = 1.0
SMALL = 1 << 16  # bytes of a setting that are compared one by one

P = TypeVar("P", bound=Part)


def record_training(model: Sequential, recorder: Recorder, data: dict[str, Array], batch: int) -> None:
    """Write down a step: take a batch of the slots X, y and order, forward, loss, backward, update."""
    assert model.loss is not None and model.optimizer is not None
    order, X, y = (recorder.slot(name, data[name].shape, data[name].dtype) for name in ("order", "X", "y"))
    rows = recorder.adopt(model.engine.zeros((batch,), np.int64))
    recorder.next_batch(order, recorder.adopt(model.cursor), rows)
    outputs = recorder.take(X, rows)
    targets = (recorder.take_labels if model.loss.classifies else recorder.take)(y, rows)

    layers = [recorded(layer, recorder) for layer in model.layers]
    for layer in layers:
        with named(layer, "forward"):
            outputs = recorder.asarray(layer.forward(outputs))
    with named(model.loss, "gradient"):
        loss = recorded(model.loss, recorder)
        dvalues = recorder.asarray(loss.gradient(outputs, targets, None, recorder.adopt(model.total)))
    for layer in reversed(layers):
        with named(layer, "backward"):
            dvalues = recorder.asarray(layer.backward(dvalues))
            for name, memory in model.gradient_memory(layers.index(layer)).items():
                if f"d{name}" not in layer.__dict__:
                    raise RecordingError(f"{layer!r}: backward must store the gradient of {name} as self.d{name}")
                recorder.want(getattr(layer, f"d{name}"), memory)
    with named(model.optimizer, "update"):
        parameters, gradients = recorder.adopt(model.parameters), recorder.adopt(model.parameter_gradients)
        optimizer = recorded(model.optimizer, recorder)
        optimizer.update(parameters, gradients, None)
    for part, twin in zip((*model.layers, model.loss, model.optimizer), (*layers, loss, optimizer), strict=True):
        for name, value in part.__dict__.items():
            if type(value) in (*PLAIN, float) and twin.__dict__[name] != value:
                raise RecordingError(
                    f"{part!r}: {name} changed while a step was recorded, which happens once, not once a step; "
                    "what changes from step to step is an array named in `state`, updated by an op"
                )


def record_forward(model: Sequential, recorder: Recorder, rows: int, features: int) -> None:
    """Write down a forward pass for prediction, from the tape's memory "X" to its memory "outputs"."""
    recorder.memory["X"] = model.engine.zeros((rows, features), model.dtype)
    outputs = inputs = recorder.adopt(recorder.memory["X"])
    for layer in model.layers:
        with named(layer, "forward"):
            outputs = recorder.asarray(recorded(layer, recorder, training=False).forward(outputs))
    recorder.memory["outputs"] = recorder.memory["X"] if outputs is inputs else recorder.want(outputs)


def recorded(part: P, recorder: Recorder, **attributes: Any) -> P:
    """A twin of a part that calls the recorder and holds handles for its arrays."""
    handles = {name: recorder.adopt(part.__dict__[name]) for name in part.arrays()}
    return part.twin(engine=recorder, **handles, **attributes)


@contextlib.contextmanager
def named(part: Part, method: str) -> Iterator[None]:
    """Say which part cannot be recorded."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        raise RecordingError(f"{part!r}: {method} cannot be recorded: {error}") from error


def signature(part: Part) -> tuple[Any, ...]:
    """What a recording depends on: the part, its settings, and the arrays that it keeps from call to call.

    A recording keeps those arrays alive, so their identity is never used again while it may be looked up.
    """
    settings = [(k, v if type(v) in PLAIN else _value(v)) for k, v in part.settings().items()]
    return type(part), id(part), *settings, *[id(part.__dict__[name]) for name in part.arrays()]


PLAIN = {bool, int, str, type(None)}


def _value(setting: Any) -> Any:
    """Something that equals another setting's where recordings would be the same."""
    if isinstance(setting, np.ndarray) and setting.nbytes <= SMALL:
        return setting.dtype.str, setting.shape, setting.tobytes()
    if isinstance(setting, float | tuple | list | dict | np.generic):
        return repr(setting)
    return id(setting)


class Run:
    """Replays steps in slices; between them it looks at the loss.

    Where the loss is no longer finite, the model's memory goes back to a snapshot, at most a second or so old.
    """

    def __init__(self, model: Sequential, memory: Sequence[Array]) -> None:
        self._model = model
        self._memory = memory
        self._seconds_a_step: dict[Tape, float] = {}
        self._steps = 0
        self._take_snapshot()

    def __call__(self, tape: Tape, steps: int) -> None:
        while steps:
            seconds = self._seconds_a_step.get(tape)
            size = min(steps, max(1, int(SLICE_SECONDS / seconds)) if seconds else 1)
            start = time.perf_counter()
            tape.run(size)
            self._seconds_a_step[tape] = (time.perf_counter() - start) / size
            steps -= size
            self._check(size)

    def finish(self) -> None:
        """See that the last step left finite weights."""
        self._check(0, thoroughly=True)

    def _check(self, steps: int, thoroughly: bool = False) -> None:
        loss = float(self._model.total[0])
        snapshot_is_due = time.perf_counter() - self._snapshot_time > SNAPSHOT_SECONDS
        if not np.isfinite(loss) or ((thoroughly or snapshot_is_due) and not self._weights_are_finite()):
            for array, kept in zip(self._memory, self._snapshot, strict=True):
                array[...] = kept
            what = "weights became infinite" if np.isfinite(loss) else f"loss became {loss}"
            raise FloatingPointError(
                f"the {what} in epoch {len(self._model.history.get('loss', [])) + bool(steps)}, between the steps "
                f"{self._steps + bool(steps)} and {self._steps + steps} of this call; the weights are back at step "
                f"{self._snapshot_step}. Try a smaller lr, inputs scaled to about 1, or dtype=np.float64"
            )
        self._steps += steps
        if snapshot_is_due:
            self._take_snapshot()

    def _weights_are_finite(self) -> bool:
        return bool(np.isfinite(self._model.engine.asnumpy(self._model.parameters)).all())

    def _take_snapshot(self) -> None:
        self._snapshot = [array.copy() for array in self._memory]
        self._snapshot_step, self._snapshot_time = self._steps, time.perf_counter()
