"""Layers: each computes its output and its gradients by calling ops on an engine."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from functools import partial
from typing import Any, Self, overload

import numpy as np

from .boundary import as_array, as_count, as_flag, as_number, as_seed, check_finite
from .initializers import Initializer, initializer
from .kernels.engine import Engine, real_array
from .kernels.ops import Array
from .part import Part, Setting
from .selection import engine as choose_engine

__all__ = ["Dense", "Dropout", "Layer", "Parameter", "Softmax"]


class Parameter:
    """An array of a layer that training changes.

    A layer alone keeps the array that is assigned, and its dtype. Once a model owns the layer, the array is a view
    into the model's memory, and assigning copies into it.

    Parameters
    ----------
    decay : bool, default True
        Whether weight decay applies.
    """

    def __init__(self, *, decay: bool = True) -> None:
        self.decay = decay

    def __set_name__(self, owner: type[Layer], name: str) -> None:
        self.name = name

    @overload
    def __get__(self, layer: None, owner: type[Layer]) -> Self: ...
    @overload
    def __get__(self, layer: Layer, owner: type[Layer]) -> Array: ...
    def __get__(self, layer: Layer | None, owner: type[Layer]) -> Self | Array:
        if layer is None:
            return self
        if self.name not in layer.__dict__:
            layer.draw_to_look()
        return layer.__dict__[self.name]

    def __set__(self, layer: Layer, value: Any) -> None:
        array = real_array(value, self.name)
        shape = layer.shapes()[self.name]
        if array.shape != shape:
            raise ValueError(f"{layer!r}: {self.name} must have shape {shape}, got {array.shape}")
        check_finite(array, self.name, np.float64 if layer.owner is None else layer.__dict__[self.name].dtype)
        if layer.owner is not None:
            layer.__dict__[self.name][...] = layer.engine.asarray(array)
        else:
            layer.__dict__.get("_looked_at", {}).pop(self.name, None)
            floats = array.dtype if array.dtype in (np.float32, np.float64) else np.float64
            layer.__dict__[self.name] = layer.engine.asarray(array, floats)


class Layer(Part):
    """A step of a network: `forward` computes `output` from `inputs`, `backward` computes `dinputs` from `dvalues`.

    A subclass computes with ops alone (``self.engine.dense_forward(...)``), so that the same two methods serve both
    for a call at once and for a recording. A parameter is declared as a `Parameter` in the class and given a shape by
    `shapes`; `backward` stores the gradient of ``weights`` as ``dweights``. `draw` gives first values, and `config` the
    constructor's arguments, for files.

    Examples
    --------
    A layer with parameters of its own, as wide as its input:

    >>> import numpy as np, fastbp
    >>> class Mix(fastbp.Layer):
    ...     weights, biases = fastbp.Parameter(), fastbp.Parameter(decay=False)
    ...
    ...     def __init__(self, size, **options):
    ...         super().__init__(**options)
    ...         self.features = self.size = size
    ...
    ...     def config(self):
    ...         return {"size": self.size}
    ...
    ...     def shapes(self):
    ...         return {"weights": (self.size, self.size), "biases": (1, self.size)}
    ...
    ...     def draw(self, rng, **options):
    ...         for name, shape in self.shapes().items():
    ...             if name not in self.__dict__:
    ...                 setattr(self, name, rng.normal(0, 0.1, shape))
    ...
    ...     def forward(self, x):
    ...         self.inputs = self.read(x, self.size)
    ...         z = self.engine.dense_forward(self.inputs, self.weights, self.biases)
    ...         self.output = self.engine.tanh_forward(z)
    ...         return self.output
    ...
    ...     def backward(self, dvalues):
    ...         dz = self.engine.tanh_backward(dvalues, self.output)
    ...         self.dweights = self.engine.dense_weight_grad(self.inputs, dz)
    ...         self.dbiases = self.engine.dense_bias_grad(dz)
    ...         self.dinputs = self.engine.dense_input_grad(dz, self.weights)
    ...         return self.dinputs
    >>> fastbp.gradcheck(Mix(3), np.random.default_rng(0).standard_normal((4, 3)))
    True
    >>> model = fastbp.Sequential([Mix(2)], loss=fastbp.MeanSquaredError(), optimizer=fastbp.SGD(0.1), seed=0)
    >>> losses = model.fit(np.eye(2), np.eye(2), epochs=20).history["loss"]
    >>> losses[-1] < 0.5 * losses[0]
    True
    """

    #: Layers inside this one.
    layers: tuple[Layer, ...] = ()
    #: Whether the weights of a layer in front of this one are drawn larger, because it drops much of what it is given.
    rectifies = False
    #: How many features `x` must have; None for any number.
    features: int | None = None
    inputs: Array
    output: Array
    dinputs: Array

    def __init__(self, *, engine: str | Engine | None = None) -> None:
        self.engine = choose_engine(engine)

    @property
    def training(self) -> bool:
        """False for what `forward` does in a prediction; assigning holds for the layers inside, too."""
        return bool(self.__dict__.get("training", True))

    @training.setter
    def training(self, training: bool) -> None:
        for _, layer in self.walk():
            layer.__dict__["training"] = as_flag(training, "training")

    @property
    def trainable(self) -> bool:
        """Whether training changes the parameters; assigning holds for the layers inside, too.

        What goes on being trained keeps its optimizer's moments; where more is trained than before, all start anew.
        """
        return bool(self.__dict__.get("_trainable", True))

    @trainable.setter
    def trainable(self, trainable: bool) -> None:
        trainable = as_flag(trainable, "trainable")
        layers = [layer for _, layer in self.walk()]
        with contextlib.nullcontext() if self.owner is None else self.owner.all_or_nothing(*layers):
            for layer in layers:
                layer.__dict__["_trainable"] = trainable
            if self.owner is not None:
                self.owner.layers = self.owner.layers

    def walk(self, path: str = "") -> Iterator[tuple[str, Layer]]:
        """This layer and those inside it, each with its path: ``""``, ``"layers.0."``, ``"layers.0.layers.1."``."""
        yield path, self
        for place, layer in enumerate(self.layers):
            yield from layer.walk(f"{path}layers.{place}.")

    def forward(self, x: Array) -> Array:
        """Compute, store and return `output` for a batch.

        Parameters
        ----------
        x : array, shape (batch, features)
            float32 or float64; the layer computes in its dtype.

        Returns
        -------
        array, shape (batch, features of the output)

        Raises
        ------
        ValueError
            Where the shape of `x` does not fit the layer.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(x)")

    def backward(self, dvalues: Array) -> Array:
        """Compute, store and return `dinputs`, the gradient by this layer's inputs, after `forward`.

        Parameters
        ----------
        dvalues : array, shape of `output`
            The gradient of the loss by this layer's output.

        Returns
        -------
        array, shape of `inputs`
        """
        raise NotImplementedError(f"{type(self).__name__} must define backward(dvalues)")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters."""
        return {}

    def draw(self, rng: np.random.Generator, *, before_relu: bool = True) -> None:
        """Give values to the parameters that have none.

        Parameters
        ----------
        rng : numpy.random.Generator
        before_relu : bool, default True
            Whether a layer follows that `rectifies`, which the default initialisation looks at.
        """

    def draw_to_look(self) -> None:
        """Draw what has no values yet, because somebody looks at it before a model owns the layer."""
        lacking = self.parameters().keys() - self.__dict__.keys()
        self.draw(np.random.default_rng())
        self.check_drawn()
        self.__dict__["_looked_at"] = {name: self.engine.asnumpy(self.__dict__[name]).copy() for name in lacking}

    def check_drawn(self) -> None:
        """Raise TypeError where `shapes` or `draw` leave a declared parameter out."""
        if lacking := self.parameters().keys() - (self.__dict__.keys() & self.shapes().keys()):
            raise TypeError(f"{self!r}: shapes must name and draw must assign {', '.join(sorted(lacking))}")

    def undraw(self) -> None:
        """Drop what `draw_to_look` drew, if it is as it was drawn; a model's seed then gives the values."""
        for name, drawn in self.__dict__.pop("_looked_at", {}).items():
            if (self.engine.asnumpy(self.__dict__[name]) == drawn).all():
                del self.__dict__[name]

    def reseed(self, seed: np.random.SeedSequence, place: int) -> None:
        """Start the layer's random numbers anew, from a model's seed and the layer's place in it."""

    def width(self, features: int) -> int:
        """The number of features of the output, where the input has `features`; ValueError where it cannot be."""
        if self.features not in (None, features):
            raise ValueError(f"{self!r} takes {self.features} features, but the layer before it gives {features}")
        return features

    def check_rows(self, X: Array, name: str = "X") -> None:
        """Raise ValueError where this layer cannot take a value of `X`; asked where it is the first to see it."""
        if self.layers:
            self.layers[0].check_rows(X, name)

    def arrays(self) -> tuple[str, ...]:
        return *self.parameters(), *self.state

    @classmethod
    def parameters(cls) -> dict[str, Parameter]:
        """The declared parameters by name."""
        return cls.declared(Parameter)

    def read(self, x: Any, features: int | None = None) -> Array:
        """`x` as an engine array of shape (batch, `features`)."""
        array = as_array(x, "x", self.engine)
        if array.ndim != 2 or 0 in array.shape or features not in (None, array.shape[1]):
            expected = "features" if features is None else features
            raise ValueError(f"{self!r}: x must have shape (batch, {expected}), got {array.shape}")
        return array

    def read_gradient(self, dvalues: Any, shape: tuple[int, ...] | None = None) -> Array:
        """`dvalues` as an engine array of a shape, by default that of `output`."""
        array, shape = as_array(dvalues, "dvalues", self.engine), shape or self.output.shape
        if array.shape != shape:
            raise ValueError(f"{self!r}: dvalues must have shape {shape}, as the output, got {array.shape}")
        return array

    def forget(self) -> None:
        """Drop what `forward` and `backward` stored."""
        for name in self.stored():
            self.__dict__.pop(name, None)

    @classmethod
    @functools.cache
    def stored(cls) -> tuple[str, ...]:
        return "inputs", "output", "dinputs", *(f"d{name}" for name in cls.parameters())

    def __getattr__(self, name: str) -> Any:
        if name in self.stored():
            method = "backward(dvalues)" if name.startswith("d") else "forward(x)"
            raise AttributeError(f"{self!r} has no {name}: call {method} to look")
        hint = ": its __init__ must call super().__init__()" if name == "engine" else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")


