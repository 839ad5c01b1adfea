"""Locks that a fork leaves free, and how many threads may compute."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from _thread import RLock
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

__all__ = ["Lock", "allowed_threads", "blas_libraries", "limited"]


class Lock(RLock):  # type: ignore[misc]  # which typeshed calls final, and Python does not
    """A lock that its thread may take again, and that in a forked process no other thread of the parent's holds."""

    def __init__(self) -> None:
        _locks.add(self)

    def free_after_fork(self) -> None:
        if self.acquire(blocking=False):  # it is nobody's, or the thread's that forked
            self.release()
        else:
            self._at_fork_reinit()  # type: ignore[attr-defined]


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


class Ask(NamedTuple):
    """Who wants BLAS to have how many threads at most."""

    by: int
    threads: int


# BLAS's setting belongs to the whole process, so those who change it share one book
_book = Lock()
_asked: list[Ask] = []
_before: list[tuple[Any, int]] = []  # each BLAS library, and its threads before anyone asked


@contextlib.contextmanager
def limited(threads: int, libraries: list[Any]) -> Iterator[None]:
    """Hold BLAS to some threads for a ``with`` block; where several ask, to the least."""
    ask = Ask(threading.get_ident(), threads)
    try:
        with _book:
            if not _asked:
                _before[:] = [(library, library.get_num_threads()) for library in libraries]
            _asked.append(ask)
            _apply()
        yield
    finally:
        with contextlib.suppress(ValueError):  # Ctrl-C may have come before it was there
            _asked.remove(ask)
        with _book:
            _apply()


def allowed_threads(most: int, libraries: list[Any]) -> int:
    """How many threads may compute: at most so many, and no more than these BLAS libraries may use."""
    with _book:
        return min([most, *(library.get_num_threads() for library in libraries), *(ask.threads for ask in _asked)])


def _apply() -> None:
    for library, before in _before:
        library.set_num_threads(min([before, *(ask.threads for ask in _asked)]))


@cache
def blas_libraries() -> list[Any]:
    """The BLAS libraries of this process; finding them takes longer than a small fit.

    Raises
    ------
    ImportError
        Where threadpoolctl is not installed.
    """
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        raise ImportError("threads= needs threadpoolctl: pip install threadpoolctl") from None
    return [library for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]


def _after_fork() -> None:
    """In a child process there is only the thread that forked."""
    for lock in _locks:
        lock.free_after_fork()
    if _asked:
        _asked[:] = [ask for ask in _asked if ask.by == threading.get_ident()]
        _apply()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
