"""``engine="auto"``: which engine it takes, by engines whose speed is known; and that nothing else depends on it."""

import copy
import functools
import importlib.metadata
import json
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

import fastbp
from fastbp import auto
from fastbp.__main__ import main
from fastbp.kernels.engine import CallByCall
from fastbp.kernels.numpy_engine import NumpyEngine
from fastbp.samples import Data

from .checks import small_data, small_model, state_of
from .conftest import ENGINES

X, Y = small_data(50)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Counted(CallByCall):
    """Lets the clock go on as the engine says, at each step of training that is replayed."""

    def run(self, steps):
        super().run(steps)
        call = self._calls[0]
        if call.op.name == "next_batch":
            self._engine.clock.now += steps * self._engine.seconds(len(call.arguments[-1]))


class Fake(NumpyEngine):
    """NumPy, of a speed that the test gives."""

    def __init__(self, name, clock, seconds):
        self.name, self.clock, self.seconds = name, clock, seconds

    def program(self, calls):
        return Counted(self, calls)

    def __reduce__(self):
        return fastbp.engine, (self.name,)


@pytest.fixture(autouse=True)
def _forgetful(tmp_path, monkeypatch):
    """No choice is known yet, and none is kept where the user's are."""
    monkeypatch.setattr(auto, "folder", lambda: tmp_path / "kept")
    monkeypatch.setattr(auto, "STEPS", 16)
    forget()
    yield
    forget()


def forget():
    """Be as a new process."""
    auto._chosen.clear()
    auto.here.cache_clear()
    auto._say.cache_clear()


def forget_all(folder):
    """Be as on a new machine."""
    forget()
    for path in folder.glob("*"):
        path.unlink()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(auto, "clock", clock)
    monkeypatch.setattr(auto, "cpu_clock", clock)
    return clock


@pytest.fixture
def fakes(clock, monkeypatch):
    """Let engines be all that there are, each by its seconds for a step of some rows."""

    def install(**seconds):
        made = {name: Fake(name, clock, function) for name, function in seconds.items()}
        infos = [fastbp.EngineInfo(name, True, "cpu", "") for name in made]
        monkeypatch.setattr(auto, "engines", lambda: infos)
        load = fastbp.selection._load
        monkeypatch.setattr(fastbp.selection, "_load", lambda name: made.get(name) or load(name))
        forget()
        return made

    return install


@pytest.fixture
def info(caplog):
    caplog.set_level("INFO", "fastbp")
    return caplog


def trained(batch_size=10, rows=50, **options):
    model = small_model("auto", **options)
    return model.fit(*small_data(rows), epochs=2, batch_size=batch_size)


def files(tmp_path):
    return sorted((tmp_path / "kept").glob("*"))


GRID = [(fixed, per_row) for fixed in (2e-6, 5e-5, 1e-3) for per_row in (1e-8, 1e-6, 2e-5)]


@pytest.mark.parametrize("batch", [1, 16, 256])
@pytest.mark.parametrize("turn", range(3))
def test_the_fastest_is_taken(fakes, batch, turn):
    others = GRID[turn:] + GRID[:turn]
    for (a, b), (c, d) in zip(GRID, others[1:] + others[:1], strict=True):
        made = fakes(first=lambda n, a=a, b=b: a + b * n, second=lambda n, c=c, d=d: c + d * n, third=lambda n: 1e-2)
        forget_all(auto.folder())
        taken = trained(batch, rows=2 * batch).engine
        assert taken.seconds(batch) <= 1.1 * min(engine.seconds(batch) for engine in made.values())


def test_each_class_of_steps_has_its_own(fakes):
    made = fakes(small=lambda n: 1e-5 + 1e-6 * n, large=lambda n: 1e-4 + 1e-7 * n)  # as fast at 100 rows
    model, plain = small_model("auto", dropout=0.3), small_model("numpy", dropout=0.3)
    for batch, name in ((8, "small"), (512, "large"), (16, "small"), (400, "large")):
        for x in (model, plain):
            x.fit(*small_data(1000), epochs=2, batch_size=batch)
        assert model.engine is made[name]
        assert state_of(model) == state_of(plain)  # these engines compute what NumPy computes


