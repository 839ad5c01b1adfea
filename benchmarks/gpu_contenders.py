"""Those who train the same steps on a GPU: fastbp, torch and jax, each with the data there already."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fastbp

__all__ = ["CONTENDERS", "ENGINE", "ByFastbp", "Run", "path_of"]

ENGINE, LR = "cupy", 0.01
AT_ONCE = 16  # steps of a graph, as many as fastbp captures
UNROLLED = 8  # steps of a loop's turn
Run = Callable[[int], list[float]]  # trains for so many epochs, and gives the seconds of each


class ByFastbp:
    """Epochs by fastbp, and how it runs their steps."""

    def __init__(self, sizes: list[int], batch: int, steps: int, precision: str) -> None:
        layers = [part for k, n in itertools.pairwise(sizes) for part in (fastbp.Dense(k, n), fastbp.ReLU())][:-1]
        self._model = fastbp.Sequential(
            layers,
            loss=fastbp.SoftmaxCrossEntropy(),
            optimizer=fastbp.SGD(LR),
            engine=ENGINE,
            precision=precision,
            seed=0,
        )
        self._data, self._batch = data_for(sizes, batch, steps), batch

    def __call__(self, epochs: int) -> list[float]:
        """After one epoch more, at the start of which the data come to the GPU."""
        ends: list[float] = []
        options: dict[str, Any] = {"batch_size": self._batch, "shuffle": False, "verbose": False}
        clock = [lambda *_: ends.append(time.perf_counter())]
        self._model.fit(*self._data, epochs=epochs + 1, callbacks=clock, **options)
        return [end - start for start, end in itertools.pairwise(ends)]

    def path(self) -> str:
        return path_of(self._model)

    def on_device(self) -> float:
        """Seconds of an epoch's steps by the GPU's own clock."""
        model: Any = self._model
        with model.training() as trainer:
            trainer.bind(model.checked(*self._data), self._batch)
            trainer.epoch()  # which makes ready what others take
            model.memory.start_epoch()
            ((tape, steps),) = trainer._replays
            return float(model.engine.device_seconds(lambda: tape.run(steps)))


def path_of(model: Any) -> str:
    """What ran a model's last steps of training: "Graph", or "OneKernel" of so many blocks."""
    tapes = [tape for (kind, *_), tape in model._tapes.items() if kind == "step"]
    run = [run for tape in tapes for run in tape._program._ready.values()][-1]
    return f"OneKernel({run._grid[0]})" if hasattr(run, "_grid") else type(run).__name__


def data_for(sizes: list[int], batch: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch * steps, sizes[0]), np.float32), rng.integers(0, sizes[-1], batch * steps)


def each_timed(epoch: Callable[[], object]) -> Run:
    """A run of epochs each of which is done when it comes back."""

    def seconds() -> float:
        start = time.perf_counter()
        epoch()
        return time.perf_counter() - start

    return lambda epochs: [seconds() for _ in range(epochs)]


def by_torch(sizes: list[int], batch: int, steps: int, precision: str, way: str) -> Run:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    modules = [m for k, n in itertools.pairwise(sizes) for m in (torch.nn.Linear(k, n), torch.nn.ReLU())]
    model = torch.nn.Sequential(*modules[:-1]).cuda()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    X, y = (torch.from_numpy(x).cuda() for x in data_for(sizes, batch, steps))

    def loss_of(x: Any, t: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            return torch.nn.functional.cross_entropy(model(x), t)

    loss, update = loss_of, optimizer.step
    if way == "compiled":
        loss, update = torch.compile(loss_of, mode="max-autotune"), torch.compile(optimizer.step)

    def train(x: Any, t: Any) -> None:
        for samples, labels in zip(x.split(batch), t.split(batch), strict=True):
            optimizer.zero_grad()
            loss(samples, labels).backward()
            update()

    rows = batch * min(AT_ONCE, steps) if way == "graph" else len(X)
    assert len(X) % rows == 0
    run = captured(train, X[:rows].clone(), y[:rows].clone(), batch) if way == "graph" else train

    def epoch() -> None:
        for samples, labels in zip(X.split(rows), y.split(rows), strict=True):
            run(samples, labels)
        torch.cuda.synchronize()

    return each_timed(epoch)


def captured(train: Callable[[Any, Any], None], x: Any, t: Any, batch: int) -> Callable[[Any, Any], None]:
    """Steps of torch as one CUDA graph, which takes its samples from `x` and `t`."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(x[:batch], t[:batch])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(x, t)

    def replay(samples: Any, labels: Any) -> None:
        x.copy_(samples)
        t.copy_(labels)
        graph.replay()

    return replay


def by_jax(sizes: list[int], batch: int, steps: int, precision: str, unroll: int) -> Run:
    import jax
    from jax import numpy as jnp

    if jax.default_backend() != "gpu":
        raise RuntimeError("jax has no GPU")
    presets = jax.lax.DotAlgorithmPreset
    kind = {"fp32": presets.F32_F32_F32, "tf32": presets.TF32_TF32_F32, "bf16": presets.BF16_BF16_F32}[precision]
    rng = np.random.default_rng(0)
    parameters = [
        (jnp.array(rng.standard_normal((k, n), np.float32) * np.sqrt(2 / k)), jnp.zeros(n, jnp.float32))
        for k, n in itertools.pairwise(sizes)
    ]
    X, y = data_for(sizes, batch, steps)
    X, y = jnp.array(X.reshape(steps, batch, -1)), jnp.array(y.reshape(steps, batch))

    def loss_of(parameters: Any, x: Any, t: Any) -> Any:
        for w, b in parameters[:-1]:
            x = jax.nn.relu(jnp.matmul(x, w, precision=kind) + b)
        w, b = parameters[-1]
        logits = jnp.matmul(x, w, precision=kind) + b
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), t[:, None], axis=1).mean()

    def step(parameters: Any, samples: Any) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(parameters, *samples)
        return jax.tree.map(lambda p, g: p - LR * g, parameters, gradients), loss

    def epoch_of(parameters: Any, X: Any, y: Any) -> Any:
        return jax.lax.scan(step, parameters, (X, y), unroll=unroll)

    scan = jax.jit(epoch_of, donate_argnums=0)

    def epoch() -> None:
        nonlocal parameters
        parameters, losses = scan(parameters, X, y)
        losses.block_until_ready()

    return each_timed(epoch)


CONTENDERS: dict[str, Callable[..., Run]] = {
    "fastbp": ByFastbp,
    "torch eager": functools.partial(by_torch, way="eager"),
    "torch graph": functools.partial(by_torch, way="graph"),
    "jax scan": functools.partial(by_jax, unroll=1),
    "jax unrolled": functools.partial(by_jax, unroll=UNROLLED),
    "torch compiled": functools.partial(by_torch, way="compiled"),
}
