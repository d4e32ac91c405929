"""FastRNN: state carried across calls, layouts, transformations, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.recurrent import LSTM, FastRNN, HyperLSTM

CELL = HyperLSTM(8, hyper_units=4, layer_norm=True)
X = jax.random.normal(jax.random.key(0), (3, 10, 5))
VARIABLES = jax.jit(FastRNN(CELL).init)(jax.random.key(1), X)


def test_a_text_in_two_parts_is_the_text_in_one():
    layer = FastRNN(CELL)
    last, h = layer.apply(VARIABLES, X)
    carry, first = layer.apply(VARIABLES, X[:, :4])
    carry, second = layer.apply(VARIABLES, X[:, 4:], carry)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), h, atol=1e-6)
    for a, b in zip(carry, last, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_time_major_is_a_transpose():
    _, h = FastRNN(CELL).apply(VARIABLES, X)
    _, swapped = FastRNN(CELL, time_major=True).apply(VARIABLES, X.swapaxes(0, 1))
    np.testing.assert_array_equal(swapped, h.swapaxes(0, 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_inputs_of_other_types_become_the_parameters(dtype):
    x = jax.nn.one_hot(jnp.arange(6).reshape(2, 3) % 5, 5)
    want = FastRNN(CELL).apply(VARIABLES, x)
    for a, b in zip(
        jax.tree.leaves(FastRNN(CELL).apply(VARIABLES, x.astype(dtype))), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_vmap_over_parameters_is_a_loop_over_them():
    layer, x = FastRNN(LSTM(4)), X[:1, :4]
    many = [layer.init(jax.random.key(n), x) for n in range(2)]
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(layer.apply(v, x)[1] ** 2)))
    together = jax.vmap(gradient)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *many))
    for n, variables in enumerate(many):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(gradient(variables)), strict=True):
            np.testing.assert_allclose(a[n], b, rtol=1e-4, atol=1e-5)


def test_dropout_differs_between_steps_calls_and_keys_but_not_between_chunk_sizes():
    cell, x = LSTM(6, keep=0.5), jnp.ones((2, 8, 3))
    variables = FastRNN(LSTM(6)).init(jax.random.key(0), x)

    def run(key, chunk=None):
        return FastRNN(cell, remat_chunk=chunk).apply(variables, x, rngs={"dropout": jax.random.key(key)})[1]

    np.testing.assert_array_equal(run(1), run(1))
    np.testing.assert_allclose(run(1), run(1, chunk=3), atol=1e-6)
    assert not np.allclose(run(1), run(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FastRNN(CELL).apply(VARIABLES, X[0]), r"shape \(10, 5\).*\[batch, time, features\]"),
        (lambda: FastRNN(CELL).apply(VARIABLES, X[:, :0]), r"shape \(3, 0, 5\)"),
        (lambda: FastRNN(CELL, remat_chunk=0).apply(VARIABLES, X), "remat_chunk is 0"),
        (
            lambda: FastRNN(CELL).apply(VARIABLES, X, CELL.initialize_carry(None, (4, 5))),
            r"shapes \(\(4, 8\).*\(\(3, 8\)",
        ),
        (lambda: FastRNN(CELL).apply(VARIABLES, X, (jnp.zeros((3, 8)),)), "initial_carry has shapes"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
