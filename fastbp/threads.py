"""Threads: computing on some of them only, and taking turns with one model."""

from __future__ import annotations

import contextlib
import time

from .kernels.threads import Lock, blas_libraries, limited

__all__ = ["Turns", "limited_threads"]


def limited_threads(threads: int | None) -> contextlib.AbstractContextManager[None]:
    """Compute on at most `threads` threads in a ``with`` block; where several ask, on the least.

    Raises
    ------
    ImportError
        Where threadpoolctl is not installed.
    """
    return contextlib.nullcontext() if threads is None else limited(threads, blas_libraries())


class Turns(Lock):  # type: ignore[misc]
    """A lock that a thread which takes it again and again leaves to others in between."""

    def __init__(self) -> None:
        super().__init__()
        self._asking: set[object] = set()

    def __enter__(self) -> bool:  # type: ignore[override]
        asking = object()
        self._asking.add(asking)
        try:
            return self.acquire()
        finally:
            self._asking.discard(asking)

    def __exit__(self, *_: object) -> None:
        self.release()
        if self._asking:
            time.sleep(1e-4)  # a lock alone goes most often to the thread that has just released it

    def free_after_fork(self) -> None:
        super().free_after_fork()
        self._asking.clear()
