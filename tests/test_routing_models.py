"""experiments/routing_models.py: data and networks by name, who learns how fast, the weightings by hand and in use."""

import dataclasses

import jax
import jax.numpy as jnp
import multitask_snr as multitask
import numpy as np
import optax
import pytest
import routing_models as models

from hyperjax import routing, training
from hyperjax.data import TaskData, TaskSplit

TASKS = {"up": routing.Binary(), "size": routing.Regression(), "kind": routing.MultiClass(3)}
OPTIONS = {"group": "income", "correlation": 0.5, "seed": 0}


@pytest.mark.parametrize("name", models.MODELS)
def test_a_network_of_each_name_answers_all_tasks(name):
    model = models.MODELS[name](TASKS, 2, 5, (4,))
    x = jax.ShapeDtypeStruct((7, 6), jnp.float32)
    outputs, info = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, jax.random.key(1))[0], x)
    assert {task: values.shape for task, values in outputs.items()} == {"up": (7,), "size": (7,), "kind": (7, 3)}
    assert ("l0" in info) == name.startswith("snr")
    narrow = routing.count_parameters(model, x)
    assert routing.count_parameters(models.MODELS[name](TASKS, 2, 6, (4,)), x) > narrow


def test_what_distinguishes_the_networks():
    built = {name: make(TASKS, 4, 5, (4,)) for name, make in models.MODELS.items()}
    assert (built["snr_trans"].connection, built["snr_aver"].connection) == ("trans", "aver")
    assert (built["ungated"].connection, built["ungated"].gates) == ("trans", None)
    for name in ("snr_trans", "snr_aver", "ungated"):
        assert built[name].levels == ((5, 5, 5, 5), (5, 5, 5, 5))
    assert built["mmoe"].experts == 4
    x = jax.ShapeDtypeStruct((1, 6), jnp.float32)
    assert routing.count_parameters(built["snr_trans"], x) - routing.count_parameters(built["ungated"], x) == 4 * 4 + 12


def test_regression_labels_are_standardised_by_the_training_split():
    rng = np.random.default_rng(0)
    splits = {
        name: TaskSplit({"x": np.zeros((9, 2))}, {"size": 5 + 3 * rng.standard_normal(9), "up": np.arange(9) % 2})
        for name in ("train", "valid", "test")
    }
    tasks = {"size": routing.Regression(), "up": routing.Binary()}
    data = TaskData("made", **splits, tasks=tasks, encode=lambda features: features["x"])
    found = models.standardise(data)
    assert found.train.labels["size"].mean() == pytest.approx(0, abs=1e-12)
    assert found.train.labels["size"].std() == pytest.approx(1)
    old = data.train.labels["size"]
    for name in ("valid", "test"):
        new = (getattr(data, name).labels["size"] - old.mean()) / old.std()
        np.testing.assert_allclose(getattr(found, name).labels["size"], new)
        np.testing.assert_array_equal(getattr(found, name).labels["up"], splits[name].labels["up"])
    assert old.mean() > 2  # the data that was given is as it was


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("synthetic", "a.csv", "--data-file is a.csv, but --data synthetic reads no such file; leave it out"),
        ("digits", "a.npz", "--data-file is a.npz, but --data digits reads no such file; leave it out"),
        ("census", None, "--data census needs --data-file with census-income.data or census-income.test"),
        ("cifar", None, "--data is 'cifar', expected one of synthetic, digits, census, multimnist"),
    ],
)
def test_data_that_cannot_be(name, file, message):
    with pytest.raises(ValueError, match=message):
        models.load(name, file, None, **OPTIONS)


def test_each_part_learns_at_its_own_rate():
    params = {
        "network": {"level_1": {"kernel": jnp.ones(2), "log_alpha": jnp.ones(2)}, "tower_up": {"bias": jnp.ones(2)}},
        "multipliers": routing.Multipliers.zeros(),
        "weighting": jnp.ones(2),
    }
    optimizer = models.make_optimizer(0.01, 0.2, 10, multiplier_rate=0.5)
    grads = jax.tree.map(jnp.ones_like, params)
    state, changes = optimizer.init(params), []
    for _ in range(11):
        updates, state = optimizer.update(grads, state, params)
        changes.append(updates)
    first = changes[0]  # the first step of Adam is the learning rate, against the gradient
    np.testing.assert_allclose(first["network"]["level_1"]["kernel"], -0.01, rtol=1e-4)
    np.testing.assert_allclose(first["network"]["tower_up"]["bias"], -0.01, rtol=1e-4)
    np.testing.assert_allclose(first["weighting"], -0.01, rtol=1e-4)
    np.testing.assert_allclose(first["network"]["level_1"]["log_alpha"], -0.2, rtol=1e-4)
    assert [float(value) for value in first["multipliers"]] == [0.5, 0.5]  # these climb
    kernel, gates, climbed = (
        [float(jnp.abs(jax.tree.leaves(pick(each))[0]).max()) for each in changes]
        for pick in (
            lambda each: each["network"]["level_1"]["kernel"],
            lambda each: each["network"]["level_1"]["log_alpha"],
            lambda each: each["multipliers"],
        )
    )
    np.testing.assert_allclose(kernel[:6], 0.01, rtol=1e-3)  # constant over the first half
    assert kernel[5] > kernel[7] > kernel[9] > kernel[10]
    assert kernel[10] == gates[10] == 0  # and 0 at the end
    assert climbed[10] == 0.5


