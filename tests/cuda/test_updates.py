"""Plain SGD as part of the products that are weights' gradients, on the stand-in."""

import ctypes
import itertools

import numpy as np
import pytest

import fastbp
from fastbp.kernels import cupy_updates
from fastbp.kernels.cupy_sources import KERNELS, Stage

from . import standin

pytestmark = pytest.mark.skipif(standin.COMPILER is None, reason="needs g++")

ENGINE, REPLAY = standin.engine_module(), standin.replay_module()


@pytest.fixture
def engine(monkeypatch):
    """The engine, on which steps are graphs, and weights of a hundred elements are large."""
    monkeypatch.setattr(REPLAY, "blocks_for", lambda *_: [])
    monkeypatch.setattr(ENGINE, "updated_by_products", cupy_updates.updated_by_products)
    monkeypatch.setattr(cupy_updates, "UPDATED", 100)
    return standin.engine_on_host()


@pytest.fixture
def ran(engine, monkeypatch):
    """The kernels of each graph that has been made ready."""
    names = []
    ready = ENGINE.CupyEngine.at_its_precision

    def at_its_precision(self, *given):
        stages, owned = ready(self, *given)
        names.append([stage.kernel for stage in stages])
        return stages, owned

    monkeypatch.setattr(ENGINE.CupyEngine, "at_its_precision", at_its_precision)
    return names


def trained(engine, optimizer, dtype="float64", precision="fp32", sizes=(9, 13, 11, 3), epochs=3, **fit):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, sizes[0])), rng.integers(0, sizes[-1], 60)
    layers = [part for k, n in itertools.pairwise(sizes) for part in (fastbp.Dense(k, n), fastbp.ReLU())]
    model = fastbp.Sequential(
        layers[:-1],
        loss=fastbp.SoftmaxCrossEntropy(),
        optimizer=optimizer,
        engine=engine,
        dtype=dtype,
        precision=precision,
        seed=0,
    )
    model.fit(X, y, epochs=epochs, batch_size=20, verbose=False, **fit)
    return model.engine.asnumpy(model.memory.parameters)


@pytest.mark.parametrize(
    ("optimizer", "updated"),
    [
        (lambda: fastbp.SGD(0.1), 2),
        (lambda: fastbp.SGD(0.2, schedule=fastbp.StepLR(1, 0.5)), 2),
        (lambda: fastbp.SGD(0.1, momentum=0.9), 0),
        (lambda: fastbp.SGD(0.1, weight_decay=0.1), 2),
        (lambda: fastbp.SGD(0.1, clip_norm=0.1), 0),
        (lambda: fastbp.Adam(0.01), 0),
    ],
    ids=["plain", "schedule", "momentum", "decay", "clip", "adam"],
)
def test_the_weights_are_those_of_numpy(engine, ran, optimizer, updated):
    """Of three matrices of weights two are large."""
    wanted = trained("numpy", optimizer())
    np.testing.assert_allclose(trained(engine, optimizer()), wanted, rtol=1e-9, atol=1e-12)
    (step,) = ran
    assert step.count("weight_step") == updated and step.count("dense_weight_grad") == 3 - updated


@pytest.mark.parametrize("any_algorithm", [1, 0])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_in_float32(engine, ran, monkeypatch, precision, any_algorithm):
    blas = engine._blas._libraries["cublasLt"].loaded
    monkeypatch.setattr(ctypes.c_int.in_dll(blas, "any_algorithm"), "value", any_algorithm)
    chosen = type(engine)(precision)
    found, again = (trained(chosen, fastbp.SGD(0.1), "float32", precision) for _ in range(2))
    assert np.array_equal(found, again) and "weight_step" in ran[0]
    monkeypatch.setattr(cupy_updates, "UPDATED", 10**9)
    np.testing.assert_allclose(found, trained(chosen, fastbp.SGD(0.1), "float32", precision), rtol=1e-2, atol=1e-3)
    assert "weight_step" not in ran[-1]


def test_gradients_that_are_added_up_stay(engine, ran):
    wanted = trained("numpy", fastbp.SGD(0.1), accumulate=3)
    np.testing.assert_allclose(trained(engine, fastbp.SGD(0.1), accumulate=3), wanted, rtol=1e-9, atol=1e-12)
    assert ran and not any("weight_step" in step for step in ran)


def kernels(engine, *calls):
    """What becomes of stages, each a kernel and the names of its arrays, in the order of its parameters."""
    p, g = engine.zeros((300,), np.float64), engine.zeros((300,), np.float64)
    arrays = {name: engine.zeros((12, 12), np.float64) for name in ("x", "dz", "other")}
    arrays |= {"p": p, "g": g, "w": p[64:208].reshape(12, 12), "dw": g[64:208].reshape(12, 12)}
    arrays |= {"lr": engine.scalar(0.5), "rates": engine.scalar(0.5), "step": engine.integers(0)}
    stages = []
    for name, written, *given in calls:
        parameters = [parameter for _, parameter in KERNELS[name].parameters]
        found = dict(zip(parameters, (arrays[n] for n in given), strict=True))
        stages.append(Stage(name, found, frozenset({written})))
    return [stage.kernel for stage in cupy_updates.updated_by_products(engine, stages)[0]]


GRADIENT, SGD = ("dense_weight_grad", "dw", "x", "dz", "dw"), ("sgd", "p", "p", "g", "lr")
STEP = ["step_factors", "weight_step"]


@pytest.mark.parametrize(
    ("between", "becomes"),
    [
        ([], STEP),
        ([("relu_forward", "y", "x", "other")], [*STEP, "relu_forward"]),
        ([("dense_input_grad", "dx", "dz", "w", "other")], ["dense_input_grad", *STEP]),
        ([("next_rate", "rate", "rates", "step", "lr")], ["next_rate", *STEP]),
        ([("relu_forward", "y", "dw", "other")], ["dense_weight_grad", "relu_forward", "sgd"]),
        ([("rectify", "z", "dw")], ["dense_weight_grad", "rectify", "sgd"]),
        ([("rectify", "z", "dz"), ("rectify", "z", "w")], ["dense_weight_grad", "rectify", "rectify", "sgd"]),
        ([("sgd", "p", "p", "g", "lr")], ["dense_weight_grad", "sgd", "sgd"]),
    ],
)
def test_a_product_takes_the_step_when_it_may(engine, between, becomes):
    """When nobody reads the weights any more and the rate is known; not where others need the gradient as it was."""
    assert kernels(engine, GRADIENT, *between, SGD) == becomes


def test_who_reads_a_gradient_later_finds_it(engine):
    later = ("relu_forward", "y", "dw", "other")
    assert kernels(engine, GRADIENT, SGD, later) == ["dense_weight_grad", "sgd", "relu_forward"]