def test_what_else_the_machine_does_is_no_engines_fault(fakes):
    calls = []

    def disturbed(rows):
        calls.append(rows)
        return 1e-3 if len(calls) < 5 else 1e-5

    fakes(fast=disturbed, slow=lambda n: 2e-5)
    assert trained().engine.name == "fast"


def test_what_was_timed_on_a_busy_machine_is_not_kept(fakes, clock, info, tmp_path, monkeypatch):
    fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)
    monkeypatch.setattr(auto, "cpu_clock", lambda: clock.now / 2)
    assert trained().engine.name == "fast"
    assert "others kept the processor busy" in info.text and not files(tmp_path)


@pytest.mark.parametrize("seconds", [1e-7, 1e-4, 0.02, 0.1, 0.2])
def test_a_second_at_most(fakes, clock, seconds):
    fakes(a=lambda n: seconds, b=lambda n: 1.01 * seconds)
    model = small_model("auto")
    data = Data(X, Y, None)
    auto.settle(model, data, 10, model.loss)
    assert model.engine.name == "a"
    assert 0 < clock.now <= 1


def test_a_choice_is_made_once(fakes, clock, tmp_path, info):
    made = fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)
    model = trained()
    for again in (lambda: None, forget):
        again()
        info.clear()
        before = clock.now
        assert trained(9).engine is made["fast"]
        assert clock.now - before == pytest.approx(2 * 6 * 1e-5)  # the steps that it trained
    (path,) = files(tmp_path)
    assert json.loads(path.read_text())["seconds"] == pytest.approx({"slow": 2e-5, "fast": 1e-5})
    assert re.search(r"auto takes fast \(10\.0 us a step, slow 20\.0\) for Dense 4x8, .* kept from", info.text)
    before = clock.now
    auto.settle(model, Data(X, Y, np.ones(50)), 10, model.loss)  # weighted: another class
    assert clock.now > before and len(files(tmp_path)) == 2


def test_it_says_what_it_takes_and_why(fakes, info, capsys):
    fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)
    model = trained()
    why = (
        "fast (10.0 us a step, slow 20.0) for Dense 4x8, ReLU, Dense 8x4; Adam; float64; "
        "SoftmaxCrossEntropy; 8 rows x 4 float64; y int64"
    )
    assert f"auto takes {why}; timed in 0." in info.text
    assert "engine fast (auto)" in model.summary()
    main(["info"])
    out = capsys.readouterr().out
    assert why in out and str(auto.folder()) in out


@pytest.mark.parametrize("what", ["machine", "versions", "engines"])
def test_another_machine_version_or_engine_measures_anew(fakes, clock, what, monkeypatch, capsys, tmp_path):
    fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)
    trained()
    other = {"machine": "another", "versions": {"fastbp": "0.0.9"}, "engines": {"slow": "cpu", "fast": "tpu"}}
    changed = auto.here()._replace(**{what: other[what]})
    monkeypatch.setattr(auto, "here", functools.cache(lambda: changed))
    auto._chosen.clear()
    main(["info"])
    assert "us a step" not in capsys.readouterr().out
    before = clock.now
    trained()
    assert clock.now - before > 0.0002 and len(files(tmp_path)) == 2


@pytest.mark.parametrize("when", [1, 2, 15])
def test_an_engine_that_fails_is_left_out(fakes, when, info, tmp_path):
    calls = []

    def failing(rows):
        calls.append(rows)
        if len(calls) >= when:
            raise RuntimeError("beads are missing")
        return 1e-6

    fakes(broken=failing, sound=lambda n: 1e-5)
    assert trained().engine.name == "sound"
    assert "auto leaves out broken, which failed while it was timed: RuntimeError('beads are missing')" in info.text
    assert not files(tmp_path)  # it may work next time


