"""Fusing the calls of a recording changes nothing that is read: random programs on whole numbers, compared exactly."""

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

import fastbp
from fastbp.fusion import fuse
from fastbp.kernels.engine import Call
from fastbp.kernels.ops import OPS

from .checks import assert_array_equal
from .conftest import ENGINES

N = 2  # all matrices are N x N, so that any call fits any memory
MATRICES = ["p", "q", "r", "s"]
FOLLOWS = {
    "dense_forward": "relu_forward",
    "dense_input_grad": "relu_backward",
    "relu_backward": "dense_bias_grad",
    "dense_bias_grad": "dense_weight_grad",
    "dense_weight_grad": "sgd",
}
NAMES = [*FOLLOWS, "relu_forward"]
modest = settings(max_examples=150, deadline=None, derandomize=True)


class Memory:
    """Matrices p to s, parameters w and b, their gradients, all as whole numbers."""

    def __init__(self, engine, seed):
        rng = np.random.default_rng(seed)
        parameters, gradients = engine.zeros((64,), np.float64), engine.zeros((64,), np.float64)
        self.arrays = {
            "w": parameters[: N * N].reshape(N, N),
            "b": parameters[32 : 32 + N].reshape(1, N),
            "dw": gradients[: N * N].reshape(N, N),
            "db": gradients[32 : 32 + N].reshape(1, N),
            "lr": engine.scalar(1),
        } | {name: engine.zeros((N, N), np.float64) for name in MATRICES}
        for name in [*MATRICES, "w", "b"]:
            self.arrays[name][...] = engine.asarray(rng.integers(-1, 2, self.arrays[name].shape), np.float64)
        self.arrays |= {"parameters": parameters, "gradients": gradients}

    def calls(self, program):
        return [Call(OPS[name], tuple(self.arrays[a] for a in arguments)) for name, arguments in program]


@st.composite
def programs(draw):
    """Calls whose outputs overlap no inputs; a gradient is written once at most, as `Recorder.want` sees to."""
    program, written = [], set()
    for _ in range(draw(st.integers(2, 9))):
        last = program[-1] if program else ("", ("",))
        name = draw(st.sampled_from([FOLLOWS[last[0]]] * 6 + NAMES if last[0] in FOLLOWS else NAMES))
        if name == "sgd":
            program.append((name, ("parameters", "gradients", "lr")))
            continue
        chain = [last[1][-1]] * 6 if last[1][-1] in {*MATRICES} else []
        arguments = [
            "b" if arg.dims[0] == "1" else draw(st.sampled_from([*MATRICES, "w", *(chain if place == 0 else [])]))
            for place, arg in enumerate(OPS[name].inputs)
        ]
        outputs = {"dense_weight_grad": ["dw"] * 4 + MATRICES, "dense_bias_grad": ["db"]}.get(name, MATRICES)
        if free := [x for x in outputs if x not in arguments and x not in written]:
            output = draw(st.sampled_from(free))
            written |= {output} & {"dw", "db"}
            program.append((name, (*arguments, output)))
    return program


@given(programs(), st.sampled_from(ENGINES), st.sets(st.sampled_from(MATRICES)), st.integers(0, 99))
@modest
def test_a_fused_program_leaves_the_same_in_memory(program, name, kept, seed):
    engine = fastbp.engine(name)
    plain, fused = Memory(engine, seed), Memory(engine, seed)
    rewritten = fuse(fused.calls(program), engine, [fused.arrays[a] for a in kept])
    event("fused" if {call.op.name for call in rewritten} - {*NAMES, "sgd"} else "plain")
    for calls in (plain.calls(program), rewritten):
        replay = engine.program(calls)
        replay.bind()
        replay.run(2)  # the second time, what the first left behind is read
    for array in (*kept, "w", "b"):
        assert_array_equal(fused.arrays[array], plain.arrays[array], err_msg=array)


def names_after_fusing(engine, program, kept=()):
    memory = Memory(engine, 0)
    return [call.op.name for call in fuse(memory.calls(program), engine, [memory.arrays[a] for a in kept])]


DENSE_RELU = [("dense_forward", "pwbq"), ("relu_forward", "qr")]


def test_neighbours_are_fused(engine):
    if engine.supports(OPS["dense_relu_forward"]):
        assert names_after_fusing(engine, DENSE_RELU, kept="r") == ["dense_relu_forward"]


def test_what_somebody_reads_is_still_written(engine):
    plain = [name for name, _ in DENSE_RELU]
    assert names_after_fusing(engine, DENSE_RELU, kept="q") == plain
    assert names_after_fusing(engine, [*DENSE_RELU, ("relu_forward", "qs")]) == [*plain, "relu_forward"]


def test_what_the_fused_call_reads_itself_is_still_written(engine):
    program = [("dense_input_grad", "pwq"), ("relu_backward", "qqr")]
    assert names_after_fusing(engine, program, kept="r") == [name for name, _ in program]


def test_no_call_crosses_what_it_depends_on(engine):
    between = ("relu_forward", "rp")  # reads what the later part writes, writes what the earlier part reads
    assert "dense_relu_forward" not in names_after_fusing(engine, [DENSE_RELU[0], between, DENSE_RELU[1]], kept="rp")


def names_of_sparse_rows(engine, features, *program, kept=()):
    """What becomes of ops that follow `sparse_rows`."""
    arrays = {name: engine.zeros((features, N), np.float64) for name in ("w", "dw")}
    arrays |= {name: engine.zeros((N, N), np.float64) for name in ("z", "dz")}
    arrays |= {name: engine.zeros((N, features), np.float64) for name in ("x", "y")}
    arrays |= {"b": engine.zeros((1, N), np.float64), "rows": engine.zeros((N,), np.int64)}
    table = ["values", "columns", "starts", "stops", arrays["rows"], "zeros", arrays["x"]]
    calls = [Call(OPS[name], tuple(arrays[a] for a in arguments.split())) for name, arguments in program]
    fused = fuse([Call(OPS["sparse_rows"], tuple(table)), *calls], engine, [arrays[name] for name in kept])
    return [call.op.name for call in fused]


FORWARD, GRADIENT = ("dense_forward", "x w b z"), ("dense_weight_grad", "x dz dw")


def test_wide_sparse_rows_are_multiplied_as_they_are_stored(engine):
    plain = ["sparse_rows", "dense_forward", "dense_weight_grad"]
    stored = ["sparse_forward", "sparse_weight_grad"] if engine.supports(OPS["sparse_forward"]) else plain
    assert names_of_sparse_rows(engine, 1024, FORWARD, GRADIENT, kept=["z", "dw"]) == stored
    assert names_of_sparse_rows(engine, 1023, FORWARD, GRADIENT, kept=["z", "dw"]) == plain


def test_sparse_rows_that_others_read_are_made_dense(engine):
    for other in [("add", "x y y"), ("add", "x x y"), ("dense_weight_grad", "y x w"), ("next_batch", "rows rows rows")]:
        names = names_of_sparse_rows(engine, 1024, FORWARD, other, GRADIENT)
        assert names == ["sparse_rows", "dense_forward", other[0], "dense_weight_grad"]
    names = names_of_sparse_rows(engine, 1024, FORWARD, GRADIENT, kept=["x"])
    assert names == ["sparse_rows", "dense_forward", "dense_weight_grad"]


def test_no_output_becomes_an_input_of_the_same_call(engine):
    in_place = [DENSE_RELU[0], ("relu_forward", "qp")]
    assert "dense_relu_forward" not in names_after_fusing(engine, in_place, kept="p")
