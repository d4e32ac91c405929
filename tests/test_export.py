"""experiments/export.py: every kind of run as a file that answers as the run's network does."""

import json
import shutil
import time
from functools import partial

import char_lm
import dynamic_pruning
import export
import export_runs
import fewshot_adaptation
import hypernet_images
import jax
import multitask_snr
import numpy as np
import pytest

from hyperjax.training import Workdir

TEXT = "".join(f"{n} green bottles, and {n * n % 97} on the wall.\n" for n in range(300))
QUICK = "--log-every=2", "--eval-every=2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a short run of each script."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    small = ["--units=8", "--hyper-units=4", "--embedding=2", "--batch=4", "--length=16", "--sample-length=5"]
    started = {
        "char": (char_lm, [f"--corpus={folder / 'text.txt'}", *small, "--steps=4", *QUICK]),
        "images": (hypernet_images, ["--features=4", "--steps=4", *QUICK]),
        "snr": (multitask_snr, ["--steps=4", "--budget=4000", *QUICK]),
        "mmoe": (multitask_snr, ["--steps=4", "--budget=4000", "--model=mmoe", *QUICK]),
    }
    for name, (script, arguments) in started.items():
        assert script.main([*arguments, f"--workdir={folder / name}"]) == 0
    few_shot(folder / "few")
    pruned(folder / "pruned")
    return folder


def few_shot(folder):
    """A run that has trained, and not yet compared."""
    config = fewshot_adaptation.Config(train_tasks=5, batch=5, samples=5, steps=4, eval_every=2)
    family = fewshot_adaptation.make_family(config)
    with Workdir(folder, config).open() as workdir:
        hyper = fewshot_adaptation.make_hyper(config, family)
        fewshot_adaptation.train(config, workdir, family, hyper, time.perf_counter())


def pruned(folder):
    """A run that has trained, and not yet measured."""
    sizes = {"width": 16, "heads": 2, "ffn": 64, "blocks": 4, "length": 16, "prompt": 4, "eval_windows": 4, "batch": 4}
    config = dynamic_pruning.Config(budgets=(0.7,), steps=4, eval_every=4, **sizes)
    task = dynamic_pruning.load(config, 0)
    with Workdir(folder, config).open() as workdir:
        for name in ("static", "sequence", "experts"):
            dynamic_pruning.train(config, name, 0.7, 0, task, workdir, f"{name}_70-seed0", None, time.perf_counter())


CASES = [
    ("char", [], "one sequence"),
    ("char", ["--function=step"], "one step"),
    ("few", ["--task=3"], "task 3 of sinusoids"),
    ("images", [], "images as bytes"),
    ("snr", [], "snr_trans on synthetic, checkpoint 4, compact"),
    ("mmoe", [], "mmoe on synthetic, checkpoint 4;"),
    ("pruned/static_70-seed0", [], "checkpoint 4, compact"),
    ("pruned/sequence_70-seed0", ["--batch=3"], "sequence_70-seed0 on pydoc"),
    ("pruned/experts_70-seed0", ["--batch=3"], "experts_70-seed0 on pydoc"),
]


@pytest.mark.parametrize(("name", "options", "line"), CASES)
def test_the_file_answers_as_the_network_does(runs, tmp_path, capsys, name, options, line):
    out = tmp_path / "model.bin"
    arguments = [f"--workdir={runs / name}", f"--out={out}", "--batches", "1", "3", "--repeats=1", *options]
    assert export.main(arguments) == 0
    printed = capsys.readouterr().out
    assert line in printed
    assert f"wrote   {out}, {out.stat().st_size / 2**20:.3f} MiB, for cpu, cuda, tpu" in printed
    fixed = "--batch=3" in options
    last = [row.split() for row in printed.splitlines()[-(1 if fixed else 2) :]]
    assert [row[0] for row in last] == (["3"] if fixed else ["1", "3"])
    assert all(float(row[-1]) <= 1e-6 and float(row[1]) > 0 < float(row[2]) for row in last)
    given = dict(option.removeprefix("--").split("=") for option in options)
    task = int(given["task"]) if "task" in given else None
    served = export_runs.open_run(runs / name, given.get("function"), task, fixed=fixed)
    arrays = list(served.inputs(3).values())
    got = jax.export.deserialize(bytearray(out.read_bytes())).call(*arrays)
    for form in (served.run, partial(served.trained, served.variables) if served.trained else served.run):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(form(*arrays)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.abs(b).max())))


