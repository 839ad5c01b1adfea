"""The GPU's own clock, on the stand-in: what ``fastbp bench`` tells apart."""

import numpy as np
import pytest

from fastbp.benchmarks import devices
from fastbp.kernels.engine import Call
from fastbp.kernels.ops import OPS

from . import standin

pytestmark = pytest.mark.skipif(standin.COMPILER is None, reason="needs g++")


@pytest.fixture
def engine():
    return standin.engine_on_host()


@pytest.fixture
def relu(engine):
    """A replay of one kernel, and what it writes."""
    x, y = engine.asarray(np.float32([[-1, 2]])), engine.empty((1, 2), np.float32)
    program = engine.program([Call(OPS["relu_forward"], (x, y))])
    program.bind()
    return program, y


@pytest.mark.parametrize(("name", "kernels"), [("relu_forward", 1), ("mean_squared_error", 2)])
def test_phases_of_an_op(engine, rng, name, kernels):
    op, sizes = OPS[name], {"B": 4, "N": 3}
    inputs = op.sample(rng, sizes, np.dtype(np.float32))
    found = devices.phases(engine, devices.timing_of(engine), op, inputs, sizes)
    assert set(found) == {"transfer", "compile", "first call", "launch", "device"}
    assert min(found.values()) > 0
    assert found["device"] == pytest.approx(kernels * standin.KERNEL_SECONDS)


def test_compiling_runs_nothing(engine):
    before, x, y = standin.clock.seconds, engine.asarray(np.ones((1, 2))), engine.empty((1, 2), np.float64)
    engine.timing.compile(OPS["relu_forward"], [x, y])
    assert standin.clock.seconds == before and np.isnan(y.get()).all()


def test_the_gpu_starts_when_all_is_launched(engine, relu):
    program, y = relu
    found = []

    def run():
        program.run(3)
        found.append(y.get())

    assert engine.timing.device_seconds(run) == pytest.approx(3 * standin.KERNEL_SECONDS)
    assert np.isnan(found).all()
    np.testing.assert_array_equal(y.get(), [[0, 2]])


def test_an_error_while_launching_leaves_the_gpu_free(engine, relu):
    program, y = relu

    def run():
        program.run(1)
        raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        engine.timing.device_seconds(run)
    engine.timing.synchronize()
    np.testing.assert_array_equal(y.get(), [[0, 2]])
