"""The deferred scan against a plain scan: values, every gradient, memory, and what its loop may not contain."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_cells import CASES, T, cases, setup

from hyperjax.recurrent import FastRNN, HyperLSTM, Weights, deferred_scan, platform
from hyperjax.recurrent.scan import product


def plain_scan(cell, params, carry, x, masks=None):
    """The cell's own step under lax.scan, differentiated by JAX as it stands."""

    def body(carry, at_t):
        x_t, mask = at_t
        w = cell.bind({"params": params}).weights(x_t.shape[-1])
        xp = {k: product(x_t, v) for k, v in w.inputs.items()}
        hp = {k: product(carry[1], v) for k, v in w.recurrent.items()}
        if w.late:
            gated = cell.gate(w.small, carry, x_t, xp, hp)
            xp |= {k: product(gated, v) for k, v in w.late.items()}
        new = cell.step(w.small, carry, xp, hp, mask)
        return new, new[1]

    return lax.scan(body, carry, (x, masks))


def fast_scan(cell, params, carry, x, masks=None):
    weights = cell.bind({"params": params}).weights(x.shape[-1])
    return deferred_scan(cell.step, weights, carry, x, masks, gate=cell.gate)


def loss_and_gradients(scan, name, dtype):
    with jax.enable_x64(dtype == np.float64):
        cell, params, carry, x, _ = setup(name, dtype=dtype)
        masks = None
        if name != "hyper_rnn":
            cell = cell.clone(keep=0.7)
            masks = np.random.default_rng(3).random((T, x.shape[1], cell.units)) < 0.7
        arguments = jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, carry, x))
        weight = jnp.asarray(np.random.default_rng(4).normal(size=(T, x.shape[1], cell.units)), dtype)

        def loss(*arguments):
            last, h = scan(cell, *arguments, masks)
            return jnp.vdot(weight, h) + sum(jnp.sum(jnp.sin(c)) for c in last)

        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arguments))


plain_in_double = functools.cache(lambda name: loss_and_gradients(plain_scan, name, np.float64))


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-4)])
def test_gradients_are_the_plain_scans(name, dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        got, want = loss_and_gradients(fast_scan, name, dtype), plain_in_double(name)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.max(np.abs(b))))


@pytest.fixture
def as_on_accelerators(monkeypatch):
    """Runs here what XLA compiles for GPUs and TPUs; the list tells that there was a choice."""
    chosen = []

    def choose(*arguments, cpu, accelerator):
        chosen.append(accelerator)
        return accelerator(*arguments)

    monkeypatch.setattr(platform, "choose", choose)
    return chosen


@cases
def test_gradients_in_the_accelerators_form(name, as_on_accelerators):
    """The same values and gradients to the last digits of doubles."""
    want, got = plain_in_double(name), loss_and_gradients(fast_scan, name, np.float64)
    assert as_on_accelerators
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * float(np.max(np.abs(b))))


def outcome_in_chunks_of(chunk, dtype=None):
    """The loss, the new state, the outputs, and the gradients of one layer; a chunk of None is no rematerialisation."""
    cell = CASES["ln_hyper_lstm"][0](8, **CASES["ln_hyper_lstm"][1], keep=0.7, dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (3, 10, 5))
    variables = jax.jit(FastRNN(cell).init)({"params": jax.random.key(1), "dropout": jax.random.key(2)}, x)

    def loss(v, x):
        carry, h = FastRNN(cell, remat_chunk=chunk).apply(v, x, rngs={"dropout": jax.random.key(5)})
        return jnp.sum(jnp.cos(h)), (carry, h)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables, x)


uninterrupted = functools.cache(lambda: outcome_in_chunks_of(None))


