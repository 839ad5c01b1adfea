"""Models of PyTorch and for it, and for ONNX."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .activations import ELU, GELU, Identity, LeakyReLU, ReLU, Sigmoid, SiLU, Softplus, Tanh
from .atomic import write_bytes
from .layers import Dense, Dropout, Layer, Softmax
from .model import Sequential
from .norms import BatchNorm, LayerNorm
from .residual import Residual

if TYPE_CHECKING:
    from .perceptron import Perceptron

__all__ = ["export_onnx", "from_torch", "to_torch"]


def need(module: str, extra: str) -> Any:
    """Import what an export writes with, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"this needs {module}: pip install {extra}") from None


def network_of(model: Any) -> Sequential:
    """The `Sequential` that a fitted estimator trains, or the argument itself."""
    if isinstance(model, Sequential):
        return model
    if not hasattr(model, "_network"):
        raise TypeError(f"model must be a fastbp Sequential or estimator, got {type(model).__name__}")
    if not hasattr(model, "coefs_"):
        raise ValueError(f"{model!r} is not fitted yet")
    return model._network()


def to_torch(model: Sequential | Perceptron, *, share: bool = False) -> Any:
    """A `torch.nn.Sequential` with a copy of the weights.

    Like the model's last layer, it gives logits, not probabilities. The parameters of frozen layers do not require a
    gradient.

    Parameters
    ----------
    model : Sequential or estimator
    share : bool, default False
        No copy: the module's weights are the model's memory, so that what trains one trains both. That ends where the
        model lays its memory anew: when its layers or its optimizer are assigned, or a layer is frozen.

    Returns
    -------
    torch.nn.Sequential
        In the model's dtype.

    Raises
    ------
    ValueError
        For a layer that has no counterpart there, an estimator that is not fitted, or statistics in another dtype than
        the weights, which torch does not take, so that they cannot be shared.
    TypeError
        For what is no model of fastbp.
    ImportError
        Where torch is not installed.

    Examples
    --------
    >>> import fastbp
    >>> fastbp.to_torch(fastbp.Sequential([fastbp.Dense(4, 3), fastbp.ReLU()]))  # doctest: +SKIP
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
    )
    """
    torch = need("torch", "torch")
    network, made = network_of(model), []
    for layer in network.layers:
        if type(layer) not in MODULES:
            raise ValueError(f"{layer!r} has no counterpart in torch that to_torch knows")
        for mine in ARRAYS:
            if share and mine in layer.arrays() and (kept := getattr(layer, mine).dtype) != network.dtype:
                raise ValueError(f"{layer!r}: {mine} is {kept}; share=True needs a model of that dtype")
    for layer in network.layers:
        name, attributes = MODULES[type(layer)]
        options = {"dim": 1} if isinstance(layer, Softmax) else {}
        module = getattr(torch.nn, name)(*(getattr(layer, mine) for mine in attributes), **options)
        module.to(getattr(torch, network.dtype.name))
        for mine, theirs in ARRAYS.items():
            if mine in layer.arrays():
                target, array = getattr(module, theirs), getattr(layer, mine)
                tensor = torch.from_dlpack((array if share else layer.engine.asnumpy(array)).T).reshape(target.shape)
                if share:
                    target.data = tensor
                else:
                    target.data.copy_(tensor)
        made.append(module.requires_grad_(layer.trainable))
    return torch.nn.Sequential(*made)


#: Names of a layer's arrays here and there.
ARRAYS = {"weights": "weight", "biases": "bias", "running_mean": "running_mean", "running_var": "running_var"}
#: Each layer's counterpart in `torch.nn`, and the attributes that are the first arguments, here and there.
MODULES: dict[type[Layer], tuple[str, dict[str, str]]] = {
    Dense: ("Linear", {"n_inputs": "in_features", "n_neurons": "out_features"}),
    LayerNorm: ("LayerNorm", {"features": "normalized_shape", "eps": "eps"}),
    BatchNorm: ("BatchNorm1d", {"features": "num_features", "eps": "eps", "momentum": "momentum"}),
    Identity: ("Identity", {}),
    ReLU: ("ReLU", {}),
    LeakyReLU: ("LeakyReLU", {"negative_slope": "negative_slope"}),
    ELU: ("ELU", {"alpha": "alpha"}),
    GELU: ("GELU", {"approximate": "approximate"}),
    SiLU: ("SiLU", {}),
    Tanh: ("Tanh", {}),
    Sigmoid: ("Sigmoid", {}),
    Softplus: ("Softplus", {"beta": "beta", "threshold": "threshold"}),
    Softmax: ("Softmax", {}),
    Dropout: ("Dropout", {"rate": "p"}),
}


