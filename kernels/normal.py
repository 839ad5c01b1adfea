"""The tail of the normal distribution, for engines that have no error function.

For x >= 0, P(X > x) = exp(-x**2 / 2) * g(t) with t = 1 / (1 + x / 4), where g is so smooth that a polynomial in
u = PER_T * t - SHIFT, which runs from -1 to 1 for x from 9 to 0, gives all digits.
"""

from __future__ import annotations

import functools
import math

from numpy.polynomial import chebyshev

__all__ = ["PER_T", "SHIFT", "tail_series"]

LAST = 1 / (1 + 9 / 4)
PER_T, SHIFT = 2 / (1 - LAST), (1 + LAST) / (1 - LAST)


@functools.cache
def tail_series(terms: int) -> tuple[float, ...]:
    """The coefficients of the polynomial, that of the highest power first; 10 terms for float32, 18 for float64."""

    def g(u: float) -> float:
        x = 4 * (PER_T / (u + SHIFT) - 1)
        return math.erfc(x / math.sqrt(2)) / 2 * math.exp(x**2 / 2)

    points = chebyshev.chebpts1(terms + 1)
    series = chebyshev.cheb2poly(chebyshev.chebfit(points, [g(u) for u in points], terms))
    return tuple(map(float, series[::-1]))
