"""Sampling text: determinism, the greedy path, the distribution of the draws, and the prime."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.recurrent import CELLS, LanguageModel, generate

V = 6
PRIME = np.array([2, 0, 5, 1])
N = 25  # drawn; one length, so that the tests share compiled programs


@functools.cache
def make(cell="ln_hyper_lstm"):
    """A model with weights so large, and biases so small, that its predictions depend on what was read."""
    keep = 1.0 if cell == "hyper_rnn" else 0.9
    model = LanguageModel(cell, vocabulary=V, units=7, hyper_units=4, embedding=2, keep=keep)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)

    def draw(path, a):
        one = "gamma" in path[-1].key or "b_z" in path[-1].key
        values = 2.0 * rng.normal(size=a.shape) if len(a.shape) > 1 else np.full(a.shape, float(one))
        return jnp.asarray(values, jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnames="model")
def forward(model, params, ids, carry=None):
    return model.apply({"params": params}, ids[None], carry)


def logits_of(model, params, ids):
    """Of the symbol after each prefix of `ids`, by one pass over the whole text: [1 + N, V]."""
    return np.asarray(forward(model, params, jnp.array([-1, *ids], jnp.int32))["logits"][0])


def test_the_same_key_gives_the_same_text_with_and_without_jit():
    model, params = make()
    key = jax.random.key(3)
    first = generate(model, params, PRIME, N, key, 0.8)
    assert first.shape == (N,)
    assert first.dtype == jnp.int32
    np.testing.assert_array_equal(first, generate(model, params, PRIME, N, key, 0.8))
    outer = jax.jit(lambda params, key: generate(model, params, PRIME, N, key, 0.8))
    np.testing.assert_array_equal(first, outer(params, key))


def test_no_jit_at_all_gives_the_same_text():
    model, params = make("lstm")
    drawn = generate(model, params, PRIME[:1], 3, jax.random.key(3))
    with jax.disable_jit():
        np.testing.assert_array_equal(drawn, generate(model, params, PRIME[:1], 3, jax.random.key(3)))


def test_another_key_gives_another_text():
    model, params = make()
    one, two = (generate(model, params, PRIME, N, jax.random.key(n), 3.0) for n in range(2))
    assert np.any(one != two)


@pytest.mark.parametrize("cell", CELLS)
def test_temperature_0_takes_the_argmax_of_a_full_forward_pass(cell):
    model, params = make(cell)
    drawn = np.asarray(generate(model, params, PRIME, N, jax.random.key(0), 0.0))
    best = logits_of(model, params, [*PRIME, *drawn]).argmax(-1)
    np.testing.assert_array_equal(drawn, best[len(PRIME) : -1])
    assert len(set(drawn.tolist())) > 1


def test_a_low_temperature_comes_to_the_argmax():
    model, params = make()
    greedy = generate(model, params, PRIME, N, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(greedy, generate(model, params, PRIME, N, jax.random.key(5), 1e-4))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_of_the_scaled_logits(temperature):
    model, params = make("lstm")
    logits = np.array([1.0, 0.0, -1.0, 0.5, 2.0, -0.5], np.float32)
    params = {**params, "readout": {"kernel": jnp.zeros((7, V)), "bias": jnp.asarray(logits)}}
    n = 5000
    drawn = np.asarray(generate(model, params, [], n, jax.random.key(11), temperature))
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    counts = np.bincount(drawn, minlength=V)
    chi_square = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi_square < 20.5  # the 0.999 quantile at 5 degrees of freedom
    # Independent draws: a symbol does not change the odds of the next one being the same.
    assert abs(np.mean(drawn[1:] == drawn[:-1]) - (p**2).sum()) < 4 * (0.25 / n) ** 0.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prime_is_a_state_to_go_on_from(temperature):
    model, params = make()
    key = jax.random.key(7)
    out = forward(model, params, jnp.array([-1, *PRIME], jnp.int32))
    expected = []
    for n in range(N):
        logits = out["logits"][0, -1]
        drawn = jax.random.categorical(jax.random.fold_in(key, n), logits / temperature) if temperature else None
        expected.append(int(logits.argmax() if drawn is None else drawn))
        out = forward(model, params, jnp.array(expected[-1:], jnp.int32), out["carry"])
    np.testing.assert_array_equal(generate(model, params, PRIME, N, key, temperature), expected)


def test_what_was_drawn_may_be_given_as_prime():
    model, params = make()
    key = jax.random.key(0)
    whole = np.asarray(generate(model, params, PRIME, N, key, 0.0))
    rest = generate(model, params, [*PRIME, *whole[:8]], N - 8, key, 0.0)
    np.testing.assert_array_equal(rest, whole[8:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"prime_ids": [0, V]}, r"prime ids span 0\.\.6; the vocabulary has ids 0\.\.5"),
        ({"prime_ids": [-1, 2]}, r"prime ids span -1\.\.2"),
        ({"prime_ids": [0.5, 1.0]}, "prime ids have type float64"),
    ],
)
def test_bad_input(change, message):
    model = LanguageModel("lstm", vocabulary=V, units=7)  # refused before the parameters are looked at
    good = {"prime_ids": PRIME, "length": 3, "temperature": 1.0}
    with pytest.raises(ValueError, match=message):
        generate(model, {}, key=jax.random.key(0), **good | change)
