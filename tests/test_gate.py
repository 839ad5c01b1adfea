"""The gate against slower kernels: its races, its verdicts, and where it finds what to race against."""

import os
import random
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from fastbp import machine
from fastbp.benchmarks import gate, racing
from fastbp.benchmarks.cases import Turn

from .test_bench import FakeTime

NAMES = ["dense_forward", "adam", "take"]


class OnABusyMachine:
    """A racer in name: what it does takes a millisecond, or up to three times as long where others are in the way."""

    can = NAMES
    slow = ""
    started = 0

    def __init__(self, folder, times=1, place=0):
        self.times, self.random = times, random.Random(OnABusyMachine.started)
        OnABusyMachine.started += 1

    def seconds(self, name, calls):
        kernel = self.times if name == self.slow or not self.slow else 1
        return 1e-3 * kernel * self.random.choice([1, 1.1, 1.5, 3])

    def close(self):
        pass


@pytest.fixture
def busy(monkeypatch):
    monkeypatch.setattr(gate, "Racer", OnABusyMachine)
    monkeypatch.setattr(gate, "PAUSE", 0)
    monkeypatch.setattr(OnABusyMachine, "slow", "")
    return OnABusyMachine


@pytest.mark.parametrize("slow", NAMES)
def test_a_kernel_made_twice_as_slow_is_found_and_no_other(busy, monkeypatch, slow):
    assert gate.slower(gate.HERE, gate.HERE, NAMES) == {}
    monkeypatch.setattr(busy, "slow", slow)
    assert gate.slower(gate.HERE, gate.HERE, NAMES, times=2) == pytest.approx({slow: 2.0})


@pytest.mark.parametrize(
    ("tries", "verdict", "raced"),
    [
        ([[(1.2, 1)]], {}, 1),
        ([[(3, 1)], [(1, 1)]], {}, 2),
        ([[(3, 1)], [(2.9, 1.0)], [(3, 2)], [(1.4, 1)]], {}, 4),
        ([[(2, 1)], [(4, 2)], [(2.2, 1)], [(2.1, 1)]], {"adam": 2.0}, 4),
        ([[(1.3, 1)], [(1.3, 0.65)], [(2, 1)], [(2, 1)]], {"adam": 2.0}, 4),  # in the first try the base was unlucky
        ([[(1, 0.5), (1, 1), (1, 1)]], {}, 1),  # the base was lucky once
        ([[(3, 1), (1.1, 1), (2, 1)]], {}, 1),  # mine was unlucky twice of three times
    ],
)
def test_a_suspect_is_raced_again_and_is_slow_by_least_times_and_by_median(busy, monkeypatch, tries, verdict, raced):
    left = iter(tries)
    monkeypatch.setattr(gate, "race", lambda new, base, name: next(left))
    assert gate.slower(gate.HERE, gate.HERE, ["adam"]) == verdict
    assert len(list(left)) == len(tries) - raced


