"""Model files: safetensors, with the architecture as JSON in the header; loading one runs no code that it brings."""

from __future__ import annotations

import contextlib
import inspect
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

import numpy as np

import fastbp

from .atomic import write_bytes
from .boundary import as_count, as_flag
from .kernels.engine import Engine
from .layers import Layer
from .network import Network
from .part import Part
from .schedules import Schedule
from .selection import AUTO, EngineNotAvailable, choice

if TYPE_CHECKING:
    from .model import Sequential

__all__ = ["load", "read_metadata", "save"]

FORMAT = 1
SMALL = 1 << 16  # what layers may be larger than their parameters, as an embedding of few columns of many is
SWITCHES = {"trainable": "_trainable", "training": "training"}  # of layers, and where these keep them
_INSTALL = "model files need safetensors: pip install 'fastbp[files]'"


def save(model: Network, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
    """Write a model: parameters, optimizer state, counters, random state and history.

    The file is written beside `path` and renamed, so that `path` holds the old model or the new one. Where the process
    is killed meanwhile, what was written stays beside it, as a file of that name behind a dot and before eight digits.
    While another thread trains the model, the file holds the state between two steps.

    Parameters
    ----------
    model : Sequential
    path : path
        A link stays one: the file that it leads to is written. A file that is there keeps its permissions.
    metadata : dict, optional
        Anything that JSON holds, which `read_metadata` gives back.

    Raises
    ------
    OSError
        Where `path` cannot be written, or is no file but a directory or a device.
    TypeError
        Where the model has what a file cannot hold: a schedule that is a function, or a layer, loss or optimizer of
        one's own whose `config` does not return what makes it again.
    """
    if not isinstance(metadata, dict | None):
        raise TypeError(f"metadata must be a dict, got {short(metadata)}")
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must hold what JSON holds: {error}") from error
    tensors, about = describe(model)
    write(path, tensors, about | {"metadata": metadata or {}})


def write(path: str | Path, tensors: dict[str, Any], about: dict[str, Any]) -> None:
    """Write arrays and what JSON holds to a file that is whole at any time: the old one or the new one."""
    try:
        from safetensors.numpy import save as to_bytes
    except ImportError:
        raise ImportError(_INSTALL) from None
    text = json.dumps(about)
    write_bytes(Path(path), to_bytes(tensors, {"fastbp": text, "crc32": checksum(text, tensors)}))


def load(
    path: str | Path, *, engine: str | Engine | None = None, custom: Mapping[str, type[Part]] | None = None
) -> Sequential:
    """Read a model that `Sequential.save` wrote; it predicts and goes on training as the saved one would.

    Parameters
    ----------
    path : path
    engine : str or Engine, optional
        See `fastbp.engine`; not necessarily the one that it was trained on. Where none is chosen, a model that was
        made with "auto" has "auto" again.
    custom : dict of str to class, optional
        Layers, losses and optimizers of your own that the file names.

    Returns
    -------
    Sequential

    Raises
    ------
    ValueError
        For a file that is not a model of fastbp, or of a later format.
    FileNotFoundError
        Where there is none.
    ImportError
        Where safetensors is not installed, or what the engine needs.

    Examples
    --------
    >>> import tempfile, fastbp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fastbp.Sequential([fastbp.Dense(2, 3)]).save(f"{folder}/model.safetensors")
    ...     fastbp.load(f"{folder}/model.safetensors").layers
    (Dense(inputs=2, neurons=3),)
    """
    if not isinstance(custom, Mapping | None):
        raise TypeError(f"custom must be a dict of classes by name, got {short(custom)}")
    about, tensors = read(path)
    with explained(path):
        return rebuild(about, tensors, engine, custom or {})


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Say which file is meant where what it holds is no model."""
    try:
        yield
    except EngineNotAvailable:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a complete fastbp model: {error!r}") from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The `metadata` that a model was saved with."""
    metadata = read(path)[0].get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: metadata must be a dict, got {short(metadata)}")
    return metadata


def describe(model: Network) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that a model's file holds: arrays by name, and what JSON holds."""
    with model.at_rest():
        return _describe(model)


def _describe(model: Network) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays = {f"layers.{path}": layer.__dict__[name] for path, (layer, name) in model.places().items()}
    if model.optimizer is not None:
        arrays |= {f"optimizer.{name}": model.optimizer.__dict__[name] for name in model.optimizer.state}
    about = {
        "format": FORMAT,
        "dtype": model.dtype.name,
        "layers": [_describe_part(layer) for layer in model.layers],
        "loss": _describe_part(model.loss),
        "optimizer": _describe_part(model.optimizer),
        "schedule": schedule_of(model).progress(),
        "history": {name: list(values) for name, values in model.history.items()},
        "random": model.random_state(),
        "batches": model.batches,
    }
    if model.chooses_engine:
        about["engine"] = AUTO
    if model.engine.precision != "fp32":
        about["precision"] = model.engine.precision
    return {name: model.engine.asnumpy(array).copy() for name, array in arrays.items()}, about


def schedule_of(model: Network) -> Schedule:
    """The optimizer's schedule where it is one that learns; otherwise one that does not."""
    schedule = None if model.optimizer is None else model.optimizer.schedule
    return schedule if isinstance(schedule, Schedule) else Schedule()


def _describe_part(part: Part | None) -> dict[str, Any] | None:
    if part is None:
        return None
    _check_config(part)
    config = {name: describe_value(value) for name, value in part.config().items()}
    return {"type": type(part).__name__, "config": config, **_switched_off(part)}


def _check_config(part: Part) -> None:
    """Raise TypeError where what `config` gives would not make this part again."""
    name, config = type(part).__name__, part.config()
    try:
        constructor = inspect.signature(type(part))
    except Exception:  # whatever its annotations raise, which Python 3.14 evaluates here
        return
    must = (
        f"a file cannot hold this {name}: {name}.config must return all arguments that __init__ needs to make it again"
    )
    try:
        constructor.bind(**config)
    except TypeError as error:
        raise TypeError(f"{must}, got {', '.join(config)}: {error}") from None
    kept_otherwise = {"engine", "init", *config, *SWITCHES}  # weights that are stored need no `init`
    held = {name: value for name, value in part.settings().items() if name not in kept_otherwise}
    defaults = {name: each.default for name, each in constructor.parameters.items() if each.default is not each.empty}
    lost = [name for name in held.keys() & defaults.keys() if not _same(held[name], defaults[name])]
    again = type(part)(**config) if lost else part  # as what stands for a default may be made of it
    for name in lost:
        if not _same(held[name], getattr(again, name, None)):
            raise TypeError(f"{must}, and lacks {name}={short(held[name])}")


def _same(one: Any, other: Any) -> bool:
    return one is other or bool(np.array_equal(one, other))


def _switched_off(part: Part) -> dict[str, Any]:
    """What is switched off in a layer: False where it is so in those inside too, otherwise how it is in each."""
    layers = [layer for _, layer in part.walk()] if isinstance(part, Layer) else []
    switches = {name: [getattr(layer, name) for layer in layers] for name in SWITCHES}
    return {name: on if any(on) else False for name, on in switches.items() if not all(on)}


def describe_value(value: Any) -> Any:
    """A constructor's argument as what JSON holds; it may be a part itself, or hold some."""
    if isinstance(value, Part):
        return _describe_part(value)
    if callable(value):
        raise TypeError(f"a file cannot hold the function {value!r}; a fastbp.Schedule it can")
    if isinstance(value, list | tuple):
        return [describe_value(item) for item in value]
    if isinstance(value, Mapping):  # as pairs, because JSON turns a key that is a number, such as a label, into text
        return {"dict": describe_value(list(value.items()))}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write` wrote: what JSON holds, and the arrays by name."""
    path = Path(path)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(_INSTALL) from None
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            about = json.loads(metadata.get("fastbp", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a model file: {error}") from error
    if not isinstance(about, dict) or "format" not in about:
        raise ValueError(f"{path} is a safetensors file, but not one of fastbp")
    if about["format"] != FORMAT:
        raise ValueError(f"{path} has format {short(about['format'])}; this version of fastbp reads format {FORMAT}")
    if metadata.get("crc32", found := checksum(metadata["fastbp"], tensors)) != found:
        raise ValueError(f"{path} is damaged; a file that was changed on purpose loads without its entry crc32")
    return about, tensors


def checksum(text: str, tensors: Mapping[str, Any]) -> str:
    """By which a file that was damaged shows."""
    crc = zlib.crc32(text.encode())
    for name, array in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {array.dtype.str} {array.shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def rebuild(
    about: dict[str, Any], tensors: dict[str, Any], engine: str | Engine | None, custom: Mapping[str, type[Part]]
) -> Sequential:
    """The model that `describe` described."""
    from .model import Sequential

    size, held = _size(about["layers"]), sum(array.nbytes for array in tensors.values())
    if size > SMALL + held:  # before there is memory for them
        raise ValueError(f"the file describes layers of size {size}, but holds {held} bytes of numbers")
    stack = [_make(description, custom) for description in about["layers"]]
    for place, layer in enumerate(stack):
        for path, inner in layer.walk(f"layers.{place}."):
            for name, shape in inner.shapes().items():
                if tensors[f"{path}{name}"].shape != shape:
                    raise ValueError(f"{path}{name} must be of shape {shape}, got {tensors[f'{path}{name}'].shape}")
    otherwise = AUTO if about.get("engine") == AUTO else "numpy"
    model = Sequential(
        stack,
        loss=_make(about["loss"], custom),
        optimizer=_make(about["optimizer"], custom),
        engine=choice(engine, otherwise=otherwise, precision=about.get("precision", "fp32")),
        dtype=about["dtype"],
    )
    for path, (layer, name) in model.places().items():
        _fill(model.engine, layer.__dict__[name], tensors[f"layers.{path}"], f"layers.{path}")
    if model.optimizer is not None:
        for name in model.optimizer.state:
            _fill(model.engine, model.optimizer.__dict__[name], tensors[f"optimizer.{name}"], f"optimizer.{name}")
    schedule_of(model).resume(about["schedule"])
    model.history = {str(name): [float(x) for x in values] for name, values in about["history"].items()}
    model.set_random_state(about["random"])
    model.batches = None if about.get("batches") is None else as_count(about["batches"], "batches")
    return model


def _size(value: Any) -> int:
    """What the sizes in a description add up to; of a list of numbers the largest counts."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        numbers = [item for item in value if isinstance(item, int)]
        return max(numbers, default=0) + sum(_size(item) for item in value if not isinstance(item, int))
    return max(value, 0) if isinstance(value, int) else 0


def _make(description: dict[str, Any] | None, custom: Mapping[str, type[Part]]) -> Any:
    """The part that was described; only classes that fastbp exports, or that the caller gives, are ever called."""
    if description is None:
        return None
    name = description["type"]
    kind = custom.get(name) or (getattr(fastbp, name) if name in fastbp.__all__ else None)
    if not (isinstance(kind, type) and issubclass(kind, Part)):
        name = short(name)
        raise ValueError(f"the file names {name}, which fastbp does not have; pass custom={{{name}: the class}}")
    part: Any = kind(**{key: _make_value(value, custom) for key, value in description["config"].items()})
    for name in SWITCHES.keys() & description.keys():
        layers, on = [layer for _, layer in part.walk()], description[name]
        for layer, flag in zip(layers, on if isinstance(on, list) else len(layers) * [on], strict=True):
            layer.__dict__[SWITCHES[name]] = as_flag(flag, name)
    return part


def _make_value(value: Any, custom: Mapping[str, type[Part]]) -> Any:
    if isinstance(value, dict) and value.keys() >= {"type", "config"}:
        return _make(value, custom)
    if isinstance(value, dict) and value.keys() == {"dict"}:
        return {_make_value(key, custom): _make_value(item, custom) for key, item in value["dict"]}
    if isinstance(value, dict):  # not by pairs: what was a number is a text here
        return {int(key) if key.lstrip("-").isdecimal() else key: item for key, item in value.items()}
    return tuple(_make_value(item, custom) for item in value) if isinstance(value, list) else value


def _fill(engine: Engine, array: Any, values: Any, name: str) -> None:
    if array.shape != values.shape or not np.can_cast(values.dtype, array.dtype, "same_kind"):
        raise ValueError(f"{name} must be {array.dtype} of shape {array.shape}, got {values.dtype} of {values.shape}")
    array[...] = engine.asarray(values)
