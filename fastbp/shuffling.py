"""In which order an epoch takes its rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .kernels.engine import Call, Engine
from .kernels.ops import OPS, Array

__all__ = ["shuffler"]

MANY_ROWS = 1 << 12  # from which the op is used: for fewer, NumPy's own shuffle is faster than to call one
MOST_ROWS = 1 << 31  # the sum of two rows has 32 bits
(KEYS,) = OPS["shuffle"].shape(OPS["shuffle"].inputs[0], {})  # each halves what a place tells of its row


def shuffler(engine: Engine, rng: np.random.Generator, order: Array) -> Callable[[], None]:
    """What puts another random order of rows into an array of an engine, each time that it is called.

    Parameters
    ----------
    engine : Engine
    rng : Generator
    order : array of int64, shape (rows,)

    Raises
    ------
    ValueError
        For more rows than can be shuffled.
    """
    rows = len(order)
    if rows > MOST_ROWS:
        raise ValueError(f"X must have at most {MOST_ROWS:,} rows to be shuffled, got {rows:,}: see shuffle=False")
    if rows < MANY_ROWS:

        def shuffle() -> None:
            order[...] = engine.asarray(rng.permutation(rows))

        return shuffle
    keys = engine.asarray(np.zeros(KEYS, np.uint64))
    program = engine.program([Call(OPS["shuffle"], (keys, order))])
    program.bind()

    def shuffle_by_op() -> None:
        keys[...] = engine.asarray(rng.bit_generator.random_raw(KEYS))
        program.run(1)

    return shuffle_by_op
