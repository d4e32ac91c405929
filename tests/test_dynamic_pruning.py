"""experiments/dynamic_pruning.py: what a run leaves, resuming to the bit, teachers, penalties, passages, bad input."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import dynamic_pruning as script
import jax
import numpy as np
import pruning_methods as methods
import pruning_training as learning
import pytest
import text_tasks as tasks

from hyperjax import training, transformer
from hyperjax.pruning import costs

SIZES = ["--layers=2", "--width=16", "--ffn=32", "--blocks=4", "--length=24", "--prompt=8", "--batch=4"]
TINY = [*SIZES, "--steps=8", "--log-every=2", "--eval-every=4", "--eval-windows=8", "--repeats=1", "--budgets=0.85"]
CAUSAL = ["dense", "small", "static", "sequence", "layers", "token", "mod", "experts", "random_mod"]


pytestmark = pytest.mark.usefixtures("cheap_compilation")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert script.main([*TINY, "--methods", *CAUSAL, f"--workdir={workdir}"]) == 0
    return workdir


def read_summary(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    assert not any(isinstance(value, dict | list) for value in summary.values())
    needed = "params params_unique seconds device jax_version git_commit seed data steps"
    assert set(needed.split()) <= summary.keys()
    return summary


def folder(name, seed=0):
    return f"{name}{'' if name == 'dense' else '_85'}-seed{seed}"


def test_a_run_leaves_what_it_should(finished):
    summary, names = read_summary(finished), {path.name for path in finished.iterdir()}
    pictures = {"flops.png", "time.png", "open.png", "compute.png"}
    assert names >= {"config.json", *pictures, *map(folder, CAUSAL)}
    for path in [*(finished / name for name in pictures), *finished.glob("*/curves.png")]:
        assert path.read_bytes().startswith(b"\x89PNG")
    for name in CAUSAL:
        label = folder(name).removesuffix("-seed0")
        wanted = {"bpc_mean", "share_mean", "params", *(f"flops_per_token_p{p}" for p in (5, 50, 95))}
        assert {f"{label}_{key}" for key in wanted} <= summary.keys()
        assert 0 < summary[f"{label}_bpc_mean"] < 9
        p5, p50, p95 = (summary[f"{label}_flops_per_token_p{p}"] for p in (5, 50, 95))
        assert p5 <= p50 <= p95
        assert (finished / folder(name) / "curves.png").exists()
        rows = training.read_lines(finished / folder(name) / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8]
        assert [row["step"] for row in rows if "valid_bpc" in row] == [4, 8]
    assert (
        summary["params"] == summary["params_unique"] == summary["dense_params"] == summary["static_85_params"] - 2 * 8
    )
    assert summary["dense_params"] == summary["token_85_params"] - 2 * (16 + 1) * 8
    assert (summary["data"], summary["steps"], summary["seed"], summary["dense_share_mean"]) == ("pydoc", 8, 0, 1.0)


def test_times_are_of_what_saves_some(finished):
    summary = read_summary(finished)
    for name in CAUSAL:
        label = folder(name).removesuffix("-seed0")
        timed = {key for key in ("ms_b1", "ms_b32", "decode_ms") if f"{label}_{key}_mean" in summary}
        wanted = {"ms_b1", "ms_b32"} if name in ("dense", "small", "static", "sequence", "experts") else set()
        assert timed == wanted | ({"decode_ms"} if name in ("dense", "small", "static", "layers", "mod") else set())
        if "ms_b32" in timed:
            speed = summary[f"{label}_tokens_per_second_mean"] * summary[f"{label}_ms_b32_mean"] / 1e3
            assert speed == pytest.approx(32 * 24)


def test_every_method_costs_what_the_budget_says(finished):
    summary = read_summary(finished)
    whole = summary["dense_flops_per_token_p50"]
    task = script.load(script.Config(length=24, prompt=8), 0)
    dense = transformer.Config(task.vocabulary, layers=2, width=16, heads=4, ffn=32, length=24)
    assert whole == costs(dense, 24).total / 24
    assert summary["small_85_share_mean"] == pytest.approx(0.85, rel=0.02)
    assert summary["small_85_params"] < summary["params"]
    for name in ("experts", "random_mod"):  # as near as sizes allow
        assert summary[f"{name}_85_share_mean"] == pytest.approx(0.85, abs=0.05)
    for name in CAUSAL[1:]:
        mean = summary[f"{name}_85_share_mean"]
        assert summary[f"{name}_85_flops_per_token_p5"] <= whole * mean * (1 + 1e-6)
        assert summary[f"{name}_85_flops_per_token_p95"] >= whole * mean * (1 - 1e-6)


def test_the_same_command_prints_the_summary(finished, capsys):
    before = (finished / "summary.json").read_bytes()
    assert script.main([*TINY, "--methods", *CAUSAL, f"--workdir={finished}"]) == 0
    printed = capsys.readouterr().out
    assert "holds a finished run; choose another --workdir" in printed
    assert "sequence_85_share_mean" in printed
    assert (finished / "summary.json").read_bytes() == before


def test_an_interrupted_run_resumes_to_the_same_files(finished, tmp_path, monkeypatch, capsys):
    chosen = ["dense", "mod", "static"]
    command, batch_at, sixth = [*TINY, "--methods", *chosen, f"--workdir={tmp_path}"], tasks.Characters.batch_at, []

    def stop_in_the_second(task, step):
        sixth.extend([step] * (step == 5))
        if step == 5 and len(sixth) == 2:
            signal.raise_signal(signal.SIGINT)
        return batch_at(task, step)

    with monkeypatch.context() as patched:
        patched.setattr(tasks.Characters, "batch_at", stop_in_the_second)
        with pytest.raises(SystemExit) as stop:
            script.main(command)
    assert (stop.value.code, len(sixth)) == (130, 2)
    assert not (tmp_path / "summary.json").exists()
    assert not (tmp_path / folder("static")).exists()
    spent = learning.earlier(tmp_path)
    assert spent > 0
    capsys.readouterr()
    assert script.main(command) == 0
    printed = capsys.readouterr().out
    assert "dense-seed0: after step 8 of 8" in printed
    assert "mod_85-seed0: after step 6 of 8" in printed
    for name in chosen:
        path = Path(folder(name)) / "metrics.jsonl"
        assert (tmp_path / path).read_bytes() == (finished / path).read_bytes()
    summary, whole = read_summary(tmp_path), read_summary(finished)
    assert summary["seconds"] > spent
    exact = [key for key in summary if not any(word in key for word in ("seconds", "second", "ms"))]
    assert len(exact) > 25
    assert {key: summary[key] for key in exact} == {key: whole[key] for key in exact}


def test_data_that_changed_is_not_trained_on(finished, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("summary.json"))
    monkeypatch.setattr(tasks.Characters, "fingerprint", "another")
    before = (workdir / "dense-seed0" / "metrics.jsonl").read_bytes()
    assert_refused([*TINY, "--methods", *CAUSAL, f"--workdir={workdir}"], "the data pydoc has changed since", capsys)
    assert (workdir / "dense-seed0" / "metrics.jsonl").read_bytes() == before


def test_a_teacher_changes_what_is_learned(finished, tmp_path):
    assert script.main([*TINY, "--methods", "dense", "small", "--distill=2", f"--workdir={tmp_path}"]) == 0
    same, other = ("dense-seed0/metrics.jsonl", "small_85-seed0/metrics.jsonl")
    assert (tmp_path / same).read_bytes() == (finished / same).read_bytes()
    taught, alone = (
        [row for row in training.read_lines(path / other) if "loss" in row] for path in (tmp_path, finished)
    )
    assert taught[-1]["task_loss"] != alone[-1]["task_loss"]
    assert all(row["loss"] == row["task_loss"] for row in alone)
    assert all(row["loss"] > row["task_loss"] for row in taught)


def test_penalties_weigh_what_is_open():
    config = script.Config(layers=2, width=16, ffn=32, blocks=4, length=24, prompt=8, batch=4, steps=30)
    task = script.load(config, 0)
    model, batch = methods.build("static", learning.sizes(config, task), task, 0.85, 0, 4), task.batch_at(0)
    shapes = jax.eval_shape(lambda key: model.init(key, batch["tokens"]), jax.random.key(0))["params"]
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), shapes)
    gates = model.choice.gates(None, np.float32(0.1))  # of all heads and blocks alike
    wanted = {"flops": 1.0, "l1": float(gates), "l2": float(gates) ** 2}
    assert 0 < wanted["l2"] < wanted["l1"] < 1
    for penalty, value in wanted.items():
        chosen = dataclasses.replace(config, penalty=penalty, penalty_weight=0.5)
        loss = jax.jit(learning.make_loss(chosen, "static", model, task, 0.85))
        for step, ramp in ((0, 0.0), (1, 1 / 3), (7, 1.0)):  # it sets in slowly
            total, (carry, metrics) = loss({"network": params}, {"step": step}, batch, None)
            assert float(total - metrics["task_loss"]) == pytest.approx(0.5 * ramp * value, abs=1e-5)
            assert carry == {"step": step + 1}


def test_passages(tmp_path, capsys):
    chosen = ["--data=topic", "--methods", "dense", "expert_choice", "sequence", "mod", "--length=48", "--steps=4"]
    assert script.main([*TINY, *chosen, f"--workdir={tmp_path}"]) == 0
    summary = read_summary(tmp_path)
    for name in ("dense", "expert_choice", "sequence", "mod"):
        label = folder(name).removesuffix("-seed0")
        assert 0 <= summary[f"{label}_error_mean"] <= 1
        assert {f"{label}_ms_b1_mean", f"{label}_ms_b32_mean"} <= summary.keys()
        assert f"{label}_decode_ms_mean" not in summary
        error = 8 * training.read_lines(tmp_path / folder(name) / "metrics.jsonl")[-1]["valid_error"]
        assert error == pytest.approx(round(error), abs=1e-6)
    assert summary["mod_85_flops_per_token_p5"] < summary["mod_85_flops_per_token_p95"]
    assert not (tmp_path / "compute.png").exists()
    assert "4 steps of 4 x 48" in capsys.readouterr().out


def test_two_seeds_of_two_budgets(finished, tmp_path):
    chosen = ["--methods", "dense", "small", "--seeds=2", "--budgets", "0.85", "1"]
    assert script.main([*TINY, *chosen, f"--workdir={tmp_path}"]) == 0
    summary, one = read_summary(tmp_path), read_summary(finished)["dense_bpc_mean"]
    other = 2 * summary["dense_bpc_mean"] - one
    assert one != other
    assert summary["dense_bpc_std"] == pytest.approx(abs(one - other) / np.sqrt(2), rel=1e-4)
    assert summary["dense_ms_b32_std"] >= 0 < summary["dense_decode_ms_std"]
    for key in ("bpc_mean", "bpc_std", "share_mean", "params"):
        assert summary[f"small_100_{key}"] == pytest.approx(summary[f"dense_{key}"])  # the same network


def test_a_method_that_only_masks_needs_no_picture_of_time(tmp_path):
    assert script.main([*TINY, "--methods", "random_mod", f"--workdir={tmp_path}"]) == 0
    assert (tmp_path / "flops.png").exists()
    assert not (tmp_path / "time.png").exists()


def test_presets():
    quick, passages, cpu = script.defaults(), script.defaults("quick", "topic"), script.defaults("cpu")
    assert (quick.data, quick.seeds, quick.layers, quick.budgets) == ("pydoc", 1, 2, (0.6,))
    assert "expert_choice" in passages.methods
    assert (cpu.data, cpu.seeds, cpu.width) == ("ptb", 3, 96)
    for config in (quick, passages, cpu, script.defaults("cpu", "corpus")):
        script.check(config)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset=paper"], "--preset is paper, expected quick or cpu"),
        (["--data=digits"], "--data is digits, expected one of pydoc, ptb, topic, shuffled, corpus"),
        (["--data=ptb", "--data-dir=absent"], "absent"),
        (["--budgets=0"], "--budgets is (0.0,), expected in (0, 1]"),
        (["--budgets=1.5"], "--budgets is (1.5,), expected in (0, 1]"),
        (["--budgets=nan"], "--budgets is (nan,), expected in (0, 1]"),
        (["--budgets", "0.5", "0.5"], "--budgets is (0.5, 0.5), expected each once"),
        (["--methods", "dense", "dense"], "--methods is ('dense', 'dense'), expected each once"),
        (["--methods", "moe"], "--methods is ('moe',), expected some of dense, small"),
        (["--methods", "expert_choice"], "need a causal model"),
        (["--blocks=3"], "--blocks is 3, expected a divisor of --ffn, 32"),
        (["--prompt=24"], "--prompt is 24, expected 1 to 23"),
        (["--length=10000000"], "--length is 10000000, expected below"),
        (["--heads=3"], "--heads is 3, expected a divisor of half of --width, 16"),
        (["--heads=16"], "--heads is 16, expected a divisor of half of --width, 16"),
        (["--layers=1", "--methods", "mod"], "--layers is 1, expected 2 or more for mod"),
        (["--layers=1", "--methods", "sequence"], "--layers is 1, expected 2 or more for sequence"),
        (["--budgets=0.3", "--methods", "small"], "--budgets has 0.3, expected 0.360 to 1 for small"),
        (["--budgets=0.1", "--methods", "thin"], "--budgets has 0.1, expected 0."),
        (["--budgets=0.1", "--methods", "static"], "--budgets has 0.1, expected 0."),
        (["--budgets=0.3", "--methods", "token"], "--budgets has 0.3, expected 0."),
        (["--budgets=0.1", "--methods", "layers"], "--budgets has 0.1, expected 0."),
        (["--budgets=0.3", "--methods", "sequence"], "--budgets has 0.3, expected 0."),
        (["--budgets=0.3", "--methods", "random_sequence"], "--budgets has 0.3, expected 0."),
        (["--budgets=0.1", "--methods", "mod"], "--budgets has 0.1, expected 0."),
        (["--budgets=0.5", "--methods", "experts"], "--budgets has 0.5, expected 0."),
        (["--steps=0"], "--steps is 0, expected 1 or more"),
        (["--seed=-1"], "--seed is -1, expected a whole number from 0"),
        (["--learning-rate=nan"], "--learning-rate is nan, expected a positive number"),
        (["--settle=1"], "--settle is 1.0, expected a number in [0, 1)"),
        (["--settle=nan"], "--settle is nan, expected a number in [0, 1)"),
        (["--penalty=l3"], "--penalty is l3, expected lagrangian, flops, l1, l2"),
        (["--dropout=1"], "dropout is 1.0, expected a share of at least 0 and below 1"),
        (["--distill=1", "--methods", "small", "dense"], "expected dense first, the teacher of --distill"),
        (["--data=topic", "--batch=100000", "--length=48"], "batch 100000 exceeds"),
        (["--budget=0.5"], "did you mean --budgets?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert_refused([*TINY[:-1], *arguments], line, capsys)
    assert list(tmp_path.iterdir()) == []


def assert_refused(arguments, line, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert line in error


def test_windows_of_a_text_are_judged_behind_their_prompts():
    task = script.load(script.Config(length=24, prompt=8, eval_windows=5), 0)
    (batch, count), (rest, last) = task.batches("test", 4)
    text = np.asarray(task.corpus.test)
    assert (count, last) == (4, 1)
    for row, (tokens, targets) in enumerate(zip(batch["tokens"], batch["targets"], strict=True)):
        np.testing.assert_array_equal(tokens, text[16 * row : 16 * row + 24])
        np.testing.assert_array_equal(targets, text[16 * row + 1 : 16 * row + 25])
    np.testing.assert_array_equal(rest["tokens"][0], text[64:88])
    logits = np.random.default_rng(0).normal(size=(4, 24, task.vocabulary)).astype(np.float32)
    worse = logits.copy()
    worse[:, :8] = 0
    np.testing.assert_array_equal(task.figures(logits, batch), task.figures(worse, batch))
    likely = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    bits = -np.log2(np.take_along_axis(likely, batch["targets"][..., None], 2))[:, 8:, 0]
    np.testing.assert_allclose(task.figures(logits, batch), bits.mean(-1), rtol=1e-5)
    kinds = "".join("ldse."[kind] for kind in task.group_of(batch)[0])
    symbols = task.corpus.decode(batch["tokens"][0])
    wanted = [("l", str.isalpha), ("d", str.isdigit), ("s", " ".__eq__), ("e", "\n".__eq__)]
    assert kinds == "".join(next((kind for kind, test in wanted if test(s)), ".") for s in symbols)
