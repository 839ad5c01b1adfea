"""The contract: every op that an engine computes, one row each.

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

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

__all__ = ["OPS", "Arg", "Array", "Op"]

#: An engine's array: a NumPy array, or what stands for one on another device or in a recording.
Array: TypeAlias = "NDArray[Any]"
# as strings, because importing numpy.random takes a fifth of the time of NumPy's own import
Sampler: TypeAlias = "Callable[[Generator, tuple[int, ...]], Array]"

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

    def dtype(self, floats: np.dtype[Any]) -> np.dtype[Any]:
        """The dtype of this argument where the model's float type is `floats`."""
        return type_of_kind.get(self.kind, floats)


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
        How to draw an argument for tests and benchmarks where standard normal numbers (or zeros, for what is not a
        float) are not valid input.
    rtol : mapping
        Relative tolerance against a float64 reference, by the size of the float type in bytes.
    """

    def __init__(
        self,
        name: str,
        signature: str,
        flops: Callable[[Mapping[str, int]], int] = lambda d: 0,
        samples: Mapping[str, Sampler] | None = None,
        rtol: Mapping[int, float] | None = None,
    ) -> None:
        self.name, self.signature, self.flops = name, signature, flops
        self.samples, self.rtol = samples or {}, rtol or {4: 1e-5, 8: 1e-12}
        inputs, _, outputs = signature.partition("->")
        self.inputs = tuple(map(Arg.parse, inputs.split()))
        self.outputs = tuple(map(Arg.parse, outputs.split()))

    def __repr__(self) -> str:
        return f"<op {self.name}: {self.signature}>"

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """Find the size of each dimension from the shapes of the inputs.

        Raises
        ------
        ValueError
            Where a shape does not fit the row; it names the op, the argument, its shape and what was expected.
        """
        sizes: dict[str, int] = {}
        for arg, shape in zip(self.inputs, shapes, strict=True):
            expected = tuple(int(d) if d.isdigit() else sizes.get(d, d) for d in arg.dims)
            fits = len(shape) == len(expected) and all(
                isinstance(e, str) or e == n for e, n in zip(expected, shape, strict=True)
            )
            if not fits or 0 in shape:
                wanted = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
                raise ValueError(f"{self.name}: {arg.name} must have shape ({wanted}), none of it empty; got {shape}")
            sizes.update(zip(arg.dims, shape, strict=True))
        return sizes

    def shape(self, arg: Arg, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of an argument, given the sizes of the dimensions."""
        return tuple(int(d) if d.isdigit() else sizes[d] for d in arg.dims)

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
            shape, dtype = self.shape(arg, sizes), arg.dtype(floats)
            draw = self.samples.get(arg.name, _normal if arg.kind in "fa" else _zeros)
            drawn.append(draw(rng, shape).astype(dtype))
        return drawn


def _normal(rng: Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape)


def _zeros(rng: Generator, shape: tuple[int, ...]) -> Array:
    return np.zeros(shape)


def _first_numbers(rng: Generator, shape: tuple[int, ...]) -> Array:
    """Labels or row numbers that are valid wherever there are two or more classes or rows."""
    return rng.integers(0, 2, shape)


def _probabilities(rng: Generator, shape: tuple[int, ...]) -> Array:
    weights = rng.uniform(0.1, 1, shape)
    normalised: Array = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def _rectified(rng: Generator, shape: tuple[int, ...]) -> Array:
    return np.maximum(rng.standard_normal(shape), 0)


def _positive(rng: Generator, shape: tuple[int, ...]) -> Array:
    return rng.uniform(0.1, 1, shape)


def _fraction(rng: Generator, shape: tuple[int, ...]) -> Array:
    return np.full(shape, 0.3)


def _product(d: Mapping[str, int]) -> int:
    return 2 * d["B"] * d["K"] * d["N"]


def _per_element(n: int) -> Callable[[Mapping[str, int]], int]:
    """`n` operations for each element of the op's largest argument."""
    return lambda d: n * d.get("B", 1) * d.get("N", 1) * d.get("P", 1)


_CLASSIFIED: dict[str, Sampler] = {"p": _probabilities, "t": _first_numbers}

