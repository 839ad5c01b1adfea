"""The one contract of cross-entropy: against its definition, torch and ONNX, at every combination."""

import itertools
import tracemalloc

import numpy as np
import pytest

import fastbp
from fastbp.tape import Recorder

from .checks import assert_allclose, assert_array_equal, slopes

LOSSES = [fastbp.SoftmaxCrossEntropy, fastbp.CategoricalCrossEntropy]
each_loss = pytest.mark.parametrize("loss_of", LOSSES)

ROWS, CLASSES = 7, 4
COMBINATIONS = list(
    itertools.product(
        ["sparse", "one-hot", "soft"],
        [0.0, 0.1, 1.0],  # label_smoothing
        [None, [0.5, 2.0, 0.0, 1.0], {0: 3.0, 3: 0.25}],  # class_weight
        [None, np.array([1, 3, 0, 1, 2, 1, 1])],  # sample_weight
        [None, 2, -100],  # ignore_index
    )
)


def problem(loss_of, rng, rows=ROWS, classes=CLASSES):
    """Outputs of a last layer, and labels."""
    outputs = rng.standard_normal((rows, classes))
    if loss_of is fastbp.CategoricalCrossEntropy:
        outputs = rng.dirichlet(np.ones(classes), rows) * 0.9 + 0.1 / classes
    return outputs, rng.integers(0, classes, rows)


def targets(kind, y, ignore_index, rng):
    if kind == "sparse":
        y = y.copy()
        y[1] = 0 if ignore_index is None else ignore_index
        return y
    rows = np.eye(CLASSES)[y]
    if kind == "soft":
        rows[::2] = rng.dirichlet(np.ones(CLASSES), len(rows[::2]))
        rows[0] *= 0.5  # need not sum to 1
    return rows


def by_definition(loss_of, outputs, y, smoothing, class_weight, sample_weight, ignore_index):
    """Each row's loss and weight, number by number."""
    weights = [1.0] * CLASSES
    for label, weight in (
        (class_weight or {}).items() if not isinstance(class_weight, list) else enumerate(class_weight)
    ):
        weights[label] = weight
    costs, counts = [], []
    for i, row in enumerate(outputs):
        t = [float(c == y[i]) for c in range(CLASSES)] if y.ndim == 1 else y[i]
        repeat = 1.0 if sample_weight is None else float(sample_weight[i])
        label = y[i] if y.ndim == 1 else next((c for c in range(CLASSES) if t[c] and t[c] == sum(t)), None)
        if ignore_index is not None and label == ignore_index:
            repeat = 0.0
        if loss_of is fastbp.SoftmaxCrossEntropy:
            log_p = [z - np.log(sum(np.exp(other) for other in row)) for z in row]
        else:
            log_p = [np.log(p) for p in row]
        cost = 0.0
        for c in range(CLASSES):
            cost -= ((1 - smoothing) * t[c] + smoothing / CLASSES) * weights[c] * log_p[c] * repeat
        costs.append(cost)
        counts.append(repeat * sum(t[c] * weights[c] for c in range(CLASSES)))
    return np.array(costs), np.array(counts)


def reduced(costs, counts, reduction):
    if reduction == "mean":
        return costs.sum() / counts.sum() if counts.sum() else 0.0
    return costs if reduction == "none" else costs.sum()