def test_where_all_fail_the_fit_says_why(fakes, tmp_path):
    class InNumPy(fastbp.Tanh):
        def forward(self, x):
            return np.tanh(x)

    fakes(a=lambda n: 1e-5, b=lambda n: 1e-5)
    model = fastbp.Sequential(
        [fastbp.Dense(4, 3), InNumPy()], loss=fastbp.MeanSquaredError(), optimizer=fastbp.SGD(0.1), engine="auto"
    )
    before = state_of(model)
    with pytest.raises(fastbp.RecordingError, match="forward cannot be recorded"):
        model.fit(X, np.ones((50, 3)))
    assert model.engine.name == "numpy" and state_of(model) == before and not files(tmp_path)


def test_a_single_engine_is_not_timed(fakes, clock, info, tmp_path):
    fakes(only=lambda n: 1e-5)
    assert trained().engine.name == "only"
    assert clock.now == pytest.approx(2 * 5 * 1e-5) and "the only engine" in info.text and not files(tmp_path)


KEY = {"machine": "", "versions": {}, "engines": {}, "step": "Dense 1x1"}
DAMAGED = [
    *(b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"key": {}}'),
    *(
        json.dumps({"key": KEY, "seconds": seconds}).encode()
        for seconds in ({"slow": 1.0}, {}, [], {"slow": -1}, {"slow": float("nan")}, {"slow": "x"}, {"slow": None})
    ),
]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_ignored_and_replaced(fakes, content, info, tmp_path):
    fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)
    trained()
    (path,) = files(tmp_path)
    whole = json.loads(path.read_text())
    path.write_bytes(content)
    forget()
    info.clear()
    list(auto.kept_choices())
    assert trained().engine.name == "fast"
    assert "auto ignores" in info.text and json.loads(path.read_text())["key"] == whole["key"]


def test_an_engine_that_is_kept_but_gone_is_ignored(fakes, info, tmp_path):
    fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)
    trained()
    (path,) = files(tmp_path)
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"seconds": {"abacus": 1e-5, "slow": 2e-5}}))
    forget()
    assert trained().engine.name == "fast" and "got 'abacus'" in info.text


def test_where_nothing_can_be_written(fakes, info, tmp_path, monkeypatch):
    fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(auto, "folder", lambda: tmp_path / "file" / "kept")
    for batch_size in (8, 32):
        assert trained(batch_size).engine.name == "fast"
    assert info.text.count("auto cannot keep its choices in") == 1
    assert list(auto.kept_choices()) == []


def test_without_platformdirs_choices_are_in_memory(fakes, info, monkeypatch, clock, capsys):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setattr(auto, "folder", FOLDER)
    fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)
    trained()
    assert "in memory alone; to keep them on disk: pip install 'fastbp[auto]'" in info.text
    before = clock.now
    assert trained().engine.name == "fast"
    assert clock.now - before == pytest.approx(2 * 5 * 1e-5)
    main(["info"])
    assert "pip install 'fastbp[auto]'" in capsys.readouterr().out


FOLDER = auto.folder


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name, **_: str(tmp_path / name))
    assert FOLDER() == tmp_path / "fastbp" / "engines"


