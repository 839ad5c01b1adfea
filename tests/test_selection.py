"""Which engine computes."""

import contextvars
import copy
import importlib.machinery
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest

import fastbp
from fastbp.__main__ import main
from fastbp.kernels import cublaslt

from .checks import assert_allclose, assert_array_equal
from .conftest import CUDA_ON_HOST, ENGINES

numba_too = pytest.mark.skipif("numba" not in ENGINES, reason="needs two engines")


def chosen():
    return fastbp.Dense(1, 1).engine.name


@pytest.fixture
def hide(monkeypatch):
    """Make a module look as if it were not installed."""
    find = importlib.util.find_spec

    def hide(name):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda module, *rest: None if module == name else find(module, *rest)
        )
        fastbp.selection._load.cache_clear()

    yield hide
    fastbp.selection._load.cache_clear()


def test_numpy_is_the_last_resort(monkeypatch):
    assert chosen() == fastbp.engine().name == "numpy"
    monkeypatch.setenv("FASTBP_ENGINE", "")
    assert chosen() == "numpy"


@numba_too
def test_the_order_of_choices(monkeypatch):
    monkeypatch.setenv("FASTBP_ENGINE", "numba")
    assert chosen() == "numba"
    fastbp.set_default("numpy")
    assert chosen() == "numpy"
    with fastbp.use("numba") as engine:
        assert chosen() == engine.name == "numba"
        with fastbp.use("numpy"):
            assert chosen() == "numpy"
            assert fastbp.Dense(1, 1, engine="numba").engine.name == "numba"
            assert fastbp.Sequential([fastbp.Dense(1, 1)], engine="numba").engine.name == "numba"
        assert chosen() == "numba"
    assert chosen() == "numpy"
    fastbp.set_default(None)
    assert chosen() == "numba"


@numba_too
def test_use_ends_with_an_error_too():
    with pytest.raises(RuntimeError), fastbp.use("numba"):
        raise RuntimeError
    assert chosen() == "numpy"


@numba_too
def test_bound_when_built():
    with fastbp.use("numba"):
        layer, model = fastbp.Dense(1, 1), fastbp.Sequential([fastbp.ReLU()])
    assert layer.engine.name == model.engine.name == "numba"


@numba_too
def test_use_is_of_its_thread_and_set_default_of_all():
    seen = {}

    def look(name):
        seen[name] = chosen()

    def in_thread(name):
        thread = threading.Thread(target=contextvars.Context().run, args=(look, name))
        thread.start()
        thread.join()

    with fastbp.use("numba"):
        in_thread("used elsewhere")
    fastbp.set_default("numba")
    in_thread("default")
    assert seen == {"used elsewhere": "numpy", "default": "numba"}


def test_an_engine_itself_is_a_choice(engine):
    assert fastbp.engine(engine) is engine
    assert fastbp.Dense(1, 1, engine=engine).engine is engine
    with fastbp.use(engine):
        assert chosen() == engine.name
    fastbp.set_default(engine)
    assert chosen() == engine.name


@pytest.mark.parametrize("name", ["torch", "NumPy", 7])
def test_unknown_engines(name, monkeypatch):
    match = rf"engine must be one of numpy, numba, cupy.*, got {name!r}"
    for choose in (fastbp.engine, fastbp.set_default, lambda name: fastbp.use(name).__enter__()):
        with pytest.raises(ValueError, match=match):
            choose(name)
    assert chosen() == "numpy"
    monkeypatch.setenv("FASTBP_ENGINE", str(name))
    with pytest.raises(ValueError, match="engine must be one of numpy, numba, cupy"):
        fastbp.engine()


def test_an_engine_that_is_not_installed(hide, monkeypatch):
    hide("numba")
    info = next(info for info in fastbp.engines() if info.name == "numba")
    assert not info.available and "numba" in info.why_not and "pip install 'fastbp[numba]'" in info.why_not
    match = r"engine 'numba' is not available: numba missing; install it with: pip install 'fastbp\[numba\]'"
    with pytest.raises(fastbp.EngineNotAvailable, match=match):
        fastbp.Sequential([fastbp.Dense(1, 1)], engine="numba")
    with pytest.raises(ValueError, match=match), fastbp.use("numba"):
        pass
    with pytest.raises(ImportError, match=match):
        fastbp.set_default("numba")
    monkeypatch.setenv("FASTBP_ENGINE", "numba")
    with pytest.raises(fastbp.EngineNotAvailable, match=match):
        fastbp.Dense(1, 1)


