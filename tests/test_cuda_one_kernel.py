"""Training steps as one kernel of a block or of a cluster of blocks, on the stand-in for a GPU."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastbp
from fastbp.conformance import keep
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
def blocks(monkeypatch):
    """Say by how many blocks steps are run, 0 for a graph."""

    def blocks(count):
        monkeypatch.setattr(REPLAY, "blocks_for", lambda *_: count)

    blocks(1)
    return blocks


@pytest.fixture
def engine(blocks):
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
def test_where_arrays_lie_changes_no_bit(engine, room, blocks, name, dtype):
    near = fit(model_of(engine, *OPTIMIZERS[name], dtype))
    all_of_it = ASKED["replay"]
    for size in (all_of_it - 1, all_of_it // 2, 0):
        room(size)
        assert state_of(fit(model_of(engine, *OPTIMIZERS[name], dtype))) == state_of(near)
        assert 0 < ASKED["replay"] <= size if size else ASKED["replay"] == 0
    blocks(0)
    graph = fit(model_of(engine, *OPTIMIZERS[name], dtype))
    assert_same_parameters(near, graph, rtol=1e-4 if dtype == "float32" else 1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_order_of_blocks_changes_no_bit(engine, room, blocks, name, dtype):
    """Which is another each time."""
    blocks(8)
    first = fit(model_of(engine, *OPTIMIZERS[name], dtype))
    table = ASKED["replay"]
    again = fit(model_of(engine, *OPTIMIZERS[name], dtype))
    room(table - 1)
    assert state_of(first) == state_of(again) == state_of(fit(model_of(engine, *OPTIMIZERS[name], dtype)))
    assert ASKED["replay"] == 0 < table < 48 << 10
    blocks(1)
    in_one_block = fit(model_of(engine, *OPTIMIZERS[name], dtype))
    assert_same_parameters(first, in_one_block, rtol=1e-4 if dtype == "float32" else 1e-10)


class AsOneKernel(REPLAY.Replay):
    """A replay of calls without slots, which would be a graph, behind one that has some."""

    def __init__(self, engine, calls):
        self._order = engine.integers(0)
        first = Call(OPS["next_batch"], ("order", engine.integers(0), engine.integers(0)))
        super().__init__(engine, [first, *calls])

    def bind(self):
        super().bind(order=self._order)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_each_op_as_a_part(engine, blocks, monkeypatch, op):
    if not engine.supports(op):
        pytest.skip("is taken apart before it comes here")
    blocks(3)
    monkeypatch.setattr(standin.engine_module(), "Replay", AsOneKernel)
    result = keep(engine, op, "values")
    assert result.outcome == "passed", result


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (2, 3, 5), (33, 4, 3), (7, 64, 130), (130, 66, 1), (40, 258, 9), (70, 12, 300), (5, 2, 2100)],
)
def test_products(engine, blocks, count, dtype, rows, inputs, outputs):
    """Of tiles that are whole or not, more and fewer than threads, and of rows that begin at 16 bytes or do not."""
    blocks(count)
    rng = np.random.default_rng(rows)
    x, w, dz = (rng.standard_normal(shape) for shape in ((rows, inputs), (inputs, outputs), (rows, outputs)))
    x[0, 0] = np.nan  # which stays in its row, or column
    b = rng.standard_normal((1, outputs))
    y = np.maximum(x, 0)
    expected = {
        "dense_forward": x @ w + b, "dense_relu_forward": np.maximum(x @ w + b, 0), "dense_input_grad": dz @ w.T,
        "dense_weight_grad": x.T @ dz, "dense_relu_input_grad": np.where(y <= 0, 0, dz @ w.T),
        "dense_relu_grads": np.where(y <= 0, 0, dz @ w.T),
    }  # fmt: skip
    given = {name: engine.asarray(array, dtype) for name, array in {"x": x, "w": w, "b": b, "dz": dz, "y": y}.items()}
    order, rows_taken = engine.integers(0), engine.integers(0)
    made = {name: [engine.buffer(array.shape, dtype)] for name, array in expected.items()}
    made["dense_relu_grads"].append(engine.buffer((1, inputs), dtype))
    calls = [Call(OPS[name], (*(given[arg.name] for arg in OPS[name].inputs), *made[name])) for name in expected]
    program = engine.program([Call(OPS["next_batch"], ("order", engine.integers(0), rows_taken)), *calls])
    program.bind(order=order)
    program.run(1)
    for name, array in expected.items():
        found, scale = made[name][0].get(), inputs + outputs + rows
        np.testing.assert_allclose(found, array, atol=scale * np.finfo(dtype).eps, rtol=0, err_msg=name)
    bias = expected["dense_relu_grads"].sum(axis=0, keepdims=True)
    np.testing.assert_allclose(made["dense_relu_grads"][1].get(), bias, atol=scale * np.finfo(dtype).eps * rows, rtol=0)


@pytest.mark.parametrize(
    ("capability", "room", "work", "size", "count"),
    [
        ("90", 227, 1_000_000, 179, 1),
        ("90", 227, 1_000_000, 180, 8),
        ("90", 227, 1_000_001, 1, 8),
        ("100", 227, 10_000_000, 1 << 20, 8),
        ("90", 227, 10_000_001, 1, 0),
        ("80", 163, 2_000_000, 115, 1),
        ("80", 163, 2_000_000, 116, 0),
        ("89", 99, 2_000_001, 1, 0),
    ],
)
def test_how_many_blocks(monkeypatch, capability, room, work, size, count):
    """Room and size are in KB."""
    monkeypatch.setattr(standin.Device, "compute_capability", capability)
    monkeypatch.setattr(standin.Device, "attributes", {"MaxSharedMemoryPerBlockOptin": room << 10})
    assert REPLAY.blocks_for(work, size << 10) == count


def test_a_network_is_as_large_as_its_arrays(engine, monkeypatch):
    """Those that several calls share count once, and a user's tables not at all."""
    asked = []
    monkeypatch.setattr(REPLAY, "blocks_for", lambda *given: asked.append(given) or 1)
    w, db, dz, dw = (engine.zeros(shape, np.float64) for shape in ((8, 4), (1, 4), (6, 4), (8, 4)))
    calls = [
        Call(OPS["dense_bias_grad"], (dz, db)),
        Call(OPS["dense_weight_grad"], ("X", dz, dw)),
        Call(OPS["add"], (w, w[:], dw)),
    ]
    engine.program(calls).bind(X=engine.zeros((6, 8), np.float64))
    ((work, size),) = asked
    assert size == 8 * (32 + 4 + 24 + 32) and 2 * 6 * 8 * 4 <= work < 3 * 6 * 8 * 4