@pytest.mark.parametrize("chunk", [4, 5])
def test_rematerialisation_changes_no_number(chunk):
    for a, b in zip(*map(jax.tree.leaves, (uninterrupted(), outcome_in_chunks_of(chunk))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_accelerators_rematerialise_in_bfloat16(as_on_accelerators):
    """All options of a long run at once: as far from float32 as eight bits of mantissa are, and in its types."""
    want = uninterrupted()
    del as_on_accelerators[:]
    got = outcome_in_chunks_of(5, jnp.bfloat16)
    assert as_on_accelerators
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=0.03 * float(np.max(np.abs(b))))


def gradient_of(layer, x):
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    return jax.jit(jax.grad(lambda v, x: jnp.sum(layer.apply(v, x)[1] ** 2))).lower(variables, x)


def test_rematerialisation_needs_at_most_a_third_of_the_memory():
    cell, x = HyperLSTM(64, hyper_units=16, layer_norm=True), jnp.zeros((16, 400, 10))
    plain, remat = (
        gradient_of(FastRNN(cell, remat_chunk=c), x).compile().memory_analysis().temp_size_in_bytes for c in (None, 20)
    )
    assert remat < plain / 3


def products_in_a_step(cell, target):
    """What a time step multiplies, forward and then backward, as lowered for a platform; and all products' shapes."""
    layer, x = FastRNN(cell), jnp.zeros((5, 7, 3))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda v, x: jnp.sum(layer.apply(v, x)[1] ** 2)))
    text = gradient.trace(variables, x).lower(lowering_platforms=(target,)).as_text()
    functions = re.split(r"\n  func\.func ", text)
    shapes = [re.findall(r"dot_general.*-> tensor<(\S+)xf32>", function) for function in functions]
    loops = [s for s, function in zip(shapes, functions, strict=True) if function.startswith("private @closed_call")]
    return loops, [shape for found in shapes for shape in found]


@pytest.mark.parametrize(("target", "counts"), [("cpu", [15, 51]), ("cuda", [4, 8]), ("tpu", [4, 8])])
def test_products_in_a_time_step(target, counts):
    """Forward: with h, with h_hat for gates and for z, and of all z. XLA merges what the way back names twice."""
    loops, _ = products_in_a_step(HyperLSTM(37, hyper_units=8, layer_norm=True), target)
    assert [len(shapes) for shapes in loops] == counts


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_no_big_weight_gradient_is_formed_inside_the_loop(target):
    loops, everywhere = products_in_a_step(HyperLSTM(37, hyper_units=8), target)
    big = f"37x{4 * (37 + 8)}"
    assert len(loops) == 2
    assert everywhere.count(big) == 1
    assert not any(big in shapes for shapes in loops)


def test_gradients_take_the_place_of_their_products_on_cpus():
    """The widest arrays are x W and h W, [T, B, 4 (H + S)] each; apart from them there is little but the state."""
    steps, B, H, S = 400, 16, 64, 16
    needed = gradient_of(FastRNN(HyperLSTM(H, hyper_units=S, layer_norm=True)), jnp.zeros((B, steps, 10))).compile()
    products, state = 2 * steps * B * 4 * (H + S) * 4, steps * B * (4 * H + 2 * S) * 4
    assert needed.memory_analysis().temp_size_in_bytes < 1.25 * (products + state)


@pytest.mark.parametrize("form", ["cpu", "accelerator"])
def test_takes_any_cell(form, request):
    """A cell of the reader's own: h' = tanh(x W + h R + b), against a loop in Python and its gradients by JAX."""
    if form == "accelerator":
        request.getfixturevalue("as_on_accelerators")
    rng = np.random.default_rng(0)
    W, R, b = rng.normal(size=(3, 4)), rng.normal(size=(4, 4)), rng.normal(size=(4,))
    x = rng.normal(size=(5, 2, 3))

    def step(small, carry, xp, hp, noise):
        return carry[0] + 1, jnp.tanh(xp["w"] + hp["r"] + jnp.broadcast_to(small, xp["w"].shape))

    def ours(W, R, b, x):
        weights = Weights({"w": W}, {"r": R}, b)
        return deferred_scan(step, weights, (jnp.zeros((2, 1)), jnp.zeros((2, 4))), x)

    def loop(W, R, b, x):
        h = [jnp.zeros((2, 4))]
        for x_t in x:
            h.append(jnp.tanh(x_t @ W + h[-1] @ R + b[None]))
        return (jnp.full((2, 1), 5.0), h[-1]), jnp.stack(h[1:])

    def with_gradients(run):
        gradient = jax.grad(lambda *a: jnp.sum(jnp.sin(jnp.arange(40.0).reshape(5, 2, 4)) * run(*a)[1]), (0, 1, 2, 3))
        return run(W, R, b, x), gradient(W, R, b, x)

    with jax.enable_x64(True):
        got, want = with_gradients(ours), with_gradients(loop)
        for a, c in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, c, rtol=1e-10, atol=1e-12)
