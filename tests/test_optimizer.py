"""The learning rate's rise and fall, the mean of the parameters, decay of matrices alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax import training


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine():
    rate = training.schedule(2.0, 100, decay=1.0, warmup=10)
    cosine = 1 + np.cos(np.pi * np.arange(101) / 100)
    rise = np.minimum(1, (np.arange(101) + 1) / 10)
    np.testing.assert_allclose([float(rate(step)) for step in range(101)], cosine * rise, atol=1e-6)
    flat = training.schedule(0.5, 100, warmup=4)
    np.testing.assert_allclose([float(flat(step)) for step in range(6)], [0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def trained(optimizer, steps=30):
    params, history = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, []
    state = optimizer.init(params)
    for step in range(steps):
        gradient = jax.tree.map(lambda p, k=step: jnp.sin(p + k), params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return params, state, history


def test_the_mean_is_the_recursion_and_changes_no_step():
    plain, _, _ = trained(optax.adam(0.1))
    params, state, history = trained(training.average_params(optax.adam(0.1), 0.7))
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    mean = np.ones((2, 3))
    for t, each in enumerate(history):
        kept = min(0.7, t / (t + 9))
        mean = kept * mean + (1 - kept) * np.asarray(each["w"])
    got = training.averaged_params(state, params)
    np.testing.assert_allclose(got["w"], mean, rtol=1e-5)
    assert training.averaged_params(optax.adam(0.1).init(plain), plain) is plain


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_mean_without_an_end_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay is {decay}, .*\[0, 1\)"):
        training.average_params(optax.sgd(0.1), decay)


def test_matrices_leave_out_biases():
    assert training.matrices({"w": jnp.ones((2, 3)), "b": jnp.ones(3), "s": 1.0}) == {"w": True, "b": False, "s": False}
