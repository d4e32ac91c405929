"""experiments/routing_runs.py: runs side by side, what their gates cost, and what is left of them to serve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_runs as runs

from hyperjax import routing, training

TASKS = {"size": routing.Regression(), "up": routing.Binary()}
STEPS = 30
SNR = routing.SNR(((2, 2), (2, 2)), TASKS, (3,))
SHARED = routing.SharedBottom((4, 4), tasks=TASKS, towers=(3,))


def make_group(model, own_rows=False, sparse=False):
    sizes = {"steps": STEPS, "batch": 8, "gate_rate": 0.05}
    shape = jax.ShapeDtypeStruct((1, 3), jnp.float32)
    return runs.Group(model, TASKS, shape, **sizes, own_rows=own_rows, sparse=sparse)


def draw(rows, *shape):
    x = np.random.default_rng(rows).standard_normal((*shape, rows, 3)).astype(np.float32)
    return {"x": x, "size": x[..., 1], "up": np.broadcast_to(np.arange(rows) % 2, (*shape, rows))}


class Bar:
    """Counts the steps."""

    done = 0

    def update(self, steps):
        self.done += steps

    def set_postfix_str(self, text):
        assert "loss" in text


def test_each_run_is_scored_on_its_own_labels_and_fails_alone():
    splits = {name: draw(rows, 2) for name, rows in (("train", 24), ("valid", 12), ("test", 16))}
    group, bar = make_group(SHARED, own_rows=True), Bar()
    rates, seeds = {"learning_rate": jnp.array([1e-2, 1e-2])}, jnp.array([5, 5])
    found = group.train(splits, rates, seeds, bar)
    assert bar.done == STEPS
    assert found[0]["test_quality"] != found[1]["test_quality"]  # of one seed: the rows differ
    for row in found:
        for split in ("valid", "test"):
            both = row[f"{split}_up_auc"] + row[f"{split}_size_r2"]
            assert row[f"{split}_quality"] == pytest.approx(both / 2)
    alike = {name: jax.tree.map(lambda a: np.stack([a[0], a[0]]), split) for name, split in splits.items()}
    again, failed = group.train(alike, {"learning_rate": jnp.array([1e-2, 1e30])}, seeds, Bar())
    assert again == pytest.approx(found[0], rel=1e-4)
    assert failed == {"failed": 1}


def test_lambda_target_and_the_settings_of_the_gates_reach_the_loss():
    dense, sparse, batch = make_group(SNR), make_group(SNR, sparse=True), draw(8)
    hyper = {"beta": 0.6, "gamma": -0.5, "zeta": 1.5, "open": 0.8, "l0": 0.0, "ramp": 0.4, "target": 0.3}
    params, steps = sparse.init(jax.random.key(0), hyper), STEPS

    @jax.jit
    def losses(hyper, multipliers, step=steps):
        given = params | {"multipliers": multipliers}
        return tuple(group.loss(given, hyper, batch, jax.random.key(1), step) for group in (dense, sparse))

    zero = params["multipliers"]
    (total, each), (same, _) = losses(hyper, zero)
    assert float(total) == pytest.approx(float(sum(each.values())), rel=1e-6)  # gates that cost nothing
    assert same == total
    gates = 0.8 * (2 * 2 + 2 * 2)
    for l0, step, share in ((1.0, steps, 1), (2.0, steps, 1), (1.0, steps // 5, 0.5), (1.0, 0, 0)):
        costs = losses(hyper | {"l0": l0}, zero, step)
        assert [float(cost - total) for cost, _ in costs] == pytest.approx([l0 * share * gates] * 2, abs=1e-5)
    pull = zero._replace(linear=jnp.float32(2.0))
    for step, target in ((steps, 0.3), (steps // 5, 0.65)):  # all gates are served at first: the excess is 1 - target
        (unsteered, _), (steered, _) = losses(hyper, pull, step)
        assert unsteered == total
        assert float(steered - total) == pytest.approx(2 * (1 - target), rel=1e-5)
    assert losses(hyper | {"zeta": 1.9}, zero)[0][0] != total


def test_what_a_run_serves():
    group = make_group(SNR)
    hyper = {"beta": 0.6, "gamma": -0.5, "zeta": 1.5, "open": 0.8}
    params = group.init(jax.random.key(0), hyper)["network"]

    def served(*towers):
        gates = {"level_1": jnp.full((2, 2), 2.0), "towers": jnp.array(towers)}
        closed = params | {name: params[name] | {"log_alpha": z} for name, z in gates.items()}
        return tuple(group.served(jax.tree.map(np.asarray, closed), hyper).values())  # size, share open, tasks lost

    size = training.count(params)
    assert served([2.0, 2.0], [2.0, 2.0]) == (size - 8, 1.0, 0)  # gates go into the weights
    assert served([2.0, -9.0], [2.0, 2.0]) < (size - 8, 1.0, 0)
    assert served([2.0, -9.0], [2.0, 2.0])[1:] == (7 / 8, 0)
    assert served([2.0, 2.0], [-9.0, -9.0]) == (size, 0.75, 1)  # useless, so not called small
    ungated = make_group(SHARED).served({"a": np.zeros(7)}, {})
    assert ungated == {"params": 7, "connections_open": 1.0, "tasks_lost": 0}
