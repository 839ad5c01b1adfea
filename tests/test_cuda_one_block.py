"""What one block of threads keeps in its shared memory for a run of steps, on the stand-in for a GPU."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastbp
from fastbp.kernels.cupy_sources import SOURCES, source
from fastbp.kernels.engine import Call
from fastbp.kernels.ops import OPS

from .checks import assert_same_parameters, state_of
from .cuda import standin

pytestmark = pytest.mark.skipif(standin.COMPILER is None, reason="needs g++")

REPLAY = standin.replay_module()
ASKED = standin.shared_memory_asked_for
X, LABELS, WEIGHTS = np.random.default_rng(0).standard_normal((31, 4)), np.arange(31) % 3, np.linspace(0.1, 2, 31)
PLAIN = fastbp.Dense(4, 9), fastbp.ReLU(), fastbp.Dense(9, 3)
NORMAL = fastbp.Dense(4, 9), fastbp.Tanh(), fastbp.BatchNorm(9), fastbp.Dropout(0.3), fastbp.Dense(9, 3)
DEEP = fastbp.Dense(4, 5), fastbp.LayerNorm(5), fastbp.Residual(fastbp.Dense(5, 5)), fastbp.Dense(5, 3)
OPTIMIZERS = {
    "SGD": (PLAIN, fastbp.SGD(0.1)),
    "momentum": (PLAIN, fastbp.SGD(0.1, momentum=0.9, nesterov=True)),
    "Adam": (NORMAL, fastbp.Adam(0.02, clip_norm=1.0, weight_decay=0.1, schedule=fastbp.CosineAnnealingLR(4))),
    "RMSprop": (DEEP, fastbp.RMSprop(0.01, momentum=0.9, centered=True, l1=0.01)),
    "Lion": (PLAIN, fastbp.Lion(0.01)),
}


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(REPLAY, "SMALL", 10**9)
    return standin.engine_on_host()


@pytest.fixture
def room(monkeypatch):
    """Say how many bytes of shared memory a launch may ask for."""
    available = REPLAY.shared_memory_of
    return lambda size: monkeypatch.setattr(REPLAY, "shared_memory_of", lambda kernel: min(size, available(kernel)))


def model_of(engine, layers, optimizer, dtype):
    options = {"loss": fastbp.SoftmaxCrossEntropy(label_smoothing=0.1), "engine": engine, "dtype": dtype, "seed": 0}
    return fastbp.Sequential(copy.deepcopy(layers), optimizer=copy.deepcopy(optimizer), **options)


def fit(model, epochs=4):
    """Train on batches of 7 and of 3 rows; between two epochs, the host changes weights and the learning rate."""

    def change(model, _):
        model.layers[0].weights *= 0.9
        model.optimizer.lr *= 0.9

    return model.fit(X, LABELS, sample_weight=WEIGHTS, epochs=epochs, batch_size=7, callbacks=[change], verbose=False)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_where_arrays_lie_changes_no_bit(engine, room, name, dtype, monkeypatch):
    near = fit(model_of(engine, *OPTIMIZERS[name], dtype))
    all_of_it = ASKED["replay"]
    for size in (all_of_it - 1, all_of_it // 2, 0):
        room(size)
        assert state_of(fit(model_of(engine, *OPTIMIZERS[name], dtype))) == state_of(near)
        assert 0 < ASKED["replay"] <= size if size else ASKED["replay"] == 0
    monkeypatch.setattr(REPLAY, "SMALL", 0)
    graph = fit(model_of(engine, *OPTIMIZERS[name], dtype))
    assert_same_parameters(near, graph, rtol=1e-4 if dtype == "float32" else 1e-10)


def test_all_but_the_slots_lies_in_shared_memory(engine):
    model = model_of(engine, *OPTIMIZERS["Adam"], "float32")
    with model.training() as trainer:
        trainer.bind(model.checked(X, LABELS, WEIGHTS), 31)
        trainer.epoch()
        replay, slots = trainer._replays[0][0]._program, trainer._slots
        words, moved, spans = (x.get() for x in replay._run._tables)
    far = [x.data.ptr for x in slots.values()]
    assert sorted(slots) == ["X", "order", "rates", "weights", "y"]
    assert set(words[(moved == 0) & (words > 1 << 32)]) == set(far)  # where else the heap has its addresses
    assert set(words[moved == 1]) >= set(spans[1::3]) and not set(far) & set(spans[0::3])
    assert not replay._room.get()[0]  # blocks that came to an end, between launches


def test_networks_of_the_same_kernels_share_them(engine):
    """One needs more shared memory than there is unasked; the other is made ready before the first runs."""
    wide, narrow = (
        model_of(engine, [fastbp.Dense(4, width), fastbp.ReLU(), fastbp.Dense(width, 3)], fastbp.SGD(0.1), "float64")
        for width in (260, 5)
    )
    with wide.training() as first, narrow.training() as second:
        first.bind(wide.checked(X, LABELS), 31)
        second.bind(narrow.checked(X, LABELS), 31)
        first.epoch()
        assert ASKED["replay"] > standin.SHARED_MEMORY_UNASKED
        second.epoch()
        assert ASKED["replay"] < standin.SHARED_MEMORY_UNASKED


@pytest.mark.parametrize("size", [48 << 10, 64 << 10, 227 << 10])
def test_no_more_is_asked_for_than_a_device_has(engine, monkeypatch, size):
    attributes = standin.Device.attributes | {"MaxSharedMemoryPerBlockOptin": size}
    monkeypatch.setattr(standin.Device, "attributes", attributes)
    fit(model_of(engine, [fastbp.Dense(4, 1500), fastbp.Dense(1500, 3)], fastbp.Adam(), "float64"), 1)
    kernel = standin.cupy.RawModule(code=source(["products"], "float32")).get_function("dense_forward")
    available = REPLAY.shared_memory_of(kernel)
    assert 0 < ASKED["replay"] < available + kernel.shared_size_bytes == size
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        kernel.max_dynamic_shared_size_bytes = available + 1
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        kernel((1, 1), (1, 1), (), shared_mem=available + 1)


def test_memory_of_slots_is_not_moved_and_any_other_is(engine):
    """A slot that shows weights which each step changes, and a table that is no slot: odd bytes, backwards."""
    weights, gradients = engine.asarray(np.arange(6.0)), engine.asarray(np.ones(6))
    rows, cursor, batch, other = engine.integers(0, 0), engine.integers(0), *engine.zeros((2, 2, 3), np.float64)
    table = engine.asarray(np.arange(-30, 31, dtype=np.int8))[1:].reshape(20, 3)[::-1]
    program = engine.program(
        [
            Call(OPS["next_batch"], ("order", cursor, rows)),
            Call(OPS["take"], ("X", rows, batch)),
            Call(OPS["take"], (table, rows, other)),
            Call(OPS["sgd"], (weights, gradients, engine.scalar(0.5))),
        ]
    )
    program.bind(X=weights.reshape(2, 3), order=engine.integers(1, 0, 1, 0))
    program.run(2)
    assert ASKED["replay"] > 0 and cursor.tolist() == [4] and weights.tolist() == [-1, 0, 1, 2, 3, 4]
    assert batch.tolist() == [[2.5, 3.5, 4.5], [-0.5, 0.5, 1.5]]
    assert other.tolist() == [[25, 26, 27], [28, 29, 30]]


def test_places():
    """Those used most for their size come first, at multiples of 16; views are one span; what is fixed stays."""
    used = [range(100, 140), range(120, 160), range(500, 508), range(1000, 1100), range(1050, 1051), range(7, 7)]
    fixed = [range(1090, 1200)]
    expected = {range(500, 508): 32, range(100, 160): 48}
    assert REPLAY.places_for(used, fixed, 24, 108) == expected
    assert REPLAY.places_for(used, fixed, 24, 107) == {range(500, 508): 32}
    assert REPLAY.places_for(used * 2, fixed, 24, 108) == expected
    often = [*used, *[range(130, 131)] * 20]
    assert REPLAY.places_for(often, fixed, 24, 108) == {range(100, 160): 32, range(500, 508): 96}
    assert REPLAY.places_for(used, fixed, 24, 24) == REPLAY.places_for([], fixed, 0, 100) == {}


# what runs under the sanitizers, in a process that a fault may end: a network far, and near with a changed kernel
COMPARED = """
import sys
from fastbp.kernels.cupy_sources import SOURCES
from tests import test_cuda_one_block as here
from tests.checks import state_of
from tests.cuda import standin
standin.OPTIONS += "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"
here.REPLAY.SMALL, available = 10**9, here.REPLAY.shared_memory_of
def train(size):
    here.REPLAY.shared_memory_of = lambda kernel: min(size, available(kernel))
    return state_of(here.fit(here.model_of(standin.engine_on_host(), *here.OPTIMIZERS["Adam"], "float32"), 2))