class Dense(Layer):
    """A fully connected layer: ``output = x @ weights + biases``.

    Parameters
    ----------
    inputs, neurons : int
        Features of the input and of the output.
    init : str or callable, optional
        How weights are drawn, by a name below or a function ``(rng, shape) -> array`` of a `numpy.random.Generator` and
        (inputs, neurons). By default "he" alone or in front of ReLU and what is bent like it, "glorot" in front
        of anything else in a model.
    engine : str or Engine, optional

    Attributes
    ----------
    weights : array, shape (inputs, neurons)
    biases : array, shape (1, neurons)
    dweights, dbiases : array
        Their gradients, of the same shapes, after `backward`.

    Raises
    ------
    ValueError
        For a size below 1, or a name of `init` that there is not.

    Notes
    -----
    What `init` may name, and the variance that it gives the weights around a mean of 0:

    ======================================  ==========================  ==============================================
    "he_normal" ("he"), "he_uniform"        2 / inputs                  He et al. 2015, eq. 10
    "glorot_normal"                         2 / (inputs + neurons)      Glorot and Bengio 2010, eq. 12
    "glorot_uniform" ("glorot")             2 / (inputs + neurons)      Glorot and Bengio 2010, eq. 16
    "lecun_normal", "lecun_uniform"         1 / inputs                  LeCun et al. 1998, Efficient BackProp, eq. 16
    "orthogonal"                            1 / max(inputs, neurons)    Saxe et al. 2014: orthonormal columns, or rows
    "normal"                                0.01**2
    "zeros"                                 0
    "torch"                                 1 / (3 * inputs)            `torch.nn.Linear`, uniform
    ======================================  ==========================  ==============================================

    Biases start at 0; with "torch" they are drawn as the weights are.

    `config`, and so a model's file, keeps the name of `init` but no function: weights that are stored need none.

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> layer = fastbp.Dense(2, 3)
    >>> layer.weights = [[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]]
    >>> layer.forward(np.array([[3.0, 4.0]]))
    array([[ 3.,  4., 14.]])
    >>> layer.backward(np.array([[1.0, 1.0, 1.0]]))
    array([[3., 3.]])
    >>> layer.dweights
    array([[3., 3., 3.],
           [4., 4., 4.]])
    """

    weights = Parameter()
    biases = Parameter(decay=False)
    dweights: Array
    dbiases: Array

    def __init__(
        self,
        inputs: int,
        neurons: int,
        *,
        init: str | Initializer | None = None,
        engine: str | Engine | None = None,
    ) -> None:
        super().__init__(engine=engine)
        if init is not None:
            initializer(init)
        self.features = self.n_inputs = as_count(inputs, "inputs")
        self.n_neurons = as_count(neurons, "neurons")
        self.init = init

    def forward(self, x: Array) -> Array:
        self.inputs = self.read(x, self.n_inputs)
        self.output = self.engine.dense_forward(self.inputs, self.weights, self.biases)
        return self.output

    def backward(self, dvalues: Array) -> Array:
        dvalues = self.read_gradient(dvalues, (self.inputs.shape[0], self.n_neurons))
        self.dbiases = self.engine.dense_bias_grad(dvalues)
        self.dweights = self.engine.dense_weight_grad(self.inputs, dvalues)
        self.dinputs = self.engine.dense_input_grad(dvalues, self.weights)
        return self.dinputs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weights": (self.n_inputs, self.n_neurons), "biases": (1, self.n_neurons)}

    def draw(self, rng: np.random.Generator, *, before_relu: bool = True) -> None:
        init = self.init or ("he" if before_relu else "glorot")
        shape = self.n_inputs, self.n_neurons
        if "weights" not in self.__dict__:
            self.weights = initializer(init)(rng, shape)
        if "biases" not in self.__dict__:
            self.biases = initializer(init)(rng, shape)[:1] if init == "torch" else np.zeros((1, self.n_neurons))

    def width(self, features: int) -> int:
        super().width(features)
        return self.n_neurons

    def config(self) -> dict[str, Any]:
        init = {"init": self.init} if isinstance(self.init, str) else {}
        return {"inputs": self.n_inputs, "neurons": self.n_neurons} | init


