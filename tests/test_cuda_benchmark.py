"""The script that a GPU is looked at with, as far as it goes without one."""

import json
import subprocess
import sys

import pytest

import fastbp
import fastbp.kernels
import fastbp.selection
from fastbp.benchmarks import gpu

from .cuda import standin


def available(monkeypatch, why_not):
    infos = [fastbp.selection.EngineInfo("cupy", not why_not, "cuda", why_not)]
    monkeypatch.setattr(fastbp, "engines", lambda: infos)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    available(monkeypatch, "an NVIDIA GPU with a driver missing")
    monkeypatch.setattr("sys.argv", ["gpu.py", "--json", str(tmp_path / "gpu.json")])
    assert gpu.main() == 2
    assert "no GPU to measure: an NVIDIA GPU with a driver missing" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_parts_that_have_passed_are_not_run_again(monkeypatch, tmp_path):
    available(monkeypatch, "")
    ran, file = [], tmp_path / "gpu.json"

    def in_process(name, seconds, without):
        ran.append(name)
        return {"passed": name != "bench" or ran.count("bench") > 1}

    monkeypatch.setattr(gpu, "in_process", in_process)
    assert not gpu.run_parts(["about", "bench"], file, again=False)
    assert json.loads(file.read_text()) == {"about": {"passed": True}, "bench": {"passed": False}}
    assert gpu.run_parts(["about", "bench"], file, again=False)
    assert ran == ["about", "bench", "bench"]
    assert gpu.run_parts(["about"], file, again=True) and ran[-1] == "about"


@pytest.fixture
def on_host(monkeypatch):
    """The script on the stand-in for a GPU, and networks that are quick there."""
    if standin.COMPILER is None:
        pytest.skip("needs g++")
    monkeypatch.setattr(gpu, "ENGINE", standin.engine_on_host())
    monkeypatch.setattr(fastbp.kernels, "cupy_replay", standin.replay_module(), raising=False)
    monkeypatch.setitem(sys.modules, "cupy", standin.cupy)
    monkeypatch.setattr(gpu, "LINES", {"2-4-3": 5})
    monkeypatch.setitem(gpu.CASES, "2-4-3", (5, 4, ["fp32", "bf16"], 30, 3))


def test_small_networks_are_timed_in_each_way(on_host):
    choose = standin.replay_module().blocks_for
    result = gpu.ways(steps=2)["us_per_step"]["2-4-3"]
    work, size = result.pop("operations"), result.pop("bytes")
    assert 2 * 5 * (3 * (2 * 4 + 4 * 3) - 2 * 4) <= work < 2000 < size < 4000
    assert result.keys() == {"block", "cluster", "graph", "one lane"} and min(result.values()) > 0
    assert standin.replay_module().blocks_for is choose


def test_a_gpu_without_clusters_has_a_way_less(on_host, monkeypatch):
    monkeypatch.setattr(standin.Device, "compute_capability", "80")
    assert gpu.settings_of_ways().keys() == {"block", "graph", "one lane"}


def test_training_in_each_way_is_held_against_numpy(on_host, monkeypatch):
    pytest.importorskip("safetensors")
    X, y = fastbp.spiral_data(20, 3, seed=0)
    monkeypatch.setattr(fastbp, "spiral_data", lambda *_, **__: (X, y))
    result = gpu.training()
    assert result["passed"] and result["errors"].keys() == {"deep", "plain"}
    for errors in result["errors"].values():
        assert errors.keys() == {"block", "cluster", "graph", "one lane"}
        assert all(exact < 1e-10 < 1e-5 < half for exact, half in errors.values())


def test_others_may_be_missing(on_host, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "jax", None)
    result = gpu.PARTS["bench 2-64-3"].func("2-4-3")
    assert result["passed"] and [each["precision"] for each in result["results"]] == ["fp32", "bf16"]
    for each in result["results"]:
        us = each["us_per_step"]
        assert len(us.pop("fastbp")) == gpu.REPEATS and set(us.values()) == {"not installed"} and len(us) == 4


def test_a_part_that_fails_is_no_end():
    result = gpu.in_process("about", 60)
    if not result["passed"]:
        assert "cupy" in result["error"].lower()


def test_what_is_found_before_time_is_up_is_kept(monkeypatch):
    def run(command, **options):
        raise gpu.subprocess.TimeoutExpired(command, 1, output=b'{"results": [1]}\n{"results": [1, 2]}\n')

    monkeypatch.setattr(gpu.subprocess, "run", run)
    result = gpu.in_process("bench 2-64-3", 7)
    assert not result["passed"] and result["error"] == "not done after 7 seconds" and result["results"] == [1, 2]


def test_all_tests_of_engines_are_shared_out(tmp_path):
    """To each of four parts two of these files, in one of which a test fails."""
    (tmp_path / "tests").mkdir()
    for place in range(8):
        code = f"def test_cupy(): assert {place} != 6\ndef test_numpy(): raise ValueError"
        (tmp_path / "tests" / f"test_{place}.py").write_text(code)
    look = f"from fastbp.benchmarks import gpu; gpu.PROCESSES, gpu.ROOT = 0, gpu.Path({str(tmp_path)!r})"
    for share in (0, 2):
        command = [sys.executable, "-c", f"{look}; print(gpu.json.dumps(gpu.PARTS['tests {share + 1} of 4']()))"]
        result = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=tmp_path).stdout)
        assert result["passed"] == (share != 2)
        assert ("1 failed, 1 passed" if share == 2 else "2 passed") in result["output"][-1]


def test_how_results_are_judged():
    us = {"fastbp": [2.0], "torch eager": [80.0], "torch graph": [5.0], "jax scan": "not installed"}
    judged = gpu.judged(us, 30, 3)
    assert judged["ratios"] == {"eager": pytest.approx(40), "best": pytest.approx(2.5)}
    assert judged["reached"] == {"eager": True, "best": False}
