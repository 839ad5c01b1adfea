"""What goes wrong outside: Ctrl-C, a full disk, folders that cannot be written to, packages that are missing."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import fastbp
from fastbp.kernels.numpy_engine import NumpyEngine

from .checks import small_data, small_model, state_of
from .conftest import ENGINES

X, Y = small_data()
PACKAGE = Path(fastbp.__file__).parent


def run(code, *arguments, python=(), **environment):
    """Run code in a process of its own; its output."""
    done = subprocess.run(
        [sys.executable, *python, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {name: str(value) for name, value in environment.items()},
    )
    assert done.returncode == 0, done.stderr
    return done


INTERRUPTED = """
import faulthandler, os, random, signal, sys, threading, time
import numpy as np
import tqdm.auto
import fastbp

engine, times = sys.argv[1], int(sys.argv[2])
faulthandler.dump_traceback_later(300, exit=True)  # where it hangs
rng = random.Random(0)
X, y = fastbp.spiral_data(100, 3, seed=0)
model = fastbp.Sequential(
    [fastbp.Dense(2, 16), fastbp.ReLU(), fastbp.Dropout(0.1), fastbp.Dense(16, 3)],
    loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(0.001), engine=engine, seed=0, threads=1,
)
fit = lambda epochs, **options: model.fit(X, y, epochs=epochs, batch_size=10, validation_data=(X, y), **options)
fit(2, verbose=True)
interrupted = 0
# an interrupt that meets a finalizer or a callback from C is printed and lost; so is it to every library
sys.unraisablehook = lambda unraisable: None
signal.signal(signal.SIGALRM, signal.default_int_handler)  # the handler of Ctrl-C, at a random moment
for _ in range(times):
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 0.06))
        fit(100_000, verbose=True)
    except KeyboardInterrupt:
        interrupted += 1
    assert not tqdm.auto.tqdm._instances, "a bar is open"
    assert np.isfinite(model.predict_proba(X)).all()
    epochs = len(model.history["loss"])
    fit(1)
    assert len(model.history["loss"]) == epochs + 1
import copy
again = copy.deepcopy(model)
fit(2)
again.fit(X, y, epochs=2, batch_size=10, validation_data=(X, y))
assert again.memory.parameters.tobytes() == model.memory.parameters.tobytes()
print(interrupted)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no timer that interrupts")
def test_ctrl_c_at_any_moment_leaves_a_model_that_goes_on(installed_engine):
    pytest.importorskip("tqdm")
    pytest.importorskip("threadpoolctl")
    assert int(run(INTERRUPTED, installed_engine.name, 60).stdout) == 60


INTERRUPTED_EVERYWHERE = """
import faulthandler, sys, threading
import numpy as np
import fastbp
from fastbp.kernels.threads import blas_libraries

engine, width, what, stride = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
faulthandler.dump_traceback_later(300, exit=True)  # where it hangs
rng = np.random.default_rng(0)
X, y = rng.standard_normal((300, 20)).astype(np.float32), rng.integers(0, 10, 300)
model = fastbp.Sequential(
    [fastbp.Dense(20, width), fastbp.ReLU(), fastbp.Dense(width, 10)], loss=fastbp.SoftmaxCrossEntropy(),
    optimizer=fastbp.Adam(1e-5), engine=engine, seed=0, threads=1 if width < 100 else None,
)
do = {"predict": lambda: model.predict(X), "fit": lambda: model.fit(X, y, batch_size=150, verbose=False)}
for each in do.values():
    each()
before = [library.get_num_threads() for library in blas_libraries()]
sys.unraisablehook = lambda unraisable: None  # an interrupt that meets a finalizer is printed and lost
for at in range(1, 10**9, stride):
    calls = []

    def interrupt(frame, event, _):
        # as Ctrl-C, which comes when a Python function begins, or a C function has ended
        if event in ("call", "c_return"):
            calls.append(event)
            if len(calls) == at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    try:
        sys.setprofile(interrupt)
        do[what]()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    others = [threading.Thread(target=model.predict, args=(X,), daemon=True) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
        assert not other.is_alive(), f"another thread waits for ever after call {at}"
    if at % 50 == 1:
        do["fit"]()
    do["predict"]()
    now = [library.get_num_threads() for library in blas_libraries()]
    assert now == before, f"BLAS has {now} threads, not {before}, after call {at}"
    if engine == "numba":
        from fastbp.kernels import numba_team
        assert not numba_team.latest[0][numba_team.OPEN], f"a team is open after call {at}"
    if len(calls) < at:
        break
print(at)
"""


