"""Bad input to a Transformer fails at once, with a line that names the value, what was expected and the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_transformer import random_variables

from hyperjax.transformer import Chosen, Config, Decoder, Dispatch, Encoder, EncoderDecoder, Gates, generate

B, L, H, V = 2, 6, 2, 7
SIZES = dict(vocabulary=V, layers=2, width=8, heads=H, ffn=8, length=L)
TOKENS = np.arange(B * L).reshape(B, L) % V
MODEL = Decoder(Config(**SIZES))
VARIABLES = random_variables(MODEL, TOKENS)
KEY = jax.random.key(0)


def one(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vocabulary=0), "vocabulary is 0"),
        (dict(vocabulary=7.5), "vocabulary is 7.5"),
        (dict(layers=2.0), "layers is 2.0"),
        (dict(width=-8), "width is -8"),
        (dict(length=True), "length is True"),
        (dict(heads=3), "heads is 3, which does not divide the width 8"),
        (dict(heads=(2, 1)), "give head_width"),
        (dict(heads=[2, 2]), r"heads is \[2, 2\], expected .* a tuple"),
        (dict(heads=(2, 2, 2), head_width=4), "heads is .* each of 2 layers"),
        (dict(heads=2.0), "heads is 2.0"),
        (dict(heads="2"), "heads is '2'"),
        (dict(cross_heads=-1), "cross_heads is -1"),
        (dict(head_width=0), "head_width is 0"),
        (dict(head_width=3), "a head is 3 wide, expected an even number"),
        (dict(ffn=(8, -8)), "ffn is .*-8"),
        (dict(outputs=0), "outputs is 0"),
        (dict(outputs=2.5), "outputs is 2.5"),
        (dict(activation="relu"), "activation is 'relu', expected gelu or swiglu"),
        (dict(positions="sine"), "positions is 'sine', expected learned or rotary"),
        (dict(dropout=1), "dropout is 1"),
        (dict(dropout=float("nan")), "dropout is nan"),
        (dict(dtype=jnp.int32), "dtype is .*int32"),
        (dict(attention_map=()), r"attention_map is \(\), expected a tuple"),
        (dict(attention_map=[0, 0]), "attention_map is .* a tuple"),
        (dict(ffn_map=(0.0, 0.0)), "ffn_map is"),
        (dict(norm_map=(0, -1)), "norm_map is"),
        (dict(ffn_map=(0, 0), ffn=(8, 4)), "ffn_map is .* the sizes 8 and 4"),
    ],
)
def test_configs(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**{**SIZES, **change})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS + 5, "tokens run from 5 to 11, expected numbers from 0 to 6"),
        (TOKENS - 1, "tokens run from -1 to 5"),
        (TOKENS[0], r"tokens have shape \(6,\)"),
        (TOKENS[:, :0], r"tokens have shape \(2, 0\)"),
        (TOKENS * 1.0, "type float64, expected an array of whole numbers"),
        (TOKENS.tolist(), "type list"),
    ],
)
def test_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        MODEL.apply(VARIABLES, tokens)
    with pytest.raises(ValueError, match=message):
        generate(MODEL, VARIABLES, tokens, 2, KEY)


def chosen(index, weight=None):
    index = np.asarray(index)
    return Gates(tokens=Chosen(np.stack([index] * 2), one(2, *(index.shape if weight is None else weight))))


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (one(2, H), "gates are ndarray, expected Gates"),
        ({"heads": one(2, H)}, "gates are dict, expected Gates"),
        (lambda number, x: one(H), "the gates of a layer are ndarray"),
        (Gates(heads=one(3, H)), r"gates.heads has shape \(3, 2\), expected .* leading axis of 2 layers"),
        (Gates(heads=one(1, H)), "leading axis of 2 layers"),
        (Gates(heads=[[1.0, 1.0], [1.0, 1.0]]), "gates.heads is list"),
        (Gates(layer=0.5), "gates.layer is float"),
        (Gates(heads=one(2, H + 1)), r"gates.heads of a layer has shape \(3,\), expected .*\(2,\) or \(2, 2\)"),
        (Gates(heads=one(2)), r"gates.heads of a layer has shape \(\)"),
        (Gates(heads=one(2, H, 1)), r"gates.heads of a layer has shape \(2, 1\)"),
        (Gates(heads=one(2, B + 1, H)), r"has shape \(3, 2\)"),
        (Gates(heads=one(2, B, L - 1, H)), r"has shape \(2, 5, 2\)"),
        (Gates(heads=one(2, B, 1, H)), r"has shape \(2, 1, 2\)"),
        (Gates(blocks=one(2, 3)), "3 blocks do not divide the 8 hidden units"),
        (Gates(blocks=one(2, 0)), "0 blocks"),
        (Gates(blocks=one(2, B + 1, 4)), r"gates.blocks of a layer has shape \(3, 4\)"),
        (Gates(blocks=(one(2, 4, 3, dtype=int), one(2, 4, 3))), "gates.blocks is tuple"),
        (Gates(blocks=Dispatch(one(2, 3, 3, dtype=int), one(2, 3, 3))), "3 blocks do not divide"),
        (Gates(blocks=Dispatch(one(2, 4, 3), one(2, 4, 3))), "a dispatch has index .* float32"),
        (Gates(blocks=Dispatch(one(2, 4, 3, dtype=int), one(2, 4, 2))), "a dispatch has index"),
        (Gates(cross=one(2, H)), "gates.cross is given, expected none"),
        (Gates(layer=one(2, B + 1)), r"gates.layer of a layer has shape \(3,\)"),
        (Gates(layer=one(2, B, L)), "gates.layer of a layer"),
        (Gates(tokens=one(B, L)), r"gates.tokens of a layer has shape \(6,\), expected .*\(2, 6\)"),
        (Gates(tokens=one(2, B, L - 1)), "gates.tokens of a layer"),
        (Gates(tokens=one(2, 1, L)), "gates.tokens of a layer"),
        (chosen([[2, 0], [1, 3]]), r"chosen positions are \[\[2, 0\], .* expected rising numbers from 0 to 5"),
        (chosen([[2, 2], [1, 3]]), "rising"),
        (chosen([[2, 9], [1, 3]]), "rising numbers from 0 to 5"),
        (chosen([[2, 4]]), r"chosen positions have shape \(1, 2\)"),
        (chosen([[0.0, 1.0], [1.0, 3.0]]), "type float64"),
        (chosen([[0, 1], [1, 3]], weight=(2, 3)), "weights of chosen positions"),
        (
            Gates(tokens=chosen([[0, 1], [1, 3]]).tokens, blocks=Dispatch(one(2, 4, 3, dtype=int), one(2, 4, 3))),
            "beside chosen positions give blocks as an array",
        ),
    ],
)
def test_gates(gates, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: MODEL.apply(v, TOKENS, gates=gates), VARIABLES)


@pytest.mark.parametrize(
    "mask", [one(B, L), one(L, dtype=bool), one(B, L - 1, dtype=bool), one(1, L, dtype=bool), one(B, 1, dtype=bool)]
)
def test_masks(mask):
    model = Encoder(MODEL.config)
    with pytest.raises(ValueError, match=r"mask has shape .* expected bool \(2, 6\), False for padding"):
        jax.eval_shape(lambda v: model.apply(v, TOKENS, mask=mask), VARIABLES)


def test_too_long_for_the_table_of_positions():
    model = Decoder(Config(**{**SIZES, "length": 4}, positions="learned"))
    variables = random_variables(model, TOKENS[:, :4])
    with pytest.raises(ValueError, match="length 6, above the 4 rows of the position table"):
        model.apply(variables, TOKENS)
    with pytest.raises(ValueError, match="size 5, above the 4 rows"):
        model.initialize_cache(B, 5)
    with pytest.raises(ValueError, match="size 5, above the 4 rows"):
        generate(model, variables, TOKENS[:, :3], 2, KEY)


@pytest.mark.parametrize(
    ("memory", "mask", "message"),
    [
        (None, None, "memory is not given, expected `memory`"),
        (one(B, 3, 9), None, r"memory has shape \(2, 3, 9\), expected \[2, length, 8\]"),
        (one(1, 3, 8), None, r"memory has shape \(1, 3, 8\)"),
        (one(B, 3, 8), one(B, 4, dtype=bool), r"memory_mask has shape \(2, 4\)"),
        (one(B, 3, 8), one(B, 3), "memory_mask .* expected bool"),
    ],
)
def test_memory(memory, mask, message):
    model = Decoder(MODEL.config, cross=True)
    variables = random_variables(model, TOKENS, memory=one(B, 3, 8))
    with pytest.raises(ValueError, match=message):
        model.apply(variables, TOKENS, memory=memory, memory_mask=mask)


def test_memory_without_cross():
    with pytest.raises(ValueError, match="cross is False and memory is given, expected none: set cross=True"):
        MODEL.apply(VARIABLES, TOKENS, memory=one(B, 3, 8))
    with pytest.raises(ValueError, match="memory has shape None"):
        MODEL.apply(VARIABLES, TOKENS, memory_mask=one(B, 3, dtype=bool))
    with pytest.raises(ValueError, match="memory is given and cross is False"):
        MODEL.apply(VARIABLES, B, 6, one(B, 3, 8), method="initialize_cache")


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (MODEL.initialize_cache(B, 4), "the cache has 4 positions, of which 0 are used, and 6 more come"),
        (MODEL.initialize_cache(B, 8)._replace(used=jnp.int32(3)), "8 positions, of which 3 are used, and 6 more"),
        (MODEL.initialize_cache(1, 8), "the cache holds 1 samples and the tokens have 2"),
        (Decoder(Config(**{**SIZES, "layers": 3})).initialize_cache(B, 8), "the cache has 3 layers and the model 2"),
    ],
)
def test_caches(cache, message):
    with pytest.raises(ValueError, match=message):
        MODEL.apply(VARIABLES, TOKENS, cache=cache)


def test_sizes_of_caches_and_what_cannot_fill_one():
    for batch, size in ((B, 0), (B, -1), (0, 8)):
        with pytest.raises(ValueError, match="expected 1 or more of both"):
            MODEL.initialize_cache(batch, size)
    with pytest.raises(ValueError, match="chosen positions cannot fill a cache"):
        MODEL.apply(VARIABLES, TOKENS, cache=MODEL.initialize_cache(B), gates=chosen([[0, 1], [1, 3]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(length=0), "length is 0"),
        (dict(length=2.5), "length is 2.5"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(gates=lambda number, x: None), "gates are a function"),
        (dict(gates=Gates(heads=one(3, H))), "leading axis of 2 layers"),
        (dict(gates=Gates(heads=one(2, B, L, H))), "gates by position are given"),
        (dict(gates=Gates(tokens=one(2, B, L))), "gates by position are given"),
        (dict(model=Encoder(MODEL.config)), "the model is Encoder, expected a Decoder without an encoder"),
        (dict(model=Decoder(MODEL.config, cross=True)), "expected a Decoder without an encoder"),
    ],
)
def test_generate(change, message):
    with pytest.raises(ValueError, match=message):
        generate(**{**dict(model=MODEL, variables=VARIABLES, prompt=TOKENS, length=2, key=KEY), **change})


@pytest.mark.parametrize("change", [dict(width=16), dict(outputs=3)])
def test_encoder_and_decoder_that_do_not_fit(change):
    model = EncoderDecoder(Config(**{**SIZES, **change}), MODEL.config)
    with pytest.raises(ValueError, match="expected equal widths and no outputs"):
        jax.eval_shape(lambda key: model.init(key, TOKENS, TOKENS), KEY)


def test_values_are_not_asked_for_in_a_trace():
    def call(tokens, index):
        gates = Gates(tokens=Chosen(index, jnp.ones((2, B, 2))))
        return MODEL.apply(VARIABLES, tokens, gates=gates)["logits"]

    assert jax.eval_shape(call, TOKENS, np.zeros((2, B, 2), int)).shape == (B, L, V)
