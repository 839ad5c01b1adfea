"""Training steps as CUDA graphs, on the stand-in for a GPU, which does what a graph leaves open in any order."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastbp

from .checks import assert_same_parameters, small_model, state_of
from .cuda import standin

pytestmark = pytest.mark.skipif(standin.COMPILER is None, reason="needs g++")

REPLAY = standin.replay_module()
X, LABELS = np.random.default_rng(0).standard_normal((160, 6)), np.arange(160) % 3


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(REPLAY, "blocks_for", lambda *_: [])
    return standin.engine_on_host()


@pytest.fixture
def captured(monkeypatch):
    """The graphs that are captured."""
    end, captures = standin.Stream.end_capture, []
    monkeypatch.setattr(standin.Stream, "end_capture", lambda self: captures.append(self.captured) or end(self))
    return captures


def trained(engine, layers=(), optimizer=None):
    """A model after forty steps: one by itself, two graphs of sixteen, and seven of one."""
    layers = layers or [
        *(fastbp.Dense(6, 9), fastbp.ReLU(), fastbp.Dense(9, 8), fastbp.Tanh(), fastbp.Dropout(0.2)),
        *(fastbp.BatchNorm(8), fastbp.Dense(8, 3)),
    ]
    model = fastbp.Sequential(
        layers,
        loss=fastbp.SoftmaxCrossEntropy(label_smoothing=0.1),
        optimizer=optimizer or fastbp.Adam(0.01, clip_norm=1.0, weight_decay=0.01),
        engine=engine,
        dtype="float64",
        seed=0,
    )
    with model.training() as trainer:
        trainer.bind(model.checked(X, LABELS), 4)
        ((tape, steps),) = trainer._replays
        tape.run(steps)
    return model


def test_any_order_that_a_graph_allows_gives_the_same_bits(engine, captured):
    model = trained(engine)
    assert len(captured[0].nodes) == 16 * len(captured[1].nodes) and len(captured) == 2
    assert state_of(model) == state_of(trained(engine)) == state_of(trained(engine))
    assert_same_parameters(model, trained("numpy"), rtol=1e-8)


@pytest.mark.parametrize("after", [0, 1, 20])
def test_ctrl_c_while_a_graph_is_captured(engine, monkeypatch, after):
    left, run_all = [after], REPLAY.run_all

    def interrupted(launches):
        if standin.current_stream().is_capturing():
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        run_all(launches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(REPLAY, "run_all", interrupted)
        trained(engine)
    assert_same_parameters(trained(engine), trained("numpy"), rtol=1e-8)


@pytest.mark.parametrize(
    "kernel", ["dense_weight_grad", "softmax_cross_entropy", "adam", "dropout_forward", "take", "no such kernel"]
)
def test_a_wait_too_few_is_found(engine, kernel):
    states = standin.in_process(states_without_waits, kernel)
    assert (states != [state_of(trained(engine))] * 5) == (kernel != "no such kernel")


def states_without_waits(kernel):
    """What comes of training five times where one kernel counts as one that meets no other."""
    meetings = REPLAY.meetings

    def too_few(engine, stages):
        meet = meetings(engine, stages)
        for place, stage in enumerate(stages):
            if kernel in stage.kernel:
                meet[place] = meet[:, place] = False
        return meet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REPLAY, "blocks_for", lambda *_: [])
        patch.setattr(REPLAY, "meetings", too_few)
        patch.setattr(REPLAY, "lanes_for", lambda meet, count: [place % count for place in range(len(meet))])
        return [state_of(trained(standin.engine_on_host())) for _ in range(5)]


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_as_much_as_can_runs_side_by_side(engine, captured, monkeypatch, lanes):
    """How many of a step's 17 kernels follow each other; 8 have to, from the first layer to the update."""
    monkeypatch.setattr(REPLAY, "LANES", lanes)
    sizes = itertools.pairwise((6, 5, 4, 3))
    layers = [layer for k, n in sizes for layer in (fastbp.Dense(k, n), fastbp.ReLU())][:-1]
    trained(engine, layers, fastbp.SGD(0.1))
    graph, depths = captured[0], {}
    for node in graph.nodes:
        depths[node] = 1 + max((depths[before] for before in node.before), default=0)
    assert len(graph.nodes) == 16 * 17
    assert max(depths.values()) // 16 == {1: 17, 2: 10, 3: 8}[lanes]


