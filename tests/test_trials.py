"""Runs side by side: what one does depends on its seed and hyperparameters, not on its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax.training import apply_in_blocks, make_trials

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((20, 3)).astype(np.float32), RNG.standard_normal(20).astype(np.float32)
ROWS = {"x": X, "y": Y, "row": np.arange(20)}
SEEDS = np.array([3, 4, 3])
HYPER = {"scale": [1.0, 2.0, 0.5], "penalty": [0.1, 0.0, 0.3], "rate": [0.1, 0.05, 0.02]}
HYPER = {name: jnp.array(values) for name, values in HYPER.items()}


def init(key, hyper):
    return {"w": hyper["scale"] * jax.random.normal(key, (3,))}


def loss_fn(params, hyper, batch, key, step):
    noise = 0.1 * jax.random.normal(key)
    error = batch["x"] @ params["w"] - batch["y"] + noise
    penalty = hyper["penalty"] * (params["w"] ** 2).sum()
    figures = {"noise": noise, "step": step, "first": batch["row"][0], "last": batch["row"][-1], "penalty": penalty}
    return (error**2).mean() + penalty, figures


def adam(hyper):
    return optax.adam(hyper["rate"])


@pytest.fixture(scope="module")
def trials():
    return make_trials(init, loss_fn, adam, batch=4)


def some(values, index):
    return jax.tree.map(lambda array: array[np.array(index)], values)


def train(trials, index, *steps, rows=ROWS):
    hyper, seeds = some(HYPER, index), SEEDS[index]
    states, found = trials.start(seeds, hyper), []
    for count in steps:
        states, metrics = trials.advance(states, hyper, seeds, rows, count)
        found.append(metrics)
    return states, jax.tree.map(lambda *parts: np.concatenate(parts, 1), *found)


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), one, other)


@pytest.fixture(scope="module")
def together(trials):
    return train(trials, [0, 1, 2], 10)


def test_a_run_does_not_depend_on_its_neighbours(trials, together):
    states, metrics = together
    assert {name: values.shape for name, values in metrics.items()} == dict.fromkeys(metrics, (3, 10))
    assert states.step.tolist() == [10, 10, 10]
    for run in range(3):
        assert_close(train(trials, [run], 10), some(together, [run]))
    assert_close(train(trials, [2, 0, 0], 10), some(together, [2, 0, 0]))


def test_runs_of_one_seed_see_the_same_and_runs_of_another_do_not(together):
    metrics = together[1]
    for name in ("noise", "first", "last"):
        np.testing.assert_array_equal(metrics[name][0], metrics[name][2])  # seeds 3, 4 and 3
        assert (metrics[name][0] != metrics[name][1]).any()
        assert len(set(metrics[name][0].tolist())) > 3  # it changes from step to step
    assert (metrics["loss"][0] != metrics["loss"][2]).all()
    np.testing.assert_array_equal(metrics["step"], np.tile(np.arange(10), (3, 1)))
    for name in ("first", "last"):
        assert metrics[name].min() >= 0
        assert metrics[name].max() <= 19


def test_five_steps_and_five_more_are_ten(trials, together):
    assert_close(train(trials, [0, 1, 2], 5, 5), together)


def test_every_row_is_drawn_about_as_often(trials):
    _, metrics = train(trials, [0, 1], 2000)  # two seeds
    counts = np.bincount(metrics["last"].ravel(), minlength=20)
    np.testing.assert_allclose(counts, 200, atol=5 * np.sqrt(200))  # five standard deviations


def test_hyperparameters_reach_initialization_loss_and_optimizer(trials, together):
    start = trials.start(np.array([3, 3, 3]), HYPER)
    w = start.params["w"]
    np.testing.assert_allclose(w[1] / HYPER["scale"][1], w[0] / HYPER["scale"][0], rtol=1e-6)
    np.testing.assert_allclose(
        together[1]["penalty"][:, 0], HYPER["penalty"] * (some(w, [0]) ** 2).sum() * jnp.array([1, 0, 0.25]), rtol=1e-5
    )

    def without_noise(params, hyper, batch, key, step):
        loss = (batch["x"] @ params["w"] - batch["y"]) ** 2
        return loss.mean() + hyper["penalty"] * (params["w"] ** 2).sum(), {}

    sgd = make_trials(init, without_noise, lambda hyper: optax.sgd(hyper["rate"]), batch=2)
    one = {"x": X[:1], "y": Y[:1]}  # of a single row every batch is the same: the step is known by hand
    states, metrics = sgd.advance(sgd.start(SEEDS, HYPER), HYPER, SEEDS, one, 1)
    for run, w0 in enumerate(np.asarray(trials.start(SEEDS, HYPER).params["w"])):
        penalty, rate = (float(HYPER[name][run]) for name in ("penalty", "rate"))
        error = X[0] @ w0 - Y[0]
        expected = w0 - rate * (2 * error * X[0] + 2 * penalty * w0)
        np.testing.assert_allclose(states.params["w"][run], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"][run], [error**2 + penalty * (w0**2).sum()], rtol=1e-5)


def test_rows_of_their_own(together):
    own = make_trials(init, loss_fn, adam, batch=4, own_rows=True)
    alike = jax.tree.map(lambda array: np.stack([array] * 3), ROWS)
    assert_close(train(own, [0, 1, 2], 10, rows=alike), together)
    other = jax.tree.map(np.copy, alike)
    other["x"][1] += 1
    states, _ = train(own, [0, 1, 2], 10, rows=other)
    assert_close(some(states, [0, 2]), some(together[0], [0, 2]))
    assert (states.params["w"][1] != together[0].params["w"][1]).all()


@pytest.mark.parametrize("block", [1, 4, 5, 20, 64])  # 4 and 64 leave a part of a block
@pytest.mark.parametrize("own", [False, True])
def test_blocks_are_the_whole(block, own):
    params = {"w": RNG.standard_normal((2, 3)).astype(np.float32)}
    rows = {"x": np.stack([X, 2 * X])[:, :18] if own else X[:18]}

    def apply(params, rows):
        return {"y": rows["x"] @ params["w"], "pairs": rows["x"][:, :2] + params["w"][:2][None]}

    found = apply_in_blocks(apply, params, rows, block, own_rows=own)
    for run in range(2):
        alone = apply(some(params, run), some(rows, run) if own else rows)
        for name, values in alone.items():
            assert isinstance(found[name], np.ndarray)
            assert found[name][run].shape == values.shape
            np.testing.assert_allclose(found[name][run], values, rtol=1e-5, atol=1e-6)


def test_what_cannot_be():
    for batch in (0, -1):
        with pytest.raises(ValueError, match=f"batch is {batch}, expected 1 or more rows"):
            make_trials(init, loss_fn, adam, batch)
    for block in (0, -3):
        with pytest.raises(ValueError, match=f"block is {block}, expected 1 or more rows"):
            apply_in_blocks(lambda p, x: x, jnp.zeros(2), X, block)
    with pytest.raises(ValueError, match="there are no rows to apply the networks to"):
        apply_in_blocks(lambda p, x: x, jnp.zeros(2), X[:0])
