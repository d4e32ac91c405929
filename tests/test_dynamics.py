"""The scales that hyper cells generate, against the NumPy reference run step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_cells
import pytest

from hyperjax.recurrent import LanguageModel
from hyperjax.recurrent.dynamics import generated_scales, scale_changes

V, H = 5, 6
IDS = np.array([-1, 3, 0, 0, 4, 2, 1, 3, 3])
cells = pytest.mark.parametrize("cell", ["hyper_rnn", "hyper_lstm", "ln_hyper_lstm"])


@functools.cache
def make(cell, layers=2):
    model = LanguageModel(cell, vocabulary=V, units=H, layers=layers, hyper_units=4, embedding=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(2)
    return model, jax.tree.map(lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), jnp.float32), shapes)


def reference(model, params, carry):
    """Layer -> kind and gate -> [N, H], and the same before the first character [H], in float64."""
    kind, gates, hat = (
        (numpy_cells.hyper_rnn, "", 0) if model.cell == "hyper_rnn" else (numpy_cells.hyper_lstm, "igfo", 3)
    )
    params, carry = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, carry))
    inputs = np.stack([np.eye(V)[n] if n >= 0 else np.zeros(V) for n in IDS])[:, None]
    scales, before = {}, {}
    for n in range(model.layers):
        p, state = params[f"layer_{n}"]["cell"], carry[n]
        names = list(gates) or [""]
        rows, outputs = [], []

        def generated(state, p=p, names=names):
            return {k + y: d[0] for (k, y), d in numpy_cells.generated(p, state[hat], names).items()}

        before[f"layer_{n}"] = generated(state)
        for x in inputs:
            state = kind(p, state, x)
            rows.append(generated(state))
            outputs.append(state[1])
        scales[f"layer_{n}"] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        inputs = np.stack(outputs)
    return scales, before


def some_carry(model):
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), jnp.float32), model.initialize_carry(1))


@cells
@pytest.mark.parametrize("carried", [True, False])
def test_scales_and_changes_are_those_of_the_reference(cell, carried):
    model, params = make(cell)
    carry = some_carry(model) if carried else None
    want, before = reference(model, params, carry if carried else model.initialize_carry(1))
    got = generated_scales(model, params, IDS, carry)
    changes = scale_changes(model, params, IDS, carry)
    gates = [""] if cell == "hyper_rnn" else list("igfo")
    assert set(got) == set(changes) == {"layer_0", "layer_1"}
    for layer in got:
        assert set(got[layer]) == {kind + y for kind in "hxb" for y in gates}
        assert list(changes[layer]) == gates
        for name, d_NH in got[layer].items():
            assert d_NH.shape == (len(IDS), H)
            assert d_NH.dtype == jnp.float32
            np.testing.assert_allclose(d_NH, want[layer][name], rtol=2e-4, atol=2e-5)
        for y in gates:
            path = np.concatenate([before[layer]["h" + y][None], want[layer]["h" + y]])
            expected = np.sqrt((np.diff(path, axis=0) ** 2).sum(-1))
            assert changes[layer][y].shape == (len(IDS),)
            np.testing.assert_allclose(changes[layer][y], expected, rtol=2e-3, atol=2e-4)


def test_no_jit_gives_the_same_scales():
    model, params = make("hyper_rnn", layers=1)
    compiled = generated_scales(model, params, IDS[:3])
    with jax.disable_jit():
        eager = generated_scales(model, params, IDS[:3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), eager, compiled)


@cells
def test_a_text_may_be_read_in_parts(cell):
    model, params = make(cell)
    carry = jax.jit(model.apply)({"params": params}, jnp.asarray(IDS[None, :4]))["carry"]
    for read in (generated_scales, scale_changes):
        whole, first, rest = (read(model, params, *a) for a in ((IDS,), (IDS[:4],), (IDS[4:], carry)))
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), first, rest)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), joined, whole)


def test_a_new_model_scales_by_a_tenth_whatever_it_reads():
    model = LanguageModel("hyper_lstm", vocabulary=V, units=H, hyper_units=4, embedding=3)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    for name, d_NH in generated_scales(model, params, IDS)["layer_0"].items():
        np.testing.assert_allclose(d_NH, 0.0 if name.startswith("b") else 0.1, rtol=1e-6)
    for moved_N in scale_changes(model, params, IDS)["layer_0"].values():
        np.testing.assert_array_equal(moved_N, 0)


@pytest.mark.parametrize(
    ("cell", "change", "message"),
    [
        ("lstm", {}, "the cell 'lstm' generates no scales; use a model of hyper_rnn"),
        ("ln_lstm", {}, "the cell 'ln_lstm' generates no scales"),
        ("hyper_lstm", {"ids": []}, r"ids have shape \(0,\)"),
        ("hyper_lstm", {"ids": [[1, 2]]}, r"ids have shape \(1, 2\)"),
        ("hyper_lstm", {"ids": [1.0]}, "type float64"),
        ("hyper_lstm", {"ids": [0, V]}, r"ids span 0\.\.5; give ids 0\.\.4"),
        ("hyper_lstm", {"ids": [-2, 1]}, r"ids span -2\.\.1"),
        ("hyper_lstm", {"carry": ((jnp.zeros((2, H)),) * 4,)}, "carry has shapes"),
    ],
)
@pytest.mark.parametrize("read", [generated_scales, scale_changes])
def test_bad_input(read, cell, change, message):
    model = LanguageModel(cell, vocabulary=V, units=H, hyper_units=4)  # refused before the parameters are looked at
    with pytest.raises(ValueError, match=message):
        read(model, {}, **{"ids": IDS} | change)
