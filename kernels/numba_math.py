"""Functions of numbers and rows for the Numba engine: exponential and logarithm without calls, random words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .normal import PER_T, SHIFT, tail_series
from .numba_vectors import Number
from .ops import Array

__all__ = [
    "FAST",
    "divide",
    "exp",
    "exp_any",
    "exp_of",
    "exp_shifted",
    "expm1",
    "largest",
    "log",
    "log1p",
    "log_any",
    "log_of",
    "normal_cdf",
    "philox",
    "sigmoid",
    "sign",
    "tanh",
]

# Kernels may reassociate sums, never assume finite values: with full fastmath, isfinite(NaN) compiles to False.
FAST: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}


def formula(f: Callable[[Number], Number]) -> Any:
    """A function for kernels that becomes the arithmetic of `f` on the spot, so that loops over it are vector code."""

    @intrinsic
    def function(typing_context: Any, x: Any) -> Any:
        return x(x), lambda context, builder, signature, arguments: f(Number(builder, arguments[0])).value

    return function


def of_power(x: Number) -> tuple[Number, Number]:
    """Splits e**x = 2**n * e**rest, with \\|rest\\| <= ln(2) / 2; gives rest and 2**n."""
    shift = 1.5 * 2**x.mantissa
    shifted = x * (1 / math.log(2)) + shift  # which rounds to a whole number, in the low bits
    n = shifted.bits() - x.constant(shift).bits()
    # the first factor has few bits, so that its product with n is exact
    rest = x - n.rounded(x) * (355 / 512) - n.rounded(x) * -2.1219444005469058e-4
    return rest, ((n + x.bias) << x.mantissa).bits()


def lowest(x: Number) -> float:
    """Below this, e**x is too small for a normal number."""
    return -math.log(2) * (x.bias - 1.5)


def exp_of(x: Number) -> Number:
    """e**x for x <= 0, or as far above as 2**n is a number."""
    rest, power = of_power(x)
    y = rest.series([1 / math.factorial(n) for n in reversed(range(8 if x.single else 14))])
    return (x < lowest(x)).choose(0.0, y * power)


def exp_of_any(x: Number) -> Number:
    """e**x, whose powers of two may be too many for one number."""
    half = exp_of(x * 0.5)
    return (x.constant(math.log(2) * (x.bias + 2)) < x).choose(math.inf, half * half)


def expm1_of(x: Number) -> Number:
    """e**x - 1 for x <= 0, as exact for small x as for large."""
    rest, power = of_power(x)
    y = rest.series([*(1 / math.factorial(n) for n in reversed(range(1, 8 if x.single else 14))), 0.0])
    return (x < lowest(x)).choose(-1.0, power * y + (power - 1.0))


def log_of(x: Number) -> Number:
    """The natural logarithm of a number above 0 that is not subnormal."""
    # log(2**n * m) = n * ln2 + 2 * artanh((m - 1) / (m + 1)), with m from sqrt(1/2) to sqrt(2)
    root = x.constant(math.sqrt(0.5)).bits()
    above = x.bits() - root
    m = ((above & (2**x.mantissa - 1)) + root).bits()
    s = (m - 1.0) / (m + 1.0)
    y = (s * s).series([2 / (2 * n + 1) for n in reversed(range(5 if x.single else 11))])
    return (x < math.inf).choose(y * s + (above >> x.mantissa).rounded(x) * math.log(2), x)


def log_of_any(x: Number) -> Number:
    """The same, but -inf for 0 and NaN below that."""
    return (x < 0.0).choose(math.nan, x.equals(0.0).choose(-math.inf, log_of(x)))


def log1p_of(x: Number) -> Number:
    """log(1 + x) for x from 0 to 1, as exact for small x as for large."""
    s = x / (x + 2.0)  # log(1 + x) = 2 * artanh(s), with s up to 1/3
    return (s * s).series([2 / (2 * n + 1) for n in reversed(range(8 if x.single else 17))]) * s


def normal_cdf_of(x: Number) -> Number:
    """P(X <= x) of the normal distribution; see `normal`."""
    negative = x < 0.0
    size = negative.choose(x * -1.0, x)
    u = x.constant(4.0) / (size + 4.0) * PER_T - SHIFT
    tail = u.series(list(tail_series(10 if x.single else 18))) * exp_of(x * x * -0.5)
    return negative.choose(tail, x.constant(1.0) - tail)


exp, exp_any, expm1 = formula(exp_of), formula(exp_of_any), formula(expm1_of)
log, log_any, log1p = formula(log_of), formula(log_of_any), formula(log1p_of)
normal_cdf = formula(normal_cdf_of)


@njit(**FAST)
def sigmoid(x: Any) -> Any:
    one = type(x)(1)
    e = exp(-abs(x))
    return (one if x > 0 else e) / (one + e)


@njit(**FAST)
def tanh(x: Any) -> Any:
    e = expm1(type(x)(-2) * abs(x))
    y = -e / (type(x)(2) + e)
    return -y if x < 0 else y


@njit(**FAST)
def philox(key: Array, block: Any) -> Any:
    """Four random words of Philox4x64-10 (Salmon et al., 2011), as ``np.random.Philox`` gives them."""
    c0, c1, c2, c3 = block, key[2], key[3], np.uint64(0)
    k0, k1 = key[0], key[1]
    for _ in range(10):
        high0, low0 = multiply_high(np.uint64(0xD2E7470EE14C6C93), c0)
        high1, low1 = multiply_high(np.uint64(0xCA5A826395121157), c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += np.uint64(0x9E3779B97F4A7C15)
        k1 += np.uint64(0xBB67AE8584CAA73B)
    return c0, c1, c2, c3


@intrinsic
def multiply_high(typing_context: Any, a: Any, b: Any) -> Any:
    """The high and the low word of a product of two unsigned words."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide, word = ir.IntType(128), ir.IntType(64)
        product = builder.mul(*(builder.zext(x, wide) for x in arguments))
        high = builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), word)
        return context.make_tuple(builder, signature.return_type, [high, builder.trunc(product, word)])

    return types.UniTuple(types.uint64, 2)(types.uint64, types.uint64), build


