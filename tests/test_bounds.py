"""Kernels read and write within their arrays, even where they are given addresses."""

import subprocess
import sys
from pathlib import Path

import pytest

GUARDED = Path(__file__).parent / "guarded.py"
PLANTED = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from guarded import guarded
array = guarded((3, 5), "f4", sys.argv[2] == "end")
array[...] = 1
ctypes.c_float.from_address(array.ctypes.data + (array.nbytes if sys.argv[2] == "end" else -4)).value
"""
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the guards are made with mprotect")


@linux_only
def test_nothing_is_touched_beyond_its_arrays(cpu_engine):
    done = subprocess.run([sys.executable, str(GUARDED), cpu_engine.name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]
    assert done.stdout.endswith("nothing was touched beyond its arrays\n")


@linux_only
@pytest.mark.parametrize("side", ["end", "start"])
def test_a_look_beyond_an_array_is_noticed(side):
    done = subprocess.run([sys.executable, "-c", PLANTED, str(GUARDED.parent), side], capture_output=True)
    assert done.returncode < 0
