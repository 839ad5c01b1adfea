"""The script that a GPU is looked at with, as far as it goes without one."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import fastbp
import fastbp.kernels
import fastbp.selection
from fastbp.benchmarks import gpu, gpu_contenders

from .cuda import standin

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs groups of processes")


def available(monkeypatch, why_not):
    infos = [fastbp.selection.EngineInfo("cupy", not why_not, "cuda", why_not)]
    monkeypatch.setattr(fastbp, "engines", lambda: infos)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    available(monkeypatch, "an NVIDIA GPU with a driver missing")
    monkeypatch.setattr("sys.argv", ["gpu.py", "--json", str(tmp_path / "gpu.json")])
    assert gpu.main() == 2
    assert "no GPU to measure: an NVIDIA GPU with a driver missing" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


class Runs:
    """Calls of the script on a GPU that there is not, with parts that give what they are told to."""

    def __init__(self, monkeypatch, file):
        self.file, self.results, self.ran, self.caps, self.clock = file, {}, [], [], 0
        self.card, self.code = "a card", "some code"
        available(monkeypatch, "")
        monkeypatch.setattr(gpu, "in_process", self.in_process)
        monkeypatch.setattr(gpu, "card", lambda: self.card)
        monkeypatch.setattr(gpu, "fingerprint", lambda: self.code)
        monkeypatch.setattr(gpu.time, "monotonic", lambda: self.clock)

    def in_process(self, name, seconds):
        self.ran.append(name)
        self.caps.append(seconds)
        self.clock += 100
        return {"passed": True, "seconds": 100, "status": 0, "stderr": [], **self.results.get(name, {})}

    def __call__(self, *names, again=False, seconds=1000):
        """What ran, and whether all have passed."""
        self.ran.clear()
        return gpu.run_parts(list(names), self.file, again, seconds), list(self.ran)

    @property
    def kept(self):
        return json.loads(self.file.read_text())["parts"]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    return Runs(monkeypatch, tmp_path / "results" / "gpu.json")


FAILED = {"passed": False, "status": -11, "stderr": ["Traceback", "MemoryError: of a kind", "at the end"]}
LATE = {"passed": False, "status": "not done in time"}


def test_parts_that_have_passed_are_not_run_again(runs):
    """What failed is, and what was skipped, which may be installed by now."""
    runs.results = {"check": FAILED, "training": {"skipped": "for a reason"}}
    names = "about", "training", "check"
    assert runs(*names) == (False, [*names])
    runs.results = {}
    assert runs(*names) == (True, ["training", "check"])
    assert runs(*names) == (True, [])


@pytest.mark.parametrize("what", ["card", "code"])
def test_parts_of_another_card_or_other_code_do_not_count(runs, what):
    runs("about", "check")
    setattr(runs, what, "another")
    assert runs("about") == (True, ["about"])
    assert [runs.kept[name][what] for name in ("about", "check")] == [
        "another",
        f"{'a' * (what == 'card') or 'some'} {what}",
    ]
    assert runs("about", "check") == (True, ["check"])


def test_only_what_is_named_is_forgotten(runs):
    """And a call without `again` goes on from there."""
    names = "about", "training", "check"
    runs(*names)
    assert runs("training", "check", again=True, seconds=100) == (False, ["training"])
    assert runs.kept.keys() == {"about", "training"}
    assert runs(*names) == (True, ["check"])


def test_the_file_is_whole_at_any_time(runs, monkeypatch):
    runs("about")
    before = runs.file.read_text()
    monkeypatch.setattr(gpu.Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runs("check")
    assert runs.file.read_text() == before


def test_when_time_is_up_the_rest_stays_as_it_was(runs):
    """A part that began late, and was cut short, does not take the place of what it said before."""
    names = "about", "training", "check"
    runs.results = {"training": FAILED, "check": FAILED}
    runs(*names)
    runs.results = {"training": LATE}
    assert runs(*names, seconds=50) == (False, ["training"]) and runs.caps[-1] == 50
    assert runs.kept["training"]["status"] == runs.kept["check"]["status"] == -11
    assert runs("check", "tests 1 of 4") == (True, ["check", "tests 1 of 4"])
    assert runs.caps[-2:] == [gpu.CAP, gpu.CAPS["tests"]]
    runs.results = {"training": LATE, "ways 2-64-3": LATE}
    assert runs("training", "ways 2-64-3", seconds=gpu.CAP + 1) == (False, ["training", "ways 2-64-3"])
    assert runs.kept["training"]["status"] == runs.kept["ways 2-64-3"]["status"] == LATE["status"]


def test_what_a_fingerprint_is_of(monkeypatch, tmp_path):
    files = "fastbp/a.py", "kernels/b.py", "kernels/c.cu", "benchmarks/gpu.py", "benchmarks/gpu_contenders.py"
    for name in (*files, "benchmarks/other.py", "tests/test_a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    seen = {gpu.fingerprint()}
    (tmp_path / "benchmarks" / "other.py").write_text("more")
    (tmp_path / "tests" / "test_a.py").write_text("more")
    assert gpu.fingerprint() in seen
    for name in files:
        (tmp_path / name).write_text("more")
        seen.add(gpu.fingerprint())
    assert len(seen) == 1 + len(files)


def test_parts_are_named_by_how_they_begin():
    assert gpu.chosen([""], []) == list(gpu.PARTS)
    assert gpu.chosen(["bench 2-64-3"], ["jax"]) == [
        f"bench 2-64-3 {who}" for who in ("fastbp", "torch eager", "torch graph", "torch compiled")
    ]
    assert gpu.chosen(["tests", "about"], ["2 of", "3 of"]) == ["about", "tests 1 of 4", "tests 4 of 4"]
    with pytest.raises(ValueError, match="no part begins with 'bunch'; there are about, "):
        gpu.chosen(["about", "bunch"], [])


SAYS = 'import sys, os; print(\'{"a": 1}\\n{"a": 2, "b": 3}\', flush=True); '


@pytest.mark.parametrize(
    ("code", "status", "found", "stderr"),
    [
        ("print('no JSON')", 0, {"passed": True, "a": 2}, []),
        ("print(7)", 0, {"passed": True, "a": 2}, []),
        ("print('{\"passed\": false}')", 0, {"passed": False}, []),
        ("sys.exit('at the end')", 1, {"passed": False, "a": 2, "b": 3}, ["at the end"]),
        pytest.param("os.kill(os.getpid(), 9)", -9, {"passed": False, "a": 2}, [], marks=POSIX),
        ("print('begin', file=sys.stderr); 1 / 0", 1, {"a": 2}, ["begin", "ZeroDivisionError: division by zero"]),
    ],
)
def test_what_a_part_found_is_kept_however_it_ends(monkeypatch, code, status, found, stderr):
    monkeypatch.setattr(gpu, "COMMAND", [sys.executable, "-c", SAYS + code])
    result = gpu.in_process("about", 600)
    assert result["status"] == status and found.items() <= result.items()
    assert [line for line in result["stderr"] if line in stderr] == stderr


def test_a_part_that_says_nothing_has_failed(monkeypatch):
    monkeypatch.setattr(gpu, "COMMAND", [sys.executable, "-c", ""])
    assert not gpu.in_process("about", 600)["passed"]


@POSIX
@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("a part", 7), SystemExit()])
def test_a_part_that_is_ended_ends_with_all_that_it_has_started(monkeypatch, tmp_path, error):
    """Its child keeps a pipe open for as long as it lives."""
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    child = f"import signal; pipe = open({str(tmp_path / 'pipe')!r}, 'wb', 0); pipe.write(b'!'); signal.pause()"
    code = f"{SAYS} import subprocess; subprocess.run([sys.executable, '-c', {child!r}])"
    wait = subprocess.Popen.wait

    def wait_for_child(self, timeout=None):
        if timeout is None:
            return wait(self)
        while not select.select([pipe], [], [], 1)[0] or not os.read(pipe, 1):
            assert self.poll() is None
        raise error

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_child)
    monkeypatch.setattr(gpu, "COMMAND", [sys.executable, "-c", code])
    if isinstance(error, SystemExit):
        with pytest.raises(SystemExit):
            gpu.in_process("about", 7)
    else:
        result = gpu.in_process("about", 7)
        assert not result["passed"] and result["status"] == "not done in time" and result["b"] == 3
    assert select.select([pipe], [], [], 60)[0] and os.read(pipe, 1) == b""
    os.close(pipe)


@POSIX
def test_a_call_that_is_told_to_end_does_not_leave_a_part_behind(monkeypatch):
    """It ends by an exception, as `in_process` needs."""
    monkeypatch.setattr(gpu, "run_parts", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit):
            gpu.main()
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def decoy(monkeypatch, tmp_path):
    """Another fastbp, that Python would find."""
    (tmp_path / "fastbp").mkdir()
    (tmp_path / "fastbp" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_the_code_beside_the_script_is_measured_also_where_it_is_not_installed(monkeypatch, decoy):
    look = "import fastbp, json, subprocess, sys; file = fastbp.__file__"
    code = f"import runpy; runpy.run_path({gpu.__file__!r}); {look}; print(file)"
    found = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()]
    of_child = (
        "subprocess.run([sys.executable, '-c', 'import fastbp; print(fastbp.__file__)'], cwd='/', stdout=-1, text=True)"
    )
    report = f"print(json.dumps({{'files': [file, {of_child}.stdout.strip()]}}))"
    monkeypatch.setattr(gpu, "COMMAND", [sys.executable, "-c", f"{look}; {report}"])
    found += gpu.in_process("about", 600)["files"]
    assert found == [str(gpu.ROOT / "fastbp" / "__init__.py")] * 3


@POSIX
def test_what_a_sanitizer_says_is_kept(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(gpu.shutil, "which", lambda _: None)
        assert gpu.sanitizer("memcheck").keys() == {"skipped"}
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "a race, says $1"\nexit 9\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    result = gpu.in_process("sanitizer racecheck", 600)
    assert not result["passed"] and "a race, says --tool=racecheck" in result["stderr"]


@pytest.fixture
def on_host(monkeypatch):
    """The script on the stand-in for a GPU, and networks that are quick there."""
    if standin.COMPILER is None:
        pytest.skip("needs g++")
    monkeypatch.setattr(gpu_contenders, "ENGINE", standin.engine_on_host())
    monkeypatch.setattr(fastbp.kernels, "cupy_replay", standin.replay_module(), raising=False)
    monkeypatch.setitem(sys.modules, "cupy", standin.cupy)
    monkeypatch.setitem(gpu.LINES, "2-4-3", 5)
    monkeypatch.setitem(gpu.CASES, "2-4-3", gpu.Case(5, 4, "fp32", 30, 3))
    monkeypatch.setattr(gpu, "WARM", 0)
    monkeypatch.setattr(gpu, "TIMED", 0)


@pytest.fixture
def without_room(monkeypatch):
    """A GPU that has no room for a cluster."""
    monkeypatch.setattr(standin.Device, "blocks_of_a_cluster", 4)


WAYS = {"block": "OneKernel(1)", "cluster": "OneKernel(5)", "graph": "Graph", "one lane": "Graph"}


def test_small_networks_are_timed_in_each_way(on_host, capsys):
    choose = standin.replay_module().blocks_for
    result = gpu.ways("2-4-3", steps=2)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    work, size = result.pop("operations"), result.pop("bytes")
    assert 2 * 5 * (3 * (2 * 4 + 4 * 3) - 2 * 4) <= work < 2000 < size < 4000
    assert {way: each["ran"] for way, each in result.items()} == WAYS
    assert min(each["us"] for each in result.values()) > 0
    assert standin.replay_module().blocks_for is choose


def test_what_was_meant_to_be_a_cluster_and_is_not_says_so(on_host, without_room):
    assert gpu.ways("2-4-3", steps=2)["cluster"]["ran"] == "Graph"


def test_a_large_network_takes_few_steps_by_one_block(on_host, monkeypatch):
    asked = []

    class Epochs(gpu.ByFastbp):
        def __init__(self, sizes, batch, steps, precision):
            asked.append(steps)
            super().__init__(sizes, batch, 2, precision)

    monkeypatch.setattr(gpu, "ByFastbp", Epochs)
    monkeypatch.setattr(gpu, "TOO_LARGE", 99)
    gpu.ways("2-4-3")
    assert asked == [20, 500, 500, 500]


def test_a_gpu_without_clusters_has_a_way_less(on_host, monkeypatch):
    monkeypatch.setattr(standin.Device, "compute_capability", "80")
    assert gpu.settings_of_ways().keys() == {"block", "graph", "one lane"}


@pytest.fixture
def few_samples(on_host, monkeypatch):
    data = fastbp.spiral_data(20, 3, seed=0)
    monkeypatch.setattr(fastbp, "spiral_data", lambda *_, **__: data)


def test_training_in_each_way_is_held_against_numpy(few_samples):
    result = gpu.training()
    assert result["passed"] and result["errors"].keys() == {"deep", "plain"}
    for name, errors in result["errors"].items():
        assert errors.keys() == WAYS.keys()
        assert all(x["fp64"] < 1e-10 < 1e-5 < x["bf16"] and x["same bits"] for x in errors.values())
        ran = {way: x["ran"] for way, x in errors.items()}
        assert ran == WAYS | {"cluster": "OneKernel(6)" if name == "plain" else "Graph"}


def test_a_cluster_that_does_not_train_is_a_failure(few_samples, without_room):
    result = gpu.training()
    assert not result["passed"] and result["errors"]["plain"]["cluster"]["ran"] == "Graph"


def test_fastbp_says_how_it_ran(on_host, capsys):
    result = gpu.bench("2-4-3", "fastbp")
    assert result["ran"] in ("OneKernel(5)", "OneKernel(1)", "Graph") and result["epochs"] == gpu.EPOCHS
    assert 0 < result["least"] <= result["us"] <= result["most"] and result["us_on_device"] > 0
    assert json.loads(capsys.readouterr().out) == {k: x for k, x in result.items() if k != "us_on_device"}


def test_each_contender_works_before_it_is_timed(monkeypatch):
    """For as long as it takes to warm a GPU, and then for long enough."""
    asked = []
    result = gpu.timed(lambda epochs: asked.append(epochs) or [0.25 * n for n in range(1, epochs + 1)], 1000)
    assert asked == [1, 1, gpu.WARM * 4, gpu.EPOCHS]
    assert result == {"us": 750, "least": 250, "most": 1250, "epochs": 5}
    asked.clear()
    gpu.timed(lambda epochs: asked.append(epochs) or [0.01] * epochs, 1000)
    assert asked == [1, 1, 100, 50]


@pytest.mark.parametrize("name", ["torch eager", "jax scan", "jax unrolled"])
def test_others_may_be_missing(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name.split()[0], None)
    assert gpu.run_part(f"bench 2-64-3 {name}") == {"skipped": f"{name.split()[0]} is not installed"}


def test_a_graph_of_torch_has_as_many_steps_as_that_of_fastbp(monkeypatch):
    """And takes all samples, each once."""
    torch = pytest.importorskip("torch")
    X, _ = gpu_contenders.data_for([2, 3], 5, 32)
    copy, loss = torch.Tensor.copy_, torch.nn.functional.cross_entropy
    replays, seen, steps = [], [], []

    def nothing(*_):
        return contextlib.nullcontext()

    cuda = {"synchronize": nothing, "current_stream": nothing, "stream": nothing}
    cuda["graph"] = lambda _: contextlib.nullcontext(steps.clear())
    cuda["Stream"] = lambda: SimpleNamespace(wait_stream=nothing)
    cuda["CUDAGraph"] = lambda: SimpleNamespace(replay=lambda: replays.append(1))
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for kind in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(kind, "cuda", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, x: seen.append(x.numpy().copy()) or copy(to, x))
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *x: steps.append(1) or loss(*x))
    run = gpu_contenders.by_torch([2, 3], 5, 32, "fp32", "graph")
    run(1)
    assert len(replays) == 2 and len(steps) == gpu_contenders.AT_ONCE == standin.replay_module().STEPS_OF_A_GRAPH
    np.testing.assert_array_equal(np.concatenate(seen[::2]), X)


def test_all_tests_of_engines_are_shared_out(tmp_path):
    """To each of four parts two of these files, in one of which a test fails."""
    (tmp_path / "tests").mkdir()
    for place in range(8):
        code = f"def test_cupy(): assert {place} != 6\ndef test_numpy(): raise ValueError"
        (tmp_path / "tests" / f"test_{place}.py").write_text(code)
    look = f"from fastbp.benchmarks import gpu; gpu.PROCESSES, gpu.ROOT = 0, gpu.Path({str(tmp_path)!r})"
    for share in (0, 2):
        command = [sys.executable, "-c", f"{look}; gpu.so_far(gpu.run_part('tests {share + 1} of 4'))"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert json.loads(done.stdout) == {"passed": share != 2}
        assert ("1 failed, 1 passed" if share == 2 else "2 passed") in done.stderr.splitlines()[-1]


def test_how_results_are_judged_and_shown(runs, capsys):
    """Each contender has its line, and what it failed by; only those of one run are compared without a word."""
    names = [f"bench 2-64-3 {who}" for who in ("fastbp", "torch eager", "torch graph", "jax scan", "torch compiled")]
    given = [{"us": 2.0, "ran": "OneKernel(8)", "us_on_device": 1.5}, {"us": 80.0}, {"us": 5.0}]
    given += [{"skipped": "jax is not installed"}, FAILED]
    runs.results = dict(zip(names, given, strict=True))
    runs(*names)
    judged = json.loads(runs.file.read_text())["benches"]["2-64-3"]
    assert judged["ratios"] == {"eager": 40, "best": 2.5} and judged["reached"] == {"eager": True, "best": False}
    assert judged["missing"] == ["jax scan", "jax unrolled", "torch compiled"] and judged["in one run"]
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [" ".join(line.split()) for line in table[:7]] == [
        "2-64-3, batch 300, eager x40.00 reached 30, best x2.50 MISSED 3",
        "fastbp 2.00 us 1.00 OneKernel(8), 1.50 us on the device",
        "torch eager 80.00 us 40.00",
        "torch graph 5.00 us 2.50",
        "jax scan jax is not installed",
        "jax unrolled not run",
        "torch compiled FAILED (-11) MemoryError: of a kind",
    ]
    stamp = {"card": runs.card, "code": runs.code, "run": "later"}
    gpu.Results(runs.file, stamp).keep(names[2], {"passed": True, "us": 7.0})
    assert next(gpu.Results(runs.file, stamp).table()) == (
        "2-64-3, batch 300, eager x40.00 reached 30, best x3.50 reached 3, not of one run"
    )
