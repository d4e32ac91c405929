"""The frame of a script: its command line and its workdir."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest

import hyperjax
from hyperjax.training import Workdir, bad_input, count, environment, parse, print_summary

ROOT = Path(hyperjax.__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Config:
    """A small experiment."""

    preset: str = "quick"  # small or large
    model: str = "a"  # which one
    workdir: str | None = None  # where
    data_dir: str | None = None  # data
    units: int = 8  # width of the layers
    learning_rate: float = 0.5  # of the optimizer
    dtype: Literal["float32", "bfloat16"] = "float32"  # of products
    steps: int | None = None  # updates


def defaults(preset="quick", model="a"):
    if preset not in ("quick", "large"):
        raise ValueError(f"preset is {preset!r}, expected one of quick, large")
    return Config(preset, model, units={"quick": 8, "large": 80}[preset] + (model == "b"))


def parsed(*argv):
    return parse(defaults, argv=argv, description="A small experiment.", prog="small.py")


def test_presets_and_models_choose_defaults_and_fields_override_them():
    assert parsed() == Config()
    assert parsed("--preset", "large", "--model=b") == Config("large", "b", units=81)
    assert parsed("--units=3", "--preset=large", "--steps", "7").units == 3
    assert parsed("--learning_rate", "1e-4", "--steps", "None") == Config(learning_rate=1e-4)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--preset", "tiny"], "preset is 'tiny', expected one of quick, large"),
        (["--preset"], "--preset needs a value"),
        (["--unit", "3"], "--unit is not a field of this experiment; did you mean --units?"),
        (["--zzz=3"], "--zzz is not a field of this experiment; --help lists"),
        (["--units", "three"], "--units: invalid literal for int() with base 10: 'three'"),
        (["--units"], "Missing value for argument '--units'"),
        (["--dtype", "float16"], "'float16' for argument '--dtype'. Expected one of ('float32', 'bfloat16')"),
        (["stray"], "stray"),
    ],
)
def test_a_bad_command_line_is_one_line_and_status_2(argv, line, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert line in error
    assert "│" not in error


def test_help_lists_every_field_with_its_meaning_and_the_default_of_the_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--preset", "large", "--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text
    assert "A small experiment." in text
    assert "width of the layers (default: 80)" in text


def test_our_own_value_errors_become_a_line_and_others_stay_errors(capsys):
    with pytest.raises(SystemExit) as stop, bad_input(__file__):
        raise ValueError("units is 0,\nexpected more")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: units is 0, expected more\n"
    with pytest.raises(SystemExit), bad_input("elsewhere.py"):
        Workdir("/dev/null/x", Config()).open()
    with pytest.raises(ValueError, match="out of bounds"), bad_input(__file__):
        np.zeros((2, 2)).sum(axis=5)
    with pytest.raises(ValueError, match="in this file"), bad_input("elsewhere.py"):
        raise ValueError("in this file")


def test_a_workdir_keeps_its_configuration(tmp_path):
    path = tmp_path / "runs" / "one"
    with Workdir(path, Config()).open():
        saved = json.loads((path / "config.json").read_text())
    assert saved == {k: v for k, v in dataclasses.asdict(Config()).items() if k != "workdir"}
    Workdir(path, Config(workdir="elsewhere", data_dir="other")).open().close()
    with pytest.raises(
        ValueError, match=r"another configuration: units 8 -> 9, steps None -> 5; use the old .*--workdir"
    ):
        Workdir(path, Config(units=9, steps=5))
    assert json.loads((path / "config.json").read_text()) == saved


def test_a_field_that_an_older_run_did_not_have_counts_as_its_default(tmp_path):
    Workdir(tmp_path, Config(units=9)).open().close()
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["steps"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    Workdir(tmp_path, Config(units=9)).open().close()
    with pytest.raises(ValueError, match=r"another configuration: steps None -> 5; use"):
        Workdir(tmp_path, Config(units=9, steps=5))


def test_a_finished_run_has_its_summary(tmp_path):
    workdir = Workdir(tmp_path, Config())
    assert workdir.summary is None
    with workdir.open():
        workdir.finish({"bpc": 1.5})
    assert Workdir(tmp_path, Config()).summary == {"bpc": 1.5}


def test_a_workdir_that_is_not_a_runs_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"checkpoints but no config\.json"):
        Workdir(tmp_path, Config())
    (tmp_path / "config.json").write_text('{"units": 8')
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        Workdir(tmp_path, Config())


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write in .*file/run .*; choose another --workdir"):
        Workdir(tmp_path / "file" / "run", Config()).open()


def test_a_second_process_is_refused_and_a_killed_one_blocks_nobody(tmp_path):
    hold = (
        "import sys, test_experiment as t\n"
        "w = t.Workdir(sys.argv[1], t.Config()).open()\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    path = f"{ROOT}:{Path(__file__).parent}"
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=rf"in use by process {holder.pid}; .*another --workdir"):
            Workdir(tmp_path, Config()).open()
        holder.kill()
        holder.wait()
    with Workdir(tmp_path, Config()).open(), pytest.raises(ValueError, match="in use by process"):
        Workdir(tmp_path, Config()).open()


def test_the_environment_of_a_run(tmp_path, capsys):
    w = jnp.zeros((3, 4))
    facts = environment(str(tmp_path / "script.py"), {"a": w, "again": w, "b": jnp.zeros(2)}, 7, 1.234)
    names = ["params", "params_unique", "seconds", "device", "jax_version", "git_commit", "seed"]
    assert list(facts) == names
    assert (facts["params"], facts["params_unique"], facts["seed"], facts["git_commit"]) == (26, 14, 7, None)
    assert "CPU" in facts["device"] or " x " in facts["device"]
    assert count({"a": w}) == 12
    print_summary(facts)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names


def test_the_commit_of_a_checkout_says_whether_it_was_changed(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath=/dev/null"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    script = tmp_path / "script.py"
    script.write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    clean = environment(str(script), {}, 0, 0.0)["git_commit"]
    script.write_text("2\n")
    assert len(clean) == 40
    assert environment(str(script), {}, 0, 0.0)["git_commit"] == clean + "+"
