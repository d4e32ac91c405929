"""experiments/continual_digits.py: less is forgotten, runs resume to the bit, bad input is one line."""

import json
import signal

import continual_digits as script
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import training
from hyperjax.data import Images, Split, load_images
from hyperjax.hypernet.continual import continual_scores

TINY = ["--num-tasks=3", "--embedding-dim=16", "--features=32", "--batch=16", "--learning-rate=0.01", "--log-every=7"]
RUN = ["--tasks=permuted", *TINY, "--hidden", "16", "--steps-per-task=60", "--beta=0.05", "--seed=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert script.main([*RUN, f"--workdir={workdir}"]) == 0
    return workdir


def test_a_run_leaves_what_it_should(finished, capsys):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "timings.jsonl", "summary.json", "accuracy.png", "checkpoints"}
    summary = json.loads((finished / "summary.json").read_text())
    needed = "params params_unique main_params seconds device jax_version git_commit seed tasks data beta num_tasks"
    assert set(needed.split()) <= summary.keys()
    assert not any(isinstance(value, dict | list) for value in summary.values())
    assert summary["main_params"] == 64 * 16 + 16 + 16 * 10 + 10
    matrices = script.read_matrices(finished / "metrics.jsonl", ("plain", "regularised"), 3)
    for learner, matrix in matrices.items():
        np.testing.assert_array_equal(np.isfinite(matrix), np.tri(3, dtype=bool))
        assert continual_scores(matrix) == {
            name: summary[f"{learner}_{name}"] for name in ("accuracy", "accuracy_when_learned", "forgetting")
        }
    assert script.main([*RUN, f"--workdir={finished}"]) == 0
    assert "holds a finished run" in capsys.readouterr().out


def test_the_regulariser_prevents_forgetting(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["regularised_accuracy_when_learned"] > 0.5
    assert summary["regularised_forgetting"] < summary["plain_forgetting"] - 0.1
    assert summary["regularised_accuracy"] > summary["plain_accuracy"] + 0.05
    rows = [row for row in training.read_lines(finished / "metrics.jsonl") if "loss" in row]
    first = [row for row in rows if row["step"] <= 60]
    assert {row["penalty"] for row in first} == {0.0}  # no old task yet: the two learners are one
    assert all(row["plain_loss"] == pytest.approx(row["regularised_loss"], rel=1e-3) for row in first)
    assert all(row["penalty"] > 0 for row in rows if row["step"] > 67)


def test_a_run_stopped_within_a_task_resumes_to_the_same_metrics(finished, tmp_path, monkeypatch, capsys):
    prepare, prepared = script.Task.prepare, []

    def stop_at_step_75(task, images, peak):
        prepared.append(len(images) == 16)
        if sum(prepared) == 75:
            signal.raise_signal(signal.SIGINT)
        return prepare(task, images, peak)

    with monkeypatch.context() as patched:
        patched.setattr(script.Task, "prepare", stop_at_step_75)
        with pytest.raises(SystemExit) as stop:
            script.main([*RUN, f"--workdir={tmp_path}"])
    assert stop.value.code == 130
    assert not (tmp_path / "summary.json").exists()
    capsys.readouterr()
    assert script.main([*RUN, f"--workdir={tmp_path}"]) == 0
    assert "resuming after step 75 of 180" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_embeddings_of_other_tasks_stay_where_they_are():
    config = script.Config(num_tasks=2, embedding_dim=4, hidden=(6,), features=5, learning_rate=0.1, beta=1.0)
    hyper = script.make_hyper(config, load_images("digits"))
    optimizer, create, begin = script.make_start(config, hyper, 64)
    step = training.make_step(script.make_loss(config, hyper), optimizer)
    batch = {"images": np.ones((2, 64), np.float32), "labels": np.array([0, 1], np.int32)}
    state, tables, penalties = jax.jit(create)(jax.random.key(0)), [], []
    for task in (0, 1):
        state = begin(state, task)
        for _ in range(2):
            tables.append({name: np.asarray(params["embedding"]) for name, params in state.params.items()})
            state, metrics = step(state, batch, jax.random.key(1))
            penalties.append(float(metrics["penalty"]))
    after = {name: np.asarray(params["embedding"]) for name, params in state.params.items()}
    for name in ("plain", "regularised"):
        assert np.all(tables[2][name][0] != tables[0][name][0])  # task 0 learns its own
        np.testing.assert_array_equal(tables[2][name][1], tables[0][name][1])
        np.testing.assert_array_equal(after[name][0], tables[2][name][0])  # and task 1 does not move it
        assert np.all(after[name][1] != tables[2][name][1])
    assert penalties[:3] == [0.0, 0.0, 0.0]
    assert penalties[3] > 0


def fake_images(side, classes=10):
    labels = np.arange(4 * classes, dtype=np.int32) % classes
    pixels = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, side, side, 1), np.uint8)
    split = Split(pixels, labels)
    return Images("fake", split, Split(pixels[::-1], labels[::-1]), split, classes)


