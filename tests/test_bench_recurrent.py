"""experiments/bench_recurrent.py: its figures, its table, and what it refuses."""

import importlib.util
import json

import bench_recurrent as bench
import pytest

TINY = [
    *("--units=8", "--hyper-units=4", "--embedding=2", "--features=3", "--batch=2", "--steps=3", "--repeats=1"),
    *("--memory-steps=64", "--remat-chunk=8"),
]


def test_measures_writes_and_prints(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert bench.main([*TINY, f"--json={path}"]) == 0
    figures = json.loads(path.read_text())
    for name in ("ours", "naive", "floor", "flax_lstm"):
        assert figures[f"seconds_{name}"] > 0
        assert figures[f"compile_seconds_{name}"] > 0
    assert figures["ratio_ours_over_floor"] == figures["seconds_ours"] / figures["seconds_floor"]
    assert 0 < figures["peak_bytes_remat"] < figures["peak_bytes_plain"]
    torch = importlib.util.find_spec("torch") is not None
    assert ("seconds_torch_lstm" in figures) == torch
    printed = capsys.readouterr().out
    assert "HyperLSTM, hyperjax" in printed
    assert ("not installed" in printed) == (not torch or importlib.util.find_spec("labml_nn") is None)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--units=0", "--units is 0, expected a whole number of at least 1"),
        ("--hyper-units=9", "--hyper-units is 9, expected at most the --units, 8"),
        ("--json=/absent/folder/bench.json", "cannot be written"),
        ("--json=.", "cannot be written"),
        ("--unit=3", "--unit is not a field"),
        ("--steps=many", "--steps"),
    ],
)
def test_bad_input_is_one_line(argument, line, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*TINY, argument])
    assert stop.value.code == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert line in printed
