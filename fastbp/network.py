"""What a model is made of: its layers, loss and optimizer, their memory, and the recordings made of them."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import numpy as np

from .boundary import as_count, as_features, as_float_type, as_seed, as_tuple, on_host
from .kernels.engine import Engine
from .kernels.ops import Array
from .kernels.threads import Lock
from .layers import Layer
from .losses import Loss
from .memory import Memory
from .optim import Optimizer
from .part import Part
from .samples import Data
from .schedules import Schedule
from .selection import AUTO, choice
from .selection import engine as choose_engine
from .shuffling import shuffler
from .signatures import Signatures
from .tape import Recorder, Tape
from .threads import Turns

__all__ = ["Network"]

P = TypeVar("P")
TAPES, TAPES_BYTES = 32, 1 << 28  # how many recordings a model keeps, and how much memory beside the last one's


class Network:
    """The owner of layers, a loss and an optimizer; `Sequential` says what it does with them."""

    #: How many the last epoch through batches that came one by one had, which the next one's schedule wants to know.
    batches: int | None = None

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
        precision: str | None = None,
    ) -> None:
        self._dtype = as_float_type(dtype)
        self.threads = threads
        engine = choice(engine)
        self._auto, self._engine = engine == AUTO, choose_engine(engine)
        if precision is not None:
            self._engine = self._engine.at_precision(precision)
        if precision not in (None, "fp32") and self._dtype != np.float32:
            raise ValueError(f"precision={precision!r} needs dtype float32, got {self._dtype}")
        self.loss = loss
        self.history: dict[str, list[float]] = {}
        self._seeds = np.random.SeedSequence(as_seed(seed))
        self._rng = np.random.Generator(np.random.Philox(self._seeds))
        self._layers: tuple[Layer, ...] = ()
        self._optimizer: Optimizer | None = None
        self._make_locks()
        self._assemble(layers, optimizer)

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def chooses_engine(self) -> bool:
        """Whether ``engine="auto"`` was chosen: `engine` is then where the last fit went, before it NumPy."""
        return self._auto

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
        if loss is not None:
            loss.go_to(self.engine)
        self._loss = loss

    @property
    def optimizer(self) -> Optimizer | None:
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer | None) -> None:
        self._assemble(self.layers, optimizer)

    def move_to(self, engine: str | Engine) -> Self:
        """Let another engine compute from now on; parameters, optimizer, state and random numbers stay, bit for bit.

        Parameters
        ----------
        engine : str or Engine
            See `fastbp.engine`; with ``"auto"``, the next fit chooses. One that is named computes at the precision
            that this model has now, where it can.

        Returns
        -------
        Self
            What was taken from it before, such as ``layer.weights``, is no longer part of it.

        Examples
        --------
        >>> import fastbp
        >>> fastbp.Sequential([fastbp.Dense(2, 3)], engine="auto").move_to("numpy").chooses_engine
        False
        """
        chosen = choice(engine, precision=self.engine.precision)
        if isinstance(chosen, Engine):
            self.keep_to(chosen)
        self._auto = chosen == AUTO
        return self

    def keep_to(self, engine: Engine) -> None:
        """Do what `move_to` does, but for what the next fit may choose."""
        with self._lock, self._recording:
            if engine is self.engine:
                return
            parts = self.parts()
            with self.all_or_nothing(*parts):
                for part in parts:
                    part.go_to(engine)
                self._engine = engine
                self._gather()

    def walk(self) -> Iterator[Layer]:
        """All layers, those inside others too."""
        for layer in self.layers:
            if layer.layers:
                yield from (inner for _, inner in layer.walk())
            else:  # the usual one, for which walk() would take four times as long, in each prediction
                yield layer

    def parts(self) -> list[Part]:
        """All layers, those inside others too, and the loss and the optimizer where there are any."""
        return [part for part in (*self.walk(), self.loss, self.optimizer) if part is not None]

    def places(self) -> dict[str, tuple[Layer, str]]:
        """Layers and names of the arrays that a trained model consists of, parameters and other state.

        By path, such as ``"0.weights"``, or ``"1.layers.0.weights"`` for a layer inside another one.
        """
        return {
            f"{path}{name}": (inner, name)
            for place, layer in enumerate(self.layers)
            for path, inner in layer.walk(f"{place}.")
            for name in inner.arrays()
        }

    def note(self, figures: Mapping[str, float]) -> None:
        """Write an epoch's figures into the history."""
        with self.turns:
            for name, value in figures.items():
                self.history.setdefault(name, []).append(value)

    def permutation(self, rows: int) -> Array:
        """A new order of some rows, drawn from this model's seed; NumPy's array of int64, shape (rows,)."""
        order = np.empty(rows, np.int64)
        shuffler(choose_engine("numpy"), self._rng, order)()
        return order

    def shuffler(self, order: Array) -> Callable[[], None]:
        """What puts new orders of rows, drawn from this model's seed, into an array of int64 of its engine."""
        return shuffler(self.engine, self._rng, order)

    def random_state(self) -> dict[str, Any]:
        """The state of the generator that shuffles, and the seed, as what JSON holds."""
        state = self._rng.bit_generator.state
        words = {name: [int(word) for word in value] for name, value in state["state"].items()}
        return {"seed": self._seeds.entropy, **state, "state": words, "buffer": [int(word) for word in state["buffer"]]}

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Go back to what `random_state` gave.

        Raises
        ------
        ValueError, TypeError, KeyError, IndexError, OverflowError
            For what it never gives.
        """
        if not 0 <= state["buffer_pos"] <= len(state["buffer"]) == 4:
            raise ValueError("buffer_pos must be a place in the buffer")  # which NumPy does not look at
        words = {name: np.array(value, np.uint64) for name, value in state["state"].items()}
        self._rng.bit_generator.state = state | {"state": words, "buffer": np.array(state["buffer"], np.uint64)}
        self._seeds = np.random.SeedSequence(state["seed"])

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Hold other threads that train this model between two steps, for a ``with`` block."""
        with self.turns.queue, self.turns, self._recording:
            yield

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # a shallow one would share layers, which have one owner

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = twin = object.__new__(type(self))
        twin.__setstate__(self._state_copied(memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        others_train = self._training not in (None, threading.get_ident())
        return self._state_copied({id(self): self}) if others_train else self._state()

    def _state(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._made_anew}

    def _state_copied(self, memo: dict[int, Any]) -> dict[str, Any]:
        with self.at_rest():
            return copy.deepcopy(self._state(), memo)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._make_locks()
        self._gather()

    # what these two make, so that pickle and deepcopy leave it out
    _made_anew = "memory", "_tapes", "_signatures", "_lock", "_recording", "turns", "_training"

    def _make_locks(self) -> None:
        self._lock, self._recording = Lock(), Lock()
        self.turns = Turns()
        self._training: int | None = None  # by which thread

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Train in a ``with`` block; other threads wait until it ends.

        Raises
        ------
        RuntimeError
            Where this thread trains the model already.
        """
        with self._lock:
            if self._training == threading.get_ident():
                raise RuntimeError(
                    "this model is being trained: its callbacks and batches may predict, evaluate and change it, "
                    "but not train it; train a copy.deepcopy of it"
                )
            self._training = threading.get_ident()
            try:
                yield
            finally:
                self._training = None

    def _assemble(self, layers: Sequence[Layer], optimizer: Optimizer | None) -> None:
        """Take layers and optimizer into this model, or raise before anything has changed."""
        with self._lock, self._recording:  # not while another thread trains
            self._assemble_alone(layers, optimizer)

    def _assemble_alone(self, layers: Sequence[Layer], optimizer: Optimizer | None) -> None:
        layers = as_tuple(layers, "layers", "layers")
        features = _check_stack(layers)
        _check_kind("optimizer", optimizer, Optimizer)
        for part in (*(x for layer in layers for _, x in layer.walk()), optimizer):
            if part is not None and part.owner not in (None, self):
                raise ValueError(f"{part!r} belongs to another model; make a new one, or copy.deepcopy it")
        inner = tuple(x for layer in layers for _, x in layer.walk())
        schedule = None if optimizer is None or not isinstance(optimizer.schedule, Schedule) else optimizer.schedule
        with self.all_or_nothing(*self.walk(), *inner, self.optimizer, optimizer, schedule):
            self._take(layers, inner, optimizer, features)

    def _take(
        self, layers: tuple[Layer, ...], inner: tuple[Layer, ...], optimizer: Optimizer | None, features: int | None
    ) -> None:
        """Make these the model's own."""
        for layer in inner:
            if layer.owner is None:
                layer.undraw()
        for layer, following in zip(layers, (*layers[1:], None), strict=True):
            if layer.owner is None:
                layer.draw(self._rng, before_relu=following is not None and following.rectifies)
        for place, layer in enumerate(inner):
            if layer.owner is None:
                layer.check_drawn()
                layer.reseed(self._seeds, place)
        for part in (*self.walk(), self.optimizer):
            if part is not None and part not in (*inner, optimizer):
                part.owner = None
        if optimizer is not None and optimizer is not self.optimizer:
            optimizer.reset()
        self._layers, self._optimizer = layers, optimizer
        self._features = features
        self._gather()

    @contextlib.contextmanager
    def all_or_nothing(self, *parts: Part | Schedule | None) -> Iterator[None]:
        """Put back what this model and some parts were, where something is raised: for want of memory, or by Ctrl-C.

        Another thread that trains the model is waited for, before anything changes.
        """
        with self._lock, self._recording:
            random = self._rng.bit_generator.state
            before = [(each, each.__dict__.copy()) for each in (self, *parts) if each is not None]
            try:
                yield
            except BaseException:
                for each, attributes in before:  # never without them, because other threads may predict
                    each.__dict__.update(attributes)
                    for name in each.__dict__.keys() - attributes.keys():
                        del each.__dict__[name]
                self._rng.bit_generator.state = random
                raise

    def _gather(self) -> None:
        """Lay all parameters into one array, of which the layers' own become views, and take the other state over."""
        before = self.__dict__.get("memory")
        self.memory = Memory(self.walk(), self.engine, self.dtype, before)
        for layer in self.walk():
            layer.owner, layer.engine = self, self.engine
            layer.forget()
            for name in layer.state:
                layer.__dict__[name] = self.engine.asarray(layer.__dict__[name]).copy()
        if self.optimizer is not None:
            self.optimizer.owner = self
            if before is not None:
                self.optimizer.follow(self.memory, before)
            self.optimizer.prepare(self.engine, len(self.memory.gradients), self.dtype)
        self._tapes: dict[Any, Tape] = {}
        self._signatures = Signatures()

    def tape(self, *key: Any, record: Callable[[Recorder], None], parts: Sequence[Part]) -> Tape:
        """The recording for `key` and the parts as they are; made where it is not there yet."""
        with self._recording:
            key = *key, *map(self._signatures, parts)
            tape = self._tapes.pop(key, None)
            if tape is None:
                recorder = Recorder(self.engine, self.dtype)
                record(recorder)
                tape = recorder.tape()
                while len(self._tapes) >= TAPES or sum(kept.nbytes for kept in self._tapes.values()) > TAPES_BYTES:
                    del self._tapes[next(iter(self._tapes))]
            self._tapes[key] = tape  # behind those that were used less lately
        return tape

    def checked(self, X: Any, y: Any, sample_weight: Any = None, prefix: str = "", loss: Loss | None = None) -> Data:
        """X, y and weights as the tapes take them, or an error that names what does not fit."""
        X = self._features_of(X, f"{prefix}X")
        rows, width = X.shape
        for layer in self.layers:
            width = layer.width(width)
        loss = loss or needed("loss", self.loss)
        y, sample_weight = (on_host(x, self.engine) for x in (y, sample_weight))
        return Data(X, *loss.targets(y, rows, width, sample_weight, f"{prefix}y", self.dtype))

    def loss_with(self, class_weight: Any) -> Loss:
        """What training needs: the loss, here with class weights in place of its own."""
        loss = needed("loss", self.loss)
        needed("optimizer", self.optimizer)
        if not len(self.memory.gradients):
            raise ValueError("no layer of this model has parameters to train")
        return loss if class_weight is None else loss.with_class_weight(class_weight)

    def _features_of(self, X: Any, name: str = "X") -> Array:
        """X as a table that the first layer takes, in its own dtype, or an error that names what does not fit."""
        table = as_features(X, self._features, name, self.dtype, self.engine)
        self.layers[0].check_rows(table, name)
        return table


def _check_kind(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind | None):
        raise TypeError(f"{name} must be a fastbp {kind.__name__}, got {value!r}")


def _check_stack(layers: tuple[Layer, ...]) -> int | None:
    """How many features the layers take; None where none says so."""
    if not layers:
        raise ValueError("layers must hold at least one layer")
    seen: set[int] = set()
    for place, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            raise TypeError(f"layers[{place}] must be a fastbp Layer, got {layer!r}")
        for path, inner in layer.walk(f"layers[{place}]."):
            if id(inner) in seen:
                raise ValueError(f"{path.rstrip('.')}, {inner!r}, stands in the model twice")
            seen.add(id(inner))
    features = next((layer.features for layer in layers if layer.features is not None), None)
    if features is not None:
        width = features
        for layer in layers:
            width = layer.width(width)
    return features


def needed(name: str, part: P | None) -> P:
    """The loss or the optimizer, or an error where the model has none."""
    if part is None:
        raise ValueError(f"this needs a model with {name}=, as in Sequential(layers, loss=..., optimizer=...)")
    return part