@pytest.mark.parametrize("times", [1, 2])
def test_a_turn_has_parts_and_each_starts_anew(monkeypatch, times):
    clock, log = FakeTime(), []
    monkeypatch.setattr(racing, "time", clock)

    def run(calls):
        clock.now += calls * 1e-4
        log.append(calls)

    def reset():
        clock.now += 1e-5  # which does not count
        log.append("reset")

    assert list(racing.parts(Turn(run, reset), 6, times)) == pytest.approx([1e-4 * times] * (4 // times))
    assert log == ["reset", 6] * 4


def test_a_racer_times_what_is_in_its_folder(tmp_path):
    pytest.importorskip("numba")
    new, base = racing.Racer(racing.HERE, times=2), racing.Racer(racing.HERE)
    assert {"relu_forward", "2-64-3"} < {*new.can} and "softmax_jacobian" not in new.can
    turns = racing.race(new, base, "relu_forward")
    assert len(turns) == racing.TURNS
    assert 1e-7 < min(its for _, its in turns) < min(mine for mine, _ in turns) < 1  # thousands of elements; work twice
    for racer in (new, base):
        racer.close()
    (tmp_path / "fastbp").mkdir()
    (tmp_path / "fastbp" / "__init__.py").write_text("")
    with pytest.raises(RuntimeError, match=r"in .* ended at the start"):
        racing.Racer(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are bound to processors on Linux alone")
def test_racers_of_a_place_share_a_processor():
    pytest.importorskip("numba")
    mine = sorted(os.sched_getaffinity(0))
    for place in range(3):
        with closing(racing.Racer(racing.HERE, place=place)) as racer:
            assert os.sched_getaffinity(racer._process.pid) == {mine[place % len(mine)]}


# where the base comes from


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with two revisions of a package that is laid out like this one; and an empty cache."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    monkeypatch.setattr(gate.platformdirs, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    root = tmp_path / "repository"

    def git(*arguments, **options):
        who = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "core.autocrlf=false"]
        done = subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True, **options)
        return done.stdout.decode().strip()

    for folder in ("fastbp", "kernels", "benchmarks"):
        (root / folder).mkdir(parents=True)
    (root / "fastbp" / "__init__.py").write_text("version = 1\n")
    git("init", "--quiet")
    git("config", "uploadpack.allowAnySHA1InWant", "true")
    for link in ("kernels", "benchmarks"):  # links, also where none can be made
        place = git("hash-object", "-w", "--stdin", input=f"../{link}".encode())
        git("update-index", "--add", "--cacheinfo", f"120000,{place},fastbp/{link}")
    for n in (1, 2):
        (root / "kernels" / "ops.py").write_text(f"revision = {n}\n")
        git("add", "fastbp/__init__.py", "kernels")
        git("commit", "--quiet", "-m", f"{n}")
    return root, git("rev-parse", "HEAD~1")


def test_the_base_is_the_package_of_that_revision_with_todays_benchmarks(repository):
    root, first = repository
    folder = gate.checkout("HEAD~1", root)
    assert folder.name == first
    assert (folder / "fastbp" / "kernels" / "ops.py").read_text() == "revision = 1\n"
    assert (folder / "fastbp" / "__init__.py").read_text() == "version = 1\n"
    today = Path(gate.__file__).read_bytes()
    assert (folder / "fastbp" / "benchmarks" / "gate.py").read_bytes() == today
    assert (folder / "fastbp" / "machine.py").read_bytes() == Path(machine.__file__).read_bytes()
    (folder / "fastbp" / "kernels" / "compiled").touch()
    assert gate.checkout(first, root) == folder
    assert (folder / "fastbp" / "kernels" / "compiled").exists()  # kept, with what was compiled
    assert [path.name for path in folder.parent.iterdir()] == [first]


def test_a_shallow_clone_fetches_the_base(repository, tmp_path):
    root, first = repository
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--depth", "1", "-n", root.as_uri(), str(clone)], check=True)
    folder = gate.checkout(first, clone)
    assert (folder / "fastbp" / "kernels" / "ops.py").read_text() == "revision = 1\n"


@pytest.mark.parametrize("lacking", ["revision", "repository", "git"])
def test_without_a_base_it_says_so_and_is_not_green(repository, monkeypatch, capsys, tmp_path, lacking):
    root = repository[0]
    if lacking == "git":
        monkeypatch.setenv("PATH", "")
    found = gate.checkout
    monkeypatch.setattr(gate, "checkout", lambda name: found(name, tmp_path if lacking == "repository" else root))
    assert gate.main(["--base", "1234567890" * 4]) == 3
    said = capsys.readouterr().out
    assert "NOTHING WAS RACED" in said and "1234567890" * 4 in said


def test_a_base_that_does_not_run_is_an_error(repository, monkeypatch):
    root, first = repository
    found = gate.checkout
    monkeypatch.setattr(gate, "checkout", lambda name: found(name, root))
    with pytest.raises(RuntimeError, match=r"the process with the package in .* ended"):
        gate.main(["--base", first])


# as a command


@pytest.mark.parametrize(
    ("arguments", "change", "raced"),
    [
        ([], "", []),
        (["--all"], "", [*NAMES, "2-64-3"]),
        ([], "fastbp/kernels", [*NAMES, "2-64-3"]),
        ([], "fastbp", ["2-64-3"]),
    ],
)
@pytest.mark.parametrize("found", [{}, {"adam": 2.0}])
def test_what_changed_is_raced(busy, monkeypatch, capsys, arguments, change, raced, found):
    monkeypatch.setattr(gate, "RACED", [*NAMES, "new_op", "2-64-3"])
    monkeypatch.setattr(busy, "can", [*NAMES, "2-64-3"])
    monkeypatch.setattr(gate, "checkout", lambda revision: gate.HERE)
    monkeypatch.setattr(gate, "changed", lambda base, folder: folder == change)
    log = []
    monkeypatch.setattr(gate, "slower", lambda new, base, names: log.extend(names) or found)
    assert gate.main([*arguments, "--base", "v1"]) == len(found)
    assert log == raced
    said = capsys.readouterr().out
    assert ("not raced, because v1 does not have them: new_op" in said) == ("adam" in raced)
    assert ("the kernels are those of v1: not raced" in said) == ("adam" not in raced)
    assert ("adam: takes 2.00 times as long as at v1" in said) == bool(found)


def test_a_file_that_is_another_one_is_a_change(tmp_path):
    shutil.copytree(gate.HERE / "fastbp" / "kernels", tmp_path / "fastbp" / "kernels")
    assert not gate.changed(tmp_path, "fastbp/kernels")
    assert gate.changed(tmp_path, "fastbp")
    with (tmp_path / "fastbp" / "kernels" / "ops.py").open("a") as file:
        file.write("\n")
    assert gate.changed(tmp_path, "fastbp/kernels")


@pytest.mark.parametrize(("slow", "code"), [("", 0), ("adam", 1)])
def test_it_proves_itself(busy, monkeypatch, capsys, slow, code):
    monkeypatch.setattr(gate, "PROOF", NAMES)
    monkeypatch.setattr(busy, "slow", slow)  # the others are not slowed, and so are missed
    assert gate.main(["--prove"]) == code
    assert ("not found: dense_forward, take" in capsys.readouterr().out) == bool(code)