def from_torch(module: Any, **options: Any) -> Sequential:
    """A model with a copy of the weights of a `torch.nn.Sequential`.

    A layer is frozen whose parameters are, all of them; a frozen `BatchNorm` keeps its statistics, too. A linear layer
    without biases gets some of 0, a norm without weights some of 1, and training changes them.

    Parameters
    ----------
    module : torch.nn.Sequential
        Of linear layers, activations and dropout; may hold others of its kind.
    **options
        Of `Sequential`: ``loss``, ``optimizer``, ``engine``, ``seed``... The dtype is that of the weights.

    Returns
    -------
    Sequential

    Raises
    ------
    ValueError
        For a module that has no counterpart here, one with weights that stands there twice, one with hooks, and one of
        whose parameters only some are trained.
    TypeError
        For what is no module of torch.
    ImportError
        Where torch is not installed.

    Examples
    --------
    >>> import torch, fastbp  # doctest: +SKIP
    >>> fastbp.from_torch(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())).layers  # doctest: +SKIP
    (Dense(inputs=4, neurons=3), ReLU())
    """
    torch = need("torch", "torch")
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Sequential, got {type(module).__name__}")
    layers: list[Layer] = []
    dtypes = set()

    def parts_of(module: Any) -> list[Any]:
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"{module!r} has hooks, which have no counterpart in fastbp")
        stack = type(module) is torch.nn.Sequential  # a subclass may compute something else
        return [part for child in module for part in parts_of(child)] if stack else [module]

    kinds = {getattr(torch.nn, name): (kind, attributes) for kind, (name, attributes) in MODULES.items()}
    parts = parts_of(module)
    for place, part in enumerate(parts):
        if any(part is other for other in parts[:place]) and list(part.parameters()):
            raise ValueError(f"{part!r} stands in the module twice; layers of fastbp cannot share weights")
        if type(part) not in kinds:
            raise ValueError(f"{part!r} has no counterpart in fastbp that from_torch knows")
        kind, attributes = kinds[type(part)]
        layer = _layer_of(part, kind, attributes.values())
        layer.trainable = all(tensor.requires_grad for tensor in part.parameters())
        for mine, theirs in ARRAYS.items():
            tensor = getattr(part, theirs, None)
            if tensor is not None:
                if not tensor.is_floating_point() or tensor.itemsize < 4:  # NumPy has no bfloat16
                    raise ValueError(f"{part!r} must hold float32 or float64, got {tensor.dtype}; see module.float()")
                array = tensor.detach().cpu().numpy()
                dtypes.add(array.dtype)
                shape = layer.shapes().get(mine, array.shape)
                array = array.T if array.ndim == 2 else array.reshape(shape)
                if mine in layer.state:
                    getattr(layer, mine)[...] = layer.engine.asarray(array)
                else:
                    setattr(layer, mine, array.copy())
        layers.append(layer)
    dtype = np.result_type(*dtypes) if dtypes else np.float32
    return Sequential(layers, **({"dtype": dtype} | options))


def _layer_of(part: Any, kind: type[Layer], attributes: Iterable[str]) -> Layer:
    """The layer, without its weights; ValueError for a module that does what it cannot do."""
    if len({tensor.requires_grad for tensor in part.parameters()}) == 2:
        raise ValueError(f"{part!r} must train all of its parameters or none (requires_grad)")
    if kind is LayerNorm and len(part.normalized_shape) != 1:
        raise ValueError(f"{part!r} must go over one dimension")
    if kind is BatchNorm and (part.momentum is None or part.running_mean is None):
        raise ValueError(f"{part!r} must have a momentum and running statistics")
    if kind is Softmax and part.dim not in (1, -1):
        raise ValueError(f"{part!r} must have dim=1")
    settings = [getattr(part, name) for name in attributes]
    layer = kind(*(x[0] if isinstance(x, tuple) else x for x in settings))  # normalized_shape is one
    if isinstance(layer, Dense):
        layer.biases = np.zeros((1, layer.n_neurons))  # where there are none
    return layer


