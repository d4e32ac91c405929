"""The hand-written backward passes of the pointwise maths, against autodiff of the plain formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.recurrent.gates import layer_norm, lstm_memory, lstm_output


def plain_norm(x, scale, bias):
    mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-3) * scale[None] + bias[None]


def plain_memory(c, i, g, f, mask):
    return jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * mask * jnp.tanh(g)


def plain_output(o, c):
    return jax.nn.sigmoid(o) * jnp.tanh(c)


CASES = {
    "layer_norm": (layer_norm, plain_norm, [(4, 7), (7,), (7,)]),
    "memory": (lambda c, i, g, f: lstm_memory(c, i, g, f, None), lambda *a: plain_memory(*a, 1.0), [(4, 7)] * 4),
    "masked memory": (
        lambda c, i, g, f: lstm_memory(c, i, g, f, jnp.eye(4, 7) / 0.5),
        lambda *a: plain_memory(*a, jnp.eye(4, 7) / 0.5),
        [(4, 7)] * 4,
    ),
    "output": (lstm_output, plain_output, [(4, 7)] * 2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("jit", [False, True])
def test_value_and_gradient_are_the_formulas(name, jit):
    ours, plain, shapes = CASES[name]
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        arguments, weight = [2 * rng.normal(size=s) for s in shapes], rng.normal(size=(4, 7))
        everything = tuple(range(len(shapes)))

        def outcome(f):
            both = jax.value_and_grad(lambda *a: jnp.vdot(weight, f(*a)), argnums=everything)
            return jax.tree.leaves((jax.jit(both) if jit else both)(*arguments))

        for a, b in zip(outcome(ours), outcome(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_layer_norm_of_a_constant_is_its_bias_and_of_extremes_is_finite():
    ones = jnp.ones(5)
    np.testing.assert_allclose(layer_norm(jnp.full((1, 5), 7.0), ones, 2 * ones), 2 * jnp.ones((1, 5)))
    assert jnp.isfinite(layer_norm(jnp.array([[1e15, -1e15, 0, 0, 0]]), ones, ones)).all()