far = train(0)
old, new = sys.argv[1:]
SOURCES["replay"] = SOURCES["replay"].replace(old, new)
here.REPLAY.module_of_parts.cache_clear()
print("the same" if train(1 << 20) == far else "different")
"""


def compared(old, new):
    path = subprocess.run([standin.COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout
    if not Path(path.strip()).is_file():
        pytest.skip("needs the address sanitizer of g++")
    environment = os.environ | {"LD_PRELOAD": path.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command, root = [sys.executable, "-c", COMPARED, old, new], Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_all_stays_within_bounds():
    done = compared("CASES", "CASES")
    assert done.stdout == "the same\n", done.stderr[-3000:]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("__syncthreads();\n    for (; steps", "for (; steps"),
        ("; __syncthreads())", ";)"),
        ("EACH(i, table.size)", "EACH(i, table.size - 2)"),
        ("(Index)near;", "((Index)near + 8);"),
        ("(Index)near;", "((Index)near + 1);"),
        ("spans[i + 1];", "spans[i + 1] + 16;"),
        ("EACH(i, pieces)", "EACH(i, pieces - 1)"),
        ("i < size;", "i < size - 1;"),
        ("i < spans.size;", "i < spans.size - 3;"),
        ("copy_all(spans, false);", ""),
        ("copy_all(spans, true);", ""),
    ],
)
def test_a_fault_is_found(old, new):
    assert old in SOURCES["replay"]
    done = compared(old, new)
    assert "CalledProcessError" not in done.stderr  # as where what was changed does not compile
    assert done.returncode or done.stdout == "different\n"
