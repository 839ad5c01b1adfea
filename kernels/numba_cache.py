"""Compiled functions on disk, which later processes take from there."""

from __future__ import annotations

import functools
import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.core.compiler_lock import global_compiler_lock

__all__ = ["DIGEST", "with_disk_cache"]

# Numba's cache would not see a change in what a function calls from another file.
SOURCES = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("numba_*.py")))
DIGEST = f"{zlib.crc32(SOURCES):08x}"

log = logging.getLogger("fastbp")


def with_disk_cache(decorator: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """Compile a function with a disk cache, or without one where no folder can be written to, or files are damaged.

    Numba tells functions in a cache apart by their names, to which the digest of all sources is added here; each
    needs a name of its own.
    """
    function.__qualname__ += f"_{DIGEST}"
    try:
        return decorator(cache=True)(function)
    except Exception as error:
        say_uncached(type(error).__name__)
        return decorator(cache=False)(function)


@functools.cache
def say_uncached(error: str) -> None:
    log.warning(
        "fastbp: no folder can keep the compiled kernels (%s); set NUMBA_CACHE_DIR to one that can be written to, or "
        "remove a damaged one",
        error,
    )


# so that no child finds the compiler taken, by a thread that it does not have
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )
