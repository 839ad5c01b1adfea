"""Choosing an engine: by argument, ``with use(name)``, `set_default`, the variable FASTBP_ENGINE, or else NumPy.

How a model's fit chooses where "auto" is chosen stands in `auto`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from .kernels.engine import Engine

__all__ = ["AUTO", "EngineInfo", "EngineNotAvailable", "choice", "engine", "engines", "set_default", "use"]

AUTO = "auto"


class EngineNotAvailable(ValueError, ImportError):
    """An engine was asked for by name, and something that it needs is missing. The text says what to install."""


class EngineInfo(NamedTuple):
    """What `engines` tells of one engine."""

    name: str
    available: bool
    device: str
    why_not: str


def _cuda_lacks() -> list[str]:
    """What a GPU engine lacks where CuPy is installed."""
    try:
        import cupy
    except ImportError as error:
        return [f"a CuPy that can be imported ({error})"]
    from .kernels.cublaslt import load_libraries

    lacking = []
    for library, look in (("NVRTC", cupy.cuda.nvrtc.getVersion), ("cuBLAS", load_libraries)):
        try:
            look()
        except Exception:  # each library has errors of its own
            lacking.append(f"the CUDA library {library}")
    return lacking + ([] if cupy.is_available() else ["an NVIDIA GPU with a driver"])


def _numba_lacks() -> list[str]:
    """What the Numba engine lacks where Numba is installed, which takes long to import."""
    return ["Numba's compiler"] if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0") else []


class _Entry(NamedTuple):
    location: str
    needs: tuple[str, ...]
    device: str
    remedy: str
    lacks: Callable[[], list[str]] = list


_KNOWN = {
    "numpy": _Entry(".kernels.numpy_engine:NumpyEngine", ("numpy",), "cpu", ""),
    "numba": _Entry(
        ".kernels.numba_engine:NumbaEngine", ("numba",), "cpu",
        "install it with: pip install 'fastbp[numba]', and leave NUMBA_DISABLE_JIT unset",
        _numba_lacks,
    ),
    "cupy": _Entry(
        ".kernels.cupy_engine:engine_at", ("cupy",), "cuda",
        "install it with: pip install 'fastbp[cuda]', where there is an NVIDIA GPU with a driver for CUDA 13",
        _cuda_lacks,
    ),
}  # fmt: skip

GROUP = "fastbp.engines"  # the entry points by which other packages bring engines

_used: ContextVar[str | Engine | None] = ContextVar("fastbp_engine", default=None)
_default: str | Engine | None = None


def engine(name: str | Engine | None = None, *, otherwise: str = "numpy") -> Engine:
    """Get an engine.

    Parameters
    ----------
    name : str or Engine, optional
        ``"numpy"``, ``"numba"``, ``"cupy"``, an engine that another package brings, or one itself. Without a name, the
        choice in force: the innermost ``with use(name)``, then `set_default`, then the environment variable
        FASTBP_ENGINE, then `otherwise`. ``"auto"`` lets `Sequential.fit` take the engine that is fastest at the
        model's step; whatever is no model to train is NumPy's then.
    otherwise : str, default "numpy"

    Returns
    -------
    Engine
        Its ``name`` and ``device`` say what it is, and its ops are its methods.

    Raises
    ------
    ValueError
        For a name that no engine has.
    EngineNotAvailable
        For an engine that lacks something it needs; the text gives the install line.

    Examples
    --------
    >>> import fastbp
    >>> fastbp.engine("numpy").name
    'numpy'
    """
    chosen = choice(name, otherwise=otherwise)
    return chosen if isinstance(chosen, Engine) else _load("numpy")


def choice(name: str | Engine | None = None, *, otherwise: str = "numpy", precision: str = "fp32") -> Engine | str:
    """What `engine` chooses, but ``"auto"`` as it is, for models; one that is named is of a precision where it can."""
    if name is not None and not isinstance(name, str | Engine):
        raise _unknown(name)
    chosen = name if name is not None else _used.get() or _default or os.environ.get("FASTBP_ENGINE") or otherwise
    if isinstance(chosen, Engine) or chosen == AUTO:
        return chosen
    loaded = _load(chosen)
    return loaded.at_precision(precision) if precision in loaded.precisions else loaded


def engines() -> list[EngineInfo]:
    """List the engines: name, whether it is available, its device, and why it is not available.

    Those that other packages bring are loaded to see whether they are.

    Examples
    --------
    >>> import fastbp
    >>> fastbp.engines()[0]
    EngineInfo(name='numpy', available=True, device='cpu', why_not='')
    """
    reasons = {name: _why_not(name) for name in _KNOWN}
    infos = [EngineInfo(name, not reason, _KNOWN[name].device, reason) for name, reason in reasons.items()]
    for name in brought():
        try:
            infos.append(EngineInfo(name, True, _load(name).device, ""))
        except EngineNotAvailable as error:
            infos.append(EngineInfo(name, False, "", str(error)))
    return infos


@contextlib.contextmanager
def use(name: str | Engine) -> Iterator[Engine]:
    """Choose an engine for what is built inside a ``with`` block, in this thread or task alone.

    Parameters
    ----------
    name : str or Engine
        See `engine`.

    Yields
    ------
    Engine

    Raises
    ------
    ValueError, EngineNotAvailable
        As `engine` does, at the start of the block.

    Examples
    --------
    >>> import fastbp
    >>> with fastbp.use("numpy"):
    ...     layer = fastbp.Dense(2, 3)
    >>> layer.engine.name
    'numpy'
    """
    token = _used.set(choice(name))
    try:
        yield engine()
    finally:
        _used.reset(token)


def set_default(name: str | Engine | None) -> None:
    """Choose the engine for whatever is built from now on.

    Parameters
    ----------
    name : str, Engine or None
        See `engine`; None goes back to FASTBP_ENGINE or NumPy.

    Raises
    ------
    ValueError, EngineNotAvailable
        As `engine` does; the choice is then what it was.

    Examples
    --------
    >>> import fastbp
    >>> fastbp.set_default("numpy")
    >>> fastbp.Dense(2, 3).engine.name
    'numpy'
    >>> fastbp.set_default(None)
    """
    global _default
    _default = name if name is None else choice(name)


def _why_not(name: str) -> str:
    entry = _KNOWN[name]
    missing = [module for module in entry.needs if importlib.util.find_spec(module) is None] or entry.lacks()
    return f"{' and '.join(missing)} missing; {entry.remedy}" if missing else ""


def brought() -> dict[str, list[EntryPoint]]:
    """The engines of other packages, and where they are; none can take the name of one of fastbp's own."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        if entry.name not in (*_KNOWN, AUTO):
            found.setdefault(entry.name, {})[entry.value] = entry  # a package may be found twice
    return {name: list(places.values()) for name, places in found.items()}