@pytest.mark.parametrize(("what", "stride"), [("predict", 1), ("fit", 3)])
@pytest.mark.parametrize("width", [16, 700])
def test_ctrl_c_in_any_call_leaves_nothing_taken(cpu_engine, width, what, stride):
    """Also where other threads go on, and where it meets what begins and ends the work of several cores."""
    pytest.importorskip("threadpoolctl")
    assert int(run(INTERRUPTED_EVERYWHERE, cpu_engine.name, width, what, stride).stdout) > 50


FULL = """
import resource, signal, sys
import fastbp

path = sys.argv[1]
models = [fastbp.Sequential([fastbp.Dense(40, 100)], optimizer=fastbp.Adam(), seed=seed) for seed in (0, 1)]
models[0].save(path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    models[1].save(path)
except OSError as error:
    print(type(error).__name__)
assert fastbp.load(path).layers[0].weights.tobytes() == models[0].layers[0].weights.tobytes()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files have no limit")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    pytest.importorskip("safetensors")
    assert run(FULL, tmp_path / "model").stdout == "OSError\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def elsewhere(tmp_path):
    """A copy of the package, as if it were installed there."""
    to = tmp_path / "site" / "fastbp"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, to, ignore=ignored)
    return to


PREDICT = """
import logging, sys
logging.basicConfig(format="%(message)s", level=logging.WARNING)
import fastbp
model = fastbp.Sequential([fastbp.Dense(2, 3)], engine="numba", seed=0)
for _ in range(2):
    model.predict([[1, 2]])
