"""Optimizers: a few ops a step, over all parameters of a model at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from .boundary import as_flag, as_number, optional
from .kernels.engine import Engine
from .kernels.ops import Array
from .part import Part, Setting
from .schedules import Rates, Schedule, as_schedule

if TYPE_CHECKING:
    from .memory import Memory

__all__ = ["SGD", "Adam", "AdamW", "Lion", "Optimizer", "RMSprop"]


class Options(TypedDict, total=False):
    """What every optimizer takes by keyword; see `Optimizer`."""

    l1: float
    clip_norm: float | None
    clip_value: float | None
    schedule: Rates | None


def _betas(value: Any, name: str) -> tuple[float, float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"{name} must be two numbers, got {value!r}")
    return as_number(value[0], f"{name}[0]", below=1), as_number(value[1], f"{name}[1]", below=1)


class Optimizer(Part):
    """How gradients change parameters.

    A step clips the gradients, adds the penalties to those of the weights, and then advances the parameters. A
    subclass computes with ops alone, in `advance`, and names in `moments` the arrays that it keeps for each parameter.
    `config` returns the arguments of the constructor, for files: those below, and what a subclass adds to
    ``super().config()``.

    Parameters
    ----------
    lr : float
        Learning rate.
    weight_decay : float, default 0.0
        Adds ``weight_decay * w`` to the gradients of weights, not to those of biases: the gradient of
        ``weight_decay / 2 * (w ** 2).sum()``. `AdamW` and `Lion` shrink the weights themselves.
    l1 : float, default 0.0
        Adds ``l1 * sign(w)`` to the gradients of weights: the gradient of ``l1 * abs(w).sum()``.
    clip_norm : float, optional
        Scale the gradients down where the Euclidean norm of all of them is larger, as
        ``torch.nn.utils.clip_grad_norm_`` does; after `clip_value`, and before the penalties, like it.
    clip_value : float, optional
        Put each element of the gradients between ``-clip_value`` and ``clip_value``.
    schedule : callable, optional
        Learning rates in the course of training, from times in epochs and `lr`; see `fastbp.Schedule`.

    Attributes
    ----------
    rate : array, shape (1,), float64
        The learning rate of the present step, in the engine's memory: `lr`, unless a schedule says otherwise.

    Examples
    --------
    An optimizer of one's own: steps of ``lr`` along the sign of a running mean (Bernstein et al., 2018, Signum).

    >>> import fastbp
    >>> class Signum(fastbp.Optimizer):
    ...     moments = ("mean",)
    ...
    ...     def advance(self, parameters, gradients):
    ...         betas = self.engine.scalar(0.9, 0.9)
    ...         self.engine.lion(parameters, self.mean, gradients, self.rate, betas)
    >>> X, y = fastbp.spiral_data(100, 3, noise=0.1, seed=0)
    >>> model = fastbp.Sequential(
    ...     [fastbp.Dense(2, 64), fastbp.ReLU(), fastbp.Dense(64, 3)],
    ...     loss=fastbp.SoftmaxCrossEntropy(), optimizer=Signum(0.01, clip_norm=1.0), seed=0,
    ... )
    >>> model.fit(X, y, epochs=200).evaluate(X, y)["accuracy"] > 0.9
    True
    """

    #: Names of the arrays that are kept from step to step, a number for each parameter, at first 0.
    moments: ClassVar[tuple[str, ...]] = ()
    #: Names of the other arrays that steps change: float64, shape (1,), at first 0.
    counters: ClassVar[tuple[str, ...]] = ()

    weight_decay = Setting(as_number)
    l1 = Setting(as_number, default=0.0)
    clip_norm = Setting(optional(partial(as_number, above=0)), default=None)
    clip_value = Setting(optional(partial(as_number, above=0)), default=None)

    def __init__(
        self,
        lr: float,
        *,
        weight_decay: float = 0.0,
        l1: float = 0.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        schedule: Rates | None = None,
    ) -> None:
        # an array from the start: what a recording reads may then change between its steps
        self.rate = np.empty(1)
        self.lr = lr
        self.weight_decay, self.l1 = weight_decay, l1
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.schedule = schedule
        self.reset()

    @property
    def lr(self) -> float:
        """The learning rate, or what a schedule starts from; it may change at any time."""
        return self.__dict__["lr"]

    @lr.setter
    def lr(self, lr: float) -> None:
        self.__dict__["lr"] = as_number(lr, "lr")
        self.rate[...] = self.lr

    @property
    def schedule(self) -> Rates | None:
        """Learning rates in the course of training; it may change between calls of ``fit``."""
        return self.__dict__["schedule"]

    @schedule.setter
    def schedule(self, schedule: Rates | None) -> None:
        self.__dict__["schedule"] = None if schedule is None else as_schedule(schedule, "schedule")
        self.rate[...] = self.lr

    @property
    def decoupled(self) -> bool:
        """Whether weight decay shrinks the weights instead of being part of their gradients."""
        return False

    def prepare(self, engine: Engine, size: int, dtype: Any) -> None:
        """Move to an engine's memory; the moments of as many parameters stay, others start from 0.

        Parameters
        ----------
        engine : Engine
        size : int
            How many parameters there are.
        dtype : dtype
            Theirs, and the moments'.
        """
        if any(name not in self.__dict__ or self.__dict__[name].shape != (size,) for name in self.moments):
            self.forget()
        self.engine = engine
        for name in ("rate", *self.counters):
            self.__dict__[name] = engine.asarray(self.__dict__[name]).copy()  # it may be another's memory
        for name in self.moments:
            kept = self.__dict__.get(name)
            self.__dict__[name] = engine.zeros((size,), dtype)
            if kept is not None and kept.shape == (size,):
                self.__dict__[name][...] = engine.asarray(kept)

    def follow(self, memory: Memory, before: Memory) -> None:
        """Take the moments of parameters to where they lie now.

        Where one of them has none yet, all steps taken are forgotten, because a correction of the moments' bias counts
        them for all parameters together.
        """
        moments = {name: self.engine.asarray(self.__dict__[name]) for name in self.moments if name in self.__dict__}
        own = {name: moment for name, moment in moments.items() if moment.shape == before.gradients.shape}
        carried = {name: memory.carried(moment, before) for name, moment in own.items()}
        if any(moment is None for moment in carried.values()):
            self.forget()
        else:
            self.__dict__ |= carried

    def reset(self) -> None:
        """Forget all steps taken, and what the schedule has seen."""
        self.forget()
        if isinstance(self.schedule, Schedule):
            self.schedule.reset()

    def forget(self) -> None:
        """Forget all steps taken, but not what the schedule has seen."""
        zeros = self.engine.zeros if "engine" in self.__dict__ else np.zeros
        for name in ("rate", *self.counters):
            self.__dict__[name] = zeros((1,), np.float64)  # new memory: the old may be another's too
        for name in self.moments:
            if name in self.__dict__:
                self.__dict__[name] = zeros(self.__dict__[name].shape, self.__dict__[name].dtype)
        self.rate[...] = self.lr

    @property
    def state(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("rate", *self.counters, *self.moments)

    def update(self, parameters: Array, gradients: Array, decayed: tuple[Array, Array] | None) -> None:
        """Take one step.

        Parameters
        ----------
        parameters : array, shape (size,)
            All that is trained, flat; changed in place.
        gradients : array, shape (size,)
            Theirs; overwritten where they are clipped or penalties are added.
        decayed : (array, array) or None
            Views of the first of parameters and gradients, each of shape (decayed size,), to which weight decay and
            `l1` apply; None where they apply to none.
        """
        engine, weight_decay = self.engine, self.weight_decay
        if self.clip_value is not None:
            engine.clip_value(gradients, engine.scalar(self.clip_value))
        if self.clip_norm is not None:
            engine.clip_norm(gradients, engine.scalar(self.clip_norm))
        if decayed is not None:
            coupled = 0.0 if self.decoupled else weight_decay
            if coupled or self.l1:
                engine.penalize(*decayed, engine.scalar(coupled), engine.scalar(self.l1))
            if weight_decay and self.decoupled:
                engine.decay(decayed[0], self.rate, engine.scalar(weight_decay))
        self.advance(parameters, gradients)

    def advance(self, parameters: Array, gradients: Array) -> None:
        """Change the parameters, by ops of ``self.engine`` that read ``self.rate`` and update the `moments`.

        Parameters
        ----------
        parameters, gradients : array, shape (size,)
        """
        raise NotImplementedError

    def rates(self, epochs: NDArray[np.float64]) -> NDArray[np.float64]:
        """The learning rates of some steps.

        Parameters
        ----------
        epochs : array of float64
            When each step begins, in epochs since the start of training: steps done / steps an epoch.

        Returns
        -------
        array of float64, shape of `epochs`

        Raises
        ------
        ValueError
            Where the schedule gives something else than finite rates of at least 0, one for each step or one for all.
        """
        epochs = np.asarray(epochs, np.float64)
        rates = np.empty(epochs.shape)
        try:
            rates[...] = self.lr if self.schedule is None else self.schedule(epochs, self.lr)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"schedule must map an array of times of shape {epochs.shape} to learning rates of that shape "
                f"(np.vectorize makes such a function of one of numbers): {error}"
            ) from error
        if (bad := ~(np.isfinite(rates) & (rates >= 0))).any():
            raise ValueError(
                f"schedule must give finite learning rates of at least 0, got {rates[bad][0]} at epoch {epochs[bad][0]}"
            )
        return rates

    def observe(self, figures: Mapping[str, float]) -> None:
        """Tell the schedule the figures of an epoch: ``loss``, ``val_loss`` and others by name."""
        if isinstance(self.schedule, Schedule):
            self.schedule.observe(figures)

    def monitored(self) -> tuple[str, ...]:
        """Names of the figures that `observe` must be given."""
        return self.schedule.monitored() if isinstance(self.schedule, Schedule) else ()

    def settings(self) -> dict[str, Any]:
        """What a recording depends on; learning rates reach it through `rate`."""
        settings = super().settings() | {"scheduled": self.schedule is not None}
        return {name: value for name, value in settings.items() if name not in ("lr", "schedule")}

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that make this optimizer again."""
        schedule = {} if self.schedule is None else {"schedule": self.schedule}
        return {"lr": self.lr} | super().config() | schedule

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # a shallow one would share the arrays that steps change


