"""How the estimators train: scikit-learn's loop, its stopping rules and its loss, around a `Sequential`."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy.optimize
from sklearn.exceptions import ConvergenceWarning

from . import Adam, AdamW, BinaryCrossEntropy, Dense, Dropout, MeanSquaredError, Poisson, SoftmaxCrossEntropy
from .activations import ELU, GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Tanh
from .auto import settle
from .boundary import as_number
from .callbacks import tell, told
from .kernels.engine import Engine
from .kernels.ops import Array
from .layers import Layer
from .losses import Loss
from .model import Sequential
from .optim import SGD, Optimizer
from .part import Setting
from .progress import Progress
from .samples import Data

__all__ = [
    "ACTIVATIONS",
    "STOCHASTIC",
    "Rate",
    "build",
    "dense_of",
    "fit_lbfgs",
    "fit_stochastic",
    "glorot",
    "optimizer_of",
    "settle_engine",
]

PIECE = 256  # how many rows L-BFGS computes at a time
STOCHASTIC = "sgd", "adam", "adamw"
ACTIVATIONS: dict[str, Callable[[], Layer] | None] = {
    "identity": None,
    "logistic": Sigmoid,
    "tanh": Tanh,
    "relu": ReLU,
    "gelu": GELU,
    "silu": SiLU,
    "elu": ELU,
    "leaky_relu": LeakyReLU,
}


class PenalizedLoss(Loss):
    """What scikit-learn's perceptrons minimise: a batch's mean loss and ``alpha / 2 * sum(w ** 2) / rows``.

    An epoch's loss is the mean of its batches', each counted by its rows.

    Parameters
    ----------
    loss : Loss
    alpha : float
    share, slope : float
        What `loss` is multiplied by, and what its gradient is.
    width : int
        How often `loss` counts each row.
    """

    state = ("batch",)

    def __init__(self, loss: Loss, alpha: float, share: float, slope: float, width: int) -> None:
        super().__init__(engine=loss.engine)
        self.loss, self.alpha = loss, alpha
        self.share, self.slope, self.width = share, slope, width
        self.batch = self.engine.zeros((2,), np.float64)
        self.classifies = loss.classifies

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        gradient = self.loss.twin(engine=self.engine).gradient(outputs, targets, weights, self.batch)
        if self.slope != 1:
            gradient = self.engine.scale(gradient, self.engine.scalar(self.slope))
        return gradient

    def penalize(self, rows: int, parameters: Array, gradients: Array, total: Array) -> None:
        numbers = map(self.engine.scalar, (self.alpha, self.share, self.width, rows))
        self.engine.l2_loss(parameters, gradients, *numbers, self.batch, total)

    def probabilities(self, outputs: Array) -> Array:
        return self.loss.twin(engine=self.engine).probabilities(outputs)


class ClassicSGD(SGD):
    """`SGD` that also takes a momentum of 1, as scikit-learn's does."""

    momentum = Setting(partial(as_number, most=1))


class Rate:
    """scikit-learn's rules for the learning rate of SGD."""

    def __init__(self, optimizer: Optimizer, kind: str, power_t: float) -> None:
        self._optimizer, self._kind, self._power_t = optimizer, kind, power_t
        self._first = optimizer.lr

    @property
    def learning_rate(self) -> float:
        return self._optimizer.lr

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        if isinstance(self._optimizer, SGD) and rate:
            # a velocity of steps, as scikit-learn's, would stay as it is; this one is of gradients
            self._optimizer.velocity[:] *= self._optimizer.lr / rate
        self._optimizer.lr = rate

    def epoch_ends(self, rows_seen: int) -> None:
        if self._kind == "invscaling":
            self.learning_rate = self._first / (rows_seen + 1) ** self._power_t

    def stops(self, why: str, verbose: bool) -> bool:
        """Whether training ends where it no longer improves; "adaptive" takes a smaller rate first."""
        ends = self._kind != "adaptive" or self.learning_rate <= 1e-6
        if not ends:
            self.learning_rate /= 5
        if verbose:
            print(f"{why} {'Stopping' if ends else f'Setting learning rate to {self.learning_rate:f}'}.")
        return ends


