"""What an op is: a row of the contract in `ops`, and what follows from it.

A row reads ``name: inputs -> outputs``. An argument is ``name:kind[dimensions]``:

====  =======================================================================
kind  elements
====  =======================================================================
f     the model's float type, float32 or float64 (one type in one call)
i     int64: class labels, row numbers
s     float64: scalars and sums that outlive a call
u     uint64: keys and counters of random numbers
a     any real dtype, rows at any stride: the user's own data
====  =======================================================================

Letters are dimensions that must agree within a call, ``!`` marks an argument that is updated in place, and ``<N`` says
that its numbers run from 0 to below a dimension. Everything else about an op follows from its row: shape errors,
allocation, lowering, tests, benchmarks.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

__all__ = ["Arg", "Array", "Op", "Reach", "Sampler"]

#: An engine's array: a NumPy array, or what stands for one on another device or in a recording.
Array: TypeAlias = "NDArray[Any]"
# as strings, because importing numpy.random takes a fifth of the time of NumPy's own import
Sampler: TypeAlias = "Callable[[Generator, tuple[int, ...], Mapping[str, int]], Array]"
Reach: TypeAlias = "Callable[[Mapping[str, Array], Mapping[str, int]], tuple[str, Array, Array, str]]"

meaning = {
    "f": "array of the float type",
    "i": "array of int64",
    "s": "array of float64",
    "u": "array of uint64",
    "a": "array of any real dtype, at any strides",
}
type_of_kind = {"i": np.dtype(np.int64), "s": np.dtype(np.float64), "u": np.dtype(np.uint64)}


class Arg(NamedTuple):
    """One argument of an op: ``p!:f[P]`` is ``Arg("p", "f", ("P",), inplace=True)``."""

    name: str
    kind: str
    dims: tuple[str, ...]
    inplace: bool
    below: str = ""

    @classmethod
    def parse(cls, text: str) -> Arg:
        match = re.fullmatch(r"(\w+)(!?):([fisua])\[([\w,]+)\](?:<(\w))?", text)
        if match is None:
            raise ValueError(f"an argument must read name:kind[dimensions], got {text!r}")
        name, mark, kind, dims, below = match.groups()
        return cls(name, kind, tuple(dims.split(",")), bool(mark), below or "")

    def text(self) -> str:
        """What this argument is, in words."""
        shape = ", ".join(self.dims) + ("," if len(self.dims) == 1 else "")
        limits = f", from 0 to below {self.below}" if self.below else ""
        return f"{self.name} : {meaning[self.kind]}, shape ({shape}){limits}{', updated in place' * self.inplace}"

    def dtype(self, floats: np.dtype[Any]) -> np.dtype[Any]:
        """The dtype of this argument where the model's float type is `floats`."""
        return type_of_kind.get(self.kind, floats)


def several_matrices(d: Mapping[str, int]) -> int:
    return 6 * math.prod(sorted(d.values())[-2:])


