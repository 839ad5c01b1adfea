"""What the estimators share: checked parameters, weights that a user sees, early stopping's data, fit and predict."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import numpy as np
from sklearn import neural_network
from sklearn.base import BaseEstimator, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, check_scoring, r2_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from .boundary import as_choice, as_count, as_flag, as_float_type, as_number, as_samples, optional
from .callbacks import as_callbacks
from .fitting import (
    ACTIVATIONS,
    STOCHASTIC,
    PenalizedLoss,
    Rate,
    adapt,
    build,
    dense_of,
    fit_lbfgs,
    fit_stochastic,
    glorot,
    optimizer_of,
    settle_engine,
)
from .interop import in_bounds, is_sparse
from .kernels.engine import DTypeError, real_array
from .kernels.ops import Array
from .model import Sequential
from .samples import Data
from .selection import choice, engines
from .selection import engine as choose_engine

__all__ = ["BOOKS", "Perceptron"]


def _batch_size(value: Any, name: str) -> Any:
    return value if isinstance(value, str) and value == "auto" else as_count(value, name)


def _epochs(value: Any, name: str) -> Any:
    return value if value == np.inf else as_count(value, name)


def _warm_start(value: Any, name: str) -> Any:
    return value if isinstance(value, str) and value == "optimizer" else as_flag(value, name)


def _scoring(value: Any, name: str) -> Any:
    if not (value is None or isinstance(value, str) or callable(value)):  # several scores are none to judge by
        raise TypeError(f"{name} must be a name or a function of an estimator, X and y, got {value!r}")
    return value if value is None else check_scoring(scoring=value)


CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "activation": partial(as_choice, choices=tuple(ACTIVATIONS)),
    "solver": partial(as_choice, choices=("lbfgs", *STOCHASTIC)),
    "alpha": as_number,
    "batch_size": _batch_size,
    "learning_rate": partial(as_choice, choices=("constant", "invscaling", "adaptive")),
    "learning_rate_init": partial(as_number, above=0),
    "power_t": as_number,
    "max_iter": as_count,
    "shuffle": as_flag,
    "tol": as_number,
    "warm_start": _warm_start,
    "momentum": partial(as_number, most=1),
    "nesterovs_momentum": as_flag,
    "early_stopping": as_flag,
    "validation_fraction": partial(as_number, below=1),
    "beta_1": partial(as_number, below=1),
    "beta_2": partial(as_number, below=1),
    "epsilon": partial(as_number, above=0),
    "n_iter_no_change": _epochs,
    "max_fun": as_count,
    "loss": partial(as_choice, choices=("squared_error", "poisson")),
    "scoring": _scoring,
    "callbacks": as_callbacks,
    "precision": optional(as_float_type),
    "dropout": partial(as_number, below=1),
    "label_smoothing": partial(as_number, below=1),
    "clip_norm": optional(partial(as_number, above=0)),
    "threads": optional(as_count),
}


# what scikit-learn's estimators keep under the same name
BOOKS = (
    *("coefs_", "intercepts_", "n_layers_", "n_outputs_", "out_activation_", "classes_"),
    *("n_features_in_", "feature_names_in_", "n_iter_", "t_", "loss_", "loss_curve_", "best_loss_"),
    *("validation_scores_", "best_validation_score_", "_no_improvement_count"),
)


FLOATS = np.dtype(np.float64), np.dtype(np.float32)


@functools.cache
def usual_engine() -> str:
    """What computes where nobody chose an engine."""
    return "numba" if any(info.name == "numba" and info.available for info in engines()) else "numpy"


def is_plain_target(y: Any, rows: int, labels: bool) -> bool:
    """Whether y is an array in which `validate_data` would change nothing."""
    if type(y) is not np.ndarray or y.shape != (rows,):
        return False
    return y.dtype.kind in "iu" if labels else y.dtype == np.float64 and is_finite(y)


def is_finite(x: Array) -> bool:
    """Whether the sum of an array's elements is finite, and so each of them."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(x.sum())


def in_rows(X: Any) -> Any:
    """X, by rows where it is sparse."""
    return in_bounds(X).tocsr() if is_sparse(X) else X


def unmasked(**arrays: Any) -> None:
    """Raise for masked arrays, of which scikit-learn would take what is masked."""
    for name, x in arrays.items():
        if isinstance(x, np.ma.MaskedArray):
            real_array(x, name)


