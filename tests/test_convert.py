"""Models from other libraries and for them compute what they computed there."""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import sklearn.neural_network as theirs
from sklearn.datasets import load_iris, make_multilabel_classification
from sklearn.preprocessing import StandardScaler

import fastbp
from fastbp import estimators
from fastbp.estimators import MLPClassifier, from_sklearn

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.usefixtures("engine_in_use"),
]

X, Y = load_iris(return_X_y=True)
X = StandardScaler().fit_transform(X)
LABELS = make_multilabel_classification(150, 4, random_state=0)[1]
PROBLEMS = {
    "texts": ("MLPClassifier", np.array(["setosa", "versicolor", "virginica"])[Y], {}),
    "integers": ("MLPClassifier", 10 * Y - 5, {"activation": "tanh"}),
    "two texts": ("MLPClassifier", np.where(Y == 1, "yes", "no"), {"activation": "logistic"}),
    "bools": ("MLPClassifier", Y == 1, {}),
    "several labels": ("MLPClassifier", LABELS, {}),
    "numbers": ("MLPRegressor", X @ [1, -2, 3, 1.0], {"activation": "identity"}),
    "rows of numbers": ("MLPRegressor", np.stack([X[:, 0] - X[:, 1], X[:, 2]], 1), {}),
    "counts": ("MLPRegressor", Y, {"loss": "poisson"}),
}


def fitted(kind, y, **options):
    return kind(**{"max_iter": 20, "random_state": 0} | options).fit(X, y)


@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_from_scikit_learn_and_back(problem, solver):
    name, y, options = PROBLEMS[problem]
    original = fitted(getattr(theirs, name), y, solver=solver, **options)
    model = from_sklearn(original)
    back = model.to_sklearn()
    assert type(model) is getattr(estimators, name) and type(back) is type(original)
    assert back.get_params() == original.get_params()
    for other in (model, back):
        assert other.get_params().items() >= original.get_params().items()
        np.testing.assert_allclose(other.coefs_[0], original.coefs_[0])
        predicted, expected = other.predict(X), original.predict(X)
        if name == "MLPClassifier":
            np.testing.assert_array_equal(predicted, expected)
            np.testing.assert_allclose(other.predict_proba(X), original.predict_proba(X))
        else:
            np.testing.assert_allclose(predicted, expected)
        assert other.score(X, y) == pytest.approx(original.score(X, y))
    if solver != "lbfgs":
        for other in (original, model):
            other.partial_fit(X, y)
        np.testing.assert_allclose(model.coefs_[0], original.coefs_[0])  # the moments came along
        assert model.loss_curve_ == pytest.approx(original.loss_curve_)
        back.partial_fit(X, y)


def test_a_copy_shares_no_weights():
    original = fitted(theirs.MLPClassifier, Y)
    model = from_sklearn(original)
    before = original.coefs_[0].copy()
    model.partial_fit(X, Y)
    np.testing.assert_array_equal(original.coefs_[0], before)
    back = model.to_sklearn()
    back.coefs_[0][:] = 0
    assert model.coefs_[0].any()


def needs_torch(*values):
    return pytest.param(*values, marks=pytest.mark.skipif(find_spec("torch") is None, reason="needs torch"))