@pytest.mark.parametrize(
    ("tasks", "main_params", "beta", "learned"),
    [("split", 475_202, 0.01, 42_000), ("permuted", 1_796_010, 0.1, 78_000)],
)
def test_the_paper_preset_is_the_papers(tasks, main_params, beta, learned):
    config = script.defaults("paper", tasks)
    images = fake_images(28)
    hyper = script.make_hyper(config, images)
    assert sum(spec.size for spec in hyper.targets[0].structure.specs) == main_params
    assert (config.beta, config.batch, config.num_tasks) == (beta, 128, 5 if tasks == "split" else 10)
    shapes = jax.eval_shape(lambda: hyper.init(jax.random.key(0), jnp.zeros((1, 784)), task_id=0))
    (generator,) = (value for name, value in shapes["params"].items() if name != "embedding")
    assert generator["head"].shape == (learned, config.features)


def test_tasks():
    images = fake_images(4)
    split = script.make_tasks(script.Config(num_tasks=5, batch=8), images)
    assert [task.name for task in split] == ["0/1", "2/3", "4/5", "6/7", "8/9"]
    for number, task in enumerate(split):
        batch = task.batches.batch_at(0)
        source = batch["images"][:, 0, 0, 0] % 10
        np.testing.assert_array_equal(source, 2 * number + batch["labels"])
        assert set(task.test.labels.tolist()) == {0, 1}
    permuted = script.make_tasks(script.Config(tasks="permuted", num_tasks=3, batch=8), images)
    x = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1)
    seen = [task.prepare(x, 255.0) for task in permuted]
    np.testing.assert_allclose(seen[0], x.reshape(2, 16) / 255.0, rtol=1e-6)
    for other in seen[1:]:
        assert sorted(other[0].tolist()) == sorted(seen[0][0].tolist())
        assert (other != seen[0]).any()
    assert (seen[1] != seen[2]).any()
    held_out = script.make_tasks(script.Config(tasks="permuted", num_tasks=2, batch=8, held_out=0.5), images)
    np.testing.assert_array_equal(held_out[1].test.labels, images.valid.labels)


def test_without_beta_there_is_one_learner():
    config = script.Config(num_tasks=2, hidden=(6,), beta=0.0)
    hyper = script.make_hyper(config, fake_images(4))
    _, create, _ = script.make_start(config, hyper, 16)
    assert set(jax.eval_shape(create, jax.random.key(0)).params) == {"plain"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset=huge"], "--preset is huge, expected one of quick, cpu, paper"),
        (["--tasks=rotated"], "--tasks is rotated, expected one of split, permuted"),
        (["--num-tasks=3"], "--num-tasks is 3, expected a divisor of the 10 classes"),
        (["--num-tasks=1"], "--num-tasks is 1, expected at least 2"),
        (["--beta=-1"], "--beta is -1.0, expected a number of at least 0"),
        (["--learning-rate=nan"], "--learning-rate is nan, expected a positive number"),
        (["--hidden", "8", "0"], "--hidden is (8, 0), expected nothing below 1"),
        (["--chunk=0"], "--chunk is 0, expected nothing below 1"),
        (["--held-out=1"], "--held-out is 1.0, expected a fraction in [0, 1)"),
        (["--batch=1000"], "batch 1000 exceeds the"),
        (["--data-file=absent.npz"], "absent.npz"),
        (["--betas=1"], "did you mean --beta?"),
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