class SGD(Optimizer):
    """Stochastic gradient descent.

    With momentum, ``velocity = momentum * velocity + gradient`` and ``parameter -= lr * velocity``; with Nesterov's,
    ``parameter -= lr * (gradient + momentum * velocity)`` (Sutskever et al., 2013, in the form that torch uses).

    Parameters
    ----------
    lr : float
    momentum : float, default 0.0
        In [0, 1).
    nesterov : bool, default False
        Needs a momentum.
    weight_decay : float, default 0.0
    **options
        l1, clip_norm, clip_value, schedule; see `Optimizer`.

    Examples
    --------
    >>> import fastbp
    >>> fastbp.SGD(0.1, momentum=0.9)
    SGD(lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0)
    """

    moments = ("velocity",)
    velocity: Array

    momentum = Setting(partial(as_number, below=1))
    nesterov = Setting(as_flag)

    def __init__(
        self,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(lr, weight_decay=weight_decay, **options)
        self.momentum = momentum
        self.nesterov = nesterov

    def agree(self, settings: Mapping[str, Any]) -> None:
        if settings.get("nesterov") and not settings["momentum"]:
            raise ValueError(f"nesterov needs a momentum above 0, got momentum={settings['momentum']}")

    @property
    def decoupled(self) -> bool:
        return not self.momentum  # both are the same then, and this leaves the gradients as they are

    def advance(self, parameters: Array, gradients: Array) -> None:
        if self.momentum:
            numbers = self.engine.scalar(self.momentum), self.engine.scalar(self.nesterov)
            self.engine.sgd_momentum(parameters, self.velocity, gradients, self.rate, *numbers)
        else:
            self.engine.sgd(parameters, gradients, self.rate)


class RMSprop(Optimizer):
    """Gradients divided by the root of a running mean of their squares (Tieleman and Hinton, 2012).

    Parameters
    ----------
    lr : float, default 0.01
    alpha : float, default 0.99
        How much of the running means a step keeps, in [0, 1).
    eps : float, default 1e-8
        Added to the root.
    weight_decay : float, default 0.0
    momentum : float, default 0.0
        In [0, 1): of a velocity of divided gradients, as in `SGD`.
    centered : bool, default False
        Divide by the root of the running variance instead (Graves, 2013).
    **options
        l1, clip_norm, clip_value, schedule; see `Optimizer`.

    Examples
    --------
    >>> import fastbp
    >>> fastbp.RMSprop(momentum=0.9)
    RMSprop(lr=0.01, alpha=0.99, eps=1e-08, momentum=0.9, centered=False, weight_decay=0.0)
    """

    moments = ("v", "m", "velocity")
    v: Array
    m: Array
    velocity: Array

    alpha = Setting(partial(as_number, below=1))
    eps = Setting(partial(as_number, above=0))
    momentum = Setting(partial(as_number, below=1))
    centered = Setting(as_flag)

    def __init__(
        self,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(lr, weight_decay=weight_decay, **options)
        self.alpha, self.eps = alpha, eps
        self.momentum, self.centered = momentum, centered

    def advance(self, parameters: Array, gradients: Array) -> None:
        numbers = map(self.engine.scalar, (self.alpha, self.eps, self.momentum, self.centered))
        self.engine.rmsprop(parameters, self.v, self.m, self.velocity, gradients, self.rate, *numbers)


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015, algorithm 1).

    Parameters
    ----------
    lr : float, default 0.001
    betas : (float, float), default (0.9, 0.999)
        How much of the running means of gradient and squared gradient a step keeps, each in [0, 1).
    eps : float, default 1e-8
        Added to the root of the unbiased running mean of squares.
    weight_decay : float, default 0.0
    eps_hat : float, default 0.0
        Added to that root before its bias is taken out: the paper's "epsilon hat" at the end of section 2, and the only
        epsilon of scikit-learn and Keras.
    **options
        l1, clip_norm, clip_value, schedule; see `Optimizer`.

    Examples
    --------
    >>> import fastbp
    >>> fastbp.Adam(0.01)
    Adam(lr=0.01, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)
    """

    moments = ("m", "v")
    m: Array
    v: Array
    counters = ("steps",)
    steps: Array

    betas = Setting(_betas)
    eps = Setting(as_number)
    eps_hat = Setting(as_number, default=0.0)

    def __init__(
        self,
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        eps_hat: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(lr, weight_decay=weight_decay, **options)
        self.betas = betas
        self.eps, self.eps_hat = eps, eps_hat

    def agree(self, settings: Mapping[str, Any]) -> None:
        if settings.get("eps") == 0 and settings.get("eps_hat") == 0:
            raise ValueError("eps must be above 0, or else eps_hat")

    def advance(self, parameters: Array, gradients: Array) -> None:
        numbers = self.engine.scalar(*self.betas), self.engine.scalar(self.eps, self.eps_hat)
        self.engine.adam(parameters, self.m, self.v, gradients, self.rate, *numbers, self.steps)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019): weights shrink by ``lr * weight_decay`` a step.

    Parameters
    ----------
    lr : float, default 0.001
    betas : (float, float), default (0.9, 0.999)
    eps : float, default 1e-8
    weight_decay : float, default 0.01
    eps_hat : float, default 0.0
    **options
        l1, clip_norm, clip_value, schedule; see `Optimizer`.

    Examples
    --------
    >>> import fastbp
    >>> fastbp.AdamW(weight_decay=0.1)
    AdamW(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.1)
    """

    def __init__(
        self,
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        eps_hat: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(lr, betas, eps, weight_decay, eps_hat=eps_hat, **options)

    @property
    def decoupled(self) -> bool:
        return True


class Lion(Optimizer):
    """Steps of ``lr`` along the sign of a running mean of gradients (Chen et al., 2023, algorithm 2).

    ``parameter -= lr * (sign(betas[0] * m + (1 - betas[0]) * gradient) + weight_decay * parameter)``, and then
    ``m = betas[1] * m + (1 - betas[1]) * gradient``.

    Parameters
    ----------
    lr : float, default 0.0001
        A third to a tenth of what suits `AdamW`.
    betas : (float, float), default (0.9, 0.99)
    weight_decay : float, default 0.0
        Decoupled, as in `AdamW`.
    **options
        l1, clip_norm, clip_value, schedule; see `Optimizer`.

    Examples
    --------
    >>> import fastbp
    >>> fastbp.Lion(weight_decay=0.1)
    Lion(lr=0.0001, betas=(0.9, 0.99), weight_decay=0.1)
    """

    moments = ("m",)
    m: Array

    betas = Setting(_betas)

    def __init__(
        self,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(lr, weight_decay=weight_decay, **options)
        self.betas = betas

    @property
    def decoupled(self) -> bool:
        return True

    def advance(self, parameters: Array, gradients: Array) -> None:
        self.engine.lion(parameters, self.m, gradients, self.rate, self.engine.scalar(*self.betas))
