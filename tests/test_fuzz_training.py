"""Command lines, workdirs, metrics and checkpoints of any content: a result or one line, nothing else."""

import contextlib
import dataclasses
import io
import json
import shutil

import char_lm
import char_lm_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzz import NONSENSE, answer, damaged, drawn, edited
from hypothesis import given
from hypothesis import strategies as st
from test_experiment import Config, defaults

from hyperjax.training import (
    Checkpoints,
    JsonLines,
    Workdir,
    parse,
    print_summary,
    read_lines,
    save_curves,
    series,
)

WORDS = st.sampled_from(
    ["--units", "--units=3", "--preset", "large", "--model", "b", "--dtype", "None", "--steps", "-1"]
)
ROWS = b"".join(b'{"step": %d, "bpc": %.3f, "valid_bpc": 2.5}\n' % (n, 3 / n) for n in range(1, 9))


def quiet(function, *arguments):
    """Calls a part of a script; returns its exit status, and the lines of its error."""
    printed, status = io.StringIO(), 0
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        try:
            function(*arguments)
        except SystemExit as stop:
            status = stop.code or 0
    return status, printed.getvalue().splitlines()


@drawn()
@given(st.lists(WORDS | st.text(max_size=6), max_size=4))
def test_any_command_line_is_a_config_or_one_line(argv):
    found = []
    status, lines = quiet(lambda: found.append(parse(defaults, argv=argv, prog="small.py")))
    if status == 0:
        assert not found or isinstance(found[0], Config)
    else:
        assert status == 2
        assert len(lines) == 1
        assert lines[0].startswith("error: ")


@drawn()
@given(st.data())
def test_any_config_and_summary_is_a_workdir_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("w")
    whole = {k: v for k, v in dataclasses.asdict(Config()).items() if k != "workdir"}
    for name, content in (("config.json", whole), ("summary.json", {"bpc": 1.5, "device": "CPU"})):
        raw = json.dumps(content).encode() if data.draw(st.booleans()) else data.draw(edited(content))
        (path / name).write_bytes(raw)
    workdir = answer(Workdir, path, Config())
    if isinstance(workdir, Workdir):
        assert quiet(print_summary, workdir.summary)[0] == 0
    else:
        assert str(path) in workdir


@drawn()
@given(st.data())
def test_any_file_of_metrics_is_read_continued_and_drawn_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    if data.draw(st.booleans()):
        raw = data.draw(damaged(ROWS))
    else:
        rows = [json.loads(line) for line in ROWS.splitlines()]
        for _ in range(3):
            row = data.draw(st.sampled_from(rows))
            row[data.draw(st.sampled_from(["bpc", "valid_bpc", "other"]))] = data.draw(NONSENSE)
        raw = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(raw)
    found = answer(read_lines, path)
    lines = answer(JsonLines, path, 4)
    assert isinstance(found, str) == isinstance(lines, str) or isinstance(
        found, str
    )  # one reads no further than it needs
    if isinstance(lines, JsonLines):
        lines.close()
    if isinstance(lines, str):
        assert path.read_bytes() == raw
    if not isinstance(found, str):
        assert all(np.isfinite(value) for _, value in series(found, "bpc"))
        path.write_bytes(raw)
        save_curves(path, path.with_suffix(".png"))


def test_deep_nesting_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    assert "config.json cannot be read" in answer(Workdir, tmp_path, Config())
    (tmp_path / "m").write_text("[" * 200_000 + "\n" + '{"step": 1}\n')
    assert "line 1 of" in answer(read_lines, tmp_path / "m")


@drawn()
@given(st.data())
def test_any_config_of_a_run_is_opened_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("r")
    whole = dataclasses.asdict(char_lm.Config(model="lstm", units=8))
    whole.pop("workdir")
    (path / "config.json").write_bytes(data.draw(edited(whole)))
    found = answer(char_lm_runs.open_run, path)
    assert isinstance(found, char_lm_runs.Run) or found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, of which the newer will be damaged."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": jnp.full((64, 8), step, jnp.float32)}, {"step": step}, 1.0 / step)
    return folder


@drawn(0.5)
@given(st.data())
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own, from a reader that failed
def test_any_damage_to_a_checkpoint_is_noticed_or_harmless(tmp_path_factory, saved, data):
    folder = tmp_path_factory.mktemp("c") / "checkpoints"
    shutil.copytree(saved, folder)
    files = sorted(path for path in (folder / "2").rglob("*") if path.is_file())
    victim = data.draw(st.sampled_from(files))
    if data.draw(st.integers(0, 5)) == 0:
        victim.unlink()
    else:
        victim.write_bytes(data.draw(damaged(victim.read_bytes())))
    checkpoints = Checkpoints(folder)
    state, meta = checkpoints.restore({"w": jax.ShapeDtypeStruct((64, 8), jnp.float32)})
    assert meta["step"] in (1, 2)
    np.testing.assert_array_equal(state["w"], np.full((64, 8), meta["step"], np.float32))
    assert len(checkpoints.notes) >= (meta["step"] == 1)
    with checkpoints:
        checkpoints.save(3, {"w": jnp.zeros((64, 8))}, {"step": 3})
    assert Checkpoints(folder).restore({"w": jnp.zeros((64, 8))})[1] == {"step": 3}


@drawn(0.2)
@given(st.lists(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=5), max_size=3))
def test_any_other_folder_among_the_checkpoints_is_left_alone(tmp_path_factory, saved, names):
    folder = tmp_path_factory.mktemp("c") / "checkpoints"
    shutil.copytree(saved, folder)
    others = [name for name in names if not (name.isdecimal() and name == str(int(name)))]
    for name in [*others, "007", "\N{ARABIC-INDIC DIGIT NINE}"]:
        with contextlib.suppress(OSError):  # the file system may not like it
            (folder / name).mkdir()
    assert Checkpoints(folder).steps() == [1, 2]


def test_a_summary_of_anything_is_printed():
    print_summary({})
    summary = {"a": [1], "b": None, "\ud800": "\ud800", "c": 10**400}
    assert quiet(print_summary, summary) == (0, [])
