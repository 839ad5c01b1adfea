"""Random junk as arguments: it makes sense, or a ValueError or TypeError names the argument and nothing changed."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

import fastbp
from fastbp.files import describe
from fastbp.kernels.ops import OPS

from .checks import small_data, small_model
from .conftest import ENGINES
from .fuzz import fuzz

X, Y = small_data(12)

numbers = st.one_of(
    st.integers(-3, 20),
    st.floats(),
    st.floats(0, 2),
    st.booleans(),
    st.sampled_from([np.float32(0.5), np.int8(3), np.float64("nan"), np.bool_(True), 2**70, -(2**40), 1e308, 1j]),
)
arrays = st_numpy.arrays(
    st.one_of(
        st_numpy.floating_dtypes(),
        st_numpy.integer_dtypes(),
        st.just(np.dtype(bool)),
        st.just(np.dtype(object)),
        st_numpy.complex_number_dtypes(),
        st_numpy.unicode_string_dtypes(max_len=3),
        st_numpy.datetime64_dtypes(),
    ),
    st.sampled_from([(), (0,), (3,), (12,), (12, 1), (12, 3), (12, 4), (4, 12), (0, 4), (12, 0), (3, 4), (2, 12, 4)]),
    elements=None,
)
valid = st.sampled_from(
    [
        X,
        Y,
        X[::-1],
        np.asfortranarray(X),
        X.astype("f4"),
        X.astype(">f8"),
        np.ma.masked_array(X),
        np.ma.masked_array(X, X > 1),
        X.tolist(),
        np.eye(3)[Y],
        np.eye(3)[Y] * 0.999,
        np.float16(X),
        np.zeros((12, 3)),
        Y.astype(float),
        Y.reshape(-1, 1),
        np.broadcast_to(X[:1], X.shape),
        np.where(X > 1, np.nan, X),
        np.where(X > 1, np.inf, X),
        X * 1e300,
        X.view(np.recarray),
        np.array(None),
        np.array([X, X.T], dtype=object),
    ]
)
others = st.sampled_from(
    [None, "", "mean", "numba", b"x", (), [], {}, {0: 2.0}, {0: -1}, {"a": 1}, {9: 1.0}, set(), object(), len, range(3),
     iter([]), [[1], [1, 2]], [None] * 12, ["a"] * 12, (X, Y), (X,), (X, Y, None), [X, Y], slice(3), Ellipsis, type,
     np.dtype("f4"), np.float32, float, fastbp.ReLU, memoryview(b"abc"), bytearray(12), "balanced", ["x", 1.0], "ab"]
)  # fmt: skip
junk = st.one_of(numbers, others, valid, arrays, st.lists(numbers, max_size=4), st.tuples(numbers, numbers))


def everything(model):
    """All of a model that a file holds: arrays, settings, history, random state."""
    tensors, about = describe(model)
    return {name: (array.dtype.str, array.tobytes()) for name, array in tensors.items()}, about


def explained(call, names):
    """Call; whether it went through. An error must be of the right kind, and name one of some arguments."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
            call()
    except (ValueError, TypeError, FloatingPointError) as error:
        text = str(error)
        assert any(name in text for name in names), f"{type(error).__name__}: {text}"
        return False
    except (ImportError, FileNotFoundError) as error:
        assert any(name in str(error) for name in names), error
        return False
    return True


