"""The tail of the normal distribution, for engines that have no error function.

For x >= 0, P(X > x) = exp(-x**2 / 2) * g(t) with t = 1 / (1 + x / 4), where g is so smooth that a polynomial in
u = PER_T * t - SHIFT, which runs from -1 to 1 for x from 9 to 0, gives all digits.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.polynomial import chebyshev

__all__ = ["PER_T", "SHIFT", "tail_series"]

LAST = 1 / (1 + 9 / 4)
PER_T, SHIFT = 2 / (1 - LAST), (1 + LAST) / (1 - LAST)


@functools.cache
def tail_series(terms: int) -> tuple[float, ...]:
    """The coefficients of the polynomial, that of the highest power first; 10 terms for float32, 18 for float64."""

    def g(u: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        x = 4 * (PER_T / (u + SHIFT) - 1)
        return np.array([math.erfc(value / math.sqrt(2)) / 2 * math.exp(value**2 / 2) for value in x])

    series = chebyshev.cheb2poly(chebyshev.chebinterpolate(g, terms))
    return tuple(map(float, series[::-1]))
