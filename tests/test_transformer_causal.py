"""No logit of a decoder knows a later token, whatever the gates; and a cache changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_transformer import random_variables

from hyperjax.transformer import Chosen, Config, Decoder, Dispatch, Encoder, EncoderDecoder, Gates, generate

L, H, N, V = 6, 2, 4, 7
SIZES = dict(vocabulary=V, layers=2, width=8, heads=H, ffn=8, length=L)
ROTARY, LEARNED = Config(**SIZES), Config(**SIZES, positions="learned", activation="swiglu")
RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, V, L)


def perturbed():
    """TEXT, and texts that differ from it at one position s, or from s on: [samples, L], and each one's s."""
    texts, since = [TEXT], [L]
    for s in range(1, L):
        for shift in (1, 2, 4):
            for end in (s + 1, L):
                changed = TEXT.copy()
                changed[s:end] = (changed[s:end] + shift) % V
                texts.append(changed)
                since.append(s)
    return np.stack(texts), np.array(since)


TEXTS, SINCE = perturbed()
B = len(TEXTS)


def alike(*shape):
    """Gates as data, some of them 0, equal for all samples: [2, B, *shape]."""
    rng = np.random.default_rng(sum(shape))
    gate = rng.uniform(0.2, 1.5, (2, 1, *shape)) * (rng.uniform(size=(2, 1, *shape)) < 0.7)
    return np.broadcast_to(gate, (2, B, *shape)).astype(np.float32)


def of_state(number, x_BLD):
    """Every gate from the state at its own position; heads, blocks and tokens are discrete choices."""
    on = (x_BLD > 0).astype(jnp.float32)
    return Gates(heads=on[..., :H], blocks=jax.nn.sigmoid(x_BLD[..., :N]) * on[..., :N], tokens=on[..., 7 - number])


def of_mean(number, x_BLD):
    """Gates from the mean over the whole sequence: what a causal model may not have."""
    return Gates(heads=jax.nn.sigmoid(3 * x_BLD.mean(1)[:, :H]))


def of_best_positions(number, x_BLD):
    """The positions with the largest score: a choice that looks ahead."""
    weight, index = jax.lax.top_k(x_BLD[..., 0], 3)
    order = jnp.argsort(index, -1)
    return Gates(tokens=Chosen(*(jnp.take_along_axis(a, order, -1) for a in (index, jax.nn.sigmoid(weight)))))


