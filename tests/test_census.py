"""Census-Income: the two groups of tasks, categories aligned by name, and what a file must not hold."""

import gzip

import jax
import numpy as np
import pytest

from hyperjax.data import load_census
from hyperjax.data.census import COLUMNS, DEGREES, INCOME, MARRIED, NO_DEGREE, NUMERIC, WEIGHT
from hyperjax.routing.tasks import Binary

EDUCATION, STATUS = NO_DEGREE + DEGREES, ("Never married", *MARRIED)
ADULT = {"education": "High school graduate", "marital_stat": "Divorced", "income_50k": "- 50000."}


def row(**values):
    """Returns a line in the layout of the file; a column without a value holds 0, or a category of its own."""
    fields = {name: "0" if name in NUMERIC else f"{name} a" for name in COLUMNS} | {WEIGHT: "1000.5"} | ADULT | values
    return ", ".join(fields.values())


def rows(count=60):
    """Returns lines in which every education, marital status and income occurs."""
    rng = np.random.default_rng(0)
    return [
        row(
            age=str(rng.integers(90)),
            capital_gains=str(rng.choice([0, 0, 15024])),
            education=EDUCATION[i % len(EDUCATION)],
            marital_stat=STATUS[i % len(STATUS)],
            income_50k=list(INCOME)[i % 3 == 0],
            citizenship=("Native- Born in the United States", "Foreign born- Not a citizen of U S ")[i % 2],
            weeks_worked=str(rng.integers(53)),
            instance_weight=f"{rng.uniform(100, 3000):.2f}",
            race="?" if i % 5 == 0 else "race a",
        )
        for i in range(count)
    ]


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("census") / "census-income.data", rows())


@pytest.mark.parametrize(("group", "main"), [("income", "income_50k"), ("education", "college")])
def test_a_group(file, group, main):
    data = load_census(file, group=group)
    assert data.tasks == {main: Binary(), "never_married": Binary()}
    assert (data.name, data.train.rows, data.valid.rows, data.test.rows) == (f"census_{group}", 36, 12, 12)
    assert data.train.features["numbers"].shape == (36, 7)
    assert data.train.features["ids"].shape == (36, 32)
    inputs = jax.jit(data.encode)(data.train.features)
    assert inputs.shape == (36, data.width)
    np.testing.assert_array_equal(inputs[:, 7:].sum(1), 32)
    np.testing.assert_allclose(inputs[:, :7].mean(0), 0, atol=1e-6)
    # age, capital_gains and weeks_worked vary; the other columns of numbers are constant here.
    np.testing.assert_allclose(inputs[:, :7].std(0), [1, 0, 1, 0, 0, 0, 1], atol=1e-5)
    assert "census-income.data (36 train, 12 valid, 12 test; 39 columns" in data.notes[0]
    assert "split 60/20/20 by seed 0: another split than the papers'" in data.notes[1]
    assert load_census(file, group=group).fingerprint == data.fingerprint
    assert load_census(file, group=group, seed=1).fingerprint != data.fingerprint


def test_each_label_by_hand(tmp_path):
    lines = [row(education=e, marital_stat=m, income_50k=i) for e in EDUCATION for m in STATUS for i in INCOME]
    train, test = write(tmp_path / "train", lines), write(tmp_path / "test", lines[:2])
    college, single = [e in DEGREES for e in EDUCATION], [m == "Never married" for m in STATUS]
    assert sum(college) == 6
    labels = load_census(train, test_file=test, group="education").train.labels
    assert labels["college"].reshape(17, 7, 2)[:, 0, 0].tolist() == [int(c) for c in college]
    assert labels["never_married"].reshape(17, 7, 2)[3, :, 1].tolist() == [int(s) for s in single]
    assert load_census(train, test_file=test).train.labels["income_50k"][:4].tolist() == [0, 1, 0, 1]


def test_neither_a_label_nor_the_instance_weight_is_a_feature(tmp_path, file):
    changed = [line.replace("50000+.", "- 50000.") for line in rows()]
    changed = [",".join([*line.split(",")[:24], " 5.0", *line.split(",")[25:]]) for line in changed]
    changed = [line.replace(", Widowed,", ", Never married,") for line in changed]
    first, second = load_census(file), load_census(write(tmp_path / "changed", changed))
    for split in ("train", "valid", "test"):
        for name, array in getattr(first, split).features.items():
            np.testing.assert_array_equal(array, getattr(second, split).features[name])
    assert not any(second.train.labels["income_50k"])
    assert first.train.labels["income_50k"].any()


def test_columns_to_leave_out(file):
    whole, less = (load_census(file, test_file=file, without=names) for names in ((), ("education", "age")))
    assert less.train.features["numbers"].shape[1] == 6
    assert less.width == whole.width - 1 - 18
    np.testing.assert_array_equal(less.train.features["numbers"], whole.train.features["numbers"][:, 1:])


