"""Activations: what bends the line between dense layers, element by element."""

from __future__ import annotations

from functools import partial

from .boundary import as_choice, as_number
from .kernels.engine import Engine
from .kernels.ops import OPS, Array
from .layers import Layer
from .part import Setting

__all__ = ["ELU", "GELU", "Activation", "Identity", "LeakyReLU", "ReLU", "SiLU", "Sigmoid", "Softplus", "Tanh"]


class Activation(Layer):
    """A layer that computes by two ops, ``op + "_forward"`` and ``op + "_backward"``, whose rows say what they read."""

    op: str

    def forward(self, x: Array) -> Array:
        self.inputs = self.read(x)
        self.output = self.engine.call(OPS[f"{self.op}_forward"], self.inputs, *self._settings())
        return self.output

    def backward(self, dvalues: Array) -> Array:
        op = OPS[f"{self.op}_backward"]
        seen = self.output if op.inputs[1].name == "y" else self.inputs
        self.dinputs = self.engine.call(op, self.read_gradient(dvalues), seen, *self._settings())
        return self.dinputs

    def _settings(self) -> list[Array]:
        """What both ops take besides arrays: the attributes that are named as their arguments."""
        return [self.engine.scalar(getattr(self, arg.name)) for arg in OPS[f"{self.op}_forward"].inputs[1:]]


class Identity(Layer):
    """``output = x``.

    Parameters
    ----------
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> fastbp.Identity().forward(np.array([[-1.0, 2.0]]))
    array([[-1.,  2.]])
    """

    def forward(self, x: Array) -> Array:
        self.output = self.inputs = self.read(x)
        return self.output

    def backward(self, dvalues: Array) -> Array:
        self.dinputs = self.read_gradient(dvalues)
        return self.dinputs


class ReLU(Activation):
    """``output = max(x, 0)``, whose gradient passes where the output is positive.

    Parameters
    ----------
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> relu = fastbp.ReLU()
    >>> relu.forward(np.array([[-1.0, 2.0]]))
    array([[0., 2.]])
    >>> relu.backward(np.array([[5.0, 5.0]]))
    array([[0., 5.]])
    """

    op = "relu"
    rectifies = True


class LeakyReLU(Activation):
    """``output = x`` where that is positive, otherwise ``negative_slope * x`` (Maas et al., 2013).

    Parameters
    ----------
    negative_slope : float, default 0.01
        At least 0.
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> layer = fastbp.LeakyReLU(0.5)
    >>> layer.forward(np.array([[-1.0, 2.0]]))
    array([[-0.5,  2. ]])
    >>> layer.backward(np.array([[1.0, 1.0]]))
    array([[0.5, 1. ]])
    """

    op = "leaky_relu"
    rectifies = True
    negative_slope = Setting(as_number, default=0.01)

    def __init__(self, negative_slope: float = 0.01, *, engine: str | Engine | None = None) -> None:
        super().__init__(engine=engine)
        self.negative_slope = negative_slope


class ELU(Activation):
    """``output = x`` where that is positive, otherwise ``alpha * (exp(x) - 1)`` (Clevert et al., 2016, eq. 15).

    Parameters
    ----------
    alpha : float, default 1.0
        At least 0.
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> layer = fastbp.ELU()
    >>> layer.forward(np.array([[-np.log(2), 2.0]]))
    array([[-0.5,  2. ]])
    >>> layer.backward(np.array([[1.0, 1.0]]))
    array([[0.5, 1. ]])
    """

    op = "elu"
    rectifies = True
    alpha = Setting(as_number, default=1.0)

    def __init__(self, alpha: float = 1.0, *, engine: str | Engine | None = None) -> None:
        super().__init__(engine=engine)
        self.alpha = alpha


class GELU(Activation):
    """``output = x * P(X <= x)`` for a standard normal X (Hendrycks and Gimpel, 2016).

    Parameters
    ----------
    approximate : {"none", "tanh"}, default "none"
        With "tanh", ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))`` instead, as in GPT-2.
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> layer = fastbp.GELU()
    >>> layer.forward(np.array([[-1.0, 0.0, 1.0]])).round(4)
    array([[-0.1587,  0.    ,  0.8413]])
    >>> layer.backward(np.array([[1.0, 1.0, 1.0]])).round(4)
    array([[-0.0833,  0.5   ,  1.0833]])
    """

    rectifies = True
    approximate = Setting(partial(as_choice, choices=("none", "tanh")), default="none")

    def __init__(self, approximate: str = "none", *, engine: str | Engine | None = None) -> None:
        super().__init__(engine=engine)
        self.approximate = approximate

    @property
    def op(self) -> str:  # type: ignore[override]
        return "gelu" if self.approximate == "none" else "gelu_tanh"


class SiLU(Activation):
    """``output = x / (1 + exp(-x))``, also known as swish (Elfwing et al., 2018, eq. 9).

    Parameters
    ----------
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> layer = fastbp.SiLU()
    >>> layer.forward(np.array([[0.0, np.log(3)]])).round(4)
    array([[0.   , 0.824]])
    >>> layer.backward(np.array([[1.0, 1.0]])).round(4)
    array([[0.5  , 0.956]])
    """

    op = "silu"
    rectifies = True


class Tanh(Activation):
    """``output = tanh(x)``.

    Parameters
    ----------
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> layer = fastbp.Tanh()
    >>> layer.forward(np.array([[0.0, np.log(2)]]))
    array([[0. , 0.6]])
    >>> layer.backward(np.array([[1.0, 1.0]]))
    array([[1.  , 0.64]])
    """

    op = "tanh"


class Sigmoid(Activation):
    """``output = 1 / (1 + exp(-x))``.

    Parameters
    ----------
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> layer = fastbp.Sigmoid()
    >>> layer.forward(np.array([[0.0, np.log(3)]]))
    array([[0.5 , 0.75]])
    >>> layer.backward(np.array([[1.0, 1.0]]))
    array([[0.25  , 0.1875]])
    """

    op = "sigmoid"


class Softplus(Activation):
    """``output = log(1 + exp(beta * x)) / beta``, and x itself where ``beta * x`` is above `threshold`.

    Parameters
    ----------
    beta : float, default 1.0
        Above 0.
    threshold : float, default 20.0
    engine : str or Engine, optional

    Examples
    --------
    >>> import numpy as np, fastbp
    >>> layer = fastbp.Softplus()
    >>> layer.forward(np.array([[0.0, 30.0]])).round(4)
    array([[ 0.6931, 30.    ]])
    >>> layer.backward(np.array([[1.0, 1.0]]))
    array([[0.5, 1. ]])
    """

    op = "softplus"
    rectifies = True
    beta = Setting(partial(as_number, above=0), default=1.0)
    threshold = Setting(as_number, default=20.0)

    def __init__(self, beta: float = 1.0, threshold: float = 20.0, *, engine: str | Engine | None = None) -> None:
        super().__init__(engine=engine)
        self.beta, self.threshold = beta, threshold