def recorded(loss, outputs, y, sample_weight):
    """The loss's value and gradient, from a replay."""
    engine = loss.engine
    recorder, total = Recorder(engine, outputs.dtype), engine.zeros((2,), np.float64)
    t, weights = loss.targets(y, *outputs.shape, sample_weight)
    arrays = [engine.asarray(outputs), engine.asarray(t, outputs.dtype if t.ndim == 2 else None)]
    handles = [recorder.adopt(array) for array in arrays]
    if weights is not None:
        arrays.append(engine.asarray(weights, outputs.dtype))
    weights = None if weights is None else recorder.adopt(arrays[-1])
    gradient = loss.twin(engine=recorder).gradient(*handles, weights, recorder.adopt(total))
    memory, tape = recorder.want(gradient), recorder.tape()
    with tape.bound():
        tape.run()
    return total, engine.asnumpy(memory)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_combination_is_as_defined(engine, loss_of, reduction, rng):
    outputs, labels = problem(loss_of, rng)
    for kind, smoothing, class_weight, sample_weight, ignore_index in COMBINATIONS:
        y = targets(kind, labels, ignore_index, rng)
        loss = loss_of(class_weight, smoothing, ignore_index, reduction, engine=engine)

        def definition(y=y, options=(smoothing, class_weight, sample_weight, ignore_index)):
            return by_definition(loss_of, outputs, y, *options)

        expected = reduced(*definition(), reduction)
        assert_allclose(loss.forward(outputs, y, sample_weight), expected, rtol=1e-12, atol=1e-14)
        gradient = slopes(lambda d=definition: np.sum(reduced(*d(), reduction)), outputs)
        assert_allclose(loss.backward(), gradient, atol=2e-8)
        total, replayed = recorded(loss, outputs, y, sample_weight)
        assert_allclose(replayed, loss.backward(), rtol=1e-12, atol=1e-15)
        assert loss.value(total) == pytest.approx(np.sum(expected), rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["sparse", "soft"])
def test_softmax_cross_entropy_is_torchs(engine, kind, reduction, dtype, rng):
    torch = pytest.importorskip("torch")
    rtol = 1e-9 if dtype == np.float64 else 1e-4
    outputs = (3 * rng.standard_normal((33, 17))).astype(dtype)
    y = rng.integers(0, 17, 33) if kind == "sparse" else rng.dirichlet(np.ones(17), 33)
    for smoothing, weighted, ignored in itertools.product([0.0, 0.2], [False, True], [None, 5, -100]):
        if kind == "soft" and (ignored is not None or (weighted and reduction == "mean")):
            continue  # what torch lacks, and what is documented to differ
        options = {"class_weight": rng.uniform(0.1, 2, 17)} if weighted else {}
        leaf = torch.tensor(outputs, dtype=torch.float64, requires_grad=True)
        given = y.copy()
        if ignored is not None:
            given[::4] = ignored
        expected = torch.nn.functional.cross_entropy(
            leaf,
            torch.tensor(given),
            weight=torch.tensor(options["class_weight"]) if weighted else None,
            label_smoothing=smoothing,
            reduction=reduction,
            **({"ignore_index": ignored} if ignored is not None else {}),
        )
        expected.sum().backward()
        loss = fastbp.SoftmaxCrossEntropy(
            **options, label_smoothing=smoothing, ignore_index=ignored, reduction=reduction, engine=engine
        )
        assert_allclose(loss.forward(outputs, given), expected.detach(), rtol=rtol, atol=rtol)
        assert_allclose(loss.backward(), leaf.grad, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_softmax_cross_entropy_is_that_of_onnx(engine, reduction, rng):
    pytest.importorskip("onnx")
    from onnx.reference.ops.op_softmax_cross_entropy_loss import softmaxcrossentropy

    outputs, y = rng.standard_normal((20, 6)), rng.integers(0, 6, 20)
    for weight, ignored in itertools.product([None, rng.uniform(0.1, 2, 6)], [None, 3, -1]):
        given = y.copy()
        given[::5] = y[0] if ignored is None else ignored
        expected = softmaxcrossentropy(outputs, given, weight=weight, reduction=reduction, ignore_index=ignored)
        loss = fastbp.SoftmaxCrossEntropy(weight, ignore_index=ignored, reduction=reduction, engine=engine)
        assert_allclose(loss.forward(outputs, given), np.asarray(expected).squeeze(), rtol=1e-9)


@each_loss
def test_where_nothing_counts_loss_and_gradient_are_0(engine, loss_of, rng):
    outputs, y = problem(loss_of, rng)
    for options, weights in (
        ({"ignore_index": -1}, None),
        ({"class_weight": np.zeros(CLASSES)}, None),
        ({"class_weight": np.zeros(CLASSES), "label_smoothing": 0.5}, None),
        ({}, np.zeros(ROWS)),
    ):
        loss = loss_of(**options, engine=engine)
        assert loss.forward(outputs, np.full(ROWS, -1) if "ignore_index" in options else y, weights) == 0
        assert (loss.backward() == 0).all()


@each_loss
def test_rows_that_do_not_count_may_hold_anything(engine, loss_of, dtype, rng):
    outputs, y = problem(loss_of, rng)
    outputs = outputs.astype(dtype)
    loss = loss_of(ignore_index=-1, engine=engine)
    y[2] = -1
    expected, gradient = loss.forward(outputs, y), loss.backward()
    outputs[2] = np.nan
    assert loss.forward(outputs, y) == expected
    assert_array_equal(loss.backward(), gradient)


def test_a_class_that_cannot_be_adds_nothing(engine, dtype):
    outputs = np.array([[0.0, -np.inf, 0.0]], dtype)
    for y in (np.array([0]), np.array([[0.5, 0.0, 0.5]])):
        loss = fastbp.SoftmaxCrossEntropy([1, 2, 1], engine=engine)
        assert loss.forward(outputs, y) == pytest.approx(np.log(2))
        assert_allclose(loss.backward(), [[-0.5, 0, 0.5]] if y.ndim == 1 else [[0, 0, 0]], atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"class_weight": {3: 2.0}, "label_smoothing": 0.1}], ids=str)
