"""experiments/share_layers.py: what a run leaves, every row, resuming to the bit, plans anew, bad input."""

import json
import signal

import jax
import numpy as np
import pytest
import share_layers as script
import sharing_rows as rows
import text_tasks as tasks

from hyperjax import sharing, training
from hyperjax.pruning import costs

SIZES = ["--layers=4", "--sets=2", "--width=16", "--heads=2", "--ffn=16", "--length=16", "--prompt=4", "--batch=4"]
SHORT = ["--steps=8", "--extra=6", "--log-every=2", "--eval-every=4", "--eval-windows=4", "--repeats=1", "--soft=0.34"]
TINY = [*SIZES, *SHORT, "--replan-every=3"]
SOME = ["unshared", "wide", "cycle", "replanned", "to_unshared", "to_loss", "to_lora"]


pytestmark = pytest.mark.usefixtures("cheap_compilation")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert script.main([*TINY, "--rows", *SOME, f"--workdir={workdir}"]) == 0
    return workdir


def test_a_run_leaves_what_it_should(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert not any(isinstance(value, dict | list) for value in summary.values())
    needed = "params params_unique seconds device jax_version git_commit seed data steps extra"
    assert set(needed.split()) <= summary.keys()
    keys = "bpc_mean params_unique flops_per_token ms_per_step peak_bytes optimizer_bytes"
    for name in SOME:
        assert {f"{name}_{key}" for key in keys.split()} <= summary.keys()
        assert 0 < summary[f"{name}_bpc_mean"] < 9
    for path in [finished / "cka.png", finished / "params.png", *finished.glob("*/curves.png")]:
        assert path.read_bytes().startswith(b"\x89PNG")
    folders = {path.name for path in finished.iterdir() if path.is_dir()}
    assert {"to_loss-soft-seed0", "to_loss-seed0", "replanned-0-seed0", "replanned-6-seed0", "to_lora-seed0"} <= folders
    lines = training.read_lines(finished / "to_loss-seed0" / "metrics.jsonl")
    assert [row["step"] for row in lines if "loss" in row] == [12, 14]  # after 8 and 2
    soft = [
        row["apart"] for row in training.read_lines(finished / "to_loss-soft-seed0" / "metrics.jsonl") if "apart" in row
    ]
    assert all(0 < apart < 1 for apart in soft)


def test_what_is_saved_is_parameters_not_operations(finished):
    summary = json.loads((finished / "summary.json").read_text())
    whole = summary["unshared_flops_per_token"]
    for name in ("cycle", "to_loss"):
        assert summary[f"{name}_flops_per_token"] == whole
        assert summary[f"{name}_params_unique"] == summary["cycle_params_unique"] < 0.7 * summary["params"]
        assert len(set(summary[f"{name}_maps"].split())) == 2
        ratio = summary[f"{name}_optimizer_bytes"] / summary["unshared_optimizer_bytes"]
        assert ratio == pytest.approx(summary[f"{name}_params_unique"] / summary["params"], rel=0.01)
    assert summary["wide_flops_per_token"] == pytest.approx(whole, rel=0.15)
    assert 0.8 < summary["to_lora_params_unique"] / summary["cycle_params_unique"] <= 1


def test_the_same_command_prints_the_summary(finished, capsys):
    before = (finished / "summary.json").read_bytes()
    assert script.main([*TINY, "--rows", *SOME, f"--workdir={finished}"]) == 0
    assert "holds a finished run; choose another --workdir" in capsys.readouterr().out
    assert (finished / "summary.json").read_bytes() == before


def test_an_interrupted_run_resumes_to_the_same_files(finished, tmp_path, monkeypatch, capsys):
    command = [*TINY, "--rows", "unshared", "replanned", "to_loss", f"--workdir={tmp_path}"]
    batch_at = tasks.Characters.batch_at
    for at, count in ((4, 2), (12, 1)):  # in the second stage of `replanned`, and in the last of `to_loss`
        seen = []

        def stop(task, step, at=at, count=count, seen=seen):
            seen.extend([step] * (step == at))
            if step == at and len(seen) == count:
                signal.raise_signal(signal.SIGINT)
            return batch_at(task, step)

        with monkeypatch.context() as patched:
            patched.setattr(tasks.Characters, "batch_at", stop)
            with pytest.raises(SystemExit) as stopped:
                script.main(command)
        assert stopped.value.code == 130
    assert script.main(command) == 0
    for path in tmp_path.glob("*/metrics.jsonl"):
        assert path.read_bytes() == (finished / path.relative_to(tmp_path)).read_bytes(), path
    summary, whole = (json.loads((path / "summary.json").read_text()) for path in (tmp_path, finished))
    for key in ("replanned_bpc_mean", "replanned_maps", "to_loss_bpc_mean", "to_loss_maps"):
        assert summary[key] == whole[key]


def test_every_row_can_be_made(monkeypatch):
    search, maps = rows.searched, {}

    def once(kind, *args):  # `to_loss` and `to_scale` ask for the same map
        maps[kind] = maps[kind] if kind in maps else search(kind, *args)
        return maps[kind]

    monkeypatch.setattr(rows, "searched", once)
    config = script.Config(layers=6, sets=3, width=16, heads=2, ffn=16, length=16, prompt=4, batch=4)
    task = script.load(config, 0)
    sizes, example = script.sizes(config, task), task.batch_at(0)["tokens"]
    teacher = jax.jit(rows.Decoder(sizes).init)(jax.random.key(0), example)["params"]
    counts = {}
    for name in rows.ROWS:
        made = rows.scratch(name, config, sizes, 0) if name in rows.SCRATCH else None
        made = made or rows.converted(name, config, sizes, 0, task, teacher, example)
        counts[name] = rows.unique(made.net, example)
        if made.transfer is not None:
            start = made.transfer(teacher)  # what the network takes
            shapes = jax.eval_shape(made.net.init, jax.random.key(0), example)["params"]
            assert jax.tree.map(np.shape, start) == jax.tree.map(np.shape, shapes)
            logits = jax.eval_shape(lambda p, made=made: rows.logits_of(made.net, p, example), start)
            assert logits.shape == (4, 16, task.vocabulary)
    equal = {
        counts[name] for name in ("groups", "cycle", "cycle_reverse", "middle_cycle", "random", "to_cka", "to_greedy")
    }
    assert len(equal) == 1
    assert counts["all"] < min(equal) < counts["unshared"]
    assert counts["all"] < counts["attention"] < counts["ffn"] < counts["unshared"]  # attention is larger here
    assert costs(sizes, 16).total == costs(rows.scratch("cycle", config, sizes, 0).sized, 16).total


def test_a_budget_chooses_the_sets():
    sizes = {"layers": 4, "width": 16, "heads": 2, "ffn": 16, "length": 16, "prompt": 4, "batch": 4}
    config = script.Config(rows=("unshared", "groups"), **sizes)
    for budget, sets in ((1.0, 4), (0.9, 3), (0.75, 2)):
        config = script.dataclasses.replace(config, budget=budget)
        assert script.within_budget(config).sets == sets


def test_random_maps_differ_and_have_all_sets():
    found = [rows.random_map(6, 3, seed) for seed in range(20)]
    assert len(set(found)) > 10
    assert all(len(set(layer_map)) == 3 and layer_map == sharing.canonical(layer_map) for layer_map in found)


def test_presets():
    quick, cpu = script.defaults(), script.defaults("cpu")
    assert (quick.data, quick.seeds, quick.rows[0]) == ("pydoc", 1, "unshared")
    assert (cpu.data, cpu.seeds, cpu.layers) == ("ptb", 3, 6)
    for config in (quick, cpu):
        script.check(config)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset=paper"], "--preset is paper, expected quick or cpu"),
        (["--data=digits"], "--data is digits, expected pydoc or ptb"),
        (["--data=ptb", "--data-dir=absent"], "absent"),
        (["--rows", "moe"], "--rows is ('moe',), expected some of unshared, shallow"),
        (["--rows", "cycle", "cycle"], "expected each once"),
        (["--rows", "cycle", "to_cka"], "expected unshared first, the teacher of the rows to_X"),
        (["--sets=5"], "--sets is 5, expected at most --layers, 4"),
        (["--sets=3", "--rows", "cycle"], "--sets is 3, expected a divisor of --layers, 4, for cycle"),
        (["--rows", "middle_cycle"], "--sets is 2, expected 3 or more"),
        (["--budget=0"], "--budget is 0.0, expected a share in (0, 1]"),
        (["--budget=0.1"], "below"),
        (["--transfer=average"], "--transfer is average, expected one of mean, first"),
        (["--prompt=16"], "--prompt is 16, expected 1 to 15"),
        (["--heads=3"], "--heads is 3, expected a divisor of half of --width, 16"),
        (["--length=10000000"], "--length is 10000000, expected below"),
        (["--steps=0"], "--steps is 0, expected 1 or more"),
        (["--soft=1"], "--soft is 1.0, expected a number in [0, 1)"),
        (["--distill=nan"], "--distill is nan, expected a number of at least 0"),
        (["--extra-rate=0"], "--extra-rate is 0.0, expected a positive number"),
        (["--seed=-1"], "--seed is -1, expected a whole number from 0"),
        (["--set=2"], "did you mean --sets?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main([*TINY, *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert line in error
    assert list(tmp_path.iterdir()) == []
