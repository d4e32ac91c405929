"""Loss weightings: closed forms, where they come to rest, and what their gradients reach."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax.routing.tasks import Binary, MultiClass, Regression
from hyperjax.routing.weighting import (
    dynamic_average,
    fixed,
    gradnorm,
    task_gradient_norms,
    uncertainty,
)

TASKS = {"r": Regression(), "c": MultiClass(3), "b": Binary()}
LOSSES = {"r": jnp.float32(0.3), "c": jnp.float32(1.1), "b": jnp.float32(0.4)}


def test_fixed_is_the_weighted_sum():
    weights = {"b": 0.5, "c": 2, "r": 0.0}
    assert fixed(LOSSES, weights) == pytest.approx(0.5 * 0.4 + 2 * 1.1)
    assert jax.jit(fixed)(LOSSES, weights) == pytest.approx(0.5 * 0.4 + 2 * 1.1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"r": 1.0, "c": 1.0}, "task 'b' has no weight; give one"),
        (
            {"r": 1.0, "c": 1.0, "b": 1.0, "x": 1.0},
            "there is a weight of 'x', which has no loss; the tasks are r, c, b",
        ),
        ({"r": 1.0, "c": -0.1, "b": 1.0}, "the weight of 'c' is -0.1, expected a finite number of at least 0"),
        ({"r": 1.0, "c": float("nan"), "b": 1.0}, "the weight of 'c' is nan"),
    ],
)
def test_fixed_refuses(weights, message):
    with pytest.raises(ValueError, match=message):
        fixed(LOSSES, weights)


def test_uncertainty_by_hand():
    s = {"r": 0.2, "c": -0.5, "b": 1.0}
    wanted = np.exp(-0.2) * 0.3 / 2 + 0.1 + np.exp(0.5) * 1.1 - 0.25 + np.exp(-1.0) * 0.4 + 0.5
    assert uncertainty(LOSSES, s, TASKS) == pytest.approx(wanted, rel=1e-6)
    assert jax.jit(lambda losses, s: uncertainty(losses, s, TASKS))(LOSSES, s) == pytest.approx(wanted, rel=1e-6)


def test_uncertainty_is_least_at_the_logarithm_of_the_loss():
    # d/ds (a exp(-s) L + s / 2) = 0 at exp(s) = 2 a L, with a = 1/2 for regression and 1 for the rest
    best = {"r": jnp.log(0.3), "c": jnp.log(2 * 1.1), "b": jnp.log(2 * 0.4)}
    gradient, curvature = (f(lambda s: uncertainty(LOSSES, s, TASKS)) for f in (jax.grad, jax.hessian))
    np.testing.assert_allclose(list(gradient(best).values()), 0, atol=1e-6)
    assert all(curvature(best)[name][name] > 0 for name in TASKS)


def test_uncertainty_refuses():
    with pytest.raises(ValueError, match="task 'c' has no log variance; give one"):
        uncertainty(LOSSES, {"r": 0.0}, TASKS)
    with pytest.raises(ValueError, match="there is a kind of 'b', which has no loss; the tasks are r, c"):
        uncertainty({"r": 1.0, "c": 1.0}, {"r": 0.0, "c": 0.0}, TASKS)


THETA, NORMS = jnp.array([0.3, -0.2, 0.5]), jnp.array([1.0, 4.0, 0.5])
NOW, START = jnp.array([0.2, 0.9, 0.5]), jnp.array([1.0, 1.0, 2.0])


def test_gradnorm_by_hand():
    weights, balance = gradnorm(THETA, NORMS, NOW, START, alpha=1.5)
    odds = np.exp([0.3, -0.2, 0.5])
    wanted = 3 * odds / odds.sum()
    rates = np.array([0.2, 0.9, 0.25])
    size = wanted * np.array([1.0, 4.0, 0.5])
    np.testing.assert_allclose(weights, wanted, rtol=1e-6)
    assert balance == pytest.approx(np.abs(size - size.mean() * (rates / rates.mean()) ** 1.5).sum(), rel=1e-5)
    np.testing.assert_allclose(jax.jit(gradnorm)(THETA, NORMS, NOW, START, 1.5)[1], balance, rtol=1e-6)


def test_gradients_of_gradnorm_reach_theta_only():
    def balance(theta, norms, losses, initial):
        return gradnorm(theta, norms, losses, initial, 1.5)[1]

    def weighted(theta, norms, losses, initial):
        return gradnorm(theta, norms, losses, initial, 1.5)[0].sum() * 3 + gradnorm(*arguments, 1.5)[0][0]

    arguments = (THETA, NORMS, NOW, START)
    theta, *others = jax.grad(balance, argnums=(0, 1, 2, 3))(*arguments)
    assert all(not np.any(other) for other in others)
    assert all(not np.any(part) for part in jax.grad(weighted, argnums=(0, 1, 2, 3))(*arguments))
    # with the target held fixed: dG_i / dtheta_k = norm_i w_i (delta_ik - w_k / T)
    weights = np.asarray(gradnorm(*arguments, 1.5)[0])
    size, rates = weights * np.asarray(NORMS), np.asarray(NOW / START)
    sign = np.sign(size - size.mean() * (rates / rates.mean()) ** 1.5)
    wanted = [sum(sign[i] * size[i] * ((i == k) - weights[k] / 3) for i in range(3)) for k in range(3)]
    np.testing.assert_allclose(theta, wanted, rtol=1e-5)


def test_task_gradient_norms_are_those_of_one_gradient_each():
    params = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, 0.2])}

    def losses(params):
        return jnp.stack([jnp.sum(params["w"] ** 2), jnp.sum(params["b"] ** 3) + params["w"][0, 1]])

    wanted = [2 * np.sqrt(1 + 4 + 0.25 + 9), np.sqrt((3 * 0.01) ** 2 + (3 * 0.04) ** 2 + 1)]
    np.testing.assert_allclose(task_gradient_norms(losses, params), wanted, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda p: task_gradient_norms(losses, p))(params), wanted, rtol=1e-6)
    assert not any(
        np.any(leaf) for leaf in jax.tree.leaves(jax.grad(lambda p: task_gradient_norms(losses, p).sum())(params))
    )
    with pytest.raises(ValueError, match=r"losses_fn returns the shape \(\), expected a vector"):
        task_gradient_norms(lambda p: losses(p).sum(), params)


def test_gradnorm_balances_two_linear_tasks():
    # the second task's targets are 10 times as large, and so are its gradients at first
    x = jax.random.normal(jax.random.key(0), (32, 4))
    truth = jax.random.normal(jax.random.key(1), (2, 4)) * jnp.array([[1.0], [10.0]])
    y = x @ truth.T

    def losses(shared):
        return jnp.square((x @ shared) - y).mean(0)

    def step(carry, _):
        shared, theta, state = carry
        norms = task_gradient_norms(losses, shared)
        weights, balance = gradnorm(theta, norms, losses(shared), start, 0.0)
        gradient = jax.grad(lambda t: gradnorm(t, norms, losses(shared), start, 0.0)[1])(theta)
        change, state = optimizer.update(gradient, state)
        shared = shared - 1e-4 * jax.grad(lambda s: weights @ losses(s))(shared)
        return (shared, optax.apply_updates(theta, change), state), (weights * norms, weights, balance)

    shared, theta = jnp.zeros((4, 2)), jnp.zeros(2)
    start, optimizer = losses(shared), optax.adam(optax.exponential_decay(0.05, 100, 0.5))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=600)[1])
    sizes, weights, balance = run((shared, theta, optimizer.init(theta)))
    assert sizes[0, 1] / sizes[0, 0] > 8
    assert sizes[-1, 1] / sizes[-1, 0] == pytest.approx(1, abs=0.02)
    assert balance[-1] < 0.02 * balance[0]
    np.testing.assert_allclose(weights.sum(1), 2, rtol=1e-5)


def test_gradnorm_gives_more_to_the_task_that_learns_more_slowly():
    equal = jnp.ones(2)
    slope = jax.grad(lambda theta: gradnorm(theta, equal, jnp.array([0.9, 0.1]), equal, 1.0)[1])(jnp.zeros(2))
    assert slope[0] < 0 < slope[1]


def test_dynamic_average_by_hand():
    recent, earlier = jnp.array([0.5, 0.9]), jnp.array([1.0, 1.0])
    odds = np.exp([0.25, 0.45])
    np.testing.assert_allclose(dynamic_average(recent, earlier), 2 * odds / odds.sum(), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(dynamic_average)(recent, earlier), 2 * odds / odds.sum(), rtol=1e-6)
    np.testing.assert_allclose(dynamic_average(recent, recent), 1)
    np.testing.assert_allclose(dynamic_average(recent, earlier, 1e6), 1, rtol=1e-5)
    assert not np.any(jax.grad(lambda recent: dynamic_average(recent, earlier)[0])(recent))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gradnorm(THETA, NORMS[:2], NOW, START, 1.0),
            r"theta \(3,\), norms \(2,\), .*one number for each task",
        ),
        (lambda: gradnorm(THETA, NORMS, NOW, jnp.zeros(3), 1.0), "initial is .*expected numbers above 0"),
        (lambda: dynamic_average(jnp.float32(1), jnp.float32(1)), r"recent \(\), earlier \(\)"),
        (lambda: dynamic_average(NOW, jnp.zeros(3)), "earlier is"),
        (lambda: dynamic_average(NOW, START, 0.0), "temperature is 0.0, expected numbers above 0"),
    ],
)
def test_bad_vectors_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
