"""Metrics on disk: files that a kill cannot spoil, and the picture of the curves."""

import json

import pytest

from hyperjax.training import JsonLines, read_lines, save_curves, write_json


def write(path, *steps):
    with JsonLines(path, 0) as lines:
        for step in steps:
            lines.write(step, loss=1 / step)


def test_lines_come_back_exactly(tmp_path):
    write(tmp_path / "m", 3, 7)
    assert read_lines(tmp_path / "m") == [{"step": 3, "loss": 1 / 3}, {"step": 7, "loss": 1 / 7}]


def test_resuming_drops_what_comes_after_the_checkpoint(tmp_path):
    path = tmp_path / "m"
    write(path, 2, 4, 4, 6, 8)
    whole = path.read_bytes()
    with JsonLines(path, 4) as lines:
        assert [row["step"] for row in read_lines(path)] == [2, 4, 4]
        for step in (6, 8):
            lines.write(step, loss=1 / step)
    assert path.read_bytes() == whole


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    write(tmp_path / "m", 2, 4)
    JsonLines(tmp_path / "m", 0).close()
    assert (tmp_path / "m").read_bytes() == b""


@pytest.mark.parametrize("cut", [1, 2, 15])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "m"
    write(path, 2, 4)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row["step"] for row in read_lines(path)] == [2]
    with JsonLines(path, 4) as lines:
        lines.write(5, loss=0.0)
    assert [row["step"] for row in read_lines(path)] == [2, 5]


def test_a_damaged_line_before_the_last_is_reported_and_kept(tmp_path):
    path = tmp_path / "m"
    write(path, 2, 4, 6)
    damaged = path.read_bytes().replace(b'"step": 4', b'"stop": 4')
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        JsonLines(path, 6)
    assert path.read_bytes() == damaged


def test_values_that_json_cannot_hold_are_refused(tmp_path):
    with JsonLines(tmp_path / "m", 0) as lines, pytest.raises(ValueError, match="JSON"):
        lines.write(1, loss=float("nan"))
    assert (tmp_path / "m").read_bytes() == b""


def test_replacing_a_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.json"]


def test_the_curves_show_the_data(tmp_path):
    with JsonLines(tmp_path / "m", 0) as lines:
        for step in range(10, 200, 10):
            lines.write(step, bpc=2 + 30 / step)
        lines.write(190, valid_bpc=2.2)
    save_curves(tmp_path / "m", tmp_path / "all.png", title="a model")
    write(tmp_path / "none", 1)
    save_curves(tmp_path / "none", tmp_path / "none.png")
    images = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert sorted(images) == ["all.png", "none.png"]
    assert all(image.startswith(b"\x89PNG") for image in images.values())
    assert len(images["all.png"]) > 1.3 * len(images["none.png"])