@pytest.mark.parametrize(
    "convert, error, message",
    [
        (lambda: from_sklearn(StandardScaler()), TypeError, "fitted must be .* got StandardScaler"),
        (lambda: from_sklearn(theirs.MLPClassifier()), ValueError, "not fitted yet"),
        (lambda: MLPClassifier().to_sklearn(), ValueError, "not fitted yet"),
        (lambda: fitted(MLPClassifier, Y, activation="gelu").to_sklearn(), ValueError, "no activation='gelu'"),
        needs_torch(lambda: fastbp.to_torch(MLPClassifier()), ValueError, "not fitted yet"),
        needs_torch(lambda: fastbp.to_torch(3), TypeError, "model must be a fastbp Sequential or estimator, got int"),
        (lambda: fastbp.export_onnx(fitted(MLPClassifier, Y + 0.5), "x"), ValueError, "Unknown label type"),
        needs_torch(
            lambda: fastbp.to_torch(fastbp.Sequential([Odd()])), ValueError, "Odd.* has no counterpart in torch"
        ),
        (lambda: fastbp.export_onnx(fastbp.Sequential([Odd()]), "x"), ValueError, "Odd.* has no counterpart in ONNX"),
    ],
)
def test_what_cannot_be_converted(convert, error, message):
    with pytest.raises(error, match=message):
        convert()


class Odd(fastbp.Layer):
    def forward(self, x):
        return x


ACTIVATIONS = [
    fastbp.Identity(),
    fastbp.ReLU(),
    fastbp.LeakyReLU(0.2),
    fastbp.ELU(0.7),
    fastbp.GELU(),
    fastbp.GELU("tanh"),
    fastbp.SiLU(),
    fastbp.Tanh(),
    fastbp.Sigmoid(),
    fastbp.Softplus(2.0, 3.0),
    fastbp.Softmax(),
    fastbp.Dropout(0.5),
    fastbp.LayerNorm(6, 1e-3),
    fastbp.BatchNorm(6, 1e-3, 0.2),
]


