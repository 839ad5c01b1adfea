"""Threads: holding BLAS to some of them, and taking turns with one model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

from .kernels.engine import Engine

__all__ = ["Turns", "limited_threads"]

# BLAS's setting belongs to the whole process, so those who ask for it at once share one
_lock = threading.Lock()
_asked: list[int] = []
_before: list[tuple[Any, int]] = []  # each BLAS library, and its threads before anyone asked


def limited_threads(threads: int | None, engine: Engine) -> contextlib.AbstractContextManager[None]:
    """Hold BLAS to `threads` threads for a ``with`` block; where several ask, to the least.

    Raises
    ------
    ImportError
        Where threadpoolctl is not installed.
    """
    return contextlib.nullcontext() if threads is None else _limited(threads, _libraries(engine))


@contextlib.contextmanager
def _limited(threads: int, libraries: list[Any]) -> Iterator[None]:
    with _lock:
        if not _asked:
            _before[:] = [(library, library.get_num_threads()) for library in libraries]
        _asked.append(threads)
        _apply()
    try:
        yield
    finally:
        with _lock:
            _asked.remove(threads)
            _apply()


def _apply() -> None:
    for library, before in _before:
        library.set_num_threads(min([before, *_asked]))


@cache
def _libraries(engine: Engine) -> list[Any]:
    """The BLAS libraries that an engine uses; finding them takes longer than a small fit."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        raise ImportError("threads= needs threadpoolctl: pip install threadpoolctl") from None
    engine.load_libraries()
    return [library for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]


class Turns:
    """A lock, for ``with`` blocks, that a thread which takes it again and again leaves to others in between."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._asking: set[object] = set()

    def __enter__(self) -> None:
        asking = object()
        self._asking.add(asking)
        try:
            self._lock.acquire()
        finally:
            self._asking.discard(asking)

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if self._asking:
            time.sleep(1e-4)  # a lock alone goes most often to the thread that has just released it