class Graph:
    """Nodes of an ONNX graph, one after the other."""

    def __init__(self, onnx: Any, dtype: np.dtype[Any]) -> None:
        self.onnx, self.dtype = onnx, dtype
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """A node; returns the name of its output."""
        out = out or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def cast(self, x: str, dtype: Any) -> str:
        """`x`, which is of the graph's dtype or else of float32, in one of the two."""
        if self.dtype == np.float32:
            return x
        return self.add("Cast", x, to=self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def constant(self, value: Any, dtype: Any = None) -> str:
        """An array that the graph holds; returns its name."""
        array = np.asarray(value, self.dtype if dtype is None else dtype)
        name = f"constant_{len(self.constants)}"
        if array.dtype.kind in "UO":
            texts = [str(text).encode() for text in array.ravel()]
            tensor = self.onnx.helper.make_tensor(name, self.onnx.TensorProto.STRING, array.shape, texts)
        else:
            tensor = self.onnx.numpy_helper.from_array(array, name)
        self.constants.append(tensor)
        return name


def _dense(graph: Graph, layer: Any, x: str) -> str:
    weights, biases = (layer.engine.asnumpy(a) for a in (layer.weights, layer.biases))
    return graph.add("Gemm", x, graph.constant(weights), graph.constant(biases[0]))


def _gelu(graph: Graph, layer: Any, x: str) -> str:
    if layer.approximate == "tanh":
        cube = graph.add("Mul", graph.add("Mul", x, x), graph.add("Mul", x, graph.constant(0.044715)))
        inner = graph.add("Mul", graph.add("Add", x, cube), graph.constant(np.sqrt(2 / np.pi)))
        bend = graph.add("Tanh", inner)
    else:
        scaled = graph.add("Mul", x, graph.constant(np.sqrt(0.5)))
        bend = graph.cast(graph.add("Erf", graph.cast(scaled, np.float32)), graph.dtype)  # ONNX Runtime has no other
    half = graph.add("Mul", x, graph.constant(0.5))
    return graph.add("Mul", half, graph.add("Add", bend, graph.constant(1)))


# ONNX Runtime has no Elu and Softplus for float64, and LeakyRelu's slope is of float32


def _leaky_relu(graph: Graph, layer: Any, x: str) -> str:
    flat = graph.add("Mul", x, graph.constant(layer.negative_slope))
    return graph.add("Where", graph.add("Greater", x, graph.constant(0)), x, flat)


def _elu(graph: Graph, layer: Any, x: str) -> str:
    below = graph.add("Exp", graph.add("Min", x, graph.constant(0)))
    curve = graph.add("Mul", graph.add("Sub", below, graph.constant(1)), graph.constant(layer.alpha))
    return graph.add("Where", graph.add("Greater", x, graph.constant(0)), x, curve)


def _softplus(graph: Graph, layer: Any, x: str) -> str:
    beta = graph.constant(layer.beta)
    steep = graph.add("Mul", x, beta)
    rest = graph.add("Exp", graph.add("Neg", graph.add("Abs", steep)))
    above = graph.add("Max", steep, graph.constant(0))
    soft = graph.add("Div", graph.add("Add", above, graph.add("Log", graph.add("Add", rest, graph.constant(1)))), beta)
    return graph.add("Where", graph.add("Greater", steep, graph.constant(layer.threshold)), x, soft)


def _layer_norm_node(graph: Graph, layer: Any, x: str) -> str:
    weights, biases = (graph.constant(layer.engine.asnumpy(a)[0]) for a in (layer.weights, layer.biases))
    return graph.add("LayerNormalization", x, weights, biases, axis=1, epsilon=layer.eps)


def _batch_norm_node(graph: Graph, layer: Any, x: str) -> str:
    arrays = layer.weights, layer.biases, layer.running_mean, layer.running_var
    constants = [graph.constant(layer.engine.asnumpy(a).reshape(-1)) for a in arrays]
    return graph.add("BatchNormalization", x, *constants, epsilon=layer.eps)


def _residual(graph: Graph, layer: Any, x: str) -> str:
    return graph.add("Add", x, nodes_of(graph, layer.layers, x))


def nodes_of(graph: Graph, layers: Sequence[Layer], x: str) -> str:
    """Add what layers compute from `x`; returns the name of their output."""
    for layer in layers:
        if type(layer) not in ONNX:
            raise ValueError(f"{layer!r} has no counterpart in ONNX that export_onnx knows")
        x = ONNX[type(layer)](graph, layer, x)
    return x


ONNX: dict[type[Layer], Callable[[Graph, Any, str], str]] = {
    Identity: lambda graph, layer, x: x,
    Dropout: lambda graph, layer, x: x,
    Dense: _dense,
    LayerNorm: _layer_norm_node,
    BatchNorm: _batch_norm_node,
    Residual: _residual,
    ReLU: lambda graph, layer, x: graph.add("Relu", x),
    LeakyReLU: _leaky_relu,
    ELU: _elu,
    GELU: _gelu,
    SiLU: lambda graph, layer, x: graph.add("Mul", x, graph.add("Sigmoid", x)),
    Tanh: lambda graph, layer, x: graph.add("Tanh", x),
    Sigmoid: lambda graph, layer, x: graph.add("Sigmoid", x),
    Softplus: _softplus,
    Softmax: lambda graph, layer, x: graph.add("Softmax", x, axis=1),
}


def export_onnx(model: Sequential | Perceptron, path: str | Path) -> None:
    """Write a model as an ONNX file (opset 17), whose input is ``X``.

    A `Sequential`'s output is ``output``: that of its last layer. A regressor's is ``variable``: predictions, shape
    (rows, outputs). A classifier has two, as those that skl2onnx writes: ``label`` and ``probabilities``, shape
    (rows, classes). The exact GELU of a float64 model is computed there with float32's error function.

    Parameters
    ----------
    model : Sequential or fitted estimator
    path : path

    Raises
    ------
    ValueError
        For a layer that ONNX has no operator for that is known here, an estimator that is not fitted, or labels other
        than texts, integers and bools.
    TypeError
        For what is no model of fastbp.
    ImportError
        Where the package onnx is not installed.

    Examples
    --------
    >>> import fastbp
    >>> model = fastbp.Sequential([fastbp.Dense(4, 3), fastbp.Softmax()])
    >>> fastbp.export_onnx(model, "model.onnx")  # doctest: +SKIP
    """
    onnx = need("onnx", "'fastbp[onnx]'")
    network = network_of(model)
    graph = Graph(onnx, network.dtype)
    x = nodes_of(graph, network.layers, "X")
    width = network._features
    if isinstance(model, Sequential):
        shapes: dict[str, tuple[Any, int | None]] = {graph.add("Identity", x, out="output"): (network.dtype, None)}
    elif hasattr(model, "classes_"):
        shapes = _classes(graph, model, x)
    else:
        x = graph.add("Exp", x) if model.out_activation_ == "exp" else x
        shapes = {graph.add("Identity", x, out="variable"): (network.dtype, None)}
    helper, types = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype

    def described(name: str, dtype: Any, shape: list[Any]) -> Any:
        kind = onnx.TensorProto.STRING if dtype is str else types(np.dtype(dtype))
        return helper.make_tensor_value_info(name, kind, shape)

    made = helper.make_graph(
        graph.nodes,
        "fastbp",
        [described("X", network.dtype, ["rows", width])],
        [described(name, dtype, ["rows"] if rank == 1 else ["rows", None]) for name, (dtype, rank) in shapes.items()],
        graph.constants,
    )
    file = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], producer_name="fastbp", ir_version=8)
    onnx.checker.check_model(file, full_check=True)
    write_bytes(Path(path), file.SerializeToString())


