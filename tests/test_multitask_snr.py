"""experiments/multitask_snr.py: what a run leaves, resuming to the bit, every kind of data, and bad input."""

import dataclasses
import json
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import multitask_snr as script
import numpy as np
import pytest
import routing_models as models

from hyperjax import routing, training
from hyperjax.data import RowBatches, digit_tasks
from hyperjax.data.census import COLUMNS, NUMERIC

TINY = ["--parts=2", "--towers", "4", "--budget=1500", "--log-every=2"]
RUN = ["--data=digits", *TINY, "--batch=32", "--steps=14", "--log-every=3", "--eval-every=5"]


pytestmark = pytest.mark.usefixtures("cheap_compilation")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert script.main([*RUN, f"--workdir={workdir}"]) == 0
    return workdir


def read_summary(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    assert not any(isinstance(value, dict | list) for value in summary.values())
    needed = "params params_unique seconds device jax_version git_commit seed model data weighting"
    assert set(needed.split()) <= summary.keys()
    return summary


def test_a_run_leaves_what_it_should(finished, capsys):
    pictures = {"curves.png", "routing.png", "gates.png"}
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "timings.jsonl", "gates.jsonl", "checkpoints"} | pictures
    for name in pictures:
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    summary = read_summary(finished)
    scores = {"class_accuracy", "parity_auc", "at_least_5_auc", "loop_auc"}
    for split in ("valid", "test"):
        assert summary[f"{split}_quality"] == pytest.approx(np.mean([summary[f"{split}_{name}"] for name in scores]))
    assert abs(summary["params"] - 1500) <= 0.25 * 1500
    assert (summary["serving_connections_before"], summary["serving_subnetworks_before"]) == (2 * 2 + 4 * 2, 4)
    assert summary["serving_params_before"] == summary["params"] - 12  # gates go into the weights
    assert summary["serving_params"] <= summary["serving_params_before"]
    assert summary["serving_gap"] < 1e-5
    assert summary["tasks_lost"] == 0
    rows = training.read_lines(finished / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 9, 12, 14]
    valid = [row for row in rows if "valid_error" in row]
    assert [row["step"] for row in valid] == [5, 10, 14]
    assert valid[-1]["valid_error"] == pytest.approx(1 - summary["valid_quality"])
    assert valid[-1]["valid_task_loss"] == pytest.approx(summary["valid_task_loss"])
    total = [sum(row[f"{task}_loss"] for task in ("class", "parity", "at_least_5", "loop")) for row in rows[:1]]
    assert total[0] < rows[0]["loss"] < total[0] + 1e-3 * 12  # and lambda times the gates that are open
    gates = training.read_lines(finished / "gates.jsonl")
    assert [row["step"] for row in gates] == [5, 10, 14]
    assert {name: np.shape(z) for name, z in gates[0].items()} == {"step": (), "level_1": (2, 2), "towers": (4, 2)}
    assert gates[0]["towers"] != gates[1]["towers"]
    assert script.main([*RUN, f"--workdir={finished}"]) == 0
    assert "holds a finished run" in capsys.readouterr().out


def test_an_interrupted_run_resumes_to_the_same_files(finished, tmp_path, monkeypatch, capsys):
    drawn, batch_at = [], RowBatches.batch_at

    def stop_at_step_8(batches, step):
        drawn.append(step)
        if step == 7:
            signal.raise_signal(signal.SIGINT)
        return batch_at(batches, step)

    with monkeypatch.context() as patched:
        patched.setattr(RowBatches, "batch_at", stop_at_step_8)
        with pytest.raises(SystemExit) as stop:
            script.main([*RUN, f"--workdir={tmp_path}"])
    assert (stop.value.code, drawn) == (130, list(range(8)))
    assert not (tmp_path / "summary.json").exists()
    capsys.readouterr()
    assert script.main([*RUN, f"--workdir={tmp_path}"]) == 0
    assert "resuming after step 8 of 14" in capsys.readouterr().out
    for name in ("metrics.jsonl", "gates.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    one, other = (
        {name: value for name, value in read_summary(path).items() if "seconds" not in name and "ratio" not in name}
        for path in (tmp_path, finished)
    )
    assert one == other


