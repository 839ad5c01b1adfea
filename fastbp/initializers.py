"""How the weights of a dense layer start: functions that draw them, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from .kernels.ops import Array

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["INITIALIZERS", "Initializer", "initializer"]

#: Draws weights of a shape, (inputs, neurons), from a generator of random numbers.
Initializer: TypeAlias = "Callable[[Generator, tuple[int, int]], Array]"
Variance: TypeAlias = Callable[[int, int], float]


def normal(variance: Variance) -> Initializer:
    return lambda rng, shape: rng.normal(0, np.sqrt(variance(*shape)), shape)


def uniform(variance: Variance) -> Initializer:
    """Between -limit and limit; the variance is limit**2 / 3."""

    def draw(rng: Generator, shape: tuple[int, int]) -> Array:
        limit = np.sqrt(3 * variance(*shape))
        return rng.uniform(-limit, limit, shape)

    return draw


def orthogonal(rng: Generator, shape: tuple[int, int]) -> Array:
    """Orthonormal columns, or rows where there are fewer of those, each such matrix as likely as any other."""
    q, r = np.linalg.qr(rng.standard_normal((max(shape), min(shape))))
    q *= np.where(np.diag(r) < 0, -1, 1)  # QR alone prefers some signs (Mezzadri 2007, section 5)
    return q if q.shape == shape else q.T


def he(inputs: int, neurons: int) -> float:
    return 2 / inputs


def glorot(inputs: int, neurons: int) -> float:
    return 2 / (inputs + neurons)


def lecun(inputs: int, neurons: int) -> float:
    return 1 / inputs


INITIALIZERS: dict[str, Initializer] = {
    "he_normal": normal(he),
    "he_uniform": uniform(he),
    "glorot_normal": normal(glorot),
    "glorot_uniform": uniform(glorot),
    "lecun_normal": normal(lecun),
    "lecun_uniform": uniform(lecun),
    "orthogonal": orthogonal,
    "normal": normal(lambda inputs, neurons: 0.01**2),
    "zeros": lambda rng, shape: np.zeros(shape),
    "torch": uniform(lambda inputs, neurons: 1 / (3 * inputs)),
}
INITIALIZERS |= {"he": INITIALIZERS["he_normal"], "glorot": INITIALIZERS["glorot_uniform"]}


def initializer(init: str | Initializer) -> Initializer:
    """The function of a name, or `init` itself where it is one.

    Raises
    ------
    ValueError
        For a name that there is not.

    Examples
    --------
    >>> import numpy as np
    >>> weights = initializer("orthogonal")(np.random.default_rng(0), (5, 3))
    >>> bool(np.allclose(weights.T @ weights, np.eye(3)))
    True
    """
    if callable(init):
        return init
    if not isinstance(init, str) or init not in INITIALIZERS:
        names = ", ".join(map(repr, INITIALIZERS))
        raise ValueError(f"init must be one of {names}, None, or a function (rng, shape) -> array; got {init!r}")
    return INITIALIZERS[init]
