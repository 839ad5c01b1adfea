"""What runs here: the processor, the cores that this process may use, and versions of packages."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import sys
from pathlib import Path

__all__ = ["cpu_name", "usable_cores", "version_of"]

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # Linux says there what a container may use: "150000 100000", or "max 100000"


def usable_cores() -> int:
    """How many cores this process may use, by its affinity and a container's quota."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError):
        limit, _, period = QUOTA.read_text().partition(" ")
        if limit.isdecimal():
            cores = min(cores, max(1, math.ceil(int(limit) / int(period))))
    return cores


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError, StopIteration):  # where there is such a file
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """The version of a package, by its own name or its module's; None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    if importlib.util.find_spec(package) is None:
        return None
    owners = importlib.metadata.packages_distributions()  # slow; for packages that have another name than their module
    return importlib.metadata.version(owners[package][0]) if package in owners else "?"