def network(activation, dtype="float32", *more):
    activation = type(activation)(**activation.config())
    layers = [fastbp.Dense(4, 6), activation, *more, fastbp.Dense(6, 2)]
    model = fastbp.Sequential(layers, loss=fastbp.MeanSquaredError(), optimizer=fastbp.Adam(0.05), dtype=dtype, seed=0)
    return model.fit(X, X[:, :2], epochs=2)  # so that norms have something to tell


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_to_torch_and_back(activation, dtype):
    torch = pytest.importorskip("torch")
    model = network(activation, dtype)
    module = fastbp.to_torch(model).eval()
    rows = (3 * X).astype(dtype)
    expected = model.predict(rows)
    np.testing.assert_allclose(module(torch.from_numpy(rows)).detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    back = fastbp.from_torch(torch.nn.Sequential(module, torch.nn.Identity()))
    assert back.dtype == dtype
    np.testing.assert_allclose(back.predict(rows), expected, rtol=1e-4, atol=1e-6)


def test_frozen_layers_of_torch_and_for_it():
    nn = pytest.importorskip("torch").nn
    module = nn.Sequential(nn.Linear(4, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 2))
    model = fastbp.from_torch(module, loss=fastbp.MeanSquaredError(), optimizer=fastbp.Adam())
    assert [layer.trainable for layer in model.layers] == [False, True, True]
    back = fastbp.to_torch(model)
    assert [tensor.requires_grad for tensor in back.parameters()] == [False, False, True, True]
    module[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"Linear.* must train all of its parameters or none"):
        fastbp.from_torch(module)


def test_from_torch_takes_an_activation_that_stands_there_twice():
    torch = pytest.importorskip("torch")
    nn, again = torch.nn, torch.nn.ReLU()
    module = nn.Sequential(nn.Linear(4, 8), again, nn.Sequential(nn.Linear(8, 8), again), nn.Linear(8, 2))
    rows = np.asarray(X, np.float32)
    expected = module(torch.tensor(rows)).detach().numpy()
    np.testing.assert_allclose(fastbp.from_torch(module).predict(rows), expected, rtol=1e-4, atol=1e-6)


def test_from_torch_refuses_what_it_would_get_wrong():
    nn = pytest.importorskip("torch").nn

    class Twice(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    class ReLU(nn.Module):
        def forward(self, x):
            return x.abs()

    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"Linear.* stands in the module twice; layers of fastbp cannot share weights"):
        fastbp.from_torch(nn.Sequential(shared, nn.ReLU(), shared))
    with pytest.raises(ValueError, match=r"(?s)Twice.* has no counterpart in fastbp"):
        fastbp.from_torch(Twice(nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"ReLU.* has no counterpart in fastbp"):  # whatever it is called
        fastbp.from_torch(nn.Sequential(nn.Linear(4, 2), ReLU()))
    hooked = nn.Linear(4, 2)
    hooked.register_forward_hook(lambda module, x, y: 2 * y)
    normed = nn.utils.spectral_norm(nn.Linear(4, 2))
    stack = nn.Sequential(nn.Linear(4, 2))
    stack.register_forward_pre_hook(lambda module, x: None)
    for part in (hooked, normed, stack):
        with pytest.raises(ValueError, match=r"(?s)has hooks, which have no counterpart in fastbp"):
            fastbp.from_torch(nn.Sequential(part))
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Sequential, got int"):
        fastbp.from_torch(3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_from_torch_says_what_it_holds(dtype):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(2, 3, dtype=getattr(torch, dtype)))
    with pytest.raises(ValueError, match=rf"Linear\(.*\) must hold float32 or float64, got torch.{dtype}"):
        fastbp.from_torch(module)
    assert fastbp.from_torch(module.float()).dtype == np.float32


def test_from_torch_without_biases_and_what_it_does_not_know():
    nn = pytest.importorskip("torch").nn
    model = fastbp.from_torch(nn.Sequential(nn.Linear(4, 3, bias=False)), loss=fastbp.SoftmaxCrossEntropy())
    assert not model.layers[0].biases.any() and model.loss is not None
    with pytest.raises(ValueError, match=r"Conv1d.* has no counterpart in fastbp"):
        fastbp.from_torch(nn.Sequential(nn.Conv1d(1, 1, 1)))
    with pytest.raises(ValueError, match="must have a momentum and running statistics"):
        fastbp.from_torch(nn.Sequential(nn.BatchNorm1d(4, momentum=None)))
    with pytest.raises(ValueError, match="must go over one dimension"):
        fastbp.from_torch(nn.Sequential(nn.LayerNorm((4, 4))))
    with pytest.raises(ValueError, match="must have dim=1"):
        fastbp.from_torch(nn.Sequential(nn.Softmax(dim=0)))


def run(path, rows):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"X": rows})
    return dict(zip([output.name for output in session.get_outputs()], outputs, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_onnx_of_a_network(activation, dtype, tmp_path):
    pytest.importorskip("onnx")
    model = network(activation, dtype, fastbp.Residual([fastbp.Dense(6, 6), fastbp.ReLU()]))
    fastbp.export_onnx(model, tmp_path / "model.onnx")
    rows = (3 * X).astype(dtype)
    found = run(tmp_path / "model.onnx", rows)["output"]
    exact = 100 if dtype == np.float64 else 1
    np.testing.assert_allclose(found, model.predict(rows), rtol=1e-4 / exact, atol=1e-5 / exact)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_onnx_of_an_estimator(problem, dtype, tmp_path):
    pytest.importorskip("onnx")
    name, y, options = PROBLEMS[problem]
    rows = X.astype(dtype)
    model = getattr(estimators, name)(max_iter=20, random_state=0, **options).fit(rows, y)
    fastbp.export_onnx(model, tmp_path / "model.onnx")
    found = run(tmp_path / "model.onnx", rows)
    if name == "MLPRegressor":
        np.testing.assert_allclose(found["variable"], model.predict(rows).reshape(150, -1), rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_array_equal(found["label"], model.predict(rows))
        np.testing.assert_allclose(found["probabilities"], model.predict_proba(rows), rtol=1e-4, atol=1e-6)


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    path, model = tmp_path / "model.onnx", fastbp.Sequential([fastbp.Dense(2, 3)], seed=0)
    fastbp.export_onnx(model, path)
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        fastbp.export_onnx(model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == before
