"""Random networks, data and options against torch in float64."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import fastbp

from .checks import assert_allclose
from .conftest import ENGINES
from .fuzz import fuzz

torch = pytest.importorskip("torch")
from .torch_reference import Reference  # noqa: E402  it needs torch

LOSSES = {
    "SoftmaxCrossEntropy": lambda draw, classes: {
        "class_weight": draw(st.none() | st.lists(st.floats(0.1, 3), min_size=classes, max_size=classes)),
        "label_smoothing": draw(st.just(0.0) | st.floats(0, 0.9)),
        "ignore_index": draw(st.none() | st.integers(-1, classes - 1)),
    },
    "CategoricalCrossEntropy": lambda draw, classes: {"label_smoothing": draw(st.sampled_from([0.0, 0.2]))},
    "MeanSquaredError": lambda draw, classes: {},
    "MeanAbsoluteError": lambda draw, classes: {},
    "Huber": lambda draw, classes: {"delta": draw(st.floats(0.1, 2))},
    "Poisson": lambda draw, classes: {},
    "BinaryCrossEntropy": lambda draw, classes: {"pos_weight": draw(st.none() | st.floats(0.1, 3))},
}
LAYERS = {
    "ReLU": lambda draw: {},
    "LeakyReLU": lambda draw: {"negative_slope": draw(st.floats(0, 0.9))},
    "ELU": lambda draw: {"alpha": draw(st.floats(0.1, 2))},
    "GELU": lambda draw: {"approximate": draw(st.sampled_from(["none", "tanh"]))},
    "SiLU": lambda draw: {},
    "Tanh": lambda draw: {},
    "Sigmoid": lambda draw: {},
    "Softplus": lambda draw: {"beta": draw(st.floats(0.2, 3))},
    "Softmax": lambda draw: {},
    "Identity": lambda draw: {},
    "Dropout": lambda draw: {"rate": 0.0},
}
OPTIMIZERS = {
    "SGD": lambda draw: {"momentum": (momentum := draw(st.sampled_from([0.0, 0.9]))), "nesterov": momentum > 0},
    "Adam": lambda draw: {"eps": 0.1, "betas": (draw(st.floats(0, 0.95)), draw(st.floats(0.5, 0.999)))},
    "AdamW": lambda draw: {"eps": 0.1},
    "RMSprop": lambda draw: {"eps": 0.1, "momentum": draw(st.sampled_from([0.0, 0.5]))},
}


def arranged(draw, x, types):
    """The same numbers in another dtype and another place."""
    x = x.astype(draw(st.sampled_from(types)))
    how = draw(st.sampled_from(["C", "F", "list", "gaps", "backwards", "read-only", "swapped", "tensor"]))
    if how == "gaps":
        wide = np.zeros((2 * len(x), *(n + 3 for n in x.shape[1:])), x.dtype)
        view = wide[(slice(1, None, 2), *(slice(2, -1) for _ in x.shape[1:]))]
        view[...] = x
        return view
    if how == "read-only":
        x.flags.writeable = False
    return {
        "F": lambda: np.asfortranarray(x),
        "list": x.tolist,
        "backwards": lambda: x[::-1].copy()[::-1],
        "swapped": lambda: x.astype(x.dtype.newbyteorder()),
        "tensor": lambda: torch.tensor(x),
    }.get(how, lambda: x)()


@st.composite
def layers_of(draw, width, depth=0):
    """Layers for an input of a width, and the width of their output."""
    layers = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["Dense", "Dense", "LayerNorm", "BatchNorm", "Residual", *LAYERS]))
        if kind == "Dense":
            neurons = draw(st.integers(1, 6) | st.integers(7, 40))
            layers.append(fastbp.Dense(width, neurons))
            width = neurons
        elif kind in ("LayerNorm", "BatchNorm"):
            layers.append(getattr(fastbp, kind)(width, eps=0.1))
        elif kind == "Residual":
            if not depth:
                inner, back = draw(layers_of(width, 1))
                layers.append(fastbp.Residual([*inner, fastbp.Dense(back, width)]))
        else:
            layers.append(getattr(fastbp, kind)(**LAYERS[kind](draw)))
    return layers, width


@st.composite
def problems(draw):
    """A model, its data as a user might have them, and the same data as plain arrays."""
    dtype, engine = draw(st.sampled_from(["float32", "float64"])), draw(st.sampled_from(ENGINES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, features, outputs = draw(st.integers(2, 20)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    X = rng.standard_normal((rows, features)) * draw(st.sampled_from([0.1, 1, 3]))
    layers, width = [], features
    types = ["f4", "f8", "f8"]
    if draw(st.integers(0, 4)) == 0:
        codes = draw(st.integers(1, 3))
        layers.append(fastbp.Embedding(features, [features - 1], [codes], [(dim := draw(st.integers(1, 3)))]))
        X[:, -1] = rng.integers(0, codes, rows)
        width = features - 1 + dim
    elif draw(st.integers(0, 3)) == 0:
        X, types = np.round(X * 3).clip(0), ["u1", "i8", "f2", "i4"]
    middle, width = draw(layers_of(width))
    layers += [*middle, fastbp.Dense(width, outputs)]
    kind = draw(st.sampled_from(list(LOSSES)))
    if kind == "CategoricalCrossEntropy":
        layers.append(fastbp.Softmax())
    loss = getattr(fastbp, kind)(reduction=draw(st.sampled_from(["mean", "sum"])), **LOSSES[kind](draw, outputs))
    name = draw(st.sampled_from(list(OPTIMIZERS)))
    optimizer = getattr(fastbp, name)(
        draw(st.sampled_from([1 / 64, 1 / 256])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        clip_norm=draw(st.none() | st.floats(0.1, 2)),
        **OPTIMIZERS[name](draw),
    )
    model = fastbp.Sequential(layers, loss=loss, optimizer=optimizer, dtype=dtype, engine=engine, seed=0)
    for layer in model.walk():
        for parameter, shape in layer.shapes().items():
            setattr(layer, parameter, rng.normal(0, 0.5, shape))
    for layer in model.layers[:-1]:
        if draw(st.integers(0, 5)) == 0:
            layer.trainable = False
    if kind in ("SoftmaxCrossEntropy", "CategoricalCrossEntropy"):
        labels = rng.integers(0, outputs, rows)
        if kind == "SoftmaxCrossEntropy" and loss.ignore_index == -1:
            labels[rng.random(rows) < 0.3] = -1
        soft = rng.dirichlet(np.ones(outputs), rows)
        hot = np.eye(outputs)[labels]
        choices = [labels] if loss.__dict__.get("ignore_index") is not None or outputs == 1 else [labels, hot, soft]
        y = draw(st.sampled_from(choices))
        y_types = ["i8", "i4", "i1", "f8"] if y is labels else ["f8"]
    elif kind == "Poisson":
        y, y_types = rng.integers(0, 4, (rows, outputs)), ["i8", "f4", "u1"]
    elif kind == "BinaryCrossEntropy":
        y, y_types = rng.integers(0, 2, (rows, outputs)), ["i8", "f4", "?"]
    else:
        y, y_types = rng.standard_normal((rows, outputs)).astype("f4"), ["f4", "f8"]
    weights = draw(st.sampled_from([None, rng.integers(0, 3, rows), rng.random(rows)]))
    passed = arranged(draw, X, types)
    plain = np.asarray(passed).astype(np.float64)
    given_weights = None if weights is None else arranged(draw, weights, [weights.dtype])
    given = {"X": passed, "y": arranged(draw, y, y_types), "sample_weight": given_weights}
    return model, given, (plain, np.array(y), None if weights is None else weights.astype(float))


def assert_near(ours, theirs, model, times=1):
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    rtol = times * (1e-4 if model.dtype == np.float32 else 1e-10)
    assert_allclose(ours, theirs, rtol=rtol, atol=rtol * max(1, np.abs(theirs).max(initial=0)))


def has(model, kind):
    return any(isinstance(layer, kind) for layer in model.walk())


@given(problems())
@fuzz
def test_gradients_are_those_of_torch(problem):
    model, given, (X, y, weights) = problem
    twin = Reference(model)
    x = torch.tensor(X, requires_grad=True)
    total, count = twin.loss(twin.forward(x, training=True), y, weights)
    assume(twin.margin > (1e-5 if model.dtype == np.float32 else 1e-9))
    expected = total / count if count else 0 * total
    inputs = torch.autograd.grad(expected, [x, *twin.parameters.values()], allow_unused=True)
    found = model.gradients(given["X"], given["y"], sample_weight=given["sample_weight"])
    assert_near(found.loss, expected, model)
    if not has(model, fastbp.Embedding):
        assert_near(found.inputs, inputs[0], model)
    ours = [gradient for layer in found.layers for gradient in layer.values()]
    for mine, theirs in zip(ours, inputs[1:], strict=True):
        assert_near(mine, theirs, model)


@given(problems(), st.data())
@fuzz
def test_training_is_that_of_torch(problem, data):
    model, given, (X, y, weights) = problem
    rows, epochs = len(X), data.draw(st.integers(1, 3))
    batch = data.draw(st.integers(1, rows + 2))
    assume(not has(model, fastbp.BatchNorm) or (batch > 1 and rows % batch != 1))  # of which torch makes an error
    assume(len(model.memory.gradients))
    twin = Reference(model)
    history = twin.fit(X, y, weights, batch, epochs)
    outputs = twin.forward(torch.tensor(X), training=False)
    assume(twin.margin > (1e-4 if model.dtype == np.float32 else 1e-9))
    numbers = outputs.exp() if has_rates(model) else outputs
    # what diverges, also in the last step, makes as much as it likes of rounding
    assume(max(np.abs(history).max(), outputs.abs().max().item(), numbers.max().item()) < 1e6)
    model.fit(**given, epochs=epochs, batch_size=batch, shuffle=False)
    assert_near(model.history["loss"], history, model, times=5)
    for (place, name), theirs in twin.parameters.items():
        assert_near(getattr(list(model.walk())[place], name), theirs, model, times=5)
    scores = {"SoftmaxCrossEntropy": lambda: outputs.softmax(1), "BinaryCrossEntropy": outputs.sigmoid}
    if model.loss.classifies:
        expected = scores.get(type(model.loss).__name__, lambda: outputs)()
        found = model.predict_proba(given["X"])
        assert_near(found, expected, model, times=5)
        assert type(found) is (torch.Tensor if isinstance(given["X"], torch.Tensor) else np.ndarray)
    else:
        assert_near(model.predict(given["X"]), numbers, model, times=5)
    total, count = twin.loss(outputs, y, weights)
    if count:
        assert_near(model.evaluate(**given)["loss"], total / count, model, times=5)


def has_rates(model):
    return isinstance(model.loss, fastbp.Poisson)


@given(
    st.sampled_from(ENGINES),
    st.sampled_from(["float32", "float64"]),
    st.sampled_from(["SoftmaxCrossEntropy", "BinaryCrossEntropy", "MeanSquaredError", "MeanAbsoluteError", "Huber"]),
    st.lists(st.sampled_from(["LayerNorm", "BatchNorm", *LAYERS]), max_size=3),
    st.floats(-40, 38),
    st.floats(-8, 8),
    st.integers(0, 2**32),
)
@fuzz
def test_where_torch_stays_finite_so_do_we(engine, dtype, loss, kinds, scale_x, scale_w, seed):
    rng = np.random.default_rng(seed)
    layers = [
        getattr(fastbp, kind)(*[6] * ("Norm" in kind), **({"rate": 0.0} if kind == "Dropout" else {})) for kind in kinds
    ]
    model = fastbp.Sequential(
        [fastbp.Dense(4, 6), *layers, fastbp.Dense(6, 3)],
        loss=getattr(fastbp, loss)(), engine=engine, dtype=dtype, seed=0,
    )  # fmt: skip
    for layer in model.walk():
        for name, shape in layer.shapes().items():
            setattr(layer, name, rng.normal(0, 10**scale_w, shape).astype(dtype))
    with np.errstate(all="ignore"):
        X = (rng.standard_normal((5, 4)) * 10**scale_x).astype(dtype)
        further = 16 * X  # where sums come close to the largest number, their order decides
    assume(np.isfinite(X).all())
    labels = rng.integers(0, 3, 5)
    y = labels if loss == "SoftmaxCrossEntropy" else np.eye(3)[labels]
    module = fastbp.to_torch(model)
    target = torch.tensor(labels) if loss == "SoftmaxCrossEntropy" else torch.tensor(y, dtype=getattr(torch, dtype))
    costs = {
        "SoftmaxCrossEntropy": "cross_entropy",
        "BinaryCrossEntropy": "binary_cross_entropy_with_logits",
        "MeanSquaredError": "mse_loss",
        "MeanAbsoluteError": "l1_loss",
        "Huber": "huber_loss",
    }

    def all_of_torch(X):
        x = torch.tensor(X, requires_grad=True)
        outputs = module(x)
        cost = getattr(torch.nn.functional, costs[loss])(outputs, target)
        return [outputs, cost, *torch.autograd.grad(cost, [x, *module.parameters()])]

    pairs = zip(all_of_torch(X), all_of_torch(further), strict=True)
    finite = [all(torch.isfinite(x).all() for x in pair) for pair in pairs]
    assume(finite[0])  # the slope of an absolute error is 0 in torch where the output is NaN
    found = model.gradients(X, y)
    gradients = [gradient for layer in found.layers for gradient in layer.values()]
    ours = [model.forward(X), found.loss, found.inputs, *gradients]
    assert [np.isfinite(x).all() for x, its in zip(ours, finite, strict=True) if its] == [True] * sum(finite)
