"""What layers, losses and optimizers share: they belong to a model, and say how to make them again."""

from __future__ import annotations

import weakref
from typing import Any, Self

from .kernels.engine import Engine

__all__ = ["Part"]


class Part:
    """A piece of a model."""

    #: Names of attributes that hold engine memory which lives from call to call, besides a layer's parameters.
    state: tuple[str, ...] = ()
    engine: Engine

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that make this part again."""
        return {}

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

    @classmethod
    def stored(cls) -> tuple[str, ...]:
        """Names of the attributes that calls leave behind to be looked at."""
        return ()

    def settings(self) -> dict[str, Any]:
        """All attributes but the arrays, and what calls leave behind."""
        skipped = {*self.arrays(), *self.stored()}
        return {name: value for name, value in self.__dict__.items() if name not in skipped}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_owner"}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.config().items())})"