print(model.predict([[1.0, 2.0]]).tobytes().hex(), fastbp.__file__)
"""
numba_too = pytest.mark.skipif("numba" not in ENGINES, reason="Numba is not installed")


@numba_too
def test_kernels_that_no_folder_can_keep_are_compiled_and_that_is_said_once(elsewhere, tmp_path):
    a_file = tmp_path / "file"
    a_file.touch()
    (elsewhere / "kernels" / "__pycache__").touch()
    nowhere = dict.fromkeys(("NUMBA_CACHE_DIR", "HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"), a_file / "below")
    done = run(PREDICT, python=["-B", "-P"], PYTHONPATH=elsewhere.parent, **nowhere)
    expected = fastbp.Sequential([fastbp.Dense(2, 3)], engine="numba", seed=0).predict([[1.0, 2.0]])
    assert done.stdout.split() == [expected.tobytes().hex(), str(elsewhere / "__init__.py")]
    assert done.stderr.count("no folder can keep the compiled kernels (RuntimeError); set NUMBA_CACHE_DIR") == 1
    assert len(done.stderr.splitlines()) <= 2


@numba_too
@pytest.mark.parametrize("damage", ["another version", "cut", "garbage", "cut data"])
def test_a_cache_of_another_version_or_damaged(tmp_path, damage):
    cache = tmp_path / "cache"
    first = run(PREDICT, NUMBA_CACHE_DIR=cache)
    files = list(cache.rglob("*.nbc" if damage == "cut data" else "*.nbi"))
    assert files
    for file in files:
        content = file.read_bytes()
        if damage == "another version":
            with file.open("rb") as opened:
                pickle.load(opened)
                content = pickle.dumps("0.1") + opened.read()
        else:
            content = b"\0garbage" if damage == "garbage" else content[: len(content) // 2]
        file.write_bytes(content)
    assert run(PREDICT, NUMBA_CACHE_DIR=cache).stdout == first.stdout


MISSING = """
import sys, warnings
name, code = sys.argv[1:]
sys.modules[name] = None
import fastbp
X, y = fastbp.spiral_data(10, 2, seed=0)
options = {"loss": fastbp.SoftmaxCrossEntropy(), "optimizer": fastbp.SGD(0.1)}
model = fastbp.Sequential([fastbp.Dense(2, 2)], engine="numpy", seed=0, **options)
try:
    exec(code)
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("module", "code", "install"),
    [
        ("safetensors", "model.save('x')", "fastbp[files]"),
        ("safetensors", "fastbp.load('x')", "fastbp[files]"),
        ("tqdm.auto", "model.fit(X, y, verbose=True)", "fastbp[cli]"),
        ("threadpoolctl", "model.fit(X, y, threads=1)", "threadpoolctl"),
        ("torch", "fastbp.to_torch(model)", "torch"),
        ("torch", "fastbp.from_torch(model)", "torch"),
        ("onnx", "fastbp.export_onnx(model, 'x')", "fastbp[onnx]"),
        ("sklearn", "import fastbp.estimators", "fastbp[sklearn]"),
        ("scipy", "import fastbp.estimators", "fastbp[sklearn]"),
        ("numba", "fastbp.engine('numba')", "fastbp[numba]"),
        ("sklearn", "from fastbp.tables import load_table; load_table('digits', None, 0)", "fastbp[cli]"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(module, code, install):
    answer = run(MISSING, module, code).stdout
    assert re.search(rf"pip install '?{re.escape(install)}", answer)


def test_an_error_in_a_callback_leaves_a_model_that_goes_on(engine):
    model, other = small_model(engine, dropout=0.2), small_model(engine, dropout=0.2)

    def fail(model, figures):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        model.fit(X, Y, epochs=3, callbacks=[fail])
    other.fit(X, Y, epochs=1)
    assert state_of(model) == state_of(other)
    assert state_of(model.fit(X, Y, epochs=2)) == state_of(other.fit(X, Y, epochs=2))
    assert np.isfinite(model.predict_proba(X)).all()


class Scarce(NumpyEngine):
    """Memory for so many arrays more."""

    left = np.inf

    def _take(self):
        self.left -= 1
        if self.left < 0:
            raise MemoryError

    def empty(self, shape, dtype):
        self._take()
        return super().empty(shape, dtype)

    def asarray(self, x, dtype=None):
        self._take()
        return super().asarray(x, dtype).copy()


CHANGES = {
    "move_to": lambda model, engine: model.move_to(engine),
    "optimizer": lambda model, _: setattr(model, "optimizer", fastbp.RMSprop(0.01)),
    "the same optimizer": lambda model, _: setattr(model, "optimizer", model.optimizer),
    "layers": lambda model, _: setattr(model, "layers", [model.layers[0], fastbp.BatchNorm(8), *model.layers[1:]]),
    "trainable": lambda model, _: setattr(model.layers[0], "trainable", False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_for_which_memory_is_wanting_is_none(change):
    def trained():
        model = small_model(Scarce() if change is not CHANGES["move_to"] else "numpy")
        return model.fit(X, Y, epochs=2, verbose=False)

    expected = trained()
    change(expected, Scarce())
    wanted = state_of(expected.fit(X, Y, epochs=2, verbose=False))
    for left in range(100):
        model, engine = trained(), Scarce()
        layers, optimizer, frozen, before = model.layers, model.optimizer, model.layers[0].trainable, state_of(model)
        source = model.engine if isinstance(model.engine, Scarce) else engine
        source.left = left
        try:
            change(model, engine)
        except MemoryError:
            source.left = np.inf
            assert model.layers == layers and model.optimizer is optimizer and model.engine is not engine
            assert state_of(model) == before and model.layers[0].trainable == frozen
            change(model, engine)
            assert state_of(model.fit(X, Y, epochs=2, verbose=False)) == wanted
        else:
            break
    assert 0 < left < 99


def test_training_needs_no_stderr(engine, monkeypatch):
    """As in a program without a console."""
    for stream in (None, types.SimpleNamespace(write=print)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert small_model(engine).fit(X, Y, epochs=1).history