@intrinsic
def ordered(typing_context: Any, x: Any) -> Any:
    """An integer that is the larger the larger a float is; or the float of such an integer."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = Number(builder, arguments[0])
        bits = number.bits() if number.is_float else number
        size = types_of[signature.return_type].bitwidth
        bits = bits ^ ((bits >> (size - 1)) & (2 ** (size - 1) - 1))  # of what is below 0, all but the sign are turned
        return (bits if number.is_float else bits.bits()).value

    types_of = {types.float32: types.int32, types.float64: types.int64}
    types_of |= {to: kind for kind, to in types_of.items()}
    return types_of[x](x), build


@njit(**FAST)
def largest(x: Array) -> Any:
    """The largest number of a row, which may be any where one is NaN; as integers, because those make vector code."""
    best = ordered(x[0])
    for i in range(1, len(x)):
        best = max(best, ordered(x[i]))
    return ordered(best)


@njit(**FAST)
def sign(x: Any) -> Any:
    """1, -1, or 0 and NaN as they are."""
    one = type(x)(1)
    return one if x > 0 else -one if x < 0 else x


@njit(**FAST)
def flushed(x: Any, tiny: Any) -> Any:
    """0 in place of what is smaller than `tiny`, the smallest normal number.

    What decays would come to rest as a subnormal number, with which processors compute many times as slowly.
    """
    return type(x)(0) if abs(x) < tiny else x


@njit(**FAST)
def exp_shifted(x: Array, top: Any, y: Array) -> Any:
    """y = exp(x - top), where no x is above that; returns the sum of y."""
    total = x.dtype.type(0)
    for i in range(len(x)):
        y[i] = exp(x[i] - top)
        total += y[i]
    return total


@njit(**FAST)
def divide(x: Array, by: Any) -> None:
    factor = 1 / x.dtype.type(by)
    for i in range(len(x)):
        x[i] *= factor
