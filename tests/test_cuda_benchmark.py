"""The script that a GPU is looked at with, as far as it goes without one."""

import json

import pytest

import fastbp
import fastbp.selection
from fastbp.benchmarks import gpu


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

    def in_process(name, seconds):
        ran.append(name)
        return {"passed": name != "bench" or ran.count("bench") > 1}

    monkeypatch.setattr(gpu, "in_process", in_process)
    assert not gpu.run_parts(["about", "bench"], file, again=False)
    assert json.loads(file.read_text()) == {"about": {"passed": True}, "bench": {"passed": False}}
    assert gpu.run_parts(["about", "bench"], file, again=False)
    assert ran == ["about", "bench", "bench"]
    assert gpu.run_parts(["about"], file, again=True) and ran[-1] == "about"


def test_a_part_that_fails_is_no_end():
    result = gpu.in_process("about", 60)
    if not result["passed"]:
        assert "cupy" in result["error"].lower()


def test_how_results_are_judged():
    us = {"fastbp": [2.0], "torch eager": [80.0], "torch graph": [5.0], "jax scan": "not installed"}
    judged = gpu.judged(us, 30, 3)
    assert judged["ratios"] == {"eager": pytest.approx(40), "best": pytest.approx(2.5)}
    assert judged["reached"] == {"eager": True, "best": False}
