"""Writing a file that is whole at any time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["write_bytes"]


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is whole at any time, the old one or the new one, also where several processes write it."""
    path = path.resolve()  # of a link, that to which it leads
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no file that could be replaced")
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666  # who may read it, from its first byte on
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
