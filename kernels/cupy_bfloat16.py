"""Products of bfloat16: which matrices are of that type, where they lie, and who rounds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .cupy_sources import KERNELS, Stage
from .ops import Array

if TYPE_CHECKING:
    from .cupy_engine import CupyEngine

__all__ = ["in_bfloat16"]

# what a product multiplies
FACTORS = {
    "dense_forward": ("x", "w"),
    "dense_relu_forward": ("x", "w"),
    "dense_input_grad": ("dz", "w"),
    "dense_weight_grad": ("x", "dz"),
}


class Place(NamedTuple):
    """Where a matrix lies."""

    start: int
    stop: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def in_bfloat16(
    engine: CupyEngine, stages: Sequence[Stage], passing: Sequence[Array]
) -> tuple[list[Stage], list[Array]]:
    """Stages in float32, but their products multiply bfloat16; and the memory that they need for that.

    What `passing` matrices hold between kernels that can write and read bfloat16 is of that type, in other memory. Of
    other factors there are copies, each made when its matrix is new. A bias is added as what it is added to.
    """
    halves = {place: engine.buffer(place.shape, np.uint16) for place in enough(engine, stages, passing)}
    copies: dict[Place, Array] = {}
    fresh: set[Place] = set()
    result = []
    for kernel, given, written in stages:
        places = {name: place_of(engine, given[name]) for _, name in KERNELS[kernel].parameters}
        arrays = {name: halves.get(place, given[name]) for name, place in places.items()}
        half = {name for name in places if places[name] in halves}
        factors = list(FACTORS.get(kernel, ()))
        if factors and half & written and "b" in places:
            factors.append("b")  # which has to be of the result's type
        for name in factors:
            if name not in half:
                place = places[name]
                if place not in fresh:
                    copies.setdefault(place, engine.buffer(place.shape, np.uint16))
                    result.append(Stage("to_bfloat16", {"x": given[name], "h": copies[place]}, frozenset({"h"})))
                    fresh.add(place)
                arrays[name] = copies[place]
        result.append(Stage(kernel if factors or not half else f"{kernel}_bfloat16", arrays, written))
        fresh -= {place for name in written & places.keys() for place in fresh if overlap(place, places[name])}
    return result, [*halves.values(), *copies.values()]


def enough(engine: CupyEngine, stages: Sequence[Stage], passing: Sequence[Array]) -> set[Place]:
    """The factors of products that need be of no other type, because they are passing and all that use them can."""
    uses = [
        (stage.kernel, {name: place_of(engine, stage.arrays[name]) for _, name in KERNELS[stage.kernel].parameters})
        for stage in stages
    ]
    factors = {places[name] for kernel, places in uses for name in FACTORS.get(kernel, ())}
    found = factors.intersection(place_of(engine, x) for x in passing)
    while True:
        left = set(found)
        for kernel, places in uses:
            here = {name for name in places if places[name] in found}
            fits = "b" not in here if kernel in FACTORS else here in (set(), halves_of(f"{kernel}_bfloat16"))
            if not fits:
                left -= {places[name] for name in here}
        if left == found:
            return found
        found = left


def halves_of(kernel: str) -> set[str]:
    """The parameters of a kernel, if there is such a one, that are of bfloat16."""
    return {name for kind, name in KERNELS[kernel].parameters if kind == "Halves"} if kernel in KERNELS else set()


def place_of(engine: CupyEngine, x: Array) -> Place:
    start, stop = engine.span(x)
    return Place(start, stop, x.shape, x.strides)


def overlap(one: Place, other: Place) -> bool:
    return one.start < other.stop and other.start < one.stop