OPS: dict[str, Op] = {
    op.name: op
    for op in [
        # a batch: the next rows in order, gathered and converted to the model's float type
        Op("next_batch", "order:i[M] cursor!:i[1] rows!:i[B] ->"),
        Op("take", "x:a[M,K] rows:i[B]<M -> xb:f[B,K]", samples={"rows": _first_numbers}),
        Op("take_labels", "t:i[M] rows:i[B]<M -> tb:i[B]", samples={"rows": _first_numbers}),
        # layers
        Op("dense_forward", "x:f[B,K] w:f[K,N] b:f[1,N] -> z:f[B,N]", _product),
        Op("dense_input_grad", "dz:f[B,N] w:f[K,N] -> dx:f[B,K]", _product),
        Op("dense_weight_grad", "x:f[B,K] dz:f[B,N] -> dw:f[K,N]", _product),
        Op("dense_bias_grad", "dz:f[B,N] -> db:f[1,N]", _per_element(1)),
        Op("relu_forward", "x:f[B,N] -> y:f[B,N]", _per_element(1)),
        Op("relu_backward", "dy:f[B,N] y:f[B,N] -> dx:f[B,N]", _per_element(1), {"y": _rectified}),
        Op(
            "dropout_forward",
            "x:f[B,N] rate:s[1] key!:u[4] -> y:f[B,N] mask:f[B,N]",
            _per_element(2),
            {"rate": _fraction},
        ),
        Op("dropout_backward", "dy:f[B,N] mask:f[B,N] -> dx:f[B,N]", _per_element(1)),
        Op("softmax_forward", "z:f[B,N] -> p:f[B,N]", _per_element(4)),
        Op("softmax_jacobian", "p:f[B,N] -> j:f[B,N,N]", lambda d: 2 * d["B"] * d["N"] ** 2, {"p": _probabilities}),
        Op("softmax_backward", "dp:f[B,N] p:f[B,N] -> dz:f[B,N]", _per_element(4), {"p": _probabilities}),
        # losses: total[0] += the sum of the rows' losses, total[1] += what their mean is divided by
        Op("cross_entropy_forward", "p:f[B,N] t:i[B]<N total!:s[2] -> cost:f[B]", lambda d: 2 * d["B"], _CLASSIFIED),
        Op("cross_entropy_backward", "p:f[B,N] t:i[B]<N -> dp:f[B,N]", lambda d: 2 * d["B"], _CLASSIFIED),
        Op("softmax_cross_entropy", "z:f[B,N] t:i[B]<N total!:s[2] -> dz:f[B,N]", _per_element(6), _CLASSIFIED),
        Op("softmax_cross_entropy_backward", "p:f[B,N] t:i[B]<N -> dz:f[B,N]", _per_element(1), _CLASSIFIED),
        Op("mean_squared_error", "y:f[B,N] t:f[B,N] total!:s[2] -> dy:f[B,N]", _per_element(4)),
        # two or three of the above in one; `fusion.RULES` says which
        Op("dense_relu_forward", "x:f[B,K] w:f[K,N] b:f[1,N] -> y:f[B,N]", _product),
        Op("dense_relu_input_grad", "dz:f[B,N] w:f[K,N] y:f[B,K] -> dx:f[B,K]", _product),
        Op("dense_relu_grads", "dz:f[B,N] w:f[K,N] y:f[B,K] -> dx:f[B,K] db:f[1,K]", _product),
        Op("dense_weight_sgd", "x:f[B,K] dz:f[B,N] w!:f[K,N] lr:s[1] ->", _product, {"lr": _fraction}),
        Op("dense_bias_sgd", "dz:f[B,N] b!:f[1,N] lr:s[1] ->", _per_element(1), {"lr": _fraction}),
        Op(
            "dense_softmax_cross_entropy",
            "x:f[B,K] w:f[K,N] b:f[1,N] t:i[B]<N total!:s[2] -> dz:f[B,N]",
            _product,
            _CLASSIFIED,
        ),
        # from a ReLU's output through the last layer and the loss back to the gradient in front of that ReLU
        Op(
            "classifier_grads",
            "x:f[B,K] w:f[K,N] b:f[1,N] t:i[B]<N total!:s[2] -> dz:f[B,N] dx:f[B,K] db:f[1,K]",
            lambda d: 2 * _product(d),
            _CLASSIFIED | {"x": _rectified},
        ),
        # the same, and plain SGD on that layer
        Op(
            "classifier_sgd",
            "x:f[B,K] w!:f[K,N] b!:f[1,N] t:i[B]<N total!:s[2] lr:s[1] -> dx:f[B,K] db:f[1,K]",
            lambda d: 3 * _product(d),
            _CLASSIFIED | {"x": _rectified, "lr": _fraction},
        ),
        # optimizers, over all parameters at once
        Op("sgd", "p!:f[P] g:f[P] lr:s[1] ->", _per_element(2), {"lr": _fraction}),
        Op(
            "sgd_momentum",
            "p!:f[P] velocity!:f[P] g:f[P] lr:s[1] momentum:s[1] nesterov:s[1] ->",
            _per_element(6),
            {"lr": _fraction, "momentum": _fraction},
        ),
        Op(
            "adam",
            "p!:f[P] m!:f[P] v!:f[P] g:f[P] lr:s[1] betas:s[2] eps:s[1] steps!:s[1] ->",
            _per_element(12),
            {"v": _positive, "lr": _fraction, "betas": _fraction, "eps": _fraction},
        ),
    ]
}
