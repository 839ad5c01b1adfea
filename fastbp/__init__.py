"""Back-propagation for dense neural networks, on the array engine that you choose.

Examples
--------
>>> import fastbp
>>> X, y = fastbp.spiral_data(100, 3, noise=0.1, seed=0)
>>> model = fastbp.Sequential(
...     [fastbp.Dense(2, 64), fastbp.ReLU(), fastbp.Dense(64, 3)],
...     loss=fastbp.SoftmaxCrossEntropy(),
...     optimizer=fastbp.Adam(0.02),
...     seed=0,
... )
>>> model.fit(X, y, epochs=300).evaluate(X, y)["accuracy"] > 0.9
True
"""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .activations import ELU as ELU
    from .activations import GELU as GELU
    from .activations import Identity as Identity
    from .activations import LeakyReLU as LeakyReLU
    from .activations import ReLU as ReLU
    from .activations import Sigmoid as Sigmoid
    from .activations import SiLU as SiLU
    from .activations import Softplus as Softplus
    from .activations import Tanh as Tanh
    from .callbacks import Callback as Callback
    from .callbacks import EarlyStopping as EarlyStopping
    from .conformance import Report as Report
    from .conformance import check as check
    from .convert import export_onnx as export_onnx
    from .convert import from_torch as from_torch
    from .convert import to_torch as to_torch
    from .cross_entropy import CategoricalCrossEntropy as CategoricalCrossEntropy
    from .cross_entropy import SoftmaxCrossEntropy as SoftmaxCrossEntropy
    from .data import spiral_data as spiral_data
    from .embedding import Embedding as Embedding
    from .files import load as load
    from .finite_differences import GradientError as GradientError
    from .finite_differences import gradcheck as gradcheck
    from .kernels.engine import DTypeError as DTypeError
    from .kernels.engine import Engine as Engine
    from .layers import Dense as Dense
    from .layers import Dropout as Dropout
    from .layers import Layer as Layer
    from .layers import Parameter as Parameter
    from .layers import Softmax as Softmax
    from .losses import BinaryCrossEntropy as BinaryCrossEntropy
    from .losses import Huber as Huber
    from .losses import Loss as Loss
    from .losses import MeanAbsoluteError as MeanAbsoluteError
    from .losses import MeanSquaredError as MeanSquaredError
    from .losses import Poisson as Poisson
    from .model import Gradients as Gradients
    from .model import Sequential as Sequential
    from .norms import BatchNorm as BatchNorm
    from .norms import LayerNorm as LayerNorm
    from .optim import SGD as SGD
    from .optim import Adam as Adam
    from .optim import AdamW as AdamW
    from .optim import Lion as Lion
    from .optim import Optimizer as Optimizer
    from .optim import RMSprop as RMSprop
    from .residual import Residual as Residual
    from .schedules import CosineAnnealingLR as CosineAnnealingLR
    from .schedules import LinearWarmup as LinearWarmup
    from .schedules import OneCycleLR as OneCycleLR
    from .schedules import ReduceLROnPlateau as ReduceLROnPlateau
    from .schedules import Schedule as Schedule
    from .schedules import SequentialLR as SequentialLR
    from .schedules import StepLR as StepLR
    from .selection import EngineInfo as EngineInfo
    from .selection import EngineNotAvailable as EngineNotAvailable
    from .selection import engine as engine
    from .selection import engines as engines
    from .selection import set_default as set_default
    from .selection import use as use
    from .tape import RecordingError as RecordingError

# Imported when a name is first used, so that `import fastbp` loads nothing else, not even NumPy.
_HOMES = {
    "activations": ["ELU", "GELU", "Identity", "LeakyReLU", "ReLU", "Sigmoid", "SiLU", "Softplus", "Tanh"],
    "conformance": ["Report", "check"],
    "callbacks": ["Callback", "EarlyStopping"],
    "cross_entropy": ["CategoricalCrossEntropy", "SoftmaxCrossEntropy"],
    "convert": ["export_onnx", "from_torch", "to_torch"],
    "data": ["spiral_data"],
    "embedding": ["Embedding"],
    "files": ["load"],
    "finite_differences": ["GradientError", "gradcheck"],
    "kernels.engine": ["DTypeError", "Engine"],
    "layers": ["Dense", "Dropout", "Layer", "Parameter", "Softmax"],
    "losses": ["BinaryCrossEntropy", "Huber", "Loss", "MeanAbsoluteError", "MeanSquaredError", "Poisson"],
    "model": ["Gradients", "Sequential"],
    "norms": ["BatchNorm", "LayerNorm"],
    "optim": ["SGD", "Adam", "AdamW", "Lion", "Optimizer", "RMSprop"],
    "schedules": [
        "CosineAnnealingLR",
        "LinearWarmup",
        "OneCycleLR",
        "ReduceLROnPlateau",
        "Schedule",
        "SequentialLR",
        "StepLR",
    ],
    "residual": ["Residual"],
    "selection": ["EngineInfo", "EngineNotAvailable", "engine", "engines", "set_default", "use"],
    "tape": ["RecordingError"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = {"estimators", "notebook", *_HOMES}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fastbp' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