def test_numba_without_its_compiler_is_not_available(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    info = next(info for info in fastbp.engines() if info.name == "numba")
    assert not info.available and "NUMBA_DISABLE_JIT" in info.why_not
    with pytest.raises(fastbp.EngineNotAvailable, match=r"Numba's compiler missing; .* leave NUMBA_DISABLE_JIT unset"):
        fastbp.Dense(1, 1, engine="numba")


@pytest.mark.skipif(CUDA_ON_HOST, reason="nothing is lacking where something stands in for it")
@pytest.mark.parametrize(
    ("lacking", "text"),
    [
        ("cupy", "cupy missing"),
        ("NVRTC", "the CUDA library NVRTC missing"),
        ("cuBLAS", "the CUDA library cuBLAS missing"),
        ("GPU", "an NVIDIA GPU with a driver missing"),
        ("all", "the CUDA library NVRTC and the CUDA library cuBLAS and an NVIDIA GPU with a driver missing"),
    ],
)
def test_what_the_gpu_engine_lacks(hide, monkeypatch, lacking, text):
    def look(name):
        if lacking in (name, "all"):
            raise OSError("no such library")

    cupy = types.ModuleType("cupy")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    cupy.cuda = types.SimpleNamespace(nvrtc=types.SimpleNamespace(getVersion=lambda: look("NVRTC")))
    cupy.is_available = lambda: lacking not in ("GPU", "all")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cublaslt, "load_libraries", lambda: look("cuBLAS"))
    hide("cupy" if lacking == "cupy" else "")
    info = next(info for info in fastbp.engines() if info.name == "cupy")
    assert info[:3] == ("cupy", False, "cuda") and info.why_not.startswith(f"{text}; ")
    match = rf"engine 'cupy' is not available: {text}; install it with: pip install 'fastbp\[cuda\]'"
    with pytest.raises(fastbp.EngineNotAvailable, match=match):
        fastbp.Dense(1, 1, engine="cupy")


def test_engines_are_listed(engine):
    info = next(info for info in fastbp.engines() if info.name == engine.name)
    assert info == (engine.name, True, engine.device, "")
    assert fastbp.engines()[0].name == "numpy"


def test_an_engine_is_made_once_and_pickles(engine):
    assert fastbp.engine(engine.name) is engine
    again = pickle.loads(pickle.dumps(engine))
    assert again.name == engine.name
    assert_array_equal(again.relu_forward(-np.ones((1, 2))), [[0, 0]])
    assert copy.deepcopy(engine) is engine
    assert engine.name in repr(engine) and engine.device in repr(engine)


def test_importing_loads_no_array_library():
    libraries = "numpy", "numba", "cupy", "llvmlite", "scipy", "pandas", "torch"
    code = f"import sys, fastbp; print({{*{libraries}}} & set(sys.modules))"
    environment = {k: v for k, v in os.environ.items() if k != "FASTBP_ENGINE"}
    for variables in ({}, {"FASTBP_ENGINE": "numba"}):
        answer = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment | variables
        )
        assert answer.stdout.strip() == "set()"


def test_modules_are_attributes_of_the_package():
    for code in ("estimators.from_sklearn", "files.save", "notebook.ActivationRelU"):
        subprocess.run([sys.executable, "-c", f"import fastbp; fastbp.{code}"], check=True)
    with pytest.raises(AttributeError, match="module 'fastbp' has no attribute 'nowhere'"):
        fastbp.nowhere  # noqa: B018


BROUGHT = """
import sys
from fastbp.kernels.engine import Engine
from fastbp.kernels.numpy_engine import NumpyEngine
class Abacus(NumpyEngine):
    name, device = "abacus", "wood"
class Nameless(Engine):
    device = "wood"
class Nowhere(Engine):
    name = "abacus"
class Bare(Nowhere):
    device = "wood"
def gone():
    sys.exit("no beads, no engine")
class Other(NumpyEngine):
    name = "numpy"
def broken():
    raise RuntimeError("beads are missing")
"""


