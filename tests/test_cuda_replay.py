"""Models on the GPU engine, replayed as one kernel and as graphs: on a GPU where there is one, else on the host."""

import copy
import importlib
import pickle

import numpy as np
import pytest

import fastbp

from .checks import assert_same_parameters, parameters_of
from .conftest import CUDA_ON_HOST, ENGINES
from .cuda import standin

ON_GPU = "cupy" in ENGINES and not CUDA_ON_HOST
pytestmark = pytest.mark.skipif(not ON_GPU and standin.COMPILER is None, reason="needs a GPU, or g++")
on_host = pytest.mark.skipif(ON_GPU, reason="looks into what stands for a GPU")
MODULE = importlib.import_module("fastbp.kernels.cupy_replay") if ON_GPU else standin.replay_module()
X, Y = fastbp.spiral_data(40, 3, seed=0)


@pytest.fixture
def engine():
    return fastbp.engine("cupy") if ON_GPU else standin.engine_on_host()


@pytest.fixture(params=[1, 8, 0], ids=["in one block", "in a cluster", "as a graph"])
def way(request, monkeypatch):
    if ON_GPU and request.param > 1 and int(MODULE.cupy.cuda.Device().compute_capability) < 90:
        pytest.skip("the GPU has no clusters")
    monkeypatch.setattr(MODULE, "blocks_for", lambda *_: [request.param] * (request.param > 0))
    return request.param


def model_on(engine, dtype=np.float64, optimizer=None):
    layers = [fastbp.Dense(2, 8), fastbp.ReLU(), fastbp.Dropout(0.2), fastbp.Dense(8, 8), fastbp.Tanh()]
    return fastbp.Sequential(
        [*layers, fastbp.Dense(8, 3)],
        loss=fastbp.SoftmaxCrossEntropy(),
        optimizer=optimizer or fastbp.Adam(0.01, clip_norm=1.0, schedule=fastbp.CosineAnnealingLR(10)),
        engine=engine,
        dtype=dtype,
        seed=0,
    )


def fit(model, epochs=3):
    return model.fit(X, Y, epochs=epochs, batch_size=7, validation_data=(X, Y), verbose=False)


def test_training_gives_what_numpy_gives(engine, way):
    model, reference = fit(model_on(engine)), fit(model_on("numpy"))
    assert_same_parameters(model, reference, rtol=1e-8)
    for name, values in reference.history.items():
        np.testing.assert_allclose(model.history[name], values, rtol=1e-8, err_msg=name)
    np.testing.assert_allclose(model.predict_proba(X), reference.predict_proba(X), rtol=1e-8)
    again = fit(model_on(engine))
    assert {name: x.tobytes() for name, x in parameters_of(again).items()} == {
        name: x.tobytes() for name, x in parameters_of(model).items()
    }


def test_a_saved_model_goes_on_without_a_gpu_and_back(engine, way, tmp_path):
    pytest.importorskip("safetensors")
    model = fit(model_on(engine))
    model.save(tmp_path / "model.safetensors")
    loaded = fastbp.load(tmp_path / "model.safetensors", engine="numpy")
    assert loaded.engine.name == "numpy" and isinstance(loaded.memory.parameters, np.ndarray)
    back = fastbp.load(tmp_path / "model.safetensors", engine=engine)
    for other in (loaded, back):
        assert_same_parameters(other, model, rtol=1e-12)
    trained = parameters_of(fit(model))
    for other in (loaded, back):
        assert_same_parameters(fit(other), trained, rtol=1e-8)


def test_a_callback_moves_a_model_to_a_gpu_and_back(engine, way):
    def move(model, figures):
        model.move_to({1: engine, 2: "numpy"}.get(len(model.history["loss"]), model.engine))

    model = model_on("numpy").fit(X, Y, epochs=4, batch_size=7, callbacks=[move], verbose=False)
    reference = model_on("numpy").fit(X, Y, epochs=4, batch_size=7, verbose=False)
    assert_same_parameters(model, reference, rtol=1e-8)
    np.testing.assert_allclose(model.history["loss"], reference.history["loss"], rtol=1e-8)


def test_copies_and_pickles_are_as_the_model(engine, way):
    model = fit(model_on(engine))
    stored = pickle.dumps(model)
    assert b"cupy.ndarray" not in stored and b"ndarray" in stored
    for other in (copy.deepcopy(model), pickle.loads(stored)):
        assert other.engine.name == "cupy"
        assert_same_parameters(other, model, rtol=0)
        fit(other, 1)
    assert_same_parameters(other, fit(model, 1), rtol=1e-12)


def test_a_replay_is_made_anew_for_other_data(engine, way):
    model, reference = model_on(engine), model_on("numpy")
    for data, labels in ((X, Y), (X[:20].astype(np.float32), Y[:20]), (X[::-2], Y[::-2])):
        for each in (model, reference):
            each.fit(data, labels, epochs=2, batch_size=10, verbose=False)
    assert_same_parameters(model, reference, rtol=1e-8)


