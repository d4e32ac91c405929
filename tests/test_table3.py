"""experiments/table3.py: finished runs go into one file, once each, and out of it beside the paper's figures."""

import dataclasses
import json

import char_lm
import pytest
import table3

from hyperjax.recurrent import PAPER_MODELS


def make_run(folder, model="lstm", seed=0, test_bpc=1.5, **changes):
    """The two files that a run leaves and this script reads."""
    folder.mkdir()
    config = dataclasses.replace(char_lm.defaults("reduced", model), seed=seed, **changes)
    (folder / "config.json").write_text(json.dumps({**dataclasses.asdict(config), "data_dir": "/somewhere"}))
    figures = {"valid_bpc": test_bpc + 0.04, "test_bpc": test_bpc, "seed": seed, "params": 323_382, "steps": 7835}
    figures |= {"best_step": 7835, "seconds": 900.5, "chars_per_second": 28_000, "jax_version": "0.10.2"}
    figures |= {"device": "2 CPU cores", "git_commit": "abc", "model": model}
    (folder / "summary.json").write_text(json.dumps(figures))
    return folder


def collect(tmp_path, *folders, preset="reduced"):
    results = tmp_path / "results" / "ptb.json"
    assert table3.main([*map(str, folders), f"--results={results}", f"--preset={preset}"]) == 0
    return json.loads(results.read_text())


def test_the_published_rows_are_the_models():
    assert list(table3.PUBLISHED) == list(PAPER_MODELS)


def test_seeds_of_one_configuration_are_one_line(tmp_path, capsys):
    one, two = make_run(tmp_path / "a", test_bpc=1.5), make_run(tmp_path / "b", seed=1, test_bpc=1.52)
    other = make_run(tmp_path / "c", model="ln_hyper_lstm", test_bpc=1.4, learning_rate=3e-3)
    runs = collect(tmp_path, other, two, one)
    assert [(run["config"]["model"], run["seed"]) for run in runs] == [("lstm", 0), ("lstm", 1), ("ln_hyper_lstm", 0)]
    assert runs[1]["command"] == "python experiments/char_lm.py --preset reduced --model lstm --seed 1"
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 2
    assert "| 2 | 1.550 ± 0.014 | 1.510 ± 0.014 | 1.347 | 1.312 | 2.99 | 2 CPU cores |" in lines[0]
    assert "`--preset reduced --model ln_hyper_lstm --learning-rate 0.003` " in lines[1]


def test_the_commands_in_the_file_are_those_of_the_runs(tmp_path, monkeypatch):
    (run,) = collect(tmp_path, make_run(tmp_path / "a", steps=70, seed=3, dtype="bfloat16"))
    arguments = run["command"].split()[2:]
    config = char_lm.training.parse(char_lm.defaults, argv=arguments)
    want = dataclasses.replace(char_lm.defaults("reduced", "lstm"), steps=70, seed=3, dtype="bfloat16")
    assert config == want
    assert not set(char_lm.FREE) & run["config"].keys()


def test_a_run_collected_again_replaces_the_old_one(tmp_path):
    collect(tmp_path, make_run(tmp_path / "a", test_bpc=1.5), make_run(tmp_path / "b", seed=1))
    runs = collect(tmp_path, make_run(tmp_path / "again", test_bpc=1.4))
    assert [run["test_bpc"] for run in runs] == [1.4, 1.5]


def test_unfinished_runs_are_left_out(tmp_path, capsys):
    unfinished = make_run(tmp_path / "b", seed=1)
    (unfinished / "summary.json").unlink()
    assert len(collect(tmp_path, make_run(tmp_path / "a"), unfinished)) == 1
    assert "b has not finished: left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda run: (run / "config.json").unlink(), "holds no config.json; give the workdir of char_lm.py"),
        (lambda run: (run / "config.json").write_text("{"), "config.json cannot be read, expected JSON"),
        (lambda run: (run / "config.json").write_text('{"preset": "quick", "corpus": "pydoc"}'), "'quick' on 'pydoc'"),
        (lambda run: (run / "summary.json").write_text('{"seed": 0}'), "summary.json lacks device, jax_version"),
    ],
)
def test_bad_folders_are_one_line(tmp_path, capsys, damage, line):
    good, bad = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)
    damage(bad)
    with pytest.raises(SystemExit) as stop:
        collect(tmp_path, good, bad)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_nothing_to_print_is_one_line(tmp_path, capsys):
    for arguments, line in (([], "holds no run"), (["--preset=cpu"], "--preset is cpu, expected reduced or paper")):
        with pytest.raises(SystemExit):
            table3.main([f"--results={tmp_path / 'absent.json'}", *arguments])
        assert line in capsys.readouterr().err


def test_levers_have_no_published_figures(tmp_path, capsys):
    config = dataclasses.asdict(char_lm.defaults("levers", "tied"))
    run = make_run(tmp_path / "a")
    (run / "config.json").write_text(json.dumps(config))
    (found,) = collect(tmp_path, run, preset="levers")
    assert found["command"] == "python experiments/char_lm.py --preset levers --model tied"
    assert table3.command({**config, "model": "base"}).endswith("--model base --input-units 192 --tied")
    header, _, line = capsys.readouterr().out.splitlines()
    assert "paper" not in header
    assert line.count("|") == header.count("|") == 8
