"""The user's tables: what each column becomes, and what is refused. Expected values are worked out by hand."""

import datetime
import decimal
import json

import numpy as np
import pandas as pd
import pytest

from fastbp.encoding import Category, Encoder, Number, choose_task, prepare, split_rows
from fastbp.tables import load_table, read_table


def texts(*values):
    return np.array(values, object)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_numbers_are_standardised_and_come_back():
    number = Number.of("a", np.array([1, 3, 5]))
    deviation = np.sqrt((4 + 0 + 4) / 3)
    assert number == Number("a", 3.0, pytest.approx(deviation))
    np.testing.assert_allclose(number.encode(np.array([1, 3, 8])), [[-2 / deviation], [0], [5 / deviation]])
    np.testing.assert_allclose(number.decode(number.encode(np.array([1, 3, 8]))), [1, 3, 8])


def test_a_missing_number_counts_as_the_mean_of_the_others():
    number = Number.of("a", np.array([1.0, np.nan, 5.0]))
    assert (number.mean, number.std) == (3, 2)
    assert number.encode(np.array([np.nan, 5])).tolist() == [[0], [1]]


@pytest.mark.parametrize("values", [[0.1] * 3, [np.nan, 7.0], [np.nan, np.nan], [3]])
def test_a_column_that_never_differed_becomes_zeros(values):
    assert Number.of("a", np.array(values)).encode(np.array([1e6, np.nan, 0.1])).tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, 1e200])
def test_an_infinite_number_is_refused_by_column_and_row(bad):
    with pytest.raises(ValueError, match=r"'a' must hold finite numbers, got .* in row 2"):
        Number.of("a", np.array([1.0, bad]))


@pytest.mark.parametrize("column", ["a", "y"])
@pytest.mark.parametrize("place", [0, 49, 99])
def test_a_row_is_counted_in_the_whole_table(column, place):
    columns = {"a": np.arange(100.0), "y": np.arange(100.0)}
    columns["y"][10:20] = np.nan  # these rows are left out
    columns[column][place] = np.inf
    with pytest.raises(ValueError, match=f"column '{column}' must hold finite numbers, got inf in row {place + 1}$"):
        prepare(columns, None, 0.2, seed=0)


def test_a_text_among_numbers_is_refused_by_column():
    with pytest.raises(ValueError, match=r"'a' must hold numbers.*many"):
        Number("a", 0, 1).encode(texts("1.5", "many"))
    assert Number("a", 0, 1).encode(texts("1.5", None)).tolist() == [[1.5], [0]]


def test_texts_become_one_hot_with_missing_as_a_value_and_unknown_as_zeros():
    colour = Category.of("c", texts("red", None, "blue", "red"))
    assert colour.values == ["blue", "red", None]
    assert colour.encode(texts("red", None, "green")).tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([True, False]), ["False", "True"]),
        (np.array([10, 9, 2]), ["2", "9", "10"]),
        (np.array([1.0, 0.5]), ["0.5", "1"]),
        (texts("b", "10", "9"), ["10", "9", "b"]),
    ],
)
def test_classes_are_in_order_and_named_as_a_person_writes_them(values, expected):
    assert Category.of("y", values).values == expected


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (texts("a", "b"), "classification"),
        (np.array([True, False]), "classification"),
        (np.arange(20), "classification"),
        (np.arange(21), "regression"),
        (np.array([0.0, 1.0]), "regression"),
    ],
)
def test_the_target_says_the_task(values, task):
    assert choose_task(values)[0] == task


def test_the_split_is_stratified_and_reproducible():
    y = np.repeat([0, 1, 2], [50, 30, 20])
    train, test = split_rows(y, 0.2, seed=3)
    assert np.bincount(y[test]).tolist() == [10, 6, 4]
    assert sorted([*train, *test]) == list(range(100))
    np.testing.assert_array_equal(split_rows(y, 0.2, seed=3)[1], test)
    assert not np.array_equal(split_rows(y, 0.2, seed=4)[1], test)


def test_a_class_of_one_row_is_trained_on():
    train, test = split_rows(np.array([0] * 9 + [1]), 0.5, seed=0)
    assert 9 in train
    assert len(test) == 4


def test_too_few_rows_to_hold_out():
    with pytest.raises(ValueError, match="3 rows of 3 classes are too few"):
        split_rows(np.arange(3), 0.5, seed=0)


def test_only_the_rows_to_train_on_say_how_to_standardise():
    columns = {"a": np.arange(100.0) ** 2, "y": np.tile([0, 1], 50)}
    split, _, _ = prepare(columns, None, 0.2, seed=0)
    train, _ = split_rows(columns["y"], 0.2, seed=0)
    kept = columns["a"][train]
    assert split.encoder.features == [Number("a", kept.mean(), kept.std())]
    np.testing.assert_allclose(split.train[0][:, 0], (kept - kept.mean()) / kept.std(), rtol=1e-6)
    assert split.train[0].dtype == np.float32


