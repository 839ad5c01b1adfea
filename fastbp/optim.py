"""Optimizers: one op a step, over all parameters of a model at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from .kernels.engine import Engine
from .kernels.ops import Array
from .part import Part

__all__ = ["SGD", "Adam", "Optimizer"]


class Optimizer(Part):
    """How gradients change parameters.

    A subclass computes with ops alone, in `update`, and names in `slots` the arrays that it keeps for each parameter.
    """

    #: Names of the arrays of the parameters' size that an optimizer keeps from step to step.
    slots: ClassVar[tuple[str, ...]] = ()
    #: Names of the other state: the learning rate, counters.
    cells: ClassVar[tuple[str, ...]] = ("rate",)

    def __init__(self, lr: float) -> None:
        # an array from the start: what a recording reads may then change between its steps
        self.rate = np.empty(1)
        self.lr = lr

    @property
    def lr(self) -> float:
        """The learning rate; it may change at any time."""
        return float(self.rate[0])

    @lr.setter
    def lr(self, lr: float) -> None:
        self.rate[0] = _number("lr", lr)

    def prepare(self, engine: Engine, size: int, dtype: Any) -> None:
        """Move to `engine`, with state for `size` parameters: what is there of that size, otherwise zeros."""
        self.engine = engine
        fits = all(self.__dict__.get(name, self.rate).shape == (size,) for name in self.slots)
        for name in self.cells:
            self.__dict__[name] = engine.asarray(np.array(self.__dict__[name]))  # a copy: it may be another's memory
            if name != "rate" and not fits:
                self.__dict__[name][...] = 0
        for name in self.slots:
            values = self.__dict__[name] if fits else 0
            self.__dict__[name] = engine.zeros((size,), dtype)
            self.__dict__[name][...] = values

    def reset(self) -> None:
        """Forget all steps taken."""
        for name in self.slots:
            self.__dict__.pop(name, None)

    @property
    def state(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.cells, *self.slots)

    def update(self, parameters: Array, gradients: Array, decayed: tuple[Array, Array] | None) -> None:
        """Take one step: `parameters` change in place.

        Parameters
        ----------
        parameters, gradients : array, shape (size,)
            All that is trained, flat.
        decayed : (array, array) or None
            Views of the first of them, to which weight decay applies; None where it applies to none.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that make this optimizer again."""
        return {"lr": self.lr}


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

    Examples
    --------
    >>> import fastbp
    >>> fastbp.SGD(0.1, momentum=0.9)
    SGD(lr=0.1, momentum=0.9, nesterov=False)
    """

    slots = ("velocity",)
    velocity: Array

    def __init__(self, lr: float, momentum: float = 0.0, nesterov: bool = False) -> None:
        super().__init__(lr)
        self.momentum = _number("momentum", momentum, below=1)
        self.nesterov = bool(nesterov)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0, got momentum=0.0")

    def update(self, parameters: Array, gradients: Array, decayed: tuple[Array, Array] | None) -> None:
        if self.momentum:
            numbers = self.engine.scalar(self.momentum), self.engine.scalar(self.nesterov)
            self.engine.sgd_momentum(parameters, self.velocity, gradients, self.rate, *numbers)
        else:
            self.engine.sgd(parameters, gradients, self.rate)

    def config(self) -> dict[str, Any]:
        return {"lr": self.lr, "momentum": self.momentum, "nesterov": self.nesterov}


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015, algorithm 1).

    Parameters
    ----------
    lr : float, default 0.001
    betas : (float, float), default (0.9, 0.999)
        How much of the running means of gradient and squared gradient a step keeps, each in [0, 1).
    eps : float, default 1e-8

    Examples
    --------
    >>> import fastbp
    >>> fastbp.Adam(0.01)
    Adam(lr=0.01, betas=(0.9, 0.999), eps=1e-08)
    """

    slots = ("m", "v")
    m: Array
    v: Array
    cells = ("rate", "steps")

    def __init__(self, lr: float = 0.001, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(lr)
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers, got {betas!r}")
        self.betas = (_number("betas[0]", betas[0], below=1), _number("betas[1]", betas[1], below=1))
        self.eps = _number("eps", eps)
        self.steps = np.zeros(1)

    def update(self, parameters: Array, gradients: Array, decayed: tuple[Array, Array] | None) -> None:
        numbers = self.engine.scalar(*self.betas), self.engine.scalar(self.eps)
        self.engine.adam(parameters, self.m, self.v, gradients, self.rate, *numbers, self.steps)

    def config(self) -> dict[str, Any]:
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps}


def _number(name: str, value: Any, below: float = np.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < below:
        limit = f"below {below}" if below < np.inf else "finite"
        raise ValueError(f"{name} must be at least 0 and {limit}, got {value}")
    return float(value)