def test_wide_rows_are_not_copied(cpu_engine, options, rng):
    outputs = rng.standard_normal((64, 100_000), np.float32)
    y = rng.integers(0, 100_000, 64)
    loss = fastbp.SoftmaxCrossEntropy(**options, engine=cpu_engine)
    z = outputs[:, :50].copy()
    loss.forward(z, y % 50)  # what is loaded or compiled once
    for compute in (lambda: loss.forward(outputs, y), lambda: recorded(loss, outputs, y, None)):
        tracemalloc.start()
        compute()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.25 * outputs.nbytes  # the gradient, and vectors as long as a row


def test_wide_rows_are_as_defined(engine, rng):
    outputs = rng.standard_normal((64, 100_000), np.float32)
    y = rng.integers(0, 100_000, 64)
    leaf = outputs.astype(np.float64)
    leaf -= leaf.max(1, keepdims=True)
    log_p = leaf - np.log(np.exp(leaf).sum(1, keepdims=True))
    loss = fastbp.SoftmaxCrossEntropy(engine=engine)
    assert loss.forward(outputs, y) == pytest.approx(-log_p[np.arange(64), y].mean(), rel=1e-6)


def test_training_on_wide_rows_makes_no_copy_of_the_logits(cpu_engine, rng):
    model = fastbp.Sequential(
        [fastbp.Dense(8, 16), fastbp.ReLU(), fastbp.Dense(16, 100_000)],
        loss=fastbp.SoftmaxCrossEntropy(),
        optimizer=fastbp.SGD(0.1),
        engine=cpu_engine,
        seed=0,
    )
    X, y = rng.standard_normal((256, 8)), rng.integers(0, 100_000, 256)
    weights, logits = model.layers[2].weights.nbytes, 256 * 100_000 * 4
    model.train_on_batch(X[:2], y[:2])
    tracemalloc.start()
    model.train_on_batch(X, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * logits + 5 * weights  # themselves and their gradient, while the step is recorded


@each_loss
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_are_in_float64(engine, loss_of, weighted):
    outputs = np.full((200_000, 2), 0.5, np.float32)
    loss = loss_of([1, 1] if weighted else None, engine=engine)
    assert loss.forward(outputs, np.zeros(200_000, int)) == pytest.approx(np.log(2), rel=1e-6)


@each_loss
@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64, np.float64, list])
def test_sparse_and_one_hot_targets_agree(engine, loss_of, kind, rng):
    outputs, y = problem(loss_of, rng)
    loss = loss_of(engine=engine)
    expected, gradient = loss.forward(outputs, y), loss.backward()
    for targets in (y, np.eye(4, dtype=int)[y]):
        given = targets.tolist() if kind is list else targets.astype(kind)
        assert loss.forward(outputs, given) == expected
        assert_array_equal(loss.backward(), gradient)


