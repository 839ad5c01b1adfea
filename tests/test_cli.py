"""The command line: each command in process, and once as a process of its own."""

import csv
import io
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import fastbp
from fastbp.__main__ import main
from fastbp.files import read_metadata
from fastbp.info import pins
from fastbp.kernels import numpy_engine
from fastbp.machine import usable_cores


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """Two kinds of flowers that a network tells apart, in a table with all kinds of columns."""
    rng = np.random.default_rng(0)
    kind = rng.choice(["rose", "tulip"], 120)
    frame = pd.DataFrame(
        {
            "length": np.where(kind == "rose", 3.0, 5.0) + 0.3 * rng.standard_normal(120),
            "same": 7,
            "colour": rng.choice(["red", "white", None], 120),
            "wild": rng.random(120) < 0.5,
            "kind": kind,
        }
    )
    frame.loc[5, "length"] = np.nan
    path = tmp_path_factory.mktemp("flowers") / "flowers.csv"
    frame.to_csv(path, index=False)
    return frame, path


@pytest.fixture(scope="module")
def model(flowers):
    path = flowers[1].with_suffix(".model")
    assert main(["train", str(flowers[1]), "--hidden", "8", "--epochs", "40", "--lr", "0.01", "--save", str(path)]) == 0
    return path


