"""All that is to be seen of the engine "cupy" on a GPU, in parts that resume, within 8 minutes.

    python benchmarks/gpu.py [--json FILE] [--again] [--parts about "bench 2-64-3" ...] [--without "torch compiled" ...]

Each part runs in a process of its own, and its result is in the file as soon as it is there; the next call goes on with
those that are missing or have failed. The exit status is 0 where all parts have passed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import io
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import fastbp

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480
# the network, its batch, steps of an epoch, precisions, and how many times as long others should take at least: torch
# as it is, and the best of the rest
CASES = {
    "2-64-3": (300, 1000, ["fp32"], 30, 3),
    "30-100-2": (200, 1000, ["fp32"], 30, 3),
    "64-128-10": (32, 1000, ["fp32"], 30, 3),
    "784-512-256-10": (128, 400, ["fp32"], 8, 1.2),
    "4096-4096-4096-4096": (8192, 8, ["tf32", "bf16"], 1.2, 1.0),
}
# networks and batches about as large as those between which kernels/cupy_replay.py draws a line
LINES = {"2-64-3": 300, "64-128-10": 32, "30-100-2": 200, "64-512-10": 32, "128-256-128-10": 64, "256-256-10": 128}
LINES |= {"784-512-256-10": 128}
ENGINE, LR, REPEATS = "cupy", 0.01, 5
PROCESSES, SHARES = 8, 4  # of the tests
OF_ENGINES = "cupy or fuzz or fused or engines"  # in the names of those that are run on each engine
Run = Callable[[int], list[float]]  # trains for so many epochs, and gives the seconds of each


class NoGPU(RuntimeError):
    """What is missing on this machine."""


def about() -> dict[str, Any]:
    """The GPU, its driver, and versions."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": properties["name"].decode(),
        "driver": driver(),
        "cuda": cupy.cuda.runtime.runtimeGetVersion(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in ("fastbp", "numpy", "cupy-cuda13x", "torch", "jax")},
    }


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check() -> dict[str, Any]:
    """Every op, held against the contract."""
    report = fastbp.check("cupy", verbose=False)
    return {
        "passed": report.passed,
        "ops": len({r.op for r in report.results}),
        "failures": list(map(str, report.failures)),
    }


def training() -> dict[str, Any]:
    """Networks trained on the GPU, in each way, are those of NumPy, and load on a CPU; one seed gives the same bits."""
    X, y = fastbp.spiral_data(500, 3, seed=0)

    def fit(name: str, engine: Any, dtype: str = "float64", precision: str = "fp32") -> fastbp.Sequential:
        layers, optimizer = trained(name)
        model = fastbp.Sequential(
            layers,
            loss=fastbp.SoftmaxCrossEntropy(),
            optimizer=optimizer,
            engine=engine,
            dtype=dtype,
            precision=precision,
            seed=0,
        )
        return model.fit(X, y, epochs=10, batch_size=100, verbose=False)

    errors: dict[str, dict[str, list[float]]] = {}
    for name in ("deep", "plain"):
        reference = fit(name, "numpy").predict_proba(X)
        for way, way_set in settings_of_ways().items():
            with way_set:
                first, again = fit(name, ENGINE), fit(name, ENGINE).predict_proba(X)
                p = first.predict_proba(X)
                rounded = fit(name, ENGINE, "float32", "bf16").predict_proba(X)
            assert np.array_equal(p, again), "the same seed gave other bits"
            with tempfile.TemporaryDirectory() as folder:
                first.save(f"{folder}/model.safetensors")
                loaded = fastbp.load(f"{folder}/model.safetensors", engine="numpy")
            np.testing.assert_allclose(loaded.predict_proba(X), p, rtol=1e-9, atol=1e-12)
            errors.setdefault(name, {})[way] = [float(np.abs(found - reference).max()) for found in (p, rounded)]
    found = [pair for ways in errors.values() for pair in ways.values()]
    return {"passed": all(exact < 1e-6 and half < 0.1 for exact, half in found), "errors": errors}


def trained(name: str) -> tuple[list[fastbp.Layer], fastbp.Optimizer]:
    """What no blocks can share, for its dropout; and what they can, some of them without parameters that decay."""
    if name == "deep":
        layers = [fastbp.Dense(2, 64), fastbp.ReLU(), fastbp.Dropout(0.1), fastbp.Dense(64, 32), fastbp.Tanh()]
        return [*layers, fastbp.Dense(32, 3)], fastbp.Adam(0.01)
    layers = [fastbp.Dense(2, 16), fastbp.ReLU(), fastbp.Dense(16, 3)]
    return layers, fastbp.AdamW(0.01, weight_decay=0.1, clip_norm=1.0)


