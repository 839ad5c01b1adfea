"""Training steps as one kernel of a block, or of blocks that share each batch, on the stand-in for a GPU."""

import contextlib
import copy
import functools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

import fastbp
from fastbp.kernels.engine import Call
from fastbp.kernels.ops import OPS
from fastbp.trial import FLOATS, UNEVEN, Trial, expected

from .checks import assert_same_parameters, state_of
from .cuda import standin

pytestmark = pytest.mark.skipif(standin.COMPILER is None, reason="needs g++")

REPLAY, ONE = standin.replay_module(), standin.one_kernel_module()
ASKED = standin.shared_memory_asked_for
X, LABELS, WEIGHTS = np.random.default_rng(0).standard_normal((26, 4)), np.arange(26) % 3, np.linspace(0.1, 2, 26)
PLAIN = fastbp.Dense(4, 9), fastbp.ReLU(), fastbp.Dense(9, 3)
DEEP = fastbp.Dense(4, 5), fastbp.LayerNorm(5), fastbp.Residual([fastbp.Dense(5, 5), fastbp.Tanh()]), fastbp.Dense(5, 3)
NORMAL = fastbp.Dense(4, 9), fastbp.BatchNorm(9), fastbp.Dense(9, 3)
CLASSES, CLASSES_WEIGHED = fastbp.SoftmaxCrossEntropy(), fastbp.SoftmaxCrossEntropy([1, 2, 3], label_smoothing=0.1)
SQUARES = fastbp.MeanSquaredError()
ANNEALING = fastbp.CosineAnnealingLR(4)
# layers, optimizer, loss, rows of a batch: fewer than blocks, as many for each block, or not
CASES = {
    "SGD": (PLAIN, fastbp.SGD(0.1), CLASSES, 6),
    "momentum": (PLAIN, fastbp.SGD(0.1, momentum=0.9, nesterov=True, l1=0.01), CLASSES_WEIGHED, 13),
    "Adam": (DEEP, fastbp.Adam(0.02, clip_norm=0.1, weight_decay=0.1, schedule=ANNEALING), CLASSES_WEIGHED, 13),
    "AdamW": (PLAIN, fastbp.AdamW(0.02, clip_value=0.1, weight_decay=0.1), SQUARES, 12),
    "RMSprop": (PLAIN, fastbp.RMSprop(0.01, momentum=0.9, centered=True), SQUARES, 2),
}
TOLERANCES = {"float32": 1e-4, "float64": 1e-10}


@pytest.fixture
def blocks(monkeypatch):
    """Say by how many blocks to try to run steps, one after the other; a launch takes as many steps as there are."""
    monkeypatch.setattr("fastbp.steps.SLICE_SECONDS", 1e9)

    def blocks(*counts):
        monkeypatch.setattr(REPLAY, "blocks_for", lambda *_: counts)

    blocks(1)
    return blocks


@pytest.fixture
def engine(blocks):
    return standin.engine_on_host()


@pytest.fixture
def room(monkeypatch):
    """Say how many bytes of shared memory there are for arrays, behind tables."""
    places = ONE.Shares.places

    def room(size):
        monkeypatch.setattr(ONE.Shares, "places", lambda self, start, _: places(self, start, start + size))

    return room


@pytest.fixture
def sources(monkeypatch):
    """The sources of kernels, which are not compiled."""
    found = []
    kernel = mock.Mock(shared_size_bytes=0)
    module = SimpleNamespace(get_function=lambda _: kernel)
    monkeypatch.setattr(ONE, "module_of_parts", lambda source: found.append(source) or module)
    return found


def model_of(engine, layers, optimizer, loss=CLASSES, dtype="float64"):
    made = copy.deepcopy((layers, optimizer, loss))
    return fastbp.Sequential(made[0], optimizer=made[1], loss=made[2], engine=engine, dtype=dtype, seed=0)