def build(
    settings: Any,
    coefs: Sequence[Array],
    intercepts: Sequence[Array],
    out: str,
    dtype: Any,
    engine: str | Engine,
    seed: int,
) -> Sequential:
    """The network of an estimator.

    Parameters
    ----------
    settings : estimator
        Its parameters say what stands between the layers and what trains them.
    coefs, intercepts : sequence of array
        Weights of shape (inputs, outputs), biases of shape (outputs,).
    out : str
        The output's activation: "softmax", "logistic", "identity" or "exp".
    dtype : dtype
    engine : str or Engine
    seed : int
        Of dropout.
    """
    dense = [Dense(*weights.shape, engine=engine) for weights in coefs]
    for layer, weights, biases in zip(dense, coefs, intercepts, strict=True):
        layer.weights, layer.biases = weights, biases[np.newaxis]
    layers, loss = layers_of(settings, dense), loss_of(settings, out, len(intercepts[-1]), engine)
    return Sequential(layers, loss=loss, engine=engine, dtype=dtype, seed=seed, threads=settings.threads)


def adapt(model: Sequential, settings: Any, out: str, engine: str | Engine) -> None:
    """Let other settings stand around the weights that a model has, whose optimizer goes on."""
    model.move_to(engine)
    dense = dense_of(model)
    model.layers = layers_of(settings, dense)
    model.loss = loss_of(settings, out, dense[-1].biases.size, model.engine)
    model.threads = settings.threads


def layers_of(settings: Any, dense: Sequence[Dense]) -> list[Layer]:
    """Dense layers with what an estimator's parameters want between them."""
    layers: list[Layer] = []
    activation = ACTIVATIONS[settings.activation]
    for layer in dense:
        if layers and activation is not None:
            layers.append(activation())
        if layers and settings.dropout:
            layers.append(Dropout(settings.dropout))
        layers.append(layer)
    return layers


def loss_of(settings: Any, out: str, n: int, engine: str | Engine) -> PenalizedLoss:
    """The loss of so many outputs, without a penalty yet."""
    # scikit-learn adds up the outputs of a row, but in the loss (not its gradient) of squared errors
    kind, share, slope, width = {
        "softmax": (SoftmaxCrossEntropy, 1, 1, 1),
        "logistic": (BinaryCrossEntropy, n, n, n),
        "identity": (MeanSquaredError, 0.5, n / 2, n),
        "exp": (Poisson, n, n, n),
    }[out]
    smoothing = {"label_smoothing": settings.label_smoothing} if out == "softmax" else {}
    return PenalizedLoss(kind(engine=engine, **smoothing), 0.0, share, slope, width)


def dense_of(model: Sequential) -> list[Dense]:
    """The layers that have weights."""
    return [layer for layer in model.layers if isinstance(layer, Dense)]


def optimizer_of(settings: Any) -> Optimizer | None:
    """A new optimizer as an estimator's parameters say."""
    rate, clip = settings.learning_rate_init, {"clip_norm": settings.clip_norm}
    if settings.solver == "sgd":
        return ClassicSGD(rate, settings.momentum, settings.nesterovs_momentum and settings.momentum > 0, **clip)
    adam: dict[str, Any] = {"betas": (settings.beta_1, settings.beta_2), "eps": 0.0, "eps_hat": settings.epsilon} | clip
    if settings.solver == "adamw":
        return AdamW(rate, weight_decay=settings.alpha, **adam)
    return Adam(rate, **adam) if settings.solver == "adam" else None


