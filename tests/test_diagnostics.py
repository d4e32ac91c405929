"""Similarities of embeddings, the share of generation, familiarity and the prior: against formulas and by frequency."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.hypernet import Generator, HyperNetwork, Learned
from hyperjax.hypernet.diagnostics import (
    Familiarity,
    embedding_prior,
    embedding_similarity,
    generation_share,
)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def rotation(width, seed=3):
    return np.linalg.qr(draws(width, width, seed=seed))[0]


def test_similarity_is_the_cosine_or_0_for_a_length_of_0():
    table = draws(5, 3)
    expected = [[a @ b / np.sqrt((a @ a) * (b @ b)) for b in table] for a in table]
    np.testing.assert_allclose(embedding_similarity(table), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(embedding_similarity)(table), expected, atol=1e-6)
    stretched = table @ rotation(3) * np.array([1e-4, 1.0, 3.0, 1e5, 7.0])[:, None]
    np.testing.assert_allclose(embedding_similarity(stretched), expected, atol=1e-6)
    of_length_0 = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_array_equal(embedding_similarity(of_length_0), [[0, 0], [0, 1]])


@pytest.mark.parametrize("table", [np.ones(3), np.ones((2, 3), np.int32), np.ones((0, 3))])
def test_a_table_is_a_matrix_of_floats(table):
    for function in (embedding_similarity, Familiarity.fit):
        with pytest.raises(ValueError, match=r"the table is .* of shape .*, expected floating point numbers \[T, E\]"):
            function(table)


def slow(x):
    """Returns x, after a millisecond or more."""
    matrix = jnp.eye(96)
    return jax.lax.fori_loop(0, 60, lambda _, y: matrix @ y, jnp.full((96, 96), x))[0, 0]


def ones(hyper, *inputs, **keywords):
    """Variables that need no compilation."""
    shapes = jax.eval_shape(lambda key: hyper.init(key, *inputs, task_id=0, **keywords), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)


class Slow(Generator):
    @nn.compact
    def __call__(self, z, task_id=None, native=None):
        return {spec.path: slow(self.param(spec.name, nn.initializers.ones, ())) for spec in self.leaves}


@pytest.mark.parametrize(
    ("generator", "target", "low", "high"),
    [
        (Slow(), lambda params, x: params["w"] * x, 0.25, np.inf),
        (Learned(), lambda params, x: slow(params["w"]) * x, 0.0, 0.25),
    ],
    ids=["slow generator", "slow target"],
)
def test_the_share_of_generation_tells_a_slow_generator_from_a_slow_target(generator, target, low, high):
    x = jnp.ones(3)
    hyper = HyperNetwork.from_target(
        target, x, embedding_dim=1, num_embeddings=1, generator=generator, params={"w": jnp.ones(())}
    )
    share = generation_share(hyper, ones(hyper, x), x, task_id=0, repeats=15)
    assert low < share.forward_share < high
    assert low < share.step_share < high
    assert share.forward_share == share.generate_seconds / share.forward_seconds
    assert share.step_share == share.generate_step_seconds / share.step_seconds


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(2)(x))


def test_the_share_is_measured_with_state_randomness_static_flags_and_any_source_of_z():
    x = jnp.ones((4, 3))
    hyper = HyperNetwork.from_target(Stateful(), x, train=False, embedding_dim=2, num_embeddings=2, generator=Learned())
    variables = ones(hyper, x, train=False)
    extra = dict(train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)})
    share = generation_share(hyper, variables, x, z=np.ones(2, np.float32), repeats=1, **extra)
    assert min(share) > 0
    with pytest.raises(ValueError, match="task_id is 2, expected 0 to 1"):
        generation_share(hyper, variables, x, task_id=2, **extra)
    for repeats in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"repeats is {repeats}, expected a whole number of at least 1"):
            generation_share(hyper, variables, x, task_id=0, repeats=repeats, **extra)


def clusters(n, width, seed):
    centres = 8 * draws(3, width, seed=99)
    return centres[np.random.default_rng(seed).integers(3, size=n)] + draws(n, width, seed=1000 + seed)


def thin(n, width, seed):
    """Two directions of many vary by 1, the others by 0.01."""
    return draws(n, width, seed=seed) * np.where(np.arange(width) < 2, 1, 0.01)


def decaying(n, width, seed, power=1):
    return draws(n, width, seed=seed) / np.arange(1, width + 1) ** power


normal = functools.partial(decaying, power=0)


@pytest.mark.parametrize(
    ("kind", "T", "E", "least", "most"),
    [
        # from 19 rows on the rate is kept: about 0.05, whatever the distribution, with T above E and below
        (normal, 39, 6, 0.02, 0.07),
        (clusters, 59, 4, 0.02, 0.07),
        (decaying, 39, 50, 0.02, 0.07),
        (thin, 39, 8, 0.02, 0.07),
        # with fewer rows it is a bound
        (normal, 2, 32, 0.0, 0.06),
        (decaying, 5, 16, 0.0, 0.06),
        (clusters, 5, 64, 0.0, 0.06),
        (normal, 12, 3, 0.0, 0.06),
    ],
)
def test_fresh_embeddings_of_the_same_distribution_seldom_warn_and_far_ones_always(kind, T, E, least, most):
    tables, fresh = 60, 100
    warned = []
    for seed in range(tables):
        x = np.float32(kind(T + fresh, E, seed))
        familiarity, z = Familiarity.fit(x[:T]), x[T:]
        direction = draws(fresh, E, seed=2000 + seed)
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        far = np.float32(z + 12 * np.sqrt(E) * x.std() * direction)
        scores = np.asarray(familiarity.score(np.concatenate([z, far])))
        warned.append(np.mean(scores.reshape(2, fresh) > familiarity.threshold, axis=1))
    false_positives, detected = np.mean(warned, axis=0)
    assert least <= false_positives <= most
    assert detected == 1


@pytest.mark.parametrize(("T", "E"), [(19, 3), (24, 40), (60, 5)])
def test_the_threshold_is_a_quantile_of_refits_without_each_row(T, E):
    """Against refitting the covariance T times; the shrinkage is that of all rows (Chen et al., equation 23)."""
    x = decaying(T, E, 7)
    n = T - 1
    covariance = np.cov(x.T)
    power, trace = np.sum(covariance**2), np.trace(covariance)
    rho = min(1, ((1 - 2 / E) * power + trace**2) / ((n + 1 - 2 / E) * (power - trace**2 / E)))
    scores = []
    for i in range(T):
        others = np.delete(x, i, axis=0)
        centred = others - others.mean(axis=0)
        shrunk = (1 - rho) * centred.T @ centred / n + rho * trace / E * np.eye(E)
        difference = x[i] - others
        scores.append(np.sqrt(np.min(np.sum(difference * np.linalg.solve(shrunk, difference.T).T, axis=1)) / E))
    for rate, rank in ((0.05, int(np.ceil(0.95 * (T + 1)))), (0.5, int(np.ceil(0.5 * (T + 1))))):
        assert rho < 1
        assert np.isclose(Familiarity.fit(x, rate).threshold, np.sort(scores)[rank - 1], rtol=1e-5)


@pytest.mark.parametrize(("T", "E"), [(4, 6), (30, 6)])
def test_rotating_shifting_and_scaling_change_nothing(T, E):
    table, z = decaying(T, E, 1), 3 * draws(8, E, seed=2)
    plain = Familiarity.fit(table)
    for move in (lambda v: v @ rotation(E), lambda v: 1e4 * v, lambda v: 1e-6 * v, lambda v: v + 5.0):
        moved = Familiarity.fit(move(table))
        np.testing.assert_allclose(moved.threshold, plain.threshold, rtol=1e-4)
        np.testing.assert_allclose(moved.score(move(z)), plain.score(z), rtol=1e-3)


def test_trained_embeddings_score_0_and_the_score_grows_with_the_distance():
    table = draws(25, 4)
    familiarity = Familiarity.fit(table)
    np.testing.assert_allclose(familiarity.score(table), np.zeros(25), atol=1e-5)
    outward = np.linspace(1, 30, 20)[:, None] * table[np.argmax(np.linalg.norm(table, axis=1))]
    assert np.all(np.diff(familiarity.score(outward)) > 0)
    np.testing.assert_allclose(familiarity.score(outward[3]), familiarity.score(outward)[3], rtol=1e-5)
    assert familiarity.score(table[0]).shape == ()
    inside = jax.jit(lambda familiarity, z: (familiarity.score(z), familiarity.score(z) > familiarity.threshold))
    values, warns = inside(familiarity, outward)
    np.testing.assert_allclose(values, familiarity.score(outward), rtol=1e-5, atol=1e-6)
    assert warns.sum() == 19


def test_what_lies_between_clusters_is_unfamiliar_though_it_is_near_the_mean():
    table = 0.1 * draws(60, 3) + np.where(np.arange(60) % 2, 5, -5)[:, None]
    familiarity = Familiarity.fit(table)
    assert float(familiarity.score(table.mean(axis=0))) > 2 * familiarity.threshold
    assert float(familiarity.score(table[0] + 0.05)) < familiarity.threshold


def test_a_direction_that_hardly_varies_counts_more():
    table = thin(200, 8, 5)
    familiarity = Familiarity.fit(table)
    for axis, warns in ((0, False), (7, True)):
        z = table[3] + 0.1 * np.eye(8)[axis]
        assert (float(familiarity.score(z)) > familiarity.threshold) == warns


def test_check_warns_in_one_line_above_the_threshold_and_at_nan():
    table = np.float32(draws(30, 4))
    familiarity = Familiarity.fit(table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(familiarity.check(table[2])) < 1e-5
    far = np.float32([table[0] + 50, table[1], table[2] - 40])
    message = (
        r"^2 of 3 embeddings z are far from all 30 trained: out-of-distribution score \d+\.?\d*, threshold \d\.\d+;"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        scores = familiarity.check(far)
    np.testing.assert_allclose(scores, familiarity.score(far))
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__
    for z in (far[0], np.float32([0, np.nan, 0, 0])):
        with pytest.warns(UserWarning, match="^z is far from all 30 trained"):
            familiarity.check(z)
    for function in (familiarity.check, Familiarity.fit):
        with pytest.raises(ValueError, match=r"Familiarity\.(check|fit) was called inside jit.*call it outside"):
            jax.jit(function)(far)
    with pytest.raises(ValueError, match=r"z has shape \(5,\), expected \[4\]"):
        familiarity.score(jnp.ones(5))


def test_a_lower_rate_is_a_higher_threshold_in_both_regimes():
    for T, rates in ((4, (0.2, 0.05, 0.01)), (200, (0.2, 0.05, 0.01)), (30, (0.1, 0.01))):
        thresholds = [Familiarity.fit(draws(T, 3), rate).threshold for rate in rates]
        assert thresholds == sorted(set(thresholds))


@pytest.mark.parametrize(
    ("table", "rate", "message"),
    [
        (np.ones((1, 3)), 0.05, "the table is 1 x 3, all rows equal; expected at least 2 different"),
        (np.ones((5, 3)), 0.05, "the table is 5 x 3, all rows equal"),
        (np.array([[1.0, np.inf], [0.0, 1.0]]), 0.05, "the table is 2 x 2, not all finite"),
        (draws(4, 3), 0, "false_positive_rate is 0, expected a number between 0 and 1"),
        (draws(4, 3), 1.0, "false_positive_rate is 1.0"),
    ],
)
def test_tables_that_say_nothing_are_refused(table, rate, message):
    with pytest.raises(ValueError, match=message):
        Familiarity.fit(table, rate)


def test_the_prior_is_the_negative_log_density_up_to_a_constant():
    shape = (2, 3, 4)
    a, b, std = draws(*shape), draws(*shape, seed=1), 0.7

    def log_density(z):
        rows = z.reshape(-1, shape[-1])
        return np.mean(np.sum(-(rows**2) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi)), axis=1))

    change = embedding_prior(a, std) - embedding_prior(b, std)
    np.testing.assert_allclose(change, log_density(b) - log_density(a), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(embedding_prior)(a, std), embedding_prior(a, std), rtol=1e-6)
    np.testing.assert_allclose(embedding_prior(a[0, 0], std), np.sum(a[0, 0] ** 2) / (2 * std**2), rtol=1e-6)
    gradient = jax.grad(embedding_prior)(jnp.asarray(a), std)
    np.testing.assert_allclose(gradient, a / std**2 / np.prod(shape[:-1]), rtol=1e-5)


@pytest.mark.parametrize(
    ("z", "std", "message"),
    [
        *[(np.ones(2), std, "std is .*, expected one number above 0") for std in (0, -1.0, np.nan, np.inf, np.ones(2))],
        *[(z, 1.0, r"z is .* of shape .*, expected floating point .* E\]") for z in (1.0, np.ones(3, np.int32))],
    ],
)
def test_the_prior_is_of_floats_with_an_axis_and_one_standard_deviation_above_0(z, std, message):
    with pytest.raises(ValueError, match=message):
        embedding_prior(z, std)
