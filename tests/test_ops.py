"""Each op of the contract, on each engine, kept to its promises; and single values worked out by hand."""

import inspect
import math

import numpy as np
import pytest

import fastbp
from fastbp.fusion import FUSED
from fastbp.kernels.engine import Call
from fastbp.kernels.formulas import FORMULAS, masked, softmax
from fastbp.kernels.op import key
from fastbp.kernels.ops import OPS
from fastbp.tape import Recorder

from .checks import assert_allclose, assert_array_equal
from .conftest import ENGINES

PAIRS = [(name, op) for name in ENGINES for op in OPS.values() if fastbp.engine(name).supports(op)]


def test_every_op_has_a_formula_and_a_kernel(engine):
    assert OPS.keys() == FORMULAS.keys()
    reference = fastbp.engine("numpy")
    missing = {op.name for op in OPS.values() if reference.supports(op) and not engine.supports(op)}
    assert missing <= (FUSED if engine.name == "cupy" else set())


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_room_to_work_in_is_of_the_order_of_what_is_read_and_written(op):
    large = {"B": 500, "K": 900, "N": 300, "P": 2_000_000, "M": 20_000}
    arguments = *op.inputs, *op.outputs
    sizes = {d: large[d] for arg in arguments for d in arg.dims if not d.isdigit()}
    shapes = [op.shape(arg, sizes) for arg in arguments]
    assert op.room(sizes) <= 6 * sum(map(math.prod, shapes)) + (1 << 18)


def test_a_program_may_be_released_before_it_is_bound(engine):
    x, z = (engine.zeros((2, 3), np.float64) for _ in range(2))
    program = engine.program([Call(OPS["add"], ("X", x, z))])
    program.release()
    program.bind(X=engine.asarray(np.ones((2, 3))))
    program.run(1)
    assert_array_equal(engine.asnumpy(z), np.ones((2, 3)))


@pytest.mark.parametrize(("engine", "op"), PAIRS, ids=[f"{e}-{op.name}" for e, op in PAIRS], indirect=["engine"])
def test_promises(engine, op):
    report = fastbp.check(engine, [op.name])
    assert report.passed, f"\n{report}"


# a table of four numbers; where column 0, code by code, begins in it; how many codes; how far apart
ASTRAY = {
    "start": (10**9, 4, 1), "one code too many": (1, 4, 1), "far apart": (0, 2**62, 16), "backwards": (2, 4, -1),
}  # fmt: skip


@pytest.mark.parametrize("places", ASTRAY.values(), ids=ASTRAY)
def test_no_table_is_read_beyond_its_ends(engine, places):
    x, w, column = np.ones((1, 1)), np.ones(4), engine.integers(0)
    places = [engine.integers(n) for n in places]
    with pytest.raises(ValueError, match=r"^embedding_forward: start must lead to places from 0 to 3, got"):
        engine.embedding_forward(x, w, column, *places)
    with pytest.raises(ValueError, match=r"^embedding_backward: start must lead to places from 0 to 3, got"):
        engine.embedding_backward(x, x, w, column, *places)


def test_what_lies_beyond_a_table_is_of_no_account_where_there_are_no_codes(engine):
    places = [engine.integers(n) for n in (0, 10**9, 0, 1)]
    assert engine.asnumpy(engine.embedding_forward(np.full((1, 1), 7.0), np.ones(4), *places)).tolist() == [[7]]


@pytest.mark.parametrize("cursor", [-1, 3, 2**63 - 1])
def test_no_row_is_read_beyond_the_last(engine, cursor):
    order, rows = engine.integers(5, 6, 7, 8, 9), engine.integers(1, 2, 3)
    with pytest.raises(ValueError, match=r"^next_batch: cursor must lead to places from 0 to 4, got"):
        engine.next_batch(order, engine.integers(cursor), rows)
    assert engine.asnumpy(rows).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"^next_rate: step must lead to places from 0 to 2, got"):
        engine.next_rate(engine.scalar(1, 2, 3), engine.integers(cursor), engine.scalar(0))


def test_small_probabilities_are_as_accurate_as_large_ones(engine, dtype):
    z = np.linspace(-80, 0, 1001).reshape(-1, 7).astype(dtype)
    z[:, 0] = 0
    assert_allclose(engine.softmax_forward(z), softmax(z.astype(np.float64)), rtol=20 * np.finfo(dtype).eps * 7)