def test_engines_of_other_packages(installed, capsys):
    installed(BROUGHT, abacus="brought:Abacus")
    assert fastbp.engine("abacus").device == "wood"
    assert fastbp.engines()[-1] == ("abacus", True, "wood", "")
    model = fastbp.Sequential([fastbp.Dense(2, 1)], engine="abacus", seed=0)
    assert model.engine is fastbp.engine("abacus") and pickle.loads(pickle.dumps(model)).engine.name == "abacus"
    main(["info"])
    assert re.search(r"abacus +wood +available", capsys.readouterr().out)
    assert main(["check", "abacus", "--ops", "relu_forward"]) == 0


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("brought:broken", r"brought:broken, cannot be loaded: RuntimeError\('beads are missing'\)"),
        ("brought:Nothing", "cannot be loaded: AttributeError"),
        ("nowhere:Abacus", "cannot be loaded: ModuleNotFoundError"),
        ("brought:gone", r"cannot be loaded: SystemExit\('no beads, no engine'\)"),
        ("brought:Other", "must be an Engine of that name with a device, got Other of name 'numpy' and device 'cpu'"),
        ("brought:Nameless", "got Nameless of name None and device 'wood'"),
        ("brought:Nowhere", "got Nowhere of name 'abacus' and device None"),
        ("builtins:dict", "got dict of name None and device None"),
    ],
)
def test_a_broken_engine_says_so_and_breaks_nothing_else(installed, value, match, capsys):
    installed(BROUGHT, abacus=value)
    with pytest.raises(fastbp.EngineNotAvailable, match=match):
        fastbp.engine("abacus")
    info = fastbp.engines()[-1]
    assert info.name == "abacus" and not info.available and re.search(match, info.why_not)
    main(["info"])
    assert re.search(match, capsys.readouterr().out)
    assert fastbp.engine("numpy").name == "numpy"
    with pytest.raises(ValueError, match="engine must be one of numpy, numba, cupy, abacus or auto, got 'abax'"):
        fastbp.engine("abax")


def test_two_packages_with_an_engine_of_one_name(installed, tmp_path):
    installed(BROUGHT, abacus="brought:Abacus")
    again = tmp_path / "again-1.0.dist-info"
    again.mkdir()
    (again / "METADATA").write_text("Metadata-Version: 2.1\nName: again\nVersion: 1.0\n")
    (again / "entry_points.txt").write_text("[fastbp.engines]\nabacus = brought:Abacus")
    assert fastbp.engine("abacus").device == "wood"  # the same one, found twice
    fastbp.selection._load.cache_clear()
    (again / "entry_points.txt").write_text("[fastbp.engines]\nabacus = brought:Nameless")
    match = "engine 'abacus' is brought by more than one package: brought:Abacus and brought:Nameless"
    with pytest.raises(fastbp.EngineNotAvailable, match=match):
        fastbp.engine("abacus")
    assert fastbp.engines()[-1] == ("abacus", False, "", match)


def test_an_engine_without_kernels_is_told_what_it_lacks(installed):
    installed(BROUGHT, abacus="brought:Bare")
    (failure,) = fastbp.check("abacus", ["relu_forward"]).failures
    assert "Bare must define supports(op)" in failure.message


def test_fastbps_own_names_cannot_be_taken(installed):
    installed(BROUGHT, numpy="brought:Other")
    assert type(fastbp.engine("numpy")).__module__ == "fastbp.kernels.numpy_engine"
    assert [info.name for info in fastbp.engines()].count("numpy") == 1


def test_the_engine_in_the_docs_keeps_its_promises(installed):
    page = (Path(__file__).parent.parent / "docs" / "engines.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    name, value = re.search(r"entry-points.*\n(\w+) = \"(.*)\"", page).groups()
    installed(code, **{name: value.replace("einsum_engine", "brought")})
    report = fastbp.check(name)
    assert report.passed, f"\n{report}"
    X, y = fastbp.spiral_data(20, 3, seed=0)
    models = [
        fastbp.Sequential(
            [fastbp.Dense(2, 8), fastbp.ReLU(), fastbp.Dense(8, 3)],
            loss=fastbp.SoftmaxCrossEntropy(),
            optimizer=fastbp.Adam(0.01),
            engine=engine,
            dtype=np.float64,
            seed=0,
        ).fit(X, y, epochs=3)
        for engine in (name, "numpy")
    ]
    assert_allclose(*(model.predict_proba(X) for model in models), rtol=1e-9)


def test_a_fault_in_the_docs_engine_is_found(installed):
    page = (Path(__file__).parent.parent / "docs" / "engines.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    installed(code.replace("    z += b\n", ""), einsum="brought:EinsumEngine")
    report = fastbp.check("einsum", ["dense_forward", "dense_input_grad"])
    assert {failure.op for failure in report.failures} == {"dense_forward"}
