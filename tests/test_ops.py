"""Each op of the contract, on each engine, against a formula in float64 written here."""

import numpy as np
import pytest

import fastbp
from fastbp.kernels.formulas import FORMULAS, masked, softmax
from fastbp.kernels.op import key
from fastbp.kernels.ops import OPS

from .checks import assert_close
from .conftest import ENGINES

SIZES = [
    dict(zip("BKNPM", s, strict=True)) for s in [(1, 1, 1, 1, 1), (1, 7, 3, 5, 2), (5, 1, 2, 64, 9), (9, 3, 1, 33, 4)]
]
SIZES += [
    dict(zip("BKNPM", s, strict=True)) for s in [(17, 13, 31, 1000, 50), (64, 33, 10, 255, 64), (33, 64, 129, 7, 33)]
]


def draw(op, sizes, dtype, rng):
    if op.name == "next_batch":
        sizes = sizes | {"B": min(sizes["B"], sizes["M"])}
    return op.sample(rng, sizes, dtype)


def expected_of(op, arguments):
    wide = [a.astype(np.float64) if arg.kind in "fa" else a for arg, a in zip(op.inputs, arguments, strict=True)]
    with np.errstate(all="ignore"):
        return [np.asarray(x) for x in FORMULAS[op.name](*wide)]


def computed_by(engine, op, arguments, out=None):
    """What the op changed in place, then its outputs, as NumPy arrays."""
    given = [engine.asarray(a.copy()) for a in arguments]
    result = getattr(engine, op.name)(*given, **({} if out is None else {"out": out}))
    outputs = result if isinstance(result, tuple) else () if result is None else (result,)
    changed = [a for arg, a in zip(op.inputs, given, strict=True) if arg.inplace]
    for arg, before, after in zip(op.inputs, arguments, given, strict=True):
        assert arg.inplace or engine.asnumpy(after).tobytes() == before.tobytes(), f"{arg.name} is not marked in place"
    return [engine.asnumpy(x) for x in (*changed, *outputs)]


def compare(engine, op, arguments, dtype):
    expected, actual = expected_of(op, arguments), computed_by(engine, op, arguments)
    kinds = [arg.dtype(dtype) for arg in (*(a for a in op.inputs if a.inplace), *op.outputs)]
    for kind, x, y in zip(kinds, actual, expected, strict=True):
        assert x.dtype == kind and x.shape == y.shape
        if kind.kind == "f":
            assert_close(x, y, op.rtol[dtype.itemsize])
        else:
            np.testing.assert_array_equal(x, y)


def each(ops):
    """Every engine with every op that it has."""
    pairs = [(name, op) for name in ENGINES for op in ops if fastbp.engine(name).supports(op)]
    ids = [f"{name}-{op.name}" for name, op in pairs]
    return pytest.mark.parametrize(("engine", "op"), pairs, ids=ids, indirect=["engine"])


each_op = each(list(OPS.values()))
each_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s.values())))


each_op_with_outputs = each([op for op in OPS.values() if op.outputs])


def test_every_op_has_a_formula_here_and_a_kernel(engine):
    assert OPS.keys() == FORMULAS.keys()
    reference = fastbp.engine("numpy")  # fused ops are no must
    assert [op for op in OPS.values() if reference.supports(op) and not engine.supports(op)] == []


@each_op
@each_size
def test_values(engine, op, sizes, dtype, rng):
    compare(engine, op, draw(op, sizes, dtype, rng), dtype)


each_product = each([op for op in OPS.values() if op.name.startswith(("dense", "classifier"))])


def guarded(engine, array):
    """A copy of an array between two stretches of 7s, off the boundaries of vectors, and those stretches."""
    memory = engine.empty((array.size + 250,), array.dtype)
    memory[...] = 7
    copy = memory[125:-125].reshape(array.shape)
    copy[...] = array
    return copy, (memory[:125], memory[-125:])


@each_product
def test_products_of_any_size_stay_in_their_memory(engine, op, dtype, rng):
    """Kernels compute in tiles of some rows and columns; these sizes leave all kinds of rests."""
    for n in range(1, 70):
        sizes = {"B": int(rng.integers(1, 30)), "K": int(rng.integers(1, 40)), "N": n}
        sizes = dict(zip("BKN", rng.permutation(list(sizes.values())).tolist(), strict=True))
        arguments = draw(op, sizes, dtype, rng)
        outputs = [np.full(op.shape(arg, sizes), np.nan, dtype) for arg in op.outputs]
        memory = [guarded(engine, array) for array in (*arguments, *outputs)]
        arrays = [array for array, _ in memory]
        given, out = arrays[: len(arguments)], tuple(arrays[len(arguments) :])
        getattr(engine, op.name)(*given, out=out or None)
        assert all((engine.asnumpy(edge) == 7).all() for _, edges in memory for edge in edges), sizes
        written = [*(a for arg, a in zip(op.inputs, given, strict=True) if arg.inplace), *out]
        for actual, expected in zip(written, expected_of(op, arguments), strict=True):
            assert_close(engine.asnumpy(actual), expected, op.rtol[dtype.itemsize])