def test_only_what_needs_others_waits_for_them(engine):
    stages = standin.stages_of(
        engine,
        ("dense_bias_grad", "dz", "db"),
        ("dense_weight_grad", "x", "dz", "dw"),  # the same is read
        ("add", "dw", "x", "u"),  # what was written
        ("scale", "x", "half", "v"),
        ("scale", "u", "half", "dz"),  # what was written
        ("scale", "v", "half", "dz"),  # what is written again
        ("scale", "x", "half", "v"),  # what was read
        ("relu_forward", "x", "w"),
    )
    assert REPLAY.waiting(REPLAY.meetings(engine, stages)) == [False, False, True, False, True, True, True, False]


@pytest.mark.parametrize(
    ("calls", "waits"),
    [
        ([("relu_forward", "x", "u"), ("relu_forward", "u", "v")], [True, True]),  # it is overwritten for the next step
        ([("relu_forward", "x", "u"), ("relu_forward", "w", "v")], [True, False]),
        ([("relu_forward", "x", "u")], [True]),
    ],
)
def test_a_step_waits_for_the_step_before(engine, calls, waits):
    assert REPLAY.waiting(REPLAY.meetings(engine, standin.stages_of(engine, *calls))) == waits


def test_a_small_step_waits_six_times(engine, monkeypatch):
    """For the batch and the weights, hidden units, logits, the loss's slopes, those of hidden units, and all slopes."""
    waits, waiting = [], REPLAY.waiting
    monkeypatch.setattr(REPLAY, "waiting", lambda meet: waits.append(waiting(meet)) or waits[-1])
    options = {"loss": fastbp.SoftmaxCrossEntropy(), "optimizer": fastbp.Adam(), "engine": engine}
    model = fastbp.Sequential(copy.deepcopy(PLAIN), **options)
    model.fit(X[:28], LABELS[:28], batch_size=7, epochs=1, verbose=False)
    assert [sum(each) for each in waits] == [6]


