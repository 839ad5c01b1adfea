"""Run an engine on arrays that end, or begin, where memory ends: whatever reads or writes beyond them is killed.

``python guarded.py ENGINE`` prints what it runs before it does, so that the last line names what was killed.
"""

import ctypes
import mmap
import sys

import numpy as np

import fastbp
from fastbp.kernels.engine import Call
from fastbp.kernels.ops import OPS

PAGE = mmap.PAGESIZE
SIZES = (
    (1, 1, 1, 1),
    (3, 5, 7, 9),
    (17, 33, 18, 40),
    (64, 16, 32, 64),
    (5, 130, 3, 131),
    (19, 37, 3, 70),
    (2, 300, 17, 1000),
    (35, 600, 300, 70),  # of which products copy parts of the one matrix,
    (130, 90, 300, 131),  # or of the other
)
protect = ctypes.CDLL(None, use_errno=True).mprotect


def guarded(shape, dtype, at_the_end=True):
    """Memory whose last byte, or whose first one, lies beside a page that nobody may touch."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    pages = -(-size // PAGE)
    block = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    for place in (start, start + (pages + 1) * PAGE):
        if protect(ctypes.c_void_p(place), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (pages * PAGE - size if at_the_end else 0)
    return np.frombuffer(block, dtype, size // dtype.itemsize, offset).reshape(shape)


def guarded_engine(name, at_the_end):
    kind = type(fastbp.engine(name))

    class Guarded(kind):
        """The engine with guards around all of its memory: outputs, buffers, room to work in, parameters."""

        def empty(self, shape, dtype):
            return guarded(shape, dtype, at_the_end)

    return Guarded()


def run_op(engine, op, sizes, dtype):
    drawn = op.sample(np.random.default_rng(0), sizes, dtype)
    arrays = [engine.empty(array.shape, array.dtype) for array in drawn]
    for mine, array in zip(arrays, drawn, strict=True):
        mine[...] = array
    arrays += [engine.empty(op.shape(arg, sizes), arg.dtype(dtype)) for arg in op.outputs]
    program = engine.program([Call(op, tuple(arrays))])
    program.bind()
    program.run(1)


def train(engine, dtype, features, hidden, rows):
    X = engine.empty((rows, features), dtype)
    X[...] = np.random.default_rng(0).standard_normal(X.shape)
    layers = [fastbp.Dense(features, hidden), fastbp.BatchNorm(hidden), fastbp.ReLU(), fastbp.Dense(hidden, hidden)]
    layers += [
        fastbp.LayerNorm(hidden),
        fastbp.GELU(),
        fastbp.Dropout(0.2),
        fastbp.Residual(fastbp.Dense(hidden, hidden)),
    ]
    layers += [fastbp.Tanh(), fastbp.Dense(hidden, 3)]
    model = fastbp.Sequential(
        layers, loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(), engine=engine, dtype=dtype, seed=0
    )
    y = np.arange(rows) % 3
    model.fit(X, y, epochs=2, batch_size=max(2, rows // 3), sample_weight=np.ones(rows))
    model.predict(X)
    model.evaluate(X, y)


def main(name):
    for at_the_end in (True, False):
        engine = guarded_engine(name, at_the_end)
        for dtype in (np.dtype("f4"), np.dtype("f8")):
            for op in filter(engine.supports, OPS.values()):
                letters = {d for arg in (*op.inputs, *op.outputs) for d in arg.dims if not d.isdigit()}
                for numbers in SIZES:
                    sizes = dict(zip("BKNP", numbers, strict=True)) | {"M": 2 * numbers[0]}
                    sizes = {letter: sizes[letter] for letter in letters}
                    print(op.name, dtype, sizes, "end" if at_the_end else "start", flush=True)
                    run_op(engine, op, sizes, dtype)
            for features, hidden, rows in ((1, 1, 4), (5, 17, 13), (33, 40, 64)):
                print("training", dtype, features, hidden, rows, flush=True)
                train(engine, dtype, features, hidden, rows)
    print("nothing was touched beyond its arrays")


if __name__ == "__main__":
    main(sys.argv[1])