def test_the_test_file_is_halved_and_the_other_one_is_training(tmp_path, file):
    other = tmp_path / "census-income.test.gz"
    other.write_bytes(gzip.compress("\n".join(rows(21)).encode()))
    data = load_census(file, test_file=other, seed=3)
    assert (data.train.rows, data.valid.rows, data.test.rows) == (60, 10, 11)
    assert "halves of" in data.notes[1]
    assert "by seed 3" in data.notes[1]
    assert "papers'" not in data.notes[1]
    reordered = load_census(file, test_file=other, seed=4)
    np.testing.assert_array_equal(reordered.train.features["ids"], data.train.features["ids"])
    assert reordered.fingerprint != data.fingerprint
    together = np.sort(np.concatenate([data.valid.labels["income_50k"], data.test.labels["income_50k"]]))
    assert together.tolist() == sorted(i % 3 == 0 for i in range(21))


def test_categories_are_aligned_by_name(tmp_path):
    """A column of train a, b, c; one test file lacks b, another has b and three unseen ones: c is the same feature."""
    train = write(tmp_path / "train", [row(race=race, weeks_worked="1") for race in "abcabc"])
    lacking = write(tmp_path / "lacking", [row(race=race) for race in "ccaa"])
    unseen = write(tmp_path / "unseen", [row(race=race) for race in "0bcAz"] + [row(race="c", sex="sex z")])
    first, second = (load_census(train, test_file=file, without=("education",)) for file in (lacking, unseen))
    assert first.width == second.width
    np.testing.assert_array_equal(first.train.features["ids"], second.train.features["ids"])

    # Every column of categories before `race` has one value in training, hence two features.
    before = set(COLUMNS[: COLUMNS.index("race")]) - {*NUMERIC, *ADULT}
    start = 7 + 2 * len(before)

    def one_hot(data, *splits):
        inputs = np.concatenate([data.encode(getattr(data, split).features) for split in splits])
        return inputs[:, start : start + 4].tolist()

    unknown, a, b, c = np.eye(4).tolist()
    for data in (first, second):
        assert one_hot(data, "train") == [a, b, c, a, b, c]
    assert sorted(one_hot(first, "valid", "test")) == sorted([a, a, c, c])
    assert sorted(one_hot(second, "valid", "test")) == sorted([b, c, c, unknown, unknown, unknown])

    def counted(data, column):
        return sum(int(note.split(" of ")[1].split()[0]) for note in data.notes if f": {column} of " in note)

    assert (counted(first, "race"), counted(second, "race"), counted(second, "sex")) == (0, 3, 1)
    text = " ".join(second.notes)
    assert all(f"'{name}'" in text for name in ("0", "A", "z", "sex z"))
    assert "is not in train, read as unknown" in text


BAD_LINES = [
    (row() + ", 1", r"census, line 5 has 43 columns, expected 42 \(age to income_50k\); correct the line"),
    (row().rsplit(", ", 1)[0], r"census, line 5 has 41 columns, expected 42"),
    (row(age="old"), r"census, line 5: age is 'old', expected a number"),
    (row(capital_gains="-5"), r"census, line 5: capital_gains is '-5', expected a number of at least 0"),
    (row(income_50k="50000"), r"census, line 5: income_50k is '50000', expected one of '- 50000.', '50000\+\.'; corr"),
    (row(marital_stat="Engaged"), r"census, line 5: marital_stat is 'Engaged', expected one of 'Married-civilian"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_line_that_cannot_be(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_census(write(tmp_path / "census", [*rows(4), line, *rows(4)]))
    assert "\n" not in str(caught.value)
    good = write(tmp_path / "good", rows())
    with pytest.raises(ValueError, match=message):
        load_census(good, test_file=tmp_path / "census")


def test_what_cannot_be_asked_for(tmp_path, file):
    with pytest.raises(ValueError, match=r"group 'wealth' is unknown: expected one of income, education"):
        load_census(file, group="wealth")
    with pytest.raises(ValueError, match=r"seed is -1, expected an integer of at least 0"):
        load_census(file, seed=-1)
    with pytest.raises(ValueError, match=r"without names 'wage', which is no column: expected some of age, class_w"):
        load_census(file, without=("age", "wage"))
    with pytest.raises(ValueError, match=r"line 5: education is 'Kindergarten', expected one of 'Children', 'Less"):
        load_census(write(tmp_path / "a", [*rows(4), row(education="Kindergarten")]), group="education")
    with pytest.raises(ValueError, match=r"two has 2 rows, too few to split: expected at least 3"):
        load_census(write(tmp_path / "two", rows(2)))
    with pytest.raises(ValueError, match=r"one has 1 rows, too few to split: expected at least 2"):
        load_census(file, test_file=write(tmp_path / "one", rows(1)))
    three = load_census(write(tmp_path / "three", rows(3)))
    assert (three.train.rows, three.valid.rows, three.test.rows) == (1, 1, 1)