def test_costs_set_in_slowly():
    assert [float(models.ramp(step, 100)) for step in (0, 5, 10, 11, 100)] == pytest.approx([0, 0.5, 1, 1, 1])
    found = [float(models.ramp(step, 100, 0.4)) for step in (0, 10, 20, 40, 100)]
    assert found == pytest.approx([0, 0.25, 0.5, 1, 1])


def test_quality_is_the_mean_of_what_is_better_when_higher():
    scores = {"up_auc": 0.9, "size_mse": 100.0, "size_r2": 0.3, "kind_accuracy": 0.6, "other_auc": 0.0}
    assert models.quality(scores, TASKS) == pytest.approx(0.6)


def losses_at(*values):
    return dict(zip(("up", "size", "kind"), map(jnp.float32, values), strict=True))


def never(network):
    raise AssertionError("only gradnorm needs the gradients of the tasks")


def test_fixed_is_the_sum():
    weighting = models.Weighting("fixed", TASKS, 3)
    assert (weighting.params(), weighting.carry()) == ({}, {})
    carry = {"step": jnp.int32(4)}
    total, after = weighting.total({}, carry, losses_at(1.0, 2.0, 4.0), never)
    assert float(total) == 7
    assert after is carry


def test_uncertainty_learns_a_variance_for_each_task():
    weighting = models.Weighting("uncertainty", TASKS, 3)
    params, losses = weighting.params(), losses_at(0.2, 0.5, 2.0)
    assert set(params["weighting"]) == set(TASKS)
    assert weighting.carry() == {}

    def total(params):
        return weighting.total(params, {"step": 0}, losses, never)[0]

    assert float(total(params)) == pytest.approx(0.2 + 0.25 + 2.0)  # s = 0, and half of regression's
    optimizer = optax.sgd(0.2)
    state, step = optimizer.init(params), jax.jit(jax.grad(total))
    for _ in range(400):
        updates, state = optimizer.update(step(params), state)
        params = optax.apply_updates(params, updates)
    wanted = {"up": np.log(0.4), "size": np.log(0.5), "kind": np.log(4.0)}
    for name, value in params["weighting"].items():
        assert float(value) == pytest.approx(wanted[name], abs=1e-3)


def test_gradnorm_weighs_by_the_gradients_of_what_is_shared():
    weighting = models.Weighting("gradnorm", {"up": routing.Binary(), "size": routing.Regression()}, 3)
    params = weighting.params() | {"network": {"bottom": jnp.array([2.0]), "tower_up": jnp.array([5.0])}}
    assert weighting.carry()["initial"].shape == (2,)

    def losses_of(network):  # gradients of the bottom: 3 and 1; the tower's, 100, does not count
        bottom, tower = network["bottom"][0], network["tower_up"][0]
        return {"up": 3 * bottom + 100 * tower, "size": 1 * bottom}

    def total(params, carry):
        return weighting.total(params, carry, losses_of(params["network"]), losses_of)

    start = {"step": jnp.int32(0), **weighting.carry()}
    (value, carry), grads = jax.value_and_grad(total, has_aux=True)(params, start)
    np.testing.assert_array_equal(carry["initial"], [2.0, 506.0])  # sorted by name: size, up
    # Weights are 1; all rates are 1, as this is the first step: both norms are pulled to their mean, 2.
    assert float(value) == pytest.approx(506 + 2 + 1 + 1)
    assert float(grads["network"]["bottom"][0]) == pytest.approx(4)  # of the losses alone
    assert float(grads["network"]["tower_up"][0]) == pytest.approx(100)
    size, up = grads["weighting"].tolist()
    assert size < 0 < up  # descent gives weight to the task of the smaller gradient
    assert size == pytest.approx(-up)
    later = jax.tree.map(lambda leaf: leaf / 2, params)
    again = total(later, {**carry, "step": jnp.int32(1)})[1]
    np.testing.assert_array_equal(again["initial"], [2.0, 506.0])


