"""`Sequential`: a stack of layers that trains by replaying a recorded step."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from .boundary import as_count, as_features, as_float_type, as_pair
from .kernels.engine import Engine
from .kernels.ops import Array
from .layers import Layer, ReLU
from .losses import Loss
from .optim import Optimizer
from .part import Part
from .progress import Progress
from .selection import engine as choose_engine
from .steps import Run, record_forward, record_training, signature
from .tape import Recorder, Tape
from .threads import limited_threads

__all__ = ["Gradients", "Sequential"]

PREDICT_ROWS = 1024  # how many rows `predict` computes at a time
ALIGNMENT = 256  # bytes
TAPES = 32  # how many recordings a model keeps

P = TypeVar("P")


class Gradients(NamedTuple):
    """What `Sequential.gradients` returns."""

    loss: float
    #: For each layer its parameters' gradients by name, in the parameters' shapes.
    layers: list[dict[str, Array]]
    #: By X, in its shape.
    inputs: Array


class Sequential:
    """A network of layers in a row.

    Parameters
    ----------
    layers : sequence of Layer
        A layer belongs to one model. Layers without weights get them drawn from `seed`, in order; assigned ones stay.
    loss : Loss, optional
        Needed to train and to evaluate.
    optimizer : Optimizer, optional
        Needed to train.
    engine : str or Engine, optional
        See `fastbp.engine`.
    dtype : dtype, default float32
        float32 or float64: of parameters and of all that is computed.
    seed : int, optional
        One seed gives one run: initial weights, shuffles and dropout masks, the same on every engine.
    threads : int, optional
        At most so many threads for BLAS while this model computes; needs threadpoolctl.

    Attributes
    ----------
    layers : tuple of Layer
        Assigning others keeps the values of those that stay.
    history : dict of list
        One number an epoch, over all calls of `fit`: ``loss``, and with validation data ``val_loss`` and
        ``val_accuracy``.

    Examples
    --------
    >>> import fastbp
    >>> X, y = fastbp.spiral_data(100, 3, noise=0.1, seed=0)
    >>> model = fastbp.Sequential(
    ...     [fastbp.Dense(2, 64), fastbp.ReLU(), fastbp.Dense(64, 3)],
    ...     loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(0.02), seed=0,
    ... )
    >>> model.fit(X, y, epochs=300).evaluate(X, y)["accuracy"] > 0.9
    True
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        loss: Loss | None = None,
        optimizer: Optimizer | None = None,
        engine: str | Engine | None = None,
        dtype: Any = np.float32,
        seed: int | None = None,
        threads: int | None = None,
    ) -> None:
        self._dtype = as_float_type(dtype)
        self.threads = threads
        self._engine = choose_engine(engine)
        self.loss = loss
        self.history: dict[str, list[float]] = {}
        self._seeds = np.random.SeedSequence(None if seed is None else as_count(seed, "seed", least=0))
        self._rng = np.random.Generator(np.random.Philox(self._seeds))
        self._layers: tuple[Layer, ...] = ()
        self._optimizer: Optimizer | None = None
        self._lock, self._recording = threading.RLock(), threading.RLock()
        self._assemble(layers, optimizer)

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype

    @property
    def threads(self) -> int | None:
        return self._threads

    @threads.setter
    def threads(self, threads: int | None) -> None:
        self._threads = None if threads is None else as_count(threads, "threads")

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self._layers

    @layers.setter
    def layers(self, layers: Sequence[Layer]) -> None:
        self._assemble(layers, self.optimizer)

    @property
    def loss(self) -> Loss | None:
        return self._loss

    @loss.setter
    def loss(self, loss: Loss | None) -> None:
        _check_kind("loss", loss, Loss)
        self._loss = loss

    @property
    def optimizer(self) -> Optimizer | None:
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer | None) -> None:
        self._assemble(self.layers, optimizer)

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        epochs: int = 10,
        batch_size: int = 32,
        shuffle: bool = True,
        validation_data: tuple[Any, Any] | None = None,
        verbose: bool | None = None,
        threads: int | None = None,
    ) -> Self:
        """Train; a further call goes on where the last one stopped.

        Parameters
        ----------
        X : array, shape (rows, features)
            Finite numbers of any real dtype, at any row stride; converted a batch at a time.
        y : array
            As the loss wants it: labels or one-hot rows, or numbers of shape (rows, outputs).
        epochs, batch_size : int
            The last batch of an epoch is shorter where `batch_size` does not divide the rows.
        shuffle : bool, default True
            Draw a new order of the rows for each epoch.
        validation_data : (X, y), optional
            Evaluated after each epoch, into `history`.
        verbose : bool, optional
            Show a progress bar; by default on a terminal where tqdm is installed.
        threads : int, optional
            For this call, in place of the model's.

        Returns
        -------
        Sequential
            This model.

        Raises
        ------
        ValueError
            For data that does not fit; nothing has changed then.
        FloatingPointError
            Where the loss becomes infinite or NaN. The weights are then those of at most a second before.
        """
        loss, optimizer = _needed("loss", self.loss), _needed("optimizer", self.optimizer)
        if not self.parameters.size:
            raise ValueError("no layer of this model has parameters to train")
        epochs, batch_size = as_count(epochs, "epochs"), as_count(batch_size, "batch_size")
        X, y = self._checked(X, y)
        held_out = (
            None
            if validation_data is None
            else self._checked(*as_pair(validation_data, "validation_data"), "validation_data: ")
        )
        progress = Progress(epochs, verbose)
        order = np.arange(len(X))
        data = {"X": self.engine.table(X), "y": self.engine.table(y), "order": self.engine.table(order)}
        full, rest = divmod(len(X), batch_size)
        threads = self.threads if threads is None else as_count(threads, "threads")
        with self._lock, limited_threads(threads, self.engine), contextlib.ExitStack() as bound, progress:
            tapes = []
            for batch, steps in ((batch_size, full), (rest, 1)):
                if batch and steps:
                    record = partial(record_training, self, data=data, batch=batch)
                    kinds = [(x.shape[1:], x.dtype) for x in data.values()]
                    tape = self._tape("training", batch, *kinds, record=record, parts=[*self.layers, loss, optimizer])
                    bound.enter_context(tape.bound(**data))
                    tapes.append((tape, steps))
            for layer in self.layers:
                layer.forget()
            run = Run(self, [self.parameters, *arrays_of(optimizer), *(a for x in self.layers for a in arrays_of(x))])
            for _ in range(epochs):
                if shuffle:
                    data["order"][...] = self.engine.asarray(self._rng.permutation(len(X)))
                self.cursor[...] = 0
                self.total[...] = 0
                for tape, steps in tapes:
                    run(tape, steps)
                figures = {"loss": float(self.total[0] / self.total[1])}
                if held_out is not None:
                    figures |= {f"val_{name}": value for name, value in self._scores(*held_out).items()}
                for name, value in figures.items():
                    self.history.setdefault(name, []).append(value)
                progress.step(figures)
            run.finish()
        return self

    def predict(self, X: Any) -> Array:
        """Class labels where the loss is one for classes, otherwise the outputs.

        Parameters
        ----------
        X : array, shape (rows, features)

        Returns
        -------
        array, shape (rows,) of int64, or (rows, outputs)
        """
        outputs = self._outputs(X)
        return outputs.argmax(axis=1) if self.loss is not None and self.loss.classifies else outputs

    def predict_proba(self, X: Any) -> Array:
        """Class probabilities, shape (rows, classes)."""
        loss = _needed("loss", self.loss).twin(engine=self.engine)
        return self.engine.asnumpy(loss.probabilities(self.engine.asarray(self._outputs(X))))

    def evaluate(self, X: Any, y: Any) -> dict[str, float]:
        """The mean ``loss`` on data held out, and the ``accuracy`` where there are classes."""
        return self._scores(*self._checked(X, y))

    def gradients(self, X: Any, y: Any) -> Gradients:
        """The mean loss of a batch and all its gradients, in one training pass that changes nothing."""
        loss = _needed("loss", self.loss).twin(engine=self.engine)
        X, y = self._checked(X, y)
        layers = [x.twin(**{name: x.__dict__[name].copy() for name in x.state}) for x in self.layers]
        outputs = self.engine.asarray(X, self.dtype)
        with limited_threads(self.threads, self.engine):
            for layer in layers:
                outputs = layer.forward(outputs)
            mean = loss.forward(outputs, y)
            dvalues = loss.backward()
            for layer in reversed(layers):
                dvalues = layer.backward(dvalues)
        return Gradients(mean, [{name: getattr(x, f"d{name}") for name in x.parameters()} for x in layers], dvalues)

    def forward(self, X: Any) -> Array:
        """The last layer's output in a training pass; each layer keeps its own `output` to look at."""
        outputs = self.engine.asarray(as_features(X, self._features, dtype=self.dtype), self.dtype)
        with limited_threads(self.threads, self.engine):
            for layer in self.layers:
                outputs = layer.forward(outputs)
        return outputs

    def backward(self, dvalues: Any) -> Array:
        """Take a gradient by the output of the last `forward` back to X; each layer keeps its gradients to look at.

        `step` then updates the parameters with them.

        Parameters
        ----------
        dvalues : array, shape (rows, outputs)

        Returns
        -------
        array, shape (rows, features)
            The gradient by X.
        """
        gradient = self.engine.asarray(dvalues, self.dtype)
        if gradient.shape != self.layers[-1].output.shape:
            raise ValueError(f"dvalues must have shape {self.layers[-1].output.shape}, got {gradient.shape}")
        with limited_threads(self.threads, self.engine):
            for layer in reversed(self.layers):
                gradient = layer.backward(gradient)
        return gradient

    def step(self) -> None:
        """Let the optimizer take a step with the gradients of the last `backward`."""
        optimizer = _needed("optimizer", self.optimizer)
        for place, layer in enumerate(self.layers):
            for name, memory in self.gradient_memory(place).items():
                memory[...] = getattr(layer, f"d{name}")
        optimizer.update(self.parameters, self.parameter_gradients, None)

    def summary(self) -> str:
        """A table of the layers, as text."""
        counts = [sum(math.prod(shape) for shape in layer.shapes().values()) for layer in self.layers]
        width = max(len(repr(layer)) for layer in self.layers)
        lines = [f"{layer!r:{width}}  {count:>12,}" for layer, count in zip(self.layers, counts, strict=True)]
        parts = [repr(part) for part in (self.loss, self.optimizer) if part is not None]
        about = f"{sum(counts):,} parameters", self.dtype.name, f"engine {self.engine.name}", *parts
        return "\n".join([*lines, ", ".join(about)])

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write the model to a safetensors file; `fastbp.load` reads it. See `fastbp.files.save`."""
        from .files import save

        save(self, path, metadata)

    def gradient_memory(self, place: int) -> dict[str, Array]:
        """Where training writes the gradients of a layer's parameters, by name and in their shapes."""
        layer = self.layers[place]
        return {
            name: self.parameter_gradients[where].reshape(layer.shapes()[name])
            for owner, name, where in self._places
            if owner is layer
        }

    def random_state(self) -> dict[str, Any]:
        """The state of the generator that shuffles, and the seed, as what JSON holds."""
        state = self._rng.bit_generator.state
        words = {name: [int(word) for word in value] for name, value in state["state"].items()}
        return {"seed": self._seeds.entropy, **state, "state": words, "buffer": [int(word) for word in state["buffer"]]}

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Go back to what `random_state` gave."""
        words = {name: np.array(value, np.uint64) for name, value in state["state"].items()}
        self._rng.bit_generator.state = state | {"state": words, "buffer": np.array(state["buffer"], np.uint64)}
        self._seeds = np.random.SeedSequence(state["seed"])

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # a shallow one would share layers, which have one owner

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._made_anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock, self._recording = threading.RLock(), threading.RLock()
        self._gather()

    def __repr__(self) -> str:
        return f"Sequential({list(self.layers)!r}, loss={self.loss!r}, optimizer={self.optimizer!r})"

    # what `_gather` makes, so that pickle and deepcopy leave it out
    _made_anew = "parameters", "parameter_gradients", "cursor", "total", "_places", "_tapes", "_lock", "_recording"

    def _assemble(self, layers: Sequence[Layer], optimizer: Optimizer | None) -> None:
        """Take layers and optimizer into this model, or raise before anything has changed."""
        with self._lock, self._recording:  # not while another thread trains
            self._assemble_alone(layers, optimizer)

    def _assemble_alone(self, layers: Sequence[Layer], optimizer: Optimizer | None) -> None:
        if not isinstance(layers, Iterable):
            raise TypeError(f"layers must be a sequence of layers, got {layers!r}")
        layers = tuple(layers)
        _check_stack(layers)
        _check_kind("optimizer", optimizer, Optimizer)
        for part in (*layers, optimizer):
            if part is not None and part.owner not in (None, self):
                raise ValueError(f"{part!r} belongs to another model; make a new one, or copy.deepcopy it")
        for place, (layer, following) in enumerate(zip(layers, (*layers[1:], None), strict=True)):
            if layer.owner is None:
                layer.undraw()
                layer.draw(self._rng, before_relu=isinstance(following, ReLU))
                if lacking := layer.parameters().keys() - (layer.__dict__.keys() & layer.shapes().keys()):
                    raise TypeError(f"{layer!r}: shapes must name and draw must assign {', '.join(sorted(lacking))}")
                layer.reseed(self._seeds, place)
        for part in (*self.layers, self.optimizer):
            if part is not None and part not in (*layers, optimizer):
                part.owner = None
        if optimizer is not None and (optimizer is not self.optimizer or layers != self.layers):
            optimizer.reset()
        self._layers, self._optimizer = layers, optimizer
        self._gather()

    def _gather(self) -> None:
        """Lay all parameters into one array, decayed before undecayed ones, and make the layers' own views of it."""
        named = [(layer, name, p) for layer in self.layers for name, p in layer.parameters().items()]
        step = ALIGNMENT // self.dtype.itemsize
        self._places: list[tuple[Layer, str, slice]] = []
        size = 0
        for layer, name, _ in sorted(named, key=lambda item: not item[2].decay):
            stop = size + math.prod(layer.shapes()[name])
            self._places.append((layer, name, slice(size, stop)))
            size = -(-stop // step) * step
        self.parameters = self.engine.zeros((size,), self.dtype)
        self.parameter_gradients = self.engine.zeros((size,), self.dtype)
        self.cursor = self.engine.zeros((1,), np.int64)
        self.total = self.engine.zeros((2,), np.float64)
        for layer, name, where in self._places:
            view = self.parameters[where].reshape(layer.shapes()[name])
            view[...] = self.engine.asarray(layer.__dict__[name])
            layer.__dict__[name] = view
        for layer in self.layers:
            layer.owner, layer.engine = self, self.engine
            layer.forget()
            for name in layer.state:
                layer.__dict__[name] = self.engine.asarray(layer.__dict__[name]).copy()
        if self.optimizer is not None:
            self.optimizer.owner = self
            self.optimizer.prepare(self.engine, size, self.dtype)
        self._tapes: dict[Any, Tape] = {}

    def _tape(self, *key: Any, record: Callable[[Recorder], None], parts: Sequence[Part]) -> Tape:
        """The recording for `key` and the parts as they are; made where it is not there yet."""
        key = *key, *map(signature, parts)
        with self._recording:
            tape = self._tapes.get(key)
            if tape is None:
                recorder = Recorder(self.engine, self.dtype)
                record(recorder)
                while len(self._tapes) >= TAPES:
                    del self._tapes[next(iter(self._tapes))]
                tape = self._tapes[key] = recorder.tape()
                tape.settings = [part.settings() for part in parts]
        return tape

    @property
    def _features(self) -> int | None:
        """How many features X must have; None where no layer says so."""
        return next((layer.features for layer in self.layers if layer.features is not None), None)

    def _checked(self, X: Any, y: Any, prefix: str = "") -> tuple[Array, Array]:
        """X and y as the tapes take them, or an error that names what does not fit."""
        X = as_features(X, self._features, f"{prefix}X", self.dtype)
        width = X.shape[1]
        for layer in self.layers:
            width = layer.width(width)
        return X, _needed("loss", self.loss).targets(y, len(X), width, None, f"{prefix}y", self.dtype)[0]

    def _outputs(self, X: Any) -> Array:
        """The last layer's output for all rows of X, as a NumPy array."""
        X = as_features(X, self._features, dtype=self.dtype)
        outputs = []
        with limited_threads(self.threads, self.engine):
            for start in range(0, len(X), PREDICT_ROWS):
                piece = X[start : start + PREDICT_ROWS]
                record = partial(record_forward, self, rows=piece.shape[0], features=piece.shape[1])
                tape = self._tape("forward", *piece.shape, record=record, parts=self.layers)
                with tape.bound():
                    tape.memory["X"][...] = self.engine.asarray(piece)
                    tape.run()
                    outputs.append(self.engine.asnumpy(tape.memory["outputs"]).copy())
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def _scores(self, X: Array, y: Array) -> dict[str, float]:
        loss = _needed("loss", self.loss).twin(engine=self.engine)
        outputs = self._outputs(X)
        scores = {"loss": loss.forward(outputs, y)}
        if loss.classifies:
            scores["accuracy"] = float(np.mean(outputs.argmax(axis=1) == y))
        return scores


def arrays_of(part: Part) -> list[Array]:
    """The arrays that a part keeps from call to call, besides a layer's parameters."""
    return [part.__dict__[name] for name in part.state]


def _needed(name: str, part: P | None) -> P:
    if part is None:
        raise ValueError(f"this needs a model with {name}=, as in Sequential(layers, loss=..., optimizer=...)")
    return part


def _check_kind(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind | None):
        raise TypeError(f"{name} must be a fastbp {kind.__name__}, got {value!r}")


def _check_stack(layers: tuple[Layer, ...]) -> None:
    if not layers:
        raise ValueError("layers must hold at least one layer")
    for place, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            raise TypeError(f"layers[{place}] must be a fastbp Layer, got {layer!r}")
        if any(layer is other for other in layers[:place]):
            raise ValueError(f"layers[{place}], {layer!r}, stands in the model twice")
    width = next((layer.features for layer in layers if layer.features is not None), None)
    if width is not None:
        for layer in layers:
            width = layer.width(width)