@each_product
def test_large_products(engine, op, dtype, rng):
    compare(engine, op, draw(op, {"B": 259, "K": 260, "N": 131}, dtype, rng), dtype)


@each_op
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_pass_through(engine, op, value, dtype, rng):
    arguments = draw(op, SIZES[4], dtype, rng)
    for place, arg in enumerate(op.inputs):
        if arg.kind in "fa" and arg.name not in ("m", "v", "velocity"):
            planted = [a.copy() for a in arguments]
            planted[place].flat[planted[place].size // 2] = value
            compare(engine, op, planted, dtype)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 30, 1e4, 1e30])
@pytest.mark.parametrize("name", ["softmax_forward", "softmax_cross_entropy"])
def test_tiny_and_huge_logits(engine, name, scale, dtype, rng):
    arguments = draw(OPS[name], SIZES[5], dtype, rng)
    arguments[0] *= dtype.type(scale)
    compare(engine, OPS[name], arguments, dtype)


def test_small_probabilities_are_as_accurate_as_large_ones(engine, dtype):
    z = np.linspace(-80, 0, 1001).reshape(-1, 7).astype(dtype)
    z[:, 0] = 0
    np.testing.assert_allclose(
        engine.softmax_forward(z), softmax(z.astype(np.float64)), rtol=20 * np.finfo(dtype).eps * 7
    )


def test_a_large_error_does_not_overflow_the_float64_total(engine):
    total = np.zeros(2)
    engine.mean_squared_error(np.full((1, 2), 1e25, np.float32), np.zeros((1, 2), np.float32), total)
    np.testing.assert_allclose(total, [2e50, 2], rtol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dropout_at_any_rate(engine, rate, dtype, rng):
    x, seed = rng.standard_normal((13, 11)).astype(dtype), key(rng, (4,), {})
    y, mask = engine.dropout_forward(x, np.array([rate]), seed.copy())
    kept = masked(x, np.array([min(rate, 0.99)]), seed)[2] > 0 if rate < 1 else np.zeros(x.shape, bool)
    scale = 1 / (1 - rate) if rate < 1 else 0
    np.testing.assert_allclose(engine.asnumpy(mask), kept * scale, rtol=1e-6)
    np.testing.assert_allclose(engine.asnumpy(y), x * kept * scale, rtol=1e-6)


def test_dropout_masks_change_from_step_to_step_and_keep_a_share(engine):
    key = engine.asarray(np.array([1, 2, 0, 3], np.uint64))
    x = np.ones((100, 100), np.float32)
    first, second = (engine.asnumpy(engine.dropout_forward(x, np.array([0.25]), key)[1]) > 0 for _ in range(2))
    assert (first != second).any()
    assert abs(first.mean() - 0.75) < 0.02  # five standard deviations


@pytest.mark.parametrize("nesterov", [0.0, 1.0])
def test_momentum_in_both_forms(engine, nesterov, dtype, rng):
    op = OPS["sgd_momentum"]
    arguments = draw(op, SIZES[4], dtype, rng)
    arguments[-1][:] = nesterov
    compare(engine, op, arguments, dtype)


@pytest.mark.parametrize("kind", ["uint8", "int64", "bool", "float32", "float64", "int16"])
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "reversed"])
def test_take_reads_any_type_at_any_stride(engine, kind, layout, dtype, rng):
    table = (100 * rng.standard_normal((12, 10))).astype(kind)
    x = {"plain": table, "transposed": table.T, "sliced": table[::3, 1::2], "reversed": table[::-1, ::-1]}[layout]
    rows = rng.integers(0, len(x), 7)
    taken = engine.take(engine.table(x), rows)
    expected = x[rows].astype(np.float32 if kind == "float32" else np.float64)
    np.testing.assert_array_equal(engine.asnumpy(taken), expected)


@each_op_with_outputs
def test_out_is_written_and_returned(engine, op, dtype, rng):
    arguments = draw(op, SIZES[5], dtype, rng)
    expected = computed_by(engine, op, arguments)[-len(op.outputs) :]
    out = tuple(engine.zeros(x.shape, x.dtype) for x in expected)
    result = getattr(engine, op.name)(
        *(engine.asarray(a.copy()) for a in arguments), out=out if len(out) > 1 else out[0]
    )
    for made, given, wanted in zip(result if len(out) > 1 else [result], out, expected, strict=True):
        assert made is given
        np.testing.assert_array_equal(engine.asnumpy(given), wanted)


