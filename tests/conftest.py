"""What the tests share: every engine that is installed here, both float types, fixed random numbers."""

import os
import sys

import numpy as np
import pytest

import fastbp
from fastbp.kernels import numba_cache

CUDA_ON_HOST = bool(os.environ.get("FASTBP_CUDA_ON_HOST"))
if CUDA_ON_HOST:  # run all tests on the GPU engine, too, where there is no GPU
    from .cuda import standin

    standin.install()

ENGINES = [info.name for info in fastbp.engines() if info.available]


@pytest.fixture(
    params=[
        info.name if info.available else pytest.param(info.name, marks=pytest.mark.skip(reason=info.why_not))
        for info in fastbp.engines()
    ]
)
def engine(request):
    return fastbp.engine(request.param)


@pytest.fixture(params=[info.name for info in fastbp.engines() if info.available and info.device == "cpu"])
def cpu_engine(request):
    """For what is about NumPy's own memory, or about processes that share it."""
    return fastbp.engine(request.param)


@pytest.fixture
def engine_in_use(engine):
    """For all that is made without saying on which engine."""
    with fastbp.use(engine):
        yield engine


@pytest.fixture
def installed_engine(engine):
    """For processes of their own, in which nothing stands in for CuPy."""
    if CUDA_ON_HOST and engine.name == "cupy":
        pytest.skip("CuPy is not installed")
    return engine


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _no_engine_chosen(monkeypatch):
    """Tests choose engines themselves, and leave no choice behind."""
    monkeypatch.delenv("FASTBP_ENGINE", raising=False)
    yield
    fastbp.set_default(None)


@pytest.fixture(autouse=True)
def _kernels_are_kept(monkeypatch):
    """What cannot be kept on disk would be compiled again by each process, with no more than a warning."""
    monkeypatch.setattr(numba_cache, "say_uncached", pytest.fail)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Make it look as if a package were installed that brings engines."""

    def install(code, **engines):
        about = tmp_path / "brought-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in engines.items()]
        (about / "entry_points.txt").write_text("\n".join(["[fastbp.engines]", *lines]))
        (tmp_path / "brought.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("brought", None)
    fastbp.selection._load.cache_clear()