def _classes(graph: Graph, model: Any, logits: str) -> dict[str, tuple[Any, int | None]]:
    """Nodes from a classifier's last layer to its label and probabilities; returns their dtypes and ranks."""
    if model._multilabel:
        yes = graph.add("Sigmoid", logits, out="probabilities")
        over = graph.add("Greater", logits, graph.constant(0))
        graph.add("Cast", over, out="label", to=graph.onnx.TensorProto.INT64)
        return {"label": (np.int64, None), yes: (graph.dtype, None)}
    if model.out_activation_ == "softmax":
        graph.add("Softmax", logits, out="probabilities", axis=1)
        place = graph.add("ArgMax", logits, axis=1, keepdims=0)
    else:
        yes = graph.add("Sigmoid", logits)
        no = graph.add("Sub", graph.constant(1), yes)
        graph.add("Concat", no, yes, out="probabilities", axis=1)
        over = graph.add("Greater", logits, graph.constant(0))
        whole = graph.add("Cast", over, to=graph.onnx.TensorProto.INT64)
        last = graph.constant(len(model.classes_) - 1, np.int64)
        flat_shape = graph.constant([-1], np.int64)
        place = graph.add("Min", graph.add("Reshape", whole, flat_shape), last)
    classes = np.asarray(model.classes_)
    texts = classes.dtype.kind == "U" or all(isinstance(label, str) for label in classes.tolist())
    if not texts and classes.dtype.kind not in "iub":
        raise ValueError(f"classes must be texts, integers or bools for ONNX, got {classes.dtype}")
    kind = str if texts else np.int64
    labels = graph.constant(classes, object if texts else np.int64)
    graph.add("Gather", labels, place, out="label", axis=0)
    return {"label": (kind, 1), "probabilities": (graph.dtype, None)}
