"""Locks that a fork leaves free, and how many threads may compute."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from _thread import RLock
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

__all__ = ["Lock", "allowed_threads", "blas_libraries", "limited"]


class Lock(RLock):  # type: ignore[misc]  # which typeshed calls final, and Python does not
    """A lock that its thread may take again, and that in a forked process no other thread of the parent's holds."""

    #: Whether a fork waits for it: who holds it computes, and the child would find BLAS's own locks taken for ever.
    computes = False

    def __init__(self) -> None:
        _locks.add(self)

    def free_after_fork(self) -> None:
        if self.acquire(blocking=False):  # it is nobody's, or the thread's that forked
            self.release()
        else:
            self._at_fork_reinit()  # type: ignore[attr-defined]


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()
_forking = Lock()
_waited_for: list[Lock] = []  # by the thread that forks
LONGEST_WAIT = 1.0  # seconds, for each lock


@dataclass(eq=False)
class Ask:
    """Who wants BLAS to have how many threads at most, for as long as this is held."""

    by: int
    threads: int


# BLAS's setting belongs to the whole process, so those who change it share one book
_book = Lock()
_asked: weakref.WeakSet[Ask] = weakref.WeakSet()
_before: list[tuple[Any, int]] = []  # each BLAS library, and its threads before anyone asked; empty if nobody does


@contextlib.contextmanager
def limited(threads: int, libraries: list[Any]) -> Iterator[None]:
    """Hold BLAS to some threads for a ``with`` block; where several ask, to the least.

    Should Ctrl-C come in the midst of its end, the next block's end makes up for it.
    """
    ask = Ask(threading.get_ident(), threads)
    try:
        with _book:
            if not _before:
                _before[:] = [(library, library.get_num_threads()) for library in libraries]
            _asked.add(ask)
            _apply()
        yield
    finally:
        with _book:
            _asked.discard(ask)
            _apply()


def allowed_threads(most: int, libraries: list[Any]) -> int:
    """How many threads may compute: at most so many, and no more than these BLAS libraries may use."""
    with _book:
        return min([most, *(library.get_num_threads() for library in libraries), *(ask.threads for ask in _asked)])


def _apply() -> None:
    for library, before in _before:
        _set_threads(library, min([before, *(ask.threads for ask in _asked)]))
    if not _asked:
        _before.clear()


def _set_threads(library: Any, threads: int) -> None:
    """Set them from any thread: threadpoolctl, from 3.7 on, hears only that which was the first to set them."""
    forget_who_was_first = getattr(library, "clear_controlling_thread", lambda force: None)
    forget_who_was_first(force=True)
    library.set_num_threads(threads)
    forget_who_was_first(force=True)


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


def _before_fork() -> None:
    _forking.acquire()
    _waited_for[:] = [lock for lock in list(_locks) if lock.computes and lock.acquire(timeout=LONGEST_WAIT)]


def _after_fork() -> None:
    while _waited_for:
        _waited_for.pop().release()
    _forking.release()


def _after_fork_in_child() -> None:
    """In a child process there is only the thread that forked."""
    _after_fork()
    for lock in _locks:
        lock.free_after_fork()
    if _asked:
        for ask in [ask for ask in _asked if ask.by != threading.get_ident()]:
            _asked.discard(ask)
        _apply()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
