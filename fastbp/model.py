"""`Sequential`: a stack of layers that trains by replaying a recorded step."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

import numpy as np

from .auto import settled
from .boundary import as_array, as_count, as_flag, as_metrics, as_number, check_metrics
from .callbacks import Callback, EpochFunction, tell, told
from .checkpoints import Checkpoints
from .files import save
from .interop import WIDE, dense, dense_if_narrow, in_bounds, is_sparse, like
from .kernels.ops import Array
from .layers import Dense, Layer
from .losses import Loss
from .network import Network, needed
from .progress import Progress
from .samples import Data
from .source import Source
from .steps import record_forward
from .threads import limited_threads
from .training import Trainer

__all__ = ["Gradients", "Sequential"]

# How many rows a prediction computes together: this many; but fewer where its widest layer gives more numbers for them
# than the second of these, more where it gives less than the first, and a few in any case.
PREDICT_ROWS, PREDICT_NUMBERS, FEW = 1024, (1 << 19, 1 << 22), 32

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
        See `fastbp.engine`. With "auto", `fit` and `train_on_batch` move the model to the engine that is fastest at
        their step, by measurement, see `move_to`; until then it is on NumPy.
    dtype : dtype, default float32
        float32 or float64: of parameters and of all that is computed.
    seed : int, optional
        One seed gives one run: initial weights, shuffles and dropout masks, the same on every engine.
    threads : int, optional
        At most so many threads while this model computes, by default as many as BLAS and Numba may use; needs
        threadpoolctl. 1 is best for models that train side by side in threads on NumPy's engine.
    precision : {"fp32", "tf32", "bf16"}, optional
        What float32 numbers are rounded to where matrices are multiplied, on an engine that can ("cupy"): sums,
        weights and gradients of weights stay float32. What only passes between products of "bf16" is rounded when it
        is written, and so are the biases that are added there. By default "fp32", or that of the engine given.

    Attributes
    ----------
    layers : tuple of Layer
        Assigning others keeps the values of those that stay, and their optimizer's moments unless more is trained than
        before.
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
        callbacks: Sequence[Callback | EpochFunction] | None = None,
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
            from a file and larger than memory. Arrays of any library, data frames, and SciPy's sparse matrices: from
            1,024 features on, a `Dense` that comes first multiplies them as they are stored. What is on the engine's
            GPU stays there. Or, without `y`, batches: an iterable of (X, y) or (X, y, sample_weight), gone through
            anew in each epoch, or a function that returns one. Where it has a length, or from the second epoch on as
            many as before, a schedule moves with each batch; in a first epoch of unknown length the rate is that of its
            beginning.
        y : array
            As the loss wants it: labels, one-hot rows or rows of probabilities, or numbers of shape (rows, outputs).
        epochs, batch_size : int
            The last batch of an epoch is shorter where `batch_size` does not divide the rows.
        shuffle : bool, default True
            Draw a new order of the rows for each epoch, of more than one batch. Batches are taken as they come.
        sample_weight : array, shape (rows,), optional
            How often each row counts.
        class_weight : array of shape (classes,), dict or "balanced", optional
            In place of the loss's; "balanced" is rows / (classes * rows of the class), rows counted by their weights.
        validation_data : (X, y) or (X, y, sample_weight), optional
            Evaluated after each epoch, into `history`.
        metrics : sequence or dict of functions, optional
            Called with the targets and predictions of the validation data, and with `sample_weight` where there is
            one, as those of sklearn.metrics are; `history` has them as ``"val_"`` and their names. Rows of weight 0
            and ignored ones are left out; where none is left, accuracy and metrics are NaN.
        callbacks : sequence of Callback or function, optional
            What is called after each epoch, with the model and its figures; one that returns True, and nothing else,
            ends training. What it changes takes effect in the next epoch: settings, layers, loss, optimizer. It may
            predict and evaluate with the model, but not train it, nor wait for another thread that does: that one
            waits for the end.
        accumulate : int, default 1
            Take the mean gradient of so many batches for each update.
        checkpoint : path, optional
            A file to write every `every` epochs and at the end: the model, and how far this call has come. The file is
            whole at any time; `fastbp.load` reads it, too.
        every : int, default 1
        resume : bool, default False
            If there is that file, go on from it, to the same bits as if training had never stopped: by the same call
            again, on a model made in the same way. Weights, random state and the settings of layers, loss and optimizer
            are then those of the file; other data or another batch size is not noticed, and counts from there on.
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
            For data that does not fit; nothing has changed then, but by the batches before a bad one.
        FloatingPointError
            Where loss or weights become infinite or NaN. The weights are then those of at most a second before.
        RuntimeError
            Where a callback, or what gives the batches, trains this same model. Another thread waits for the end.

        Examples
        --------
        >>> import fastbp
        >>> X, y = fastbp.spiral_data(50, 3, seed=0)
        >>> model = fastbp.Sequential([fastbp.Dense(2, 16), fastbp.ReLU(), fastbp.Dense(16, 3)],
        ...                           loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(), seed=0)
        >>> model.fit(X, y, epochs=3, validation_data=(X, y)).history.keys()
        dict_keys(['loss', 'val_loss', 'val_accuracy'])
        """
        needed("loss", self.loss)
        optimizer = needed("optimizer", self.optimizer)
        epochs, batch_size = as_count(epochs, "epochs"), as_count(batch_size, "batch_size")
        accumulate = as_count(accumulate, "accumulate")
        threads = self.threads if threads is None else as_count(threads, "threads")
        functions = as_metrics(metrics)
        every = as_count(every, "every")
        shuffle, resume = as_flag(shuffle, "shuffle"), as_flag(resume, "resume")
        verbose = None if verbose is None else as_flag(verbose, "verbose")
        if resume and checkpoint is None:
            raise ValueError("resume=True needs checkpoint, the file to go on from")
        if functions and validation_data is None:
            raise ValueError("metrics need validation_data, on which they are computed")
        source = Source(self, X, y, sample_weight, class_weight, validation_data)
        check_metrics(functions, weighted=source.held_out_is_weighted)
        names = (
            "loss",
            *([f"val_{name}" for name in self._score_names(functions)] if source.held_out is not None else []),
        )
        for name in optimizer.monitored():
            if name not in names:
                raise ValueError(
                    f"the schedule monitors {name!r}, but fit gives {', '.join(names)}; see validation_data"
                )
        sample, size = source.sample(batch_size) if self.chooses_engine else (None, None)
        with (
            self._alone(),
            settled(self, sample, size, source.loss(), accumulate, threads),
            told(callbacks, self, names) as listeners,
            Progress(epochs, verbose) as progress,
            Trainer(self, source.loss, accumulate) as trainer,
        ):
            checkpoints = self._checkpoints(checkpoint, every, callbacks)
            done, over = checkpoints.resume() if checkpoints and resume else (0, False)
            for epoch in range(epochs if over else done, epochs):
                changeable = epoch == done or bool(listeners)  # who may have changed the model
                if changeable:
                    source.look()
                rows = 0 if source.data is None else source.data.rows
                shuffled = shuffle and batch_size < rows  # a batch of all rows has no order
                if source.data is None:
                    mean = trainer.epoch_through(*source.batches())
                else:
                    if changeable:
                        trainer.bind(source.data, batch_size)
                    if shuffled:
                        trainer.shuffle()
                    mean = trainer.epoch()
                figures = {"loss": mean}
                try:
                    if source.held_out is not None:
                        scores = self._scores(source.held_out, functions, weighted=source.held_out_is_weighted)
                        figures |= {f"val_{name}": value for name, value in scores.items()}
                finally:  # the epoch has trained, also where a metric fails
                    self.note(figures)
                progress.step(figures)
                needed("optimizer", self.optimizer).observe(figures)
                over = tell(listeners, self, figures)
                if checkpoints:
                    checkpoints.epoch(epoch + 1, epochs, over=over)
                if over:
                    break
        return self

    def train_on_batch(
        self,
        X: Any,
        y: Any,
        *,
        sample_weight: Any = None,
        class_weight: Any = None,
        epoch: float | None = None,
        threads: int | None = None,
    ) -> float:
        """Train one step on a batch, which `history` does not show.

        Parameters
        ----------
        X : array, shape (batch, features)
        y : array
            As in `fit`.
        sample_weight, threads : optional
            As in `fit`.
        class_weight : array of shape (classes,) or dict, optional
            In place of the loss's.
        epoch : float, optional
            When this step is, in epochs since the start of training, as a schedule wants to know: where the optimizer
            has one, it must be given, because single batches do not tell how many make an epoch.

        Returns
        -------
        float
            The batch's loss, before the step.

        Raises
        ------
        ValueError, FloatingPointError, RuntimeError
            As in `fit`.
        """
        threads = self.threads if threads is None else as_count(threads, "threads")
        loss = self.loss_with(class_weight)
        start = self._time(epoch)
        data = self.checked(dense_if_narrow(X), y, sample_weight, loss=loss)
        with (
            self._alone(),
            settled(self, data, None, loss, 1, threads),
            Trainer(self, lambda: loss) as trainer,
        ):
            trainer.bind(data, data.rows)
            return trainer.epoch(start=start)

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
            Its ``bind(data, batch_size)`` and ``epoch(order)`` check nothing of what they are given; between the two,
            ``shuffle()`` draws an order from the model's seed.
        """
        threads = self.threads if threads is None else as_count(threads, "threads")

        def current() -> Loss:
            return needed("loss", loss or self.loss)

        current()
        with (
            self._alone(),
            limited_threads(threads),
            Trainer(self, current, accumulate, watched=watched) as trainer,
        ):
            yield trainer

    def predict(self, X: Any) -> Any:
        """What the loss makes of the outputs: class labels where it is one for classes, numbers in the units of y.

        Parameters
        ----------
        X : array, shape (rows, features)

        Returns
        -------
        array, shape (rows,) of int64, or (rows, outputs)
            Of the library that X is of, where that is one of tensors, such as torch; otherwise of NumPy.

        Raises
        ------
        ValueError
            For `X` that does not fit.
        FloatingPointError
            Where outputs that should say a class are NaN.
        """
        outputs = self._outputs(self._features_of(X))
        if self.loss is None:
            return like(X, outputs)
        if self.loss.classifies and math.isnan(np.vdot(outputs, outputs)):  # squares are NaN where numbers are
            row = np.isnan(outputs).any(axis=1).argmax()
            raise FloatingPointError(f"the outputs for row {row} of X are NaN: they say no class")
        return like(X, self.loss.decide(outputs))

    def predict_proba(self, X: Any) -> Any:
        """Class probabilities.

        Parameters
        ----------
        X : array, shape (rows, features)

        Returns
        -------
        array, shape (rows, classes)
            Of the library that `predict` gives. With `BinaryCrossEntropy` (rows, outputs): of a yes for each.

        Raises
        ------
        ValueError
            For `X` that does not fit, and for a model without a loss or with one for numbers.
        """
        return like(X, self._outputs(self._features_of(X), needed("loss", self.loss)))

    def evaluate(self, X: Any, y: Any, *, sample_weight: Any = None, metrics: Metrics = ()) -> dict[str, float]:
        """The loss on data held out, the accuracy where there are classes, and metrics.

        Parameters
        ----------
        X : array, shape (rows, features)
        y : array
            As in `fit`.
        sample_weight : array, shape (rows,), optional
            How often each row counts.
        metrics : sequence or dict of functions, optional
            As in `fit`.

        Returns
        -------
        dict of str to float
            ``loss``, ``accuracy`` and the metrics by name.

        Raises
        ------
        ValueError
            For data that does not fit, and for a model without a loss.
        """
        functions, weighted = as_metrics(metrics), sample_weight is not None
        check_metrics(functions, weighted=weighted)
        return self._scores(self.checked(X, y, sample_weight), functions, weighted=weighted)

    def gradients(self, X: Any, y: Any, *, sample_weight: Any = None) -> Gradients:
        """The loss of a batch and all its gradients, in one training pass that changes nothing.

        Parameters
        ----------
        X : array, shape (batch, features)
        y : array
            As in `fit`.
        sample_weight : array, shape (batch,), optional
            How often each row counts.

        Returns
        -------
        Gradients
            ``loss``, ``layers`` and ``inputs``; arrays are of the library that `predict` gives.

        Raises
        ------
        ValueError
            For data that does not fit, and for a model without a loss.
        """
        loss = needed("loss", self.loss).twin(engine=self.engine)
        data = self.checked(dense(in_bounds(X)), y, sample_weight)
        layers = [_copied(layer) for layer in self.layers]
        outputs = self.engine.asarray(data.X, self.dtype)
        total = self.engine.zeros((2,), np.float64)
        with limited_threads(self.threads), self.turns.queue, self.turns:
            for layer in layers:
                outputs = layer.forward(outputs)
            dvalues = loss.gradient(outputs, data.y, data.weights, total)
            for layer in reversed(layers):
                dvalues = layer.backward(dvalues)
        found = [
            {f"{path}{name}": self._like(X, getattr(x, f"d{name}")) for path, x in layer.walk() for name in x.shapes()}
            for layer in layers
        ]
        return Gradients(loss.value(total), found, self._like(X, dvalues))

    def forward(self, X: Any) -> Any:
        """The last layer's output in a training pass; each layer keeps its own `output` to look at.

        Parameters
        ----------
        X : array, shape (batch, features)

        Returns
        -------
        array, shape (batch, outputs)
            Of the library that `predict` gives; what layers keep is the engine's.

        Raises
        ------
        ValueError
            For `X` that does not fit.
        """
        outputs = self.engine.asarray(self._features_of(dense(in_bounds(X))), self.dtype)
        with limited_threads(self.threads):
            for layer in self.layers:
                outputs = layer.forward(outputs)
        return self._like(X, outputs)

    def backward(self, dvalues: Any) -> Any:
        """Take a gradient by the output of the last `forward` back to X; each layer keeps its gradients to look at.

        `step` then updates the parameters with them.

        Parameters
        ----------
        dvalues : array, shape (batch, outputs)

        Returns
        -------
        array, shape (batch, features)
            The gradient by X.

        Raises
        ------
        ValueError
            Where `dvalues` does not have the shape of the output.
        AttributeError
            Where there was no `forward` yet.
        """
        gradient = as_array(dvalues, "dvalues", self.engine, self.dtype)
        if gradient.shape != self.layers[-1].output.shape:
            raise ValueError(f"dvalues must have shape {self.layers[-1].output.shape}, got {gradient.shape}")
        with limited_threads(self.threads):
            for layer in reversed(self.layers):
                gradient = layer.backward(gradient)
        return self._like(dvalues, gradient)

    def step(self, epoch: float | None = None) -> None:
        """Let the optimizer take a step with the gradients of the last `backward`.

        Parameters
        ----------
        epoch : float, optional
            When this step is, as in `train_on_batch`.
        """
        start = self._time(epoch)
        optimizer = needed("optimizer", self.optimizer)
        for layer in self.walk():
            for name, where in self.memory.gradients_of(layer).items():
                where[...] = getattr(layer, f"d{name}")
        if optimizer.schedule is not None:
            optimizer.rate[...] = self.engine.asarray(optimizer.rates(np.array([start])))
        with self.turns:
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
        about = (
            f"{count:,} parameters",
            self.dtype.name,
            f"engine {self.engine.name}{' (auto)' * self.chooses_engine}",
            *parts,
        )
        return "\n".join([*(f"{text:{width}}  {count:>12,}" for text, count in rows), ", ".join(about)])

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write the model to a safetensors file; `fastbp.load` reads it. See `fastbp.files.save`."""
        save(self, path, metadata)

    def __repr__(self) -> str:
        return f"Sequential({list(self.layers)!r}, loss={self.loss!r}, optimizer={self.optimizer!r})"

    def _time(self, epoch: float | None) -> float:
        """When a single step is, in epochs."""
        if epoch is not None:
            return as_number(epoch, "epoch")
        if self.optimizer is not None and self.optimizer.schedule is not None:
            raise ValueError(
                f"epoch must say when this step is, in epochs since the start of training, for the schedule "
                f"{self.optimizer.schedule!r}; as in epoch=step / steps_an_epoch"
            )
        return 0.0

    def _checkpoints(self, path: str | Path | None, every: int, callbacks: Sequence[Any] | None) -> Checkpoints | None:
        if path is None:
            return None
        return Checkpoints(self, path, every, callbacks or ())

    def _outputs(self, X: Array, loss: Loss | None = None) -> Array:
        """The last layer's output for all rows of a checked X, or what a loss takes for probabilities, as NumPy's."""
        outputs, parts = [], [*self.walk(), *([] if loss is None else [loss])]
        wide = is_sparse(X) and X.shape[1] >= WIDE
        done = int(wide and type(self.layers[0]) is Dense and self.engine.device == "cpu")
        rows = self._rows_at_a_time(X.shape[1], done) if X.shape[0] > FEW else FEW
        with limited_threads(self.threads), self.turns.queue, self.turns:
            for start in range(0, X.shape[0], rows):
                piece = X[start : start + rows]
                piece = self._of_sparse(piece) if done else dense(piece)
                record = partial(
                    record_forward, self, rows=piece.shape[0], features=piece.shape[1], loss=loss, done=done
                )
                tape = self.tape("forward", done, *piece.shape, record=record, parts=parts)
                with tape.lock:
                    tape.bind()
                    tape.memory["X"][...] = self.engine.asarray(piece)
                    tape.run()
                    outputs.append(self.engine.asnumpy(tape.memory["outputs"]).copy())
        if self._training not in (None, threading.get_ident()):
            time.sleep(1e-4)  # or prediction after prediction would keep the one who trains waiting
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def _rows_at_a_time(self, features: int, done: int) -> int:
        """How many rows a prediction computes together, where the first layers may be done."""
        widths = list(itertools.accumulate(self.layers, lambda width, layer: layer.width(width), initial=features))
        least, most = (numbers // max(widths[done:]) for numbers in PREDICT_NUMBERS)
        return max(FEW, least, min(PREDICT_ROWS, most))

    def _of_sparse(self, X: Any) -> Array:
        """What the first layer, a `Dense`, makes of some sparse rows."""
        first = self.layers[0]
        assert isinstance(first, Dense)
        weights, biases = map(self.engine.asnumpy, (first.weights, first.biases))
        product: Array = X.astype(self.dtype, copy=False) @ weights
        return product + biases

    def _like(self, x: Any, result: Array) -> Any:
        """The engine's `result` in the kind that a user's `x` is of."""
        return result if self.engine.owns(x) else like(x, self.engine.asnumpy(result))

    def _scores(self, data: Data, metrics: Mapping[str, Callable[..., float]], *, weighted: bool) -> dict[str, float]:
        loss = needed("loss", self.loss).twin(engine=self.engine)
        outputs, total = self._outputs(data.X), self.engine.zeros((2,), np.float64)
        loss.gradient(self.engine.asarray(outputs), data.y, data.weights, total)
        scores = {"loss": loss.value(total)}
        # of rows that do not count nothing is looked at: those that are ignored have no label
        weights = np.ones(data.X.shape[0]) if data.weights is None else data.weights
        rows = weights > 0
        if not rows.any():
            return scores | dict.fromkeys([*(["accuracy"] if loss.classifies else []), *metrics], math.nan)
        outputs, weights = outputs[rows], weights[rows]
        predicted, true = loss.decide(outputs), loss.decide_targets(data.y[rows])
        if loss.classifies:
            right = (predicted == true).reshape(len(true), -1).all(axis=1) & ~np.isnan(outputs).any(axis=1)
            scores["accuracy"] = float(np.average(right, weights=weights))
        options = {"sample_weight": weights} if weighted else {}
        return scores | {name: _figure(name, metric(true, predicted, **options)) for name, metric in metrics.items()}

    def _score_names(self, metrics: Iterable[str]) -> list[str]:
        return ["loss", *(["accuracy"] if needed("loss", self.loss).classifies else []), *metrics]


def _copied(layer: Layer) -> Layer:
    """A twin whose state is its own, and those of the layers inside."""
    inner = {"layers": tuple(map(_copied, layer.layers))} if layer.layers else {}
    return layer.twin(**{name: layer.__dict__[name].copy() for name in layer.state}, **inner)


def _figure(metric: str, value: Any) -> float:
    """What a metric returned, which may be NaN but must be a number."""
    with contextlib.suppress(TypeError, ValueError):
        if np.ndim(value) == 0 and not isinstance(value, str | bytes):
            return float(value)
    raise TypeError(f"metrics[{metric!r}] must return a number, got {short(value)}")
