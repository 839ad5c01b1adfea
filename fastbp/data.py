"""Data to train on."""

from __future__ import annotations

import numpy as np

from .boundary import as_count, as_number, as_seed
from .kernels.ops import Array

__all__ = ["spiral_data"]


def spiral_data(
    samples: int, classes: int, *, noise: float = 0.2, seed: int | np.random.Generator | None = None
) -> tuple[Array, Array]:
    """Points on intertwined spirals, one a class.

    Parameters
    ----------
    samples : int
        Points of each class.
    classes : int
        Number of spirals.
    noise : float, default 0.2
        Standard deviation of the angle, in units of 0.4 radians; a spiral turns by 4 of them.
    seed : int or numpy.random.Generator, optional

    Returns
    -------
    X : array, shape (samples * classes, 2), float64
        Within the unit circle.
    y : array, shape (samples * classes,), int64

    Examples
    --------
    >>> import fastbp
    >>> X, y = fastbp.spiral_data(100, 3, seed=0)
    >>> X.shape, y.shape
    ((300, 2), (300,))
    """
    samples, classes = as_count(samples, "samples"), as_count(classes, "classes")
    noise = as_number(noise, "noise")
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(as_seed(seed))
    y = np.repeat(np.arange(classes), samples)
    radius = np.tile(np.linspace(0, 1, samples), classes)
    angle = 2.5 * (4 * (y + radius) + noise * rng.standard_normal(len(y)))
    return radius[:, None] * np.column_stack([np.sin(angle), np.cos(angle)]), y
