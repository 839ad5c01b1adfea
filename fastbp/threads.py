"""Threads: computing on some of them only, and taking turns with one model."""

from __future__ import annotations

import contextlib

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
    """Whose turn it is to read or change all parameters of a model: for a few steps, or for a prediction.

    Whoever trains takes it again and again, and in between lets those through who hold `queue` to have it next. Both
    are held by ``with`` alone: its code is C, where Ctrl-C finds a lock either held or free.
    """

    computes = True

    def __init__(self) -> None:
        super().__init__()
        self.queue = Lock()

    def let_others(self) -> None:
        """Called between turns by the one who takes them again and again."""
        with self.queue:
            pass
