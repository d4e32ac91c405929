"""The character language model: the published parameter counts, its inputs, its state, its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.recurrent import CELLS, PAPER_MODELS, LanguageModel

# Ha, Dai, Le, arXiv 1609.09106, Table 3, counted exactly for 50 one-hot symbols.
COUNTS = {
    "lstm": 4_254_050,
    "lstm_1250": 6_567_550,
    "lstm_2x1000": 12_258_050,
    "ln_lstm": 4_264_050,
    "hyper_lstm": 4_911_874,
    "ln_hyper_lstm": 4_923_154,
    "ln_hyper_lstm_large": 5_085_682,
    "ln_hyper_lstm_2x": 14_407_714,
}
TOKENS = jax.random.randint(jax.random.key(0), (3, 7), 0, 11)


@pytest.mark.parametrize("row", COUNTS)
def test_parameter_counts_of_table_3(row):
    model = LanguageModel(vocabulary=50, **PAPER_MODELS[row])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 3), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[row]


def test_table_3_is_complete_and_in_order():
    assert list(PAPER_MODELS) == list(COUNTS)


@pytest.mark.parametrize("cell", CELLS)
def test_state_carried_over_makes_two_windows_one_text(cell):
    model = LanguageModel(cell, 11, 8, layers=2, hyper_units=4)
    params = jax.jit(model.init)(jax.random.key(1), TOKENS)
    apply = jax.jit(lambda tokens, carry: model.apply(params, tokens, carry))
    whole = apply(TOKENS, model.initialize_carry(3))
    first = apply(TOKENS[:, :4], model.initialize_carry(3))
    second = apply(TOKENS[:, 4:], first["carry"])
    assert whole["logits"].shape == (3, 7, 11)
    assert [h.shape for h in whole["hidden"]] == [(3, 7, 8)] * 2
    np.testing.assert_allclose(
        jnp.concatenate([first["logits"], second["logits"]], 1), whole["logits"], rtol=1e-5, atol=1e-5
    )


def test_minus_one_is_no_symbol():
    model = LanguageModel("lstm", 11, 8)
    params = model.init(jax.random.key(1), TOKENS)["params"]
    blind = {**params, "layer_0": jax.tree.map(lambda p: p, params["layer_0"])}
    blind["layer_0"]["cell"] |= {f"W_x{y}": jnp.zeros((11, 8)) for y in "igfo"}
    start = jnp.full((1, 1), -1)
    np.testing.assert_array_equal(
        model.apply({"params": params}, start)["logits"], model.apply({"params": blind}, start)["logits"]
    )
    assert not np.allclose(
        model.apply({"params": params}, start)["logits"], model.apply({"params": params}, start + 1)["logits"]
    )


def test_dropout_acts_on_input_recurrence_and_output_alike():
    """At the first step of an LSTM with its initial zero biases: c = s(i) mask tanh(g), and g = 0 without an input."""
    model, tokens = LanguageModel("lstm", 11, 200, keep=0.5), jnp.full((300, 1), 3)
    params = jax.jit(model.init)(jax.random.key(1), tokens)

    @jax.jit
    def apply(key):
        return model.apply(params, tokens, deterministic=False, rngs={"dropout": jax.random.key(key)})

    out = apply(0)
    c, h = out["carry"][0][0], out["hidden"][0][:, 0]
    silent = jnp.all(c == 0, -1)
    assert 0.4 < float(jnp.mean(silent)) < 0.6  # the input symbol was dropped
    assert 0.45 < float(jnp.mean(c[~silent] == 0)) < 0.55  # the candidate was
    assert 0.70 < float(jnp.mean(h[~silent] == 0)) < 0.80  # the output was, or the candidate
    np.testing.assert_array_equal(apply(0)["logits"], out["logits"])
    assert not np.allclose(apply(1)["logits"], out["logits"])
    with pytest.raises(Exception, match="dropout"):
        model.apply(params, tokens, deterministic=False)


def test_bfloat16_gives_float32_logits_and_state():
    model = LanguageModel("ln_lstm", 11, 8, dtype="bfloat16")
    variables = model.init(jax.random.key(1), TOKENS)
    out = model.apply(variables, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves((out, variables))} == {jnp.dtype("float32")}
    exact = LanguageModel("ln_lstm", 11, 8).apply(variables, TOKENS)["logits"]
    np.testing.assert_allclose(out["logits"], exact, atol=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cell": "gru"}, "unknown cell 'gru'; choose one of lstm, "),
        ({"vocabulary": 0}, "vocabulary is 0"),
        ({"layers": 0}, "layers is 0"),
        ({"units": -3}, "units is -3"),
        ({"keep": 0.0}, r"keep is 0.0.*\(0, 1\]"),
        ({"hyper_units": 0}, "hyper_units is 0"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(**{"cell": "hyper_lstm", "vocabulary": 5, "units": 4} | fields).initialize_carry(1)