def changed(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("", [], "holds no config.json that can be read; give the --workdir of a run"),
        ("nothing", [], "nothing, which is no folder; give that of a run"),
        ("char", ["--function=all"], "--function is 'all', expected step or sequence"),
        ("char", ["--task=1"], "--task is 1, but runs of char_lm.py have no such choice; drop it"),
        ("few", ["--task=5"], "--task is 5, expected one of the tasks trained on, 0 to 4"),
        ("few", ["--function=step"], "--function is step, but runs of fewshot_adaptation.py have no such choice"),
        ("pruned", [], "holds several networks; give one of experts_70-seed0, sequence_70-seed0, static_70-seed0"),
        ("pruned/sequence_70-seed0", [], "has a width for each sample of a batch; fix its size with --batch"),
        ("pruned/experts_70-seed0", [], "has places for the tokens of a batch; fix its size with --batch"),
        ("snr", ["--platforms", "gpu"], "platform 'gpu' is unknown, expected some of cpu, cuda, tpu, rocm"),
        ("snr", ["--batch=0"], "--batch is 0, expected a whole number of at least 1, or None for any"),
        ("snr", ["--batches", "0"], "--batches is (0,), expected whole numbers of at least 1"),
        ("snr", ["--repeats=0"], "--repeats is 0, expected a whole number of at least 1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_file(runs, tmp_path, capsys, name, options, line):
    out = tmp_path / "model.bin"
    out.write_bytes(b"the model of yesterday")
    with pytest.raises(SystemExit) as stop:
        export.main([f"--workdir={runs / name}", f"--out={out}", *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error
    assert out.read_bytes() == b"the model of yesterday"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "--workdir is missing; give the folder of a run"),
        (["--workdir=."], "--out is missing; give a file"),
        (["--workdir=.", "--out=."], "--out is ., expected a file in a folder that exists"),
        (["--workdir=.", "--out=nowhere/model.bin"], "--out is nowhere/model.bin, expected a file in a folder that"),
    ],
)
def test_what_is_missing_is_one_line(capsys, options, line):
    with pytest.raises(SystemExit) as stop:
        export.main(options)
    assert stop.value.code == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"seed": "none"}, "has seed 'none', expected int; restore it"),
        ({"towers": 3}, "has towers 3, expected tuple[int, ...]; restore it"),
        ({"correlation": 0.25}, "has changed since this run began; restore it"),
        ({"colour": "blue"}, "holds a run of another script, expected one of char_lm.py, "),
    ],
)
def test_a_configuration_edited_into_nonsense_is_one_line(runs, tmp_path, capsys, fields, line):

    shutil.copytree(runs / "snr", tmp_path / "snr")
    changed(tmp_path / "snr", **fields)
    with pytest.raises(SystemExit) as stop:
        export.main([f"--workdir={tmp_path / 'snr'}", f"--out={tmp_path / 'model.bin'}"])
    assert stop.value.code == 2
    assert line in capsys.readouterr().err


def test_a_file_for_other_machines_is_written_and_not_measured(runs, tmp_path, capsys):
    out = tmp_path / "model.bin"
    assert export.main([f"--workdir={runs / 'few'}", f"--out={out}", "--platforms", "tpu"]) == 0
    assert "not measured: this machine is none of its platforms" in capsys.readouterr().out
    assert jax.export.deserialize(bytearray(out.read_bytes())).platforms == ("tpu",)
