"""Learning rates in the course of training.

A schedule maps times to learning rates. Time counts epochs, in fractions of them (steps done / steps an epoch), so that
one schedule serves any batch size and changes the rate at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .boundary import as_choice, as_count, as_number, optional
from .part import Part, Setting

__all__ = [
    "CosineAnnealingLR",
    "LinearWarmup",
    "OneCycleLR",
    "ReduceLROnPlateau",
    "Schedule",
    "SequentialLR",
    "StepLR",
]

Times: TypeAlias = NDArray[np.float64]
#: A schedule, or a function that is called like one.
Rates: TypeAlias = Callable[[Times, float], Any]

_positive = partial(as_number, above=0)


def _name(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a name, got {value!r}")
    return value


def as_schedule(value: Any, name: str) -> Rates:
    """Check something that is called as a schedule is."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be a fastbp.Schedule or a function of (epochs, lr), got {value!r}")
    return value


class Schedule(Part):
    """A learning rate for each time.

    Time counts the epochs in the model's `history`, and the share of the present one: in `Sequential.fit` the steps
    done / steps an epoch; with batches of unknown number those of the epoch before, and 0 in the first.
    `Sequential.train_on_batch` and `Sequential.step` are told the time by ``epoch=``.

    Any function of times and the optimizer's `lr` is a schedule too; it computes with NumPy arrays.

    Examples
    --------
    A rate that falls by 5 % an epoch, and by a little at each step:

    >>> import numpy as np, fastbp
    >>> optimizer = fastbp.SGD(0.1, schedule=lambda epochs, lr: lr * 0.95**epochs)
    >>> optimizer.rates(np.array([0.0, 0.5, 1.0])).round(4)
    array([0.1   , 0.0975, 0.095 ])
    """

    def __call__(self, epochs: Times, lr: float) -> Times:
        """The learning rates at some times.

        Parameters
        ----------
        epochs : array of float64
            Epochs since the start of training.
        lr : float
            The optimizer's.

        Returns
        -------
        array of float64, shape of `epochs`
        """
        raise NotImplementedError

    def observe(self, figures: Mapping[str, float]) -> None:
        """Take note of the figures of an epoch."""

    def monitored(self) -> tuple[str, ...]:
        """Names of the figures that `observe` looks at."""
        return ()

    def reset(self) -> None:
        """Forget the figures seen."""

    def progress(self) -> dict[str, Any]:
        """What was learned from the figures seen, as what JSON holds."""
        return {}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go back to what `progress` gave."""


class StepLR(Schedule):
    """``lr * gamma ** floor(epochs / step_size)``, as in torch.

    Parameters
    ----------
    step_size : float
        Epochs from one fall to the next.
    gamma : float, default 0.1

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> fastbp.StepLR(10)(np.array([0.0, 9.9, 10.0]), 0.5)
    array([0.5 , 0.5 , 0.05])
    """

    step_size = Setting(_positive)
    gamma = Setting(as_number)

    def __init__(self, step_size: float, gamma: float = 0.1) -> None:
        self.step_size, self.gamma = step_size, gamma

    def __call__(self, epochs: Times, lr: float) -> Times:
        falls = np.floor(epochs / self.step_size + 1e-9)  # 0.3 / 0.1 is a little below 3
        return lr * self.gamma**falls


class CosineAnnealingLR(Schedule):
    """Half a cosine from `lr` to `eta_min` (Loshchilov and Hutter, 2017), and back again after `T_max`, as in torch.

    Parameters
    ----------
    T_max : float
        Epochs until `eta_min`.
    eta_min : float, default 0.0

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> fastbp.CosineAnnealingLR(10)(np.array([0.0, 5.0, 10.0]), 0.5)
    array([0.5 , 0.25, 0.  ])
    """

    T_max = Setting(_positive)
    eta_min = Setting(as_number)

    def __init__(self, T_max: float, eta_min: float = 0.0) -> None:
        self.T_max, self.eta_min = T_max, eta_min

    def __call__(self, epochs: Times, lr: float) -> Times:
        return _cosine(lr, self.eta_min, epochs / self.T_max)


class LinearWarmup(Schedule):
    """A line from ``lr * start_factor`` to ``lr * end_factor``, which then stays: torch's LinearLR.

    Parameters
    ----------
    epochs : float
        How long it takes.
    start_factor : float, default 1/3
    end_factor : float, default 1.0

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> fastbp.LinearWarmup(5, start_factor=0.0)(np.array([0.0, 2.5, 5.0, 6.0]), 0.5)
    array([0.  , 0.25, 0.5 , 0.5 ])
    """

    epochs = Setting(_positive)
    start_factor = Setting(as_number)
    end_factor = Setting(as_number)

    def __init__(self, epochs: float, start_factor: float = 1 / 3, end_factor: float = 1.0) -> None:
        self.epochs, self.start_factor, self.end_factor = epochs, start_factor, end_factor

    def __call__(self, epochs: Times, lr: float) -> Times:
        return _line(lr * self.start_factor, lr * self.end_factor, np.minimum(epochs / self.epochs, 1))


class OneCycleLR(Schedule):
    """Up to `max_lr` and down to almost nothing (Smith and Topin, 2018); the optimizer's `lr` plays no part.

    Parameters
    ----------
    max_lr : float
        At the time ``pct_start * epochs``.
    epochs : float
        Length of the cycle; the rate stays at its end.
    pct_start : float, default 0.3
        Share of the cycle in which the rate rises, in (0, 1).
    anneal_strategy : {"cos", "linear"}, default "cos"
    div_factor : float, default 25
        The first rate is ``max_lr / div_factor``.
    final_div_factor : float, default 1e4
        The last rate is ``max_lr / div_factor / final_div_factor``.
    steps_per_epoch : float, optional
        Where it is given, peak and end come a step earlier, ``1 / steps_per_epoch``: the rate of each step is then
        that of torch's ``OneCycleLR(..., epochs=epochs, steps_per_epoch=steps_per_epoch, cycle_momentum=False)``, which
        has `max_lr` at the last step that begins before ``pct_start * epochs`` and the last rate at the last step of
        all. Without it, the rate of those steps is a step's change off.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> fastbp.OneCycleLR(1.0, 10, div_factor=10, final_div_factor=10)(np.array([0.0, 3.0, 10.0]), 0.5)
    array([0.1 , 1.  , 0.01])
    """

    max_lr = Setting(as_number)
    epochs = Setting(_positive)
    pct_start = Setting(partial(as_number, above=0, below=1))
    anneal_strategy = Setting(partial(as_choice, choices=("cos", "linear")))
    div_factor = Setting(_positive)
    final_div_factor = Setting(_positive)
    steps_per_epoch = Setting(optional(_positive), default=None)

    def __init__(
        self,
        max_lr: float,
        epochs: float,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        steps_per_epoch: float | None = None,
    ) -> None:
        self.max_lr, self.epochs, self.pct_start = max_lr, epochs, pct_start
        self.anneal_strategy = anneal_strategy
        self.div_factor, self.final_div_factor = div_factor, final_div_factor
        self.steps_per_epoch = steps_per_epoch

    def agree(self, settings: Mapping[str, Any]) -> None:
        if steps := settings.get("steps_per_epoch"):
            rising = settings["pct_start"] * settings["epochs"] * steps
            if rising <= 1:
                raise ValueError(f"pct_start * epochs * steps_per_epoch must be above 1 step, got {rising:g}")

    def __call__(self, epochs: Times, lr: float) -> Times:
        curve = _cosine if self.anneal_strategy == "cos" else _line
        step = 1 / self.steps_per_epoch if self.steps_per_epoch else 0
        first, peak, end = self.max_lr / self.div_factor, self.pct_start * self.epochs - step, self.epochs - step
        rising = curve(first, self.max_lr, epochs / peak)
        falling = np.minimum((epochs - peak) / (end - peak), 1)
        return np.where(epochs < peak, rising, curve(self.max_lr, first / self.final_div_factor, falling))


class ReduceLROnPlateau(Schedule):
    """Multiply the learning rate by `factor` where a figure has stopped improving, as in torch.

    It keeps what it has seen: each optimizer needs one of its own.

    Parameters
    ----------
    mode : {"min", "max"}, default "min"
        Whether less or more is better.
    factor : float, default 0.1
        In (0, 1).
    patience : int, default 10
        So many epochs without an improvement are let pass.
    threshold : float, default 1e-4
        An improvement is a change of more than that.
    threshold_mode : {"rel", "abs"}, default "rel"
        Whether `threshold` is a share of the best figure so far.
    cooldown : int, default 0
        Epochs after a reduction that do not count.
    min_lr : float, default 0.0
    monitor : str, default "val_loss"
        Name of the figure; ``val_loss`` needs ``fit(..., validation_data=...)``.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> optimizer = fastbp.SGD(0.1, schedule=fastbp.ReduceLROnPlateau(patience=1, factor=0.5, monitor="loss"))
    >>> for loss in (1.0, 1.0, 1.0):
    ...     optimizer.observe({"loss": loss})
    >>> optimizer.rates(np.array([3.0]))
    array([0.05])
    """

    mode = Setting(partial(as_choice, choices=("min", "max")))
    factor = Setting(partial(as_number, above=0, below=1))
    patience = Setting(partial(as_count, least=0))
    threshold = Setting(as_number)
    threshold_mode = Setting(partial(as_choice, choices=("rel", "abs")))
    cooldown = Setting(partial(as_count, least=0))
    min_lr = Setting(as_number)
    monitor = Setting(_name)
    #: The best figure so far.
    best: float | None
    #: Epochs without an improvement, since the last reduction if there was one.
    waited: int
    #: Epochs to come that do not count.
    cooling: int
    reductions: int

    def __init__(
        self,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        monitor: str = "val_loss",
    ) -> None:
        self.mode, self.factor, self.patience = mode, factor, patience
        self.threshold, self.threshold_mode = threshold, threshold_mode
        self.cooldown, self.min_lr, self.monitor = cooldown, min_lr, monitor
        self.reset()

    def __call__(self, epochs: Times, lr: float) -> Times:
        reduced = max(lr * self.factor**self.reductions, self.min_lr)
        return np.full(epochs.shape, min(lr, reduced))

    def observe(self, figures: Mapping[str, float]) -> None:
        if self.monitor not in figures:
            raise ValueError(f"monitor must name a figure of an epoch ({', '.join(figures)}), got {self.monitor!r}")
        figure = figures[self.monitor]
        self.waited += 1
        if self._improves(figure):
            self.best, self.waited = float(figure), 0
        if self.cooling:
            self.cooling, self.waited = self.cooling - 1, 0
        if self.waited > self.patience:
            self.reductions, self.waited, self.cooling = self.reductions + 1, 0, self.cooldown

    def monitored(self) -> tuple[str, ...]:
        return (self.monitor,)

    def reset(self) -> None:
        self.best = None
        self.waited = self.cooling = self.reductions = 0

    def progress(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "cooling": self.cooling, "reductions": self.reductions}

    def resume(self, progress: Mapping[str, Any]) -> None:
        best = progress["best"]
        counts = [as_count(progress[name], name, least=0) for name in ("waited", "cooling", "reductions")]
        self.best = None if best is None else as_number(best, "best", least=-math.inf)
        self.waited, self.cooling, self.reductions = counts

    def _improves(self, figure: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        best = -sign * math.inf if self.best is None else self.best
        margin = sign * self.threshold
        return sign * figure > sign * (best * (1 + margin) if self.threshold_mode == "rel" else best + margin)


class SequentialLR(Schedule):
    """One schedule after another, as in torch: each begins at time 0 at its milestone.

    Parameters
    ----------
    schedules : sequence of Schedule or function
        All of them observe the figures from the first epoch.
    milestones : sequence of float
        The epochs at which the second, third, ... take over.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> schedules = [fastbp.LinearWarmup(2, start_factor=0.5), fastbp.CosineAnnealingLR(8)]
    >>> fastbp.SequentialLR(schedules, milestones=[2])(np.array([0.0, 1.0, 2.0, 6.0, 10.0]), 0.4)
    array([0.2, 0.3, 0.4, 0.2, 0. ])
    """

    def __init__(self, schedules: Sequence[Rates], milestones: Sequence[float]) -> None:
        if not isinstance(schedules, Sequence) or not schedules:
            raise TypeError(f"schedules must be a sequence of schedules, got {schedules!r}")
        if not isinstance(milestones, Sequence) or len(milestones) != len(schedules) - 1:
            raise ValueError(f"milestones must hold {len(schedules) - 1} numbers, got {milestones!r}")
        self.schedules = tuple(as_schedule(x, f"schedules[{i}]") for i, x in enumerate(schedules))
        self.milestones = tuple(as_number(x, f"milestones[{i}]", above=0) for i, x in enumerate(milestones))
        if any(a >= b for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"milestones must rise, got {milestones!r}")

    def __call__(self, epochs: Times, lr: float) -> Times:
        rates = np.empty(epochs.shape)
        in_force = np.searchsorted(self.milestones, epochs, side="right")
        for i, (schedule, start) in enumerate(zip(self.schedules, (0.0, *self.milestones), strict=True)):
            now = in_force == i
            if now.any():
                rates[now] = schedule(epochs[now] - start, lr)
        return rates

    def observe(self, figures: Mapping[str, float]) -> None:
        for schedule in self._own().values():
            schedule.observe(figures)

    def monitored(self) -> tuple[str, ...]:
        return tuple(name for schedule in self._own().values() for name in schedule.monitored())

    def reset(self) -> None:
        for schedule in self._own().values():
            schedule.reset()

    def progress(self) -> dict[str, Any]:
        return {place: schedule.progress() for place, schedule in self._own().items()}

    def resume(self, progress: Mapping[str, Any]) -> None:
        for place, schedule in self._own().items():
            schedule.resume(progress[place])

    def config(self) -> dict[str, Any]:
        return {"schedules": self.schedules, "milestones": self.milestones}

    def _own(self) -> dict[str, Schedule]:
        """The schedules that are no plain functions, by their places."""
        return {str(i): schedule for i, schedule in enumerate(self.schedules) if isinstance(schedule, Schedule)}


def _line(start: float, end: float, share: Times) -> Times:
    return start + (end - start) * share


def _cosine(start: float, end: float, share: Times) -> Times:
    return end + (start - end) * (1 + np.cos(np.pi * share)) / 2
