"""What changed between runs, other libraries, and time to accuracy."""

import statistics

import numpy as np
import pytest

import fastbp
from fastbp.__main__ import main
from fastbp.benchmarks import accuracy
from fastbp.benchmarks.compare import changes, doubts_between, ratio_interval
from fastbp.benchmarks.libraries import LIBRARIES, check_installed
from fastbp.benchmarks.report import load, save, tables
from fastbp.benchmarks.training import check, contenders, gemms, notebook, task_of, training_cases

from .conftest import ENGINES
from .test_bench import ABOUT, row_of

ROOFS = {"flops": {"float32": 1e11, "float64": 5e10}, "copies": [[1 << 20, 1e10]], "core": None}


def installed(name):
    try:
        check_installed(name)
    except ImportError:
        return False
    return name != "torch.compile"


FOUND = [name for name in LIBRARIES if installed(name)]


def report_of(rows, **about):
    return {
        "format": 1, "machine": ABOUT, "settings": {"engines": ["numpy"]}, "roofs": ROOFS, "looks": [], "doubts": [],
        "rows": rows,
    } | about  # fmt: skip


def noisy(median, seed, n=11, spread=0.03):
    return list(median * (1 + spread * np.random.default_rng(seed).standard_normal(n)))


# comparing two runs


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (noisy(1, 0), noisy(1, 1), "same"),
        (noisy(1, 0), noisy(1.05, 1), "same"),  # less than the threshold
        (noisy(1, 0), noisy(2, 1), "slower"),
        (noisy(1, 0), noisy(0.5, 1), "faster"),
        (noisy(1, 0, spread=0.5), noisy(1.3, 1, spread=0.5), "same"),  # within noise
        ([1.0], [1.0], "same"),
    ],
)
def test_what_changed_beyond_noise(before, after, verdict):
    (change,) = changes(report_of([row_of("numpy", before)]), report_of([row_of("numpy", after)]))
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(np.median(after) / np.median(before))
    assert change.low <= change.ratio <= change.high


def test_the_interval_of_a_ratio_holds_it_as_often_as_it_says():
    held = 0
    for seed in range(100):
        low, high = ratio_interval(noisy(1, 2 * seed, 21), noisy(1.5, 2 * seed + 1, 21))
        held += low <= 1.5 <= high
    assert held >= 94  # 99 % of the time, but for the small samples


def test_noise_alone_is_seldom_a_change():
    rows = [[row_of("numpy", noisy(1e-6, 1000 * run + i), name=str(i)) for i in range(300)] for run in (1, 2)]
    assert sum(change.verdict != "same" for change in changes(*map(report_of, rows))) == 0


