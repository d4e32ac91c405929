"""experiments/fewshot_adaptation.py: its tasks, what it leaves behind, and what it refuses."""

import json

import fewshot_adaptation as fewshot
import fewshot_tasks as tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

TINY = [
    *("--train-tasks=4", "--tune-tasks=2", "--new-tasks=2", "--adapt-steps=6", "--steps=60", "--batch=2"),
    *("--eval-every=30", "--log-every=10"),
]


@pytest.fixture
def small(monkeypatch):
    """Two numbers of shots and one learning rate: compiling is what takes the time."""
    for module in (tasks, fewshot):
        monkeypatch.setattr(module, "SHOTS", (1, 2))
    monkeypatch.setattr(fewshot, "RATES", dict.fromkeys(fewshot.WAYS, (0.01,)))


@pytest.mark.parametrize("family", ["sinusoids", "digits"])
@pytest.mark.usefixtures("small")
def test_a_run_leaves_what_it_should(family, tmp_path, capsys):
    arguments = [f"--tasks={family}", *TINY, f"--workdir={tmp_path}", "--degrees=20", "--permutations=2"]
    assert fewshot.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "fine-tuning all weights" in printed
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "timings.jsonl", "summary.json", "fewshot.png", "checkpoints"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    needed = "params params_unique seconds device jax_version git_commit seed valid_error"
    assert set(needed.split()) <= summary.keys()
    assert not any(isinstance(value, dict | list) for value in summary.values())
    for way in fewshot.WAYS:
        for shots in (1, 2):
            assert 0 <= summary[f"error_{way}_{shots}"] < np.inf
            assert summary[f"steps_{way}_{shots}"] in (1, 2, 6)
            assert summary[f"milliseconds_{way}_{shots}"] > 0
    size = {"sinusoids": 1_761, "digits": 4_810}[family]
    assert summary["params_target"] == summary["touched_finetune"] == summary["touched_scratch"] == size
    assert summary["touched_z"] == 4
    assert summary["share_touched_z"] == 4 / size < 0.01
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 60
    assert [row["step"] for row in rows if "valid_error" in row] == [30, 60]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert fewshot.main(arguments) == 0
    assert "holds a finished run" in capsys.readouterr().out


def test_sinusoids_are_sinusoids():
    family = tasks.Sinusoids(np.random.default_rng(0), 50)
    new = family.episode(np.random.default_rng(1), 8, tune=False)
    assert new.inputs.shape == new.targets.shape == (8, 20, 1)
    assert new.queries.shape == new.answers.shape == (8, 101, 1)
    for x, y, queries, answers in zip(*new, strict=True):
        # a sin(x - p) is a sum of sin(x) and cos(x): the shots decide the answers.
        basis = lambda x: np.concatenate([np.sin(x), np.cos(x)], 1)  # noqa: E731
        weights = np.linalg.lstsq(basis(x), y, rcond=None)[0]
        np.testing.assert_allclose(basis(queries) @ weights, answers, atol=1e-4)
        assert 0.1 <= np.linalg.norm(weights) <= 5.001
    inputs, targets = family.sample(np.random.default_rng(2), np.array([3, 3, 7]), 200)
    amplitudes = np.abs(targets).max((1, 2))
    np.testing.assert_allclose(amplitudes[0], amplitudes[1], rtol=0.02)
    assert np.abs(inputs).max() <= 5


def test_digits_of_new_tasks_are_balanced_and_kept_apart():
    family = tasks.Digits(np.random.default_rng(0), 3, 30.0, 2)
    new = family.episode(np.random.default_rng(1), 4, tune=False)
    assert new.inputs.shape == (4, 200, 64)
    assert new.queries.shape == (4, 160, 64)
    for labels in new.targets:
        for shots in tasks.SHOTS:
            assert (np.bincount(labels[: 10 * shots], minlength=10) == shots).all()
    for inputs, queries in zip(new.inputs, new.queries, strict=True):
        assert len(np.unique(np.concatenate([inputs, queries]), axis=0)) == 360
    flat = tasks.Digits(np.random.default_rng(0), 2, 1e-9, 1)  # no turning, one order: all tasks show the same images
    tune, new = (flat.episode(np.random.default_rng(1), 1, tune=tune).inputs for tune in (True, False))
    train, valid, tune, new = (
        {image.tobytes() for image in part.round(3).reshape(-1, 64) + 0.0}
        for part in (flat._made[False][0], flat._made[True][0], tune, new)
    )
    assert tune <= valid
    assert not train & valid
    assert not new & (train | valid)


def test_weights_are_fitted_by_adam():
    family = tasks.Sinusoids(np.random.default_rng(0), 1)
    new = family.episode(np.random.default_rng(1), 2, tune=True)
    starts = jax.vmap(lambda key: family.model.init(key, family.example)["params"])(jax.random.split(jax.random.key(0)))
    errors = tasks.fit_weights(family, starts, new, 0.01, np.array([1, 4]))

    optimizer = optax.adam(0.01)
    params = jax.tree.map(lambda v: v[1], starts)
    state, expected = optimizer.init(params), []

    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.square(family.model.apply({"params": p}, new.inputs[1]) - new.targets[1]).mean()  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
        expected.append(jnp.square(family.model.apply({"params": params}, new.queries[1]) - new.answers[1]).mean())
    np.testing.assert_allclose(errors[1], [expected[0], expected[3]], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--tasks=chess"], "--tasks is 'chess', expected sinusoids or digits"),
        (["--preset=huge"], "--preset is 'huge', expected quick or cpu"),
        (["--start=best"], "--start is 'best', expected mean, zeros or nearest"),
        (["--new-tasks=0"], "--new-tasks is 0, expected a whole number of at least 1"),
        (["--embedding-dim=0"], "--embedding-dim is 0, expected a whole number"),
        (["--degrees=-5"], "--degrees is -5.0, expected a positive number"),
        (["--noise=-1"], "--noise is -1.0, expected a standard deviation"),
        (["--decay=2"], "--decay is 2.0, expected a fraction"),
        (["--seed=-1"], "--seed is -1, expected a whole number"),
        (["--shots=3"], "--shots is not a field"),
    ],
)
def test_bad_input_is_one_line(arguments, line, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        fewshot.main([*arguments, f"--workdir={tmp_path / 'run'}"])
    assert stop.value.code == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert line in printed
    assert not (tmp_path / "run").exists()