def test_rows_without_a_target_are_left_out_and_their_integers_stay_classes():
    columns = {"a": np.arange(10.0), "y": np.array([0, 1] * 4 + [np.nan] * 2)}
    split, _, notes = prepare(columns, None, 0.25, seed=0)
    assert split.encoder.target == Category("y", ["0", "1"])
    assert len(split.train[1]) + len(split.held_out[1]) == 8
    assert notes == ["2 of 10 rows are left out: they have no 'y'"]


def test_names_are_left_out_and_it_is_said():
    columns = {"name": texts(*"abcdefgh"), "a": np.arange(8.0), "y": np.tile([0, 1], 4)}
    split, _, notes = prepare(columns, None, 0.25, seed=0)
    assert [x.name for x in split.encoder.features] == ["a"]
    assert notes == ["column 'name' is left out: 6 different texts in 6 rows"]


def test_numbers_with_a_stray_text_are_pointed_at():
    columns = {"a": texts(*["1", "2", "3", "n.n."] * 10), "y": np.tile([0, 1], 20)}
    assert prepare(columns, None, 0.25, seed=0)[2] == ["column 'a' is taken as text: it holds numbers, but also 'n.n.'"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": np.arange(4.0), "y": texts(*"xxxx")}, "'y' has one value only, x"),
        ({"a": np.arange(4.0), "y": np.full(4, 0.5)}, "'y' has one value only, 0.5"),
        ({"a": np.arange(4.0), "y": np.full(4, np.nan)}, "no row has a target, 'y'"),
        ({"y": np.arange(8) % 2}, "no column is left to predict 'y' from"),
    ],
)
def test_nothing_to_learn(columns, message):
    with pytest.raises(ValueError, match=message):
        prepare(columns, None, 0.25, seed=0)


def test_an_encoder_survives_json_and_any_order_of_columns():
    encoder = Encoder([Number("a", 1.0, 2.0), Category("c", ["x", None])], Category("y", ["n", "p"]))
    again = Encoder.from_json(json.loads(json.dumps(encoder.to_json())))
    assert again == encoder
    assert again.encode({"c": texts("x", None), "other": texts("?", "?"), "a": np.array([5, 1])}).tolist() == [
        [2, 1, 0],
        [0, 0, 1],
    ]


def test_a_missing_feature_is_named():
    with pytest.raises(ValueError, match="no column 'b'; the columns are 'a', 'c'"):
        Encoder([Number("a", 0, 1), Number("b", 0, 1)], Number("y", 0, 1)).encode({"a": np.ones(1), "c": np.ones(1)})


NUMBER, CATEGORY = {"name": "a", "mean": 0.0, "std": 1.0}, {"name": "y", "values": ["p", None]}


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"features": 3, "target": {}},
        {"features": [{"x": 1}], "target": {}},
        *({"features": [NUMBER | {key: junk}], "target": CATEGORY} for key in NUMBER for junk in (None, ["a"], {})),
        *({"features": [NUMBER], "target": CATEGORY | {"values": junk}} for junk in (None, 3, [["p"]], [1])),
        {"features": [NUMBER | {"std": "1"}], "target": CATEGORY},
        {"features": [NUMBER | {"std": np.nan}], "target": CATEGORY},
        {"features": [NUMBER], "target": CATEGORY | {"mean": 0.0}, "more": 1} | {"features": [CATEGORY, 5]},
    ],
)
def test_a_model_that_says_nothing_of_columns_is_refused(about):
    with pytest.raises(ValueError, match="'fastbp train' did not save it"):
        Encoder.from_json(about)


@pytest.mark.parametrize(
    "content",
    [
        "a,b,c\n1,x,true\n,,false\n",
        "\ufeffa;b;c\n1;x;TRUE\n?;;False\n",
        "a\tb\tc\n1\tx\tTrue\nNA\t\tFalse\n",
        ",a,b,c\n0,1,x,True\n1,,,False\n",
    ],
    ids=["commas", "semicolons and byte order mark", "tabs", "row numbers"],
)
def test_csv(tmp_path, content):
    table = read_table(write(tmp_path / "t.csv", content))
    assert list(table) == ["a", "b", "c"]
    np.testing.assert_array_equal(table["a"], [1, np.nan])
    assert table["b"].tolist() == ["x", None]
    assert table["c"].tolist() == [True, False] and table["c"].dtype == bool


def test_a_text_column_stays_text_in_a_later_file(tmp_path):
    like = Encoder([Category("zip", ["007", "A1"]), Category("on", ["False", "True"])], Number("y", 0, 1))
    table = read_table(write(tmp_path / "t.csv", "zip,on\n007,TRUE\n"), like=like)
    assert like.encode(table).tolist() == [[1, 0, 0, 1]]


