"""Stochastic gates and masks: closed forms against samples, limits, extremes, `jit` and `vmap`, error messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from hyperjax import estimators as est

KEY = jax.random.key(0)
N = 10**6
STRETCHES = [(2 / 3, -0.1, 1.1), (0.5, -1.0, 2.0), (0.9, -0.1, 1.5)]  # beta, gamma, zeta: the corners of SNR's search
RANDOM = {  # every function of a key, as f(key, logits of shape [n])
    "hard_concrete": est.hard_concrete,
    "gumbel_softmax": est.gumbel_softmax,
    "gumbel_softmax hard": functools.partial(est.gumbel_softmax, temperature=0.5, hard=True),
    "gumbel_sigmoid": est.gumbel_sigmoid,
    "gumbel_sigmoid hard": functools.partial(est.gumbel_sigmoid, temperature=0.5, hard=True),
    "bernoulli_straight_through": est.bernoulli_straight_through,
    "reinforce": lambda key, x: est.reinforce(key, x, lambda gates: (gates**2).mean(), samples=3),
}
FIXED = {
    "hard_concrete_deterministic": est.hard_concrete_deterministic,
    "hard_concrete_l0": est.hard_concrete_l0,
    "hard_concrete_one": est.hard_concrete_one,
    "threshold_mask": est.threshold_mask,
    "top_k_mask": lambda x: est.top_k_mask(x, 2),
}
EXACT = ("gumbel_softmax hard", "gumbel_sigmoid hard", "bernoulli_straight_through", "threshold_mask", "top_k_mask")


def agrees(frequency, probability, samples=N):
    """Within five standard errors of a frequency."""
    error = np.sqrt(probability * (1 - probability) / samples)
    assert np.all(np.abs(np.asarray(frequency) - probability) < 5 * error + 1e-7), (frequency, probability)


@functools.cache
def hard_concrete_statistics():
    @jax.jit
    def statistics(log_alpha, beta, gamma, zeta):
        z = est.hard_concrete(KEY, jnp.broadcast_to(log_alpha, N), beta=beta, gamma=gamma, zeta=zeta)
        return (z == 0).mean(), (z == 1).mean(), z.mean(), z.std()

    return statistics


@pytest.mark.parametrize("log_alpha", [-2.398, 0.0, 1.5])
@pytest.mark.parametrize("stretch", STRETCHES)
def test_closed_forms_are_the_frequencies_of_a_million_samples(stretch, log_alpha):
    beta, gamma, zeta = stretch
    zero, one, mean, std = hard_concrete_statistics()(log_alpha, beta, gamma, zeta)
    constants = dict(beta=beta, gamma=gamma, zeta=zeta)
    agrees(1 - zero, float(est.hard_concrete_l0(log_alpha, **constants)))
    agrees(one, float(est.hard_concrete_one(log_alpha, **constants)))

    # E z is the integral of P(z > t), and P(s <= x) = sigmoid(beta logit(x) - log_alpha)
    def survival(t):
        return special.expit(log_alpha - beta * special.logit((t - gamma) / (zeta - gamma)))

    assert abs(mean - integrate.quad(survival, 0, 1)[0]) < 5 * std / np.sqrt(N)
    agrees(1 - zero, survival(0.0))
    agrees(one, survival(1.0))


def test_a_gate_served_as_zero_is_open_with_probability_of_a_third():
    edge = -np.log(11)  # sigmoid(log_alpha) * 1.2 - 0.1 = 0
    np.testing.assert_allclose(est.hard_concrete_deterministic(jnp.array([edge - 0.01, 0.0])), [0, 0.5], atol=1e-6)
    assert 0 < est.hard_concrete_deterministic(edge + 0.01) < 0.01
    np.testing.assert_allclose(est.hard_concrete_l0(edge), 0.31, atol=1e-3)


def test_location_of_an_open_probability_is_the_inverse():
    with jax.enable_x64(True):
        p = np.array([1e-6, 0.1, 0.5, 0.9, 1 - 1e-6])
        for beta, gamma, zeta in STRETCHES:
            constants = dict(beta=beta, gamma=gamma, zeta=zeta)
            there = est.hard_concrete_log_alpha(p, **constants)
            np.testing.assert_allclose(est.hard_concrete_l0(there, **constants), p, rtol=1e-9)


def test_the_whole_bracket_is_divided_by_beta_and_the_noise_is_sampled():
    """Undoing the formula of any (log_alpha, beta) gives the same logistic noise, anew for every key."""
    with jax.enable_x64(True):

        @jax.jit
        def noise(key, log_alpha, beta):
            s = est.hard_concrete(key, jnp.full(2000, log_alpha), beta=beta, gamma=0.0, zeta=1.0)
            return beta * jax.scipy.special.logit(s) - log_alpha

        first = noise(KEY, 0.0, 1.0)
        for log_alpha, beta in [(1.5, 0.5), (-2.0, 0.9), (0.7, 2.0)]:
            np.testing.assert_allclose(noise(KEY, log_alpha, beta), first, rtol=1e-6, atol=1e-6)
        assert stats.kstest(first, stats.logistic.cdf).pvalue > 1e-3
        other = noise(jax.random.key(1), 0.0, 1.0)
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.1


@pytest.mark.parametrize("logit", [-2.0, 0.0, 0.7])
def test_binary_samples_are_open_with_probability_sigmoid(logit):
    p = float(special.expit(logit))
    agrees(jax.jit(lambda x: est.bernoulli_straight_through(KEY, jnp.broadcast_to(x, N)).mean())(logit), p)
    for temperature in (0.3, 2.0):
        hard, soft = (est.gumbel_sigmoid(KEY, jnp.full(N, logit), temperature, hard=h) for h in (True, False))
        agrees(hard.mean(), p)
        np.testing.assert_array_equal(hard, soft > 0.5)


def test_largest_entry_of_gumbel_softmax_is_categorical():
    logits = jnp.array([1.0, -0.5, 0.3, -jnp.inf])
    for temperature in (0.3, 2.0):
        hard, soft = (
            est.gumbel_softmax(KEY, jnp.broadcast_to(logits[:, None], (4, N)), temperature, hard=h, axis=0)
            for h in (True, False)
        )
        agrees(hard.mean(1), special.softmax(logits))
        np.testing.assert_array_equal(hard.argmax(0), soft.argmax(0))
        np.testing.assert_array_equal(hard.sum(0), 1)
        np.testing.assert_allclose(soft.sum(0), 1, rtol=1e-6)


@pytest.mark.parametrize("stretch", STRETCHES)
def test_gradient_of_the_expected_l0(stretch):
    beta, gamma, zeta = stretch
    constants = dict(beta=beta, gamma=gamma, zeta=zeta)
    with jax.enable_x64(True):
        x, h = np.linspace(-6, 6, 7), 1e-6
        for closed_form in (est.hard_concrete_l0, est.hard_concrete_one):
            p, pullback = jax.vjp(functools.partial(closed_form, **constants), jnp.asarray(x))
            gradient = pullback(jnp.ones(7))[0]
            np.testing.assert_allclose(gradient, p * (1 - p), rtol=1e-9)
            difference = closed_form(x + h, **constants) - closed_form(x - h, **constants)
            np.testing.assert_allclose(gradient, difference / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("f", [est.gumbel_softmax, est.gumbel_sigmoid])
def test_hard_samples_have_the_gradient_of_the_soft_ones(f):
    x, weight = jnp.array([[0.3, -1.0, 2.0], [0.0, 0.5, 1.0]]), jnp.array([[1.0, -2.0, 0.5], [0.2, 3.0, -1.0]])

    def gradient(hard):
        return jax.jit(jax.grad(lambda x: jnp.vdot(weight, f(KEY, x, 0.7, hard=hard))))(x)

    np.testing.assert_allclose(gradient(True), gradient(False), rtol=1e-6, atol=1e-7)
    assert (gradient(False) != 0).all()


def test_the_penalty_moves_a_closed_gate_where_a_count_of_samples_moves_none():
    x = jnp.array([-4.0, 0.0, 4.0])
    assert (jax.grad(lambda a: est.hard_concrete_l0(a).sum())(x) > 1e-3).all()
    assert (jax.grad(lambda a: (est.hard_concrete(KEY, a) != 0).astype(a.dtype).sum())(x) == 0).all()


def test_hard_concrete_of_small_beta_is_bernoulli():
    for log_alpha in (-1.0, 0.5):
        zero, one, mean, _ = hard_concrete_statistics()(log_alpha, 1e-6, -0.1, 1.1)
        p = float(special.expit(log_alpha))
        assert zero + one > 1 - 1e-5
        agrees(mean, p)
        np.testing.assert_allclose(est.hard_concrete_l0(log_alpha, beta=1e-6), p, rtol=1e-5)
        np.testing.assert_allclose(est.hard_concrete_one(log_alpha, beta=1e-6), p, rtol=1e-5)


def test_hard_concrete_without_stretch_is_the_concrete_distribution():
    x = jnp.linspace(-3, 3, 9)
    plain = dict(gamma=0.0, zeta=1.0)
    np.testing.assert_allclose(
        est.hard_concrete(KEY, x, beta=0.7, **plain), est.gumbel_sigmoid(KEY, x, 0.7), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(est.hard_concrete_deterministic(x, **plain), special.expit(x), rtol=1e-6)
    np.testing.assert_array_equal(est.hard_concrete_l0(x, **plain), 1)
    np.testing.assert_array_equal(est.hard_concrete_one(x, **plain), 0)
    nearly = dict(gamma=-1e-30, zeta=1.0 + 1e-6)
    assert (est.hard_concrete_l0(x, **nearly) > 1 - 1e-6).all()
    assert (est.hard_concrete_one(x, **nearly) < 3e-3).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_extremes_are_no_nan(dtype):
    limits = jnp.finfo(dtype)
    finite = [limits.min, -1e4, -30, -limits.tiny, 0, 30, 1e4, limits.max]
    infinite = [-jnp.inf, *finite, jnp.inf]

    @jax.jit
    def everything(finite, infinite):
        def one(name, f):
            x = finite if name in ("gumbel_softmax", "gumbel_softmax hard", "reinforce") else infinite
            value, pullback = jax.vjp(f, x)
            return value, pullback(jnp.linspace(-1, 1, max(1, value.size)).reshape(value.shape).astype(value.dtype))[0]

        keyed = {name: functools.partial(f, KEY) for name, f in RANDOM.items()}
        return {name: one(name, f) for name, f in (keyed | FIXED).items()}

    for name, (value, gradient) in everything(jnp.array(finite, dtype), jnp.array(infinite, dtype)).items():
        assert gradient.dtype == dtype, name
        assert jnp.isfinite(gradient).all(), (name, gradient)
        assert ((value >= 0) & (value <= 1)).all(), (name, value)
        assert name == "reinforce" or value.dtype == dtype, name
        assert name not in EXACT or ((value == 0) | (value == 1)).all(), name
    p = jnp.array([limits.tiny, 0.5, 1 - limits.epsneg], dtype)
    there = est.hard_concrete_log_alpha(p)
    assert there.dtype == dtype
    assert jnp.isfinite(there).all()


def test_half_precision_is_float32_rounded():
    x = jnp.linspace(-3, 3, 8, dtype=jnp.float16)
    keyed = {name: functools.partial(f, KEY) for name, f in RANDOM.items() if name != "reinforce"}
    everything = jax.jit(lambda x: {name: f(x) for name, f in (keyed | FIXED).items()})
    wide, half = everything(x.astype(jnp.float32)), everything(x)
    for name in wide:
        np.testing.assert_allclose(half[name], wide[name].astype(jnp.float16), rtol=1e-3, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", RANDOM)
def test_same_numbers_with_and_without_jit_and_under_vmap(name):
    f = RANDOM[name]
    keys, logits = jax.random.split(KEY, 3), jnp.linspace(-2, 3, 15).reshape(3, 5)
    same = np.testing.assert_array_equal if name in EXACT else functools.partial(np.testing.assert_allclose, rtol=2e-6)
    compiled = jax.jit(f)
    alone = [f(key, logits[0]) for key in keys]
    for key, row in zip(keys, alone, strict=True):
        same(compiled(key, logits[0]), row)
    same(jax.jit(jax.vmap(f, (0, None)))(keys, logits[0]), jnp.stack(alone))
    same(jax.jit(jax.vmap(f, (None, 0)))(KEY, logits), jnp.stack([compiled(KEY, row) for row in logits]))
    assert name == "reinforce" or not np.array_equal(f(keys[0], logits), f(keys[1], logits))
    np.testing.assert_array_equal(f(keys[0], logits), f(keys[0], logits))


def test_traced_constants_under_vmap_equal_each_alone():
    x = jnp.linspace(-3, 3, 7)
    functions = {"hard_concrete": functools.partial(est.hard_concrete, KEY), "l0": est.hard_concrete_l0}
    functions |= {"one": est.hard_concrete_one}
    together = jax.jit(jax.vmap(lambda b, g, z: {n: f(x, beta=b, gamma=g, zeta=z) for n, f in functions.items()}))(
        *jnp.array(STRETCHES).T
    )
    for i, (beta, gamma, zeta) in enumerate(STRETCHES):
        for name, f in functions.items():
            alone = f(x, beta=beta, gamma=gamma, zeta=zeta)
            np.testing.assert_allclose(together[name][i], alone, rtol=1e-5, atol=1e-6, err_msg=name)
    temperatures = jnp.array([0.3, 2.0])
    for name, f in {"softmax": est.gumbel_softmax, "sigmoid": est.gumbel_sigmoid}.items():
        rows = jax.vmap(lambda t, f=f: f(KEY, x, t))(temperatures)
        for row, t in zip(rows, (0.3, 2.0), strict=True):
            np.testing.assert_allclose(row, f(KEY, x, t), rtol=1e-5, err_msg=name)


def test_temperature_schedule():
    for rate, minimum, initial in [(1e-5, 0.5, 1.0), (1e-4, 0.5, 1.0), (1e-8, 0.1, 5.0), (800.0, 0.2, 2.0)]:
        schedule = est.exponential_temperature(rate, minimum, initial)
        for step in (0, 1, 1000, 60_000, 10**8):
            expected = max(minimum, initial * np.exp(-rate * step))
            np.testing.assert_allclose(schedule(step), expected, rtol=2e-6)
            np.testing.assert_allclose(schedule(jnp.int32(step)), expected, rtol=2e-6)


BAD = {
    "beta is 0.0, expected above 0": lambda: est.hard_concrete(KEY, 0.0, beta=0.0),
    "beta is nan, expected above 0": lambda: est.hard_concrete_l0(0.0, beta=np.nan),
    "beta is -1.0, expected above 0": lambda: est.hard_concrete_one(0.0, beta=np.linspace(-1, 1, 200)),
    "gamma is 0.1, expected 0 or below": lambda: est.hard_concrete_deterministic(0.0, gamma=0.1),
    "zeta is inf, expected 1 or above": lambda: est.hard_concrete_l0(0.0, zeta=np.inf),
    "gamma is -inf, expected 0 or below": lambda: est.hard_concrete_l0(0.0, gamma=-np.inf),
    "gamma is 0, expected below 0": lambda: est.hard_concrete_log_alpha(0.5, gamma=0),
    "zeta is 0.9, expected 1 or above": lambda: est.hard_concrete(KEY, 0.0, zeta=0.9),
    "open_probability is 1.0, expected inside of (0, 1)": lambda: est.hard_concrete_log_alpha([0.5, 1.0]),
    "open_probability is 0, expected inside of (0, 1)": lambda: est.hard_concrete_log_alpha(0),
    "temperature is 0, expected above 0": lambda: est.gumbel_softmax(KEY, jnp.zeros(2), 0),
    "temperature is -1.0, expected above 0": lambda: est.gumbel_sigmoid(KEY, jnp.zeros(2), -1.0),
    "temperature is -2, expected above 0": lambda: est.threshold_mask(jnp.zeros(2), temperature=-2),
    "temperature is -3, expected above 0": lambda: est.top_k_mask(jnp.zeros(2), 1, temperature=-3),
    "k is 4, expected a whole number of 0 to 3, the length of axis 0": lambda: est.top_k_mask(jnp.zeros(3), 4, axis=0),
    "k is -1, expected a whole number of 0 to 3": lambda: est.top_k_mask(jnp.zeros((2, 3)), jnp.array([[2], [-1]])),
    "k is 1.5, expected a whole number of 0 to 3": lambda: est.top_k_mask(jnp.zeros(3), 1.5),
    "samples is 0, expected 1 or more": lambda: est.reinforce(KEY, jnp.zeros(2), jnp.sum, samples=0),
    "loss_fn returns shape (2,), expected a scalar": lambda: est.reinforce(KEY, jnp.zeros(2), lambda z: z, samples=2),
    "rate is 0, expected above 0": lambda: est.exponential_temperature(0),
    "minimum is 2.0, expected above 0 and at most the initial temperature 1.0": lambda: est.exponential_temperature(
        1e-4, 2.0
    ),
    "minimum is 0, expected above 0": lambda: est.exponential_temperature(1e-4, 0),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_are_one_line_that_names_the_value(message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is looked at below
        BAD[message]()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 120
