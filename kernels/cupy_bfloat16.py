"""Products of bfloat16: which matrices are of that type, where they lie, and who rounds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .cupy_sources import KERNELS, Stage
from .engine import Engine
from .ops import Array

__all__ = ["in_bfloat16"]

# what a product multiplies
FACTORS = {
    "dense_forward": ("x", "w"),
    "dense_relu_forward": ("x", "w"),
    "dense_input_grad": ("dz", "w"),
    "dense_weight_grad": ("x", "dz"),
    "weight_step": ("x", "dz"),
}


class Span(NamedTuple):
    """Where a matrix lies."""

    start: int
    stop: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def in_bfloat16(engine: Engine, stages: Sequence[Stage], passing: Sequence[Array]) -> tuple[list[Stage], list[Array]]:
    """Stages in float32, but their products multiply bfloat16; and the memory that they need for that.

    What `passing` matrices hold between kernels that can write and read bfloat16 is of that type, in other memory. Of
    other factors there are copies, each made when its matrix is new. A bias is added as what it is added to.
    """
    uses = [
        (stage.kernel, {name: span_of(engine, stage.arrays[name]) for _, name in KERNELS[stage.kernel].parameters})
        for stage in stages
    ]
    found = enough(uses, {span_of(engine, x) for x in passing})
    halves = {span: engine.buffer(span.shape, np.uint16) for span in found}
    copies: dict[Span, Array] = {}
    fresh: set[Span] = set()
    result = []
    for (kernel, given, written), (_, spans) in zip(stages, uses, strict=True):
        arrays = {name: halves.get(span, given[name]) for name, span in spans.items()}
        half = {name for name in spans if spans[name] in halves}
        factors = list(FACTORS.get(kernel, ()))
        if factors and half & written and "b" in spans:
            factors.append("b")  # which has to be of the result's type
        for name in factors:
            if name not in half:
                span = spans[name]
                if span not in fresh:
                    if span not in copies:
                        copies[span] = engine.buffer(span.shape, np.uint16)
                    result.append(Stage("to_bfloat16", {"x": given[name], "h": copies[span]}, frozenset({"h"})))
                    fresh.add(span)
                arrays[name] = copies[span]
        result.append(Stage(kernel if factors or not half else f"{kernel}_bfloat16", arrays, written))
        fresh -= {span for name in written & spans.keys() for span in fresh if overlap(span, spans[name])}
    return result, [*halves.values(), *copies.values()]


def enough(uses: Sequence[tuple[str, dict[str, Span]]], passing: set[Span]) -> set[Span]:
    """The factors of products that need be of no other type, because they are passing and all that use them can."""
    found = passing & {spans[name] for kernel, spans in uses for name in FACTORS.get(kernel, ())}
    while True:
        left = set(found)
        for kernel, spans in uses:
            here = {name for name in spans if spans[name] in found}
            fits = "b" not in here if kernel in FACTORS else here in (set(), halves_of(f"{kernel}_bfloat16"))
            if not fits:
                left -= {spans[name] for name in here}
        if left == found:
            return found
        found = left


def halves_of(kernel: str) -> set[str]:
    """The parameters of a kernel, if there is such a one, that are of bfloat16."""
    return {name for kind, name in KERNELS[kernel].parameters if kind == "Halves"} if kernel in KERNELS else set()


def span_of(engine: Engine, x: Array) -> Span:
    start, stop = engine.span(x)
    return Span(start, stop, x.shape, x.strides)


def overlap(one: Span, other: Span) -> bool:
    return one.start < other.stop and other.start < one.stop