def test_dynamic_average_by_hand():
    tasks = {"b": routing.Binary(), "a": routing.Binary()}
    weighting = models.Weighting("dynamic_average", tasks, 2)
    step = jax.jit(lambda carry, losses: weighting.total({}, carry, losses, never))
    a, b = [4, 2, 2, 1, 1, 1, 5], [1, 1, 1, 1, 1, 2, 3]
    carry, totals = {"step": jnp.int32(0), **weighting.carry()}, []
    for one, other in zip(a, b, strict=True):
        total, carry = step(carry, {"b": jnp.float32(other), "a": jnp.float32(one)})
        carry["step"] += 1
        totals.append(float(total))

    def weights(a_ratio, b_ratio):
        powers = np.exp(np.array([a_ratio, b_ratio]) / 2)
        return 2 * powers / powers.sum()

    by_epoch = [weights(1, 1), weights(1, 1), weights(1.5 / 3, 1 / 1), weights(1 / 1.5, 1.5 / 1)]
    wanted = [by_epoch[n // 2] @ [one, other] for n, (one, other) in enumerate(zip(a, b, strict=True))]
    np.testing.assert_allclose(totals, wanted, rtol=1e-6)
    np.testing.assert_allclose(carry["sum"], [5, 3])  # half an epoch, to be averaged at its end


@pytest.fixture(scope="module")
def little():
    """Two tasks of which one is learned, and the batch that is all of their data."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 3)).astype(np.float32)
    split = TaskSplit({"x": x}, {"up": (x[:, 0] > 0).astype(np.int32), "size": 3 * x[:, 1]})
    tasks = {"size": routing.Regression(), "up": routing.Binary()}
    data = TaskData("little", split, split, split, tasks, lambda features: features["x"])
    return data, {"features": split.features, "labels": split.labels}


def train(config, little):
    """Trains on one batch; returns all states' parameters, the metrics of all steps, and the model."""
    data, batch = little
    model = multitask.make_model(config, data)
    weighting = models.Weighting(config.weighting, data.tasks, 2)
    params = {"network": model.init(jax.random.key(0), jnp.zeros((1, 3)))["params"], **weighting.params()}
    params |= {"multipliers": routing.Multipliers.zeros()} if config.target is not None else {}
    optimizer = models.make_optimizer(config.learning_rate, config.gate_rate, config.steps)
    carry = {"step": jnp.zeros((), jnp.int32), **jax.tree.map(jnp.copy, weighting.carry())}  # each is donated
    state = training.TrainState.create(params, optimizer, carry)
    step = training.make_step(multitask.make_loss(config, data, model, weighting), optimizer)
    states, rows = [], []
    for _ in range(config.steps):
        states.append(jax.tree.map(np.array, state.params))
        state, metrics = step(state, batch, jax.random.key(1))
        rows.append(metrics)
    states.append(jax.tree.map(np.array, state.params))
    assert int(state.carry["step"]) == config.steps
    return states, rows, model


SMALL = multitask.Config(parts=2, towers=(3,), budget=90, gate_rate=0.1)


@pytest.mark.parametrize("weighting", models.WEIGHTINGS)
def test_what_each_weighting_moves(weighting, little):
    config = dataclasses.replace(SMALL, model="ungated", weighting=weighting, steps=6, learning_rate=0.05)
    states, rows, _ = train(config, little)
    losses = [float(row["size_loss"] + row["up_loss"]) for row in rows]
    assert losses[-1] < losses[0]
    if weighting == "uncertainty":
        # dL/ds = 1/2 - exp(-s) a L: the first step of Adam is up where the loss is large, and down where it is small.
        first = states[1]["weighting"]
        for name, half in (("size", 0.5), ("up", 1.0)):
            assert np.sign(first[name]) == np.sign(half * float(rows[0][f"{name}_loss"]) - 0.5)
    elif weighting == "gradnorm":
        assert states[0]["weighting"].tolist() == [0, 0]
        theta = states[1]["weighting"]  # tasks by name: size, up
        assert np.abs(theta).min() > 0
        assert theta[0] == pytest.approx(-theta[1])
    else:
        assert "weighting" not in states[0]
        assert losses[0] == pytest.approx(float(rows[0]["loss"]), rel=1e-6)


def test_open_gates_cost_more_and_more(little):
    data, batch = little
    config = dataclasses.replace(SMALL, l0=0.5, open=0.9, steps=100)
    model, weighting = multitask.make_model(config, data), models.Weighting("fixed", data.tasks, 2)
    params = {"network": model.init(jax.random.key(0), jnp.zeros((1, 3)))["params"]}
    loss = jax.jit(multitask.make_loss(config, data, model, weighting))
    gates = 2 * 2 + 2 * 2
    for step, share in ((0, 0), (5, 0.5), (10, 1), (99, 1)):
        total, (carry, metrics) = loss(params, {"step": jnp.int32(step)}, batch, jax.random.key(step))
        cost = float(total - metrics["size_loss"] - metrics["up_loss"])
        assert cost == pytest.approx(share * 0.5 * 0.9 * gates, rel=1e-5, abs=1e-6)
        assert int(carry["step"]) == step + 1


def test_the_target_is_reached(little):
    config = dataclasses.replace(SMALL, target=0.5, open=0.9, steps=400, learning_rate=0.01)
    states, rows, model = train(config, little)
    shares = [float(row["served_share"]) for row in rows]
    assert shares[0] == 1
    assert 0.25 <= np.mean(shares[-100:]) <= 0.75
    assert states[-1]["multipliers"].linear != 0
    sizes = routing.connection_sizes(model)
    served = routing.served_gates(model, {"params": states[-1]["network"]})
    found = sum((sizes[name] * (z > 0)).sum() for name, z in served.items()) / sum(
        size.sum() for size in sizes.values()
    )
    assert 0.25 <= found <= 0.75
