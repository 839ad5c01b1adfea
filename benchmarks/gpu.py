"""All that is to be seen of the engine "cupy" on a GPU, in parts that resume, within 8 minutes a call.

    python benchmarks/gpu.py [--json FILE] [--parts about "bench 2-64-3" ...] [--without "torch compiled" ...] [--again]

Each part runs in a process of its own, and what it found is in the file as soon as it is there, also where the process
failed. A call goes on with the parts that have not passed on this GPU with this code; `--again` first forgets those it
names. A name stands for all parts that begin with it, and one after `--without` for all parts that have it in theirs.
The exit status is 0 where all have passed. NumPy and CuPy are needed; where torch, jax or pytest is not installed, what
needs it is skipped and says so. What is printed ends with a table of all that the file has.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # this file is run, and fastbp may not be installed, or be another
    sys.path.insert(0, str(ROOT))

import fastbp  # noqa: E402
from fastbp.benchmarks import gpu_contenders as contenders  # noqa: E402
from fastbp.benchmarks.gpu_contenders import CONTENDERS, ByFastbp, Run, path_of  # noqa: E402
from fastbp.kernels.ops import OPS  # noqa: E402


class Case(NamedTuple):
    """A network's training, and how many times as long others should take at least."""

    batch: int
    steps: int  # of an epoch
    precision: str
    eager: float  # torch as it is
    best: float  # the best of the others


CASES = {
    "2-64-3": Case(300, 1024, "fp32", 30, 3),
    "30-100-2": Case(200, 1024, "fp32", 30, 3),
    "64-128-10": Case(32, 1024, "fp32", 30, 3),
    "784-512-256-10": Case(128, 400, "fp32", 8, 1.2),
    "4096-4096-4096-4096 tf32": Case(8192, 8, "tf32", 1.2, 1.0),
    "4096-4096-4096-4096 bf16": Case(8192, 8, "bf16", 1.2, 1.0),
}
# networks and batches about as large as those between which kernels/cupy_replay.py draws a line
LINES = {"2-64-3": 300, "64-128-10": 32, "30-100-2": 200, "64-512-10": 32, "128-256-128-10": 64, "256-256-10": 128}
LINES |= {"784-512-256-10": 128}
TOO_LARGE = 10_000_000  # weights times a batch's rows, from which one block takes milliseconds a step
EPOCHS, TIMED, WARM = 5, 0.5, 1.0  # epochs that are timed, at least; seconds that they take; seconds of work before
PROCESSES, SHARES = 8, 4  # of the tests
OF_ENGINES = "cupy or fuzz or fused or engines"  # in the names of those that are run on each engine
TOOLS = "memcheck", "racecheck", "synccheck"
OPTIONAL = "torch", "jax", "pytest"
CAPS = {"tests": 300, "sanitizer": 200}  # seconds that one of them may take
CAP, LEAST = 150, 5  # that another part may; that must be left to begin one
COMMAND = [sys.executable, "-m", "fastbp.benchmarks.gpu", "--part"]
LINES_KEPT = 40  # of what a part prints to its error stream
Found = dict[str, Any]


class NoGPU(RuntimeError):
    """What is missing on this machine."""


def so_far(found: Found) -> None:
    """Say what a part has found, for the case that it does not come to its end."""
    print(json.dumps(found), flush=True)


def about() -> Found:
    """The GPU, its driver, and versions."""
    import cupy

    names = "fastbp", "numpy", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cublas", "torch", "jax", "jaxlib"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": printed_by("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "driver": printed_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": cupy.cuda.runtime.runtimeGetVersion(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in names},
    }