def fit(engine, name, dtype, epochs=4):
    """A model of a case, trained; between two epochs, the host changes weights and the learning rate."""

    def change(model, _):
        model.layers[0].weights *= 0.9
        model.optimizer.lr *= 0.9

    layers, optimizer, loss, batch = CASES[name]
    rows = len(X) // batch * batch  # all batches are as large
    y = X[:rows, :3] ** 2 if loss is SQUARES else LABELS[:rows]
    model = model_of(engine, layers, optimizer, loss, dtype)
    weights = None if name == "SGD" else WEIGHTS[:rows]
    return model.fit(
        X[:rows], y, sample_weight=weights, epochs=epochs, batch_size=batch, callbacks=[change], verbose=False
    )


def runs_of(model, *data, batch=26):
    """What a model's steps on some data are run by."""
    with model.training() as trainer:
        trainer.bind(model.checked(*data), batch)
        return [tape._program._run for tape, _ in trainer._replays]


@pytest.mark.parametrize(("name", "dtype"), [("Adam", "float32"), ("momentum", "float64")])
def test_where_arrays_lie_changes_no_bit(engine, room, name, dtype):
    """Where none but tables is in shared memory, too, and no kernel is made where these have no room."""
    near, all_of_it = fit(engine, name, dtype), ASKED["replay"]
    for size in (1200, 0):
        room(size)
        assert state_of(fit(engine, name, dtype)) == state_of(near)
        assert 0 < ASKED["replay"] < all_of_it
    with_tables = ASKED["replay"]
    room(-1)
    ASKED.clear()
    assert_same_parameters(near, fit(engine, name, dtype), rtol=TOLERANCES[dtype])
    assert "replay" not in ASKED and with_tables < all_of_it


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("SGD", "float32"), ("momentum", "float64"), ("Adam", "float32"), ("Adam", "float64"), ("AdamW", "float64"),
        ("RMSprop", "float64"),
    ],
)  # fmt: skip
def test_blocks_share_a_batch(engine, blocks, monkeypatch, name, dtype):
    """They give what one block gives, and a graph, but for rounding; and the same bits in whatever order they run."""
    in_one_block = fit(engine, name, dtype)
    monkeypatch.setattr(REPLAY, "Graph", None)
    blocks(8)
    shared = fit(engine, name, dtype)
    assert state_of(shared) == state_of(fit(engine, name, dtype))
    monkeypatch.undo()
    blocks()
    graph = fit(engine, name, dtype)
    for other in (in_one_block, graph):
        assert_same_parameters(shared, other, rtol=TOLERANCES[dtype])
        np.testing.assert_allclose(shared.history["loss"], other.history["loss"], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("rows", "most", "count"),
    [(128, 8, 8), (12, 8, 6), (20, 8, 5), (13, 8, 8), (4, 8, 4), (3, 8, 3), (2, 8, 2), (1, 8, 1), (12, 4, 4)],
)
def test_how_many_blocks_share_a_batch(engine, blocks, sources, rows, most, count):
    """As many as can with as many rows each, but for too few; a single row is not shared."""
    blocks(most, 1)
    data = np.ones((rows, 4)), np.zeros(rows, np.int64)
    (run,) = runs_of(model_of(engine, PLAIN, fastbp.SGD(0.1)), *data, batch=rows)
    assert run._grid == (count, 1) and f"#define BLOCKS {count}\n" in sources[-1]


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (NORMAL, {}),
        ((*PLAIN[:2], fastbp.Dropout(0.3), PLAIN[2]), {}),
        ((fastbp.Dense(4, 2500), fastbp.Dense(2500, 3)), {}),  # which is too large
        (PLAIN, {"accumulate": 2}),
    ],
)
def test_what_blocks_cannot_share_one_runs_alone(engine, blocks, monkeypatch, layers, options):
    monkeypatch.setattr(ONE, "module_of_parts", lambda source: 1 / 0)
    blocks(8)
    expected = model_of("numpy", layers, fastbp.SGD(0.1)).fit(X, LABELS, batch_size=13, epochs=2, **options)
    graph = model_of(engine, layers, fastbp.SGD(0.1)).fit(X, LABELS, batch_size=13, epochs=2, **options)
    assert_same_parameters(graph, expected, rtol=1e-8)
    blocks(8, 1)
    with pytest.raises(ZeroDivisionError):
        model_of(engine, layers, fastbp.SGD(0.1)).fit(X, LABELS, batch_size=13, epochs=2, **options)