@pytest.mark.parametrize(
    ("factor", "error", "code", "said"),
    [
        (1.0, None, 0, "2 cases: 0 slower, 0 faster, 0 wrong, 2 same"),
        (2.0, None, 1, "2 cases: 1 slower, 0 faster, 0 wrong, 1 same"),
        (0.5, None, 0, "2 cases: 0 slower, 1 faster, 0 wrong, 1 same"),
        (1.0, "it is wrong", 1, "2 cases: 0 slower, 0 faster, 1 wrong, 1 same"),
    ],
)
def test_the_exit_code_of_compare(factor, error, code, said, tmp_path, capsys):
    after = row_of("numpy", [] if error else noisy(1e-6 * factor, 1), **({"error": error} if error else {}))
    same = row_of("numba", noisy(1e-6, 3))
    save(tmp_path / "a.json", report_of([row_of("numpy", noisy(1e-6, 0)), same, row_of("gone", [1.0])]))
    save(tmp_path / "b.json", report_of([after, same, row_of("new", [1.0])]))
    assert main(["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == code
    assert said in capsys.readouterr().out


def test_the_threshold_of_compare(tmp_path):
    for name, median, seed in (("a", 1e-6, 0), ("b", 1.3e-6, 1)):
        save(tmp_path / f"{name}.json", report_of([row_of("numpy", noisy(median, seed))]))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert main(["bench", "--compare", *files]) == 1
    assert main(["bench", "--compare", *files, "--threshold", "0.5"]) == 0


def test_runs_with_nothing_in_common():
    with pytest.raises(ValueError, match="no case in common"):
        changes(report_of([row_of("numpy", [1.0])]), report_of([row_of("numba", [1.0])]))


def test_what_makes_a_comparison_doubtful():
    slow = ROOFS | {"flops": {"float32": 5e10, "float64": 5e10}}
    other = report_of([], machine=ABOUT | {"cpu": "another CPU"}, roofs=slow, doubts=["it was busy"])
    assert doubts_between(report_of([]), report_of([])) == []
    assert doubts_between(report_of([]), other) == [
        "cpu was a CPU, is another CPU",
        "the machine itself multiplies float32 matrices 0.50 times as fast as before",
        "in the second run, it was busy",
    ]


def test_a_report_comes_back_as_it_was(tmp_path):
    report = report_of([row_of("numpy", [1e-6, 2e-6])])
    save(tmp_path / "a.json", report)
    assert load(tmp_path / "a.json") == report


# training, beside other libraries


@pytest.mark.parametrize("library", FOUND)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_libraries_take_the_same_steps(library, optimizer):
    task = task_of("64-128-10").start(20)
    task = type(task)(task.X, task.y, task.weights, task.batch, optimizer, 0.001)
    trainers = [accuracy.ByFastbp(task, fastbp.engine("numpy")), LIBRARIES[library](task)]
    for trainer in trainers:
        data = trainer.load(task.X, task.y)
        for _ in range(2):
            trainer.epoch(data)
    ours, theirs = trainers
    for a, b, before in zip(ours.weights(), theirs.weights(), task.weights, strict=True):
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(a - before)  # Adam magnifies rounding
    assert np.mean(ours.predict(task.X) == theirs.predict(task.X)) > 0.99


def test_a_contender_that_trains_otherwise_is_found():
    task = task_of("2-64-3")

    def twice_the_rate(short):
        return notebook(type(short)(short.X, short.y, short.weights, short.batch, "sgd", 2 * short.lr))

    check(task, "right", notebook)
    check(task, "GEMMs alone", gemms)
    with pytest.raises(AssertionError, match="wrong one trains layer 0 wrong"):
        check(task, "wrong one", twice_the_rate)


def test_flops_and_bytes_of_a_step():
    case = next(iter(training_cases(["30-100-2"], [fastbp.engine("numpy")])))
    # three products of 200 x 30 x 100 and 200 x 100 x 2, without the inputs' gradient of the first layer
    assert case.flops == 2 * 200 * (2 * 30 * 100 + 3 * 100 * 2)
    forward = (6000 + 3000 + 20_000) + (20_000 + 200 + 400)
    by_weights_and_update = (6000 + 20_000 + 2 * 3000) + (20_000 + 400 + 2 * 200)
    by_inputs = 400 + 200 + 20_000
    assert case.bytes == 4 * (forward + by_weights_and_update + by_inputs)
    assert case.parts == 5 * 200


def test_who_trains():
    engines = [fastbp.engine(name) for name in ENGINES]
    ours = {f"fastbp {name}" for name in ENGINES} | ({"fastbp numba, 1 thread"} if "numba" in ENGINES else set())
    assert set(contenders(engines, FOUND)) == ours | {"notebook", "GEMMs alone"} | set(FOUND)


# time to accuracy


def tiny():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 40)
    return (np.eye(3)[y] + 0.05 * rng.standard_normal((120, 3))).astype(np.float32), y


@pytest.fixture
def goal(monkeypatch):
    monkeypatch.setitem(accuracy.GOALS, "tiny", accuracy.Goal(tiny, (3, 8, 3), 10, 90, 0.03, 0.9, 8))
    monkeypatch.setattr("fastbp.benchmarks.accuracy.AWAKE", 0.0)
    return "tiny"


def test_all_reach_the_goal_alike(goal):
    who = accuracy.contenders([fastbp.engine(name) for name in ENGINES], FOUND)
    rows = {row["who"]: row for row in accuracy.reach(goal, who, 3)}
    assert list(rows) == [*(f"fastbp {name}" for name in ENGINES), *FOUND]
    first = rows["fastbp numpy"]
    for row in rows.values():
        assert "error" not in row
        assert row["epochs"] == pytest.approx(first["epochs"], abs=1)
        assert len(row["seconds"]) == 3
        assert row["curve"] == pytest.approx(first["curve"], abs=0.03)
        assert row["curve_seconds"] == sorted(row["curve_seconds"])
        assert row["sizes"] == {"batch": 10, "rows": 90, "held out": 30}


def test_who_learns_otherwise_is_found(goal):
    slow = accuracy.contenders([fastbp.engine("numpy")])
    slow["slow one"] = lambda task: slow["fastbp numpy"](
        type(task)(task.X, task.y, task.weights, task.batch, "adam", task.lr / 10)
    )
    rows = {row["who"]: row for row in accuracy.reach(goal, slow, 2)}
    assert "error" not in rows["fastbp numpy"]
    assert "slow one does not learn as fastbp numpy does" in rows["slow one"]["error"]
    assert statistics.fmean(rows["slow one"]["curve"]) < statistics.fmean(rows["fastbp numpy"]["curve"]) - 0.02


def test_a_seed_that_does_not_get_there_counts_with_all_its_epochs(goal, monkeypatch):
    monkeypatch.setitem(accuracy.GOALS, "tiny", accuracy.GOALS["tiny"]._replace(target=1.01))
    (row,) = accuracy.reach(goal, accuracy.contenders([fastbp.engine("numpy")]), 2)
    assert row["epochs"] == [None, None]
    assert statistics.median(row["seconds"]) == pytest.approx(row["curve_seconds"][-1])
    (table,) = tables(report_of([row]))
    assert table.rows[1] == ["  epochs", "2 of 2 seeds do not get there"]


@pytest.mark.parametrize("name", ["digits to 97 %", "MNIST 5000 to 93 %"])
def test_the_data_are_there_and_batches_divide_them(name):
    goal = accuracy.GOALS[name]
    try:
        X, y = goal.load()
    except ImportError as error:
        pytest.skip(str(error))
    assert (X.shape[1], len(np.unique(y))) == (goal.sizes[0], goal.sizes[-1])
    assert X.dtype == np.float32
    assert (X.min(), X.max()) == (0, 1)
    assert goal.train % goal.batch == 0
    assert len(X) - goal.train >= 300
