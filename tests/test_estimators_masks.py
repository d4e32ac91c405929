"""Threshold and top-k masks: exact values, ties, NaN, and the soft gradients they are documented to have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import estimators as est
from hyperjax.estimators import threshold_mask, top_k_mask

SCORES = jnp.array([[0.5, -1.0, 2.0, 0.5, 0.5], [-0.0, 0.0, -3.0, 0.0, 1e-3]])
WEIGHT = jnp.array([[1.0, -2.0, 0.3, 0.7, 4.0], [0.1, 0.2, 0.3, -0.4, 0.5]])
both = pytest.mark.parametrize("compiled", [lambda f: f, jax.jit], ids=["eager", "jit"])


def bits(x):
    return np.asarray(x).view(np.uint32)


@both
def test_top_k_values_with_ties_to_the_lower_index(compiled):
    expected = {
        0: [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
        1: [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]],
        2: [[1, 0, 1, 0, 0], [1, 0, 0, 0, 1]],
        3: [[1, 0, 1, 1, 0], [1, 1, 0, 0, 1]],
        5: [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
    }
    mask = compiled(functools.partial(top_k_mask, temperature=0.37))
    for k, rows in expected.items():
        for number in (k, np.int64(k), float(k), jnp.int32(k)):
            np.testing.assert_array_equal(bits(mask(SCORES, number)), bits(np.float32(rows)))
        along = compiled(functools.partial(top_k_mask, axis=0))(SCORES.T, k)
        np.testing.assert_array_equal(along, np.transpose(rows))
    ks = jnp.array([[3], [1]])
    np.testing.assert_array_equal(mask(SCORES, ks), [expected[3][0], expected[1][1]])
    np.testing.assert_array_equal(top_k_mask(SCORES, [[3], [1]]), mask(SCORES, ks))
    each = compiled(jax.vmap(lambda k: top_k_mask(SCORES[0], k)))(jnp.array([0, 2, 5]))
    np.testing.assert_array_equal(each, [expected[k][0] for k in (0, 2, 5)])


@both
def test_threshold_values_are_exact_and_equal_is_closed(compiled):
    mask = compiled(functools.partial(threshold_mask, temperature=0.37))
    np.testing.assert_array_equal(bits(mask(SCORES)), bits(np.float32([[1, 0, 1, 1, 1], [0, 0, 0, 0, 1]])))
    np.testing.assert_array_equal(mask(SCORES, 0.5), [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask(SCORES, jnp.array([[2.0], [-1.0]])), [[0, 0, 0, 0, 0], [1, 1, 0, 1, 1]])
    above = np.nextafter(np.float32(0.5), np.float32(1))
    np.testing.assert_array_equal(mask(jnp.array([0.5, above]), 0.5), [0, 1])
    np.testing.assert_array_equal(mask(jnp.arange(3), 1), [0, 0, 1])


@both
def test_nan_is_never_chosen_and_infinities_are_numbers(compiled):
    top, n, inf = compiled(top_k_mask), np.nan, np.inf
    np.testing.assert_array_equal(top(jnp.array([1.0, n, 3.0, -2.0]), 2), [1, 0, 1, 0])
    np.testing.assert_array_equal(top(jnp.array([n, -inf, n, -inf]), 2), [0, 1, 0, 1])
    np.testing.assert_array_equal(top(jnp.array([-n, inf, 3.0, inf]), 2), [0, 1, 0, 1])
    np.testing.assert_array_equal(top(jnp.full(4, -inf), 2), [1, 1, 0, 0])
    np.testing.assert_array_equal(compiled(threshold_mask)(jnp.array([n, 1.0, -inf, inf])), [0, 1, 0, 1])
    gradient = compiled(jax.grad(lambda x: jnp.vdot(WEIGHT[0], top_k_mask(x, 2))))
    for row in ([1.0, n, 3.0, -2.0, 0.0], [inf, n, -inf, inf, 0.0], [n] * 5):
        assert jnp.isfinite(gradient(jnp.array(row))).all()
    with_nan, without = gradient(jnp.array([1.0, n, 3.0, -2.0, 0.0])), gradient(jnp.array([1.0, -inf, 3.0, -2.0, 0.0]))
    np.testing.assert_array_equal(with_nan, without)
    assert with_nan[1] == 0


@both
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gradients_are_those_of_the_soft_masks(compiled, temperature):
    def gradient(f):
        return compiled(jax.grad(lambda *a: (WEIGHT * f(*a)).sum(), argnums=(0, 1)))

    def sigmoid(x, threshold):
        return 1 / (1 + jnp.exp(-(x - threshold) / temperature))

    def softmax(x, _, axis, k):
        weights = jnp.exp(x / temperature)
        return k * weights / weights.sum(axis, keepdims=True)

    hard = gradient(functools.partial(threshold_mask, temperature=temperature))(SCORES, 0.3)
    for a, b in zip(hard, gradient(sigmoid)(SCORES, 0.3), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for axis, k in [(-1, 2), (0, 1), (-1, jnp.array([[3], [1]]))]:
        hard = gradient(lambda x, _, a=axis, k=k: top_k_mask(x, k, temperature=temperature, axis=a))(SCORES, 0.0)[0]
        soft = gradient(functools.partial(softmax, axis=axis, k=k))(SCORES, 0.0)[0]
        np.testing.assert_allclose(hard, soft, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(hard.sum(axis), 0, atol=1e-5)


def test_shapes_that_would_broadcast_are_refused():
    scores = jnp.zeros((3, 3))
    with pytest.raises(ValueError, match=r"k has shape \(3,\) for scores \(3, 3\), expected a number, or 2 axes"):
        est.top_k_mask(scores, np.array([1, 2, 3]))
    np.testing.assert_array_equal(est.top_k_mask(scores, np.array([[1], [2], [3]])).sum(-1), [1, 2, 3])
    with pytest.raises(ValueError, match=r"threshold has shape \(2, 1\), expected one that broadcasts to \(3,\)"):
        est.threshold_mask(jnp.zeros(3), jnp.zeros((2, 1)))


def test_a_choice_that_is_ruled_out_leaves_the_temperature_a_gradient():
    logits, key = jnp.array([0.0, 1.0, -jnp.inf]), jax.random.key(0)
    weights = jnp.arange(3.0)
    soft, slope = jax.value_and_grad(lambda t: est.gumbel_softmax(key, logits, t) @ weights)(0.7)
    near = [est.gumbel_softmax(key, logits, t) @ weights for t in (0.7 - 1e-2, 0.7 + 1e-2)]
    assert np.isfinite(soft)
    assert slope == pytest.approx(float(near[1] - near[0]) / 2e-2, rel=1e-2)


def test_reinforce_of_certain_gates_is_finite():
    logits = jnp.array([jnp.inf, -jnp.inf, 0.0])
    loss, gradient = jax.value_and_grad(lambda l: est.reinforce(jax.random.key(0), l, jnp.sum, 4))(logits)
    assert np.isfinite(loss)
    np.testing.assert_array_equal(gradient[:2], 0.0)
    assert np.isfinite(gradient[2])