def test_which_stages_meet(engine):
    """Where one writes what the other reads or writes, in whatever order."""
    stages = standin.stages_of(engine, ("add", "x", "w", "u"), ("relu_forward", "u", "v"), ("scale", "x", "half", "u"))
    stages += standin.stages_of(engine, ("relu_forward", "x", "v"))
    assert REPLAY.meetings(engine, stages[:3]).tolist() == [[True, True, True], [True, True, True], [True, True, True]]
    stages = standin.stages_of(engine, ("add", "x", "w", "u"), ("relu_forward", "x", "v"), ("scale", "u", "half", "dz"))
    assert REPLAY.meetings(engine, stages).tolist() == [[True, False, True], [False, True, False], [True, False, True]]


def test_products_side_by_side_work_in_rooms_of_their_own(engine, monkeypatch):
    rooms, product = {}, engine._blas.product

    def noted(matrices, workspace, **options):
        rooms[matrices[2].address] = workspace
        return product(matrices, workspace, **options)

    monkeypatch.setattr(engine._blas, "product", noted)
    monkeypatch.setattr(standin.engine_module(), "tile_for", lambda *_: None)
    stages = standin.stages_of(engine, ("dense_weight_grad", "x", "dz", "dw"), ("dense_input_grad", "dz", "w", "u"))
    lanes = REPLAY.lanes_for(REPLAY.meetings(engine, stages), 2)
    graph = REPLAY.Graph(engine, stages)
    used = [rooms[stage.arrays[name].data.ptr] for stage, name in zip(stages, ("dw", "dx"), strict=True)]
    assert sorted(lanes) == sorted(graph._lanes) == [0, 1] and abs(used[0] - used[1]) >= 32 << 20


def test_threads_that_begin_at_once_work_in_one_room_which_stays(monkeypatch):
    engine, together = type(standin.engine_on_host())(), threading.Barrier(2)
    empty = engine.empty

    def slowly(*arguments):
        together.wait(timeout=60)
        return empty(*arguments)

    monkeypatch.setattr(engine, "empty", slowly)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(engine._workspace, [0, 0])
    assert one is other is engine._workspace(0)


def test_threads_whose_streams_are_their_own_do_not_share_rooms(engine, monkeypatch):
    """CuPy has one pointer for all of these."""

    def rooms(stream):
        with stream:
            replay = REPLAY.Replay(engine, ())
            replay.bind()
            turned = engine.turned((2, 2), np.float32, 0)
            return engine._workspace(0).data.ptr, turned.data.ptr, turned, *replay._ready

    of_a_thread = standin.Stream()
    of_a_thread.ptr = 2
    for stream, apart in ((of_a_thread, True), (standin.Stream(), False)):
        here = rooms(stream)
        with ThreadPoolExecutor(1) as thread:
            there = thread.submit(rooms, stream).result()
        assert [a != b for a, b in zip(here[:2], there[:2], strict=True)] == [apart] * 2
        assert (here[3:] != there[3:]) == apart


@pytest.mark.parametrize("blocks", [0, 1])
def test_another_gpu_than_that_of_the_process_is_an_error(engine, monkeypatch, blocks):
    """For graphs, and for one kernel of so many blocks."""
    monkeypatch.setattr(REPLAY, "blocks_for", lambda *_: [blocks] * blocks)
    model = trained(engine)
    before = state_of(model)
    for each in (model, small_model(engine)):  # for which all is ready, or nothing is
        data = np.ones((21, len(each.layers[0].weights))), LABELS[:21]
        with monkeypatch.context() as another:
            another.setattr(standin.Device, "id", 3)
            with pytest.raises(
                RuntimeError, match=r"in this process the engine 'cupy' works on GPU 0, where it began, not on 3"
            ):
                each.fit(*data, batch_size=7, verbose=False)
        assert each is not model or state_of(model) == before
        each.fit(*data, batch_size=7, verbose=False)
