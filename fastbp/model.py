"""`Sequential`: a stack of layers that trains by replaying a recorded step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias, TypeVar

import numpy as np

from .boundary import as_count, as_metrics, as_samples
from .callbacks import Callback, EpochFunction, told
from .kernels.ops import Array
from .layers import Layer
from .losses import Loss
from .network import Network
from .progress import Progress
from .steps import record_forward
from .threads import limited_threads
from .training import Data, Trainer

if TYPE_CHECKING:
    from .checkpoints import Checkpoints

__all__ = ["Gradients", "Sequential"]

PREDICT_ROWS = 1024  # how many rows `predict` computes at a time

P = TypeVar("P")
#: Functions of targets and predictions, by name or with names of their own.
Metrics: TypeAlias = "Sequence[Callable[..., float]] | Mapping[str, Callable[..., float]]"


class Gradients(NamedTuple):
    """What `Sequential.gradients` returns."""

    loss: float
    #: For each layer its parameters' gradients by name, in the parameters' shapes; those of a layer inside another
    #: one with its path, as in ``"layers.0.weights"``.
    layers: list[dict[str, Array]]
    #: By X, in its shape.
    inputs: Array


class Sequential(Network):
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
    precision : {"fp32", "tf32", "bf16"}, default "fp32"
        What float32 numbers are rounded to where matrices are multiplied, on an engine that can ("cupy"): sums,
        weights and all else stay float32.

    Attributes
    ----------
    layers : tuple of Layer
        Assigning others keeps the values of those that stay.
    history : dict of list
        One number an epoch, over all calls of `fit`: ``loss``, and with validation data ``val_loss``, ``val_accuracy``
        and metrics.
    memory : Memory
        Parameters, gradients and counters, as flat arrays of the engine.

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

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        epochs: int = 10,
        batch_size: int = 32,
        shuffle: bool = True,
        sample_weight: Any = None,
        class_weight: Any = None,
        validation_data: Sequence[Any] | None = None,
        metrics: Metrics = (),
        callbacks: Sequence[Callback | EpochFunction] = (),
        accumulate: int = 1,
        checkpoint: str | Path | None = None,
        every: int = 1,
        resume: bool = False,
        verbose: bool | None = None,
        threads: int | None = None,
    ) -> Self:
        """Train; a further call goes on where the last one stopped.

        Parameters
        ----------
        X : array, shape (rows, features)
            Finite numbers of any real dtype, at any row stride; converted a batch at a time, so that it may be mapped
            from a file and larger than memory. Or, without `y`, batches: an iterable of (X, y) or (X, y,
            sample_weight), gone through anew in each epoch, or a function that returns one.
        y : array
            As the loss wants it: labels, one-hot rows or rows of probabilities, or numbers of shape (rows, outputs).
        epochs, batch_size : int
            The last batch of an epoch is shorter where `batch_size` does not divide the rows.
        shuffle : bool, default True
            Draw a new order of the rows for each epoch. Batches are taken as they come.
        sample_weight : array, shape (rows,), optional
            How often each row counts.
        class_weight : array of shape (classes,), dict or "balanced", optional
            In place of the loss's; "balanced" is rows / (classes * rows of the class), rows counted by their weights.
        validation_data : (X, y) or (X, y, sample_weight), optional
            Evaluated after each epoch, into `history`.
        metrics : sequence or dict of functions, optional
            Called with the targets and predictions of the validation data, and with `sample_weight` where there is
            one, as those of sklearn.metrics are; `history` has them as ``"val_"`` and their names.
        callbacks : sequence of Callback or function, optional
            What is called after each epoch, with the model and its figures; one that returns True ends training.
        accumulate : int, default 1
            Take the mean gradient of so many batches for each update.
        checkpoint : path, optional
            A file to write every `every` epochs and at the end: the model, and how far this call has come. The file is
            whole at any time; `fastbp.load` reads it, too.
        every : int, default 1
        resume : bool, default False
            If there is that file, go on from it, to the same bits as if training had never stopped: by the same call
            again, on a model made in the same way.
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

        Examples
        --------
        >>> import fastbp
        >>> X, y = fastbp.spiral_data(50, 3, seed=0)
        >>> model = fastbp.Sequential([fastbp.Dense(2, 16), fastbp.ReLU(), fastbp.Dense(16, 3)],
        ...                           loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(), seed=0)
        >>> model.fit(X, y, epochs=3, validation_data=(X, y)).history.keys()
        dict_keys(['loss', 'val_loss', 'val_accuracy'])
        """
        _, optimizer = _needed("loss", self.loss), _needed("optimizer", self.optimizer)
        epochs, batch_size = as_count(epochs, "epochs"), as_count(batch_size, "batch_size")
        accumulate = as_count(accumulate, "accumulate")
        threads = self.threads if threads is None else as_count(threads, "threads")
        functions = as_metrics(metrics)
        held_out = None
        if validation_data is not None:
            held_out = self._checked(*as_samples(validation_data, "validation_data"), "validation_data: ")
        every = as_count(every, "every")
        if resume and checkpoint is None:
            raise ValueError("resume=True needs checkpoint, the file to go on from")
        data, batches, loss = self._source(X, y, sample_weight, class_weight)
        names = "loss", *(() if held_out is None else [f"val_{name}" for name in self._score_names(functions)])
        for name in optimizer.monitored():
            if name not in names:
                raise ValueError(
                    f"the schedule monitors {name!r}, but fit gives {', '.join(names)}; see validation_data"
                )
        with (
            self._lock,
            limited_threads(threads, self.engine),
            told(callbacks, self, names) as listeners,
            Progress(epochs, verbose) as progress,
            Trainer(self, loss, accumulate) as trainer,
        ):
            checkpoints = self._checkpoints(checkpoint, every, callbacks)
            done, over = checkpoints.resume() if checkpoints and resume else (0, False)
            for epoch in range(epochs if over else done, epochs):
                if data is None:
                    mean = trainer.epoch_through(batches())
                else:
                    if epoch == done or listeners:  # which may have changed the model
                        trainer.bind(data, batch_size)
                    mean = trainer.epoch(self.permutation(len(data.X)) if shuffle else None)
                figures = {"loss": mean}
                if held_out is not None:
                    scores = self._scores(held_out, functions)
                    figures |= {f"val_{name}": value for name, value in scores.items()}
                for name, value in figures.items():
                    self.history.setdefault(name, []).append(value)
                progress.step(figures)
                optimizer.observe(figures)
                over = sum(bool(listener(self, figures)) for listener in listeners) > 0  # all are told
                if checkpoints:
                    checkpoints.epoch(epoch + 1, epochs, over=over)
                if over:
                    break
        return self

    def train_on_batch(
        self, X: Any, y: Any, *, sample_weight: Any = None, class_weight: Any = None, threads: int | None = None
    ) -> float:
        """Train one step on a batch, which `history` does not show.

        Parameters
        ----------
        X : array, shape (batch, features)
        y : array
            As in `fit`.
        sample_weight, class_weight, threads : optional
            As in `fit`.

        Returns
        -------
        float
            The batch's loss, before the step.

        Raises
        ------
        ValueError, FloatingPointError
            As in `fit`.
        """
        threads = self.threads if threads is None else as_count(threads, "threads")
        loss = self._loss_with(class_weight)
        data = self._checked(X, y, sample_weight, loss=loss)
        with self._lock, limited_threads(threads, self.engine), Trainer(self, loss) as trainer:
            trainer.bind(data, len(data.X))
            return trainer.epoch()

    @contextlib.contextmanager
    def training(
        self, loss: Loss | None = None, accumulate: int = 1, *, threads: int | None = None, watched: bool = True
    ) -> Iterator[Trainer]:
        """Train by a loop of one's own, in a ``with`` block that no other thread may enter meanwhile.

        Parameters
        ----------
        loss : Loss, optional
            In place of the model's.
        accumulate, threads : optional
            As in `fit`. Without an optimizer, an epoch leaves its mean gradient in ``memory.gradients`` where
            `accumulate` is its number of batches, above 1.
        watched : bool, default True
            Whether a loss or weights that are not finite raise FloatingPointError.

        Yields
        ------
        Trainer
            Its ``bind(data, batch_size)`` and ``epoch(order)`` check nothing of what they are given.
        """
        threads = self.threads if threads is None else as_count(threads, "threads")
        with (
            self._lock,
            limited_threads(threads, self.engine),
            Trainer(self, _needed("loss", loss or self.loss), accumulate, watched=watched) as trainer,
        ):
            yield trainer

    def predict(self, X: Any) -> Array:
        """What the loss makes of the outputs: class labels where it is one for classes, numbers in the units of y.

        Parameters
        ----------
        X : array, shape (rows, features)

        Returns
        -------
        array, shape (rows,) of int64, or (rows, outputs)
        """
        outputs = self._outputs(self._features_of(X))
        return outputs if self.loss is None else self.loss.decide(outputs)

    def predict_proba(self, X: Any) -> Array:
        """Class probabilities, shape (rows, classes)."""
        return self._outputs(self._features_of(X), _needed("loss", self.loss))

    def evaluate(self, X: Any, y: Any, *, sample_weight: Any = None, metrics: Metrics = ()) -> dict[str, float]:
        """The ``loss`` on data held out, the ``accuracy`` where there are classes, and metrics as in `fit`."""
        return self._scores(self._checked(X, y, sample_weight), as_metrics(metrics))

    def gradients(self, X: Any, y: Any, *, sample_weight: Any = None) -> Gradients:
        """The loss of a batch and all its gradients, in one training pass that changes nothing."""
        loss = _needed("loss", self.loss).twin(engine=self.engine)
        X, y, weights = self._checked(X, y, sample_weight)
        layers = [_copied(layer) for layer in self.layers]
        outputs = self.engine.asarray(X, self.dtype)
        total = self.engine.zeros((2,), np.float64)
        with limited_threads(self.threads, self.engine):
            for layer in layers:
                outputs = layer.forward(outputs)
            dvalues = loss.gradient(outputs, y, weights, total)
            for layer in reversed(layers):
                dvalues = layer.backward(dvalues)
        found = [
            {f"{path}{name}": getattr(x, f"d{name}") for path, x in layer.walk() for name in x.shapes()}
            for layer in layers
        ]
        return Gradients(loss.value(total), found, dvalues)

    def forward(self, X: Any) -> Array:
        """The last layer's output in a training pass; each layer keeps its own `output` to look at."""
        outputs = self.engine.asarray(self._features_of(X), self.dtype)
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
        for layer in self.walk():
            for name, where in self.memory.gradients_of(layer).items():
                where[...] = getattr(layer, f"d{name}")
        if optimizer.schedule is not None:
            optimizer.rate[...] = optimizer.rates(np.array([float(len(self.history.get("loss", ())))]))
        optimizer.update(self.memory.trained, self.memory.gradients, self.memory.decayed)

    def summary(self) -> str:
        """A table of the layers, as text."""
        rows = [
            (
                f"{'  ' * path.count('.')}{x!r}{'' if x.trainable else ' (frozen)'}",
                sum(map(math.prod, x.shapes().values())),
            )
            for layer in self.layers
            for path, x in layer.walk()
        ]
        width = max(len(text) for text, _ in rows)
        parts = [repr(part) for part in (self.loss, self.optimizer) if part is not None]
        count = sum(count for _, count in rows)
        about = f"{count:,} parameters", self.dtype.name, f"engine {self.engine.name}", *parts
        return "\n".join([*(f"{text:{width}}  {count:>12,}" for text, count in rows), ", ".join(about)])

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write the model to a safetensors file; `fastbp.load` reads it. See `fastbp.files.save`."""
        from .files import save

        save(self, path, metadata)

    def __repr__(self) -> str:
        return f"Sequential({list(self.layers)!r}, loss={self.loss!r}, optimizer={self.optimizer!r})"

    def _checked(self, X: Any, y: Any, sample_weight: Any = None, prefix: str = "", loss: Loss | None = None) -> Data:
        """X, y and weights as the tapes take them, or an error that names what does not fit."""
        X = self._features_of(X, f"{prefix}X")
        width = X.shape[1]
        for layer in self.layers:
            width = layer.width(width)
        loss = loss or _needed("loss", self.loss)
        return Data(X, *loss.targets(y, len(X), width, sample_weight, f"{prefix}y", self.dtype))

    def _source(
        self, X: Any, y: Any, sample_weight: Any, class_weight: Any
    ) -> tuple[Data | None, Callable[[], Iterator[Data]], Loss]:
        """Data to train on, or None and a function that goes through batches of data; and the loss."""
        if y is not None:
            loss = self._loss_with(None if isinstance(class_weight, str) else class_weight)
            data = self._checked(X, y, sample_weight, loss=loss)
            if isinstance(class_weight, str):
                loss = self._loss_with(_balanced(class_weight, data))
            return data, lambda: iter([]), loss
        if hasattr(X, "shape") or hasattr(X, "dtypes") or not (callable(X) or isinstance(X, Iterable)):
            raise ValueError("y must hold real numbers, got None; only batches, an iterable of (X, y), need no y")
        if sample_weight is not None or isinstance(class_weight, str):
            raise ValueError(
                "with batches, sample_weight is each batch's third part, and class_weight has no 'balanced'"
            )
        loss = self._loss_with(class_weight)

        def batches() -> Iterator[Data]:
            place = -1
            for place, batch in enumerate(X() if callable(X) else X):
                yield self._checked(*as_samples(batch, f"batch {place}"), f"batch {place}: ", loss)
            if place < 0:
                raise ValueError("there is no batch (left): pass a list, or a function that returns an iterator")

        return None, batches, loss

    def _checkpoints(self, path: str | Path | None, every: int, callbacks: Sequence[Any]) -> Checkpoints | None:
        if path is None:
            return None
        from .checkpoints import Checkpoints

        return Checkpoints(self, path, every, callbacks)

    def _loss_with(self, class_weight: Any) -> Loss:
        """What training needs: the loss, here with class weights in place of its own."""
        loss = _needed("loss", self.loss)
        _needed("optimizer", self.optimizer)
        if not len(self.memory.gradients):
            raise ValueError("no layer of this model has parameters to train")
        return loss if class_weight is None else loss.with_class_weight(class_weight)

    def _outputs(self, X: Array, loss: Loss | None = None) -> Array:
        """The last layer's output for all rows of a checked X, or what a loss takes for probabilities, as NumPy's."""
        outputs, parts = [], [*self.walk(), *([] if loss is None else [loss])]
        with limited_threads(self.threads, self.engine):
            for start in range(0, len(X), PREDICT_ROWS):
                piece = X[start : start + PREDICT_ROWS]
                record = partial(record_forward, self, rows=piece.shape[0], features=piece.shape[1], loss=loss)
                tape = self.tape("forward", *piece.shape, record=record, parts=parts)
                with tape.bound():
                    tape.memory["X"][...] = self.engine.asarray(piece)
                    tape.run()
                    outputs.append(self.engine.asnumpy(tape.memory["outputs"]).copy())
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def _scores(self, data: Data, metrics: Mapping[str, Callable[..., float]]) -> dict[str, float]:
        loss = _needed("loss", self.loss).twin(engine=self.engine)
        outputs, total = self._outputs(data.X), self.engine.zeros((2,), np.float64)
        loss.gradient(self.engine.asarray(outputs), data.y, data.weights, total)
        scores = {"loss": loss.value(total)}
        predicted, true = loss.decide(outputs), loss.decide_targets(data.y)
        if loss.classifies:
            right = (predicted == true).reshape(len(true), -1).all(axis=1)
            counts = data.weights is not None and data.weights.any()
            scores["accuracy"] = float(np.average(right, weights=data.weights if counts else None))
        options = {} if data.weights is None else {"sample_weight": data.weights}
        return scores | {name: float(metric(true, predicted, **options)) for name, metric in metrics.items()}

    def _score_names(self, metrics: Iterable[str]) -> list[str]:
        return ["loss", *(["accuracy"] if _needed("loss", self.loss).classifies else []), *metrics]


def _copied(layer: Layer) -> Layer:
    """A twin whose state is its own, and those of the layers inside."""
    inner = {"layers": tuple(map(_copied, layer.layers))} if layer.layers else {}
    return layer.twin(**{name: layer.__dict__[name].copy() for name in layer.state}, **inner)


def _balanced(class_weight: str, data: Data) -> dict[int, float]:
    """Class weights that make all classes count the same."""
    if class_weight != "balanced" or data.y.ndim != 1:
        raise ValueError(f"class_weight must be numbers, or 'balanced' with labels, got {class_weight!r}")
    counts = np.bincount(data.y, data.weights)
    labels = np.flatnonzero(counts)
    return {int(label): float(counts.sum() / (len(labels) * counts[label])) for label in labels}


def _needed(name: str, part: P | None) -> P:
    if part is None:
        raise ValueError(f"this needs a model with {name}=, as in Sequential(layers, loss=..., optimizer=...)")
    return part