def read_only(array):
    array.setflags(write=False)
    return array


BAD_OUT = {
    "shape": lambda x: np.empty((*x.shape[:-1], x.shape[-1] + 1), x.dtype),
    "dtype": lambda x: np.empty(x.shape, np.float16),
    "order": lambda x: np.empty((*x.shape, 2), x.dtype)[..., 0],
    "read-only": lambda x: read_only(np.empty_like(x)),
    "no array": lambda x: x.tolist(),
}


@each_op_with_outputs
@pytest.mark.parametrize("fault", BAD_OUT)
def test_bad_out_is_refused_by_name(engine, op, fault, dtype, rng):
    arguments = draw(op, SIZES[5], dtype, rng)
    good = computed_by(engine, op, arguments)[-len(op.outputs) :]
    for place, arg in enumerate(op.outputs):
        out = [x.copy() for x in good]
        out[place] = BAD_OUT[fault](good[place])
        with pytest.raises((TypeError, ValueError), match=rf"{op.name}: .*\b{arg.name}\b"):
            getattr(engine, op.name)(*arguments, out=tuple(out))


@each_op_with_outputs
def test_out_that_overlaps_an_input_is_refused(engine, op, dtype, rng):
    arguments = draw(op, SIZES[5], dtype, rng)
    outputs = computed_by(engine, op, arguments)[-len(op.outputs) :]
    for place, (arg, output) in enumerate(zip(op.outputs, outputs, strict=True)):
        for i, (source, given) in enumerate(zip(op.inputs, arguments, strict=True)):
            if source.dtype(dtype) != arg.dtype(dtype) or source.inplace:
                continue
            memory = np.empty(given.size + output.size, given.dtype)
            shared = memory[: given.size].reshape(given.shape)
            shared[...] = given
            overlapping = memory[given.size - 1 : given.size - 1 + output.size].reshape(output.shape)
            out = tuple(overlapping if j == place else x for j, x in enumerate(outputs))
            with pytest.raises(ValueError, match=rf"{op.name}: .*\b{arg.name}\b.* overlaps"):
                getattr(engine, op.name)(*arguments[:i], shared, *arguments[i + 1 :], out=out)


@each_op
def test_wrong_number_of_arguments(engine, op, dtype, rng):
    arguments = draw(op, SIZES[5], dtype, rng)
    with pytest.raises(TypeError, match=rf"{op.name} takes {len(op.inputs)} arguments .*{op.inputs[-1].name}"):
        getattr(engine, op.name)(*arguments[:-1])
    if op.outputs:
        with pytest.raises(TypeError, match=rf"{op.name}: out must hold {len(op.outputs)} arrays"):
            getattr(engine, op.name)(*arguments, out=())


@each_op
@pytest.mark.parametrize("change", ["longer", "another dimension", "empty"])
def test_shape_errors_name_op_argument_and_expectation(engine, op, change, dtype, rng):
    arguments = draw(op, SIZES[5], dtype, rng)
    known = set()
    for place, arg in enumerate(op.inputs):
        given = arguments[place]
        bad = {
            "longer": np.zeros([n + 1 for n in given.shape], given.dtype),
            "another dimension": given[None],
            "empty": given[:0],
        }[change]
        settled = known.union("0123456789")
        if change != "longer" or settled.intersection(arg.dims):
            expected = str(given.shape[0]) if settled.intersection(arg.dims[0]) else arg.dims[0]
            with pytest.raises(ValueError, match=rf"{op.name}: {arg.name} must have shape \({expected}.*got"):
                getattr(engine, op.name)(*arguments[:place], bad, *arguments[place + 1 :])
        known.update(arg.dims)


@each_op
def test_memory_that_is_updated_must_be_right(engine, op, dtype, rng):
    arguments = draw(op, SIZES[5], dtype, rng)
    for place, arg in enumerate(op.inputs):
        if arg.inplace:
            given = arguments[place]
            strided = np.zeros((*given.shape, 2), given.dtype)[..., 0]
            bad = [np.zeros(given.shape, np.float16), given.tolist(), read_only(given.copy())] + [strided] * (
                given.size > 1
            )
            for wrong in bad:
                with pytest.raises(
                    (TypeError, ValueError), match=rf"{op.name}: {arg.name} must be a writeable C-contiguous"
                ):
                    getattr(engine, op.name)(*arguments[:place], wrong, *arguments[place + 1 :])


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


def test_unknown_op(engine):
    with pytest.raises(AttributeError, match="has no op 'tanh_of_everything'"):
        engine.tanh_of_everything()
