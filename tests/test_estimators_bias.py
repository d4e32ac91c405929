"""The bias of each gradient estimator on problems small enough to enumerate, with the errors of a sample's mean."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special

from hyperjax import estimators as est

LOGITS, A, C = np.array([-0.7, 0.4, 1.1]), np.array([1.5, -2.0, 1.0]), 0.3
P = special.expit(LOGITS)
GATES = np.array(list(itertools.product([0.0, 1.0], repeat=3)))
PROBABILITY = np.prod(np.where(GATES == 1, P, 1 - P), 1)
SAMPLES = 200_000


def square(z, c=C):
    return (jnp.vdot(jnp.asarray(A, z.dtype), z) - c) ** 2


def enumerated(loss):
    """The expected loss of Bernoulli gates, and its gradient [3]: the sum of P loss d log P."""
    losses = np.array([float(loss(jnp.float32(gates))) for gates in GATES])
    return PROBABILITY @ losses, (PROBABILITY * losses) @ (GATES - P)


def sampled(function, x=LOGITS, samples=SAMPLES):
    """Mean of the value and of the gradient of function(key, x), their standard errors, the gradient's variance."""
    keys = jax.random.split(jax.random.key(1), samples)
    run = jax.jit(jax.vmap(jax.value_and_grad(function, argnums=1), (0, None)))
    value, gradient = (np.asarray(a, np.float64) for a in run(keys, jnp.float32(x)))
    root = np.sqrt(samples)
    return value.mean(), value.std() / root, gradient.mean(0), gradient.std(0) / root, gradient.var(0)


def equals(mean, error, exact):
    assert (np.abs(mean - exact) < 5 * error + 1e-6).all(), (mean, exact, error)


def differs(mean, error, exact):
    assert (np.abs(mean - exact) > 20 * error).any(), (mean, exact, error)


def concrete_moment(n, stretch):
    """E z^n and its derivative to log_alpha, [3] each, by numerical integration of P(z > t)."""
    beta, gamma, zeta = stretch

    def integral(f, i):
        tail = lambda t: special.expit(LOGITS[i] - beta * special.logit((t - gamma) / (zeta - gamma)))  # noqa: E731
        return integrate.quad(lambda t: n * t ** (n - 1) * f(tail(t)), 0, 1, limit=200)[0]

    return tuple(np.array([integral(f, i) for i in range(3)]) for f in (lambda p: p, lambda p: p * (1 - p)))


def integrated(stretch):
    """The gradient of the expected `square` of relaxed gates: it only needs the first and second moments."""
    (first, d_first), (_, d_second) = concrete_moment(1, stretch), concrete_moment(2, stretch)
    return A**2 * d_second + 2 * A * d_first * (A @ first - A * first - C)


def test_reinforce_is_unbiased_and_leave_one_out_has_the_lower_variance():
    def loss(z):
        return jnp.floor(square(z)) + 3  # no gradient in the gates; an offset that a baseline takes away

    expected, exact = enumerated(loss)
    variances = {}
    for samples in (1, 2, 4):
        value, error, gradient, gradient_error, variances[samples] = sampled(
            lambda key, x, n=samples: est.reinforce(key, x, loss, n)
        )
        equals(value, error, expected)
        equals(gradient, gradient_error, exact)
    for samples in (2, 4):  # at as many evaluations of the loss
        assert (variances[samples] < 0.8 * variances[1] / samples).all(), variances


def test_reinforce_of_a_constant_is_still_and_other_parameters_have_their_gradient():
    def value(key, x, c, samples):
        return est.reinforce(key, x, lambda z: square(z, c), samples)

    constant = jax.grad(lambda x: est.reinforce(jax.random.key(0), x, lambda z: jnp.float32(7), 4))
    np.testing.assert_array_equal(constant(jnp.float32(LOGITS)), 0)
    exact = 2 * (C - A @ P)
    mean, error = sampled(lambda key, c: value(key, jnp.float32(LOGITS), c, 2), C)[2:4]
    equals(mean, error, exact)


def test_straight_through_is_exact_for_losses_linear_in_each_gate():
    def linear(z):
        return jnp.vdot(jnp.asarray(A, z.dtype), z)

    for seed in range(3):  # without noise even
        f = lambda x, s=seed: linear(est.bernoulli_straight_through(jax.random.key(s), x))  # noqa: E731
        np.testing.assert_allclose(jax.grad(f)(jnp.float32(LOGITS)), enumerated(linear)[1], rtol=1e-5)
    product = lambda z: jnp.prod(z) + z[0] * z[1]  # noqa: E731
    mean, error = sampled(lambda key, x: product(est.bernoulli_straight_through(key, x)))[2:4]
    equals(mean, error, enumerated(product)[1])


def test_straight_through_is_biased_for_a_nonlinear_loss_by_what_enumeration_says():
    value, value_error, mean, error, _ = sampled(lambda key, x: square(est.bernoulli_straight_through(key, x)))
    expected, exact = enumerated(square)
    equals(value, value_error, expected)
    slopes = 2 * (GATES @ A - C)[:, None] * A
    equals(mean, error, PROBABILITY @ slopes * P * (1 - P))
    differs(mean, error, exact)


@pytest.mark.parametrize("stretch", [(2 / 3, -0.1, 1.1), (0.5, -1.0, 2.0)])
def test_hard_concrete_has_the_gradient_of_its_own_expectation(stretch):
    beta, gamma, zeta = stretch
    sample = functools.partial(est.hard_concrete, beta=beta, gamma=gamma, zeta=zeta)
    mean, error = sampled(lambda key, x: square(sample(key, x)))[2:4]
    equals(mean, error, integrated(stretch))


def test_soft_gumbel_sigmoid_is_biased_for_gates_of_0_and_1_and_less_so_when_cold():
    exact = enumerated(square)[1]
    biases = [np.linalg.norm(integrated((t, 0.0, 1.0)) - exact) for t in (2.0, 1.0, 0.5, 0.2, 0.05)]
    assert (np.diff(biases) < 0).all(), biases
    assert biases[-1] < 0.1 * biases[0]
    for temperature in (1.0, 0.5):
        mean, error = sampled(lambda key, x, t=temperature: square(est.gumbel_sigmoid(key, x, t)))[2:4]
        equals(mean, error, integrated((temperature, 0.0, 1.0)))
        differs(mean, error, exact)


def test_gumbel_softmax_is_biased_for_a_choice_and_less_so_when_cold():
    p = special.softmax(LOGITS)
    losses = (A - C) ** 2
    exact = p * (losses - p @ losses)
    biases, noise = [], []
    for temperature in (2.0, 0.5, 0.1):
        mean, error = sampled(lambda key, x, t=temperature: square(est.gumbel_softmax(key, x, t)))[2:4]
        biases.append(np.linalg.norm(mean - exact))
        noise.append(np.linalg.norm(error))
    assert biases[0] > biases[1] + 5 * noise[1] > biases[2] + 10 * noise[2], (biases, noise)
    assert noise[0] < noise[1] < noise[2]  # the price of the cold


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_hard_gumbel_has_the_discrete_value_and_a_biased_gradient(name):
    sample = {"sigmoid": est.gumbel_sigmoid, "softmax": est.gumbel_softmax}[name]
    value, value_error, mean, error, _ = sampled(lambda key, x: square(sample(key, x, hard=True)))
    expected, exact = enumerated(square)
    if name == "softmax":
        p, losses = special.softmax(LOGITS), (A - C) ** 2
        expected, exact = p @ losses, p * (losses - p @ losses)
    equals(value, value_error, expected)
    differs(mean, error, exact)