def test_data_that_changed_is_not_trained_on(finished, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("summary.json"))
    data = digit_tasks()
    other = dataclasses.replace(data, valid=data.test)
    monkeypatch.setattr(script, "load", lambda *args, **options: other)
    before = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        script.main([*RUN, f"--workdir={workdir}"])
    assert stop.value.code == 2
    assert "the data digit_tasks has changed since this run began; choose another --workdir" in capsys.readouterr().err
    assert (workdir / "metrics.jsonl").read_bytes() == before


def census_line(number, rng):
    fields = {name: str(rng.integers(9)) if name in NUMERIC else f"{name} {rng.integers(2)}" for name in COLUMNS}
    status, income = ("Never married", "Divorced")[number % 2], ("- 50000.", "50000+.")[number // 2 % 2]
    fields |= {"education": "Children", "marital_stat": status, "income_50k": income, "instance_weight": "1.5"}
    return ", ".join(fields.values())


@pytest.fixture(scope="module")
def census(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("census") / "census-income.test"
    path.write_text("".join(census_line(number, rng) + "\n" for number in range(120)))
    return path


def test_census_with_gates_for_each_task(census, tmp_path, capsys):
    chosen = [
        "--data=census",
        f"--data-file={census}",
        f"--test-file={census}",
        "--per=task",
        "--weighting=uncertainty",
        "--target=0.9",
    ]
    assert script.main([*chosen, *TINY, "--steps=4", "--batch=16", f"--workdir={tmp_path}"]) == 0
    summary = read_summary(tmp_path)
    assert {"test_income_50k_auc", "test_never_married_auc"} <= summary.keys()
    assert summary["serving_connections_before"] == 2 * 2 * 2 + 2 * 2  # each task has its own path
    assert summary["serving_gap"] < 1e-5
    assert np.shape(training.read_lines(tmp_path / "gates.jsonl")[-1]["level_1"]) == (2, 2, 2)
    printed = capsys.readouterr().out
    assert "(120 train, 60 valid, 60 test" in printed
    assert "losses weighted by uncertainty, lambda 0.001, target 0.9" in printed


def test_multimnist_with_gates_for_each_sample(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 6, 6), np.uint8)
    labels = np.arange(60) % 10
    arrays = {"train_images": pixels[:40], "test_images": pixels[40:]}
    np.savez(tmp_path / "small.npz", **arrays, train_labels=labels[:40], test_labels=labels[40:])
    chosen = ["--data=multimnist", f"--data-file={tmp_path / 'small.npz'}", "--model=snr_aver", "--per=sample"]
    workdir = tmp_path / "run"
    sizes = ["--parts=2", "--towers", "4", "--budget=36000", "--batch=8", "--steps=3"]
    assert script.main([*chosen, *sizes, "--weighting=dynamic_average", f"--workdir={workdir}"]) == 0
    summary = read_summary(workdir)
    assert {"test_top_left_accuracy", "test_bottom_right_accuracy"} <= summary.keys()
    assert not {"serving_params", "tasks_lost"} & summary.keys()
    assert "gates of this network depend on the sample: nothing can be cut out" in capsys.readouterr().out
    assert (workdir / "gates.jsonl").read_text() == ""
    assert not (workdir / "routing.png").exists()


def test_synthetic_with_a_network_without_gates(tmp_path):
    workdir = tmp_path / "run"
    chosen = ["--model=mmoe", "--weighting=gradnorm", "--correlation=0.9", "--steps=3", "--batch=64"]
    assert script.main([*chosen, *TINY, f"--workdir={workdir}"]) == 0
    summary = read_summary(workdir)
    assert (summary["model"], summary["data"], summary["weighting"]) == ("mmoe", "synthetic", "gradnorm")
    assert {"test_first_r2", "test_second_mse"} <= summary.keys()
    assert "serving_params" not in summary
    (row,) = [row for row in training.read_lines(workdir / "metrics.jsonl") if row["step"] == 3 and "loss" in row]
    assert {"first_loss", "second_loss"} <= row.keys()
    assert "served_share" not in row


def test_a_task_without_path_is_reported(tmp_path, capsys):
    data = digit_tasks()
    model = script.make_model(script.Config(data="digits", parts=2, towers=(4,), budget=1500), data)
    network = model.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    closed = jnp.full((4, 2), 3.0).at[sorted(data.tasks).index("loop")].set(-9.0)
    network["towers"]["log_alpha"] = closed
    gates = routing.served_gates(model, {"params": network})
    with training.JsonLines(tmp_path / "gates.jsonl", 0) as lines:
        for step in (1, 2):
            lines.write(step, **{name: z.tolist() for name, z in gates.items()})
    assert script.serve(model, network, data, SimpleNamespace(path=tmp_path)) == {"tasks_lost": 1}
    assert "no path is left to loop: not compacted; lower --l0, or raise --target or --open" in capsys.readouterr().out
    assert (tmp_path / "routing.png").exists()


@pytest.mark.parametrize("name", models.MODELS)
def test_every_network_meets_the_budget(name):
    model = script.make_model(script.Config(model=name, data="digits", budget=6_000), digit_tasks())
    size = routing.count_parameters(model, jax.ShapeDtypeStruct((1, 64), jnp.float32))
    assert abs(size - 6_000) <= 0.25 * 6_000
    if name.startswith("snr"):
        assert model.gates == routing.HardConcrete(0.6, -0.5, 1.5, 0.5)


def test_presets():
    quick, cpu = script.defaults(), script.defaults("cpu", "census", "mmoe")
    assert (quick.data, quick.model, quick.batch, quick.steps) == ("synthetic", "snr_trans", 256, 2000)
    assert (cpu.batch, cpu.steps, cpu.budget) == (512, 1500, 48_000)
    assert script.defaults("cpu", "multimnist").learning_rate == 1e-3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset=paper"], "--preset is paper, expected quick or cpu"),
        (["--data=cifar"], "--data is cifar, expected one of synthetic, digits, census, multimnist"),
        (["--model=moe"], "--model is moe, expected one of snr_trans, snr_aver"),
        (["--weighting=equal"], "--weighting is equal, expected one of fixed, uncertainty, gradnorm, dynamic_average"),
        (["--per=row", "--data=digits"], "per is 'row', expected 'connection', 'task' or 'sample'"),
        (["--per=task", "--model=ple"], "--per is task, expected connection: ple has no such gates"),
        (["--model=mmoe", "--target=0.5"], "--target is 0.5, expected none: mmoe has no gates to steer"),
        (["--model=ungated", "--target=0.5"], "--target is 0.5, expected none: ungated has no gates"),
        (["--target=1"], "--target is 1.0, expected a share inside of (0, 1), or none"),
        (["--data-file=a.csv"], "--data-file is a.csv, but --data synthetic reads no such file; leave it out"),
        (["--data=digits", "--test-file=a.csv"], "--test-file is a.csv, but --data digits reads no such file"),
        (["--data=census"], "--data census needs --data-file with census-income.data"),
        (["--data=census", "--data-file=absent.csv"], "absent.csv"),
        (["--data=digits", "--batch=5000"], "batch 5000 exceeds the 1293 rows of the split; lower the batch"),
        (["--data=digits", "--budget=20"], "the budget is 20 parameters, but widths 1 to 4096 come no closer"),
        (["--steps=0"], "--steps is 0, expected 1 or more"),
        (["--learning-rate=nan"], "--learning-rate is nan, expected a positive number"),
        (["--gate-rate=0"], "--gate-rate is 0.0, expected a positive number"),
        (["--l0=-1"], "--l0 is -1.0, expected a number of at least 0"),
        (["--seed=-1"], "--seed is -1, expected a whole number from 0"),
        (["--data=digits", "--beta=0"], "beta is 0.0"),
        (["--data=digits", "--open=1"], "1.0"),
        (["--data=digits", "--towers", "0"], "0"),
        (["--correlation=2"], "correlation is 2.0, expected -1 to 1"),
        (["--budgets=1"], "did you mean --budget?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert_refused(arguments, line, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_table_is_one_line(census, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = census.read_text().splitlines()
    for change, line in [
        (lines[6] + ", 1", "line 7"),
        (lines[6].replace("50000", "40000"), "line 7: income_50k is"),
        ("x" + lines[6], "line 7: age is"),
    ]:
        (tmp_path / "damaged.csv").write_text("\n".join([*lines[:6], change, *lines[7:]]))
        assert_refused(["--data=census", "--data-file=damaged.csv"], line, capsys)
    assert_refused(["--data=census", f"--data-file={census}", "--group=age"], "group 'age' is unknown", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.csv"]


def assert_refused(arguments, line, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert line in error
