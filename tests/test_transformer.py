"""Encoder, decoder and both against the NumPy reference: every part, every gate, every map."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer as reference
import pytest
from numpy_transformer import numpy_of, random_variables

from hyperjax.transformer import Chosen, Config, Decoder, Dispatch, Encoder, EncoderDecoder, FeedForward, Gates

RNG = np.random.default_rng(0)
B, L, H, N, V = 2, 6, 2, 4, 7
SIZES = dict(vocabulary=V, layers=2, width=8, heads=H, ffn=8, length=L)
TOKENS = RNG.integers(0, V, (B, L))
MASK = np.arange(L) < np.array([[6], [4]])


def assert_equal(got, wanted, rtol=2e-4, atol=1e-4):
    """Compares all that the reference computes, layer by layer."""
    for name in wanted:
        if name == "layers":
            for mine, theirs in zip(got["layers"], wanted["layers"], strict=True):
                for part in theirs:
                    np.testing.assert_allclose(mine[part], np.stack(theirs[part]), rtol=rtol, atol=atol, err_msg=part)
        else:
            np.testing.assert_allclose(got[name], np.stack(wanted[name]), rtol=rtol, atol=atol, err_msg=name)


def some(*shape):
    return np.round(np.random.default_rng(sum(shape)).uniform(0.2, 1.5, (2, *shape)), 2).astype(np.float32)


TOKENS_GATE = some(B, L) * np.random.default_rng(3).integers(0, 2, (2, B, L)).astype(np.float32)
POSITIONS = np.array([[[0, 2, 3], [1, 4, 5]], [[2, 3, 4], [0, 1, 5]]])
PLACES = np.random.default_rng(4).integers(0, B * L, (2, N, 5))
PLACE_WEIGHTS = some(N, 5) * np.array([1, 1, 0, 1, 0], np.float32)[None, None]
GATES = {
    "none": {},
    "heads": {"heads": some(H)},
    "heads by sample": {"heads": some(B, H)},
    "heads by position": {"heads": some(B, L, H)},
    "blocks": {"blocks": some(N)},
    "blocks by sample": {"blocks": some(B, N)},
    "blocks by position": {"blocks": some(B, L, N)},
    "layer": {"layer": some()},
    "layer by sample": {"layer": some(B)},
    "tokens": {"tokens": TOKENS_GATE},
    "chosen": {"tokens": (POSITIONS, some(B, 3)), "heads": some(B, L, H), "blocks": some(B, N)},
    "dispatch": {"blocks": (PLACES, PLACE_WEIGHTS)},
    "all": {"heads": some(B, L, H), "blocks": some(B, L, N), "layer": some(B), "tokens": TOKENS_GATE},
}


def as_gates(gates):
    """For the library."""
    plans = {"tokens": Chosen, "blocks": Dispatch}
    return Gates(**{name: plans[name](*g) if isinstance(g, tuple) else g for name, g in gates.items()})


def as_numpy(gates):
    """For the reference, which has dispatches as the gates that they stand for."""
    if isinstance(gates.get("blocks"), tuple):
        plans = zip(*gates["blocks"], strict=True)
        return {**gates, "blocks": np.stack([reference.dispatched(*plan, B, L) for plan in plans])}
    return gates


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_encoder_with_padding(positions, kind):
    config = Config(**SIZES, positions=positions, outputs=3, activation="gelu" if positions == "rotary" else "swiglu")
    model = Encoder(config)
    variables = random_variables(model, TOKENS)
    got = model.apply(variables, TOKENS, mask=MASK, gates=as_gates(GATES[kind]))
    wanted = reference.encoder(numpy_of(variables), config, TOKENS, MASK, as_numpy(GATES[kind]))
    np.testing.assert_allclose(got["logits"], wanted["logits"], rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(got["features"][MASK], np.stack(wanted["features"])[MASK], rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("kind", GATES)
def test_decoder(kind):
    activation, positions = ("swiglu", "rotary") if "heads" in kind else ("gelu", "learned")
    config = Config(**SIZES, positions=positions, activation=activation)
    model = Decoder(config)
    variables = random_variables(model, TOKENS)
    got = model.apply(variables, TOKENS, gates=as_gates(GATES[kind]))
    wanted = reference.decoder(numpy_of(variables), config, TOKENS, as_numpy(GATES[kind]))
    if "tokens" in GATES[kind]:  # the updates of positions left out are nobody's
        wanted["layers"] = [{"state": done["state"]} for done in wanted["layers"]]
    assert_equal(got, wanted)
    assert set(got) == {"features", "logits", "embedded", "layers"}
    assert [set(done) for done in got["layers"]] == [{"attention", "ffn", "state"}] * 2


@pytest.mark.parametrize("shape", [(H,), (B, H), (B, L, H)])
def test_encoder_decoder(shape):
    configs = Config(**SIZES, activation="swiglu"), Config(**SIZES, positions="learned", cross_heads=H)
    model, source = EncoderDecoder(*configs), TOKENS[:, ::-1]
    variables = random_variables(model, source, TOKENS)
    gates, encoder_gates = {"cross": some(*shape), "layer": some()}, {"heads": some(B, H)}
    got = model.apply(
        variables, source, TOKENS, mask=MASK, encoder_gates=as_gates(encoder_gates), gates=as_gates(gates)
    )
    wanted = reference.encoder_decoder(numpy_of(variables), configs, source, TOKENS, MASK, encoder_gates, gates)
    assert_equal(got, wanted)
    assert set(got["layers"][0]) == {"attention", "cross", "ffn", "state"}
    assert set(got["encoder"]) == {"features", "embedded", "layers"}


def test_ragged_layers_and_layers_without_a_part():
    sizes = {**SIZES, "layers": 3, "heads": (2, 0, 1), "ffn": (8, 4, 0), "head_width": 6}
    config = Config(**sizes, cross_heads=(0, 1, 2))
    model, memory = Decoder(config, cross=True), some(L, 8)
    variables = random_variables(model, TOKENS, memory=memory)
    got = model.apply(variables, TOKENS, memory=memory, memory_mask=MASK)
    assert_equal(got, reference.decoder(numpy_of(variables), config, TOKENS, None, memory, MASK))
    assert [set(done) - {"state"} for done in got["layers"]] == [
        {"attention", "ffn"},
        {"cross", "ffn"},
        {"attention", "cross"},
    ]
    assert (
        set(variables["params"]["stack"]) & {"attention_1", "attention_norm_1", "ffn_2", "cross_attention_0"} == set()
    )

    def gates(number, _):  # by layer, since no array fits layers of unequal heads
        return Gates(heads=np.zeros(sizes["heads"][number], np.float32), blocks=np.zeros(2, np.float32))

    got = model.apply(variables, TOKENS, memory=memory, gates=gates)["layers"]
    assert not np.any(got[0]["attention"])
    assert not np.any(got[1]["ffn"])
    assert np.any(got[1]["cross"])


def test_layers_that_share_weights():
    sizes, maps = {**SIZES, "layers": 3}, {"attention": (0, 0, 1), "ffn": (1, 0, 1), "norm": (2, 2, 2)}
    shared, own = Config(**sizes, **{f"{kind}_map": numbers for kind, numbers in maps.items()}), Config(**sizes)
    variables = random_variables(Decoder(shared), TOKENS)
    assert_equal(Decoder(shared).apply(variables, TOKENS), reference.decoder(numpy_of(variables), shared, TOKENS))
    tied = variables["params"]["stack"]
    parts = {"attention": "attention", "ffn": "ffn", "attention_norm": "norm", "ffn_norm": "norm"}
    numbers = {part: maps[kind] for part, kind in parts.items()}
    assert set(tied) == {f"{part}_{n}" for part in parts for n in numbers[part]}  # each once
    copies = {f"{part}_{layer}": tied[f"{part}_{n}"] for part in parts for layer, n in enumerate(numbers[part])}

    def gradient(config, stack):
        def loss(stack):
            given = {"params": {**variables["params"], "stack": stack}}
            return (Decoder(config).apply(given, TOKENS)["logits"] ** 2).mean()

        return jax.jit(jax.grad(loss))(stack)

    summed, by_use = gradient(shared, tied), gradient(own, copies)
    for name in tied:
        part, number = name.rsplit("_", 1)
        uses = [by_use[f"{part}_{layer}"] for layer, n in enumerate(numbers[part]) if n == int(number)]
        total = jax.tree.map(lambda *leaves: sum(leaves), *uses)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), summed[name], total)


def test_a_block_alone_is_the_network_cut_out():
    module, x = FeedForward(8, 8, "swiglu"), jnp.asarray(some(B, L, 8)[0])
    variables = random_variables(module, x)
    kernels = variables["params"]
    cut = {"up": kernels["up"][:, 2:4], "gate": kernels["gate"][:, 2:4], "down": kernels["down"][2:4]}
    alone = FeedForward(2, 8, "swiglu").apply({"params": cut}, x)
    np.testing.assert_allclose(module.apply(variables, x, np.eye(4, dtype=np.float32)[1]), alone, rtol=1e-5, atol=1e-5)
    everywhere = Dispatch(np.arange(B * L)[None].repeat(4, 0), np.eye(4, dtype=np.float32)[1][:, None].repeat(B * L, 1))
    np.testing.assert_allclose(module.apply(variables, x, everywhere), alone, rtol=1e-5, atol=1e-5)