class Op:
    """A row of the contract.

    Parameters
    ----------
    name : str
        What layers call, and what an engine names its kernel.
    signature : str
        ``inputs -> outputs``, as the module's text explains.
    flops : callable
        Floating-point operations of one call, from the sizes of its dimensions.
    samples : mapping
        How to draw an argument for checks and benchmarks, by its name, where `USUAL` does not say it.
    rtol : mapping
        Relative tolerance against a float64 reference, by the size of the float type in bytes.
    room : callable
        How many numbers a kernel may keep in between, from the sizes of the op's dimensions.
    reach : callable, optional
        Which argument tells where to read or write, beyond a mark ``<N``: its name, the first and the last of these
        places, and the dimension that they lie in, from the arguments by name and the sizes of the dimensions.
    cuts : str
        Dimensions along which a call may be cut: the op on a part of each array that has one of them gives this part of
        the outputs. What is updated in place and has no such dimension counts calls, and is the same for each part.
    """

    def __init__(
        self,
        name: str,
        signature: str,
        flops: Callable[[Mapping[str, int]], int] = lambda d: 0,
        samples: Mapping[str, Sampler] | None = None,
        rtol: Mapping[int, float] | None = None,
        room: Callable[[Mapping[str, int]], int] = several_matrices,
        reach: Reach | None = None,
        cuts: str = "",
    ) -> None:
        self.name, self.signature, self.flops, self.room, self.reach = name, signature, flops, room, reach
        self.cuts = cuts
        self.samples, self.rtol = samples or {}, rtol or {4: 1e-5, 8: 1e-12}
        inputs, _, outputs = signature.partition("->")
        self.inputs = tuple(map(Arg.parse, inputs.split()))
        self.outputs = tuple(map(Arg.parse, outputs.split()))

    def __repr__(self) -> str:
        return f"<op {self.name}: {self.signature}>"

    def text(self) -> str:
        """What the row says, in words."""
        lines = [self.signature, "", "Parameters", "----------", *(arg.text() for arg in self.inputs)]
        if self.outputs:
            into = "an array, or a tuple of them, to write the results into"
            lines += [f"out : {into}; new ones by default", "", "Returns", "-------"]
        return "\n".join([*lines, *(arg.text() for arg in self.outputs)])

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> Mapping[str, int]:
        """Find the size of each dimension from the shapes of the inputs.

        Raises
        ------
        ValueError
            Where a shape does not fit the row; it names the op, the argument, its shape and what was expected.
        """
        return _sizes(self, tuple(shapes))

    def shape(self, arg: Arg, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of an argument, given the sizes of the dimensions."""
        return tuple(int(d) if d.isdigit() else sizes[d] for d in arg.dims)

    def part(self, arguments: Sequence[Array], along: str, start: int, stop: int) -> list[Array]:
        """The arguments of the part of a call that goes from `start` to `stop` in one dimension."""
        some = slice(start, stop)
        return [
            array[tuple(some if d == along else slice(None) for d in arg.dims)]
            for arg, array in zip((*self.inputs, *self.outputs), arguments, strict=True)
        ]

    def bytes(self, sizes: Mapping[str, int], floats: np.dtype[Any]) -> int:
        """Least memory traffic of one call: each input read once, each output written once."""
        return sum(
            (1 + arg.inplace) * int(np.prod(self.shape(arg, sizes))) * arg.dtype(floats).itemsize
            for arg in (*self.inputs, *self.outputs)
        )

    def sample(self, rng: Generator, sizes: Mapping[str, int], floats: np.dtype[Any]) -> list[Array]:
        """Draw valid inputs for one call."""
        drawn = []
        for arg in self.inputs:
            draw = self.samples.get(arg.name) or USUAL.get(arg.name, normal)
            drawn.append(draw(rng, self.shape(arg, sizes), sizes).astype(arg.dtype(floats)))
        return drawn


@functools.lru_cache(1024)  # because each eager call asks several times, for the same shapes as the one before it
def _sizes(op: Op, shapes: tuple[tuple[int, ...], ...]) -> Mapping[str, int]:
    sizes: dict[str, int] = {}
    for arg, shape in zip(op.inputs, shapes, strict=True):
        expected = tuple(int(d) if d.isdigit() else sizes.get(d, d) for d in arg.dims)
        fits = len(shape) == len(expected) and all(
            isinstance(e, str) or e == n for e, n in zip(expected, shape, strict=True)
        )
        if not fits or 0 in shape:
            wanted = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
            raise ValueError(f"{op.name}: {arg.name} must have shape ({wanted}), none of it empty; got {shape}")
        sizes.update(zip(arg.dims, shape, strict=True))
    return MappingProxyType(sizes)


def normal(rng: Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    return rng.standard_normal(shape)


def uniform(rng: Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    return rng.uniform(0.1, 1, shape)


def between(low: float, high: float) -> Sampler:
    return lambda rng, shape, sizes: rng.uniform(low, high, shape)


def small(rng: Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    return rng.uniform(-0.1, 0.1, shape)


def rectified(rng: Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    return np.maximum(rng.standard_normal(shape), 0)


def probabilities(rng: Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    weights = rng.uniform(0.01, 1, shape)
    return weights / weights.sum(axis=1, keepdims=True)


def order(rng: Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    return rng.permutation(shape[0])


def key(rng: Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    """Two words of a seed, a step and a layer's place."""
    return np.concatenate([rng.integers(0, 2**64, 2, np.uint64), rng.integers(0, 2**40, 2, np.uint64)])


def words(rng: Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    return rng.integers(0, 2**64, shape, np.uint64)


def mask(rng: Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    return 2.0 * rng.integers(0, 2, shape)


def flag(rng: Generator, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    return rng.integers(0, 2, shape)


def below(end: str) -> Sampler:
    return lambda rng, shape, sizes: rng.integers(0, sizes[end], shape)


def constant(*values: float) -> Sampler:
    return lambda rng, shape, sizes: np.array(values)


USUAL: dict[str, Sampler] = {
    "rows": below("M"),
    "t": below("N"),
    "order": order,
    "cursor": constant(0),
    "key": key,
    "keys": words,
    "y": rectified,
    "mask": mask,
    "p": probabilities,
    "total": constant(0.5, 3),
    "rate": constant(0.3),
    "lr": constant(0.1),
    "momentum": constant(0.9),
    "nesterov": flag,
    "betas": constant(0.9, 0.999),
    "eps": constant(1e-8),
    "steps": constant(3),
    "step": constant(0),
    "limit": constant(0.8),
    "l2": constant(0.2),
    "l1": constant(0.3),
    "weight_decay": constant(0.2),
    "alpha": constant(0.9),
    "centered": flag,
    "weights": uniform,
    "class_weight": uniform,
    "pos_weight": uniform,
    "smoothing": constant(0.1),
    "mean": flag,
    "negative_slope": constant(0.1),
    "beta": constant(2),
    "threshold": constant(1.5),
    "delta": constant(0.7),
    "log_input": flag,
}