def fit_stochastic(
    estimator: Any,
    model: Sequential,
    data: Data,
    score: Callable[[], float] | None,
    *,
    constants: Array | None = None,
    once: bool = False,
) -> None:
    """Train by epochs, as ``_fit_stochastic`` of scikit-learn's perceptrons does, and keep its books.

    Parameters
    ----------
    estimator : Perceptron
        Its parameters say how; its ``loss_curve_`` and the like are written.
    model : Sequential
    data : Data
        X may be a sparse matrix.
    score : callable, optional
        The score on held-out data after an epoch, for early stopping; the weights of the best epoch stay.
    constants : array, shape (rows,), optional
        What belongs to each row's loss but depends on no output.
    once : bool, default False
        One epoch, and no warning that it is not enough.
    """
    rows, memory, size = data.rows, model.memory, estimator.batch_size
    if size != "auto" and size > rows:
        warnings.warn(f"batch_size={size} is larger than the sample size, and clipped to it: {rows}", stacklevel=4)
    size = batch_rows(estimator, rows)
    order, best = np.arange(rows), memory.parameters.copy()
    estimator.n_iter_ = 0
    with (
        told(estimator.callbacks or (), model, ("loss",) if score is None else ("loss", "val_score")) as listeners,
        Progress(estimator.max_iter, estimator.progress) as progress,
        model.training(watched=False) as trainer,
    ):
        try:
            for epoch in range(1 if once else estimator.max_iter):
                if estimator.shuffle:
                    order = next_order(estimator, order, seeded=once and bool(estimator.loss_curve_))
                if epoch == 0 or listeners:  # which may have changed the model
                    trainer.bind(data, size)
                loss = trainer.epoch(order if estimator.shuffle else None)
                if constants is not None:
                    loss += mean_of_batches(constants[order], data.weights, order, size)
                estimator.n_iter_ += 1
                estimator.t_ += rows
                best_score = estimator.best_validation_score_
                figures = keep_books(estimator, loss, score)
                if estimator.best_validation_score_ != best_score:
                    best[...] = memory.parameters
                model.note(figures)
                progress.step(figures)
                estimator._optimizer.epoch_ends(estimator.t_)
                if tell(listeners, model, figures) or has_converged(estimator, score):
                    break
                if score is None and not np.isfinite(loss):
                    break  # it stays so
                if not once and estimator.n_iter_ == estimator.max_iter:
                    warnings.warn(
                        f"Stochastic Optimizer: Maximum iterations ({estimator.max_iter}) reached and the optimization "
                        "hasn't converged yet.",
                        ConvergenceWarning,
                        stacklevel=4,
                    )
        except KeyboardInterrupt:
            warnings.warn("Training interrupted by user.", stacklevel=4)
    if score is not None:
        with model.turns:
            memory.parameters[...] = best


def batch_rows(estimator: Any, rows: int) -> int:
    """How many of some rows make a batch."""
    return min(200 if estimator.batch_size == "auto" else estimator.batch_size, rows)