@each_loss
@pytest.mark.parametrize(
    ("y", "match"),
    [
        ([0, 1], r"y must hold 3 labels, shape \(3,\), or rows of shape \(3, 2\); got \(2,\)"),
        ([[0], [1], [0]], r"y must hold 3 labels, .*got \(3, 1\)"),
        ([0, 1, 2], "y must hold labels from 0 to 1, got 2"),
        ([0, 1, -1], "y must hold labels from 0 to 1, got -1"),
        ([0, 1, 0.5], r"y must hold whole numbers, got 0\.5"),
        ([0, 1, np.nan], r"y must hold finite .*numbers, got nan at \(2,\)"),
        ([[0, 1], [1, 0], [-1, 2]], "y of two dimensions must hold one-hot rows or probabilities, got -1"),
        ([[0, 1], [1, 0], [np.nan, 1]], r"y must hold finite .*numbers, got nan at \(2, 0\)"),
        ([[0, 1, 0], [1, 0, 0], [1, 0, 0]], r"y must hold 3 labels, .*got \(3, 3\)"),
        (["a", "b", "a"], "y must hold real numbers, got dtype"),
        ([0j, 1, 0], "y must hold real numbers, got dtype complex128"),
        (np.ma.masked_array([0, 1, 1]), "y is a masked array"),
    ],
)
def test_bad_labels(engine, loss_of, y, match):
    loss = loss_of(engine=engine)
    with pytest.raises(ValueError, match=match):
        loss.forward(np.full((3, 2), 0.5), y)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"class_weight": [1, -1]}, "class_weight must be at least 0 and finite, got -1"),
        ({"class_weight": [[1, 1]]}, "class_weight must be an array of one number for each class, or a dict"),
        ({"class_weight": {1.7: 2.0}}, r"class_weight must have whole numbers, the labels, for keys, got 1\.7"),
        ({"class_weight": {"1": 2.0}}, "class_weight must have whole numbers, the labels, for keys, got '1'"),
        ({"class_weight": {np.inf: 2.0}}, "class_weight must have whole numbers, the labels, for keys, got inf"),
        ({"class_weight": {0: np.nan}}, r"class_weight\[0\] must be at least 0 and finite, got nan"),
        ({"class_weight": "balanced"}, "class_weight must be an array .* got 'balanced'; 'balanced' is for fit"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be at least 0 and at most 1, got 1\.5"),
        ({"label_smoothing": -0.5}, r"label_smoothing must be at least 0 and at most 1, got -0\.5"),
        ({"ignore_index": 0.5}, r"ignore_index must be an integer, got 0\.5"),
        ({"reduction": "max"}, "reduction must be 'mean' or 'sum' or 'none', got 'max'"),
    ],
)
@each_loss
def test_bad_settings(loss_of, options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        loss_of(**options)


@each_loss
@pytest.mark.parametrize(
    ("class_weight", "match"),
    [
        ([1, 2, 3], "class_weight must hold 2 numbers, one for each class, got 3"),
        ({2: 1.0}, "class_weight must have labels from 0 to 1, got 2"),
    ],
)
def test_class_weights_that_do_not_fit(loss_of, class_weight, match):
    with pytest.raises(ValueError, match=match):
        loss_of(class_weight).forward(np.full((3, 2), 0.5), [0, 1, 1])


@pytest.mark.parametrize("key", [1, 1.0, np.int8(1), np.float32(1), True])
def test_keys_of_class_weights_may_be_any_whole_numbers(key):
    assert fastbp.SoftmaxCrossEntropy(class_weight={key: 2.0}).class_weight == {1: 2.0}


@pytest.mark.parametrize("p", [0.0, 1e-40, 3e-38])
def test_weights_leave_the_gradient_at_a_probability_of_0_finite(engine, p):
    loss = fastbp.CategoricalCrossEntropy(class_weight=[1e5, 1], reduction="sum", engine=engine)
    loss.forward(np.array([[p, 1], [0.5, 0.5]], np.float32), [0, 0], sample_weight=[100, 1])
    gradient = engine.asnumpy(loss.backward())
    assert gradient[0, 0] == -1 / np.finfo(np.float32).tiny and gradient[1, 0] == -2e5


def test_a_small_weight_counts_where_the_slope_alone_would_be_infinite(engine):
    loss = fastbp.CategoricalCrossEntropy(class_weight=[1e5, 1], engine=engine)
    loss.forward(np.array([[0, 1], [0.5, 0.5]], np.float32), [0, 0], sample_weight=[1e-3, 1])
    share = 1e2 / (1e2 + 1e5)  # of all weight
    assert_allclose(loss.backward()[0, 0], -share / np.finfo(np.float32).tiny, rtol=1e-6)