@pytest.mark.parametrize("count", [1, 8])
def test_how_many_steps_a_launch_takes_changes_no_bit(engine, blocks, count):
    """Of the sum of costs, too, to which others add between launches."""
    blocks(count)
    layers, optimizer, loss, batch = CASES["momentum"]
    states = []
    for sizes in ([6], [1, 2, 3]):
        model = model_of(engine, layers, optimizer, loss)
        with model.training() as trainer:
            trainer.bind(model.checked(np.tile(X, (3, 1)), np.tile(LABELS, 3), np.tile(WEIGHTS, 3)), batch)
            for _ in range(2):
                model.memory.start_epoch()
                model.memory.total.fill(0.1)
                for steps in sizes:
                    trainer._replays[0][0].run(steps)
        states.append((state_of(model), model.memory.total.tobytes()))
    assert states[0] == states[1]


class AsOneKernel(REPLAY.Replay):
    """A replay of calls without slots, which would be a graph, behind one that has some."""

    def __init__(self, engine, calls):
        self._order = engine.integers(0)
        first = Call(OPS["next_batch"], ("order", engine.integers(0), engine.integers(0)))
        super().__init__(engine, [first, *calls])

    def bind(self):
        super().bind(order=self._order)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_each_op_as_a_part(engine, dtype):
    trials, calls = [], []
    for op in filter(engine.supports, OPS.values()):
        trial = Trial(engine, op)
        arguments = trial.draw(UNEVEN, dtype)
        given, outputs = trial.given(arguments), trial.poisoned(UNEVEN, dtype, engine.empty)
        trials.append((trial, arguments, given, outputs))
        calls.append(Call(op, (*given, *outputs)))
    program = AsOneKernel(engine, calls)
    program.bind()
    program.run(1)
    for trial, arguments, given, outputs in trials:
        trial.judge(trial.written(given, outputs), expected(trial.op, arguments), dtype, arguments)
        assert not trial.failure, trial.failure


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products(engine, dtype):
    """Of tiles that are whole or not, more and fewer than threads, and of rows that begin at 16 bytes or do not."""
    calls, checks = [], []
    for rows, inputs, outputs in [
        (1, 1, 1), (2, 3, 5), (33, 4, 3), (7, 64, 130), (130, 66, 1), (40, 258, 9), (70, 12, 300), (5, 2, 2100),
    ]:  # fmt: skip
        rng = np.random.default_rng(rows)
        x, w, dz = (rng.standard_normal(shape) for shape in ((rows, inputs), (inputs, outputs), (rows, outputs)))
        x[0, 0] = np.nan  # which stays in its row, or column
        b = rng.standard_normal((1, outputs))
        y = np.maximum(x, 0)
        bent = np.where(y <= 0, 0, dz @ w.T)
        wanted = [
            ("dense_forward", [x @ w + b]), ("dense_relu_forward", [np.maximum(x @ w + b, 0)]),
            ("dense_input_grad", [dz @ w.T]), ("dense_weight_grad", [x.T @ dz]), ("dense_relu_input_grad", [bent]),
            ("dense_relu_grads", [bent, bent.sum(axis=0, keepdims=True)]),
            ("dense_bias_grad", [dz.sum(axis=0, keepdims=True)]), ("dense_weight_grad", [x.T @ dz]),  # at once
        ]  # fmt: skip
        given = {
            name: engine.asarray(array, dtype) for name, array in {"x": x, "w": w, "b": b, "dz": dz, "y": y}.items()
        }
        for name, arrays in wanted:
            made = [engine.buffer(array.shape, dtype) for array in arrays]
            calls.append(Call(OPS[name], (*(given[arg.name] for arg in OPS[name].inputs), *made)))
            checks.append((f"{name} of {rows, inputs, outputs}", made, arrays, (inputs + outputs + rows) * rows))
    program = AsOneKernel(engine, calls)
    program.bind()
    program.run(1)
    for what, made, arrays, scale in checks:
        for found, array in zip(made, arrays, strict=True):
            np.testing.assert_allclose(found.get(), array, atol=scale * np.finfo(dtype).eps, rtol=0, err_msg=what)


