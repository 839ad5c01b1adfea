"""``engine="auto"``: the engine that is fastest at a model's training step, found by timing it, once on a machine.

A copy of the model takes the step in question on each engine. What that took is kept in the user's cache directory, a
file for each class of steps, on a machine, with its versions and engines. Steps are of a class where they have the same
parts, and sizes that round to the same powers of two.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from .atomic import write_bytes
from .interop import is_sparse
from .kernels.engine import Engine
from .kernels.threads import Lock
from .losses import Loss
from .machine import cpu_name, usable_cores, version_of
from .memory import Memory
from .network import Network
from .samples import Data
from .selection import brought, engine, engines
from .threads import limited_threads
from .training import Trainer
from .version import __version__

__all__ = ["INSTALL", "Step", "fastest", "folder", "kept_choices", "settle", "settled"]

SECONDS = 0.5  # what all timed replays may take together
PIECE = 1e-3  # seconds, what one of them should take
STEPS = 256  # at most, of one of them
ROUNDS, SURE = 20, 6  # how often each engine is timed; and how often those that are clearly slower
CLEARLY = 1.5  # times as long as the fastest: more than noise makes of the best of so many turns
CALM = 0.8  # of the time; a process that has a core to itself works all of it, one that shares it with another half
TINY = 1e-12  # the learning rate, so that weights stay numbers of the usual size, and BLAS does not skip a factor of 0
WORK = 400_000_000  # rows times parameters of a step, beyond which it is timed with fewer rows

# what BLAS reads when it is loaded
VARIABLES = "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"

INSTALL = "pip install 'fastbp[auto]'"

log = logging.getLogger("fastbp")
clock, cpu_clock = time.perf_counter, time.process_time
_chosen: dict[str, Engine] = {}
_lock = Lock()  # who measures has the cores alone, as far as this process goes


class Step(NamedTuple):
    """A training step to time."""

    model: Network
    loss: Loss
    data: Data
    #: How many it takes from the data; None where these are a batch that comes alone, and is bound for one replay.
    rows: int | None
    accumulate: int = 1
    threads: int | None = None

    @property
    def batch(self) -> int:
        """How many rows there are in a step."""
        return self.data.rows if self.rows is None else min(self.rows, self.data.rows)

    def describe(self) -> str:
        """The class that this step is of, as a text for programs to compare and for people to read."""
        X, y, weights = self.data
        rows = f"{rounded(self.batch)} rows x {rounded(X.shape[1])} {X.dtype}{', sparse' if is_sparse(X) else ''}"
        targets = f"y {y.dtype}{' rows' if y.ndim > 1 else ''}{'' if weights is None else ', weighted'}"
        other = ["accumulated"] * (self.accumulate > 1) + ["batch by batch"] * (self.rows is None)
        other += [] if self.threads is None else [f"{self.threads} threads"]
        return "; ".join([layers_of(self.model), type(self.loss).__name__, rows, targets, *other])


def layers_of(model: Network) -> str:
    """The class of a model's layers and optimizer, in words; written once, as it is asked for at each step alone."""
    if model.memory not in _layers:  # which is new whenever they change
        names = []
        for layer in model.walk():
            largest = max(layer.shapes().values(), key=math.prod, default=())
            size = "x".join(str(rounded(n)) for n in largest)
            names.append(" ".join(filter(None, [type(layer).__name__, size, "" if layer.trainable else "frozen"])))
        optimizer = [] if model.optimizer is None else [type(model.optimizer).__name__]
        _layers[model.memory] = "; ".join([", ".join(names), *optimizer, model.dtype.name])
    return _layers[model.memory]


_layers: WeakKeyDictionary[Memory, str] = WeakKeyDictionary()


class Here(NamedTuple):
    """What speed depends on, besides the step."""

    machine: str
    versions: dict[str, str]
    #: The devices of those that are available, by name.
    engines: dict[str, str]


def settle(
    model: Network, data: Data | None, rows: int | None, loss: Loss, accumulate: int = 1, threads: int | None = None
) -> None:
    """Where "auto" was chosen, move a model to the engine that is the fastest at a training step.

    Parameters
    ----------
    model : Network
    data : Data or None
        What the step takes its rows from; None to stay on the engine that is in use.
    rows : int or None
        How many it takes; None where `data` are a batch that comes alone.
    loss : Loss
    accumulate, threads : optional
        As in `Sequential.training`.
    """
    if model.chooses_engine and data is not None:
        model.keep_to(fastest(Step(model, loss, data, rows, accumulate, threads)))


