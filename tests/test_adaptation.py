"""Adaptation of an embedding: it is gradient descent on z alone, for one task as for many."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from targets import ConvNet, Mlp, x

import hyperjax as hj
from hyperjax.hypernet import adapt, adapt_many

KEY = jax.random.key(5)
N, T, E = 3, 5, 4


def squared(outputs, targets):
    return jnp.square(outputs - targets)


@pytest.fixture(scope="module")
def setting():
    """A hypernetwork, and data of N tasks, which are what embeddings of its table make, and a bit of noise."""
    model = Mlp(widths=(6,), classes=2)
    hyper = hj.HyperNetwork.from_target(model, x(8, 3), embedding_dim=E, num_embeddings=T)
    variables = jax.jit(lambda key: hyper.init(key, x(8, 3), task_id=0))(KEY)
    rng = np.random.default_rng(0)  # as if trained: at the start, z = 0 makes kernels of 0, where gradients vanish
    noise = jax.tree.map(lambda v: 0.2 * rng.normal(size=v.shape).astype(np.float32), variables)
    variables = jax.tree.map(jnp.add, variables, noise)
    inputs = jax.random.normal(KEY, (N, 8, 3))
    targets = outputs(hyper, variables, inputs, hyper.embeddings(variables)[np.array([3, 0, 4])])
    return hyper, variables, inputs, targets + 0.01 * jax.random.normal(KEY, targets.shape)


def outputs(hyper, variables, inputs, z):
    """Of N tasks, each with its own z and inputs; for one of them, of T rows of z."""
    own = 0 if inputs.ndim == 3 else None
    return jax.jit(jax.vmap(lambda inputs, z: hyper.apply(variables, inputs, z=z), (own, 0)))(inputs, z)


def by_hand(hyper, variables, inputs, targets, z, steps, optimizer, precision=0.0):
    def objective(z):
        return squared(hyper.apply(variables, inputs, z=z), targets).mean() + precision * jnp.sum(z**2) / 2

    gradient, state, losses = jax.jit(jax.value_and_grad(objective)), optimizer.init(z), []
    for _ in range(steps):
        loss, grad = gradient(z)
        updates, state = optimizer.update(grad, state, z)
        losses.append(loss)
        z = optax.apply_updates(z, updates)
    return z, [*losses, gradient(z)[0]]


@pytest.mark.parametrize(("optimizer", "prior"), [(0.05, None), (optax.sgd(0.1, momentum=0.9), 2.0)])
def test_equals_steps_by_hand(setting, optimizer, prior):
    hyper, variables, inputs, targets = setting
    before = jax.tree.map(np.array, variables)
    found = adapt(hyper, variables, inputs[0], targets[0], squared, steps=4, optimizer=optimizer, prior_std=prior)
    mean = hyper.embeddings(variables).mean(0)
    made = optax.adam(optimizer) if isinstance(optimizer, float) else optimizer
    precision = 0.0 if prior is None else 1 / prior**2
    z, losses = by_hand(hyper, variables, inputs[0], targets[0], mean, 4, made, precision)
    np.testing.assert_allclose(found.z, z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    np.testing.assert_array_equal(found.trajectory[0], mean)
    np.testing.assert_array_equal(found.trajectory[-1], found.z)
    assert found.trajectory.shape == (5, E)
    assert found.seconds > 0
    jax.tree.map(np.testing.assert_array_equal, before, variables)


@pytest.mark.parametrize("start", ["zeros", "mean", "nearest"])
def test_many_falls_and_equals_one_by_one(setting, start):
    hyper, variables, inputs, targets = setting
    options = {"start": start, "steps": 60, "optimizer": 0.1}
    many = adapt_many(hyper, variables, inputs, targets, squared, **options)
    assert many.z.shape == (N, E)
    assert many.losses.shape == (N, 61)
    assert many.trajectory.shape == (N, 61, E)
    if start != "nearest":
        assert (many.losses[:, -1] < 0.5 * many.losses[:, 0]).all()
    for i in range(N):
        one = adapt(hyper, variables, inputs[i], targets[i], squared, **options)
        np.testing.assert_allclose(many.losses[i], one.losses, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(many.z[i], one.z, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("memory", [2**30, 300])
def test_nearest_is_the_embedding_that_made_the_data(setting, memory, monkeypatch):
    hyper, variables, inputs, targets = setting
    module = sys.modules["hyperjax.hypernet.adaptation"]
    monkeypatch.setattr(module, "MEMORY", memory)  # 300 bytes hold one set of weights: blocks of one

    def loss(outputs, targets):  # a function of its own, so that both sizes of a block are compiled
        return squared(outputs, targets)

    table = hyper.embeddings(variables)
    found = adapt_many(hyper, variables, inputs, targets, loss, start="nearest", steps=0)
    np.testing.assert_array_equal(found.z, table[np.array([3, 0, 4])])
    np.testing.assert_array_equal(found.trajectory[:, 0], found.z)
    losses = squared(outputs(hyper, variables, inputs[0], table), targets[:1]).mean((1, 2))
    np.testing.assert_allclose(found.losses[0], [losses.min()], rtol=1e-5)
    poisoned = {**variables, "params": {**variables["params"], "embedding": table.at[0].set(jnp.nan)}}
    assert jnp.isfinite(adapt_many(hyper, poisoned, inputs, targets, loss, start="nearest", steps=0).z).all()


def test_start_may_be_one_embedding_or_one_for_each_task(setting):
    hyper, variables, inputs, targets = setting
    z = np.random.default_rng(0).normal(size=(N, E)).astype(np.float32)
    found = adapt_many(hyper, variables, inputs, targets, squared, start=z, steps=0)
    np.testing.assert_array_equal(found.z, z)
    found = adapt_many(hyper, variables, inputs, targets, squared, start=z[1], steps=0)
    np.testing.assert_array_equal(found.z, np.tile(z[1], (N, 1)))
    assert (adapt(hyper, variables, inputs[0], targets[0], squared, start=z[1], steps=0).z == z[1]).all()


def test_prior_pulls_z_to_zero(setting):
    hyper, variables, inputs, targets = setting
    options = {"steps": 100, "optimizer": 0.1}
    free, tight = (
        adapt_many(hyper, variables, inputs, targets, squared, prior_std=std, **options).z for std in (None, 0.05)
    )
    assert (jnp.linalg.norm(tight, axis=1) < 0.2 * jnp.linalg.norm(free, axis=1)).all()


def test_second_call_compiles_nothing(setting):
    hyper, variables, inputs, targets = setting
    options = {"steps": 7, "prior_std": 1.0}
    first = adapt(hyper, variables, inputs[0], targets[0], squared, optimizer=0.1, **options)
    other = jax.block_until_ready(jax.tree.map(lambda v: 1.1 * v, variables))
    data = jax.block_until_ready((inputs[1], targets[1]))
    events = []

    def note(name, *_, **__):
        events.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        # Other variables, data, learning rate and prior.
        second = adapt(hyper, other, *data, squared, optimizer=0.2, steps=7, prior_std=2.0)
    finally:
        jax._src.monitoring.unregister_event_duration_listener(note)
    assert not [name for name in events if "compile" in name]
    assert second.compile_seconds < 0.1 * first.compile_seconds
    assert not np.allclose(first.z, second.z)


def test_stored_statistics_and_other_inputs_reach_the_target():
    images = x(4, 6, 6, 2)
    hyper = hj.HyperNetwork.from_target(ConvNet((2,), 2), images, embedding_dim=E, generator=hj.Scale())
    variables = jax.jit(lambda key: hyper.init(key, images, task_id=0))(KEY)
    statistics = jax.tree.map(lambda v: v + 0.5, variables["batch_stats"])
    labels = jnp.array([0, 1, 1, 0])
    loss = optax.softmax_cross_entropy_with_integer_labels
    found = adapt(hyper, {**variables, "batch_stats": statistics}, images, labels, loss, steps=20, train=False)
    assert found.losses[-1] < found.losses[0]
    logits = jax.jit(hyper.apply)({**variables, "batch_stats": statistics}, images, z=found.z)
    np.testing.assert_allclose(loss(logits, labels).mean(), found.losses[-1], rtol=1e-5)

    inputs = (x(4, 3), x(4, 6))
    hyper = hj.HyperNetwork.from_target(Mlp((6,), 2), *inputs, embedding_dim=E, scale=2.0)
    variables = jax.jit(lambda key: hyper.init(key, *inputs, scale=2.0))(KEY)
    found = adapt(hyper, variables, inputs, jnp.ones((4, 2)), squared, steps=0, scale=2.0)
    outputs = jax.jit(hyper.apply)(variables, *inputs, z=found.z, scale=2.0)
    np.testing.assert_allclose(found.losses, [squared(outputs, 1.0).mean()], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "nearby"}, "start is 'nearby', expected one of mean, zeros, nearest, or an array"),
        ({"start": np.zeros(E + 1, np.float32)}, r"start has shape \(5,\), expected \[4\]"),
        ({"start": np.zeros((2, E), np.float32)}, r"start has shape \(2, 4\), expected one embedding"),
        ({"start": np.zeros(E, int)}, r"start is int\d+, expected floating point"),
        ({"steps": -1}, "steps is -1, expected a whole number of at least 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"optimizer": -0.1}, "optimizer is -0.1, expected an optax transformation, or a positive"),
        ({"optimizer": "adam"}, "optimizer is 'adam'"),
        ({"prior_std": 0.0}, "prior_std is 0.0, expected a positive number"),
        ({"inputs": np.zeros((7, 3), np.float32)}, r"targets has shape \(8, 2\), but inputs has \(7, 3\)"),
        ({"inputs": np.zeros((0, 3), np.float32)}, r"inputs has an array of shape \(0, 3\)"),
        ({"inputs": (), "targets": ()}, "there are no inputs and no targets"),
        ({"loss_fn": 3}, "loss_fn is 3, expected a function"),
        ({"loss_fn": lambda y, t: (y, t)}, "loss_fn returned a tuple, expected one array"),
        ({"extra": np.zeros((8, 6))}, "extra is a ndarray, which is not hashable"),
    ],
)
def test_bad_arguments_are_one_line(setting, options, message):
    hyper, variables, inputs, targets = setting
    data = {"inputs": inputs[0], "targets": targets[0], "loss_fn": squared} | options
    with pytest.raises(ValueError, match=message) as error:
        adapt(hyper, variables, **data)
    assert "\n" not in str(error.value)


def test_bad_tasks_and_hypernetworks_without_a_table(setting):
    hyper, variables, inputs, targets = setting
    with pytest.raises(ValueError, match="one for each of 3 tasks"):
        adapt_many(hyper, variables, inputs, targets, squared, start=np.zeros((2, E), np.float32))
    with pytest.raises(ValueError, match=r"targets has shape \(2, 8, 2\), but inputs has \(3, 8, 3\)"):
        adapt_many(hyper, variables, inputs, targets[:2], squared)
    with pytest.raises(ValueError, match=r"expected \[tasks, samples, ...\]"):
        adapt_many(hyper, variables, inputs[0, 0], targets, squared)
    model, conditioned = Mlp((6,), 2), x(5)
    encoded = hj.HyperNetwork.from_target(model, x(8, 3), embedding_dim=E, encoder=Mlp((6,), E))
    made = jax.jit(lambda key: encoded.init(key, x(8, 3), condition=conditioned))(KEY)
    for start in ("mean", "nearest"):
        with pytest.raises(ValueError, match=f"start is '{start}', but this hypernetwork has no table"):
            adapt(encoded, made, inputs[0], targets[0], squared, start=start)
    assert adapt(encoded, made, inputs[0], targets[0], squared, start="zeros", steps=1).z.shape == (E,)
    static = hj.HyperNetwork.from_target(model, x(8, 3), embedding_dim=E, num_embeddings=0, generator=hj.Learned())
    with pytest.raises(ValueError, match="a static hypernetwork has no z to adapt"):
        adapt(static, {"params": {}}, inputs[0], targets[0], squared)
