"""experiments/replay.py: the step that was not finite, computed again from the checkpoint before it."""

import json

import char_lm
import numpy as np
import pytest
import replay
from test_char_lm import TINY

SMALL = [*TINY, "--steps=8", "--eval-every=4", "--log-every=1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n} green bottles, and {n * n % 97} on the wall.\n" for n in range(300)))
    return path


@pytest.mark.usefixtures("cheap_compilation")
@pytest.mark.parametrize("each", [1, 2])
def test_a_replayed_step_has_the_loss_that_was_written(text, tmp_path, capsys, each):
    options = [f"--corpus={text}", f"--workdir={tmp_path / 'run'}", f"--steps-per-call={each}"]
    options += ["--log-every=2"] if each == 2 else []
    assert char_lm.main([*SMALL, *options, "--keep-checkpoints=1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    found = {}
    for step in (5, 6) if each == 2 else (6,):
        capsys.readouterr()
        assert replay.main([f"--workdir={tmp_path / 'run'}", f"--step={step}", f"--out={tmp_path / 'b.npz'}"]) == 0
        printed = capsys.readouterr().out
        found[step] = float(printed.split("loss")[1].split()[0])
        assert printed.count(" finite\n") == printed.count("finite") == 5
        assert "green" in printed or "wall" in printed or "bottles" in printed
    assert sum(found.values()) / len(found) == pytest.approx(losses[6], rel=1e-4)
    with np.load(tmp_path / "b.npz", allow_pickle=False) as batch:
        assert batch["inputs"].shape == (4, 16)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_what_was_not_finite_is_named(text, tmp_path, capsys):
    options = ["--learning-rate=3e38", "--non-finite=skip", "--max-skipped=2"]
    with pytest.raises(SystemExit) as stop:
        char_lm.main([*SMALL, f"--corpus={text}", f"--workdir={tmp_path}", *options])
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "after 2 skipped" in error
    step = int(error.split("at step ")[1].split(",")[0])
    skipped = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped if "skipped" in row] == [step - 2, step - 1]
    assert replay.main([f"--workdir={tmp_path}", f"--step={step}"]) == 0
    printed = capsys.readouterr().out
    assert "gradient:  not finite: " in printed
    assert "batch:     finite" in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--step=1"], "--workdir is missing"),
        (["--workdir=absent", "--step=1"], "absent is not a folder"),
        (["--workdir={run}", "--step=0"], "--step is 0, expected one of the run's, 1 to 4"),
        (["--workdir={run}", "--step=5"], "--step is 5, expected one of the run's, 1 to 4"),
    ],
)
def test_bad_input_is_one_line(text, tmp_path, capsys, arguments, line):
    run = tmp_path / "run"
    if "{run}" in arguments[0]:
        assert char_lm.main([*TINY, "--steps=4", f"--corpus={text}", f"--workdir={run}"]) == 0
        capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        replay.main([argument.format(run=run) for argument in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error