@contextlib.contextmanager
def settled(
    model: Network, data: Data | None, rows: int | None, loss: Loss, accumulate: int, threads: int | None
) -> Iterator[None]:
    """`settle`, and a ``with`` block for the training on at most so many threads."""
    settle(model, data, rows, loss, accumulate, threads)
    with limited_threads(threads):
        yield


def fastest(step: Step) -> Engine:
    """The engine that takes a step in the least time; timed now, if that was never done here.

    Nothing of the step's model changes. An engine that fails while it is timed is left out, and the logger "fastbp"
    says why; where all fail, it is the engine on which the model is.
    """
    kind = step.describe()
    if kind not in _chosen:
        with _lock:
            if kind not in _chosen:
                found = _kept(kind) or _measured(step, kind)
                if found is None:
                    return step.model.engine
                _chosen[kind] = found
    return _chosen[kind]


def _measured(step: Step, kind: str) -> Engine | None:
    names = list(here().engines)
    if len(names) == 1:
        log.info("fastbp: auto takes %s, the only engine that is here", names[0])
        return engine(names[0])
    start = clock()
    seconds, busy = measure(step)
    if not seconds:
        return None
    log.info("fastbp: auto takes %s; timed in %.2f s", tell(kind, seconds), clock() - start)
    if busy:
        log.info("fastbp: auto forgets this choice with the process, because others kept the processor busy")
    elif len(seconds) == len(names):  # what made an engine fail may be over next time
        _keep(kind, seconds)
    return engine(min(seconds, key=seconds.__getitem__))


def tell(kind: str, seconds: dict[str, float]) -> str:
    """An engine and the times that it was chosen for, in words."""
    first, *others = sorted(seconds, key=seconds.__getitem__)
    times = [f"{seconds[first] * 1e6:.1f} us a step", *(f"{name} {seconds[name] * 1e6:.1f}" for name in others)]
    return f"{first} ({', '.join(times)}) for {kind}"


