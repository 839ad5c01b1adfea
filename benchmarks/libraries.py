"""Other libraries' way to train a task: each through its own interface, an epoch at a time.

To add one, write a class with `epoch` and `weights`, and give it a name in `LIBRARIES`.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np

from fastbp.kernels.ops import Array

__all__ = ["LIBRARIES", "Task", "Trainer", "check_installed", "quiet"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Task:
    """Rows in float32 and labels, initial weights (biases start at 0), and how to train with them.

    Between dense layers stands ReLU; the loss is the cross-entropy of the softmax. `optimizer` is "sgd" or "adam", the
    latter with betas of 0.9 and 0.999 and eps = 1e-8; `batch` divides the rows.
    """

    X: Array
    y: Array
    weights: list[Array]
    batch: int
    optimizer: str
    lr: float

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.X) // self.batch

    def start(self, steps: int) -> Task:
        """The same task on its first few batches."""
        return replace(self, X=self.X[: steps * self.batch], y=self.y[: steps * self.batch])


class Trainer(Protocol):
    """A library that trains one network."""

    def __init__(self, task: Task) -> None: ...

    def load(self, X: Array, y: Array) -> Any:
        """The rows as the library likes to have them."""

    def epoch(self, data: Any) -> None:
        """Go through what was loaded once, in its order."""

    def weights(self) -> list[Array]:
        """Of each layer, (inputs, neurons)."""

    def predict(self, X: Array) -> Array:
        """The labels."""


class ByTorch:
    """PyTorch, eagerly."""

    compiled = False

    def __init__(self, task: Task) -> None:
        import torch

        self.batch = task.batch
        self.dense = [torch.nn.Linear(*w.shape) for w in task.weights]
        with torch.no_grad():
            for layer, w in zip(self.dense, task.weights, strict=True):
                layer.weight[:] = torch.from_numpy(w.T.copy())
                layer.bias[:] = 0
        stack = [part for layer in self.dense for part in (layer, torch.nn.ReLU())][:-1]
        self.model = model = torch.nn.Sequential(*stack)
        optimizer = torch.optim.SGD if task.optimizer == "sgd" else torch.optim.Adam
        self.optimizer = optimizer(model.parameters(), task.lr)

        def loss(x: Any, t: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(x), t)

        self.loss = torch.compile(loss) if self.compiled else loss

    def load(self, X: Array, y: Array) -> Any:
        import torch

        return torch.from_numpy(X), torch.from_numpy(y)

    def epoch(self, data: Any) -> None:
        rows, labels = data
        for start in range(0, len(rows), self.batch):
            self.optimizer.zero_grad()
            self.loss(rows[start : start + self.batch], labels[start : start + self.batch]).backward()
            self.optimizer.step()

    def weights(self) -> list[Array]:
        return [layer.weight.detach().numpy().T for layer in self.dense]

    def predict(self, X: Array) -> Array:
        import torch

        with torch.no_grad():
            return self.model(torch.from_numpy(X)).argmax(1).numpy()


class ByTorchCompile(ByTorch):
    """PyTorch, through torch.compile."""

    compiled = True


class ByJax:
    """JAX: an epoch is one compiled scan over its batches."""

    def __init__(self, task: Task) -> None:
        import jax.numpy as jnp

        self.batch = task.batch
        self.parameters = [(jnp.array(w), jnp.zeros(w.shape[1])) for w in task.weights]
        zeros = [(jnp.zeros_like(w), jnp.zeros_like(b)) for w, b in self.parameters]
        self.state = (zeros, [(jnp.zeros_like(w), jnp.zeros_like(b)) for w, b in self.parameters], jnp.zeros(()))
        self.scan = jax_epoch(task.optimizer, task.lr)

    def load(self, X: Array, y: Array) -> Any:
        import jax.numpy as jnp

        return jnp.array(X.reshape(-1, self.batch, X.shape[1])), jnp.array(y.reshape(-1, self.batch))

    def epoch(self, data: Any) -> None:
        (self.parameters, self.state), losses = self.scan((self.parameters, self.state), *data)
        losses.mean().block_until_ready()

    def weights(self) -> list[Array]:
        return [np.asarray(w) for w, _ in self.parameters]

    def predict(self, X: Array) -> Array:
        return np.asarray(jax_forward(self.parameters, X).argmax(1))


def jax_forward(parameters: Any, x: Any) -> Any:
    import jax

    for w, b in parameters[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = parameters[-1]
    return x @ w + b


@functools.cache
def jax_epoch(optimizer: str, lr: float) -> Any:
    """A compiled function of (parameters, state), rows and labels; jax compiles it anew for other shapes."""
    import jax
    import jax.numpy as jnp

    def loss(parameters: Any, x: Any, t: Any) -> Any:
        logs = jax.nn.log_softmax(jax_forward(parameters, x))
        return -jnp.take_along_axis(logs, t[:, None], axis=1).mean()

    def step(carried: Any, batch: Any) -> Any:
        parameters, (m, v, n) = carried
        value, gradients = jax.value_and_grad(loss)(parameters, *batch)
        if optimizer == "sgd":
            return (jax.tree.map(lambda p, g: p - lr * g, parameters, gradients), (m, v, n)), value
        n = n + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradients)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradients)
        rate, root = lr / (1 - 0.9**n), jnp.sqrt(1 - 0.999**n)
        parameters = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) / root + 1e-8), parameters, m, v)
        return (parameters, (m, v, n)), value

    return jax.jit(lambda carried, X, y: jax.lax.scan(step, carried, (X, y)), donate_argnums=0)


class BySklearn:
    """scikit-learn's MLPClassifier; where there are two classes, it has one logit instead of two."""

    def __init__(self, task: Task) -> None:
        from sklearn.neural_network import MLPClassifier

        sizes = [len(task.weights[0]), *(w.shape[1] for w in task.weights)]
        self.model = MLPClassifier(
            sizes[1:-1], solver=task.optimizer, alpha=0, batch_size=task.batch, learning_rate_init=task.lr,
            momentum=0, nesterovs_momentum=False, shuffle=False,
        )  # fmt: skip
        rows = np.resize(task.X, (max(task.batch, sizes[-1]), sizes[0]))
        self.model.partial_fit(rows, np.arange(len(rows)) % sizes[-1], classes=np.arange(sizes[-1]))
        del self.model._optimizer  # the next call makes a new one
        for mine, w in zip(self.model.coefs_, task.weights, strict=True):
            mine[:] = w if mine.shape == w.shape else w[:, 1:] - w[:, :1]
        for bias in self.model.intercepts_:
            bias[:] = 0

    def load(self, X: Array, y: Array) -> Any:
        return X, y

    def epoch(self, data: Any) -> None:
        self.model.partial_fit(*data)

    def weights(self) -> list[Array]:
        return self.model.coefs_

    def predict(self, X: Array) -> Array:
        return self.model.predict(X)


LIBRARIES: dict[str, Callable[[Task], Trainer]] = {
    "torch": ByTorch,
    "torch.compile": ByTorchCompile,
    "jax": ByJax,
    "sklearn": BySklearn,
}
PACKAGE = {"torch.compile": "torch", "sklearn": "scikit-learn"}


def check_installed(name: str) -> None:
    """Raise ImportError with the install line where a library is missing."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise ImportError(f"{name} is not installed; the remedy: pip install {PACKAGE.get(name, name)}")


def quiet(function: Callable[P, R]) -> Callable[P, R]:
    """The same without the warnings of libraries, such as that a training did not converge."""

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*arguments, **options)

    return call