def test_float32_and_gradients_added_up(engine, way):
    kinds = fastbp.SGD(0.1, momentum=0.9), fastbp.SGD(0.1)
    for make in kinds:
        model, reference = (model_on(e, np.float32, copy.deepcopy(make)) for e in (engine, "numpy"))
        for each in (model, reference):
            each.fit(X, Y, epochs=2, batch_size=8, accumulate=3, verbose=False)
        assert_same_parameters(model, reference, rtol=1e-4)


@on_host
def test_an_epoch_neither_allocates_nor_waits(engine, way):
    model = model_on(engine, optimizer=fastbp.Adam(0.01))
    with model.training() as trainer:
        trainer.bind(model.checked(X, Y), 8)
        trainer.epoch()
        trainer.epoch()
        tape, steps = trainer._replays[0]
        model.memory.start_epoch()
        standin.counted.clear()
        tape.run(steps)
        assert not standin.counted
        standin.counted.clear()
        standin.copied.clear()
        trainer.epoch()
        assert standin.counted["allocations"] == standin.counted["uploads"] == 0
        assert set(standin.copied) == {16, 1}  # bytes: the loss and what it is of, and whether weights are finite


@on_host
def test_data_are_uploaded_once(engine, way):
    seen = []
    model = model_on(engine, optimizer=fastbp.Adam(0.01))
    table = type(engine).table
    try:
        type(engine).table = lambda self, x: seen.append(np.shape(x)) or table(self, x)
        model.fit(X, Y, epochs=3, batch_size=8, callbacks=[lambda *_: None], verbose=False)
    finally:
        type(engine).table = table
    assert seen.count(X.shape) == 1


def test_precision(engine):
    for precision, tolerance in (("fp32", 1e-6), ("tf32", 2e-3), ("bf16", 2e-2)):
        model = fastbp.Sequential([fastbp.Dense(64, 8)], engine=engine, precision=precision, seed=0)
        reference = fastbp.Sequential([fastbp.Dense(64, 8)], seed=0)
        assert model.engine.precision == precision and pickle.loads(pickle.dumps(model)).engine.precision == precision
        x = np.random.default_rng(0).standard_normal((16, 64), np.float32)
        wanted = reference.predict(x)
        np.testing.assert_allclose(model.predict(x), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
    with pytest.raises(ValueError, match="precision must be 'fp32', 'tf32', 'bf16', got 'fp8'"):
        fastbp.Sequential([fastbp.Dense(1, 1)], engine=engine, precision="fp8")
    with pytest.raises(ValueError, match="precision='tf32' needs dtype float32, got float64"):
        fastbp.Sequential([fastbp.Dense(1, 1)], engine=engine, precision="tf32", dtype="float64")


def test_precision_stays(engine, tmp_path, monkeypatch):
    """Where a model is loaded, moved to an engine by its name, or made for an engine that has one."""
    pytest.importorskip("safetensors")
    load = fastbp.selection._load
    monkeypatch.setattr(fastbp.selection, "_load", lambda name: engine if name == "cupy" else load(name))
    model = fastbp.Sequential([fastbp.Dense(64, 8)], engine="cupy", precision="bf16", seed=0)
    model.save(tmp_path / "model.safetensors")
    half, x = model.engine, np.random.default_rng(0).standard_normal((16, 64), np.float32)
    loaded = fastbp.load(tmp_path / "model.safetensors", engine="cupy")
    assert loaded.engine is half and loaded.predict(x).tobytes() == model.predict(x).tobytes()
    assert fastbp.load(tmp_path / "model.safetensors", engine=engine).engine is engine
    assert fastbp.load(tmp_path / "model.safetensors", engine="numpy").engine.name == "numpy"
    assert model.move_to("cupy").engine is half and model.move_to(engine).engine is engine
    assert fastbp.Sequential([fastbp.Dense(1, 1)], engine=half).engine is half
    assert fastbp.Sequential([fastbp.Dense(1, 1)], engine=half, precision="fp32").engine is engine


def test_a_process_has_one_engine_of_a_precision(engine):
    for each in (engine, engine.at_precision("tf32")):
        assert pickle.loads(pickle.dumps(each)) is each is engine.at_precision(each.precision)


def test_precision_of_an_engine_that_has_one():
    with pytest.raises(ValueError, match="precision must be 'fp32' on engine 'numpy', got 'bf16'"):
        fastbp.Sequential([fastbp.Dense(1, 1)], engine="numpy", precision="bf16")


def test_arrays_of_the_gpu_are_data_too(engine):
    given = engine.asarray(X)
    model, reference = model_on(engine), model_on("numpy")
    np.testing.assert_allclose(model.predict_proba(given), reference.predict_proba(given), rtol=1e-8)