def tests(share: int) -> dict[str, Any]:
    """One of SHARES of all tests that are run on each engine, on this one."""
    import pytest

    files = sorted(map(str, (ROOT / "tests").glob("test_*.py")))[share::SHARES]
    options = ["-q", "-n", str(PROCESSES), "--dist", "worksteal", "--maxfail", "20", "-k", OF_ENGINES]
    options += ["-p", "no:benchmark"]  # which warns of the processes
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = pytest.main([*options, *files])
    return {"passed": status == 0, "output": printed.getvalue().splitlines()[-40:]}


def sanitizer() -> dict[str, Any]:
    """Some ops, and small networks in each way, under compute-sanitizer, where it is installed and works."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"passed": True, "skipped": "there is no compute-sanitizer"}
    code = "from fastbp.benchmarks import gpu; gpu.some_work()"
    outputs = {}
    for kind in ("memcheck", "racecheck", "synccheck"):
        command = [tool, f"--tool={kind}", "--error-exitcode=9", sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        outputs[kind] = {"status": done.returncode, "output": done.stdout.splitlines()[-20:]}
    return {"passed": all(output["status"] == 0 for output in outputs.values()), **outputs}


def some_work() -> None:
    """Without timing how to compute products, which a tool that waits for each kernel holds up."""
    with mock.patch("fastbp.kernels.cupy_engine.fastest", lambda engine, kernel, arrays, ways: ways[0]):
        assert fastbp.check("cupy", ["softmax_cross_entropy", "batch_norm_backward", "adam"]).passed
        in_each_way([30, 64, 10], batch=50, steps=3)


def bench(name: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """Microseconds a step of a network, beside torch and jax in the same run and precision."""
    batch, steps, precisions, *targets = CASES[name]
    contenders: dict[str, Callable[..., Run]] = {
        "fastbp": by_fastbp,
        "torch eager": functools.partial(by_torch, way="eager"),
        "torch graph": functools.partial(by_torch, way="graph"),
        "jax scan": by_jax,
        "torch compiled": functools.partial(by_torch, way="compiled"),
    }
    results: list[Any] = []
    for precision in precisions:
        us: dict[str, Any] = {}
        for contender, prepare in contenders.items():
            if contender in without:
                continue
            try:
                run = prepare(sizes_of(name), batch, steps, precision)
                run(1)
                us[contender] = sorted(1e6 * seconds / steps for seconds in run(REPEATS))
            except ImportError:
                us[contender] = "not installed"
            except Exception as error:  # of another library; the others still count
                us[contender] = repr(error)
            print(json.dumps({"results": [*results, us]}), flush=True)  # what there is if time is up
        results.append({"batch": batch, "precision": precision, "us_per_step": us, **judged(us, *targets)})
    return {"passed": all(isinstance(r["us_per_step"]["fastbp"], list) for r in results), "results": results}


def sizes_of(network: str) -> list[int]:
    return [int(n) for n in network.split("-")]


def settings_of_ways() -> dict[str, contextlib.AbstractContextManager[Any]]:
    """Settings under which steps are run by a block, by a cluster, and as a graph of several lanes or of one."""
    import cupy

    from fastbp.kernels import cupy_replay

    ways = {"block": (1, 1), "cluster": (cupy_replay.CLUSTER, 1), "graph": (0, cupy_replay.LANES), "one lane": (0, 1)}
    if int(cupy.cuda.Device().compute_capability) < 90:
        del ways["cluster"]
    return {way: settings(cupy_replay, *chosen) for way, chosen in ways.items()}


@contextlib.contextmanager
def settings(module: Any, blocks: int, lanes: int) -> Iterator[mock.Mock]:
    """So many blocks for one kernel, 0 for a graph, and so many lanes; gives what is asked how many blocks to take."""
    asked = mock.Mock(return_value=[blocks] if blocks else [])
    with mock.patch.multiple(module, blocks_for=asked, LANES=lanes):
        yield asked


def ways(steps: int = 500) -> dict[str, Any]:
    """Microseconds a step of networks by a block, by a cluster, and as a graph of several lanes or of one."""
    return {"us_per_step": {name: in_each_way(sizes_of(name), batch, steps) for name, batch in LINES.items()}}


def in_each_way(sizes: list[int], batch: int, steps: int) -> dict[str, Any]:
    """What a network's step takes, in operations and bytes, and in microseconds, one way or another."""
    found: dict[str, Any] = {}
    for way, way_set in settings_of_ways().items():
        with way_set as asked:
            seconds = by_fastbp(sizes, batch, steps, "fp32")(REPEATS)
        found["operations"], found["bytes"] = asked.call_args.args
        found[way] = 1e6 * statistics.median(seconds) / steps
    return found


def each_timed(epoch: Callable[[], object]) -> Run:
    """A run of epochs each of which is done when it comes back."""

    def seconds() -> float:
        start = time.perf_counter()
        epoch()
        return time.perf_counter() - start

    return lambda epochs: [seconds() for _ in range(epochs)]


