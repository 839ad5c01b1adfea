"""What the tests share: every engine that is installed here, both float types, fixed random numbers."""

import numpy as np
import pytest

import fastbp

ENGINES = [info.name for info in fastbp.engines() if info.available]


@pytest.fixture(params=ENGINES)
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
