"""The benchmark suite: what is wrong is not timed, and figures are what was measured, with a clock under control."""

import json
import math
import re
import statistics
from dataclasses import replace

import numpy as np
import pytest

import fastbp
from fastbp.__main__ import main
from fastbp.benchmarks import devices, faces, machine, report
from fastbp.benchmarks.cases import Case, Turn, calls_in, measure, time_group
from fastbp.benchmarks.machine import Look, Roofs, attainable
from fastbp.benchmarks.ops import SIZES, op_cases, problem
from fastbp.kernels import numpy_engine
from fastbp.kernels.numpy_engine import NumpyEngine
from fastbp.kernels.ops import OPS

from .conftest import ENGINES


class FakeTime:
    """A clock that only moves when somebody works."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    thread_time = perf_counter

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    for module in ("cases", "devices", "faces"):
        monkeypatch.setattr(f"fastbp.benchmarks.{module}.time", fake)
    return fake


@pytest.fixture
def calm(monkeypatch):
    """Spare tests the measuring of the machine."""
    monkeypatch.setattr(machine, "look", lambda: Look(1e11, 1.0))
    for module in ("cases", "suite"):
        monkeypatch.setattr(f"fastbp.benchmarks.{module}.look", lambda: Look(1e11, 1.0))
    roofs = Roofs({"float32": 1e11, "float64": 5e10}, [(1 << 15, 1e11), (1 << 27, 1e10)], 1e11)
    monkeypatch.setattr("fastbp.benchmarks.suite.measure_roofs", lambda quick: roofs)
    monkeypatch.setattr("fastbp.benchmarks.suite.machine", lambda: ABOUT)
    monkeypatch.setattr("fastbp.benchmarks.suite.doubts", lambda looks, load: [])


ABOUT = {
    "date": "2026-01-01T00:00+00:00",
    "cpu": "a CPU",
    "cores": 2,
    "usable_cores": 2,
    "system": "a system",
    "blas": [{"name": "openblas 1", "architecture": "Z", "num_threads": 2}],
    "pinned": {},
    "python": "3.12",
    "versions": {"numpy": "2.0", "cupy": None},
}


def planted(op, wrong):
    """A NumPy engine whose kernel for `op` is another function."""

    class Planted(NumpyEngine):
        name = "planted"

        def kernel(self, which, arguments):
            return wrong if which.name == op else super().kernel(which, arguments)

    return Planted()


def a_bit_off(x, y):
    np.maximum(x, 0, out=y)
    y[-1, -1] += 0.001


def off_beyond_64_rows(x, y):
    np.maximum(x, 0, out=y)
    if len(y) > 64:
        y[64:] = 0


def raises(x, y):
    raise ZeroDivisionError("oh")


# a planted wrong kernel


@pytest.mark.parametrize(
    ("wrong", "size", "said"),
    [
        (a_bit_off, "small", "relu_forward by planted is wrong, small, float32"),
        (off_beyond_64_rows, "medium", "relu_forward by planted is wrong, medium, float32"),
        (raises, "small", r"ZeroDivisionError\('oh'\)"),
    ],
)
def test_a_wrong_kernel_is_not_timed_and_hides_no_other(wrong, size, said):
    engines = [fastbp.engine("numpy"), planted("relu_forward", wrong)]
    rows, _ = measure(list(op_cases(["relu_forward"], engines, [size], ["float32"])), 2, 1e-4)
    found = {row["who"]: row for row in rows}
    assert set(found) == {"numpy", "planted", "notebook"}
    assert found["planted"]["seconds"] == []
    assert re.search(said, found["planted"]["error"])
    for who in ("numpy", "notebook"):
        assert len(found[who]["seconds"]) == 2
        assert "error" not in found[who]


@pytest.mark.parametrize("op", ["sgd", "dense_forward", "softmax_cross_entropy"])
def test_what_an_op_leaves_out_is_found(op):
    engines = [planted(op, lambda *arguments: None)]
    rows, _ = measure(list(op_cases([op], engines, ["small"], ["float64"])), 1, 1e-4)
    assert "wrong" in next(row for row in rows if row["who"] == "planted")["error"]


def test_a_wrong_kernel_ends_the_command_with_1(monkeypatch, capsys, calm, tmp_path):
    monkeypatch.setitem(numpy_engine.KERNELS, "relu_forward", a_bit_off)
    arguments = ["bench", "--quick", "--ops", "relu_forward", "--engines", "numpy", "--sizes", "small"]
    assert main([*arguments, "--json", str(tmp_path / "a.json")]) == 1
    out = capsys.readouterr().out
    assert "WRONG RESULTS, not timed" in out
    assert "relu_forward by numpy is wrong" in out
    assert main(["bench", "--from", str(tmp_path / "a.json")]) == 1


def test_a_wrong_kernel_fails_the_face_of_pytest():
    class Benchmark:
        disabled = False

    (case, *_) = op_cases(["relu_forward"], [planted("relu_forward", a_bit_off)], ["small"], ["float32"])
    with pytest.raises(AssertionError, match="relu_forward by planted is wrong"):
        faces.bench(Benchmark(), case)


# what is measured


@pytest.mark.parametrize("name", OPS)
def test_each_op_is_a_case_of_each_engine_that_has_it(name):
    engines = [fastbp.engine(engine) for engine in ENGINES]
    cases = list(op_cases([name], engines))
    able = [engine.name for engine in engines if engine.supports(OPS[name])]
    for size in SIZES:
        for dtype in ("float32", "float64"):
            who = [case.who for case in cases if (case.size, case.dtype) == (size, dtype)]
            assert who[: len(able)] == able
    assert all(case.flops == OPS[name].flops(case.sizes) for case in cases)
    tables = "next_batch", "next_rate", "take", "take_labels", "take_weights"
    whole = name in tables or name.startswith("sparse")  # which are read in part
    for case in cases:
        assert case.bytes == OPS[name].bytes(case.sizes, np.dtype(case.dtype)) or whole


def test_of_a_table_only_the_rows_of_a_batch_count():
    cases = op_cases(["take", "next_rate"], [fastbp.engine("numpy")], ["small"], ["float32"])
    assert [case.bytes for case in cases] == [32 * (64 * 4 + 8 + 64 * 4), 8 + 2 * 8 + 2 * 8]
    cases = op_cases(["sparse_rows"], [fastbp.engine("numpy")], ["small"], ["float32"])
    stored = 32 * 10_000 // 2000
    assert [case.bytes for case in cases] == [stored * (4 + 8) + 32 * 3 * 8 + (1 + 32) * 64 * 4]


@pytest.mark.parametrize(
    ("op", "ways"),
    [
        ("softmax_backward", {"numpy", "notebook", "Jacobian einsum", "closed form"}),
        ("softmax_cross_entropy", {"numpy", "numpy, four ops", "notebook"}),
        ("dense_forward", {"numpy", "notebook"}),
    ],
)
def test_the_notebooks_ways_are_right(op, ways):
    cases = list(op_cases([op], [fastbp.engine("numpy")], ["small", "medium"]))
    assert {case.who for case in cases} == ways
    for case in cases:
        case.check()


@pytest.mark.parametrize("name", ["decay", "sgd", "next_batch", "adam", "next_rate", "l2_loss"])
def test_each_turn_starts_anew(name, engine):
    """So that what is updated in place neither runs out of rows nor fades away."""
    (case,) = [x for x in op_cases([name], [engine], ["small"], ["float32"]) if x.who == engine.name]
    turn = case.prepare()
    for _ in range(3):
        turn.reset()
        with np.errstate(all="raise"):
            turn.run(case.most)


def case_of(who, seconds, clock, **options):
    """A case that takes so many seconds, the first time ten times as many."""
    calls = []

    def run(n):
        clock.now += n * seconds * (1 if calls else 10)
        calls.append(n)

    return Case("ops", "an op", who, lambda: Turn(run), lambda: None, **options), calls


def test_seconds_are_those_of_one_call(clock):
    (fast, fast_calls), (slow, slow_calls) = case_of("fast", 1e-5, clock), case_of("slow", 3e-3, clock, parts=30)
    taken = time_group([fast, slow], 4, 0.01)
    assert taken["fast"] == pytest.approx([1e-5] * 4)
    assert taken["slow"] == pytest.approx([1e-4] * 4)  # a call has 30 parts
    assert fast_calls[-4:] == [1000] * 4  # 10 ms
    assert slow_calls[-4:] == [3] * 4


@pytest.mark.parametrize(
    ("seconds", "most", "calls"), [(1e-3, 1000, 10), (1.0, 1000, 1), (1e-9, 1000, 1000), (1e-3, 4, 4)]
)
def test_a_turn_fills_its_time(clock, seconds, most, calls):
    case, _ = case_of("a", seconds, clock)
    assert calls_in(case.prepare(), 0.01, most) == calls


def test_what_a_case_leaves_awake_is_waited_for(clock):
    case, _ = case_of("a", 0.01, clock, awake=5.0)
    assert time_group([case], 2, 0.01)["a"] == pytest.approx([0.01, 0.01])
    assert clock.now > 10


def test_passes_spread_the_turns_of_a_case_over_the_run(clock, calm):
    order, checks, seen = [], [], []

    def one(name):
        case, _ = case_of("a", 0.01, clock)

        def prepare():
            order.append(name)
            return case.prepare()

        return replace(case, name=name, prepare=prepare, check=lambda: checks.append(name))

    rows, looks = measure([one("first"), one("second")], 5, 0.01, lambda case: seen.append(case.name), passes=2)
    assert order == seen == ["first", "second"] * 2
    assert checks == ["first", "second"]
    assert [row["seconds"] for row in rows] == [pytest.approx([0.01] * 5)] * 2
    assert len(looks) == 4


# the roofline


def test_the_roof_is_the_slower_of_computing_and_moving():
    roofs = Roofs({"float32": 100.0, "float64": 50.0}, [(1000, 40.0), (100_000, 10.0)], None)
    assert attainable(roofs, "float32", 1000, 100) == 10  # 100 bytes at 40 a second take 2.5 s
    assert attainable(roofs, "float64", 1000, 100) == 20
    assert attainable(roofs, "float32", 10, 400) == 10  # in a cache
    assert attainable(roofs, "float32", 10, 4000) == 400  # not in it
    assert attainable(roofs, "float32", 0, 1_000_000) == 100_000  # beyond what was copied


def test_roofs_are_measured():
    roofs = machine.measure_roofs(quick=True)
    assert set(roofs.flops) == {"float32", "float64"}
    assert all(speed > 0 for _, speed in roofs.copies)
    assert [size for size, _ in roofs.copies] == sorted(size for size, _ in roofs.copies)
    assert (roofs.core is None) == ("numba" not in ENGINES)
    assert 0 < machine.look().share <= 1


# doubts


CALM = [Look(1e11, 1.0)] * 10


@pytest.mark.parametrize(
    ("looks", "load", "threads", "pins", "said"),
    [
        (CALM, 0.1, 2, [], []),
        ([Look(None, 1.0)], None, 2, [], []),
        ([Look(1e11, 0.6)] * 10, 0.1, 2, [], ["the machine is busy: this process got 60% of the core"]),
        (CALM, 3.5, 2, [], ["the machine may be busy: its load was 3.5 at the start, on 2 cores"]),
        (CALM[:5] + [Look(7e10, 1.0)] * 5, 0.1, 2, [], ["a core's peak went from 100 to 70 GFLOP/s"]),
        (CALM, 0.1, 8, [], ["oversubscribed: openblas runs 8 threads on 2 cores"]),
        (CALM, 0.1, 2, ["OPENBLAS_CORETYPE=Haswell ..."], ["BLAS is pinned: OPENBLAS_CORETYPE=Haswell"]),
    ],
)
def test_doubts(monkeypatch, looks, load, threads, pins, said):
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    monkeypatch.setattr(machine, "blas_libraries", lambda environment: [{"name": "openblas", "num_threads": threads}])
    monkeypatch.setattr(machine, "pins", lambda libraries: pins)
    found = machine.doubts(looks, load)
    assert len(found) == len(said)
    assert all(part in line for part, line in zip(said, found, strict=True))


# devices


class OnDevice(NumpyEngine):
    """NumPy that claims to be a device, and takes its time on a clock under control."""

    name, device = "fake", "cuda"

    def __init__(self, clock):
        self.clock, self.compiled, self.pending = clock, set(), 0.0
        self.timing = self

    def __reduce__(self):
        return type(self), (self.clock,)

    def asarray(self, x, dtype=None):
        self.clock.now += 0.5
        return super().asarray(x, dtype)

    def asnumpy(self, x):
        self.clock.now += 0.25
        return super().asnumpy(x)

    def compile(self, op, arguments):
        if op.name not in self.compiled:
            self.compiled.add(op.name)
            self.clock.now += 30.0

    def synchronize(self):
        self.clock.now += self.pending
        self.pending = 0.0

    def device_seconds(self, run):
        before = self.pending
        run()
        worked = self.pending - before
        self.synchronize()
        return worked

    def program(self, calls):
        engine, plain = self, super().program(calls)

        class Program:
            first = True

            def bind(self, **slots):
                plain.bind(**slots)

            def run(self, steps):
                for call in calls:
                    engine.compile(call.op, ())
                engine.clock.now += 1.0 * self.first + 0.01 * steps
                self.first = False
                engine.pending += 2.0 * steps
                plain.run(steps)

        return Program()


def test_a_devices_time_is_told_apart(clock):
    engine, op = OnDevice(clock), OPS["multiply"]
    sizes = {"B": 4, "N": 3}
    inputs = op.sample(np.random.default_rng(0), sizes, np.dtype(np.float32))
    found = devices.phases(engine, engine.timing, op, inputs, sizes)
    assert found == pytest.approx(
        {"transfer": 2 * 0.5 + 0.25, "compile": 30, "first call": 1 + 0.01 + 2, "launch": 0.01, "device": 2}
    )


@pytest.mark.parametrize(("op", "size"), [("multiply", "small"), ("next_batch", "medium")])
def test_an_op_on_a_device_is_waited_for_and_has_its_phases(clock, monkeypatch, op, size):
    monkeypatch.setattr("fastbp.benchmarks.cases.look", lambda: Look(None, 1.0))
    engine = OnDevice(clock)
    cases = [case for case in op_cases([op], [engine], [size], ["float32"]) if case.who == "fake"]
    shared = problem(op, size, "float32").inputs  # by all who compute this op
    before = [x.copy() for x in shared]
    rows, _ = measure(cases, 2, 0.01)
    for mine, x in zip(before, shared, strict=True):
        np.testing.assert_array_equal(x, mine)
    assert rows[0]["seconds"] == pytest.approx([2.01, 2.01], rel=0.01)
    assert set(rows[0]["phases"]) == {"transfer", "compile", "first call", "launch", "device"}
    about = {
        "settings": {"engines": ["fake"]},
        "rows": rows,
        "roofs": Roofs({"float32": 1.0}, [(1, 1.0)], None)._asdict(),
    }
    titles = [table.title for table in report.tables(about)]
    assert "Where the time of an op on a device goes" in titles


def test_a_device_without_timing_is_not_measured_as_if_it_were_the_host():
    class Blind(NumpyEngine):
        name, device = "blind", "cuda"

    with pytest.raises(ValueError, match=r"'blind' works on cuda, so .* attribute timing"):
        list(op_cases(["multiply"], [Blind()], ["small"]))
    assert devices.timing_of(fastbp.engine("numpy")) is None


# the report


def test_the_command_measures_and_reports(calm, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    where = {name: str(tmp_path / f"a.{name}") for name in ("json", "html")}
    what = "--quick --suites ops,steps,epochs --ops relu_forward,softmax_backward,next_batch --networks 2-64-3"
    how = ["--engines", "numpy", "--repeats", "2", "--pictures", str(tmp_path / "pictures")]
    code = main(["bench", *what.split(), *how, "--json", where["json"], "--html", where["html"]])
    out = capsys.readouterr().out
    assert code == 0, out
    for text in ("Ops, float32", "Several ways to one result", "A training step", "An epoch", "a CPU", "GEMMs alone"):
        assert text in out
    about = json.loads((tmp_path / "a.json").read_text())
    assert about["format"] == 1
    assert about["settings"]["engines"] == ["numpy"]
    assert {row["suite"] for row in about["rows"]} == {"ops", "steps", "epochs"}
    assert all(len(row["seconds"]) == 2 for row in about["rows"])
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert "softmax_backward" in page
    assert not [part for part in ("<script", "<link", "src=", "url(http") if part in page]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "ops.svg",
        "roofline.svg",
        "steps.svg",
        "tables.md",
    }
    assert main(["bench", "--from", where["json"], "--html", str(tmp_path / "b.html")]) == 0
    assert (tmp_path / "b.html").read_text(encoding="utf-8") == page


def row_of(who, seconds, name="relu_forward", **more):
    return {
        "suite": "ops", "name": name, "size": "small", "dtype": "float32", "who": who, "flops": 2000, "bytes": 4000,
        "sizes": {}, "seconds": seconds, **more,
    }  # fmt: skip


def test_tables_mark_the_fastest_and_give_ratios():
    rows = [row_of("numpy", [4e-6, 5e-6, 9e-6]), row_of("numba", [2e-6, 2e-6, 2e-6]), row_of("notebook", [2e-5])]
    roofs = Roofs({"float32": 1e10, "float64": 1e10}, [(1 << 20, 4e9)], None)
    about = {"settings": {"engines": ["numpy", "numba"]}, "rows": rows, "roofs": roofs._asdict()}
    (table,) = report.tables(about)
    assert table.rows == [
        ["relu_forward", "small", "5.00 us (2.50)", "2.00 us *", "20.0 us (10.00)", "1.00", "2.00", "50%"]
    ]
    assert "| 2.00 us * |" in table.markdown()
    assert "<td class=best>2.00 us *</td>" in table.html()
    lines = table.text().splitlines()
    assert lines[2].split() == ["op", "size", "numpy", "numba", "notebook", "GFLOP/s", "GB/s", "of", "roof"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ops", "dense_foward"], "--ops: there is no 'dense_foward'; did you mean dense_forward"),
        (["--engines", "nimba"], "engine must be one of numpy, numba, cupy or auto, got 'nimba'"),
        (["--against", "theano"], "--against: there is no 'theano'; known are torch, torch.compile, jax, sklearn"),
        (["--sizes", "huge"], "--sizes: there is no 'huge'; known are small, medium, large"),
        (["--dtypes", "float16"], "--dtypes: there is no 'float16'; did you mean float"),
        (["--networks", "3-3"], "--networks: there is no '3-3'; "),
        (["--suites", "all"], "--suites: there is no 'all'; known are ops, steps, epochs, accuracy"),
        (["--repeats", "0"], "--repeats must be a whole number of at least 1, got '0'"),
        (["--seeds", "x"], "--seeds must be a whole number of at least 1, got 'x'"),
        (["--from", "missing.json"], "no file 'missing.json'"),
        (["--json", "missing/a.json"], "cannot write 'missing/a.json'"),
        (["--compare", "missing.json", "b.json"], "no file 'missing.json'"),
        (["--compare", "a", "b", "--threshold", "x"], "--threshold must be a number from 0"),
    ],
)
def test_what_the_command_refuses(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastbp: error: ")
    assert said in line


def test_a_library_that_is_missing_is_said(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["bench", "--against", "sklearn", "--engines", "numpy"])
    assert "sklearn is not installed; the remedy: pip install scikit-learn" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"format": 99, "rows": []}', '{"rows": []}'])
def test_files_that_are_no_reports(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is no "):
        report.load(tmp_path / "a.json")


def test_time_text():
    assert [report.time_text(x) for x in (2.5e-9, 0.0, math.nan, 12.34, 1234.5)] == [
        "2.50 ns",
        "-",
        "-",
        "12.3 s",
        "1,234 s",
    ]


def test_the_face_of_pytest_gives_seconds_of_one_call(clock, monkeypatch):
    monkeypatch.setattr(faces, "roofs", lambda: Roofs({"float32": 1e9}, [(1 << 20, 1e9)], None))
    case, _ = case_of("a", 1e-4, clock, flops=1000, bytes=400)
    taken = []

    class Benchmark:
        disabled = False
        extra_info: dict = {}  # noqa: RUF012

        def pedantic(self, run, arguments, setup, rounds):
            for _ in range(rounds):
                setup()
                start = faces.CLOCK()
                run(*arguments)
                taken.append(faces.CLOCK() - start)
            self.stats = type("S", (), {"stats": type("S", (), {"median": statistics.median(taken)})})

    benchmark = Benchmark()
    faces.bench(benchmark, case)
    assert taken == pytest.approx([1e-4] * faces.ROUNDS)
    assert benchmark.extra_info == pytest.approx(
        {"flops": 1000, "bytes": 400, "GFLOP/s": 0.01, "GB/s": 0.004, "share of roof": 0.01}
    )
