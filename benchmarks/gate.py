"""The gate of continuous integration: no kernel, and no epoch of training, may become much slower than it was.

    python -m fastbp.benchmarks.gate            race the Numba engine against itself as it was at BASE
    python -m fastbp.benchmarks.gate --prove    race it against itself, working twice and as it is

Two processes, one with the code under test and one with the base's, take turns of milliseconds at the same work on one
processor, BLAS held to one thread. What looks slower is raced again a while later by new processes on another one. Slow
is what is so by the least times of all tries and by the median of all pairs of turns, since a busy machine falsifies
either: a single lucky turn the former, many unlucky ones the latter. The exit code is 1 where something is slower, and
3 where the base cannot be had and nothing was raced.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path

import platformdirs

from fastbp import machine

from .racing import HERE, RACED, Racer, race
from .training import NETWORKS

__all__ = ["BaseNotAvailable", "checkout", "slower"]

BASE = "028f4240c182e8302b6e0ca4aba64adf716d20e9"  # to move on, where a kernel may be slower for a reason
FACTOR = 1.5  # how many times slower is too slow
SUSPECT = 1.25  # from here on it is raced again
TRIES = 4
PAUSE = 1.0  # seconds between tries, in which a busy machine may become calm
PROOF = ["dense_forward", "softmax_cross_entropy", "layer_norm_backward", "relu_backward", "adam", "64-128-10"]


class BaseNotAvailable(Exception):
    """There is nothing to race against."""


def slower(new: Path, base: Path, names: Collection[str], times: int = 1) -> dict[str, float]:
    """Those that take FACTOR times as long in `new`, or more, and how many times."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for attempt in range(TRIES):
        if not turns:
            break
        time.sleep(PAUSE if attempt else 0)
        # in new places of memory, too
        with closing(Racer(new, times, attempt)) as mine, closing(Racer(base, place=attempt)) as its:
            for name, seconds in turns.items():
                seconds += race(mine, its, name)
        turns = {name: seconds for name, seconds in turns.items() if ratio(seconds) >= SUSPECT}
    return {name: found for name, seconds in turns.items() if (found := ratio(seconds)) >= FACTOR}


def ratio(turns: Sequence[tuple[float, float]]) -> float:
    """How many times as long the first of two take, by what puts them in the better light."""
    least = min(mine for mine, _ in turns) / min(its for _, its in turns)
    return min(least, statistics.median(mine / its for mine, its in turns))


def checkout(revision: str, source: Path = HERE) -> Path:
    """A folder with the package as it was at a revision of the repository `source`, kept for the next time.

    Its benchmarks are today's, with what they need to know of a machine, so that both sides do the same.

    Raises
    ------
    BaseNotAvailable
        Without git, a repository, or the revision in it or where it came from.
    """
    git = functools.partial(git_in, source)
    try:
        commit = f"{revision}^{{commit}}"
        try:
            name = git("rev-parse", "--verify", "--quiet", commit).decode().strip()
        except subprocess.CalledProcessError:  # as in a shallow clone
            git("fetch", "--quiet", "--depth", "1", "origin", revision)
            name = git("rev-parse", "--verify", "FETCH_HEAD^{commit}").decode().strip()
        folder = platformdirs.user_cache_path("fastbp", appauthor=False) / "gate" / name
        if not folder.is_dir():
            archive = git("archive", "--format=zip", name, "fastbp", "kernels")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as place:
                unpack(archive, Path(place) / "new")
                (Path(place) / "new").rename(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None)
        raise BaseNotAvailable(f"revision {revision}: {why.decode().strip() if why else error}") from error
    benchmarks = folder / "fastbp" / "benchmarks"
    shutil.copytree(Path(__file__).parent, benchmarks, ignore=lambda *_: ["results", "__pycache__"], dirs_exist_ok=True)
    shutil.copy2(machine.__file__, folder / "fastbp")
    return Path(folder).resolve()


def git_in(folder: Path, *arguments: str) -> bytes:
    quiet = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    return subprocess.run(["git", *arguments], cwd=folder, env=quiet, capture_output=True, check=True).stdout


def unpack(archive: bytes, folder: Path) -> None:
    """Put kernels and all into one folder; links come out of a zip file as small text files."""
    zipfile.ZipFile(io.BytesIO(archive)).extractall(folder)
    for link in ("kernels", "benchmarks"):
        (folder / "fastbp" / link).unlink()
    (folder / "kernels").rename(folder / "fastbp" / "kernels")


def changed(base: Path, folder: str) -> bool:
    """Whether the Python files of a folder are other ones than the base's."""
    mine, its = ({path.name: path.read_bytes() for path in (root / folder).glob("*.py")} for root in (HERE, base))
    return mine != its


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE, metavar="REV", help="another revision to race against")
    parser.add_argument("--all", action="store_true", help="also what did not change; with --prove, also other kernels")
    parser.add_argument("--prove", action="store_true", help="see that work done twice is found, and nothing else")
    options = parser.parse_args(arguments)
    return prove(RACED if options.all else PROOF) if options.prove else gate(options.base, options.all)


def gate(revision: str, everything: bool) -> int:
    """Race what changed since the revision."""
    try:
        base = checkout(revision)
    except BaseNotAvailable as error:
        print(f"NOTHING WAS RACED, for want of a base. {error}")
        return 3
    with closing(Racer(base)) as racer:
        can = racer.can
    kernels = everything or changed(base, "fastbp/kernels")
    names = [name for name in RACED if kernels or (name in NETWORKS and changed(base, "fastbp"))]
    if not kernels:
        print(f"the kernels are those of {revision}: not raced" + ("" if names else ", nor is training"))
    if new := [name for name in names if name not in can]:
        print(f"not raced, because {revision} does not have them: {', '.join(new)}")
    raced = [name for name in names if name in can]
    found = slower(HERE, base, raced)
    for name, ratio in found.items():
        print(f"{name}: takes {ratio:.2f} times as long as at {revision}; {FACTOR:g} times is too slow")
    print(f"{len(raced)} raced, {len(found)} too slow")
    return 1 if found else 0


def prove(names: Sequence[str]) -> int:
    """Let the code race against itself, first doing its work twice; 1 where the gate is wrong."""
    missed = {*names} - {*slower(HERE, HERE, names, times=2)}
    blamed = slower(HERE, HERE, names)
    for found, what in ((missed, "made twice as slow and not found"), (blamed, "as fast as before and found slow")):
        if found:
            print(f"{what}: {', '.join(sorted(found))}")
    print(f"of {len(names)} made twice as slow {len(missed)} missed; of as many that were not {len(blamed)} blamed")
    return 1 if missed or blamed else 0


if __name__ == "__main__":
    sys.exit(main())
