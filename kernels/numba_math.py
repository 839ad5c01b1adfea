"""Functions of numbers and rows for the Numba engine: exponential and logarithm without calls, random words."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from .normal import PER_T, SHIFT, tail_series
from .ops import Array

__all__ = [
    "FAST",
    "divide",
    "exp",
    "exp_shifted",
    "expm1",
    "largest",
    "log",
    "log1p",
    "normal_cdf",
    "philox",
    "sigmoid",
    "sign",
    "tanh",
]

# Kernels may reassociate sums, never assume finite values: with full fastmath, isfinite(NaN) compiles to False.
FAST: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}


def exp(x: Any) -> Any:
    """e**x for x <= 0, without a call, so that loops over it become vector code."""
    return np.exp(x)


def log(x: Any) -> Any:
    """The natural logarithm of x >= 1, without a call."""
    return np.log(x)


def log1p(x: Any) -> Any:
    """log(1 + x) for x from 0 to 1, without a call, as exact for small x as for large."""
    return np.log1p(x)


def expm1(x: Any) -> Any:
    """e**x - 1 for x <= 0, without a call, as exact for small x as for large."""
    return np.expm1(x)


def number_format(real: Any) -> Any:
    """(float type, integer type, bits of the mantissa, offset of the exponent, terms that e**x and log x take)"""
    return (np.float32, np.int32, 23, 127, 7, 5) if real == types.float32 else (np.float64, np.int64, 52, 1023, 13, 11)


@overload(exp)
def exp_overload(x: Any) -> Any:
    real, whole, bits, offset, terms, _ = number_format(x)
    factorial = np.cumprod([1.0, *range(1, terms + 1)])
    series = tuple(real(1 / f) for f in factorial[::-1])
    per_ln2, shift = real(1 / np.log(2)), real(1.5 * 2**bits)
    ln2_high = real(np.float32(355 / 512))  # few bits, so that n * ln2_high is exact
    ln2_low, lowest = real(-2.1219444005469058e-4), real(-np.log(2) * (offset - 1.5))
    shift_whole, offset = shift.view(whole), whole(offset)
    bits, zero = whole(bits), real(0)

    def exp(x: Any) -> Any:
        # e**x = 2**n * e**rest with |rest| <= ln(2) / 2. Adding `shift` rounds to a whole number, in the low bits.
        n = whole(same_bits(x * per_ln2 + shift) - shift_whole)
        rest = x - real(n) * ln2_high - real(n) * ln2_low
        y = zero
        for term in series:
            y = y * rest + term
        y *= same_bits(whole((n + offset) << bits))
        return y if not x < lowest else zero

    return exp


@overload(expm1)
def expm1_overload(x: Any) -> Any:
    real, whole, bits, offset, terms, _ = number_format(x)
    factorial = np.cumprod([*range(1, terms + 1)], dtype=np.float64)
    series = tuple(real(1 / f) for f in factorial[::-1])
    per_ln2, shift = real(1 / np.log(2)), real(1.5 * 2**bits)
    ln2_high, ln2_low = real(np.float32(355 / 512)), real(-2.1219444005469058e-4)
    lowest, shift_whole = real(-np.log(2) * (offset - 1.5)), shift.view(whole)
    offset, bits, zero, one = whole(offset), whole(bits), real(0), real(1)

    def expm1(x: Any) -> Any:
        # as in `exp`, but 2**n * (e**rest - 1) + (2**n - 1), where n is 0 for small x
        n = whole(same_bits(x * per_ln2 + shift) - shift_whole)
        rest = x - real(n) * ln2_high - real(n) * ln2_low
        y = zero
        for term in series:
            y = (y + term) * rest
        power = same_bits(whole((n + offset) << bits))
        return power * y + (power - one) if not x < lowest else -one

    return expm1


@overload(log)
def log_overload(x: Any) -> Any:
    real, whole, bits, _, _, terms = number_format(x)
    series = tuple(real(2 / (2 * n + 1)) for n in reversed(range(terms)))
    ln2, root, zero, one, infinity = real(np.log(2)), real(np.sqrt(0.5)), real(0), real(1), real(np.inf)
    root_whole, fraction, bits = root.view(whole), whole(2**bits - 1), whole(bits)

    def log(x: Any) -> Any:
        # log(2**n * m) = n * ln2 + 2 * artanh((m - 1) / (m + 1)), with m from sqrt(1/2) to sqrt(2)
        above = whole(same_bits(x) - root_whole)
        n = whole(above >> bits)
        m = same_bits(whole((above & fraction) + root_whole))
        s = (m - one) / (m + one)
        y = zero
        for term in series:
            y = y * (s * s) + term
        return y * s + real(n) * ln2 if x < infinity else x

    return log


@overload(log1p)
def log1p_overload(x: Any) -> Any:
    real = number_format(x)[0]
    series = tuple(real(2 / (2 * n + 1)) for n in reversed(range(8 if real == np.float32 else 17)))
    two, zero = real(2), real(0)

    def log1p(x: Any) -> Any:
        s = x / (two + x)  # log(1 + x) = 2 * artanh(s), with s up to 1/3
        y = zero
        for term in series:
            y = y * (s * s) + term
        return y * s

    return log1p


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


def normal_cdf(x: Any) -> Any:
    """P(X <= x) of the normal distribution; see `normal`."""


@overload(normal_cdf)
def normal_cdf_overload(x: Any) -> Any:
    real = number_format(x)[0]
    series = tuple(map(real, tail_series(10 if real == np.float32 else 18)))
    per_t, shift, four, half, one, zero = map(real, (PER_T, SHIFT, 4, 0.5, 1, 0))

    def normal_cdf(x: Any) -> Any:
        u = per_t * (four / (four + abs(x))) - shift
        y = zero
        for term in series:
            y = y * u + term
        y *= exp(-half * x * x)
        return one - y if x > 0 else y

    return normal_cdf


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
def same_bits(typingctx: Any, x: Any) -> Any:
    """The float or integer of the same size that has the same bits."""
    other = {
        types.float32: types.int32,
        types.int32: types.float32,
        types.float64: types.int64,
        types.int64: types.float64,
    }[x]
    return other(x), lambda context, builder, signature, args: builder.bitcast(args[0], context.get_value_type(other))


@njit(**FAST)
def largest(x: Array) -> Any:
    best = x[0]
    for i in range(len(x)):
        best = best if x[i] <= best else x[i]
    return best


@njit(**FAST)
def sign(x: Any) -> Any:
    """1, -1, or 0 and NaN as they are."""
    one = type(x)(1)
    return one if x > 0 else -one if x < 0 else x


@njit(**FAST)
def exp_shifted(x: Array, y: Array) -> Any:
    """y = exp(x - max x); returns the sum of y."""
    top, total = largest(x), x.dtype.type(0)
    for i in range(len(x)):
        y[i] = exp(x[i] - top)
        total += y[i]
    return total


@njit(**FAST)
def divide(x: Array, by: Any) -> None:
    factor = 1 / x.dtype.type(by)
    for i in range(len(x)):
        x[i] *= factor