def printed_by(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check() -> Found:
    """Every op, held against the contract."""
    failures: list[str] = []
    for name in OPS:
        so_far({"failures": failures, "in": name})
        failures += map(str, fastbp.check(contenders.ENGINE, [name], verbose=False).failures)
    return {"passed": not failures, "ops": len(OPS), "failures": failures}


def training() -> Found:
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

    passed, errors = True, Found()
    for name in ("deep", "plain"):
        reference = fit(name, "numpy").predict_proba(X)
        for way, way_set in settings_of_ways().items():
            with way_set:
                first, again = (fit(name, contenders.ENGINE) for _ in range(2))
                p = first.predict_proba(X)
                rounded = fit(name, contenders.ENGINE, "float32", "bf16").predict_proba(X)
            exact, half = (float(np.abs(found - reference).max()) for found in (p, rounded))
            same = bool(np.array_equal(p, again.predict_proba(X)))
            ran = path_of(first)
            errors.setdefault(name, {})[way] = {"fp64": exact, "bf16": half, "same bits": same, "ran": ran}
            as_meant = name == "deep" or ("OneKernel" in ran) == (way in ("block", "cluster"))
            passed = passed and exact < 1e-6 and half < 0.1 and same and as_meant and loads(first, X, p)
            so_far({"errors": errors})
    return {"passed": passed, "errors": errors}


def trained(name: str) -> tuple[list[fastbp.Layer], fastbp.Optimizer]:
    """What no blocks can share, for its dropout; and what they can, some of them without parameters that decay."""
    if name == "deep":
        layers = [fastbp.Dense(2, 64), fastbp.ReLU(), fastbp.Dropout(0.1), fastbp.Dense(64, 32), fastbp.Tanh()]
        return [*layers, fastbp.Dense(32, 3)], fastbp.Adam(0.01)
    layers = [fastbp.Dense(2, 16), fastbp.ReLU(), fastbp.Dense(16, 3)]
    return layers, fastbp.AdamW(0.01, weight_decay=0.1, clip_norm=1.0)


def loads(model: fastbp.Sequential, X: np.ndarray, p: np.ndarray) -> bool:
    """Whether a model is the same on a CPU, by way of a file where there is safetensors."""
    if importlib.util.find_spec("safetensors") is None:
        return True
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.safetensors")
        loaded = fastbp.load(f"{folder}/model.safetensors", engine="numpy")
    return np.allclose(loaded.predict_proba(X), p, rtol=1e-9, atol=1e-12)


def tests(share: int) -> Found:
    """One of SHARES of all tests that are run on each engine, on this one."""
    import pytest

    files = sorted(map(str, (ROOT / "tests").glob("test_*.py")))[share::SHARES]
    options = ["-q", "-n", str(PROCESSES), "--dist", "worksteal", "--maxfail", "20", "-k", OF_ENGINES]
    options += ["-p", "no:benchmark"]  # which warns of the processes
    with contextlib.redirect_stdout(sys.stderr):
        return {"passed": pytest.main([*options, *files]) == 0}


def sanitizer(tool: str) -> Found:
    """Some ops, and small networks in each way, under a tool of compute-sanitizer, where that is installed."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"skipped": "there is no compute-sanitizer"}
    code = "from fastbp.benchmarks import gpu; gpu.some_work()"
    command = [program, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", code]
    return {"passed": subprocess.run(command, stdout=sys.stderr).returncode == 0}


def some_work() -> None:
    """Without timing how to compute products, which a tool that waits for each kernel holds up."""
    with mock.patch("fastbp.kernels.cupy_engine.fastest", lambda engine, kernel, arrays, ways: ways[0]):
        assert fastbp.check("cupy", ["softmax_cross_entropy", "batch_norm_backward", "adam"]).passed
        for way_set in settings_of_ways().values():
            with way_set:
                ByFastbp([30, 64, 10], 50, 3, "fp32")(1)


def bench(name: str, contender: str) -> Found:
    """Microseconds a step of a network, by one contender."""
    case = CASES[name]
    run = CONTENDERS[contender](sizes_of(name), case.batch, case.steps, case.precision)
    result = timed(run, case.steps)
    if isinstance(run, ByFastbp):
        result["ran"] = run.path()
        so_far(result)
        result["us_on_device"] = 1e6 * run.on_device() / case.steps
    return result


def timed(run: Run, steps: int) -> Found:
    """Microseconds a step, of enough epochs on a GPU that is warm by the same work."""
    run(1)  # which compiles
    (seconds,) = run(1)
    run(math.ceil(WARM / seconds))
    us = [1e6 * each / steps for each in run(max(EPOCHS, math.ceil(TIMED / seconds)))]
    return {"us": statistics.median(us), "least": min(us), "most": max(us), "epochs": len(us)}


def sizes_of(network: str) -> list[int]:
    return [int(n) for n in network.split()[0].split("-")]


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


def ways(name: str, steps: int = 500) -> Found:
    """Microseconds a step of a network by a block, by a cluster, and as a graph; and what it was run by really."""
    batch, sizes, found = LINES[name], sizes_of(name), Found()
    for way, way_set in settings_of_ways().items():
        few = way == "block" and batch * sum(map(math.prod, itertools.pairwise(sizes))) > TOO_LARGE
        epoch = steps // 25 if few else steps
        with way_set as asked:
            run = ByFastbp(sizes, batch, epoch, "fp32")
            seconds = statistics.median(run(EPOCHS))
        found["operations"], found["bytes"] = asked.call_args.args
        found[way] = {"us": 1e6 * seconds / epoch, "ran": run.path()}
        so_far(found)
    return found


def bench_of(name: str, contender: str) -> str:
    return f"bench {name} {contender}"


BENCHES: dict[str, Callable[[], Found]] = {
    bench_of(name, contender): functools.partial(bench, name, contender) for name in CASES for contender in CONTENDERS
}
# what says most comes first, and what takes long comes last
PARTS: dict[str, Callable[[], Found]] = {
    "about": about,
    "training": training,
    **{name: part for name, part in BENCHES.items() if not name.endswith("compiled")},
    **{f"ways {name}": functools.partial(ways, name) for name in LINES},
    "check": check,
    **{name: part for name, part in BENCHES.items() if name.endswith("compiled")},
    **{f"sanitizer {tool}": functools.partial(sanitizer, tool) for tool in TOOLS},
    **{f"tests {share + 1} of {SHARES}": functools.partial(tests, share) for share in range(SHARES)},
}


def run_part(name: str) -> Found:
    """What a part gives, in this process."""
    try:
        return PARTS[name]()
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        return {"skipped": f"{error.name} is not installed"}


def in_process(name: str, seconds: float) -> Found:
    """What a part gives in a process of its own; however that ends, what it found until then, and its last errors."""
    start = time.monotonic()
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options: dict[str, Any] = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": paths}, "stdin": subprocess.DEVNULL}
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:  # pipes would wait for grandchildren
        part = subprocess.Popen([*COMMAND, name], stdout=printed, stderr=errors, start_new_session=True, **options)
        status: int | str
        try:
            status = part.wait(seconds)
        except subprocess.TimeoutExpired:
            status = "not done in time"
        finally:
            end(part)
        found, last = last_object(text_of(printed)), text_of(errors).splitlines()
    passed = status == 0 and found.get("passed", bool(found))
    kept = last[-LINES_KEPT:] if not passed else last[-1:]
    return {**found, "passed": passed, "status": status, "stderr": kept, "seconds": round(time.monotonic() - start, 1)}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, with all that it has started where the system knows of groups."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(OSError):  # there is nobody left
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def text_of(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


def last_object(text: str) -> Found:
    """Of the last line that is one of JSON; a library may print more behind it."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError):
            if isinstance(found := json.loads(line), dict):
                return found
    return {}


class Results:
    """The parts' results in a file, and which of them are of this GPU and this code."""

    def __init__(self, file: Path, stamp: dict[str, str]) -> None:
        self._file, self._stamp = file, stamp
        self._parts: dict[str, Found] = json.loads(file.read_text()).get("parts", {}) if file.exists() else {}

    def forget(self, names: list[str]) -> None:
        self._parts = {name: part for name, part in self._parts.items() if name not in names}
        self._save()

    def keep(self, name: str, result: Found) -> None:
        self._parts[name] = result | self._stamp
        self._save()

    def _save(self) -> None:
        content = {"benches": {name: self.judged(name) for name in CASES}, "parts": self._parts}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_name(self._file.name + ".new")
        new.write_text(json.dumps(content, indent=1) + "\n")
        new.replace(self._file)  # so that whoever is stopped here leaves a whole file

    def __getitem__(self, name: str) -> Found:
        """A part's result, empty where there is none of this GPU and this code."""
        part = self._parts.get(name, {})
        return part if all(part.get(key) == self._stamp[key] for key in ("card", "code")) else {}

    def judged(self, name: str) -> Found:
        """How many times as long as fastbp others took, and whether that is what it should be at least."""
        case, parts = CASES[name], {contender: self[bench_of(name, contender)] for contender in CONTENDERS}
        us = {contender: part["us"] for contender, part in parts.items() if "us" in part}
        runs = {part["run"] for contender, part in parts.items() if contender in us}
        result: Found = {"us": us, "missing": [contender for contender in CONTENDERS if contender not in us]}
        if mine := us.get("fastbp"):
            others = [us[contender] for contender in us if contender not in ("fastbp", "torch eager")]
            ratios = {"eager": us["torch eager"] / mine} if "torch eager" in us else {}
            ratios |= {"best": min(others) / mine} if others else {}
            targets = {"eager": case.eager, "best": case.best}
            reached = {kind: ratio >= targets[kind] for kind, ratio in ratios.items()}
            result |= {"ratios": ratios, "targets": targets, "reached": reached, "in one run": len(runs) == 1}
        return result

    def table(self) -> Iterator[str]:
        """Lines for a person: of each network that there is something of, and what else has not passed."""
        for name, case in CASES.items():
            parts = {contender: self[bench_of(name, contender)] for contender in CONTENDERS}
            if not any(parts.values()):
                continue
            judged, mine = self.judged(name), parts["fastbp"].get("us", math.nan)
            verdicts = [
                f"{kind} x{ratio:.2f} {'reached' if judged['reached'][kind] else 'MISSED'} {judged['targets'][kind]}"
                for kind, ratio in judged.get("ratios", {}).items()
            ]
            runs = [] if judged.get("in one run", True) else ["not of one run"]
            yield ", ".join([f"{name}, batch {case.batch}", *verdicts, *runs])
            for contender, part in parts.items():
                line = f"{part['us']:10.2f} us {part['us'] / mine:8.2f}" if "us" in part else ""
                if "ran" in part:
                    line += f" {part['ran']}, {part.get('us_on_device', math.nan):.2f} us on the device"
                yield f"  {contender:15} {line} {why(part)}".rstrip()
        for name in PARTS:
            part = self[name]
            if name.startswith("ways") and part:
                found = [f"{way} {x['us']:.2f} {x['ran']}" for way, x in part.items() if isinstance(x, dict)]
                yield f"{name}: {', '.join(found)} {why(part)}".rstrip()
            elif part and why(part) and not name.startswith("bench"):
                yield f"{name}: {why(part)}"


def why(part: Found) -> str:
    """Why a part has not passed; nothing where it has."""
    if part.get("passed"):
        return str(part.get("skipped", ""))
    if not part:
        return "not run"
    errors = [line[:120] for line in part["stderr"] if "Error" in line] or [""]
    return f"FAILED ({part['status']}) {errors[-1]}".rstrip()


def run_parts(names: list[str], file: Path, again: bool, seconds: float) -> bool:
    """Run the parts that have not passed yet, and keep each result; whether all have passed."""
    if reason := next(entry.why_not for entry in fastbp.engines() if entry.name == "cupy"):
        raise NoGPU(f"no GPU to measure: {reason}")
    run = datetime.datetime.now().isoformat(timespec="seconds")
    results = Results(file, {"card": card(), "code": fingerprint(), "run": run})
    if again:
        results.forget(names)
    stop = time.monotonic() + seconds
    for name in names:
        part = results[name]
        if part.get("passed") and "skipped" not in part:
            continue
        left, cap = stop - time.monotonic(), CAPS.get(name.split()[0], CAP)
        if left < LEAST:
            break
        result = in_process(name, min(left, cap))
        if left < cap and isinstance(result["status"], str) and part:  # for want of time, which says less than `part`
            break
        results.keep(name, result)
        print(f"{name}: {why(result) or 'passed'} ({result['seconds']} s)", flush=True)
    print("", *results.table(), sep="\n", flush=True)
    missing = [name for name in names if not results[name].get("passed")]
    print(f"{len(names) - len(missing)} of {len(names)} parts have passed on {card()} with code {fingerprint()}")
    return not missing


def card() -> str:
    import cupy

    return str(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode())


def fingerprint() -> str:
    """Of the code that is measured, and that measures."""
    digest = hashlib.sha256()
    patterns = "fastbp/*.py", "kernels/*.py", "kernels/*.cu", "benchmarks/gpu*.py"
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def chosen(names: list[str], without: list[str]) -> list[str]:
    """The parts that are named, in their order."""
    for given in names:
        if not any(part.startswith(given) for part in PARTS):
            raise ValueError(f"no part begins with {given!r}; there are {', '.join(PARTS)}")
    return [part for part in PARTS if part.startswith(tuple(names)) and not any(x in part for x in without)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--seconds", type=float, default=480, help="for this call")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--parts", nargs="+", default=[""], help="how their names begin")
    parser.add_argument("--without", nargs="+", default=[], help='what is left out, such as "torch compiled"')
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        so_far(run_part(options.part))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the part that runs, too
    try:
        names = chosen(options.parts, options.without)
        return 0 if run_parts(names, options.json, options.again, options.seconds) else 1
    except (NoGPU, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