def error_of(arguments, capsys):
    """The one line that a wrong command leaves on stderr."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "fastbp: note:" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("fastbp: error: ")
    return lines[0]


def held_out(text):
    return float(re.search(r"held out    accuracy ([\d.]+)%", text)[1])


@pytest.mark.parametrize(("name", "least"), [("digits", 96), ("spiral", 95)])
def test_the_data_sets_are_learnt_with_the_default_options(name, least, capsys):
    assert main(["train", name, "--engine", "numba"]) == 0
    text = capsys.readouterr().out
    assert held_out(text) > least
    assert 5 <= len(re.findall(r"^ +\d+ .*%$", text, re.MULTILINE)) <= 10


def test_the_summary(flowers, capsys):
    main(["train", str(flowers[1]), "--hidden", "8,4", "--epochs", "3", "--engine", "numpy", "--quiet"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["engine", "network", "time", "speed", "held"]
    assert lines[0].split() == ["engine", "numpy"]
    # inputs: length, same, three colours (one of them missing), two of wild
    assert lines[1].endswith(f"7-8-4-2, {7 * 8 + 8 + 8 * 4 + 4 + 4 * 2 + 2} parameters")


def test_it_says_what_was_taken_for_what(flowers, capsys):
    main(["train", str(flowers[1]), "--epochs", "1"])
    captured = capsys.readouterr()
    assert "120 rows, 96 to train on and 24 held out" in captured.out
    assert "'kind': classification of texts, 2 classes (taken by default" in captured.out
    assert "column 'length': 1 of 120 numbers are missing; the mean stands in" in captured.err


def test_one_seed_gives_one_run(flowers, capsys):
    def run(seed):
        main(["train", str(flowers[1]), "--epochs", "2", "--seed", seed])
        return re.sub(r"^(time|speed) .*$", "", capsys.readouterr().out, flags=re.MULTILINE)

    assert run("1") == run("1")
    assert run("1") != run("2")


def test_predict_gives_names_and_probabilities_back(flowers, model, tmp_path):
    frame, path = flowers
    assert main(["predict", str(model), str(path), "--output", str(tmp_path / "out.csv")]) == 0
    out = pd.read_csv(tmp_path / "out.csv")
    assert list(out) == ["label", "probability_rose", "probability_tulip"]
    assert (out["label"] == frame["kind"]).mean() > 0.9
    np.testing.assert_allclose(out["probability_rose"] + out["probability_tulip"], 1, rtol=1e-5)
    assert ((out["probability_rose"] > 0.5) == (out["label"] == "rose")).all()


def test_predict_standardises_as_training_did(flowers, model, capsys):
    """The same numbers from the model and its description, by hand."""
    frame, path = flowers
    about = {x["name"]: x for x in read_metadata(model)["table"]["features"]}
    length = (frame["length"].fillna(about["length"]["mean"]) - about["length"]["mean"]) / about["length"]["std"]
    columns = [length, 0 * length]
    columns += [frame["colour"].isna() if x is None else frame["colour"] == x for x in about["colour"]["values"]]
    columns += [frame["wild"].astype(str) == x for x in about["wild"]["values"]]
    expected = fastbp.load(model).predict_proba(np.column_stack(columns).astype(np.float32))
    main(["predict", str(model), str(path)])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    np.testing.assert_allclose([float(row["probability_tulip"]) for row in rows], expected[:, 1], rtol=1e-4, atol=1e-7)


def test_predict_needs_neither_the_target_nor_an_order_of_columns(flowers, model, tmp_path, capsys):
    frame, path = flowers
    main(["predict", str(model), str(path)])
    expected = capsys.readouterr().out
    other = frame[["wild", "colour", "length", "same"]].assign(more="x")
    other.to_parquet(tmp_path / "other.parquet")
    main(["predict", str(model), str(tmp_path / "other.parquet")])
    assert capsys.readouterr().out == expected


def test_predict_with_a_model_that_says_other_outputs_than_it_has(flowers, model, tmp_path, capsys):
    loaded, about = fastbp.load(model), read_metadata(model)
    about["table"]["target"]["values"].append("lily")
    loaded.save(tmp_path / "more", about)
    assert "says 3 outputs, but has (2,)" in error_of(["predict", tmp_path / "more", flowers[1]], capsys)


def test_predict_names_a_missing_column(flowers, model, tmp_path, capsys):
    flowers[0].drop(columns=["length", "wild"]).to_csv(tmp_path / "less.csv")
    assert "no column 'length', 'wild'" in error_of(["predict", model, tmp_path / "less.csv"], capsys)


def test_regression_comes_back_in_its_own_units(tmp_path, capsys):
    X = np.random.default_rng(0).standard_normal((300, 2))
    y = 5000 + 100 * X[:, 0] - 50 * X[:, 1]
    np.savez(tmp_path / "t.npz", X=X, y=y)
    arguments = ["--hidden", "16", "--epochs", "60", "--lr", "0.01", "--save", str(tmp_path / "m")]
    main(["train", str(tmp_path / "t.npz"), *arguments])
    text = capsys.readouterr().out
    assert "regression of floats" in text
    r2, error = re.search(r"held out    R2 ([\d.]+), root mean square error ([\d.]+) on 60 rows", text).groups()
    main(["predict", str(tmp_path / "m"), str(tmp_path / "t.npz")])
    out = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(out) == ["prediction"]
    assert np.abs(out["prediction"] - y).mean() < 5
    assert float(r2) > 0.99
    assert float(error) < 10


def test_r2_and_error_are_those_of_scikit_learn(tmp_path, capsys):
    from sklearn.metrics import mean_squared_error, r2_score

    from fastbp.encoding import split_rows

    X = np.random.default_rng(1).standard_normal((100, 2))
    y = X[:, 0] ** 2 + 10
    np.savez(tmp_path / "t.npz", X=X, y=y)
    main(["train", str(tmp_path / "t.npz"), "--epochs", "5", "--save", str(tmp_path / "m"), "--quiet"])
    text = capsys.readouterr().out
    main(["predict", str(tmp_path / "m"), str(tmp_path / "t.npz")])
    prediction = pd.read_csv(io.StringIO(capsys.readouterr().out))["prediction"]
    _, test = split_rows(np.zeros(100), 0.2, seed=0)
    expected = r2_score(y[test], prediction[test]), mean_squared_error(y[test], prediction[test]) ** 0.5
    found = re.search(r"R2 (-?[\d.]+), root mean square error ([\d.]+)", text).groups()
    np.testing.assert_allclose([float(x) for x in found], expected, atol=1e-3)


def test_the_task_can_be_chosen(tmp_path, capsys):
    path = tmp_path / "t.csv"
    pd.DataFrame({"a": range(40), "y": np.arange(40) % 4}).to_csv(path, index=False)
    for options, expected in (([], "4 classes"), (["--task", "regression"], "regression of integers")):
        main(["train", str(path), "--epochs", "1", *options])
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(("source", "pictures"), [("spiral", 2), ("digits", 1)])
def test_plot(source, pictures, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append((self, path)))
    main(["train", source, "--epochs", "3", "--plot", str(tmp_path / "p.png")])
    figure, path = drawn[0]
    assert path == str(tmp_path / "p.png")
    titles = ["Loss", "Decision regions and held-out rows"]
    assert [axes.get_title() for axes in figure.axes] == titles[:pictures]
    training, held_out = figure.axes[0].lines
    assert list(training.get_xdata()) == list(held_out.get_xdata()) == [1, 2, 3]


def test_a_plot_is_a_png(flowers, tmp_path):
    main(["train", str(flowers[1]), "--epochs", "1", "--plot", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_check_prints_a_table(capsys):
    assert main(["check", "numpy", "--ops", "relu_forward, adam"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["op", "values", "extremes"]
    assert [line.split()[:2] for line in lines[1:3]] == [["relu_forward", "ok"], ["adam", "ok"]]
    assert lines[-1] == "engine numpy: 2 ops, 0 of 16 promises broken; errors are shares of the tolerance"


def test_check_fails_where_an_engine_does(capsys, monkeypatch):
    def negated(x, y):
        np.minimum(x, 0, out=y)

    monkeypatch.setitem(numpy_engine.KERNELS, "relu_forward", negated)
    assert main(["check", "numpy", "--ops", "relu_forward"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"relu_forward +FAILED", out) and "relu_forward, values: y[" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["abacus"], "engine must be one of .*abacus"),
        (["numpy", "--ops", "relu,adam"], "ops must be names of ops such as .* got 'relu'"),
        (["numpy", "--ops", "adam,relu_foward"], "ops must be names of ops such as relu_forward.* got 'relu_foward'"),
        (["numpy", "--ops", ""], "ops must be names of ops such as next_batch.* got ''"),
    ],
)
def test_check_of_what_is_not_there(arguments, message, capsys):
    assert re.search(message, error_of(["check", *arguments], capsys))


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (fastbp.__version__, np.__version__, sys.version.split()[0], "numba", "cores", "BLAS"):
        assert word in text
    assert re.search(r"numpy +cpu +available", text)


@pytest.mark.parametrize(("quota", "cores"), [("50000 100000", 1), ("max 100000", None), ("99999999 100000", None)])
def test_cores_are_those_that_a_container_may_use(quota, cores, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbp.machine.QUOTA", tmp_path / "cpu.max")
    without = usable_cores()
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert usable_cores() == (cores or without)


def test_info_warns_of_a_pinned_blas(monkeypatch):
    monkeypatch.delenv("OPENBLAS_L2_SIZE", raising=False)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    answers = {True: "Prescott", False: "SkylakeX"}

    def libraries(environment):
        return [{"architecture": answers["OPENBLAS_CORETYPE" in environment], "filepath": "libopenblas.so"}]

    monkeypatch.setattr("fastbp.info.blas_libraries", libraries)
    (line,) = pins(libraries({"OPENBLAS_CORETYPE": "Prescott"}))
    assert "Prescott" in line and "SkylakeX" in line and line.endswith("the remedy: unset OPENBLAS_CORETYPE")
    answers[False] = "Prescott"
    assert pins(libraries({})) == []


def test_info_warns_of_a_small_cache_size(monkeypatch):
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "1")
    assert pins([])[0].endswith("the remedy: unset OPENBLAS_L2_SIZE")
    monkeypatch.delenv("OPENBLAS_L2_SIZE")
    assert pins([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "abacus"], "engine must be one of .*abacus"),
        (["--hidden", "12,x"], "--hidden: expected whole numbers with commas.*'12,x'"),
        (["--hidden", "0"], "--hidden"),
        (["--hidden", "99999999999"], "not enough memory: Unable to allocate"),
        (["--epochs", "0"], "--epochs: expected a whole number of at least 1"),
        (["--epochs", 30 * "9"], "--epochs: expected a whole number of at least 1 and at most 18 digits, got '999"),
        (["--batch-size", "1.5"], "--batch-size"),
        (["--lr", "nan"], "--lr: expected a number above 0"),
        (["--test-size", "1"], "--test-size: expected a number above 0 and below 1"),
        (["--seed", "-1"], "--seed"),
        (["--target", "price"], "no column 'price'; the columns are 'length', 'same', 'colour', 'wild', 'kind'"),
        (["--task", "regression"], "'kind' must hold numbers"),
        (["--plot", "nowhere/p.png"], "cannot write 'nowhere/p.png'"),
        (["--plot", "p.doc"], "a picture's name must end in .png"),
        (["--save", "."], "cannot write '.'"),
        (["--lr", "1e30"], "the loss became"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_one_line(arguments, message, flowers, capsys):
    assert re.search(message, error_of(["train", flowers[1], *arguments], capsys))


def test_wrong_files_are_one_line(tmp_path, model, flowers, capsys):
    assert "no file 'no.csv'" in error_of(["train", "no.csv"], capsys)
    assert "no model file" in error_of(["predict", tmp_path / "no.model", flowers[1]], capsys)
    assert "not a model file" in error_of(["predict", flowers[1], flowers[1]], capsys)
    assert "no file 'no.csv'" in error_of(["predict", model, "no.csv"], capsys)
    (tmp_path / "one.csv").write_text("a,b\n1,x\n2,x\n")
    assert "'b' has one value only, x" in error_of(["train", tmp_path / "one.csv"], capsys)
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    assert "cannot read" in error_of(["train", tmp_path / "picture.csv"], capsys)


def test_a_model_saved_by_the_library_is_refused(tmp_path, flowers, capsys):
    fastbp.Sequential([fastbp.Dense(1, 1)]).save(tmp_path / "m")
    assert "'fastbp train' did not save it" in error_of(["predict", tmp_path / "m", flowers[1]], capsys)


def test_a_missing_engine_says_what_to_install(flowers, capsys, monkeypatch):
    if next(entry for entry in fastbp.engines() if entry.name == "cupy").available:
        pytest.skip("CuPy is installed")
    assert "pip install" in error_of(["train", flowers[1], "--engine", "cupy"], capsys)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("pandas", ["train", "FILE"]),
        ("sklearn.datasets", ["train", "digits"]),
        ("matplotlib", ["train", "spiral", "--plot", "p.png"]),
        ("safetensors", ["train", "spiral", "--save", "m"]),
    ],
)
def test_a_missing_extra_says_what_to_install(module, arguments, flowers, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    line = error_of([flowers[1] if x == "FILE" else x for x in arguments], capsys)
    assert line == f"fastbp: error: this needs {module.split('.')[0]}: pip install 'fastbp[cli]'"


def test_a_command_is_needed(capsys):
    assert "COMMAND" in error_of([], capsys)


def test_help_has_examples(capsys):
    for arguments in (["--help"], ["train", "--help"], ["predict", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert "fastbp predict houses.model new.csv" in capsys.readouterr().out


def test_ctrl_c(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastbp.__main__.load_table", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["train", "spiral"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\nfastbp: interrupted\n"


def test_as_a_process(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "fastbp", *arguments], capture_output=True, text=True)

    assert run("--version").stdout == f"fastbp {fastbp.__version__}\n"
    done = run("train", str(tmp_path / "no.csv"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"fastbp: error: no file '{tmp_path / 'no.csv'}'\n"


def test_a_reader_may_stop_early(flowers, model):
    command = f'"{sys.executable}" -m fastbp predict "{model}" "{flowers[1]}" | head -1'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stdout == "label,probability_rose,probability_tulip\n"
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_importing_fastbp_stays_light():
    code = "import sys, fastbp; print([x for x in ('pandas', 'sklearn', 'matplotlib', 'tqdm') if x in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