@pytest.mark.parametrize(
    ("capability", "room", "work", "size", "counts"),
    [
        ("90", 227, 1_000_000, 179, [8, 1]),
        ("90", 227, 1_000_000, 180, [8]),
        ("90", 227, 1_000_001, 1, [8]),
        ("100", 227, 10_000_000, 1 << 20, [8]),
        ("90", 227, 10_000_001, 1, []),
        ("80", 163, 1_000_000, 115, [1]),
        ("80", 163, 1_000_000, 116, []),
        ("89", 99, 1_000_001, 1, []),
    ],
)
def test_how_many_blocks_are_tried(monkeypatch, capability, room, work, size, counts):
    """Room and size are in KB."""
    monkeypatch.setattr(standin.Device, "compute_capability", capability)
    monkeypatch.setattr(standin.Device, "attributes", {"MaxSharedMemoryPerBlockOptin": room << 10})
    assert REPLAY.blocks_for(work, size << 10) == counts


@pytest.fixture
def refused(monkeypatch):
    """Say with which status a GPU refuses to run eight blocks at once."""
    monkeypatch.setattr(standin.Device, "blocks_of_a_cluster", 4)
    return lambda status: monkeypatch.setattr(standin.CUDADriverError, "status", status)


@pytest.mark.parametrize("others", [[1], []])
@pytest.mark.parametrize("status", [701, 912])
def test_where_a_gpu_cannot_run_so_many_blocks_at_once_it_takes_another_way(engine, blocks, refused, status, others):
    refused(status)
    blocks(8, *others)
    model = model_of(engine, PLAIN, fastbp.SGD(0.1))
    (run,) = runs_of(model, X, LABELS)
    assert isinstance(run, ONE.OneKernel if others else REPLAY.Graph)
    expected = model_of("numpy", PLAIN, fastbp.SGD(0.1)).fit(X, LABELS, batch_size=26, epochs=2)
    assert_same_parameters(model.fit(X, LABELS, batch_size=26, epochs=2), expected, rtol=1e-8)


@pytest.mark.parametrize("status", [1, 700])  # an invalid value, an illegal address
def test_a_cluster_that_fails_otherwise_is_an_error(engine, blocks, refused, status):
    refused(status)
    blocks(8, 1)
    with pytest.raises(standin.CUDADriverError):
        runs_of(model_of(engine, PLAIN, fastbp.SGD(0.1)), X, LABELS)


def test_what_a_kernel_is_tried_with_changes_nothing(engine, blocks):
    """When it is made for a cluster, by a launch of no steps."""
    blocks(8)
    model = fit(engine, "momentum", "float64")
    model.memory.total.fill(0.1)
    before = state_of(model), model.memory.total.tobytes()
    ASKED.clear()
    model._tapes.clear()
    runs_of(model, X, LABELS, WEIGHTS)
    assert "replay" in ASKED and (state_of(model), model.memory.total.tobytes()) == before


def test_a_table_of_more_rows_than_one_kernel_can_count_is_for_a_graph(engine, blocks, monkeypatch):
    blocks(8, 1)
    data = X, LABELS
    for most, kind in ((len(X), ONE.OneKernel), (len(X) - 1, REPLAY.Graph)):
        monkeypatch.setattr(REPLAY, "MOST_ROWS", most)
        (run,) = runs_of(model_of(engine, PLAIN, fastbp.SGD(0.1)), *data)
        assert isinstance(run, kind)