def settle_engine(estimator: Any, model: Sequential, data: Data, once: bool) -> None:
    """Let a model with ``engine="auto"`` choose, by the steps that `fit_stochastic` or `fit_lbfgs` will take."""
    rows, loss = data.rows, model.loss
    assert isinstance(loss, PenalizedLoss)
    size = PIECE if estimator.solver == "lbfgs" else batch_rows(estimator, rows)
    if once:
        data = data.take(slice(size))
    if estimator.solver == "lbfgs":
        settle(model, data, size, loss.loss, -(-rows // PIECE), model.threads)
    else:
        settle(model, data, None if once else size, loss, threads=model.threads)


def keep_books(estimator: Any, loss: float, score: Callable[[], float] | None) -> dict[str, float]:
    """Write down an epoch's loss and score, and whether they improve; returns them by name."""
    estimator.loss_ = loss
    estimator.loss_curve_.append(loss)
    if estimator.verbose:
        print(f"Iteration {estimator.n_iter_}, loss = {loss:.8f}")
    if score is None:
        figures, stalled = {"loss": loss}, loss > estimator.best_loss_ - estimator.tol
        if loss < estimator.best_loss_:  # not where it is NaN
            estimator.best_loss_ = loss
    else:
        value = score()
        figures, stalled = {"loss": loss, "val_score": value}, value < estimator.best_validation_score_ + estimator.tol
        estimator.validation_scores_.append(value)
        if estimator.verbose:
            print(f"Validation score: {value:f}")
        if value > estimator.best_validation_score_:
            estimator.best_validation_score_ = value
    estimator._no_improvement_count = estimator._no_improvement_count + 1 if stalled else 0
    return figures


def has_converged(estimator: Any, score: Callable[[], float] | None) -> bool:
    """Whether training ends because it no longer improves."""
    if estimator._no_improvement_count <= estimator.n_iter_no_change:
        return False
    what = "Training loss" if score is None else "Validation score"
    why = f"{what} did not improve more than tol={estimator.tol:f} for {estimator.n_iter_no_change} consecutive epochs."
    if estimator._optimizer.stops(why, estimator.verbose):
        return True
    estimator._no_improvement_count = 0
    return False


def next_order(estimator: Any, order: Array, seeded: bool) -> Array:
    """The rows in a new order, as scikit-learn shuffles them; `seeded` says that a generator would be new."""
    if seeded and isinstance(estimator.random_state, int):
        return first_order(estimator.random_state, len(order))
    shuffled = np.arange(len(order))
    estimator._random_state.shuffle(shuffled)
    return order[shuffled]


@functools.lru_cache(maxsize=8)
def first_order(seed: int, rows: int) -> Array:
    """The order that one seed gives each call of `partial_fit`: making the generator takes longer than a batch."""
    order = np.arange(rows)
    np.random.RandomState(seed).shuffle(order)
    order.flags.writeable = False
    return order


def fit_lbfgs(estimator: Any, model: Sequential, data: Data, constant: float = 0.0) -> None:
    """Train by L-BFGS on the loss over all rows and its gradient, replayed in pieces that fit into a cache."""
    engine, memory, objective = model.engine, model.memory, model.loss
    assert isinstance(objective, PenalizedLoss)
    rows = data.rows
    with model.training(objective.loss, -(-rows // PIECE), watched=False) as trainer:
        trainer.bind(data, min(PIECE, rows))
        decayed = memory.decayed[0].size if memory.decayed is not None else 0

        def assign(parameters: Array) -> None:
            with model.turns:
                memory.parameters[...] = engine.asarray(parameters)

        # over the parameters as they lie in memory: what fills up between them has no slope and stays 0
        def loss_and_slope(parameters: Array) -> tuple[float, Array]:
            assign(parameters)
            mean, count = trainer.epoch(), float(memory.total[1]) / objective.width
            slope = engine.asnumpy(memory.gradients).astype(np.float64)
            slope *= objective.slope
            weights = parameters[:decayed]
            slope[:decayed] += objective.alpha / count * weights
            return objective.share * mean + objective.alpha / 2 / count * float(weights @ weights) + constant, slope

        def say(intermediate_result: Any) -> None:
            estimator.n_iter_ += 1
            print(f"Iteration {estimator.n_iter_}, loss = {intermediate_result.fun:.8f}")

        estimator.n_iter_ = 0
        result = scipy.optimize.minimize(
            loss_and_slope,
            engine.asnumpy(memory.parameters).astype(np.float64),
            method="L-BFGS-B",
            jac=True,
            callback=say if estimator.verbose else None,
            options={"maxfun": estimator.max_fun, "maxiter": estimator.max_iter, "gtol": estimator.tol},
        )
        assign(result.x)
    if result.status != 0:
        warnings.warn(
            f"lbfgs failed to converge after {result.nit} iteration(s) (status={result.status}): {result.message}. "
            "Increase max_iter, or scale the data.",
            ConvergenceWarning,
            stacklevel=4,
        )
    estimator.n_iter_ = min(result.nit, estimator.max_iter)  # the solver may count one more
    estimator.loss_ = float(result.fun)


def mean_of_batches(values: Array, weights: Array | None, order: Array, size: int) -> float:
    """The mean of batches' weighted means, each counted by its rows."""
    if weights is None:
        return float(values.mean())
    starts = np.arange(0, len(order), size)
    rows = np.diff([*starts, len(order)])
    weights = weights[order]
    means = np.add.reduceat(values * weights, starts) / np.add.reduceat(weights, starts)
    return float((rows * means).sum() / len(order))


def glorot(
    rng: np.random.RandomState, units: Sequence[int], activation: str, dtype: Any
) -> tuple[list[Array], list[Array]]:
    """Initial weights and biases, drawn as scikit-learn draws them."""
    coefs, intercepts = [], []
    for inputs, outputs in itertools.pairwise(units):
        bound = np.sqrt((2 if activation == "logistic" else 6) / (inputs + outputs))
        coefs.append(rng.uniform(-bound, bound, (inputs, outputs)).astype(dtype, copy=False))
        intercepts.append(rng.uniform(-bound, bound, outputs).astype(dtype, copy=False))
    return coefs, intercepts
