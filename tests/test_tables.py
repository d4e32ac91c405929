"""Tables are read as they are or not at all, and no row outside of training moves a feature."""

import gzip

import jax
import numpy as np
import pytest

from hyperjax.data import TableEncoder, Vocabulary, read_table
from hyperjax.data import tables as module

COLUMNS = ("age", "colour", "gain", "size")
LINES = ["30, red , 0, S", "40, blue, 100, ?", "50, red, 0, M", "20,green, 7, L", " 60, blue, 1e3, S"]
TRAIN = np.array([0, 1, 2])


def write(path, lines=LINES, end="\n"):
    path.write_text(end.join(lines) + end, newline="")
    return path


@pytest.fixture
def table(tmp_path):
    return read_table(write(tmp_path / "tiny.csv"), COLUMNS)


def texts(table, name):
    codes, names = table.columns[name]
    return [names[code] for code in codes]


def test_what_is_read(table):
    assert len(table) == 5
    assert texts(table, "colour") == ["red", "blue", "red", "green", "blue"]
    assert texts(table, "size") == ["S", "?", "M", "L", "S"]
    assert table.columns["colour"].names == ("red", "blue", "green")
    np.testing.assert_array_equal(table.numbers("gain", least=0), [0, 100, 0, 7, 1000])
    flags = table.flags("colour", {"red": True, "blue": False, "green": False, "pink": True})
    assert flags.tolist() == [1, 0, 1, 0, 0]
    assert flags.dtype == np.int32