@pytest.mark.parametrize("loss", [CLASSES, SQUARES], ids=["classes", "squares"])
@pytest.mark.parametrize("kind", ["f8", "f4", "i1", "?"])
@pytest.mark.parametrize(("columns", "batch"), [(1, 1), (3, 40), (32, 64), (32, 65), (257, 2)])
@pytest.mark.parametrize("count", [1, 3])
def test_batches_are_those_of_numpy(engine, blocks, count, columns, batch, kind, loss):
    """Also where a thread has more to take than it asks for ahead: over eight elements, or of two columns."""
    blocks(count)
    rng = np.random.default_rng(0)
    data = rng.integers(0, 2, (3 * batch, columns)).astype(kind)
    labels = rng.integers(0, 3, 3 * batch)
    y, weights = np.eye(3)[labels] if loss is SQUARES else labels, rng.random(3 * batch)
    models = [model_of(of, [fastbp.Dense(columns, 3)], fastbp.SGD(0.1), loss) for of in (engine, "numpy")]
    for model in models:
        model.fit(data, y, epochs=2, batch_size=batch, sample_weight=weights, verbose=False)
    assert_same_parameters(*models, rtol=1e-10)


def test_what_is_done_at_once(engine):
    """Sums of what a product multiplies, on the same arrays, where neither writes what the other reads."""
    kernels = [
        [stage.kernel for stage in REPLAY.done_at_once(engine, standin.stages_of(engine, *calls))]
        for calls in [
            [("dense_bias_grad", "dz", "db"), ("dense_weight_grad", "x", "dz", "dw")],
            [("dense_bias_grad", "dz", "db"), ("dense_weight_grad", "x", "u", "dw")],
            [("dense_bias_grad", "dz", "db"), ("dense_weight_grad", "db", "dz", "dw")],
            [("dense_bias_grad", "dz", "db"), ("add", "u", "v", "w"), ("dense_weight_grad", "x", "dz", "dw")],
        ]
    ]
    apart = ["dense_bias_grad", "dense_weight_grad"]
    assert kernels == [["dense_weight_and_bias_grad"], apart, apart, [apart[0], "add", apart[1]]]


def test_a_network_is_as_large_as_its_arrays(engine, monkeypatch):
    """Those that several calls share count once, and a user's tables not at all."""
    asked = []
    monkeypatch.setattr(REPLAY, "blocks_for", lambda *given: asked.append(given) or [])
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
    assert ONE.waiting(ONE.meetings(engine, stages)) == [False, False, True, False, True, True, True, False]


@pytest.mark.parametrize(
    ("calls", "waits"),
    [
        ([("relu_forward", "x", "u"), ("relu_forward", "u", "v")], [True, True]),  # it is overwritten for the next step
        ([("relu_forward", "x", "u"), ("relu_forward", "w", "v")], [True, False]),
        ([("relu_forward", "x", "u")], [True]),
    ],
)
def test_a_step_waits_for_the_step_before(engine, calls, waits):
    assert ONE.waiting(ONE.meetings(engine, standin.stages_of(engine, *calls))) == waits


@pytest.mark.parametrize(("count", "block", "parameters"), [(1, 6, 0), (8, 7, 1)])
def test_a_small_step_waits_six_times(engine, blocks, sources, count, block, parameters):
    """For the batch and the weights, hidden units, logits, the loss's slopes, those of hidden units, and all slopes.

    Where blocks share it, for weights of others with the first, and for the sum of all slopes.
    """
    blocks(count)
    runs_of(model_of(engine, PLAIN, fastbp.Adam(0.1)), X, LABELS)
    step = sources[0].split(STEP)[1].split("\n    }\n")[0]
    assert step.count(BARRIER) == block and step.count(RECEIVED) == step.count("wait_for_all();") == parameters


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


@pytest.mark.parametrize("count", [1, 8])
def test_shared_memory_ends_with_a_whole_piece(engine, blocks, count):
    """Of as many bytes as a thread reads at a time, or it would read beyond the end."""
    blocks(count)
    model = model_of(
        engine, (fastbp.Dense(7, 33), fastbp.ReLU(), fastbp.Dense(33, 5)), fastbp.SGD(0.1), dtype="float32"
    )
    model.fit(np.zeros((37, 7)), np.zeros(37, int), batch_size=37, verbose=False)
    assert ASKED["replay"] % 16 == 0


