"""All that is to be seen of the engine "cupy" on a GPU, in parts that resume, within 8 minutes.

    python benchmarks/gpu.py [--json FILE] [--again] [--parts about check ...]

Each part runs in a process of its own, and its result is in the file as soon as it is there; the next call goes on with
those that are missing or have failed. The exit status is 0 where all parts have passed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import fastbp

ROOT = Path(__file__).parent.parent
SECONDS = 480
# the network, its batch, steps of an epoch, precisions, and how many times as long others should take at least: torch
# as it is, and the best of the rest
CASES = {
    "2-64-3": (300, 200, ["fp32"], 30, 3),
    "30-100-2": (200, 200, ["fp32"], 30, 3),
    "64-128-10": (32, 400, ["fp32"], 30, 3),
    "784-512-256-10": (128, 400, ["fp32"], 8, 1.2),
    "4096-4096-4096-4096": (8192, 8, ["tf32", "bf16"], 1.2, 1.0),
}
LR, REPEATS = 0.01, 5
Run = Callable[[int], Any]  # so many epochs, and all is done when it comes back


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
    """A network trained on the GPU is that of NumPy; saved, it loads on a CPU; the same seed gives the same bits."""
    X, y = fastbp.spiral_data(500, 3, seed=0)

    def fit(engine: str, hidden: int) -> fastbp.Sequential:
        layers = [fastbp.Dense(2, hidden), fastbp.ReLU(), fastbp.Dropout(0.1), fastbp.Dense(hidden, 3)]
        model = fastbp.Sequential(
            layers,
            loss=fastbp.SoftmaxCrossEntropy(),
            optimizer=fastbp.Adam(0.01),
            engine=engine,
            dtype="float64",
            seed=0,
        )
        return model.fit(X, y, epochs=10, batch_size=100, verbose=False)

    errors = []
    for hidden in (16, 2048):  # in one block, and as a graph
        first, again, reference = fit("cupy", hidden), fit("cupy", hidden), fit("numpy", hidden)
        first.save("/tmp/fastbp-gpu.safetensors")
        loaded = fastbp.load("/tmp/fastbp-gpu.safetensors", engine="numpy")
        p, q = first.predict_proba(X), reference.predict_proba(X)
        errors.append(float(np.abs(p - q).max()))
        assert np.array_equal(p, again.predict_proba(X)), "the same seed gave other bits"
        np.testing.assert_allclose(loaded.predict_proba(X), p, rtol=1e-9, atol=1e-12)
    return {"passed": max(errors) < 1e-6, "errors": errors}


def tests() -> dict[str, Any]:
    """Replay, models and ops on this engine."""
    files = ["tests/test_cuda_replay.py", "tests/cuda/test_cublaslt.py", "tests/test_ops.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda or cupy", *files, "--maxfail=20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"passed": done.returncode == 0, "output": done.stdout.splitlines()[-40:]}


def sanitizer() -> dict[str, Any]:
    """Some ops under compute-sanitizer, where it is installed and works."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"passed": True, "skipped": "there is no compute-sanitizer"}
    code = "import fastbp; assert fastbp.check('cupy', ['softmax_cross_entropy', 'batch_norm_backward', 'adam']).passed"
    outputs = {}
    for kind in ("memcheck", "racecheck"):
        command = [tool, f"--tool={kind}", "--error-exitcode=9", sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        outputs[kind] = {"status": done.returncode, "output": done.stdout.splitlines()[-20:]}
    return {"passed": all(output["status"] == 0 for output in outputs.values()), **outputs}


def bench() -> dict[str, Any]:
    """Microseconds a step of each network, beside torch and jax in the same run and precision."""
    results = []
    for name, (batch, steps, precisions, *targets) in CASES.items():
        for precision in precisions:
            contenders = {"fastbp": by_fastbp, "torch eager": by_torch(captured=False)}
            contenders |= {"torch graph": by_torch(captured=True), "jax scan": by_jax}
            us: dict[str, Any] = {}
            for contender, prepare in contenders.items():
                try:
                    run = prepare([int(n) for n in name.split("-")], batch, steps, precision)
                    run(1)
                    us[contender] = sorted(1e6 * timed(run) / steps for _ in range(REPEATS))
                except ImportError:
                    us[contender] = "not installed"
                except Exception as error:  # of another library; the others still count
                    us[contender] = repr(error)
            results.append(
                {"network": name, "batch": batch, "precision": precision, "us_per_step": us, **judged(us, *targets)}
            )
    return {"passed": all(isinstance(r["us_per_step"]["fastbp"], list) for r in results), "results": results}


def timed(run: Run) -> float:
    start = time.perf_counter()
    run(1)
    return time.perf_counter() - start


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
        layers, loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.SGD(LR), engine="cupy", precision=precision, seed=0
    )
    X, y = data_for(sizes, batch, steps)
    model.fit(X, y, epochs=1, batch_size=batch, verbose=False)
    return lambda epochs: model.fit(X, y, epochs=epochs, batch_size=batch, shuffle=False, verbose=False)