@pytest.mark.parametrize("chunk", [1, 2, 4096])
def test_plain_or_gzip_any_line_end_and_a_byte_order_mark(tmp_path, monkeypatch, table, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    windows = write(tmp_path / "windows.csv", end="\r\n")
    (tmp_path / "marked.csv").write_bytes(b"\xef\xbb\xbf" + "\n".join(LINES).encode())
    (tmp_path / "packed").write_bytes(gzip.compress(windows.read_bytes()))
    for name in ("windows.csv", "marked.csv", "packed"):
        found = read_table(str(tmp_path / name), COLUMNS)
        assert all(texts(found, column) == texts(table, column) for column in COLUMNS)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*LINES[:2], "50, red, 0"], r"tiny\.csv, line 3 has 3 columns, expected 4 \(age to size\); correct the line"),
        (["30, red, 0, S, 1", *LINES], r"tiny\.csv, line 1 has 5 columns, expected 4"),
        ([*LINES[:1], "", *LINES[1:]], r"tiny\.csv, line 2 has 1 columns, expected 4"),
        ([""], r"tiny\.csv is empty, expected lines of 4 columns; give the whole file"),
    ],
)
def test_lines_that_do_not_fit(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_table(write(tmp_path / "tiny.csv", lines), COLUMNS)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_table(tmp_path):
    whole = gzip.compress("\n".join(LINES * 50).encode())
    flipped = bytearray(whole)
    flipped[-6] ^= 1
    for name, content, message in [
        ("short.gz", whole[: len(whole) // 2], r"short\.gz is a damaged gzip file \(.*\); get it again"),
        ("flipped.gz", bytes(flipped), r"flipped\.gz is a damaged gzip file \(CRC"),
        ("latin.csv", "30, caf\xe9, 0, S\n".encode("latin-1"), r"is not UTF-8: byte 0xe9 at offset 7; convert"),
        ("packed.zip", b"PK\x03\x04 and more", r"packed\.zip is an archive or no text, expected .*; unpack it first"),
        ("packed.tar.gz", gzip.compress(b"a.csv\0\0\0" + whole), r"packed\.tar\.gz is an archive or no text"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / name, COLUMNS)
    with pytest.raises(ValueError, match=r"none\.csv does not exist; give the path"):
        read_table(tmp_path / "none.csv", COLUMNS)
    with pytest.raises(ValueError, match=r"is a folder, expected a file"):
        read_table(tmp_path, COLUMNS)


@pytest.mark.parametrize("value", ["old", "", "nan", "inf", "1 000", "?"])
def test_a_number_that_is_none(tmp_path, value):
    table = read_table(write(tmp_path / "tiny.csv", [*LINES, f"{value}, red, 0, S", "old, red, 0, S"]), COLUMNS)
    with pytest.raises(ValueError, match=r"tiny\.csv, line 6: age is '.*', expected a number; correct") as caught:
        table.numbers("age")
    assert repr(value) in str(caught.value)


def test_values_outside_of_their_range(tmp_path):
    table = read_table(write(tmp_path / "tiny.csv", [*LINES, f"30, {'x' * 99}, -1, S"]), COLUMNS)
    with pytest.raises(ValueError, match=r"line 6: gain is '-1', expected a number of at least 0"):
        table.numbers("gain", least=0)
    with pytest.raises(ValueError, match=r"line 6: gain is '-1', expected a number of at least 0"):
        TableEncoder.fit(table, TRAIN, ["gain"], [], log=["gain"])
    with pytest.raises(
        ValueError, match=r"line 4: colour is 'green', expected one of 'red', 'blue'; correct"
    ) as caught:
        table.flags("colour", {"red": True, "blue": False})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"line 6: colour is 'x{57}\.\.\.', expected one of"):
        table.flags("colour", {"red": True, "blue": False, "green": True})


def test_a_vocabulary(table):
    vocabulary = Vocabulary.fit(table.columns["colour"], TRAIN)
    assert vocabulary == Vocabulary(("blue", "red"))
    assert len(vocabulary) == 3
    assert vocabulary.ids(table.columns["colour"], np.arange(5)).tolist() == [2, 1, 2, 0, 1]
    assert vocabulary.ids(table.columns["size"], np.array([3, 0])).tolist() == [0, 0]


def test_features_by_hand(table):
    encoder = TableEncoder.fit(table, TRAIN, ["age", "gain"], ["colour", "size"], log=["gain"])
    assert encoder.width == 2 + 3 + 4
    features = encoder.transform(table, np.arange(5))
    assert {name: array.dtype.name for name, array in features.items()} == {"numbers": "float32", "ids": "int32"}
    gain = np.log1p([0, 100, 0, 7, 1000])
    expected = np.zeros((5, 9), np.float32)
    expected[:, 0] = (np.array([30, 40, 50, 20, 60]) - 40) / np.std([30, 40, 50])
    expected[:, 1] = (gain - gain[:3].mean()) / gain[:3].std()
    # Columns: unknown, blue, red; unknown, ?, M, S. The green of row 3 and its L were not in training.
    for row, ones in enumerate([(4, 8), (3, 6), (4, 7), (2, 5), (3, 8)]):
        expected[row, list(ones)] = 1
    for encode in (encoder.encode, jax.jit(encoder.encode)):
        found = encode(features)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    stacked = {name: np.stack([array, array[::-1]]) for name, array in features.items()}
    np.testing.assert_allclose(jax.vmap(encoder.encode)(stacked)[1], expected[::-1], rtol=1e-6, atol=1e-6)
    assert encoder.unseen(table, np.arange(3)) == {}
    assert encoder.unseen(table, np.array([3, 3, 4])) == {"colour": "2 rows ('green')", "size": "2 rows ('L')"}


def test_rows_outside_of_training_move_nothing(tmp_path, table):
    columns = (["age", "gain"], ["colour", "size"], ["gain"])
    other = read_table(write(tmp_path / "b.csv", ["9, violet, 1, XL", *LINES[:3], "99, amber, 5, XS"]), COLUMNS)
    first, second = TableEncoder.fit(table, TRAIN, *columns), TableEncoder.fit(other, TRAIN + 1, *columns)
    assert first.numeric == second.numeric
    assert first.vocabularies == second.vocabularies
    for name, array in first.transform(table, TRAIN).items():
        np.testing.assert_array_equal(array, second.transform(other, TRAIN + 1)[name])
        np.testing.assert_array_equal(array, first.transform(other, TRAIN + 1)[name])


def test_a_constant_column_and_columns_of_one_kind_alone(tmp_path, table):
    constant = read_table(write(tmp_path / "c.csv", ["5, a, 0, S", "5, b, 0, S", "8, a, 0, S"]), COLUMNS)
    numbers = TableEncoder.fit(constant, np.arange(2), ["age"], [])
    assert np.asarray(numbers.encode(numbers.transform(constant, np.arange(3)))).tolist() == [[0], [0], [3]]
    categories = TableEncoder.fit(table, TRAIN, [], ["colour"])
    found = categories.encode(categories.transform(table, np.arange(4)))
    assert np.asarray(found).tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_many_unseen_categories_are_cut_short(tmp_path):
    table = read_table(write(tmp_path / "d.csv", ["1, a, 0, S", *(f"1, {c}, 0, S" for c in "hgfedcb")]), COLUMNS)
    encoder = TableEncoder.fit(table, np.arange(1), [], ["colour"])
    assert encoder.unseen(table, np.arange(8)) == {"colour": "7 rows ('b', 'c', 'd', 'e', 'f', ...)"}


def test_equal_numbers_have_no_scale(tmp_path):
    path = tmp_path / "rows.csv"  # the deviation of these logarithms is a rounding error above 0
    path.write_text("\n".join([*["5"] * 1001, "6"]) + "\n")
    table = read_table(path, ("money",))
    encoder = TableEncoder.fit(table, np.arange(1001), ["money"], [], log=["money"])
    numbers = encoder.transform(table, np.array([0, 1001]))["numbers"]
    np.testing.assert_allclose(numbers[:, 0], [0.0, np.log(7 / 6)], atol=1e-6)