@pytest.mark.parametrize("count", [1, 8])
def test_all_but_the_slots_lies_in_shared_memory(engine, blocks, sources, count):
    """Of which each block keeps what it needs: all parameters, and its own rows."""
    blocks(count)
    model = model_of(engine, *CASES["Adam"][:3], "float32")
    with model.training() as trainer:
        trainer.bind(model.checked(X, LABELS, WEIGHTS), 26)
        run, slots = trainer._replays[0][0]._program._run, trainer._slots
        given, loads, stores, totals = (x.get() for x in run._tables)
    places = {x.data.ptr: x.nbytes for x in slots.values()}
    assert sorted(slots) == ["X", "order", "rates", "weights", "y"]
    far = given[given > 1 << 32]  # where else the heap has its addresses
    assert set(far) >= set(places)
    assert all(any(start <= x < start + size for start, size in places.items()) for x in far)
    loads, stores = (x.reshape(run._grid[0], -1, 3) for x in (loads, stores))
    for start, size in places.items():
        assert ((loads[..., 0] + loads[..., 2] <= start) | (loads[..., 0] >= start + size)).all()
    assert len(totals) == (count > 1)
    for copies, kept in zip(loads.swapaxes(0, 1), stores.swapaxes(0, 1), strict=True):  # each byte comes back once
        assert max(copies[:, 1] + copies[:, 2]) <= run._shared
        there, back = ([n for start, _, size in x.tolist() for n in range(start, start + size)] for x in (copies, kept))
        assert sorted({*there}) == sorted(back)


def test_which_networks_share_a_kernel(engine, blocks, sources):
    """Those of the same shapes, wherever the user's tables lie and however long they are."""
    for layers, rows, count in [(PLAIN, 26, 1), (PLAIN, 52, 1), (DEEP, 26, 2), (PLAIN, 39, 2)]:
        model = model_of(engine, layers, fastbp.SGD(0.1))
        runs = runs_of(model, np.ones((rows, 4)), np.zeros(rows, np.int64), batch=13)
        assert len(runs) == 1 and len({*sources}) == count
    runs_of(model_of(engine, PLAIN, fastbp.SGD(0.1)), X, LABELS, batch=26)
    assert len({*sources}) == 3


@pytest.mark.parametrize("size", [48 << 10, 49 << 10, 64 << 10])
def test_no_more_is_asked_for_than_a_device_has(engine, monkeypatch, size):
    """Nor is there a kernel where that is not enough for its tables."""
    attributes = standin.Device.attributes | {"MaxSharedMemoryPerBlockOptin": size}
    monkeypatch.setattr(standin.Device, "attributes", attributes)
    ASKED.clear()
    model = model_of(engine, [fastbp.Dense(4, 1500), fastbp.Dense(1500, 3)], fastbp.Adam())
    model.fit(X, LABELS, batch_size=26, epochs=1, verbose=False)
    assert ("replay" in ASKED) == (size > 49 << 10)
    assert ASKED.get("replay", 0) <= ONE.room_of_block() == size - (48 << 10)


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


def test_joined():
    """Views are one span; what touches is not."""
    spans = [range(100, 140), range(120, 160), range(500, 508), range(160, 170), range(105, 110), range(7, 7)]
    assert ONE.joined(spans) == [range(100, 160), range(160, 170), range(500, 508)]


def test_places():
    """What is written comes first, then what is used most for its size, at multiples of 16."""
    small, large, written = range(500, 508), range(100, 160), range(900, 940)

    def places(start, room, often=1, must=()):
        uses = Counter({small: 1, large: often, written: 1})
        return ONE.Shares.places(
            SimpleNamespace(_uses=uses, _written={*must}, size=len, blocks=1 + bool(must)), start, room
        )

    assert places(24, 1000) == {small: 32, written: 48, large: 96}
    assert places(24, 155) == {small: 32, written: 48}
    assert places(24, 1000, often=20) == {large: 32, small: 96, written: 112}
    assert places(24, 155, must=[large]) == {large: 32, small: 96, written: 112}
    assert places(24, 24) == {}
    for wrong in ((25, 24), (24, 80, 1, [large, written])):
        with pytest.raises(ONE.NotShared):
            places(*wrong)