class Trial:
    """A copy of a step's model on one engine, to time.

    Attributes
    ----------
    seconds : float
        What a step took, at best.
    next : float
        What the next call will take, about.
    """

    def __init__(self, engine: Engine, step: Step) -> None:
        model, loss = copy.deepcopy((step.model, step.loss))
        if model.optimizer is not None:
            model.optimizer.schedule = None  # it may be a user's function, which nobody expects to be called
            model.optimizer.lr = TINY
        model.move_to(engine)
        self._trainer = Trainer(model, lambda: loss, step.accumulate, watched=False)
        self._limit = functools.partial(limited_threads, step.threads)
        self._data, self._streamed = step.data, step.rows is None
        self._rows = min(step.batch, max(32, WORK // (model.memory.parameters.size + 1)))
        self._most = STEPS if self._streamed else min(STEPS, step.data.rows // self._rows)
        self.seconds, self.next, self._steps = math.inf, 0.0, 1
        with self._limit():
            self._prepare()
            self._run()  # may load or compile kernels

    def __call__(self) -> float:
        """Time some steps; returns the seconds of all. Where that is short, the next call takes more steps."""
        with self._limit():
            start = clock()
            self._run()
            took = clock() - start
        self.seconds = min(self.seconds, took / self._steps)
        if took < PIECE and self._steps < self._most:
            self._steps = min(4 * self._steps, self._most)
            self._prepare()
        self.next = self.seconds * self._steps
        return took

    def _prepare(self) -> None:
        rows = self._rows if self._streamed else self._rows * self._steps
        self._piece = self._data.take(slice(rows))
        if not self._streamed:
            self._trainer.bind(self._piece, self._rows)

    def _run(self) -> None:
        if self._streamed:
            self._trainer.epoch_through([self._piece] * self._steps)
        else:
            self._trainer.epoch()

    def close(self) -> None:
        self._trainer.__exit__(None, None, None)


def measure(step: Step) -> tuple[dict[str, float], bool]:
    """Seconds of a step, by the name of each engine that is available and does not fail; and whether to doubt them.

    The engines take turns, so that what else the machine does is no engine's fault alone; each counts by its best turn.
    They are in doubt where this process worked for less than `CALM` of the time, though its engines compute on CPUs.
    """
    trials: dict[str, Trial] = {}
    with contextlib.ExitStack() as stack:
        for name in here().engines:
            with _left_out_if_it_fails(name, trials):
                trials[name] = Trial(engine(name), step)
                stack.callback(trials[name].close)
        spent, start, worked = 0.0, clock(), cpu_clock()
        for turn in range(ROUNDS):
            for name, trial in list(trials.items()):
                slow = trial.seconds > CLEARLY * min(other.seconds for other in trials.values())
                over = spent + trial.next > SECONDS
                if turn == 0 or not (over or (slow and turn >= SURE)):
                    with _left_out_if_it_fails(name, trials):
                        spent += trial()
        busy = cpu_clock() - worked < CALM * (clock() - start) and set(here().engines.values()) == {"cpu"}
    return {name: trial.seconds for name, trial in trials.items()}, busy


@contextlib.contextmanager
def _left_out_if_it_fails(name: str, trials: dict[str, Trial]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever an engine may do wrong
        trials.pop(name, None)
        log.warning("fastbp: auto leaves out %s, which failed while it was timed: %r", name, error)


@functools.cache
def rounded(n: int) -> int:
    """The next power of two, by ratio."""
    return 2 ** round(math.log2(n)) if n else 0


@functools.cache
def here() -> Here:
    """This machine, its versions and its engines, as this process found them first."""
    versions = {"fastbp": __version__, "numpy": np.__version__}
    versions |= {name: version for name in ("numba", "cupy") if (version := version_of(name))}
    available = {info.name: info.device for info in engines() if info.available}
    for name, entries in brought().items():
        for dist in (entry.dist for entry in entries if name in available):
            if dist is not None:
                versions[dist.name] = dist.version
    settings = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    machine = platform.node(), platform.machine(), cpu_name(), f"{usable_cores()} cores", *settings
    return Here(", ".join(machine), versions, available)


def folder() -> Path | None:
    """Where choices are kept, a file each; None without platformdirs, which knows the place."""
    try:
        import platformdirs
    except ImportError:
        return None
    return Path(platformdirs.user_cache_dir("fastbp", appauthor=False)) / "engines"


def kept_choices() -> Iterator[str]:
    """What is kept on disk of this machine, with its present versions and engines, in words."""
    place = folder()
    for path in sorted(place.glob("*.json")) if place else ():
        content = _content(path)
        if content and content[0] == _key(content[0].get("step", "")):
            yield tell(content[0]["step"], content[1])


def _key(kind: str) -> dict[str, Any]:
    """What a choice is kept for: all that it depends on."""
    return here()._asdict() | {"step": kind}


def _path(kind: str, place: Path) -> Path:
    return place / f"{hashlib.sha256(json.dumps(_key(kind), sort_keys=True).encode()).hexdigest()[:32]}.json"


def _keep(kind: str, seconds: dict[str, float]) -> None:
    place = folder()
    if place is None:
        _say(f"fastbp: auto keeps its choices in memory alone; to keep them on disk: {INSTALL}")
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_bytes(_path(kind, place), json.dumps({"key": _key(kind), "seconds": seconds}, indent=1).encode())
    except OSError as error:
        _say(f"fastbp: auto cannot keep its choices in {place}: {error}")


@functools.cache
def _say(line: str) -> None:
    """Warn, once."""
    log.warning(line)


def _kept(kind: str) -> Engine | None:
    """The engine that was chosen for a class of steps before."""
    place = folder()
    content = _content(_path(kind, place)) if place else None
    if content is None:
        return None
    key, seconds = content
    try:
        if key != _key(kind):
            raise ValueError(f"it is for another step, {key}")
        chosen = engine(min(seconds, key=seconds.__getitem__))
    except ValueError as error:
        log.warning("fastbp: auto ignores what is kept of %s: %s", kind, error)
        return None
    log.info("fastbp: auto takes %s; kept from an earlier run", tell(kind, seconds))
    return chosen


def _content(path: Path) -> tuple[dict[str, Any], dict[str, float]] | None:
    """What a file is for, and the seconds of a step on each engine; None where it does not say so, or is not there."""
    try:
        about = json.loads(path.read_bytes())
        key, seconds = about["key"], {str(name): float(x) for name, x in about["seconds"].items()}
        if not isinstance(key, dict) or not seconds or not all(0 < x < math.inf for x in seconds.values()):
            raise ValueError("it holds no choice of an engine")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning("fastbp: auto ignores %s: %r", path, error)
        return None
    return key, seconds
