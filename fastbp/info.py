"""What ``fastbp info`` says of this machine: versions, engines, cores, and how fast its BLAS may be."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import auto
from .machine import usable_cores, version_of
from .selection import engines
from .version import __version__

__all__ = ["print_info"]

CHOICES = 20  # of auto, how many are printed


def print_info() -> None:
    """Print versions, cores, engines, their choices and BLAS libraries, and warn of variables that slow these down."""
    found = engines()
    print(f"fastbp   {__version__}")
    print(f"python   {platform.python_version()}, {platform.platform()}")
    for module in ("numpy", "numba", "scipy", "cupy"):
        print(f"{module:8} {version_of(module) or 'not installed'}")
    print(f"cores    {os.cpu_count()}, of which this process may use {usable_cores()}")
    print("engines")
    for entry in found:
        print(f"  {entry.name:8} {entry.device:5} {'available' if entry.available else entry.why_not}")
    place = auto.folder()
    print(f"auto     keeps what it chose in {place or f'memory; to keep it on disk: {auto.INSTALL}'}")
    choices = list(auto.kept_choices())
    for line in [*choices[:CHOICES], *([f"and {len(choices) - CHOICES} more"] if len(choices) > CHOICES else [])]:
        print(f"  {line}")
    print("BLAS")
    libraries = blas_libraries(os.environ)
    for library in libraries:
        print(
            f"  {library['name']:8} {library['architecture']}, {library['num_threads']} threads, {library['filepath']}"
        )
    if not libraries:
        print("  unknown; to see it: pip install 'fastbp[cli]'")
    for line in pins(libraries):
        print(f"warning: {line}")


def blas_libraries(environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """What threadpoolctl finds in a fresh process: OpenBLAS reads its variables only when it is loaded."""
    code = """if True:
        import contextlib, json, numpy, threadpoolctl
        with contextlib.suppress(ImportError):
            import scipy.linalg
        print(json.dumps([x for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas"]))"""
    done = subprocess.run([sys.executable, "-c", code], env=dict(environment), capture_output=True, text=True)
    libraries = json.loads(done.stdout) if done.returncode == 0 else []
    return [{"architecture": "?", **x, "name": f"{x['internal_api']} {x['version']}"} for x in libraries]


def pins(libraries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings about variables that make OpenBLAS slower than this processor is, with the remedy."""
    lines = []
    if core := os.environ.get("OPENBLAS_CORETYPE"):
        free = blas_libraries({name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"})
        natural = {x["filepath"]: x["architecture"] for x in free}
        pairs = {(x["architecture"], natural.get(x["filepath"], x["architecture"])) for x in libraries}
        lines += [
            f"OPENBLAS_CORETYPE={core} makes OpenBLAS use its code for {pinned}, where this processor gets {better}; "
            "the remedy: unset OPENBLAS_CORETYPE"
            for pinned, better in sorted(pairs)
            if pinned != better
        ]
    if size := os.environ.get("OPENBLAS_L2_SIZE"):
        file = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")  # Linux says there, for example, 1024K
        actual = file.read_text().strip().removesuffix("K") if file.is_file() else ""
        if not (actual.isdecimal() and size.isdecimal() and int(size) >= int(actual)):
            lines.append(
                f"OPENBLAS_L2_SIZE={size} makes OpenBLAS cut its blocks for a cache of {size} KiB; "
                f"this processor has {f'{actual} KiB' if actual else 'its own'}; the remedy: unset OPENBLAS_L2_SIZE"
            )
    return lines
