"""The conformance check: a right engine passes, and a fault in any op does not."""

import math
import time

import numpy as np
import pytest

import fastbp
from fastbp.conformance import keep
from fastbp.kernels.engine import Call, needs_scratch, scratch_for
from fastbp.kernels.numpy_engine import NumpyEngine
from fastbp.kernels.ops import OPS
from fastbp.trial import expected

REFERENCE = NumpyEngine()
each_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


def by_formula(op):
    """A kernel for an op that the NumPy engine lacks."""

    def kernel(*arrays):
        written = [array for arg, array in zip(op.inputs, arrays, strict=False) if arg.inplace]
        written += arrays[len(op.inputs) :]
        for array, values in zip(written, expected(op, arrays[: len(op.inputs)]), strict=True):
            array[...] = values

    return kernel


class Faulty(NumpyEngine):
    """NumPy's kernels, but `spoil` may change what the kernel of one op did."""

    name = "faulty"

    def __init__(self, op, spoil):
        self.op, self.spoil = op, spoil

    def supports(self, op):
        return True

    def kernel(self, op, arguments):
        right = super().kernel(op, arguments) if REFERENCE.supports(op) else by_formula(op)
        if op is not self.op:
            return right
        scratch = [self.empty(*scratch_for([Call(op, tuple(arguments))]))] if needs_scratch(right, op) else []
        read = [i for i, arg in enumerate(op.inputs) if not arg.inplace]
        written = [i for i in range(len(arguments)) if i not in read]

        def kernel(*arrays):
            before = self.spoil and [arrays[i].copy() for i in written]
            right(*arrays, *scratch)
            if self.spoil:
                self.spoil([arrays[i] for i in written], before, [arrays[i] for i in read])

        return kernel


def last_element_is_off(written, before, read):
    x = written[-1]
    x.flat[-1] += max(1e-3 * np.abs(x).max(), 1e-3) if x.dtype.kind == "f" else x.dtype.type(1)


def first_array_is_off(written, before, read):
    last_element_is_off(written[:1], before, read)


def nothing_is_updated(written, before, read):
    for x, old in zip(written, before, strict=True):
        x[...] = old


def a_row_is_not_written(written, before, read):
    written[-1][-1] = before[-1][-1]


def computed_in_half_precision(written, before, read):
    for x in written:
        x[...] = x.astype(np.float16) if x.dtype.kind == "f" else x >> np.array(1, x.dtype)


def rows_are_swapped(written, before, read):
    for x in written:
        x[...] = x[::-1].copy() if x.shape[0] > 1 else np.roll(x, 1)


def an_input_is_written(written, before, read):
    x = read[0]
    x.flat[0] = 1 - x.flat[0] if x.dtype.kind != "u" else x.flat[0] + x.dtype.type(1)


def written_beyond(written, before, read):
    x = written[-1]
    behind = np.lib.stride_tricks.as_strided(x.reshape(-1)[-1:], (2,), (x.itemsize,))
    behind[1] = 0


def nan_is_swallowed(written, before, read):
    for x in written:
        if x.dtype.kind == "f":
            np.nan_to_num(x, copy=False, posinf=0, neginf=0)


def different_each_time(written, before, read):
    x = written[-1]
    x.reshape(-1)[-1:].view(np.uint8)[0] ^= time.perf_counter_ns() >> 4 & 1


def too_much_is_allocated(written, before, read):
    np.ones(100_000)


def an_error(written, before, read):
    raise ZeroDivisionError("no luck")


# a fault, and the promise that it breaks
FAULTS = {
    last_element_is_off: "values",
    first_array_is_off: "values",
    nothing_is_updated: "memory",
    a_row_is_not_written: "memory",
    computed_in_half_precision: "values",
    rows_are_swapped: "values",
    an_input_is_written: "memory",
    written_beyond: "memory",
    nan_is_swallowed: "extremes",
    different_each_time: "repeat",
    too_much_is_allocated: "allocation",
    an_error: "replay",
}


@each_op
def test_the_wrapping_alone_breaks_nothing(op):
    report = fastbp.check(Faulty(op, None), [op.name])
    broken = {result.promise for result in report.failures}
    assert broken == (set() if REFERENCE.supports(op) else {"allocation"}), f"\n{report}"


@each_op
@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_fault_in_an_op_is_found(op, spoil):
    if spoil is nan_is_swallowed and not any(arg.kind in "fa" for arg in op.inputs):
        pytest.skip("an op of integers")
    if spoil in (nan_is_swallowed, computed_in_half_precision) and op.name == "one_hot":
        pytest.skip("an op that writes 0 and 1")
    if spoil is too_much_is_allocated and not REFERENCE.supports(op):
        pytest.skip("a formula allocates anyway")
    written = [*(arg for arg in op.inputs if arg.inplace), *op.outputs]
    if spoil is rows_are_swapped and all(arg.dims == ("1",) for arg in written):
        pytest.skip("an op that writes single numbers")
    result = keep(Faulty(op, spoil), op, FAULTS[spoil])
    assert result.outcome == "failed" and result.message and (math.isnan(result.error) or result.error >= 0)


def test_no_ops_are_no_check():
    with pytest.raises(ValueError, match="ops must name at least one op"):
        fastbp.check("numpy", [])


def set_last(function):
    """A fault that writes something else into the last output, from it and from what was read."""

    def spoil(written, before, read):
        written[-1][...] = function(written[-1], *read)

    return spoil


def other_way_round(x):
    """A matrix whose memory is read as if it were transposed."""
    return x.reshape(x.shape[::-1])


MISTAKES = {
    "a wrong mask, relu_backward": set_last(lambda dz, dy, y: dy * (y <= 0)),
    "no mask, dropout_backward": set_last(lambda dx, dy, mask: dy),
    "a transposed weight, dense_forward": set_last(lambda z, x, w, b: x @ other_way_round(w).T + b),
    "a transposed weight, dense_input_grad": set_last(lambda dx, dz, w: dz @ other_way_round(w)),
    "a transposed weight, dense_weight_grad": set_last(lambda dw, x, dz: other_way_round(dz.T @ x)),
    "a mean in place of a sum, dense_bias_grad": set_last(lambda db, dz: dz.mean(axis=0)),
    "no 1/N, softmax_cross_entropy": set_last(lambda dz, z, t: dz * len(z)),
    "no 1/N, cross_entropy_backward": set_last(lambda dp, p, t: dp * len(p)),
    "no 1/N, mean_squared_error": set_last(lambda dy, y, *rest: dy * y.size),
    "1/B for 1/(B * N), binary_cross_entropy": set_last(lambda dy, y, *rest: dy * y.shape[1]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_that_people_make_are_found(mistake):
    op = OPS[mistake.split(", ")[1]]
    assert keep(Faulty(op, MISTAKES[mistake]), op, "values").outcome == "failed"
