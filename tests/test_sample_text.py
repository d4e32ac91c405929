"""experiments/sample_text.py: text from a tiny run of char_lm.py, the picture of its scales, and bad input."""

import json
import shutil

import char_lm
import char_lm_runs
import numpy as np
import pytest
import sample_text

TINY = [
    "--units=8",
    "--hyper-units=4",
    "--embedding=2",
    "--batch=4",
    "--length=16",
    "--steps=6",
    "--eval-every=3",
    "--log-every=3",
    "--sample-length=5",
    "--prime-length=5",
]
PRIME = "7 green bottles,\n"


def train(folder, model):
    text = folder / "text.txt"
    text.write_text(
        "".join(f"{n} green bottles, and {n * n % 97} on the wall.\n" for n in range(150)), encoding="utf-8"
    )
    workdir = folder / "run"
    assert char_lm.main([*TINY, f"--model={model}", f"--corpus={text}", f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("hyper"), "hyper_lstm")


@pytest.fixture
def copied(trained, tmp_path):
    """A copy to damage; its corpus is a copy too."""
    shutil.copytree(trained.parent, tmp_path / "all")
    workdir = tmp_path / "all" / "run"
    edit_config(workdir, corpus=str(tmp_path / "all" / "text.txt"))
    return workdir


def edit_config(workdir, **changes):
    path = workdir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sample(capsys, *arguments):
    capsys.readouterr()
    assert sample_text.main([str(a) for a in arguments]) == 0
    return capsys.readouterr()


def refused(capsys, *arguments):
    """The one line that bad input prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample_text.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_prints_the_text_alone_and_draws_the_picture(trained, tmp_path, capsys):
    picture = tmp_path / "scales.png"
    arguments = (trained, "--prime", PRIME, "--length=30", "--temperature=1", "--seed=4")
    plain = sample(capsys, *arguments)
    assert plain.err == ""
    assert plain.out.startswith(PRIME)
    assert len(plain.out) == len(PRIME) + 30 + 1
    drawn = sample(capsys, *arguments, "--dynamics", picture)
    assert drawn.out == plain.out
    assert drawn.err == f"drew {picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sample(capsys, *arguments[:-1], "--seed=5").out != plain.out


def test_a_character_of_no_symbol_is_read_as_unknown_and_said(trained, capsys):
    printed = sample(capsys, trained, "--prime=g\u00e9", "--length=2")
    assert printed.out.startswith("g\N{REPLACEMENT CHARACTER}")
    assert "unknown symbol" in printed.err


def test_uses_the_best_checkpoint_and_leaves_the_run_as_it_is(trained):
    before = {path: path.read_bytes() for path in sorted(trained.rglob("*")) if path.is_file()}
    params, step = char_lm_runs.open_run(trained).restore()
    summary = json.loads((trained / "summary.json").read_text())
    assert step == summary["best_step"]
    assert sum(np.size(leaf) for leaf in sample_text.jax.tree.leaves(params)) == summary["params"]
    assert before == {path: path.read_bytes() for path in sorted(trained.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-1"], "--temperature is -1.0"),
        (["--temperature=nan"], "--temperature is nan"),
        (["--length=0"], "--length is 0"),
        (["--seed=-1"], "--seed is -1"),
        (["--seed=4294967296"], "--seed is 4294967296"),
        (["--dynamics=nowhere/out.png"], "there is no folder nowhere"),
        (["--dynamics=out.jpg"], "ends in .png, .svg, .pdf"),
        (["--lenght=3"], "did you mean --length?"),
    ],
)
def test_bad_settings(trained, arguments, message, capsys):
    assert message in refused(capsys, trained, *arguments)


def test_folders_that_hold_nothing_to_sample_from(copied, tmp_path, capsys):
    assert "WORKDIR" in refused(capsys)
    assert "is not a folder" in refused(capsys, tmp_path / "absent")
    assert "holds no run" in refused(capsys, tmp_path)
    shutil.rmtree(copied / "checkpoints")
    assert "has no checkpoint yet" in refused(capsys, copied)
    edit_config(copied, colour="red")
    assert "is not the configuration of a run of char_lm.py" in refused(capsys, copied)
    (copied / "config.json").write_text("{")
    assert "is not the configuration of a run of char_lm.py" in refused(capsys, copied)


def test_damaged_checkpoints(copied, capsys):
    for path in (copied / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "is damaged" in refused(capsys, copied)


@pytest.mark.parametrize("line", ["Another line.\n", "10 green bottles.\n"])  # with a new symbol, and without one
def test_a_corpus_that_has_changed(copied, line, capsys):
    text = copied.parent / "text.txt"
    text.write_text(line + text.read_text())
    assert "has changed since this run began" in refused(capsys, copied)
    text.unlink()
    assert "is not there" in refused(capsys, copied)


def test_a_plain_lstm_has_no_dynamics(copied, capsys):
    edit_config(copied, model="lstm")
    assert "--dynamics needs a model with a hyper cell" in refused(capsys, copied, "--dynamics=out.png")


def test_a_prime_may_begin_with_dashes(trained, capsys):
    assert len(sample(capsys, trained, "--prime", "-- it", "--length=3").out.rstrip("\n")) >= 5
