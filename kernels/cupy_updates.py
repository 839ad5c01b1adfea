"""Steps of plain SGD as part of the products that are weights' gradients."""

from __future__ import annotations

from collections.abc import Sequence

from .cupy_sources import KERNELS, Stage, address
from .engine import Engine
from .ops import Array

__all__ = ["updated_by_products"]

UPDATED = 1 << 20  # elements of weights, from which on their own product updates them; the others are updated together


def updated_by_products(engine: Engine, stages: Sequence[Stage]) -> tuple[list[Stage], list[Array]]:
    """The stages of a recording, but large gradients that only `sgd` reads are nowhere; and the memory needed for that.

    Each such product changes its weights itself, when nobody reads them any more and the learning rate is known.
    """
    uses = [
        (place, name in stage.written, range(*engine.span(stage.arrays[name])))
        for place, stage in enumerate(stages)
        for _, name in KERNELS[stage.kernel].parameters
    ]

    def users(x: Array, writers: bool = False) -> list[int]:
        start, stop = engine.span(x)
        return [n for n, writes, span in uses if span.start < stop and start < span.stop and (writes or not writers)]

    steps = [place for place, stage in enumerate(stages) if stage.kernel == "sgd"]
    if len(steps) != 1:
        return list(stages), []
    at = steps[0]
    p, g, lr = (stages[at].arrays[name] for name in ("p", "g", "lr"))
    factors = engine.empty((2,), p.dtype)
    moved: dict[int, tuple[int, Stage]] = {}  # from there: behind what, and as what
    bounds = [0, p.size]  # of what is left to update together
    for place, stage in enumerate(stages[:at]):
        if stage.kernel == "dense_weight_grad" and stage.arrays["dw"].size >= UPDATED:
            x, dz, dw = (stage.arrays[name] for name in ("x", "dz", "dw"))
            start = (address(dw) - address(g)) // dw.itemsize
            w = p[start : start + dw.size].reshape(dw.shape)
            behind = max(n for n in (place, *users(w), *users(lr, writers=True)) if n < at)
            changed = any(place < n <= behind for n in users(x, writers=True) + users(dz, writers=True))
            if set(users(dw)) == {place, at} and not changed:
                arrays = {"x": x, "dz": dz, "factors": factors, "w": w}
                moved[place] = behind, Stage("weight_step", arrays, frozenset({"w"}))
                bounds += start, start + dw.size
    if not moved:
        return list(stages), []
    first, result = min(behind for behind, _ in moved.values()), []
    for place, stage in enumerate(stages):
        if place == at:
            bounds.sort()
            for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
                if start < stop and users(g[start:stop], writers=True):  # between parameters is nothing
                    result.append(stage._replace(arrays={"p": p[start:stop], "g": g[start:stop], "lr": lr}))
        elif place not in moved:
            result.append(stage)
        if place == first:
            result.append(Stage("step_factors", {"lr": lr, "factors": factors}, frozenset({"factors"})))
        result += [step for behind, step in moved.values() if behind == place]
    return result, [factors]
