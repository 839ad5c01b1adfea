"""Losses for classes: one contract of cross-entropy, on logits and on probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import numpy as np

from .boundary import as_count, as_labels, as_number, as_weights, optional
from .kernels.engine import Engine, real_array
from .kernels.ops import Array
from .losses import Loss
from .part import Setting

__all__ = ["CategoricalCrossEntropy", "SoftmaxCrossEntropy"]


def _class_weight(value: Any, name: str) -> tuple[float, ...] | dict[int, float] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {_label(label, name): as_number(weight, f"{name}[{label!r}]") for label, weight in value.items()}
    if isinstance(value, str):
        raise ValueError(
            f"{name} must be an array of one number for each class, or a dict, got {value!r}; "
            "'balanced' is for fit, which knows the labels"
        )
    array = real_array(value, name)
    if array.ndim != 1:
        raise ValueError(f"{name} must be an array of one number for each class, or a dict, got shape {array.shape}")
    return tuple(as_number(weight, name) for weight in array.tolist())


def _label(value: Any, name: str) -> int:
    if not isinstance(value, int | float | np.number | np.bool_) or not float(value).is_integer():
        raise ValueError(f"{name} must have whole numbers, the labels, for keys, got {value!r}")
    return int(value)


class CrossEntropy(Loss):
    """What both losses for classes share: targets and rows' weights, as `SoftmaxCrossEntropy` says."""

    classifies = True
    class_weight = Setting(_class_weight, default=None)
    label_smoothing = Setting(partial(as_number, most=1), default=0.0)
    ignore_index = Setting(optional(partial(as_count, least=np.iinfo(np.int64).min)), default=None)

    def __init__(
        self,
        class_weight: Any = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        reduction: str = "mean",
        *,
        engine: str | Engine | None = None,
    ) -> None:
        super().__init__(reduction=reduction, engine=engine)
        self.class_weight = class_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index

    def targets(
        self, y: Any, rows: int, width: int, sample_weight: Any = None, name: str = "y", dtype: Any = np.float64
    ) -> tuple[Array, Array | None]:
        self._class_weights(width)
        weights = as_weights(sample_weight, rows, f"{name.removesuffix('y')}sample_weight")
        targets, ignored = as_labels(y, rows, width, name, self.ignore_index, dtype)
        if ignored.any():
            weights = np.where(ignored, 0, 1 if weights is None else weights)
        return targets, weights

    def decide(self, outputs: Array) -> Array:
        return outputs.argmax(axis=1)

    def decide_targets(self, targets: Array) -> Array:
        return targets.argmax(axis=1) if targets.ndim == 2 else targets

    def with_class_weight(self, class_weight: Any) -> Self:
        twin = self.twin()
        twin.class_weight = class_weight
        return twin

    @property
    def _plain(self) -> bool:
        return self.class_weight is None and self.label_smoothing == 0 and self.reduction == "mean"

    def _options(self, outputs: Array, weights: Array | None) -> tuple[Array, ...]:
        """What the ops of cross-entropy take after outputs and targets."""
        return (
            self.row_weights(weights, outputs.shape[0]),
            self.engine.scalar(*self._class_weights(outputs.shape[1])),
            self.engine.scalar(self.label_smoothing),
            self.engine.scalar(self.reduction == "mean"),
        )

    def _class_weights(self, classes: int) -> Array:
        given, weights = self.class_weight, np.ones(classes)
        if isinstance(given, dict):
            for label, weight in given.items():
                if not 0 <= label < classes:
                    raise ValueError(f"class_weight must have labels from 0 to {classes - 1}, got {label}")
                weights[label] = weight
        elif given is not None:
            if len(given) != classes:
                raise ValueError(f"class_weight must hold {classes} numbers, one for each class, got {len(given)}")
            weights[:] = given
        return weights


class SoftmaxCrossEntropy(CrossEntropy):
    """Softmax and cross-entropy in one, on logits, from log-sum-exp in one pass with the gradient.

    Parameters
    ----------
    class_weight : array of shape (classes,) or dict, optional
        How much each class counts, at least 0; classes that a dict lacks count 1.
    label_smoothing : float, default 0.0
        In [0, 1]: the share of each row's target that is spread over all classes.
    ignore_index : int, optional
        A label of rows that do not count; it need not be one of the classes. A row of probabilities is ignored where
        this class has all of it.
    reduction : {"mean", "sum", "none"}, default "mean"
        See `Loss`.
    engine : str or Engine, optional

    Notes
    -----
    Of a row with targets t, 1 for its label and 0 for the others or probabilities, and class weights c:

    - its weight is the sum of t * c, times its sample weight; 0 where it is ignored;
    - its loss is the sum over classes of q * c * -log p, times its sample weight, where
      q = (1 - label_smoothing) * t + label_smoothing / classes (Szegedy et al., 2016, section 7);
    - the mean is the sum of the rows' losses divided by the sum of their weights; 0 where nothing counts.

    So labels and their one-hot rows agree in everything, and a sample weight is a repeat count. The values are those
    of ``torch.nn.functional.cross_entropy`` but for the mean where targets are probabilities with class weights, or
    do not sum to 1 in each row (torch divides by the number of rows), and where nothing counts (torch gives NaN).
    A class of target 0 adds nothing, even where its logit is -infinity.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> loss = fastbp.SoftmaxCrossEntropy()
    >>> round(loss.forward(np.array([[0.0, 0.0]]), np.array([1])), 6)
    0.693147
    >>> loss.backward()
    array([[ 0.5, -0.5]])
    >>> loss = fastbp.SoftmaxCrossEntropy(class_weight={1: 3.0}, ignore_index=-100, reduction="sum")
    >>> round(loss.forward(np.zeros((3, 2)), np.array([0, 1, -100])), 6)  # 1 * log(2) + 3 * log(2)
    2.772589
    """

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        if self._plain and weights is None and targets.ndim == 1:
            return self.engine.softmax_cross_entropy(outputs, targets, total)
        labels = targets.ndim == 1
        op = self.engine.weighted_softmax_cross_entropy if labels else self.engine.soft_softmax_cross_entropy
        self.costs, gradient = op(outputs, targets, *self._options(outputs, weights), total)
        return gradient

    def probabilities(self, outputs: Array) -> Array:
        return self.engine.softmax_forward(outputs)


class CategoricalCrossEntropy(CrossEntropy):
    """Cross-entropy on probabilities, such as a `Softmax` layer gives.

    Probabilities are clipped to [1e-7, 1 - 1e-7] for the loss. On logits, `SoftmaxCrossEntropy` is faster and exact;
    all else is as there.

    Parameters
    ----------
    class_weight, label_smoothing, ignore_index, reduction, engine : optional
        See `SoftmaxCrossEntropy`.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> loss = fastbp.CategoricalCrossEntropy()
    >>> round(loss.forward(np.array([[0.25, 0.75]]), np.array([0])), 6)
    1.386294
    >>> loss.backward()
    array([[-4.,  0.]])
    """

    def gradient(self, outputs: Array, targets: Array, weights: Array | None, total: Array) -> Array:
        if self._plain and weights is None and targets.ndim == 1:
            self.costs = self.engine.cross_entropy_forward(outputs, targets, total)
            return self.engine.cross_entropy_backward(outputs, targets)
        rows = targets if targets.ndim == 2 else self.engine.one_hot(targets, outputs)
        self.costs, gradient = self.engine.soft_cross_entropy(outputs, rows, *self._options(outputs, weights), total)
        return gradient

    def probabilities(self, outputs: Array) -> Array:
        return outputs
