"""Counts of operations against XLA's of the compiled function, and shares that gates leave against closed forms."""

import dataclasses

import jax
import numpy as np
import pytest
from numpy_transformer import random_variables

from hyperjax.pruning import Buckets, BucketServer, Experts, MixtureOfDepths, costs, cut, share
from hyperjax.pruning.experts import places
from hyperjax.transformer import Config, Decoder, Encoder, Gates

B, L, H, N = 2, 32, 2, 4
SIZES = dict(vocabulary=11, layers=2, width=32, heads=H, ffn=64, length=L)
C = Config(**SIZES)
TOKENS = np.random.default_rng(0).integers(0, 11, (B, L))
RAGGED = dict(layers=3, heads=(2, 0, 1), ffn=(64, 16, 0), head_width=16)
GATES = Gates(heads=np.float32([[1, 0], [0.5, 1]]), blocks=np.float32([[1, 0, 0, 1], [0, 0, 0.3, 0]]))


def flops(fn, *args):
    """What XLA counts for one sample; of the arguments only the shapes."""
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"] / B


def shapes_of(model, *inputs):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))


def whole_flops(model):
    return flops(lambda v, t: model.apply(v, t)["logits"], shapes_of(model, TOKENS), TOKENS)


@pytest.mark.parametrize(
    ("changes", "causal"),
    [
        ({}, True),
        ({"activation": "swiglu", "positions": "learned"}, True),
        ({"outputs": 3, "positions": "learned"}, False),
        ({"outputs": 3, "activation": "swiglu"}, False),
        (RAGGED, True),
    ],
    ids=["gelu rotary decoder", "swiglu learned decoder", "gelu learned encoder", "swiglu rotary encoder", "ragged"],
)
def test_costs_agree_with_xla(changes, causal):
    config = dataclasses.replace(C, **changes)
    model = (Decoder if causal else Encoder)(config)
    assert costs(config, L, causal=causal).total == pytest.approx(whole_flops(model), rel=0.05)


def test_costs_of_what_is_cut_out_agree_with_xla():
    small, params = cut(C, random_variables(Decoder(C), TOKENS)["params"], GATES)
    assert (small.heads, small.ffn) == ((1, 2), (32, 16))
    counted = flops(lambda p, t: Decoder(small).apply({"params": p}, t)["logits"], params, TOKENS)
    assert costs(small, L).total == pytest.approx(counted, rel=0.05)
    opened = jax.tree.map(lambda gate: (gate > 0).astype(np.float32), GATES)
    assert share(costs(C, L), opened) == pytest.approx(costs(small, L).total / costs(C, L).total, rel=1e-6)


def test_costs_of_decoding_agree_with_xla():
    cache = Decoder(C).initialize_cache(B, L)
    variables = shapes_of(Decoder(C), TOKENS)
    counted = flops(lambda v, t, c: Decoder(C).apply(v, t, cache=c)["logits"], variables, TOKENS[:, :8], cache)
    assert costs(C, 8, cached=L).total == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("causal", [True, False])
def test_share_of_mixture_of_depths_agrees_with_xla(causal):
    config = dataclasses.replace(C, outputs=3)
    model = MixtureOfDepths(config, causal=causal, keep=0.25)
    variables, key = shapes_of(model, TOKENS), jax.random.key(0)
    counted = flops(lambda v, t, k: model.apply(v, t, k)["logits"], variables, TOKENS, key)
    promised = jax.jit(lambda v, t, k: model.apply(v, t, k)["share"])(random_variables(model, TOKENS), TOKENS, key)
    assert promised.shape == (B,)
    np.testing.assert_allclose(promised * costs(config, L, causal=causal).total, counted, rtol=0.05)


def test_share_of_experts_agrees_with_xla():
    model = Experts(C, blocks=N, keep=1, capacity=1.25)
    counted = flops(lambda v, t, k: model.apply(v, t, k)["logits"], shapes_of(model, TOKENS), TOKENS, jax.random.key(0))
    whole, held = costs(C, L), places((B, L, N), 1, 1.25)
    assert held == 20  # 1.25 of B L / N
    units = sum(f * u for f, u in zip(whole.units, whole.unit, strict=True))  # of all blocks at all positions
    assert whole.total - units * (1 - held / (B * L)) == pytest.approx(counted, rel=0.05)
    promised = jax.jit(lambda v, t: model.apply(v, t)["share"])(random_variables(model, TOKENS), TOKENS)
    assert promised * whole.total == pytest.approx(whole.total - units * (1 - 1 / N), rel=1e-6)  # k of N blocks


@pytest.mark.parametrize("causal", [True, False])
def test_shares_of_buckets_are_those_of_models_of_their_widths(causal):
    config, prompt = dataclasses.replace(C, layers=3, outputs=3), 8
    model = Buckets(config, causal=causal, shares=(0.5, 1.0), blocks=N, prompt=prompt)
    server = BucketServer(model, random_variables(model, TOKENS))
    whole = costs(config, L, causal=causal).total
    for native, promised in zip(server._models, model.costs(L), strict=True):
        if causal:  # the prompt at full width
            found = costs(config, prompt, cached=L).total + costs(native.config, L - prompt, cached=L).total
        else:
            found = costs(native.config, L, causal=False).total
        assert promised == pytest.approx(found / whole, rel=1e-5)
    narrow = server._models[0]
    assert narrow.config.heads == (2, 1, 1)
    assert narrow.config.ffn == (64, 32, 32)
    assert costs(narrow.config, L, causal=causal).total == pytest.approx(whole_flops(narrow), rel=0.05)


