"""What a recording depends on, as something to look it up by."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from .kernels.engine import Engine
from .kernels.ops import Array
from .part import Part

__all__ = ["PLAIN", "Signatures", "signature"]

SMALL = 1 << 12  # bytes of an array among the settings, of which a digest is kept where it is larger


def signature(part: Part) -> tuple[Any, ...]:
    """What a recording depends on: the part, its settings, and the arrays that it keeps from call to call.

    A recording keeps those arrays alive, so their identity is never used again while it may be looked up.
    """
    parts: list[Any] = [type(part), *[id(part.__dict__[name]) for name in part.arrays()]]
    for name, x in part.settings().items():
        kind = x.__class__
        parts += name, kind, x if kind in PLAIN else _content_of(kind)(x)
    return tuple(parts)


PLAIN = {bool, int, str, type(None)}


class Signatures:
    """The signatures of a model's parts, told at once where no attribute was replaced since they were last told."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def __call__(self, part: Part) -> tuple[Any, ...]:
        now = part.__dict__
        known = self._known.get(id(part))
        if known is None or known.ids != [*map(id, now.values())] or known.names != [*now]:
            known = _Known([*now], [*map(id, now.values())], [*now.values()], signature(part))
            if (
                part.owner is not None
                and now.keys().isdisjoint(part.stored())
                and all(map(is_fixed, part.settings().values()))
            ):
                self._known[id(part)] = known
        return known.signature


class _Known(NamedTuple):
    names: list[str]
    ids: list[int]
    values: list[Any]  # which live on here, so that nothing else gets their ids
    signature: tuple[Any, ...]


def is_fixed(value: Any) -> bool:
    """Whether a setting has the same content for as long as it is the same object."""
    return value.__class__ in PLAIN or value.__class__ is float or isinstance(value, Engine)


def content(value: Any) -> Any:
    """What equals the content of another setting where recordings would be the same.

    Numbers, text, arrays and whatever holds them are the same where all of them are, bit for bit; anything else only
    where it is the same object.
    """
    return value.__class__, _content_of(value.__class__)(value)


@functools.cache
def _content_of(kind: type) -> Callable[[Any], Any]:
    if kind in PLAIN or issubclass(kind, bytes):
        return lambda value: value
    if issubclass(kind, Part):
        return signature
    if issubclass(kind, np.ndarray):
        return _content_of_array
    if issubclass(kind, np.generic):
        return lambda value: (value.dtype.str, value.tobytes())
    if issubclass(kind, float | complex):
        return repr  # which tells -0.0 from 0.0 and finds nan in nan
    if issubclass(kind, Mapping):
        return lambda value: tuple((content(key), content(item)) for key, item in value.items())
    if issubclass(kind, tuple | list | deque | bytearray):
        return lambda value: tuple(map(content, value))
    if issubclass(kind, set | frozenset):
        return lambda value: frozenset(map(content, value))
    if dataclasses.is_dataclass(kind) or issubclass(kind, SimpleNamespace):
        return lambda value: content(vars(value)) if hasattr(value, "__dict__") else _Same(value)
    if kind.__eq__ is object.__eq__ and kind.__hash__ is object.__hash__:
        return lambda value: value  # which equals nothing else, as a `_Same` does, but is compared faster
    return _Same


def _content_of_array(x: Array) -> Any:
    if x.dtype.hasobject:
        return x.shape, content(x.tolist())
    small = x.nbytes <= SMALL
    return x.dtype.str, x.shape, x.tobytes() if small else hashlib.sha256(x.tobytes()).digest()


class _Same:
    """Equals what holds the same object, which it keeps alive."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
