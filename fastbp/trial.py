"""One op of an engine on trial: drawn arguments, calls, and what is found of their results."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .kernels.engine import Engine
from .kernels.formulas import FORMULAS
from .kernels.ops import Arg, Array, Op

__all__ = ["FLOATS", "LARGE", "MIDDLE", "SIZES", "TAILS", "UNEVEN", "Trial", "expected", "message_of"]

FLOATS = np.dtype(np.float32), np.dtype(np.float64)
# one row, one column, one class; sizes off and beyond the boundaries of vectors and tiles
SIZES = [
    dict(zip("BKNPM", sizes, strict=True))
    for sizes in [
        (1, 1, 1, 1, 1),
        (1, 7, 3, 5, 2),
        (5, 1, 2, 64, 9),
        (45, 3, 1, 33, 48),
        (17, 13, 31, 1000, 50),
        (19, 21, 3, 40, 19),
        (64, 33, 10, 255, 64),
        (33, 64, 129, 7, 33),
        (70, 36, 2, 65, 80),
        (150, 3, 40, 90, 150),
    ]
]
MIDDLE, UNEVEN = SIZES[6], SIZES[4]
LARGE = {"B": 259, "K": 260, "N": 131, "P": 20_000, "M": 5000}
TAILS = [*range(1, 36), 47, 63, 64, 65]  # whatever may be left over after some tiles of rows and columns


class Trial:
    """One op of one engine, and the worst that was found of it."""

    def __init__(self, engine: Engine, op: Op) -> None:
        self.engine, self.op = engine, op
        self.rng = np.random.default_rng(0)
        self.error = math.nan
        self.failure = ""
        self.updated = [arg for arg in op.inputs if arg.inplace]
        self.function: Callable[..., Any] = getattr(engine, op.name)

    def sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes of this op's dimensions; letters that `SIZES` does not know are as long as K."""
        letters = sorted({d for arg in (*self.op.inputs, *self.op.outputs) for d in arg.dims if not d.isdigit()})
        return {letter: sizes.get(letter, sizes["K"]) for letter in letters}

    def draw(self, sizes: Mapping[str, int], dtype: np.dtype[Any]) -> list[Array]:
        return self.op.sample(self.rng, self.sizes(sizes), dtype)

    def poisoned(self, sizes: Mapping[str, int], dtype: np.dtype[Any], new: Callable[..., Array]) -> list[Array]:
        """Outputs that hold NaN, or numbers that no op gives."""
        arrays = []
        for arg in self.op.outputs:
            array = new(self.op.shape(arg, self.sizes(sizes)), arg.dtype(dtype))
            array[...] = np.nan if arg.dtype(dtype).kind == "f" else 77
            arrays.append(array)
        return arrays

    def given(self, arguments: Sequence[Array]) -> list[Array]:
        """Copies in the engine's memory."""
        return [self.engine.asarray(array.copy()) for array in arguments]

    def call(self, given: Sequence[Array], out: Sequence[Array] | None = None) -> list[Array]:
        """What a call updated, then its outputs, as NumPy arrays."""
        result = self.function(*given, **({"out": tuple(out)} if out else {}))
        outputs = result if isinstance(result, tuple) else () if result is None else (result,)
        if len(outputs) != len(self.op.outputs):
            raise AssertionError(f"{len(outputs)} outputs came back, instead of {len(self.op.outputs)}")
        return self.written(given, outputs)

    def written(self, given: Sequence[Array], outputs: Sequence[Array]) -> list[Array]:
        changed = [array for arg, array in zip(self.op.inputs, given, strict=True) if arg.inplace]
        return [self.engine.asnumpy(array) for array in (*changed, *outputs)]

    def unchanged(self, given: Sequence[Array], before: Sequence[Array], also_updated: bool = False) -> None:
        for arg, now, then in zip(self.op.inputs, given, before, strict=True):
            if (also_updated or not arg.inplace) and self.engine.asnumpy(now).tobytes() != then.tobytes():
                raise AssertionError(f"{arg.name} was changed")

    def compare(self, arguments: Sequence[Array], dtype: np.dtype[Any], **tolerance: Any) -> None:
        """Call the op, and judge the results."""
        given = self.given(arguments)
        actual = self.call(given)
        self.unchanged(given, arguments)
        self.judge(actual, expected(self.op, arguments), dtype, arguments, **tolerance)

    def judge(
        self,
        actual: Sequence[Array],
        wanted: Sequence[Array],
        dtype: np.dtype[Any],
        arguments: Sequence[Array],
        floors: Sequence[float] | None = None,
        slack: Sequence[float] | None = None,
    ) -> None:
        """Note how far results are from what they should be, as a share of the tolerance, and the worst of all.

        Errors are relative to an element and to the largest element, or to `floors` where all are small; `slack` is
        added. What is not finite must stand in the same places.
        """
        rtol = self.op.rtol[dtype.itemsize]
        for i, (arg, x, y) in enumerate(zip((*self.updated, *self.op.outputs), actual, wanted, strict=True)):
            kind, y = arg.dtype(dtype), np.asarray(y)
            if x.dtype != kind or x.shape != y.shape:
                raise AssertionError(f"{arg.name} is {x.dtype} {x.shape}, should be {kind} {y.shape}")
            if kind.kind == "f":
                finite = np.isfinite(y)
                largest = np.abs(y[finite]).max(initial=floors[i] if floors else 0.01)
                with np.errstate(all="ignore"):
                    allowed = rtol * (np.abs(y) + largest) + (slack[i] if slack else 0)
                    errors = np.where(finite, np.abs(x - y) / allowed, np.isfinite(x) * math.inf)
                errors[np.isnan(errors)] = np.where(finite & (x != y), math.inf, 0)[np.isnan(errors)]
            else:
                errors = np.where(x != y, math.inf, 0)
            worst = np.unravel_index(np.argmax(errors), errors.shape)
            error = float(errors[worst])
            if error > 1 and not error <= self.error:
                place = ", ".join(map(str, worst))
                shapes = ", ".join(f"{a.name} {b.shape}" for a, b in zip(self.op.inputs, arguments, strict=True))
                self.failure = (
                    f"{arg.name}[{place}] is {x[worst]}, should be {y[worst]}, which is {error:.2g} times the "
                    f"tolerance off ({dtype}, {shapes})"
                )
            self.error = error if math.isnan(self.error) else max(error, self.error)

    @contextmanager
    def refused(self, fault: str, arg: Arg | None, given: Sequence[Array]) -> Iterator[None]:
        """Expect an error that names op and argument, with nothing changed."""
        before = [self.engine.asnumpy(array).copy() for array in given]
        try:
            yield
        except (TypeError, ValueError) as error:
            for name in (self.op.name, arg.name if arg else self.op.name):
                if not re.search(rf"\b{name}\b", str(error)):
                    raise AssertionError(f"{fault}: the error should name {name}, it says: {error}") from error
        except Exception as error:
            raise AssertionError(f"{fault} should raise TypeError or ValueError, got {message_of(error)}") from error
        else:
            raise AssertionError(f"{fault} should be refused")
        self.unchanged(given, before, also_updated=True)


def expected(op: Op, arguments: Sequence[Array]) -> list[Array]:
    """What the formula gives in float64: what is updated in place, then the outputs."""
    wide = [a.astype(np.float64) if arg.kind in "fa" else a for arg, a in zip(op.inputs, arguments, strict=True)]
    with np.errstate(all="ignore"):
        return [np.asarray(array) for array in FORMULAS[op.name](*wide)]


def message_of(error: Exception) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"