CHOSEN = Chosen(np.tile(np.array([[[0, 2, 3]], [[1, 4, 5]]]), (1, B, 1)), alike(3))
PLACES = np.stack([np.arange(B * L)[block % 2 :: 2] for block in range(N)])[None].repeat(2, 0)
DISPATCH = Dispatch(
    PLACES, np.tile(np.float32([[1, 0.5, 0], [0.3, 0, 2]]), (1, PLACES.shape[-1] // 3))[:, None].repeat(N, 1)
)
CAUSAL = {
    "none": None,
    "heads": Gates(heads=alike(L, H)),
    "heads for all": Gates(heads=alike(H)[:, 0]),
    "blocks": Gates(blocks=alike(L, N)),
    "tokens": Gates(tokens=alike(L)),
    "layer": Gates(layer=alike()),
    "all": Gates(heads=alike(L, H), blocks=alike(L, N), layer=alike()[:, 0], tokens=alike(L)),
    "of the state": of_state,
    "chosen": Gates(tokens=CHOSEN, heads=alike(L, H)),
    "dispatch": Gates(blocks=DISPATCH),
}


def first_change(out):
    """Of each text, how much its output differs from TEXT's before and from its first changed token on."""
    difference = np.abs(np.asarray(out) - np.asarray(out)[:1]).max(-1)
    before = np.arange(L) < SINCE[:, None]
    return np.where(before, difference, 0).max(), np.where(before, 0, difference).max(-1)[1:]


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("config", [ROTARY, LEARNED], ids=["rotary", "learned"])
def test_no_logit_knows_a_later_token(config, kind):
    variables = random_variables(Decoder(config), TEXTS)
    gates = CAUSAL[kind]
    out = Decoder(config).apply(variables, TEXTS, gates=gates)["logits"]
    before, after = first_change(out)
    assert before <= 1e-6
    assert np.all(after > 1e-4)  # the changes are felt where they may be


def test_an_encoder_and_a_gate_of_the_whole_text_do_know():
    variables = random_variables(Decoder(ROTARY), TEXTS)
    for gates in (of_mean, of_best_positions):
        assert first_change(Decoder(ROTARY).apply(variables, TEXTS, gates=gates)["logits"])[0] > 1e-2
    assert first_change(Encoder(ROTARY).apply(variables, TEXTS)["features"])[0] > 1e-2


def part(gates, start, stop):
    """The gates of some positions, of those of all."""
    if gates is None or callable(gates):
        return gates
    cut = {"heads": 4, "blocks": 4, "tokens": 3}
    return Gates(
        **{
            name: gate[:, :, start:stop] if gate is not None and np.ndim(gate) == cut.get(name) else gate
            for name, gate in vars(gates).items()
        }
    )


CACHED = [(ROTARY, kind) for kind in CAUSAL if kind not in ("chosen", "dispatch")] + [(LEARNED, "all")]


@pytest.mark.parametrize(("config", "kind"), CACHED, ids=[f"{config.positions}-{kind}" for config, kind in CACHED])
def test_a_cache_changes_nothing(config, kind):
    model, gates = Decoder(config), CAUSAL[kind]
    variables = random_variables(model, TEXTS)
    whole = model.apply(variables, TEXTS, gates=gates)["logits"]
    cache, at, found = model.initialize_cache(B, L), 0, []
    for size in (1, 1, 3, 1):
        out = model.apply(variables, TEXTS[:, at : at + size], cache=cache, gates=part(gates, at, at + size))
        cache, at = out["cache"], at + size
        found.append(out["logits"])
    np.testing.assert_allclose(np.concatenate(found, 1), whole, rtol=1e-4, atol=1e-5)
    assert int(cache.used) == L


def test_positions_with_0_are_not_in_the_cache():
    variables = random_variables(Decoder(ROTARY), TEXTS)
    tokens = np.ones((2, B, L), np.float32)
    tokens[1, :, 2] = 0
    out = Decoder(ROTARY).apply(variables, TEXTS, cache=Decoder(ROTARY).initialize_cache(B), gates=Gates(tokens=tokens))
    present = [np.asarray(held.present[0]) for held in out["cache"].layers]
    np.testing.assert_array_equal(present[0], [True] * 6)
    np.testing.assert_array_equal(present[1], [True, True, False, True, True, True])


def test_a_cache_with_an_encoder():
    model = EncoderDecoder(LEARNED, ROTARY)
    source, mask = TEXTS[:, ::-1], np.arange(L) < np.arange(B)[:, None] % 4 + 3
    tokens, gates = TEXTS, Gates(cross=alike(H))
    variables = random_variables(model, source, tokens)
    whole = model.apply(variables, source, tokens, mask=mask, gates=gates)

    def start(m):
        return m.decode.initialize_cache(B, L, m.encode(source, mask=mask)["features"], mask)

    cache, found = model.apply(variables, method=start), []
    for at in (0, 3):
        out = model.apply(
            variables, method=lambda m, at=at, cache=cache: m.decode(tokens[:, at : at + 3], cache=cache, gates=gates)
        )
        cache = out["cache"]
        found.append(out["logits"])
    np.testing.assert_allclose(np.concatenate(found, 1), whole["logits"], rtol=1e-4, atol=1e-5)
    other = model.apply(variables, np.where(mask, source, (source + 1) % V), tokens, mask=mask, gates=gates)
    np.testing.assert_allclose(other["logits"], whole["logits"], rtol=1e-5, atol=1e-6)  # padding is not read


def test_generate():
    model, prompt, key = Decoder(ROTARY), np.repeat(TEXTS[:1, :3], 2000, 0), jax.random.key(0)
    variables = random_variables(model, prompt)
    gates = Gates(heads=np.float32([[1, 0], [0.5, 1]]), blocks=np.float32([[1, 0, 1, 1], [0, 1, 1, 1]]))

    def drawn(temperature, key=key):
        return np.asarray(generate(model, variables, prompt, 3, key, temperature=temperature, gates=gates))

    greedy = drawn(0)
    assert greedy.dtype == np.int32
    text = np.tile(np.concatenate([prompt[0], greedy[0]]), (B, 1))
    logits = np.asarray(model.apply(variables, text, gates=gates)["logits"][0])
    np.testing.assert_array_equal(greedy, np.tile(logits.argmax(-1)[2:5], (2000, 1)))

    np.testing.assert_array_equal(drawn(2.0), drawn(2.0))
    assert np.any(drawn(2.0) != drawn(2.0, jax.random.key(1)))
    for temperature in (0.5, 2.0):
        shares = np.bincount(drawn(temperature)[:, 0], minlength=V) / 2000
        np.testing.assert_allclose(shares, jax.nn.softmax(logits[2] / temperature), atol=0.05)