def test_rows_are_written_down_for_whom_they_matter(engine):
    """The cursor moves on where the batch's rows are only taken; else, they are there."""
    x, order = engine.asarray(np.arange(8.0).reshape(4, 2)), engine.integers(3, 1, 2, 0)
    for also in ([], [Call(OPS["one_hot"], ("rows", engine.zeros((2, 4), np.float64)))]):
        rows, cursor, xb = engine.integers(0, 0), engine.integers(0), engine.empty((2, 2), np.float64)
        calls = [Call(OPS["next_batch"], ("order", cursor, rows)), Call(OPS["take"], ("X", rows, xb))]
        for op, arguments in also:
            t, p = rows, arguments[1]
            calls.append(Call(op, (t, p, engine.empty((2, 4), np.float64))))
        program = engine.program(calls)
        program.bind(order=order, X=x)
        program.run(2)
        assert xb.tolist() == [[4, 5], [0, 1]] and cursor.tolist() == [4]
        assert rows.tolist() == ([2, 0] if also else [0, 0])


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
    kernel = standin.cupy.RawModule(code=source(["layers"], "float32")).get_function("add_bias")
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


@pytest.mark.parametrize(
    ("count", "file", "old", "new"),
    [
        (1, "replay", "wait_for_all() { __syncthreads(); }", "wait_for_all() {}"),
        (1, "replay", "__syncthreads();\n    copy_all", "copy_all"),
        (8, "replay", "    __cluster_barrier_arrive();\n    __cluster_barrier_wait();\n", ""),
        (8, "replay", "if (*word++)", "if (word++ == words)"),
        (8, "layers", "cursor[0] += rows.size", "cursor[0] += rows.size - 1"),
        (8, "layers", "order[cursor[0] + i]", "order[cursor[0] + i % 512]"),
        (1, "products", "__syncthreads(); // what was here before has been read", ""),
        (1, "products", "        __syncthreads();\n        for (int at", "        for (int at"),
        (1, "products", "slice < slices; slice++", "slice < slices - 1; slice++"),
        (1, "products", "slice == 0; k++", "slice == 1; k++"),
        (1, "products", "+ n % TILE * across", "+ n % TILE"),
        (8, "products", "share * block_of_grid()", "(share - 1) * block_of_grid()"),
        (1, "products", "? k + 1 : begin", "? k + 1 : end - 1"),
        (1, "products", "from[3 * next]", "from[2 * next]"),
    ],
)
def test_a_fault_is_found(count, file, old, new):
    assert SOURCES[file].count(old) == 1
    expected = standin.in_process(state_with_fault, count, file, old, old)
    assert expected
    assert standin.in_process(state_with_fault, count, file, old, new) != expected


def state_with_fault(count, file, old, new):
    """What comes of training by so many blocks with other source."""
    standin.plant(file, old, new)
    REPLAY.blocks_for = lambda *_: count
    layers = fastbp.Dense(4, 90), fastbp.ReLU(), fastbp.Dense(90, 70), fastbp.ReLU(), fastbp.Dense(70, 3)
    batch = 550 if file == "layers" else 7  # more rows than threads of a block, or few
    model, rows = model_of(standin.engine_on_host(), layers, fastbp.SGD(0.1), "float64"), np.arange(3 * batch) % len(X)
    try:
        return state_of(model.fit(X[rows], LABELS[rows], batch_size=batch, epochs=1))
    except (RuntimeError, FloatingPointError):
        return None


# what runs under the sanitizers, in a process that a fault may end: a network far, and near with a changed kernel
COMPARED = """
import sys
from fastbp.kernels.cupy_sources import SOURCES
from tests import test_cuda_one_kernel as here
from tests.checks import state_of
from tests.cuda import standin
standin.OPTIONS += "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"
here.REPLAY.blocks_for, available = lambda *_: 1, here.REPLAY.shared_memory_of
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
        ("EACH_OF_BLOCK(i, table.size)", "EACH_OF_BLOCK(i, table.size - 12)"),
        ("(Word)near;", "((Word)near + 8);"),
        ("(Word)near;", "((Word)near + 1);"),
        ("spans[i + 1];", "spans[i + 1] + 16;"),
        ("EACH_OF_BLOCK(i, pieces)", "EACH_OF_BLOCK(i, pieces - 1)"),
        ("i < size;", "i < size - 1;"),
        ("i < spans.size;", "i < spans.size - 3;"),
        ("copy_all(spans, false);", ""),
        ("copy_all(spans, true);", ""),
    ],
)
def test_a_fault_of_addresses_is_found(old, new):
    assert old in SOURCES["replay"]
    done = compared(old, new)
    assert "CalledProcessError" not in done.stderr  # as where what was changed does not compile
    assert done.returncode or done.stdout == "different\n"
