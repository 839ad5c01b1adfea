"""What layers, losses and optimizers share: they belong to a model, and say how to make them again."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np

from .kernels.engine import Engine

__all__ = ["Part", "Setting"]

T = TypeVar("T")


class Setting(Generic[T]):
    """An argument of a part's constructor that may also be assigned later, and is checked both times.

    Parameters
    ----------
    check : callable
        ``check(value, name)`` returns what is kept, or raises an error that names the setting.
    default : optional
        Where the setting has this value, `Part.config` leaves it out.
    """

    def __init__(self, check: Callable[[Any, str], T], default: Any = ...) -> None:
        self.check, self.default = check, default

    def __set_name__(self, owner: type[Part], name: str) -> None:
        self.name = name

    @overload
    def __get__(self, part: None, owner: type[Part]) -> Self: ...
    @overload
    def __get__(self, part: Part, owner: type[Part]) -> T: ...
    def __get__(self, part: Part | None, owner: type[Part]) -> Self | T:
        if part is None:
            return self
        try:
            value: T = part.__dict__[self.name]
        except KeyError:
            raise AttributeError(f"{type(part).__name__} has no {self.name} yet") from None
        return value

    def __set__(self, part: Part, value: Any) -> None:
        value = self.check(value, self.name)
        part.agree(part.__dict__ | {self.name: value})
        part.__dict__[self.name] = value


class Part:
    """A piece of a model."""

    #: Names of attributes that hold engine memory which lives from call to call, besides a layer's parameters.
    state: tuple[str, ...] = ()
    engine: Engine

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that make this part again; its `Setting` attributes, unless a part says more."""
        settings = self.declared(Setting)
        values = {name: getattr(self, name) for name in settings}
        return {name: value for name, value in values.items() if value != settings[name].default}

    @classmethod
    @functools.cache
    def declared(cls, kind: type[T]) -> dict[str, T]:
        """The attributes of this class and those above it that are of some kind, by name; the class's own first."""
        found: dict[str, Any] = {}
        for base in cls.__mro__:
            found |= {name: value for name, value in vars(base).items() if name not in found}
        return {name: value for name, value in found.items() if isinstance(value, kind)}

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError where settings do not go together; asked before one of them changes.

        Parameters
        ----------
        settings : mapping of str to value
            As they would be then; while the part is made, some are missing.
        """

    @property
    def owner(self) -> Any:
        """The model that owns this part, or None."""
        reference = self.__dict__.get("_owner")
        return reference() if reference else None

    @owner.setter
    def owner(self, model: Any) -> None:
        self.__dict__["_owner"] = model if model is None else weakref.ref(model)

    def twin(self, **attributes: Any) -> Self:
        """A shallow copy with other attributes; whatever its methods store, this part is not touched."""
        twin = object.__new__(type(self))
        twin.__dict__ |= self.__dict__ | attributes
        return twin

    def arrays(self) -> tuple[str, ...]:
        """Names of all attributes that hold engine memory which lives from call to call."""
        return self.state

    def go_to(self, engine: Engine) -> None:
        """Bring all that memory to an engine, which is this part's from then on; without any, nothing changes."""
        arrays = {name: self.__dict__[name] for name in self.arrays()}
        if arrays and engine is not self.engine:
            arrays = {name: self.engine.asnumpy(x) for name, x in arrays.items()}
        if arrays:
            self.__dict__ |= {"engine": engine, **{name: _writeable(engine, x) for name, x in arrays.items()}}

    @classmethod
    def stored(cls) -> tuple[str, ...]:
        """Names of the attributes that calls leave behind to be looked at."""
        return ()

    def settings(self) -> dict[str, Any]:
        """All attributes but the arrays, the owner, and what calls leave behind."""
        others = {*self.arrays(), *self.stored(), "_owner"}
        return {name: value for name, value in self.__dict__.items() if name not in others}

    def __getstate__(self) -> dict[str, Any]:
        """All attributes, arrays as NumPy's: where they are loaded there may be no GPU."""
        kept = {name: value for name, value in self.__dict__.items() if name != "_owner"}
        engine = kept.get("engine")
        return {name: engine.asnumpy(x) if engine and engine.owns(x) else x for name, x in kept.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if engine := state.get("engine"):  # which an optimizer that has not been used lacks
            for name in {*self.arrays(), *self.stored()} & state.keys():
                if isinstance(state[name], np.ndarray):
                    self.__dict__[name] = _writeable(engine, state[name])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.config().items())})"


def _writeable(engine: Engine, array: Any) -> Any:
    """An array in an engine's memory; a copy of one that is read-only, because compiled ops would write to it."""
    array = engine.asarray(array)
    return array.copy() if isinstance(array, np.ndarray) and not array.flags.writeable else array