def test_parquet(tmp_path):
    day = datetime.date(1970, 1, 2)
    frame = pd.DataFrame(
        {
            "whole": pd.array([1, None], "Int64"),
            "exact": [decimal.Decimal("1.5"), decimal.Decimal("2.5")],
            "day": [day, None],
            "time": pd.to_datetime(["1970-01-01 00:01", "1970-01-01 00:00"]),
            "kind": pd.Categorical(["u", None]),
            "on": [True, False],
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    np.testing.assert_array_equal(table["whole"], [1, np.nan])
    assert table["exact"].tolist() == [1.5, 2.5]
    np.testing.assert_array_equal(table["day"], [86400, np.nan])
    assert table["time"].tolist() == [60, 0]
    assert table["kind"].tolist() == ["u", None]
    assert table["on"].dtype == bool


def test_npz(tmp_path):
    path = tmp_path / "t.npz"
    np.savez(path, X=np.arange(12).reshape(3, 2, 2), y=np.array([["a"], ["b"], ["a"]]), other=np.array([1, 2, 3]))
    table = read_table(path, target="y")
    assert list(table) == ["X0", "X1", "X2", "X3", "y"]
    assert table["X1"].tolist() == [1, 5, 9]
    assert table["y"].tolist() == ["a", "b", "a"]
    assert load_table(str(path), "other", 0)["other"].tolist() == [1, 2, 3]
    like = Encoder([Number(name, 0, 1) for name in "pqrs"], Number("y", 0, 1))
    assert list(read_table(path, like=like)) == list("pqrs")


def test_npz_has_no_texts_for_a_model_that_takes_them(tmp_path):
    np.savez(tmp_path / "t.npz", X=np.ones((3, 1)))
    with pytest.raises(ValueError, match="the model takes texts, 'c'"):
        read_table(tmp_path / "t.npz", like=Encoder([Category("c", ["a", "b"])], Number("y", 0, 1)))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"A": np.ones((2, 2)), "y": np.ones(2)}, "no array 'X'.*'A', 'y'"),
        ({"X": np.ones((2, 2))}, "no array 'y'.*--target"),
        ({"X": np.ones(2), "y": np.ones(2)}, "X must have shape"),
        ({"X": np.ones((2, 2)), "y": np.ones(3)}, "y must hold 2 numbers or texts"),
        ({"X": np.ones((2, 2)), "y": np.array([{}, {}])}, "allow_pickle=False"),
        ({"X": np.array([["a"]]), "y": np.ones(1)}, "X"),
    ],
)
def test_npz_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "t.npz", target="y")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("png.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "holds no text in UTF-8"),
        ("latin.csv", "a,b\n1,é\n".encode("latin-1"), "utf-8"),
        ("empty.csv", "", "No columns"),
        ("header.csv", "a,b\n", "holds no rows"),
        ("ragged.csv", "a,b\n1,2\n1,2,3\n", "line 3"),
        ("long.csv", "a,b\n1,2,3\n1,2,3\n", "more fields than its first line has names"),
        ("twice.csv", "b; a;a\n1;2;3\n", "column 'a' stands there twice"),
        ("text.parquet", "hello", "Parquet"),
        ("text.npz", "hello", "no NPZ file"),
        ("table.xlsx", "hello", "must end in .csv, .tsv, .parquet or .npz"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read_table(write(tmp_path / name, content))


@pytest.mark.parametrize("part", [0.3, 0.7, 0.95])
def test_a_truncated_npz(tmp_path, part):
    np.savez_compressed(tmp_path / "t.npz", X=np.random.default_rng(0).random((50, 4)), y=np.arange(50))
    content = (tmp_path / "t.npz").read_bytes()
    with pytest.raises(ValueError, match=r"cannot read .*t\.npz"):
        read_table(write(tmp_path / "cut.npz", content[: int(part * len(content))]).rename(tmp_path / "t.npz"))


def test_damage_inside_an_npz(tmp_path):
    np.savez_compressed(tmp_path / "t.npz", X=np.random.default_rng(0).random((50, 4)), y=np.arange(50))
    content = bytearray((tmp_path / "t.npz").read_bytes())
    content[200:300] = bytes(100)
    with pytest.raises(ValueError, match="cannot read"):
        read_table(write(tmp_path / "t.npz", bytes(content)), target="y")


def test_no_file():
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere\.csv'"):
        load_table("nowhere.csv", None, 0)
    with pytest.raises(FileNotFoundError, match="the data sets are spiral and digits"):
        load_table("digts", None, 0)


def test_the_target_stands_last_and_must_be_there(tmp_path):
    path = str(write(tmp_path / "t.csv", "a,b\n1,2\n"))
    assert list(load_table(path, None, 0)) == ["a", "b"]
    assert list(load_table(path, "a", 0)) == ["b", "a"]
    with pytest.raises(ValueError, match="no column 'z'; the columns are 'a', 'b'"):
        load_table(path, "z", 0)
