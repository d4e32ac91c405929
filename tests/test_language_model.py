"""The character language model: the published parameter counts, its inputs, its state, its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.recurrent import CELLS, PAPER_MODELS, LanguageModel, generated_scales

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
        ({"input_units": -1}, "input_units is -1; choose a width, or 0"),
        ({"tied": True}, "tied is True, but there is no embedding"),
        ({"skip": "dense"}, "unknown skip 'dense'; choose one of none, residual, highway"),
        ({"cell": "lstm", "gate_input": True}, "gate_input is True, but the cell 'lstm' is no HyperLSTM"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(**{"cell": "hyper_lstm", "vocabulary": 5, "units": 4} | fields).initialize_carry(1)


def outputs(model, params, tokens, key=None):
    rngs = {} if key is None else {"dropout": jax.random.key(key)}
    return model.apply({"params": params}, tokens, deterministic=key is None, rngs=rngs)


def initialized(**fields):
    model = LanguageModel(**{"cell": "ln_hyper_lstm", "vocabulary": 7, "units": 8, "hyper_units": 4} | fields)
    tokens = jax.random.randint(jax.random.key(0), (3, 6), 0, 7)
    return model, jax.jit(model.init)(jax.random.key(1), tokens)["params"], tokens


def test_a_learned_embedding_is_one_hot_with_its_product_taken_into_w_x():
    model, params, tokens = initialized(cell="lstm", input_units=4)
    cell = params["layer_0"]["cell"]
    merged = cell | {name: params["embedding"] @ w for name, w in cell.items() if name.startswith("W_x")}
    plain = {"layer_0": {"cell": merged}, "readout": params["readout"]}
    one_hot = LanguageModel("lstm", 7, 8)
    np.testing.assert_allclose(
        outputs(model, params, tokens)["logits"], outputs(one_hot, plain, tokens)["logits"], atol=1e-5
    )
    assert np.all(np.isfinite(outputs(model, params, -np.ones_like(tokens))["logits"]))


@pytest.mark.parametrize(("width", "parameters"), [(8, 7), (5, 7 + 8 * 5 + 5)])
def test_a_tied_readout_costs_a_bias_and_where_the_widths_differ_a_projection(width, parameters):
    model, params, tokens = initialized(input_units=width, tied=True)
    outside = {k: v for k, v in params.items() if k not in ("layer_0", "embedding")}
    assert sum(a.size for a in jax.tree.leaves(outside)) == parameters
    out = outputs(model, params, tokens)
    h = out["hidden"][-1]
    if width != 8:
        h = h @ params["projection"]["kernel"] + params["projection"]["bias"].reshape(1, 1, -1)
    np.testing.assert_allclose(out["logits"], h @ params["embedding"].T, atol=1e-5)


@pytest.mark.parametrize("skip", ["residual", "highway"])
def test_skips_join_a_layers_input_to_its_output(skip):
    model, params, tokens = initialized(layers=2, skip=skip)
    first, second = outputs(model, params, tokens)["hidden"]
    without = {k: v for k, v in params.items() if k != "highway_1"}
    below, alone = outputs(model.clone(skip="none"), without, tokens)["hidden"]
    np.testing.assert_array_equal(first, below)
    share = 1.0
    if skip == "highway":
        share = jax.nn.sigmoid(first @ params["highway_1"]["kernel"] + params["highway_1"]["bias"].reshape(1, 1, -1))
    expected = first + alone if skip == "residual" else share * alone + (1 - share) * first
    np.testing.assert_allclose(second, expected, atol=1e-6)


def test_variational_dropout_drops_the_same_units_at_every_step():
    model, params, tokens = initialized(keep=0.5, variational=True)
    same = outputs(model, params, tokens, key=3)["hidden"][0] == 0
    assert same.any()
    assert np.all(same == same[:, :1])
    anew = outputs(model.clone(variational=False), params, tokens, key=3)["hidden"][0] == 0
    assert np.any(anew != anew[:, :1])
    cell = model.make_cell(deterministic=False)
    masks = cell.masks(jax.random.key(0), jnp.arange(5), 3)
    assert masks.shape == (5, 3, 8)
    assert np.all(masks == masks[:1])
    assert not np.all(masks)


def test_weight_dropout_drops_entries_of_the_recurrent_matrices_and_nothing_when_deterministic():
    model, params, tokens = initialized(cell="lstm", weight_keep=0.5)
    plain = model.clone(weight_keep=1.0)
    np.testing.assert_array_equal(outputs(model, params, tokens)["logits"], outputs(plain, params, tokens)["logits"])
    a, b = (outputs(model, params, tokens, key)["logits"] for key in (1, 2))
    assert np.any(a != b)
    np.testing.assert_array_equal(a[:, 0], outputs(plain, params, tokens)["logits"][:, 0])  # h is 0 before the text

    def loss(params):
        return jnp.sum(jnp.sin(outputs(model, params, tokens, key=1)["logits"]))

    gradient = jax.grad(loss)(params)["layer_0"]["cell"]
    dropped = [float(np.mean(gradient[name] == 0)) for name in gradient if name.startswith("W_h")]
    assert len(dropped) == 4
    assert all(0.2 < share < 0.8 for share in dropped)
    assert all(np.mean(gradient[name] == 0) < 0.2 for name in ("W_xi", "W_xg"))


def test_generated_scales_are_those_of_a_model_with_every_option():
    options = {"input_units": 5, "tied": True, "skip": "residual", "gate_input": True, "layers": 2}
    model, params, tokens = initialized(**options)
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    h = {name: generated_scales(model, params, tokens[0])[name]["hi"] for name in ("layer_0", "layer_1")}
    half, carry = tokens[0, :3], outputs(model, params, tokens[:1, :3])["carry"]
    for name, n in (("layer_0", 0), ("layer_1", 1)):
        z = params[name]["cell"]
        h_hat = carry[n][3]
        want = (h_hat @ z["W_z_h"][:, :4] + z["b_z_h"][:4].reshape(1, -1)) @ z["W_d_hi"]
        np.testing.assert_allclose(h[name][half.size - 1], want[0], atol=1e-5)