def judged(us: dict[str, Any], eager: float, best: float) -> dict[str, Any]:
    """How many times as long the others took, and whether that is what it should be at least."""
    medians = {name: statistics.median(values) for name, values in us.items() if isinstance(values, list)}
    mine, torch = medians.pop("fastbp", None), medians.pop("torch eager", None)
    if mine is None:
        return {}
    ratios = {"eager": torch and torch / mine, "best": min(medians.values()) / mine if medians else None}
    targets = {"eager": eager, "best": best}
    return {"ratios": ratios, "reached": {k: ratios[k] and ratios[k] >= targets[k] for k in ratios}, "targets": targets}


def data_for(sizes: list[int], batch: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch * steps, sizes[0]), np.float32), rng.integers(0, sizes[-1], batch * steps)


def by_fastbp(sizes: list[int], batch: int, steps: int, precision: str) -> Run:
    layers = [part for k, n in itertools.pairwise(sizes) for part in (fastbp.Dense(k, n), fastbp.ReLU())][:-1]
    model = fastbp.Sequential(
        layers, loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.SGD(LR), engine=ENGINE, precision=precision, seed=0
    )
    X, y = data_for(sizes, batch, steps)

    def run(epochs: int) -> list[float]:
        """After one epoch, at the start of which the data come to the GPU, as others have them there already."""
        ends: list[float] = []
        options: dict[str, Any] = {"batch_size": batch, "shuffle": False, "verbose": False}
        model.fit(X, y, epochs=epochs + 1, callbacks=[lambda *_: ends.append(time.perf_counter())], **options)
        return [end - start for start, end in itertools.pairwise(ends)]

    return run


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

    def step(x: Any, t: Any) -> None:
        optimizer.zero_grad()
        loss(x, t).backward()
        update()

    replay = captured(step, X[:batch].clone(), y[:batch].clone()) if way == "graph" else step

    def epoch() -> None:
        for start in range(0, len(X), batch):
            replay(X[start : start + batch], y[start : start + batch])
        torch.cuda.synchronize()

    return each_timed(epoch)


def captured(step: Callable[[Any, Any], None], x: Any, t: Any) -> Callable[[Any, Any], None]:
    """A step of torch as a CUDA graph, which takes its samples from `x` and `t`."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x, t)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(x, t)

    def replay(samples: Any, labels: Any) -> None:
        x.copy_(samples)
        t.copy_(labels)
        graph.replay()

    return replay


def by_jax(sizes: list[int], batch: int, steps: int, precision: str) -> Run:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the others need memory, too
    import jax
    from jax import numpy as jnp

    if jax.default_backend() != "gpu":
        raise ImportError("jax has no GPU")
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

    scan = jax.jit(lambda parameters, X, y: jax.lax.scan(step, parameters, (X, y)), donate_argnums=0)

    def epoch() -> None:
        nonlocal parameters
        parameters, losses = scan(parameters, X, y)
        losses.block_until_ready()

    return each_timed(epoch)


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    **{part.__name__: part for part in (about, check, training, ways)},
    **{f"bench {name}": functools.partial(bench, name) for name in CASES},
    "sanitizer": sanitizer,
    **{f"tests {share + 1} of {SHARES}": functools.partial(tests, share) for share in range(SHARES)},
}


def run_parts(names: list[str], file: Path, again: bool, without: Sequence[str] = ()) -> bool:
    """Run the parts that have not passed yet, and keep each result; whether all have passed."""
    if reason := next(entry.why_not for entry in fastbp.engines() if entry.name == "cupy"):
        raise NoGPU(f"no GPU to measure: {reason}")
    kept = json.loads(file.read_text()) if file.exists() and not again else {}
    end = time.monotonic() + SECONDS
    for name in names:
        if kept.get(name, {}).get("passed"):
            continue
        kept[name] = in_process(name, end - time.monotonic(), without)
        print(f"{name}: {'passed' if kept[name]['passed'] else 'FAILED'}", flush=True)
        file.write_text(json.dumps(kept, indent=1) + "\n")
    return all(kept[name]["passed"] for name in names)


def in_process(name: str, seconds: float, without: Sequence[str] = ()) -> dict[str, Any]:
    """What a part gives, in a process of its own; an error or too long a time is a failure, not the end."""
    start = time.monotonic()
    command = [sys.executable, __file__, "--part", name, *(["--without", *without] if without else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1))
        result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-4000:]}
    except subprocess.TimeoutExpired as expired:
        printed = (expired.stdout or b"").decode()  # bytes, whatever was asked for
        *_, last = ["{}", *re.findall(r"^{.*}$", printed, re.MULTILINE)]
        result = {"error": f"not done after {seconds:.0f} seconds", **json.loads(last)}
    return {"passed": "error" not in result, **result, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--without", nargs="+", default=[], help='contenders to leave out, such as "torch compiled"')
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        given = {"without": options.without} if options.part.startswith("bench") else {}
        print(json.dumps(PARTS[options.part](**given)))
        return 0
    try:
        return 0 if run_parts(options.parts, options.json, options.again, options.without) else 1
    except NoGPU as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