def test_a_large_error_does_not_overflow_the_float64_total(engine):
    total = engine.zeros((2,), np.float64)
    y = np.full((1, 2), 1e25, np.float32)
    engine.mean_squared_error(y, np.zeros_like(y), np.ones(1), np.ones(1), total)
    assert_allclose(total, [2e50, 2], rtol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dropout_at_any_rate(engine, rate, dtype, rng):
    x, seed = rng.standard_normal((13, 11)).astype(dtype), key(rng, (4,), {})
    y, mask = engine.dropout_forward(x, np.array([rate]), engine.asarray(seed.copy()))
    kept = masked(x, np.array([min(rate, 0.99)]), seed)[2] > 0 if rate < 1 else np.zeros(x.shape, bool)
    scale = 1 / (1 - rate) if rate < 1 else 0
    assert_allclose(mask, kept * scale, rtol=1e-6)
    assert_allclose(y, x * kept * scale, rtol=1e-6)


def test_dropout_masks_change_from_step_to_step_and_keep_a_share(engine):
    key = engine.asarray(np.array([1, 2, 0, 3], np.uint64))
    x = np.ones((100, 100), np.float32)
    first, second = (engine.asnumpy(engine.dropout_forward(x, np.array([0.25]), key)[1]) > 0 for _ in range(2))
    assert (first != second).any()
    assert abs(first.mean() - 0.75) < 0.02  # five standard deviations


def test_shape_errors_say_what_was_expected(engine):
    x, w, b = np.ones((5, 3)), np.ones((3, 2)), np.ones((1, 2))
    for arguments, text in [
        ((x, w.T, b), r"w must have shape \(3, N\), none of it empty; got \(2, 3\)"),
        ((x, w, b[0]), r"b must have shape \(1, 2\), none of it empty; got \(2,\)"),
        ((x[:0], w, b), r"x must have shape \(B, K\), none of it empty; got \(0, 3\)"),
    ]:
        with pytest.raises(ValueError, match=f"dense_forward: {text}"):
            engine.dense_forward(*arguments)
    with pytest.raises(TypeError, match=r"dense_forward takes 3 arguments \(x, w, b\), got 2"):
        engine.dense_forward(x, w)


def test_labels_must_be_integers(engine):
    with pytest.raises(ValueError, match="cross_entropy_backward: t must hold integers, got float64"):
        engine.cross_entropy_backward(np.full((2, 2), 0.5), np.array([0.0, 1.0]))


@pytest.mark.parametrize("value", [[[1j]], [["a"]], np.ma.masked_array([[1.0]]), [[None]]], ids=str)
def test_what_is_no_real_number_is_refused(engine, value):
    with pytest.raises((TypeError, ValueError), match=r"masked|real numbers"):
        engine.relu_forward(value)


def test_lists_integers_and_tensors_become_float64(engine):
    class Tensor:  # what speaks DLPack
        def __dlpack__(self, **options):
            return np.array([[-1.0, 2.0]]).__dlpack__(**options)

        def __dlpack_device__(self):
            return np.zeros(1).__dlpack_device__()

    for x in ([[-1, 2]], np.array([[-1, 2]], np.int8), np.array([[-1, 2]], ">f8"), np.array([[-1, 2]], "f2"), Tensor()):
        y = engine.asnumpy(engine.relu_forward(x))
        assert y.dtype == np.float64 and y.tolist() == [[0, 2]]


@pytest.mark.parametrize("kind", ["f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"])
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 16, 31, 33])
def test_tables_of_any_type_become_the_models(engine, dtype, kind, columns):
    """As NumPy converts the extremes of each type, and numbers halfway between two of float32."""
    numbers = np.array([0, 1, 5, 2**24 + 1, 2**24 + 3, 2**62 + 2**38, 2**31 - 1], object)
    if kind in ("f4", "f8"):
        least = 2e-38 if engine.device == "cuda" else 1e-45  # CuPy has denormal numbers count as 0
        numbers = np.array([0.1, -1 - 2**-24, 1 + 2**-24 + 2**-40, 3e38, least, -0.0, 7], kind)
    elif kind == "?":
        numbers = numbers > 0
    else:
        limits = np.iinfo(kind)
        numbers = np.array([limits.min, limits.max, *(x for x in numbers if x <= limits.max)], kind)
    x = np.resize(numbers, (11, columns)).astype(kind)
    rows, xb = engine.integers(3, 0, 10, 10, 7), engine.zeros((5, columns), dtype)
    for table in (x, x[:, ::-1], np.asfortranarray(x)):
        program = engine.program([Call(OPS["take"], (engine.table(table), rows, xb))])
        program.bind()
        program.run(1)
        found, expected = engine.asnumpy(xb), table[[3, 0, 10, 10, 7]].astype(dtype)
        assert_array_equal(found, expected)
        assert_array_equal(np.signbit(found), np.signbit(expected))


def test_an_op_that_is_not_there(engine):
    with pytest.raises(AttributeError, match=r"has no op 'tanh_of_everything'$"):
        engine.tanh_of_everything()
    for caller in (engine, Recorder(engine, np.float32)):
        with pytest.raises(AttributeError, match="has no op 'relu_foward'; did you mean relu_forward"):
            caller.relu_foward()


def test_ops_can_be_found(engine):
    for caller in (engine, Recorder(engine, np.float32)):
        assert OPS.keys() <= set(dir(caller)) and "asarray" in dir(caller)
        method = caller.sgd
        assert method.__name__ == "sgd" and str(inspect.signature(method)) == "(p, g, lr, /, *, out=None)"
        text = inspect.getdoc(method)
        assert OPS["sgd"].signature in text and "p : array of the float type, shape (P,), updated in place" in text
    assert "t : array of int64, shape (B,), from 0 to below N" in OPS["softmax_cross_entropy"].text()
