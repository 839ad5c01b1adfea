"""What the tests share: every engine that is installed here, both float types, fixed random numbers."""

import os

import numpy as np
import pytest

import fastbp

if os.environ.get("FASTBP_CUDA_ON_HOST"):  # run all tests on the GPU engine, too, where there is no GPU
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