class Softmax(Layer):
    """Rows of probabilities: ``output = exp(x) / sum(exp(x))``, each row shifted by its maximum first.

    Parameters
    ----------
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> softmax = fastbp.Softmax()
    >>> softmax.forward(np.array([[0.0, 0.0]]))
    array([[0.5, 0.5]])
    >>> softmax.jacobian()
    array([[[ 0.25, -0.25],
            [-0.25,  0.25]]])
    """

    def forward(self, x: Array) -> Array:
        self.inputs = self.read(x)
        self.output = self.engine.softmax_forward(self.inputs)
        return self.output

    def backward(self, dvalues: Array) -> Array:
        self.dinputs = self.engine.softmax_backward(self.read_gradient(dvalues), self.output)
        return self.dinputs

    def jacobian(self) -> Array:
        """The derivative of each output by each input, for each row of the last `forward`.

        Returns
        -------
        array, shape (batch, classes, classes)
            ``diag(p) - outer(p, p)``. `backward` multiplies by it without building it.
        """
        return self.engine.softmax_jacobian(self.output)


class Dropout(Layer):
    """Set each element to 0 with probability `rate` while training, and scale the others by 1 / (1 - rate).

    Srivastava et al., 2014, scaled in training, so that `predict` has nothing to do. The masks are numbers of
    Philox4x64-10 counted by block, step and layer: a model's seed gives the same masks on every engine.

    Parameters
    ----------
    rate : float, default 0.5
        In [0, 1].
    seed : int, optional
        For a layer that stands alone; a model sets it from its own seed.
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> dropout = fastbp.Dropout(0.5, seed=0)
    >>> bool(np.isin(dropout.forward(np.ones((4, 5))), [0.0, 2.0]).all())
    True
    """

    state = ("key",)
    rate = Setting(partial(as_number, most=1))

    def __init__(self, rate: float = 0.5, *, seed: int | None = None, engine: str | Engine | None = None) -> None:
        super().__init__(engine=engine)
        self.rate = rate
        self.reseed(np.random.SeedSequence(as_seed(seed)), 0)

    def reseed(self, seed: np.random.SeedSequence, place: int) -> None:
        # two words of the seed, the step, and the layer's place
        key = np.array([*seed.generate_state(2, np.uint64), 0, place], np.uint64)
        self.key = self.engine.asarray(key)

    def forward(self, x: Array) -> Array:
        self.inputs = self.read(x)
        if self.training:
            self.output, self.mask = self.engine.dropout_forward(self.inputs, self.engine.scalar(self.rate), self.key)
        else:
            self.output = self.inputs
        return self.output

    def backward(self, dvalues: Array) -> Array:
        dvalues = self.read_gradient(dvalues)
        self.dinputs = self.engine.dropout_backward(dvalues, self.mask) if self.training else dvalues
        return self.dinputs

    @classmethod
    @functools.cache
    def stored(cls) -> tuple[str, ...]:
        return *super().stored(), "mask"