def _unknown(name: object) -> ValueError:
    return ValueError(f"engine must be one of {', '.join([*_KNOWN, *brought()])} or auto, got {name!r}")


@functools.cache
def _load(name: str) -> Engine:
    if name in _KNOWN:
        if reason := _why_not(name):
            raise EngineNotAvailable(f"engine {name!r} is not available: {reason}")
        module, _, attribute = _KNOWN[name].location.partition(":")
        try:
            loaded: Engine = getattr(importlib.import_module(module, __package__), attribute)()
        except ImportError as error:
            raise EngineNotAvailable(f"engine {name!r} is not available: {error}") from error
        return loaded
    entries = brought().get(name, [])
    if not entries:
        raise _unknown(name)
    if len(entries) > 1:
        places = " and ".join(sorted(entry.value for entry in entries))
        raise EngineNotAvailable(f"engine {name!r} is brought by more than one package: {places}")
    place = entries[0].value
    try:
        loaded = entries[0].load()()
    except (Exception, SystemExit) as error:  # whatever another package may do wrong
        raise EngineNotAvailable(f"engine {name!r}, {place}, cannot be loaded: {error!r}") from error
    its_name, device = (getattr(loaded, attribute, None) for attribute in ("name", "device"))
    if not isinstance(loaded, Engine) or its_name != name or not isinstance(device, str):
        raise EngineNotAvailable(
            f"engine {name!r}, {place}, must be an Engine of that name with a device, "
            f"got {type(loaded).__name__} of name {its_name!r} and device {device!r}"
        )
    return loaded