USES = {
    "fit": {
        "X": X, "y": Y, "epochs": 1, "batch_size": 5, "shuffle": True, "sample_weight": None, "class_weight": None,
        "validation_data": None, "metrics": (), "callbacks": (), "accumulate": 1, "every": 1, "resume": False,
        "verbose": False, "threads": None,
    },
    "train_on_batch": {"X": X, "y": Y, "sample_weight": None, "class_weight": None, "threads": None},
    "predict": {"X": X},
    "predict_proba": {"X": X},
    "forward": {"X": X},
    "evaluate": {"X": X, "y": Y, "sample_weight": None, "metrics": ()},
    "gradients": {"X": X, "y": Y, "sample_weight": None},
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
@given(data=st.data())
@fuzz
def test_calls_of_a_model(use, data):
    model = small_model(data.draw(st.sampled_from(ENGINES)), dropout=0.1, dtype="float32").fit(X, Y, epochs=1)
    arguments = USES[use]
    names = data.draw(st.lists(st.sampled_from(list(arguments)), min_size=1, max_size=2, unique=True))
    changed = {name: data.draw(junk, label=name) for name in names}
    if any(isinstance(changed.get(name), int) and changed[name] > 99 for name in ("epochs", "accumulate")):
        return
    before = everything(model)
    wanted = [*names, "y must"]  # which may not fit an X of other rows
    went_through = explained(lambda: getattr(model, use)(**(arguments | changed)), wanted)
    if not went_through or use not in ("fit", "train_on_batch", "forward"):
        assert everything(model) == before
    elif use != "forward":
        assert all(np.isfinite(layer.weights).all() for layer in (model.layers[0], model.layers[-1]))


PARTS = {
    "Dense": {"inputs": 4, "neurons": 3, "init": "he_normal"},
    "Dropout": {"rate": 0.1},
    "LeakyReLU": {"negative_slope": 0.1},
    "ELU": {"alpha": 1.0},
    "GELU": {"approximate": "none"},
    "Softplus": {"beta": 1.0, "threshold": 20.0},
    "LayerNorm": {"features": 4, "eps": 1e-5},
    "BatchNorm": {"features": 4, "eps": 1e-5, "momentum": 0.1},
    "Embedding": {"features": 4, "columns": [0], "num_embeddings": [3], "embedding_dim": [2]},
    "Residual": {"layers": [fastbp.Tanh()]},
    "SoftmaxCrossEntropy": {"class_weight": None, "label_smoothing": 0.1, "ignore_index": None, "reduction": "mean"},
    "BinaryCrossEntropy": {"pos_weight": None, "reduction": "mean"},
    "Huber": {"delta": 1.0},
    "Poisson": {"log_input": True},
    "SGD": {"lr": 0.1, "momentum": 0.1, "nesterov": False, "weight_decay": 0.0, "l1": 0.0, "clip_norm": None,
            "clip_value": None, "schedule": None},
    "Adam": {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8},
    "AdamW": {"lr": 0.1, "weight_decay": 0.0},
    "RMSprop": {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "momentum": 0.0, "centered": False},
    "Lion": {"lr": 0.1, "betas": (0.9, 0.99)},
    "StepLR": {"step_size": 2, "gamma": 0.1},
    "CosineAnnealingLR": {"T_max": 3, "eta_min": 0.0},
    "LinearWarmup": {"epochs": 2, "start_factor": 0.1, "end_factor": 1.0},
    "OneCycleLR": {"max_lr": 0.1, "epochs": 3, "pct_start": 0.3},
    "ReduceLROnPlateau": {"factor": 0.1, "patience": 2, "threshold": 1e-4, "min_lr": 0.0, "monitor": "loss"},
    "EarlyStopping": {"monitor": "loss", "patience": 3},
    "Sequential": {"layers": [fastbp.ReLU()], "loss": None, "optimizer": None, "engine": None, "dtype": "f4", "seed": 0,
                   "threads": None},
    "spiral_data": {"samples": 3, "classes": 2, "noise": 0.1, "seed": 0},
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
@given(data=st.data())
@fuzz
def test_constructors(part, data):
    name = data.draw(st.sampled_from(list(PARTS[part])))
    value = data.draw(junk, label=name)
    if isinstance(value, int) and value > 1000:
        return  # there may be so much memory
    explained(lambda: getattr(fastbp, part)(**(PARTS[part] | {name: value})), [name])


@given(data=st.data())
@fuzz
def test_assignments(data):
    model = small_model(data.draw(st.sampled_from(ENGINES)), dropout=0.1).fit(X, Y, epochs=1)
    part, name = data.draw(
        st.sampled_from(
            [(model, "threads"), (model, "loss"), (model, "optimizer"), (model, "layers")]
            + [(model.layers[0], "weights"), (model.layers[0], "biases"), (model.layers[2], "rate")]
            + [(model.optimizer, name) for name in ("lr", "betas", "eps", "clip_norm", "weight_decay", "schedule")]
            + [(model.loss, name) for name in ("class_weight", "label_smoothing", "ignore_index", "reduction")]
        )
    )
    before, value = everything(model), data.draw(junk, label=name)
    if not explained(lambda: setattr(part, name, value), [name]):
        assert everything(model) == before
        model.fit(X, Y, epochs=1)


@given(data=st.data())
@fuzz
def test_layers_and_losses_alone(data):
    engine = data.draw(st.sampled_from(ENGINES))
    layer = data.draw(
        st.sampled_from([fastbp.Dense(4, 3, engine=engine), fastbp.ReLU(engine=engine), fastbp.Softmax(engine=engine),
                         fastbp.LayerNorm(4, engine=engine), fastbp.BatchNorm(4, engine=engine),
                         fastbp.Dropout(0.1, engine=engine), fastbp.GELU(engine=engine)])
    )  # fmt: skip
    explained(lambda: layer.forward(data.draw(junk, label="x")), ["x"])
    layer.forward(X)
    explained(lambda: layer.backward(data.draw(junk, label="dvalues")), ["dvalues"])
    kind = data.draw(st.sampled_from([fastbp.SoftmaxCrossEntropy, fastbp.MeanSquaredError, fastbp.BinaryCrossEntropy]))
    loss = kind(engine=engine)
    outputs = np.zeros((12, 3))
    explained(lambda: loss.forward(data.draw(junk, label="outputs"), Y), ["outputs", "y must"])
    explained(lambda: loss.forward(outputs, data.draw(junk, label="y")), ["y must", "y is", "y of"])
    explained(lambda: loss.forward(outputs, Y, data.draw(junk, label="sample_weight")), ["sample_weight", "y must"])


@given(data=st.data())
@fuzz
def test_ops(data):
    """Eager ops: an array of another shape or dtype is refused by name; another order or dtype computes the same."""
    engine = fastbp.engine(data.draw(st.sampled_from(ENGINES)))
    op = data.draw(st.sampled_from([op for op in OPS.values() if engine.supports(op)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    letters = sorted({d for arg in (*op.inputs, *op.outputs) for d in arg.dims if not d.isdigit()})
    arguments = op.sample(rng, {letter: data.draw(st.integers(2, 40)) for letter in letters}, np.dtype("f8"))
    place = data.draw(st.integers(0, len(arguments) - 1))
    arguments[place] = data.draw(junk, label=op.inputs[place].name)
    explained(lambda: getattr(engine, op.name)(*arguments), [f"{op.name}: "])