def parts(length=L, cached=None):
    """Operations by kind, all layers together, and all."""
    c = costs(C, length, cached=cached)
    heads = sum(h * a for h, a in zip(c.heads, c.attention, strict=True))
    scores = sum(h * s for h, s in zip(c.heads, c.scores, strict=True))
    units = sum(f * u for f, u in zip(c.units, c.unit, strict=True))
    return heads, scores, units, sum(c.layer), c.total


def of(all_keys=False, mask=None, **gates):
    return share(costs(C, L), Gates(**gates), mask, all_keys=all_keys)


def test_share_by_closed_forms():
    heads, scores, units, rest, total = parts()
    ones = dict(heads=np.ones((2, H)), blocks=np.ones((2, N)), layer=np.ones(2), tokens=np.ones((2, B, L)))
    np.testing.assert_allclose(of(**ones), np.ones(B), rtol=1e-6)
    assert of() == pytest.approx(1)
    assert of(heads=np.full((2, H), 0.25)) == pytest.approx(1 - 0.75 * (heads + scores) / total)
    assert of(blocks=np.eye(2, N)) == pytest.approx(1 - 0.75 * units / total)
    assert of(layer=np.zeros(2)) == pytest.approx(costs(C, L).fixed / total)
    assert of(layer=np.float32([1, 0])) == pytest.approx(1 - (heads + scores + units + rest) / 2 / total)
    by_sample = of(blocks=np.float32([[1, 0], [0, 1]])[..., None].repeat(N, -1))
    np.testing.assert_allclose(by_sample, [1 - units / 2 / total] * 2, rtol=1e-6)
    by_token = of(heads=np.zeros((2, B, L, H)), all_keys=True)  # keys and values are there, as a later one may ask
    np.testing.assert_allclose(by_token, 1 - (heads / 2 + scores) / total, rtol=1e-6)


def test_share_of_positions_is_that_of_a_shorter_text():
    taken = np.float32((np.arange(L) >= 3) & (np.arange(L) < 15))[None, None].repeat(2, 0)
    heads, scores, units, rest, _ = parts(12)
    wanted = (costs(C, L).fixed + heads + scores + units + rest) / costs(C, L).total
    np.testing.assert_allclose(of(tokens=taken), wanted, rtol=1e-6)
    # of what takes part, half of the heads and no block: gates elsewhere do not matter
    first = np.float32([1, 0])
    inner = dict(heads=1 - taken[..., None] * first, blocks=1 - taken[..., None].repeat(N, -1))
    wanted = (costs(C, L).fixed + heads / 2 + scores / 2 + rest) / costs(C, L).total
    np.testing.assert_allclose(of(tokens=taken, **inner), wanted, rtol=1e-6)
    wanted = (costs(C, L).fixed + heads + scores + rest) / costs(C, L).total
    by_sample = of(tokens=taken, heads=np.ones((2, 1, H)), blocks=np.zeros((2, 1, N)))
    np.testing.assert_allclose(by_sample, wanted, rtol=1e-6)


def test_padding_does_not_count_in_a_share():
    mask = np.arange(L) < np.array([[L], [8]])
    _, _, units, _, total = parts()
    blocks = np.float32(np.arange(L) < 4)[None, None, :, None] * np.ones((2, B, 1, N), np.float32)
    expected = 1 - units / total * np.array([1 - 4 / L, 1 - 4 / 8])
    np.testing.assert_allclose(of(blocks=blocks, mask=mask), expected, rtol=1e-6)
    np.testing.assert_allclose(of(blocks=blocks * mask[None, :, :, None], mask=mask), expected, rtol=1e-6)
    np.testing.assert_allclose(of(blocks=blocks), 1 - units / total * (1 - 4 / L), rtol=1e-6)


def test_share_is_differentiable():
    heads, scores, units, _, total = parts()
    gates = Gates(heads=np.full((2, H), 0.5), blocks=np.full((2, N), 0.5), layer=np.float64([1, 0.5]))
    found = jax.jit(jax.grad(lambda gates: share(costs(C, L), gates)))(gates)
    wanted = (heads + scores) / (2 * H) / total * np.float32([[1, 1], [0.5, 0.5]])
    np.testing.assert_allclose(found.heads, wanted, rtol=1e-5)
    np.testing.assert_allclose(found.blocks, units / (2 * N) / total * np.array([[1], [0.5]]).repeat(N, 1), rtol=1e-5)
    tokens = jax.jit(jax.grad(lambda gate: of(tokens=gate).sum()))(np.full((2, B, L), 0.5))
    assert np.all(tokens > 0)
