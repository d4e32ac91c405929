"""The full dynamic hypernetwork: its definition sample by sample, and where the scaling cells coincide with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cells import perturbed

from hyperjax.recurrent import FastRNN, FullHyperLSTM, FullHyperRNN, HyperLSTM, HyperRNN

B, T, D, H, Z = 3, 5, 4, 6, 2
PAIRS = {"rnn": (HyperRNN, FullHyperRNN, [""]), "lstm": (HyperLSTM, FullHyperLSTM, list("igfo"))}
pairs = pytest.mark.parametrize("name", PAIRS)


def made(kind, seed, dtype=jnp.float64):
    cell = kind(H, hyper_units=3, embedding=Z, param_dtype=dtype)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, T, D))
    params = perturbed(jax.eval_shape(FastRNN(cell).init, jax.random.key(seed), x)["params"], seed)
    return cell, params, x


@pairs
def test_scaling_is_the_full_network_whose_matrices_differ_by_a_factor_a_column(name):
    scaling, full, gates = PAIRS[name]
    with jax.enable_x64(True):
        cell, params, x = made(scaling, 0)
        p = dict(params["cell"])
        for y in gates:
            for kind in "hx":
                W, d = p[f"W_{kind}{y}"], p.pop(f"W_d_{kind}{y}")
                p[f"W_{kind}{y}"] = np.concatenate([W * d[k] for k in range(Z)], -1)
        _, want = FastRNN(cell).apply({"params": params}, x)
        other = full(H, hyper_units=3, embedding=Z, param_dtype=jnp.float64)
        _, got = FastRNN(other).apply({"params": {"cell": p}}, x)
        np.testing.assert_allclose(got, want, rtol=1e-10)


def test_the_definition_with_a_weight_matrix_for_every_sample():
    with jax.enable_x64(True):
        cell, params, x = made(FullHyperRNN, 1)
        p = params["cell"]
        stack = {k: np.stack(np.split(p[f"W_{k}"], Z, -1)) for k in "hx"}  # [Z, rows, H]
        _, outputs = FastRNN(cell).apply({"params": params}, x)
        for b in range(B):
            h_hat, h = np.zeros(3), np.zeros(H)
            for t in range(T):
                total = h @ p["hyper_W_h"] + x[b, t] @ p["hyper_W_x"] + h_hat @ p["hyper_U"] + p["hyper_b"]
                h_hat = np.tanh(total)
                z = {k: h_hat @ p[f"W_z_{k}"] + p.get(f"b_z_{k}", 0) for k in "hxb"}
                W = {k: np.tensordot(z[k], stack[k], 1) for k in "hx"}  # W(z) = <W_z, z>
                h = np.tanh(h @ W["h"] + x[b, t] @ W["x"] + z["b"] @ p["W_d_b"] + p["b"])
                np.testing.assert_allclose(outputs[b, t], h, rtol=1e-10)


@pairs
def test_it_learns_through_every_parameter(name):
    cell, params, x = made(PAIRS[name][1], 2, jnp.float32)
    params = jax.tree.map(jnp.float32, params)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(FastRNN(cell).apply({"params": p}, x)[1] ** 2)))(params)
    for path, g in jax.tree.leaves_with_path(grads):
        assert float(jnp.max(jnp.abs(g))) > 0, path


def test_it_has_no_scales_to_read():
    cell, params, _ = made(FullHyperRNN, 0, jnp.float32)
    with pytest.raises(ValueError, match="whole matrices"):
        cell.bind({"params": params["cell"]}).generate({}, jnp.zeros((1, 3)))