def test_processes_at_once(tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        from fastbp import auto
        auto.folder = lambda: Path(sys.argv[1])
        for i in range(1, 200):
            auto._keep("a step", {"numpy": i * 1e-6})
            assert auto._kept("a step").name == "numpy"
    """
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "kept")], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    if sys.platform != "win32":  # there, a file that is read cannot be replaced, which is said and does no harm
        assert said == ["", "", ""]
    (path,) = files(tmp_path)
    json.loads(path.read_text())


def test_threads_at_once(fakes, tmp_path):
    fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)
    models = [small_model("auto") for _ in range(6)]
    threads = [threading.Thread(target=model.fit, args=(X, Y)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {model.engine.name for model in models} == {"fast"} and len(files(tmp_path)) == 1


@pytest.fixture
def winner(engine, monkeypatch):
    """Time all engines that are here, and let each of them be the fastest in turn."""
    measure = auto.measure
    monkeypatch.setattr(auto, "measure", lambda step: (measure(step)[0] | {engine.name: 1e-12}, False))
    return engine


def fit_arrays(model):
    model.fit(X, Y, epochs=3, batch_size=16, sample_weight=np.linspace(0, 1, 50), class_weight="balanced")


def fit_accumulated(model):
    model.fit(X, Y, epochs=2, batch_size=8, accumulate=3, validation_data=(X, Y))


def fit_once_given_batches(model):
    model.fit(((X[i : i + 16], Y[i : i + 16]) for i in range(0, 48, 16)), epochs=1)


def fit_batches(model):
    calls = []

    def batches():
        calls.append(None)
        return ((X[i : i + 16], Y[i : i + 16]) for i in range(0, 50, 16))

    model.fit(batches, epochs=3)
    assert len(calls) == 3


def train_on_batches(model):
    for i in range(0, 50, 16):
        model.train_on_batch(X[i : i + 16], Y[i : i + 16], epoch=i / len(X))


WAYS = [fit_arrays, fit_accumulated, fit_once_given_batches, fit_batches, train_on_batches]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_results_are_those_of_the_engine_that_is_taken(winner, way):
    options = {"dropout": 0.3, "optimizer": fastbp.Adam(0.01, clip_norm=1.0, schedule=fastbp.StepLR(1, 0.5))}
    models = [small_model(engine, **copy.deepcopy(options)) for engine in (winner, "auto", "auto")]
    for model in models:  # the second is timed, where there are engines to choose from, the third not
        way(model)
        assert model.engine is winner
    assert state_of(models[1]) == state_of(models[0]) and state_of(models[2]) == state_of(models[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("other", ENGINES)
def test_moving_keeps_all_bits(engine, other):
    optimizer = fastbp.Adam(0.01, schedule=fastbp.StepLR(1, 0.5))
    model = small_model(engine, dropout=0.3, optimizer=optimizer).fit(X, Y, epochs=2)
    before, outputs = state_of(model), model.predict_proba(X)
    assert model.move_to(other) is model and model.engine.name == other
    assert state_of(model) == before
    np.testing.assert_allclose(model.predict_proba(X), outputs, rtol=1e-12)
    back = copy.deepcopy(model).move_to(engine).fit(X, Y, epochs=1)
    twin = small_model(engine, dropout=0.3, optimizer=fastbp.Adam(0.01, schedule=fastbp.StepLR(1, 0.5)))
    assert state_of(back) == state_of(twin.fit(X, Y, epochs=2).fit(X, Y, epochs=1))


def test_moving_to_what_is_not_there_changes_nothing():
    model = small_model("auto")
    with pytest.raises(ValueError, match=r"engine must be one of numpy, .* or auto, got 'abacus'"):
        model.move_to("abacus")
    assert model.chooses_engine and model.engine.name == "numpy"
    assert not model.move_to("numpy").chooses_engine and model.move_to("auto").chooses_engine


def test_where_auto_is_taken(fakes, monkeypatch):
    fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)

    def see():
        assert fastbp.engine().name == fastbp.Dense(2, 3).engine.name == "numpy"
        model = small_model(None)
        assert model.chooses_engine and model.engine.name == "numpy"
        assert model.fit(X, Y, epochs=1).engine.name == "fast"
        assert not small_model("numpy").chooses_engine

    with fastbp.use("auto") as engine:
        assert engine.name == "numpy"
        see()
    assert not small_model(None).chooses_engine
    fastbp.set_default("auto")
    see()
    with fastbp.use("numpy"):
        assert not small_model(None).chooses_engine
    fastbp.set_default(None)
    monkeypatch.setenv("FASTBP_ENGINE", "auto")
    see()
    assert fastbp.engine("auto").name == "numpy" and fastbp.Dense(2, 3, engine="auto").engine.name == "numpy"


def test_before_training_it_is_numpy(fakes, clock):
    fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)
    model = small_model("auto")
    model.predict(X), model.evaluate(X, Y), model.gradients(X, Y), model.forward(X)
    assert model.engine.name == "numpy" and clock.now == 0


@pytest.mark.parametrize("fitted", [False, True])
def test_copies_and_files_keep_it(fakes, fitted, tmp_path):
    made = fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)
    model = trained() if fitted else small_model("auto")
    model.save(tmp_path / "m")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fastbp.load(tmp_path / "m")):
        assert again.chooses_engine and state_of(again) == state_of(model)
        assert again.fit(X, Y, epochs=1).engine is made["fast"]
    assert not fastbp.load(tmp_path / "m", engine="numpy").chooses_engine
    fastbp.set_default("numpy")
    assert not fastbp.load(tmp_path / "m").chooses_engine
    fastbp.set_default(None)
    small_model("numpy").save(tmp_path / "n")
    assert not fastbp.load(tmp_path / "n").chooses_engine
    assert fastbp.load(tmp_path / "n", engine="auto").chooses_engine


def test_a_checkpoint_goes_on_with_the_engine_that_it_had(fakes, tmp_path):
    made = fakes(a=lambda n: 1e-5, b=lambda n: 2e-5)
    trained_through = small_model("auto").fit(X, Y, epochs=4)
    small_model("auto").fit(X, Y, epochs=2, checkpoint=tmp_path / "c")
    made["a"].seconds = lambda n: 3e-5
    forget_all(tmp_path / "kept")
    resumed = small_model("auto").fit(X, Y, epochs=4, checkpoint=tmp_path / "c", resume=True)
    assert resumed.engine is made["a"] and state_of(resumed) == state_of(trained_through)
    assert small_model("auto").fit(X, Y, epochs=1).engine is made["b"]


BROUGHT = """
import time
from fastbp.kernels.engine import CallByCall
from fastbp.kernels.numpy_engine import NumpyEngine
class Slow(CallByCall):
    def run(self, steps):
        time.sleep(0.005 * steps)
        super().run(steps)
class Abacus(NumpyEngine):
    name, device = "abacus", "wood"
    def program(self, calls):
        return Slow(self, calls)
"""


def test_engines_of_other_packages_are_timed_too(installed, info):
    installed(BROUGHT, abacus="brought:Abacus")
    forget()
    assert trained().engine.name != "abacus"
    assert re.search(r"auto takes \w+ \(.*abacus \d{4,}\.\d\b", info.text)
    assert auto.here().engines["abacus"] == "wood" and auto.here().versions["brought"] == "1.0"
    assert auto.here().versions["numpy"] == importlib.metadata.version("numpy")


def test_the_command_line(fakes, capsys, tmp_path):
    fakes(slow=lambda n: 2e-5, fast=lambda n: 1e-5)
    assert main(["train", "spiral", "--epochs", "3", "--engine", "auto", "--save", str(tmp_path / "m")]) == 0
    assert re.search(r"^engine +fast \(auto\)$", capsys.readouterr().out, re.MULTILINE)
    assert fastbp.load(tmp_path / "m").chooses_engine


@pytest.fixture
def perceptrons():
    pytest.importorskip("sklearn")
    from fastbp import estimators

    return estimators


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
@pytest.mark.parametrize("sparse", [False, True])
def test_estimators(perceptrons, winner, solver, sparse):
    table = X
    if sparse:
        table = pytest.importorskip("scipy.sparse").csr_matrix(X)
    options = {"hidden_layer_sizes": (8,), "max_iter": 5, "solver": solver, "random_state": 0, "batch_size": 16}
    options |= {"dropout": 0.2, "early_stopping": True} if solver != "lbfgs" else {}
    fixed, free, again = (
        perceptrons.MLPClassifier(engine=engine, **options).fit(table, Y) for engine in (winner, "auto", "auto")
    )
    assert free.engine_ == winner.name and free.get_params()["engine"] == "auto"
    for model in (free, again, pickle.loads(pickle.dumps(free))):
        np.testing.assert_array_equal(model.predict_proba(table), fixed.predict_proba(table))
        assert [x.tobytes() for x in model.coefs_] == [x.tobytes() for x in fixed.coefs_]


def test_partial_fit(perceptrons, winner):
    models = [perceptrons.MLPClassifier((8,), engine=engine, random_state=0) for engine in (winner, "auto")]
    for model in models:
        for _ in range(3):
            model.partial_fit(X, Y, classes=[0, 1, 2])
    assert models[1].engine_ == winner.name
    np.testing.assert_array_equal(models[1].coefs_[0], models[0].coefs_[0])
