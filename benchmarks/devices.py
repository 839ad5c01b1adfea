"""Where the time of an op on a device goes: compiling, the first call, the transfer, the launch, the device itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from fastbp.kernels.engine import Call, Engine
from fastbp.kernels.ops import Array, Op

__all__ = ["DeviceTiming", "phases", "synchronize", "timing_of"]


class DeviceTiming(Protocol):
    """What an engine whose device works beside the host offers as its attribute ``timing``."""

    def compile(self, op: Op, arguments: Sequence[Array]) -> None:
        """Compile the kernel that `op` takes for these arguments, and do not run it."""

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""

    def device_seconds(self, run: Callable[[], object]) -> float:
        """How long the device worked on what `run` launches, by the device's own clock."""


def timing_of(engine: Engine) -> DeviceTiming | None:
    """An engine's `DeviceTiming`; None for one that computes on the host.

    Raises
    ------
    ValueError
        Where the device is not the host and there is none: a launch alone would count as the work.
    """
    found: DeviceTiming | None = vars(engine).get("timing") or vars(type(engine)).get("timing")
    if found is None and engine.device != "cpu":
        raise ValueError(
            f"engine {engine.name!r} works on {engine.device}, so to be measured it must have an attribute timing, "
            "as fastbp.benchmarks.devices.DeviceTiming describes it"
        )
    return found


def synchronize(engine: Engine) -> Callable[[], object]:
    """What waits for an engine's device."""
    timing = timing_of(engine)
    return timing.synchronize if timing else lambda: None


def phases(
    engine: Engine, timing: DeviceTiming, op: Op, inputs: Sequence[Array], sizes: dict[str, int], calls: int = 20
) -> dict[str, float]:
    """Seconds of each phase of one call of `op`.

    Parameters
    ----------
    engine : Engine
    timing : DeviceTiming
        The engine's.
    op : Op
    inputs : sequence of NumPy arrays
        The op's inputs.
    sizes : dict of str to int
        The op's dimensions.
    calls : int, default 20
        Over how many calls launch and device time are averaged.

    Returns
    -------
    dict
        ``transfer``, of the inputs to the device and of the outputs back; ``compile``, near 0 where the kernel is
        compiled already; ``first call``, after that; ``launch``, the host's part of a further call; ``device``, the
        device's part.
    """
    floats = next((x.dtype for x in inputs if x.dtype.kind == "f" and x.itemsize == 4), inputs[0].dtype)
    outputs = [engine.empty(op.shape(arg, sizes), arg.dtype(floats)) for arg in op.outputs]
    timing.synchronize()

    def clock(run: Callable[[], object], wait: bool = True) -> float:
        start = time.perf_counter()
        run()
        if wait:
            timing.synchronize()
        return time.perf_counter() - start

    given: list[Array] = []
    seconds = {"transfer": clock(lambda: given.extend(engine.asarray(x) for x in inputs))}
    arguments = [*given, *outputs]
    seconds["compile"] = clock(lambda: timing.compile(op, arguments))
    program = engine.program([Call(op, tuple(arguments))])

    def first() -> None:
        program.bind()
        program.run(1)

    seconds["first call"] = clock(first)
    program.run(1)  # which may make ready what further calls take, as a graph
    timing.synchronize()

    def again() -> None:
        for _ in range(calls):
            program.run(1)

    seconds["launch"] = clock(again, wait=False) / calls
    timing.synchronize()
    seconds["device"] = timing.device_seconds(again) / calls
    seconds["transfer"] += clock(lambda: [engine.asnumpy(array) for array in outputs])
    return seconds
