"""experiments/sweep_snr.py: what a sweep leaves, going on after a kill, its random search, and bad input."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import sweep_snr as script

from hyperjax import routing, training
from hyperjax.data import TaskData, TaskSplit
from hyperjax.data.multitask import SPLITS

SIZES = ["--budgets", "1400", "--search-budget=1400", "--parts=2", "--towers", "4", "--steps=4", "--batch=16"]
RUN = ["--models", "snr_sparse", "shared_bottom", *SIZES, "--search=2", "--seeds=2"]


pytestmark = pytest.mark.usefixtures("cheap_compilation")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert script.main([*RUN, f"--workdir={workdir}"]) == 0
    return workdir


def test_a_sweep_leaves_what_it_should(finished, capsys):
    assert {path.name for path in finished.iterdir()} >= {
        *("config.json", "metrics.jsonl", "timings.jsonl", "summary.json", "quality.png")
    }
    assert (finished / "quality.png").read_bytes().startswith(b"\x89PNG")
    rows = training.read_lines(finished / "metrics.jsonl")
    groups = [(row["step"], row["model"], row.get("trial"), row.get("budget"), row["seed"]) for row in rows]
    assert groups == [
        *((1, "snr_sparse", 0, None, 0), (1, "snr_sparse", 1, None, 0)),
        *((2, "snr_sparse", None, 1400, 0), (2, "snr_sparse", None, 1400, 1)),
        *((3, "shared_bottom", 0, None, 0), (3, "shared_bottom", 1, None, 0)),
        *((4, "shared_bottom", None, 1400, 0), (4, "shared_bottom", None, 1400, 1)),
    ]
    scores = ("class_accuracy", "parity_auc", "at_least_5_auc", "loop_auc")
    for row in rows:
        for split in ("valid", "test"):
            assert row[f"{split}_quality"] == pytest.approx(np.mean([row[f"{split}_{name}"] for name in scores]))
        assert 0 < row["params"] <= 1.15 * 1400
        assert 0 < row["connections_open"] <= 1
        assert row["failed"] == 0
    assert rows[2]["test_quality"] != rows[3]["test_quality"]  # seeds differ
    summary = json.loads((finished / "summary.json").read_text())
    assert not any(isinstance(value, dict | list) for value in summary.values())
    needed = "params params_unique seconds device jax_version git_commit seed data steps trials_per_minute"
    assert set(needed.split()) <= summary.keys()
    assert summary["trials_per_minute"] > 0
    for name, at in (("snr_sparse", 2), ("shared_bottom", 4)):
        runs = [row for row in rows if row["step"] == at]
        for key in ("params", "tasks_lost", "test_quality", "test_parity_auc"):
            assert summary[f"{name}_1400_{key}"] == pytest.approx(np.mean([run[key] for run in runs]), abs=1e-6)
        deviation = np.std([run["test_quality"] for run in runs], ddof=1)
        assert summary[f"{name}_1400_test_quality_std"] == pytest.approx(deviation, abs=1e-6)
        trials = [row for row in rows if row["step"] == at - 1]
        best = max(trials, key=lambda row: (not row["tasks_lost"], row["valid_quality"]))
        assert summary[f"{name}_learning_rate"] == best["learning_rate"]
        for key in ("beta", "gamma", "zeta", "open", "l0", "ramp", "target"):  # only gates have these
            assert summary.get(f"{name}_{key}") == (best[key] if name == "snr_sparse" else None)
    assert script.main([*RUN, f"--workdir={finished}"]) == 0
    assert "holds a finished run" in capsys.readouterr().out


def test_a_killed_sweep_repeats_no_group_that_was_finished(finished, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("summary.json"))
    lines = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:30])  # within the last group
    trained, train = [], script.Group.train

    def counting(group, *arguments):
        trained.append(type(group.model).__name__)
        return train(group, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(script.Group, "train", counting)
        assert script.main([*RUN, f"--workdir={workdir}"]) == 0
    assert trained == ["SharedBottom"]
    assert "resuming after 3 of 4 groups of runs" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == b"".join(lines)
    one, other = (json.loads((path / "summary.json").read_text()) for path in (workdir, finished))
    assert one.pop("seconds") > 0
    other.pop("seconds")
    assert one == other
    times = [training.read_lines(path / "timings.jsonl") for path in (workdir, finished)]
    assert [len(rows) for rows in times] == [4, 4]
    assert times[0][:3] == times[1][:3]


def test_ctrl_c_keeps_what_is_there(finished, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("summary.json"))
    lines = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_bytes(b"".join(lines[:4]))

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.Group, "train", interrupted)
    with pytest.raises(SystemExit) as stop:
        script.main([*RUN, f"--workdir={workdir}"])
    assert stop.value.code == 130
    assert "to resume: python" in capsys.readouterr().err
    assert (workdir / "metrics.jsonl").read_bytes() == b"".join(lines[:4])
    (workdir / "metrics.jsonl").write_bytes(b"{}\n" + b"".join(lines))
    with pytest.raises(SystemExit) as stop:
        script.main([*RUN, f"--workdir={workdir}"])
    assert stop.value.code == 2
    assert "line 1 of" in capsys.readouterr().err


def test_synthetic_data_is_drawn_anew_for_each_seed(monkeypatch):
    def load(name, data_file, test_file, *, group, correlation, seed):
        x = np.full((6, 3), seed, np.float32)
        parts = {part: TaskSplit({"x": x + n}, {"size": x[:, 0] - n}) for n, part in enumerate(SPLITS)}
        return TaskData("little", **parts, tasks={"size": routing.Regression()}, encode=lambda features: features["x"])

    monkeypatch.setattr(script, "load", load)
    config = script.Config(data="synthetic", seeds=2, seed=5)
    _, splits, own = script.read_splits(config)
    assert own
    for n, part in enumerate(SPLITS):
        assert splits[part]["x"].shape == (2, 6, 3)
        assert splits[part]["x"][:, 0, 0].tolist() == [5 + n, 6 + n]
        assert splits[part]["size"][:, 3].tolist() == [5 - n, 6 - n]
    _, splits, own = script.read_splits(dataclasses.replace(config, data="digits"))
    assert (own, splits["train"]["x"].shape) == (False, (6, 3))


def test_the_search_is_the_same_for_all_but_dense_pays_nothing():
    config = script.Config(search=200, seed=3)
    drawn = script.draw(config, "snr_sparse")
    assert drawn == script.draw(config, "snr_sparse") == script.draw(config, "mmoe")
    assert drawn[:4] == script.draw(dataclasses.replace(config, search=4), "mmoe")  # a longer search begins alike
    assert drawn != script.draw(dataclasses.replace(config, seed=4), "mmoe")
    assert script.draw(config, "snr_dense") == [one | {"l0": 0.0} for one in drawn]
    ranges = {"beta": (0.5, 0.9), "gamma": (-1, -0.1), "zeta": (1.1, 2)}  # the paper's
    for name, (low, high) in ranges.items():
        values = np.array([one[name] for one in drawn])
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high
    for name in ("open", "ramp", "target"):
        values = [one[name] for one in drawn]
        assert 0 < min(values) < max(values) - 0.2
        assert max(values) < 1
    assert {one["l0"] for one in drawn} == {1e-3, 1e-4, 1e-5}
    rates = np.log10([one["learning_rate"] for one in drawn])
    assert -3 <= rates.min() < rates.max() <= -2
    assert np.median(rates) == pytest.approx(-2.5, abs=0.1)  # even on a logarithmic scale
    stacked = script.stack(drawn)
    np.testing.assert_allclose(stacked["beta"], [one["beta"] for one in drawn], rtol=1e-6)


def test_the_best_setting_has_neither_failed_nor_lost_a_task():
    config = script.Config(search=5, search_seeds=2)
    values = {0: (0.5, 0.7), 1: (0.99, 0.99), 2: (0.2, 0.9), 3: (0.62, 0.64)}
    rows = [
        {"model": "mmoe", "trial": t, "valid_quality": quality, "tasks_lost": int(t == n == 1), "failed": 0}
        for t, pair in values.items()
        for n, quality in enumerate(pair)
    ]
    rows += [{"model": "mmoe", "trial": 4, "failed": 1}, rows[2] | {"trial": 4}, {"model": "mmoe", "budget": 9}]
    rows += [rows[2] | {"model": "ple", "trial": 0}]
    drawn = script.draw(config, "mmoe")
    assert script.best_of(config, "mmoe", rows) == drawn[3]  # 0.63 on average
    lost = [row | {"tasks_lost": 1} for row in rows if not row.get("failed")] + [rows[-4]]
    assert script.best_of(config, "mmoe", lost) == drawn[1]  # all lost some: the best of them
    with pytest.raises(training.NonFinite, match="every setting of mmoe put out NaN or infinity"):
        script.best_of(config, "mmoe", [row | {"failed": 1} for row in rows])


def test_pictures_of_many_networks_and_of_bad_ones(tmp_path):
    config = script.Config(models=script.NETWORKS, budgets=(10, 20), seeds=1)
    rows = []
    for name in config.models:
        rows.append({"model": name, "trial": 0, "params": 10, "valid_quality": -0.01, "failed": 0})
        rows.append({"model": name, "trial": 1, "failed": 1})
        rows += [{"model": name, "budget": b, "seed": 0, "params": b, "test_quality": -0.5} for b in (10, 20)]
    script.draw_figures(config, rows, tmp_path)
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_presets():
    cpu, census = script.defaults("cpu"), script.defaults("cpu", "census")
    assert (script.defaults().data, cpu.data, cpu.seeds, len(cpu.budgets)) == ("digits", "synthetic", 5, 4)
    assert (census.seeds, census.batch, census.search_budget) == (3, 512, 48_000)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset=paper"], "--preset is paper, expected quick or cpu"),
        (["--data=cifar"], "--data is cifar, expected one of synthetic, digits"),
        (["--models", "mmoe", "moe"], "--models is ('mmoe', 'moe'), expected some of snr_dense, snr_sparse"),
        (["--models", "mmoe", "mmoe"], "--models is ('mmoe', 'mmoe'), expected each once"),
        (["--budgets", "3000", "3000"], "--budgets is (3000, 3000), expected each once"),
        (["--budgets", "9"], "the budget is 9 parameters, but widths 1 to 4096 come no closer"),
        (["--budgets"], "--budgets is (), expected one or more"),
        (["--learning-rates", "1e-2", "1e-3"], "--learning-rates is (0.01, 0.001), expected two positive numbers"),
        (["--gate-rate=inf"], "--gate-rate is inf, expected a positive number"),
        (["--steps=0"], "--steps is 0, expected 1 or more"),
        (["--towers", "0"], "--towers is (0,), expected nothing below 1"),
        (["--search-seeds=3"], "--search-seeds is 3, expected at most 2 seeds"),
        (["--seed=2147483647"], "--seed is 2147483647, expected a whole number from 0 to 2147483646, for 2 seeds"),
        (["--data-file=a.npz"], "--data-file is a.npz, but --data digits reads no such file; leave it out"),
        (["--data=census"], "--data census needs --data-file"),
        (["--data=synthetic", "--correlation=2"], "correlation is 2.0, expected -1 to 1"),
        (["--budget=1"], "did you mean --budgets?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert line in error
    assert list(tmp_path.iterdir()) == []
