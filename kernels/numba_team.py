"""Several cores for one replay: its thread and helpers take the parts of a call, each the next as soon as it is free.

Nobody waits for a helper that has not begun: where the system gives one no core, the others take its parts. What the
parts are, and with them each bit of a result, does not depend on who takes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import add_symbol
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .numba_cache import with_disk_cache
from .numba_vectors import INDEX, INT, TRIPLE
from .ops import Array

__all__ = ["OPEN", "RUN_PARTS", "WORD", "ask_for_help", "call", "new_team"]

WORD = 8  # bytes
LINE = 8  # words of a cache line, which goes from core to core as a whole
# The words of a team. A ticket holds the number of a call, of its parts, and of those that were taken. Then come where
# the parts are, and how far apart; how many were done by helpers; whether these shall stay.
TICKET, FIRST, SIZE, DONE, OPEN = 0, LINE, LINE + 1, 2 * LINE, 3 * LINE
BITS = 16  # of a ticket, for each number of parts
MOST = (1 << BITS) - 1
PATIENCE = 64  # looks at what is awaited, until a helper that has nothing to do lets others have its core
LONG = 1 << 13  # looks, after some tenths of a millisecond: by then the system must have stopped a helper in its part

# Kernels that a disk cache keeps know these functions by names, to which each process gives its own addresses.
if sys.platform == "win32":
    of_system = {"give_way": ctypes.windll.kernel32.SwitchToThread, "sleep": ctypes.windll.kernel32.Sleep}
else:
    of_system = {"give_way": ctypes.CDLL(None).sched_yield, "sleep": ctypes.CDLL(None).usleep}
if sys.platform == "linux":
    current_core = ctypes.CDLL(None).sched_getcpu
for function_name, found in of_system.items():
    add_symbol(f"fastbp_{function_name}", ctypes.cast(found, ctypes.c_void_p).value)


def of_words(result: Any, build: Callable[..., Any]) -> Any:
    """A function of addresses and words for compiled code; ``build(builder, *words)`` writes it."""

    @intrinsic
    def function(typing_context: Any, *words: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            done = build(builder, *cgutils.unpack_tuple(builder, arguments[0]))
            return context.get_dummy_value() if result is types.void else done

        return result(types.StarArgTuple(words)), code

    return function


def word_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, INDEX.as_pointer())


def call_function(builder: Any, function: Any, row: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [INDEX]).as_pointer()
    builder.call(builder.inttoptr(function, kind), [row])


def call_named(builder: Any, name: str, result: Any, *arguments: Any) -> None:
    kind = ir.FunctionType(result, [x.type for x in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def rest_a_moment(builder: Any) -> None:
    if TRIPLE.startswith(("aarch64", "arm64")):
        call_named(builder, "llvm.aarch64.hint", ir.VoidType(), ir.Constant(INT, 1))
    else:
        call_named(builder, "llvm.x86.sse2.pause", ir.VoidType())


call = of_words(types.void, call_function)
read = of_words(types.intp, lambda b, at: b.load_atomic(word_at(b, at), "acquire", WORD))
write = of_words(types.void, lambda b, at, x: b.store_atomic(x, word_at(b, at), "release", WORD))
add_to = of_words(types.void, lambda b, at, x: b.atomic_rmw("add", word_at(b, at), x, "acq_rel"))
replace = of_words(
    types.boolean,
    lambda b, at, old, new: b.extract_value(b.cmpxchg(word_at(b, at), old, new, "acq_rel", "acquire"), 1),
)
rest = of_words(types.void, rest_a_moment)
give_way = of_words(types.void, lambda b: call_named(b, "fastbp_give_way", INT))
sleep = of_words(types.void, lambda b: call_named(b, "fastbp_sleep", INT, ir.Constant(INT, 1)))


@numba.njit(inline="always")
def take_parts(team: int) -> int:
    """Runs parts that nobody has taken, until there are none; returns how many."""
    taken = 0
    while True:
        ticket = read(team + WORD * TICKET)
        part = ticket & MOST
        if part >= (ticket >> BITS) & MOST:
            return taken
        # whoever gets the part is waited for, so until it is done there is no other call
        if replace(team + WORD * TICKET, ticket, ticket + 1):
            row = read(team + WORD * FIRST) + part * read(team + WORD * SIZE)
            call(read(row), row + WORD)
            taken += 1


def run_parts(row: int) -> None:
    team, parts, size = read(row), read(row + WORD), read(row + 2 * WORD)
    write(team + WORD * FIRST, row + 3 * WORD)
    write(team + WORD * SIZE, size)
    write(team + WORD * DONE, 0)
    number = (read(team + WORD * TICKET) >> 2 * BITS) + 1
    write(team + WORD * TICKET, (number << 2 * BITS) | (parts << BITS))
    others, looks = parts - take_parts(team), 0
    while read(team + WORD * DONE) < others:
        if looks < LONG:
            rest()
        else:
            sleep()  # which lets the system move a helper that it has stopped to this core
        looks += 1


def help_out(team: int) -> None:
    looks = 0
    while read(team + WORD * OPEN):
        taken = take_parts(team)
        if taken:
            add_to(team + WORD * DONE, taken)
            looks = 0
        elif looks < PATIENCE:
            rest()
            looks += 1
        else:
            give_way()
            looks = 0


#: The C function whose row lists a team, a number of parts, the bytes that each takes, and the parts: rows behind ops.
RUN_PARTS = with_disk_cache(functools.partial(numba.cfunc, "void(intp)"), run_parts)
help_until_closed = with_disk_cache(functools.partial(numba.njit, "void(intp)", nogil=True), help_out)


def new_team() -> Array:
    """A team's words, which begin a cache line."""
    words = np.zeros(OPEN + 2 * LINE, np.int64)
    return words[-words.ctypes.data % (WORD * LINE) // WORD :]


class Helper:
    """A thread that takes parts of a team's calls, from when it is asked to until the team is closed."""

    def __init__(self) -> None:
        self.asked: SimpleQueue[Array] = SimpleQueue()  # no Python code, which Ctrl-C could leave in its middle
        self.thread = threading.Thread(target=self._work, name="fastbp helper", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while True:
            team = self.asked.get()  # whose memory stays while this looks at it
            help_until_closed(team.ctypes.data)


helpers: list[Helper] = []
latest = [new_team()]  # that was helped


def forget_helpers() -> None:
    """A child process has no other thread."""
    helpers.clear()
    latest[:] = [new_team()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_helpers)


@contextlib.contextmanager
def kept_off_this_core(threads: Iterable[threading.Thread]) -> Iterator[None]:
    """Keep other threads from the core that this one is on, for a ``with`` block.

    Behind that, they may run where this thread may. Where few cores share a cache, Linux may wake a thread on the core
    of whoever wakes it, and leave both there for 10 ms, though the others are idle.
    """
    if sys.platform != "linux":
        yield
        return
    ids, cores = [thread.native_id for thread in threads], os.sched_getaffinity(0)
    let_run_on(ids, cores - {current_core()} or cores)
    try:
        yield
    finally:
        let_run_on(ids, cores)


def let_run_on(threads: Iterable[int | None], cores: set[int]) -> None:
    with contextlib.suppress(OSError):  # where a process may not choose, the system does
        for thread in filter(None, threads):
            os.sched_setaffinity(thread, cores)


def ask_for_help(team: Array, count: int) -> None:
    """Open a team, and let up to `count` threads help it until it is closed, unless they help another one."""
    if latest[0][OPEN]:
        return
    with contextlib.suppress(RuntimeError):  # where there can be no more threads, those that are there do
        while len(helpers) < count:
            helpers.append(Helper())
    latest[0], team[OPEN] = team, 1
    asked = helpers[:count]
    with kept_off_this_core([helper.thread for helper in asked]):
        for helper in asked:
            helper.asked.put(team)
