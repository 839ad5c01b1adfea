"""scikit-learn's multi-layer perceptrons: the same arguments, attributes and methods, trained by fastbp.

Examples
--------
>>> from sklearn.datasets import load_digits
>>> from fastbp.estimators import MLPClassifier  # in place of sklearn.neural_network
>>> X, y = load_digits(return_X_y=True)
>>> MLPClassifier(early_stopping=True, random_state=0).fit(X[:1000] / 16, y[:1000]).score(X[1000:] / 16, y[1000:]) > 0.9
True
"""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np

try:
    from scipy.special import xlogy
    from sklearn import neural_network
    from sklearn.base import ClassifierMixin, RegressorMixin, is_classifier
    from sklearn.utils.class_weight import compute_sample_weight
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import type_of_target, unique_labels
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise ImportError(f"the estimators need scikit-learn: pip install 'fastbp[sklearn]' ({error})") from error

from .boundary import check_finite
from .fitting import dense_of
from .interop import dense
from .kernels.engine import real_array
from .kernels.ops import Array
from .perceptron import BOOKS, Perceptron

__all__ = ["MLPClassifier", "MLPRegressor", "from_sklearn"]


class MLPClassifier(ClassifierMixin, Perceptron):
    """A multi-layer perceptron for classes: `sklearn.neural_network.MLPClassifier`, trained by fastbp.

    One label of many makes a softmax, one of two or several at once a sigmoid, with the cross-entropy to each.

    Parameters
    ----------
    hidden_layer_sizes : sequence of int, default (100,)
        Neurons of each hidden layer.
    activation : {"relu", "identity", "logistic", "tanh", "gelu", "silu", "elu", "leaky_relu"}, default "relu"
    solver : {"adam", "sgd", "lbfgs", "adamw"}, default "adam"
    alpha : float, default 0.0001
        Adds ``alpha / 2 * sum(w ** 2) / rows of the batch`` to the loss; for "adamw" its weight decay.
    batch_size : int or "auto", default "auto"
        "auto" is 200, or all rows if there are fewer.
    learning_rate : {"constant", "invscaling", "adaptive"}, default "constant"
        Of "sgd" alone: ``learning_rate_init / (rows seen + 1) ** power_t``; or a fifth whenever training stalls.
    learning_rate_init : float, default 0.001
    power_t : float, default 0.5
    max_iter : int, default 200
        Epochs, or iterations of "lbfgs".
    shuffle : bool, default True
        In each epoch.
    random_state : int, RandomState or None
        One gives the weights, the split and the order of rows that scikit-learn draws from it.
    tol : float, default 1e-4
        Training ends when the loss, or the score, gets no better by `tol` for `n_iter_no_change` epochs.
    verbose : bool, default False
        Print each epoch.
    warm_start : bool or "optimizer", default False
        Go on from the weights of the last fit; "optimizer" keeps the optimizer's state as well.
    momentum : float, default 0.9
    nesterovs_momentum : bool, default True
    early_stopping : bool, default False
        Judge by the score on held-out rows, and keep the weights of the best epoch.
    validation_fraction : float, default 0.1
    beta_1, beta_2, epsilon : float, default 0.9, 0.999, 1e-8
        Of "adam" and "adamw".
    n_iter_no_change : int, default 10
    max_fun : int, default 15000
        Evaluations of "lbfgs".
    class_weight : dict, "balanced" or None
        How often each class counts; "balanced" is rows / (classes * rows of the class).
    label_smoothing : float, default 0.0
        This share of each target is spread over all classes.
    dropout : float, default 0.0
        The share of hidden neurons that a step leaves out.
    clip_norm : float, optional
        Scale the gradient down to this norm where it is longer.
    scoring : str or callable, optional
        Of early stopping: what `sklearn.metrics.check_scoring` takes. By default the estimator's own score.
    callbacks : sequence of Callback or function, optional
        Told of each epoch, as in `fastbp.Sequential.fit`; their figures are ``loss`` and ``val_score``.
    progress : bool, default False
        Show a progress bar; needs tqdm.
    engine : str or Engine, optional
        By default the choice in force, see `fastbp.engine`; where there is none, Numba if it is installed, or NumPy.
        "auto" is the one that is fastest at the network's step, by measurement.
    precision : {"float32", "float64"}, optional
        What to compute in; by default the dtype of X in the first fit.
    threads : int, optional
        At most so many threads, by default as many as BLAS and Numba may use; needs threadpoolctl.

    Attributes
    ----------
    classes_ : array, shape (classes,)
    coefs_ : list of array, shape (inputs, outputs) of each layer
        The model's own memory; what is assigned in its place is what the next call computes with.
    intercepts_ : list of array, shape (outputs,) of each layer
    loss_ : float
    loss_curve_ : list of float
        The loss of each epoch.
    best_loss_ : float or None
    validation_scores_ : list of float or None
    best_validation_score_ : float or None
    n_iter_, t_ : int
        Epochs of the last fit, and rows seen in all.
    n_layers_, n_outputs_, n_features_in_ : int
    feature_names_in_ : array of str
        Where X had names for all columns.
    out_activation_ : str
    engine_ : str
        The name of the engine in use.

    Notes
    -----
    One `random_state` gives scikit-learn's own results but for rounding, with two exceptions: where a probability is so
    small that scikit-learn clips it, the loss is exact here, and "lbfgs" may take another path; and a loss that is no
    longer finite ends training at once.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> X, y = load_iris(return_X_y=True)
    >>> model = make_pipeline(StandardScaler(), MLPClassifier(solver="lbfgs", random_state=0))
    >>> model.fit(X, y).score(X, y) > 0.95
    True
    """

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool | str = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
        class_weight: Any = None,
        label_smoothing: float = 0.0,
        dropout: float = 0.0,
        clip_norm: float | None = None,
        scoring: Any = None,
        callbacks: Any = None,
        progress: bool = False,
        engine: Any = None,
        precision: Any = None,
        threads: int | None = None,
    ) -> None:
        self._keep(locals())

    @available_if(lambda estimator: estimator._takes_batches())
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> Self:
        """Train for one epoch over some rows, from the weights as they are.

        Parameters
        ----------
        X : array, sparse matrix or data frame, shape (rows, features)
        y : array, shape (rows,) or (rows, classes)
        sample_weight : array, shape (rows,), optional
        classes : array, shape (classes,)
            All that there will be; needed in the first call.

        Returns
        -------
        MLPClassifier
            Itself.
        """
        known = getattr(self, "classes_", None)
        if classes is None and known is None:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        if classes is not None and known is not None and not np.array_equal(known, unique_labels(classes)):
            raise ValueError(f"`classes={classes!r}` is not the same as on last call to partial_fit, was: {known!r}")
        if known is not None:
            return self._fit(X, y, sample_weight, incremental=True)
        labels = {"classes_": unique_labels(classes), "_multilabel": type_of_target(y).startswith("multilabel")}
        return self._fit(X, y, sample_weight, incremental=True, **labels)

    def predict_proba(self, X: Any) -> Array:
        """Probabilities, shape (rows, classes); those of several labels stand alone, and add up to anything.

        Parameters
        ----------
        X : array, sparse matrix or data frame, shape (rows, features)
        """
        yes = self._outputs(X, probabilities=True)
        return np.hstack([1 - yes, yes]) if self.n_outputs_ == 1 else yes

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithms of `predict_proba`.

        Parameters
        ----------
        X : array, sparse matrix or data frame, shape (rows, features)
        """
        probabilities = self.predict_proba(X)
        with np.errstate(divide="ignore"):
            return np.log(probabilities, out=probabilities)

    def _targets(self, y: Any, *, define: bool, subset: bool) -> Array:
        """Labels as numbers, or rows of 0 and 1; where asked to, `classes_` first."""
        if define or not hasattr(self, "classes_"):
            kind = type_of_target(y, input_name="y")
            if kind not in ("binary", "multiclass", "multilabel-indicator"):
                raise ValueError(
                    f"Unknown label type: {kind}. y must hold labels, or rows of 0 and 1 for several labels"
                )
            self._multilabel = kind == "multilabel-indicator"
            self.classes_ = np.arange(y.shape[1]) if self._multilabel else np.unique(y)
        elif not subset and not np.array_equal(found := unique_labels(y), self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous call to fit. "
                f"Previously got {self.classes_}, `y` has {found}"
            )
        if self._multilabel:
            rows = np.asarray(dense(y), np.float64)
            if rows.ndim != 2 or rows.shape[1] != len(self.classes_) or not ((rows == 0) | (rows == 1)).all():
                raise ValueError(f"y must hold rows of 0 and 1, shape (rows, {len(self.classes_)}), got {rows.shape}")
        else:
            places = np.minimum(np.searchsorted(self.classes_, y), len(self.classes_) - 1)
            if (self.classes_[places] != y).any():
                raise ValueError(
                    f"`y` has classes not in `self.classes_`: {unique_labels(y)} in place of {self.classes_}"
                )
            if len(self.classes_) > 2:
                return places.astype(np.int64, copy=False)
            rows = places.astype(np.float64).reshape(-1, 1)
        return rows * (1 - self.label_smoothing) + self.label_smoothing / 2

    def _weigh_classes(self, y: Array, weights: Array | None, incremental: bool) -> Array | None:
        if self.class_weight is None:
            return weights
        if incremental and isinstance(self.class_weight, str):
            raise ValueError("class_weight='balanced' needs all rows, so partial_fit cannot take it; pass a dict")
        by_class: Array = compute_sample_weight(self.class_weight, y)
        check_finite(by_class, "class_weight")
        if (by_class < 0).any():
            raise ValueError(f"class_weight must hold numbers of at least 0, got {by_class.min()}")
        return by_class if weights is None else weights * by_class

    def _out_activation(self) -> str:
        return "logistic" if self._multilabel or len(self.classes_) <= 2 else "softmax"

    def _constants(self, targets: Array) -> Array | None:
        return None

    def _decide(self, outputs: Array) -> Array:
        if self._multilabel:
            return (outputs > 0).astype(int)
        if self.out_activation_ == "softmax":
            return self.classes_[outputs.argmax(axis=1)]
        return self.classes_[np.minimum(outputs[:, 0] > 0, len(self.classes_) - 1).astype(int)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class MLPRegressor(RegressorMixin, Perceptron):
    """A multi-layer perceptron for numbers: `sklearn.neural_network.MLPRegressor`, trained by fastbp.

    Parameters and attributes are those of `MLPClassifier`, but for what has to do with classes.

    Parameters
    ----------
    loss : {"squared_error", "poisson"}, default "squared_error"
        Half the squared error, or half the Poisson deviance of the exponential of the output. With several outputs,
        the gradient of the squared error is that of the sum over them, as scikit-learn's is, the loss that of the mean.
    **parameters
        See `MLPClassifier`.

    Examples
    --------
    >>> from sklearn.datasets import make_regression
    >>> X, y = make_regression(200, 5, random_state=0)
    >>> MLPRegressor(solver="lbfgs", random_state=0, max_iter=500, tol=0.1).fit(X, y).score(X, y) > 0.99
    True
    """

    def __init__(
        self,
        loss: str = "squared_error",
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool | str = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
        dropout: float = 0.0,
        clip_norm: float | None = None,
        scoring: Any = None,
        callbacks: Any = None,
        progress: bool = False,
        engine: Any = None,
        precision: Any = None,
        threads: int | None = None,
    ) -> None:
        self._keep(locals())

    @available_if(lambda estimator: estimator._takes_batches())
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train for one epoch over some rows, from the weights as they are.

        Parameters
        ----------
        X : array, sparse matrix or data frame, shape (rows, features)
        y : array, shape (rows,) or (rows, outputs)
        sample_weight : array, shape (rows,), optional

        Returns
        -------
        MLPRegressor
            Itself.
        """
        return self._fit(X, y, sample_weight, incremental=True)

    def _targets(self, y: Array, *, define: bool, subset: bool) -> Array:
        y = real_array(y, "y")
        if self.loss == "poisson" and (y < 0).any():
            raise ValueError(f"y must be at least 0 with loss='poisson', got {y.min()}")
        return y.reshape(len(y), -1)

    def _weigh_classes(self, y: Array, weights: Array | None, incremental: bool) -> Array | None:
        return weights

    def _out_activation(self) -> str:
        return "exp" if self.loss == "poisson" else "identity"

    def _constants(self, targets: Array) -> Array | None:
        """What makes scikit-learn's loss, half a deviance, of the negative log-likelihood."""
        return (xlogy(targets, targets) - targets).sum(axis=1) if self.loss == "poisson" else None

    def _decide(self, outputs: Array) -> Array:
        with np.errstate(over="ignore"):
            numbers = np.exp(outputs) if self.out_activation_ == "exp" else outputs
        return numbers.ravel() if numbers.shape[1] == 1 else numbers