@pytest.mark.parametrize(
    ("size", "parts", "granule"), [(13, 8, 1), (8, 8, 1), (48, 8, 16), (16 * 57, 8, 16), (7, 2, 4)]
)
def test_cut(size, parts, granule):
    cuts = [ONE.cut(size, part, parts, granule) for part in range(parts)]
    assert [n for each in cuts for n in each] == [*range(size)]
    assert all(each.start % granule == 0 for each in cuts if each)
    granules = [-(-len(each) // granule) for each in cuts]
    assert max(granules) - min(granules) <= 1


STEP = "for (; steps; steps--) {\n"
BARRIER, RECEIVED = "__syncthreads();", "wait_for_parameters();"


@pytest.mark.parametrize(
    ("count", "old", "new", "which"),
    [
        *((1, BARRIER, "", which) for which in range(8)),
        # but for that behind the loss, whose rows one warp has here
        *((8, BARRIER, "", which) for which in (0, 1, 2, 3, 5, 6, 7, 8)),
        (8, "wait_for_all();", BARRIER, 0),
        (8, RECEIVED, "", 0),
        (8, "    parameters_are_sent();\n}", "}", None),
        (8, "    parameters_are_sent();\nAhead", "Ahead", None),
        (1, f"{BARRIER}\n    begin_totals", "begin_totals", None),
        (8, f"{RECEIVED}\n    end_totals", "end_totals", None),
        (8, f"end_totals(totals, kept);\n    {BARRIER}", "end_totals(totals, kept);", None),
        (8, "g.size / COUNT", "g.size / COUNT - 1", None),
        (8, "g.size / COUNT", "g.size / COUNT + 1", None),
        (8, "p.size * sizeof(Real) / 16", "p.size * sizeof(Real) / 16 - 1", None),
        (8, "other = 0; other < BLOCKS; other++) {", "other = 1; other < BLOCKS; other++) {", None),
        (8, "(rank() + other) % BLOCKS)", "(rank() + other) / BLOCKS)", None),
        (
            8,
            "for (int other = 1; other < BLOCKS; other++)\n                t",
            "int other = 1;\n                t",
            None,
        ),
        (8, "else if (rank() > 0)", "else if (rank() > 1)", None),
        (8, "GRANULE", 24, None),
        (1, "EACH_OF_BLOCK(i, table.size)", "EACH_OF_BLOCK(i, table.size / 2)", None),
        (1, "EACH_OF_BLOCK(i, pieces)", "EACH_OF_BLOCK(i, pieces - 1)", None),
        (1, "i < size;", "i < size - 1;", None),
        (1, "i < spans.size; i += 3", "i < spans.size; i += 6", None),
        (1, "copy_all(mine(loads), false);", "", None),
        (8, "copy_all(mine(stores), true);", "", None),
        (1, "cursor[0] += rows.size", "cursor[0] += rows.size - 1", None),
        (1, "first + n * down, bits[n]", "first + n * down, bits[0]", None),
        (1, "first + n * down < count", "first + n * down < count - 1", None),
        (1, "read(rows[n])", "read(rows[0])", None),
        (8, "ask_for_rows(order, start, ", "ask_for_rows(order, next, ", None),
        (8, "begun ? next + whole(count) : next", "next", None),
        (1, "column_of(n) < columns)", "true)", None),
        (1, "distance >> bits; distance /= 2)", "distance > 32; distance /= 2)", None),
        (1, "sum_of_b[n] += term;", "sum_of_b[n] = term;", None),
        (1, "start += THREADS / 32 << bits", "start += THREADS / 16 << bits", None),
        (1, "k = AT_ONCE * chunks + slice;", "k = AT_ONCE * chunks + slice + 1;", None),
        (1, "mine + __shfl_xor_sync(0xffffffffu, other, distance)", "mine + other", None),
        (1, ": x + n * across", ": x + n", None),
    ],
)
def test_a_fault_is_found(count, old, new, which):
    assert standin.in_process(state_with_fault, count, old, new, which) != state_without_fault(count)


@functools.cache
def state_without_fault(count):
    expected, again = (standin.in_process(state_with_fault, count, STEP, STEP, None) for _ in range(2))
    assert expected and expected == again
    return expected


def state_with_fault(count, old, new, which):
    """What comes of training by so many blocks where the source's only `old`, or one of those of a step, is new."""
    source_of_parts = ONE.source_of_parts

    def with_fault(*given):
        source = source_of_parts(*given)
        start = source.index(STEP) if which is not None else 0
        pieces = source[start:].split(old)
        assert len(pieces) == 2 or len(pieces) > which + 1
        place = which or 0
        return source[:start] + old.join(pieces[: place + 1]) + new + old.join(pieces[place + 1 :])

    if old == "GRANULE":
        ONE.GRANULE = new
    else:
        ONE.source_of_parts = with_fault
    REPLAY.blocks_for = lambda *_: [count]
    layers = fastbp.Dense(32, 90), fastbp.ReLU(), fastbp.Dense(90, 70), fastbp.ReLU(), fastbp.Dense(70, 3)
    model = model_of(standin.engine_on_host(), layers, fastbp.SGD(0.1))
    with model.training() as trainer, contextlib.suppress(RuntimeError):
        trainer.bind(model.checked(np.tile(X[:24], (8, 8)), np.tile(LABELS[:24], 8)), 12)
        model.memory.total.fill(0.1)
        for _ in range(5):  # orders of threads, some of which let a fault pass
            trainer._replays[0][0].run(3)
    return state_of(model), model.memory.total.tobytes()


# what runs under the sanitizers, in a process that a fault may end: a network far, and near with a changed kernel
COMPARED = """
import sys
from tests import test_cuda_one_kernel as here
from tests.checks import state_of
from tests.cuda import standin
standin.OPTIONS += "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"
places, source_of_parts = here.ONE.Shares.places, here.ONE.source_of_parts
def train(count, size):
    here.REPLAY.blocks_for = lambda *_: [count]
    here.ONE.Shares.places = lambda self, start, _: places(self, start, start + size)
    return state_of(here.fit(standin.engine_on_host(), "momentum", "float32", 2))
count, old, new = sys.argv[1:]
wanted = train(1, 0) if count == "1" else train(8, 1 << 17)
def with_fault(*given):
    source = source_of_parts(*given)
    assert old in source
    return source.replace(old, new)
here.ONE.source_of_parts = with_fault
print("the same" if train(int(count), 1 << 17) == wanted else "different")
"""


def compared(count, old, new):
    path = subprocess.run([standin.COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout
    if not Path(path.strip()).is_file():
        pytest.skip("needs the address sanitizer of g++")
    environment = os.environ | {"LD_PRELOAD": path.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command, root = [sys.executable, "-c", COMPARED, str(count), old, new], Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("count", [1, 8])
def test_all_stays_within_bounds(count):
    done = compared(count, "THREADS", "THREADS")
    assert done.stdout == "the same\n", done.stderr[-3000:]


@pytest.mark.parametrize(
    ("count", "old", "new"),
    [
        (1, "(char *)near + spans[i + 1]", "(char *)near + spans[i + 1] + 16"),
        (1, "(char *)near + spans[i + 1]", "(char *)near + spans[i + 1] + 1"),
        (8, "of_all.data + rank() * size", "of_all.data + rank() * (size + 1)"),
    ],
)
def test_a_fault_of_addresses_is_found(count, old, new):
    done = compared(count, old, new)
    assert "CalledProcessError" not in done.stderr  # as where what was changed does not compile
    assert "AssertionError" not in done.stderr
    assert done.returncode or done.stdout == "different\n"