def by_torch(captured: bool) -> Callable[..., Run]:
    def prepare(sizes: list[int], batch: int, steps: int, precision: str) -> Run:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        modules = [m for k, n in itertools.pairwise(sizes) for m in (torch.nn.Linear(k, n), torch.nn.ReLU())]
        model = torch.nn.Sequential(*modules[:-1]).cuda()
        optimizer = torch.optim.SGD(model.parameters(), LR)
        X, y = (torch.from_numpy(x).cuda() for x in data_for(sizes, batch, steps))
        x, t = X[:batch].clone(), y[:batch].clone()

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                loss = torch.nn.functional.cross_entropy(model(x), t)
            loss.backward()
            optimizer.step()

        replay = step
        if captured:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            replay = graph.replay

        def run(epochs: int) -> None:
            for _ in range(epochs):
                for start in range(0, len(X), batch):
                    x.copy_(X[start : start + batch])
                    t.copy_(y[start : start + batch])
                    replay()
            torch.cuda.synchronize()

        return run

    return prepare


def by_jax(sizes: list[int], batch: int, steps: int, precision: str) -> Run:
    import jax
    from jax import numpy as jnp

    if jax.default_backend() != "gpu":
        raise ImportError("jax has no GPU")
    kind = {"fp32": "highest", "tf32": "tensorfloat32", "bf16": "bfloat16"}[precision]
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

    epoch = jax.jit(lambda parameters, X, y: jax.lax.scan(step, parameters, (X, y)), donate_argnums=0)

    def run(epochs: int) -> None:
        nonlocal parameters
        for _ in range(epochs):
            parameters, losses = epoch(parameters, X, y)
        losses.block_until_ready()

    return run


PARTS = {part.__name__: part for part in (about, check, training, bench, sanitizer, tests)}


def run_parts(names: list[str], file: Path, again: bool) -> bool:
    """Run the parts that have not passed yet, and keep each result; whether all have passed."""
    if reason := next(entry.why_not for entry in fastbp.engines() if entry.name == "cupy"):
        raise NoGPU(f"no GPU to measure: {reason}")
    kept = json.loads(file.read_text()) if file.exists() and not again else {}
    end = time.monotonic() + SECONDS
    for name in names:
        if kept.get(name, {}).get("passed"):
            continue
        kept[name] = in_process(name, end - time.monotonic())
        print(f"{name}: {'passed' if kept[name]['passed'] else 'FAILED'}", flush=True)
        file.write_text(json.dumps(kept, indent=1) + "\n")
    return all(kept[name]["passed"] for name in names)


def in_process(name: str, seconds: float) -> dict[str, Any]:
    """What a part gives, in a process of its own; an error or too long a time is a failure, not the end."""
    start = time.monotonic()
    command = [sys.executable, __file__, "--part", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1))
        result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-4000:]}
    except subprocess.TimeoutExpired:
        result = {"error": f"not done after {seconds:.0f} seconds"}
    return {"passed": "error" not in result, **result, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part]()))
        return 0
    try:
        return 0 if run_parts(options.parts, options.json, options.again) else 1
    except NoGPU as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