class Perceptron(BaseEstimator):
    """What the classifier and the regressor share."""

    def _keep(self, arguments: dict[str, Any]) -> None:
        """Store the constructor's arguments as they are, as `get_params` and `clone` want it."""
        names = self._get_param_names()
        self.__dict__ |= {name: value for name, value in arguments.items() if name in names}

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, validation_data: Any = None) -> Self:
        """Train, from new weights unless `warm_start`.

        Parameters
        ----------
        X : array, sparse matrix or data frame, shape (rows, features)
        y : array, shape (rows,) or (rows, outputs)
        sample_weight : array, shape (rows,), optional
            How often each row counts.
        validation_data : (X, y) or (X, y, sample_weight), optional
            For early stopping, in place of a part of X.

        Returns
        -------
        estimator
            Itself.

        Raises
        ------
        ValueError
            For parameters or data that cannot be, and where the weights become infinite or NaN.
        """
        return self._fit(X, y, sample_weight, validation_data=validation_data)

    def _prepared(
        self, X: Any, y: Any, sample_weight: Any, incremental: bool, validation_data: Any
    ) -> tuple[Sequential, Data, Callable[[], float] | None]:
        """All that training needs, checked: the model, its data, and the score for early stopping."""
        hidden = self._checked_parameters()
        if incremental and self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True")
        if validation_data is not None and not self.early_stopping:
            raise ValueError("validation_data needs early_stopping=True")
        first = not hasattr(self, "coefs_") or not (self.warm_start or incremental)
        if first or not (self._is_plain(X) and is_plain_target(y, len(X), is_classifier(self))):
            unmasked(X=X, y=y, sample_weight=sample_weight)
            X, y = validate_data(
                self, X, y, accept_sparse=["csr", "csc"], multi_output=True, y_numeric=not is_classifier(self),
                dtype=(np.float64, np.float32), reset=first,
            )  # fmt: skip
        y = column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X).astype(np.float64)
        targets = self._targets(y, define=first and not incremental, subset=incremental)
        weights = self._weigh_classes(y, weights, incremental)
        held_out = None if validation_data is None else self._held_out(validation_data, y)
        if first or not incremental or not isinstance(self.random_state, int):
            self._random_state = check_random_state(self.random_state)
        if first:
            self._start([X.shape[1], *hidden, targets.shape[1] if targets.ndim > 1 else len(self.classes_)], X.dtype)
        elif self.solver in STOCHASTIC:
            best = "best_validation_score_" if self.early_stopping else "best_loss_"
            if getattr(self, best, None) is None:  # another solver, or stopping rule, trained before
                self._begin_books()
        data, score = Data(in_rows(X), targets, weights), None
        if self.early_stopping and self.solver in STOCHASTIC:
            if held_out is None:
                data, held_out = self._split(data, y)
            score = partial(self._score_of, *held_out)
        model = self._trainable(hidden, goes_on=incremental or (not first and self.warm_start == "optimizer"))
        if model.chooses_engine:
            settle_engine(self, model, data, once=incremental)
            self._expose(model)
        return model, data, score

    def _fit(
        self, X: Any, y: Any, sample_weight: Any, *, incremental: bool = False, validation_data: Any = None,
        **known: Any,
    ) -> Self:  # fmt: skip
        """Train, with what is `known` of the labels before."""
        before = self.__dict__.copy()
        try:
            self.__dict__ |= known
            model, data, score = self._prepared(X, y, sample_weight, incremental, validation_data)
        except BaseException:
            self.__dict__ |= before  # never without what other threads predict with
            for name in self.__dict__.keys() - before.keys():
                del self.__dict__[name]
            raise
        try:
            constants = self._constants(data.y)
            if self.solver in STOCHASTIC:
                fit_stochastic(self, model, data, score, constants=constants, once=incremental)
            else:
                constant = 0.0 if constants is None else float(np.average(constants, weights=data.weights))
                fit_lbfgs(self, model, data, constant)
        finally:
            self._expose(model)
        if not model.engine.is_finite(model.memory.parameters):
            raise ValueError(
                "Solver produced non-finite parameter weights. The input data may contain large values and need to be "
                "preprocessed."
            )
        if not np.isfinite(self.loss_):
            warnings.warn(
                f"The loss became {self.loss_}, which ended training. Scale the targets, or lower learning_rate_init.",
                ConvergenceWarning,
                stacklevel=3,
            )
        return self

    def _checked_parameters(self) -> list[int]:
        """The sizes of the hidden layers, where all parameters are as they should be."""
        given = [self.__dict__.get(name) for name in CHECKS]
        if given != self.__dict__.get("_checked"):  # a check of all takes a seventh of a small partial_fit
            for name, check in CHECKS.items():
                if hasattr(self, name):
                    try:
                        check(getattr(self, name), name)
                    except TypeError as error:
                        raise DTypeError(str(error)) from error  # a ValueError too, as scikit-learn's is
            self._checked = given
        choose_engine(self.engine)
        if self.solver == "lbfgs" and (self.dropout or self.clip_norm is not None or self.callbacks):
            raise ValueError("dropout, clip_norm and callbacks need another solver than 'lbfgs'")
        sizes = self.hidden_layer_sizes
        sizes = list(sizes) if hasattr(sizes, "__iter__") else [sizes]
        if any(isinstance(size, bool) or not isinstance(size, int | np.integer) or size <= 0 for size in sizes):
            raise ValueError(f"hidden_layer_sizes must be > 0, got {sizes}.")
        return [int(size) for size in sizes]

    def _start(self, units: list[int], dtype: Any) -> None:
        """New weights and empty books."""
        if self.precision is not None:
            dtype = as_float_type(self.precision)
        self.n_iter_ = self.t_ = 0
        self.n_layers_, self.n_outputs_ = len(units), units[-1]
        self.out_activation_ = self._out_activation()
        self.coefs_, self.intercepts_ = glorot(self._random_state, units, self.activation, dtype)
        self.__dict__.pop("_model", None)
        if self.solver in STOCHASTIC:
            self.loss_curve_: list[float] = []
            self._begin_books()

    def _begin_books(self) -> None:
        """What the stochastic solvers note, by the stopping rule; losses of earlier epochs stay."""
        self.loss_curve_ = getattr(self, "loss_curve_", [])
        self._no_improvement_count = 0
        stopping = self.early_stopping
        self.validation_scores_: list[float] | None = [] if stopping else None
        self.best_validation_score_ = -np.inf if stopping else None
        self.best_loss_ = None if stopping else np.inf

    def _trainable(self, hidden: list[int], goes_on: bool) -> Sequential:
        """The model, with the loss and the optimizer that the parameters describe."""
        if hidden != (found := [len(biases) for biases in self.intercepts_[:-1]]):
            raise ValueError(f"hidden_layer_sizes must stay as they were fitted, {found}, got {hidden}")
        model = self._network()
        assert isinstance(model.loss, PenalizedLoss)
        model.loss.alpha = 0.0 if self.solver == "adamw" else float(self.alpha)
        if not (goes_on and model.optimizer is not None) and not (model.optimizer is None and self.solver == "lbfgs"):
            model.optimizer = optimizer_of(self)
            if model.optimizer is not None:
                kind = self.learning_rate if self.solver == "sgd" else "constant"
                self._optimizer = Rate(model.optimizer, kind, self.power_t)
            self._expose(model)
        return model

    def _network(self) -> Sequential:
        """The model with the weights that `coefs_` and `intercepts_` hold: whoever assigns others there means them."""
        arrays = [*self.coefs_, *self.intercepts_]
        views, model = self.__dict__.get("_views", ()), self.__dict__.get("_model")
        made_for = self.engine, self.activation, self.dropout, getattr(self, "label_smoothing", 0.0), self.threads
        if model is None or [np.shape(x) for x in arrays] != [x.shape for x in views]:
            engine, rng = choice(self.engine, otherwise=usual_engine()), self.__dict__.get("_random_state")
            seed = 0 if rng is None else copy.deepcopy(rng).randint(2**31 - 1)  # what shuffles stays in step
            coefs, intercepts = ([np.asarray(x) for x in these] for these in (self.coefs_, self.intercepts_))
            model = build(self, coefs, intercepts, self.out_activation_, np.result_type(*coefs), engine, seed)
            self._model, self._made_for = model, made_for
            self._expose(model)
        elif any(x is not view for x, view in zip(arrays, views, strict=True)):
            for layer, weights, biases in zip(dense_of(model), self.coefs_, self.intercepts_, strict=True):
                layer.weights, layer.biases = weights, np.reshape(biases, (1, -1))
            self._expose(model)
        if made_for != self.__dict__.get("_made_for"):
            adapt(model, self, self.out_activation_, choice(self.engine, otherwise=usual_engine()))
            self._made_for = made_for
            self._expose(model)
        return model

    def _expose(self, model: Sequential) -> None:
        """Let `coefs_` and `intercepts_` be the model's own memory, and name its engine."""
        self.engine_ = model.engine.name
        dense, show = dense_of(model), model.engine.asnumpy
        self.coefs_ = [show(layer.weights) for layer in dense]
        self.intercepts_ = [show(layer.biases).reshape(-1) for layer in dense]
        self._views = *self.coefs_, *self.intercepts_

    def __getstate__(self) -> dict[str, Any]:
        if "_model" in self.__dict__:
            self._network()  # takes what was assigned
        left_out = {"coefs_", "intercepts_", "_views"} if "_model" in self.__dict__ else set()
        return {name: value for name, value in super().__getstate__().items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_model" in self.__dict__:
            self._expose(self._model)

    def _held_out(self, validation_data: Any, fitted: Array) -> tuple[Any, Array, Array | None]:
        """(X, y, weights) held out by the user, checked against what was fitted."""
        X, y, weights = as_samples(validation_data, "validation_data")
        try:
            unmasked(X=X, y=y)
            X, y = validate_data(
                self, X, y, accept_sparse=["csr", "csc"], multi_output=True, y_numeric=not is_classifier(self),
                reset=False,
            )  # fmt: skip
            y = column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y
            if y.shape[1:] != fitted.shape[1:]:
                raise ValueError(f"y must have shape {('rows', *fitted.shape[1:])}, got {y.shape}")
            if y.ndim == 1 and isinstance(y[0], str) != isinstance(fitted[0], str):
                raise ValueError(f"y must hold labels such as {fitted.tolist()[0]!r}, got {y.tolist()[0]!r}")
            return in_rows(X), y, None if weights is None else _check_sample_weight(weights, X)
        except ValueError as error:
            raise ValueError(f"validation_data: {error}") from error

    def _split(self, data: Data, y: Array) -> tuple[Data, tuple[Any, Array, Array | None]]:
        """What to train on, and (X, y, weights) to score."""
        binary = data.y.ndim == 2 and data.y.shape[1] == 1 and is_classifier(self)
        train, held = train_test_split(
            np.arange(len(data.y)), random_state=self._random_state, test_size=self.validation_fraction,
            stratify=data.y > 0.5 if binary else None,
        )  # fmt: skip
        if len(held) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of your dataset."
            )
        X_held, _, weights_held = data.take(held)
        return data.take(train), (X_held, y[held], weights_held)

    def _score_of(self, X: Any, y: Array, weights: Array | None) -> float:
        """A score for early stopping; NaN where predictions are not finite."""
        if self.scoring is not None:
            nameless = object.__new__(type(self))  # X is an array here, which has no column names
            nameless.__dict__ |= {name: value for name, value in self.__dict__.items() if name != "feature_names_in_"}
            scorer = check_scoring(nameless, self.scoring)
            return float(scorer(nameless, X, y, **({} if weights is None else {"sample_weight": weights})))
        predicted = self._decide(self._model._outputs(X))
        if predicted.dtype.kind == "f" and not np.isfinite(predicted).all():
            return float("nan")
        metric = accuracy_score if is_classifier(self) else r2_score
        return float(metric(y, predicted, sample_weight=weights))

    def _is_plain(self, X: Any) -> bool:
        """Whether X is an array in which `validate_data`, slower than a small batch, would change nothing."""
        return (
            type(X) is np.ndarray
            and X.dtype in FLOATS
            and X.ndim == 2
            and len(X) > 0
            and X.shape[1] == self.__dict__.get("n_features_in_")
            and "feature_names_in_" not in self.__dict__
            and is_finite(X)
        )

    def _outputs(self, X: Any, probabilities: bool = False) -> Array:
        """The last layer's output for a user's X, before or after its activation."""
        if not (hasattr(self, "coefs_") and self._is_plain(X)):
            check_is_fitted(self)
            unmasked(X=X)
            X = validate_data(self, X, accept_sparse=["csr", "csc"], reset=False)
        model = self._network()
        return model._outputs(in_rows(X), model.loss if probabilities else None)

    def predict(self, X: Any) -> Array:
        """Class labels or numbers, shape (rows,), or for several outputs (rows, outputs).

        Parameters
        ----------
        X : array, sparse matrix or data frame, shape (rows, features)
        """
        return self._decide(self._outputs(X))

    def to_sklearn(self) -> Any:
        """scikit-learn's estimator with a copy of these weights and books; its ``partial_fit`` begins a new optimizer.

        Returns
        -------
        sklearn.neural_network.MLPClassifier or MLPRegressor

        Raises
        ------
        ValueError
            Where `activation` or `solver` is one that scikit-learn does not have.
        """
        check_is_fitted(self)
        self._network()  # takes what was assigned
        if self.activation not in ("identity", "logistic", "tanh", "relu") or self.solver == "adamw":
            raise ValueError(
                f"scikit-learn has no activation={self.activation!r} with solver={self.solver!r}; "
                "set_params may change a solver"
            )
        kind = neural_network.MLPClassifier if is_classifier(self) else neural_network.MLPRegressor
        made = kind()
        known = made.get_params(deep=False)
        made.set_params(**{name: value for name, value in self.get_params(deep=False).items() if name in known})
        made.warm_start = bool(self.warm_start)
        made.__dict__ |= {name: copy.deepcopy(value) for name, value in vars(self).items() if name in BOOKS}
        if is_classifier(self):
            labels = np.eye(self.n_outputs_, dtype=int) if self._multilabel else self.classes_
            made._label_binarizer = LabelBinarizer().fit(labels)
        return made

    def _takes_batches(self) -> bool:
        if self.solver not in STOCHASTIC:
            raise AttributeError(f"partial_fit is only available for stochastic optimizers. {self.solver} is not.")
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags
