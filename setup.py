"""What pyproject.toml cannot say: with SOURCE_DATE_EPOCH, an sdist is the same bytes wherever it is made."""

import gzip
import os
import tarfile
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist


class SameBytes(sdist):
    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        if format != "gztar" or "SOURCE_DATE_EPOCH" not in os.environ:
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        when, path = int(os.environ["SOURCE_DATE_EPOCH"]), Path(f"{base_name}.tar.gz")

        def same(entry):
            entry.mtime, entry.mode = when, 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            return entry

        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=when) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            archive.add(base_dir, filter=same)  # in the order of names
        return str(path)


setup(cmdclass={"sdist": SameBytes})