def from_sklearn(fitted: Any) -> MLPClassifier | MLPRegressor:
    """The estimator that goes on where one of scikit-learn stands, weights, books and optimizer copied.

    Its way back is the method ``to_sklearn``.

    Parameters
    ----------
    fitted : sklearn.neural_network.MLPClassifier or MLPRegressor

    Returns
    -------
    MLPClassifier or MLPRegressor

    Raises
    ------
    TypeError
        For anything else.
    sklearn.exceptions.NotFittedError

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.neural_network import MLPClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> theirs = MLPClassifier(solver="lbfgs", random_state=0, max_iter=1000).fit(X, y)
    >>> bool((from_sklearn(theirs).predict(X) == theirs.predict(X)).all())
    True
    """
    if not isinstance(fitted, neural_network.MLPClassifier | neural_network.MLPRegressor):
        raise TypeError(f"fitted must be scikit-learn's MLPClassifier or MLPRegressor, got {type(fitted).__name__}")
    check_is_fitted(fitted)
    made = (MLPClassifier if is_classifier(fitted) else MLPRegressor)(**fitted.get_params(deep=False))
    made.__dict__ |= {name: copy.deepcopy(value) for name, value in vars(fitted).items() if name in BOOKS}
    if is_classifier(made):
        made._multilabel = made.out_activation_ == "logistic" and made.n_outputs_ > 1
    theirs = getattr(fitted, "_optimizer", None)
    model = made._trainable([len(biases) for biases in made.intercepts_[:-1]], goes_on=False)
    optimizer: Any = model.optimizer
    if theirs is not None and made.solver == "adam":
        optimizer.steps[...] = theirs.t
        moments = {"m": theirs.ms, "v": theirs.vs}
    elif theirs is not None and made.solver == "sgd":
        # there, velocities are steps, of which the learning rate is part
        optimizer.lr = rate = theirs.learning_rate
        moments = {"velocity": [-velocity / rate for velocity in theirs.velocities]}
    else:
        moments = {}
    dense = dense_of(model)
    for name, arrays in moments.items():
        for layer, weights, biases in zip(dense, arrays[: len(dense)], arrays[len(dense) :], strict=True):
            parts = model.memory.parts_of(layer, getattr(optimizer, name))
            parts["weights"][...], parts["biases"][...] = map(model.engine.asarray, (weights, biases))
    return made
